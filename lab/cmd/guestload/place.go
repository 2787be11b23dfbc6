package main

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"unsafe"

	"golang.org/x/sys/unix"

	lp "vacate/lab/loadproto"
)

// fill grows the sets to their sizes, one after the other.
func fill(sets []set) error {
	for _, s := range sets {
		if err := s.grow(s.size()); err != nil {
			return err
		}
	}
	return nil
}

// Turns of a set, and pieces of memory that are freed at once, in pages. A turn
// costs milliseconds where two processes have to wait for each other.
const (
	shortestTurn = 128 << 10 / lp.PageSize
	longestTurn  = 8 << 20 / lp.PageSize
	longestPiece = 2 << 20 / lp.PageSize
)

// scatter grows the sets to their sizes as on a machine that has run for long, where addresses tell
// nothing. Free memory is in pieces, which hold what was there before, and the sets take them in
// turns.
func scatter(sets []set, seed uint64) error {
	r := rand.New(rand.NewPCG(seed, 1))
	need := 0
	for _, s := range sets {
		need += s.size()
	}
	held, err := fragment(r, need)
	if err != nil {
		return err
	}
	if err := inTurns(sets, r); err != nil {
		return err
	}
	return unix.Close(held)
}

// inTurns grows the sets to their sizes, all at once.
func inTurns(sets []set, r *rand.Rand) error {
	missing := make([]int, len(sets))
	need := 0
	for i, s := range sets {
		missing[i] = s.size()
		need += missing[i]
	}
	for need > 0 {
		// A set that lacks more has more turns, so that all end together.
		i := 0
		for at := r.IntN(need); at >= missing[i]; i++ {
			at -= missing[i]
		}
		n := min(shortestTurn*length(r, longestTurn/shortestTurn), missing[i])
		if err := sets[i].grow(n); err != nil {
			return err
		}
		missing[i] -= n
		need -= n
	}
	return nil
}

// spoil has most free memory hold what was there before, as it does on a
// machine that has run for long.
func spoil() error {
	free, err := freePages()
	if err != nil {
		return err
	}
	used, err := use(free * 7 / 8)
	if err != nil {
		return err
	}
	return unix.Close(used)
}

func freePages() (int, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, err
	}
	return int(info.Freeram) * int(info.Unit) / lp.PageSize, nil
}

// use takes n pages and writes to them. They are those of a file in memory,
// which has single pages, never huge ones, and costs no page fault for each.
func use(n int) (fd int, err error) {
	fd, err = unix.MemfdCreate("used", unix.MFD_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("use free memory: %w", err)
	}
	chunk := make([]lp.Page, 256)
	for first := 0; first < n; first += len(chunk) {
		chunk = chunk[:min(len(chunk), n-first)]
		for i := range chunk {
			chunk[i].Fill(lp.Base(usedSeed, uint64(first+i), 0))
		}
		bytes := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(chunk))),
			len(chunk)*lp.PageSize)
		if _, err := unix.Write(fd, bytes); err != nil {
			return -1, fmt.Errorf("use %d free pages: %w", n, err)
		}
	}
	return fd, nil
}

// usedSeed is that of pages that are freed again: no set's.
const usedSeed = 0x75736564

// fragment takes nearly all free memory and gives it back in pieces, in no
// order, but for some that lie between them: those go when held is closed.
func fragment(r *rand.Rand, need int) (held int, err error) {
	free, err := freePages()
	if err != nil {
		return -1, err
	}
	if need > free {
		return -1, fmt.Errorf("the load needs %d pages, %d are free; give the guest more memory",
			need, free)
	}
	n := free * 7 / 8
	hold := min(n/8, (free-need)/2)
	if held, err = use(n); err != nil {
		return -1, err
	}
	type piece struct{ first, size int }
	var pieces []piece
	for first := 0; first < n; {
		p := piece{first, min(length(r, longestPiece), n-first)}
		first += p.size
		if r.IntN(n) >= hold {
			pieces = append(pieces, p)
		}
	}
	r.Shuffle(len(pieces), func(i, j int) { pieces[i], pieces[j] = pieces[j], pieces[i] })
	for _, p := range pieces {
		err := unix.Fallocate(held, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE,
			int64(p.first)*lp.PageSize, int64(p.size)*lp.PageSize)
		if err != nil {
			return -1, fmt.Errorf("give %d pages back: %w", p.size, err)
		}
	}
	return held, nil
}

// length returns a number from 1 to most, a power of two. Short ones are the
// likelier.
func length(r *rand.Rand, most int) int {
	return 1 + r.IntN(1<<r.IntN(bits.Len(uint(most))))
}
