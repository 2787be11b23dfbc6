package link

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"vacate/internal/link/certs"
)

// Why a connection was turned away; wrapped by what TurnedAway gets, next to ErrPeer and
// ErrUnauthenticated.
var (
	ErrUnauthorised = errors.New("not authorised")
	ErrTooSlow      = errors.New("too slow")
	ErrTooMany      = errors.New("too many at the same time")
	ErrVersion      = errors.New("another version")
	ErrTaken        = errors.New("taken by another connection")
)

// ListenOptions are who may come in, and how many. Limits that are 0 have the defaults told.
type ListenOptions struct {
	// TLS has this host's certificate and the CA of those who may come (ClientCAs), or gives them
	// for each handshake by GetConfigForClient. Nil means a plain link.
	TLS *tls.Config
	// Allow decides whether the peer of that name may come in; the name is empty on a plain link. A
	// peer hears the error's words. Nil allows all.
	Allow func(peer string) error
	// TurnedAway, which may be nil, hears of each connection that did not become part of a session:
	// from where, and why, by the errors above. Several goroutines call it, which it holds up.
	TurnedAway func(from string, err error)

	Pending          int // connections that have not said who they are; 128
	PendingPerSource int // of them from one address (IPv6: from one /64); 32
	Waiting          int // sessions that lack lanes or wait for Accept; 32
	// of them by one peer: its name, or on a plain link its address; 8
	WaitingPerPeer int
	// for a connection to say who it is, and for a session's lanes; 5 s
	Timeout time.Duration
}

// Listener takes sessions, of many peers at the same time. Its methods may be called by several
// goroutines.
//
// A connection passes TLS, if any, then Allow, then it says hello and joins a session. Each has a
// goroutine of its own, so that a slow peer holds up no other. When there are too many, the one
// that has been at it for longest makes room: an honest peer takes milliseconds.
type Listener struct {
	ln    net.Listener
	o     ListenOptions
	ready chan *place // has room for all that may wait
	ctx   context.Context
	stop  context.CancelFunc
	tasks sync.WaitGroup
	slots chan struct{} // one taken by each connection pending
	down  chan struct{} // closed when ln gives nothing more
	err   error         // why; set before down is closed

	mu       sync.Mutex
	pending  []*arrival        // oldest first; guarded by mu
	sessions map[ticket]*place // of all that have not ended; guarded by mu
}

// arrival is a connection, and nothing is known of it yet.
type arrival struct {
	conn   net.Conn
	from   string // its address
	source string // its host
	ousted atomic.Bool
}

// ticket is what the lanes of a session have in common. The name keeps one peer from joining
// another's session, whatever it has overheard.
type ticket struct {
	peer string
	id   [16]byte
}

// place is a session that comes about or lives; Listener.mu guards it.
type place struct {
	s        *Session
	taken    [lanes]bool   // by a connection, which may not be a lane yet
	lanes    int           // answered
	whole    chan struct{} // closed when all are
	failed   bool          // before it was whole
	accepted bool
}

// NewListener takes sessions from the connections of ln, a listener of TCP, until Close.
func NewListener(ln net.Listener, o ListenOptions) *Listener {
	o.Pending = cmp.Or(o.Pending, 128)
	o.PendingPerSource = cmp.Or(o.PendingPerSource, 32)
	o.Waiting = cmp.Or(o.Waiting, 32)
	o.WaitingPerPeer = cmp.Or(o.WaitingPerPeer, 8)
	o.Timeout = cmp.Or(o.Timeout, handshakeTimeout)
	if o.TLS != nil {
		o.TLS = secured(o.TLS)
	}
	if o.TurnedAway == nil {
		o.TurnedAway = func(string, error) {}
	}
	l := &Listener{ln: ln, o: o, ready: make(chan *place, o.Waiting),
		slots: make(chan struct{}, o.Pending), down: make(chan struct{}),
		sessions: map[ticket]*place{}}
	l.ctx, l.stop = context.WithCancel(context.Background())
	l.tasks.Go(l.run)
	return l
}

// Accept waits for a session. It fails when ctx is done, after Close (with net.ErrClosed),
// and when the port gives no more connections.
func (l *Listener) Accept(ctx context.Context) (*Session, error) {
	select {
	case p := <-l.ready:
		l.mu.Lock()
		p.accepted = true
		l.mu.Unlock()
		return p.s, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-l.down:
		return nil, fmt.Errorf("accept a connection: %w", l.err)
	}
}

// Close closes the port and all sessions that were not accepted. It returns when nothing that the
// listener started runs any more.
func (l *Listener) Close() error {
	l.stop()
	err := l.ln.Close()
	l.tasks.Wait()
	for {
		select {
		case p := <-l.ready:
			p.s.Close()
		default:
			return err
		}
	}
}

