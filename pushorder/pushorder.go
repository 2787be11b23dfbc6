// Package pushorder decides which page of a frozen guest is sent next. It is the one
// place where order is decided: pure, deterministic, knowing neither QEMU nor the link.
//
// There is one queue per reason, and the first that is not empty is served:
//
//  1. fetches: pages the running guest waits for. They never wait here: Fetch hands the
//     page out at once.
//  2. neighbours of recent fetches, the most recent first: a guest that touched a page
//     will soon touch those beside it.
//  3. the plan: all other pages, in an order given from outside (SetPlan), by default
//     that of addresses.
//
// A page is handed out exactly once, whichever queue it is in.
package pushorder

import "vacate/pageset"

// Reason is why a page is sent.
type Reason uint8

// The reasons, in the order in which they are served.
const (
	Fetched Reason = iota
	Near
	Planned
	Reasons // the number of reasons
)

func (r Reason) String() string {
	return [...]string{"fetched", "near", "planned", "none"}[min(r, Reasons)]
}

// Neighbourhood is how much of a block around a fetched page is pushed next: half of it
// before, half behind, in bytes.
const Neighbourhood = 256 << 10

// maxNear bounds the fetches whose neighbourhood is remembered; older ones are left to the plan.
const maxNear = 256

// Order holds the pages not yet handed out. It is not safe for concurrent use.
type Order struct {
	left   []*pageset.Set
	radius []pageset.Page // of the neighbourhood, per block
	total  int

	near []pageset.Run // the newest last
	plan []pageset.Run
	at   int // first run of the plan that may still have pages
}

// Block is a block's extent, in pages and bytes per page.
type Block struct {
	Pages    int
	PageSize int
}

// New returns an order over all pages of the blocks.
func New(blocks []Block) *Order {
	o := &Order{}
	for _, b := range blocks {
		o.left = append(o.left, pageset.Full(b.Pages))
		o.radius = append(o.radius, pageset.Page(max(1, Neighbourhood/2/b.PageSize)))
		o.total += b.Pages
	}
	o.SetPlan(nil)
	return o
}

// SetPlan replaces the order of the pages for which there is no better reason. It may be
// called at any time and name any pages, in the order wanted; those that it does not name
// come behind it, by address.
func (o *Order) SetPlan(plan []pageset.Run) {
	o.plan, o.at = append([]pageset.Run(nil), plan...), 0
	for i, set := range o.left {
		o.plan = append(o.plan, pageset.Run{Block: i, Count: set.Size()})
	}
}

// Left is the number of pages not yet handed out.
func (o *Order) Left() int { return o.total }

// Take hands out those of the run's pages that are left.
func (o *Order) Take(run pageset.Run) []pageset.Run {
	return o.take(nil, run, run.Count)
}

// Fetch hands out those of the run's pages that are left, because the guest waits for
// one of them, and puts the neighbours of the run's first page at the head of the queue.
func (o *Order) Fetch(run pageset.Run) []pageset.Run {
	if run.Block < 0 || run.Block >= len(o.left) {
		return nil
	}
	if len(o.near) == maxNear {
		o.near = append(o.near[:0], o.near[1:]...)
	}
	radius := o.radius[run.Block]
	first := run.First - min(run.First, radius)
	// What lies behind the page is more likely to be next than what lies before it.
	o.near = append(o.near,
		pageset.Run{Block: run.Block, First: first, Count: int(run.First - first)},
		pageset.Run{Block: run.Block, First: run.First, Count: int(radius)})
	return o.take(nil, run, run.Count)
}

// Next hands out up to limit pages to be pushed, appended to dst as runs, and the reason.
// All have the same reason and are of the same block. There are none only when none are left.
func (o *Order) Next(dst []pageset.Run, limit int) ([]pageset.Run, Reason) {
	for len(o.near) > 0 {
		last := o.near[len(o.near)-1]
		if got := o.take(dst, last, limit); len(got) > len(dst) {
			return got, Near
		}
		o.near = o.near[:len(o.near)-1]
	}
	for ; o.at < len(o.plan); o.at++ {
		run := &o.plan[o.at]
		got := o.take(dst, *run, limit)
		if len(got) > len(dst) {
			// What lies before the end of the last run taken is gone for good.
			end := got[len(got)-1].End()
			run.Count -= int(end - run.First)
			run.First = end
			return got, Planned
		}
	}
	return dst, Planned
}

// take moves up to limit pages of the run from left to dst.
func (o *Order) take(dst []pageset.Run, run pageset.Run, limit int) []pageset.Run {
	if run.Block < 0 || run.Block >= len(o.left) || run.Count <= 0 {
		return dst
	}
	set := o.left[run.Block]
	for p := run.First; limit > 0; {
		first, n := set.Next(p, limit)
		if n == 0 || first >= run.End() {
			break
		}
		n = min(n, int(run.End()-first))
		set.RemoveRun(first, n)
		o.total -= n
		limit -= n
		dst = append(dst, pageset.Run{Block: run.Block, First: first, Count: n})
		p = first + pageset.Page(n)
	}
	return dst
}
