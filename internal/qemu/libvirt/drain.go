package libvirt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// Drain returns when libvirt has handled all that a domain's QEMU has said so far, and every
// subscription of this connection has the events of it. The process of QEMU is stopped, so that it
// says no more, and cannot be asked.
//
// That is so when nothing is left in QEMU's monitor, the daemon's thread for the domain waits for
// more, and the daemon has then answered this connection twice: it sends what events it has before
// it reads the second call.
func (c *Conn) Drain(ctx context.Context, d Domain, qemu process.Process) error {
	what := "hear all of what the QEMU of the domain " + d.Name + " said"
	monitor, err := monitorOf(qemu.PID)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer unix.Close(monitor)
	daemon, err := unix.GetsockoptUcred(monitor, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return fmt.Errorf("%s: whose monitor: %w", what, err)
	}
	for {
		left, err := unix.IoctlGetInt(monitor, unix.SIOCOUTQ)
		if err != nil {
			return fmt.Errorf("%s: %w", what, os.NewSyscallError("ioctl SIOCOUTQ", err))
		}
		waits, err := threadWaits(int(daemon.Pid), d.Name)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if left == 0 && waits {
			break
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, ctx.Err())
		}
	}
	for range 2 {
		if _, err := c.State(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// monitorOf returns our descriptor of the monitor by which libvirt asks a QEMU.
func monitorOf(pid int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	fds, err := os.ReadDir(procFile(pid, "fd"))
	if err != nil {
		return -1, err
	}
	for _, f := range fds {
		n, err := strconv.Atoi(f.Name())
		if err != nil {
			continue
		}
		to, err := os.Readlink(procFile(pid, "fd/"+f.Name()))
		if err != nil || !strings.HasPrefix(to, "socket:") {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			return -1, os.NewSyscallError("pidfd_getfd", err)
		}
		if isMonitor(fd) {
			return fd, nil
		}
		unix.Close(fd)
	}
	return -1, fmt.Errorf("process %d has no monitor of libvirt's", pid)
}

// isMonitor reports whether a socket is the connection of libvirt's to a QEMU's monitor.
func isMonitor(fd int) bool {
	addr, err := unix.Getsockname(fd)
	if err != nil {
		return false
	}
	own, ok := addr.(*unix.SockaddrUnix)
	if !ok || filepath.Base(own.Name) != "monitor.sock" {
		return false
	}
	listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && listens == 0
}

// sysPolls are the numbers of the system calls in which a thread of libvirt's waits: GLib has
// chosen one of the two, by its version.
var sysPolls = []string{strconv.Itoa(unix.SYS_POLL), strconv.Itoa(unix.SYS_PPOLL)}

// threadWaits reports whether the thread of the daemon that reads the monitor of a domain waits.
func threadWaits(daemon int, domain string) (bool, error) {
	name := "vm-" + domain
	name = name[:min(len(name), 15)] // Linux cuts the name of a thread
	dir := procFile(daemon, "task")
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	found := false
	for _, t := range tasks {
		comm, err := os.ReadFile(filepath.Join(dir, t.Name(), "comm"))
		if err != nil || strings.TrimSpace(string(comm)) != name {
			continue
		}
		found = true
		call, err := os.ReadFile(filepath.Join(dir, t.Name(), "syscall"))
		if err != nil {
			return false, err
		}
		number, _, _ := bytes.Cut(call, []byte(" "))
		if !slices.Contains(sysPolls, string(number)) {
			return false, nil
		}
	}
	if !found {
		return false, errors.New("libvirt has no thread for it")
	}
	return true, nil
}

// ListenPath returns where the QEMU of a coming domain may make a socket: the URI for Prepare, and
// the path by which this process reaches it. id makes it unique.
func (c *Conn) ListenPath(id string) (uri, ours string) {
	dir := "/var/lib/libvirt/qemu"
	if c.session {
		dir = filepath.Join(filepath.Dir(c.Socket), "qemu/run")
	}
	path := filepath.Join(dir, "vacate-"+id+".sock")
	return "unix://" + path, filepath.Join(procFile(c.peer, "root"), path)
}
