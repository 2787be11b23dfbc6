package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
	"vacate/internal/sys/sched"

	"golang.org/x/sys/unix"
)

// How long a QEMU may take until it answers, unless its VM's description has start_timeout.
const (
	usualStart = 30 * time.Second
	leastStart = time.Second
	// MaxStart is the longest start_timeout.
	MaxStart = time.Hour
)

// A PresentError is why no twin was started: there is a QEMU of the VM here.
type PresentError struct {
	VM   string
	Seen Seen
}

func (e *PresentError) Error() string {
	pid := fmt.Sprintf("process %d", e.Seen.Process.PID)
	switch e.Seen.State {
	case Running:
		return fmt.Sprintf("VM %s runs already (%s)", e.VM, pid)
	case Incoming:
		return fmt.Sprintf("a twin of VM %s waits already (%s): if no eviction needs it, end it "+
			"with kill -9 %d", e.VM, pid, e.Seen.Process.PID)
	case Frozen:
		return fmt.Sprintf("VM %s is there already, frozen by an eviction (%s, %s): see vacate "+
			"status", e.VM, pid, e.Seen.Status)
	case Starting:
		return fmt.Sprintf("a QEMU of VM %s is there already (%s), and does not answer: "+
			"wait if it is starting, else end it with kill -9 %d", e.VM, pid, e.Seen.Process.PID)
	case Silent:
		return fmt.Sprintf("a QEMU of VM %s is there already, and its monitor does not answer: "+
			"another eviction, or another client, has it", e.VM)
	}
	return fmt.Sprintf("VM %s is there already, %s (%s)", e.VM, e.Seen.Status, pid)
}

// Absent returns an error unless there is no QEMU of a VM here; a *PresentError if there is one.
func Absent(ctx context.Context, vm VM) error {
	seen, err := Search(ctx, vm)
	if err == nil && seen.State != None {
		err = &PresentError{vm.Name, seen}
	}
	return err
}

// StartTwin starts the VM's QEMU so that it waits for the VM to arrive, and returns when it does.
// It fails with a
// *PresentError when a QEMU answers at the VM's QMP socket: one more would take the socket away
// from it.
//
// The QEMU lives on when this process ends: it has a session, a log file and an environment of its
// own, and none of our descriptors. One goroutine stays until the QEMU ends, to take note of that
// for the kernel.
func StartTwin(ctx context.Context, vm VM) (process.Process, error) {
	p, err := start(ctx, vm, true)
	if err != nil {
		return process.Process{}, fmt.Errorf("start twin: %w", err)
	}
	return p, nil
}

// Start is StartTwin for a VM that is to run at once, from its disks. Whether it may, the caller
// knows.
func Start(ctx context.Context, vm VM) (process.Process, error) {
	p, err := start(ctx, vm, false)
	if err != nil {
		return process.Process{}, fmt.Errorf("start VM %s: %w", vm.Name, err)
	}
	return p, nil
}

func start(ctx context.Context, vm VM, twin bool) (process.Process, error) {
	// The description is a good lock: there is one for each VM.
	lock, err := os.Open(vm.file)
	if err != nil {
		return process.Process{}, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		return process.Process{}, fmt.Errorf("a QEMU of VM %s is being started already", vm.Name)
	} else if err != nil {
		return process.Process{}, os.NewSyscallError("flock", err)
	}
	if err := Absent(ctx, vm); err != nil {
		return process.Process{}, err
	}

	ctx, cancel := context.WithTimeoutCause(ctx, vm.StartTimeout, errSlow)
	defer cancel()
	log, err := os.OpenFile(vm.Log,
		os.O_RDWR|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return process.Process{}, fmt.Errorf("open its log: %w", err)
	}
	defer log.Close()
	said, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return process.Process{}, fmt.Errorf("%s, its log, is not a file: %w", vm.Log, err)
	}
	cmd, err := vm.start(log, twin)
	if err != nil {
		return process.Process{}, err
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait() // what it ended with, its log tells
		close(ended)
	}()
	p, err := answers(ctx, vm, twin, cmd.Process.Pid, ended)
	if err != nil {
		cmd.Process.Kill()
		<-ended
		if words := process.LastWords(log, said); words != "" {
			err = fmt.Errorf("%w: %s has: %s", err, log.Name(), words)
		}
		return process.Process{}, err
	}
	return p, nil
}

