package evict

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"vacate/link"
)

// sessionPair makes a session over loopback and returns both ends, the source's first.
func sessionPair(t *testing.T) (near, far *link.Session) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := link.NewListener(ln, link.ListenOptions{})
	t.Cleanup(func() { l.Close() })
	if near, err = (link.Dialer{Addr: ln.Addr().String()}).Session(t.Context()); err != nil {
		t.Fatal(err)
	}
	if far, err = l.Accept(t.Context()); err != nil {
		t.Fatal(err)
	}
	return near, far
}

// A destination may take longer over an offer than a source waits for one that says nothing. It hears that the source gives up.
func TestWaitingForTwin(t *testing.T) {
	ctx := t.Context()
	near, far := sessionPair(t)
	e := Source{}.engine(Preparing)
	defer e.done(nil)
	a := attach(near, maxJSON)
	defer a.end()
	r := &Request{attachment: attach(far, maxControl)}
	defer r.end()
	const patience = tellWaiting * 3 / 2
	took := make(chan error, 1)
	go func() {
		took <- r.While(ctx, "a QEMU starts", func(context.Context) error {
			time.Sleep(2 * patience)
			return r.control.Write(msgAccepted)
		})
	}()
	if err := e.awaitTaken(ctx, a.control, patience); err != nil {
		t.Error(err)
	}
	if err := <-took; err != nil {
		t.Error(err)
	}
	err := e.awaitTaken(ctx, a.control, 50*time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "neither took the offer nor turned it down: it has said nothing for 50ms") {
		t.Error(err)
	}
	go func() {
		took <- r.While(ctx, "a QEMU starts", func(ctx context.Context) error {
			<-ctx.Done()
			return context.Cause(ctx)
		})
	}()
	if f, err := a.control.await(ctx, msgWaiting); err != nil || !strings.Contains(string(f.payload), "a QEMU starts") {
		t.Error(err)
	}
	if err := writeJSON(a.control.Conn, msgAbort, farewell{"no more"}); err != nil {
		t.Error(err)
	}
	if err := <-took; err == nil || !strings.Contains(err.Error(), "no more") {
		t.Error(err)
	}
}
