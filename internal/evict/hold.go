package evict

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"vacate/internal/link"
)

// This file handles a host that has no memory for a page once the VM runs there. Nothing is lost
// then: the source has the page, and the guest waits. So the engine keeps the page, and places it
// as soon as there is memory. Meanwhile it goes on reading the lanes: a session whose frames nobody
// reads would seem dead. It does not report pushed pages as placed, so the source's window lets
// only one round trip's worth of pages come.

// errNoMemory is wrapped by the reasons for which this host cannot take a page now, but may later.
var errNoMemory = errors.New("no memory for a page")

const (
	// retryMemory is how often pages that found no memory are tried again.
	retryMemory = 100 * time.Millisecond
	// maxHeld bounds the pages that are kept, in bytes. Beyond it the engine stops reading the
	// lanes.
	maxHeld = 64 << 20
	// heldRun and heldParcel are the most memory that a run and a parcel take beside their data,
	// which may be empty.
	heldRun, heldParcel = 64, 512
)

// parcel is pages that came and are not placed yet.
type parcel struct {
	runs   []pageRun
	data   []byte // of those that are not zero
	urgent bool
	all    bool // none of the frame's pages was here before
	// the session in which they came; nil for zeroes in place of pages that were left out
	a     *attachment
	push  *tally // gets a report when they are placed; may be nil
	bytes int    // of the frame
}

// tally counts what was placed of a push lane. The lane's reader uses it. While pages of the lane
// are held, the task that places those does.
type tally struct {
	lane   *link.Conn
	placed uint64 // bytes of frames
	report []byte
}

// tell counts and reports a placed frame.
func (p *tally) tell(bytes int, held bool) error {
	if p == nil {
		return nil
	}
	p.placed += uint64(bytes)
	p.report = appendPlaced(p.report[:0], p.placed, held)
	return p.lane.Write(framePlaced, p.report)
}

// heldPages are pages that came and found no memory yet, in the order in which they came. Lanes add
// to them, and one task tries to place them, as long as there are any. So whether that task runs
// changes only together with the pages. Its lock is also held while the engine replaces the placer,
// since the task uses that.
type heldPages struct {
	sync.Mutex
	parcels  []parcel
	retrying bool // the task runs
}

// behind adds pushed pages if other pages of their session are held, which go first. It reports
// whether it did.
func (h *heldPages) behind(f parcel) bool {
	h.Lock()
	defer h.Unlock()
	if !slices.ContainsFunc(h.parcels, func(other parcel) bool { return other.push == f.push }) {
		return false
	}
	h.parcels = append(h.parcels, f)
	return true
}

// park adds pages. It reports whether the caller must start the task.
func (h *heldPages) park(f parcel) (start bool) {
	h.Lock()
	defer h.Unlock()
	h.parcels = append(h.parcels, f)
	start = !h.retrying
	h.retrying = true
	return start
}

// done reports whether the task may end, as no pages are held.
func (h *heldPages) done() bool {
	h.Lock()
	defer h.Unlock()
	h.retrying = len(h.parcels) > 0
	return !h.retrying
}

// bytes returns about how much memory the pages take.
func (h *heldPages) bytes() (sum int) {
	h.Lock()
	defer h.Unlock()
	for _, f := range h.parcels {
		sum += len(f.data) + len(f.runs)*heldRun + heldParcel
	}
	return sum
}

// settle places pages, or holds them until there is memory. It reports whether they are held: then
// the caller must not reuse their data.
func (e *destination) settle(f parcel) (held bool, err error) {
	if f.push != nil && e.supply.held.behind(f) {
		return true, nil
	}
	rest, why := e.put(f)
	if rest == nil {
		return false, why
	}
	if e.supply.held.park(*rest) {
		e.tasks.Go(func() { e.retry(why) })
	}
	return true, nil
}

// put places pages and reports them. It returns those that found no memory, if there may be some
// later, and the reason.
func (e *destination) put(f parcel) (rest *parcel, err error) {
	if len(f.runs) == 0 {
		return nil, f.push.tell(f.bytes, false)
	}
	held, done, err := e.placer.place(f.runs, f.data, f.urgent)
	if errors.Is(err, errNoMemory) && e.mayHold() {
		e.pages.placed(done)
		f.runs, f.data = without(e.incoming.layout, f.runs, f.data, done)
		return &f, err
	} else if err != nil {
		return nil, err
	}
	e.pages.placed(f.runs)
	return nil, f.push.tell(f.bytes, held && f.all)
}

// without removes the pages of done from the front of runs, and their data.
func without(l layout, runs []pageRun, data []byte, done []pageRun) ([]pageRun, []byte) {
	for _, d := range done {
		if !d.Zero {
			data = data[uint64(d.Count)*l[d.Block].PageSize:]
		}
		if runs[0].Count == d.Count {
			runs = runs[1:]
			continue
		}
		first := runs[0]
		first.First, first.Count = d.End(), first.Count-d.Count
		runs = append([]pageRun{first}, runs[1:]...)
	}
	return runs, data
}

