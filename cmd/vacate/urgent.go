package main

import (
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// How an eviction's engines are scheduled. They need little of a core, but they need it at
// once: a guest waits for every page, and the core they share is the overloaded one. With
// a short slice, Linux 6.12 and later lets a thread that wakes go first.
const (
	niceness = -10
	slice    = 100 * time.Microsecond
)

// beUrgent has the host schedule this process ahead of the VMs, if it may, and keeps
// one blocked system call from holding up the rest on a host with few cores.
func beUrgent() {
	runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0)))
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	// Priority is a thread's on Linux, and new threads inherit it.
	for _, t := range threads {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			// Without the right to, it works all the same.
			_ = unix.SchedSetAttr(tid, &unix.SchedAttr{
				Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL, Nice: niceness, Runtime: uint64(slice),
			}, 0)
		}
	}
}
