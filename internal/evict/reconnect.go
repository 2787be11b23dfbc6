package evict

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/qmp"
)

// How long a source waits before it tries to reach the destination again, and for answers.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = time.Second
	answerTime = 10 * time.Second
	// connectTime is how long a new session may take to be made.
	connectTime = 5 * time.Second
)

// Gap is a period in which a committed eviction had no link.
type Gap struct {
	At    float64 `json:"at_s"`   // since the start
	For   float64 `json:"for_s"`  // until pages were sent again, or none were needed
	Again int     `json:"again"`  // pages that were on their way and were sent once more
	Why   string  `json:"reason"` // of the first failure
}

// seeThrough completes a committed eviction, through any number of sessions. why is the reason for
// which the present session has failed; nil if it pushes pages.
func (e *source) seeThrough(ctx context.Context, why error) error {
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
		e.Log.Warn("cannot reach the destination; the VM stays frozen here, and its pages wait",
			"error", why)
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
				err = decode(f.payload, &e.heard.summary)
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
			if e.departures.settled() < int(e.departures.total.Load()) {
				return e.lostHere(context.Cause(e.life))
			}
			return false, context.Cause(e.life) // the destination may have all pages: ask it
		case <-left.Done():
			return true, e.left()
		}
	}
}

// hearShort notes whether the destination has memory for pages.
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
	e.heard.short.set(text)
	e.show("")
	return nil
}

// reach makes sessions with the destination until it has said what became of the eviction, and acts
// on the answer. If it returns without done, pages are pushed again.
func (e *source) reach(left context.Context, why error) (done bool, err error) {
	since := time.Now()
	again := 0
	e.heard.apart.set("")
	defer func() {
		if !errors.Is(err, ErrLeft) {
			e.sessions.gap(Gap{since.Sub(e.started).Seconds(), time.Since(since).Seconds(), again,
				why.Error()})
		}
	}()
	pause := time.Duration(0)
	for {
		// This happens even if the QEMU here has ended. The destination may have every page
		// already. If not, it must know that no more will come.
		select {
		case <-time.After(pause):
		case <-left.Done():
			return true, e.left()
		}
		pause = min(max(2*pause, firstPause), lastPause)
		a, st, err := e.inquire(left, resume{Eviction: e.Eviction, Committed: true})
		if err != nil && e.Carried != nil && time.Since(since) > CarriedPatience {
			return true, e.lost(errors.Join(why, err), "")
		}
		if err != nil {
			e.Log.Debug("cannot ask the destination", "error", err)
			e.heard.noteApart(err.Error())
			continue
		}
		here := copyPaused
		if e.life.Err() != nil {
			here = copyGone
		}
		switch next := sourceOnAnswer(here, e.heard.ran, st.Answer); next {
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
				e.heard.summary = *st.Summary
			}
			e.at.Store(a) // by this session the destination is told that the source has heard
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
			return true, e.lost(fmt.Errorf("the destination answers %q, which cannot be true",
				st.Answer), e.frozenRemedy())
		default:
			e.end(a)
			e.Log.Warn("the destination does not know what became of the VM; it stays frozen here",
				"answer", st.Answer, "reason", st.Reason)
			e.heard.noteApart(st.Reason)
			pause = lastPause
		}
	}
}

// inquire makes a new session, sends why, and returns what the destination says of the eviction.
func (e *source) inquire(left context.Context, why resume) (*attachment, status, error) {
	ctx, cancel := context.WithTimeout(left, connectTime)
	defer cancel()
	s, err := e.Connect(ctx)
	if err != nil {
		return nil, status{}, err
	}
	a := attach(s, maxPresent/8+runSize)
	st, err := func() (st status, err error) {
		if err := writeJSON(a.control.Conn, msgResume, why); err != nil {
			return st, err
		}
		ctx, cancel := context.WithTimeoutCause(context.Background(), answerTime,
			errors.New("the destination does not answer"))
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

// rejoin learns which pages the destination has, and pushes the others in a new session. The VM has
// run there for the time ran. It returns how many pages were sent before and must be sent again.
func (e *source) rejoin(a *attachment, ran time.Duration) (again int, err error) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), answerTime,
		errors.New("the destination does not say which pages it has"))
	defer cancel()
	l := e.image.frozen.layout
	has := make([]*pageset.Set, len(l))
	for i, b := range l {
		has[i] = pageset.New(b.Pages)
	}
	for {
		f, err := a.control.await(ctx, msgPresent, msgReady)
		if err != nil {
			return 0, err
		}
		if f.kind == msgReady {
			break
		}
		if err := l.parsePresent(f.payload, has); err != nil {
			return 0, err
		}
	}
	skipped, again := e.departures.rejoin(has)
	e.heard.ran = true
	e.heard.noteRan(ran, e.machine)
	a.window = e.Path.join(migstream.TargetPageSize, e.Limit, e.Yield)
	e.at.Store(a)
	a.begin(func() error { return e.serveFetches(a) })
	a.begin(func() error {
		if err := errors.Join(sendSkipped(a, join(skipped)), e.image.sendHuge(a)); err != nil {
			return err
		}
		e.beginPush(a)
		e.beginGiveBack(a)
		return nil
	})
	return again, nil
}

// join merges adjacent runs of pages.
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
	e.heard.short.set("") // the destination says it anew
	if a := e.at.Load(); a != nil {
		a.Fail(why)
		e.end(a)
	}
}

// end ends a session, and keeps its figures for the report.
func (e *source) end(a *attachment) {
	a.end()
	e.sessions.end(a)
}

// notThere reports whether an error of reaching a QEMU says that it has ended.
func notThere(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) ||
		errors.Is(err, qmp.ErrClosed) || errors.Is(err, errAnother)
}
