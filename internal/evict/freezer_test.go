package evict

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
	"vacate/lab"
	"vacate/lab/labtest"

	"golang.org/x/sys/unix"
)

// The test freezes a QEMU of each version, whose guest is its firmware, and others send commands at
// every moment of that. The engine notices their effect, or QEMU cannot carry them out. The VM goes
// on as they left it, and the next freeze works as usual.
func TestFreezer(t *testing.T) {
	if testing.Short() {
		t.Skip("starts QEMUs")
	}
	labtest.Need(t, lab.Probe())
	for name, find := range map[string]func(context.Context) (lab.QEMU, error){
		"stock": lab.StockQEMU,
		"newest": func(ctx context.Context) (lab.QEMU, error) {
			return lab.BackportsQEMU(ctx, labtest.Dir(t))
		},
		"debian 12": func(ctx context.Context) (lab.QEMU, error) {
			return lab.Backports12QEMU(ctx, labtest.Dir(t))
		},
	} {
		t.Run(name, func(t *testing.T) {
			q, err := find(labtest.Within(t, 5*time.Minute))
			labtest.Need(t, err)
			v := startFirmware(t, q)
			v.all()
		})
	}
}

type firmware struct {
	*testing.T
	ctx      context.Context
	disk     string
	q, other *qmp.Client
	mem      *guestmem.Memory
	qemu     process.Process
	machine  string
	last     *freezer
	// QEMU's word for the state that it stands in when it is frozen; empty if it runs
	stands string
}

func startFirmware(t *testing.T, q lab.QEMU) *firmware {
	dir := t.TempDir()
	v := &firmware{T: t, ctx: labtest.Within(t, 2*time.Minute), disk: filepath.Join(dir, "disk")}
	v.check(os.WriteFile(v.disk, make([]byte, 1<<20), 0o600))
	sockets := []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}
	cmd := exec.Command(q.Path, "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "64",
		"-machine", "pc",
		"-drive", "file="+v.disk+",format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d",
		"-device", "virtio-net-pci",
		"-qmp", "unix:"+sockets[0]+",server=on,wait=off", "-qmp",
		"unix:"+sockets[1]+",server=on,wait=off")
	cmd.Stderr = t.Output()
	v.check(process.StartBound(cmd, cmd.Start))
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	dial := func(path string) *qmp.Client {
		for {
			c, err := qmp.Dial(v.ctx, path)
			if err == nil {
				t.Cleanup(func() { c.Close() })
				return c
			}
			if v.ctx.Err() != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	v.q, v.other = dial(sockets[0]), dial(sockets[1])
	var err error
	v.mem, err = guestmem.Attach(v.ctx, v.q)
	v.check(err)
	t.Cleanup(func() { v.mem.Close() })
	v.check(v.mem.Missing())
	v.qemu, err = process.Find(v.mem.PID())
	v.check(err)
	v.machine, err = v.q.QueryMachine(v.ctx)
	v.check(err)
	return v
}

func (v *firmware) check(err error) {
	v.Helper()
	if err != nil {
		v.Fatal(err)
	}
}

// is checks the VM's state.
func (v *firmware) is(want string) {
	v.Helper()
	s, err := v.other.QueryStatus(v.ctx)
	if err != nil || s.Status != want {
		v.Fatalf("the VM is %q, %v; want %q", s.Status, err, want)
	}
}

// goOn resumes the VM, as a source does that rolls back.
func (v *firmware) goOn() {
	v.Helper()
	v.rollBack("running")
}

func (v *firmware) rollBack(want string) {
	v.Helper()
	e := &source{owner: &qemuSource{q: v.q, freezer: v.last}, qemu: v.qemu,
		facts: hostFacts{Ran: v.stands == "", Stood: v.stands}}
	now, err := e.resume(v.ctx)
	if err != nil || now.Status != want {
		v.Fatalf("rolled back, and the VM is %+v, %v; want %q", now, err, want)
	}
	v.is(want)
	if v.last != nil {
		v.last.close()
		v.last = nil
	}
}

// run freezes the VM once. It calls before ahead of the freeze, between after it, and held once the
// process is stopped.
func (v *firmware) run(name string, before, between, held func(), want error, says string) {
	v.T.Run(name, func(t *testing.T) {
		all := v
		v := *v
		v.T = t
		v.is("running")
		f, err := newFreezer(v.ctx, v.q, v.mem)
		v.check(err)
		all.last = f
		if before != nil {
			before()
		}
		s, err := f.freeze(v.ctx, true)
		if err == nil {
			v.is("paused")
			if len(s.load) < 10_000 || s.at.IsZero() && v.stands == "" ||
				s.was.Running != (v.stands == "") {
				t.Errorf("%d bytes, at %v, was %+v", len(s.load), s.at, s.was)
			}
			if between != nil {
				between()
			}
			v.check(f.forget(v.ctx))
			err = f.hold(v.ctx, v.qemu)
			if stopped, err := v.qemu.Stopped(); err != nil || !stopped {
				t.Errorf("stopped %v, %v", stopped, err)
			}
			if held != nil {
				held()
			}
		}
		t.Log(err)
		if want == nil && says == "" {
			v.check(err)
		} else if err == nil || want != nil && !errors.Is(err, want) ||
			!strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %v that says %q", err, want, says)
		}
	})
	if v.Failed() {
		v.FailNow()
	}
}

