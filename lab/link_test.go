package lab

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// listenOn listens on a free port of a host, to the end of the test.
func listenOn(t *testing.T, h *Host) (ln net.Listener) {
	t.Helper()
	err := h.Do(func() (err error) {
		ln, err = net.Listen("tcp4", net.JoinHostPort(h.Addr, "0"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// connect makes a TCP connection from one host to another.
func connect(t *testing.T, from, to *Host) (near, far net.Conn) {
	t.Helper()
	ln := listenOn(t, to)
	err := from.Do(func() (err error) {
		near, err = net.DialTimeout("tcp4", ln.Addr().String(), 10*time.Second)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close() })
	if far, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	return near, far
}

// arrives has a message sent from one end of a connection, and reports whether it is at the
// other soon.
func arrives(t *testing.T, from, to net.Conn, message string, soon time.Duration) bool {
	t.Helper()
	if _, err := io.WriteString(from, message); err != nil {
		t.Fatal(err)
	}
	return comes(t, to, message, soon)
}

func comes(t *testing.T, to net.Conn, message string, soon time.Duration) bool {
	t.Helper()
	to.SetReadDeadline(time.Now().Add(soon))
	got := make([]byte, len(message))
	n, err := io.ReadFull(to, got)
	if errors.Is(err, os.ErrDeadlineExceeded) && n == 0 {
		return false
	}
	if err != nil || string(got) != message {
		t.Fatalf("got %q, %v; want %q", got[:n], err, message)
	}
	return true
}

const (
	soon = 10 * time.Second       // as good as for ever, on a link that works
	late = 300 * time.Millisecond // much, on one that works
)

// A link that is cut one way carries the other way, but no acknowledgements of it.
func TestCutOneWay(t *testing.T) {
	l := newTestLab(t, Options{Rate: 1e9})
	a, b := connect(t, l.A, l.B)
	for _, c := range []struct {
		name       string
		aToB, bToA bool
		good, far  net.Conn // the ends that can still send, and that cannot
	}{
		{"only b to a", false, true, b, a},
		{"only a to b", true, false, a, b},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := l.SetLink(c.aToB, c.bToA); err != nil {
				t.Fatal(err)
			}
			if !arrives(t, c.good, c.far, "one", soon) {
				t.Error("nothing comes the way that is not cut")
			}
			if arrives(t, c.far, c.good, "two", late) {
				t.Error("something comes the way that is cut")
			}
			if err := l.SetLinkUp(true); err != nil {
				t.Fatal(err)
			}
			// TCP sends again what was dropped.
			if !comes(t, c.good, "two", soon) || !arrives(t, c.good, c.far, "three", soon) {
				t.Error("the connection does not work after the link was mended")
			}
		})
	}
}

// A stalled link still acknowledges, and carries a greeting, but no load.
func TestStall(t *testing.T) {
	l := newTestLab(t, Options{Rate: 1e9})
	a, b := connect(t, l.A, l.B)
	if err := l.Stall(true); err != nil {
		t.Fatal(err)
	}
	if !arrives(t, a, b, "greeting", soon) {
		t.Error("not even a greeting passes a stalled link")
	}
	const size = 4 << 20
	start := time.Now()
	sent := make(chan error, 1)
	go func() {
		_, err := a.Write(make([]byte, size))
		sent <- err
	}()
	got, buf := 0, make([]byte, 64<<10)
	b.SetReadDeadline(time.Now().Add(time.Second))
	for {
		n, err := b.Read(buf)
		got += n
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	took := time.Since(start)
	t.Logf("%d of %d bytes passed in %v", got, size, took)
	if got > stallBurst+int(took.Seconds()*stallRate) {
		t.Errorf("%d bytes passed a stalled link in %v", got, took)
	}
	if err := l.Stall(false); err != nil {
		t.Fatal(err)
	}
	b.SetReadDeadline(time.Now().Add(time.Minute))
	if n, err := io.ReadFull(b, make([]byte, size-got)); err != nil {
		t.Fatalf("%d of %d bytes came after the stall: %v", n, size-got, err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// A link that loses large packets one way carries small ones, and large ones the other way.
func TestLoseLarge(t *testing.T) {
	l := newTestLab(t, Options{Rate: 1e9})
	a, b := connect(t, l.A, l.B)
	if err := l.LoseLarge(true, false); err != nil {
		t.Fatal(err)
	}
	large := strings.Repeat("large", 2000) // fits into a socket's buffer
	if !arrives(t, a, b, "small", soon) || !arrives(t, b, a, large, soon) {
		t.Error("what is not to be lost does not arrive")
	}
	if arrives(t, a, b, large, late) {
		t.Error("a large packet arrives")
	}
	if err := l.LoseLarge(false, false); err != nil {
		t.Fatal(err)
	}
	if !comes(t, b, large, soon) || !arrives(t, a, b, large, soon) {
		t.Error("large packets do not arrive after the link was mended")
	}
}

// Hosts beyond a and b reach each other and all others, but for those that they are parted from.
func TestMoreHosts(t *testing.T) {
	l := newTestLab(t, Options{More: []string{"c", "d"}, Rate: 1e9})
	c, d := l.More[0], l.More[1]
	for _, ends := range [][2]*Host{{c, d}, {d, l.A}, {l.B, c}} {
		near, far := connect(t, ends[0], ends[1])
		if !arrives(t, near, far, "here", 10*time.Second) {
			t.Fatalf("%s does not reach %s", ends[0].Name, ends[1].Name)
		}
	}
	near, far := connect(t, c, d)
	if err := Part(c, d, true); err != nil {
		t.Fatal(err)
	}
	if arrives(t, near, far, "lost", time.Second) || arrives(t, far, near, "lost", time.Second) {
		t.Error("they reach each other, and are parted")
	}
	if n, f := connect(t, c, l.B); !arrives(t, n, f, "here", 10*time.Second) {
		t.Error("one that is parted from another does not reach a third")
	}
	if err := Part(c, d, false); err != nil {
		t.Fatal(err)
	}
	if !comes(t, far, "lost", 30*time.Second) || !comes(t, near, "lost", 30*time.Second) {
		t.Error("what was sent does not come when they are joined again")
	}
	if err := Part(c, d, false); err != nil {
		t.Errorf("joined twice: %v", err)
	}
}
