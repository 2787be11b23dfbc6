package linux

import (
	"fmt"

	"vacate/internal/sys/units"
)

// space translates virtual addresses by a table of x86-64 (Intel SDM volume 3, 4.5):
// four or five levels, pages of 4 KiB, 2 MiB and 1 GiB. It keeps the tables that it has
// read until forget is called, so it must not outlive a stop of the guest. It is not
// safe for concurrent use.
type space struct {
	mem    Memory
	root   uint64 // guest-physical address of the top table
	levels int    // 4 or 5
	tables map[uint64]*table
	spare  []*table // to be filled again
	tlb    [1 << tlbBits]tlbEntry
}

type table [512]uint64

const (
	present   = 1 << 0
	canWrite  = 1 << 1
	largePage = 1 << 7
	addrMask  = (1<<52 - 1) &^ (units.PageSize - 1)
	maxTables = 16 << 10 // kept at a time: 64 MiB
	tlbBits   = 10
)

// tlbEntry: pages of 4 KiB with number vpn lie at addr, size bytes from the start of a larger page
// on.
type tlbEntry struct {
	vpn   uint64 // of 4 KiB, plus 1: 0 is none
	addr  uint64 // of that 4 KiB page
	until uint64 // virtual address at which the page ends, whatever its size
}

func newSpace(mem Memory, root uint64, levels int) *space {
	return &space{mem: mem, root: root &^ (units.PageSize - 1) & addrMask, levels: levels,
		tables: map[uint64]*table{}}
}

// Bits of the registers (Intel SDM volume 3, 2.5).
const (
	cr0Paging = 1 << 31
	cr4LA57   = 1 << 12
)

// levels is how many levels of page tables the CPU uses.
func (c CPU) levels() int {
	if c.CR4&cr4LA57 != 0 {
		return 5
	}
	return 4
}

// roots are the candidates for the table that maps the kernel. Under page table isolation, a CPU in
// user mode uses the second of two, with bit 12 set, which lacks most of the kernel.
func (c CPU) roots() [2]uint64 { return [2]uint64{c.CR3, c.CR3 &^ units.PageSize} }

// forget drops what was read of the tables, as they may have changed.
func (s *space) forget() {
	for addr, t := range s.tables {
		s.spare = append(s.spare, t)
		delete(s.tables, addr)
	}
	clear(s.tlb[:])
}

// table returns the table at a guest-physical address.
func (s *space) table(addr uint64) (*table, error) {
	if t := s.tables[addr]; t != nil {
		return t, nil
	}
	if len(s.tables) >= maxTables {
		s.forget()
	}
	var t *table
	if n := len(s.spare); n > 0 {
		t, s.spare = s.spare[n-1], s.spare[:n-1]
	} else {
		t = new(table)
	}
	if err := readPhys(s.mem, bytesOf(t[:]), addr); err != nil {
		s.spare = append(s.spare, t)
		return nil, fmt.Errorf("read page table: %w", err)
	}
	s.tables[addr] = t
	return t, nil
}

// translate returns the guest-physical address of va and the number of bytes from there
// to the end of the page, which may be a large one.
func (s *space) translate(va uint64) (addr, left uint64, err error) {
	vpn := va / units.PageSize
	e := &s.tlb[vpn%(1<<tlbBits)]
	if e.vpn != vpn+1 {
		if err := s.walk(va, e); err != nil {
			return 0, 0, err
		}
	}
	return e.addr + va%units.PageSize, e.until - va, nil
}

// read fills dst with virtual memory, which must all be mapped RAM.
func (s *space) read(dst []byte, va uint64) error {
	for len(dst) > 0 {
		addr, left, err := s.translate(va)
		if err != nil {
			return err
		}
		n := min(left, uint64(len(dst)))
		if err := readPhys(s.mem, dst[:n], addr); err != nil {
			return err
		}
		dst, va = dst[n:], va+n
	}
	return nil
}

func (s *space) walk(va uint64, e *tlbEntry) error {
	top := 12 + 9*uint(s.levels)
	if sign := int64(va) >> (top - 1); sign != 0 && sign != -1 {
		return fmt.Errorf("address %#x is not canonical", va)
	}
	at := s.root
	for shift := top - 9; ; shift -= 9 {
		t, err := s.table(at)
		if err != nil {
			return err
		}
		entry := t[va>>shift&511]
		if entry&present == 0 {
			return fmt.Errorf("address %#x is not mapped", va)
		}
		at = entry & addrMask
		if shift > 12 && (shift > 30 || entry&largePage == 0) {
			continue
		}
		size := uint64(1) << shift
		at &^= size - 1 // bit 12 of a large page's entry is no address
		// The last page ends at 2^64, which is 0: until minus va is right all the same.
		*e = tlbEntry{va/units.PageSize + 1, at + va&(size-1)&^(units.PageSize-1),
			va&^(size-1) + size}
		return nil
	}
}

// writable reports whether the kernel may write to va, where that lies, and how far from there on
// the same is so at least.
func (s *space) writable(va uint64) (addr, left uint64, ok bool) {
	at := s.root
	for shift := 12 + 9*uint(s.levels-1); ; shift -= 9 {
		left = 1<<shift - va&(1<<shift-1)
		t, err := s.table(at)
		if err != nil {
			return 0, left, false
		}
		entry := t[va>>shift&511]
		if entry&(present|canWrite) != present|canWrite {
			return 0, left, false
		}
		at = entry & addrMask
		if shift > 12 && (shift > 30 || entry&largePage == 0) {
			continue
		}
		return at&^(1<<shift-1) + va&(1<<shift-1), left, true
	}
}
