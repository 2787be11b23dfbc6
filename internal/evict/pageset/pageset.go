// Package pageset holds sets and runs of pages of a guest's RAM blocks.
//
// A block and an index in it name a page. The index counts in units of the block's own page size: 4
// KiB, or the huge page size of its back end. QEMU's post-copy places memory in these units. Sets
// are plain bit words. A 1 TiB guest costs 32 MiB, and finding the next run of pages takes a few
// instructions.
package pageset

import (
	"iter"
	"math/bits"
)

// Page is the index of a page in its block.
type Page uint64

// Run is Count consecutive pages of one block, from First on.
type Run struct {
	Block int
	First Page
	Count int
}

// End returns the page after the last of the run.
func (r Run) End() Page { return r.First + Page(r.Count) }

// Pages returns the number of pages in runs.
func Pages(runs []Run) int {
	n := 0
	for _, r := range runs {
		n += r.Count
	}
	return n
}

// Set is a set of the pages of one block. It is not safe for concurrent use.
type Set struct {
	words []uint64
	size  int
	count int
}

// New returns an empty set over a block of size pages.
func New(size int) *Set {
	return &Set{words: make([]uint64, (size+63)/64), size: size}
}

// Full returns the set of all pages of a block of size pages.
func Full(size int) *Set {
	s := New(size)
	s.AddRun(0, size)
	return s
}

// Size returns the number of pages of the block, in the set or not.
func (s *Set) Size() int { return s.size }

// Count returns the number of pages in the set.
func (s *Set) Count() int { return s.count }

// Has reports whether p is in the set. A page outside the block is in no set.
func (s *Set) Has(p Page) bool {
	return p < Page(s.size) && s.words[p/64]&(1<<(p%64)) != 0
}

// Add puts p into the set and reports whether it was absent.
func (s *Set) Add(p Page) bool {
	if p >= Page(s.size) || s.Has(p) {
		return false
	}
	s.words[p/64] |= 1 << (p % 64)
	s.count++
	return true
}

// Remove takes p out of the set and reports whether it was there.
func (s *Set) Remove(p Page) bool {
	if !s.Has(p) {
		return false
	}
	s.words[p/64] &^= 1 << (p % 64)
	s.count--
	return true
}

// AddRun puts n pages from first on into the set and returns how many were absent. It ignores pages
// outside the block.
func (s *Set) AddRun(first Page, n int) int {
	return s.change(first, n, func(w *uint64, mask uint64) int {
		absent := mask &^ *w
		*w |= mask
		return bits.OnesCount64(absent)
	}, 1)
}

// RemoveRun takes n pages from first on out of the set and returns how many were there.
func (s *Set) RemoveRun(first Page, n int) int {
	return s.change(first, n, func(w *uint64, mask uint64) int {
		present := mask & *w
		*w &^= mask
		return bits.OnesCount64(present)
	}, -1)
}

func (s *Set) change(first Page, n int, apply func(w *uint64, mask uint64) int, sign int) int {
	if n <= 0 || first >= Page(s.size) {
		return 0
	}
	end := Page(s.size)
	if uint64(n) < uint64(end-first) {
		end = first + Page(n)
	}
	changed := 0
	for p := first; p < end; {
		word, low := p/64, p%64
		mask := ^uint64(0) << low
		if limit := (word + 1) * 64; end < limit {
			mask &= ^uint64(0) >> (limit - end)
		}
		changed += apply(&s.words[word], mask)
		p = (word + 1) * 64
	}
	s.count += sign * changed
	return changed
}

// Next returns the first run of pages in the set from a page on and before end, at most limit pages
// long. It returns a count of 0 when there is none. It looks at no page that the answer does not
// depend on, so that its time does not grow with the block.
func (s *Set) Next(from, end Page, limit int) (first Page, count int) {
	return s.next(from, end, limit, 0)
}

// Runs yields all runs of pages in the set from a page on and before end: the first page, and how
// many. The loop may change what it was given.
func (s *Set) Runs(from, end Page) iter.Seq2[Page, int] { return s.runs(from, end, 0) }

// Gaps is Runs for pages of the block that are not in the set.
func (s *Set) Gaps(from, end Page) iter.Seq2[Page, int] { return s.runs(from, end, ^uint64(0)) }

func (s *Set) runs(from, end Page, invert uint64) iter.Seq2[Page, int] {
	return func(yield func(Page, int) bool) {
		for {
			first, n := s.next(from, end, s.size, invert)
			if n == 0 || !yield(first, n) {
				return
			}
			from = first + Page(n)
		}
	}
}

// End returns the page after the last of the block.
func (s *Set) End() Page { return Page(s.size) }

func (s *Set) next(from, end Page, limit int, invert uint64) (first Page, count int) {
	end = min(end, s.End())
	first = s.find(from, end, invert)
	if first >= end || limit <= 0 {
		return first, 0
	}
	return first, int(s.find(first, min(end-first, Page(limit))+first, ^invert) - first)
}

// find returns the first page from a page on whose bit, after XOR with invert, is set. If there is
// none before end, it returns end. No page of the block lies behind end.
func (s *Set) find(from, end Page, invert uint64) Page {
	if from >= end {
		return end
	}
	word, last := from/64, (end-1)/64
	w := (s.words[word] ^ invert) &^ (1<<(from%64) - 1)
	for w == 0 {
		if word++; word > last {
			return end
		}
		w = s.words[word] ^ invert
	}
	return min(word*64+Page(bits.TrailingZeros64(w)), end)
}
