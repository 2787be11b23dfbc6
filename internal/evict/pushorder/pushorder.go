// Package pushorder decides which page of a frozen guest is sent next. No other package decides
// order. It is pure and deterministic, and knows neither QEMU nor the link.
//
// There is one queue per reason, and the first that is not empty is served:
//
//  1. fetches: pages the running guest waits for. They never wait here: Fetch hands the
//     page out at once.
//  2. neighbours of recent fetches, the most recent first: a guest that touched a page
//     will soon touch those beside it. These are neighbours in its address space if that
//     is known, else in its physical memory.
//  3. the plan: all other pages, in the order of a Policy, which may use what is known
//     about the guest's pages. It may come, or be replaced, at any time.
//
// A page is handed out exactly once, whichever queue it is in. The order remembers why.
package pushorder

import (
	"slices"

	"vacate/internal/evict/pageset"
)

// Reason is why a page was handed out.
type Reason uint8

// The reasons. Those from Fetched to Planned are in the order in which they are served.
const (
	Left    Reason = iota // not yet
	Early                 // before the guest runs at the destination, which needs it first
	Fetched               // the guest waits for it
	Near                  // a neighbour of a page that was fetched
	Planned
	Skipped // it is free in the guest, and not sent at all
	Unused  // the source has no memory for it, and it is not sent at all
	Before  // it was at the destination already
	Reasons // the number of reasons
)

func (r Reason) String() string {
	return [...]string{"left", "early", "fetched", "near", "planned", "skipped", "unused", "before",
		"none"}[min(r, Reasons)]
}

// Neighbourhood is how many bytes around a fetched page are pushed next: half of them before it,
// half behind it. Around a page known to be the kernel's, it is a quarter of that.
const Neighbourhood = 256 << 10

// maxNear bounds how many spans of neighbours are remembered; the plan has the older ones.
const maxNear = 512

// late marks a page for which the guest waited after it was handed out.
const late = 0x80

// Order holds the pages not yet handed out. It is not safe for concurrent use.
type Order struct {
	near   bool
	left   []*pageset.Set
	radius []pageset.Page // of the neighbourhood, by block
	why    [][]uint8      // reason and late, per page of each block
	total  int

	spans []span // of neighbours, the newest last
	plan  Plan
	at    int           // first run of the plan that may still have pages
	rest  []pageset.Run // all pages, by address: behind the plan
	kin   *Kinship

	returned []pageset.Run // ahead of the plan
}

// span is a run of neighbours. It holds a block's pages or, if virtual is set, places in the
// sequence of pages as the guest's processes see them.
type span struct {
	pageset.Run
	virtual bool
}

// Block is a block's extent, in pages and bytes per page.
type Block struct {
	Pages    int
	PageSize int
}

// New returns an order over all pages of the blocks. Until there is a plan, it goes by address.
// With near, neighbours of fetches come first.
func New(blocks []Block, near bool) *Order {
	o := &Order{near: near}
	for _, b := range blocks {
		o.left = append(o.left, pageset.Full(b.Pages))
		o.radius = append(o.radius, pageset.Page(max(1, Neighbourhood/2/b.PageSize)))
		o.why = append(o.why, make([]uint8, b.Pages))
		o.total += b.Pages
		o.rest = append(o.rest, pageset.Run{Block: len(o.rest), Count: b.Pages})
	}
	return o
}

// SetPlan replaces the order of the pages that no other queue holds. It may be called at any time,
// and the plan may name any pages. Pages that it does not name come last, by address. The order
// keeps the plan, and changes it.
func (o *Order) SetPlan(plan Plan) { o.plan, o.at = plan, 0 }

// SetKinship makes neighbours those in the guest's address spaces, as far as these are known. It
// may be called at any time.
func (o *Order) SetKinship(k *Kinship) {
	o.kin = k
	// these spans are places in the old kinship
	o.spans = slices.DeleteFunc(o.spans, func(s span) bool { return s.virtual })
}

// Left returns the number of pages not yet handed out.
func (o *Order) Left() int { return o.total }

// Take hands out those of the run's pages that are left, for a reason that the caller gives.
func (o *Order) Take(run pageset.Run, why Reason) []pageset.Run {
	return o.take(nil, run, run.Count, why)
}

// Fetch hands out the run's pages that are left, as the guest waits for one of them. It puts the
// neighbours of the run's first page at the head of the queue. Pages that are on their way already
// it marks as late.
func (o *Order) Fetch(run pageset.Run) []pageset.Run {
	if run.Block < 0 || run.Block >= len(o.left) {
		return nil
	}
	why := o.why[run.Block]
	for p := run.First; p < run.End() && p < pageset.Page(len(why)); p++ {
		if r := Reason(why[p]); r == Near || r == Planned {
			why[p] |= late
		}
	}
	if o.near {
		o.addNeighbours(run)
	}
	return o.take(nil, run, run.Count, Fetched)
}

func (o *Order) addNeighbours(run pageset.Run) {
	if drop := len(o.spans) + 2 - maxNear; drop > 0 {
		o.spans = append(o.spans[:0], o.spans[drop:]...)
	}
	radius, virtual := o.radius[run.Block], false
	if at, ok := o.kin.place(run.Block, run.First); ok {
		run, virtual = pageset.Run{First: at}, true
	} else if o.kin != nil {
		// The page belongs to no process, so it is the kernel's, and the guest needs little around
		// it soon. The neighbours of 150 such pages, 23 MiB, once delayed what a busy process
		// waited for.
		radius = max(1, radius/4)
	}
	first := run.First - min(run.First, radius)
	// The guest is more likely to need what follows the page than what precedes it.
	o.spans = append(o.spans,
		span{pageset.Run{Block: run.Block, First: first, Count: int(run.First - first)}, virtual},
		span{pageset.Run{Block: run.Block, First: run.First, Count: int(radius)}, virtual})
}

