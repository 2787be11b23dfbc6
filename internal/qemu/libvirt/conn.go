// Package libvirt speaks to the libvirt daemon of this host, over its socket and without libvirt's
// own library: the modular virtqemud as well as libvirtd. Tried with libvirtd 9.0.
//
// What it adds to go-libvirt: contexts, bounds on what the daemon may send, events in the order in
// which libvirt sent them, those without data included, and a monitor that package qmp can talk to.
// Domain descriptions of peers are hostile until [Policy.Check] has taken them.
package libvirt

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"vacate/internal/sys/process"

	golibvirt "github.com/digitalocean/go-libvirt"
)

var (
	// ErrNone is wrapped by Dial's error where no daemon listens.
	ErrNone = errors.New("no libvirt daemon listens")

	// ErrClosed is wrapped by the error of a call whose answer cannot come any more, as the
	// connection has ended. Whether libvirt did it is then unknown.
	ErrClosed = errors.New("the connection to libvirt has ended")

	// ErrNoDomain matches (errors.Is) libvirt's answer that it has no such domain.
	ErrNoDomain = errors.New("libvirt has no such domain")
)

// An Error is libvirt's refusal of a call.
type Error struct {
	Call string // such as "begin the migration"
	Code int    // virErrorNumber
	Text string
}

func (e *Error) Error() string { return fmt.Sprintf("libvirt refused to %s: %s", e.Call, e.Text) }

// Is reports a match with ErrNoDomain.
func (e *Error) Is(target error) bool {
	return target == ErrNoDomain && e.Code == int(golibvirt.ErrNoDomain)
}

// A Conn is a connection to a daemon. Its methods may be called concurrently. The daemon serves
// five calls of a connection at a time. A call such as [Conn.Finish] takes one until it returns.
//
// A migration's job that was begun on a Conn ends with it: libvirt rolls it back where it can.
type Conn struct {
	Socket string // path

	l       *golibvirt.Libvirt
	conn    net.Conn
	peer    int           // the process that made the socket listen: the daemon, or systemd
	session bool          // it serves one user
	done    chan struct{} // closed when the connection has ended

	register sync.Mutex // held while events are asked for
	mu       sync.Mutex // guards what follows
	asked    bool       // events come
	subs     map[*Subscription]bool
}

// An Address is where a daemon listens, and whose domains it is asked for.
type Address struct {
	Sockets []string // the first that there is
	Driver  string   // "qemu:///system" or "qemu:///session"
}

// ParseURI reads "qemu:///system" (also the empty string), "qemu:///session", either of them with
// "?socket=PATH", or the path of a socket of the former.
func ParseURI(uri string) (Address, error) {
	if filepath.IsAbs(uri) {
		return Address{[]string{uri}, string(golibvirt.QEMUSystem)}, nil
	}
	if uri == "" {
		uri = string(golibvirt.QEMUSystem)
	}
	u, err := url.Parse(uri)
	if err != nil {
		return Address{}, fmt.Errorf("libvirt's URI: %w", err)
	}
	if u.Host != "" || u.User != nil || u.Scheme != "qemu" && u.Scheme != "qemu+unix" ||
		u.Path != "/system" && u.Path != "/session" {
		return Address{}, fmt.Errorf(
			"libvirt's URI %.200q: want qemu:///system, qemu:///session, "+
				"or the path of this host's socket: "+
				"vacate asks the libvirt of its own host only",
			uri,
		)
	}
	a := Address{Driver: "qemu://" + u.Path}
	dir := "/run/libvirt"
	if u.Path == "/session" {
		dir = os.Getenv("XDG_RUNTIME_DIR")
		if dir == "" {
			dir = fmt.Sprintf("/run/user/%d", os.Getuid())
		}
		dir = filepath.Join(dir, "libvirt")
	}
	a.Sockets = []string{filepath.Join(dir, "virtqemud-sock"), filepath.Join(dir, "libvirt-sock")}
	if s := u.Query().Get("socket"); s != "" {
		a.Sockets = []string{s}
	}
	return a, nil
}

