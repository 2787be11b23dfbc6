package evict

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"vacate/internal/link"
)

// A path may carry small packets and lose large ones: a tunnel takes some bytes of each, and a
// firewall drops the messages that would say so. Then the set-up succeeds, and the first page is
// lost. So the source proves the path before it touches the VM: frames longer than any packet cross
// each lane, both ways, beside the other preparations.
const (
	proofBytes = 64 << 10
	// proofTime is how long the proof may take, and provenTime the destination's part of it.
	proofTime  = 8 * time.Second
	provenTime = 6 * time.Second
	// lossTime is how long it takes at least to give up a connection that loses packets.
	lossTime = 2 * time.Second
)

// prove proves the path to the destination. If that fails, it ends the session.
func (a *attachment) prove(ctx context.Context) error {
	filler := make([]byte, proofBytes)
	rand.Read(filler) // never fails; compressible data would prove nothing
	return a.cross(ctx, proofTime,
		func(ctx context.Context) error {
			if err := a.control.Write(msgProve, filler); err != nil {
				return err
			}
			f, err := a.control.await(ctx, msgProve)
			if err == nil && len(f.payload) != proofBytes {
				err = fmt.Errorf("%w: a proof of %d bytes", errFrame, len(f.payload))
			}
			return err
		},
		func(lane *link.Conn) error {
			if err := lane.Write(frameProof, filler); err != nil {
				return err
			}
			return readProof(lane, nil)
		})
}

// answerProof is the destination's part, once the frame on the control lane has come.
func (a *attachment) answerProof(ctx context.Context, proof []byte) error {
	if len(proof) != proofBytes {
		return fmt.Errorf("%w: a proof of %d bytes", errFrame, len(proof))
	}
	return a.cross(ctx, provenTime,
		func(context.Context) error { return a.control.Write(msgProve, proof) },
		func(lane *link.Conn) error {
			buf := make([]byte, proofBytes)
			if err := readProof(lane, buf); err != nil {
				return err
			}
			return lane.Write(frameProof, buf)
		})
}

func readProof(lane *link.Conn, buf []byte) error {
	kind, payload, err := lane.Read(buf, proofBytes)
	if err == nil && (kind != frameProof || len(payload) != proofBytes) {
		err = fmt.Errorf("%w: type %d of %d bytes for a proof", errFrame, kind, len(payload))
	}
	return err
}

// cross runs a function for the control lane and one for each other lane, at the same time, within
// a limit. If any fails, it ends the session.
func (a *attachment) cross(ctx context.Context, limit time.Duration,
	control func(context.Context) error, each func(*link.Conn) error) error {
	begun := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errProof)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { a.Fail(context.Cause(ctx)) })
	defer stop()
	on := func(name string, do func() error) func() error {
		return func() error {
			err := do()
			if errors.Is(err, net.ErrClosed) && a.Err() != nil {
				err = a.Err()
			}
			if err == nil {
				return nil
			}
			if lossy(err, time.Since(begun)) {
				err = &lossError{a.Peer(), name, err}
			}
			if name == link.Control.String() {
				// the others may fail because the peer gave up, and it says so on the control lane
				a.Fail(err)
			} else {
				a.FailSoon(err)
			}
			return err
		}
	}
	err := together(
		on(link.Control.String(), func() error { return control(ctx) }),
		on(link.Push.String(), func() error { return each(a.Lane(link.Push)) }),
		on(link.Fetch.String(), func() error { return each(a.Lane(link.Fetch)) }))
	if err != nil {
		a.Fail(err)
	}
	return err
}

var errProof = errors.New("it took too long")

// lossy reports whether an error of a lane means that a large frame was lost. after is the time
// since that was sent.
func lossy(err error, after time.Duration) bool {
	if errors.Is(err, errProof) || errors.Is(err, syscall.ETIMEDOUT) {
		return true
	}
	return after >= lossTime &&
		(errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE))
}

// lossError says that small frames came through, and large ones did not.
type lossError struct {
	peer string // an address
	lane string
	err  error
}

func (e *lossError) Error() string {
	host, _, err := net.SplitHostPort(e.peer)
	if err != nil {
		host = e.peer
	}
	slow := ""
	if errors.Is(e.err, errProof) {
		slow = ", or is slower than 300 kbit/s"
	}
	return fmt.Sprintf(
		"the path to %s loses large packets%s: small frames pass on the %s lane, and one of %d "+
			"KiB does not (%v). "+
			"Check the MTU at both ends and on the way (`ip link`; a firewall that drops ICMP "+
			"\"fragmentation needed\" hides what is wrong): `ping -M do -s 1472 %[1]s`",
		host, slow, e.lane, proofBytes>>10, e.err)
}

func (e *lossError) Unwrap() error { return e.err }

const (
	// packageBytes is about the size of the state of many devices.
	packageBytes = 256 << 10
	// mostOpening bounds how much is sent to open TCP's window.
	mostOpening = 1 << 20
)

// openWindow sends as many bytes over the control lane as will soon cross it while the VM stands
// still: the device state, and n bytes of pages ahead of it. TCP begins with 15 KB a round trip and
// doubles that with each, also after a pause. So it finds out now, while the VM runs, that the path
// carries more.
func (c *controlLane) openWindow(ctx context.Context, n uint64) error {
	filler := make([]byte, packageBytes+min(n, mostOpening-packageBytes))
	rand.Read(filler)
	if err := c.Write(msgOpen, filler); err != nil {
		return err
	}
	_, err := c.await(ctx, msgOpened)
	return err
}
