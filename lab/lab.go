// Package lab makes real VMs on one machine, for the demo, tests and benchmarks. Two hosts are
// network namespaces, each pinned to a core, joined by a shaped link. VMs run Debian's stock cloud
// kernel and a load that knows what every byte of its memory should be.
//
//	┌─ client ─────────┐
//	│ 10.77.0.3    br0 ├──┐ veth pair
//	└──────────────────┘  │
//	┌─ host a: core 0 ────┴─┐   veth pair, tbf   ┌─ host b: core 1 ──────┐
//	│ 10.77.0.1    br0─eth0 ├────────────────────┤ eth0─br0    10.77.0.2 │
//	│ QEMU ─┬─ tap ─┘       │  at both ends      │       └─ tap ─┬─ QEMU │
//	└───────┼───────────────┘                    └───────────────┼───────┘
//	        └──── reports (ttyS1) ─► Guest ◄─ reports ───────────┘
//
// All hosts, and the guests that have a tap (10.77.1.1 and up), are in one
// Ethernet. Guests keep their addresses wherever they run.
//
// It needs Linux on x86-64, root, and on Debian the packages named in
// Packages. It speaks to QEMU 7.2 and later (machines pc and q35).
//
// Nothing outlives the process. QEMUs and other children get SIGKILL when it dies, also those that
// a daemon under test has started (see Expected). Namespaces have no names and vanish with their
// last process. The next lab in the same folder removes run directories that were left behind.
package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// Packages are the Debian packages a lab needs.
const Packages = "qemu-system-x86"

// Options say how to make a lab. The zero value is good.
type Options struct {
	// Dir holds the cache (guest image, other QEMUs) and run directories.
	// Default ".lab" in the current directory.
	Dir string
	// Rate of the link in bits per second, each way; 0 means unshaped.
	Rate uint64
	// NoPin leaves the hosts' processes free to run on any core.
	NoPin bool
	// BootOnce has one guest of each kind boot, ever. VMs start from a file with that, in a
	// fraction of the time, each with a load of its own. Labs of package labtest do.
	BootOnce bool
	// More are names of further hosts, which are not pinned. Each has a link of its own to the
	// bridge of the client's host, shaped as that between a and b is.
	More []string
	// Log takes progress, such as downloads; default none.
	Log *slog.Logger
}

// Lab is two hosts and the link between them. Methods may be called from any
// goroutine.
type Lab struct {
	A, B *Host
	// Client is a third host, not pinned and beside a on its bridge, for the clients of
	// guests. What it says to a guest on b crosses the link.
	Client *Host
	More   []*Host // by Options.More

	dir   string // absolute
	run   string // run directory
	lock  *os.File
	log   *slog.Logger
	once  bool // Options.BootOnce
	link  *link
	image images
	kvm   sync.Mutex // one looks whether KVM works

	mu  sync.Mutex
	vms []*VM // guarded by mu
	seq int   // VMs so far, for unique names; guarded by mu

	guests   byte        // guests with an address so far; guarded by mu
	expected []*Expected // guarded by mu
}

// maxSocketPath is the longest path of a unix socket on Linux, in bytes.
const maxSocketPath = 107

