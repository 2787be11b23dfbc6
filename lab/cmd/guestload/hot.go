package main

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	lp "vacate/lab/loadproto"
)

// rdtsc reads the time-stamp counter. Software emulation's guest clocks are
// too slow to read twice per page.
func rdtsc() uint64

// tscHz measures the counter against CLOCK_MONOTONIC.
func tscHz() float64 {
	start, t0 := time.Now(), rdtsc()
	time.Sleep(100 * time.Millisecond)
	d, t1 := time.Since(start), rdtsc()
	return float64(t1-t0) / d.Seconds()
}

// hotSet is rewritten all the time by its workers, each in its own share.
type hotSet struct {
	workers []*worker
	grown   int
	stop    atomic.Bool
	done    sync.WaitGroup
}

type worker struct {
	set   *hotSet
	seed  uint64
	pages []lp.Page
	first int      // number of the share's first page in the whole set
	gen   []uint32 // the generation each page should have
	pick  picker
	bad   *badSink
	slow  uint64  // the least slow touch, in ticks
	tick  float64 // nanoseconds

	ops atomic.Uint64
	mu  sync.Mutex
	// touches since the last report; guarded by mu.
	touches lp.Touches
	_       [64]byte // the counters of two workers share no cache line
}

func newHotSet(seed uint64, n, workers int, zipf bool, bad *badSink) (*hotSet, error) {
	workers = min(workers, n)
	h := &hotSet{}
	if workers == 0 {
		return h, nil
	}
	hz := tscHz()
	for i := range workers {
		first, end := n*i/workers, n*(i+1)/workers
		pages, err := mapPages(end - first)
		if err != nil {
			return nil, fmt.Errorf("hot set: %w", err)
		}
		w := &worker{
			set: h, seed: lp.SetSeed(seed, lp.SetHot), pages: pages, first: first,
			gen: make([]uint32, len(pages)), bad: bad,
			slow: uint64(lp.SlowTouch * hz / 1e9), tick: 1e9 / hz,
		}
		w.pick = newPicker(w.seed+uint64(first), len(pages), zipf)
		h.workers = append(h.workers, w)
	}
	return h, nil
}

func (w *worker) base(i int) uint64 {
	return lp.Base(w.seed, uint64(w.first+i), uint64(w.gen[i]))
}

func (h *hotSet) size() (n int) {
	for _, w := range h.workers {
		n += len(w.pages)
	}
	return n
}

func (h *hotSet) grow(n int) error {
	for range n {
		for _, w := range h.workers {
			if i := h.grown - w.first; i < len(w.pages) {
				w.pages[i].Fill(w.base(i))
				break
			}
		}
		h.grown++
	}
	return nil
}

func (h *hotSet) start(slow bool) {
	for _, w := range h.workers {
		h.done.Add(1)
		go w.run(slow)
	}
}

// A slow worker rests for restTime after restAfter turns. Under emulation it costs as much to wake
// up as some hundred turns do.
const (
	restAfter = 64
	restTime  = 40 * time.Millisecond
)

// run works until the set stops. One turn: pick a page; look up its
// generation and read its first word, which is what is timed; check it whole;
// rewrite it as the next generation.
func (w *worker) run(slow bool) {
	defer w.set.done.Done()
	runtime.LockOSThread()
	var word uint64
	for turn := 1; !w.set.stop.Load(); turn++ {
		if slow && turn%restAfter == 0 {
			time.Sleep(restTime)
		}
		i := w.pick.next()
		page := &w.pages[i]

		before := rdtsc()
		base := w.base(i)
		word ^= atomic.LoadUint64(&page[0])
		if took := rdtsc() - before; took >= w.slow {
			w.mu.Lock()
			w.touches.Add(uint64(float64(took) * w.tick))
			w.mu.Unlock()
		}

		if !page.Good(base) {
			w.bad.look(lp.SetHot, w.first+i, page, base)
		}
		w.gen[i]++
		page.Fill(w.base(i))
		w.ops.Add(1)
	}
	runtime.KeepAlive(word)
}

// report returns the operations so far and takes the touches since the last call.
func (h *hotSet) report() (ops uint64, touches lp.Touches) {
	for _, w := range h.workers {
		ops += w.ops.Load()
		w.mu.Lock()
		touches.Merge(&w.touches)
		w.touches = lp.Touches{}
		w.mu.Unlock()
	}
	return ops, touches
}

// check stops the workers for good and checks every page.
func (h *hotSet) check(bad *badSink) (lp.SetResult, error) {
	h.stop.Store(true)
	h.done.Wait()
	r := lp.SetResult{Set: lp.SetHot}
	for _, w := range h.workers {
		r.Pages += uint64(len(w.pages))
		for i := range w.pages {
			if bad.look(lp.SetHot, w.first+i, &w.pages[i], w.base(i)) {
				r.Bad++
			}
		}
	}
	return r, nil
}

func monotonic() uint64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return 0
	}
	return uint64(ts.Nano())
}
