package evict

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/evict/pushorder"
	"vacate/internal/qemu/export"
	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

// How long a source waits before it tries to reach the destination again, and for its answers.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = time.Second
	answerTime = 10 * time.Second
	// connectTime is how long a new session may take to be made.
	connectTime = 5 * time.Second
)

// Gap is a time in which a committed eviction had no link.
type Gap struct {
	At    float64 `json:"at_s"`   // since the start
	For   float64 `json:"for_s"`  // until pages were sent again, or it was known that none need be
	Again int     `json:"again"`  // pages that were on their way and had to be sent once more
	Why   string  `json:"reason"` // of the first failure
}

// converse goes on with a committed eviction to its end, through any number of sessions. why
// is the reason for which the present one is of no use; nil if pages are being pushed in it.
func (e *source) converse(ctx context.Context, why error) error {
	left, stop := untilLeft(ctx)
	defer stop()
	for {
		if why == nil {
			done, err := e.await(left)
			if done {
				return err
			}
			why = err
			if err := e.machine.enter(Reconnecting); err != nil {
				return e.lost(errors.Join(why, err), e.frozenRemedy())
			}
		}
		e.drop(why)
		e.Log.Warn("the destination is out of reach; the VM stays frozen here, and pages wait", "error", why)
		done, err := e.reach(left, why)
		if done {
			return err
		}
		why = nil
	}
}

// await waits for the end of a push, or of its session.
func (e *source) await(left context.Context) (done bool, err error) {
	a := e.at.Load()
	for {
		select {
		case f := <-a.control.frames:
			err := f.check(msgComplete, msgShort)
			if err == nil && f.kind == msgShort {
				if err = e.hearShort(a, f.payload); err == nil {
					continue
				}
			} else if err == nil {
				err = decode(f.payload, &e.summary)
			}
			switch {
			case err == nil:
				return true, e.retire()
			case errors.Is(err, errShutDown):
				return true, e.bury(err)
			case errors.Is(err, errFailed), errors.Is(err, errFarewell):
				return true, e.lostThere(err)
			}
			return false, err
		case <-a.Done():
			return false, a.Err()
		case <-e.life.Done():
			if e.settled() < int(e.total.Load()) {
				return e.lostHere(context.Cause(e.life))
			}
			return false, context.Cause(e.life) // the destination may have it all: it is asked
		case <-left.Done():
			return true, e.left()
		}
	}
}

// hearShort takes note of whether the destination has memory for pages.
func (e *source) hearShort(a *attachment, payload []byte) error {
	var f farewell
	if err := decode(payload, &f); err != nil {
		return err
	}
	if len(f.Reason) > maxReason {
		return fmt.Errorf("%w: a reason of %d bytes", errFrame, len(f.Reason))
	}
	text := shortText("the destination "+a.Session.Peer(), f.Reason)
	if text == "" {
		e.Log.Info("the destination has memory again for the VM's pages")
	} else {
		e.Log.Warn("the VM waits at the destination", "reason", text)
	}
	e.short.Store(&text)
	e.show("")
	return nil
}