// New makes a lab. Close it after use.
func New(ctx context.Context, opts Options) (_ *Lab, err error) {
	if err := Probe(); err != nil {
		return nil, err
	}
	l := &Lab{log: opts.Log, once: opts.BootOnce}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	if l.dir, err = absDir(opts.Dir); err != nil {
		return nil, err
	}
	others, err := l.openRunDir()
	if err != nil {
		return nil, fmt.Errorf("make lab's run directory: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	l.image.dir, l.image.log = l.dir, l.log
	cores := onlineCores()
	for i, h := range []**Host{&l.A, &l.B} {
		core := -1
		if !opts.NoPin {
			core = cores[(i+others)%len(cores)] // hosts a are the busy ones
		}
		if *h, err = newHost(l, string(rune('a'+i)), byte(1+i), core); err != nil {
			return nil, err
		}
	}
	if l.Client, err = newHost(l, "client", 3, -1); err != nil {
		return nil, err
	}
	if _, err := plug(l.A, "client", l.Client, "eth0"); err != nil {
		return nil, fmt.Errorf("link the lab's client: %w", err)
	}
	if l.link, err = newLink(l.A, "eth0", l.B, "eth0", opts.Rate); err != nil {
		return nil, fmt.Errorf("link the lab's hosts: %w", err)
	}
	for i, name := range opts.More {
		h, err := newHost(l, name, byte(4+i), -1)
		if err != nil {
			return nil, err
		}
		l.More = append(l.More, h)
		if _, err := newLink(l.Client, fmt.Sprint("to", i), h, "eth0", opts.Rate); err != nil {
			return nil, fmt.Errorf("link host %s: %w", name, err)
		}
	}
	return l, ctx.Err()
}

func absDir(dir string) (string, error) {
	if dir == "" {
		dir = ".lab"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("lab directory: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("lab directory: %w", err)
	}
	return dir, nil
}

// openRunDir makes a run directory and locks it, and removes those whose lab is dead: a lock lasts
// no longer than the process that holds it. It returns how many others live.
func (l *Lab) openRunDir() (others int, err error) {
	all := filepath.Join(l.dir, "run")
	if err := os.MkdirAll(all, 0o700); err != nil {
		return 0, err
	}
	// Between making a directory and locking it another lab could take it
	// for a dead one's.
	unlock, err := lockFile(context.Background(), filepath.Join(l.dir, "run.lock"))
	if err != nil {
		return 0, err
	}
	defer unlock()
	old, err := os.ReadDir(all)
	if err != nil {
		return 0, err
	}
	for _, e := range old {
		dir := filepath.Join(all, e.Name())
		if f, err := tryLock(filepath.Join(dir, "lock")); err == nil {
			removeRunDir(dir)
			f.Close()
		} else if errors.Is(err, os.ErrNotExist) {
			removeRunDir(dir)
		} else {
			others++
		}
	}
	if l.run, err = os.MkdirTemp(all, ""); err != nil {
		return 0, err
	}
	if longest := filepath.Join(l.run, "a-100-labqmp.sock"); len(longest) > maxSocketPath {
		os.Remove(l.run)
		return 0,
			fmt.Errorf("unix sockets such as %s would have %d bytes, Linux allows %d: choose a "+
				"shorter lab directory", longest, len(longest), maxSocketPath)
	}
	f, err := os.OpenFile(filepath.Join(l.run, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return 0, err
	}
	l.lock = f
	return others, unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
}

// removeRunDir removes a run directory, with the disks that are mounted in it.
func removeRunDir(dir string) error {
	disks, err := filepath.Glob(filepath.Join(dir, diskPrefix+"*"))
	if err != nil {
		return err
	}
	for _, d := range disks {
		// Also if a process has files open there, as one that is being killed may.
		if err := unix.Unmount(d, unix.MNT_DETACH); err != nil && err != unix.EINVAL {
			// not mounted
			return fmt.Errorf("unmount %s: %w", d, err)
		}
	}
	return os.RemoveAll(dir)
}

// tryLock locks an existing file at once or fails.
func tryLock(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Dir returns the lab's directory, absolute.
func (l *Lab) Dir() string { return l.dir }

// RunDir returns the directory of this lab's sockets and logs; Close removes it.
func (l *Lab) RunDir() string { return l.run }

// Close kills every VM, those that others started included, and every process started on a
// host, and removes the link, the hosts and the run directory.
func (l *Lab) Close() error {
	l.mu.Lock()
	expected := l.expected
	l.mu.Unlock()
	for _, e := range expected {
		e.close() // no more VMs come
	}
	l.mu.Lock()
	vms := l.vms
	l.mu.Unlock()
	for _, vm := range vms {
		vm.Kill()
	}
	// The network goes with the hosts.
	for _, h := range append([]*Host{l.A, l.B, l.Client}, l.More...) {
		if h != nil {
			h.close()
		}
	}
	var err error
	if l.run != "" {
		err = removeRunDir(l.run)
	}
	if l.lock != nil {
		l.lock.Close()
	}
	return err
}
