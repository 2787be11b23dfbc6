package evict

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"vacate/link"
)

// controlLane hands the frames of a session's control lane on, one at a time.
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

// errFarewell is wrapped by the error for a peer that gave the eviction up. From a
// destination it is the promise that its QEMU never ran the VM and never will.
var errFarewell = errors.New("the other side gave up")

// await waits for a frame of one of the kinds. It fails with the peer's farewell, when
// the session or ctx ends, and when there is a value on failed.
func (c *controlLane) await(ctx context.Context, failed <-chan error, kinds ...uint8) (controlFrame, error) {
	select {
	case f := <-c.frames:
		return f, f.check(kinds...)
	case err := <-failed:
		return controlFrame{}, err
	case <-c.session.Done():
		return controlFrame{}, c.session.Err()
	case <-ctx.Done():
		return controlFrame{}, context.Cause(ctx)
	}
}

// check tells whether the frame is of one of the kinds.
func (f controlFrame) check(kinds ...uint8) error {
	switch {
	case f.err != nil:
		return f.err
	case slices.Contains(kinds, f.kind):
		return nil
	case f.kind == msgAbort, f.kind == msgFailed:
		var bye farewell
		if err := decode(f.payload, &bye); err != nil {
			return err
		}
		if f.kind == msgFailed {
			return fmt.Errorf("the other side failed: %s", bye.Reason)
		}
		return fmt.Errorf("%w: %s", errFarewell, bye.Reason)
	}
	return fmt.Errorf("%w: message %d out of turn", errFrame, f.kind)
}
