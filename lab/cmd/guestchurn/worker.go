package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"vacate/lab/churnproto"
)

const pageSize = churnproto.PageSize

// loads are the workers, each a process. Sizes are shares of the guest's memory in percent.
var loads = []struct {
	name  string
	share int
	needs func(*system) bool
	run   func(*worker) error
}{
	{"anon", 16, always, func(w *worker) error { return w.anon(unix.MADV_NOHUGEPAGE) }},
	{"huge", 18, always, func(w *worker) error { return w.anon(unix.MADV_HUGEPAGE) }},
	{"fork", 3, always, (*worker).fork},
	{"disk", 13, func(s *system) bool { return s.disk },
		func(w *worker) error { return w.files(diskDir) }},
	{"shmem", 9, always, func(w *worker) error { return w.files(shmemDir) }},
	{"names", 2, always, (*worker).names},
	{"kernel", 4, always, (*worker).kernel},
	{"pipe", 2, always, (*worker).pipes},
	{"socket", 2, always, (*worker).sockets},
	{"echo", 1, func(s *system) bool { return s.net }, (*worker).echo},
	{"hugetlb", 7, always, (*worker).hugetlb},
	{"press", 45, func(s *system) bool { return s.swap }, (*worker).press},
	{"poke", 0, always, (*worker).poke},
}

func always(*system) bool { return true }

// counters are shared by all processes.
type counters struct {
	pages  atomic.Uint64
	checks atomic.Uint64     // how often all workers were asked to verify all they have
	ops    [64]atomic.Uint64 // by worker
	done   [64]atomic.Uint64 // the last check that it has carried out
}

// Descriptors that a worker inherits.
const (
	fdReport   = 3
	fdCounters = 4
)

func mapCounters(fd int) (*counters, error) {
	b, err := unix.Mmap(fd, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map counters: %w", err)
	}
	return (*counters)(unsafe.Pointer(&b[0])), nil
}

// A worker is one process of the load.
type worker struct {
	*rand.Rand
	index  int
	budget int // pages
	shared *counters
	report *os.File
	said   int // bad words
}

// work is the main function of a worker's process.
func work(name string, index int) error {
	shared, err := mapCounters(fdCounters)
	if err != nil {
		return err
	}
	kib, err := meminfo("MemTotal")
	if err != nil {
		return err
	}
	for _, l := range loads {
		if l.name == name {
			var seed [2]uint64
			if err := randomSeed(&seed); err != nil {
				return err
			}
			shared.done[index].Store(shared.checks.Load())
			return l.run(&worker{
				Rand: rand.New(rand.NewPCG(seed[0], seed[1])), index: index,
				budget: kib / 4 * l.share / 100,
				shared: shared, report: os.NewFile(fdReport, "report"),
			})
		}
	}
	return fmt.Errorf("there is no such worker")
}

func randomSeed(seed *[2]uint64) error {
	_, err := unix.Getrandom(unsafe.Slice((*byte)(unsafe.Pointer(seed)), 16), unix.GRND_NONBLOCK)
	if err == unix.EAGAIN { // a VM without a source of chance: time will do
		var t unix.Timespec
		err = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
		seed[0], seed[1] = uint64(t.Nano()), uint64(os.Getpid())
	}
	return err
}

// checkDue says whether checkNow would call.
func (w *worker) checkDue() bool { return w.shared.done[w.index].Load() != w.shared.checks.Load() }

// checkNow calls verify if the worker must verify all that it has now. It is called often.
func (w *worker) checkNow(verify func() error) error {
	n := w.shared.checks.Load()
	if w.shared.done[w.index].Load() == n {
		return nil
	}
	if err := verify(); err != nil {
		return err
	}
	w.shared.done[w.index].Store(n)
	return nil
}

// did counts an operation and the pages that it verified.
func (w *worker) did(pages int) {
	w.shared.ops[w.index].Add(1)
	w.shared.pages.Add(uint64(pages))
}

// maxBad is how many bad words a worker reports.
const maxBad = 20

func (w *worker) bad(what string, address, want, found uint64) {
	if w.said++; w.said > maxBad {
		return
	}
	b, err := json.Marshal(churnproto.Bad{Worker: w.index, What: what, Address: address, Want: want,
		Found: found})
	if err == nil {
		w.report.Write(append(b, '\n'))
	}
}

// check verifies one page of memory; it reports the first wrong word, at address plus its offset.
func (w *worker) check(what string, p []byte, seed uint64, address uint64) bool {
	words := (*churnproto.Words)(unsafe.Pointer(&p[0]))
	at, want := words.Check(seed, w.step())
	if at >= 0 {
		w.bad(what, address+uint64(at)*8, want, words[at])
	}
	return at < 0
}

func (w *worker) fill(p []byte, seed uint64) {
	(*churnproto.Words)(unsafe.Pointer(&p[0])).Fill(seed, w.step())
}

func (w *worker) step() uint64 { return churnproto.Step(w.index) }

// seed returns a new seed for a page, never 0.
func (w *worker) seed() uint64 { return w.Uint64() | 1 }

func addressOf(p []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&p[0]))) }
