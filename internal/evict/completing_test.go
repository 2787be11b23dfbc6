package evict

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// The process of a twin that has all of its memory may be stopped, and so not end its migration.
// Its engine leaves all the same.
func TestLeaveCompleting(t *testing.T) {
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "stream"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := net.Dial("unix", ln.Addr().String()) // nobody reads it, or answers
	if err != nil {
		t.Fatal(err)
	}
	completing := make(chan struct{})
	e := Destination{Show: func(p Progress) {
		if p.State == Completing {
			select {
			case <-completing:
			default:
				close(completing)
			}
		}
	}}.engine(CutOff)
	e.pages.begin(nil)
	close(e.pages.whole) // there is none to wait for
	e.placer = newPlacer(conn, testSection, nil)
	e.recovery.present.Store(newStream(conn))
	left, leave := context.WithCancelCause(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- e.serve(left) }()
	select {
	case <-completing:
	case err := <-ended:
		t.Fatal("it did not come to complete:", err)
	}
	leave(ErrLeave)
	select {
	case err := <-ended:
		if !errors.Is(err, ErrLeft) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it does not leave")
	}
	e.close()
}