// reach makes sessions with the destination until it has said what became of the eviction,
// and does what follows from it. It returns with done unset when pages are pushed again.
func (e *source) reach(left context.Context, why error) (done bool, err error) {
	since := time.Now()
	again := 0
	defer func() {
		if !errors.Is(err, ErrLeft) {
			e.sessions.gap(Gap{since.Sub(e.started).Seconds(), time.Since(since).Seconds(), again, why.Error()})
		}
	}()
	pause := time.Duration(0)
	for {
		// Even where the QEMU here has ended: the destination may have every page already, and
		// if it has not, it has to know that no more will come.
		select {
		case <-time.After(pause):
		case <-left.Done():
			return true, e.left()
		}
		pause = min(max(2*pause, firstPause), lastPause)
		a, st, err := e.inquire(left, resume{Eviction: e.Eviction, Committed: true})
		if err != nil {
			e.Log.Debug("the destination cannot be asked", "error", err)
			continue
		}
		here := copyPaused
		if e.life.Err() != nil {
			here = copyGone
		}
		switch next := sourceOnAnswer(here, e.ranThere, st.Answer); next {
		case stepPush:
			if again, err = e.rejoin(a, time.Duration(st.Ran)*time.Millisecond); err != nil {
				a.Fail(err)
				e.end(a)
				continue
			}
			if err := e.machine.enter(Pushing); err != nil {
				return true, e.lost(err, e.frozenRemedy())
			}
			return false, nil
		case stepRetire:
			if st.Summary != nil {
				e.summary = *st.Summary
			}
			e.at.Store(a) // there it is told that this was heard
			return true, e.retire()
		case stepEnd:
			e.at.Store(a)
			return true, e.bury(fmt.Errorf("%w: %s", errShutDown, st.Reason))
		case stepRollBack:
			e.end(a)
			return true, e.rollBack(fmt.Errorf("the destination never ran the VM: %s", st.Reason))
		case stepLose:
			e.end(a)
			if here == copyGone {
				return e.lostHere(context.Cause(e.life))
			}
			return true, e.lostThere(st.lost())
		case stepHold:
			if here == copyGone {
				e.at.Store(a)
				if done, err := e.lostHere(context.Cause(e.life)); done {
					return true, err
				}
				e.drop(context.Cause(e.life))
				continue
			}
			e.end(a)
			return true, e.lost(fmt.Errorf("the destination answers %q, which cannot be true", st.Answer), e.frozenRemedy())
		default:
			e.end(a)
			e.Log.Warn("the destination cannot tell what became of the VM; it stays frozen here", "answer", st.Answer, "reason", st.Reason)
			pause = lastPause
		}
	}
}

// inquire makes a new session, says why, and hears what became of the eviction.
func (e *source) inquire(left context.Context, why resume) (*attachment, status, error) {
	ctx, cancel := context.WithTimeout(left, connectTime)
	defer cancel()
	s, err := e.Connect(ctx)
	if err != nil {
		return nil, status{}, err
	}
	a := attach(s, maxHas/8+runSize)
	st, err := func() (st status, err error) {
		if err := writeJSON(a.control.Conn, msgResume, why); err != nil {
			return st, err
		}
		ctx, cancel := context.WithTimeoutCause(context.Background(), answerTime, errors.New("the destination does not answer"))
		defer cancel()
		f, err := a.control.await(ctx, msgStatus)
		if err != nil {
			return st, err
		}
		err = decode(f.payload, &st)
		st.Reason = plain(st.Reason)
		return st, err
	}()
	if err != nil {
		e.end(a)
		return nil, st, err
	}
	return a, st, nil
}

// rejoin learns which pages the destination has, where the VM has run for so long, and pushes the
// others in a new session. It returns how many of them were sent before.
func (e *source) rejoin(a *attachment, ran time.Duration) (again int, err error) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), answerTime, errors.New("the destination does not tell what it has"))
	defer cancel()
	l := e.frozen.layout
	has := make([]*pageset.Set, len(l))
	for i, b := range l {
		has[i] = pageset.New(b.Pages)
	}
	for {
		f, err := a.control.await(ctx, msgHas, msgReady)
		if err != nil {
			return 0, err
		}
		if f.kind == msgReady {
			break
		}
		if err := l.parseHas(f.payload, has); err != nil {
			return 0, err
		}
	}
	var skipped []pageset.Run
	e.mu.Lock()
	for i, b := range l {
		for p := range pageset.Page(b.Pages) {
			run := pageset.Run{Block: i, First: p, Count: 1}
			switch why, _ := e.order.Why(i, p); {
			case has[i].Has(p) && why == pushorder.Left:
				e.order.Take(run, pushorder.Before)
				e.count(pushorder.Before, []pageset.Run{run})
			case has[i].Has(p) || why == pushorder.Left:
			case why == pushorder.Skipped || why == pushorder.Unused:
				skipped = append(skipped, run)
			default:
				e.order.Return(run)
				e.sent[why].Add(-1)
				again++
			}
		}
	}
	e.mu.Unlock()
	e.ranThere = true
	e.noteRan(ran)
	a.window = e.Path.join(migstream.TargetPageSize, e.Limit, e.Yield)
	e.at.Store(a)
	a.begin(func() error { return e.serveFetches(a) })
	a.begin(func() error {
		if err := sendSkipped(a, join(skipped)); err != nil {
			return err
		}
		e.beginPush(a)
		return nil
	})
	return again, nil
}

