package evict

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/evict/pushorder"
	"vacate/internal/guest/pageclass"
	"vacate/internal/qemu/migstream"
)

// madeSurvey makes up what is known about a guest of some pages: 45 % are its processes', 30 % are
// of files, 20 % free, 5 % the kernel's. Half of them are in huge pages or large blocks, the others
// in blocks of 1 to 32 pages. In a shredded guest no two neighbours are alike.
func madeSurvey(pages int, shredded bool) *pageclass.Survey {
	r := rand.New(rand.NewPCG(1, 2))
	s := &pageclass.Survey{Pages: make([]pageclass.Page, pages),
		Processes: make([]pageclass.Process, 200), Sequence: make([]uint32, 0, pages)}
	for i := range s.Processes {
		s.Processes[i] = pageclass.Process{PID: 100 + i, Active: i < 50,
			LastRun: time.Duration(i) * time.Second,
			Recent:  time.Duration(200-i) * time.Millisecond}
	}
	type piece struct{ first, count uint32 }
	var mapped []piece
	for at := 0; at < pages; {
		count := 1
		switch {
		case shredded:
		case r.IntN(40) == 0: // 512 against 13 on average, so that both have half of the memory
			count = 512
		default:
			count = 1 << r.IntN(6)
		}
		count = min(count, pages-at)
		p := pageclass.Page{Kind: pageclass.Anon, Class: pageclass.UserData,
			Flags: pageclass.Mapped, Owner: uint16(1 + r.IntN(len(s.Processes)))}
		switch n := r.IntN(100); {
		case n < 45:
		case n < 75:
			p.Kind, p.Class = pageclass.File, pageclass.FileInactive
		case n < 95:
			p = pageclass.Page{Kind: pageclass.FreeBuddy, Class: pageclass.Free,
				Flags: pageclass.Skippable}
		default:
			p = pageclass.Page{Kind: pageclass.Slab, Class: pageclass.Kernel}
		}
		if p.Owner != 0 {
			mapped = append(mapped, piece{uint32(at), uint32(count)})
		}
		for i := range count {
			s.Pages[at+i] = p
		}
		at += count
	}
	r.Shuffle(len(mapped), func(i, j int) { mapped[i], mapped[j] = mapped[j], mapped[i] })
	for _, m := range mapped {
		for i := range m.count {
			s.Sequence = append(s.Sequence, m.first+i)
		}
	}
	return s
}

// madeSource is a source that has frozen a VM of some pages.
func madeSource(pages int) (*source, []pushorder.Frames) {
	e := &source{Source: Source{Order: pushorder.Default, Map: &Map{}}}
	e.image.frozen = &frozen{layout: layout{{Name: "pc.ram", Length: uint64(pages) * 4096,
		PageSize: migstream.TargetPageSize, Pages: pages}}}
	e.departures.begin(e.image.frozen.layout, e.Order, time.Now())
	return e, []pushorder.Frames{{Run: pageset.Run{Count: pages}}}
}

