package lab

import (
	"context"
	"testing"
	"time"

	"vacate/lab/latency"
	"vacate/lab/memclient"
	"vacate/lab/pgclient"
)

// client is one of a server in a guest.
type client interface {
	Stats() latency.Stats
	Stop() latency.Stats
}

// clientOf starts a client of a guest's server, in the lab's client.
func clientOf(t *testing.T, l *Lab, vm *VM) client {
	t.Helper()
	var c client
	var err error
	if ctx := deadline(t, time.Minute); vm.Spec.Server == PostgreSQL {
		c, err = pgclient.Start(ctx,
			pgclient.Options{Addr: vm.ServerAddr(), Dial: l.Client.Dial,
				Rows: vm.Spec.ServerMiB << 20 / ItemBytes})
	} else {
		c, err = memclient.Start(ctx,
			memclient.Options{Addr: vm.ServerAddr(), Dial: l.Client.Dial, Items: 2000, Rate: 100,
				Redis: vm.Spec.Server == Redis})
	}
	if err != nil {
		t.Fatal(vm.explain(err))
	}
	t.Cleanup(func() { c.Stop() })
	return c
}

// more waits for n more answers to a client, and fails if one was wrong.
func more(ctx context.Context, t *testing.T, c client, n uint64) latency.Stats {
	t.Helper()
	for goal := c.Stats().Requests + n; ; time.Sleep(10 * time.Millisecond) {
		s := c.Stats()
		if s.Wrong != 0 || s.Broken != 0 || ctx.Err() != nil {
			t.Fatalf("the client: %v, saw %+v", ctx.Err(), s)
		}
		if s.Requests >= goal {
			return s
		}
	}
}

// A server in a guest, and its client's connections, move with the guest.
func TestServers(t *testing.T) {
	l := newTestLab(t, Options{Rate: 1e9})
	for _, kind := range Servers() {
		t.Run(string(kind), func(t *testing.T) { serverMoves(t, l, kind) })
	}
}

func serverMoves(t *testing.T, l *Lab, kind Server) {
	src, err := l.A.Boot(deadline(t, 5*time.Minute),
		Spec{MemoryMiB: 768, Devices: Full, Tap: true, Server: kind, ServerMiB: 64,
			Load: Load{HotMiB: 4, Slow: true}})
	if err != nil {
		t.Fatal(err)
	}
	c := clientOf(t, l, src)
	more(deadline(t, time.Minute), t, c, 200)
	dst, err := l.B.Incoming(deadline(t, time.Minute), src, IncomingOptions{Running: true})
	if err != nil {
		t.Fatal(err)
	}
	postcopy(deadline(t, 2*time.Minute), t, l, src, dst)
	src.Kill()
	t.Cleanup(dst.Kill)
	s := more(deadline(t, time.Minute), t, c, 200)
	t.Logf("%d answers, silent for %v", s.Requests, s.Silence)

	// Nothing answers over the cut link, from a guest on host b, nor does a connection break.
	if err := l.SetLinkUp(false); err != nil {
		t.Fatal(err)
	}
	time.Sleep(late) // for what is under way
	cut := c.Stats().Requests
	time.Sleep(late)
	if n := c.Stats().Requests; n != cut {
		t.Errorf("%d answers over the cut link", n-cut)
	}
	if err := l.SetLinkUp(true); err != nil {
		t.Fatal(err)
	}
	if s := more(deadline(t, time.Minute), t, c, 100); s.Silence < late {
		t.Errorf("the link was cut for %v, and the client's longest silence was %v", late,
			s.Silence)
	}
	if s := c.Stop(); s.Wrong != 0 || s.Broken != 0 {
		t.Errorf("the client saw %+v", s)
	}
}