// join makes runs of pages that follow one another into one.
func join(runs []pageset.Run) []pageset.Run {
	out := runs[:0]
	for _, r := range runs {
		if n := len(out) - 1; n >= 0 && out[n].Block == r.Block && out[n].End() == r.First {
			out[n].Count += r.Count
			continue
		}
		out = append(out, r)
	}
	return out
}

// drop ends the present session.
func (e *source) drop(why error) {
	e.short.Store(nil) // it is told anew
	if a := e.at.Load(); a != nil {
		a.Fail(why)
		e.end(a)
	}
}

// end ends a session, and keeps what the report tells of it.
func (e *source) end(a *attachment) {
	a.end()
	e.sessions.end(a)
}

// noteRan notes that the VM has run at the destination for so long, as that says. What it says
// cannot be true of a time before it was told to run the VM.
func (e *source) noteRan(ran time.Duration) {
	if !e.ranSince.IsZero() {
		return
	}
	now := time.Now()
	e.ranSince = now.Add(-ran)
	if told := e.machine.at(Committing); told.IsZero() {
		e.ranSince = now // it was another engine that told it
	} else if e.ranSince.Before(told) {
		e.ranSince = told
	}
}

// retire ends the QEMU here, as the destination has every page.
func (e *source) retire() error { return e.finish(MarkCompleted, "", Completed) }

// bury ends the QEMU here, as the guest ended itself at the destination: that wrote its disks last.
func (e *source) bury(why error) error {
	e.shutDown = why.Error()
	return e.finish(MarkShutDown, why.Error(), ShutDown)
}

// finish ends the QEMU here, as nobody needs it any more.
func (e *source) finish(m Mark, why string, as State) error {
	if err := e.machine.enter(Retiring); err != nil {
		return e.lost(err, "The VM on the destination does not need the copy here. Nothing is lost")
	}
	if err := e.note(m, why); err != nil {
		e.Log.Warn("the journal does not take how the eviction ended", "mark", m, "error", err)
	}
	if a := e.at.Load(); a != nil {
		a.control.Write(msgHeard)
	}
	ended := e.kill()
	err := e.machine.enter(as)
	<-ended
	return err
}

// quitTime is how long a QEMU that was killed may take to end.
const quitTime = 10 * time.Second

// kill ends the QEMU here, as it is of no more use to anyone. Its process is stopped: it could not be told to quit without being
// let run first, and then it could carry out a `cont` that somebody gave it meanwhile. What it returns is closed when it has ended.
func (e *source) kill() <-chan struct{} {
	ended := make(chan struct{})
	e.tasks.Go(func() {
		defer close(ended)
		ctx, cancel := context.WithTimeout(context.Background(), quitTime)
		defer cancel()
		if err := e.qemu.Kill(ctx); err != nil {
			e.Log.Warn("the source's QEMU does not end; end it by hand", "pid", e.qemu.PID, "error", err)
		}
	})
	return ended
}

