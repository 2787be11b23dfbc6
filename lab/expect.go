package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Expected is a VM on a host that another process is to start, such as a daemon under test, once or
// several times in a row. Each QEMU connects to the lab for its guest's reports, and the lab knows
// it by that. From then on it does not outlive the lab, whatever becomes of the process that
// started it. Methods may be called from any goroutine.
type Expected struct {
	Name string
	Host *Host
	QMP  string // monitor socket, for the starter
	// Args are QEMU and its arguments. To wait for a guest it needs "-S -incoming defer"
	// besides. It has to run on Host, that is, be started by a process that Host.Start did.
	Args []string

	// Kernel, Initrd and Cmdline are what it boots, and Reports is the socket to which its second
	// serial port connects: all that a QEMU of another command line needs.
	Kernel, Initrd, Cmdline, Reports string

	what *prepared
	done chan struct{} // closed when no more connections are taken

	mu      sync.Mutex
	vms     []*VM         // guarded by mu
	changed chan struct{} // closed and replaced when there is another VM; guarded by mu
}

// Expect has the lab ready for a QEMU that is to take the guest of twin, and which another
// process starts.
func (h *Host) Expect(ctx context.Context, twin *VM) (*Expected, error) {
	return h.expect(ctx, twin.Spec, twin.Guest)
}

// ExpectBoot prepares the lab for QEMUs that boot a guest of their own, and that another process
// starts with its own command line. [Expected.Came] waits for each.
func (h *Host) ExpectBoot(ctx context.Context, spec Spec) (*Expected, error) {
	if err := spec.fill(ctx); err != nil {
		return nil, fmt.Errorf("expect VM on host %s: %w", h.Name, err)
	}
	return h.expect(ctx, spec, newGuest())
}

// ExpectWaiting is [Host.ExpectBoot] for guests that wait for their parameters once they have
// booted: see [VM.Waits] and [VM.Begin].
func (h *Host) ExpectWaiting(ctx context.Context, spec Spec) (*Expected, error) {
	spec.waits, spec.Disk, spec.Load = true, "", Load{}
	return h.ExpectBoot(ctx, spec)
}

func (h *Host) expect(ctx context.Context, spec Spec, guest *Guest) (*Expected, error) {
	p, err := h.prepare(ctx, spec, guest)
	if err != nil {
		return nil, fmt.Errorf("expect VM on host %s: %w", h.Name, err)
	}
	img, err := h.lab.image.get(ctx, &spec)
	if err != nil {
		return nil, fmt.Errorf("expect VM on host %s: %w", h.Name, err)
	}
	e := &Expected{
		Name: p.name, Host: h, QMP: p.file("qmp.sock"), Args: p.args,
		Kernel: img.kernel, Initrd: img.initrd, Cmdline: p.spec.cmdline(),
		Reports: p.file("load.sock"),
		what:    p, done: make(chan struct{}), changed: make(chan struct{}),
	}
	h.lab.mu.Lock()
	h.lab.expected = append(h.lab.expected, e)
	h.lab.mu.Unlock()
	go e.serve()
	return e, nil
}

// Started returns the VM that was started last, when its monitor answers. If none was, or it
// has ended since, Started waits for the next.
func (e *Expected) Started(ctx context.Context) (*VM, error) {
	for {
		vm, err := e.Came(ctx)
		if err != nil {
			return nil, err
		}
		if err = vm.answer(ctx); err == nil {
			return vm, nil
		} else if vm.Alive() {
			return nil, vm.explain(fmt.Errorf("wait for VM %s to answer: %w", e.Name, err))
		}
	}
}

// Came returns the VM that was started last, once it is there, without asking its monitor. If none
// was, or it has ended since, Came waits for the next.
func (e *Expected) Came(ctx context.Context) (*VM, error) {
	for {
		e.mu.Lock()
		changed := e.changed
		var vm *VM
		if n := len(e.vms); n > 0 && e.vms[n-1].Alive() {
			vm = e.vms[n-1]
		}
		e.mu.Unlock()
		if vm != nil {
			return vm, nil
		}
		select {
		case <-changed:
		case <-e.done:
			return nil, errHostClosed
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for VM %s to be started: %w", e.Name, ctx.Err())
		}
	}
}

// Booted waits until the load of the guest has begun that vm boots.
func (vm *VM) Booted(ctx context.Context) error {
	err := vm.Guest.wait(ctx, "the guest's load to begin", vm.done,
		func() bool { return vm.Guest.hellos > 0 })
	if err != nil {
		return vm.explain(err)
	}
	return nil
}

// Spec returns the specification of a QEMU, with all defaults filled in.
func (e *Expected) Spec() Spec { return e.what.spec }

// Guest returns the guest that such a QEMU boots, or takes.
func (e *Expected) Guest() *Guest { return e.what.guest }

// VMs returns all that were started so far, the oldest first.
func (e *Expected) VMs() []*VM {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.vms)
}

// serve takes the connections of QEMUs until close.
func (e *Expected) serve() {
	defer close(e.done)
	defer e.what.reports.Close()
	for {
		conn, err := e.what.reports.AcceptUnix()
		if err != nil {
			return
		}
		if err := e.take(conn); err != nil {
			conn.Close()
			e.Host.lab.log.Error("a QEMU that the lab cannot follow", "vm", e.Name, "error", err)
		}
	}
}

// take makes a VM of the process at the other end of conn.
func (e *Expected) take(conn *net.UnixConn) error {
	pid, err := peer(conn)
	if err != nil {
		return err
	}
	process, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	forget, err := killWithLab(pid)
	if err != nil {
		process.Kill()
		return err
	}
	vm := e.what.vm()
	vm.process = process
	vm.all.Go(func() {
		defer close(vm.done)
		defer forget()
		// The handle is a pidfd, which can be read when the process has ended.
		err := process.WithHandle(func(pidfd uintptr) {
			fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
			for {
				if _, err := unix.Poll(fds, -1); err != unix.EINTR {
					return
				}
			}
		})
		if err != nil && !errors.Is(err, os.ErrProcessDone) {
			process.Kill()
		}
	})
	vm.follow(conn)
	l := e.Host.lab
	l.mu.Lock()
	l.vms = append(l.vms, vm)
	l.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.vms = append(e.vms, vm)
	close(e.changed)
	e.changed = make(chan struct{})
	return nil
}

// peer returns the process that made a connection.
func peer(conn *net.UnixConn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, fmt.Errorf("whose connection: %w", credErr)
	}
	if cred.Pid <= 1 {
		return 0, fmt.Errorf("a connection of process %d", cred.Pid)
	}
	return int(cred.Pid), nil
}

// killWithLab makes sure that a process is killed when this one ends, in whatever way, until forget
// is called. A shell waits for the end of a pipe whose other end only this process has.
func killWithLab(pid int) (forget func(), err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command("sh", "-c", `read -r forget || kill -9 "$1"`, "sh", strconv.Itoa(pid))
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no signal of a terminal is for it
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, fmt.Errorf("start a guard: %w", err)
	}
	return func() {
		w.WriteString("forget\n")
		w.Close()
		cmd.Wait()
	}, nil
}

// close takes no more connections, but those that were made before.
func (e *Expected) close() {
	os.Remove(e.what.file("load.sock"))
	e.what.reports.SetDeadline(time.Now().Add(100 * time.Millisecond))
	<-e.done
}
