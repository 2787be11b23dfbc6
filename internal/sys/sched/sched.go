// Package sched has a host schedule engines ahead of VMs. They need little of a core, but they need
// it at once: a guest waits for every page, and the core they share is the overloaded one.
package sched

import (
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// With a short slice, Linux 6.12 and later lets a thread that wakes go first, and others need not
// wait until a long one ends.
const (
	niceness = -10
	patience = 5 // a third of what a vCPU gets that wants all that it can get
	slice    = 100 * time.Microsecond
)

// Process asks the host to schedule this process ahead of others, if it may. It also keeps one
// blocked system call from holding up the rest on a host with few cores. Processes that it starts
// inherit that, unless by Usual.
func Process() {
	runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0)))
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	// Priority is a thread's on Linux, and new threads inherit it.
	for _, t := range threads {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			// Without the right to, it works all the same.
			_ = unix.SchedSetAttr(tid, attributes(niceness, slice), 0)
		}
	}
	// Niceness counts among the threads of a control group. Where there is none and the kernel
	// makes groups by itself, it counts among those of a session (sched(7), autogroup), whose group
	// has a niceness of its own. Somebody else's session is none of ours.
	if sid, err := unix.Getsid(0); err == nil && sid == os.Getpid() {
		_ = os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(niceness)), 0)
	}
}

func attributes(nice int32, slice time.Duration) *unix.SchedAttr {
	return &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL, Nice: nice,
		Runtime: uint64(slice)}
}

// Usual calls f on a thread that is scheduled as usual, which the processes that f starts
// inherit.
func Usual(f func() error) error { return as(attributes(0, 0), f) }

// Patiently calls f on a thread that gives way to VMs.
func Patiently(f func()) {
	_ = as(attributes(patience, slice), func() error {
		f()
		return nil
	})
}

func as(a *unix.SchedAttr, f func() error) error {
	runtime.LockOSThread()
	was, err := unix.SchedGetAttr(0, 0)
	if err != nil || unix.SchedSetAttr(0, a, 0) != nil {
		defer runtime.UnlockOSThread()
		return f()
	}
	defer func() {
		// A thread that may not get back what it had ends with its goroutine.
		if unix.SchedSetAttr(0, was, 0) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}
