package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
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
	Name string // "a", "b" or "client"
	Addr string // IPv4 address
	Core int    // core its processes are pinned to, or -1

	lab    *Lab
	ns     netns.NsHandle
	nl     *netlink.Handle
	bridge netlink.Link // has the address
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

// The lab's network, to which all hosts and guests are bridged.
var (
	network   = net.CIDRMask(16, 32)
	hostAddr  = func(n byte) net.IP { return net.IPv4(10, 77, 0, n).To4() }
	guestAddr = func(n byte) net.IP { return net.IPv4(10, 77, 1, n).To4() }
)

// Bridge is the name of each host's bridge, which has the taps of its guests.
const Bridge = "br0"

// newHost makes a host; n is its number in the lab.
func newHost(l *Lab, name string, n byte, core int) (*Host, error) {
	h := &Host{Name: name, Addr: hostAddr(n).String(), Core: core, lab: l, ns: -1,
		calls: make(chan func()), closed: make(chan struct{}), done: make(chan struct{})}
	ready := make(chan error)
	go h.serve(n, ready)
	if err := <-ready; err != nil {
		h.close()
		return nil, fmt.Errorf("make host %s: %w", name, err)
	}
	return h, nil
}

// serve runs on the host's thread until close. The thread is never unlocked,
// so it ends with the goroutine.
func (h *Host) serve(n byte, ready chan<- error) {
	defer close(h.done)
	runtime.LockOSThread()
	if err := h.enterNew(n); err != nil {
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

func (h *Host) enterNew(n byte) (err error) {
	if h.ns, err = netns.New(); err != nil { // moves this thread into it
		return fmt.Errorf("new network namespace: %w", err)
	}
	if h.nl, err = netlink.NewHandleAt(h.ns, unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	lo, err := h.nl.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if err := h.nl.LinkSetUp(lo); err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	if err := h.addBridge(n); err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	if h.Core < 0 {
		return nil
	}
	if err := pin(h.Core); err != nil {
		return err
	}
	// After the bridge: its ports have passed on what it receives.
	return receiveOn(h.Core)
}

// addBridge gives the host its address, on a bridge without ports. A bridge forwards at once
// as long as it speaks no spanning tree protocol, which it does only if told to.
func (h *Host) addBridge(n byte) (err error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = Bridge
	// else it has a port's, and another with each port
	attrs.HardwareAddr = net.HardwareAddr{0x02, 0, 0, 77, 0, n}
	snoop := false
	if err := h.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snoop}); err !=
		nil {
		return fmt.Errorf("kernel option BRIDGE: %w", err)
	}
	// Bridged packets need not pass by the (empty) packet filter. Without it there is no such file.
	if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte("0"),
		0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if h.bridge, err = h.nl.LinkByName(attrs.Name); err != nil {
		return err
	}
	if err := h.nl.AddrAdd(h.bridge,
		&netlink.Addr{IPNet: &net.IPNet{IP: hostAddr(n), Mask: network}}); err != nil {
		return fmt.Errorf("address %s: %w", h.Addr, err)
	}
	return h.nl.LinkSetUp(h.bridge)
}

// addPort makes a device in the host's network a port of its bridge.
func (h *Host) addPort(name string) (netlink.Link, error) {
	dev, err := h.nl.LinkByName(name)
	if err == nil {
		err = h.nl.LinkSetMaster(dev, h.bridge)
	}
	if err == nil {
		err = h.nl.LinkSetUp(dev)
	}
	if err != nil {
		return nil, fmt.Errorf("bridge %s on host %s: %w", name, h.Name, err)
	}
	return dev, nil
}

// addTap makes a tap on the host's bridge. It stays as long as the host.
func (h *Host) addTap(name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err := h.Do(func() error {
		return netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP})
	})
	if err != nil {
		return fmt.Errorf("make tap %s on host %s (kernel option TUN): %w", name, h.Name, err)
	}
	_, err = h.addPort(name)
	return err
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
	if err := os.WriteFile(mask, []byte(strings.Join(words, ",")), 0); err != nil &&
		!errors.Is(err, os.ErrNotExist) {
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

// Dial makes a connection from the host to an address with an IP, not a name.
func (h *Host) Dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = h.Do(func() error {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// NetNS returns a path of the host's network namespace, good while this
// process lives.
func (h *Host) NetNS() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(h.ns)) }

func (h *Host) close() {
	h.once.Do(func() {
		close(h.closed)
		<-h.done
		if h.nl != nil {
			h.nl.Close()
		}
		h.ns.Close()
	})
}
