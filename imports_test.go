package vacate_test

import (
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A row is a package in the table of docs/architecture.md.
type row struct {
	pkg     string   // as imports are written, below internal/ without it
	imports []string // the same; modules of others by their path
}

// group is the first part of a package's path.
func group(pkg string) string {
	first, _, _ := strings.Cut(pkg, "/")
	return first
}

// table reads the section "Packages" of docs/architecture.md.
func table(t *testing.T) []row {
	t.Helper()
	text, err := os.ReadFile("docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Packages\n")
	section, _, _ = strings.Cut(section, "\n## ")
	quoted := regexp.MustCompile("`([^`]+)`")
	var rows []row
	for line := range strings.Lines(section) {
		cells := strings.Split(line, " | ")
		if !strings.HasPrefix(line, "| `") || len(cells) != 3 {
			continue
		}
		r := row{pkg: quoted.FindStringSubmatch(cells[0])[1]}
		for _, m := range quoted.FindAllStringSubmatch(cells[2], -1) {
			r.imports = append(r.imports, m[1])
		}
		rows = append(rows, r)
	}
	return rows
}

// TestImports holds the table of packages against the code. Imports of tests do not count.
func TestImports(t *testing.T) {
	rows := table(t)
	var groups []string // in the table's order
	for _, r := range rows {
		if !slices.Contains(groups, group(r.pkg)) {
			groups = append(groups, group(r.pkg))
		}
	}
	for _, r := range rows {
		for _, name := range r.imports {
			if !strings.Contains(group(name), ".") &&
				slices.Index(groups, group(name)) > slices.Index(groups, group(r.pkg)) {
				t.Errorf("%s imports %s, of a group below its own", r.pkg, name)
			}
		}
	}
	used := imports(t)
	for _, r := range rows {
		var have []string
		for _, name := range used[r.pkg] {
			listed := slices.IndexFunc(r.imports, func(i string) bool {
				return name == i ||
					strings.Contains(group(i), ".") && strings.HasPrefix(name, i+"/")
			})
			if listed < 0 {
				t.Errorf("package %s imports %s, which its row in docs/architecture.md does not "+
					"name", r.pkg, name)
				continue
			}
			have = append(have, r.imports[listed])
		}
		for _, name := range r.imports {
			if !slices.Contains(have, name) {
				t.Errorf("package %s does not import %s, which its row in docs/architecture.md "+
					"names", r.pkg, name)
			}
		}
		delete(used, r.pkg)
	}
	for pkg := range used {
		t.Errorf("package %s has no row in docs/architecture.md", pkg)
	}
}

// imports returns what each package of this module imports beside the standard library.
func imports(t *testing.T) map[string][]string {
	t.Helper()
	files, err := goFiles()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for _, f := range files {
		dir := path.Dir(filepath.ToSlash(f.name))
		if strings.HasSuffix(f.name, "_test.go") ||
			slices.Contains(strings.Split(dir, "/"), "testdata") ||
			strings.HasPrefix(dir, "tools/") { // a module of its own
			continue
		}
		pkg := strings.TrimPrefix(dir, "internal/")
		all[pkg] = append(all[pkg], "")
		for _, spec := range f.ast.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if own, ok := strings.CutPrefix(name, "vacate/"); ok {
				all[pkg] = append(all[pkg], strings.TrimPrefix(own, "internal/"))
			} else if strings.Contains(group(name), ".") {
				all[pkg] = append(all[pkg], name)
			}
		}
	}
	for pkg, names := range all {
		slices.Sort(names)
		all[pkg] = slices.Compact(names)[1:]
	}
	return all
}