// has returns a function by which somebody else sends a command.
func (v *firmware) has(command string, args any) func() {
	return func() { v.check(v.other.Run(v.ctx, command, args, nil)) }
}

func (v *firmware) all() {
	for i := range 3 {
		v.run(fmt.Sprintf("%d", i), nil, nil, nil, nil, "")
		v.goOn()
	}
	v.run("cont behind the freeze", nil, v.has("cont", nil), nil, errMoved, "RESUME")
	v.goOn()
	v.run("cont and stop behind the freeze", nil,
		func() { v.has("cont", nil)(); v.has("stop", nil)() }, nil, errMoved, "RESUME")
	v.rollBack("paused") // as that somebody wants it
	v.has("cont", nil)()
	v.run("reset behind the freeze", nil, v.has("system_reset", nil), nil, errMoved, "RESET")
	v.goOn()
	// A VM that stands gets its disk back without running, and can be frozen again.
	for range 3 {
		v.stands = "paused"
		v.run("stop ahead of the freeze", v.has("stop", nil), nil, nil, nil, "")
		v.rollBack("paused")
		if err := fit.Activate(v.ctx, v.other); err != nil { // nothing needs doing
			v.Error(err)
		}
		v.stands = ""
		v.has("cont", nil)()
	}
	v.stands = "paused"
	v.run("cont behind the freeze of one that stood", v.has("stop", nil), v.has("cont", nil), nil,
		errMoved, "RESUME")
	v.stands = ""
	v.rollBack("running")
	v.run("a device plugged", v.has("device_add",
		map[string]any{"driver": "secondary-vga", "id": "more"}), nil, nil, nil, "plugged")
	v.goOn()
	var err error
	v.mem.Close()
	v.mem, err = guestmem.Attach(v.ctx, v.q) // its memory must stay
	v.check(err)

	// A stopped QEMU carries out a command only once it may continue.
	var queued *qmp.Pending
	v.run("cont while stopped", nil, nil, func() {
		queued = v.other.Begin(v.ctx, "cont", nil)
		time.Sleep(50 * time.Millisecond)
		events := v.q.Subscribe(16)
		defer events.Close()
		v.check(v.q.Drain(v.ctx))
		if len(events.C) > 0 {
			v.Errorf("a stopped QEMU says %v", <-events.C)
		}
	}, nil, "")
	v.check(v.qemu.Continue())
	v.check(queued.Reply(v.ctx, nil))
	v.goOn()

	// The freeze gives up the lock of the disk. While another process has it, the VM cannot be
	// resumed.
	lock := func() (unlock func()) {
		f, err := os.OpenFile(v.disk, os.O_RDWR, 0)
		v.check(err)
		v.check(unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK,
			&unix.Flock_t{Type: unix.F_WRLCK, Start: 100, Len: 150}))
		return func() { f.Close() }
	}
	var unlock func()
	v.run("the disk is locked by another", nil, func() { unlock = lock() }, nil, nil, "")
	v.check(v.qemu.Continue())
	var refused *qmp.Error
	if err := v.other.Cont(v.ctx); !errors.As(err, &refused) ||
		!strings.Contains(refused.Desc, "lock") {
		v.Errorf("cont without the disk's lock: %v", err)
	}
	v.is("paused")
	unlock()
	v.goOn()
	v.run("last", nil, nil, nil, nil, "")
	v.goOn()
}

// A VM whose QEMU cannot run it, as another QEMU holds a disk, is not resumed. The error says why,
// also where the time runs out while QEMU is told once more.
func TestResumeSaysWhy(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a QEMU")
	}
	labtest.Need(t, lab.Probe())
	stock, err := lab.StockQEMU(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	v := startFirmware(t, stock)
	v.check(v.q.Run(v.ctx, "stop", nil, nil))
	ctx, cancel := context.WithCancel(v.ctx)
	defer cancel()
	told := 0
	o := &qemuSource{q: v.q, cont: func(ctx context.Context) error {
		if told++; told == 1 {
			return &qmp.Error{Command: "cont", Desc: `Failed to get "write" lock`}
		}
		cancel()
		return ctx.Err()
	}}
	_, err = o.resume(ctx, true, "")
	if err == nil || !strings.Contains(err.Error(), `Failed to get "write" lock`) {
		t.Errorf("nothing says why: %v", err)
	}
}
