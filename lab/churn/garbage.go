package churn

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"vacate/internal/qemu/guestmem"
	"vacate/lab/churnproto"
)

const (
	pageSize = churnproto.PageSize
	words    = pageSize / 8
)

// garbage returns what stop number n writes into a page. Mostly it tells both, so that a
// word that turns up in the guest's reports says where it comes from.
func garbage(pfn uint64, stop int) uint64 {
	switch stop % 8 {
	case 6:
		return ^uint64(0)
	case 7:
		return 0xa5a5a5a5a5a5a5a5
	}
	return stamp | uint64(stop&0xffff)<<32 | pfn&0xffffffff
}

const stamp = 0xa5a5 << 48

// Overwritten is the inverse of garbage, where it has one.
func Overwritten(word uint64) (pfn uint64, stop int, ok bool) {
	return word & 0xffffffff, int(word >> 32 & 0xffff), word&stamp == stamp && word != ^uint64(0) &&
		word != 0xa5a5a5a5a5a5a5a5
}

// A writer writes to a guest's memory, in runs.
type writer struct {
	mem    *guestmem.Memory
	buf    []uint64
	remote []unix.RemoteIovec
	wrote  []uint64 // by frame: the garbage last written there
	first  []byte
	ranges []guestmem.Range
}

const runPages = 256

// fill fills pages with garbage. It leaves a page as it is that begins with what was written there
// before. Debian's kernels clear each page that they allocate (init_on_alloc), so it was not used
// since.
func (w *writer) fill(pfns []uint64, stop int) error {
	if len(pfns) == 0 {
		return nil
	}
	w.ranges = w.ranges[:0]
	for _, pfn := range pfns {
		block, offset, ok := w.mem.Resolve(pfn * pageSize)
		if !ok {
			return fmt.Errorf("there is no page %#x", pfn)
		}
		w.ranges = append(w.ranges, guestmem.Range{Block: block, Offset: offset, Length: 8})
	}
	w.first = slices.Grow(w.first[:0], len(pfns)*8)[:len(pfns)*8]
	if err := w.mem.ReadRanges(w.first, w.ranges); err != nil {
		return err
	}
	if last := int(slices.Max(pfns)); last >= len(w.wrote) {
		w.wrote = append(w.wrote, make([]uint64, last+1-len(w.wrote))...)
	}
	w.buf = w.buf[:0]
	for i, pfn := range pfns {
		if now := binary.LittleEndian.Uint64(w.first[i*8:]); now != 0 && now == w.wrote[pfn] {
			continue
		}
		g := garbage(pfn, stop)
		w.wrote[pfn] = g
		for range words {
			w.buf = append(w.buf, g)
		}
		if err := w.add(pfn*pageSize, pageSize); err != nil {
			return err
		}
		if len(w.buf) == runPages*words {
			if err := w.flush(); err != nil {
				return err
			}
		}
	}
	return w.flush()
}

// write writes one word.
func (w *writer) write(gpa, value uint64) error {
	w.buf = append(w.buf[:0], value)
	if err := w.add(gpa, 8); err != nil {
		return err
	}
	return w.flush()
}

func (w *writer) add(gpa uint64, n int) error {
	block, offset, ok := w.mem.Resolve(gpa)
	if !ok || !w.mem.Blocks()[block].Located {
		return fmt.Errorf("there is no memory at %#x", gpa)
	}
	base := uintptr(w.mem.Blocks()[block].HVA + offset)
	if k := len(w.remote) - 1; k >= 0 && w.remote[k].Base+uintptr(w.remote[k].Len) == base {
		w.remote[k].Len += n
		return nil
	}
	w.remote = append(w.remote, unix.RemoteIovec{Base: base, Len: n})
	return nil
}

func (w *writer) flush() error {
	defer func() { w.buf, w.remote = w.buf[:0], w.remote[:0] }()
	if len(w.buf) == 0 {
		return nil
	}
	local := []unix.Iovec{{Base: (*byte)(unsafe.Pointer(&w.buf[0])), Len: uint64(len(w.buf)) * 8}}
	n, err := unix.ProcessVMWritev(w.mem.PID(), local, w.remote, 0)
	if err == nil && n != len(w.buf)*8 {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write guest memory: %w", err)
	}
	return nil
}

// read reads the guest's memory.
func (w *writer) read(dst []byte, gpa uint64) error {
	for len(dst) > 0 {
		n := min(len(dst), int(pageSize-gpa%pageSize))
		block, offset, ok := w.mem.Resolve(gpa)
		if !ok {
			return errors.New("not in memory")
		}
		if err := w.mem.Read(dst[:n], block, offset); err != nil {
			return err
		}
		dst, gpa = dst[n:], gpa+uint64(n)
	}
	return nil
}
