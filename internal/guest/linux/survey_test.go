package linux

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/guest/pageclass"
)

// kpageflags has the guest tell of its pages.
func (m *machine) kpageflags(t testing.TB) []uint64 { return m.ask(t, "flags") }

// ask sends a command to the guest's program and returns the runs of numbers of its answer.
func (m *machine) ask(t testing.TB, command string) []uint64 {
	t.Helper()
	m.port.SetDeadline(time.Now().Add(2 * time.Minute)) // the machine may be busy
	if _, err := fmt.Fprintln(m.port, command); err != nil {
		t.Fatal(err)
	}
	var all []uint64
	lines := bufio.NewScanner(m.port)
	for lines.Scan() {
		if strings.TrimSpace(lines.Text()) == "end" {
			return all
		}
		var flags uint64
		var n int
		if _, err := fmt.Sscanf(lines.Text(), "%x %d", &flags, &n); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		all = append(all, slices.Repeat([]uint64{flags}, n)...)
	}
	t.Fatalf("guest's answer is cut short: %v", lines.Err())
	return nil
}

func kinds(s *pageclass.Survey) (n [pageclass.Kinds]int) {
	for _, p := range s.Pages {
		n[p.Kind]++
	}
	return n
}

func describe(r *Result) string {
	var b strings.Builder
	for k, n := range kinds(&r.Survey) {
		if n > 0 && k > 0 {
			fmt.Fprintf(&b, "%v %d, ", pageclass.Kind(k), n)
		}
	}
	return fmt.Sprintf("%sfree %d, skippable %d, %+v, notes %q", b.String(), r.Free, r.Skippable,
		r.Timings, r.Notes)
}

