package guestmem

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"vacate/internal/sys/units"

	"golang.org/x/sys/unix"
)

// TestRelease gives memory back that a QEMU has in a file of its own, and refuses to where it may
// be somebody else's.
func TestRelease(t *testing.T) {
	shm, err := os.MkdirTemp("/dev/shm", "vacate")
	if err != nil {
		t.Skip("needs /dev/shm: mount a tmpfs there")
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	for _, c := range []struct {
		name, kind, more string
		can              bool
	}{
		{"memfd", "memfd", ",share=on", true},
		{"unnamed file", "file", ",share=on,mem-path=" + shm, true},
		{"named file", "file", ",share=on,mem-path=" + filepath.Join(shm, "ram"), false},
		{"file on a disk", "file", ",share=on,mem-path=" + t.TempDir(), false},
		{"private memfd", "memfd", ",share=off", false},
		{"anonymous", "ram", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := start(t, append(backend(c.kind, "64M", c.more), "-S")...)
			m := v.attach(t)
			ram := -1
			for i, b := range m.Blocks() {
				if b.Name == "pc.ram" {
					ram = i
				} else if b.Kind != SharedFile && m.Releasable(i) {
					t.Errorf("block %s of %v can be given back", b.Name, b.Kind)
				}
			}
			if can := m.Releasable(ram); can != c.can {
				t.Fatalf("it can be given back: %v", can)
			}
			// Of a file on a disk nothing says which pages are not there.
			bits := make([]uint64, 1)
			if err := m.Populated(ram, 32<<20/units.PageSize, 64, bits); err != nil {
				t.Fatal(err)
			}
			if want := m.backing[ram].file != nil &&
				!m.backing[ram].tmpfs; (bits[0] == ^uint64(0)) != want {
				t.Errorf("pages that were never used: %x", bits)
			}
			const at, size = 8 << 20, 1 << 20
			if !c.can {
				if err := m.Release(ram, at, units.PageSize); err == nil {
					t.Error("it was given back")
				}
				return
			}
			f, err := m.writable(ram)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(bytes.Repeat([]byte{7}, size), at); err != nil {
				t.Fatal(err)
			}
			used := func() int64 {
				var st unix.Stat_t
				if err := unix.Fstat(int(f.Fd()), &st); err != nil {
					t.Fatal(err)
				}
				return st.Blocks * 512
			}
			before := used()
			if err := m.Release(ram, at+3*units.PageSize, size/2); err != nil {
				t.Fatal(err)
			}
			if after := used(); after > before-size/2 {
				t.Errorf("the file has %d bytes, and had %d", after, before)
			}
			got := make([]byte, size)
			if err := m.Read(got, ram, at); err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte{7}, size)
			clear(want[3*units.PageSize : 3*units.PageSize+size/2])
			if !bytes.Equal(got, want) {
				t.Error("other pages than those were given back")
			}
			for _, bad := range [][2]uint64{{at + 1, units.PageSize}, {at, units.PageSize + 1},
				{at, 0}, {64 << 20, units.PageSize}, {0, 65 << 20},
				{^uint64(0) - units.PageSize + 1, 2 * units.PageSize}} {
				if err := m.Release(ram, bad[0], bad[1]); err == nil {
					t.Errorf("%d bytes at %d were given back", bad[1], bad[0])
				}
			}
			if _, err := v.QueryStatus(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
