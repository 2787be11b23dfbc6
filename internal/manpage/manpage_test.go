package manpage

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestWriteTree(t *testing.T) {
	none := func(*cobra.Command, []string) {}
	root := &cobra.Command{Use: "move", Short: "Move things", Long: "Moves them.", Run: none}
	sub := &cobra.Command{Use: "now THING", Short: "At once", Run: none, Long: `A thing that begins
so:
  none   it's \ elsewhere
  .dot   here

Then prose.`}
	sub.Flags().String("to", "here", "the `PLACE` it goes to")
	sub.Flags().Bool("secret", false, "not told of")
	sub.Flags().MarkHidden("secret")
	root.AddCommand(sub, &cobra.Command{Use: "hidden", Hidden: true, Run: none})
	dir := t.TempDir()
	if err := WriteTree(dir, root, 1); err != nil {
		t.Fatal(err)
	}
	var files []string
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		files = append(files, e.Name())
	}
	if want := []string{"move-now.1", "move.1"}; !slices.Equal(files, want) {
		t.Errorf("pages %q, want %q", files, want)
	}
	b, err := os.ReadFile(filepath.Join(dir, "move-now.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		".TH \"MOVE-NOW\" 1", "move\\-now \\- At once\n", "move now THING",
		"so:\n.PP\n.nf\n  none   it\\(aqs \\e elsewhere\n  .dot   here\n\n.fi\n.PP\nThen prose.\n",
		"\\fB\\-\\-to\\fR PLACE\nthe PLACE it goes to (default here)\n", ".SH SEE ALSO\nmove(1)\n",
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("the page lacks %q:\n%s", want, b)
		}
	}
	if strings.Contains(string(b), "secret") {
		t.Errorf("the page tells of a hidden flag:\n%s", b)
	}
}
