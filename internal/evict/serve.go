package evict

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"slices"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/link"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// lingerTime is how long a destination without a journal stays after the end, to answer a source
// that comes back.
const lingerTime = time.Minute

// serve receives the pages of a VM that runs here, and completes the migration. It takes as long as
// it must, through any number of sessions with the source and of streams to QEMU.
//
// left ends when the engine must leave.
func (e *destination) serve(left context.Context) error {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		if e.Carried != nil {
			if err := e.carriedOver(); err != nil {
				return e.lost(err, "")
			}
		}
		now := e.signals()
		select {
		case <-now.whole:
			if over, err := e.allHere(left); over || err != nil {
				return err
			}
		case <-now.broken:
			e.streamBroke()
		case m := <-e.recovery.mending:
			e.recovery.mending = nil
			if over, err := e.streamMended(left, m); over || err != nil {
				return err
			}
		case f := <-now.frames:
			if err := e.heardUnasked(f); err != nil {
				return err
			}
		case <-now.gone:
			e.detach(e.at.Load().Err())
		case r := <-now.rejoin:
			if err := e.attach(left, r); err != nil {
				return err
			}
		case err := <-e.vm.cont:
			e.vm.cont = nil
			if err := e.continued(left, err); err != nil {
				return err
			}
		case why := <-e.owner.over():
			e.recovery.still()
			return e.shutDown(left, why)
		case <-e.life.Done():
			return e.twinGone(left)
		case <-left.Done():
			return e.leave(left, "until it needs a page that is missing")
		case <-tick.C:
			e.noteRoom()
			e.show("")
		}
	}
}

// leave leaves an eviction whose VM runs here, as it says how.
func (e *destination) leave(left context.Context, how string) error {
	return &Error{ErrLeft, e.machine.current(), context.Cause(left),
		"The VM runs here " + how + ". Another engine can go on with the eviction"}
}

// signals are what serve waits for besides the QEMU and its own end. It does not wait for a nil
// one.
type signals struct {
	whole  <-chan struct{} // all pages are here, and there is a stream to say so
	broken <-chan struct{} // QEMU's stream broke
	frames <-chan controlFrame
	gone   <-chan struct{} // the session with the source ended
	rejoin <-chan *Request
}

// signals returns what serve waits for next. Without a stream to QEMU it first has one made.
func (e *destination) signals() (now signals) {
	now.rejoin = e.rejoin
	if s := e.recovery.stream(); s != nil {
		now.whole, now.broken = e.pages.done(), s.broken
	} else {
		e.mend()
		if e.placer.direct.Load() == nil || e.recovery.pending {
			now.rejoin = nil // pages would have nowhere to go
		}
	}
	if a := e.at.Load(); a != nil {
		now.gone, now.frames = a.Done(), a.control.frames
	}
	return now
}

// mend starts a task that makes a new stream to QEMU, unless one runs. Its result comes by
// recovery.mending.
func (e *destination) mend() {
	if e.recovery.mending != nil {
		return
	}
	result := make(chan mended, 1)
	e.recovery.mending = result
	e.tasks.Go(func() {
		e.awaitRoom()
		result <- e.recovery.mend(e.life, e.incoming.layout)
	})
}

// allHere completes the eviction, as every page is here. If QEMU's stream breaks over that, the
// eviction goes on with another one.
func (e *destination) allHere(left context.Context) (over bool, err error) {
	err = e.complete(left)
	if err == nil || errors.Is(err, ErrLeft) {
		return true, err
	}
	if e.life.Err() == nil && !errors.Is(err, errQEMU) {
		e.letGo(false)
		return true, e.lost(err,
			"The VM is whole here, but its QEMU does not end the migration: ask "+
				"it with `query-migrate`. The source still holds its memory")
	}
	e.dropStream(err)
	return false, nil
}

// streamBroke gives up a stream that broke. If it broke because the QEMU ends, the source should
// hear of that in this session.
func (e *destination) streamBroke() {
	select {
	case <-e.life.Done():
	case <-time.After(lastWords):
		e.dropStream(e.recovery.stream().why)
	}
}

