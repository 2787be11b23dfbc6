package evict

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"vacate/internal/evict/pageset"
	"vacate/internal/qemu/guestmem"
)

var hugeLayout = layout{
	{Name: "ram", Length: 100 * guestmem.HugePage, PageSize: 4096, Pages: 100 * unitPages},
	{Name: "rom", Length: 4096, PageSize: 4096, Pages: 1},
	{Name: "huge", Length: guestmem.HugePage, PageSize: guestmem.HugePage, Pages: 1},
}

// The destination hears what the source reports about huge pages. It accepts nothing outside of the
// block.
func TestHugeFrames(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int{1, 63, 64, 65, 100} {
		want := make([]bool, n)
		for i := range want {
			want[i] = r.IntN(2) == 0
		}
		frame := appendHuge(nil, 0, want)
		block, got, err := hugeLayout.parseHuge(frame)
		if err != nil || block != 0 || !slices.Equal(got, want) {
			t.Errorf("%d units: block %d, %v, %v", n, block, got, err)
		}
		for _, bad := range [][]byte{frame[:len(frame)-1], append(frame, 0), frame[:3], nil} {
			if _, _, err := hugeLayout.parseHuge(bad); !errors.Is(err, errFrame) {
				t.Errorf("%d units, %d of %d bytes: %v", n, len(bad), len(frame), err)
			}
		}
	}
	for name, frame := range map[string][]byte{
		"more than the block has":   appendHuge(nil, 0, make([]bool, 101)),
		"a block without units":     appendHuge(nil, 1, make([]bool, 1)),
		"a block on huge pages":     appendHuge(nil, 2, make([]bool, 1)),
		"a block that is not there": appendHuge(nil, 3, make([]bool, 1)),
		"none":                      appendHuge(nil, 0, nil),
	} {
		if _, _, err := hugeLayout.parseHuge(frame); !errors.Is(err, errFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The task restores units in the order in which they came. Units that did not come are last.
func TestHugeOrder(t *testing.T) {
	e := Destination{}.engine(Running)
	e.incoming.layout = hugeLayout
	e.units.begin(hugeLayout)
	e.units.huge[0] = make([]bool, 100)
	for _, u := range []int{3, 4, 5, 9, 50} {
		e.units.huge[0][u] = true
	}
	came := func(first pageset.Page, count int) {
		e.units.arrived([]pageRun{{Run: pageset.Run{Block: 0, First: first, Count: count}}})
	}
	came(50*unitPages+7, 1)
	came(4*unitPages-1, 2) // of 3 and 4
	came(9*unitPages, unitPages)
	came(50*unitPages, unitPages)
	e.units.arrived([]pageRun{{Run: pageset.Run{Block: 1, Count: 1}}, {Run: pageset.Run{Block: 2,
		Count: 1}}})
	blocks := []guestmem.Block{{Name: "rom"}, {Name: "ram"}}
	h := e.hugePagesIn(blocks)
	want := []hugeUnit{{1, 50}, {1, 3}, {1, 4}, {1, 9}, {1, 5}}
	if got := h.units(); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	// From the journal, by address.
	h.order = nil
	want = []hugeUnit{{1, 3}, {1, 4}, {1, 5}, {1, 9}, {1, 50}}
	if got := h.units(); !slices.Equal(got, want) {
		t.Errorf("from the journal: got %v, want %v", got, want)
	}
}
