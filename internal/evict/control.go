package evict

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"vacate/internal/link"
)

// attachment is one session with the other side, and the tasks that run in it. An eviction has one
// at a time. It has several, one after the other, if the link or an engine fails.
type attachment struct {
	*link.Session
	control *controlLane
	window  *window // source: of the push
	tasks   sync.WaitGroup
}

// attach takes a session over. Frames of its control lane have at most limit bytes.
func attach(s *link.Session, limit int) *attachment {
	a := &attachment{Session: s, control: newControlLane(s)}
	a.tasks.Go(func() { a.control.run(limit) })
	return a
}

// begin starts a task of a lane. If the task fails, the session ends, but the other side first gets
// the chance to say why it ended it.
func (a *attachment) begin(task func() error) {
	a.tasks.Go(func() {
		if err := task(); err != nil {
			a.FailSoon(err)
		}
	})
}

// end closes the session and waits for all its tasks.
func (a *attachment) end() {
	a.Close()
	a.tasks.Wait()
	if a.window != nil {
		a.window.leave()
	}
}

// controlLane passes on the frames of a session's control lane, one at a time.
type controlLane struct {
	*link.Conn
	session *link.Session
	frames  chan controlFrame
}

type controlFrame struct {
	kind    uint8
	payload []byte
	err     error
}

func newControlLane(s *link.Session) *controlLane {
	return &controlLane{s.Lane(link.Control), s, make(chan controlFrame)}
}

// run reads frames of at most limit bytes until the lane ends.
func (c *controlLane) run(limit int) {
	for {
		var f controlFrame
		f.kind, f.payload, f.err = c.Read(nil, limit)
		if f.err == nil && f.kind == msgOpen {
			if f.err = c.Write(msgOpened); f.err == nil {
				continue
			}
		}
		select {
		case c.frames <- f:
		case <-c.session.Done():
			return
		}
		if f.err != nil {
			c.session.Fail(f.err)
			return
		}
	}
}

// errFarewell is wrapped by the error for a peer that gave the eviction up. From a destination, it
// promises that its QEMU never ran the VM and never will.
var errFarewell = errors.New("the other side gave up")

// errFailed is wrapped by the error for a destination that ran the VM and lost it.
var errFailed = errors.New("the other side failed")

// errShutDown is wrapped by the error for a destination whose guest ended itself.
var errShutDown = errors.New("the VM was shut down")

// errDead is wrapped by the error for a destination that says that the twin has ended.
var errDead = errors.New("and its QEMU has ended")

// await waits for a frame of one of the kinds. It fails with the peer's farewell, or when the
// session or ctx ends.
func (c *controlLane) await(ctx context.Context, kinds ...uint8) (controlFrame, error) {
	select {
	case f := <-c.frames:
		return f, f.check(kinds...)
	case <-c.session.Done():
		return controlFrame{}, c.session.Err()
	case <-ctx.Done():
		return controlFrame{}, context.Cause(ctx)
	}
}

// check returns an error if the frame is of none of the kinds.
func (f controlFrame) check(kinds ...uint8) error {
	switch {
	case f.err != nil:
		return f.err
	case slices.Contains(kinds, f.kind):
		return nil
	case f.kind == msgAbort, f.kind == msgFailed, f.kind == msgShutDown:
		var bye farewell
		if err := decode(f.payload, &bye); err != nil {
			return err
		}
		what := map[uint8]error{msgAbort: errFarewell, msgFailed: errFailed,
			msgShutDown: errShutDown}[f.kind]
		if f.kind == msgFailed && bye.Dead {
			return fmt.Errorf("%w, %w: %s", what, errDead, plain(bye.Reason))
		}
		return fmt.Errorf("%w: %s", what, plain(bye.Reason))
	}
	return fmt.Errorf("%w: unexpected message %d", errFrame, f.kind)
}

// saidBy adds the host's name, if it has one, to an error that is shown on another host.
func saidBy(host string, err error) error {
	if host == "" {
		return err
	}
	return fmt.Errorf("host %s: %w", host, err)
}

// Purpose is what a peer wants with a session.
type Purpose uint8