// What the guest itself tells of its pages in /proc/kpageflags, shortly before the stop and shortly
// after, must agree: wherever it tells the same of a page both times, that is what the page was in
// between, give or take a few that came and went.
func TestSurvey(t *testing.T) {
	forKernels(t, func(t *testing.T, kernel string) {
		m := boot(t, spec{kernel: kernel, mib: 384, cpus: 2})
		g, err := Attach(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		total := tally{}
		before := m.kpageflags(t)
		for i := range 5 {
			if i == 3 {
				total.check(t, true)
				total = tally{}
				m.ask(t, "rest")
				before = m.kpageflags(t)
			}
			m.stop(t)
			r, err := g.Survey(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			m.cont(t)
			after := m.kpageflags(t)
			if i == 0 {
				t.Log(describe(r))
			}
			total.add(before, after, r)
			before = after
			if len(r.Notes) > 0 {
				t.Logf("notes: %q", r.Notes)
			}
		}
		total.check(t, false)
	})
}

// tally counts pages by what the guest told and what was found.
type tally map[string]*[pageclass.Kinds]int

// told are bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h), the first that is
// set counts, and the kinds that go with it.
var told = []struct {
	bit   int
	name  string
	kinds []pageclass.Kind
}{
	{20, "nopage", []pageclass.Kind{pageclass.None}},
	{10, "buddy", []pageclass.Kind{pageclass.FreeBuddy}},
	{23, "offline", []pageclass.Kind{pageclass.Offline}},
	{26, "page table", []pageclass.Kind{pageclass.UserPageTable}},
	// 5.10 does not tell where it is
	{24, "zero page", []pageclass.Kind{pageclass.ZeroPage, pageclass.Reserved}},
	{17, "huge", []pageclass.Kind{pageclass.Hugetlb}},
	{7, "slab", []pageclass.Kind{pageclass.Slab}},
	{32, "reserved", []pageclass.Kind{pageclass.Reserved, pageclass.KernelText,
		pageclass.KernelImage, pageclass.PerCPU, pageclass.PageDescriptors}},
	{12, "anon", []pageclass.Kind{pageclass.Anon}},
	{14, "swapbacked", []pageclass.Kind{pageclass.Shmem}},
	{5, "lru", []pageclass.Kind{pageclass.File}},
}

const falselyFree = "in use, found skippable"

func (c tally) add(before, after []uint64, r *Result) {
	count := func(what string, k pageclass.Kind) {
		if c[what] == nil {
			c[what] = new([pageclass.Kinds]int)
		}
		c[what][k]++
	}
	// Bits that say what a page is for, whether or not it was used in between.
	const stable = 1<<20 | 1<<10 | 1<<23 | 1<<26 | 1<<24 | 1<<17 | 1<<7 | 1<<32 | 1<<12 | 1<<14
	for i, p := range r.Pages {
		if i >= len(before) || i >= len(after) || before[i]&stable != after[i]&stable {
			continue
		}
		what := "nothing"
		if before[i] != 0 {
			what = "other"
		}
		for _, b := range told {
			if before[i]>>b.bit&1 != 0 {
				what = b.name
				break
			}
		}
		count(what, p.Kind)
		if p.Flags&pageclass.Skippable != 0 && what != "buddy" && what != "nothing" {
			count(falselyFree, p.Kind)
		}
	}
}

// check fails if they do not agree; busy says that the guest's program worked all the time.
func (c tally) check(t *testing.T, busy bool) {
	t.Helper()
	// A page may have been something else just at the stop. The guest's program gives away and
	// takes some tens of pages a millisecond, always among the same.
	agree, all := 0, 0
	for _, b := range told {
		if c[b.name] == nil {
			continue
		}
		good, n := 0, 0
		for k, pages := range c[b.name] {
			n += pages
			if slices.Contains(b.kinds, pageclass.Kind(k)) {
				good += pages
			} else if pages > 0 {
				t.Logf("%s: %v %d", b.name, pageclass.Kind(k), pages)
			}
		}
		t.Logf("%s: %d of %d agree", b.name, good, n)
		if good*100 < n*99 {
			t.Errorf("%s: only %d of %d pages agree", b.name, good, n)
		}
		agree, all = agree+good, all+n
	}
	t.Logf("%d of %d agree; without any flag: %v", agree, all, c["nothing"])
	if all < 50_000 {
		t.Errorf("only %d pages compared", all)
	}
	if bad := c[falselyFree]; bad != nil {
		n := 0
		for _, pages := range bad {
			n += pages
		}
		// Pages that came, were free at the stop, and went to the same use again.
		t.Logf("%d pages in use before and after were free at the stop", n)
		if !busy || n > 3*100 {
			t.Errorf("%d pages in use were found skippable", n)
		}
	}
}

func BenchmarkSurvey(b *testing.B) {
	for _, memfd := range []bool{false, true} {
		b.Run(map[bool]string{false: "anonymous", true: "memfd"}[memfd], func(b *testing.B) {
			m := boot(b, spec{kernel: kernels(b)[0], mib: 1024, cpus: 2, memfd: memfd})
			g, err := Attach(b.Context(), m)
			if err == nil {
				err = g.Rehearse(b.Context())
			}
			if err != nil {
				b.Fatal(err)
			}
			m.stop(b)
			var all []Timings
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				r, err := g.Survey(context.Background())
				if err != nil {
					b.Fatal(err)
				}
				all = append(all, r.Timings)
			}
			slices.SortFunc(all, func(x, y Timings) int { return int(x.Total - y.Total) })
			b.Logf("best %+v, median %+v, worst %+v", all[0], all[len(all)/2], all[len(all)-1])
		})
	}
}

// What the machine or the kernel's options make different must not matter.
func TestVariants(t *testing.T) {
	kernel := kernels(t)[0]
	for name, s := range map[string]spec{
		"nokaslr":      {cmdline: "nokaslr no5lvl", mib: 256, cpus: 1},
		"pti":          {cmdline: "pti=on", mib: 256, cpus: 2},
		"init on free": {cmdline: "init_on_free=1 init_on_alloc=0", mib: 256, cpus: 1},
		"memfd":        {mib: 256, cpus: 1, memfd: true},
		"numa": {mib: 512, cpus: 2,
			extra: []string{"-object", "memory-backend-ram,id=a,size=256M", "-object",
				"memory-backend-ram,id=b,size=256M",
				"-numa", "node,memdev=a,cpus=0", "-numa", "node,memdev=b,cpus=1", "-machine",
				"q35"}},
		"beyond 4 GiB": {mib: 512, cpus: 2,
			extra: []string{"-machine", "pc,max-ram-below-4g=256M"}},
		"5 GB": {mib: 5120, cpus: 2},
		"hotplug": {cmdline: "memhp_default_state=online", mib: 256, cpus: 1,
			extra: []string{"-m", "256M,slots=2,maxmem=1G",
				"-object", "memory-backend-ram,id=d,size=256M", "-device", "pc-dimm,memdev=d"}},
		"debug": {cmdline: "slub_debug=FZPU page_owner=on debug_pagealloc=on", mib: 256, cpus: 1},
	} {
		t.Run(name, func(t *testing.T) {
			s.kernel = kernel
			m := boot(t, s)
			g, err := Attach(t.Context(), m)
			if err != nil {
				t.Fatal(err)
			}
			total := tally{}
			before := m.kpageflags(t)
			for range 2 {
				m.stop(t)
				r, err := g.Survey(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				m.cont(t)
				after := m.kpageflags(t)
				total.add(before, after, r)
				before = after
				t.Log(describe(r))
				if r.Skippable*100 < r.Free*98 {
					t.Errorf("of %d free pages only %d are skippable", r.Free, r.Skippable)
				}
			}
			total.check(t, true)
		})
	}
}

// After a reset, whatever boots, nothing that was known before may be used.
func TestReset(t *testing.T) {
	m := boot(t, spec{kernel: kernels(t)[0], mib: 256, cpus: 1})
	g, err := Attach(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Run(t.Context(), "system_reset", nil, nil); err != nil {
		t.Fatal(err)
	}
	for range 40 {
		m.stop(t)
		if r, err := g.Survey(t.Context()); !errors.Is(err, ErrChanged) {
			t.Fatalf("survey after a reset: %v, %v", r, err)
		}
		if err := g.Revalidate(t.Context()); !errors.Is(err, ErrChanged) {
			t.Fatalf("revalidate after a reset: %v", err)
		}
		m.cont(t)
		time.Sleep(50 * time.Millisecond)
	}
	// The next kernel has its own addresses.
	deadline := time.Now().Add(2 * time.Minute)
	for {
		next, err := Attach(t.Context(), m)
		if err == nil {
			if bytes.Equal(next.note, g.note) {
				t.Fatal("the old kernel was found")
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}
