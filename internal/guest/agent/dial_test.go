package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/guest/pageclass"
)

// fake listens like QEMU and has an agent answer requests: what it is told to do.
func fake(t *testing.T, serve func(conn net.Conn, r Request)) *Agent {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		var b []byte
		buf := make([]byte, 100)
		for {
			n, err := conn.Read(buf)
			b = append(b, buf[:n]...)
			for {
				r, _, n, ok := NextRequest(b)
				b = b[n:]
				if !ok {
					break
				}
				serve(conn, r)
			}
			if err != nil {
				return
			}
		}
	}()
	a, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		l.Close()
		<-ended
	})
	return a
}

var small = &pageclass.Survey{
	Pages: []pageclass.Page{{Kind: pageclass.Slab, Class: pageclass.Kernel}}}

func good(id uint64) []byte {
	return AppendSurvey(nil, id, &Costs{Prepared: -1}, small, false, 1<<20)
}

func TestAnswers(t *testing.T) {
	const long = time.Minute // never waited for
	for name, tt := range map[string]struct {
		deadline time.Duration
		serve    func(conn net.Conn, r Request)
		want     error // or that a survey comes
		text     string
	}{
		"good": {long, func(c net.Conn, r Request) {
			if r.ActiveWithin != DefaultActiveWithin {
				c.Write(AppendRefusal(nil, r.ID, "not the default"))
			}
			c.Write(good(r.ID))
		}, nil, ""},
		"in pieces": {long, func(c net.Conn, r Request) {
			for _, b := range good(r.ID) {
				c.Write([]byte{b})
			}
		}, nil, ""},
		"after others": {long, func(c net.Conn, r Request) {
			c.Write(good(r.ID + 1)[5:])
			c.Write(good(r.ID + 1))
			c.Write(good(r.ID + 2)[:20])
			c.Write(good(r.ID + 3)[:40])
			c.Write(good(r.ID))
		}, nil, ""},
		"stalls": {50 * time.Millisecond, func(c net.Conn, r Request) {}, ErrSilent, ""},
		"stalls amid": {50 * time.Millisecond,
			func(c net.Conn, r Request) { c.Write(good(r.ID)[:35]) }, ErrSilent, ""},
		"goes": {long, func(c net.Conn, r Request) { c.Close() }, io.EOF, ""},
		"goes amid": {long, func(c net.Conn, r Request) { c.Write(good(r.ID)[:35]); c.Close() },
			io.EOF, ""},
		"refuses": {long,
			func(c net.Conn, r Request) { c.Write(AppendRefusal(nil, r.ID, "not \x1b[2J today")) },
			errAny, `refuses: "not \x1b[2J today"`},
		"other type": {long,
			func(c net.Conn, r Request) { c.Write(AppendDone(nil, r.ID, &Costs{})) }, ErrBroken,
			"type"},
		"wrong sum": {long,
			func(c net.Conn, r Request) { b := good(r.ID); b[headerSize]++; c.Write(b) }, ErrBroken,
			"checksum"},
		"bad body": {long,
			func(c net.Conn, r Request) {
				c.Write(appendFrame(nil, typeSurvey, r.ID, []byte("lies")))
			}, ErrBroken, ""},
		"other version": {long, func(c net.Conn, r Request) { c.Write(withVersion(good(r.ID), 9)) },
			ErrBroken, "version 9"},
		"too long": {long, func(c net.Conn, r Request) {
			c.Write(appendFrame(nil, typeSurvey, r.ID, make([]byte, r.MaxBytes+1)))
		}, ErrBroken, "at most"},
		"floods": {long, func(c net.Conn, r Request) {
			for junk := make([]byte, 1<<16); ; {
				if _, err := c.Write(junk); err != nil {
					return
				}
			}
		}, ErrBroken, "belong to no answer"},
		"floods with frames": {long, func(c net.Conn, r Request) {
			for frames := bytes.Repeat(good(r.ID+1), 100); ; {
				if _, err := c.Write(frames); err != nil {
					return
				}
			}
		}, ErrBroken, "belong to no answer"},
		"skippable": {long, func(c net.Conn, r Request) {
			b := body(good(r.ID))
			at := bytes.Index(b, []byte{byte(pageclass.Slab), byte(pageclass.Kernel), 0})
			b[at+2] = byte(pageclass.Skippable)
			c.Write(appendFrame(nil, typeSurvey, r.ID, b))
		}, ErrBroken, "skippable"},
	} {
		t.Run(name, func(t *testing.T) {
			a := fake(t, tt.serve)
			s, st, err := a.Ask(t.Context(), Options{Frames: 100, Deadline: tt.deadline})
			if tt.want == nil {
				if err != nil || s.Pages[0] != small.Pages[0] || st.Bytes == 0 {
					t.Fatalf("%+v, %+v, %v", s, st, err)
				}
				return
			}
			if err == nil || s != nil || tt.want != errAny && !errors.Is(err, tt.want) ||
				!strings.Contains(err.Error(), tt.text) {
				t.Fatalf("got %v, want %v, %q", err, tt.want, tt.text)
			}
		})
	}
}

var errAny = errors.New("any")

func withVersion(frame []byte, v byte) []byte {
	frame[7] = v
	binary.LittleEndian.PutUint32(frame[28:], checksum(frame[:28]))
	return frame
}

func TestContext(t *testing.T) {
	a := fake(t, func(net.Conn, Request) {})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, _, err := a.Ask(ctx, Options{Frames: 1, Deadline: time.Hour}); !errors.Is(err,
		context.Canceled) {
		t.Error(err)
	}
	if _, err := a.Prepare(ctx, Options{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, _, err := a.Ask(t.Context(), Options{}); err == nil {
		t.Error("asked without knowing how much memory there is")
	}
}

// An answer that comes too late must not be taken for that of the next call.
func TestLate(t *testing.T) {
	var first uint64
	a := fake(t, func(c net.Conn, r Request) {
		if r.Prepare {
			first = r.ID
			return
		}
		c.Write(AppendDone(nil, first, &Costs{}))
		c.Write(good(r.ID))
	})
	if _, err := a.Prepare(t.Context(), Options{Deadline: 20 * time.Millisecond}); !errors.Is(err,
		ErrSilent) {
		t.Fatal(err)
	}
	_, st, err := a.Ask(t.Context(), Options{Frames: 1, Deadline: time.Minute})
	if err != nil || st.Skipped == 0 {
		t.Fatal(err, st)
	}
}

// A request of another version is refused in words.
func TestOtherVersion(t *testing.T) {
	r := Request{ID: 5}
	b := withVersion(r.Append(nil), 2)
	_, refusal, n, ok := NextRequest(b)
	h, _, found := findHeader(refusal)
	if ok || n == 0 || !found || h.id != 5 || h.typ != typeRefusal {
		t.Errorf("%v %d %+v", ok, n, h)
	}
}

func TestListener(t *testing.T) {
	for in, want := range map[string]string{
		"disconnected:unix:/run/a,b,server=on": "/run/a,b",
		"unix:/run/a,server=on":                "/run/a",
		"unix:/run/a":                          "",
		"unix:,server=on":                      "",
		"null":                                 "",
		"disconnected:tcp:1.2.3.4:5,server=on": "",
	} {
		if got, ok := listener(in); ok != (want != "") || ok && got != want {
			t.Errorf("%s: %q, %v", in, got, ok)
		}
	}
}
