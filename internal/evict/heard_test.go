package evict

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"testing"
)

// oneJournal accepts everything, and returns it.
type oneJournal struct {
	marks []Mark
	kept  map[string][]byte
}

func (j *oneJournal) Note(m Mark, _ string) error {
	j.marks = append(j.marks, m)
	return nil
}

func (j *oneJournal) Keep(name string, b []byte) error {
	j.kept[name] = b
	return nil
}

func (j *oneJournal) Kept(name string) ([]byte, error) {
	if b, ok := j.kept[name]; ok {
		return b, nil
	}
	return nil, fs.ErrNotExist
}

// A source that lost its QEMU, and hears that the destination has every page, has lost nothing. The
// destination hears that no more pages come, and records that the source knows.
func TestCompleteIsHeard(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(s *source) error
	}{
		{"in the session that it failed in", func(s *source) error {
			_, err := s.lostHere(errQEMUGone)
			return err
		}},
		{"while it waits for the end", func(s *source) error {
			_, err := s.await(context.Background())
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := sessionPair(t)
			ours, theirs := &oneJournal{kept: map[string][]byte{}}, &oneJournal{
				kept: map[string][]byte{}}
			s := Source{Journal: ours}.engine(Pushing)
			s.at.Store(attach(near, maxJSON))
			d := Destination{Journal: theirs}.engine(Completing)
			defer d.close()
			d.at.Store(attach(far, maxControl))
			told := make(chan struct{})
			go func() {
				defer close(told)
				d.say(msgComplete, Received{Fetches: 7})
				d.awaitHeard(nil, nil)
			}()
			report, err := s.done(c.end(s))
			<-told
			if err != nil || report.Outcome != string(Completed) ||
				!slices.Equal(ours.marks, []Mark{MarkCompleted}) || s.heard.summary.Fetches != 7 {
				t.Errorf("the source ends as %q, %v, with marks %q and %+v", report.Outcome, err,
					ours.marks, s.heard.summary)
			}
			if _, err := theirs.Kept(KeptHeard); err != nil {
				t.Errorf("the destination does not keep it that the source knows: %v", err)
			}
		})
	}
}

// A source that comes back, and hears that the VM is whole, confirms that. A source that breaks off
// does not.
func TestCompleteIsHeardAsAnAnswer(t *testing.T) {
	for _, says := range []bool{true, false} {
		near, far := sessionPair(t)
		theirs := &oneJournal{kept: map[string][]byte{}}
		d := Destination{Journal: theirs}.engine(Completing)
		_, old := sessionPair(t)
		d.at.Store(attach(old, maxControl))
		a := attach(near, maxJSON)
		go func() {
			a.control.await(t.Context(), msgStatus)
			if says {
				a.control.Write(msgHeard)
			}
			a.end()
		}()
		d.rejoin <- &Request{attachment: attach(far, maxControl), Purpose: ToResume}
		d.awaitHeard(nil, func(r *Request) bool { return r.Answer(AnswerComplete, "", false, nil) })
		d.close()
		if _, err := theirs.Kept(KeptHeard); says != (err == nil) ||
			err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a source that says that it has heard (%v): kept %v", says, err)
		}
	}
}

// A source that lost its QEMU ends only when the destination has heard that no more pages come.
func TestLostIsHeard(t *testing.T) {
	near, far := sessionPair(t)
	s := Source{}.engine(Pushing)
	s.at.Store(attach(near, maxJSON))
	cut := errors.New("the link is cut")
	far.Fail(cut)
	if done, err := s.lostHere(errQEMUGone); done || err == nil || s.machine.current() != Pushing {
		t.Errorf("done: %v, %v, in state %s; nobody heard it", done, err, s.machine.current())
	}
	near, far = sessionPair(t)
	s.at.Store(attach(near, maxJSON))
	a := attach(far, maxControl)
	told := make(chan error)
	go func() {
		_, err := a.control.await(t.Context())
		writeJSON(a.control.Conn, msgFailed, farewell{})
		told <- err
	}()
	if done, err := s.lostHere(errQEMUGone); !done || !errors.Is(err, ErrLost) {
		t.Errorf("done: %v, %v", done, err)
	}
	if err := <-told; !errors.Is(err, errFailed) {
		t.Errorf("the destination heard %v", err)
	}
	s.done(nil)
}