// The purposes.
const (
	ToOffer  Purpose = iota + 1 // a VM
	ToResume                    // an eviction, after the link or an engine failed
	ToAsk                       // something that touches no VM
	ToRelay                     // a stream of QEMU's between two QEMUs
)

// Request is a session whose peer has said what it wants. The caller must hand it to a Destination,
// or end it with Refuse, Answer or Tell.
type Request struct {
	*attachment
	Purpose  Purpose
	Eviction ID // to offer or to resume
	// to offer, to relay: the VM's name at the source, which the peer chooses freely; may be empty
	VM       string
	Question json.RawMessage // to ask

	offer  offer
	resume resume
}

// Domain reports whether the VM to offer is a domain of libvirt.
func (r *Request) Domain() bool { return r.offer.Domain != nil }

// Forced reports whether an operator wants the VM here although this host keeps VMs off.
func (r *Request) Forced() bool { return r.offer.Forced }

// Carried reports whether the VM to offer is a domain that libvirt moves by itself.
func (r *Request) Carried() bool { return r.offer.Carried != nil }

// requestTime is how long a peer may take to say what it wants.
const requestTime = 10 * time.Second

var errSaidNothing = errors.New("the peer did not say what it wants")

// ReadRequest reads what the peer of a new session wants. If that fails, it closes the session.
func ReadRequest(ctx context.Context, s *link.Session) (*Request, error) {
	return readRequest(ctx, s, requestTime, prepareTimeout)
}

