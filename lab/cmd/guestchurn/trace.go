package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"vacate/lab/churnproto"
)

// ringPages are the data pages of one CPU's ring: about 40,000 events.
const ringPages = 512

// traceAllocator has the kernel write each allocation and each freeing of pages into
// perf(2) rings. Nobody in the guest reads them: the host does, in the guest's memory.
// There it knows them by what is in them, as not all kernels tell a process where they are.
func traceAllocator(dir string) (*churnproto.Trace, error) {
	if dir == "" {
		return nil, fmt.Errorf("there is no tracefs")
	}
	t := &churnproto.Trace{}
	for name, e := range map[string]*churnproto.Event{"mm_page_alloc": &t.Alloc,
		"mm_page_free": &t.Free} {
		if err := readEvent(filepath.Join(dir, "events/kmem", name), e); err != nil {
			return nil, err
		}
	}
	for cpu := range runtime.NumCPU() {
		ring, err := openRing(cpu, t.Alloc.ID, t.Free.ID)
		if err != nil {
			return nil, err
		}
		words := unsafe.Slice((*uint64)(unsafe.Pointer(&ring[0])), len(ring)/8)
		if err := fillRing(cpu, words); err != nil {
			return nil, err
		}
		r := churnproto.Ring{Mark: rand.Uint64()}
		words[churnproto.MarkOffset/8] = r.Mark
		for i := range ringPages {
			r.Sums = append(r.Sums,
				churnproto.Sum((*churnproto.Words)(unsafe.Pointer(&ring[(1+i)*pageSize]))))
		}
		t.Rings = append(t.Rings, r)
	}
	return t, nil
}

// openRing returns a ring of a CPU's events of both kinds: struct perf_event_mmap_page,
// then the data.
func openRing(cpu int, events ...int) (ring []byte, err error) {
	leader := -1
	for _, id := range events {
		attr := unix.PerfEventAttr{
			Type: unix.PERF_TYPE_TRACEPOINT, Config: uint64(id), Sample: 1,
			Sample_type: unix.PERF_SAMPLE_TIME | unix.PERF_SAMPLE_RAW,
			Bits:        unix.PerfBitWatermark | unix.PerfBitUseClockID,
			Wakeup:      ringPages * pageSize, // never: nobody waits
			Clockid:     unix.CLOCK_MONOTONIC_RAW,
		}
		attr.Size = uint32(unsafe.Sizeof(attr))
		fd, err := unix.PerfEventOpen(&attr, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("perf_event_open: %w", err)
		}
		if leader >= 0 {
			if err := unix.IoctlSetInt(fd, unix.PERF_EVENT_IOC_SET_OUTPUT, leader); err != nil {
				return nil, fmt.Errorf("share a ring: %w", err)
			}
			continue
		}
		leader = fd
		if ring, err = unix.Mmap(fd, 0, (1+ringPages)*pageSize, unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_SHARED); err != nil {
			return nil, fmt.Errorf("map the ring: %w", err)
		}
	}
	return ring, nil
}

// fillRing allocates and frees pages on a CPU until the ring takes no more.
func fillRing(cpu int, ring []uint64) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, only unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return err
	}
	defer unix.SchedSetaffinity(0, &before)
	only.Set(cpu)
	if err := unix.SchedSetaffinity(0, &only); err != nil {
		return err
	}
	for range 2000 {
		if atomic.LoadUint64(&ring[churnproto.HeadOffset/8]) > ringPages*pageSize-
			churnproto.FullBut {
			return nil
		}
		mem, err := mmap(64*pageSize, unix.MAP_POPULATE)
		if err != nil {
			return err
		}
		if err := munmap(mem); err != nil {
			return err
		}
	}
	return fmt.Errorf("the ring of CPU %d does not fill", cpu)
}

// readEvent reads the layout of a tracepoint's record, lines such as
// "field:unsigned long pfn;	offset:8;	size:8;	signed:0;".
func readEvent(dir string, e *churnproto.Event) error {
	b, err := os.ReadFile(dir + "/format")
	if err != nil {
		return err
	}
	found := 0
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if v, ok := strings.CutPrefix(line, "ID: "); ok {
			if e.ID, err = strconv.Atoi(v); err != nil {
				return err
			}
			found++
		}
		decl, rest, _ := strings.Cut(line, ";")
		name := decl[strings.LastIndexByte(decl, ' ')+1:]
		var offset, size int
		if n, _ := fmt.Sscanf(strings.TrimSpace(rest), "offset:%d; size:%d;", &offset,
			&size); n != 2 {
			continue
		}
		switch {
		case name == "pfn" && size == 8:
			e.PFN = offset
			found++
		case name == "order" && size == 4:
			e.Order = offset
			found++
		}
	}
	if found != 3 {
		return fmt.Errorf("%s/format is not as expected", dir)
	}
	return nil
}
