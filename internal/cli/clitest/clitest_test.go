package clitest

import (
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestSplit(t *testing.T) {
	script := `# a comment
SOCKET=/run/x sudo bin/vacate evict 'web 1' \
  --to "host#b" 2>/dev/null >out; vacate ls|cat && vacate status # all
vacate watch web1 &`
	list, err := split(script)
	if err != nil {
		t.Fatal(err)
	}
	want := []simple{
		{1, []string{"bin/vacate", "evict", "web 1", "--to", "host#b"}},
		{2, []string{"vacate", "ls"}},
		{2, []string{"cat"}},
		{2, []string{"vacate", "status"}},
		{3, []string{"vacate", "watch", "web1"}},
	}
	if !reflect.DeepEqual(list, want) {
		t.Errorf("got  %v\nwant %v", list, want)
	}
	for _, bad := range []string{"echo 'x", "cat <<EOF\nx\nEOF"} {
		if _, err := split(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestTyped(t *testing.T) {
	root := func() *cobra.Command {
		c := &cobra.Command{Use: "tool", Version: "1"}
		run := func(*cobra.Command, []string) {}
		move := &cobra.Command{Use: "move VM", Args: cobra.ExactArgs(1), Run: run}
		move.Flags().String("to", "", "")
		move.MarkFlagRequired("to")
		set := &cobra.Command{Use: "set"}
		set.AddCommand(&cobra.Command{Use: "up", Run: run, Args: cobra.NoArgs})
		c.AddCommand(move, set)
		return c
	}
	for words, wrong := range map[string]string{
		"move a --to b":       "",
		"move --help":         "",
		"--version":           "",
		"set up":              "",
		"move a":              "to",
		"move --to b":         "accepts 1 arg",
		"move a b --to c":     "accepts 1 arg",
		"move a --too b":      "unknown flag",
		"mvoe a --to b":       "unknown command",
		"set":                 "subcommand",
		"set pu":              "subcommand",
		"set up --to nowhere": "unknown flag",
	} {
		err := typed(root(), strings.Fields(words))
		if wrong == "" && err != nil ||
			wrong != "" && (err == nil || !strings.Contains(err.Error(), wrong)) {
			t.Errorf("%s: %v, want %q", words, err, wrong)
		}
	}
	for words, wrong := range map[string]string{
		"move":         "",
		"move --to":    "",
		"move VM|ID":   "",
		"move --too b": "no flag",
		"mvoe VM":      "unknown command",
	} {
		err := named(root(), strings.Fields(words))
		if wrong == "" && err != nil ||
			wrong != "" && (err == nil || !strings.Contains(err.Error(), wrong)) {
			t.Errorf("%s in a sentence: %v, want %q", words, err, wrong)
		}
	}
}
