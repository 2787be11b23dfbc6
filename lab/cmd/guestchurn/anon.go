package main

import (
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"vacate/lab/churnproto"
)

// An area is a mapping whose pages are known: page i was filled with seeds[i], or is zero.
type area struct {
	mem   []byte
	seeds []uint64
}

func (w *worker) mapArea(pages, flags, advice int) (*area, error) {
	mem, err := mmap(pages*pageSize, flags)
	if err != nil {
		return nil, fmt.Errorf("map %d pages: %w", pages, err)
	}
	a := &area{mem, make([]uint64, pages)}
	if advice >= 0 {
		if err := unix.Madvise(mem, advice); err != nil {
			return nil, fmt.Errorf("madvise %d: %w", advice, err)
		}
	}
	return a, nil
}

// mmap is not unix.Mmap, whose mappings cannot be taken apart.
func mmap(size, flags int) ([]byte, error) {
	p, _, e := unix.Syscall6(unix.SYS_MMAP, 0, uintptr(size), unix.PROT_READ|unix.PROT_WRITE,
		uintptr(unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|flags), ^uintptr(0), 0)
	if e != 0 {
		return nil, e
	}
	return bytesAt(p, size), nil
}

func bytesAt(p uintptr, size int) []byte {
	return unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&p))), size)
}

func munmap(mem []byte) error {
	if _, _, e := unix.Syscall(unix.SYS_MUNMAP, uintptr(unsafe.Pointer(&mem[0])), uintptr(len(mem)),
		0); e != 0 {
		return fmt.Errorf("munmap: %w", e)
	}
	return nil
}

func (a *area) page(i int) []byte { return a.mem[i*pageSize : (i+1)*pageSize] }

func (w *worker) checkPage(what string, a *area, i int) {
	p := a.page(i)
	if !w.check(what, p, a.seeds[i], addressOf(p)) {
		a.rewrite(w, i) // or it would be reported again
	}
}

func (w *worker) checkAll(what string, a *area) {
	for i := range a.seeds {
		w.checkPage(what, a, i)
	}
}

func (a *area) rewrite(w *worker, i int) {
	a.seeds[i] = w.seed()
	w.fill(a.page(i), a.seeds[i])
}

// span picks a run of an area's pages.
func (w *worker) span(a *area) (from, to int) {
	from = w.IntN(len(a.seeds))
	return from, from + 1 + w.IntN(len(a.seeds)-from)
}

// anon maps, fills, shrinks, moves, drops, swaps out and unmaps anonymous memory.
func (w *worker) anon(advice int) error {
	s := &areaSet{worker: w, advice: advice, what: "anonymous", largest: w.budget / 4}
	if s.huge() {
		s.what = "anonymous huge"
	}
	for {
		if err := w.checkNow(func() error {
			for _, a := range s.areas {
				w.checkAll(s.what, a)
			}
			return nil
		}); err != nil {
			return err
		}
		op := w.IntN(10)
		if s.total > w.budget {
			op = 9
		}
		var err error
		if len(s.areas) == 0 || op == 0 || s.total < w.budget*7/8 {
			err = s.grow()
		} else {
			err = s.change(op)
		}
		if err != nil {
			return err
		}
	}
}

// An areaSet is the memory that a worker has mapped.
type areaSet struct {
	*worker
	advice  int    // of madvise
	what    string // for messages
	largest int    // pages of an area
	areas   []*area
	total   int // pages of all
}

func (s *areaSet) huge() bool { return s.advice == unix.MADV_HUGEPAGE }

// grow maps an area.
func (s *areaSet) grow() error {
	n := 1 << s.IntN(12)
	n = 1 + s.IntN(min(n, s.largest))
	whole := s.huge() && s.IntN(4) > 0
	if whole {
		n = 1023 + s.IntN(512) // whatever its address, at least one huge page fits
	}
	a, err := s.mapArea(n, 0, s.advice)
	if err != nil {
		return err
	}
	if whole || s.IntN(2) == 0 {
		for i := range a.seeds {
			a.rewrite(s.worker, i)
		}
	}
	s.areas, s.total = append(s.areas, a), s.total+len(a.seeds)
	s.did(0)
	return nil
}

