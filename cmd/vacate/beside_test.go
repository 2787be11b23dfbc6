package main

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// Somebody who can write to the directory, such as /tmp, may plant links to files that only we
// can write.
func TestPlantedLink(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "passwd")
	if err := os.WriteFile(victim, []byte("root:x:0:0"), 0o644); err != nil {
		t.Fatal(err)
	}
	report, picture := filepath.Join(dir, "report.json"), filepath.Join(dir, "map.svg")
	for _, name := range []string{report, picture} {
		planted := filepath.Join(dir, fmt.Sprintf(".%s.%d.part", filepath.Base(name), os.Getpid()))
		if err := os.Symlink(victim, planted); err != nil {
			t.Fatal(err)
		}
	}
	r, err := reserveReport(report)
	if err != nil {
		t.Fatal(err)
	}
	p, err := reservePicture(picture)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []*os.File{r.temp, p.temp} {
		if g, err := beside(f.Name()); err != nil || g.Name() == f.Name() {
			t.Errorf("a second file beside %s: %v, %v", f.Name(), g, err)
		}
	}
	r.discard()
	p.discard()
	if b, err := os.ReadFile(victim); err != nil || string(b) != "root:x:0:0" {
		t.Errorf("the file behind the link has %.40q (%v)", b, err)
	}
}
