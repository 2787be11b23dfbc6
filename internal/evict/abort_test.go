package evict_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/labtest"

	"golang.org/x/sys/unix"
)

// attempt is an eviction that must fail before the commit.
type attempt struct {
	name string
	// lane, upstream, kind name the frame at which a relay in between calls do.
	lane     int
	upstream bool
	kind     uint8
	do       func(r *relay, frame []byte, to net.Conn)
	cancel   bool        // ctx is cancelled when the frame has come
	cancelAt evict.State // ctx is cancelled when the source gets to that state
	timeout  time.Duration
	show     func(evict.Progress)
	// disturbed: do takes effect at a random moment. So the frame may not come, and the VM stays as
	// do left it.
	disturbed bool

	twin lab.IncomingOptions
	// done before the eviction; undone by cleanup
	with func(t *testing.T, l *lab.Lab, vm, twin *lab.VM)
	// done when the frame has come, before it passes
	atHit func(t *testing.T, l *lab.Lab, twin *lab.VM)
	here  func(t *testing.T, vm *lab.VM) // the same, at the source; undone by cleanup
	stays string                         // the VM's state after it; running if empty

	want error
	says string // part of the error
}

func pass(_ *relay, frame []byte, to net.Conn) { to.Write(frame) }

// The frames of package evict, as they stand on the wire.
const (
	offer, head, load, commit           = 1, 2, 3, 4
	accepted, loaded, running, complete = 16, 17, 18, 19
	armed                               = 25
	pages, request                      = 64, 65
)

var attempts = []attempt{
	{name: "cut at the offer", kind: offer, do: cut, want: evict.ErrRefused},
	{name: "garbage for an answer to the offer", upstream: true, kind: accepted, do: garbage,
		want: evict.ErrRefused, says: "does not speak vacate's protocol"},
	{name: "cancelled at the offer", upstream: true, kind: accepted, do: stall, cancel: true,
		want: evict.ErrAborted},
	{name: "cut at the head", kind: head, do: cut, want: evict.ErrRefused},
	{name: "head corrupted", kind: head, do: corrupt, want: evict.ErrRefused},
	{name: "cancelled at the head", kind: head, do: stall, cancel: true, want: evict.ErrAborted,
		says: "canceled"},
	{name: "cut ahead of the package", kind: pages, do: cut, want: evict.ErrAborted},
	{name: "cut at the package", kind: load, do: cut, want: evict.ErrAborted},
	{name: "package corrupted", kind: load, do: corrupt, want: evict.ErrAborted},
	{name: "cancelled at the package", kind: load, do: stall, cancel: true, want: evict.ErrAborted,
		says: "canceled"},
	{name: "destination stalls at the package", kind: load, do: stall,
		timeout: 500 * time.Millisecond, want: evict.ErrAborted,
		says: "did not load the devices within"},
	{name: "cut when loaded", upstream: true, kind: loaded, do: cut, want: evict.ErrAborted},
	{name: "cancelled when loaded", upstream: true, kind: loaded, do: stall, cancel: true,
		want: evict.ErrAborted, says: "canceled"},
	{name: "garbage when loaded", upstream: true, kind: loaded, do: garbage, want: evict.ErrAborted,
		says: "does not speak vacate's protocol"},
	{name: "destination's QEMU dies at the offer", kind: offer, do: pass, atHit: killTwin,
		want: evict.ErrRefused, says: "the other side gave up"},
	{name: "destination's QEMU dies at the head", kind: head, do: pass, atHit: killTwin,
		want: evict.ErrRefused},
	{name: "cut when armed", upstream: true, kind: armed, do: cut, want: evict.ErrRefused},
	{name: "destination's QEMU dies at the package", kind: load, do: pass, atHit: killTwin,
		want: evict.ErrAborted, says: "destination's QEMU ended"},
	{name: "a device differs in a property",
		twin: lab.IncomingOptions{Extra: []string{"-global", "virtio-net-device.ctrl_vq=off"}},
		kind: offer, do: pass, want: evict.ErrRefused,
		says: "ctrl_vq is true on the source, false on the destination"},
	{name: "a device that the destination's QEMU does not know", kind: load, do: renameDevice,
		want: evict.ErrAborted,
		says: "its last messages: qemu-system-x86_64: "},
	{name: "link dead at the package", kind: load, do: pass, atHit: unplug, timeout: time.Second,
		want: evict.ErrAborted, says: "did not load the devices within"},
	{name: "destination's disk is locked", kind: commit, do: pass, with: lockDisk,
		want: evict.ErrAborted, says: "refuses to run the VM"},
}

func killTwin(_ *testing.T, _ *lab.Lab, twin *lab.VM) { twin.Kill() }

// unplug makes the link swallow everything.
func unplug(t *testing.T, l *lab.Lab, _ *lab.VM) {
	if err := l.SetLinkUp(false); err != nil {
		t.Error(err)
	}
	t.Cleanup(func() {
		if err := l.SetLinkUp(true); err != nil {
			t.Error(err)
		}
	})
}

