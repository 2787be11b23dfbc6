package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// session returns the lines that a real QEMU said, of testdata/session.jsonl.
func session(tb testing.TB) [][]byte {
	tb.Helper()
	b, err := os.ReadFile("testdata/session.jsonl")
	if err != nil {
		tb.Fatal(err)
	}
	return bytes.Split(bytes.TrimSpace(b), []byte("\n"))
}

func TestParseRecordedSession(t *testing.T) {
	kinds := map[string]int{}
	for _, line := range session(t) {
		m, err := parseMessage(line)
		switch {
		case err != nil:
			t.Error(err)
		case m.QMP != nil:
			kinds["greeting"]++
		case m.Event != "":
			kinds["event"]++
		case m.Error != nil:
			kinds["error"]++
		default:
			kinds["return"]++
		}
	}
	if kinds["greeting"] != 1 || kinds["event"] < 2 || kinds["error"] < 3 || kinds["return"] < 10 {
		t.Errorf("kinds of messages: %v", kinds)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, line := range []string{
		``, `[]`, `null`, `{}`, `{"return":{}}`, `{"return":{},"id":"1"}`, `{"return":{},"id":-1}`,
		`{"return":{},"id":1.5}`,
		`{"return":{},"error":{"class":"a","desc":"b"},"id":1}`, `{"return":{},"id":1}{}`,
		`{"error":{},"id":1}`,
		`{"error":{"class":"GenericError","desc":"x"}}`, `{"event":"STOP"}`,
		`{"event":5,"timestamp":{}}`,
		`{"return":{},"id":1,"more":2}`, `{"QMP":{}}`, `{"return":`, "\x00\xff",
	} {
		if m, err := parseMessage([]byte(line)); err == nil {
			t.Errorf("%s: parsed as %+v", line, m)
		}
	}
}

func FuzzParseMessage(f *testing.F) {
	for _, line := range session(f) {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := parseMessage(line)
		if err != nil {
			return
		}
		if m.QMP == nil && m.Event == "" && m.ID == nil {
			t.Errorf("%q: accepted as %+v", line, m)
		}
		var s Status
		var q Migration
		decodeReply(m.Return, &s)
		decodeReply(m.Return, &q)
	})
}

// connected returns both ends of a connection, which end with the test.
func connected(tb testing.TB) (client, server *net.UnixConn) {
	tb.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	end := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "socketpair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			tb.Fatal(err)
		}
		return c.(*net.UnixConn)
	}
	client, server = end(pair[0]), end(pair[1])
	tb.Cleanup(func() { server.Close(); client.Close() })
	return client, server
}

// serve returns a client's end of a connection to a server that says the first
// line of script, waits for a command, says the rest and, if told so, hangs up.
func serve(tb testing.TB, script []byte, hangUp bool) *net.UnixConn {
	tb.Helper()
	client, server := connected(tb)
	said := make(chan struct{})
	go func() {
		defer close(said)
		first := bytes.IndexByte(script, '\n') + 1
		server.Write(script[:first])
		if first > 0 {
			server.Read(make([]byte, 4096))
		}
		server.Write(script[first:])
		if hangUp {
			server.CloseWrite()
		}
	}()
	tb.Cleanup(func() { server.Close(); client.Close(); <-said })
	return client
}

const hello = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}` + "\r\n"
const ready = hello + `{"return": {}, "id": 1}` + "\r\n"

func TestBadGreeting(t *testing.T) {
	for name, script := range map[string]string{
		"garbage":    "SSH-2.0-OpenSSH_9.2p1\r\n",
		"half line":  `{"QMP": {"vers`,
		"huge line":  strings.Repeat("x", maxGreeting+1),
		"no line":    "",
		"no version": `{"QMP": {"version": {}, "capabilities": []}}` + "\n",
	} {
		if c, err := handshake(t.Context(), serve(t, []byte(script), true), 1); !errors.Is(err,
			ErrNotQMP) {
			t.Errorf("%s: %v, %v", name, c, err)
		}
	}
}

