package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vacate/internal/cli/clitest"
)

func TestDocsCommands(t *testing.T) { clitest.Check(t, "vacate-fleet", command) }

func TestConfig(t *testing.T) {
	for text, want := range map[string]string{
		"": "operators names nobody",
		"members = [\"a:1\", \"b:2\"]\n[operators]\nadmin = [\"x\"]": "want 1, 3 or 5",
		"members = [\"a\"]\n[operators]\nadmin = [\"x\"]":            "not NAME:PORT",
		"nonsense = 1": "no setting",
		"generation = 99999999\n[operators]\nadmin = [\"x\"]":                  "generation",
		"hosts = [\"[\"]\n[operators]\nadmin = [\"x\"]":                        "no pattern",
		"members = [\"a:1\"]\n[operators]\nadmin = [\"x\"]\n[etcd]\nurls = []": "names another one",
		"[operators]\nadmin = [\"x\"]":                                         "",
	} {
		file := filepath.Join(t.TempDir(), "vacate-fleet.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := readConfig(file)
		if want == "" && err != nil || want != "" && (err == nil ||
			!strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
