package main

import (
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// niceness of an eviction's engines. They need little of a core, but they need it at
// once: a guest waits for every page, and the core they share is the overloaded one.
const niceness = -10

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
			_ = unix.Setpriority(unix.PRIO_PROCESS, tid, niceness) // without the right, it works all the same
		}
	}
}
