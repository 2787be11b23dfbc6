package evict_test

import (
	"net"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/link"
	"vacate/lab/labtest"
)

// TestAsk sends questions behind no filler, some, and too much.
func TestAsk(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	away := make(chan error, 10)
	turnedAway := func(_ string, err error) { away <- err }
	sessions := link.NewListener(ln, link.ListenOptions{TurnedAway: turnedAway})
	defer sessions.Close()
	ctx := labtest.Within(t, time.Minute)
	requests, stop := evict.Requests(ctx, sessions.Accept, turnedAway,
		func(err error) { t.Error(err) })
	defer stop()
	go func() {
		for r := range requests {
			r.Tell(string(r.Question) + "!")
		}
	}()
	ask := func(fill int) (answer string, err error) {
		s, err := link.Dialer{Addr: ln.Addr().String()}.Session(ctx)
		if err == nil {
			err = evict.Ask(ctx, s, fill, 7, &answer)
		}
		return answer, err
	}
	for _, fill := range []int{0, 1, 256 << 10, 1 << 20, 16 << 20} {
		if answer, err := ask(fill); err != nil || answer != "7!" {
			t.Errorf("behind %d bytes: %q, %v", fill, answer, err)
		}
	}
	if _, err := ask(16<<20 + 1); err == nil {
		t.Error("too much was taken")
	}
	select {
	case <-away:
	case <-ctx.Done():
		t.Error("nobody was turned away")
	}
}
