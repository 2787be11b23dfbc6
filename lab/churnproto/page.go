package churnproto

// PageSize is that of x86-64, in bytes.
const PageSize = 4096

// Words are a page's content.
type Words [PageSize / 8]uint64

// Step is the difference between one word and the next in what a worker writes, so that
// two words tell whose they are, wherever the kernel has put them. For kernels that put
// them at odd places StepOwner is the inverse.
func Step(worker int) uint64 { return stepBase + uint64(worker)<<1 }

const stepBase = 0x9e3779b97f4a7c15

// StepOwner returns the worker whose Step it is.
func StepOwner(step uint64) (worker int, ok bool) {
	d := step - stepBase
	return int(d >> 1), d&1 == 0 && d>>1 < maxWorkers
}

const maxWorkers = 64

// Fill writes the content that belongs to a seed.
//
//go:nosplit
func (w *Words) Fill(seed, step uint64) {
	for i := range w {
		seed += step
		w[i] = seed
	}
}

// Check returns the index of the first word that Fill would not have written, and what
// belongs there; -1 if all is well. The seed 0 stands for a page of zeroes.
//
//go:nosplit
func (w *Words) Check(seed, step uint64) (at int, want uint64) {
	if seed == 0 {
		step = 0
	}
	for i := range w {
		seed += step
		if w[i] != seed {
			return i, seed
		}
	}
	return -1, 0
}
