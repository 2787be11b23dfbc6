package evict

import (
	"context"
	"errors"
	"fmt"

	"vacate/internal/qemu/fit"
)

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

// Decide does what an operator decided of an eviction whose last mark is m. No engine may be at
// work on it. For ResumeHere, fenced is why the twin is dead for good, in words: who asserts it. It
// may be empty where the destination has said so itself. The destination is asked once more, and
// what it says counts more; whether it has heard of the decision is left to Tell.
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
		return e.owner.discard(ctx, e.qemu)
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
		announce(ctx, e.owner.monitor(), e.Log)
	}
	return err
}

// askOnce makes sure that the operator's word, which is fenced, is not contradicted by the
// destination. It does not go on with the eviction, whatever the answer.
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

// Tell tells the destination that an operator had the VM resumed at the source, so that it ends its
// twin, and returns whether it has heard that. No engine need be at work on the eviction, and the
// VM's QEMU is left alone.
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
			fmt.Errorf("it knows nothing of the eviction: look there whether a QEMU of VM %s "+
				"runs, and end it: %s", s.VM, st.Reason)
	case st.Answer == AnswerComplete:
		return true, fmt.Errorf("it keeps the VM, which is whole there: %s", st.Reason)
	}
	return false, fmt.Errorf("it does not say that its QEMU has ended: %s", st.Reason)
}