// frozenRemedy says what an operator can do with a VM that stands frozen here.
func (e *source) frozenRemedy() string {
	if e.gaveBack.Load() {
		return fmt.Sprintf("The copy here is of no use, as memory of it was given back. Look on the destination what became of the VM; "+
			"`vacate decide %s discard --confirm %s` ends this copy", e.Eviction, e.VM)
	}
	const keep = "Here it stays frozen, with all of its memory: do not end its QEMU. Look on the destination what became of it"
	if e.Journal == nil {
		return fmt.Sprintf(keep+". Its process is stopped: only if the VM is gone on the destination for good, `kill -CONT %d`, "+
			"then `cont` on its QMP socket, have it go on here from then", e.qemu.PID)
	}
	return keep + ". " + e.remedies()
}

// remedies says where an operator finds what can be done. What that is depends on what the destination said, and may still say.
func (e *source) remedies() string {
	return fmt.Sprintf("`vacate status %s` says what is waited for, and what can be decided", e.VM)
}

// lost is what a destination says that has lost the VM, as an error.
func (st status) lost() error {
	if st.Dead {
		return fmt.Errorf("%w, %w: %s", errFailed, errDead, st.Reason)
	}
	return fmt.Errorf("%w: %s", errFailed, st.Reason)
}

// lostThere ends an eviction whose VM is lost at the destination. One that is not told that the twin is dead
// keeps it in mind that it may run.
func (e *source) lostThere(err error) error {
	if errors.Is(err, errDead) || errors.Is(err, errFarewell) {
		if err := keep(e.Journal, keptDead, nil); err != nil {
			e.Log.Warn("the journal does not take it that the VM's QEMU on the destination has ended", "error", err)
		}
	}
	return e.lost(err, fmt.Sprintf("The VM may have run on the destination, with %d of %d pages dealt with, and what it did there is lost. %s", e.settled(), e.total.Load(), e.frozenRemedy()))
}

// lostHere ends an eviction whose frozen VM ended before all of its pages were sent. The destination
// has to know that no more will come: if it is there, and does not say that it has heard, the
// eviction is not over, and the error is why.
func (e *source) lostHere(err error) (done bool, _ error) {
	if a := e.at.Load(); a != nil {
		heard := writeJSON(a.control.Conn, msgFailed, farewell{Reason: saidBy(e.Host, err).Error()})
		ctx, cancel := context.WithTimeout(context.Background(), answerTime)
		defer cancel()
		var f controlFrame
		for heard == nil && f.kind != msgComplete {
			f, heard = a.control.await(ctx, msgHas, msgReady, msgShort, msgComplete)
		}
		if heard == nil {
			heard = decode(f.payload, &e.summary)
		}
		switch {
		case heard == nil:
			return true, e.retire() // it needs none of the pages that are gone
		case errors.Is(heard, errShutDown):
			return true, e.bury(heard)
		case !errors.Is(heard, errFailed) && !errors.Is(heard, errFarewell):
			return false, heard
		}
	}
	return true, e.lost(err, "The frozen VM here is gone, and with it the pages that the destination lacks. There it runs until it touches one of them: save what can be saved from it")
}

func (e *source) left() error {
	return &Error{ErrLeft, e.machine.current(), ErrLeave, "The VM stays frozen here, and another engine can go on with the eviction"}
}

// Resume goes on with an eviction that another engine left or died over, whose last mark in
// the journal is m: it rolls back one that was not committed, and completes the others. It
// ends as Evict does after the commit.
func (s Source) Resume(ctx context.Context, m Mark) (Report, error) {
	first := InDoubt
	if m == MarkBegun || m == MarkRolledBack {
		first = RollingBack
	}
	e := s.engine(first)
	return e.done(e.takeUp(ctx, m))
}

var errEngineDied = errors.New("the engine died")

