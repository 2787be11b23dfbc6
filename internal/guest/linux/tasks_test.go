package linux

import (
	"bufio"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// answer is what the guest says of its processes.
type answer struct {
	pid             map[string]int
	runtime         map[string]time.Duration
	tables, threads int      // of idle
	frames          []uint64 // of idle, by virtual address
}

func (m *machine) census(t testing.TB) answer {
	t.Helper()
	m.port.SetDeadline(time.Now().Add(time.Minute))
	if _, err := fmt.Fprintln(m.port, "census"); err != nil {
		t.Fatal(err)
	}
	c := answer{pid: map[string]int{}, runtime: map[string]time.Duration{}}
	lines := bufio.NewScanner(m.port)
	for lines.Scan() {
		var name string
		var pid int
		var ns, va, frame uint64
		line := strings.TrimSpace(lines.Text())
		switch {
		case line == "end":
			return c
		case scan(line, "process %s %d %d", &name, &pid, &ns):
			c.pid[name], c.runtime[name] = pid, time.Duration(ns)
		case scan(line, "idle %d %d", &c.tables, &c.threads):
			c.tables /= 4
		case scan(line, "page %x %x", &va, &frame):
			c.frames = append(c.frames, frame)
		default:
			t.Fatalf("guest says %q", line)
		}
	}
	t.Fatalf("guest's answer is cut short: %v", lines.Err())
	return c
}

func scan(line, format string, to ...any) bool {
	n, err := fmt.Sscanf(line, format, to...)
	return err == nil && n == len(to)
}

// TestCensus compares what is found of processes with what the guest says itself.
func TestCensus(t *testing.T) {
	forKernels(t, func(t *testing.T, kernel string) {
		// Emulated CPUs have five levels of page tables unless told otherwise. With process
		// context ids, QEMU 7.2 and isolation do not go together.
		t.Run("plain", func(t *testing.T) {
			testCensus(t, boot(t, spec{kernel: kernel, mib: 384, cpus: 2}), false)
		})
		t.Run("isolated", func(t *testing.T) {
			testCensus(t, boot(t,
				spec{kernel: kernel, cmdline: "no5lvl pti=on nopcid", mib: 384, cpus: 2}), true)
		})
	})
}

func testCensus(t *testing.T, m *machine, isolated bool) {
	g, err := Attach(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	told := m.census(t)
	m.stop(t)
	g.ActiveWithin = 500 * time.Millisecond
	r, err := g.Survey(t.Context())
	// The guest was busy telling; and when the host is, the guest takes that for its own
	// processes' work. But of several moments, hot is the busiest in one at least. Likewise, a
	// CPU may be about to change tasks at one, but not always.
	for try := 0; err == nil && (r.Processes[0].PID != told.pid["hot"] || g.running() != nil) &&
		try < 20; try++ {
		m.cont(t)
		time.Sleep(200 * time.Millisecond)
		m.stop(t)
		r, err = g.Survey(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d levels; %+v", g.space.levels, r.Timings)
	if len(g.census.doubts) > 0 {
		t.Errorf("doubts: %q", g.census.doubts)
	}

	owner := map[string]uint16{}
	byName := map[string]pageclass.Process{}
	for i, p := range r.Processes {
		for name, pid := range told.pid {
			if p.PID == pid {
				owner[name], byName[name] = uint16(i+1), p
			}
		}
	}
	hot, idle, init := byName["hot"], byName["idle"], byName["init"]
	t.Logf("hot %+v, idle %+v, init %+v", hot, idle, init)
	if hot.Name != "hot" || idle.Name != "idle" || init.Name != "init" {
		t.Errorf("processes are called %q, %q and %q", hot.Name, idle.Name, init.Name)
	}
	if owner["hot"] != 1 || hot.Recent < 25*time.Millisecond ||
		hot.LastRun > 500*time.Millisecond || !hot.Active {
		t.Error("the process that uses a CPU all the time is not the first")
	}
	if idle.LastRun < 900*time.Millisecond || idle.Active || idle.OnCPU ||
		idle.Recent > time.Millisecond {
		t.Error("the process that was stopped a second ago is not idle")
	}
	for name, p := range byName {
		// What the guest said is a moment old, but idle's does not change.
		if p.CPUTime < told.runtime[name] ||
			name == "idle" && p.CPUTime > told.runtime[name]+time.Millisecond {
			t.Errorf("%s used %v of CPU time: the guest says %v", name, p.CPUTime,
				told.runtime[name])
		}
	}
	if err := g.running(); err != nil {
		t.Error(err)
	}

	// Idle's pages are there in their order, and no others are idle's.
	of := make(map[uint64]bool, len(told.frames))
	place := make([]int, len(r.Pages))
	for i, f := range r.Sequence {
		if place[f] != 0 {
			t.Fatalf("page %#x comes twice", f)
		}
		place[f] = i + 1
	}
	last, anon := 0, 0
	for _, f := range told.frames {
		p := r.Pages[f]
		if of[f] {
			continue // the page of zeroes, or shared within the process
		}
		of[f] = true
		switch p.Kind {
		case pageclass.ZeroPage:
			if p.Owner != 0 {
				t.Errorf("the page of zeroes has an owner: %+v", p)
			}
			continue
		case pageclass.Anon:
			if p.Owner != owner["idle"] {
				// The program is in memory of the page cache, but a fork may share the rest.
				continue
			}
			anon++
			if p.Class != pageclass.Other {
				t.Errorf("a page of an inactive process is %+v", p)
			}
			if place[f] <= last {
				t.Errorf("page %#x is out of order", f)
			}
			last = place[f]
		}
		if p.Flags&pageclass.Mapped == 0 || place[f] == 0 {
			t.Errorf("page %#x of idle is not found: %+v", f, p)
		}
	}
	if want := (6 + 4 + 1) << 20 / units.PageSize; anon < want {
		t.Errorf("idle has %d anonymous pages: want %d at least", anon, want)
	}
	stacks, tables, code := 0, 0, 0
	for f, p := range r.Pages {
		switch {
		case p.Flags&pageclass.Exec != 0 && p.Class == pageclass.UserCode:
			code++
		case p.Owner != owner["idle"]:
		case p.Kind == pageclass.KernelStack:
			stacks++
		case p.Kind == pageclass.UserPageTable:
			tables++
			if p.Class != pageclass.Other {
				t.Errorf("a page table of an inactive process is %+v", p)
			}
		case !of[uint64(f)]:
			t.Errorf("page %#x is taken for one of idle's: %+v", f, p)
		}
	}
	if code == 0 {
		t.Error("a process that runs has no code")
	}
	if want := int(g.census.layout.stackSize) / units.PageSize * told.threads; stacks != want {
		t.Errorf("idle's %d threads have %d pages of stack: want %d", told.threads, stacks, want)
	}
	// The guest does not count the top, its twin, and the level below where there are five.
	if want := told.tables + 1 + b2i(isolated); tables < want ||
		tables > want+2*b2i(g.space.levels == 5) {
		t.Errorf("idle has %d page tables: want %d", tables, want)
	}

	testFirst(t, m, g, r)

	g.ActiveWithin = 0
	if r, err = g.Survey(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, p := range r.Processes {
		if p.PID == told.pid["idle"] && (!p.Active || uint16(i+1) != owner["idle"]) {
			t.Errorf("with the default time, idle is %+v", p)
		}
	}
	for _, f := range told.frames {
		if p := r.Pages[f]; p.Owner == owner["idle"] && p.Kind == pageclass.Anon &&
			p.Class != pageclass.UserData && p.Class != pageclass.UserCode {
			t.Fatalf("a page of an active process is %+v", p)
		}
	}
}

// testFirst verifies that each CPU's code and stack are among the first pages.
func testFirst(t *testing.T, m *machine, g *Guest, r *Result) {
	began := time.Now()
	list, err := g.First(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d first pages in %v", len(list), time.Since(began))
	began = time.Now()
	atOnce, err := AtOnce(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d at once in %v", len(atOnce), time.Since(began))
	for i, pfn := range atOnce {
		if slices.Index(atOnce, pfn) != i || !slices.Contains(list, pfn) {
			t.Errorf("page %#x of %d at once is twice there, or not among the first pages", pfn,
				len(atOnce))
		}
	}
	cpus, err := m.CPUs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stacks := 0
	for i, pfn := range list {
		if slices.Index(list, pfn) != i ||
			inRAM(m.Extents(), Range{pfn * units.PageSize, units.PageSize}) < 0 {
			t.Errorf("page %#x is twice in the list, or not RAM", pfn)
		}
		stacks += b2i(r.Pages[pfn].Kind == pageclass.KernelStack)
	}
	if stacks < 4 || len(list) > 400 {
		t.Errorf("%d first pages, %d of stacks", len(list), stacks)
	}
	checked := 0
	for i, cpu := range cpus {
		for _, va := range []uint64{cpu.RIP, cpu.RSP, cpu.IDT, cpu.TR} {
			// QEMU's own translation is that of the CPU asked.
			answer, err := m.HMP(t.Context(), fmt.Sprintf("gva2gpa %#x", va))
			var gpa uint64
			if _, serr := fmt.Sscanf(answer, "gpa: %v", &gpa); err != nil || serr != nil || i > 0 {
				continue // it does not translate for this CPU
			}
			checked++
			if !slices.Contains(list, gpa/units.PageSize) ||
				!slices.Contains(atOnce, gpa/units.PageSize) {
				t.Errorf("cpu %d's address %#x, at %#x, is not among the first pages", i, va, gpa)
			}
		}
		if cpu.RIP == 0 || cpu.RSP == 0 || cpu.IDT>>63 == 0 || cpu.TR>>63 == 0 {
			t.Errorf("cpu %d: %+v", i, cpu)
		}
	}
	if checked == 0 {
		t.Error("qemu translates no address")
	}
}

// running compares which tasks are on a CPU with what each CPU's run queue says.
func (g *Guest) running() error {
	c := &g.census
	curr, err := g.types.field("rq", "curr")
	if err != nil {
		return err
	}
	current := map[uint64]bool{} // stacks of current tasks
	queues := map[uint64]bool{}
	for q := range c.queues {
		rq, err := g.readU64(q + c.layout.queueRQ.offset)
		if err != nil {
			return err
		}
		task, err := g.readU64(rq + curr.offset)
		if err != nil {
			return err
		}
		stack, err := g.readU64(task + c.layout.stack.offset)
		if err != nil {
			return err
		}
		queues[rq], current[stack] = true, true
	}
	if len(queues) != 2 {
		return fmt.Errorf("%d run queues: want 2", len(queues))
	}
	n := 0
	for _, th := range c.threads {
		if th.onCPU != current[th.stack] {
			return fmt.Errorf("thread %+v is current: %v", th, current[th.stack])
		}
		n += b2i(th.onCPU)
	}
	if n == 0 {
		return errors.New("no task is on a CPU")
	}
	return nil
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// BenchmarkCensus takes the census of a guest of 1 GiB with some 130,000 mapped pages.
func BenchmarkCensus(b *testing.B) {
	for _, kernel := range kernels(b) {
		b.Run(filepath.Base(filepath.Dir(kernel)), func(b *testing.B) {
			m := boot(b, spec{kernel: kernel, mib: 1024, cpus: 2})
			fmt.Fprintln(m.port, "crowd")
			m.port.SetDeadline(time.Now().Add(2 * time.Minute))
			if line, err := bufio.NewReader(m.port).ReadString('\n'); err != nil {
				b.Fatal(line, err)
			}
			g, err := Attach(b.Context(), m)
			if err != nil {
				b.Fatal(err)
			}
			m.stop(b)
			var all []time.Duration
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				r, err := g.Survey(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				all = append(all, r.Timings.Census)
			}
			slices.Sort(all)
			b.Logf("%d tasks, %d mapped pages: best %v, median %v", len(g.census.threads),
				g.census.mapped, all[0], all[len(all)/2])
			b.ReportMetric(float64(all[len(all)/2].Nanoseconds()), "ns/census")
		})
	}
}