// streamMended goes on with the result of mend: a new stream to QEMU, or why there is none.
func (e *destination) streamMended(left context.Context, m mended) (over bool, err error) {
	if m.err == nil && m.over == "" {
		m.err = e.useStream(m)
	}
	switch {
	case m.over != "":
		return true, e.shutDown(left, m.over)
	case errors.Is(m.err, errCompleted):
		return true, e.finish()
	case m.err != nil:
		e.Log.Warn("cannot resume QEMU's migration yet", "error", m.err)
		if m.silent {
			e.fillLeftOut()
		}
	}
	return false, nil
}

// heardUnasked goes on after a frame on the control lane: a source that sends one gives up, has
// failed, or breaks the protocol.
func (e *destination) heardUnasked(f controlFrame) error {
	err := f.check()
	switch {
	case errors.Is(err, errFarewell) && destinationOnAbort(e.mark) == stepAbandon:
		return e.abort(err)
	case errors.Is(err, errFarewell): // it runs the VM itself, by the operator's decision
		return e.lost(errors.Join(err, e.kill()),
			"The source runs the VM again. The one here was ended")
	case errors.Is(err, errFailed):
		e.recovery.still()
		e.letGo(false)
		return e.lost(err, e.leftovers())
	}
	e.at.Load().Fail(err)
	return nil
}

// noteRoom tells the source when QEMU's own loader, which had found no memory, may find some again.
func (e *destination) noteRoom() {
	if e.recovery.starved && e.recovery.stream() != nil && e.tight() == "" {
		e.recovery.starved = false
		e.tellShort("")
	}
}

// goneHere says what is left of a VM whose QEMU here ended.
const goneHere = "The VM that ran here is gone. The source holds its memory and devices as they " +
	"were when it was frozen there: do not end its QEMU"

// leftovers says what this host has of a VM that cannot become whole.
func (e *destination) leftovers() string {
	return fmt.Sprintf("The VM runs here until it touches one of the %d pages that are missing. "+
		"Save from it what you can, then end its QEMU: `kill -9 %d`", e.pages.left(), e.process.PID)
}

// detach ends the session with the source.
func (e *destination) detach(why error) {
	a := e.at.Swap(nil)
	if a == nil {
		return
	}
	a.Fail(why)
	a.end()
	e.forget(a)
	e.said.hungUp = errors.Is(why, io.EOF) || errors.Is(why, io.ErrUnexpectedEOF) ||
		errors.Is(why, unix.ECONNRESET) || errors.Is(why, unix.EPIPE)
	if e.machine.current() == Running {
		if err := e.machine.enter(CutOff); err != nil {
			e.Log.Error("state", "error", err)
		}
	}
	e.Log.Warn("the source is not connected; the VM runs until it needs a missing page or the "+
		"source is back", "error", why)
}

// dropStream gives up QEMU's stream. Pages on their way in it may be lost, so the source must
// reconnect and learn which are here.
func (e *destination) dropStream(why error) {
	e.detach(fmt.Errorf("the stream to QEMU broke: %w", why))
	s := e.recovery.stream()
	s.fail(why)
	s.reader.Wait()
	e.recovery.present.Store(nil)
}

// attach continues with a source that came back. It tells the source which pages are here, and
// requests those that the guest waits for. A failure of the session is no error.
func (e *destination) attach(left context.Context, r *Request) error {
	e.detach(errors.New("the source has made a new session"))
	if e.recovery.pending {
		if e.said.committed = r.resume.Committed; !e.said.committed {
			// only a source that goes on needs to hear it; the others may hear it, too
			e.tasks.Go(func() {
				r.Answer(AnswerPaused, "the VM was not told to run yet", false, nil)
			})
			return nil
		}
		if err := e.run(left); err != nil {
			e.at.Store(r.attachment)
			return err
		}
	}
	a := r.attachment
	if e.recovery.stream() == nil {
		// Some pages may have come without being placed. QEMU may be unable to answer until it gets
		// one of them, and without an answer it gets no new stream.
		e.forget(nil)
		if err := e.takeStock(nil); err != nil {
			e.Log.Warn("cannot find out which pages are here", "error", err)
			r.end()
			return nil
		}
	}
	if err := e.tellPresent(a); err != nil {
		a.Fail(err)
		a.end()
		return nil
	}
	e.Log.Info("the source is back", "source", a.Session.Peer())
	e.receiveLanes(a)
	e.at.Store(a)
	e.vm.told.Store(true)
	if e.supply.short.get() != "" {
		e.passOn()
	}
	if e.machine.current() == CutOff {
		if err := e.machine.enter(Running); err != nil {
			return e.lost(err, e.leftovers())
		}
	}
	for _, run := range e.pages.awaited() {
		if err := a.Lane(link.Fetch).Write(frameRequest, appendRequest(nil, run)); err != nil {
			a.FailSoon(err)
			break
		}
	}
	return nil
}

