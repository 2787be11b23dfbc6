package guestmem

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"
	"sync"

	"vacate/internal/sys/units"

	"golang.org/x/sys/unix"
)

// A Range is Length bytes of a block from Offset on. Neither need be aligned.
type Range struct {
	Block          int
	Offset, Length uint64
}

// iovMax is the kernel's UIO_MAXIOV.
const iovMax = 1024

var iovecs = sync.Pool{New: func() any { return new([iovMax]unix.RemoteIovec) }}

// Read fills dst with the block's bytes from offset on.
func (m *Memory) Read(dst []byte, block int, offset uint64) error {
	r := [1]Range{{block, offset, uint64(len(dst))}}
	return m.ReadRanges(dst, r[:])
}

// ReadRanges fills dst with the ranges, one after another; dst must have
// exactly their length. Up to 1024 of them take one system call, and a call
// allocates nothing. The guest may change what it reads unless it is stopped.
//
// Pages that Populated does not report are zero; reading them is a waste, and
// of a PrivateFile makes the host allocate them. On an error the content of
// dst is undefined. The error wraps ErrGone if QEMU has exited.
func (m *Memory) ReadRanges(dst []byte, ranges []Range) error {
	sum := uint64(0)
	for _, r := range ranges {
		if err := m.within(r.Block, r.Offset, r.Length); err != nil {
			return fmt.Errorf("read guest memory: %w", err)
		}
		if r.Length > uint64(len(dst))-sum {
			return fmt.Errorf("read guest memory: ranges longer than the buffer of %d bytes",
				len(dst))
		}
		sum += r.Length
	}
	if sum != uint64(len(dst)) {
		return fmt.Errorf("read guest memory: buffer of %d bytes for ranges of %d", len(dst), sum)
	}
	iov := iovecs.Get().(*[iovMax]unix.RemoteIovec)
	defer iovecs.Put(iov)
	n, size := 0, 0 // remote pieces gathered, and their bytes
	flush := func() error {
		for at := 0; n > 0 && size > 0; {
			got, err := m.readv(dst[:size], iov[at:n])
			if err != nil {
				return fmt.Errorf("read guest memory: %w", err)
			}
			dst, size = dst[got:], size-got
			for ; at < n && got >= int(iov[at].Len); at++ {
				// what a short read leaves is tried again
				got -= int(iov[at].Len)
			}
			if got > 0 {
				iov[at].Base += uintptr(got)
				iov[at].Len -= got
			}
		}
		n, size = 0, 0
		return nil
	}
	for _, r := range ranges {
		if r.Length == 0 {
			continue
		}
		b := &m.blocks[r.Block]
		if b.Kind == SharedFile {
			if err := flush(); err != nil {
				return err
			}
			f := &m.backing[r.Block]
			if _, err := f.file.ReadAt(dst[:r.Length], f.offset+int64(r.Offset)); err != nil {
				if err == io.EOF {
					err = io.ErrUnexpectedEOF
				}
				return fmt.Errorf("read guest memory: block %s at %#x: %w", b.Name, r.Offset,
					m.explain(err))
			}
			dst = dst[r.Length:]
			continue
		}
		if n == iovMax {
			if err := flush(); err != nil {
				return err
			}
		}
		iov[n] = unix.RemoteIovec{Base: uintptr(b.HVA + r.Offset), Len: int(r.Length)}
		n++
		size += int(r.Length)
	}
	if err := flush(); err != nil {
		return err
	}
	if !m.alive() {
		return fmt.Errorf("read guest memory: %w (pid %d)", ErrGone, m.pid)
	}
	return nil
}

