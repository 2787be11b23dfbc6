package vacate_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode"
	"unicode/utf8"

	"vacate/internal/cli/clitest"
	"vacate/internal/evict"
)

var (
	link      = regexp.MustCompile(`\[([^\]]*)\]\(([^)\s]+)\)`)
	inlined   = regexp.MustCompile("`[^`]*`")
	ownPath   = regexp.MustCompile("`((?:cmd|contrib|docs|internal|lab|packaging|scripts)/[^`\\s*]*)`")
	heading   = regexp.MustCompile(`(?m)^#+ +(.+)$`)
	fencing   = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	goFunName = regexp.MustCompile("^`(?:[a-zA-Z]+\\.)?([A-Za-z]+)`$")
)

// anchors returns the anchors that GitHub makes of a document's headings.
func anchors(text string) []string {
	var list []string
	for _, m := range heading.FindAllStringSubmatch(fencing.ReplaceAllString(text, ""), -1) {
		title := link.ReplaceAllString(m[1], "$1")
		anchor := strings.Map(func(r rune) rune {
			switch {
			case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
				return unicode.ToLower(r)
			case r == ' ':
				return '-'
			}
			return -1
		}, strings.TrimSpace(title))
		list = append(list, anchor)
	}
	return list
}

// TestDocsLinks follows every link of the documents that stays within the repository, and every
// path in backquotes. A link whose text is the name of a function must lead to a file that has it.
func TestDocsLinks(t *testing.T) {
	for _, file := range clitest.Documents(t) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := fencing.ReplaceAllString(string(b), "")
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[2], "://") || strings.HasPrefix(m[2], "mailto:") {
				continue
			}
			target, anchor, _ := strings.Cut(m[2], "#")
			to := file
			if target != "" {
				to = path.Join(path.Dir(file), target)
			}
			there, err := os.ReadFile(to)
			if info, e := os.Stat(to); e == nil && info.IsDir() {
				continue
			}
			switch {
			case err != nil:
				t.Errorf("%s: the link to %s leads nowhere", file, m[2])
			case anchor != "" && !slices.Contains(anchors(string(there)), anchor):
				t.Errorf("%s: %s has no heading for the link to %s", file, to, m[2])
			}
			if f := goFunName.FindStringSubmatch(m[1]); f != nil && strings.HasSuffix(to, ".go") {
				if !regexp.MustCompile(`\b` + f[1] + `\b`).Match(there) {
					t.Errorf("%s: %s, to which a link leads, has no %s", file, to, f[1])
				}
			}
		}
		for _, m := range ownPath.FindAllStringSubmatch(text, -1) {
			if !exists(m[1]) {
				t.Errorf("%s: there is no %s", file, m[1])
			}
		}
	}
}

// exists reports whether there is a file, or a package that documents name without internal/.
func exists(name string) bool {
	for _, suffix := range []string{"", ".md"} {
		if _, err := os.Stat(name + suffix); err == nil {
			return true
		}
	}
	return false
}

// TestDocsRun runs the blocks of the documents that are marked "sh run", each in a directory of
// its own that looks like the top of the repository. The programs are built and in the PATH.
func TestDocsRun(t *testing.T) {
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/vacate", "./cmd/vacated",
		"./lab/cmd/vacate-lab")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	top, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(top)
	if err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, b := range clitest.Blocks(t) {
		if b.Info != "sh run" {
			continue
		}
		ran++
		dir := t.TempDir()
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), ".") {
				if err := os.Symlink(filepath.Join(top, e.Name()),
					filepath.Join(dir, e.Name())); err != nil {
					t.Fatal(err)
				}
			}
		}
		c := exec.Command("sh", "-euc", b.Text)
		c.Dir = dir
		c.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
		if out, err := c.CombinedOutput(); err != nil {
			t.Errorf("%s:%d: %v\n%s", b.File, b.Line, err, out)
		}
	}
	if ran == 0 {
		t.Error("no block is marked to be run")
	}
}

// wide is how long lines of documents and comments may be.
const wide = 100