// tellPresent tells the source that the VM runs, and which pages are here or need not come.
func (e *destination) tellPresent(a *attachment) error {
	st := status{Answer: AnswerRunning}
	if !e.vm.ranSince.IsZero() {
		st.Ran = uint32(min(time.Since(e.vm.ranSince).Milliseconds(), math.MaxUint32))
	}
	if err := writeJSON(a.control.Conn, msgStatus, st); err != nil {
		return err
	}
	for i, b := range e.incoming.layout {
		for first := 0; first < b.Pages; first += maxPresent {
			frame := e.pages.appendPresent(nil, i, first, min(maxPresent, b.Pages-first))
			if err := a.control.Write(msgPresent, frame); err != nil {
				return err
			}
		}
	}
	return a.control.Write(msgReady)
}

// complete ends QEMU's migration, as all pages are there.
func (e *destination) complete(left context.Context) error {
	if st := e.machine.current(); st != Completing {
		if err := e.machine.enter(Completing); err != nil {
			return err
		}
	}
	s := e.recovery.stream()
	select {
	case <-s.ended: // by another engine
	default:
		if err := e.placer.end(); err != nil {
			return err
		}
	}
	select {
	case <-s.ended:
	case <-s.broken:
		return s.why
	case <-e.life.Done():
		return context.Cause(e.life)
	case <-left.Done(): // its process may be stopped
		return e.leave(left, "with all of its memory")
	}
	if s.status != 0 {
		return e.explain(fmt.Errorf("QEMU ended its migration with status %d", s.status))
	}
	return e.finish()
}

// finish tells the source that the VM is whole here.
func (e *destination) finish() error {
	if e.machine.current() != Completing {
		if err := e.machine.enter(Completing); err != nil {
			return err
		}
	}
	if err := note(e.Journal, MarkCompleted, ""); err != nil {
		e.Log.Warn("cannot record in the journal that the VM is whole here", "error", err)
	}
	e.letGo(true)
	received := e.summary()
	e.say(msgComplete, received)
	e.passOnHuge()
	// From now on the operator decides about the VM.
	e.awaitHeard(e.life.Done(),
		func(r *Request) bool { return r.Answer(AnswerComplete, "", false, &received) })
	return e.machine.enter(Completed)
}

// say tells the source, if it is connected, how the eviction ended here.
func (e *destination) say(kind uint8, message any) {
	if a := e.at.Load(); a != nil {
		if err := writeJSON(a.control.Conn, kind, message); err != nil {
			a.Fail(err)
		}
	}
}

// awaitHeard waits until the source has heard how the eviction ended, over is closed, or lingerTime
// has passed. Meanwhile it answers a source that comes back. Later ones get their answer from the
// journal.
func (e *destination) awaitHeard(over <-chan struct{}, answer func(*Request) (heard bool)) {
	heard := false
	defer func() {
		if !heard {
			return
		}
		if err := keep(e.Journal, KeptHeard, nil); err != nil {
			e.Log.Warn("cannot record in the journal that the source knows how the eviction ended",
				"error", err)
		}
	}()
	timer := time.NewTimer(lingerTime)
	defer timer.Stop()
	a := e.at.Load()
	for done := false; !done && (a != nil || e.Journal == nil); {
		var gone <-chan struct{}
		var frames chan controlFrame
		if a != nil {
			gone, frames = a.Done(), a.control.frames
		}
		select {
		case f := <-frames:
			err := f.check(msgHeard)
			heard, done = err == nil, err == nil
			if err != nil && !errors.Is(err, errFailed) {
				// a source without more pages hears that it needs to send none
				a.Fail(err)
			}
		case <-gone:
			e.at.Store(nil)
			a.end()
			a = nil
		case r := <-e.rejoin:
			heard, done = answer(r), true
		case <-timer.C:
			e.Log.Warn("the eviction ended well here, but the source did not hear that")
			done = true
		case <-over:
			done = true
		}
	}
}

