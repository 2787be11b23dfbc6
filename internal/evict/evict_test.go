package evict_test

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/link"
	"vacate/lab"
	"vacate/lab/labtest"
)

// boot starts a VM on host a that works at an easy pace, so that tests share the machine, and waits
// until it works. It has little memory unless the test wants more: engines go through all of it.
func boot(t testing.TB, l *lab.Lab, spec lab.Spec) *lab.VM {
	t.Helper()
	spec.Load.Slow = true
	return bootBusy(t, l, spec)
}

// bootBusy starts a VM that works all the time.
func bootBusy(t testing.TB, l *lab.Lab, spec lab.Spec) *lab.VM {
	t.Helper()
	spec.MemoryMiB = cmp.Or(spec.MemoryMiB, 256)
	vm, err := l.A.Boot(labtest.Within(t, 3*time.Minute), spec)
	if err != nil {
		t.Fatal(err)
	}
	if !spec.Load.Sleep {
		if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 2000); err != nil {
			t.Fatal(err)
		}
	}
	return vm
}

// incoming starts the VM's twin on host b.
func incoming(t testing.TB, l *lab.Lab, vm *lab.VM) *lab.VM {
	t.Helper()
	twin, err := l.B.Incoming(labtest.Within(t, time.Minute), vm, lab.IncomingOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return twin
}

// listen opens a port on a host.
func listen(t testing.TB, h *lab.Host) net.Listener {
	t.Helper()
	var ln net.Listener
	err := h.Do(func() (err error) {
		ln, err = net.Listen("tcp", net.JoinHostPort(h.Addr, "0"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// dialFrom makes connections from a host.
func dialFrom(h *lab.Host) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = h.Do(func() error {
			var d net.Dialer
			c, err = d.DialContext(ctx, network, addr)
			return err
		})
		return c, err
	}
}

// connectTo makes sessions from a host to the listener at addr.
func connectTo(h *lab.Host, addr string) func(context.Context) (*link.Session, error) {
	return link.Dialer{Addr: addr, Dial: dialFrom(h)}.Session
}

// receiveOn takes a VM from a source that connects to ln.
func receiveOn(ctx context.Context, d evict.Destination, ln net.Listener) error {
	log := d.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	turnedAway := func(peer string, err error) {
		log.Warn("peer turned away", "peer", peer, "error", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	sessions := link.NewListener(ln, link.ListenOptions{TurnedAway: turnedAway})
	defer sessions.Close()
	requests, stop := evict.Requests(ctx, sessions.Accept, turnedAway,
		func(err error) { cancel(err) })
	defer stop()
	d.Patient = true
	_, err := d.Receive(ctx, requests)
	return err
}

type result struct {
	report  evict.Report
	source  error
	destErr error
	last    evict.Progress
}

// evictVM moves vm from host a to its twin on host b with both engines in this process.
func evictVM(ctx context.Context, t testing.TB, l *lab.Lab, vm, twin *lab.VM) result {
	t.Helper()
	return evictBetween(ctx, t, l.A, l.B, vm, twin)
}

func evictBetween(ctx context.Context, t testing.TB, from, to *lab.Host, vm, twin *lab.VM) result {
	t.Helper()
	ln := listen(t, to)
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	received := make(chan error, 1)
	go func() {
		received <- receiveOn(ctx,
			evict.Destination{QMP: twin.QMP, Log: log.With("side", "destination")}, ln)
	}()
	var r result
	r.report, r.source = evict.Source{QMP: vm.QMP, Connect: connectTo(from, ln.Addr().String()),
		Log: log.With("side", "source"), Show: r.show(t)}.Evict(ctx)
	if r.source != nil {
		ln.Close()
	}
	r.destErr = <-received
	return r
}

// show checks that progress never runs backwards.
func (r *result) show(t testing.TB) func(evict.Progress) {
	return func(p evict.Progress) {
		if p.Pages < r.last.Pages || p.Bytes < r.last.Bytes || p.Elapsed < r.last.Elapsed ||
			p.Total < r.last.Total {
			t.Errorf("progress went from %+v to %+v", r.last, p)
		}
		r.last = p
	}
}

func (r result) mustComplete(t testing.TB) {
	t.Helper()
	if r.source != nil || r.destErr != nil {
		t.Fatalf("source: %v; destination: %v", r.source, r.destErr)
	}
	p := r.report.Pages
	if p.Duplicate != 0 {
		t.Errorf("%d pages were sent twice", p.Duplicate)
	}
	if sum := p.Early + p.Pushed + p.Near + p.Fetched + p.Skipped + p.Unused; sum != p.Total {
		t.Errorf("%d pages sent and skipped of %d: %+v", sum, p.Total, p)
	}
}

func TestEvict(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	vm := bootBusy(t, l,
		lab.Spec{Load: lab.Load{HotMiB: 50, IdleMiB: 50, OtherMiB: 20, FileMiB: 4}})
	twin := incoming(t, l, vm)
	r := evictVM(labtest.Within(t, time.Minute), t, l, vm, twin)
	t.Logf("%+v", r.report)
	r.mustComplete(t)
	if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 1000); err != nil {
		t.Error(err)
	}
	labtest.MustCheck(t, twin)
	select {
	case <-vm.Done():
	case <-time.After(10 * time.Second):
		t.Error("the source's QEMU is still there")
	}
	if errors.Is(r.source, evict.ErrLost) {
		t.Error("lost")
	}
}
