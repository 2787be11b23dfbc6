package place

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"vacate/internal/fleet/view"
)

// pace is how long evictions from a host take, but for what sharing a link costs:
//
//	besides + memory in use ÷ (share × what its links take)
//
// Both come from the latest evictions from there, or, if there were none, from the fleet's.
type pace struct {
	// besides is the time in which no memory follows the VM: the order, the checks, the twin's
	// start, execution transfer, the end, and the report that tells of it.
	besides time.Duration
	// share is how much of what its links take evictions use; above 1 if hosts' rates are
	// too low.
	share float64
	by    int    // how many evictions say so; 0: none
	host  string // from which they were; empty: from any
}

const (
	// mostPast is how many evictions make a pace.
	mostPast = 9
	// leastMoving is how long memory has to follow a VM for that to tell of a link. What is shorter
	// tells of how it begins and ends.
	leastMoving = time.Second
	// usualEvery is how far reports are apart where it is not known.
	usualEvery = 3 * time.Second
)

func (p pace) String() string {
	if p.by == 0 {
		return fmt.Sprintf("no eviction has been measured: each is taken to need %v besides its "+
			"memory, and all of its links", p.besides.Round(100*time.Millisecond))
	}
	from := ""
	if p.host != "" {
		from = " from " + p.host
	}
	last := "as the last eviction"
	if p.by > 1 {
		last = fmt.Sprintf("as the last %d evictions", p.by)
	}
	return fmt.Sprintf("%s%s, each takes %v besides its memory, and uses %.0f %% of its links",
		last,
		from, p.besides.Round(100*time.Millisecond), 100*p.share)
}

// Learn is told what came of each move that completed, in the order in which they did.
func (p *Planner) Learn(o view.Outcome) {
	if o.Moving < 0 || o.Took < o.Moving {
		return // a clock has jumped
	}
	for _, of := range []string{o.From, ""} {
		list := append(p.past[of], o)
		p.past[of] = slices.Clone(list[max(0, len(list)-mostPast):])
	}
}

// pace is that of the next evictions from a host.
func (p *Planner) pace(h *host) pace {
	from := h.Name
	list := p.past[from]
	if len(list) == 0 {
		from, list = "", p.past[""]
	}
	if len(list) == 0 { // a report tells of the end, half of the time between two later
		return pace{besides: cmp.Or(h.Transfer, usualTransfer) + cmp.Or(h.every, usualEvery)/2,
			share: 1}
	}
	var besides []time.Duration
	for _, o := range list {
		besides = append(besides, o.Took-o.Moving)
	}
	slices.Sort(besides)
	n := len(besides)
	return pace{besides: (besides[(n-1)/2] + besides[n/2]) / 2, share: p.share(list), by: n,
		host: from}
}

// share is what past evictions used of what their links take, over the time in which memory
// followed any of their VMs.
func (p *Planner) share(list []view.Outcome) float64 {
	list = slices.DeleteFunc(slices.Clone(list), func(o view.Outcome) bool {
		return o.Limited || o.Moving < leastMoving || p.hosts[o.From] == nil || p.hosts[o.To] == nil
	})
	began := func(o view.Outcome) time.Time { return o.Ended.Add(-o.Moving) }
	var turns []time.Time // at which one begins or ends
	moved := 0.0
	for _, o := range list {
		turns = append(turns, began(o), o.Ended)
		moved += float64(o.InUse)
	}
	slices.SortFunc(turns, time.Time.Compare)
	could := 0.0
	for i := range max(1, len(turns)) - 1 {
		out, in := map[*host]float64{}, map[*host]float64{} // what links take in this time
		for _, o := range list {
			if !began(o).After(turns[i]) && !o.Ended.Before(turns[i+1]) {
				from, to := p.hosts[o.From], p.hosts[o.To]
				out[from], in[to] = from.Rate, to.Rate
			}
		}
		could += min(sum(out), sum(in)) * turns[i+1].Sub(turns[i]).Seconds()
	}
	if moved == 0 || could == 0 {
		return 1
	}
	return moved / could
}

func sum(rates map[*host]float64) (all float64) {
	for _, r := range rates {
		all += r
	}
	return all
}
