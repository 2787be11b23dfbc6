// Package clitest checks what the documentation says of commands against the commands themselves.
//
// A command that a reader may type stands in a fenced block of sh. There it must parse as a whole:
// the subcommand and its flags exist, and the arguments are as many as it takes. Of a command that
// is named within a sentence, in backquotes, the subcommand and the flags must exist.
package clitest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// A Block is a fenced block of a document.
type Block struct {
	File string // from the top of the module
	Line int    // of its first line of text
	Info string // what the fence says of it, such as "sh" or "sh run"
	Text string
}

// Language is the first word of what the fence says.
func (b Block) Language() string {
	lang, _, _ := strings.Cut(b.Info, " ")
	return lang
}

// Top returns the directory of the module's go.mod.
func Top(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatal("no go.mod above the working directory")
		}
		dir = up
	}
}

// Documents returns the Markdown files of the module, by their paths from its top.
func Documents(t testing.TB) []string {
	t.Helper()
	var files []string
	top := Top(t)
	err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		hidden := strings.HasPrefix(e.Name(), ".") || e.Name() == "testdata" || e.Name() == "bin"
		if e.IsDir() && path != top && hidden {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, ".md") {
			name, _ := filepath.Rel(top, path)
			files = append(files, filepath.ToSlash(name))
		}
		return nil
	})
	if err != nil || len(files) == 0 {
		t.Fatal("no documents: ", err)
	}
	return files
}

// Blocks returns the fenced blocks of all documents.
func Blocks(t testing.TB) []Block {
	t.Helper()
	var list []Block
	for _, file := range Documents(t) {
		_, blocks := parse(t, file)
		list = append(list, blocks...)
	}
	return list
}

// parse returns a document's lines, empty where they belong to a fenced block, and those blocks.
func parse(t testing.TB, file string) (prose []string, blocks []Block) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(Top(t), file))
	if err != nil {
		t.Fatal(err)
	}
	fenced := false
	for i, line := range strings.Split(string(text), "\n") {
		info, fence := strings.CutPrefix(strings.TrimSpace(line), "```")
		kept := ""
		switch {
		case fence && !fenced:
			blocks = append(blocks, Block{File: file, Line: i + 2, Info: info})
			fenced = true
		case fence:
			fenced = false
		case fenced:
			blocks[len(blocks)-1].Text += line + "\n"
		default:
			kept = line
		}
		prose = append(prose, kept)
	}
	if fenced {
		t.Errorf("%s: a fenced block has no end", file)
	}
	return prose, blocks
}

// Check checks all commands of a program in the documents against the tree that root makes.
func Check(t *testing.T, program string, root func() *cobra.Command) {
	t.Helper()
	total := 0
	// A row of a table has more than one space behind the name.
	begins := regexp.MustCompile(`^(\$ )?(sudo )?` + regexp.QuoteMeta(program) + ` \S`)
	inline := regexp.MustCompile("`(" + regexp.QuoteMeta(program) + " [^`]+)`")
	for _, file := range Documents(t) {
		prose, blocks := parse(t, file)
		for _, b := range blocks {
			if b.Language() != "sh" {
				for i, line := range strings.Split(b.Text, "\n") {
					if begins.MatchString(strings.TrimSpace(line)) {
						t.Errorf("%s:%d: put this command into a fenced block of sh: %s", file,
							b.Line+i, line)
					}
				}
				continue
			}
			list, err := split(b.Text)
			if err != nil {
				t.Errorf("%s:%d: %v", b.File, b.Line, err)
			}
			for _, c := range list {
				if filepath.Base(c.words[0]) != program {
					continue
				}
				total++
				if err := typed(root(), c.words[1:]); err != nil {
					t.Errorf("%s:%d: %s: %v", b.File, b.Line+c.line, strings.Join(c.words, " "),
						err)
				}
			}
		}
		for i, line := range prose {
			if strings.HasPrefix(line, "    ") && begins.MatchString(strings.TrimSpace(line)) {
				t.Errorf("%s:%d: put this command into a fenced block of sh: %s", file, i+1, line)
			}
			for _, m := range inline.FindAllStringSubmatch(line, -1) {
				total++
				if err := named(root(), strings.Fields(m[1])[1:]); err != nil {
					t.Errorf("%s:%d: `%s`: %v", file, i+1, m[1], err)
				}
			}
		}
	}
	if total == 0 {
		t.Errorf("no document has a command of %s", program)
	}
}