// takeUp is Resume.
func (e *source) takeUp(ctx context.Context, m Mark) error {
	opening, cancel := e.bound(ctx, prepareTimeout, errors.New("the VM's QEMU does not answer"))
	defer cancel()
	e.mark = m
	here, err := e.find(opening)
	if err != nil {
		return &Error{ErrLeft, e.machine.current(), err, "Nothing was touched"}
	}
	if err := e.whole(); err != nil && !errors.Is(err, ErrGivenBack) {
		return &Error{ErrLeft, e.machine.current(), err, "Nothing was touched"}
	}
	e.ranThere = e.gaveBack.Load() // not sooner is any given back
	if m == MarkShutDown {
		e.shutDown = errShutDown.Error()
	}
	switch sourceStep(m, here) {
	case stepRollBack:
		if e.gaveBack.Load() {
			return e.lost(fmt.Errorf("%w; and it runs", ErrGivenBack), "Pause it, and look on the destination, where the VM is")
		}
		return e.rollBack(errEngineDied)
	case stepAsk:
		if here == copyPaused {
			if err := e.reopen(); err != nil {
				return &Error{ErrLeft, e.machine.current(), err, e.frozenRemedy()}
			}
		}
		return e.converse(ctx, errEngineDied)
	case stepLose:
		return e.lost(errEngineDied, "The VM's QEMU ended, and with it the VM; the destination never ran it. Start it anew")
	case stepRetire:
		<-e.kill()
		return nil
	case stepHold:
		return e.lost(errors.New("the journal says that the VM was moved away, and it runs here"), "Nothing was touched. Look whether it runs on the destination, too")
	}
	return nil
}

// whole is Whole, and remembers what it said.
func (e *source) whole() error {
	if e.Journal == nil {
		return nil
	}
	err := Whole(e.Journal)
	e.gaveBack.Store(errors.Is(err, ErrGivenBack))
	return err
}

// find finds out what the VM's QEMU does. One whose process is stopped cannot be asked: it is frozen.
func (e *source) find(ctx context.Context) (copyState, error) {
	b, err := e.kept(keptFacts)
	if err == nil {
		e.facts, err = parseFacts(b)
		e.stands.Store(new(e.facts.Stood))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // else the VM was not touched yet
		return copyGone, err
	}
	if e.qemu = e.Process; e.qemu == (process.Process{}) {
		e.qemu = e.facts.Process
	}
	if e.qemu != (process.Process{}) {
		switch e.held, err = e.qemu.Stopped(); {
		case errors.Is(err, process.ErrGone):
			e.die(errQEMUGone)
			return copyGone, nil
		case err != nil:
			return copyGone, err
		}
		e.watch()
		if e.held {
			return copyPaused, nil
		}
	}
	if err := e.open(ctx); notThere(err) && !e.qemu.Alive() {
		e.die(err)
		return copyGone, nil
	} else if err != nil {
		return copyGone, err
	}
	if e.qemu == (process.Process{}) {
		pid, _, err := e.q.Process(ctx)
		if err != nil {
			return copyGone, err
		}
		if e.qemu, err = process.Find(pid); err != nil {
			return copyGone, err
		}
	}
	events := e.q.Subscribe(256)
	defer events.Close()
	status, err := e.q.QueryStatus(ctx)
	switch {
	case err != nil:
		return copyGone, err
	case status.Running:
		return copyRunning, nil
	case e.mark != MarkMayRun && e.mark != MarkLost:
		return copyPaused, nil
	}
	// Somebody had the stopped process go on.
	if err := e.qemu.Stop(ctx); err != nil {
		return copyGone, err
	}
	e.held = true
	if err := e.q.Drain(ctx); err != nil {
		return copyGone, err
	}
	for {
		select {
		case ev, ok := <-events.C:
			if !ok || ev.Name == "RESUME" || events.Dropped() > 0 {
				return copyGone, errors.Join(errMoved, e.qemu.Continue())
			}
		default:
			return copyPaused, nil
		}
	}
}

// reopen gets ready to send the frozen VM's pages once more.
func (e *source) reopen() error {
	if _, err := e.recall(); err != nil {
		return err
	}
	e.frozenAt.Store(&e.started)
	if e.gaveBack.Load() {
		return nil // what is left of the guest does not tell what its pages are used for
	}
	e.light.noAgent = errors.New("the guest stands still")
	e.tasks.Go(e.enlighten)
	return nil
}

