package member

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"vacate/internal/fleet/store"
	"vacate/internal/link/certs"
)

// Three members serve, and let nobody in who is none of them.
func TestThree(t *testing.T) {
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca")
	if err := certs.Init(ca); err != nil {
		t.Fatal(err)
	}
	names, members := []string{"127.0.0.1", "127.0.0.2", "127.0.0.3"}, []string{}
	for _, name := range append(names, "hosta") {
		if err := certs.Issue(ca, name, filepath.Join(dir, name), certs.DefaultDays,
			false); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range names {
		ln, err := net.Listen("tcp", name+":0")
		if err != nil {
			t.Fatal(err)
		}
		members = append(members, ln.Addr().String())
		ln.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	config := func(name, files string) Config {
		return Config{Name: name, Dir: filepath.Join(dir, files, name), Members: members,
			Certs: filepath.Join(dir, name)}
	}
	// start starts all three on files of their own.
	start := func(files string) (started []*Member, stop func()) {
		started = make([]*Member, len(names))
		var starts sync.WaitGroup
		for i, name := range names {
			starts.Go(func() {
				var err error
				started[i], err = Start(ctx, config(name, files), slog.New(slog.DiscardHandler))
				if err != nil {
					t.Error(err)
				}
			})
		}
		starts.Wait()
		stop = sync.OnceFunc(func() {
			for _, m := range started {
				if m != nil {
					m.Close()
				}
			}
		})
		t.Cleanup(stop)
		if t.Failed() {
			t.FailNow()
		}
		return started, stop
	}
	started, stop := start("first")
	for i, m := range started {
		if _, err := m.Client.Put(t.Context(), fmt.Sprint("/k", i), "v"); err != nil {
			t.Error(err)
		}
	}
	for _, who := range []struct {
		name string
		in   bool
	}{{"hosta", false}, {"127.0.0.2", true}} {
		identity, err := certs.Load(filepath.Join(dir, who.name), nil)
		if err != nil {
			t.Fatal(err)
		}
		if in := greets(t, members[0], identity.Client("127.0.0.1")); in != who.in {
			t.Errorf("%s as a member: let in is %v", who.name, in)
		}
	}

	// All three are made anew of a snapshot of one.
	snapshot, err := started[0].Client.Snapshot(ctx)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(snapshot)
	file := filepath.Join(dir, "snapshot")
	if err == nil {
		err = errors.Join(snapshot.Close(), os.WriteFile(file, data, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	stop()
	for _, name := range names {
		if err := Restore(config(name, "second"), file); err != nil {
			t.Fatal(err)
		}
	}
	started, _ = start("second")
	for i, m := range started {
		r, err := m.Client.Get(ctx, "/k2")
		if err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "v" {
			t.Errorf("member %d has %v, %v", i, r, err)
		}
	}

	// One says who leads when the others do not answer.
	led, err := store.New(started[0].Client, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := led.Campaign(ctx, "me"); err != nil {
		t.Fatal(err)
	}
	last, err := store.New(started[2].Client, 0)
	if err != nil {
		t.Fatal(err)
	}
	for who := ""; who != "me"; time.Sleep(10 * time.Millisecond) {
		if who, err = last.Leader(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 2 {
		started[i].Close()
		started[i] = nil
	}
	if who, err := last.Leader(ctx); who != "me" || err != nil {
		t.Errorf("%q leads, %v", who, err)
	}
}

// A member is known by a name, as its certificate has it, and etcd listens on addresses alone.
func TestNamed(t *testing.T) {
	dir := t.TempDir()
	if err := certs.Init(filepath.Join(dir, "ca")); err != nil {
		t.Fatal(err)
	}
	if err := certs.Issue(filepath.Join(dir, "ca"), "brain1", filepath.Join(dir, "certs"),
		certs.DefaultDays, false); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	m, err := Start(ctx, Config{Name: "brain1", Dir: dir, Certs: filepath.Join(dir, "certs"),
		Members: []string{"brain1:" + port}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	identity, err := certs.Load(filepath.Join(dir, "certs"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if !greets(t, "127.0.0.1:"+port, identity.Client("brain1")) {
		t.Error("it does not answer")
	}
}

// greets reports whether a member answers a request after the handshake.
func greets(t *testing.T, address string, c *tls.Config) bool {
	t.Helper()
	conn, err := tls.Dial("tcp", address, c)
	if err != nil {
		return false
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /version HTTP/1.0\r\n\r\n")
	n, err := conn.Read(make([]byte, 100))
	return n > 0 && err == nil
}
