package main

import "math/bits"

// A picker picks pages at random, each as likely as any other or by Zipf's law.
// It is all integers, and needs no memory: software emulation is slow at
// floating point, and a table would be one more hot set.
//
// By Zipf's law the page of rank r, from 1, is picked about 1/r times as often as the first. The
// ranks 1, 2-3, 4-7, 8-15... have the same share each, and within one all ranks are alike. Ranks
// are scattered over the pages.
type picker struct {
	x    uint64 // state of the generator; not 0
	n    uint64 // pages
	zipf bool
	bits int    // of the greatest rank
	mask uint64 // the least of ones only that has all pages' numbers
	mix  uint64
}

func newPicker(seed uint64, n int, zipf bool) picker {
	return picker{x: seed*2 + 1, n: uint64(n), zipf: zipf, bits: bits.Len(uint(n)),
		mask: 1<<bits.Len(uint(max(n, 2)-1)) - 1, mix: seed}
}

// random returns 32 random bits.
func (p *picker) random() uint64 {
	p.x ^= p.x << 13
	p.x ^= p.x >> 7
	p.x ^= p.x << 17
	return p.x >> 32
}

func (p *picker) next() int {
	if !p.zipf {
		return int(p.random() * p.n >> 32)
	}
	for {
		share := p.random() * uint64(p.bits) >> 32
		if rank := 1<<share + p.random()&(1<<share-1); rank <= p.n {
			return p.page(rank - 1)
		}
	}
}

// page is a permutation of the numbers below n. Each step is one of those of
// some bits only; a number that n does not have is stepped on from.
func (p *picker) page(rank uint64) int {
	half := max(1, p.bits/2)
	for x := rank; ; {
		for round := range uint64(3) {
			x = (x ^ p.mix>>(8*round)) & p.mask
			x = x * 0x9e3779b97f4a7c15 & p.mask
			x ^= x >> half
		}
		if x < p.n {
			return int(x)
		}
	}
}
