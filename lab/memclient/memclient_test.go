package memclient

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/lab/latency"
)

// server is as much of memcached as the client needs.
type server struct {
	ln    net.Listener
	all   sync.WaitGroup
	mu    sync.Mutex // held while a request is answered
	items map[string][]byte
	conns []net.Conn
}

func newServer(t *testing.T) *server {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{ln: ln, items: map[string][]byte{}}
	s.all.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns = append(s.conns, conn)
			s.mu.Unlock()
			s.all.Go(func() {
				defer conn.Close()
				s.serve(conn)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		s.mu.Lock()
		for _, c := range s.conns {
			c.Close()
		}
		s.mu.Unlock()
		s.all.Wait()
	})
	return s
}

func (s *server) serve(conn net.Conn) {
	in := bufio.NewReader(conn)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		f := strings.Fields(line)
		s.mu.Lock()
		switch {
		case f[0] == "get" && s.items[f[1]] != nil:
			v := s.items[f[1]]
			_, err = fmt.Fprintf(conn, "VALUE %s 0 %d\r\n%s\r\nEND\r\n", f[1], len(v), v)
		case f[0] == "get":
			_, err = io.WriteString(conn, "END\r\n")
		default:
			var n int
			fmt.Sscan(f[4], &n)
			v := make([]byte, n+2)
			if _, err = io.ReadFull(in, v); err == nil {
				s.items[f[1]] = v[:n]
				_, err = io.WriteString(conn, "STORED\r\n")
			}
		}
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func start(t *testing.T, o Options) *Client {
	t.Helper()
	c, err := Start(within(t, 10*time.Second), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Stop() })
	return c
}

// until waits for stats that are as they should.
func until(t *testing.T, c *Client, ok func(latency.Stats) bool) latency.Stats {
	t.Helper()
	for ctx := within(t, 20*time.Second); ; time.Sleep(time.Millisecond) {
		s := c.Stats()
		if ok(s) {
			return s
		}
		if ctx.Err() != nil {
			t.Fatalf("still %+v", s)
		}
	}
}

func TestAllRight(t *testing.T) {
	s := newServer(t)
	before := time.Now()
	c := start(t, Options{Addr: s.ln.Addr().String(), Conns: 3, Items: 10, Bytes: 100, Writes: 0.5})
	until(t, c, func(s latency.Stats) bool { return s.Requests > 2000 })
	got := c.Stop()
	if got.Wrong != 0 || got.Broken != 0 || got.Errors != nil {
		t.Errorf("all is right: %+v", got)
	}
	if got.Silence <= 0 || got.SilenceBegan.Before(before) ||
		got.SilenceBegan.Add(got.Silence).After(time.Now()) {
		t.Errorf("from %v on it was silent: %+v", before, got)
	}
	if n := len(c.Latencies(before, time.Now())); n != int(got.Requests) {
		t.Errorf("%d latencies of %d requests", n, got.Requests)
	}
	if n := len(c.Latencies(time.Now(), time.Now().Add(time.Hour))); n != 0 {
		t.Errorf("%d latencies after the end", n)
	}
	if again := c.Stop(); again.Requests != got.Requests || again.Silence != got.Silence {
		t.Errorf("stopped with %+v, then %+v", got, again)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) != 3 || len(s.items) != 10 {
		t.Errorf("%d connections, %d items; want 3, 10", len(s.conns), len(s.items))
	}
}

func TestWrongValues(t *testing.T) {
	for _, c := range []struct {
		name, says string
		change     func(old []byte) []byte
	}{
		{"a bit", "wrong from byte 50 of 100 on",
			func(v []byte) []byte { w := bytes.Clone(v); w[50] ^= 1; return w }},
		{"gone", "gone", func([]byte) []byte { return nil }},
		{"older", "wrong from byte 8",
			func(v []byte) []byte { w := make([]byte, 100); value(w, 9, 5, 0); return w }},
		{"longer", "101 bytes, not 100",
			func(v []byte) []byte { return append(bytes.Clone(v[:100]), 0) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t)
			k := start(t, Options{Addr: s.ln.Addr().String(), Conns: 2, Items: 10, Bytes: 100,
				Writes: 0.5, Seed: 9})
			until(t, k, func(s latency.Stats) bool { return s.Requests > 200 })
			got := until(t, k, func(n latency.Stats) bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				if n.Wrong == 0 { // not yet, or written anew before it was read
					s.items["item-5"] = c.change(s.items["item-5"])
				}
				return n.Wrong > 0
			})
			if got.Broken != 0 || !strings.Contains(got.Errors[0].Error(), "item 5, version ") ||
				!strings.Contains(got.Errors[0].Error(), c.says) {
				t.Errorf("want item 5 to be wrong, %q: %+v", c.says, got)
			}
		})
	}
}