// recall reads from the journal what the frozen VM is, and returns the head of its stream.
func (e *source) recall() (head []byte, err error) {
	e.offer.Machine, e.offer.QEMU = e.facts.Machine, e.facts.QEMU
	e.registers.Store(&e.facts.Registers)
	if e.mem, err = guestmem.Reopen(e.facts.Process.PID, e.facts.Blocks); err != nil {
		return nil, err
	}
	if err := e.mem.Map(e.facts.Mappings); err != nil {
		return nil, err
	}
	head, err = e.kept(keptHead)
	if err != nil {
		return nil, err
	}
	l, _, err := parseHead(head)
	if err != nil {
		return nil, err
	}
	e.pushed, e.fetched = newFrame(e.mem), newFrame(e.mem)
	return head, e.layOut(l)
}

func (e *source) kept(name string) ([]byte, error) {
	if e.Journal == nil {
		return nil, errors.New("an eviction cannot be resumed without a journal")
	}
	return e.Journal.Kept(name)
}

// A Decision is an operator's, of a VM that stands frozen.
type Decision string

// The decisions.
const (
	// ResumeHere has the VM go on at the source, from when it was frozen. Whoever decides
	// so knows that the VM is gone at the destination, and that nobody starts it there.
	ResumeHere Decision = "resume-here"
	// Discard gives the copy at the source up. Whoever decides so knows that the VM is whole at the
	// destination, or accepts that it is lost.
	Discard Decision = "discard"
)

// ErrUndecided is wrapped by the error of Decide when the journal does not take the decision.
// It may be there all the same after a crash, so nobody may go on as if it had not been made.
var ErrUndecided = errors.New("the journal does not take the decision: make room and decide again")

// ErrAnswers is wrapped by the error of Decide when the destination still answers for the VM.
var ErrAnswers = errors.New("the destination answers for the VM")

// ErrUnfenced is wrapped by the error of Decide when nobody says that the twin is dead.
var ErrUnfenced = errors.New("nobody says that the VM is dead on the destination")

// Decide does what an operator decided of an eviction whose last mark is m. No engine may be at work on
// it. For ResumeHere, fenced is why the twin is dead for good, in words: who asserts it. It may be empty
// where the destination has said so itself. The destination is asked once more, and what it says counts
// more; whether it has heard of the decision is left to Tell.
func (s Source) Decide(ctx context.Context, m Mark, d Decision, fenced string) error {
	e := s.engine(RollingBack)
	e.mark = m
	_, err := e.done(e.decide(ctx, d, fenced))
	return err
}

func (e *source) decide(ctx context.Context, d Decision, fenced string) error {
	ctx, cancel := e.bound(ctx, prepareTimeout, errors.New("the VM's QEMU does not answer"))
	defer cancel()
	here, err := e.find(ctx)
	switch {
	case err != nil:
		return err
	case here == copyGone && d == Discard:
		return note(e.Journal, MarkDiscarded, "the operator decided so")
	case here == copyGone:
		return errQEMUGone
	case here == copyRunning && d == Discard:
		return errors.New("the VM runs here, and that may be its only copy: nothing was decided")
	}
	switch d {
	case ResumeHere:
		return e.resumeHere(ctx, fenced)
	case Discard:
		// One that answers needs the copy, or ends the eviction by itself.
		if e.mark == MarkMayRun && !DeadThere(e.Journal) {
			if err := e.askOnce(ctx, ""); errors.Is(err, ErrAnswers) {
				return err
			}
		}
		if err := note(e.Journal, MarkDiscarded, "the operator decided so"); err != nil {
			return fmt.Errorf("%w: %w", ErrUndecided, err)
		}
		return e.qemu.Kill(ctx)
	}
	return fmt.Errorf("decision %q: there are %s and %s", d, ResumeHere, Discard)
}

