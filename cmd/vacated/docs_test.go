package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vacate/internal/cli/clitest"
	"vacate/internal/host"
	"vacate/internal/host/hypervisor"
)

func TestDocsCommands(t *testing.T) { clitest.Check(t, "vacated", command) }

// TestDocsFiles reads every configuration and every description of a VM that the documents show
// in full. The first line of such a block is the file's path, as a comment.
func TestDocsFiles(t *testing.T) {
	configurations, descriptions := 0, 0
	for _, b := range clitest.Blocks(t) {
		if b.Language() != "toml" {
			continue
		}
		first, _, _ := strings.Cut(b.Text, "\n")
		path := strings.Fields(strings.TrimPrefix(first, "# ") + " ")
		dir := t.TempDir()
		switch {
		case len(path) == 0 || !strings.HasPrefix(path[0], "/"):
			t.Errorf("%s:%d: the first line of this file is not its path", b.File, b.Line)
		case filepath.Base(path[0]) == "vacated.toml":
			configurations++
			file := filepath.Join(dir, "vacated.toml")
			write(t, file, b.Text)
			if _, err := host.ReadConfig(file); err != nil {
				t.Errorf("%s:%d: %v", b.File, b.Line, err)
			}
		case filepath.Dir(path[0]) == "/etc/vacate/vms":
			descriptions++
			name := strings.TrimSuffix(filepath.Base(path[0]), ".toml")
			write(t, filepath.Join(dir, name+".toml"), b.Text)
			if _, err := hypervisor.Find(dir, name); err != nil {
				t.Errorf("%s:%d: %v", b.File, b.Line, err)
			}
		default:
			t.Errorf("%s:%d: nothing reads %s", b.File, b.Line, path[0])
		}
	}
	if configurations == 0 || descriptions == 0 {
		t.Errorf("the documents show %d configurations and %d VMs", configurations, descriptions)
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
