package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/sys/process"
)

// eviction is one in the journal, and the engine that works on it, if there is one.
type eviction struct {
	host     *Host
	entry    *journal.Entry
	requests chan *evict.Request // a destination's: to its engine
	operator sync.Mutex          // held while an operator's word is being done: one at a time
	memory   evict.Map           // while an engine works at the source

	mu         sync.Mutex
	state      evict.State // the engine's; empty if there is none. Guarded by mu, as all below
	progress   evict.Progress
	outcome    string // how it ended
	reason     string // why it did not complete, or why it does not go on
	reconnects uint32
	// since when the other host is out of reach; zero while it is not
	alone time.Time
	// why the twin here was ended although it ran; nil if it was not
	ousted  error
	cancel  context.CancelCauseFunc // ends the engine
	idle    chan struct{}           // closed when no engine is at work
	changed chan struct{}           // closed at the next change
	huge    restoring
}

func (h *Host) newEviction(entry *journal.Entry) *eviction {
	idle := make(chan struct{})
	close(idle)
	v := &eviction{host: h, entry: entry, requests: make(chan *evict.Request, 1), idle: idle,
		changed: make(chan struct{})}
	r := entry.Record()
	if !r.Ended.IsZero() {
		v.outcome, v.reason = outcomeOf(r), r.Reason
	}
	return v
}

// outcomeOf returns how an eviction ended, as its journal has it. A refusal has the mark of a
// roll-back, as both leave the VM with the source. Only the report tells them apart.
func outcomeOf(r journal.Record) string {
	m := evict.Mark(r.Mark)
	var report evict.Report
	if m == evict.MarkRolledBack && json.Unmarshal(r.Report, &report) == nil &&
		report.Outcome == string(evict.Refused) {
		return report.Outcome
	}
	return outcomes[m]
}

// outcomes is what a mark that an eviction ended with says to people.
var outcomes = map[evict.Mark]string{
	evict.MarkCompleted: string(evict.Completed), evict.MarkRolledBack: string(evict.Aborted),
	evict.MarkNeverRan: string(evict.Aborted),
	evict.MarkShutDown: string(evict.ShutDown),
	evict.MarkLost:     string(evict.Lost), evict.MarkResumedHere: "resumed here",
	evict.MarkDiscarded: "discarded",
}

// record is the journal of an engine.
type record struct{ *journal.Entry }

// Note implements evict.Journal.
func (r record) Note(m evict.Mark, reason string) error {
	dead := evict.DeadThere(r)
	return r.Entry.Note(string(m), reason, func(to *journal.Record) {
		if m == evict.MarkResumedHere {
			to.Untold = !dead
		}
	})
}

// Kept implements evict.Journal.
func (r record) Kept(name string) ([]byte, error) { return r.Blob(name) }

func (v *eviction) mark() evict.Mark { return evict.Mark(v.entry.Record().Mark) }

// ended reports whether nothing remains to be done.
func (v *eviction) ended() bool {
	return v.entry.Err() == nil && !v.entry.Record().Ended.IsZero()
}

// change alters the eviction, and wakes those who watch.
func (v *eviction) change(f func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	f()
	close(v.changed)
	v.changed = make(chan struct{})
}

// show is told of the engine's progress.
func (v *eviction) show(p evict.Progress) {
	entered := false
	v.change(func() {
		entered = p.State != v.state
		if entered {
			switch p.State {
			case evict.Reconnecting, evict.CutOff, evict.InDoubt:
				if v.alone.IsZero() {
					v.alone = time.Now()
				}
			case evict.Pushing, evict.Running:
				if !v.alone.IsZero() {
					v.reconnects++
				}
				v.alone, v.reason = time.Time{}, ""
			}
		}
		if p.Short != "" || v.progress.Short != "" {
			v.reason = p.Short
		}
		if p.Apart != "" || v.progress.Apart != "" {
			v.reason = p.Apart
		}
		more := p.Bytes - v.progress.Bytes
		if p.Bytes < v.progress.Bytes { // another engine began to count anew
			more = p.Bytes
		}
		if more > 0 {
			v.host.metrics.bytes.WithLabelValues(string(v.entry.Record().Role)).Add(float64(more))
		}
		v.state, v.progress = p.State, p
	})
	if entered && v.host.onState != nil {
		r := v.entry.Record()
		v.host.onState(r.Role, r.ID, p.State)
	}
}

// start starts an engine that works on the eviction. It calls work until work does not leave the
// eviction; resumed is set from the second call on, and in the first if resume is. Then it calls
// ended with the outcome.
func (v *eviction) start(resume bool, work func(ctx context.Context, resumed bool) (any, error),
	ended func(report json.RawMessage, err error)) {
	ctx, cancel := context.WithCancelCause(v.host.life)
	idle := make(chan struct{})
	v.change(func() { v.cancel, v.idle = cancel, idle })
	v.host.tasks.Go(func() {
		defer cancel(nil)
		for {
			report, err := work(ctx, resume)
			if !errors.Is(err, evict.ErrLeft) {
				b, _ := json.Marshal(report)
				ended(b, err)
				break
			}
			v.change(func() { v.reason = err.Error() })
			if ctx.Err() != nil {
				break
			}
			resume = true
			v.host.log.Warn("an eviction cannot go on yet", "eviction", v.entry.ID(), "error", err)
			select {
			case <-time.After(retryPause):
			case <-ctx.Done():
			}
			if ctx.Err() != nil {
				break
			}
		}
		v.change(func() { v.cancel, v.state, v.alone = nil, "", time.Time{} })
		close(idle)
	})
}

