// Package process tells one process from a later one of its number, waits for its end, stops it,
// and ends it.
package process

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Process is one process and no other: a number may have been given to another since, but not
// with the same start. That holds as long as the host is up. Written as JSON, a Process names the
// boot, too: read after another boot it is one that has ended.
type Process struct {
	PID       int
	StartTime uint64 // in ticks since the host booted: /proc/PID/stat, field 22, proc(5)
}

// Gone is a process that has ended.
var Gone = Process{PID: -1}

// BootID returns what tells this boot of the host from all others; "" if the kernel does not say.
func BootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// written is a Process as it is kept. Boot is "" in what was kept before there was this field.
type written struct {
	PID       int
	StartTime uint64
	Boot      string `json:",omitempty"`
}

// MarshalJSON adds the boot.
func (p Process) MarshalJSON() ([]byte, error) {
	return json.Marshal(written{p.PID, p.StartTime, BootID()})
}

// UnmarshalJSON reads a process of another boot as Gone.
func (p *Process) UnmarshalJSON(b []byte) error {
	var w written
	if err := json.Unmarshal(b, &w); err != nil {
		return err
	}
	*p = Of(w.PID, w.StartTime, w.Boot)
	return nil
}

// Of returns the process that was written down during a boot: Gone if that was another one. "" is
// the present boot.
func Of(pid int, start uint64, boot string) Process {
	if boot != "" && boot != BootID() {
		return Gone
	}
	return Process{pid, start}
}

// ErrGone: the process has ended.
var ErrGone = errors.New("process has ended")

// Find returns the process that has a number now.
func Find(pid int) (Process, error) {
	start, err := startTime(pid)
	return Process{pid, start}, err
}

// Alive reports whether the process runs. One that has ended does not, even if nobody has waited
// for it yet.
func (p Process) Alive() bool {
	fd, err := p.Open()
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// Kill ends the process with SIGKILL and returns when it has ended, its memory included. It returns
// nil, too, when it had ended before.
func (p Process) Kill(ctx context.Context) error {
	fd, err := p.Open()
	if errors.Is(err, ErrGone) {
		return nil
	} else if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	return p.wait(ctx, fd)
}

// Wait returns nil when the process has ended, or ctx's error.
func (p Process) Wait(ctx context.Context) error {
	_, err := p.End(ctx)
	return err
}

// End waits for the process's end, and tells how it ended, such as "with exit status 1". That is
// empty where it had ended before, or where the kernel does not tell (before Linux 6.15).
func (p Process) End(ctx context.Context) (how string, err error) {
	fd, err := p.Open()
	if errors.Is(err, ErrGone) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	if err := p.wait(ctx, fd); err != nil {
		return "", err
	}
	return ended(fd), nil
}

// pollTime is how long a wait may take to notice that its context is done.
const pollTime = 50 * time.Millisecond

func (p Process) wait(ctx context.Context, fd int) error {
	for {
		switch ended, err := poll(fd, pollTime); {
		case err != nil:
			return err
		case ended:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("wait for the end of process %d: %w", p.PID, ctx.Err())
		}
	}
}

// Open returns a descriptor of the process (pidfd), which the caller closes. It wraps ErrGone when
// that has ended. The descriptor is of this process: what it opened has not ended yet when the
// start of the process with that number is read.
func (p Process) Open() (int, error) {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err == unix.ESRCH || err == unix.EINVAL {
		// EINVAL: a thread has the number, or none can have it
		return -1, ErrGone
	} else if err != nil {
		return -1, os.NewSyscallError("pidfd_open", err)
	}
	start, err := startTime(p.PID)
	ended := false
	if err == nil {
		ended, err = poll(fd, 0)
	}
	if err == nil && (ended || start != p.StartTime) {
		err = ErrGone
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// poll reports whether a process has ended, and waits for that for a time.
func poll(fd int, d time.Duration) (bool, error) {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}},
			int(d.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		return n > 0, os.NewSyscallError("poll", err)
	}
}

// Stop stops the process with SIGSTOP, and returns when none of its threads runs any more. Until
// somebody sends SIGCONT it does nothing, whatever it is told, but SIGKILL ends it. Its memory and
// its descriptors can be read all the while.
func (p Process) Stop(ctx context.Context) error {
	if err := p.signal(unix.SIGSTOP); err != nil {
		return fmt.Errorf("stop process %d: %w", p.PID, err)
	}
	for pause := time.Duration(0); ; pause = min(2*pause+100*time.Microsecond, pollTime) {
		stopped, err := p.Stopped()
		if err != nil || stopped {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("stop process %d: some of its threads still run: %w", p.PID,
				context.Cause(ctx))
		}
	}
}

// MayStop reports whether this process may stop and kill it.
func (p Process) MayStop() error {
	fd, err := p.Open()
	if err != nil {
		return fmt.Errorf("hold on to process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, 0, nil, 0); err != nil {
		return fmt.Errorf("may not stop process %d: %w: run as root, or as its user, or with "+
			"CAP_KILL", p.PID, err)
	}
	return nil
}

// Continue has a stopped process go on.
func (p Process) Continue() error {
	if err := p.signal(unix.SIGCONT); err != nil {
		return fmt.Errorf("continue process %d: %w", p.PID, err)
	}
	return nil
}

func (p Process) signal(number unix.Signal) error {
	fd, err := p.Open()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.PidfdSendSignal(fd, number, nil, 0)
}

// Stopped reports whether all threads of the process are stopped, as by SIGSTOP.
func (p Process) Stopped() (bool, error) {
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.PID))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	stopped, known := 0, 0
	for _, t := range tasks {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/stat", p.PID, t.Name()))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // a thread that ended
		} else if err != nil {
			return false, err
		}
		state, err := parseState(b)
		if err != nil {
			return false, err
		}
		if state == 'Z' || state == 'X' { // it has ended
			continue
		}
		known++
		if state == 'T' || state == 't' { // stopped, traced
			stopped++
		}
	}
	// The start last: what was read above is of this process.
	if start, err := startTime(p.PID); err != nil || start != p.StartTime || known == 0 {
		if err == nil {
			err = ErrGone
		}
		return false, fmt.Errorf("look whether process %d is stopped: %w", p.PID, err)
	}
	return stopped == known, nil
}

// parseState reads the state from /proc/PID/stat.
func parseState(b []byte) (byte, error) {
	i := bytes.LastIndexByte(b, ')')
	fields := bytes.Fields(b[i+1:])
	if i < 0 || len(fields) == 0 || len(fields[0]) != 1 {
		return 0, fmt.Errorf("not what the kernel tells of a process: %.100q", b)
	}
	return fields[0][0], nil
}

func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, ErrGone
	} else if err != nil {
		return 0, err
	}
	return parseStat(b)
}

// parseStat reads the start time from /proc/PID/stat. The second field is the name, which may have
// anything in it.
func parseStat(b []byte) (uint64, error) {
	i := bytes.LastIndexByte(b, ')')
	fields := bytes.Fields(b[i+1:])
	if i < 0 || len(fields) < 20 {
		return 0, fmt.Errorf("not what the kernel tells of a process: %.100q", b)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}