// change does something with some pages of one area.
func (s *areaSet) change(op int) (err error) {
	k := s.IntN(len(s.areas))
	a := s.areas[k]
	from, to := s.span(a)
	verify := func(what string) {
		for i := from; i < to; i++ {
			s.checkPage(what, a, i)
		}
	}
	switch op {
	case 1, 2, 3: // verify and rewrite
		for i := from; i < to; i++ {
			s.checkPage(s.what, a, i)
			a.rewrite(s.worker, i)
		}
	case 4: // drop
		verify(s.what)
		if err := unix.Madvise(a.mem[from*pageSize:to*pageSize],
			unix.MADV_DONTNEED); err != nil {
			return fmt.Errorf("madvise dontneed: %w", err)
		}
		clear(a.seeds[from:to])
		if s.IntN(2) == 0 { // reading maps the page of zeroes
			verify(s.what + ", dropped")
		}
	case 5: // to swap, or what else the kernel makes of it
		if err := unix.Madvise(a.mem[from*pageSize:to*pageSize],
			unix.MADV_PAGEOUT); err != nil && err != unix.EINVAL {
			return fmt.Errorf("madvise pageout: %w", err)
		}
	case 6:
		err = s.resize(a)
		from, to = 0, 0
	case 7: // verify only
		verify(s.what)
	default: // unmap
		s.checkAll(s.what, a)
		if err := munmap(a.mem); err != nil {
			return err
		}
		s.total -= len(a.seeds)
		s.areas[k] = s.areas[len(s.areas)-1]
		s.areas = s.areas[:len(s.areas)-1]
	}
	if err == nil {
		s.did(to - from)
	}
	return err
}

// resize grows or shrinks an area, and lets the kernel move it.
func (s *areaSet) resize(a *area) error {
	n := 1 + s.IntN(s.largest)
	for i := n; i < len(a.seeds); i++ {
		s.checkPage(s.what, a, i)
	}
	p, _, e := unix.Syscall6(unix.SYS_MREMAP, uintptr(unsafe.Pointer(&a.mem[0])),
		uintptr(len(a.mem)), uintptr(n*pageSize), unix.MREMAP_MAYMOVE, 0, 0)
	if e != 0 {
		return fmt.Errorf("mremap: %w", e)
	}
	a.mem = bytesAt(p, n*pageSize)
	s.total += n - len(a.seeds)
	a.seeds = append(a.seeds[:min(n, len(a.seeds))], make([]uint64, max(0, n-len(a.seeds)))...)
	return nil
}

// fork has children share the pages and then take copies of them.
func (w *worker) fork() error {
	report, err := unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	a, err := w.mapArea(w.budget/2, 0, -1)
	if err != nil {
		return err
	}
	for i := range a.seeds {
		a.rewrite(w, i)
	}
	children := 0
	for {
		if err := w.checkNow(func() error {
			w.checkAll("copied on write, parent", a)
			return nil
		}); err != nil {
			return err
		}
		if children < 5 {
			from, to := w.span(a)
			to = min(to, from+w.budget/4)
			pid := forkChild(&a.mem[from*pageSize], a.seeds[from:to], w.seed(), w.step(),
				int64(w.IntN(300)), (*[3]uint64)(unsafe.Pointer(&report[0])))
			if pid < 0 {
				return fmt.Errorf("fork: %w", unix.Errno(-pid))
			}
			children++
		}
		for range 20 {
			i := w.IntN(len(a.seeds))
			w.checkPage("copied on write, parent", a, i)
			a.rewrite(w, i)
		}
		w.did(20)
		for children > 0 {
			var status unix.WaitStatus
			pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
			if err != nil {
				return fmt.Errorf("wait for child: %w", err)
			}
			if pid == 0 {
				break
			}
			children--
			if status.ExitStatus() != 0 {
				r := (*[3]uint64)(unsafe.Pointer(&report[0]))
				w.bad(fmt.Sprintf("copied on write, child (%#x)", uint32(status)), r[0], r[1], r[2])
			}
		}
		time.Sleep(time.Duration(w.IntN(20)) * time.Millisecond)
	}
}