// retryPause is how long an eviction is left alone that could not be taken up.
const retryPause = 2 * time.Second

// engine returns what ends the engine, nil if none is at work, and what is closed when none is.
func (v *eviction) engine() (cancel context.CancelCauseFunc, idle <-chan struct{}) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.cancel, v.idle
}

// stop has the engine leave the eviction, and waits until it has.
func (v *eviction) stop(ctx context.Context) error {
	cancel, idle := v.engine()
	if cancel != nil {
		cancel(evict.ErrLeave)
	}
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// finish ends the eviction in the journal, for which it tries as long as it takes.
func (v *eviction) finish(m evict.Mark, outcome evict.State, err error, report json.RawMessage) {
	reason := ""
	if err != nil {
		reason = err.Error()
	}
	change := func(r *journal.Record) {
		if len(report) <= maxReport {
			r.Report = report
		}
	}
	r := v.entry.Record()
	v.releaseDomain(m)
	v.change(func() { v.outcome, v.reason = string(outcome), reason })
	v.host.metrics.ended.WithLabelValues(string(r.Role), string(outcome)).Inc()
	v.host.log.Info("eviction ended", "eviction", v.entry.ID(), "vm", r.VM, "role", r.Role, "peer",
		r.Peer, "outcome", outcome, "reason", reason)
	for told := false; ; told = true {
		jerr := v.entry.Finish(string(m), reason, change)
		if jerr == nil {
			break
		}
		if !told {
			v.host.log.Error("cannot record the end of an eviction in the journal: trying again "+
				"until it does", "eviction", v.entry.ID(), "error", jerr)
		}
		select {
		case <-time.After(retryPause):
		case <-v.host.life.Done():
			return // the next daemon comes to the same end
		}
	}
	v.change(func() {})
	v.tell()
}

// maxReport bounds a report in the journal, in bytes.
const maxReport = 128 << 10

// process is the QEMU of an eviction, as the journal has it; one that never lives if the host has
// booted since.
func (v *eviction) process() process.Process {
	r := v.entry.Record()
	return process.Of(r.PID, r.StartTime, r.Boot)
}

// abortable reports whether an abort would be heeded.
func (v *eviction) abortable() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch v.state {
	case evict.Preparing, evict.Switching, evict.Waiting, evict.Arming, evict.Loading,
		evict.Prepared:
		return v.cancel != nil
	}
	return false
}

// unsettled reports whether a stop of the daemon may abort it, or make it fail.
func (v *eviction) unsettled() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.entry.Record().Carried { // it would fail
		return v.cancel != nil
	}
	switch v.state {
	case evict.Preparing, evict.Switching, evict.Loading, evict.Committing, evict.RollingBack,
		evict.Waiting, evict.Arming, evict.Prepared:
		return v.cancel != nil
	case "": // its engine has said nothing yet; one that was taken up may stay so
		return v.cancel != nil && v.entry.Record().Begun.After(v.host.started)
	}
	return false
}

// openFor returns the eviction of a VM that has not ended, or nil.
func (h *Host) openFor(vm string) *eviction {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, v := range h.evictions {
		if r := v.entry.Record(); r.VM == vm && !v.ended() {
			return v
		}
	}
	return nil
}

var errStopping = errors.New("this daemon is stopping")

// take reserves a VM for an eviction that is being set up, until what it returns is called.
func (h *Host) take(vm string) (release func(), err error) {
	if v := h.openFor(vm); v != nil {
		return nil, &takenError{vm, h.name(), v.entry.ID()}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.stopping:
		return nil, errStopping
	case h.taken[vm]:
		return nil, &takenError{vm: vm, host: h.name()}
	}
	h.taken[vm] = true
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.taken, vm)
	}, nil
}

// takeTime is how long one that wants a VM waits for another that is about to have, or only looks
// at it.
const takeTime = 5 * time.Second

// takeSoon is take, which waits for a moment if the VM is reserved.
func (h *Host) takeSoon(ctx context.Context, vm string) (release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, takeTime)
	defer cancel()
	for {
		release, err := h.take(vm)
		var taken *takenError
		if !errors.As(err, &taken) || taken.id != (journal.ID{}) {
			return release, err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// takenError: an eviction has the VM.
type takenError struct {
	vm, host string
	id       journal.ID // zero while it is being set up
}

func (e *takenError) Error() string {
	if e.id == (journal.ID{}) {
		return fmt.Sprintf("VM %s is being started or stopped, or an eviction of it is being "+
			"set up, on host %s", e.vm, e.host)
	}
	return fmt.Sprintf("VM %s is being evicted already: see vacate status %s on host %s", e.vm,
		e.id, e.host)
}

// add makes an eviction known.
func (h *Host) add(v *eviction) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.evictions[v.entry.ID()] = v
	// Those that the journal has forgotten.
	for id := range h.evictions {
		if h.journal.Find(id) == nil {
			delete(h.evictions, id)
		}
	}
}

// find returns an eviction, or nil.
func (h *Host) find(id journal.ID) *eviction {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.evictions[id]
}
