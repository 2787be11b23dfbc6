package linux

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
// Only those that are looked for are kept, as there are 200,000 of them.
type kallsyms struct {
	// of the symbol, by the hash of its name; absent or ambiguous if none or several have it
	number map[uint64]uint32
}

const (
	ambiguous = 1<<32 - 1
	absent    = ambiguous - 1
)

// wanted are the symbols that are looked for.
var wanted = []string{
	"__brk_limit", "__cpu_possible_mask", "__per_cpu_offset", "__start_BTF", "__stop_BTF", "_etext",
	"_stext", "_text", "cpu_tlbstate",
	"current_task", "empty_zero_page", "entry_SYSCALL_64", "hrtimer_bases", "huge_zero_pfn",
	"init_task", "init_top_pgt", "lru_gen_caps",
	"mem_section", "node_data", "nr_cpu_ids", "pcpu_base_addr", "pcpu_hot", "pcpu_unit_size",
	"runqueues", "swapper_pg_dir",
	"tick_cpu_sched", "timer_bases", "_page_poisoning_enabled", "_page_poisoning_enabled_early",
	"want_page_poisoning",
	"want_page_poisoning_early",
}

// symbolNumber returns the place of the one symbol with this name, which must be among those that
// are looked for.
func (k *kallsyms) symbolNumber(name string) (uint32, bool) {
	i, ok := k.number[hashName(name)]
	if !ok {
		panic("a symbol is looked for that is none of those wanted: " + name)
	}
	return i, i < absent
}

// hashName is FNV-1a of 64 bits.
func hashName(name string) uint64 {
	h := uint64(hashBasis)
	for _, b := range []byte(name) {
		h = (h ^ uint64(b)) * hashPrime
	}
	return h
}

const hashBasis, hashPrime = 0xcbf29ce484222325, 0x100000001b3

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
	tokenTable    = 256 * 32 // bytes that tokens are read from; real tables are below 2 KiB
)

// decodeNames looks for names among the count that are coded; read returns what is coded from
// offset at on, at least one byte, as many as it likes, which it may change when it is called
// again.
func decodeNames(names []string, count uint32, index *[512]byte, tokens []byte,
	read func(at int) ([]byte, error)) (*kallsyms, error) {
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
	k := &kallsyms{number: make(map[uint64]uint32, len(names))}
	var likely [1 << 12]bool // by the lowest bits of a hash
	for _, name := range names {
		h := hashName(name)
		k.number[h], likely[h%uint64(len(likely))] = absent, true
	}
	var (
		part []byte // of what is coded
		at   int    // how many bytes were taken
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
		h, n := uint64(hashBasis), 0
		for range length {
			if len(part) > 0 {
				b, part, at = part[0], part[1:], at+1
			} else if b, err = next(); err != nil {
				return nil, err
			}
			expanded := token[b]
			if n == 0 && len(expanded) > 0 {
				expanded, n = expanded[1:], 1 // the type
			}
			if n += len(expanded); n > maxSymbolName {
				return nil, fmt.Errorf("symbol %d has a name of more than %d bytes", i,
					maxSymbolName)
			}
			for _, c := range expanded {
				h = (h ^ uint64(c)) * hashPrime
			}
		}
		if !likely[h%uint64(len(likely))] {
			continue
		}
		switch was, ok := k.number[h]; {
		case ok && was == absent:
			k.number[h] = i
		case ok:
			k.number[h] = ambiguous
		}
	}
	return k, nil
}
