package link

import (
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a TCP connection that is read and written with system calls that block. It does not use
// Go's poller, which wakes a goroutine for every piece that arrives, by way of other threads. At 1
// Gbit/s that makes 14,000 switches a second on a core that a VM is short of, and a fetched page
// waits for each of them.
//
// One goroutine may read and one write at the same time; close ends both.
type socket struct {
	fd    int
	since time.Time // when the reader passed Go's scheduler last

	mu     sync.Mutex // guards what follows
	users  int        // of fd; none may be in it when it is closed
	closed bool
}

// lookEvery is how often a reader passes Go's scheduler. The runtime (of Go 1.26) looks every
// 20 µs after one that did not for 10 ms, at the cost of more switches than all else here.
const lookEvery = 5 * time.Millisecond

// newSocket takes a connection over, whose deadlines must not be set. The caller closes c
// in any case; the socket lives on.
func newSocket(c *net.TCPConn) (*socket, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &socket{}
	ctlErr := raw.Control(func(fd uintptr) {
		s.fd, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	})
	if ctlErr != nil {
		return nil, ctlErr
	}
	if err != nil {
		return nil, fmt.Errorf("duplicate the connection: %w", err)
	}
	if err := unix.SetNonblock(s.fd, false); err != nil {
		unix.Close(s.fd)
		return nil, err
	}
	return s, nil
}

// enter takes hold of the descriptor until leave.
func (s *socket) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.users++
	return nil
}

func (s *socket) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users--; s.closed && s.users == 0 {
		unix.Close(s.fd)
	}
}

// Close ends the connection, and every wait in it. It may be called more than once.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.closed = true
	if s.users == 0 {
		return unix.Close(s.fd)
	}
	return unix.Shutdown(s.fd, unix.SHUT_RDWR)
}

// Read fills b as far as the stream goes.
func (s *socket) Read(b []byte) (int, error) { return s.receive(b, unix.MSG_WAITALL) }

// receive reads into b: what is there, but at least a byte, or with MSG_WAITALL all of it as
// far as the stream goes.
func (s *socket) receive(b []byte, flags int) (int, error) {
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.leave()
	if now := time.Now(); now.Sub(s.since) > lookEvery {
		s.since = now
		runtime.Gosched()
	}
	for {
		n, _, err := unix.Recvfrom(s.fd, b, flags)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, err
		case n == 0 && len(b) > 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// option sets an option of the socket.
func (s *socket) option(level, name, value int) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	return unix.SetsockoptInt(s.fd, level, name, value)
}

// writev writes the parts, one behind the other, and returns how many bytes it wrote. It
// changes the slice of parts.
func (s *socket) writev(parts [][]byte) (int, error) {
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.leave()
	sum := 0
	for {
		for len(parts) > 0 && len(parts[0]) == 0 {
			parts = parts[1:]
		}
		if len(parts) == 0 {
			return sum, nil
		}
		n, err := unix.SendmsgBuffers(s.fd, parts[:min(len(parts), maxParts)], nil, nil,
			unix.MSG_NOSIGNAL)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return sum, err
		}
		sum += n
		for n > 0 {
			k := min(n, len(parts[0]))
			if parts[0] = parts[0][k:]; len(parts[0]) == 0 {
				parts = parts[1:]
			}
			n -= k
		}
	}
}

// maxParts is the kernel's limit of parts in one call (IOV_MAX).
const maxParts = 1024
