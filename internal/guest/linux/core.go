package linux

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"vacate/internal/sys/units"
)

// Core is the memory of a guest in an ELF core file, as QEMU's dump-guest-memory writes it without
// paging (QEMU's dump/dump.c and target/i386/arch_dump.c, 7.2). It is an ET_CORE for x86-64. A
// PT_LOAD segment for each piece of RAM has its guest-physical address in p_paddr. PT_NOTE has a
// note "QEMU" for each virtual CPU with its registers.
type Core struct {
	file    io.ReaderAt
	extents []Range
	offsets []int64 // of each extent, in the file
	cpus    []CPU
}

// Limits of a core file's parts, far above what QEMU writes.
const (
	maxSegments = 1 << 16
	maxNotes    = 64 << 20
)

// OpenCore reads the headers of a core file of size bytes. It reads file as long as the
// Core is in use.
func OpenCore(file io.ReaderAt, size int64) (*Core, error) {
	c, err := openCore(file, size)
	if err != nil {
		return nil, fmt.Errorf("open core file: %w", err)
	}
	return c, nil
}

func openCore(file io.ReaderAt, size int64) (*Core, error) {
	headers, err := programHeaders(file, size)
	if err != nil {
		return nil, err
	}
	c := &Core{file: file}
	var segments []segment
	for ; len(headers) > 0; headers = headers[phSize:] {
		const ptLoad, ptNote = 1, 4
		kind, offset, paddr, filesz := u32(headers), u64(headers[8:]), u64(headers[24:]),
			u64(headers[32:])
		if offset > uint64(size) || filesz > uint64(size)-offset {
			return nil, errors.New("a segment goes beyond the file's end: the file is cut short")
		}
		switch {
		case kind == ptLoad && filesz > 0:
			if (paddr|filesz)%units.PageSize != 0 || paddr > 1<<52 || filesz > 1<<52 {
				return nil,
					fmt.Errorf("a segment of %#x bytes for address %#x is not of whole pages",
						filesz, paddr)
			}
			segments = append(segments, segment{Range{paddr, filesz}, int64(offset)})
		case kind == ptNote:
			cpus, err := readNotes(file, size, offset, filesz)
			if err != nil {
				return nil, err
			}
			c.cpus = append(c.cpus, cpus...)
		}
	}
	if err := c.place(segments); err != nil {
		return nil, err
	}
	if len(c.cpus) == 0 || len(c.cpus) > maxCPUs {
		return nil, fmt.Errorf("registers of %d virtual cpus in qemu's notes: want 1 to %d",
			len(c.cpus), maxCPUs)
	}
	return c, nil
}

// phSize is the size of a program header.
const phSize = 56

// programHeaders reads an ELF header and returns the program headers behind it.
func programHeaders(file io.ReaderAt, size int64) ([]byte, error) {
	var h [64]byte
	if err := readAt(file, size, h[:], 0); err != nil {
		return nil, err
	}
	const classData, etCore, emX8664 = "\x7fELF\x02\x01\x01", 4, 62
	if !bytes.HasPrefix(h[:], []byte(classData)) || u16(h[16:]) != etCore ||
		u16(h[18:]) != emX8664 {
		return nil,
			errors.New("not an elf core file of an x86-64 machine: make one with qemu's " +
				"dump-guest-memory, without -p, -z, -l, -s, -w")
	}
	const shSize, pnXNum = 64, 0xffff
	phoff, count := u64(h[32:]), uint64(u16(h[56:]))
	if count == pnXNum { // more than fit: section 0 has the number, in sh_info
		var sh [shSize]byte
		if err := readAt(file, size, sh[:], u64(h[40:])); err != nil {
			return nil, err
		}
		count = uint64(u32(sh[44:]))
	}
	if u16(h[54:]) != phSize || count > maxSegments {
		return nil, fmt.Errorf("%d program headers of %d bytes: want at most %d of %d", count,
			u16(h[54:]), maxSegments, phSize)
	}
	headers := make([]byte, count*phSize)
	return headers, readAt(file, size, headers, phoff)
}

// readNotes returns the registers in notes of QEMU.
func readNotes(file io.ReaderAt, size int64, offset, n uint64) ([]CPU, error) {
	if n > maxNotes {
		return nil, fmt.Errorf("notes of %d bytes: want at most %d", n, maxNotes)
	}
	notes := make([]byte, n)
	if err := readAt(file, size, notes, offset); err != nil {
		return nil, err
	}
	return parseNotes(notes)
}

