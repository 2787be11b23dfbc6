package linux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"vacate/internal/sys/units"
)

// noteMagic begins the note that Linux keeps of itself for crash dumps, at the start of
// a page (kernel/crash_core.c, kernel/vmcore_info.c): u32 length of the name, u32 length of
// the text, u32 type 0, the name, padded to 12 bytes, and then the text.
var noteName = []byte("VMCOREINFO\x00")

const (
	noteHeader = 24
	maxNote    = 8192 // bytes of text; Linux has up to 4096
	maxFound   = 64   // notes in one guest, all but one of them stale
)

// vmcoreinfo is what the note says. Addresses are as the kernel runs, KASLR included.
type vmcoreinfo struct {
	release string
	buildID string
	values  map[string]string // SYMBOL(x), SIZE(x), OFFSET(x.y), LENGTH(x), NUMBER(x), and others
}

// parseVMCOREINFO reads the note's text: lines KEY=VALUE. Lines without a "=" are
// skipped, of two with the same key the last counts, as Linux appends.
func parseVMCOREINFO(text []byte) (*vmcoreinfo, error) {
	if len(text) > maxNote {
		return nil, fmt.Errorf("a text of %d bytes: want at most %d", len(text), maxNote)
	}
	v := &vmcoreinfo{values: map[string]string{}}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
			v.values[key] = value
		}
	}
	v.release, v.buildID = v.values["OSRELEASE"], v.values["BUILD-ID"]
	if v.release == "" || len(v.release) > 64 ||
		strings.ContainsFunc(v.release, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return nil, errors.New("no release of a kernel in it")
	}
	if v.values["PAGESIZE"] != "4096" {
		return nil, fmt.Errorf("pages of %.20q bytes: only 4096 is supported", v.values["PAGESIZE"])
	}
	return v, nil
}

func (v *vmcoreinfo) symbol(name string) (uint64, bool) {
	n, err := strconv.ParseUint(v.values["SYMBOL("+name+")"], 16, 64)
	return n, err == nil
}

// number returns a decimal value such as NUMBER(PG_lru), which may be negative, by its
// whole key.
func (v *vmcoreinfo) number(key string) (int64, bool) {
	s := v.values[key]
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n, true
	}
	// Some are written as unsigned, or with 0x.
	n, err := strconv.ParseUint(s, 0, 64)
	return int64(n), err == nil
}

// findNotes calls try with VMCOREINFOs in memory and their addresses until try wants no more. First
// come those that the running kernel points to, which takes milliseconds. Then come all others, for
// which it looks at each populated page.
func findNotes(ctx context.Context, mem Memory, cpus []CPU, try func(addr uint64,
	text []byte) (done bool)) error {
	left := 2 // what two do not know, no other will
	for _, cpu := range cpus {
		if cpu.CR0&cr0Paging == 0 || left == 0 {
			continue
		}
		left--
		for _, root := range cpu.roots() {
			if pointedNotes(ctx, newSpace(mem, root, cpu.levels()), try) {
				return nil
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
	}
	return allNotes(ctx, mem, try)
}

// Where the kernel's image is, wherever in there KASLR has put it
// (Documentation/arch/x86/x86_64/mm.rst). The first is __START_KERNEL_map.
const imageFirst, imageEnd = 0xffffffff80000000, 0xffffffffc0000000

// maxData is how much of the kernel's data is looked at; Debian's have 6 to 12 MB.
const maxData = 64 << 20

// pointedNotes has the notes tried that the data of a kernel's image points to. It returns false,
// too, when ctx is done.
func pointedNotes(ctx context.Context, s *space, try func(addr uint64,
	text []byte) (done bool)) bool {
	buf := make([]byte, 256<<10)
	met := map[uint64]bool{}
	tries := 0
	list, size := []Range{}, uint64(0)
	look := func() bool {
		data := buf[:size]
		if size == 0 || s.mem.ReadRanges(data, list) != nil {
			data = nil
		}
		list, size = list[:0], 0
		for ; len(data) > 0; data = data[8:] {
			va := u64(data)
			// Page-aligned, and in the upper half but below the image, as all of memory is mapped
			// there.
			if va%units.PageSize != 0 || va < 1<<63 || va >= imageFirst || met[va] ||
				len(met) == 1<<16 {
				continue
			}
			if met[va] = true; ctx.Err() != nil {
				return false
			}
			addr, _, err := s.translate(va)
			if err != nil {
				continue
			}
			if text := readNote(s.mem, addr); text != nil {
				if tries++; try(addr, text) {
					return true
				} else if tries == maxFound {
					return false
				}
			}
		}
		return false
	}
	for va, sum := uint64(imageFirst), uint64(0); va < imageEnd && sum < maxData &&
		tries < maxFound && ctx.Err() == nil; {
		addr, left, writable := s.writable(va)
		// of a table that has nothing there, it leads to 2^64, which is 0
		left = min(left, imageEnd-va)
		if !writable {
			va += left
			continue
		}
		left = min(left, uint64(len(buf))-size)
		list, size = append(list, Range{addr, left}), size+left
		va, sum = va+left, sum+left
		if size == uint64(len(buf)) && look() {
			return true
		}
	}
	return look()
}

// readNote returns the text of the note at an address, nil if there is none.
func readNote(mem Memory, addr uint64) []byte {
	var head [noteHeader]byte
	if readPhys(mem, head[:], addr) != nil {
		return nil
	}
	if !isNote(head[:]) {
		return nil
	}
	text := make([]byte, u32(head[4:]))
	if readPhys(mem, text, addr+noteHeader) != nil {
		return nil
	}
	return text
}

// isNote reports whether a note begins with head.
func isNote(head []byte) bool {
	size := u32(head[4:])
	return u32(head) == uint32(len(noteName)) && bytes.Equal(head[12:12+len(noteName)], noteName) &&
		size > 0 && size <= maxNote
}

// allNotes has all notes tried that there are in memory.
func allNotes(ctx context.Context, mem Memory, try func(addr uint64,
	text []byte) (done bool)) error {
	// Only the populated pages are read: it is quicker, and reading others would make
	// the machine grow.
	const perBatch = 1 << 10
	var (
		ranges [perBatch]Range
		heads  [perBatch * noteHeader]byte
		bitmap [perBatch / 64]uint64
		found  int
	)
	for _, e := range mem.Extents() {
		for at := e.Addr; at < e.Addr+e.Len; at += perBatch * units.PageSize {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(perBatch, (e.Addr+e.Len-at)/units.PageSize)
			if err := mem.Populated(at, n, bitmap[:]); err != nil {
				return err
			}
			list := ranges[:0]
			for i, word := range bitmap[:(n+63)/64] {
				for ; word != 0; word &= word - 1 {
					list = append(list,
						Range{at + uint64(i*64+bits.TrailingZeros64(word))*units.PageSize,
							noteHeader})
				}
			}
			if err := mem.ReadRanges(heads[:len(list)*noteHeader], list); err != nil {
				return err
			}
			for i, r := range list {
				if !isNote(heads[i*noteHeader:][:noteHeader]) {
					continue
				}
				if found++; found > maxFound {
					return fmt.Errorf("more than %d notes", maxFound)
				}
				if text := readNote(mem, r.Addr); text != nil && try(r.Addr, text) {
					return nil
				}
			}
		}
	}
	return nil
}
