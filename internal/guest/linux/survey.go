package linux

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// A Result is what Survey found. It is overwritten by the next Survey of the same Guest.
type Result struct {
	pageclass.Survey
	Release   string
	Free      int // pages that the allocator holds, as far as can be told
	Skippable int // of these, those that need not be moved
	// Notes say what was not as expected, above all why free pages are not skippable. A few, short.
	Notes   []string
	Timings Timings
}

// Timings are how long the stages of a survey took.
type Timings struct {
	Validate  time.Duration `json:"validate"`
	Scan      time.Duration `json:"scan"`
	FreeLists time.Duration `json:"free_lists"`
	Census    time.Duration `json:"census"`
	Total     time.Duration `json:"total"`
}

func (r *Result) note(format string, args ...any) {
	if len(r.Notes) < maxNotesKept {
		r.Notes = append(r.Notes, fmt.Sprintf(format, args...))
	}
}

// features is what the guest's kernel is like, and what Survey needs.
type features struct {
	layout     layout
	census     census
	pages      pages
	hot        uint64 // flags besides PG_active that mean as much
	regions    []region
	zones      []zone
	nodeBuf    []byte
	zoneBuf    []byte
	pcpBuf     []byte
	cpuOffsets []uint64
	virtual    []Range
	onPCP      []pcpBlock
	sample     [poisonSamples * 64]byte
}

// region is where the kernel has something at a fixed place: pages first to end of
// kinds from become kind.
type region struct {
	first, end uint64
	kind       pageclass.Kind
}

// probe learns what a survey needs and makes room for it. The guest may run.
func (g *Guest) probe() error {
	if err := g.learnLayout(); err != nil {
		return err
	}
	l := &g.layout
	g.nodeBuf, g.zoneBuf = make([]byte, l.nodes*8), make([]byte, l.zoneCount*l.zoneSize)
	g.virtual, g.onPCP = make([]Range, 0, 256), make([]pcpBlock, 0, 32<<10)
	// Under the multi-generational LRU no page is "active".
	if va, ok := g.symbol("lru_gen_caps"); ok {
		if n, err := g.readU32(va); err == nil && n != 0 {
			g.hot = l.workingset
		}
	}
	if l.pcp.ok {
		raw := make([]byte, (uint64(l.cpus[len(l.cpus)-1])+1)*8)
		if err := g.read(raw, l.offsets); err != nil {
			return fmt.Errorf("read per-cpu offsets: %w", err)
		}
		for _, cpu := range l.cpus {
			g.cpuOffsets = append(g.cpuOffsets, u64(raw[cpu*8:]))
		}
	}
	g.findRegions()
	if err := g.findSections(); err != nil {
		return err
	}
	g.prepareCensus(int(g.pages.highest))
	return nil
}

// Rehearse has a survey take less time: it touches the memory that a survey needs of this process.
// That is worth it where a guest waits for the survey, and costs more than it saves where none
// does. The guest may run; what it shows meanwhile is of no interest.
func (g *Guest) Rehearse(ctx context.Context) error {
	if err := g.scan(ctx); err != nil && ctx.Err() != nil {
		return err
	}
	if c := &g.census; c.absent == nil {
		all := c.sequence[:cap(c.sequence)]
		for i := 0; i < len(all); i += units.PageSize / 4 {
			all[i] = 1
		}
	}
	return nil
}

// findRegions finds the kernel's image, its per-CPU areas and the page of zeroes. A kernel
// without kallsyms does not tell where they are; these pages are then Reserved.
func (g *Guest) findRegions() {
	add := func(kind pageclass.Kind, from, to uint64) {
		for va := from &^ (units.PageSize - 1); va < to && to-from < 1<<30; {
			addr, left, err := g.space.translate(va)
			if err != nil {
				va += units.PageSize
				continue
			}
			left = min(left, (to-va+units.PageSize-1)&^(units.PageSize-1))
			r := region{addr / units.PageSize, (addr + left) / units.PageSize, kind}
			if n := len(g.regions); n > 0 && g.regions[n-1].end == r.first &&
				g.regions[n-1].kind == kind {
				g.regions[n-1].end = r.end
			} else if n < 1<<16 {
				g.regions = append(g.regions, r)
			}
			va += left
		}
	}
	if va, ok := g.symbol("empty_zero_page"); ok { // first, as it lies in the image
		add(pageclass.ZeroPage, va, va+1)
	}
	text, ok1 := g.symbol("_text")
	etext, ok2 := g.symbol("_etext")
	end, ok3 := g.symbol("__brk_limit")
	if ok1 && ok2 && ok3 {
		add(pageclass.KernelText, text, etext)
		add(pageclass.KernelImage, etext, end)
	}
	base, ok1 := g.symbol("pcpu_base_addr")
	size, ok2 := g.symbol("pcpu_unit_size")
	if ok1 && ok2 && len(g.cpuOffsets) > 0 {
		first, err1 := g.readU64(base)
		unit, err2 := g.readU32(size)
		if errors.Join(err1, err2) == nil && unit <= 64<<20 {
			for _, off := range g.cpuOffsets {
				va := first + off - g.cpuOffsets[0]
				add(pageclass.PerCPU, va, va+uint64(unit))
			}
		}
	}
}