// run lets connections in.
func (l *Listener) run() {
	defer close(l.down)
	for {
		c, err := l.ln.Accept()
		switch {
		case l.ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			l.err = net.ErrClosed
			return
		case errors.Is(err, net.ErrClosed):
			l.err = err
			return
		case err != nil: // out of descriptors, say: that may pass
			l.o.TurnedAway("", fmt.Errorf("accept a connection: %w", err))
			select {
			case <-time.After(100 * time.Millisecond):
			case <-l.ctx.Done():
			}
		default:
			a := l.admit(c)
			l.tasks.Go(func() { l.receive(a) })
		}
	}
}

// admit counts a connection as pending, and makes room for it.
func (l *Listener) admit(c net.Conn) *arrival {
	a := &arrival{conn: c, from: c.RemoteAddr().String(), source: source(c.RemoteAddr())}
	l.mu.Lock()
	oust := -1 // the oldest of all, or of this source
	if len(l.pending) >= l.o.Pending {
		oust = 0
	}
	n := 0
	for i, other := range slices.Backward(l.pending) {
		if other.source == a.source {
			if n++; n >= l.o.PendingPerSource {
				oust = i
				break
			}
		}
	}
	if oust >= 0 {
		l.pending[oust].ousted.Store(true)
		l.pending[oust].conn.Close()
		l.pending = slices.Delete(l.pending, oust, oust+1)
	}
	l.pending = append(l.pending, a)
	l.mu.Unlock()
	l.slots <- struct{}{}
	return a
}

// source is what connections of one host have in common.
func source(a net.Addr) string {
	addr, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return a.String()
	}
	ip := addr.Addr().Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	p, _ := ip.Prefix(bits)
	return p.String()
}

// receive has a connection join a session, or turns it away. The first one of a session then
// waits for the others.
func (l *Listener) receive(a *arrival) {
	p, err := l.introduce(a)
	l.mu.Lock()
	l.pending = slices.DeleteFunc(l.pending, func(other *arrival) bool { return other == a })
	l.mu.Unlock()
	if err == nil {
		<-l.slots
		if p != nil {
			l.expect(p, a.from)
		}
		return
	}
	if a.ousted.Load() {
		err = fmt.Errorf("%w: it had to make room for a later one", ErrTooMany)
	}
	l.turnAway(a.from, err)
	<-l.slots
}

func (l *Listener) turnAway(from string, err error) {
	if l.ctx.Err() == nil {
		l.o.TurnedAway(from, err)
	}
}

// introduce brings a connection to where it is a lane. It returns the session if that is the
// first one.
func (l *Listener) introduce(a *arrival) (first *place, err error) {
	defer a.conn.Close()
	c, err := newNewcomer(a.conn, l.o.TLS, tls.Server)
	if err != nil {
		return nil, err
	}
	defer deadline(l.ctx, a.conn, l.o.Timeout)()
	name := ""
	if c.tls != nil {
		if err := c.tls.Handshake(); err != nil {
			c.part()
			return nil, judge(err)
		}
		if name, err = certs.NameOf(c.tls.ConnectionState().PeerCertificates[0]); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnauthenticated, err)
		}
	}
	h, err := readHello(c)
	if err != nil {
		if c.tls != nil {
			err = fmt.Errorf("%q: %w", name, err)
		}
		return nil, err
	}
	first, err = l.join(c, a, name, h)
	if err != nil {
		if c.tls != nil {
			err = fmt.Errorf("%q: %w", name, err)
		}
		c.part()
	}
	return first, err
}

// judge classifies the error of a handshake of TLS.
func judge(err error) error {
	var head tls.RecordHeaderError
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w: TLS: %w", ErrTooSlow, err)
	case errors.As(err, &head):
		return fmt.Errorf("%w: no TLS, which this link needs: it said %q", ErrPeer,
			head.RecordHeader)
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, net.ErrClosed):
		return fmt.Errorf("%w: it left during the handshake of TLS: %w", ErrPeer, err)
	}
	return fmt.Errorf("%w: %w", ErrUnauthenticated, err)
}

// part ends a connection that may have been told why. Closed with bytes of the peer unread, it
// would be reset, and the words could be lost.
func (c *newcomer) part() {
	c.tcp.CloseWrite()
	if c.blocking {
		return
	}
	c.tcp.SetReadDeadline(time.Now().Add(farewellTime / 2))
	io.CopyN(io.Discard, c.tcp, 64<<10)
}

// greeting is what a hello says.
type greeting struct {
	version  uint16
	lane     Lane
	id       [16]byte
	features uint64
}

// readHello reads a hello, which of another version may lack all but the version.
func readHello(c net.Conn) (h greeting, err error) {
	b := make([]byte, helloSize)
	read := func(b []byte) error {
		_, err := io.ReadFull(c, b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("%w: no hello: %w", ErrTooSlow, err)
		} else if err != nil {
			return fmt.Errorf("%w: no hello: %v", ErrPeer, err)
		}
		return nil
	}
	if err := read(b[:helloStart]); err != nil {
		return h, err
	}
	if !bytes.HasPrefix(b, []byte(mark)) {
		return h, fmt.Errorf("%w: it said %q", ErrPeer, b[:helloStart])
	}
	f := b[len(mark):]
	if h.version = binary.BigEndian.Uint16(f); h.version != Version {
		return h, nil
	}
	if err := read(b[helloStart:]); err != nil {
		return h, err
	}
	h.lane, h.id, h.features = Lane(f[2]), [16]byte(f[4:]), binary.BigEndian.Uint64(b[helloStart:])
	return h, nil
}

