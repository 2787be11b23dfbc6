package lab

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSmallDisk(t *testing.T) {
	l := newTestLab(t, Options{})
	const size = 1 << 20
	d, err := l.SmallDisk(size)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(d.Dir, "journal")
	write := func(bytes int) error { return os.WriteFile(name, make([]byte, bytes), 0o600) }
	if err := write(size / 2); err != nil {
		t.Error(err)
	}
	if err := write(2 * size); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("wrote more than there is: %v", err)
	}
	if err := write(1); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := d.Fill(); err != nil {
			t.Fatal(err)
		}
	}
	// As a process on a host sees it.
	cp := exec.Command("cp", "/etc/os-release", d.Dir)
	var said bytes.Buffer
	cp.Stderr = &said
	if err := l.B.Run(cp); err == nil ||
		!strings.Contains(said.String(), "No space left on device") {
		t.Errorf("a process wrote to the full disk: %v, %s", err, said.String())
	}
	if err := d.Free(); err != nil {
		t.Fatal(err)
	}
	if err := write(size / 2); err != nil {
		t.Errorf("wrote to the freed disk: %v", err)
	}
	open, err := os.Open(name) // no reason for it to stay
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil ||
		strings.Contains(string(mounts), l.RunDir()) {
		t.Errorf("still mounted after Close: %v\n%s", err, mounts)
	}
}
