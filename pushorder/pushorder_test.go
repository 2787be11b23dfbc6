package pushorder

import (
	"testing"

	"vacate/pageset"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// Whatever is fetched, taken and planned, each page is handed out exactly once, and the
// order ends.
func TestEachPageOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var blocks []Block
		total := 0
		for range rapid.IntRange(1, 3).Draw(t, "blocks") {
			b := Block{rapid.IntRange(1, 500).Draw(t, "pages"), 4096 << rapid.SampledFrom([]int{0, 9}).Draw(t, "size")}
			blocks = append(blocks, b)
			total += b.Pages
		}
		run := rapid.Custom(func(t *rapid.T) pageset.Run {
			return pageset.Run{
				Block: rapid.IntRange(-1, len(blocks)).Draw(t, "block"),
				First: pageset.Page(rapid.IntRange(0, 600).Draw(t, "first")),
				Count: rapid.IntRange(-1, 40).Draw(t, "count"),
			}
		})
		o := New(blocks)
		seen := make([]*pageset.Set, len(blocks))
		for i, b := range blocks {
			seen[i] = pageset.New(b.Pages)
		}
		handed := 0
		account := func(runs []pageset.Run) {
			for _, r := range runs {
				if n := seen[r.Block].AddRun(r.First, r.Count); n != r.Count {
					t.Fatalf("run %+v: %d of its pages were handed out before or do not exist", r, r.Count-n)
				}
				handed += r.Count
			}
			if o.Left() != total-handed {
				t.Fatalf("left %d, want %d", o.Left(), total-handed)
			}
		}
		for step := 0; o.Left() > 0; step++ {
			// A tenth of the steps at most, so that the order must end by itself.
			switch op := rapid.IntRange(0, 9).Draw(t, "op"); {
			case op == 0 && step < 200:
				account(o.Fetch(run.Draw(t, "fetch")))
			case op == 1 && step < 200:
				account(o.Take(run.Draw(t, "take")))
			case op == 2 && step < 200:
				o.SetPlan(rapid.SliceOf(run).Draw(t, "plan"))
			default:
				limit := rapid.IntRange(1, 64).Draw(t, "limit")
				got, _ := o.Next(nil, limit)
				if len(got) == 0 {
					t.Fatalf("%d pages are left and none is handed out", o.Left())
				}
				if pageset.Pages(got) > limit {
					t.Fatalf("%d pages handed out, limit %d", pageset.Pages(got), limit)
				}
				account(got)
			}
		}
		if got, _ := o.Next(nil, 10); len(got) != 0 {
			t.Fatalf("nothing is left, got %v", got)
		}
	})
}

func TestNeighboursOfTheLatestFetchComeFirst(t *testing.T) {
	o := New([]Block{{Pages: 10000, PageSize: 4096}})
	o.Fetch(pageset.Run{First: 5000, Count: 1})
	o.Fetch(pageset.Run{First: 9, Count: 1})
	want := []struct {
		runs   []pageset.Run
		reason Reason
	}{
		{[]pageset.Run{{First: 10, Count: 31}}, Near},
		{[]pageset.Run{{First: 0, Count: 9}}, Near},
		{[]pageset.Run{{First: 5001, Count: 31}}, Near},
		{[]pageset.Run{{First: 4968, Count: 32}}, Near},
		{[]pageset.Run{{First: 41, Count: 4927}, {First: 5032, Count: 73}}, Planned},
	}
	for i, w := range want {
		got, reason := o.Next(nil, 5000)
		if diff := cmp.Diff(w.runs, got); diff != "" || reason != w.reason {
			t.Errorf("step %d: %v, want %v: %s", i, reason, w.reason, diff)
		}
	}
}

func TestPlanIsFollowed(t *testing.T) {
	o := New([]Block{{Pages: 100, PageSize: 4096}, {Pages: 10, PageSize: 2 << 20}})
	o.SetPlan([]pageset.Run{{Block: 1, First: 3, Count: 2}, {Block: 0, First: 90, Count: 50}})
	var got []pageset.Run
	for o.Left() > 0 {
		got, _ = o.Next(got, 1000)
	}
	want := []pageset.Run{
		{Block: 1, First: 3, Count: 2}, {Block: 0, First: 90, Count: 10},
		{Block: 0, First: 0, Count: 90}, {Block: 1, First: 0, Count: 3}, {Block: 1, First: 5, Count: 5},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
