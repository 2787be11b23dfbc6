package evict_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"vacate/evict"
	"vacate/lab"
	"vacate/link"
)

// testDir is one cache for all tests; the repository ignores it.
const testDir = "../.lab"

// need skips the test when err tells what this machine lacks for it, or fails it if the
// environment says that all must run.
func need(t testing.TB, err error) {
	t.Helper()
	if err == nil {
		return
	}
	if os.Getenv("VACATE_REQUIRE") == "1" {
		t.Fatal(err)
	}
	t.Skip(err)
}

// newLab makes a lab, or skips the test where none can be made, or fails it if the
// environment says that all must run.
func newLab(t testing.TB, opts lab.Options) *lab.Lab {
	t.Helper()
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	need(t, lab.Probe())
	opts.Dir = testDir
	opts.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	l, err := lab.New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// boot starts a guest on host a and waits until it works.
func boot(t testing.TB, l *lab.Lab, spec lab.Spec) *lab.VM {
	t.Helper()
	vm, err := l.A.Boot(within(t, 3*time.Minute), spec)
	if err != nil {
		t.Fatal(err)
	}
	if !spec.Load.Sleep {
		if err := vm.Guest.WaitOps(within(t, time.Minute), 10_000); err != nil {
			t.Fatal(err)
		}
	}
	return vm
}

// incoming starts the VM's twin on host b.
func incoming(t testing.TB, l *lab.Lab, vm *lab.VM) *lab.VM {
	t.Helper()
	twin, err := l.B.Incoming(within(t, time.Minute), vm, lab.IncomingOptions{})
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

// connectTo makes sessions from a host with what listens at addr.
func connectTo(h *lab.Host, addr string) func(context.Context) (*link.Session, error) {
	return link.Dialer{Addr: addr, Dial: dialFrom(h)}.Session
}

// receiveOn takes a VM from who comes to ln.
func receiveOn(ctx context.Context, d evict.Destination, ln net.Listener) error {
	log := d.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	turnedAway := func(peer string, err error) { log.Warn("peer turned away", "peer", peer, "error", err) }
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	sessions := link.NewListener(ln, link.ListenOptions{TurnedAway: turnedAway})
	defer sessions.Close()
	requests, stop := evict.Requests(ctx, sessions.Accept, turnedAway, func(err error) { cancel(err) })
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
		received <- receiveOn(ctx, evict.Destination{QMP: twin.QMP, Log: log.With("side", "destination")}, ln)
	}()
	var r result
	r.report, r.source = evict.Source{QMP: vm.QMP, Connect: connectTo(from, ln.Addr().String()), Log: log.With("side", "source"), Show: r.show(t)}.Evict(ctx)
	if r.source != nil {
		ln.Close()
	}
	r.destErr = <-received
	return r
}

// show checks that progress never runs backwards.
func (r *result) show(t testing.TB) func(evict.Progress) {
	return func(p evict.Progress) {
		if p.Pages < r.last.Pages || p.Bytes < r.last.Bytes || p.Elapsed < r.last.Elapsed || p.Total < r.last.Total {
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
	if sum := p.Early + p.Pushed + p.Near + p.Fetched + p.Skipped; sum != p.Total {
		t.Errorf("%d pages sent and skipped of %d: %+v", sum, p.Total, p)
	}
}

// mustCheck has the guest check all of its memory.
func mustCheck(t testing.TB, vm *lab.VM) {
	t.Helper()
	check, err := vm.Guest.Check(within(t, 2*time.Minute), vm)
	if err != nil {
		t.Fatal(err)
	}
	if check.Bad != 0 || check.Pages == 0 {
		t.Fatalf("%d bad pages of %d", check.Bad, check.Pages)
	}
}

func TestEvict(t *testing.T) {
	l := newLab(t, lab.Options{Rate: 1e9})
	vm := boot(t, l, lab.Spec{Load: lab.Load{HotMiB: 100, IdleMiB: 100, OtherMiB: 20, FileMiB: 4}})
	twin := incoming(t, l, vm)
	r := evictVM(within(t, time.Minute), t, l, vm, twin)
	t.Logf("%+v", r.report)
	r.mustComplete(t)
	if err := vm.Guest.WaitOps(within(t, time.Minute), 1000); err != nil {
		t.Error(err)
	}
	mustCheck(t, twin)
	select {
	case <-vm.Done():
	case <-time.After(10 * time.Second):
		t.Error("the source's QEMU is still there")
	}
	if errors.Is(r.source, evict.ErrLost) {
		t.Error("lost")
	}
}
