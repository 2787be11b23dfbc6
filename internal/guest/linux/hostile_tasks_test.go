package linux

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// sane fails the test if the survey holds anything that its readers need not expect.
func sane(t *testing.T, g *Guest, r *Result) {
	t.Helper()
	if r == nil {
		t.Fatal("survey failed")
	}
	seen := make([]bool, len(r.Pages))
	for _, f := range r.Sequence {
		if int(f) >= len(seen) || seen[f] {
			t.Fatalf("page %#x is in the sequence twice, or is none", f)
		}
		seen[f] = true
	}
	for i, p := range r.Pages {
		if int(p.Owner) > len(r.Processes) || p.Class >= pageclass.Classes ||
			p.Kind >= pageclass.Kinds || p.Class == pageclass.Unknown && p.Kind != pageclass.None {
			t.Fatalf("page %#x is %+v; there are %d processes", i, p, len(r.Processes))
		}
	}
	for _, p := range r.Processes {
		if p.LastRun < 0 || p.CPUTime < 0 || p.Recent < 0 ||
			p.Recent > time.Duration(len(g.census.threads))*window || len(p.Name) > 16 {
			t.Fatalf("process %+v", p)
		}
	}
}

func TestHostileProcesses(t *testing.T) {
	p := newPatient(t)
	g, l := p.Guest, &p.census.layout
	next := func(task uint64) uint64 { return u64(p.phys(task+l.tasks.offset)) - l.tasks.offset }
	kthread := next(next(l.initTask)) // the first process is init, then comes kthreadd
	user := next(l.initTask)
	signal := u64(p.phys(user + l.signal.offset))
	head := signal + l.threads.offset
	node := user + l.thread.offset
	mm := u64(p.phys(user + l.mm.offset))
	pgdVA := u64(p.phys(mm + l.pgd.offset))
	pgd, _, err := g.space.translate(pgdVA)
	if err != nil {
		t.Fatal(err)
	}
	// The path to one table of the last level.
	var path []uint64 // of each level, the table and the entry's place
	at := pgd
	for level := g.space.levels; level > 1; level-- {
		table := p.at(at)
		for i := range 512 {
			e := u64(table[i*8:])
			if e&present != 0 && e&largePage == 0 && (level < g.space.levels || i < 256) {
				path = append(path, at+uint64(i)*8)
				at = e & addrMask
				break
			}
		}
	}
	leaf := at
	queue := u64(p.phys(user + l.queue.offset))
	rq := u64(p.phys(queue + l.queueRQ.offset))
	free, file := uint64(0), uint64(0)
	for i, page := range p.clean {
		if page.Flags&pageclass.Skippable != 0 {
			free = uint64(i)
		}
		if page.Kind == pageclass.Anon {
			file = uint64(i)
		}
	}
	const entry = present | 1<<1 | 1<<2 | accessed
	for name, test := range map[string]struct {
		break_ func()
		doubt  bool
	}{
		"task leads to itself": {func() {
			p.set64(p.phys(kthread+l.tasks.offset), kthread+l.tasks.offset)
		}, true},
		"tasks run in a circle": {func() {
			p.set64(p.phys(kthread+l.tasks.offset), user+l.tasks.offset)
		}, true},
		"task leads nowhere": {func() { p.set64(p.phys(user+l.tasks.offset), 0) }, true},
		"no tasks": {func() {
			p.set64(p.phys(l.initTask+l.tasks.offset), l.initTask+l.tasks.offset)
		}, false},
		"thread leads to itself": {func() {
			p.set64(p.phys(head), node)
			p.set64(p.phys(node), node)
		}, true},
		"thread leads nowhere": {func() { p.set64(p.phys(node), 1) }, true},
		"thread of another": {func() { p.set64(p.phys(node), kthread+l.thread.offset) },
			true},
		"signal is nowhere": {func() { p.set64(p.phys(user+l.signal.offset), 8) },
			true},
		"mm is nowhere":  {func() { p.set64(p.phys(user+l.mm.offset), 8) }, true},
		"pgd is nowhere": {func() { p.set64(p.phys(mm+l.pgd.offset), 1<<63) }, true},
		"pgd is not aligned": {func() { p.set64(p.phys(mm+l.pgd.offset), pgdVA+8) },
			true},
		"pgd is free": {func() {
			p.set64(p.phys(mm+l.pgd.offset), pgdVA-pgd+free*units.PageSize)
		}, true},
		"table leads to itself": {func() { p.set64(p.at(path[0]), pgd|entry) }, false},
		"table in a process": {func() {
			p.set64(p.at(path[1]), file*units.PageSize|entry)
		}, true},
		"table is not ram": {func() { p.set64(p.at(path[1]), 1<<50|entry) }, true},
		"page is free": {func() { p.set64(p.at(leaf), free*units.PageSize|entry) },
			true},
		"page is free, without access": {func() {
			p.set64(p.at(leaf), ^(free*units.PageSize)&addrMask|protNone)
		}, true},
		"page is not ram": {func() { p.set64(p.at(leaf), 1<<50|entry) }, false},
		"swapped": {func() {
			p.set64(p.at(leaf), 1<<59|^(free<<14)&(1<<59-1)&^0x3ff)
		}, false},
		"all entries lead to one table": {func() {
			p.fill(path[len(path)-1]&^(units.PageSize-1), leaf|entry)
		}, false},
		"all entries lead to one page": {func() { p.fill(leaf, file*units.PageSize|entry) }, false},
		"all entries are large": {func() {
			for i := range uint64(512) {
				p.set64(p.at(path[len(path)-1]&^(units.PageSize-1)+i*8), i<<21|entry|largePage)
			}
		}, true},
		"one of 1 GiB":   {func() { p.set64(p.at(path[len(path)-2]), entry|largePage) }, true},
		"clock far away": {func() { p.set64(p.phys(rq+l.clock.offset), ^uint64(0)>>1) }, false},
		"clock nonsense": {func() { p.set64(p.phys(rq+l.clock.offset), ^uint64(0)) }, false},
		"run in future": {func() { p.set64(p.phys(user+l.execStart.offset), ^uint64(0)) },
			false},
		"endless run time": {func() { p.set64(p.phys(user+l.runtime.offset), ^uint64(0)) }, false},
		"endless past": {func() { p.set64(p.phys(signal+l.pastRuntime.offset), ^uint64(0)) },
			false},
		"endless share": {func() { p.set64(p.phys(user+l.util.offset), ^uint64(0)) }, false},
		"no run queue":  {func() { p.set64(p.phys(user+l.queue.offset), 1<<63) }, false},
		"run queue is mad": {func() { p.set64(p.phys(queue+l.queueRQ.offset), ^uint64(0)-8) },
			false},
		"stack is free": {func() {
			p.set64(p.phys(user+l.stack.offset), pgdVA-pgd+free*units.PageSize)
		}, false},
		"stack is nowhere": {func() { p.set64(p.phys(user+l.stack.offset), ^uint64(0)&^0xfff) },
			false},
	} {
		t.Run(name, func(t *testing.T) {
			defer p.heal()
			p.t = t
			test.break_()
			r := p.survey(g)
			sane(t, g, r)
			if test.doubt != (len(r.Notes) > 0) && name != "stack is free" {
				t.Errorf("notes %q", r.Notes)
			}
			if name[:4] == "page" && test.doubt && r.Pages[free].Flags&pageclass.Skippable != 0 {
				t.Error("a page that a process maps is skippable")
			}
		})
	}
	p.t = t
	if r := p.survey(g); r == nil || len(r.Notes) > 0 {
		t.Fatal("the guest did not recover: the test is broken")
	}

	// Damage at random, where tasks and page tables are.
	rng := rand.New(rand.NewPCG(3, 4))
	var tasks []uint64
	for task := next(l.initTask); task != l.initTask; task = next(task) {
		tasks = append(tasks, task)
	}
	var tables []uint64
	for i, page := range p.clean {
		if page.Kind == pageclass.UserPageTable {
			tables = append(tables, uint64(i)*units.PageSize)
		}
	}
	fields := []field{l.tasks, l.thread, l.stack, l.mm, l.signal, l.execStart, l.runtime, l.util,
		l.arrival, l.queue}
	for range 300 {
		for range 1 + rng.IntN(64) {
			value := rng.Uint64()
			switch rng.IntN(4) {
			case 0:
				value = tables[rng.IntN(len(tables))] | entry | rng.Uint64N(2)<<7
			case 1:
				value = tasks[rng.IntN(len(tasks))] + fields[rng.IntN(len(fields))].offset
			case 2:
				value = rng.Uint64N(uint64(len(p.clean)))*units.PageSize | entry
			}
			switch rng.IntN(2) {
			case 0:
				p.set64(p.phys(tasks[rng.IntN(len(tasks))]+fields[rng.IntN(len(fields))].offset),
					value)
			case 1:
				p.set64(p.at(tables[rng.IntN(len(tables))]+rng.Uint64N(512)*8), value)
			}
		}
		if r := p.survey(g); r != nil { // a kernel's table may be broken, too
			sane(t, g, r)
		}
		list, _ := g.First(t.Context())
		atOnce, _ := AtOnce(t.Context(), p)
		for _, pfn := range slices.Concat(list, atOnce) {
			if pfn >= uint64(len(p.clean)) &&
				inRAM(p.Extents(), Range{pfn * units.PageSize, units.PageSize}) < 0 {
				t.Fatalf("page %#x is not RAM", pfn)
			}
		}
		p.heal()
	}
}

// fill sets all entries of a table.
func (p *patient) fill(table, entry uint64) {
	for i := range uint64(512) {
		p.set64(p.at(table+i*8), entry)
	}
}
