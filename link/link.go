// Package link is the session between the two hosts of an eviction: three TCP
// connections, one a lane, that carry checksummed frames.
//
//	control  set-up, package, commit, completion, abort; both ways, little of it
//	push     source to destination: pages in the source's order; back: what was placed
//	fetch    destination to source: pages the guest waits for; back: those pages
//
// The lanes are separate connections so that a fetched page never waits in a socket
// behind pushed ones. On the wire they still share the path: who pushes bounds what is
// in flight (see package evict).
//
// Each connection opens with a hello from the dialling side (the source), all integers
// big-endian:
//
//	"vacate\r\n"  u16 version  u8 lane  u8 0  16 bytes of session id
//
// The line end makes a proxy or client of a text protocol fail at once. The answer is
//
//	"vacate\r\n"  u16 version  u8 0 accepted, 1 refused  u8 0  u16 len, message
//
// and then both sides send frames:
//
//	u8 type  u8 0  u16 0  u32 len  u32 crc  payload
//
// with the CRC-32C of the eight bytes before it and the payload: QEMU's own stream has no
// checksum, and TCP's is weak. What a type means is package evict's; a frame longer than
// the reader's limit is refused before anything is allocated.
package link

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Version of the protocol. Both sides must speak the same.
const Version = 2

// Lane names one of the connections of a session.
type Lane uint8

// The lanes, in the order in which they are dialled.
const (
	Control Lane = iota
	Push
	Fetch
	lanes
)

func (l Lane) String() string {
	return [...]string{"control", "push", "fetch", "unknown"}[min(l, lanes)]
}

const (
	mark       = "vacate\r\n"
	helloSize  = len(mark) + 2 + 1 + 1 + 16
	answerSize = len(mark) + 2 + 1 + 1 + 2
	frameHead  = 12

	// handshakeTimeout is how long a peer may take to say hello or to answer one.
	handshakeTimeout = 5 * time.Second
	// helloTimeout is how long who connects may take to say hello: meanwhile all others
	// wait, so it is a fraction of the time for which they do.
	helloTimeout = 2 * time.Second
	// deadAfter is how long sent bytes may stay unacknowledged, and how long a silent peer
	// may leave keep-alive probes unanswered, until the connection is given up.
	deadAfter = 10 * time.Second
)

// ErrPeer is wrapped by errors about bytes that are not this protocol.
var ErrPeer = errors.New("the peer does not speak vacate's protocol")

// ErrRefused is wrapped by the error of a Dial that the other side turned down.
var ErrRefused = errors.New("refused by the destination")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Session is the three lanes to one peer.
type Session struct {
	ID   [16]byte
	lane [lanes]*Conn

	done  chan struct{}
	once  sync.Once
	cause error // why it ended; set before done is closed
}

// Fail closes all lanes for a reason, which Err then returns. Only the first one counts.
// Readers and writers blocked in the lanes return.
func (s *Session) Fail(cause error) {
	s.once.Do(func() {
		s.cause = cause
		close(s.done)
		for _, c := range s.lane {
			if c != nil {
				c.s.Close()
			}
		}
	})
}

// FailSoon is Fail after a moment, for the failure of one lane: a peer that gives up says
// why on the control lane and closes all, and its words should not be lost to the order
// in which the lanes end.
func (s *Session) FailSoon(cause error) {
	time.AfterFunc(farewellTime, func() { s.Fail(cause) })
}

// farewellTime is how long a peer's last words may lag behind the end of another lane.
const farewellTime = time.Second

// Done is closed when the session was ended by Fail or Close.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err is the reason that Fail was given; nil as long as the session was not ended.
func (s *Session) Err() error {
	select {
	case <-s.done:
		return s.cause
	default:
		return nil
	}
}

// Lane returns one of the session's connections.
func (s *Session) Lane(l Lane) *Conn { return s.lane[l] }

// Peer is the address of the other side.
func (s *Session) Peer() string { return s.lane[Control].peer }

// Bytes is the number of payload bytes of TCP sent and received on all lanes.
func (s *Session) Bytes() (sent, received uint64) {
	for _, c := range s.lane {
		sent += c.sent.Load()
		received += c.received.Load()
	}
	return sent, received
}

// Close closes all lanes.
func (s *Session) Close() { s.Fail(net.ErrClosed) }