// View returns the memory of a SharedFile block itself, read-only, or nil for one that is not. It
// stays until Close. The guest changes it under the reader's eyes unless it is stopped.
//
// Only populated pages may be read: reading another makes QEMU grow by it. If QEMU's memory file
// is cut short, reading faults (see debug.SetPanicOnFault).
func (m *Memory) View(block int) ([]byte, error) {
	if err := m.within(block, 0, 0); err != nil {
		return nil, fmt.Errorf("map guest memory: %w", err)
	}
	b, f := &m.blocks[block], &m.backing[block]
	if b.Kind != SharedFile {
		return nil, nil
	}
	m.viewing.Lock()
	defer m.viewing.Unlock()
	if f.view == nil {
		size := (b.Size + b.PageSize - 1) / b.PageSize * b.PageSize
		view, err := unix.Mmap(int(f.file.Fd()), f.offset, int(size), unix.PROT_READ,
			unix.MAP_SHARED)
		if err != nil {
			return nil, fmt.Errorf("map guest memory: block %s: %w", b.Name,
				os.NewSyscallError("mmap", err))
		}
		f.view = view
	}
	return f.view[:b.Size], nil
}

func (m *Memory) within(block int, offset, length uint64) error {
	switch {
	case block < 0 || block >= len(m.blocks):
		return fmt.Errorf("no block %d", block)
	case !m.blocks[block].Located:
		return fmt.Errorf("%w: %s", ErrNotLocated, m.blocks[block].Name)
	case offset > m.blocks[block].Size || length > m.blocks[block].Size-offset:
		return fmt.Errorf("%#x bytes at %#x are beyond block %s", length, offset,
			m.blocks[block].Name)
	}
	return nil
}

// readv is process_vm_readv(2) of at least one byte.
func (m *Memory) readv(dst []byte, remote []unix.RemoteIovec) (int, error) {
	local := [1]unix.Iovec{{Base: &dst[0], Len: uint64(len(dst))}}
	n, err := unix.ProcessVMReadv(m.pid, local[:], remote, 0)
	if err == nil && n == 0 {
		err = unix.EFAULT
	}
	if err != nil {
		return 0, m.explain(fmt.Errorf("process_vm_readv at %#x: %w", remote[0].Base, err))
	}
	return n, nil
}

// pagemap(5): bit 63 present in memory, bit 62 in swap.
const pagemapUsed = 3 << 62

var pagemapBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// Populated sets, for each of n pages of units.PageSize bytes from page first on, bit i%64 of
// dst[i/64] to whether page first+i may hold anything but zero. Other bits of the words it touches
// are cleared. Pages that were swapped out count. So does every page of a file in hugetlb memory,
// whose holes the kernel does not show, and of a file on a disk, whose file system may not know yet
// what will be written. The answer is exact while the guest is stopped.
func (m *Memory) Populated(block int, first, n uint64, dst []uint64) error {
	return m.scan("populated", block, first, n, dst, func(dst []uint64) error {
		kind, b := m.blocks[block].Kind, &m.backing[block]
		if kind == SharedFile || kind == PrivateFile {
			if b.file == nil || !b.tmpfs {
				setBits(dst, 0, n)
			} else if err := b.data(first, n, dst); err != nil {
				return err
			}
		}
		if kind == SharedFile {
			return nil
		}
		return m.touched(m.blocks[block].HVA/units.PageSize+first, n, dst)
	})
}

// Placed sets bits of dst as Populated does, to whether page first+i is there, be it zero or
// not: a thread that touches one which is not has the kernel make it, or waits for userfaultfd.
// It is exact for pages that were there when it was called and are not taken away.
func (m *Memory) Placed(block int, first, n uint64, dst []uint64) error {
	return m.scan("placed", block, first, n, dst, func(dst []uint64) error {
		if b := &m.backing[block]; m.blocks[block].Kind == SharedFile && !b.hugetlb {
			return b.data(first, n, dst)
		}
		return m.touched(m.blocks[block].HVA/units.PageSize+first, n, dst)
	})
}

// Held returns how many bytes of a block are there, as Placed has it: preallocated, or left in its
// file.
func (m *Memory) Held(block int) (bytes uint64, err error) {
	var words [1 << 12]uint64
	const most = uint64(len(words)) * 64
	for first, pages := uint64(0), m.blocks[block].Size/units.PageSize; first <
		pages; first += most {
		n := min(most, pages-first)
		if err := m.Placed(block, first, n, words[:]); err != nil {
			return 0, err
		}
		for _, w := range words[:(n+63)/64] {
			bytes += uint64(bits.OnesCount64(w)) * units.PageSize
		}
	}
	return bytes, nil
}