func TestLyingServer(t *testing.T) {
	ok := `{"return": {"status": "running", "running": true}, "id": 2}` + "\n"
	for name, script := range map[string]string{
		"unknown id":      `{"return": {}, "id": 77}` + "\n",
		"duplicate id":    `{"return": {}, "id": 1}` + "\n",
		"no id":           `{"return": {}}` + "\n",
		"garbage":         "what?\n",
		"second greeting": hello,
		"half line":       ok[:20],
		"huge line":       `{"return": "` + strings.Repeat("x", maxLine) + `", "id": 2}` + "\n",
	} {
		c, err := handshake(t.Context(), serve(t, []byte(ready+script), true), 1)
		if err != nil {
			t.Errorf("%s: handshake: %v", name, err)
			continue
		}
		if s, err := c.QueryStatus(t.Context()); !errors.Is(err, ErrClosed) {
			t.Errorf("%s: %v, %v", name, s, err)
		}
		c.Close()
	}
}

func TestEventFlood(t *testing.T) {
	const flood = 100_000
	event :=
		`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "RTC_CHANGE", "data": {"offset": 0}}` + "\n"
	script := ready + strings.Repeat(event, flood)
	conn := serve(t, []byte(script), true)
	c, err := handshake(t.Context(), conn, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sub := c.Subscribe(10)
	<-c.Done() // reached although nobody reads sub
	kept := uint64(0)
	for e := range sub.C {
		if e.Name != "RTC_CHANGE" || !e.Time.IsZero() {
			t.Fatalf("event %+v", e)
		}
		kept++
	}
	if kept != 10 && sub.Dropped() > 0 || kept+sub.Dropped() > flood {
		t.Errorf("%d kept, %d dropped", kept, sub.Dropped())
	}
}

// A server that does not read stops a command, not the client's Close.
func TestServerStopsReading(t *testing.T) {
	c, err := handshake(t.Context(), serve(t, []byte(ready), false), 1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	big := strings.Repeat("x", 2<<20)
	if _, err := c.HMP(ctx, big); !errors.Is(err, context.DeadlineExceeded) ||
		!errors.Is(err, ErrClosed) {
		t.Errorf("half-sent command: %v", err)
	}
	if _, err := c.HMP(t.Context(), "p 1"); !errors.Is(err, ErrClosed) {
		t.Errorf("after a half-sent command: %v", err)
	}
	c.Close()
}

func FuzzServer(f *testing.F) {
	f.Add(bytes.Join(session(f), []byte("\n")))
	for _, line := range session(f) {
		f.Add(append([]byte(ready), line...))
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		c, err := handshake(ctx, serve(t, script, true), 1)
		if err != nil {
			return
		}
		c.QueryStatus(ctx)
		c.QueryMigrationCapabilities(ctx)
		c.Close()
		if ctx.Err() != nil {
			t.Error("a server that hung up stopped a command")
		}
	})
}

func TestReadLine(t *testing.T) {
	r := bufio.NewReaderSize(strings.NewReader("a\r\n"+strings.Repeat("b", 100)+"\nc"), 16)
	for _, want := range []string{"a", strings.Repeat("b", 100), "c"} {
		if line, err := readLine(r, 101); string(line) != want {
			t.Errorf("%q, %v", line, err)
		}
	}
	if _, err := readLine(bufio.NewReaderSize(strings.NewReader(fmt.Sprint(1e9, 1e9)), 16),
		5); !errors.Is(err, errLongLine) {
		t.Error(err)
	}
}

// TestEarlyEvents has events ahead of the greeting, as QEMU 11.1 may send.
func TestEarlyEvents(t *testing.T) {
	const event = `{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "MIGRATION", "data": {"status": "setup"}}` + "\r\n"
	for n, ok := range map[int]bool{0: true, 1: true, maxEarly: true, maxEarly + 1: false} {
		g, err := readGreeting(bufio.NewReader(strings.NewReader(strings.Repeat(event, n) + hello)))
		if ok != (err == nil && g != nil) || !ok && !errors.Is(err, ErrNotQMP) {
			t.Errorf("behind %d events: %+v, %v", n, g, err)
		}
	}
}

// TestStaleReplies has a server answer to an earlier client, ahead of the greeting and behind it.
func TestStaleReplies(t *testing.T) {
	const stale = `{"return": {}, "id": 1}` + "\n" +
		`{"error": {"class": "GenericError", "desc": "too late"}, "id": 2}` + "\n"
	for n, ok := range map[int]bool{0: true, 1: true, maxEarly / 2: true, maxEarly/2 + 1: false} {
		c, err := handshake(t.Context(),
			serve(t, []byte(hello+strings.Repeat(stale, n)+`{"return": {}, "id": 100}`+"\n"),
				false), 100)
		if ok != (err == nil) || !ok && !errors.Is(err, ErrClosed) {
			t.Errorf("handshake behind %d stale replies: %v", 2*n, err)
		}
		if err == nil {
			c.Close()
		}
		g, err := readGreeting(bufio.NewReader(strings.NewReader(strings.Repeat(stale, n) + hello)))
		if ok != (err == nil && g != nil) || !ok && !errors.Is(err, ErrNotQMP) {
			t.Errorf("greeting behind %d stale replies: %+v, %v", 2*n, g, err)
		}
	}
}

// An earlier client's qmp_capabilities is carried out in this client's session, so that its own is
// refused. Or the earlier one is greeted in it. The client begins anew, and not without end.
func TestMixedSessions(t *testing.T) {
	const refusal = `{"error": {"class": "CommandNotFound", "desc": "already complete"}, "id": %v}`
	t.Run("negotiated", func(t *testing.T) { mixedSessions(t, refusal, ErrCommandNotFound) })
	t.Run("greeted", func(t *testing.T) { mixedSessions(t, hello+"%.0v", errGreetedAgain) })
}

// mixedSessions has sessions begin with an answer that is the earlier client's.
func mixedSessions(t *testing.T, refusal string, want error) {
	for refused, ok := range map[int]bool{1: true, maxSessions - 1: true, maxSessions: false} {
		path := filepath.Join(t.TempDir(), "qmp")
		ln, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		var sessions int
		var serving sync.WaitGroup
		serving.Go(func() {
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				sessions++
				answer := `{"return": {}, "id": %v}`
				if sessions <= refused {
					answer = refusal
				}
				io.WriteString(conn, hello)
				var said struct{ ID any }
				d := json.NewDecoder(conn)
				d.UseNumber()
				d.Decode(&said)
				fmt.Fprintf(conn, answer+"\n", said.ID)
				io.Copy(io.Discard, conn)
				conn.Close()
			}
		})
		c, err := Dial(t.Context(), path)
		if ok != (err == nil) || !ok && !errors.Is(err, want) {
			t.Errorf("%d sessions refused: %v", refused, err)
		}
		if err == nil {
			c.Close()
		}
		ln.Close()
		serving.Wait()
		if want := min(refused+1, maxSessions); sessions != want {
			t.Errorf("%d sessions refused: %d were begun, want %d", refused, sessions, want)
		}
	}
}