// banned are phrases that hide who does what, with what to write instead. Each is looked for only
// where its word is: that is quick to find.
var banned = []struct {
	word    string
	phrase  *regexp.Regexp
	instead string
}{
	{"whether", regexp.MustCompile(`(?i)\btells? whether\b`), "reports whether"},
	{"whoever", regexp.MustCompile(`(?i)\bwhoever\b`), "name the actor"},
	{"which", regexp.MustCompile(`(?i)\bof which\b`), "two sentences"},
	{"to be", regexp.MustCompile(`(?i)\b(is|are) to be\b`), "must, will, or the verb"},
	{"to be told", regexp.MustCompile(`(?i)\b(has|have) to be told\b`), "must be told"},
	{"against", regexp.MustCompile(`(?i)\bstands? against\b`), "blocks"},
	{"told by", regexp.MustCompile(`(?i)\bis told by\b`), "name the actor first"},
	{"take it that", regexp.MustCompile(`(?i)\b(do|does) not take it that\b`),
		"cannot record that"},
	{"has who", regexp.MustCompile(`(?i)\bhas who\b`), "name the actor first"},
	{"as far as", regexp.MustCompile(`(?i)\bas far as its (pages|memory)\b`),
		"until it needs a missing page"},
	{"not got on", regexp.MustCompile(`(?i)\b(has|have) not got on\b`), "made no progress"},
	{"be told",
		regexp.MustCompile(`(?i)\b(can|could)(not)? be told (whether|how|who|where|what)\b`),
		"find out"},
	{"to be had", regexp.MustCompile(`(?i)\bto be had\b`), "missing, or there is none"},
}

// checkPhrases reports what is wrong with the words of a text.
func checkPhrases(t *testing.T, file string, number int, text string) {
	t.Helper()
	lower := strings.ToLower(text)
	for _, b := range banned {
		if !strings.Contains(lower, b.word) {
			continue
		}
		if found := b.phrase.FindString(text); found != "" {
			t.Errorf("%s:%d: %q: write %s", file, number, found, b.instead)
		}
	}
}

// checkLine reports what is wrong with a line of prose.
func checkLine(t *testing.T, file string, number int, line string) {
	t.Helper()
	checkPhrases(t, file, number, line)
	width := utf8.RuneCountInString(strings.ReplaceAll(line, "\t", "    "))
	unbroken := !strings.Contains(strings.TrimLeft(strings.TrimSpace(line), "/#*->0123456789. "),
		" ")
	if width > wide && !unbroken && !strings.Contains(line, "://") {
		t.Errorf("%s:%d: %d columns: break the line at %d", file, number, width, wide)
	}
}

// TestDocsStyle holds the documents to the length of lines and to the banned phrases.
func TestDocsStyle(t *testing.T) {
	for _, file := range clitest.Documents(t) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		fenced := false
		for i, line := range strings.Split(string(b), "\n") {
			if strings.HasPrefix(strings.TrimSpace(line), "```") {
				fenced = !fenced
			}
			if table := strings.HasPrefix(line, "|"); fenced || table {
				continue
			}
			checkLine(t, file, i+1, inlined.ReplaceAllStringFunc(line, func(s string) string {
				return strings.Repeat("x", utf8.RuneCountInString(s))
			}))
		}
	}
}

// A goFile is a file of this module's code.
type goFile struct {
	name  string
	lines []string
	set   *token.FileSet
	ast   *ast.File
}

// line is the number of a position's line.
func (f goFile) line(at token.Pos) int { return f.set.Position(at).Line }

// goFiles are all Go files of this module, each parsed once for all tests.
var goFiles = sync.OnceValues(func() (all []goFile, err error) {
	err = filepath.WalkDir(".", func(name string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && name != "." && strings.HasPrefix(e.Name(), "."):
			return filepath.SkipDir
		case !strings.HasSuffix(name, ".go"):
			return nil
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f := goFile{name: name, lines: strings.Split(string(text), "\n"), set: token.NewFileSet()}
		if f.ast, err = parser.ParseFile(f.set, name, text, parser.ParseComments); err != nil {
			return err
		}
		all = append(all, f)
		return nil
	})
	return all, err
})

// written are the files that people write.
func written(t *testing.T) []goFile {
	t.Helper()
	all, err := goFiles()
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(slices.Clone(all),
		func(f goFile) bool { return ast.IsGenerated(f.ast) })
}