// A segment is a piece of the guest's memory, and where it is in the file.
type segment struct {
	Range
	offset int64
}

// place takes segments in order of their addresses.
func (c *Core) place(segments []segment) error {
	slices.SortFunc(segments, func(a, b segment) int { return cmp.Compare(a.Addr, b.Addr) })
	for i, s := range segments {
		if i > 0 && s.Addr < segments[i-1].Addr+segments[i-1].Len {
			return fmt.Errorf("two segments hold address %#x", s.Addr)
		}
		c.extents = append(c.extents, s.Range)
		c.offsets = append(c.offsets, s.offset)
	}
	if len(c.extents) == 0 {
		return errors.New("it holds no memory")
	}
	return nil
}

func readAt(file io.ReaderAt, size int64, dst []byte, at uint64) error {
	if at > uint64(size) || uint64(len(dst)) > uint64(size)-at {
		return fmt.Errorf("%d bytes at %#x are beyond its end", len(dst), at)
	}
	_, err := file.ReadAt(dst, int64(at))
	if err == io.EOF {
		err = nil // ReadAt may say so along with all that was asked for
	}
	return err
}

// parseNotes returns the control registers in the notes that QEMU made. Each note is a
// header of three u32 (length of the name, length of the data, type), the name and the
// data, both padded to 4 bytes. QEMU's data is its QEMUCPUState: u32 version 1, u32 size,
// 18 registers of u64, 10 segments of 24 bytes, then CR0 to CR4.
func parseNotes(b []byte) ([]CPU, error) {
	var cpus []CPU
	for len(b) > 0 {
		if len(b) < 12 {
			return nil, errors.New("a note is cut short")
		}
		name, data := uint64(u32(b)), uint64(u32(b[4:]))
		nameEnd := 12 + (name+3)&^3
		if nameEnd > uint64(len(b)) || data > uint64(len(b))-nameEnd {
			return nil, errors.New("a note is longer than all of them")
		}
		desc := b[nameEnd : nameEnd+data]
		if string(b[12:12+name]) == "QEMU\x00" {
			const control = 8 + 18*8 + 10*24
			if len(desc) < control+5*8 || u32(desc) != 1 {
				return nil, fmt.Errorf("a note with registers has %d bytes, version unknown",
					len(desc))
			}
			cpus = append(cpus,
				CPU{CR0: u64(desc[control:]), CR3: u64(desc[control+24:]),
					CR4: u64(desc[control+32:]), Position: corePosition(desc)})
		}
		b = b[min(uint64(len(b)), nameEnd+(data+3)&^3):]
	}
	return cpus, nil
}

// Extents implements Memory.
func (c *Core) Extents() []Range { return c.extents }

// ReadRanges implements Memory.
func (c *Core) ReadRanges(dst []byte, ranges []Range) error {
	for _, r := range ranges {
		i := inRAM(c.extents, r)
		if i < 0 {
			return errNotRAM(r)
		}
		if r.Len > uint64(len(dst)) {
			return fmt.Errorf("read core file: ranges are longer than the buffer")
		}
		if _, err := c.file.ReadAt(dst[:r.Len],
			c.offsets[i]+int64(r.Addr-c.extents[i].Addr)); err != nil && err != io.EOF {
			return fmt.Errorf("read core file: %w", err)
		}
		dst = dst[r.Len:]
	}
	if len(dst) != 0 {
		return fmt.Errorf("read core file: the buffer is %d bytes longer than the ranges", len(dst))
	}
	return nil
}

// Populated implements Memory: a core file does not tell, so every page may be.
func (c *Core) Populated(addr, n uint64, dst []uint64) error {
	if r := (Range{addr, n * units.PageSize}); n > 1<<40 || inRAM(c.extents, r) < 0 ||
		n > uint64(len(dst))*64 {
		return errNotRAM(r)
	}
	clear(dst)
	for i := range n {
		dst[i/64] |= 1 << (i % 64)
	}
	return nil
}

// CPUs implements Memory.
func (c *Core) CPUs(context.Context) ([]CPU, error) { return c.cpus, nil }
