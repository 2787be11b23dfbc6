package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
)

// dying is a daemon that dies in the middle of a call, until it has died so often.
type dying struct {
	hostv1.UnimplementedHostHandler
	deaths atomic.Int32
	stops  bool             // in place of dying: it is told to stop, as for an upgrade
	state  *hostv1.Eviction // before
	end    *hostv1.Eviction // after
}

func (d *dying) die() { panic(http.ErrAbortHandler) }

func (d *dying) WatchEviction(_ context.Context, _ *connect.Request[hostv1.WatchEvictionRequest],
	s *connect.ServerStream[hostv1.Eviction]) error {
	if d.deaths.Add(-1) >= 0 {
		s.Send(d.state)
		if d.stops {
			return connect.NewError(connect.CodeCanceled, context.Canceled)
		}
		d.die()
	}
	return s.Send(d.end)
}

func (d *dying) Evict(context.Context,
	*connect.Request[hostv1.EvictRequest]) (*connect.Response[hostv1.Eviction], error) {
	d.die()
	return nil, nil
}

// listen has the daemon answer at a socket until what it returns is called.
func (d *dying) listen(t *testing.T, socket string) (stop func()) {
	t.Helper()
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(hostv1.NewHostHandler(d))
	s := &http.Server{Handler: mux}
	var served sync.WaitGroup
	served.Go(func() { s.Serve(ln) })
	return sync.OnceFunc(func() {
		s.Close()
		served.Wait()
	})
}

// A daemon that is killed under a command that follows an eviction is waited for; and is told of in
// words when it does not come back.
func TestFollow(t *testing.T) {
	dir, err := os.MkdirTemp("", "vacate") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	const id = "0123456789abcdef0123456789abcdef"
	moment := func(role string, s evict.State) *hostv1.Eviction {
		return &hostv1.Eviction{Id: id, Vm: "web1", Role: role, Peer: "hostb", State: string(s),
			Progress: &hostv1.Progress{PagesSent: 1, PagesTotal: 9}}
	}
	for _, test := range []struct {
		name   string
		state  *hostv1.Eviction
		deaths int32
		end    string // outcome; empty: it stays away
		code   int
		said   []string // by the note
		ended  []string // by the error
	}{
		{"back, completed", moment("source", evict.Pushing), 3, "completed", exitCompleted,
			[]string{
				"vacated does not answer. VM web1 runs, or may run, on host hostb with the " +
					"memory that went there"},
			nil},
		{"stopped, completed", moment("source", evict.Pushing), 3, "completed", exitCompleted,
			[]string{"vacated does not answer"}, nil},
		{"back, aborted", moment("source", evict.Loading), 1, "aborted", exitAborted,
			[]string{
				"When it last answered, VM web1 was not told to run on host hostb yet. It may " +
					"have been since: do not start it by hand"}, nil},
		{"back, rolled back", moment("source", evict.RollingBack), 1, "aborted", exitAborted,
			[]string{"VM web1 stays on this host"}, nil},
		{"back, lost", moment("source", evict.Pushing), 1, "lost contact", exitLost, nil, nil},
		{"away", moment("source", evict.Pushing), 1, "", exitDetached, nil,
			[]string{"vacated has not answered for 300ms", "systemctl start vacated",
				"vacate watch 01234567", "VM web1 runs, or may run, on host hostb"}},
		{"away, at the destination", moment("destination", evict.Running), 1, "", exitDetached, nil,
			[]string{"told to run on this host", "host hostb"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			socket := filepath.Join(dir, "sock")
			fake := &dying{state: test.state, stops: test.name == "stopped, completed",
				end: &hostv1.Eviction{Id: id, Vm: "web1", Outcome: test.end}}
			fake.deaths.Store(test.deaths)
			stop := fake.listen(t, socket)
			defer func() { stop() }()
			d := &daemon{socket: socket, patience: 300 * time.Millisecond}
			if test.end != "" {
				d.patience = time.Minute
			}
			if err := d.open(); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			s := newScreen(&lines{w: &out})
			away := false
			last, err := d.follow(t.Context(), id, s, func(*hostv1.Eviction) {
				if test.end == "" && !away {
					away = true
					go stop()
				}
			})
			s.close()
			if err == nil {
				err = failure(last)
			}
			if code := exitCode(err); code != test.code {
				t.Errorf("exit code %d, not %d: %v", code, test.code, err)
			}
			for _, text := range test.said {
				if !strings.Contains(out.String(), text) {
					t.Errorf("nothing says %q: %s", text, out.String())
				}
			}
			for _, text := range test.ended {
				if err == nil || !strings.Contains(err.Error(), text) {
					t.Errorf("nothing says %q: %v", text, err)
				}
			}
			if all := out.String() + explainOf(err); strings.Contains(all, "protocol") ||
				strings.Contains(all, "EOF") {
				t.Errorf("that is nothing for people: %s", all)
			}
		})
	}
}

func explainOf(err error) string {
	if err == nil {
		return ""
	}
	return explain(err)
}

// An eviction that a daemon was told to begin, and did not answer, may have begun.
func TestBeginUnknown(t *testing.T) {
	dir, err := os.MkdirTemp("", "vacate")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "sock")
	o := evictOptions{to: "hostb", skipChecks: true, daemon: daemon{socket: socket}}
	if err := o.runByName(t.Context(), "web1"); !errors.Is(err, evict.ErrRefused) {
		t.Errorf("without a daemon: %v", err)
	}
	stop := new(dying).listen(t, socket)
	defer stop()
	err = o.runByName(t.Context(), "web1")
	if exitCode(err) != exitDetached || errors.Is(err, evict.ErrRefused) ||
		!strings.Contains(err.Error(), "see `vacate status web1`") {
		t.Errorf("a daemon that died: %v", err)
	}
}
