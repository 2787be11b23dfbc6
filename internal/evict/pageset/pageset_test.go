package pageset

import (
	"testing"

	"pgregory.net/rapid"
)

// The set behaves like a map of pages, whatever operations it gets.
func TestSetAgainstMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(0, 300).Draw(t, "size")
		set, model := New(size), map[Page]bool{}
		if rapid.Bool().Draw(t, "full") {
			set = Full(size)
			for p := range size {
				model[Page(p)] = true
			}
		}
		for range rapid.IntRange(0, 30).Draw(t, "steps") {
			p := Page(rapid.IntRange(0, size+70).Draw(t, "page"))
			n := rapid.IntRange(-1, 200).Draw(t, "n")
			changed := 0
			switch op := rapid.IntRange(0, 3).Draw(t, "op"); op {
			case 0, 1:
				got := set.Add
				if op == 1 {
					got = set.Remove
				}
				want := p < Page(size) && model[p] == (op == 1)
				if got(p) != want {
					t.Fatalf("op %d of page %d: want %v", op, p, want)
				}
				if want {
					model[p] = op == 0
				}
			default:
				for q := p; n > 0 && q < p+Page(n) && q < Page(size); q++ {
					if model[q] == (op == 3) {
						model[q] = op == 2
						changed++
					}
				}
				got := set.AddRun
				if op == 3 {
					got = set.RemoveRun
				}
				if c := got(p, n); c != changed {
					t.Fatalf("op %d changed %d pages, want %d", op, c, changed)
				}
			}
		}
		count := 0
		for p, in := range model {
			if set.Has(p) != in {
				t.Fatalf("page %d: in set %v, want %v", p, set.Has(p), in)
			}
			if in {
				count++
			}
		}
		if set.Count() != count {
			t.Fatalf("count %d, want %d", set.Count(), count)
		}
		limit := rapid.IntRange(1, 100).Draw(t, "limit")
		seen := 0
		for p := Page(0); ; {
			first, n := set.Next(p, set.End(), limit)
			if n == 0 {
				break
			}
			if n > limit {
				t.Fatalf("run of %d pages, limit %d", n, limit)
			}
			for q := first; q < first+Page(n); q++ {
				if !model[q] {
					t.Fatalf("run has page %d that is not in the set", q)
				}
			}
			seen += n
			p = first + Page(n)
		}
		if seen != count {
			t.Fatalf("runs hold %d pages, want %d", seen, count)
		}
	})
}

// drawRuns draws runs of pages in a block.
func drawRuns(t *rapid.T, size int, each func(first Page, n int)) {
	for range rapid.IntRange(0, 8).Draw(t, "runs") {
		each(Page(rapid.IntRange(0, size-1).Draw(t, "first")), rapid.IntRange(1, 130).Draw(t, "n"))
	}
}

const gaps = ^uint64(0)

// The gaps of a set are the runs of its complement.
func TestNextGap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, 300).Draw(t, "size")
		set, rest := New(size), Full(size)
		drawRuns(t, size, func(first Page, n int) {
			set.AddRun(first, n)
			rest.RemoveRun(first, n)
		})
		from, limit := Page(rapid.IntRange(0, size).Draw(t, "from")), rapid.IntRange(1,
			size).Draw(t, "limit")
		end := Page(rapid.IntRange(0, size+70).Draw(t, "end"))
		first, n := set.next(from, end, limit, gaps)
		wantFirst, want := rest.Next(from, end, limit)
		if n != want || n > 0 && first != wantFirst {
			t.Fatalf("%d pages from %d on, want %d from %d on", n, first, want, wantFirst)
		}
		if n > 0 && first+Page(n) > end {
			t.Fatalf("%d pages from %d on, want none from %d on", n, first, end)
		}
	})
}

// Runs yields the pages of the set in a part of the block, and Gaps the others. A loop may change
// what it was given.
func TestRunsAndGaps(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, 300).Draw(t, "size")
		set, was := New(size), New(size)
		drawRuns(t, size, func(first Page, n int) {
			set.AddRun(first, n)
			was.AddRun(first, n)
		})
		from := Page(rapid.IntRange(0, size).Draw(t, "from"))
		end := Page(rapid.IntRange(0, size+70).Draw(t, "end"))
		gaps := New(size)
		for first, n := range set.Gaps(from, end) {
			if set.AddRun(first, n) != n || gaps.AddRun(first, n) != n {
				t.Fatalf("%d pages from %d on are not all gaps", n, first)
			}
		}
		for first, n := range set.Runs(from, end) {
			if set.RemoveRun(first, n) != n {
				t.Fatalf("%d pages from %d on are not all in the set", n, first)
			}
		}
		for p := range Page(size) {
			inside := p >= from && p < end
			if gaps.Has(p) != (inside && !was.Has(p)) || set.Has(p) != (!inside && was.Has(p)) {
				t.Fatalf("page %d of [%d, %d), in the set before: %t, a gap: %t, left: %t", p, from,
					end, was.Has(p), gaps.Has(p), set.Has(p))
			}
		}
	})
}

// What it takes to find pages must not grow with the block: the push and the arrivals look for
// pages in every frame.
func TestNextLooksNoFartherThanItMust(t *testing.T) {
	for name, fill := range map[string]uint64{"empty": 0, "full": ^uint64(0)} {
		// Looking behind the second word is a panic.
		set := &Set{words: []uint64{fill, fill}, size: 1 << 20}
		if first, n := set.Next(3, 128, 1<<20); fill != 0 && (first != 3 || n != 125) {
			t.Errorf("%s: %d pages from %d on, want 125 from 3 on", name, n, first)
		}
		if first, n := set.next(3, 128, 1<<20, gaps); fill == 0 && (first != 3 || n != 125) {
			t.Errorf("%s: %d pages not there from %d on, want 125 from 3 on", name, n, first)
		}
		if fill == 0 {
			_, n := set.next(3, set.End(), 100, gaps)
			if n != 100 {
				t.Errorf("%s: %d pages not there, want 100", name, n)
			}
			continue
		}
		if _, n := set.Next(3, set.End(), 100); n != 100 {
			t.Errorf("%s: %d pages, want 100", name, n)
		}
	}
}
