package lab

import (
	"context"
	"testing"
	"time"

	"vacate/lab/memclient"
)

// clientOf starts a client of a guest's memcached, in the lab's client.
func clientOf(t *testing.T, l *Lab, vm *VM, o memclient.Options) *memclient.Client {
	t.Helper()
	o.Addr = vm.Memcached()
	o.Dial = l.Client.Dial
	c, err := memclient.Start(deadline(t, time.Minute), o)
	if err != nil {
		t.Fatal(vm.explain(err))
	}
	t.Cleanup(func() { c.Stop() })
	return c
}

// more waits for n more answers to a client, and fails if one was wrong.
func more(ctx context.Context, t *testing.T, c *memclient.Client, n uint64) memclient.Stats {
	t.Helper()
	for goal := c.Stats().Requests + n; ; time.Sleep(10 * time.Millisecond) {
		s := c.Stats()
		if s.Wrong != 0 || s.Broken != 0 || ctx.Err() != nil {
			t.Fatalf("the client of memcached: %v, saw %+v", ctx.Err(), s)
		}
		if s.Requests >= goal {
			return s
		}
	}
}

// A memcached in a guest, and its client's connections, move with the guest.
func TestMemcached(t *testing.T) {
	l := newTestLab(t, Options{Rate: 1e9})
	src, err := l.A.Boot(deadline(t, 3*time.Minute), Spec{Devices: Full, Tap: true, MemcachedMiB: 64, Load: Load{HotMiB: 4}})
	if err != nil {
		t.Fatal(err)
	}
	c := clientOf(t, l, src, memclient.Options{Items: 4000, Rate: 500})
	more(deadline(t, time.Minute), t, c, 1000)
	dst, err := l.B.Incoming(deadline(t, time.Minute), src, IncomingOptions{Running: true})
	if err != nil {
		t.Fatal(err)
	}
	postcopy(deadline(t, 2*time.Minute), t, l, src, dst)
	src.Kill()
	s := more(deadline(t, time.Minute), t, c, 1000)
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
		t.Errorf("the link was cut for %v, and the client's longest silence was %v", late, s.Silence)
	}
	if s := c.Stop(); s.Wrong != 0 || s.Broken != 0 {
		t.Errorf("the client of memcached saw %+v", s)
	}
}
