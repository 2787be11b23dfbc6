package evict

import (
	"errors"
	"testing"

	"vacate/internal/evict/pageset"
	"vacate/internal/link"
	"vacate/internal/qemu/migstream"

	"pgregory.net/rapid"
)

// Pages that are left out, pages that are sent and requests for pages may come in any order. Each
// page that the guest requested is placed, none twice, and those left out as zeroes. The
// destination knows when none is missing.
func TestSkip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := layout{
			{Name: "pc.ram", Length: 300 * migstream.TargetPageSize,
				PageSize: migstream.TargetPageSize, Pages: 300},
			{Name: "large", Length: 4 << 14, PageSize: 16 << 10, Pages: 4},
		}
		out := &sink{}
		e := &destination{incoming: incoming{layout: l}, placer: newPlacer(out, testSection, l)}
		e.pages.begin(l)
		e.units.begin(l)
		free := map[pageKey]bool{}  // left out
		asked := map[pageKey]bool{} // by the guest
		for e.pages.left() > 0 {
			run := rapid.Custom(func(t *rapid.T) pageset.Run {
				b := rapid.IntRange(0, 1).Draw(t, "block")
				first := rapid.IntRange(0, l[b].Pages-1).Draw(t, "first")
				return pageset.Run{Block: b, First: pageset.Page(first),
					Count: rapid.IntRange(1, l[b].Pages-first).Draw(t, "count")}
			}).Draw(t, "run")
			switch rapid.IntRange(0, 2).Draw(t, "op") {
			case 0: // left out
				for p := run.First; p < run.End(); p++ {
					if !e.pages.received[run.Block].Has(p) {
						free[pageKey{run.Block, p}] = true
					}
				}
				if err := e.skip(appendPages(nil, []pageRun{{run, true}})); err != nil {
					t.Fatal(err)
				}
			case 1: // sent
				r := []pageRun{{run, false}}
				if _, err := e.receive(parcel{},
					append(appendPages(nil, r), pageData(l, r)...)); err != nil {
					t.Fatal(err)
				}
			case 2: // asked for
				for p := run.First; p < run.End(); p++ {
					asked[pageKey{run.Block, p}] = true
				}
				_, zero := e.pages.want(run)
				if _, _, err := e.placer.place(zero, nil, true); err != nil {
					t.Fatal(err)
				}
				if len(zero) > 0 {
					e.pages.placed(zero)
				}
			}
		}
		select {
		case <-e.pages.done():
		default:
			t.Fatal("no page is missing, and that is not said")
		}
		if len(e.pages.waiting) != 0 {
			t.Fatalf("%d pages are still waited for", len(e.pages.waiting))
		}
		if err := e.placer.end(); err != nil {
			t.Fatal(err)
		}
		placed := decoded(t, l, out.Bytes()) // fails if one comes twice
		for i, b := range l {
			for p := range pageset.Page(b.Pages) {
				data, there := placed[pageKey{i,
					p * pageset.Page(b.PageSize/migstream.TargetPageSize)}]
				key := pageKey{i, p}
				switch {
				case there && data == free[key]:
					t.Fatalf("page %+v: data %v, left out %v", key, data, free[key])
				case !there && (asked[key] || !free[key]):
					t.Fatalf("page %+v was not placed; asked for %v, left out %v", key, asked[key],
						free[key])
				}
			}
		}
	})
}

func TestSkipRefusesData(t *testing.T) {
	l := layout{{Name: "pc.ram", Length: 4 * migstream.TargetPageSize,
		PageSize: migstream.TargetPageSize, Pages: 4}}
	e := &destination{incoming: incoming{layout: l}}
	r := []pageRun{{pageset.Run{Count: 1}, false}}
	if err := e.skip(append(appendPages(nil, r), pageData(l, r)...)); !errors.Is(err,
		link.ErrPeer) {
		t.Error(err)
	}
}

// Pages that were left out and that the guest has touched are missing until they are placed. QEMU
// must not hear before that it has all.
func TestSkippedInFlight(t *testing.T) {
	l := layout{{Name: "pc.ram", Length: 4 * migstream.TargetPageSize,
		PageSize: migstream.TargetPageSize, Pages: 4}}
	e := &destination{incoming: incoming{layout: l}}
	e.pages.begin(l)
	e.units.begin(l)
	whole := func() bool {
		select {
		case <-e.pages.done():
			return true
		default:
			return false
		}
	}
	if err := e.skip(appendPages(nil, []pageRun{{pageset.Run{First: 0, Count: 2}, true}})); err !=
		nil {
		t.Fatal(err)
	}
	_, free := e.pages.want(pageset.Run{First: 0, Count: 1})
	last, _, _ := e.pages.claim([]pageRun{{pageset.Run{First: 2, Count: 2}, true}}, nil)
	e.pages.placed(last)
	if len(free) == 0 || whole() {
		t.Fatal("all is said to be there, and pages that the guest waits for are yet to be placed")
	}
	e.pages.placed(free)
	if !whole() {
		t.Fatal("all is there, and that is not said")
	}
}
