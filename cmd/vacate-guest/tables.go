package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"vacate/internal/guest/pageclass"
)

// No file of Linux has a page's accessed bit unless the kernel tracks idle pages, and Debian's does
// not. "Referenced" in smaps is a sum, and kpageflags' bit is the LRU's. But kpageflags tells which
// pages are page tables, and /proc/kcore shows what they hold. Which process a table belongs to
// follows from who owns the pages that it maps.

// Bits of an entry of a page table (Intel SDM vol. 3A, table 4-20).
const (
	ptePresent  = 1 << 0
	pteUser     = 1 << 2
	pteAccessed = 1 << 5
	// in a table of the lowest level a memory type, which user memory does not use
	pteLarge = 1 << 7
	pteFrame = 1<<52 - 1<<12
)

// A segment is a part of memory in /proc/kcore, an ELF core file (man 5 elf).
type segment struct{ phys, size, offset uint64 }

// kcore reads which parts of memory the file has.
func kcore(f io.ReaderAt) ([]segment, error) {
	var h [64]byte
	if _, err := f.ReadAt(h[:], 0); err != nil {
		return nil, err
	}
	if string(h[:6]) != "\x7fELF\x02\x01" || binary.LittleEndian.Uint16(h[54:]) != 56 {
		return nil, errors.New("not a 64-bit ELF file")
	}
	table := make([]byte, 56*int(binary.LittleEndian.Uint16(h[56:])))
	if _, err := f.ReadAt(table, int64(binary.LittleEndian.Uint64(h[32:]))); err != nil {
		return nil, fmt.Errorf("read program headers: %w", err)
	}
	var list []segment
	for p := range slices.Chunk(table, 56) {
		s := segment{
			phys:   binary.LittleEndian.Uint64(p[24:]),
			size:   binary.LittleEndian.Uint64(p[32:]),
			offset: binary.LittleEndian.Uint64(p[8:]),
		}
		virt := binary.LittleEndian.Uint64(p[16:])
		const load = 1
		// The kernel's image is there a second time, above.
		if binary.LittleEndian.Uint32(p) == load && s.phys != 1<<64-1 && virt < 0xffffffff80000000 {
			list = append(list, s)
		}
	}
	return list, nil
}

// readTables reads all page tables: it marks the pages that they call accessed, and gives
// the tables an owner. It returns false if the time was over first.
func (s *survey) readTables(until time.Time) (done bool, err error) {
	f, err := os.Open(s.g.proc + "/kcore")
	if err != nil {
		return false, err
	}
	defer f.Close()
	segments, err := kcore(f)
	if err != nil {
		return false, fmt.Errorf("kcore: %w", err)
	}
	var upper [][2]uint32 // a table and one of those below it
	var mapped, accessed int
	table := make([]byte, 4096)
	for i := range s.Pages {
		if s.Pages[i].Kind != pageclass.UserPageTable {
			continue
		}
		if i%16 == 0 && time.Now().After(until) {
			return false, nil
		}
		phys := uint64(i) * 4096
		at := slices.IndexFunc(segments,
			func(g segment) bool { return phys >= g.phys && phys-g.phys < g.size })
		if at < 0 {
			continue
		}
		if _, err := f.ReadAt(table,
			int64(segments[at].offset+phys-segments[at].phys)); err != nil {
			continue
		}
		m, a, below := s.readTable(uint32(i), table)
		mapped, accessed = mapped+m, accessed+a
		if below != 0 {
			upper = append(upper, [2]uint32{uint32(i), below})
		}
	}
	for range 4 { // levels above the lowest
		for _, u := range upper {
			if p := &s.Pages[u[0]]; p.Owner == 0 {
				p.Owner = s.Pages[u[1]].Owner
			}
		}
	}
	for i := range s.Pages {
		p := &s.Pages[i]
		if p.Kind == pageclass.UserPageTable && (p.Owner == 0 || !s.Processes[p.Owner-1].Active) {
			p.Class = pageclass.Kernel
		}
	}
	s.Fresh = accessed > 0 && accessed*10 <= mapped*7
	return true, nil
}

// readTable returns how many pages of users the table maps, how many of them were accessed,
// and a table below it.
func (s *survey) readTable(frame uint32, table []byte) (mapped, accessed int, below uint32) {
	me := &s.Pages[frame]
	for at := 0; at < len(table); at += 8 {
		e := binary.LittleEndian.Uint64(table[at:])
		to := e & pteFrame >> 12
		if e&(ptePresent|pteUser) != ptePresent|pteUser {
			continue
		}
		n := uint64(1)
		if e&pteLarge != 0 && to&^1%512 == 0 { // bit 12 is a memory type
			n, to = 512, to&^1
		}
		if to+n > uint64(len(s.Pages)) {
			continue
		}
		if n == 1 && s.Pages[to].Kind == pageclass.UserPageTable {
			below = uint32(to)
			continue
		}
		mapped += int(n)
		if e&pteAccessed != 0 {
			accessed += int(n)
			for i := range n {
				if p := &s.Pages[to+i]; p.Kind != pageclass.None {
					// there may have been no time for its flags
					p.Flags |= pageclass.Accessed
				}
			}
		}
		if me.Owner == 0 {
			me.Owner = s.Pages[to].Owner
		}
	}
	return mapped, accessed, below
}
