package evict

import (
	"context"
	"fmt"
	"math/bits"
	"time"

	"vacate/guestmem"
	"vacate/migstream"
	"vacate/pageclass"
	"vacate/pushorder"
	"vacate/qmp"
)

// Estimate is what an eviction of a VM would find, in pages of 4 KiB.
type Estimate struct {
	Total int // pages of guest memory
	InUse int // to be sent
	Hot   int // of these, what the guest works on; all that are in use, where the guest cannot be looked into
}

// estimateLimit bounds an estimate, as the VM's host is overloaded and its guest may be hostile.
const estimateLimit = 5 * time.Second

// LookAhead estimates what an eviction of the VM behind a QMP socket would find. The VM runs on meanwhile, so that it is not
// exact; it costs the host some 10 ms for each GiB. It may not be called while an eviction has the VM's monitor.
func LookAhead(ctx context.Context, path string) (Estimate, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, estimateLimit, fmt.Errorf("it took longer than %v", estimateLimit))
	defer cancel()
	q, err := qmp.Dial(ctx, path)
	if err != nil {
		return Estimate{}, err
	}
	defer q.Close()
	mem, err := guestmem.Attach(ctx, q)
	if err != nil {
		return Estimate{}, err
	}
	defer mem.Close()
	var e Estimate
	survey := surveyRunning(ctx, mem, q)
	for i, b := range mem.Blocks() {
		n := b.Size / migstream.TargetPageSize
		if !b.Located {
			continue
		}
		e.Total += int(n)
		if survey != nil {
			continue
		}
		there := make([]uint64, (n+63)/64)
		if err := mem.Populated(i, 0, n, there); err != nil {
			return e, err
		}
		for _, w := range there {
			e.InUse += bits.OnesCount64(w)
		}
	}
	if survey == nil {
		e.Hot = e.InUse
		return e, nil
	}
	for class, n := range survey.Counts() {
		if pageclass.Class(class) != pageclass.Free {
			e.InUse += n
		}
	}
	e.Hot = min(pushorder.Hot(survey), e.InUse)
	return e, nil
}

// surveyRunning looks at the pages of a guest that runs; it returns nil if that cannot be done.
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
