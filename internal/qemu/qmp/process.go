package qmp

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Process finds the process that runs the virtual CPUs, and the threads that are these, by their
// numbers in our PID namespace. QEMU tells the threads by their numbers in its own, which may be
// another one: that of a container. The process is the one at the other end of the monitor's
// socket, or where a manager opened that, such as libvirt, the one that has the threads.
func (c *Client) Process(ctx context.Context) (pid int, vcpus []int, err error) {
	cpus, err := c.QueryCPUs(ctx)
	if err != nil {
		return 0, nil, err
	}
	if len(cpus) == 0 {
		return 0, nil, errors.New("qemu has no virtual CPUs, so its process cannot be identified")
	}
	for _, pid := range []int{c.pid, threadGroup(cpus[0].ThreadID)} {
		if vcpus, ok := theirThreads("/proc", pid, cpus); ok {
			return pid, vcpus, nil
		}
	}
	if c.pid == 0 {
		return 0, nil,
			errors.New(
				"find qemu's process: the one at its monitor's socket is not in this PID " +
					"namespace: " +
					"run this program where qemu's process can be seen, such as on the host itself")
	}
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", c.pid))
	return 0, nil,
		fmt.Errorf(
			"find qemu's process: process %d (%q) at its monitor's socket does not run its "+
				"virtual CPUs, "+
				"and in this PID namespace no process does: if the socket is relayed, give that "+
				"of qemu itself; "+
				"if qemu's PID namespace cannot be seen from here, run this program on the host "+
				"itself",
			c.pid, strings.TrimSpace(string(comm)))
}

// theirThreads returns the threads that are virtual CPUs of a process, if it has them all. None is
// its first thread, which is QEMU's main loop: a program with one thread does not pass for QEMU.
func theirThreads(proc string, pid int, cpus []CPU) ([]int, bool) {
	if pid <= 0 {
		return nil, false
	}
	dir := filepath.Join(proc, strconv.Itoa(pid), "task")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, false
	}
	ours := make(map[int]int, len(entries)) // by QEMU's own number
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil || tid == pid {
			continue
		}
		own := tid // of a kernel without PID namespaces
		if ns := strings.Fields(statusLine(filepath.Join(dir, e.Name(), "status"),
			"NSpid:")); len(ns) > 0 {
			if own, err = strconv.Atoi(ns[len(ns)-1]); err != nil {
				continue
			}
		}
		ours[own] = tid
	}
	list := make([]int, 0, len(cpus))
	for _, c := range cpus {
		tid, ok := ours[c.ThreadID]
		if !ok {
			return nil, false
		}
		list = append(list, tid)
	}
	return list, true
}

// threadGroup is the process that has a thread, by numbers of this PID namespace; 0 if none has.
func threadGroup(thread int) int {
	pid, _ := strconv.Atoi(strings.TrimSpace(statusLine(fmt.Sprintf("/proc/%d/status", thread),
		"Tgid:")))
	return pid
}

// statusLine returns what a file of proc(5) has behind a key.
func statusLine(file, key string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if v, ok := strings.CutPrefix(line, key); ok {
			return v
		}
	}
	return ""
}