// Dial opens a session with the destination that listens at addr, a host:port. It makes
// its connections with dial, which may be nil for the usual way.
func Dial(ctx context.Context, dial func(ctx context.Context, network, addr string) (net.Conn, error), addr string) (_ *Session, err error) {
	s := &Session{done: make(chan struct{})}
	if _, err := rand.Read(s.ID[:]); err != nil {
		return nil, fmt.Errorf("make a session id: %w", err)
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if dial == nil {
		dial = (&net.Dialer{Timeout: handshakeTimeout}).DialContext
	}
	for l := range lanes {
		c, err := dial(ctx, "tcp", addr)
		if err != nil {
			if errors.Is(err, syscall.ECONNREFUSED) {
				return nil, fmt.Errorf("nothing listens at %s: start `vacate receive` there first: %w", addr, err)
			}
			return nil, fmt.Errorf("reach the destination: %w", err)
		}
		err = hello(ctx, c, l, s.ID)
		if err == nil {
			s.lane[l], err = newConn(c)
		}
		c.Close()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("%v lane to %s: %w", l, addr, err)
		}
	}
	return s, nil
}

func hello(ctx context.Context, c net.Conn, l Lane, id [16]byte) error {
	defer deadline(ctx, c, handshakeTimeout)()
	b := binary.BigEndian.AppendUint16([]byte(mark), Version)
	b = append(append(b, byte(l), 0), id[:]...)
	if _, err := c.Write(b); err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	answer := make([]byte, answerSize)
	if _, err := io.ReadFull(c, answer); err != nil {
		return fmt.Errorf("%w (no answer to our hello: %v): is it `vacate receive` that listens there?", ErrPeer, err)
	}
	if !bytes.HasPrefix(answer, []byte(mark)) {
		return fmt.Errorf("%w: it answered %q: is it `vacate receive` that listens there?", ErrPeer, answer)
	}
	answer = answer[len(mark):]
	if v := binary.BigEndian.Uint16(answer); v != Version {
		return fmt.Errorf("%w: it speaks version %d, we speak %d: use the same release of vacate on both hosts", ErrRefused, v, Version)
	}
	if answer[2] != 0 {
		message := make([]byte, min(binary.BigEndian.Uint16(answer[4:]), 1024))
		if _, err := io.ReadFull(c, message); err != nil {
			return fmt.Errorf("%w: its reason was cut off: %w", ErrRefused, err)
		}
		return fmt.Errorf("%w: %q", ErrRefused, message)
	}
	return nil
}

// deadline bounds what follows on c by a time-out and by ctx, until the returned function
// is called.
func deadline(ctx context.Context, c net.Conn, timeout time.Duration) func() {
	c.SetDeadline(time.Now().Add(timeout))
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	return func() {
		if stop() {
			c.SetDeadline(time.Time{})
		}
	}
}

// Accept waits for a session on ln. Connections that are not one, or not whole, are
// turned away and reported to turnedAway, which may be nil, and do not end the wait. The
// lanes of a session must all arrive before another peer's are looked at.
func Accept(ctx context.Context, ln net.Listener, turnedAway func(error)) (*Session, error) {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	s := &Session{done: make(chan struct{})}
	since := time.Now()
	for {
		c, err := ln.Accept()
		if err != nil {
			s.Close()
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, fmt.Errorf("accept a connection: %w", err)
		}
		if s.lane[Control] != nil && (time.Since(since) > handshakeTimeout || s.lane[Control].s.over()) {
			s.Close() // its other lanes never came
			s = &Session{done: make(chan struct{})}
		}
		err = s.join(ctx, c)
		c.Close()
		if err != nil {
			if turnedAway != nil {
				turnedAway(fmt.Errorf("turned %v away: %w", c.RemoteAddr(), err))
			}
			continue
		}
		since = time.Now()
		if s.lane[lanes-1] != nil {
			return s, nil
		}
	}
}

// join makes c the lane of s that its hello names.
func (s *Session) join(ctx context.Context, c net.Conn) error {
	defer deadline(ctx, c, helloTimeout)()
	b := make([]byte, helloSize)
	if _, err := io.ReadFull(c, b); err != nil {
		return fmt.Errorf("%w: no hello: %v", ErrPeer, err)
	}
	if !bytes.HasPrefix(b, []byte(mark)) {
		return fmt.Errorf("%w: it said %q", ErrPeer, b)
	}
	version, l, id := binary.BigEndian.Uint16(b[len(mark):]), Lane(b[len(mark)+2]), [16]byte(b[len(mark)+4:])
	refuse := func(why string) error {
		answer(c, 1, why)
		return errors.New(why)
	}
	switch {
	case version != Version:
		return refuse(fmt.Sprintf("the source speaks version %d, the destination %d: use the same release of vacate on both hosts", version, Version))
	case l >= lanes:
		return refuse(fmt.Sprintf("there is no lane %d", l))
	case l == Control && s.lane[Control] != nil:
		return refuse("the destination is taken by another eviction")
	case l != Control && (s.lane[l-1] == nil || s.lane[l] != nil || id != s.ID):
		return refuse("the lane belongs to no session")
	}
	conn, err := newConn(c)
	if err != nil {
		return err
	}
	if err := answer(c, 0, ""); err != nil {
		conn.s.Close()
		return err
	}
	s.ID, s.lane[l] = id, conn
	return nil
}

