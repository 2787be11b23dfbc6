package link

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// Of a record of TLS 1.3 (RFC 8446, section 5.2).
	recordHead  = 5
	recordSize  = 1 << 14             // most plaintext in one
	recordExtra = recordHead + 1 + 16 // ciphertext is longer by: head, type, tag
	recordMost  = recordSize + 256    // most that may follow a head
	receiveSize = 128 << 10           // of the buffer for records received
	strayMost   = 4 * writeSize       // records gathered, those of crypto/tls itself included
	writeSize   = 6 * recordSize      // plaintext handed to crypto/tls at once
)

// secured returns c with what every lane needs: TLS 1.3, and at the listening side certificates of
// both. It forbids resumption, as a resumed TLS session would not look at certificates again.
func secured(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.MinVersion, c.MaxVersion = tls.VersionTLS13, 0
	c.ClientAuth = tls.RequireAndVerifyClientCert
	c.SessionTicketsDisabled, c.ClientSessionCache = true, nil
	c.DynamicRecordSizingDisabled = true // else a lane that paused begins with records of 1 KiB
	if current := c.GetConfigForClient; current != nil {
		c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			c, err := current(h)
			if c != nil {
				c = secured(c)
				c.GetConfigForClient = nil
			}
			return c, err
		}
	}
	return c
}

// secret is a lane under TLS. As with socket, one goroutine may read and one write at the same
// time; Close ends both. It says no farewell of TLS (close_notify): who cuts the stream between two
// frames gains nothing, as the end of a lane is never success.
type secret struct {
	*socket
	conn    *tls.Conn
	records *records
	plain   [recordSize]byte // gathers small parts
}

// Read reads up to one record's worth.
func (s *secret) Read(b []byte) (int, error) {
	s.records.awaited = len(b)
	return s.conn.Read(b)
}

// writev writes the parts in as few and as long records as can be.
func (s *secret) writev(parts [][]byte) (sum int, err error) {
	write := func(b []byte) {
		if err != nil || len(b) == 0 {
			return
		}
		var n int
		n, err = s.conn.Write(b)
		sum += n
		if err == nil && s.records.gathered() >= writeSize {
			err = s.records.flush()
		}
	}
	n := 0 // in s.plain
	for _, p := range parts {
		for len(p) > 0 && err == nil {
			if n == 0 && len(p) >= recordSize {
				k := min(len(p)/recordSize*recordSize, writeSize)
				write(p[:k])
				p = p[k:]
				continue
			}
			k := copy(s.plain[n:], p)
			if n, p = n+k, p[k:]; n == recordSize {
				write(s.plain[:])
				n = 0
			}
		}
	}
	write(s.plain[:n])
	if err == nil {
		err = s.records.flush()
	}
	return sum, err
}

// records is the connection below a tls.Conn. At first, for the handshake, it is the embedded
// one, with its deadlines; then the socket, for which it makes few system calls of many
// records.
//
// It hands the tls.Conn no byte beyond the record that it works on. So when the next one begins,
// all bytes after it are here or yet to come. At least so many must come: the plaintext that the
// reader still waits for, and what TLS adds. These it waits for in the kernel, in one go, as the
// plain lane does.
type records struct {
	net.Conn
	sock *socket // nil during the handshake

	// For the reader.
	awaited int // plaintext that the reader of the lane waits for
	in      [receiveSize]byte
	r, w    int // in[r:w] was received and not handed on
	left    int // of it and of what is to come, this belongs to the record at hand

	mu    sync.Mutex
	out   []byte // gathered; guarded by mu
	spare []byte // the writer's: what was flushed last
}

// Read implements net.Conn for the tls.Conn.
func (t *records) Read(p []byte) (int, error) {
	if t.left == 0 {
		if err := t.record(); err != nil {
			return 0, err
		}
	}
	n := copy(p, t.in[t.r:min(t.w, t.r+t.left)])
	t.r += n
	t.left -= n
	return n, nil
}

// record receives the next record as a whole and sets left. What is none, it leaves to
// crypto/tls to refuse.
func (t *records) record() error {
	err := t.fill(recordHead)
	if err == nil {
		head := t.in[t.r:]
		// change_cipher_spec to application_data
		if n := int(binary.BigEndian.Uint16(head[3:])); head[0] >= 20 && head[0] <= 23 &&
			n <= recordMost {
			t.left = recordHead + n
			err = t.fill(t.left)
		}
	}
	if here := t.w - t.r; t.left == 0 || err != nil && here > 0 {
		t.left = here
		if here > 0 {
			return nil // an error comes again at the next call
		}
	}
	return err
}

// fill receives until n bytes are here.
func (t *records) fill(n int) error {
	for t.w-t.r < n {
		copy(t.in[:], t.in[t.r:t.w])
		t.r, t.w = 0, t.w-t.r
		var k int
		var err error
		switch {
		case t.sock == nil:
			k, err = t.Conn.Read(t.in[t.w:])
		case t.w == 0:
			k, err = t.sock.receive(t.in[:], 0)
		default:
			owed := t.awaited + (t.awaited+recordSize-1)/recordSize*recordExtra
			k, err = t.sock.receive(t.in[t.w:min(max(n, owed), receiveSize)], unix.MSG_WAITALL)
		}
		t.w += k
		if err != nil && t.w-t.r < n {
			return err
		}
	}
	return nil
}

// errStray ends a lane whose peer has us answer more than it reads.
var errStray = errors.New("too many requests of TLS itself are unanswered")

// Write implements net.Conn for the tls.Conn. After the handshake it only gathers, so that it
// never blocks: crypto/tls also calls it while it reads, to answer a change of keys.
func (t *records) Write(b []byte) (int, error) {
	if t.sock == nil {
		return t.Conn.Write(b)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.out)+len(b) > strayMost {
		return 0, errStray
	}
	t.out = append(t.out, b...)
	return len(b), nil
}

func (t *records) gathered() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.out)
}

// flush sends what was gathered.
func (t *records) flush() error {
	t.mu.Lock()
	b := t.out
	t.out, t.spare = t.spare[:0], b
	t.mu.Unlock()
	_, err := t.sock.writev([][]byte{b})
	return err
}
