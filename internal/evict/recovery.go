package evict

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"vacate/internal/qemu/migstream"
)

// stream is our end of the migration that a twin takes.
type stream struct {
	conn   net.Conn
	pongs  chan uint32
	ended  chan struct{} // closed when QEMU has ended its migration
	status uint32        // with which it did; set before ended is closed
	broken chan struct{} // closed when the stream is of no more use
	once   sync.Once
	why    error // set before broken is closed
	reader sync.WaitGroup
}

func newStream(conn net.Conn) *stream {
	return &stream{conn: conn, pongs: make(chan uint32, 16), ended: make(chan struct{}),
		broken: make(chan struct{})}
}

// fail notes that the stream broke. Only the first reason counts.
func (s *stream) fail(err error) {
	s.once.Do(func() {
		s.why = err
		close(s.broken)
		s.conn.Close()
	})
}

// recovery is the stream of a twin, and how a twin whose stream broke gets another.
//
// The present stream is replaced by serve alone, but read by the tasks of a session: so it is
// atomic. The rest belongs to who mends the stream, and to serve while nobody does: the two hand it
// over by the channel that mend's result goes through, and need no lock.
type recovery struct {
	owner   twinOwner
	present atomic.Pointer[stream] // nil while it is broken
	starved bool                   // QEMU's own loader found no memory
	pending bool                   // the twin was not told to run the VM yet
}

// stream is the present stream; nil while it is broken.
func (r *recovery) stream() *stream { return r.present.Load() }

// errCompleted says that QEMU has ended its migration, which it is told to when it has all pages.
var errCompleted = errors.New("the migration is complete")

const (
	recoverFD   = "vacate-recover"
	recoverTime = 5 * time.Second
	mendPause   = time.Second // after an attempt that failed
)

// mended is a new stream to QEMU.
type mended struct {
	renewed
	r *migstream.ReturnReader // of its return path
	// by block, a bit for each of 4 KiB that QEMU has taken from streams
	bitmaps map[string][]byte
	silent  bool // QEMU did not answer in time
	err     error
}

// mend takes QEMU's migration up again by its post-copy recovery: QEMU gets a new stream, tells
// which pages it has, and once more for which it waits. It is called while there is no stream.
func (r *recovery) mend(life context.Context, l layout) mended {
	m := r.recover(life, l)
	if m.err != nil && !errors.Is(m.err, errCompleted) {
		select {
		case <-time.After(mendPause):
		case <-life.Done():
		}
	}
	return m
}

var errSilent = errors.New("QEMU does not answer: it may wait for a page itself")

func (r *recovery) recover(life context.Context, l layout) (m mended) {
	ctx, cancel := context.WithTimeoutCause(life, recoverTime, errSilent)
	defer cancel()
	defer func() { m.silent = m.err != nil && errors.Is(context.Cause(ctx), errSilent) }()
	var hello []byte
	most := 0
	for _, b := range l {
		hello = migstream.RecvBitmapCommand(b.Name).Append(hello)
		most = max(most, int(b.Length/migstream.TargetPageSize))
	}
	hello = migstream.Command{ID: migstream.CmdPostcopyResume}.Append(hello)
	if m.renewed, m.err = r.owner.renew(ctx, hello); m.err != nil || m.over != "" {
		return m
	}
	if m.err = m.handshake(ctx, most); m.err != nil {
		m.conn.Close()
	}
	return m
}

// handshake hears what QEMU says when it takes its migration up. A block has at most so many pages
// of 4 KiB.
func (m *mended) handshake(ctx context.Context, most int) error {
	stop := context.AfterFunc(ctx, func() { m.conn.SetDeadline(time.Unix(1, 0)) })
	m.r, m.bitmaps = migstream.NewReturnReader(m.conn, most), map[string][]byte{}
	for {
		msg, err := m.r.Next()
		if err != nil {
			return fmt.Errorf("QEMU's recovery: %w", errors.Join(err, context.Cause(ctx)))
		}
		switch msg.Type {
		case migstream.MsgRecvBitmap:
			m.bitmaps[msg.Block] = msg.Bitmap
		case migstream.MsgResumeAck:
			if !stop() {
				return context.Cause(ctx)
			}
			return nil
		}
	}
}