func TestBroken(t *testing.T) {
	s := newServer(t)
	c := start(t, Options{Addr: s.ln.Addr().String(), Conns: 2, Items: 10, Bytes: 100})
	s.mu.Lock()
	s.conns[0].Close()
	s.mu.Unlock()
	got := until(t, c, func(s latency.Stats) bool { return s.Broken > 0 })
	more := until(t, c, func(s latency.Stats) bool { return s.Requests > got.Requests+100 })
	if more.Broken != 1 || more.Wrong != 0 || len(more.Errors) != 1 {
		t.Errorf("one connection broke: %+v", more)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) != 2 {
		t.Errorf("%d connections; want no other in place of a broken one", len(s.conns))
	}
}

// A server that says nothing is silent from its last answer on, also while it lasts, and what
// it owes then comes late, and right.
func TestSilence(t *testing.T) {
	s := newServer(t)
	c := start(t, Options{Addr: s.ln.Addr().String(), Conns: 2, Items: 10, Bytes: 100, Rate: 1000})
	until(t, c, func(s latency.Stats) bool { return s.Requests > 20 })
	s.mu.Lock()
	began := time.Now()
	const quiet = 300 * time.Millisecond
	during := until(t, c, func(s latency.Stats) bool { return time.Since(began) > quiet })
	s.mu.Unlock()
	released := time.Now()
	after := until(t, c, func(n latency.Stats) bool { return n.Requests > during.Requests })
	for _, got := range []latency.Stats{during, after} {
		if got.Silence < quiet-100*time.Millisecond || got.SilenceBegan.After(released) ||
			got.Wrong != 0 || got.Broken != 0 {
			t.Errorf("silent from %v on for %v: %+v", began, quiet, got)
		}
	}
	for _, took := range c.Latencies(began, time.Now()) {
		if took > quiet-100*time.Millisecond {
			return
		}
	}
	t.Error("no request took long")
}

func TestStartFails(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close() // takes connections, and says nothing
	if _, err := Start(within(t, 200*time.Millisecond),
		Options{Addr: ln.Addr().String()}); err == nil {
		t.Error("started with a server that says nothing")
	}
	for _, o := range []Options{{Conns: -1}, {Items: 1}, {Bytes: 8}, {Bytes: 2 << 20}, {Rate: -1}} {
		if _, err := Start(t.Context(), o); err == nil || !strings.Contains(err.Error(), "want") {
			t.Errorf("started with %+v: %v", o, err)
		}
	}
}

func FuzzReadValue(f *testing.F) {
	// As memcached 1.6.18 answers.
	f.Add([]byte("VALUE item-1 0 5\r\nhello\r\nEND\r\n"))
	f.Add([]byte("END\r\n"))
	f.Add([]byte("SERVER_ERROR out of memory storing object\r\n"))
	f.Add([]byte("VALUE item-1 0 4294967295\r\n"))
	f.Fuzz(func(t *testing.T, answer []byte) {
		in := bufio.NewReader(bytes.NewReader(answer))
		v, err := readValue(in, "item-1", make([]byte, 64))
		if err != nil {
			return
		}
		rest, _ := io.ReadAll(in)
		want := "END\r\n"
		if v != nil {
			want = fmt.Sprintf("VALUE item-1 0 %d\r\n%s\r\nEND\r\n", len(v), v)
		}
		if took := answer[:len(answer)-len(rest)]; v == nil && string(took) != want ||
			v != nil && !strings.HasSuffix(string(took), string(v)+"\r\nEND\r\n") {
			t.Errorf("took %q for value %q", took, v)
		}
	})
}