// prepare returns the command that words mean, and the words behind it.
func prepare(root *cobra.Command, words []string) (*cobra.Command, []string, error) {
	root.InitDefaultHelpCmd()
	c, rest, err := root.Find(words)
	if err != nil {
		return nil, nil, err
	}
	c.InitDefaultHelpFlag()
	c.InitDefaultVersionFlag()
	return c, rest, nil
}

// typed reports what is wrong with words behind a program's name as somebody would type them.
func typed(root *cobra.Command, words []string) error {
	c, rest, err := prepare(root, words)
	if err != nil {
		return err
	}
	if err := c.ParseFlags(rest); err != nil {
		return err
	}
	if c.Flags().Changed("help") || c.Flags().Changed("version") {
		return nil
	}
	if !c.Runnable() {
		return errors.New("a subcommand is missing")
	}
	return errors.Join(c.ValidateArgs(c.Flags().Args()), c.ValidateRequiredFlags())
}

// named reports what is wrong with words behind a program's name that a sentence has. The sentence
// may leave out arguments, and values of flags.
func named(root *cobra.Command, words []string) error {
	end := slices.IndexFunc(words, func(w string) bool { return strings.HasPrefix(w, "-") })
	if end < 0 {
		end = len(words)
	}
	c, _, err := prepare(root, words[:end])
	if err != nil {
		return err
	}
	for _, w := range words[end:] {
		name, long := strings.CutPrefix(w, "--")
		name, _, _ = strings.Cut(strings.TrimRight(name, ".,;:)"), "=")
		if long && name != "" && c.Flags().Lookup(name) == nil {
			return fmt.Errorf("%s has no flag --%s", c.CommandPath(), name)
		}
	}
	return nil
}

// simple is one command of a script.
type simple struct {
	line  int // of the script, from 0
	words []string
}

var assignment = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*=`)

// split takes a script apart as far as documents need it: quotes, comments, continued lines,
// operators, redirections. Assignments and sudo ahead of a command are left out.
func split(script string) ([]simple, error) {
	var list []simple
	var c simple
	var word strings.Builder
	line, inWord, drop := 0, false, false
	endWord := func() {
		if inWord && !drop {
			if len(c.words) == 0 {
				c.line = line
			}
			c.words = append(c.words, word.String())
		}
		if inWord {
			drop = false
		}
		word.Reset()
		inWord = false
	}
	endCommand := func() {
		endWord()
		for len(c.words) > 0 && (assignment.MatchString(c.words[0]) || c.words[0] == "sudo") {
			c.words = c.words[1:]
		}
		if len(c.words) > 0 {
			list = append(list, c)
		}
		c, drop = simple{}, false
	}
	for i := 0; i < len(script); i++ {
		switch b := script[i]; {
		case b == '\\' && i+1 < len(script):
			i++
			if script[i] == '\n' {
				line++
			} else {
				word.WriteByte(script[i])
				inWord = true
			}
		case b == '\'' || b == '"':
			end := strings.IndexByte(script[i+1:], b)
			if end < 0 {
				return list, errors.New("a quote has no end")
			}
			quoted := script[i+1 : i+1+end]
			word.WriteString(quoted)
			inWord = true
			line += strings.Count(quoted, "\n")
			i += 1 + end
		case b == '#' && !inWord:
			for i+1 < len(script) && script[i+1] != '\n' {
				i++
			}
		case strings.HasPrefix(script[i:], "<<"):
			return list, errors.New("a here-document: show the file in a block of its own instead")
		case b == '>' || b == '<':
			if _, err := fmt.Sscanf(word.String(), "%d", new(int)); err == nil {
				word.Reset()
				inWord = false
			}
			endWord()
			for i+1 < len(script) && (script[i+1] == '>' || script[i+1] == '&') {
				i++
			}
			drop = true
		case strings.IndexByte("\n;|&(){}", b) >= 0:
			endCommand()
			if b == '\n' {
				line++
			}
		case b == ' ' || b == '\t':
			endWord()
		default:
			word.WriteByte(b)
			inWord = true
		}
	}
	endCommand()
	return list, nil
}
