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
// All lanes of a session are under TLS 1.3 with certificates on both sides, or none is. Only TLS
// makes the link safe in a network where others listen and talk. In that case nobody says a word of
// what follows to a peer without a good certificate.
//
// Each connection opens with a hello from the dialling side, all integers big-endian:
//
//	"vacate\r\n"  u16 version  u8 lane  u8 0  16 bytes of session id  u64 features
//
// The line end makes a proxy or client of a text protocol fail at once. The features are
// bits; none is defined yet. The answer is
//
//	"vacate\r\n"  u16 version  u8 0 accepted, 1 refused  u8 0  u16 len, len bytes:
//	accepted: u64 features that both sides have; refused: why, in words
//
// All versions share a hello's first 28 bytes and an answer's first 14, so that each can
// tell another one. Then both sides send frames:
//
//	u8 type  u8 0  u16 0  u32 len  u32 crc  payload
//
// with the CRC-32C of the eight bytes before it and the payload: QEMU's own stream has no
// checksum, and TCP's is weak. What a type means is package evict's; a frame longer than
// the reader's limit is refused before anything is allocated.
package link

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Version of the protocol. Both sides must speak the same.
const Version = 6

// features are the bits of what this side can do beyond what its version must.
const features uint64 = 0

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
	helloStart = len(mark) + 2 + 1 + 1 + 16 // the same in all versions
	helloSize  = helloStart + 8
	answerHead = len(mark) + 2 + 1 + 1 + 2 // the same in all versions
	frameHead  = 12

	// dialTimeout is how long a connection may take to come about: an address that is dead
	// must not keep who redials from trying again.
	dialTimeout = 2 * time.Second
	// handshakeTimeout is how long a peer may take for TLS and to answer a hello.
	handshakeTimeout = 5 * time.Second
	// deadAfter is how long sent bytes may stay unacknowledged until the connection is given
	// up, or a peer may leave its window shut. Where nothing is sent, keep-alive probes find a
	// dead peer in a second more.
	deadAfter = 3 * time.Second
)

// ErrPeer is wrapped by errors about bytes that are not this protocol.
var ErrPeer = errors.New("the peer does not speak vacate's protocol")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Session is the three lanes to one peer.
type Session struct {
	ID       [16]byte
	lane     [lanes]*Conn
	name     string // of the peer, by its certificate
	features uint64

	done  chan struct{}
	once  sync.Once
	cause error  // why it ended; set before done is closed
	ended func() // called once it did; nil for none
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
		if s.ended != nil {
			s.ended()
		}
	})
}

// FailSoon is Fail after a moment, for the failure of one lane. A peer that gives up says why on
// the control lane and closes all lanes. The order in which they end should not lose what it said.
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

// PeerName is the other side's name by its certificate, empty on a link without TLS. For
// the side that dialled, that is the name that it asked for.
func (s *Session) PeerName() string { return s.name }

// Features are the bits of what both sides can do.
func (s *Session) Features() uint64 { return s.features }

// Bytes is the number of bytes of frames sent and received on all lanes. TLS adds some 0.15 %.
func (s *Session) Bytes() (sent, received uint64) {
	for _, c := range s.lane {
		sent += c.sent.Load()
		received += c.received.Load()
	}
	return sent, received
}

// Close closes all lanes.
func (s *Session) Close() { s.Fail(net.ErrClosed) }

// stream is a socket, TLS over one, or a test's.
type stream interface {
	io.Reader
	writev(parts [][]byte) (int, error)
	io.Closer
}

// Conn is one lane. One goroutine may read and several may write at the same time.
type Conn struct {
	s        stream
	sock     *socket // below s
	peer     string
	received atomic.Uint64
	sent     atomic.Uint64
	head     [frameHead]byte // of the frame being read

	mu  sync.Mutex // guards the fields below and the order of writes
	out [frameHead]byte
	vec [][]byte
}

// setUp has a connection notice a peer that died (deadAfter). Go sets TCP_NODELAY by itself.
func setUp(c net.Conn) (*net.TCPConn, error) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil, fmt.Errorf("connection of type %T, not TCP", c)
	}
	if err := tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second,
		Interval: time.Second, Count: 3}); err != nil {
		return nil, fmt.Errorf("set keep-alive: %w", err)
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil, err
	}
	ctlErr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT,
			int(deadAfter/time.Millisecond))
	})
	if err = errors.Join(ctlErr, err); err != nil {
		return nil, fmt.Errorf("set the time-out of unacknowledged bytes: %w", err)
	}
	return tcp, nil
}

// newcomer is a connection that is not a lane yet.
type newcomer struct {
	net.Conn // what hello and answer pass over: tcp, or tls
	tcp      *net.TCPConn
	tls      *tls.Conn // nil on a plain link
	records  *records  // below tls
	blocking bool      // a lane has it: its calls block, and deadlines are not heeded
}

// newNewcomer sets a connection up, and puts TLS over it if there is a configuration. There
// is no handshake yet.
func newNewcomer(c net.Conn, config *tls.Config, side func(net.Conn,
	*tls.Config) *tls.Conn) (*newcomer, error) {
	tcp, err := setUp(c)
	if err != nil || config == nil {
		return &newcomer{Conn: tcp, tcp: tcp}, err
	}
	r := &records{Conn: tcp}
	t := side(r, config)
	return &newcomer{Conn: t, tcp: tcp, tls: t, records: r}, nil
}

// lane makes a lane of a newcomer, once hello and answer have passed. The caller closes the
// connection in any case.
func (h *newcomer) lane() (*Conn, error) {
	h.blocking = true
	sock, err := newSocket(h.tcp)
	if err != nil {
		return nil, err
	}
	c := &Conn{s: sock, sock: sock, peer: h.tcp.RemoteAddr().String()}
	if h.tls != nil {
		h.records.sock = sock
		c.s = &secret{socket: sock, conn: h.tls, records: h.records}
	}
	return c, nil
}

// Background marks the lane's packets as those of least effort (DSCP LE, RFC 8622): routers
// and hosts that know it let others pass first.
func (c *Conn) Background() error {
	const leastEffort = 1 << 2
	if err := c.sock.option(unix.IPPROTO_IP, unix.IP_TOS, leastEffort); err != nil {
		return fmt.Errorf("mark the lane as background: %w", err)
	}
	if err := c.sock.option(unix.IPPROTO_IPV6, unix.IPV6_TCLASS, leastEffort); err != nil &&
		err != unix.ENOPROTOOPT {
		return fmt.Errorf("mark the lane as background: %w", err)
	}
	return nil
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
		return 0, nil, fmt.Errorf("%w: frame of type %d has %d bytes, more than %d", ErrPeer, kind,
			n, limit)
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
		return 0, nil, fmt.Errorf("%w: frame of type %d, %d bytes, has a wrong checksum", ErrPeer,
			kind, n)
	}
	c.received.Add(uint64(frameHead) + uint64(n))
	return kind, payload, nil
}