// Next hands out up to limit pages to push. It appends them to dst as runs, and returns the reason.
// All have one reason and are in one block. It hands out none only when none are left.
func (o *Order) Next(dst []pageset.Run, limit int) ([]pageset.Run, Reason) {
	if got := o.NextNear(dst, limit); len(got) > len(dst) {
		return got, Near
	}
	for ; len(o.returned) > 0; o.returned = o.returned[1:] {
		if got := o.take(dst, o.returned[0], limit, Planned); len(got) > len(dst) {
			return got, Planned
		}
	}
	// One run after the other, as scattered pages are runs of few pages, or one: frames of so few
	// would cost both hosts far more CPU time than the pages themselves.
	n, full := len(dst), false
	more := func(run pageset.Run) (left pageset.Run) {
		if len(dst) > n && run.Block != dst[n].Block {
			full = true
			return run
		}
		before := o.total
		dst = o.take(dst, run, limit, Planned)
		if limit -= before - o.total; limit > 0 {
			return pageset.Run{}
		}
		full = true
		// Nothing before the end of the last run is left.
		end := dst[len(dst)-1].End()
		return pageset.Run{Block: run.Block, First: end, Count: run.Count - int(end-run.First)}
	}
	for ; o.at < len(o.plan); o.at++ {
		if left := more(o.plan[o.at].run()); full {
			o.plan[o.at], _ = pack(left)
			return dst, Planned
		}
	}
	for ; len(o.rest) > 0; o.rest = o.rest[1:] {
		if left := more(o.rest[0]); full {
			o.rest[0] = left
			return dst, Planned
		}
	}
	return dst, Planned
}

// NextNear is Next that hands out neighbours only.
func (o *Order) NextNear(dst []pageset.Run, limit int) []pageset.Run {
	for len(o.spans) > 0 {
		last := &o.spans[len(o.spans)-1]
		var got []pageset.Run
		if last.virtual {
			got = o.takeKin(dst, last, limit)
		} else {
			got = o.take(dst, last.Run, limit, Near)
		}
		if len(got) > len(dst) {
			return got
		}
		o.spans = o.spans[:len(o.spans)-1]
	}
	return dst
}

// takeKin takes pages of a span of the sequence, as long as they are in one block.
func (o *Order) takeKin(dst []pageset.Run, s *span, limit int) []pageset.Run {
	n := len(dst)
	for s.Count > 0 && limit > 0 {
		block, page, ok := o.kin.page(s.First)
		if len(dst) > n && ok && block != dst[n].Block {
			break
		}
		s.First++
		s.Count--
		if !ok {
			continue
		}
		before := o.total
		// Neighbours in both orders make one run.
		if last := len(dst) - 1; last >= n && dst[last].End() == page && o.left[block].Has(page) {
			dst[last].Count++
			o.take(nil, pageset.Run{Block: block, First: page, Count: 1}, 1, Near)
		} else {
			dst = o.take(dst, pageset.Run{Block: block, First: page, Count: 1}, 1, Near)
		}
		limit -= before - o.total
	}
	return dst
}

// take moves up to limit pages of the run from left to dst.
func (o *Order) take(dst []pageset.Run, run pageset.Run, limit int, why Reason) []pageset.Run {
	if run.Block < 0 || run.Block >= len(o.left) || run.Count <= 0 {
		return dst
	}
	set := o.left[run.Block]
	for p := run.First; limit > 0; {
		first, n := set.Next(p, run.End(), limit)
		if n == 0 {
			break
		}
		set.RemoveRun(first, n)
		reasons := o.why[run.Block][first:][:n]
		for i := range reasons {
			reasons[i] = uint8(why)
		}
		o.total -= n
		limit -= n
		dst = append(dst, pageset.Run{Block: run.Block, First: first, Count: n})
		p = first + pageset.Page(n)
	}
	return dst
}

// Return takes back pages that were handed out and did not arrive. The plan continues with them.
func (o *Order) Return(run pageset.Run) {
	set := o.left[run.Block]
	for p := run.First; p < run.End(); p++ {
		if set.Add(p) {
			o.why[run.Block][p] = uint8(Left)
			o.total++
		}
	}
	if n := len(o.returned) - 1; n >= 0 && o.returned[n].Block == run.Block &&
		o.returned[n].End() == run.First {
		o.returned[n].Count += run.Count
		return
	}
	o.returned = append(o.returned, run)
}

// Relabel gives another reason for which pages were handed out.
func (o *Order) Relabel(run pageset.Run, why Reason) {
	for p := run.First; p < run.End(); p++ {
		w := &o.why[run.Block][p]
		*w = *w&late | uint8(why)
	}
}

// Why returns why a page was handed out, and whether the guest waited for it while it was on its
// way.
func (o *Order) Why(block int, p pageset.Page) (why Reason, wasLate bool) {
	w := o.why[block][p]
	return Reason(w &^ late), w&late != 0
}
