package churn

import (
	"context"
	"fmt"
	"math/rand/v2"
	"regexp"
	"time"

	"vacate/internal/guest/pageclass"
)

// OverwriteResult is what stops of one guest have shown, or of several.
type OverwriteResult struct {
	Stops       int
	Overwritten uint64 // pages, over all stops
	Memory      uint64 // pages of the guests, over all stops
	Verified    uint64 // pages by the guests' loads
	Events      uint64 // of the guests' allocators, that the oracle has followed
	Problems    []Problem
	OOM         uint64 // deaths of the worker that is meant to die
	// Vmstat are the guests' own counters, from boot on, of such as swapping and compaction.
	Vmstat map[string]uint64

	// The oracle's stops: those at which no event was missing.
	OracleStops    int
	Kinds          [pageclass.Kinds]Coverage
	Contradictions []string // pages skippable and yet allocated
	Belated        int      // those that an unpublished record of their being freed explains

	Failed int            // stops at which there was no survey
	Empty  int            // stops at which nothing was skippable
	Notes  map[string]int // what the surveys said that was not as expected, without its numbers

	Stop, Look, Fill, Read, Run time.Duration
}

// Coverage is how many pages of a kind there were over all of the oracle's stops, and how many
// of them it knew to be allocated: of these it would have noticed if they had been skippable.
type Coverage struct{ Pages, Known uint64 }

func (r *OverwriteResult) add(o *OverwriteResult) {
	r.Stops += o.Stops
	r.Overwritten += o.Overwritten
	r.Memory += o.Memory
	r.Verified += o.Verified
	r.Events += o.Events
	r.Problems = append(r.Problems, o.Problems...)
	r.OOM += o.OOM
	for name, n := range o.Vmstat {
		if r.Vmstat == nil {
			r.Vmstat = map[string]uint64{}
		}
		r.Vmstat[name] += n
	}
	r.OracleStops += o.OracleStops
	for k := range r.Kinds {
		r.Kinds[k].Pages += o.Kinds[k].Pages
		r.Kinds[k].Known += o.Kinds[k].Known
	}
	r.Contradictions = append(r.Contradictions, o.Contradictions...)
	r.Belated += o.Belated
	r.Failed += o.Failed
	r.Empty += o.Empty
	for note, n := range o.Notes {
		r.noted(note, n)
	}
	r.Stop += o.Stop
	r.Look += o.Look
	r.Fill += o.Fill
	r.Read += o.Read
	r.Run += o.Run
}

var numbers = regexp.MustCompile(`(0x)?\b[0-9a-f]*[0-9][0-9a-f]*\b`)

func (r *OverwriteResult) noted(note string, n int) {
	if r.Notes == nil {
		r.Notes = map[string]int{}
	}
	r.Notes[numbers.ReplaceAllString(note, "N")] += n
}

// silence is how long a running guest on a busy machine may say nothing.
const silence = 30 * time.Second

