package main

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	lp "vacate/lab/loadproto"
)

// reportedBad bounds the bad words that are reported in full, over all sets.
const reportedBad = 20

// badSink counts bad pages and reports the first of them.
type badSink struct {
	pages atomic.Uint64
	words chan lp.BadWord // taken by the reporter; full means enough was said
}

// look counts page n of a set if it is not as base says. It is called for
// pages already known to be bad, or in full checks.
func (b *badSink) look(set string, n int, p *lp.Page, base uint64) bool {
	i, want, got := p.FirstBad(base)
	if i < 0 {
		return false
	}
	if b.pages.Add(1) <= reportedBad {
		b.words <- lp.BadWord{Set: set, Page: uint64(n), Word: uint64(i), Want: want, Got: got}
	}
	return true
}

// mapPages returns n zero pages outside the Go heap.
func mapPages(n int) ([]lp.Page, error) {
	if n == 0 {
		return nil, nil
	}
	mem, err := unix.Mmap(-1, 0, n*lp.PageSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("map %d pages: %w; give the guest more memory", n, err)
	}
	return unsafe.Slice((*lp.Page)(unsafe.Pointer(unsafe.SliceData(mem))), n), nil
}

// A set is some of the load's memory. It is made empty, and grows to its size.
type set interface {
	size() int        // in pages, when it is whole
	grow(n int) error // by so many pages
	check(*badSink) (lp.SetResult, error)
}

// still is memory that is written once.
type still struct {
	set   string
	seed  uint64
	first int // number of its first page in the whole set
	pages []lp.Page
	grown int
}

func newStill(set string, seed uint64, first, n int) (*still, error) {
	s := &still{set: set, seed: lp.SetSeed(seed, set), first: first}
	var err error
	if s.pages, err = mapPages(n); err != nil {
		return nil, fmt.Errorf("%s set: %w", set, err)
	}
	return s, nil
}

func (s *still) base(i int) uint64 { return lp.Base(s.seed, uint64(s.first+i), 0) }

func (s *still) size() int { return len(s.pages) }

func (s *still) grow(n int) error {
	for range n {
		s.pages[s.grown].Fill(s.base(s.grown))
		s.grown++
	}
	return nil
}

func (s *still) check(bad *badSink) (lp.SetResult, error) {
	r := lp.SetResult{Set: s.set, Pages: uint64(len(s.pages))}
	for i := range s.pages {
		if bad.look(s.set, s.first+i, &s.pages[i], s.base(i)) {
			r.Bad++
		}
	}
	return r, nil
}

// onFile is the page cache of a file or disk.
type onFile struct {
	set   string
	seed  uint64
	f     *os.File
	n     int
	grown int
}

// newDisk is to read n pages of the lab's disk into the page cache.
func newDisk(seed uint64, n int) (*onFile, error) {
	f, err := os.Open("/dev/vda")
	if err != nil {
		return nil, fmt.Errorf("cache set: %w; it needs a machine with a disk", err)
	}
	return &onFile{set: lp.SetCache, seed: lp.SetSeed(seed, lp.SetCache), f: f, n: n}, nil
}

func newFile(seed uint64, n int) (*onFile, error) {
	f, err := os.OpenFile("/pages", os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("file set: %w", err)
	}
	return &onFile{set: lp.SetFile, seed: lp.SetSeed(seed, lp.SetFile), f: f, n: n}, nil
}

func (d *onFile) size() int { return d.n }

func (d *onFile) grow(n int) error {
	var p lp.Page
	for range n {
		base, at := lp.Base(d.seed, uint64(d.grown), 0), int64(d.grown)*lp.PageSize
		var err error
		if d.set == lp.SetFile {
			p.Fill(base)
			_, err = d.f.WriteAt(bytesOf(&p), at)
		} else if _, err = d.f.ReadAt(bytesOf(&p), at); err == nil && !p.Good(base) {
			err = fmt.Errorf("page %d of the disk does not hold the lab's pattern", d.grown)
		}
		if err != nil {
			return fmt.Errorf("%s set: %w", d.set, err)
		}
		d.grown++
	}
	return nil
}

func bytesOf(p *lp.Page) []byte { return (*[lp.PageSize]byte)(unsafe.Pointer(p))[:] }

func (d *onFile) check(bad *badSink) (lp.SetResult, error) {
	r := lp.SetResult{Set: d.set, Pages: uint64(d.n)}
	var p lp.Page
	for i := range d.n {
		if _, err := d.f.ReadAt(bytesOf(&p), int64(i)*lp.PageSize); err != nil {
			return r, fmt.Errorf("%s set: %w", d.set, err)
		}
		if bad.look(d.set, i, &p, lp.Base(d.seed, uint64(i), 0)) {
			r.Bad++
		}
	}
	return r, nil
}