// File returns the file that a block of a SharedFile is in, which stays open until Close; nil for
// another.
func (m *Memory) File(block int) *os.File {
	if m.blocks[block].Kind != SharedFile {
		return nil
	}
	return m.backing[block].file
}

// Reserved tells for each block whether its huge pages were set aside for it when it was mapped, so
// that all of them can be had.
func (m *Memory) Reserved() ([]bool, error) {
	reserved := make([]bool, len(m.blocks))
	if !slices.ContainsFunc(m.blocks,
		func(b Block) bool { return b.Located && b.PageSize != units.PageSize }) {
		return reserved, nil
	}
	maps, err := os.Open(fmt.Sprintf("/proc/%d/smaps", m.pid))
	if err != nil {
		return nil, m.explain(err)
	}
	defer maps.Close()
	lax, err := parseUnreserved(maps)
	if err != nil {
		return nil, m.explain(err)
	}
	for i, b := range m.blocks {
		isLax, mapped := lax[b.HVA]
		reserved[i] = b.Located && b.PageSize != units.PageSize && mapped && !isLax
	}
	return reserved, nil
}

// scan has bits set of n pages from page first on, by find, which gets the words for them
// cleared. kind says for messages which pages are looked for.
func (m *Memory) scan(kind string, block int, first, n uint64, dst []uint64,
	find func(dst []uint64) error) error {
	if first > 1<<52 || n > 1<<52 || n > uint64(len(dst))*64 {
		return fmt.Errorf("find %s pages: bad range of %d pages at %d for %d words", kind, n, first,
			len(dst))
	}
	if err := m.within(block, first*units.PageSize, n*units.PageSize); err != nil {
		return fmt.Errorf("find %s pages: %w", kind, err)
	}
	dst = dst[:(n+63)/64]
	clear(dst)
	err := find(dst)
	if err == nil && !m.alive() {
		err = unix.ESRCH
	}
	if err != nil {
		return fmt.Errorf("find %s pages of block %s: %w", kind, m.blocks[block].Name,
			m.explain(err))
	}
	return nil
}

// touched adds the pages of QEMU's address space, from number vpn on, that
// the process has in memory or swap.
func (m *Memory) touched(vpn, n uint64, dst []uint64) error {
	buf := pagemapBuffers.Get().(*[64 << 10]byte)
	defer pagemapBuffers.Put(buf)
	for at := uint64(0); at < n; {
		part := buf[:min(uint64(len(buf)), (n-at)*8)]
		if _, err := m.pagemap.ReadAt(part, int64((vpn+at)*8)); err != nil {
			if err == io.EOF { // its memory is gone
				err = unix.ESRCH
			}
			return err
		}
		for ; len(part) > 0; part = part[8:] {
			if binary.NativeEndian.Uint64(part)&pagemapUsed != 0 {
				dst[at/64] |= 1 << (at % 64)
			}
			at++
		}
	}
	return nil
}

// data adds the pages that the file has storage for.
func (b *backing) data(first, n uint64, dst []uint64) error {
	start := b.offset + int64(first*units.PageSize)
	end := start + int64(n*units.PageSize)
	for at := start; at < end; {
		from, err := unix.Seek(int(b.file.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO || err == nil && from >= end {
			return nil
		}
		if err != nil { // a file system without holes
			setBits(dst, 0, n)
			return nil
		}
		to, err := unix.Seek(int(b.file.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if from < at || to <= from {
			return fmt.Errorf("file changed while it was searched for holes")
		}
		to = min(to, end)
		setBits(dst, uint64(from-start)/units.PageSize,
			(uint64(to-start)+units.PageSize-1)/units.PageSize)
		at = to
	}
	return nil
}

func setBits(dst []uint64, from, to uint64) {
	for ; from < to; from++ {
		if from%64 == 0 && to-from >= 64 {
			dst[from/64] = ^uint64(0)
			from += 63
			continue
		}
		dst[from/64] |= 1 << (from % 64)
	}
}

var zeros [64 << 10]byte

// IsZero reports whether all bytes of b are zero.
func IsZero(b []byte) bool {
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}