// TestDescriptorAlone: while a descriptor is on its way, nothing else is.
func TestDescriptorAlone(t *testing.T) {
	client, server := connected(t)
	r := bufio.NewReader(server)
	expect := func(command string) {
		t.Helper()
		server.SetReadDeadline(time.Now().Add(time.Minute))
		if line, err := r.ReadString('\n'); err != nil || !strings.Contains(line, command) {
			t.Fatalf("%q, %v: want %s", line, err, command)
		}
	}
	if _, err := server.Write([]byte(ready)); err != nil {
		t.Fatal(err)
	}
	c, err := handshake(t.Context(), client, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	expect("qmp_capabilities")

	hasty, cancel := context.WithCancel(t.Context())
	results := make(chan error, 2)
	go func() { results <- c.GetFD(hasty, "stream", 0) }()
	expect("getfd")
	cancel() // who gives up does not let others go ahead
	if err := <-results; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	go func() {
		_, err := c.QueryStatus(t.Context())
		results <- err
	}()
	server.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if b, err := r.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%q, %v: something was sent before the reply to getfd", b, err)
	}
	server.Write([]byte(`{"return": {}, "id": 2}` + "\n"))
	expect("query-status")
	server.Write([]byte(`{"return": {"status": "running", "running": true}, "id": 3}` + "\n"))
	if err := <-results; err != nil {
		t.Error(err)
	}
}
