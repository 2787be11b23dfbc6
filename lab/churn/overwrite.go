package churn

import (
	"context"
	"fmt"
	"math/rand/v2"
	"regexp"
	"time"

	"vacate/internal/guest/linux"
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
	o := &overwriter{g: g, r: &OverwriteResult{}, w: &writer{mem: g.mem}, lap: time.Now(),
		chance: rand.New(rand.NewPCG(g.Config.Seed, 1))}
	var err error
	if o.oracle, err = g.oracle(ctx, o.w); err != nil {
		return nil, err
	}
	began := g.Beat().Pages
	for o.r.Stops < stops && len(o.r.Problems) == 0 {
		if err := o.stop(ctx); err != nil {
			return o.r, err
		}
	}
	if err := o.finish(ctx); err != nil {
		return o.r, err
	}
	beat := g.Beat()
	o.r.Verified, o.r.OOM = beat.Pages-began, beat.OOM
	if o.oracle != nil {
		o.r.Events = o.oracle.Events
	}
	return o.r, nil
}

// An overwriter is Overwrite at work.
type overwriter struct {
	g       *Guest
	r       *OverwriteResult
	w       *writer
	oracle  *oracle // nil: the guest's kernel does not trace
	chance  *rand.Rand
	lap     time.Time
	doubted []uint64 // pages that the oracle contradicted at the last stop
}

// lapped adds the time since it was called last.
func (o *overwriter) lapped(sum *time.Duration) {
	now := time.Now()
	*sum += now.Sub(o.lap)
	o.lap = now
}

// pause returns a random time of so many milliseconds at most.
func (o *overwriter) pause(most int) time.Duration {
	return time.Duration(1+o.chance.IntN(most)) * time.Millisecond
}

// stop lets the guest run, stops it, overwrites what may be, and lets it run on.
func (o *overwriter) stop(ctx context.Context) (err error) {
	select {
	case <-time.After(o.pause(100)):
	case <-ctx.Done():
		return ctx.Err()
	}
	o.lapped(&o.r.Run)
	if o.g.Config.SingleStep {
		err = o.g.stopAnywhere(ctx, o.pause(20))
	} else {
		err = o.g.Stop(ctx)
	}
	if err != nil {
		return fmt.Errorf("stop the guest: %w; its problems: %v", err, o.g.Problems())
	}
	o.lapped(&o.r.Stop)
	s, pfns := o.survey(ctx)
	if err := o.consult(s); err != nil {
		return err
	}
	if err := o.w.fill(pfns, o.r.Stops); err != nil {
		return err
	}
	o.lapped(&o.r.Fill)
	o.r.Stops++
	o.r.Overwritten += uint64(len(pfns))
	o.r.Memory += uint64(o.g.Config.MemoryMiB) << 20 / pageSize
	if err := o.g.Cont(ctx); err != nil {
		return fmt.Errorf("let the guest run: %w", err)
	}
	o.lapped(&o.r.Stop)
	o.g.Silent(silence)
	o.r.Problems = o.g.Problems()
	return nil
}

// survey looks at the stopped guest, and returns the pages that may be skipped; nil if it fails.
func (o *overwriter) survey(ctx context.Context) (s *linux.Result, pfns []uint64) {
	s, err := o.g.Survey(ctx)
	o.lapped(&o.r.Look)
	if err != nil {
		o.r.Failed++
		o.r.noted(err.Error(), 1)
		return nil, nil
	}
	for pfn, p := range s.Pages {
		if p.Flags&pageclass.Skippable != 0 {
			pfns = append(pfns, uint64(pfn))
		}
	}
	for _, n := range s.Notes {
		o.r.noted(n, 1)
	}
	if len(pfns) == 0 {
		o.r.Empty++
	}
	return s, pfns
}

// consult compares a survey, if there is one, with what the oracle knows, if there is one.
func (o *overwriter) consult(s *linux.Result) error {
	if o.oracle == nil {
		return nil
	}
	lost := o.oracle.Lost
	if err := o.oracle.read(); err != nil {
		return err
	}
	for _, pfn := range o.doubted {
		if o.oracle.belated(pfn) {
			o.r.Belated++
		} else {
			o.r.Contradictions = append(o.r.Contradictions,
				fmt.Sprintf("stop %d: page %#x is allocated, but was called skippable",
					o.r.Stops, pfn))
		}
	}
	o.doubted = o.doubted[:0]
	if lost == o.oracle.Lost && s != nil {
		o.r.OracleStops++
		o.oracle.cover(&o.r.Kinds, &s.Survey)
		o.doubted = append(o.doubted, o.oracle.contradictions(&s.Survey)...)
	}
	o.lapped(&o.r.Read)
	return nil
}

// finish gives what was overwritten last a chance to hurt, and has the guest check all.
func (o *overwriter) finish(ctx context.Context) error {
	select {
	case <-time.After(2 * time.Second):
	case <-ctx.Done():
		return ctx.Err()
	}
	if len(o.r.Problems) > 0 {
		return nil
	}
	reply, err := o.g.Command(ctx, "check")
	if err != nil {
		o.r.Problems = append(o.r.Problems, Problem{time.Now(), "silent", err.Error()})
	} else {
		o.r.Vmstat = reply.Vmstat
	}
	o.r.Problems = append(o.r.Problems, o.g.Problems()...)
	return nil
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