// Dial connects to the daemon of a URI, as [ParseURI] takes it.
func Dial(ctx context.Context, uri string) (*Conn, error) {
	a, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	for _, path := range a.Sockets {
		var nc net.Conn
		nc, err = new(net.Dialer).DialContext(ctx, "unix", path)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
				err = fmt.Errorf(
					"%w: %w: start libvirtd or virtqemud, or name its socket",
					ErrNone,
					err,
				)
				continue
			}
			return nil, fmt.Errorf("connect to libvirt: %w", err)
		}
		return open(ctx, nc, path, a.Driver)
	}
	return nil, err
}

func open(ctx context.Context, nc net.Conn, path, driver string) (*Conn, error) {
	peer, err := process.PeerOf(nc.(*net.UnixConn))
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("connect to libvirt at %s: %w", path, err)
	}
	c := &Conn{
		Socket: path, conn: nc, peer: int(peer.Pid),
		session: driver == string(golibvirt.QEMUSession),
		done:    make(chan struct{}), subs: map[*Subscription]bool{},
	}
	c.l = golibvirt.NewWithDialer(
		dialer{&packets{Conn: nc, event: c.event, ended: sync.OnceFunc(func() { close(c.done) })}},
	)
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	err = c.l.ConnectToURI(golibvirt.ConnectURI(driver))
	if !stop() || err != nil {
		nc.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("connect to libvirt at %s: %w", path, err)
	}
	return c, nil
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Close ends the connection, without a word to the daemon, which may not listen.
func (c *Conn) Close() error {
	err := c.conn.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	<-c.done
	return err
}

// File returns another descriptor of the connection. As long as any process has one, the daemon
// takes the connection for open, and does not end what was begun on it.
func (c *Conn) File() (*os.File, error) { return c.conn.(*net.UnixConn).File() }

type dialer struct{ conn net.Conn }

func (d dialer) Dial() (net.Conn, error) { return d.conn, nil }

const (
	packetHead = 28       // length, program, version, procedure, type, serial, status
	maxPacket  = 33 << 20 // VIR_NET_MESSAGE_MAX, and its head

	typeMessage = 2 // VIR_NET_MESSAGE: an event
)

// packets reads whole packets from the daemon, within bounds, and takes the events out: go-libvirt
// drops those of QEMU that have no data, STOP and RESUME among them.
type packets struct {
	net.Conn
	event func(program, procedure uint32, payload []byte)
	ended func()
	rest  []byte
}

func (p *packets) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		packet, err := p.packet()
		if err != nil {
			p.ended()
			p.Close()
			return 0, err
		}
		if be.Uint32(packet[16:]) == typeMessage {
			p.event(be.Uint32(packet[4:]), be.Uint32(packet[12:]), packet[packetHead:])
			continue
		}
		p.rest = packet
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

func (p *packets) packet() ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(p.Conn, length[:]); err != nil {
		return nil, err
	}
	n := be.Uint32(length[:])
	if n < packetHead || n > maxPacket {
		return nil, fmt.Errorf("libvirt sent a packet of %d bytes", n)
	}
	packet := make([]byte, n)
	copy(packet, length[:])
	_, err := io.ReadFull(p.Conn, packet[4:])
	return packet, err
}

var be = binary.BigEndian

// call does what ctx may cut short: the daemon then may still do it, and its answer is dropped.
func call[T any](ctx context.Context, c *Conn, what string, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var none T
	if err := ctx.Err(); err != nil {
		return none, fmt.Errorf("%s: %w", what, err)
	}
	answer := make(chan result, 1)
	go func() {
		v, err := f()
		answer <- result{v, err}
	}()
	select {
	case r := <-answer:
		var refusal golibvirt.Error
		switch {
		case r.err == nil:
			return r.value, nil
		case errors.As(r.err, &refusal):
			return none, &Error{what, int(refusal.Code), refusal.Message}
		case errors.Is(r.err, golibvirt.ErrInterrupted), errors.Is(r.err, net.ErrClosed),
			errors.Is(r.err, syscall.EINVAL), errors.Is(r.err, syscall.EPIPE):
			return none, fmt.Errorf("%s: %w", what, ErrClosed)
		}
		return none, fmt.Errorf("%s: %w", what, r.err)
	case <-ctx.Done():
		return none, fmt.Errorf("%s: libvirt has not answered: %w", what, ctx.Err())
	}
}

// do is call for what returns nothing.
func do(ctx context.Context, c *Conn, what string, f func() error) error {
	_, err := call(ctx, c, what, func() (struct{}, error) { return struct{}{}, f() })
	return err
}
