package agent

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"vacate/internal/guest/pageclass"
)

// Defaults of Options.
const (
	DefaultDeadline     = time.Second
	DefaultActiveWithin = 16 * time.Second // the paper's
)

var (
	// ErrSilent is wrapped by the error of an agent that did not answer in time.
	ErrSilent = errors.New("no whole answer in time")
	// ErrBroken is wrapped by the error of an answer that breaks the protocol or its bounds.
	ErrBroken = errors.New("the agent's answer is broken")
)

// Options bound an answer.
type Options struct {
	// Frames is the highest guest page frame number plus 1. It bounds the memory that an
	// answer can cost: 10 bytes for each. It must be set for Ask.
	Frames uint64
	// Deadline is how long to wait; default DefaultDeadline. A context may end earlier.
	Deadline time.Duration
	// ActiveWithin is how long ago a process that is active may have run; default
	// DefaultActiveWithin. For Ask.
	ActiveWithin time.Duration
}

// Stats are what an answer cost.
type Stats struct {
	Costs
	Wait    time.Duration // from when the request was sent to when the answer was decoded
	Bytes   int           // of the answer's body
	Skipped int           // bytes before it that belonged to nobody
	// Incomplete says that the agent left things out for want of time or room.
	Incomplete bool
}

// An Agent is a connection to the socket of the guest's port. It serves one call at a time.
type Agent struct {
	conn net.Conn
	buf  []byte // read, not yet used
}

// Dial connects to the unix socket of a QEMU chardev behind the port [PortName]; Find finds
// it. That works whether or not an agent runs. Such a socket serves one client at a time:
// the next connects, but hears nothing.
func Dial(ctx context.Context, path string) (*Agent, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil,
			fmt.Errorf("connect to the agent's socket %s: %w: check the path, and that QEMU "+
				"runs with -chardev socket,path=…,server=on,wait=off", path, fs.ErrNotExist)
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil,
			fmt.Errorf("connect to the agent's socket %s: %w: QEMU has exited and left it behind",
				path, syscall.ECONNREFUSED)
	case err != nil:
		return nil, fmt.Errorf("connect to the agent's socket %s: %w", path, err)
	}
	return &Agent{conn: conn}, nil
}

// Close ends the connection and makes a call under way fail.
func (a *Agent) Close() error { return a.conn.Close() }

// Prepare has the agent clear the accessed bits of the guest's processes, so that an Ask
// some seconds later can tell what was used since. An error wraps ErrSilent, ErrBroken or
// ctx's; the eviction can go on in any case.
func (a *Agent) Prepare(ctx context.Context, o Options) (Stats, error) {
	var st Stats
	err := a.call(ctx, o, Request{Prepare: true, MaxBytes: 64}, typeDone, &st,
		func(body []byte) (err error) {
			st.Costs, err = decodeDone(body)
			return err
		})
	if err != nil {
		return st, fmt.Errorf("prepare the guest's agent: %w", err)
	}
	return st, nil
}

// Ask asks for a survey. The agent aims to be done within three quarters of the deadline,
// and tells less if that is short. The survey is consistent in itself, nothing more: it may
// be wrong in every detail. Errors are as Prepare's.
func (a *Agent) Ask(ctx context.Context, o Options) (*pageclass.Survey, Stats, error) {
	var st Stats
	if o.Frames == 0 || o.Frames > maxFrames {
		return nil, st, fmt.Errorf("ask the guest's agent: bad number of page frames %d", o.Frames)
	}
	var s *pageclass.Survey
	// A page takes a byte or two in the worst survey, its place in the sequence four more.
	most := int(min(1<<20+8*o.Frames, maxAnswer))
	err := a.call(ctx, o, Request{MaxBytes: most}, typeSurvey, &st, func(body []byte) (err error) {
		s, st.Costs, st.Incomplete, err = decodeSurvey(body, o.Frames)
		return err
	})
	if err != nil {
		return nil, st, fmt.Errorf("ask the guest's agent: %w", err)
	}
	return s, st, nil
}

func (a *Agent) call(ctx context.Context, o Options, r Request, want frameType, st *Stats,
	decode func([]byte) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	wait := o.Deadline
	if wait <= 0 {
		wait = DefaultDeadline
	}
	begin := time.Now()
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, end.Sub(begin))
	}
	r.Deadline, r.ActiveWithin, r.Frames = wait, o.ActiveWithin, o.Frames
	if r.ActiveWithin <= 0 {
		r.ActiveWithin = DefaultActiveWithin
	}
	var id [8]byte
	rand.Read(id[:]) // never fails
	r.ID = binary.LittleEndian.Uint64(id[:])

	a.conn.SetDeadline(begin.Add(wait))
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		a.conn.SetDeadline(time.Now())
		close(fired)
	})
	body, typ, err := a.exchange(&r, st)
	if !stop() {
		<-fired
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w (%v): it may not run in the guest, the guest may be too busy, or "+
			"another program may hold the socket", ErrSilent, wait)
	case err != nil:
		return err
	}
	st.Bytes = len(body)
	switch typ {
	case want:
		err = decode(body)
	case typeRefusal:
		return decodeRefusal(body)
	default:
		err = fmt.Errorf("unexpected type %d", typ)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBroken, err)
	}
	st.Wait = time.Since(begin)
	return nil
}

// exchange sends a request and reads until its answer has come. It reads at most twice as
// much as the longest answer: an agent that floods is cut off.
func (a *Agent) exchange(r *Request, st *Stats) ([]byte, frameType, error) {
	if _, err := a.conn.Write(r.Append(nil)); err != nil {
		return nil, 0, fmt.Errorf("send request: %w", err)
	}
	most := max(r.MaxBytes, maxText)
	chunk := make([]byte, 64<<10)
	for {
		h, at, found := findHeader(a.buf)
		for found && h.id != r.ID { // an answer to somebody before us
			st.Skipped += at + 1
			a.buf = a.buf[at+1:]
			h, at, found = findHeader(a.buf)
		}
		a.buf = a.buf[at:]
		if st.Skipped += at; st.Skipped > most {
			return nil, 0, fmt.Errorf("%w: %d bytes that belong to no answer", ErrBroken,
				st.Skipped)
		}
		if found {
			if h.version != version {
				return nil, 0, fmt.Errorf("%w: version %d of the protocol, want %d", ErrBroken,
					h.version, version)
			}
			if uint64(h.length) > uint64(most) {
				return nil, 0, fmt.Errorf("%w: %d bytes, want at most %d", ErrBroken, h.length,
					most)
			}
			if whole := headerSize + int(h.length); len(a.buf) >= whole {
				body := a.buf[headerSize:whole:whole]
				a.buf = a.buf[whole:]
				if checksum(body) != h.bodySum {
					return nil, 0, fmt.Errorf("%w: wrong checksum", ErrBroken)
				}
				return body, h.typ, nil
			}
		}
		n, err := a.conn.Read(chunk)
		a.buf = append(a.buf, chunk[:n]...)
		if err != nil && n == 0 {
			return nil, 0, fmt.Errorf("read answer: %w", err)
		}
	}
}