// Refuse turns away every connection made to ln, saying why, until ln is closed.
func Refuse(ln net.Listener, why string) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		c.SetDeadline(time.Now().Add(time.Second))
		if _, err := io.ReadFull(c, make([]byte, helloSize)); err == nil {
			answer(c, 1, why)
		}
		c.Close()
	}
}

func answer(c net.Conn, status byte, message string) error {
	b := binary.BigEndian.AppendUint16([]byte(mark), Version)
	b = binary.BigEndian.AppendUint16(append(b, status, 0), uint16(len(message)))
	_, err := c.Write(append(b, message...))
	return err
}

// stream is a socket, or a test's.
type stream interface {
	io.Reader
	writev(parts [][]byte) (int, error)
	over() bool
	io.Closer
}

// Conn is one lane. One goroutine may read and several may write at the same time.
type Conn struct {
	s        stream
	peer     string
	received atomic.Uint64
	sent     atomic.Uint64
	head     [frameHead]byte // of the frame being read

	mu  sync.Mutex // guards the fields below and the order of writes
	out [frameHead]byte
	vec [][]byte
}

// newConn makes a lane of a connection, which the caller closes in any case.
func newConn(c net.Conn) (*Conn, error) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil, fmt.Errorf("connection of type %T, not TCP", c)
	}
	// Go sets TCP_NODELAY by itself.
	err := tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: deadAfter / 4, Interval: deadAfter / 4, Count: 3})
	if err != nil {
		return nil, fmt.Errorf("set keep-alive: %w", err)
	}
	sock, err := newSocket(tcp)
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(sock.fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter/time.Millisecond)); err != nil {
		sock.Close()
		return nil, fmt.Errorf("set the time-out of unacknowledged bytes: %w", err)
	}
	return &Conn{s: sock, peer: c.RemoteAddr().String()}, nil
}

// Write sends a frame whose payload is the parts, one behind the other. It keeps no
// reference to them.
func (c *Conn) Write(kind uint8, parts ...[]byte) error {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out = [frameHead]byte{0: kind}
	binary.BigEndian.PutUint32(c.out[4:], uint32(n))
	crc := crc32.Update(0, castagnoli, c.out[:8])
	c.vec = append(c.vec[:0], c.out[:])
	for _, p := range parts {
		if len(p) > 0 {
			crc = crc32.Update(crc, castagnoli, p)
			c.vec = append(c.vec, p)
		}
	}
	binary.BigEndian.PutUint32(c.out[8:], crc)
	sent, err := c.s.writev(c.vec)
	c.sent.Add(uint64(sent))
	if err != nil {
		return fmt.Errorf("send to the peer: %w", err)
	}
	return nil
}

// Read receives a frame of at most limit bytes of payload into buf, which it grows if
// need be. It returns io.EOF, wrapped, if the peer closed the lane between two frames.
func (c *Conn) Read(buf []byte, limit int) (kind uint8, payload []byte, err error) {
	if _, err := io.ReadFull(c.s, c.head[:]); err == io.EOF {
		return 0, nil, fmt.Errorf("the peer closed the connection: %w", err)
	} else if err != nil {
		return 0, nil, fmt.Errorf("receive from the peer: %w", err)
	}
	kind = c.head[0]
	n := binary.BigEndian.Uint32(c.head[4:])
	if uint64(n) > uint64(limit) {
		return 0, nil, fmt.Errorf("%w: frame of type %d has %d bytes, more than %d", ErrPeer, kind, n, limit)
	}
	if c.head[1]|c.head[2]|c.head[3] != 0 {
		return 0, nil, fmt.Errorf("%w: frame of type %d has unknown flags", ErrPeer, kind)
	}
	if cap(buf) < int(n) {
		buf = make([]byte, n)
	}
	payload = buf[:n]
	if _, err := io.ReadFull(c.s, payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, fmt.Errorf("receive from the peer: %w", err)
	}
	crc := crc32.Update(crc32.Update(0, castagnoli, c.head[:8]), castagnoli, payload)
	if crc != binary.BigEndian.Uint32(c.head[8:]) {
		return 0, nil, fmt.Errorf("%w: frame of type %d, %d bytes, has a wrong checksum", ErrPeer, kind, n)
	}
	c.received.Add(uint64(frameHead) + uint64(n))
	return kind, payload, nil
}