// TestCommentStyle holds the comments of all packages to the same, and their help texts and
// messages to the phrases.
func TestCommentStyle(t *testing.T) {
	for _, f := range written(t) {
		if f.name == "docs_test.go" { // it lists the phrases
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool { // help texts and messages
			if text, ok := n.(*ast.BasicLit); ok && text.Kind == token.STRING &&
				!strings.HasSuffix(f.name, "_test.go") {
				checkPhrases(t, f.name, f.line(text.Pos()), text.Value)
			}
			return true
		})
		for _, group := range f.ast.Comments {
			for _, c := range group.List {
				first, last := f.line(c.Pos()), f.line(c.End())
				for n := first; n <= last; n++ {
					line := f.lines[n-1]
					if own := strings.TrimSpace(line); !strings.HasPrefix(own, "//") &&
						first == last {
						line = c.Text // behind code, whose length is the code's
					}
					checkLine(t, f.name, n, line)
				}
			}
		}
	}
}

// TestCodeColumns holds code to the same length of lines. Lines with a long string, rows of tables
// and lines with a reason for gosec may be longer.
func TestCodeColumns(t *testing.T) {
	for _, f := range written(t) {
		excused := map[int]bool{}
		excuse := func(n ast.Node) {
			for i := f.line(n.Pos()); i <= f.line(n.End()); i++ {
				excused[i] = true
			}
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if s, ok := n.(*ast.BasicLit); ok && s.Kind == token.STRING && len(s.Value) > 30 {
				excuse(s)
			}
			return true
		})
		for _, group := range f.ast.Comments { // TestCommentStyle looks at them
			for _, c := range group.List {
				excuse(c)
			}
		}
		for i, line := range f.lines {
			row := strings.HasPrefix(strings.TrimSpace(line), "{")
			width := utf8.RuneCountInString(strings.ReplaceAll(line, "\t", "    "))
			if width > wide && !excused[i+1] && !row {
				t.Errorf("%s:%d: %d columns: break the line at %d", f.name, i+1, width, wide)
			}
		}
	}
}

// TestDocsTour holds the tour of the code to the code: each function is in a file that its row
// names.
func TestDocsTour(t *testing.T) {
	text, err := os.ReadFile("docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, tour, _ := strings.Cut(string(text), "\n## A tour\n")
	tour, _, _ = strings.Cut(tour, "\n## ")
	name := regexp.MustCompile("`(?:\\w+\\.)?(\\w+)`")
	rows := 0
	for line := range strings.Lines(tour) {
		files := link.FindAllStringSubmatch(line, -1)
		if !strings.HasPrefix(line, "| ") || files == nil {
			continue
		}
		rows++
		var code []byte
		for _, m := range files {
			b, err := os.ReadFile(path.Join("docs", m[2]))
			if err != nil {
				t.Fatal(err)
			}
			code = append(code, b...)
		}
		for _, m := range name.FindAllStringSubmatch(line, -1) {
			declared := regexp.MustCompile(`(?m)^(func (\(.*?\) )?|type )` + m[1] + `\b`)
			if !declared.Match(code) {
				t.Errorf("docs/architecture.md: %s is in none of the files of %s", m[0], line)
			}
		}
	}
	if rows < 10 {
		t.Errorf("the tour has %d rows", rows)
	}
}

// TestDocsStates holds the documents to the states and metrics that there are.
func TestDocsStates(t *testing.T) {
	read := func(file string) string {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	concepts := read("docs/concepts.md")
	for _, s := range append(evict.SourceStates(), evict.DestinationStates()...) {
		if !regexp.MustCompile(`(?m)^\|[^|]*\b` + string(s) + `\b`).MatchString(concepts) {
			t.Errorf("docs/concepts.md has no row for the state %q", s)
		}
	}
	metrics := read("internal/host/metrics.go")
	for _, name := range regexp.MustCompile("`vacate_[a-z_]+").FindAllString(
		read("docs/operate.md"), -1) {
		if !strings.Contains(metrics, `"`+name[1:]+`"`) {
			t.Errorf("docs/operate.md: there is no metric %s", name[1:])
		}
	}
}

// TestDocsPicture draws the picture of the README anew from the data that are kept.
func TestDocsPicture(t *testing.T) {
	drawn, err := exec.Command("scripts/picture").Output()
	if err != nil {
		t.Fatal(err)
	}
	kept, err := os.ReadFile("docs/eviction.svg")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(drawn, kept) {
		t.Error("docs/eviction.svg is not what scripts/picture draws: scripts/picture " +
			">docs/eviction.svg")
	}
}