// resumeHere has the guest go on here by the operator's word.
func (e *source) resumeHere(ctx context.Context, fenced string) error {
	if err := e.whole(); err != nil {
		return err
	}
	if !DeadThere(e.Journal) {
		if err := e.askOnce(ctx, fenced); err != nil {
			return err
		}
	}
	reason := "an operator decided so"
	if fenced != "" {
		reason += "; " + fenced
	}
	if e.facts.Stood != "" {
		reason += fmt.Sprintf("; as before the eviction, the VM %s", fit.Stands(e.facts.Stood))
	}
	if err := note(e.Journal, MarkResumedHere, reason); err != nil {
		return fmt.Errorf("%w: %w", ErrUndecided, err)
	}
	// A twin that lives after all may hold the locks of the disks.
	if heard, err := e.Tell(ctx); !heard {
		e.Log.Info("the destination did not hear yet that the VM goes on here", "error", err)
	}
	now, err := e.resume(ctx)
	if err == nil && now.Running {
		announce(ctx, e.q, e.Log)
	}
	return err
}

// askOnce makes sure that the operator's word, which is fenced, is not contradicted by the destination. It does not go on with
// the eviction, whatever the answer.
func (e *source) askOnce(ctx context.Context, fenced string) error {
	a, st, err := e.inquire(ctx, resume{Eviction: e.Eviction})
	if err == nil {
		a.end()
		switch st.Answer {
		case AnswerRunning, AnswerPaused, AnswerComplete, AnswerShutDown:
			return fmt.Errorf("%w: it says %q", ErrAnswers, st.Answer)
		case AnswerNeverRan:
			return fmt.Errorf("%w: it says %q, so that the VM comes back by itself", ErrAnswers, st.Answer)
		case AnswerLost:
			if st.Dead {
				return nil
			}
		}
	}
	if fenced == "" {
		return ErrUnfenced
	}
	return nil
}

// Export writes the memory and the devices of a VM that stands frozen to a new file, from
// which QEMU starts it as it was when it was frozen; see export.VM.WriteFile. No engine may
// be at work on the eviction.
func (s Source) Export(ctx context.Context, file string) error {
	e := s.engine(InDoubt)
	e.mark = MarkMayRun // or lost, which makes no difference
	err := e.export(ctx, file)
	e.done(err)
	return err
}

func (e *source) export(ctx context.Context, file string) error {
	if err := e.whole(); err != nil {
		return err
	}
	switch here, err := e.find(ctx); {
	case err != nil:
		return err
	case here == copyGone:
		return errQEMUGone
	case here == copyRunning:
		return errors.New("the VM is not frozen here: it runs")
	}
	head, err := e.recall()
	if err != nil {
		return err
	}
	load, err := e.kept(keptLoad)
	if err != nil {
		return err
	}
	vm := export.VM{Memory: e.mem, Head: head, Load: load}
	return vm.WriteFile(ctx, file, nil)
}

// Tell tells the destination that an operator had the VM resumed at the source, so that it ends its twin, and returns
// whether it has heard that. No engine need be at work on the eviction, and the VM's QEMU is left alone.
func (s Source) Tell(ctx context.Context) (heard bool, err error) {
	e := &source{Source: s}
	a, st, err := e.inquire(ctx, resume{Eviction: s.Eviction, Resumed: true})
	if err != nil {
		return false, err
	}
	a.end()
	switch {
	case st.Dead:
		return true, nil
	case st.Answer == AnswerUnknown:
		return true, fmt.Errorf("it knows nothing of the eviction: look there whether a QEMU of VM %s runs, and end it: %s", s.VM, st.Reason)
	case st.Answer == AnswerComplete:
		return true, fmt.Errorf("it keeps the VM, which is whole there: %s", st.Reason)
	}
	return false, fmt.Errorf("it does not say that its QEMU has ended: %s", st.Reason)
}

// notThere tells whether an error of reaching a QEMU says that it has ended.
func notThere(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, qmp.ErrClosed) || errors.Is(err, errAnother)
}
