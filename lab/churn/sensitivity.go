package churn

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
	"unsafe"

	"vacate/internal/guest/linux"
	"vacate/internal/guest/pageclass"
	"vacate/lab/churnproto"
)

// A Target is a sort of pages in use that a trial takes for free.
type Target struct {
	Name    string
	kind    pageclass.Kind
	load    string // of kind KernelOther: those that hold data of this worker
	huge    bool   // of kind Anon: those that look like parts of huge pages
	nothing bool   // no page at all
}

// Targets are all there are. The first shows how often something is noticed when nothing is done.
var Targets = []Target{
	{Name: "(none)", nothing: true},
	{Name: "anonymous", kind: pageclass.Anon},
	{Name: "anonymous, huge", kind: pageclass.Anon, huge: true},
	{Name: "file", kind: pageclass.File},
	{Name: "shared memory", kind: pageclass.Shmem},
	{Name: "hugetlb", kind: pageclass.Hugetlb},
	{Name: "page table", kind: pageclass.UserPageTable},
	{Name: "slab", kind: pageclass.Slab},
	{Name: "kernel stack", kind: pageclass.KernelStack},
	{Name: "per cpu", kind: pageclass.PerCPU},
	{Name: "kernel text", kind: pageclass.KernelText},
	{Name: "kernel image", kind: pageclass.KernelImage},
	{Name: "page descriptors", kind: pageclass.PageDescriptors},
	{Name: "reserved", kind: pageclass.Reserved},
	{Name: "unreferenced", kind: pageclass.Unreferenced},
	{Name: "kernel other", kind: pageclass.KernelOther},
	{Name: "pipe buffers", kind: pageclass.KernelOther, load: "pipe"},
	{Name: "socket buffers", kind: pageclass.KernelOther, load: "socket"},
	{Name: "network buffers", kind: pageclass.KernelOther, load: "echo"},
	{Name: "bpf arrays", kind: pageclass.KernelOther, load: "kernel"},
}

// A Trial is one stop at which pages in use were overwritten.
type Trial struct {
	Target  string
	Pages   int
	Noticed string        // the kind of the first problem; empty if nothing was noticed
	After   time.Duration // that passed before
	Text    string
}

// Sensitivity sets the guest back to the same moment again and again, lets it run for a
// while, overwrites so many pages of a target, and waits for somebody to notice for at most
// the given time. It calls report after each trial. The guest must be attached.
func Sensitivity(ctx context.Context, g *Guest, targets []Target, trials, pages int,
	wait time.Duration, report func(Trial)) error {
	w := &writer{mem: g.mem}
	chance := rand.New(rand.NewPCG(g.Config.Seed, 2))
	if err := g.saveIdle(ctx); err != nil {
		return err
	}
	for trial := range trials {
		for _, t := range targets {
			r, err := g.try(ctx, w, t, trial, pages, wait, chance)
			if err != nil {
				return fmt.Errorf("trial %d with %s: %w", trial, t.Name, err)
			}
			if r != nil {
				report(*r)
			}
		}
	}
	return nil
}

