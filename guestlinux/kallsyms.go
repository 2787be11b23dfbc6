package guestlinux

import (
	"errors"
	"fmt"
)

// kallsyms is the kernel's own table of symbols (scripts/kallsyms.c, kernel/kallsyms.c).
//
// Names lie one after another, in order of their addresses: a length, 7 bits of it in the
// first byte and, if that has bit 7 set, higher bits in a second; then as many bytes, each
// the number of a token. token_index has 256 u16, the places in token_table of
// the tokens, which end in NUL. The first character of an expanded name is its type, as nm
// has it. Addresses are an array of u32, one a symbol, coded in one of three ways.
//
// Only hashes of the names are kept, as there are 200,000 of them, and no pointers, as the garbage
// collector would follow them.
type kallsyms struct {
	number map[uint64]uint32 // of the symbol, by the hash of its name; ambiguous if several have it
}

const ambiguous = 1<<32 - 1

// symbolNumber returns the place of the one symbol with this name.
func (k *kallsyms) symbolNumber(name string) (uint32, bool) {
	i, ok := k.number[hashName([]byte(name))]
	return i, ok && i != ambiguous
}

// hashName is FNV-1a of 64 bits.
func hashName(name []byte) uint64 {
	h := uint64(0xcbf29ce484222325)
	for _, b := range name {
		h = (h ^ uint64(b)) * 0x100000001b3
	}
	return h
}

// offsetCoding is how the array of addresses is coded.
type offsetCoding int

const (
	// Up to 6.14: not negative, the value itself (per-CPU symbols); negative, base-1-offset.
	absolutePerCPU offsetCoding = iota
	// From 6.15: base + offset.
	relative
	// 7.x: distance from the array's element itself; there is no base.
	placeRelative
	offsetCodings
)

func (c offsetCoding) address(base, array uint64, i, offset uint32) uint64 {
	switch {
	case c == relative:
		return base + uint64(offset)
	case c == placeRelative:
		return array + uint64(i)*4 + uint64(int64(int32(offset)))
	case c == absolutePerCPU && int32(offset) >= 0:
		return uint64(offset)
	}
	return base - 1 - uint64(int64(int32(offset)))
}

// Limits, several times those of kernels with everything built in.
const (
	maxSymbols    = 1 << 20
	maxSymbolName = 1024
	maxNames      = 32 << 20 // bytes of all coded names
	tokenTable    = 256 * 32 // bytes of which tokens are taken; real tables are below 2 KiB
)

// decodeNames expands count names; read returns the coded names from offset at on, at
// least one byte, as many as it likes.
func decodeNames(count uint32, index *[512]byte, tokens []byte, read func(at int) ([]byte, error)) (*kallsyms, error) {
	if count == 0 || count > maxSymbols {
		return nil, fmt.Errorf("%d symbols: want 1 to %d", count, maxSymbols)
	}
	var token [256][]byte
	for i := range token {
		at := int(u16(index[2*i:]))
		for end := at; end < len(tokens); end++ {
			if tokens[end] == 0 {
				token[i] = tokens[at:end]
				break
			}
		}
		if len(token[i]) > maxSymbolName {
			return nil, errors.New("a token is too long")
		}
	}
	k := &kallsyms{number: make(map[uint64]uint32, min(count, 1<<16))}
	var (
		part []byte // of the coded names
		at   int    // how many bytes were taken
		name [maxSymbolName]byte
	)
	next := func() (byte, error) {
		if len(part) == 0 {
			if at >= maxNames {
				return 0, fmt.Errorf("names of more than %d bytes", maxNames)
			}
			var err error
			if part, err = read(at); err != nil {
				return 0, err
			}
			if len(part) == 0 {
				return 0, errors.New("the names are cut short")
			}
		}
		b := part[0]
		part, at = part[1:], at+1
		return b, nil
	}
	for i := range count {
		b, err := next()
		if err != nil {
			return nil, err
		}
		length := int(b)
		if b&0x80 != 0 {
			if b, err = next(); err != nil {
				return nil, err
			}
			length = length&0x7f | int(b)<<7
		}
		n := 0
		for range length {
			if b, err = next(); err != nil {
				return nil, err
			}
			if n+len(token[b]) > len(name) {
				return nil, fmt.Errorf("symbol %d has a name of more than %d bytes", i, maxSymbolName)
			}
			n += copy(name[n:], token[b])
		}
		if n < 2 {
			continue // no kernel has these, but they do no harm
		}
		h := hashName(name[1:n])
		if _, ok := k.number[h]; ok {
			i = ambiguous
		}
		k.number[h] = i
	}
	return k, nil
}
