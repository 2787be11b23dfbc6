package evict_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/qemu/libvirt"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
	"vacate/lab/libvirttest"
)

// managed is a domain that an eviction moves.
type managed struct{ *libvirttest.Managed }

func startManaged(t *testing.T, spec libvirtlab.Spec) managed {
	return managed{libvirttest.Start(t, lab.Options{Rate: 1e9}, spec)}
}

// owner is a host's libvirt, with a policy for the lab's domains.
func (m managed) owner(h *libvirtlab.Host) *evict.Libvirt {
	return &evict.Libvirt{URI: "qemu:///system?socket=" + h.Socket, Domain: "web1",
		TrustDisks: true, Autostart: true, Policy: libvirt.Policy{
			Networks:  []string{"user"},
			Emulators: []string{m.Domain.VM.Spec.QEMU.Path},
			Paths:     m.Hosts.Paths(),
		}}
}

// evict moves the domain from a to b; the source runs with ctx.
func (m managed) evict(ctx context.Context, show func(evict.Progress)) result {
	m.Helper()
	ln := listen(m.T, m.Lab.B)
	log := slog.New(slog.NewTextHandler(m.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	received := make(chan error, 1)
	all, stop := context.WithCancel(labtest.Within(m.T, 3*time.Minute))
	defer stop()
	go func() {
		received <- receiveOn(all, evict.Destination{Libvirt: m.owner(m.Hosts.B),
			Log: log.With("side", "destination")}, ln)
	}()
	var r result
	r.report, r.source = evict.Source{Eviction: journal.NewID(), VM: "web1",
		Libvirt: m.owner(m.Hosts.A), Connect: connectTo(m.Lab.A, ln.Addr().String()),
		LoadTimeout: 20 * time.Second, Log: log.With("side", "source"), Show: show}.Evict(ctx)
	if errors.Is(r.source, evict.ErrRefused) {
		stop()
	}
	r.destErr = <-received
	return r
}

// A domain of libvirt is frozen and resumed, then moves under load. No page of its memory is bad.
// Both libvirts report what they would after a migration of their own.
func TestLibvirt(t *testing.T) {
	m := startManaged(t, libvirtlab.Spec{VM: lab.Spec{MemoryMiB: 256,
		Load: lab.Load{HotMiB: 24, IdleMiB: 24, Slow: true}, Devices: lab.Full}})
	m.Virsh(m.Hosts.A, "autostart", "web1")
	inactive := m.Virsh(m.Hosts.A, "dumpxml", "--inactive", "web1")

	ctx, abort := context.WithCancelCause(labtest.Within(t, time.Minute))
	r := m.evict(ctx, func(p evict.Progress) {
		if p.State == evict.Loading {
			abort(evict.ErrAbort)
		}
	})
	t.Logf("rolled back: %v; %v", r.source, r.destErr)
	if !errors.Is(r.source, evict.ErrAborted) {
		t.Fatal(r.source)
	}
	if s := m.Virsh(m.Hosts.A, "domstate", "--reason", "web1"); !strings.HasPrefix(s, "running") {
		t.Error(s)
	}
	if out := m.Virsh(m.Hosts.B, "list", "--all", "--name"); out != "" {
		t.Errorf("b still has %q", out)
	}
	m.Check(m.Domain.VM.Guest.WaitOps(labtest.Within(t, time.Minute), 100))

	r = m.evict(labtest.Within(t, 2*time.Minute), nil)
	r.mustComplete(t)
	if out := m.Virsh(m.Hosts.A, "list", "--all", "--name"); out != "" {
		t.Errorf("a still has %q", out)
	}
	if s := m.Virsh(m.Hosts.B, "domstate", "--reason", "web1"); !strings.HasPrefix(s, "running") {
		t.Error(s)
	}
	if now := m.Virsh(m.Hosts.B, "dumpxml", "--inactive", "web1"); now != inactive {
		t.Errorf("the domain is defined as\n%s\nand was\n%s", now, inactive)
	}
	if info := m.Virsh(m.Hosts.B, "dominfo", "web1"); !strings.Contains(info,
		"Autostart:      enable") {
		t.Errorf("autostart: %s", info)
	}
	vm, err := m.Domain.Came(labtest.Within(t, time.Minute))
	m.Check(err)
	m.Check(vm.Guest.WaitOps(labtest.Within(t, time.Minute), 100))
	labtest.MustCheck(t, vm)
}

// A destination's engine that ends after the commit loses its twin: the stream ends, and libvirt
// destroys the domain. The source must then keep all of the VM's memory, and another engine at the
// destination must touch nothing.
func TestLibvirtLosesItsStream(t *testing.T) {
	m := startManaged(t, libvirtlab.Spec{VM: lab.Spec{MemoryMiB: 256,
		Load: lab.Load{HotMiB: 24, IdleMiB: 24, Slow: true}, Devices: lab.Full}})
	ln := listen(t, m.Lab.B)
	j := &memoryJournal{}
	ctx, leave := context.WithCancelCause(labtest.Within(t, 2*time.Minute))
	received := make(chan error, 1)
	go func() {
		received <- receiveOn(ctx, evict.Destination{Libvirt: m.owner(m.Hosts.B), Journal: j}, ln)
	}()
	leaving, end := context.WithCancelCause(labtest.Within(t, 2*time.Minute))
	limit := &evict.Limit{}
	limit.Set(4 << 20)
	_, err := evict.Source{Eviction: journal.NewID(), VM: "web1", Libvirt: m.owner(m.Hosts.A),
		Connect: connectTo(m.Lab.A, ln.Addr().String()), LoadTimeout: 20 * time.Second,
		Limit: limit, Journal: &memoryJournal{},
		Show: func(p evict.Progress) {
			switch p.State {
			case evict.Pushing:
				leave(evict.ErrLeave)
			case evict.Reconnecting:
				end(evict.ErrLeave)
			}
		}}.Evict(leaving)
	there := <-received
	t.Logf("source: %v; destination: %v", err, there)
	if !errors.Is(err, evict.ErrLeft) || !errors.Is(there, evict.ErrLeft) {
		t.Fatal("they did not leave")
	}
	if s := m.Virsh(m.Hosts.A, "domstate", "--reason", "web1"); !strings.HasPrefix(s, "paused") {
		t.Errorf("at a: %s", s)
	}
	requests := make(chan *evict.Request)
	_, err = evict.Destination{Libvirt: m.owner(m.Hosts.B), Journal: j}.Resume(
		labtest.Within(t, time.Minute), journal.NewID(), evict.MarkMayRun, requests)
	if !errors.Is(err, evict.ErrLeft) || !strings.Contains(err.Error(), "docs/libvirt.md") {
		t.Errorf("another engine: %v", err)
	}
	// libvirt destroys a domain whose connection ends before Finish3 has returned, at its own time.
	// libvirtd 9.0 may end itself over it. So nothing is asked of it any more.
}
