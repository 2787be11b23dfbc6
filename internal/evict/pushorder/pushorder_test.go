package pushorder

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/guest/pageclass"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// survey draws what a survey may say about a guest's pages, true or not.
func survey(t *rapid.T, frames int) *pageclass.Survey {
	s := &pageclass.Survey{
		Pages: make([]pageclass.Page, rapid.IntRange(0, frames+100).Draw(t, "known")),
		Fresh: rapid.Bool().Draw(t, "fresh"),
		Sequence: rapid.SliceOfN(rapid.Uint32Range(0, uint32(frames)+100), 0, 200).Draw(t,
			"sequence"),
	}
	for range rapid.IntRange(0, 3).Draw(t, "processes") {
		s.Processes = append(s.Processes, pageclass.Process{})
	}
	r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
	for i := range s.Pages {
		s.Pages[i] = pageclass.Page{
			Kind:  pageclass.Kind(r.IntN(int(pageclass.Kinds) + 2)),
			Class: pageclass.Class(r.IntN(int(pageclass.Classes))),
			Flags: pageclass.Flags(r.IntN(256)), Owner: uint16(r.IntN(5)),
		}
	}
	return s
}

// Whatever is fetched, taken and planned, each page is handed out exactly once, and the order ends.
func TestEachPageOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var blocks []Block
		total := 0
		for range rapid.IntRange(1, 3).Draw(t, "blocks") {
			b := Block{rapid.IntRange(1, 500).Draw(t, "pages"),
				4096 << rapid.SampledFrom([]int{0, 9}).Draw(t, "size")}
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
		var frames []Frames
		at := uint64(0)
		for i, b := range blocks {
			at += uint64(rapid.IntRange(0, 50).Draw(t, "hole"))
			frames = append(frames, Frames{at, pageset.Run{Block: i, Count: b.Pages}})
			at += uint64(b.Pages) * uint64(b.PageSize/4096)
		}
		near := rapid.Bool().Draw(t, "near")
		o := New(blocks, near)
		seen := make([]*pageset.Set, len(blocks))
		for i, b := range blocks {
			seen[i] = pageset.New(b.Pages)
		}
		handed := 0
		account := func(runs []pageset.Run) {
			for _, r := range runs {
				if n := seen[r.Block].AddRun(r.First, r.Count); n != r.Count {
					t.Fatalf("run %+v: %d of its pages were handed out before or do not exist", r,
						r.Count-n)
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
				account(o.Take(run.Draw(t, "take"), Early))
			case op == 2 && step < 200:
				o.SetPlan(PlanOf(rapid.SliceOf(run).Draw(t, "plan")))
			case op == 3 && step < 200:
				policy := Policy{Base(rapid.IntRange(0, int(bases)-1).Draw(t, "base")), near}
				s := survey(t, int(at))
				o.SetPlan(NewPlan(policy, blocks, s, frames,
					rapid.SliceOf(run).Draw(t, "first")...))
				if rapid.Bool().Draw(t, "kin") {
					o.SetKinship(NewKinship(policy, blocks, s, frames))
				}
				if rapid.Bool().Draw(t, "skip") {
					for r := range Skippable(blocks, s, frames) {
						account(o.Take(r, Skipped))
					}
				}
			case op == 4 && step < 200:
				account(o.NextNear(nil, 5))
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
		for i, b := range blocks {
			for p := range b.Pages {
				if why, _ := o.Why(i, pageset.Page(p)); why == Left || why >= Reasons {
					t.Fatalf("page %d of block %d was handed out: %v", p, i, why)
				}
			}
		}
	})
}

func TestNeighboursOfTheLatestFetchComeFirst(t *testing.T) {
	o := New([]Block{{Pages: 10000, PageSize: 4096}}, true)
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
	o := New([]Block{{Pages: 100, PageSize: 4096}, {Pages: 10, PageSize: 2 << 20}}, true)
	o.SetPlan(PlanOf([]pageset.Run{{Block: 1, First: 3, Count: 2},
		{Block: 0, First: 90, Count: 50}}))
	var got []pageset.Run
	for o.Left() > 0 {
		got, _ = o.Next(got, 1000)
	}
	want := []pageset.Run{
		{Block: 1, First: 3, Count: 2}, {Block: 0, First: 90, Count: 10},
		{Block: 0, First: 0, Count: 90}, {Block: 1, First: 0, Count: 3},
		{Block: 1, First: 5, Count: 5},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// all hands out everything that is left.
func all(o *Order) []pageset.Run {
	var got []pageset.Run
	for o.Left() > 0 {
		got, _ = o.Next(got, 1000)
	}
	return got
}

// A small guest: the first four frames are in block 1, the others, behind a hole, in block 0.
var (
	smallBlocks = []Block{{Pages: 6, PageSize: 4096}, {Pages: 4, PageSize: 4096}}
	smallFrames = []Frames{{0, pageset.Run{Block: 1, Count: 4}},
		{100, pageset.Run{Block: 0, Count: 6}}}
)

func smallSurvey() *pageclass.Survey {
	s := &pageclass.Survey{Pages: make([]pageclass.Page, 106), Processes: []pageclass.Process{
		{Name: "idle", LastRun: 1, Active: true, Recent: 0},
		{Name: "busy", LastRun: 2, Active: true, Recent: 50 * time.Millisecond},
	}}
	s.Pages[0] = pageclass.Page{Kind: pageclass.FreeBuddy, Class: pageclass.Free,
		Flags: pageclass.Skippable}
	s.Pages[1] = pageclass.Page{Kind: pageclass.FreePerCPU, Class: pageclass.Free}
	s.Pages[2] = pageclass.Page{Kind: pageclass.Slab, Class: pageclass.Kernel}
	s.Pages[3] = pageclass.Page{Kind: pageclass.Anon, Class: pageclass.UserData,
		Flags: pageclass.Mapped, Owner: 1}
	s.Pages[100] = pageclass.Page{Kind: pageclass.Anon, Class: pageclass.UserData,
		Flags: pageclass.Mapped, Owner: 2}
	s.Pages[101] = pageclass.Page{Kind: pageclass.Anon, Class: pageclass.Other,
		Flags: pageclass.Mapped}
	s.Pages[102] = pageclass.Page{Kind: pageclass.UserPageTable, Class: pageclass.PageTable,
		Owner: 2}
	s.Pages[103] = pageclass.Page{Kind: pageclass.File, Class: pageclass.FileInactive}
	s.Pages[104] = pageclass.Page{Kind: pageclass.File, Class: pageclass.FileActive,
		Flags: pageclass.Active}
	s.Pages[105] = pageclass.Page{Kind: pageclass.KernelText, Class: pageclass.KernelCode}
	return s
}

func TestPlans(t *testing.T) {
	page := func(block, first int) pageset.Run {
		return pageset.Run{Block: block, First: pageset.Page(first), Count: 1}
	}
	for _, test := range []struct {
		base Base
		want []pageset.Run
	}{
		{Enlightened, []pageset.Run{
			page(0, 2), page(0, 0), // page tables and memory of the busy process
			{Block: 0, First: 4, Count: 2}, page(1, 2), // active file, kernel text; slab
			page(1, 3), // the idle process
			page(0, 1), page(0, 3), page(1, 1), page(1, 0),
		}},
		{Classes, []pageset.Run{
			page(0, 5), page(1, 2), page(0, 2),
			page(1, 3), page(0, 0), // the one that ran last before the other
			page(0, 4), page(0, 3), page(0, 1), {Block: 1, First: 0, Count: 2},
		}},
		{Address, []pageset.Run{{Block: 0, Count: 6}, {Block: 1, Count: 4}}},
	} {
		o := New(smallBlocks, false)
		o.SetPlan(NewPlan(Policy{test.base, false}, smallBlocks, smallSurvey(), smallFrames))
		if diff := cmp.Diff(test.want, all(o)); diff != "" {
			t.Errorf("%v: %s", test.base, diff)
		}
	}
	if diff := cmp.Diff([]pageset.Run{page(1, 0)},
		slices.Collect(Skippable(smallBlocks, smallSurvey(), smallFrames))); diff != "" {
		t.Error("skippable:", diff)
	}
}

// A huge page ranks like the best of its frames, and is free only if all of them are.
func TestHugePages(t *testing.T) {
	blocks := []Block{{Pages: 3, PageSize: 2 << 20}}
	frames := []Frames{{512, pageset.Run{Count: 3}}}
	s := &pageclass.Survey{Pages: make([]pageclass.Page, 4*512)}
	for i := range s.Pages {
		s.Pages[i] = pageclass.Page{Kind: pageclass.FreeBuddy, Class: pageclass.Free,
			Flags: pageclass.Skippable}
	}
	s.Pages[2*512+7] = pageclass.Page{Kind: pageclass.Slab, Class: pageclass.Kernel}
	if diff := cmp.Diff([]pageset.Run{{First: 0, Count: 1}, {First: 2, Count: 1}},
		slices.Collect(Skippable(blocks, s, frames))); diff != "" {
		t.Error(diff)
	}
	o := New(blocks, false)
	o.SetPlan(NewPlan(Policy{Base: Enlightened}, blocks, s, frames))
	if got, _ := o.Next(nil, 1); got[0].First != 1 {
		t.Errorf("page %d comes first", got[0].First)
	}
	s.Pages = s.Pages[:4*512-1]
	if got := slices.Collect(Skippable(blocks, s, frames)); pageset.Pages(got) != 1 {
		t.Errorf("%v: a page that is not known whole counts as free", got)
	}
}

// Runs that are too long for one piece of a plan are pushed all the same, and so are runs that no
// plan can name.
func TestLongRuns(t *testing.T) {
	blocks := []Block{{Pages: 3*maxCount + 7, PageSize: 4096}}
	frames := []Frames{{5, pageset.Run{First: 2, Count: 3*maxCount + 1}}}
	s := &pageclass.Survey{Pages: slices.Repeat([]pageclass.Page{{Kind: pageclass.FreeBuddy,
		Class: pageclass.Free, Flags: pageclass.Skippable}}, 3*maxCount+6)}
	pages := 0
	for r := range Skippable(blocks, s, frames) {
		if want := pageset.Page(2 + pages); r.First != want {
			t.Errorf("a run begins with page %d, want %d", r.First, want)
		}
		pages += r.Count
	}
	if pages != 3*maxCount+1 {
		t.Errorf("%d pages are skippable, want %d", pages, 3*maxCount+1)
	}
	p := NewPlan(Default, blocks, s, frames,
		pageset.Run{First: maxFirst + 1, Count: 1}, pageset.Run{Block: maxBlock + 1, Count: 1})
	if len(p) != 4 {
		t.Errorf("%d pieces, want 4", len(p))
	}
	o := New(blocks, false)
	o.SetPlan(p)
	if got, _ := o.Next(nil, 1); got[0].First != 2 {
		t.Errorf("page %d comes first, want 2", got[0].First)
	}
	if n := pageset.Pages(all(o)); n != blocks[0].Pages-1 {
		t.Errorf("%d pages, want %d", n, blocks[0].Pages-1)
	}
}

func TestLocate(t *testing.T) {
	got := Locate(smallBlocks, []uint64{105, 2, 4, 99, 106, 1 << 60, 100, 0}, smallFrames)
	want := []pageset.Run{{Block: 0, First: 5, Count: 1}, {Block: 1, First: 2, Count: 1},
		{Block: 0, First: 0, Count: 1}, {Block: 1, First: 0, Count: 1}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Where the address spaces are known, the neighbours of a fetch are those in them.
func TestKin(t *testing.T) {
	s := smallSurvey()
	s.Sequence = []uint32{100, 3, 500, 101, 3, 102}
	policy := Policy{Enlightened, true}
	o := New(smallBlocks, true)
	o.SetPlan(NewPlan(policy, smallBlocks, s, smallFrames))
	o.SetKinship(NewKinship(policy, smallBlocks, s, smallFrames))
	o.Fetch(pageset.Run{Block: 1, First: 3, Count: 1})
	var got [][]pageset.Run
	for range 2 {
		near := o.NextNear(nil, 10)
		got = append(got, near)
	}
	want := [][]pageset.Run{{{Block: 0, First: 1, Count: 2}}, {{Block: 0, First: 0, Count: 1}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if o.Fetch(pageset.Run{Block: 0, First: 2, Count: 1}) != nil {
		t.Error("handed out twice")
	}
	if why, late := o.Why(0, 2); why != Near || !late {
		t.Errorf("a page that was on its way: %v, late %v", why, late)
	}
	if why, late := o.Why(1, 3); why != Fetched || late {
		t.Errorf("a page that was fetched: %v, late %v", why, late)
	}
}

// Where the address spaces are known, a page that is in none has a quarter of the neighbours.
func TestFewNeighboursOfTheKernel(t *testing.T) {
	blocks := []Block{{Pages: 1000, PageSize: 4096}}
	frames := []Frames{{0, pageset.Run{Count: 1000}}}
	s := &pageclass.Survey{Pages: make([]pageclass.Page, 1000), Sequence: []uint32{1, 2}}
	for _, test := range []struct {
		kin   *Kinship
		pages int
	}{
		{nil, Neighbourhood/4096 - 1},
		{NewKinship(Default, blocks, s, frames), Neighbourhood/4096/4 - 1},
	} {
		o := New(blocks, true)
		o.SetKinship(test.kin)
		o.Fetch(pageset.Run{First: 500, Count: 1})
		n := 0
		for near := o.NextNear(nil, 1000); len(near) > 0; near = o.NextNear(nil, 1000) {
			n += pageset.Pages(near)
		}
		if n != test.pages {
			t.Errorf("%d neighbours, want %d", n, test.pages)
		}
	}
}

func TestPolicyNames(t *testing.T) {
	for _, p := range Policies() {
		if got, err := ParsePolicy(p.String()); err != nil || got != p {
			t.Errorf("%v: %v, %v", p, got, err)
		}
	}
	for _, s := range []string{"", "+near", "unset", "address+near+near", "Address"} {
		if _, err := ParsePolicy(s); err == nil {
			t.Errorf("%q is an order", s)
		}
	}
}

// BenchmarkPlan plans a guest of 1 GiB. Half of it is mapped in no good order.
func BenchmarkPlan(b *testing.B) {
	const pages = 1 << 18
	blocks := []Block{{Pages: pages, PageSize: 4096}}
	frames := []Frames{{0, pageset.Run{Count: pages}}}
	s := &pageclass.Survey{Pages: make([]pageclass.Page, pages),
		Processes: make([]pageclass.Process, 50)}
	r := rand.New(rand.NewPCG(1, 1))
	for i := 0; i < pages; {
		p := pageclass.Page{Kind: pageclass.Kind(1 + r.IntN(int(pageclass.Kinds)-1)),
			Class: pageclass.UserData, Owner: uint16(r.IntN(50))}
		for n := 1 + r.IntN(16); n > 0 && i < pages; n-- {
			s.Pages[i] = p
			if p.Kind >= pageclass.ZeroPage {
				s.Sequence = append(s.Sequence, uint32(i))
			}
			i++
		}
	}
	b.Run("plan", func(b *testing.B) {
		for b.Loop() {
			NewPlan(Default, blocks, s, frames)
		}
	})
	b.Run("kinship", func(b *testing.B) {
		for b.Loop() {
			NewKinship(Default, blocks, &pageclass.Survey{Sequence: slices.Clone(s.Sequence)},
				frames)
		}
	})
}

// A plan of single pages is handed out as many pages at a time as one of long runs, in its order.
func TestScatteredPlan(t *testing.T) {
	o := New([]Block{{Pages: 100, PageSize: 4096}, {Pages: 100, PageSize: 4096}}, true)
	var plan []pageset.Run
	for _, r := range []pageset.Run{{Block: 0, First: 90}, {Block: 0, First: 10}, {Block: 0,
		First: 50}, {Block: 1, First: 7}, {Block: 1, First: 5}} {
		r.Count = 1
		plan = append(plan, r)
	}
	plan = append(plan, pageset.Run{Block: 1, First: 20, Count: 10})
	o.SetPlan(PlanOf(plan))
	o.Take(pageset.Run{Block: 0, First: 10, Count: 1}, Early)
	for _, want := range [][]pageset.Run{
		{{Block: 0, First: 90, Count: 1}, {Block: 0, First: 50, Count: 1}}, // one block at a time
		{{Block: 1, First: 7, Count: 1}, {Block: 1, First: 5, Count: 1},
			{Block: 1, First: 20, Count: 3}},
		{{Block: 1, First: 23, Count: 5}},
	} {
		got, why := o.Next(nil, 5)
		if diff := cmp.Diff(want, got); diff != "" || why != Planned {
			t.Errorf("%v, as %v: %s", got, why, diff)
		}
	}
}