// mayHold reports whether the VM may run here. Before that, an eviction that finds no memory is
// aborted.
func (e *destination) mayHold() bool {
	switch e.machine.current() {
	case Running, CutOff, Completing:
		return true
	}
	return false
}

// mayRead waits until few enough pages are held to read on, or the session ends.
func (h *heldPages) mayRead(a *attachment) {
	for a.Err() == nil && h.bytes() >= maxHeld {
		select {
		case <-time.After(retryMemory):
		case <-a.Done():
		}
	}
}

// retry places the held pages, until none are held. why is the reason for which the first page was
// not placed.
func (e *destination) retry(why error) {
	e.tellShort(e.shortage(why))
	for {
		select {
		case <-time.After(retryMemory):
		case <-e.ended:
			return
		}
		e.supply.held.Lock()
		e.supply.held.parcels = e.placeHeld(e.supply.held.parcels)
		none := len(e.supply.held.parcels) == 0
		e.supply.held.Unlock()
		if !none || e.at.Load() == nil && e.tight() != "" {
			// pages of a session that ended are no longer held
			continue
		}
		e.tellShort("")
		if e.supply.held.done() {
			return
		}
		e.tellShort(e.shortage(why))
	}
}

// shortage says why a page found no memory here, and what to do.
func (e *destination) shortage(err error) string {
	if why := e.tight(); why != "" {
		return why
	}
	return err.Error()
}

// awaitRoom waits for a while if this host has no memory for any page. QEMU's own loader would only
// fail again.
func (e *destination) awaitRoom() {
	if e.placer.direct.Load() != nil {
		return
	}
	until := time.Now().Add(tightTime)
	for why := e.tight(); why != "" && time.Now().Before(until); why = e.tight() {
		if !e.recovery.starved {
			e.recovery.starved = true
			e.tellShort(why)
		}
		select {
		case <-time.After(mendPause / 2):
		case <-e.life.Done():
			return
		}
	}
}

// tightTime is how long QEMU waits for a new stream while memory seems to be missing.
const tightTime = 10 * time.Second

// placeHeld places the pages for which there is memory, and returns the rest. The caller holds the
// lock of the held pages.
func (e *destination) placeHeld(held []parcel) (left []parcel) {
	stuck := map[*tally]bool{nil: false}
	for _, f := range held {
		if stuck[f.push] {
			left = append(left, f)
			continue
		}
		rest, err := e.put(f)
		switch {
		case rest != nil:
			left = append(left, *rest)
			stuck[f.push] = f.push != nil
		case err != nil:
			e.failed(f.a, err)
		}
	}
	return left
}

// failed ends what could not take the pages: QEMU's stream, or the session.
func (e *destination) failed(a *attachment, err error) {
	if s := e.recovery.stream(); s != nil && errors.Is(err, errQEMU) {
		s.fail(err)
	}
	if a != nil {
		a.FailSoon(err)
	}
}

// forget drops held pages of a session that has ended: the source will send them again. With nil it
// drops all held pages, before the engine finds out which pages are here.
func (e *destination) forget(a *attachment) {
	e.supply.held.Lock()
	defer e.supply.held.Unlock()
	var left []parcel
	for _, f := range e.supply.held.parcels {
		if a != nil && f.a != a {
			left = append(left, f)
			continue
		}
		// without a session: pages that were left out, for which the guest asked
		e.pages.disclaim(f.runs, f.a == nil)
	}
	e.supply.held.parcels = left
}

// tellShort tells the user and the source that pages find no memory here, and why; "" if they do
// again.
func (e *destination) tellShort(why string) {
	if why != "" {
		e.Log.Warn("this host has no memory for pages of the VM, which waits for them; it goes "+
			"on by itself when there is memory", "reason", why)
	} else {
		e.Log.Info("this host has memory again for the VM's pages")
	}
	e.supply.short.set(why)
	e.show("")
	e.passOn()
}

// passOn tells the source, if it is connected, whether pages find memory here.
func (e *destination) passOn() {
	e.supply.telling.Lock()
	defer e.supply.telling.Unlock()
	a := e.at.Load()
	if a == nil || !e.vm.told.Load() {
		return // it hears it when it connects
	}
	why := e.supply.short.get()
	if err := writeJSON(a.control.Conn, msgShort,
		farewell{Reason: why[:min(len(why), maxReason)]}); err != nil {
		a.FailSoon(err)
	}
}

// maxReason bounds the reason for which pages find no memory, as sent to the source, in bytes.
const maxReason = 1000

// shortText is what users read about an eviction whose pages find no memory at the destination.
func shortText(where, why string) string {
	if why == "" {
		return ""
	}
	return fmt.Sprintf("%s has no memory for the VM's pages: %s. The VM waits there. Free "+
		"memory or raise that limit; it goes on by itself", where, why)
}
