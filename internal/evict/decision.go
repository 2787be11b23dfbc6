package evict

import (
	"context"
	"errors"
	"fmt"

	"vacate/internal/qemu/fit"
)

// A Decision is what an operator decides about a frozen VM.
type Decision string

// The decisions.
const (
	// ResumeHere resumes the VM at the source, in its state at the freeze. An operator who decides
	// this knows that the VM is gone at the destination, and that nobody starts it there.
	ResumeHere Decision = "resume-here"
	// Discard gives up the copy at the source. An operator who decides this knows that the VM is
	// whole at the destination, or accepts its loss.
	Discard Decision = "discard"
)

// ErrUndecided is wrapped by the error of Decide when it cannot write the decision to the journal.
// After a crash the decision may turn out to be there, so nobody may go on as if it had not been
// made.
var ErrUndecided = errors.New("cannot write the decision to the journal: make room and decide " +
	"again")

// ErrAnswers is wrapped by the error of Decide when the destination still answers for the VM.
var ErrAnswers = errors.New("the destination answers for the VM")

// ErrUnfenced is wrapped by the error of Decide when nobody asserts that the twin is dead.
var ErrUnfenced = errors.New("nobody has asserted that the VM is dead on the destination")

// Decide carries out an operator's decision about an eviction whose last mark is m. No engine may
// be at work on it. For ResumeHere, fenced says in words who asserts that the twin is dead for
// good. It may be empty if the destination has said so itself. Decide asks the destination once
// more, whose answer counts more. It leaves it to Tell to tell the destination of the decision.
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
		// A destination that answers needs the copy, or ends the eviction by itself.
		if e.mark == MarkMayRun && !DeadThere(e.Journal) {
			if err := e.askOnce(ctx, ""); errors.Is(err, ErrAnswers) {
				return err
			}
		}
		if err := note(e.Journal, MarkDiscarded, "the operator decided so"); err != nil {
			return fmt.Errorf("%w: %w", ErrUndecided, err)
		}
		return e.owner.discard(ctx, e.qemu)
	}
	return fmt.Errorf("decision %q: there are %s and %s", d, ResumeHere, Discard)
}

// resumeHere resumes the guest here by the operator's decision.
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
	// A twin that is still alive may hold the locks of the disks.
	if heard, err := e.Tell(ctx); !heard {
		e.Log.Info("the destination has not heard yet that the VM goes on here", "error", err)
	}
	now, err := e.resume(ctx)
	if err == nil && now.Running {
		announce(ctx, e.owner.monitor(), e.Log)
	}
	return err
}

// askOnce makes sure that the destination does not contradict the operator's assertion in fenced.
// It does not go on with the eviction, whatever the answer.
func (e *source) askOnce(ctx context.Context, fenced string) error {
	a, st, err := e.inquire(ctx, resume{Eviction: e.Eviction})
	if err == nil {
		a.end()
		switch st.Answer {
		case AnswerRunning, AnswerPaused, AnswerComplete, AnswerShutDown:
			return fmt.Errorf("%w: it says %q", ErrAnswers, st.Answer)
		case AnswerNeverRan:
			return fmt.Errorf("%w: it says %q, so that the VM comes back by itself", ErrAnswers,
				st.Answer)
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

// Tell tells the destination that an operator resumed the VM at the source, so that it ends its
// twin. It reports whether the destination has heard that. It needs no engine at work on the
// eviction, and does not touch the VM's QEMU.
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
		return true,
			fmt.Errorf("it does not know the eviction: if a QEMU of VM %s runs there, end it: %s",
				s.VM, st.Reason)
	case st.Answer == AnswerComplete:
		return true, fmt.Errorf("it keeps the VM, which is whole there: %s", st.Reason)
	}
	return false, fmt.Errorf("it does not say that its QEMU has ended: %s", st.Reason)
}