// try makes one trial. It returns nil if the guest has no such page.
func (g *Guest) try(ctx context.Context, w *writer, t Target, trial, pages int, wait time.Duration,
	chance *rand.Rand) (*Trial, error) {
	if err := g.rewind(ctx); err != nil {
		return nil, err
	}
	var s *linux.Result
	var pfns []uint64
	for range 5 { // it may have none for the moment
		select {
		case <-time.After(time.Duration(50+chance.IntN(400)) * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if p := g.Problems(); len(p) > 0 {
			return nil, fmt.Errorf("the guest is broken before anything was done: %v", p)
		}
		if err := g.Stop(ctx); err != nil {
			return nil, err
		}
		var err error
		if s, err = g.Survey(ctx); err != nil {
			return nil, err
		}
		if pfns, err = g.pick(w, t, &s.Survey); err != nil {
			return nil, err
		}
		if len(pfns) > 0 || t.nothing {
			break
		}
		if err := g.Cont(ctx); err != nil {
			return nil, err
		}
	}
	if len(pfns) == 0 && !t.nothing {
		return nil, nil
	}
	chance.Shuffle(len(pfns), func(i, j int) { pfns[i], pfns[j] = pfns[j], pfns[i] })
	pfns = pfns[:min(pages, len(pfns))]
	slices.Sort(pfns)
	clear(w.wrote)
	if err := w.fill(pfns, trial%6); err != nil {
		return nil, err
	}
	if err := g.Cont(ctx); err != nil {
		return nil, err
	}
	r := &Trial{Target: t.Name, Pages: len(pfns)}
	began := time.Now()
	checking := false
	for {
		g.Silent(hung)
		done := checking && g.answered()
		if p := g.Problems(); len(p) > 0 {
			r.Noticed, r.Text, r.After = p[0].Kind, p[0].Text, time.Since(began)
			return r, nil
		}
		if done {
			return r, nil
		}
		if time.Since(began) > wait && !checking {
			// The check that comes at the end of Overwrite as well.
			checking = true
			if err := g.send("check"); err != nil {
				return nil, err
			}
		}
		if time.Since(began) > wait+commandTime {
			r.Noticed, r.Text, r.After = "silent", "the guest does not come to an end of checking",
				time.Since(began)
			return r, nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// hung is how long a guest that is alive may say nothing, here, where a mistake costs little.
const hung = 8 * time.Second

// reset resets the VM, so that QEMU is willing to let it run.
func (g *Guest) reset(ctx context.Context) error {
	action := func(a string) error {
		return g.qmp.Run(ctx, "set-action", map[string]string{"reboot": a}, nil)
	}
	if err := action("reset"); err != nil {
		return err
	}
	if err := g.qmp.Run(ctx, "system_reset", nil, nil); err != nil {
		return err
	}
	for range 100 {
		st, err := g.qmp.QueryStatus(ctx)
		if err != nil {
			return err
		}
		if st.Status != "shutdown" && st.Status != "internal-error" {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return action("shutdown")
}

// saveIdle makes the snapshot that rewind goes back to, of a guest whose load stands and whose CPU
// is idle. Under emulation the time stamp counter is not set back with the rest (QEMU 7.2 never
// lets it decrease). To the scheduler the running task then seems to have run ever since, and would
// have to wait for as long.
func (g *Guest) saveIdle(ctx context.Context) error {
	if _, err := g.Command(ctx, "quiet"); err != nil {
		return err
	}
	for range 100 {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := g.Stop(ctx); err != nil {
			return err
		}
		registers, err := g.qmp.HMP(ctx, "info registers -a")
		if err != nil {
			return err
		}
		if !strings.Contains(registers, "HLT=0") {
			return g.save(ctx)
		}
		if err := g.Cont(ctx); err != nil {
			return err
		}
	}
	return errors.New("the guest's CPUs are never idle")
}

// rewind sets the guest back to its snapshot and lets it run.
func (g *Guest) rewind(ctx context.Context) error {
	st, err := g.qmp.QueryStatus(ctx)
	if err != nil {
		return err
	}
	if st.Status == "shutdown" || st.Status == "internal-error" { // it cannot run on
		if err := g.reset(ctx); err != nil {
			return err
		}
	}
	if st.Running {
		if err := g.Stop(ctx); err != nil {
			return err
		}
	}
	if err := g.load(ctx); err != nil {
		return err
	}
	if err := g.Cont(ctx); err != nil {
		return err
	}
	if _, err := g.Command(ctx, "go"); err != nil {
		return err
	}
	g.forget()
	return nil
}

// pick returns all pages of a target.
func (g *Guest) pick(w *writer, t Target, s *pageclass.Survey) (pfns []uint64, err error) {
	if t.nothing {
		return nil, nil
	}
	worker := slices.Index(g.Hello.Workers, t.load)
	huge := false
	for pfn, p := range s.Pages {
		if pfn%512 == 0 && t.huge {
			end := min(pfn+512, len(s.Pages))
			huge = !slices.ContainsFunc(s.Pages[pfn:end],
				func(q pageclass.Page) bool { return q.Kind != p.Kind || q.Owner != p.Owner })
		}
		if p.Kind != t.kind || t.huge && !huge {
			continue
		}
		if t.load != "" {
			var words churnproto.Words
			if err := w.read(unsafe.Slice((*byte)(unsafe.Pointer(&words)), pageSize),
				uint64(pfn)*pageSize); err != nil {
				return nil, err
			}
			if !holds(&words, worker) {
				continue
			}
		}
		pfns = append(pfns, uint64(pfn))
	}
	return pfns, nil
}

// holds says whether there is data of a worker in a page, wherever it begins.
func holds(words *churnproto.Words, worker int) bool {
	b := unsafe.Slice((*byte)(unsafe.Pointer(words)), pageSize)
	for at := range uintptr(8) {
		n := 0
		for i := at; i+16 <= pageSize; i += 8 {
			a, c := *(*uint64)(unsafe.Pointer(&b[i])), *(*uint64)(unsafe.Pointer(&b[i+8]))
			if w, ok := churnproto.StepOwner(c - a); ok && w == worker {
				n++
			}
		}
		if n >= 32 {
			return true
		}
	}
	return false
}
