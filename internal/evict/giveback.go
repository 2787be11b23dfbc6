package evict

import (
	"cmp"
	"errors"
	"io/fs"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"vacate/internal/evict/pageset"
)

// ErrGivenBack is wrapped by the errors for a copy that is not whole.
var ErrGivenBack = errors.New("memory of the frozen VM was given back to this host, as the " +
	"destination had it: the copy here is not whole")

// Whole returns an error that wraps ErrGivenBack if the eviction has given memory of the frozen VM
// back. The copy at the source can then be neither resumed nor exported. It returns another error
// if the journal cannot be read.
func Whole(j Journal) error {
	_, err := j.Kept(keptGivenBack)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err == nil:
		return ErrGivenBack
	}
	return err
}

// giveEvery is how often memory is given back, so that neighbouring pages go at once.
const giveEvery = 100 * time.Millisecond

// ledger tracks which pages the destination has in the memory of its QEMU, by its reports on
// frames. A nil ledger tracks nothing.
type ledger struct {
	mu     sync.Mutex
	flying []sentFrame   // pushed and not reported, oldest first
	sent   uint64        // bytes of all frames of the session
	ready  []pageset.Run // ready to give back
}

type sentFrame struct {
	end  uint64 // value of sent behind it
	runs []pageset.Run
}

// begin begins a session. What was on its way in the last one may not have arrived.
func (l *ledger) begin() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flying, l.sent = nil, 0
}

// add notes that a frame of size bytes is about to be pushed.
func (l *ledger) add(size int, runs []pageRun) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent += uint64(size)
	f := sentFrame{l.sent, make([]pageset.Run, len(runs))}
	for i, r := range runs {
		f.runs[i] = r.Run
	}
	l.flying = append(l.flying, f)
}

// report notes that the destination has placed all frames up to placed bytes. held says that the
// pages of the last frame are in the QEMU's memory for good; else they may still be on their way
// there.
func (l *ledger) report(placed uint64, held bool) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for ; n < len(l.flying) && l.flying[n].end <= placed; n++ {
		if held && l.flying[n].end == placed {
			l.ready = append(l.ready, l.flying[n].runs...)
		}
	}
	l.flying = slices.Delete(l.flying, 0, n)
}

// take returns the pages to give back, by address.
func (l *ledger) take() []pageset.Run {
	l.mu.Lock()
	defer l.mu.Unlock()
	runs := l.ready
	l.ready = nil
	slices.SortFunc(runs, func(a, b pageset.Run) int {
		return cmp.Or(cmp.Compare(a.Block, b.Block), cmp.Compare(a.First, b.First))
	})
	return join(runs)
}

// giving is the memory that goes back to the source's host while the VM's other pages follow.
type giving struct {
	ledger *ledger     // nil if no memory is given back early
	begun  atomic.Bool // this engine or an earlier one gave some back: the copy here is not whole
}

// beginGiveBack gives memory back in a session, if that was asked for. The VM must run there.
func (e *source) beginGiveBack(a *attachment) {
	if e.giving.ledger != nil {
		a.begin(func() error { return e.giveBack(a) })
	}
}

// giveBack gives back memory that the destination has. It does so while a session lasts, and once
// the VM has run there for long enough.
func (e *source) giveBack(a *attachment) error {
	timer := time.NewTimer(time.Until(e.heard.ranSince.Add(e.GiveBack)))
	defer timer.Stop()
	for {
		select {
		case <-a.Done():
			return nil
		case <-timer.C:
		}
		if runs := e.giving.ledger.take(); len(runs) > 0 {
			if err := e.release(runs); err != nil {
				e.Log.Warn("no more of the frozen VM's memory is given back before the end",
					"error", err)
				return nil
			}
		}
		timer.Reset(giveEvery)
	}
}

// release gives pages back whose memory can be given back. Before that it makes durable that the
// copy here is not whole from now on.
func (e *source) release(runs []pageset.Run) error {
	runs = slices.DeleteFunc(runs,
		func(r pageset.Run) bool { return !e.image.frozen.releasable(r.Block) })
	if len(runs) == 0 {
		return nil
	}
	if !e.giving.begun.Load() {
		if err := e.Journal.Keep(keptGivenBack, nil); err != nil {
			return err
		}
		e.giving.begun.Store(true)
	}
	for _, r := range runs {
		if err := e.image.frozen.release(r); err != nil {
			return err
		}
		e.departures.given.Add(int64(r.Count))
	}
	return nil
}