// lockDisk takes QEMU's lock against writing the disk for as long as the twin lives, as another VM
// with the same disk would. Byte 201 of the image means "others must not write".
func lockDisk(t *testing.T, _ *lab.Lab, vm, twin *lab.VM) {
	f, err := os.OpenFile(vm.Spec.Disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		<-twin.Done()
		f.Close()
	}()
	t.Cleanup(func() { <-closed })
	lock := unix.Flock_t{Type: unix.F_RDLCK, Start: 201, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
}

// However an eviction fails before the commit, the guest runs on where it was. One guest goes
// through all failures, one after the other, and works on in between. In the end it is evicted for
// good, and finds all of its memory as it was.
func TestAborts(t *testing.T) {
	t.Parallel()
	testAborts(t, lab.QEMU{}, slices.Concat(attempts, switches))
}

// The same with the newest QEMU.
func TestAbortsBackports(t *testing.T) {
	t.Parallel()
	labtest.New(t, lab.Options{}) // skips the test where there is none
	q, err := lab.BackportsQEMU(labtest.Within(t, 5*time.Minute), labtest.Dir(t))
	labtest.Need(t, err)
	all := slices.Concat(attempts, switches)
	for i, a := range all {
		if a.name == "a device that the destination's QEMU does not know" {
			// QEMU 11.1 may hang then, and only the time-out ends it
			all[i].says = "the destination"
		}
	}
	testAborts(t, q, all)
}

// Failures while the VM is being frozen, with the version of QEMU in between.
func TestSwitchesDebian12(t *testing.T) {
	t.Parallel()
	labtest.New(t, lab.Options{}) // skips the test where there is none
	q, err := lab.Backports12QEMU(labtest.Within(t, 5*time.Minute), labtest.Dir(t))
	labtest.Need(t, err)
	testAborts(t, q, switches)
}

func testAborts(t *testing.T, q lab.QEMU, attempts []attempt) {
	l := labtest.New(t, lab.Options{Rate: 2e9})
	vm := boot(t, l, lab.Spec{QEMU: q, Devices: lab.Full,
		Load: lab.Load{HotMiB: 40, IdleMiB: 40, OtherMiB: 20, CacheMiB: 20}})
	for _, a := range attempts {
		t.Run(a.name, func(t *testing.T) { a.run(t, l, vm) })
		if err := vm.Guest.WaitOps(labtest.Within(t, 20*time.Second), 1000); err != nil {
			t.Fatalf("after %s the guest does not work on: %v", a.name, err)
		}
		if t.Failed() {
			return
		}
	}
	disturbed(t, l, vm)
	migrateToNowhere(t, vm)
	twin := incoming(t, l, vm)
	evictVM(labtest.Within(t, time.Minute), t, l, vm, twin).mustComplete(t)
	labtest.MustCheck(t, twin)
}

// run makes the attempt, and reports whether it ended before the frame came.
func (a attempt) run(t *testing.T, l *lab.Lab, vm *lab.VM) (early bool) {
	before := settingsOf(t, vm)
	twin, err := l.B.Incoming(labtest.Within(t, time.Minute), vm, a.twin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(twin.Kill)
	if a.with != nil {
		a.with(t, l, vm, twin)
	}
	ctx, cancel := context.WithCancel(labtest.Within(t, time.Minute))
	defer cancel()
	ln, front := listen(t, l.B), listen(t, l.B)
	r := &relay{t: t, host: l.B, to: ln.Addr().String(), lane: a.lane, upstream: a.upstream,
		kind: a.kind, hit: make(chan struct{})}
	hit := r.hit
	r.do = func(r *relay, frame []byte, to net.Conn) {
		if a.atHit != nil {
			a.atHit(t, l, twin)
		}
		if a.here != nil {
			a.here(t, vm)
		}
		a.do(r, frame, to)
		if a.cancel {
			cancel()
		}
	}
	serving := make(chan struct{})
	go func() { defer close(serving); r.serve(front) }()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	received := make(chan error, 1)
	receiving, stopReceiving := context.WithCancel(labtest.Within(t, time.Minute))
	defer stopReceiving()
	go func() {
		received <- receiveOn(receiving,
			evict.Destination{QMP: twin.QMP, Log: log.With("side", "destination")}, ln)
	}()
	show := func(p evict.Progress) {
		if a.cancelAt == p.State {
			cancel()
		}
		if a.show != nil {
			a.show(p)
		}
	}
	report, evictErr := evict.Source{QMP: vm.QMP, Connect: connectTo(l.A, front.Addr().String()),
		LoadTimeout: a.timeout, Show: show, Log: log.With("side", "source")}.Evict(ctx)
	select {
	case <-hit:
	default:
		early = true
		if !a.disturbed {
			t.Error("the frame that was to be tampered with never came")
		}
	}
	front.Close()
	<-serving
	r.close()
	r.tasks.Wait()
	stopReceiving()
	destErr := <-received
	t.Logf("source: %v", evictErr)
	t.Logf("destination: %v", destErr)
	if !errors.Is(evictErr, a.want) || !strings.Contains(fmt.Sprint(evictErr), a.says) {
		t.Fatalf("source: %v; want %v that says %q", evictErr, a.want, a.says)
	}
	if report.Outcome != a.want.Error() {
		t.Errorf("the report says %q", report.Outcome)
	}
	if destErr == nil || errors.Is(destErr, evict.ErrLost) {
		t.Errorf("destination: %v", destErr)
	}
	if a.disturbed {
		return early
	}
	if status, err := vm.Status(labtest.Within(t, 10*time.Second)); err != nil ||
		status != cmp.Or(a.stays, "running") {
		t.Fatalf("the VM is %q on the source: %v", status, err)
	}
	if after := settingsOf(t, vm); after != before {
		t.Errorf("migration settings before %s, after %s", before, after)
	}
	return early
}

// settingsOf returns all migration settings of a VM's QEMU.
func settingsOf(t *testing.T, vm *lab.VM) string {
	t.Helper()
	q, err := qmp.Dial(labtest.Within(t, 10*time.Second), vm.QMP)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	caps, err := q.QueryMigrationCapabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var parameters map[string]any
	if err := q.Run(t.Context(), "query-migrate-parameters", nil, &parameters); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(caps, parameters)
}
