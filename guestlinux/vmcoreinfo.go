package guestlinux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"
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
	if v.release == "" || len(v.release) > 64 || strings.ContainsFunc(v.release, func(r rune) bool { return r <= ' ' || r > '~' }) {
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

// findNotes calls try with every VMCOREINFO in memory and its address until try wants no more.
func findNotes(ctx context.Context, mem Memory, try func(addr uint64, text []byte) (done bool)) error {
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
		for at := e.Addr; at < e.Addr+e.Len; at += perBatch * pageSize {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(perBatch, (e.Addr+e.Len-at)/pageSize)
			if err := mem.Populated(at, n, bitmap[:]); err != nil {
				return err
			}
			list := ranges[:0]
			for i, word := range bitmap[:(n+63)/64] {
				for ; word != 0; word &= word - 1 {
					list = append(list, Range{at + uint64(i*64+bits.TrailingZeros64(word))*pageSize, noteHeader})
				}
			}
			if err := mem.ReadRanges(heads[:len(list)*noteHeader], list); err != nil {
				return err
			}
			for i, r := range list {
				head := heads[i*noteHeader:][:noteHeader]
				size := u32(head[4:])
				if u32(head) != uint32(len(noteName)) || !bytes.Equal(head[12:12+len(noteName)], noteName) || size == 0 || size > maxNote {
					continue
				}
				if found++; found > maxFound {
					return fmt.Errorf("more than %d notes", maxFound)
				}
				text := make([]byte, size)
				if readPhys(mem, text, r.Addr+noteHeader) != nil {
					continue
				}
				if try(r.Addr, text) {
					return nil
				}
			}
		}
	}
	return nil
}
