package lab

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pings fails unless the guest at addr says, to the client, that nothing listens there.
func pings(t *testing.T, l *Lab, addr string) {
	t.Helper()
	for ctx := deadline(t, time.Minute); ; {
		err := l.Client.Do(func() error {
			d := net.Dialer{Timeout: time.Second}
			c, err := d.DialContext(ctx, "tcp4", net.JoinHostPort(addr, "1"))
			if err == nil {
				c.Close()
			}
			return err
		})
		if errors.Is(err, unix.ECONNREFUSED) {
			return
		}
		// Until then packets may be lost, as where a host has come up just now.
		if ctx.Err() != nil || err == nil {
			t.Fatalf("the client dialed the guest: %v; want %v", err, unix.ECONNREFUSED)
		}
	}
}

// Guests with taps have addresses of their own, which move with them, and the client
// reaches each wherever it is.
func TestTap(t *testing.T) {
	l := newTestLab(t, Options{Rate: 1e9})
	spec := Spec{MemoryMiB: 192, Devices: Full, Tap: true, Load: Load{HotMiB: 4, Slow: true}}
	other, err := l.B.Boot(deadline(t, 3*time.Minute), spec)
	if err != nil {
		t.Fatal(err)
	}
	src, err := l.A.Boot(deadline(t, 3*time.Minute), spec)
	if err != nil {
		t.Fatal(err)
	}
	if other.Spec.Addr == src.Spec.Addr {
		t.Fatalf("both guests have the address %s", src.Spec.Addr)
	}
	pings(t, l, other.Spec.Addr)
	pings(t, l, src.Spec.Addr)
	dst, err := l.B.Incoming(deadline(t, time.Minute), src, IncomingOptions{Running: true})
	if err != nil {
		t.Fatal(err)
	}
	pings(t, l, src.Spec.Addr)
	postcopy(deadline(t, 2*time.Minute), t, l, src, dst)
	src.Kill()
	pings(t, l, src.Spec.Addr)
	pings(t, l, other.Spec.Addr)
	// It is the link that the client's packets cross now.
	if err := l.SetLinkUp(false); err != nil {
		t.Fatal(err)
	}
	err = l.Client.Do(func() error {
		c, err := net.DialTimeout("tcp4", net.JoinHostPort(src.Spec.Addr, "1"), late)
		if err == nil {
			c.Close()
		}
		return err
	})
	if !os.IsTimeout(err) {
		t.Errorf("dialed the guest on host b over the cut link: %v; want a time-out", err)
	}
	mustCheck(t, src.Guest, dst, 4*pagesPerMiB)

	// All of the network is in these, which nothing holds when the lab is closed.
	var ids []string
	for _, h := range []*Host{l.A, l.B, l.Client} {
		id, err := os.Readlink(h.NetNS())
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if holders := namespaceHolders(t, id); holders != nil {
			t.Errorf("still in namespace %s: %v", id, holders)
		}
	}
}

// postcopy moves a guest with QEMU's own post-copy over the link.
func postcopy(ctx context.Context, t *testing.T, l *Lab, src, dst *VM) {
	t.Helper()
	must := func(vm *VM, command string, args any) {
		t.Helper()
		if err := vm.Execute(ctx, command, args, nil); err != nil {
			t.Fatal(err)
		}
	}
	capability := json.RawMessage(
		`{"capabilities": [{"capability": "postcopy-ram", "state": true}]}`)
	uri := map[string]string{"uri": "tcp:" + l.B.Addr + ":4444"}
	must(src, "migrate-set-capabilities", capability)
	must(dst, "migrate-set-capabilities", capability)
	must(dst, "migrate-incoming", uri)
	must(src, "migrate", uri)
	for status := ""; status != "completed"; {
		var q struct{ Status string }
		if err := src.Execute(ctx, "query-migrate", nil, &q); err != nil {
			t.Fatal(err)
		}
		switch status = q.Status; status {
		case "active":
			src.Execute(ctx, "migrate-start-postcopy", nil, nil) // may be too early still
		case "failed", "cancelled", "postcopy-paused":
			t.Fatal(src.explain(dst.explain(errors.New("migration " + status))))
		}
		time.Sleep(10 * time.Millisecond)
	}
}
