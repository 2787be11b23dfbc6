package loadproto

// PageSize is the size of a checked page in bytes.
const PageSize = 4096

// Page is a checked page. Word i of page n in generation g of a set is Base(seed, n, g) + i*step.
// So a page that is out of place, out of date, or part new and part old differs from a good one.
type Page [PageSize / 8]uint64

const step = 0x9e3779b97f4a7c15

// Base returns the first word of a page.
func Base(seed, page, generation uint64) uint64 {
	x := seed ^ page*0xd6e8feb86659fd93 ^ generation*0xca5a826395121157
	x ^= x >> 32
	x *= 0xd6e8feb86659fd93
	x ^= x >> 29
	x *= 0xff51afd7ed558ccd
	return x ^ x>>32
}

// SetSeed derives the seed of a set from the seed of the whole load.
func SetSeed(seed uint64, set string) uint64 {
	for i := range len(set) {
		seed = (seed ^ uint64(set[i])) * 0x100000001b3
	}
	return seed
}

// Fill writes the whole page.
func (p *Page) Fill(base uint64) {
	// Eight words a turn: software emulation has no branch prediction to hide
	// the end of a loop.
	for i := 0; i <= len(p)-8; i += 8 {
		w := (*[8]uint64)(p[i : i+8])
		w[0] = base
		w[1] = base + step
		w[2] = base + 2*step&(1<<64-1)
		w[3] = base + 3*step&(1<<64-1)
		w[4] = base + 4*step&(1<<64-1)
		w[5] = base + 5*step&(1<<64-1)
		w[6] = base + 6*step&(1<<64-1)
		w[7] = base + 7*step&(1<<64-1)
		base += 8 * step & (1<<64 - 1)
	}
}

// Good reports whether the whole page is as Fill left it.
func (p *Page) Good(base uint64) bool {
	var diff uint64
	for i := 0; i <= len(p)-8; i += 8 {
		w := (*[8]uint64)(p[i : i+8])
		diff |= w[0] ^ base
		diff |= w[1] ^ (base + step)
		diff |= w[2] ^ (base + 2*step&(1<<64-1))
		diff |= w[3] ^ (base + 3*step&(1<<64-1))
		diff |= w[4] ^ (base + 4*step&(1<<64-1))
		diff |= w[5] ^ (base + 5*step&(1<<64-1))
		diff |= w[6] ^ (base + 6*step&(1<<64-1))
		diff |= w[7] ^ (base + 7*step&(1<<64-1))
		base += 8 * step & (1<<64 - 1)
	}
	return diff == 0
}

// FirstBad returns the first word that is not as Fill left it, and what it
// should be; the index is -1 if the page is good.
func (p *Page) FirstBad(base uint64) (index int, want, got uint64) {
	for i, w := range p {
		if w != base {
			return i, base, w
		}
		base += step
	}
	return -1, 0, 0
}
