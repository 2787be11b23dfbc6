package vacate_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// imports is which packages of this module, and which modules of others, each package may
// import outside its tests. docs/architecture.md tells why; a package that is not here is
// not allowed.
var imports = map[string][]string{
	"relief":           {},
	"page":             {"vacate/bench", "vacate/evict"},
	"qmp":              {"golang.org/x/sys", "vacate/process"},
	"migstream":        {},
	"pageset":          {},
	"pageclass":        {},
	"guestlinux":       {"vacate/guestmem", "vacate/pageclass", "golang.org/x/sys"},
	"guesthints":       {"vacate/pageclass", "vacate/qmp"},
	"pushorder":        {"vacate/pageclass", "vacate/pageset"},
	"certs":            {},
	"link":             {"golang.org/x/sys", "vacate/certs"},
	"journal":          {"golang.org/x/sys"},
	"urgent":           {"golang.org/x/sys"},
	"process":          {"golang.org/x/sys"},
	"room":             {"golang.org/x/sys", "vacate/process"},
	"pressure":         {"github.com/prometheus/procfs", "golang.org/x/sys", "vacate/process"},
	"hypervisor":       {"github.com/BurntSushi/toml", "golang.org/x/sys", "vacate/process", "vacate/qmp", "vacate/urgent"},
	"hostapi/v1":       {"connectrpc.com/connect", "google.golang.org/protobuf"},
	"guestmem":         {"golang.org/x/sys", "vacate/qmp"},
	"evict":            {"golang.org/x/sys", "vacate/export", "vacate/fit", "vacate/guesthints", "vacate/guestlinux", "vacate/guestmem", "vacate/journal", "vacate/link", "vacate/migstream", "vacate/pageclass", "vacate/pageset", "vacate/process", "vacate/pushorder", "vacate/qmp", "vacate/room", "vacate/urgent"},
	"fit":              {"golang.org/x/sys", "vacate/qmp"},
	"export":           {"golang.org/x/sys", "vacate/guestmem", "vacate/migstream"},
	"host":             {"connectrpc.com/connect", "github.com/BurntSushi/toml", "github.com/prometheus/client_golang", "golang.org/x/net", "golang.org/x/sys", "google.golang.org/protobuf", "vacate/certs", "vacate/doctor", "vacate/evict", "vacate/hostapi/v1", "vacate/hypervisor", "vacate/journal", "vacate/link", "vacate/migstream", "vacate/pressure", "vacate/process", "vacate/pushorder", "vacate/qmp", "vacate/relief", "vacate/room", "vacate/urgent"},
	"doctor":           {"golang.org/x/sys", "vacate/fit", "vacate/guestmem", "vacate/qmp", "vacate/room", "vacate/urgent"},
	"inspect":          {"golang.org/x/image", "vacate/migstream", "vacate/pageclass"},
	"lab/loadproto":    {},
	"lab/churnproto":   {},
	"lab/answers":      {},
	"lab/memclient":    {"vacate/lab/answers"},
	"lab/pgclient":     {"github.com/jackc/pgx/v5", "vacate/lab/answers"},
	"lab/labtest":      {"vacate/lab"},
	"lab/churn":        {"golang.org/x/sys", "vacate/guestlinux", "vacate/guestmem", "vacate/lab", "vacate/lab/churnproto", "vacate/pageclass", "vacate/qmp"},
	"lab":              {"github.com/vishvananda/netlink", "github.com/vishvananda/netns", "golang.org/x/sys", "vacate/lab/loadproto"},
	"bench":            {"golang.org/x/sys", "vacate/lab", "vacate/lab/answers", "vacate/lab/memclient", "vacate/lab/pgclient", "vacate/pushorder", "vacate/qmp"},
	"cmd/guestchurn":   {"golang.org/x/sys", "vacate/lab/churnproto"},
	"cmd/vacate-guest": {"golang.org/x/sys", "vacate/guesthints", "vacate/pageclass"},
	"cmd/guestload":    {"golang.org/x/sys", "vacate/lab/loadproto"},
	"cmd/vacated":      {"github.com/spf13/cobra", "vacate/host", "vacate/urgent"},
	"cmd/vacate":       {"connectrpc.com/connect", "github.com/spf13/cobra", "github.com/spf13/pflag", "golang.org/x/sys", "golang.org/x/term", "google.golang.org/protobuf", "vacate/bench", "vacate/certs", "vacate/doctor", "vacate/evict", "vacate/hostapi/v1", "vacate/guestlinux", "vacate/guestmem", "vacate/inspect", "vacate/lab", "vacate/link", "vacate/page", "vacate/pageclass", "vacate/pushorder", "vacate/qmp", "vacate/relief", "vacate/urgent"},
}

func TestImports(t *testing.T) {
	seen := map[string]bool{}
	err := filepath.WalkDir(".", func(file string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && file != "." && (strings.HasPrefix(e.Name(), ".") || e.Name() == "testdata") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return nil
		}
		pkg := path.Dir(filepath.ToSlash(file))
		allowed, known := imports[pkg]
		if !known {
			t.Errorf("%s: package %s is not in the list of this test", file, pkg)
			return nil
		}
		seen[pkg] = true
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range f.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			first, _, _ := strings.Cut(name, "/")
			if first != "vacate" && !strings.Contains(first, ".") {
				continue // the standard library
			}
			if !slices.ContainsFunc(allowed, func(a string) bool {
				return name == a || strings.Contains(first, ".") && strings.HasPrefix(name, a+"/")
			}) {
				t.Errorf("%s imports %s, which package %s may not", file, name, pkg)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range imports {
		if !seen[pkg] {
			t.Errorf("there is no package %s: take it from the list of this test", pkg)
		}
	}
}