// readRequest is ReadRequest from a peer that has so long to say something. A source that has
// begun to prove its paths has longer for its offer: it looks at its VM meanwhile, and may have
// little of a CPU.
func readRequest(all context.Context, s *link.Session, soon, offer time.Duration) (_ *Request,
	err error) {
	ctx, cancel := context.WithTimeoutCause(all, soon, errSaidNothing)
	defer cancel()
	r := &Request{attachment: attach(s, maxControl)}
	defer func() {
		if err != nil {
			r.end()
		}
	}()
	f, err := r.control.await(ctx, msgOffer, msgResume, msgAsk, msgRelay, msgFill, msgProve)
	if err == nil && f.kind == msgProve {
		if err := r.answerProof(ctx, f.payload); err != nil {
			return nil, err
		}
		patient, stop := context.WithTimeoutCause(all, offer, errSaidNothing)
		f, err = r.control.await(patient, msgOffer)
		stop()
	}
	for left := maxFill; err == nil &&
		f.kind == msgFill; f, err = r.control.await(ctx, msgAsk, msgFill) {
		if left -= len(f.payload); left < 0 || len(f.payload) == 0 {
			return nil, fmt.Errorf("%w: too many bytes ahead of a question", errFrame)
		}
	}
	if err != nil {
		return nil, err
	}
	if len(f.payload) > maxJSON {
		return nil, fmt.Errorf("%w: a request of %d bytes", errFrame, len(f.payload))
	}
	switch f.kind {
	case msgOffer:
		if err = decode(f.payload, &r.offer); err == nil {
			err = r.offer.check()
		}
		r.Purpose, r.Eviction, r.VM = ToOffer, r.offer.Eviction, r.offer.VM
	case msgResume:
		err = decode(f.payload, &r.resume)
		r.Purpose, r.Eviction = ToResume, r.resume.Eviction
		if err == nil && r.resume.Committed && r.resume.Resumed {
			err = fmt.Errorf("%w: an eviction that is both committed and resumed at the source",
				errFrame)
		}
	case msgRelay:
		var what relayed
		err = decode(f.payload, &what)
		r.Purpose, r.VM = ToRelay, what.VM
	case msgAsk:
		r.Purpose = ToAsk
		if r.Question = f.payload; !json.Valid(f.payload) {
			err = fmt.Errorf("%w: a question that is not JSON", errFrame)
		}
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// tellWaiting is how often a destination tells the source what its offer waits for.
const tellWaiting = time.Second

// While runs do, which must end before an offer can be accepted or refused and may take long.
// Meanwhile it keeps telling the source what the host is doing. The ctx of do ends when the source
// gives up.
func (r *Request) While(ctx context.Context, what string, do func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var telling sync.WaitGroup
	done := make(chan struct{})
	telling.Go(func() {
		tick := time.NewTicker(tellWaiting)
		defer tick.Stop()
		for {
			if err := writeJSON(r.control.Conn, msgWaiting, waiting{what}); err != nil {
				r.Fail(err)
			}
			select {
			case <-tick.C:
			case <-done:
				return
			case f := <-r.control.frames: // the source may only give up
				r.Fail(f.check())
			case <-r.Done():
				cancel(r.Err())
				return
			}
		}
	})
	err := do(ctx)
	close(done)
	telling.Wait()
	if err == nil && r.Err() != nil {
		err = r.Err()
	}
	return err
}

// ResumedThere reports whether the peer says that the VM runs there again by an operator's
// decision. The twin here must then end.
func (r *Request) ResumedThere() bool { return r.Purpose == ToResume && r.resume.Resumed }

// Refuse turns the peer away with a reason, and ends the session. To an offer, it promises that the
// VM will not run here.
func (r *Request) Refuse(reason error) {
	if r.Purpose == ToResume {
		r.Answer(AnswerNone, reason.Error(), false, nil)
		return
	}
	writeJSON(r.control.Conn, msgAbort, farewell{Reason: reason.Error()})
	r.end()
}

// Answer answers a source that wants to resume an eviction on which no engine works here, and ends
// the session. dead says that the twin has ended. received is what Destination returned; only a
// complete eviction needs it. Answer reports whether the source confirmed that it heard how the
// eviction ended. If it was complete, the caller must then keep KeptHeard.
func (r *Request) Answer(a Answer, reason string, dead bool, received *Received) (heard bool) {
	st := status{Answer: a, Reason: reason, Dead: dead, Summary: received}
	writeJSON(r.control.Conn, msgStatus, st)
	return r.linger()
}

// Tell answers a question and ends the session.
func (r *Request) Tell(answer any) error {
	err := writeJSON(r.control.Conn, msgAnswer, answer)
	r.linger()
	return err
}

// linger ends the session when the peer has ended it, or after a while: closing sooner could lose
// what was said. It reports whether the peer has heard that.
func (r *Request) linger() (heard bool) {
	select {
	case f := <-r.control.frames:
		heard = f.check(msgHeard) == nil
	case <-r.Done():
	case <-time.After(requestTime):
	}
	r.end()
	return heard
}

// Ask sends a question, which is the caller's JSON, to the host behind a new session, and returns
// the answer. It first sends fill bytes of zeroes, at most maxFill, which the other side reads
// first: that measures the link. It closes the session.
func Ask(ctx context.Context, s *link.Session, fill int, question any, answer any) error {
	a := attach(s, maxJSON)
	defer a.end()
	for nothing := make([]byte, min(fill, maxBatch)); fill > 0; fill -= len(nothing) {
		nothing = nothing[:min(fill, len(nothing))]
		if err := a.control.Write(msgFill, nothing); err != nil {
			return err
		}
	}
	if err := writeJSON(a.control.Conn, msgAsk, question); err != nil {
		return err
	}
	f, err := a.control.await(ctx, msgAnswer)
	if err != nil {
		return err
	}
	return decode(f.payload, answer)
}

// Requests accepts sessions, reads what their peers want, and passes that on by the channel that it
// returns. It stops when ctx is done. The function that it returns waits for all that was started,
// and ends the sessions of requests that nobody took.
//
// When accept fails, stopped gets the error and no more sessions come. turnedAway gets the errors
// of peers that did not say anything useful.
func Requests(ctx context.Context, accept func(context.Context) (*link.Session, error),
	turnedAway func(peer string, err error), stopped func(error)) (<-chan *Request, func()) {
	ctx, cancel := context.WithCancel(ctx)
	requests := make(chan *Request)
	var tasks sync.WaitGroup
	tasks.Go(func() {
		for {
			s, err := accept(ctx)
			if err != nil {
				if ctx.Err() == nil {
					stopped(err)
				}
				return
			}
			tasks.Go(func() {
				r, err := ReadRequest(ctx, s)
				if err != nil {
					turnedAway(s.Peer(), err)
					return
				}
				select {
				case requests <- r:
				case <-ctx.Done():
					r.end()
				}
			})
		}
	})
	return requests, func() {
		cancel()
		tasks.Wait()
	}
}