// unfit says why a hello is not accepted, whatever session it is for.
func (h greeting) unfit() error {
	switch {
	case h.version != Version:
		return fmt.Errorf("%w: the source speaks version %d, the destination %d: use the same "+
			"release of vacate on both hosts", ErrVersion, h.version, Version)
	case h.lane >= lanes:
		return fmt.Errorf("%w: there is no lane %d", ErrPeer, h.lane)
	}
	return nil
}

// answer answers a hello; why is nil if it is accepted.
func answer(c net.Conn, common uint64, why error) error {
	status, text := byte(0), binary.BigEndian.AppendUint64(nil, common)
	if why != nil {
		status, text = 1, []byte(why.Error())
		text = text[:min(len(text), maxReason)]
	}
	b := binary.BigEndian.AppendUint16([]byte(mark), Version)
	b = binary.BigEndian.AppendUint16(append(b, status, 0), uint16(len(text)))
	_, err := c.Write(append(b, text...))
	return err
}

// join makes a connection the lane that its hello names, and answers. It returns the session if
// this is its first lane.
func (l *Listener) join(c *newcomer, a *arrival, name string,
	h greeting) (first *place, err error) {
	err = l.allow(name)
	if err == nil {
		err = h.unfit()
	}
	t := ticket{cmp.Or(name, a.source), h.id}
	var p *place
	var isFirst bool
	if err == nil {
		p, isFirst, err = l.reserve(t, name, h)
	}
	if err != nil {
		answer(c, 0, err)
		return nil, err
	}
	err = answer(c, p.s.features, nil)
	var lane *Conn
	if err == nil {
		lane, err = c.lane()
	}
	if err != nil {
		l.fail(p, err)
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.failed {
		lane.s.Close()
		return nil, fmt.Errorf("another lane of its session failed: %w", p.s.Err())
	}
	p.s.lane[h.lane] = lane
	if p.lanes++; p.lanes == int(lanes) {
		l.ready <- p
		close(p.whole)
	}
	if isFirst {
		first = p
	}
	return first, nil
}

func (l *Listener) allow(name string) error {
	if l.o.Allow == nil {
		return nil
	}
	if err := l.o.Allow(name); err != nil {
		return fmt.Errorf("%w: %w", ErrUnauthorised, err)
	}
	return nil
}

// reserve takes a lane's place in its session, which it makes if need be.
func (l *Listener) reserve(t ticket, name string, h greeting) (p *place, first bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p = l.sessions[t]; p == nil {
		all, its := 0, 0
		for other, q := range l.sessions {
			if !q.accepted {
				all++
				if other.peer == t.peer {
					its++
				}
			}
		}
		if all >= l.o.Waiting || its >= l.o.WaitingPerPeer {
			return nil, false,
				fmt.Errorf("%w: %d sessions wait, %d of them of this peer: try again later",
					ErrTooMany, all, its)
		}
		p = &place{whole: make(chan struct{}),
			s: &Session{ID: h.id, name: name, features: h.features & features,
				done: make(chan struct{})}}
		p.s.ended = func() { l.forget(t) }
		l.sessions[t] = p
		first = true
	}
	switch {
	case p.failed || p.taken[h.lane]:
		return nil, false, fmt.Errorf("%w: the %v lane of session %x", ErrTaken, h.lane, h.id[:4])
	case p.s.features != h.features&features:
		return nil, false, fmt.Errorf("%w: its lanes differ in features", ErrPeer)
	}
	p.taken[h.lane] = true
	return p, first, nil
}

func (l *Listener) forget(t ticket) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.sessions, t)
}

// fail ends a session that is not whole. It reports whether there was one.
func (l *Listener) fail(p *place, err error) bool {
	l.mu.Lock()
	failed := p.failed || p.lanes == int(lanes)
	p.failed = true
	l.mu.Unlock()
	if failed {
		return false
	}
	p.s.Fail(err)
	return true
}

// expect waits until a session is whole, but not for long.
func (l *Listener) expect(p *place, from string) {
	timer := time.NewTimer(l.o.Timeout)
	defer timer.Stop()
	err := net.ErrClosed
	select {
	case <-p.whole:
		return
	case <-p.s.Done():
		return
	case <-l.ctx.Done():
	case <-timer.C:
		err = fmt.Errorf("%w: the other lanes of its session did not come", ErrTooSlow)
	}
	if l.fail(p, err) {
		l.turnAway(from, err)
	}
}