// forkChild forks a child that verifies pages, writes each, sleeps for some milliseconds, and
// verifies what it wrote. The child ends with status 0, or with 1 and the wrong place in report.
// The child must not enter Go's runtime, which did not survive the fork: hence no growth of the
// stack, and only raw system calls. It returns the child's process or a negative errno.
//
//go:nosplit
//go:norace
func forkChild(mem *byte, seeds []uint64, seed, step uint64, ms int64, report *[3]uint64) int {
	pid, _, e := unix.RawSyscall(unix.SYS_FORK, 0, 0, 0)
	if e != 0 {
		return -int(e)
	}
	if pid != 0 {
		return int(pid)
	}
	sleep := unix.Timespec{Sec: 0, Nsec: ms * 1e6}
	for turn := range 2 {
		for i := range seeds {
			p := (*churnproto.Words)(unsafe.Add(unsafe.Pointer(mem), i*pageSize))
			expect := seeds[i]
			if turn == 1 {
				expect = seed + uint64(i)
			}
			if at, want := p.Check(expect, step); at >= 0 {
				report[0], report[1], report[2] = uint64(uintptr(unsafe.Pointer(p)))+
					uint64(at)*8, want, p[at]
				unix.RawSyscall(unix.SYS_EXIT_GROUP, 1, 0, 0)
			}
			p.Fill(seed+uint64(i), step)
		}
		unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&sleep)), 0, 0)
	}
	unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	return 0
}

// hugetlb resizes the pool of huge pages and uses them.
func (w *worker) hugetlb() error {
	const huge = 2 << 20 / pageSize
	most := max(1, w.budget/huge)
	var held *area
	for {
		if held != nil {
			w.checkAll("hugetlb", held)
			if err := munmap(held.mem); err != nil {
				return err
			}
			w.did(len(held.seeds))
			held = nil
		}
		if err := w.checkNow(func() error { return nil }); err != nil { // just done
			return err
		}
		if err := os.WriteFile("/proc/sys/vm/nr_hugepages", fmt.Appendf(nil, "%d", w.IntN(most+1)),
			0); err != nil {
			return err
		}
		a, err := w.mapArea((1+w.IntN(most))*huge, unix.MAP_HUGETLB, -1)
		if err == nil { // else the pool is too small
			held = a
			for i := range a.seeds {
				a.rewrite(w, i)
			}
		}
		w.did(0)
		time.Sleep(time.Duration(w.IntN(300)) * time.Millisecond)
	}
}

// press takes memory until the kernel must swap and reclaim, and lets go of it again. It is
// the first to die when there is not enough.
func (w *worker) press() error {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0); err != nil {
		return err
	}
	for {
		var areas []*area
		floor := 6<<10 + w.IntN(24<<10)
		for total, most := 0, w.budget/2+w.IntN(w.budget/2); total < most && !w.checkDue(); {
			avail, err := meminfo("MemAvailable")
			if err != nil {
				return err
			}
			free, err := meminfo("SwapFree")
			if err != nil {
				return err
			}
			if avail < floor || free < 32<<10 {
				break
			}
			a, err := w.mapArea(128+w.IntN(256), 0, -1)
			if err != nil {
				return err
			}
			for i := range a.seeds {
				a.rewrite(w, i)
			}
			areas = append(areas, a)
			total += len(a.seeds)
			w.did(0)
		}
		time.Sleep(time.Duration(w.IntN(300)) * time.Millisecond)
		for _, a := range areas {
			w.checkAll("anonymous, under pressure", a)
			if err := munmap(a.mem); err != nil {
				return err
			}
			w.did(len(a.seeds))
		}
		if err := w.checkNow(func() error { return nil }); err != nil { // just done
			return err
		}
		time.Sleep(time.Duration(w.IntN(1500)) * time.Millisecond)
	}
}

// poke has the kernel move and drop pages.
func (w *worker) poke() error {
	// 4: no line in the log each time.
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("4"), 0); err != nil {
		return err
	}
	for {
		time.Sleep(time.Duration(w.IntN(800)) * time.Millisecond)
		if err := w.checkNow(func() error { return nil }); err != nil { // it has nothing
			return err
		}
		file, value := "compact_memory", "1"
		switch w.IntN(6) {
		case 0:
			file, value = "drop_caches", "1"
		case 1:
			file, value = "drop_caches", "2"
		case 2:
			file, value = "drop_caches", "3"
		case 3: // how much the CPUs keep in their own lists; since 5.14
			file, value = "percpu_pagelist_high_fraction", fmt.Sprint([]int{0, 8, 100}[w.IntN(3)])
		}
		err := os.WriteFile("/proc/sys/vm/"+file, []byte(value), 0)
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		w.did(0)
	}
}
