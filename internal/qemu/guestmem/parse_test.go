package guestmem

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"vacate/internal/sys/units"

	"github.com/google/go-cmp/cmp"
)

// fixtures returns the recorded tables, by "version-variant".
func fixtures(tb testing.TB) []string {
	tb.Helper()
	dirs, err := filepath.Glob("testdata/*.*-*")
	if err != nil || len(dirs) == 0 {
		tb.Fatal("no recorded tables: ", err)
	}
	return dirs
}

func fixture(tb testing.TB, dir, file string) string {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

// summary tells in one line per block what the recorded tables of one VM say of it.
func summary(tb testing.TB, dir string) []string {
	tb.Helper()
	listed, err := parseRAMBlocks(fixture(tb, dir, "ramblock"))
	if err != nil {
		tb.Fatal(err)
	}
	rows, err := parseMTree(fixture(tb, dir, "mtree"))
	if err != nil {
		tb.Fatal(err)
	}
	vmas, err := parseMaps(strings.NewReader(fixture(tb, dir, "maps")))
	if err != nil {
		tb.Fatal(err)
	}
	hvas := make([]uint64, len(rows))
	for i, answer := range strings.Split(strings.TrimSpace(fixture(tb, dir, "gpa2hva")), "\n") {
		var ok bool
		if hvas[i], ok = parseGPA2HVA(answer, rows[i].gpa, rows[i].region); !ok {
			tb.Errorf("%s: %q", dir, answer)
		}
	}
	blocks, mappings := locate(listed, rows, hvas, vmas)
	var out []string
	for i, b := range blocks {
		s := fmt.Sprintf("%s %d KiB, %v:", b.Name, b.Size>>10, b.Kind)
		for _, m := range mappings {
			if m.block == i {
				s += fmt.Sprintf(" %x-%x@%x", m.gpa, m.gpa+m.size, m.offset)
			}
		}
		out = append(out, s)
	}
	return out
}

// With -record it rewrites what it expects: look at the difference.
func TestLocateRecorded(t *testing.T) {
	for _, dir := range fixtures(t) {
		if *record {
			if err := os.WriteFile(filepath.Join(dir, "want"),
				[]byte(strings.Join(summary(t, dir), "\n")+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want := strings.Split(strings.TrimSpace(fixture(t, dir, "want")), "\n")
		if diff := cmp.Diff(want, summary(t, dir)); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", dir, diff)
		}
	}
}

// On 7.2 nothing but a name joins a region to a block, so what contradicts it must undo that.
func TestLocateDoubts(t *testing.T) {
	listed := []ramBlock{{name: "pc.ram", pageSize: units.PageSize, used: 0x8000, total: 0x8000},
		{name: "0000:00:02.0/vga.vram", pageSize: units.PageSize, used: 0x1800, total: 0x2000}}
	good := []row{{0, 0x4000, 0, "pc.ram"}, {0x10000, 0x4000, 0x4000, "pc.ram"},
		{0x20000, 0x2000, 0, "vga.vram"}}
	hvas := []uint64{0x700000, 0x704000, 0x800000}
	vmas := []vma{{start: 0x700000, end: 0x706000, read: true},
		{start: 0x706000, end: 0x708000, read: true}, {start: 0x708000, end: 0x709000},
		{start: 0x800000, end: 0x802000, read: true}}
	for name, tt := range map[string]struct {
		spoil     func(listed []ramBlock, rows []row, hvas []uint64, vmas []vma)
		ram, vram bool
	}{
		"nothing": {func([]ramBlock, []row, []uint64, []vma) {}, true, true},
		"parts apart": {func(_ []ramBlock, _ []row, h []uint64, _ []vma) {
			h[1] += units.PageSize
		}, false, true},
		"no answer": {func(_ []ramBlock, _ []row, h []uint64, _ []vma) { h[0] = 0 },
			false, true},
		"beyond block": {func(_ []ramBlock, r []row, _ []uint64, _ []vma) {
			r[2].size = 0x3000
		}, true, false},
		"not readable": {func(_ []ramBlock, _ []row, _ []uint64, v []vma) {
			v[1].read = false
		}, false, true},
		"shared in part": {func(_ []ramBlock, _ []row, _ []uint64, v []vma) {
			v[1].shared = true
		}, false, true},
		"mapping too long": {func(_ []ramBlock, _ []row, _ []uint64, v []vma) {
			v[3].end += units.PageSize
		}, true, false},
		"mapping starts before": {func(_ []ramBlock, _ []row, _ []uint64, v []vma) {
			v[3].start -= units.PageSize
		}, true, false},
		"same place": {func(_ []ramBlock, r []row, h []uint64, _ []vma) {
			h[2] = 0x706000
			r[2].size = 0x2000
		}, false, false},
		"other name": {func(_ []ramBlock, r []row, _ []uint64, _ []vma) { r[2].region = "a.vram" },
			true, false},
		"ambiguous name": {func(l []ramBlock, r []row, _ []uint64, _ []vma) {
			l[0].name = "x/vga.vram"
			r[0].region = "y"
			r[1].region = "y"
		}, false, false},
	} {
		l, r, h, v := append([]ramBlock(nil), listed...), append([]row(nil),
			good...), append([]uint64(nil), hvas...), append([]vma(nil), vmas...)
		tt.spoil(l, r, h, v)
		blocks, _ := locate(l, r, h, v)
		if blocks[0].Located != tt.ram || blocks[1].Located != tt.vram {
			t.Errorf("%s: %+v", name, blocks)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	const head = "Block Name PSize Offset Used Total\n"
	row := func(name, psize string, used, total uint64) string {
		return fmt.Sprintf("%24s %8s  0x%016x 0x%016x 0x%016x\n", name, psize, 0, used, total)
	}
	if b, err := parseRAMBlocks(head + row("", "4 KiB", 1, 1) + row("a b", "2 MiB", 1, 2)); err !=
		nil || len(b) != 2 || b[0].name != "" || b[1].name != "a b" || b[1].pageSize != 2<<20 {
		t.Errorf("%+v, %v", b, err)
	}
	for _, text := range []string{
		"", "unknown command: 'info ramblock'\n", head + "x\n", head + row("a", "4 KiB", 2, 1),
		head + row("a", "3 KiB", 1, 1),
		head + row("a", "1 KiB", 1, 1), head + row("a", "4 KiB", 1, 1<<60),
		head + row("a", "4 KiB", 1, 1) + row("a", "4 KiB", 1, 1),
		head + row("a", "9999999999999999999 GiB", 1, 1),
		head + row(strings.Repeat("a", 256), "4 KiB", 1, 1),
	} {
		if b, err := parseRAMBlocks(text); err == nil {
			t.Errorf("ram blocks %.80q: %+v", text, b)
		}
	}
	const as = "FlatView #0\n AS \"memory\", root: system\n"
	for _, text := range []string{
		"", "FlatView #0\n AS \"I/O\", root: io\n", as + "  nonsense\n", as + as,
		as + "  0000000000002000-0000000000001fff (prio 0, ram): a\n",
		as + "  0000000000000000-ffffffffffffffff (prio 0, ram): a\n",
		as +
			"  0000000000000000-0000000000001fff (prio 0, ram): a\n  " +
			"0000000000001000-0000000000001fff (prio 0, ram): a\n",
	} {
		if r, err := parseMTree(text); err == nil {
			t.Errorf("memory map %q: %+v", text, r)
		}
	}
	for _, text := range []string{
		"x\n", "1000-2000 r-xp 0 0:0\n", "2000-1000 r-xp 0 00:00 0\n", "1000-2000 r-xp 0 00:00 x\n",
		"1000-2000 rwxp 0 00:00 0\n1800-3000 rwxp 0 00:00 0\n", strings.Repeat("a", 70<<10),
	} {
		if v, err := parseMaps(strings.NewReader(text)); err == nil {
			t.Errorf("maps %.80q: %+v", text, v)
		}
	}
}

func FuzzRAMBlocks(f *testing.F) {
	for _, dir := range fixtures(f) {
		f.Add(fixture(f, dir, "ramblock"))
	}
	f.Fuzz(func(t *testing.T, text string) {
		blocks, _ := parseRAMBlocks(text)
		for _, b := range blocks {
			if b.used > b.total || b.pageSize < units.PageSize {
				t.Errorf("%+v", b)
			}
		}
	})
}

func FuzzLocate(f *testing.F) {
	for _, dir := range fixtures(f) {
		f.Add(fixture(f, dir, "ramblock"), fixture(f, dir, "mtree"), fixture(f, dir, "gpa2hva"),
			fixture(f, dir, "maps"))
	}
	f.Fuzz(func(t *testing.T, ramblock, mtree, gpa2hva, maps string) {
		listed, err1 := parseRAMBlocks(ramblock)
		rows, err2 := parseMTree(mtree)
		vmas, err3 := parseMaps(strings.NewReader(maps))
		if err1 != nil || err2 != nil || err3 != nil {
			return
		}
		hvas := make([]uint64, len(rows))
		for i, s := range strings.Split(gpa2hva, "\n") {
			if i < len(rows) {
				hvas[i], _ = parseGPA2HVA(s, rows[i].gpa, rows[i].region)
			}
		}
		blocks, mappings := locate(listed, rows, hvas, vmas)
		for _, b := range blocks {
			for _, at := range []uint64{b.HVA, b.HVA + b.Size/2, b.HVA + max(b.Size, 1) - 1} {
				inside := func(v vma) bool { return v.read && v.start <= at && at < v.end }
				if b.Located && !slices.ContainsFunc(vmas, inside) {
					t.Errorf("located outside every mapping: %+v", b)
				}
			}
		}
		for _, r := range mappings {
			if total := listed[r.block].total; r.offset+r.size > total {
				t.Errorf("mapping beyond its block: %+v of %d bytes", r, total)
			}
		}
	})
}

func TestIsZero(t *testing.T) {
	for _, n := range []int{0, 1, units.PageSize, len(zeros), len(zeros) + 1, 3*len(zeros) + 5} {
		b := make([]byte, n)
		if !IsZero(b) {
			t.Errorf("%d zero bytes are not zero", n)
		}
		for _, i := range []int{0, n / 2, n - 1} {
			if n > 0 {
				b[i] = 1
				if IsZero(b) {
					t.Errorf("%d bytes with byte %d set are zero", n, i)
				}
				b[i] = 0
			}
		}
	}
}

func BenchmarkIsZero(b *testing.B) {
	page := make([]byte, units.PageSize)
	b.SetBytes(units.PageSize)
	for b.Loop() {
		if !IsZero(page) {
			b.Fatal()
		}
	}
}

// A map that changed while it was read is read again, and not for ever.
func TestMapThatMoves(t *testing.T) {
	const (
		torn = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \n" +
			"7f0000200000-7f0000300000 rw-p 00000000 00:00 0 \n"
		whole = "7f0000000000-7f0000200000 rw-p 00000000 00:00 0 \n" +
			"7f0000200000-7f0000300000 rw-p 00000000 00:00 0 \n"
	)
	read := func(calm int) (vmas []vma, tries int, err error) {
		vmas, err = readMaps(func() (io.ReadCloser, error) {
			tries++
			text := torn
			if tries >= calm {
				text = whole
			}
			return io.NopCloser(strings.NewReader(text)), nil
		})
		return vmas, tries, err
	}
	if vmas, tries, err := read(3); err != nil || tries != 3 || len(vmas) != 2 {
		t.Errorf("%v, %v after %d tries", vmas, err, tries)
	}
	if _, tries, err := read(1000); !errors.Is(err, errMoved) || tries != mapsTries {
		t.Errorf("%v after %d tries", err, tries)
	}
}