// start starts the QEMU as a process of its own, where systemd runs in a control group of its own.
func (vm VM) start(log *os.File, twin bool) (*exec.Cmd, error) {
	args := vm.Args(twin)
	var cred *syscall.Credential
	if vm.User != "" {
		var err error
		if cred, err = credential(vm.User); err != nil {
			return nil, err
		}
	}
	if Scoped() {
		args = append(scope("VM "+vm.Name, vm.Name, cred), args...)
		cred = nil // for systemd-run, which sets it
	}
	return launch(args, cred, vm.Env, log)
}

// launch starts a process that outlives this one. It gets files as its descriptors from 3 on.
func launch(args []string, cred *syscall.Credential, env map[string]string, log *os.File,
	files ...*os.File) (*exec.Cmd, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.ExtraFiles = files
	if log != nil {
		cmd.Stdout, cmd.Stderr = log, log
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: cred}
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	// Go opens all files so that they close by themselves. Those that we were started with may not.
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil &&
		err != unix.ENOSYS && err != unix.EINVAL {
		return nil, os.NewSyscallError("close_range", err)
	}
	if err := sched.Usual(cmd.Start); err != nil {
		return nil, err
	}
	// As a daemon may be spared when memory runs out, and a VM should not for that reason. It may
	// always be raised.
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", cmd.Process.Pid), []byte("0"), 0)
	return cmd, nil
}

func credential(name string) (*syscall.Credential, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return nil, err
	}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("groups of user %s: %w", name, err)
	}
	ids := make([]uint32, 0, 2+len(groups))
	for _, s := range append([]string{u.Uid, u.Gid}, groups...) {
		id, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("user %s: %w", name, err)
		}
		ids = append(ids, uint32(id))
	}
	return &syscall.Credential{Uid: ids[0], Gid: ids[1], Groups: ids[2:]}, nil
}

// attemptTime is how long a QEMU that was just started may take to answer once. A command that
// reaches QEMU 7.2 in the moment when its main loop begins may lie there until another client comes
// (seen once in some 300 starts).
const attemptTime = 3 * time.Second

// errSlow is why a QEMU that is being started is given up.
var errSlow = errors.New("it took too long")

// answers waits until the QEMU that was started answers; a twin then waits for the VM.
func answers(ctx context.Context, vm VM, twin bool, pid int,
	ended <-chan struct{}) (process.Process, error) {
	for {
		seen, err := answer(ctx, vm, twin, pid)
		if err == nil {
			return seen.Process, nil
		}
		again := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) ||
			errors.Is(err, context.DeadlineExceeded) || errors.Is(err, qmp.ErrBusy)
		if hung := errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) ||
			errors.Is(err, syscall.EPIPE); ctx.Err() == nil && hung {
			// A QEMU may make its monitor, and then find that it cannot start. Its log says more.
			select {
			case <-ended:
			case <-time.After(attemptTime):
				return process.Process{}, err
			}
		} else if ctx.Err() == nil && !again {
			return process.Process{}, err
		}
		select {
		case <-ended:
			return process.Process{}, errors.New("QEMU ended at once")
		case <-ctx.Done():
			if context.Cause(ctx) == errSlow {
				return process.Process{},
					fmt.Errorf("QEMU did not answer at %s within %v and was ended: if VM %s "+
						"needs longer to start, set start_timeout in %s", vm.QMP, vm.StartTimeout,
						vm.Name, vm.file)
			}
			return process.Process{}, fmt.Errorf("QEMU does not answer at %s yet: %w", vm.QMP,
				context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// answer asks the QEMU that was started once.
func answer(ctx context.Context, vm VM, twin bool, pid int) (Seen, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTime)
	defer cancel()
	q, err := qmp.Dial(ctx, vm.QMP)
	if err != nil {
		return Seen{}, err
	}
	defer q.Close()
	if q.PeerPID() != pid {
		if sid, err := unix.Getsid(q.PeerPID()); err == nil && sid == pid { // of ours, by a detour
			if p, err := process.Find(q.PeerPID()); err == nil {
				p.Kill(ctx)
			}
		}
		return Seen{},
			fmt.Errorf("another process (%d) answers at %s than the one started (%d): the "+
				"command must become QEMU (exec), not start it", q.PeerPID(), vm.QMP, pid)
	}
	seen, err := ask(ctx, q)
	if err == nil && twin && seen.State != Incoming {
		err = fmt.Errorf("the QEMU does not wait for a VM: it is %s", seen.Status)
	}
	return seen, err
}
