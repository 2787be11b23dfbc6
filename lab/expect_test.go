package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"
)

// startAsDaemon starts a process on the VM's host that starts its QEMU, and then waits.
func startAsDaemon(e *Expected) (*exec.Cmd, error) {
	cmd := exec.Command("sh", append([]string{"-c", `"$@" -S -incoming defer & wait`, "sh"},
		e.Args...)...)
	cmd.Stderr = os.Stderr
	return cmd, e.Host.Start(cmd)
}

// A QEMU that another process starts is a VM of the lab, also when it is started once more
// after another was killed.
func TestExpect(t *testing.T) {
	l := newTestLab(t, Options{Rate: 1e9})
	src, err := l.A.Boot(deadline(t, 3*time.Minute),
		Spec{MemoryMiB: 192, Devices: Full, Tap: true,
			Load: Load{HotMiB: 16, IdleMiB: 16, Slow: true}})
	if err != nil {
		t.Fatal(err)
	}
	e, err := l.B.Expect(deadline(t, time.Minute), src)
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), late)
	defer cancel()
	if vm, err := e.Started(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("nobody started it: %v, %v", vm, err)
	}
	var vms []*VM
	for range 2 {
		daemon, err := startAsDaemon(e)
		if err != nil {
			t.Fatal(err)
		}
		vm, err := e.Started(deadline(t, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		vms = append(vms, vm)
		// What has become of who started it is no matter.
		daemon.Process.Kill()
		daemon.Wait()
		if status, err := vm.Status(deadline(t, time.Minute)); err != nil ||
			status != "inmigrate" || !vm.Alive() {
			t.Fatalf("the VM is %q, %v, alive: %v", status, err, vm.Alive())
		}
		if again, err := e.Started(t.Context()); again != vm {
			t.Errorf("started, and asked again: %v, %v; want the same", again, err)
		}
		if len(vms) == 1 {
			vm.Kill()
			if vm.Alive() {
				t.Error("the VM is alive after Kill")
			}
		}
	}
	if got := e.VMs(); len(got) != 2 || got[0] != vms[0] || got[1] != vms[1] ||
		vms[0].PID() == vms[1].PID() {
		t.Fatalf("two processes were started in a row: %v, %v", got, vms)
	}
	dst := vms[1]
	postcopy(deadline(t, 2*time.Minute), t, l, src, dst)
	if err := dst.Execute(deadline(t, time.Minute), "cont", nil, nil); err != nil {
		// it was started with -S
		t.Fatal(err)
	}
	src.Kill()
	if err := dst.Guest.WaitOps(deadline(t, time.Minute), 1000); err != nil {
		t.Fatal(err)
	}
	samples := dst.Guest.Samples()
	if vm := samples[len(samples)-1].VM; vm != e.Name {
		t.Errorf("the last report came from VM %s, not %s", vm, e.Name)
	}
	pings(t, l, dst.Spec.Addr)
	mustCheck(t, dst.Guest, dst, (16+16)*pagesPerMiB)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if dst.Alive() {
		t.Error("the VM is alive after the lab was closed")
	}
	stateGone(t, State{VMs: []VMState{{PID: dst.PID()}}})
	if vm, err := e.Started(t.Context()); !errors.Is(err, errHostClosed) {
		t.Errorf("started in a closed lab: %v, %v", vm, err)
	}
}

// expectEnv in the environment has this binary make a lab whose QEMU has lost who started it.
const expectEnv = "VACATE_TEST_EXPECT"

// expectOnly is that lab. It says the process id of the QEMU.
func expectOnly(ctx context.Context, dir string) error {
	l, err := New(ctx, Options{Dir: dir})
	if err != nil {
		return err
	}
	defer l.Close()
	spec := Spec{MemoryMiB: 128}
	if err := spec.fill(ctx); err != nil {
		return err
	}
	e, err := l.B.Expect(ctx, &VM{Spec: spec, Guest: newGuest()})
	if err != nil {
		return err
	}
	daemon, err := startAsDaemon(e)
	if err != nil {
		return err
	}
	vm, err := e.Started(ctx)
	if err != nil {
		return err
	}
	daemon.Process.Kill()
	daemon.Wait()
	fmt.Println(vm.PID())
	<-ctx.Done()
	return nil
}

// A QEMU dies with the lab even if the process that started it is long dead, and the lab has
// no time to do anything.
func TestExpectedDiesWithLab(t *testing.T) {
	needLab(t)
	var pid int
	cmd := startSelf(t, expectEnv, func(out io.Reader) error {
		_, err := fmt.Fscanln(bufio.NewReader(out), &pid)
		return err
	})
	if exe, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || len(exe) == 0 {
		t.Fatalf("process %d is %q, %v; want a QEMU", pid, exe, err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	stateGone(t, State{VMs: []VMState{{PID: pid}}})
}
