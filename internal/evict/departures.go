package evict

import (
	"sync"
	"sync/atomic"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/evict/pushorder"
)

// departures are the pages of a VM at its source: which goes next, which went, and why. The push,
// the fetches and the survey take pages at once, from tasks of their own.
//
// One lock makes sure that each page is handed out once, and guards nothing else. The counts are
// beside it, so that progress never waits for the planner.
type departures struct {
	sent  [pushorder.Reasons]atomic.Int64 // pages by reason
	total atomic.Int64                    // of the VM; 0 before begin
	asked atomic.Int64                    // pages that the guest waited for
	given atomic.Int64                    // pages given back to the host, by this engine
	trace tracer                          // has a lock of its own

	mu       sync.Mutex
	order    *pushorder.Order // guarded by mu; nil before begin
	askedFor []*pageset.Set   // as asked; guarded by mu
}

// begin sets the layout of the VM's memory, and the policy of the push. No page went yet. begun is
// when the eviction began.
func (d *departures) begin(l layout, policy pushorder.Policy, begun time.Time) {
	d.total.Store(int64(l.pages()))
	d.trace.open(begun, l)
	blocks := l.blocks()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.order = pushorder.New(blocks, policy.Near)
	d.order.SetPlan(pushorder.NewPlan(policy, blocks, nil, nil))
	d.askedFor = make([]*pageset.Set, len(l))
	for i, b := range l {
		d.askedFor[i] = pageset.New(b.Pages)
	}
}

// plan makes the push follow a plan, which it keeps.
func (d *departures) plan(p pushorder.Plan) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.order.SetPlan(p)
}

// relate sets which pages are neighbours.
func (d *departures) relate(kin *pushorder.Kinship) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.order.SetKinship(kin)
}

// take takes the pages that are left, and returns them.
func (d *departures) take(runs []pageset.Run, why pushorder.Reason) (taken []pageset.Run) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range runs {
		taken = append(taken, d.order.Take(r, why)...)
	}
	return taken
}

// leaveOut leaves out pages that next has handed out.
func (d *departures) leaveOut(runs []pageset.Run, why pushorder.Reason) {
	d.mu.Lock()
	for _, r := range runs {
		d.order.Relabel(r, why)
	}
	d.mu.Unlock()
	d.count(why, runs)
}

// next hands out the pages to push next. While the plan is held, these are only neighbours of
// fetches.
func (d *departures) next(held bool,
	limit int) (runs []pageset.Run, reason pushorder.Reason, left int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if held {
		runs, reason = d.order.NextNear(nil, limit), pushorder.Near
	} else {
		runs, reason = d.order.Next(nil, limit)
	}
	return runs, reason, d.order.Left()
}

// fetch takes the pages that the guest waits for and that are left. After a lost link the
// destination asks for them once more; they count once.
func (d *departures) fetch(r pageset.Run) []pageset.Run {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked.Add(int64(d.askedFor[r.Block].AddRun(r.First, r.Count)))
	return d.order.Fetch(r)
}

// rejoin puts back what the destination lacks: has are the pages of each block that it has. It
// returns the pages that are left out, and how many must be sent again.
func (d *departures) rejoin(has []*pageset.Set) (skipped []pageset.Run, again int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, set := range has {
		for p := range pageset.Page(set.Size()) {
			run := pageset.Run{Block: i, First: p, Count: 1}
			switch why, _ := d.order.Why(i, p); {
			case set.Has(p) && why == pushorder.Left:
				d.order.Take(run, pushorder.Before)
				d.count(pushorder.Before, []pageset.Run{run})
			case set.Has(p) || why == pushorder.Left:
			case why == pushorder.Skipped || why == pushorder.Unused:
				skipped = append(skipped, run)
			default:
				d.order.Return(run)
				d.sent[why].Add(-1)
				again++
			}
		}
	}
	return skipped, again
}

// each calls f with each page, and how it went.
func (d *departures) each(l layout,
	f func(block int, p pageset.Page, why pushorder.Reason, late bool)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.order == nil {
		return
	}
	for i, b := range l {
		for p := range pageset.Page(b.Pages) {
			why, late := d.order.Why(i, p)
			f(i, p, why, late)
		}
	}
}

// count takes note of pages that are sent, or left out.
func (d *departures) count(why pushorder.Reason, runs []pageset.Run) {
	d.sent[why].Add(int64(pageset.Pages(runs)))
	d.trace.note(why, runs)
}

func (d *departures) pages(why pushorder.Reason) int { return int(d.sent[why].Load()) }

// sentPages returns the number of pages that were sent.
func (d *departures) sentPages() int {
	return d.settled() - d.pages(pushorder.Skipped) - d.pages(pushorder.Unused) -
		d.pages(pushorder.Before)
}

// settled returns the number of pages that are sent, or need not be.
func (d *departures) settled() int {
	n := int64(0)
	for i := range d.sent {
		n += d.sent[i].Load()
	}
	return int(n)
}