// heap returns the bytes of the heap that are in use.
func heap() int {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// A source may be one of many on a host that is short of memory. Once the push follows its plan, it
// takes no more than 0.5 % of the VM's memory, however the guest uses that.
func TestMemoryOfTheSource(t *testing.T) {
	const size = 8 << 30
	for _, shredded := range []bool{false, true} {
		t.Run(fmt.Sprintf("shredded=%v", shredded), func(t *testing.T) {
			before := heap()
			e, frames := madeSource(size / 4096)
			s := madeSurvey(size/4096, shredded)
			e.departures.plan(pushorder.NewPlan(e.Order, e.image.frozen.layout.blocks(), s, frames))
			e.keepKnown(s, frames, true)
			took := heap() - before
			t.Logf("%.1f MiB, %.1f bytes a page", float64(took)/(1<<20), float64(took)/(size/4096))
			if took > size/200 {
				t.Errorf("%d bytes for a VM of %d: want at most 0.5 %%", took, size)
			}
			runtime.KeepAlive(s)
			runtime.KeepAlive(e)
		})
	}
}

// A survey takes some 150 ns a page. The engine must not give it up where it takes its time.
func TestTimeForTheSurvey(t *testing.T) {
	for _, gib := range []uint64{1, 1 << 10, 12 << 10} {
		took := time.Duration(gib<<18) * 150
		l := layout{{Length: gib << 30, PageSize: 4096, Pages: int(gib << 18)}}
		if limit := l.surveyLimit(); limit < 2*took || limit > 4*took+surveyLimit {
			t.Errorf("%d GiB: a survey of %v may take %v", gib, took, limit)
		}
	}
}

// BenchmarkGrowth measures what an eviction costs the engines beside reading, sending and placing
// pages, as the VM grows: CPU time by page, and memory. docs/results/growth.md has what came of it.
func BenchmarkGrowth(b *testing.B) {
	for _, shredded := range []bool{false, true} {
		for _, gib := range []int{1, 4, 16, 64} {
			b.Run(fmt.Sprintf("shredded=%v/GiB=%d", shredded, gib), func(b *testing.B) {
				for range b.N {
					measureGrowth(b, gib<<18, shredded)
				}
			})
		}
	}
}

func measureGrowth(b *testing.B, pages int, shredded bool) {
	s := madeSurvey(pages, shredded)
	lists := len(s.Pages)*6 + cap(s.Sequence)*4
	base := heap() - lists
	stage := func(name string, f func()) {
		before, _ := used()
		f()
		after, _ := used()
		b.ReportMetric((after-before)*1e9/float64(pages), name+"-ns/page")
	}
	var e *source
	var frames []pushorder.Frames
	resetPeak()
	resident := peak() - lists
	stage("begin", func() { e, frames = madeSource(pages) })
	stage("plan", func() {
		p := pushorder.NewPlan(e.Order, e.image.frozen.layout.blocks(), s, frames)
		b.ReportMetric(float64(len(p))/float64(pages), "runs/page")
		e.departures.plan(p)
	})
	stage("keep", func() { e.keepKnown(s, frames, true) })
	b.ReportMetric(float64(peak()-resident)/float64(pages), "peak-B/page")
	b.ReportMetric(float64(heap()-base)/float64(pages), "heap-B/page")
	var at arrivals
	at.begin(e.image.frozen.layout)
	// What left the source arrives at the destination in the same frames.
	flown := make([]pageRun, 0, 64)
	gone := 0
	stage("push", func() {
		for {
			runs, why, _ := e.departures.next(false, 64)
			if len(runs) == 0 {
				break
			}
			e.departures.count(why, runs)
			gone += pageset.Pages(runs)
		}
	})
	stage("arrive", func() {
		r := rand.New(rand.NewPCG(3, 4))
		for _, p := range r.Perm((pages + 31) / 32) {
			flown = flown[:0]
			for i := 0; i < 32 && p*32+i < pages; i += 4 {
				flown = append(flown, pageRun{pageset.Run{First: pageset.Page(p*32 + i),
					Count: min(4, pages-p*32-i)}, false})
			}
			at.claim(flown, nil)
			at.placed(flown)
		}
	})
	stage("sum-up", func() {
		e.image.pushed, e.image.fetched = &frame{f: e.image.frozen}, &frame{f: e.image.frozen}
		e.account()
		e.image.zeroPages(&e.departures)
		t, _ := e.departures.trace.result(e.survey.classes)
		if _, err := t.encode(); err != nil {
			b.Fatal(err)
		}
	})
	if at.left() != 0 || gone == 0 {
		b.Fatalf("%d pages left, %d gone", at.left(), gone)
	}
	b.ReportMetric(0, "ns/op")
}

// resetPeak makes the kernel forget the most memory that this process had.
func resetPeak() {
	debug.FreeOSMemory()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0o600); err != nil {
		panic(err)
	}
}

// peak returns the most memory that this process had since resetPeak, in bytes.
func peak() int {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		panic(err)
	}
	kib := 0
	for line := range strings.Lines(string(b)) {
		fmt.Sscanf(line, "VmHWM: %d kB", &kib)
	}
	return kib << 10
}
