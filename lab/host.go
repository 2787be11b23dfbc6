package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Host is one of the lab's hosts: an unnamed network namespace and a core.
type Host struct {
	Name string // "a" or "b"
	Addr string // IPv4 address on the link
	Core int    // core its processes are pinned to, or -1

	lab *Lab
	ns  netns.NsHandle
	// One thread, in the namespace and on the core, starts every process: a
	// child gets both from the thread, and its parent-death signal comes when
	// this very thread ends.
	calls  chan func()
	closed chan struct{}
	done   chan struct{}
	once   sync.Once
}

func onlineCores() []int {
	var set unix.CPUSet
	var cores []int
	if unix.SchedGetaffinity(0, &set) == nil {
		for i := range 1024 {
			if set.IsSet(i) {
				cores = append(cores, i)
			}
		}
	}
	if cores == nil {
		cores = []int{0}
	}
	return cores
}

func newHost(l *Lab, name string, core int) (*Host, error) {
	h := &Host{Name: name, Core: core, lab: l, ns: -1, calls: make(chan func()), closed: make(chan struct{}), done: make(chan struct{})}
	ready := make(chan error)
	go h.serve(ready)
	if err := <-ready; err != nil {
		<-h.done
		return nil, fmt.Errorf("make host %s: %w", name, err)
	}
	return h, nil
}

// serve runs on the host's thread until close. The thread is never unlocked,
// so it ends with the goroutine.
func (h *Host) serve(ready chan<- error) {
	defer close(h.done)
	runtime.LockOSThread()
	if err := h.enterNew(); err != nil {
		ready <- err
		return
	}
	ready <- nil
	for {
		select {
		case f := <-h.calls:
			f()
		case <-h.closed:
			return
		}
	}
}

func (h *Host) enterNew() (err error) {
	if h.ns, err = netns.New(); err != nil { // moves this thread into it
		return fmt.Errorf("new network namespace: %w", err)
	}
	if h.Core >= 0 {
		if err := pin(h.Core); err != nil {
			return err
		}
		if err := receiveOn(h.Core); err != nil {
			return err
		}
	}
	nl, err := netlink.NewHandleAt(h.ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	lo, err := nl.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return nl.LinkSetUp(lo)
}

// pin moves the calling thread, and what it starts from now on, to one core.
func pin(core int) error {
	var set unix.CPUSet
	set.Set(core)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to core %d: %w", core, err)
	}
	return nil
}

// receiveOn has the network devices that are made from now on in the calling thread's
// namespace process what they receive on one core. Else the kernel does a host's work of
// receiving wherever the other host has sent, on that one's core. Linux before 6.3 cannot be told.
func receiveOn(core int) error {
	const mask = "/proc/sys/net/core/rps_default_mask" // of this thread's namespace
	words := make([]string, core/32+1)
	for i := range words {
		words[i] = "0"
	}
	words[0] = fmt.Sprintf("%x", 1<<(core%32))
	if err := os.WriteFile(mask, []byte(strings.Join(words, ",")), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("have core %d receive: %w", core, err)
	}
	return nil
}

var errHostClosed = errors.New("the lab is closed")

// on runs f on the host's thread.
func (h *Host) on(f func() error) error {
	result := make(chan error, 1)
	select {
	case h.calls <- func() { result <- f() }:
		return <-result
	case <-h.closed:
		return errHostClosed
	}
}

// Start starts cmd on the host: in its network namespace, on its core. The
// process gets SIGKILL when the lab is closed or dies. Wait for it with
// cmd.Wait.
func (h *Host) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return h.on(cmd.Start)
}

// Run starts cmd on the host and waits for it.
func (h *Host) Run(cmd *exec.Cmd) error {
	if err := h.Start(cmd); err != nil {
		return err
	}
	return cmd.Wait()
}

// Do runs f in the host's network namespace, not pinned. Sockets that f itself
// makes stay in it; goroutines that f starts do not run in it, and processes
// belong to Start.
func (h *Host) Do(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread is spoilt
		if err := netns.Set(h.ns); err != nil {
			result <- fmt.Errorf("enter the network of host %s: %w", h.Name, err)
			return
		}
		result <- f()
	}()
	return <-result
}

// NetNS returns a path of the host's network namespace, good while this
// process lives.
func (h *Host) NetNS() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(h.ns)) }

func (h *Host) close() {
	h.once.Do(func() {
		close(h.closed)
		<-h.done
		h.ns.Close()
	})
}
