package evict

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"vacate/internal/link"
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

// A destination may take longer over an offer than a source waits for a silent one. It hears that
// the source gives up.
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
	if err == nil || !strings.Contains(err.Error(),
		"neither accepted nor refused the offer: it has said nothing for 50ms") {
		t.Error(err)
	}
	go func() {
		took <- r.While(ctx, "a QEMU starts", func(ctx context.Context) error {
			<-ctx.Done()
			return context.Cause(ctx)
		})
	}()
	if f, err := a.control.await(ctx, msgWaiting); err != nil ||
		!strings.Contains(string(f.payload), "a QEMU starts") {
		t.Error(err)
	}
	if err := writeJSON(a.control.Conn, msgAbort, farewell{Reason: "no more"}); err != nil {
		t.Error(err)
	}
	if err := <-took; err == nil || !strings.Contains(err.Error(), "no more") {
		t.Error(err)
	}
}

// A source that has proved its paths may take longer over its offer than a peer that says nothing:
// on a busy host it takes long to look at a VM.
func TestPatientForOffer(t *testing.T) {
	const soon = 5 * time.Second
	near, far := sessionPair(t)
	a := attach(near, maxJSON)
	defer a.end()
	got := make(chan error, 1)
	go func() {
		r, err := readRequest(t.Context(), far, soon, time.Minute)
		if err == nil {
			r.end()
		}
		got <- err
	}()
	if err := a.prove(t.Context()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(soon + time.Second)
	if err := writeJSON(a.control.Conn, msgOffer, anOffer()); err != nil {
		t.Error(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
	_, far = sessionPair(t)
	if _, err := readRequest(t.Context(), far, 50*time.Millisecond, time.Minute); !errors.Is(err,
		errSaidNothing) {
		t.Errorf("a peer that says nothing: %v", err)
	}
}

// As many bytes cross the control lane ahead of the freeze as will during it, but not any number.
func TestOpenWindow(t *testing.T) {
	near, far := sessionPair(t)
	a, b := attach(near, maxJSON), attach(far, maxControl)
	defer a.end()
	defer b.end()
	before := uint64(0)
	for _, c := range []struct{ early, want uint64 }{{0, packageBytes},
		{528 << 10, packageBytes + 528<<10}, {maxFlash, mostOpening}} {
		if err := a.control.openWindow(t.Context(), c.early); err != nil {
			t.Fatal(err)
		}
		_, received := b.Bytes()
		if n := received - before; n < c.want || n > c.want+100 {
			t.Errorf("%d bytes for %d early ones, want %d", n, c.early, c.want)
		}
		before = received
	}
}

// The path is proved on each lane, each way. A peer that answers something else fails the proof.
func TestProve(t *testing.T) {
	prove := func(answer func(b *attachment,
		proof []byte) error) (b *attachment, ours, theirs error) {
		near, far := sessionPair(t)
		a, b := attach(near, maxJSON), attach(far, maxControl)
		t.Cleanup(a.end)
		t.Cleanup(b.end)
		done := make(chan error, 1)
		go func() {
			f, err := b.control.await(t.Context(), msgProve)
			if err == nil {
				err = answer(b, f.payload)
			}
			done <- err
		}()
		ours = a.prove(t.Context())
		return b, ours, <-done
	}
	b, ours, theirs := prove(func(b *attachment, proof []byte) error {
		return b.answerProof(t.Context(), proof)
	})
	if sent, received := b.Bytes(); ours != nil || theirs != nil ||
		min(sent, received) < 3*proofBytes {
		t.Errorf("%v, %v; %d bytes sent, %d received", ours, theirs, sent, received)
	}
	_, ours, _ = prove(func(b *attachment, _ []byte) error {
		return b.control.Write(msgProve, []byte("short"))
	})
	if ours == nil || !errors.Is(ours, link.ErrPeer) {
		t.Errorf("a short answer: %v", ours)
	}
	_, ours, _ = prove(func(b *attachment, _ []byte) error {
		return writeJSON(b.control.Conn, msgAbort, farewell{Reason: "no"})
	})
	if !errors.Is(ours, errFarewell) {
		t.Errorf("no answer but a farewell: %v", ours)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	near, _ := sessionPair(t)
	a := attach(near, maxJSON)
	defer a.end()
	time.AfterFunc(50*time.Millisecond, func() { cancel(errEnough) })
	if err := a.prove(ctx); !errors.Is(err, errEnough) {
		t.Errorf("when it is cancelled: %v", err)
	}
}

var errEnough = errors.New("enough")

// A lane that ended by a time-out, or was reset late, has lost a frame. One that was reset at once
// has not.
func TestLossError(t *testing.T) {
	for _, c := range []struct {
		err   error
		after time.Duration
		lossy bool
	}{
		{syscall.ETIMEDOUT, 0, true}, {errProof, proofTime, true},
		{syscall.ECONNRESET, lossTime, true}, {syscall.ECONNRESET, lossTime / 2, false},
		{errFarewell, proofTime, false}, {context.Canceled, proofTime, false},
	} {
		if lossy(fmt.Errorf("read: %w", c.err), c.after) != c.lossy {
			t.Errorf("%v after %v", c.err, c.after)
		}
	}
	const want = "the path to 10.0.0.2 loses large packets, or is slower than 300 kbit/s: small " +
		"frames pass on the push lane, and one of 64 KiB does not"
	if err := (&lossError{"10.0.0.2:7601", "push", errProof}); !strings.HasPrefix(err.Error(),
		want) || !strings.HasSuffix(err.Error(), "`ping -M do -s 1472 10.0.0.2`") {
		t.Error(err)
	}
	if err := (&lossError{"10.0.0.2:7601", "push",
		syscall.ETIMEDOUT}); strings.Contains(err.Error(), "slower") {
		t.Error(err)
	}
}
