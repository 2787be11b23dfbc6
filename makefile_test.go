package vacate_test

import (
	"go/ast"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The Makefile names tests that run apart from the others, or at night. Each is in a package that
// runs there, and no other package has one of that name: it would never run.
func TestMakefileNames(t *testing.T) {
	makefile, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	variable := func(name string) string {
		m := regexp.MustCompile(`(?m)^` + name + ` = (.*)$`).FindSubmatch(makefile)
		if m == nil {
			t.Fatalf("the Makefile has no %s", name)
		}
		return string(m[1])
	}
	files, err := goFiles()
	if err != nil {
		t.Fatal(err)
	}
	packages := map[string][]string{} // of tests, by their names
	for _, f := range files {
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil &&
				strings.HasSuffix(f.name, "_test.go") {
				packages[fn.Name.Name] = append(packages[fn.Name.Name],
					path.Join("vacate", path.Dir(f.name)))
			}
		}
	}
	for tests, in := range map[string]string{"VARIANTS": "VARYING", "COMPUTING": "COMPUTERS",
		"MEASURING": "MEASURERS"} {
		run := strings.Fields(variable(in))
		for _, m := range regexp.MustCompile(`(Test\w+)(\$\$/)?`).FindAllStringSubmatch(
			variable(tests), -1) {
			name, cases := m[1], m[2] != ""
			if len(packages[name]) == 0 {
				t.Errorf("%s: there is no test %s", tests, name)
			}
			for _, p := range packages[name] {
				if !cases && !slices.Contains(run, p) {
					t.Errorf("%s: %s of %s would never run: give it another name, or add its "+
						"package to %s", tests, name, p, in)
				}
			}
		}
	}
}

// Each variable of the Makefile is set once: a second value would replace the first unseen.
func TestMakefileVariables(t *testing.T) {
	makefile, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^(\w+) *[:?]?=`).FindAllSubmatch(makefile, -1) {
		if name := string(m[1]); seen[name] {
			t.Errorf("%s is set twice", name)
		} else {
			seen[name] = true
		}
	}
	if len(seen) == 0 {
		t.Error("the Makefile has no variables")
	}
}
