package evict

import (
	"context"
	"fmt"
	"time"

	"vacate/internal/evict/pushorder"
	"vacate/internal/guest/pageclass"
	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/qmp"
)

// Estimate is what an eviction of a VM would find, in pages of 4 KiB.
type Estimate struct {
	Total int // pages of guest memory
	InUse int // pages to be sent with their content; pages of zeroes hardly count
	// those of InUse that the guest works on; all of InUse if the engine cannot look into the guest
	Hot int
	// Held is why QEMU would not let go of the VM, in words. Empty: it would.
	Held string
}

// estimateLimit bounds an estimate, as the VM's host is overloaded and its guest may be hostile.
const estimateLimit = 5 * time.Second

// LookAhead estimates what an eviction of the VM behind a monitor would find. The VM keeps
// running, so the result is not exact. It costs the host some 10 ms for each GiB. Callers must not
// use it while an eviction uses the VM's monitor.
func LookAhead(ctx context.Context, q *qmp.Client) (Estimate, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, estimateLimit,
		fmt.Errorf("it took longer than %v", estimateLimit))
	defer cancel()
	var e Estimate
	held, err := fit.Held(ctx, q)
	if err != nil {
		return e, err
	}
	if err := held.Err(); err != nil {
		e.Held = err.Error()
	}
	mem, err := guestmem.Attach(ctx, q)
	if err != nil {
		return e, err
	}
	defer mem.Close()
	for _, b := range mem.Blocks() {
		if b.Located {
			e.Total += int(b.Size / migstream.TargetPageSize)
		}
	}
	var hot, other sample
	if survey := surveyRunning(ctx, mem, q); survey != nil {
		isHot := pushorder.Hot(survey)
		for pfn, p := range survey.Pages {
			if p.Kind == pageclass.None || p.Class == pageclass.Free {
				continue
			}
			s := &other
			if isHot(p) {
				s = &hot
			}
			if !s.next() {
				continue
			}
			if block, offset, ok := mem.Resolve(uint64(pfn) * migstream.TargetPageSize); ok { // #nosec G115 -- an index
				s.kept = append(s.kept, place{block, offset})
			}
		}
	} else if err := samplePopulated(mem, &hot); err != nil {
		return e, err
	}
	if e.Hot, err = hot.used(mem); err != nil {
		return e, err
	}
	n, err := other.used(mem)
	e.InUse = e.Hot + n
	return e, err
}

// surveyRunning surveys the pages of a running guest. It returns nil if that fails.
func surveyRunning(ctx context.Context, mem *guestmem.Memory, q *qmp.Client) *pageclass.Survey {
	guest, err := attachGuest(ctx, mem, q)
	if err != nil {
		return nil
	}
	r, err := guest.Survey(ctx)
	if err != nil {
		return nil
	}
	return &r.Survey
}

// samplePopulated samples all pages that may hold anything.
func samplePopulated(mem *guestmem.Memory, s *sample) error {
	for i, b := range mem.Blocks() {
		if !b.Located {
			continue
		}
		n := b.Size / migstream.TargetPageSize
		there := make([]uint64, (n+63)/64)
		if err := mem.Populated(i, 0, n, there); err != nil {
			return err
		}
		for p := range n {
			if there[p/64]>>(p%64)&1 != 0 && s.next() {
				s.kept = append(s.kept, place{i, p * migstream.TargetPageSize})
			}
		}
	}
	return nil
}

// place is where a page is.
type place struct {
	block  int
	offset uint64
}

// sampleMost is how many pages of one kind are read. That gives an error of some 2 % in the share
// that holds only zeroes.
const sampleMost = 1024

// sample is some of many pages, at equal distances: every stride-th.
type sample struct {
	seen, stride int
	kept         []place
}

// next counts another page, and reports whether it belongs to the sample.
func (s *sample) next() bool {
	if s.stride == 0 {
		s.stride = 1
	}
	if s.seen%s.stride == 0 && len(s.kept) == sampleMost {
		for i := range sampleMost / 2 {
			s.kept[i] = s.kept[2*i]
		}
		s.kept = s.kept[:sampleMost/2]
		s.stride *= 2
	}
	s.seen++
	return (s.seen-1)%s.stride == 0
}

// used estimates how many of all pages hold anything but zeroes.
func (s *sample) used(mem *guestmem.Memory) (int, error) {
	n := 0
	var there [1]uint64
	page := make([]byte, migstream.TargetPageSize)
	for _, p := range s.kept {
		// Reading a page that is not there could make the host allocate it.
		if err := mem.Populated(p.block, p.offset/migstream.TargetPageSize, 1,
			there[:]); err != nil {
			return 0, err
		}
		if there[0]&1 == 0 {
			continue
		}
		if err := mem.Read(page, p.block, p.offset); err != nil {
			return 0, err
		}
		if !guestmem.IsZero(page) {
			n++
		}
	}
	if n == 0 {
		return 0, nil
	}
	return s.seen * n / len(s.kept), nil
}
