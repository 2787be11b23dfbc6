package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vacate/internal/cli/clitest"
	"vacate/internal/fleet/store"
	"vacate/internal/sys/settings"
)

func TestDocsCommands(t *testing.T) { clitest.Check(t, "vacate-fleet", command) }

func TestConfig(t *testing.T) {
	for text, want := range map[string]string{
		"": "operators names nobody",
		"members = [\"a:1\", \"b:2\"]\n[operators]\nadmin = [\"x\"]":          "want 1, 3 or 5",
		"members = [\"a\"]\n[operators]\nadmin = [\"x\"]":                     "not HOST:PORT",
		"listen = \":99999\"\n[operators]\nadmin = [\"x\"]":                   "no port",
		"listen = \":0\"\n[operators]\nadmin = [\"x\"]":                       "no port",
		"address = \"brain1:a b\"\n[operators]\nadmin = [\"x\"]":              "no port",
		"address = \":7610\"\n[operators]\nadmin = [\"x\"]":                   "no host",
		"members = [\"a:0\"]\n[operators]\nadmin = [\"x\"]":                   "no port",
		"members = [\":1\"]\n[operators]\nadmin = [\"x\"]":                    "no name",
		"members = [\"a:1\", \"a:2\", \"b:1\"]\n[operators]\nadmin = [\"x\"]": "twice",
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

// A configuration may be anything. One that is taken can be used.
func FuzzConfig(f *testing.F) {
	b, err := os.ReadFile("../../packaging/vacate-fleet.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	_, help, _ := strings.Cut(command().Long, "The configuration (TOML):\n")
	f.Add([]byte(help))
	for _, block := range clitest.Blocks(f) {
		if strings.HasSuffix(block.File, "fleet-setup.md") && strings.Contains(block.Text, " = ") {
			f.Add([]byte(block.Text))
		}
	}
	files, err := filepath.Glob("testdata/config/*.toml")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, file := range files {
		if _, err := readConfig(file); err != nil {
			f.Error(err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		file := filepath.Join(t.TempDir(), "vacate-fleet.toml")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := readConfig(file)
		if err != nil {
			return
		}
		for _, n := range c.names("own") {
			if store.CheckName(n) != nil {
				t.Errorf("%q is the name of a member", n)
			}
		}
		if _, address, _ := strings.Cut(c.me("own"), "@"); address == "" {
			t.Errorf("it is told to be at %q", c.me("own"))
		} else if _, err := settings.SplitAddress(address, 1); err != nil {
			t.Errorf("it is told to be at %q, which %v", address, err)
		}
	})
}
