package guestmem

import (
	"os"
	"path/filepath"
	"testing"

	"vacate/internal/sys/units"
)

// A reopened memory knows where the guest sees it once it is told; what is not possible is refused.
func TestMap(t *testing.T) {
	m := &Memory{pidfd: -1, blocks: []Block{{Name: "pc.ram", Size: 1 << 30},
		{Name: "vga.vram", Size: 16 << 20}}}
	rows := []Mapping{{GPA: 0, Size: 0xa0000, Block: 0},
		{GPA: 0xa0000, Size: 0x20000, Block: 1, Offset: 0x1000},
		{GPA: 1 << 20, Size: 1 << 29, Block: 0, Offset: 1 << 20}}
	if err := m.Map(rows); err != nil {
		t.Fatal(err)
	}
	if got := m.Mappings(); len(got) != len(rows) || got[1] != rows[1] {
		t.Errorf("%+v", got)
	}
	if block, offset, ok := m.Resolve(0xa0010); !ok || block != 1 || offset != 0x1010 {
		t.Errorf("%d %#x %v", block, offset, ok)
	}
	if _, _, ok := m.Resolve(0xd0000); ok {
		t.Error("a hole is memory")
	}
	for _, bad := range [][]Mapping{
		{{Size: 4096, Block: 2}}, {{Size: 4096, Block: -1}}, {{Size: 0}}, {{GPA: 1 << 60, Size: 1}},
		{{Size: 1 << 60}}, {{Size: 1, Offset: 1 << 60}},
		{{GPA: 4096, Size: 4096}, {GPA: 0, Size: 4096}},
		{{GPA: 0, Size: 8192}, {GPA: 4096, Size: 4096}}, make([]Mapping, maxRows+1),
	} {
		if err := m.Map(bad); err == nil {
			t.Errorf("%.3v is taken", bad)
		}
	}
}

func TestParseBlocks(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("testdata", "7.2-pc", "ramblock"))
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := ParseBlocks(string(text))
	if err != nil || len(blocks) < 3 || blocks[0].Name != "pc.ram" || blocks[0].Size == 0 ||
		blocks[0].PageSize != units.PageSize {
		t.Errorf("%+v, %v", blocks, err)
	}
	if _, err := ParseBlocks("nothing"); err == nil {
		t.Error("no list is one")
	}
}
