package evict

import (
	"bytes"
	"testing"

	"vacate/internal/evict/pageset"

	"pgregory.net/rapid"
)

// Wherever placing stopped, the rest has the other pages, each with its own data.
func TestWithout(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := layout{{"pc.ram", 300 * 4096, 4096, 300}, {"huge", 4 << 14, 16 << 10, 4}}
		runs := drawRuns(t, l)
		data := pageData(l, runs)
		var done, left []pageRun
		place := rapid.IntRange(0, pagesOf(runs)).Draw(t, "placed")
		for _, r := range runs {
			n := min(place, r.Count)
			place -= n
			if n > 0 {
				done = append(done,
					pageRun{pageset.Run{Block: r.Block, First: r.First, Count: n}, r.Zero})
			}
			if n < r.Count {
				left = append(left,
					pageRun{pageset.Run{Block: r.Block, First: r.First + pageset.Page(n),
						Count: r.Count - n}, r.Zero})
			}
		}
		before := append([]pageRun(nil), runs...)
		gotRuns, gotData := without(l, runs, data, done)
		if !equalRuns(gotRuns, left) || !bytes.Equal(gotData, pageData(l, left)) {
			t.Fatalf("of %v without %v are left %v, %d bytes; want %v, %d bytes", before, done,
				gotRuns, len(gotData), left, len(pageData(l, left)))
		}
		if !equalRuns(runs, before) {
			t.Fatal("the runs themselves changed")
		}
	})
}

func pagesOf(runs []pageRun) (n int) {
	for _, r := range runs {
		n += r.Count
	}
	return n
}

func equalRuns(a, b []pageRun) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// If zeroes are dropped for which QEMU waits, the engine still counts them as waited for: QEMU asks
// only once.
func TestForget(t *testing.T) {
	l := layout{{Name: "ram", Length: 64 << 12, PageSize: 1 << 12, Pages: 64}}
	e := &destination{incoming: incoming{layout: l}}
	e.pages.begin(l)
	e.pages.claim([]pageRun{{pageset.Run{Count: 64}, true}}, nil)
	run := func(first int) []pageRun {
		return []pageRun{{pageset.Run{First: pageset.Page(first), Count: 2}, true}}
	}
	held := &e.supply.held
	held.parcels = []parcel{{runs: run(4), urgent: true}, {runs: run(8), a: &attachment{}}}
	e.forget(nil)
	if len(held.parcels) != 0 || len(e.pages.waiting) != 2 || e.pages.received[0].Count() != 60 {
		t.Errorf("%d parcels, %v are waited for, %d received", len(held.parcels), e.pages.waiting,
			e.pages.received[0].Count())
	}
	for _, p := range []pageset.Page{4, 5} {
		if _, ok := e.pages.waiting[pageKey{0, p}]; !ok {
			t.Errorf("page %d is not waited for", p)
		}
	}
}