// Overwrite stops the guest so many times at random moments, fills what a survey calls
// skippable with garbage, asks the oracle, and lets the guest run on for 1 to 100 ms. It
// ends early when the guest shows a problem. The guest must be attached.
func Overwrite(ctx context.Context, g *Guest, stops int) (*OverwriteResult, error) {
	r := &OverwriteResult{}
	w := &writer{mem: g.mem}
	o, err := g.oracle(ctx, w)
	if err != nil {
		return nil, err
	}
	chance := rand.New(rand.NewPCG(g.Config.Seed, 1))
	began := g.Beat().Pages
	var pfns, doubted []uint64
	lap := time.Now()
	lapped := func(sum *time.Duration) {
		now := time.Now()
		*sum += now.Sub(lap)
		lap = now
	}
	for r.Stops < stops {
		select {
		case <-time.After(time.Duration(1+chance.IntN(100)) * time.Millisecond):
		case <-ctx.Done():
			return r, ctx.Err()
		}
		lapped(&r.Run)
		if g.Config.SingleStep {
			err = g.stopAnywhere(ctx, time.Duration(1+chance.IntN(20))*time.Millisecond)
		} else {
			err = g.Stop(ctx)
		}
		if err != nil {
			return r, fmt.Errorf("stop the guest: %w; its problems: %v", err, g.Problems())
		}
		lapped(&r.Stop)
		s, err := g.Survey(ctx)
		lapped(&r.Look)
		pfns = pfns[:0]
		if err != nil {
			r.Failed++
			r.noted(err.Error(), 1)
		} else {
			for pfn, p := range s.Pages {
				if p.Flags&pageclass.Skippable != 0 {
					pfns = append(pfns, uint64(pfn))
				}
			}
			for _, n := range s.Notes {
				r.noted(n, 1)
			}
			if len(pfns) == 0 {
				r.Empty++
			}
		}
		if o != nil {
			lost := o.Lost
			if err := o.read(); err != nil {
				return r, err
			}
			for _, pfn := range doubted {
				if o.belated(pfn) {
					r.Belated++
				} else {
					r.Contradictions = append(r.Contradictions,
						fmt.Sprintf("stop %d: page %#x is allocated, but was called skippable",
							r.Stops, pfn))
				}
			}
			doubted = doubted[:0]
			if lost == o.Lost && err == nil {
				r.OracleStops++
				o.cover(&r.Kinds, &s.Survey)
				doubted = append(doubted, o.contradictions(&s.Survey)...)
			}
			lapped(&r.Read)
		}
		if err := w.fill(pfns, r.Stops); err != nil {
			return r, err
		}
		lapped(&r.Fill)
		r.Stops++
		r.Overwritten += uint64(len(pfns))
		r.Memory += uint64(g.Config.MemoryMiB) << 20 / pageSize
		if err := g.Cont(ctx); err != nil {
			return r, fmt.Errorf("let the guest run: %w", err)
		}
		lapped(&r.Stop)
		g.Silent(silence)
		if r.Problems = g.Problems(); len(r.Problems) > 0 {
			break
		}
	}
	// What was overwritten last must be given a chance to hurt.
	select {
	case <-time.After(2 * time.Second):
	case <-ctx.Done():
		return r, ctx.Err()
	}
	if len(r.Problems) == 0 {
		reply, err := g.Command(ctx, "check")
		if err != nil {
			r.Problems = append(r.Problems, Problem{time.Now(), "silent", err.Error()})
		} else {
			r.Vmstat = reply.Vmstat
		}
		r.Problems = append(r.Problems, g.Problems()...)
	}
	beat := g.Beat()
	r.Verified, r.OOM = beat.Pages-began, beat.OOM
	if o != nil {
		r.Events = o.Events
	}
	return r, nil
}

// oracle has the guest's allocator followed from now on. It is nil if its kernel does not
// trace.
func (g *Guest) oracle(ctx context.Context, w *writer) (*oracle, error) {
	reply, err := g.Command(ctx, "trace")
	if err != nil {
		if len(g.Hello.Lacks) > 0 {
			return nil, nil
		}
		return nil, err
	}
	if reply.Trace == nil {
		return nil, fmt.Errorf("the guest's answer has no trace")
	}
	// The rings are full, which the kernel notes when it can write again.
	if err := g.Stop(ctx); err != nil {
		return nil, err
	}
	o, err := newOracle(w, reply.Trace)
	if err == nil {
		err = o.read()
	}
	if e := g.Cont(ctx); err == nil {
		err = e
	}
	if err != nil {
		return nil, err
	}
	snap, err := g.Snapshot(ctx, o.read)
	if err != nil {
		return nil, err
	}
	o.Lost, o.Events = 0, 0 // what came before the snapshot is not needed
	for pfn := range o.allocated {
		o.allocated[pfn] = inUse(snap.before(pfn)) && inUse(snap.after(pfn))
	}
	return o, nil
}