// summary summarises what was received.
func (e *destination) summary() Received {
	stats := e.pages.summary()
	stats.ShutDown = e.vm.shutDown.get()
	return stats
}

// twin is what another engine needs to know about the QEMU here to place pages in its memory. That
// must work even while the QEMU waits for a page and does not answer.
type twin struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start_ticks"` // of the process, since boot, in clock ticks
	// of the host; "" in journals older than this field
	Boot   string           `json:"boot,omitempty"`
	Blocks []guestmem.Block `json:"blocks"`
	// Changed are its own migration settings, to restore at the end.
	Changed  settings         `json:"changed"`
	Messages process.Messages `json:"messages"`
}

func (t twin) process() process.Process { return process.Of(t.PID, t.Start, t.Boot) }

func (e *destination) twin() twin {
	t := twin{PID: e.process.PID, Start: e.process.StartTime, Boot: process.BootID(),
		Blocks: e.mem.Blocks(), Messages: e.messages}
	e.owner.record(&t)
	return t
}

// Resume continues an eviction that another engine left, or during which it died. m is its last
// mark in the journal. It ends as Receive does. It answers requests to resume the eviction.
func (d Destination) Resume(ctx context.Context, id ID, m Mark,
	requests <-chan *Request) (Received, error) {
	e := d.engine(CutOff)
	defer e.close()
	e.eviction, e.mark = id, m
	e.report(CutOff)
	e.tasks.Go(func() { e.sort(requests) })
	var err error
	found := copyGone
	if err = e.find(); err == nil {
		found = copyRunning // or it stands; recover finds out
	} else if !errors.Is(err, errTwinGone) && !errors.Is(err, fs.ErrNotExist) {
		return Received{}, &Error{ErrLeft, CutOff, err,
			"Nothing was touched. The VM may run here, until it needs a page that is missing"}
	}
	left, stop := untilLeft(ctx)
	defer stop()
	switch destinationStep(m, found) {
	case stepEnd:
		if err := e.shutDown(left, "an engine found it so before"); err != nil {
			return Received{}, err
		}
		return e.summary(), nil
	case stepAbandon:
		if found == copyGone {
			if err := note(d.Journal, MarkNeverRan,
				"the engine died before the VM was told to run"); err != nil {
				return Received{}, &Error{ErrLeft, CutOff, err, "The VM never ran here"}
			}
			e.answerRejoin(AnswerNeverRan,
				"the destination's engine died before the VM was told to run", true)
			return Received{}, &Error{ErrAborted, CutOff,
				errors.Join(errDied, e.machine.enter(Aborted)), "The VM never ran here"}
		}
		return Received{}, e.abort(errDied)
	case stepTakeUp:
		if err := e.serve(left); err != nil {
			return Received{}, err
		}
		return e.summary(), nil
	}
	if why, _ := e.owner.lastWords(); why != "" && m == MarkMayRun {
		if err := e.shutDown(left, why); err != nil {
			return Received{}, err
		}
		return e.summary(), nil
	}
	return Received{}, e.lost(fmt.Errorf("%w while no engine looked after it; %s", errTwinGone,
		e.messages.Last()), goneHere)
}

var errDied = errors.New("the engine died before the VM was told to run")

