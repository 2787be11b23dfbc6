package guestmem

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/sys/units"
	"vacate/lab"
	"vacate/lab/labtest"
)

// qemus are those at hand: the one to test with, and those of Debian's backports.
func qemus(t *testing.T) map[string]string {
	all := map[string]string{"stock": *qemuBinary}
	for name, get := range map[string]func(context.Context, string) (lab.QEMU, error){
		"newest": lab.BackportsQEMU, "debian 12": lab.Backports12QEMU,
	} {
		q, err := get(labtest.Within(t, 5*time.Minute), labtest.Dir(t))
		if err != nil {
			labtest.Need(t, err)
		}
		all[name] = q.Path
	}
	return all
}

// TestFind finds all blocks of real QEMUs in their heaps. Where QEMU tells the addresses, the
// heap's are the same; where it does not, Attach has all of them from there. A ROM's bytes are its
// file's.
func TestFind(t *testing.T) {
	if testing.Short() {
		t.Skip("short: starts several QEMUs")
	}
	labtest.Need(t, lab.Probe())
	rom := make([]byte, 64<<10)
	for i := range rom {
		rom[i] = byte(rand.Uint32() | 1)
	}
	file := filepath.Join(t.TempDir(), "rom")
	if err := os.WriteFile(file, rom, 0o600); err != nil {
		t.Fatal(err)
	}
	net := []string{"-device", "virtio-net-pci,romfile=" + file, "-device", "virtio-net-pci"}
	for version, binary := range qemus(t) {
		for name, args := range map[string][]string{
			"pc": append([]string{"-M", "pc", "-m", "128M", "-vga", "std", "-device", "VGA",
				"-device", "virtio-balloon-pci"}, net...),
			"q35 -S": append([]string{"-M", "q35", "-m", "3G", "-vga", "std", "-S"}, net...),
			"memfd": append(append(backend("memfd", "128M", ",share=on"), "-vga", "std"),
				net...),
			"incoming": append([]string{"-M", "pc", "-m", "128M", "-S", "-incoming", "defer"},
				net...),
		} {
			t.Run(version+" "+name, func(t *testing.T) {
				v := startAs(t, binary, args...)
				m := v.attach(t)
				if err := m.Missing(); err != nil {
					t.Fatal(err)
				}
				text, err := v.HMP(t.Context(), "info ramblock")
				if err != nil {
					t.Fatal(err)
				}
				listed, err := parseRAMBlocks(text)
				if err != nil {
					t.Fatal(err)
				}
				var extents []Extent
				told := 0
				for _, b := range listed {
					if b.name != "" {
						extents = append(extents, Extent{b.name, b.used, 0, b.pageSize})
					}
				}
				if len(extents) < 8 || len(extents) != len(m.Blocks()) {
					t.Fatalf("%d blocks", len(extents))
				}
				before, start := v.rss(t), time.Now()
				found, err := Find(t.Context(), m.PID(), extents)
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("found %d blocks in %v; QEMU has %d MiB", len(found), time.Since(start),
					before>>20)
				if strings.HasSuffix(name, "-S") && v.rss(t) > before {
					t.Errorf("the search made QEMU grow from %d to %d bytes", before, v.rss(t))
				}
				seen := false
				for i, b := range found {
					if b != m.Blocks()[i] {
						t.Errorf("found %+v, attached %+v", b, m.Blocks()[i])
					}
					l := listed[i]
					if b.Total != l.total || l.hva != 0 && b.HVA != l.hva {
						t.Errorf("found %+v, QEMU says %+v", b, l)
					}
					if l.hva != 0 {
						told++
					}
					// One that waits for a VM may leave its ROMs empty.
					if strings.HasSuffix(b.Name, "/virtio-net-pci.rom") &&
						b.Size == uint64(len(rom)) {
						seen = true
						got := make([]byte, len(rom))
						if err := m.Read(got, i, 0); err != nil ||
							name != "incoming" && !bytes.Equal(got, rom) {
							t.Errorf("%s is not what its file holds: %v", b.Name, err)
						}
					}
				}
				if v.Version().Major >= 10 && told != len(found) || !seen {
					t.Errorf("QEMU told of %d of %d blocks: this compares too little", told,
						len(found))
				}
				// What is not so is refused, and by name.
				for _, wrong := range []Extent{
					{"pc.rom", 64 << 10, 0, units.PageSize},
					{"pc.rom", 128 << 10, 1 << 30, units.PageSize},
					{"pc.rom", 128 << 10, 0, 2 << 20}, {"no.rom", 128 << 10, 0, units.PageSize},
				} {
					if _, err := Find(t.Context(), m.PID(), []Extent{wrong}); err == nil ||
						!strings.Contains(err.Error(), wrong.Name) {
						t.Errorf("%+v: %v", wrong, err)
					}
				}
			})
		}
	}
}
