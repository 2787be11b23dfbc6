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

// stream is the engine's end of the migration that a twin takes.
type stream struct {
	conn   net.Conn
	pongs  chan uint32
	ended  chan struct{} // closed when QEMU has ended its migration
	status uint32        // QEMU's result; set before ended is closed
	broken chan struct{} // closed when the stream cannot be used any more
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

// recovery holds the stream of a twin, and replaces one that broke.
//
// Only serve replaces the present stream, but the tasks of a session read it: so it is atomic. mend
// owns starved and pending while it works, and serve otherwise. They pass them on by the channel of
// mend's result, so the fields need no lock.
type recovery struct {
	owner   twinOwner
	present atomic.Pointer[stream] // nil while it is broken
	starved bool                   // QEMU's own loader found no memory
	pending bool                   // the twin was not told to run the VM yet
	mending <-chan mended          // serve's: gets mend's result; nil while mend does not work
	// QEMU has asked another engine for pages, and does not ask again.
	unasked atomic.Bool
}

// stream returns the present stream; nil while it is broken.
func (r *recovery) stream() *stream { return r.present.Load() }

// still waits until mend does not use the QEMU's monitor.
func (r *recovery) still() {
	if r.mending == nil {
		return
	}
	if m := <-r.mending; m.conn != nil {
		m.conn.Close()
	}
	r.mending = nil
}

// errCompleted says that QEMU has ended its migration, as the engine told it to once it had all
// pages.
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
	// by block, a bit for each 4 KiB that QEMU has received by streams
	bitmaps map[string][]byte
	silent  bool // QEMU did not answer in time
	err     error
}

// mend resumes QEMU's migration by QEMU's post-copy recovery. QEMU gets a new stream. It reports
// which pages it has, and repeats which it waits for. The caller must have no stream.
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
	if m.same {
		m.r = migstream.NewReturnReader(m.conn, 0)
		return m
	}
	if m.err = m.handshake(ctx, most); m.err != nil {
		m.conn.Close()
	}
	return m
}

// handshake reads what QEMU reports when it resumes its migration. A block has at most so many
// pages of 4 KiB.
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
