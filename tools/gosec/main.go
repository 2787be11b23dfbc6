// Gosec looks for common faults of security in the packages of the directories that it is given,
// and fails if it finds any. Its rules are gosec's. Its own command would bring the clients of
// several web services along, which take minutes to compile.
package main

import (
	"fmt"
	"io"
	"log"
	"os"
	"runtime"

	"github.com/securego/gosec/v2"
	"github.com/securego/gosec/v2/analyzers"
	"github.com/securego/gosec/v2/rules"
)

// excluded are the rules that do not apply here, and why.
var excluded = []string{
	// unsafe: system calls that Go has no wrapper for; each is a few lines, in a file of its own
	"G103",
	// errors not looked at: closing, farewells to a peer that may be gone, clean-up after an error
	// that is reported
	"G104",
	// conversions of integers: lengths and page numbers are bounded when they are read, which fuzz
	// tests try
	"G115",
	// commands and files by variables: an operator's own, or of the host's own descriptions, never
	// a peer's
	"G204", "G304",
}

func main() {
	found, err := look(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "gosec:", err)
	}
	if err != nil || found {
		os.Exit(1)
	}
}

// look prints what it finds in directories of Go files, and reports whether it found anything.
func look(directories []string) (found bool, err error) {
	if len(directories) == 0 {
		return false, fmt.Errorf("no directory is given: type gosec DIR ...")
	}
	a := gosec.NewAnalyzer(gosec.NewConfig(), false, true, false, runtime.NumCPU(),
		log.New(io.Discard, "", 0))
	a.LoadRules(rules.Generate(false, rules.NewRuleFilter(true, excluded...)).RulesInfo())
	a.LoadAnalyzers(
		analyzers.Generate(false, analyzers.NewAnalyzerFilter(true, excluded...)).AnalyzersInfo())
	if err := a.Process(nil, directories...); err != nil {
		return false, err
	}
	issues, _, broken := a.Report()
	for _, i := range issues {
		fmt.Printf("%s:%s: %s: %s\n%s", i.File, i.Line, i.RuleID, i.What, i.Code)
	}
	for file, list := range broken {
		for _, e := range list {
			fmt.Printf("%s:%d: %s\n", file, e.Line, e.Err)
		}
	}
	return len(issues) > 0 || len(broken) > 0, nil
}
