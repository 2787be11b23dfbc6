package churnproto

// PageSize is that of x86-64, in bytes.
const PageSize = 4096

// Words are a page's content.
type Words [PageSize / 8]uint64

const step = 0x9e3779b97f4a7c15 // 2^64 over the golden ratio: neighbours have little in common

// Mix makes seeds out of numbers; it never returns 0 for others than 0.
func Mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Fill writes the content that belongs to a seed.
//
//go:nosplit
func (w *Words) Fill(seed uint64) {
	for i := range w {
		seed += step
		w[i] = seed
	}
}

// Check returns the index of the first word that Fill would not have written, and what
// belongs there; -1 if all is well. The seed 0 stands for a page of zeroes.
//
//go:nosplit
func (w *Words) Check(seed uint64) (at int, want uint64) {
	inc := uint64(step)
	if seed == 0 {
		inc = 0
	}
	for i := range w {
		seed += inc
		if w[i] != seed {
			return i, seed
		}
	}
	return -1, 0
}
