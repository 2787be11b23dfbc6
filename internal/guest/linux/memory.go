package linux

import (
	"context"
	"encoding/binary"
	"fmt"
)

// A Range is Len bytes from Addr on: guest-physical for Memory, virtual addresses of
// the guest's kernel for a Guest. Neither need be aligned.
type Range struct{ Addr, Len uint64 }

// A CPU holds the registers that say how a virtual CPU translates addresses.
type CPU struct {
	CR0, CR3, CR4 uint64
	Position      // only First needs it
}

// Memory is the guest-physical memory of a virtual machine. Its methods may be called
// concurrently.
type Memory interface {
	// Extents lists the RAM, by address, whole pages, without overlaps. The caller must
	// not change it, and it never changes.
	Extents() []Range
	// ReadRanges fills dst with the ranges, one after another; they must add up to its
	// length and lie in RAM. On an error dst is undefined.
	ReadRanges(dst []byte, ranges []Range) error
	// Populated sets bit i%64 of dst[i/64] to whether page addr/4096+i may hold anything
	// but zero, for n pages that must lie within one extent, and clears the bits behind.
	Populated(addr, n uint64, dst []uint64) error
	// CPUs returns the registers of every virtual CPU. It may have to ask the machine.
	CPUs(context.Context) ([]CPU, error)
}

// viewer is what a Memory may offer besides: bytes without a copy.
type viewer interface {
	// View returns size bytes of RAM from addr on as they are, or nil if they must be
	// read instead. They may change under the reader unless the guest is stopped.
	View(addr, size uint64) []byte
}

// inRAM returns the number of the extent that holds all of r, or -1.
func inRAM(extents []Range, r Range) int {
	lo, hi := 0, len(extents)
	for lo < hi {
		if mid := (lo + hi) / 2; extents[mid].Addr+extents[mid].Len <= r.Addr {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == len(extents) || r.Addr < extents[lo].Addr ||
		r.Len > extents[lo].Len-(r.Addr-extents[lo].Addr) {
		return -1
	}
	return lo
}

func readPhys(mem Memory, dst []byte, addr uint64) error {
	return mem.ReadRanges(dst, []Range{{addr, uint64(len(dst))}})
}

func errNotRAM(r Range) error {
	return fmt.Errorf("%d bytes at guest-physical %#x are not ram", r.Len, r.Addr)
}

func u16(b []byte) uint16 { return binary.LittleEndian.Uint16(b) }
func u32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
func u64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
