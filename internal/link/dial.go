package link

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// ErrRefused is wrapped by the error of a Dialer that the other side turned down.
var ErrRefused = errors.New("refused by the destination")

// ErrUnauthenticated is wrapped by errors about a peer, or by a peer about us, without a
// certificate that is good for this link.
var ErrUnauthenticated = errors.New("not authenticated")

// Dialer opens sessions with the host that listens at Addr, a host:port.
type Dialer struct {
	Addr string
	// TLS has this host's certificate and what the other's must be: its name is ServerName, or
	// the host of Addr. Nil means a plain link.
	TLS *tls.Config
	// Host is the name of the host at Addr where its daemon is meant. Empty: `vacate receive` is.
	// It is for messages.
	Host string
	// Dial makes the connections, of TCP; nil for the usual way.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Session opens a session. An address where nobody is fails after dialTimeout (2 s).
func (d Dialer) Session(ctx context.Context) (_ *Session, err error) {
	s := &Session{done: make(chan struct{})}
	if d.TLS != nil {
		d.TLS = secured(d.TLS)
		if d.TLS.ServerName == "" {
			if d.TLS.ServerName, _, err = net.SplitHostPort(d.Addr); err != nil {
				return nil, fmt.Errorf("address of the destination: %w", err)
			}
		}
		s.name = strings.ToLower(d.TLS.ServerName)
	}
	rand.Read(s.ID[:]) // never fails
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	for l := range lanes {
		c, features, err := d.lane(ctx, l, s.ID)
		if err == nil {
			s.lane[l] = c
			if s.features = features; l != Control && features != s.features {
				err = fmt.Errorf("%w: its lanes differ in features", ErrPeer)
			}
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("%v lane to %s: %w", l, d.Addr, err)
		}
	}
	return s, nil
}

func (d Dialer) lane(ctx context.Context, l Lane, id [16]byte) (*Conn, uint64, error) {
	dial := d.Dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	dialling, cancel := context.WithTimeout(ctx, dialTimeout)
	conn, err := dial(dialling, "tcp", d.Addr)
	cancel()
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, 0, fmt.Errorf("nothing listens at %s: start %s there first: %w", d.Addr,
			d.meant(), err)
	} else if err != nil && d.Host != "" {
		return nil, 0, fmt.Errorf("reach host %s: %w", d.Host, err)
	} else if err != nil {
		return nil, 0, fmt.Errorf("reach the destination: %w", err)
	}
	defer conn.Close()
	c, err := newNewcomer(conn, d.TLS, tls.Client)
	if err != nil {
		return nil, 0, err
	}
	defer deadline(ctx, conn, handshakeTimeout)()
	if c.tls != nil {
		if err := c.tls.Handshake(); err != nil {
			return nil, 0, explainTLS(err, d.TLS.ServerName)
		}
	}
	common, err := d.hello(c, l, id)
	if err != nil {
		return nil, 0, err
	}
	lane, err := c.lane()
	return lane, common, err
}

// meant is what is to listen at Addr.
func (d Dialer) meant() string {
	if d.Host != "" {
		return "vacated of host " + d.Host + " (systemctl start vacated)"
	}
	return "`vacate receive`"
}

// explainTLS tells what an error of our side of a handshake with the host of that name means.
func explainTLS(err error, name string) error {
	var (
		head      tls.RecordHeaderError
		authority x509.UnknownAuthorityError
		hostname  x509.HostnameError
		invalid   x509.CertificateInvalidError
	)
	switch {
	case errors.As(err, &head):
		return fmt.Errorf("%w: it does not answer with TLS: does it listen for plain links?",
			ErrPeer)
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("%w: it closed the connection and made no TLS handshake (%v): does it "+
			"listen for plain links?", ErrPeer, err)
	case errors.As(err, &hostname):
		return fmt.Errorf("%w: who answers is not %q: %w", ErrUnauthenticated, name, err)
	case errors.As(err, &authority):
		return fmt.Errorf("%w: the destination's certificate is not from the CA in our ca.pem: %w",
			ErrUnauthenticated, err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Errorf("%w: the destination's certificate has expired or is not valid yet: "+
			"renew it there with `vacate certs issue`, or set the clocks: %w", ErrUnauthenticated,
			err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("handshake of TLS: %w: the destination does not answer, or the path "+
			"loses large packets, such as those with certificates: check the MTU (`ping -M do "+
			"-s 1472 %s`)", err, name)
	case remote(err):
		return fmt.Errorf("%w: the destination turns our certificate down: %w", ErrUnauthenticated,
			err)
	}
	return fmt.Errorf("handshake of TLS: %w", err)
}

// remote reports whether an error is an alert of TLS that the peer sent.
func remote(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// hello introduces a lane and returns the features that both sides have.
func (d Dialer) hello(c net.Conn, l Lane, id [16]byte) (common uint64, err error) {
	if _, err := c.Write(appendHello(nil, l, id)); err != nil {
		return 0, fmt.Errorf("say hello: %w", err)
	}
	head := make([]byte, answerHead)
	if _, err := io.ReadFull(c, head); remote(err) { // a server of TLS 1.3 judges the client last
		return 0, fmt.Errorf("%w: the destination turns our certificate down: %w",
			ErrUnauthenticated, err)
	} else if err != nil {
		return 0,
			fmt.Errorf("%w (no answer to our hello: %v): is it %s that listens there, and for "+
				"links such as this (TLS or plain), and does the path carry large packets?",
				ErrPeer, err, d.meant())
	}
	if !bytes.HasPrefix(head, []byte(mark)) {
		return 0, fmt.Errorf("%w: it answered %q: is it %s that listens there?", ErrPeer, head,
			d.meant())
	}
	head = head[len(mark):]
	if v := binary.BigEndian.Uint16(head); v != Version {
		return 0,
			fmt.Errorf("%w: it speaks version %d, we speak %d: use the same release of vacate "+
				"on both hosts", ErrRefused, v, Version)
	}
	n := binary.BigEndian.Uint16(head[4:])
	accepted := head[2] == 0
	if accepted && n != 8 {
		return 0, fmt.Errorf("%w: it accepts with %d bytes of features", ErrPeer, n)
	}
	rest := make([]byte, min(n, maxReason))
	if _, err := io.ReadFull(c, rest); err != nil && accepted {
		return 0, fmt.Errorf("%w: its answer was cut off: %w", ErrPeer, err)
	} else if err != nil {
		return 0, fmt.Errorf("%w: its reason was cut off: %w", ErrRefused, err)
	}
	if !accepted {
		return 0, fmt.Errorf("%w: %q", ErrRefused, rest)
	}
	common = binary.BigEndian.Uint64(rest)
	if common&^features != 0 {
		return 0, fmt.Errorf("%w: it claims features %#x, and we have %#x of them", ErrPeer, common,
			features)
	}
	return common, nil
}

// maxReason is how much of the words of a refusal is heard.
const maxReason = 1024

func appendHello(b []byte, l Lane, id [16]byte) []byte {
	b = binary.BigEndian.AppendUint16(append(b, mark...), Version)
	b = append(append(b, byte(l), 0), id[:]...)
	return binary.BigEndian.AppendUint64(b, features)
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