// find finds the QEMU of a resumed eviction, and its memory. It asks the QEMU nothing, as that may
// be unable to answer.
func (e *destination) find() error {
	if e.Journal == nil {
		return errors.New("an eviction cannot be resumed without a journal")
	}
	b, err := e.Journal.Kept(keptMemory)
	if err != nil {
		return fmt.Errorf("which QEMU took the VM: %w", err)
	}
	var t twin
	if err := json.Unmarshal(b, &t); err != nil {
		return fmt.Errorf("which QEMU took the VM: the journal: %w", err)
	}
	e.messages = t.Messages.Reopen()
	e.process = t.process()
	pidfd, err := e.process.Open()
	if errors.Is(err, process.ErrGone) {
		return fmt.Errorf("%w: process %d", errTwinGone, t.PID)
	} else if err != nil {
		return err
	}
	unix.Close(pidfd)
	if err := e.owner.recall(t); err != nil {
		return err
	}
	stands, err := e.Journal.Kept(keptStands)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("whether the VM must run: %w", err)
	}
	e.vm.stands.set(string(stands))
	switch _, err := e.Journal.Kept(keptRan); {
	case err == nil:
		e.vm.hasRun.Store(true)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("whether the VM ran here: %w", err)
	}
	e.lookAfter()
	head, err := e.Journal.Kept(keptHead)
	if err != nil {
		return fmt.Errorf("the VM's memory: %w", err)
	}
	l, r, err := parseHead(head)
	if err != nil {
		return err
	}
	e.adopt(head, l, r)
	if e.mem, err = guestmem.Reopen(t.PID, t.Blocks); err != nil {
		return err
	}
	memory, limits, err := memoryOf(e.mem)
	if err != nil {
		e.Log.Warn("cannot read some of the limits on the VM's memory here", "error", err)
	}
	e.supply.promised = e.Room.Note(e.process, limits, memory)
	e.placer = newPlacer(nil, r.SectionID(), l)
	e.placeDirectly()
	return e.takeStock(nil)
}

// takeStock finds out which pages are here.
func (e *destination) takeStock(bitmaps map[string][]byte) error {
	return e.pages.restock(func() ([]*pageset.Set, error) { return e.present(bitmaps) })
}

// present returns which pages are here, by QEMU's page tables: while the QEMU may wait for pages,
// each one that is there was placed. For blocks at an unknown address only QEMU knows, by a bitmap
// for each. Without that bitmap none of their pages counts as missing.
func (e *destination) present(bitmaps map[string][]byte) (placed []*pageset.Set, err error) {
	for _, b := range e.incoming.layout {
		set, per := pageset.New(b.Pages), int(b.PageSize/migstream.TargetPageSize)
		frames := b.Pages * per
		words := make([]uint64, (frames+63)/64)
		at := slices.IndexFunc(e.mem.Blocks(), func(m guestmem.Block) bool {
			return m.Name == b.Name && m.Located && m.PageSize == b.PageSize && m.Size >= b.Length
		})
		switch bits := bitmaps[b.Name]; {
		case at >= 0:
			if err := e.mem.Placed(at, 0, uint64(frames), words); err != nil {
				return nil, err
			}
		case bitmaps == nil:
			for j := range words {
				words[j] = ^uint64(0)
			}
		case len(bits)*8 < frames:
			return nil, fmt.Errorf("QEMU reports %d pages of memory %q, which has %d", len(bits)*8,
				b.Name, frames)
		default:
			for j := range frames {
				words[j/64] |= uint64(bits[j/8]>>(j%8)&1) << (j % 64)
			}
		}
		for p := range b.Pages {
			f := p * per
			if words[f/64]>>(f%64)&1 != 0 {
				set.Add(pageset.Page(p))
			}
		}
		placed = append(placed, set)
	}
	return placed, nil
}

// useStream continues with a new stream to QEMU. If the source is connected, it must reconnect, as
// other pages may be here than it knows.
func (e *destination) useStream(m mended) error {
	e.detach(errors.New("QEMU has a new stream"))
	e.forget(nil)
	e.recovery.pending = m.pending && e.vm.stands.get() == "" && !e.vm.hasRun.Load()
	e.recovery.unasked.Store(m.same)
	s := newStream(m.conn)
	e.recovery.present.Store(s)
	e.supply.held.Lock()
	old := e.placer
	d := old.direct.Load()
	e.placer = newPlacer(m.conn, e.incoming.reader.SectionID(), e.incoming.layout)
	if d != nil {
		e.placer.gate = old.gate
		e.placer.direct.Store(d)
	} else {
		e.placeDirectly()
	}
	e.supply.held.Unlock()
	if err := e.takeStock(m.bitmaps); err != nil {
		s.fail(err)
		e.recovery.present.Store(nil)
		return err
	}
	e.pages.recount()
	e.follow(s, m.r)
	return nil
}
