package evict_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/sys/process"
	"vacate/lab"
	"vacate/lab/labtest"
)

// Somebody tells the source's QEMU to run the VM in the middle of an eviction. It does not, whether
// the VM has disks, which the destination has locked by then, or none. Once the eviction is aborted
// it may. Once it is complete there is no QEMU to run it.
func TestStrayCont(t *testing.T) {
	t.Parallel()
	for name, devices := range map[string]lab.Devices{"without disks": lab.Bare,
		"with a disk": lab.Full} {
		t.Run(name, func(t *testing.T) {
			// the push takes seconds, in which a second copy would report
			l := labtest.New(t, lab.Options{Rate: 3e8})
			vm := boot(t, l, lab.Spec{Devices: devices,
				Load: lab.Load{HotMiB: 50, IdleMiB: 50, OtherMiB: 20}})
			told := make(chan error, 1)
			cont := func() {
				asked := make(chan struct{})
				go func() {
					ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
					defer cancel()
					close(asked)
					told <- vm.Execute(ctx, "cont", nil, nil)
				}()
				<-asked
				time.Sleep(50 * time.Millisecond)
			}
			err := strayed(t, l, vm, incoming(t, l, vm),
				&relay{upstream: true, kind: loaded, do: func(r *relay, frame []byte, to net.Conn) {
					untilStopped(t, vm) // which the source does meanwhile
					cont()
					if len(told) > 0 {
						t.Error("QEMU answered while its process should be stopped")
					}
					cut(r, frame, to)
				}})
			if !errors.Is(err, evict.ErrAborted) {
				t.Fatalf("%v; want it aborted", err)
			}
			// The dying twin may still have the disk.
			if err := <-told; err != nil && devices == lab.Bare {
				t.Errorf("once it was aborted: %v", err)
			}
			if err := vm.Guest.WaitOps(labtest.Within(t, 20*time.Second), 1000); err != nil {
				t.Fatal(err)
			}
			twin := incoming(t, l, vm)
			if err := strayed(t, l, vm, twin,
				&relay{kind: commit, do: func(_ *relay, frame []byte, to net.Conn) {
					cont()
					to.Write(frame)
				}}); err != nil {
				t.Fatal(err)
			}
			if err := <-told; err == nil {
				t.Error("the source's QEMU took the command")
			}
			if err := vm.Wait(labtest.Within(t, 10*time.Second)); vm.Alive() {
				t.Errorf("the source's QEMU is still there: %v", err)
			}
			labtest.MustCheck(t, twin)
			there := false
			for _, s := range vm.Guest.Samples() {
				if there = there || s.VM == twin.Name; there && s.VM != twin.Name {
					t.Fatalf("the guest reported from the source once it ran at the destination")
				}
			}
		})
	}
}

// untilStopped waits until a VM's QEMU is stopped.
func untilStopped(t *testing.T, vm *lab.VM) {
	t.Helper()
	p, err := process.Find(vm.PID())
	if err != nil {
		t.Error(err)
		return
	}
	for ctx := labtest.Within(t, 20*time.Second); ; time.Sleep(time.Millisecond) {
		if stopped, err := p.Stopped(); stopped || err != nil || ctx.Err() != nil {
			if !stopped {
				t.Errorf("QEMU is not stopped: %v", errors.Join(err, ctx.Err()))
			}
			return
		}
	}
}

// Somebody tells the twin to run the VM before the source committed. The engine ends the twin at
// once, as the source may run the VM on without asking.
func TestStrayContThere(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	vm := boot(t, l, lab.Spec{Devices: lab.Full, Load: lab.Load{HotMiB: 30, IdleMiB: 30}})
	twin := incoming(t, l, vm)
	err := strayed(t, l, vm, twin,
		&relay{upstream: true, kind: loaded, do: func(_ *relay, frame []byte, to net.Conn) {
			if err := twin.Execute(labtest.Within(t, 20*time.Second), "cont", nil,
				nil); err != nil {
				t.Logf("cont: %v", err) // it may have ended already
			}
			if err := twin.Ended(labtest.Within(t, 20*time.Second)); err != nil {
				t.Errorf("the twin runs the VM, and the source did not commit: %v", err)
			}
			to.Write(frame)
		}})
	if !errors.Is(err, evict.ErrAborted) ||
		!strings.Contains(err.Error(), "run the VM before it was told to") {
		t.Fatalf("%v; want it aborted for the reason", err)
	}
	labtest.MustCheck(t, vm)
}

// strayed evicts a VM through a relay.
func strayed(t *testing.T, l *lab.Lab, vm, twin *lab.VM, r *relay) error {
	t.Helper()
	ln, front := listen(t, l.B), listen(t, l.B)
	r.t, r.host, r.to, r.hit = t, l.B, ln.Addr().String(), make(chan struct{})
	hit := r.hit
	serving := make(chan struct{})
	go func() { defer close(serving); r.serve(front) }()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	ctx, cancel := context.WithCancel(labtest.Within(t, time.Minute))
	defer cancel()
	received := make(chan error, 1)
	go func() {
		received <- receiveOn(ctx,
			evict.Destination{QMP: twin.QMP, Log: log.With("side", "destination")}, ln)
	}()
	_, err := evict.Source{QMP: vm.QMP, Connect: connectTo(l.A, front.Addr().String()),
		LoadTimeout: 50 * time.Second,
		Log:         log.With("side", "source")}.Evict(labtest.Within(t, time.Minute))
	select {
	case <-hit:
	default:
		t.Error("the frame that was waited for never came")
	}
	front.Close()
	<-serving
	r.close()
	r.tasks.Wait()
	if err != nil {
		cancel()
	}
	if destErr := <-received; destErr != nil {
		t.Logf("destination: %v", destErr)
	}
	return err
}
