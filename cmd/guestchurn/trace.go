package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"vacate/lab/churnproto"
)

// ringPages are the data pages of one CPU's ring: about 90,000 events.
const ringPages = 1024

// traceAllocator has the kernel write each allocation and each freeing of pages into
// perf(2) rings. Nobody in the guest reads them: the host does, in the guest's memory.
func traceAllocator(dir string) (*churnproto.Trace, error) {
	if dir == "" {
		return nil, fmt.Errorf("there is no tracefs")
	}
	t := &churnproto.Trace{}
	for name, e := range map[string]*churnproto.Event{"mm_page_alloc": &t.Alloc, "mm_page_free": &t.Free} {
		if err := readEvent(filepath.Join(dir, "events/kmem", name), e); err != nil {
			return nil, err
		}
	}
	for cpu := range runtime.NumCPU() {
		leader := -1
		for _, id := range []int{t.Alloc.ID, t.Free.ID} {
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
			ring, err := unix.Mmap(fd, 0, (1+ringPages)*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				return nil, fmt.Errorf("map the ring: %w", err)
			}
			frames, err := framesOf(ring)
			if err != nil {
				return nil, err
			}
			t.Rings = append(t.Rings, frames)
		}
	}
	return t, nil
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
		if n, _ := fmt.Sscanf(strings.TrimSpace(rest), "offset:%d; size:%d;", &offset, &size); n != 2 {
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

// framesOf returns the page frames behind memory that never moves.
func framesOf(mem []byte) ([]uint64, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	frames := make([]uint64, len(mem)/pageSize)
	var entry [8]byte
	for i := range frames {
		_ = *(*byte)(&mem[i*pageSize]) // map it
		sink += mem[i*pageSize]
		if _, err := f.ReadAt(entry[:], int64((addressOf(mem)/pageSize+uint64(i))*8)); err != nil {
			return nil, err
		}
		v := binary.LittleEndian.Uint64(entry[:])
		if v>>63 == 0 || v&(1<<55-1) == 0 {
			return nil, fmt.Errorf("pagemap does not tell where page %d of the ring is", i)
		}
		frames[i] = v & (1<<55 - 1)
	}
	return frames, nil
}

var sink byte