// Survey looks at all pages of the guest, which must be stopped. It fails if the guest is no longer
// the one that was attached (ErrChanged), or if its memory cannot be read as before. The caller
// then knows nothing of any page. It allocates next to nothing unless memory was plugged.
func (g *Guest) Survey(ctx context.Context) (_ *Result, err error) {
	r := &Result{Release: g.info.release}
	defer func() {
		if err != nil {
			err = fmt.Errorf("survey guest memory: %w", err)
		}
	}()
	// A view of the guest's memory ends if the machine does.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			if _, fault := p.(interface{ Addr() uintptr }); !fault {
				panic(p)
			}
			err = errors.New("the guest's memory is gone")
		}
	}()
	began := time.Now()
	if err := g.refresh(); err != nil {
		return nil, err
	}
	// The virtual CPUs' registers take the machine a while; nothing of what is found until
	// they are known is believed before.
	type answer struct {
		cpus []CPU
		err  error
	}
	asked := make(chan answer, 1)
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		cpus, err := g.mem.CPUs(ctx)
		asked <- answer{cpus, err}
	}()
	waited := false
	defer func() {
		cancel()
		if !waited {
			<-asked
		}
	}()
	r.Timings.Validate = time.Since(began)
	err = g.look(ctx, r)
	looked := time.Now()
	if err != nil && ctx.Err() != nil {
		return nil, err
	}
	a := <-asked
	waited = true
	// Where another kernel runs, that is why what was to be read made no sense.
	if a.err == nil {
		if changed := g.inForce(a.cpus); changed != nil {
			return nil, fmt.Errorf("%w: %w", ErrChanged, changed)
		}
	}
	if err := cmp.Or(err, a.err); err != nil {
		return nil, err
	}
	r.Timings.Validate += time.Since(looked)
	r.Timings.Total = time.Since(began)
	return r, nil
}

// look does Survey's work on the memory of a guest that is taken for the one that was
// attached.
func (g *Guest) look(ctx context.Context, r *Result) error {
	lap := time.Now()
	if err := g.findSections(); err != nil {
		return err
	}
	if err := g.scan(ctx); err != nil {
		return err
	}
	g.markRegions(r)
	r.Timings.Scan, lap = time.Since(lap), time.Now()
	if err := g.skippable(r); err != nil {
		if ctx.Err() != nil {
			return err
		}
		r.note("nothing is skipped: %v", err)
		g.pages.distrust(0, g.pages.highest)
	}
	g.countFree(r)
	r.Timings.FreeLists, lap = time.Since(lap), time.Now()
	p := &g.pages
	r.Pages = p.list[:p.highest]
	if err := g.takeCensus(ctx, r); err != nil {
		return err
	}
	r.Timings.Census = time.Since(lap)
	if p.beyond {
		r.note("memory behind %d GiB is not looked at: holes are too large", p.highest>>18)
	}
	return nil
}

// markRegions gives pages their kind by where they are.
func (g *Guest) markRegions(r *Result) {
	p := &g.pages
	for _, x := range g.regions {
		if x.first >= p.highest {
			continue
		}
		for i, pg := range p.list[x.first:min(x.end, p.highest)] {
			// Parts of the image and of the areas were given back, and are used otherwise.
			if pg.Kind == pageclass.Reserved {
				p.list[x.first+uint64(i)] = page(x.kind, 0)
			}
		}
	}
	for _, b := range p.backing {
		first, end := b.Addr/units.PageSize, min((b.Addr+b.Len+units.PageSize-1)/units.PageSize,
			p.highest)
		for i := first; i < end; i++ {
			if p.list[i].Kind != pageclass.None {
				p.list[i] = page(pageclass.PageDescriptors, 0)
			}
		}
	}
	// Below 1 MiB there is firmware.
	for i := range p.list[:min(256, p.highest)] {
		if p.list[i].Kind == pageclass.Reserved {
			p.list[i].Class = pageclass.MMIO
		}
	}
	// The huge page of zeroes comes and goes.
	if va, ok := g.symbol("huge_zero_pfn"); ok {
		if pfn, err := g.readU64(va); err == nil && pfn%512 == 0 && pfn < p.highest &&
			p.highest-pfn >= 512 && p.list[pfn].Kind == pageclass.KernelOther {
			for i := pfn; i < pfn+512; i++ {
				if p.list[i].Kind == pageclass.KernelOther {
					p.list[i] = page(pageclass.ZeroPage, 0)
				}
			}
		}
	}
}

// skippable finds the free pages, and which of them need not be moved.
func (g *Guest) skippable(r *Result) error {
	p := &g.pages
	if err := g.freeLists(r); err != nil {
		return err
	}
	if err := g.perCPULists(r); err != nil {
		return err
	}
	why := g.minds()
	if why == "" {
		bad, err := g.poisoned()
		if err != nil {
			return err
		}
		if bad {
			why = "free pages look poisoned"
		}
	}
	if why != "" {
		r.note("nothing is skipped: %s", why)
		p.distrust(0, p.highest)
	}
	return nil
}

func (g *Guest) countFree(r *Result) {
	for _, pages := range g.online() {
		for i := range pages {
			if pages[i].Class == pageclass.Free {
				r.Free++
				r.Skippable += int(pages[i].Flags&pageclass.Skippable) / int(pageclass.Skippable)
			}
		}
	}
}
