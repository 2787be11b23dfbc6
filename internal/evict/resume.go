package evict

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/sys/process"
)

// Resume continues an eviction that another engine left, or during which it died. m is its last
// mark in the journal. Resume rolls back an eviction that was not committed, and completes the
// others. It ends as Evict does after the commit.
func (s Source) Resume(ctx context.Context, m Mark) (Report, error) {
	first := InDoubt
	if m == MarkBegun || m == MarkRolledBack {
		first = RollingBack
	}
	e := s.engine(first)
	return e.done(e.takeUp(ctx, m))
}

var errEngineDied = errors.New("the engine died")

// takeUp does the work of Resume.
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
	e.heard.ran = e.giving.begun.Load() // the engine gives nothing back before that
	if m == MarkShutDown {
		e.heard.shutDown = errShutDown.Error()
	}
	switch sourceStep(m, here) {
	case stepRollBack:
		if e.giving.begun.Load() {
			return e.lost(fmt.Errorf("%w; and it runs", ErrGivenBack),
				"Pause it, and find out whether the VM is on the destination")
		}
		return e.rollBack(errEngineDied)
	case stepAsk:
		if here == copyPaused {
			if err := e.reopen(); err != nil {
				return &Error{ErrLeft, e.machine.current(), err, e.frozenRemedy()}
			}
		}
		return e.seeThrough(ctx, errEngineDied)
	case stepLose:
		e.keepHere()
		return e.lost(errEngineDied,
			"The VM's QEMU ended, and so did the VM; the destination never ran it. Start it anew")
	case stepRetire:
		<-e.kill()
		return nil
	case stepHold:
		return e.lost(errors.New("the journal says that the VM moved away, but it runs here"),
			"Nothing was touched. Check whether it runs on the destination, too")
	}
	// What follows the mark may not have been done.
	switch {
	case m == MarkRolledBack || m == MarkResumedHere:
		e.keepHere()
	case here == copyGone && (m == MarkCompleted || m == MarkShutDown):
		<-e.kill()
	}
	return nil
}

// keepHere gives the VM back to its owner, as it stays here.
func (e *source) keepHere() {
	ctx, cancel := context.WithTimeout(context.Background(), rollbackTime)
	defer cancel()
	if err := e.owner.release(ctx); err != nil && !notThere(err) { // else QEMU took it along
		e.Log.Warn("the VM stays here, and is not all that it was", "error", err)
	}
}

// whole calls Whole, and remembers the result.
func (e *source) whole() error {
	if e.Journal == nil {
		return nil
	}
	err := Whole(e.Journal)
	e.giving.begun.Store(errors.Is(err, ErrGivenBack))
	return err
}

// find finds out what the VM's QEMU does. If its process is stopped, it cannot answer: the VM is
// frozen.
func (e *source) find(ctx context.Context) (copyState, error) {
	b, err := e.kept(keptFacts)
	if err == nil {
		e.facts, err = parseFacts(b)
		e.halted.stands.set(e.facts.Stood)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // without facts the VM was not touched yet
		return copyGone, err
	}
	if e.qemu = e.Process; e.qemu == (process.Process{}) {
		e.qemu = e.facts.Process
	}
	if e.qemu != (process.Process{}) {
		switch e.halted.held, err = e.qemu.Stopped(); {
		case errors.Is(err, process.ErrGone):
			e.die(errQEMUGone)
			return copyGone, nil
		case err != nil:
			return copyGone, err
		}
		e.watch()
		if e.halted.held {
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
		pid, _, err := e.owner.monitor().Process(ctx)
		if err != nil {
			return copyGone, err
		}
		if e.qemu, err = process.Find(pid); err != nil {
			return copyGone, err
		}
	}
	// Otherwise somebody may have let the stopped process continue.
	stop := e.mark == MarkMayRun || e.mark == MarkLost
	here, err := e.owner.catch(ctx, e.qemu, stop)
	e.halted.held = stop && here == copyPaused
	return here, err
}

// reopen gets ready to send the frozen VM's pages once more.
func (e *source) reopen() error {
	if _, err := e.recall(); err != nil {
		return err
	}
	e.halted.at.Store(&e.started)
	if e.giving.begun.Load() {
		return nil // the rest of the guest does not show what its pages are used for
	}
	e.survey.noAgent = errors.New("the guest stands still")
	e.tasks.Go(e.enlighten)
	return nil
}

// recall reads from the journal what describes the frozen VM, and returns the head of its stream.
func (e *source) recall() (head []byte, err error) {
	e.proposal.offer.Machine, e.proposal.offer.QEMU = e.facts.Machine, e.facts.QEMU
	e.image.registers.Store(&e.facts.Registers)
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
	e.image.pushed, e.image.fetched = newFrame(e.mem), newFrame(e.mem)
	return head, e.layOut(l)
}

func (e *source) kept(name string) ([]byte, error) {
	if e.Journal == nil {
		return nil, errors.New("an eviction cannot be resumed without a journal")
	}
	return e.Journal.Kept(name)
}
