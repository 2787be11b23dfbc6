package evict

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"

	"vacate/internal/link"
	"vacate/internal/qemu/migstream"
)

// A stream is relayed where libvirt resumes a migration of its own. Both QEMUs then know which
// pages are missing, and nobody else need know.

// Relay passes the bytes of a QEMU's connection on to the QEMU of a VM on the host behind a
// session, and back, until either of them ends it. It closes both. It calls taken, if that is not
// nil, when the other QEMU has the connection.
func Relay(ctx context.Context, s *link.Session, vm string, conn net.Conn, taken func()) error {
	a := attach(s, maxBatch)
	defer a.end()
	defer conn.Close()
	if err := writeJSON(a.control.Conn, msgRelay, relayed{vm}); err != nil {
		return err
	}
	if _, err := a.control.await(ctx, msgAccepted); err != nil {
		return err
	}
	if taken != nil {
		taken()
	}
	return a.relay(ctx, conn)
}

// Relay is the other end of a relayed stream. It closes the connection, and ends the session.
func (r *Request) Relay(ctx context.Context, conn net.Conn) error {
	defer r.end()
	defer conn.Close()
	if err := r.control.Write(msgAccepted); err != nil {
		return err
	}
	return r.relay(ctx, conn)
}

// relay returns when the connection or the session has ended. The caller then closes both.
func (a *attachment) relay(ctx context.Context, conn net.Conn) error {
	a.tasks.Go(func() {
		b := make([]byte, maxBatch)
		for {
			n, err := conn.Read(b)
			if n > 0 {
				if err := a.control.Write(msgRelayed, b[:n]); err != nil {
					a.Fail(err)
					return
				}
			}
			if err != nil {
				a.control.Write(msgRelayed)
				a.FailSoon(io.EOF)
				return
			}
		}
	})
	for {
		f, err := a.control.await(ctx, msgRelayed)
		if err != nil {
			return err
		}
		if len(f.payload) == 0 {
			return nil
		}
		if _, err := conn.Write(f.payload); err != nil {
			return err
		}
	}
}

// Resuming returns a connection to a twin whose migration is being resumed. The twin gets no half
// of a command until the source's QEMU has said that the migration goes on. If the connection is
// closed before that, the twin is told to go on, and then finds that the stream is broken: QEMU
// before 8.2 would crash without.
func Resuming(conn net.Conn) net.Conn { return &recovering{Conn: conn} }

type recovering struct {
	net.Conn
	mu   sync.Mutex
	rest []byte // not a whole command yet
	done bool   // the source's QEMU has said that it goes on
}

// Write passes whole commands on, until the one by which the migration goes on.
func (c *recovering) Write(b []byte) (int, error) {
	c.mu.Lock()
	if c.done {
		c.mu.Unlock()
		return c.Conn.Write(b)
	}
	c.rest = append(c.rest, b...)
	whole := 0
	const head = 5 // of a command: its type, its ID, the length of what follows
	for !c.done && len(c.rest[whole:]) >= head {
		n := head + int(binary.BigEndian.Uint16(c.rest[whole+3:]))
		if len(c.rest[whole:]) < n {
			break
		}
		c.done = bytes.Equal(c.rest[whole:whole+n], goOn)
		whole += n
	}
	if c.done {
		whole = len(c.rest)
	}
	_, err := c.Conn.Write(c.rest[:whole]) // these are few and small
	c.rest = c.rest[whole:]
	c.mu.Unlock()
	return len(b), err
}

// goOn is the command by which a migration goes on.
var goOn = migstream.Command{ID: migstream.CmdPostcopyResume}.Append(nil)

func (c *recovering) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.done {
		c.done = true
		c.Conn.Write(goOn)
	}
	return c.Conn.Close()
}
