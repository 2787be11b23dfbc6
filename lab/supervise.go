package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// State describes a supervised lab to other processes. It is the content of
// lab.json in the lab directory.
type State struct {
	PID   int         `json:"pid"`   // of the supervisor
	Hosts []HostState `json:"hosts"` // a, b; of a fleet all
	VMs   []VMState   `json:"vms"`
	Guest GuestState  `json:"guest"`
}

// HostState is one host of State.
type HostState struct {
	Name  string `json:"name"`
	Addr  string `json:"addr"`
	NetNS string `json:"netns"` // path of the network namespace
	Core  int    `json:"core"`  // or -1
}

// VMState is one VM of State.
type VMState struct {
	Name    string `json:"name"`
	Host    string `json:"host"`
	PID     int    `json:"pid"`
	QMP     string `json:"qmp"`
	LabQMP  string `json:"labqmp"` // not for engines
	Console string `json:"console"`
	Status  string `json:"status"` // of QMP's query-status, or "gone"
}

// GuestState is the guest of State, as last reported.
type GuestState struct {
	PagesPerSecond float64 `json:"pages_per_second"` // over the last second
	Pages          uint64  `json:"pages"`            // worked on so far
	Bad            uint64  `json:"bad"`
	TornLines      int     `json:"torn_lines"`
	Error          string  `json:"error,omitempty"`
}

const (
	stateFile = "lab.json"
	stateLock = "lab.lock" // held by the supervisor
)

// ErrNoLab says that no lab is up in a directory.
var ErrNoLab = errors.New("no lab is up")

// Supervise makes a lab with one guest on host a, and a VM that waits for it on host b. It calls
// ready, and keeps the lab until ctx is done. There is at most one supervisor per lab directory.
func Supervise(ctx context.Context, opts Options, spec Spec, ready func(State)) (err error) {
	file, unlock, err := openState(ctx, opts.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	l, err := New(ctx, opts)
	if err != nil {
		return err
	}
	return errors.Join(l.supervise(ctx, spec, file, ready), l.Close())
}

// openState takes a lab directory for one lab that is up, and returns the file for its state.
// unlock removes that.
func openState(ctx context.Context, dir string) (file string, unlock func() error, err error) {
	if dir, err = absDir(dir); err != nil {
		return "", nil, err
	}
	// Not at once: Status holds the lock for a moment.
	short, cancel := context.WithTimeout(ctx, time.Second)
	free, err := lockFile(short, filepath.Join(dir, stateLock))
	cancel()
	if errors.Is(err, context.DeadlineExceeded) {
		return "", nil, fmt.Errorf("a lab is up already in %s: take it down first", dir)
	} else if err != nil {
		return "", nil, err
	}
	file = filepath.Join(dir, stateFile)
	if err := os.RemoveAll(file); err != nil { // a killed supervisor's
		free()
		return "", nil, err
	}
	return file, func() error {
		defer free()
		return os.RemoveAll(file)
	}, nil
}

// Publish has Exec and Down know of the lab, until unpublish is called. A signal to this process
// must end the lab.
func (l *Lab) Publish(ctx context.Context) (unpublish func() error, err error) {
	file, unlock, err := openState(ctx, l.dir)
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(State{PID: os.Getpid(), Hosts: l.hostStates()})
	if err == nil {
		err = writeFile(file, append(data, '\n'))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("write the lab's state: %w", err), unlock())
	}
	return unlock, nil
}

func (l *Lab) hostStates() (list []HostState) {
	for _, h := range slices.Concat([]*Host{l.A, l.B}, l.More, []*Host{l.Client}) {
		list = append(list, HostState{h.Name, h.Addr, h.NetNS(), h.Core})
	}
	return list
}

func (l *Lab) supervise(ctx context.Context, spec Spec, file string, ready func(State)) error {
	source, err := l.A.Boot(ctx, spec)
	if err != nil {
		return err
	}
	dest, err := l.B.Incoming(ctx, source, IncomingOptions{})
	if err != nil {
		return err
	}
	state := State{PID: os.Getpid(), Hosts: l.hostStates()[:2]}
	for _, vm := range []*VM{source, dest} {
		state.VMs = append(state.VMs,
			VMState{Name: vm.Name, Host: vm.Host.Name, PID: vm.PID(), QMP: vm.QMP,
				LabQMP: vm.LabQMP, Console: vm.Console})
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for first := true; ; first = false {
		for i, vm := range []*VM{source, dest} {
			state.VMs[i].Status = "started"
			if !vm.Alive() {
				state.VMs[i].Status = gone
			}
		}
		state.Guest = source.Guest.state()
		data, err := json.MarshalIndent(state, "", "  ")
		if err != nil {
			return err
		}
		if err := writeFile(file, append(data, '\n')); err != nil {
			return fmt.Errorf("write the lab's state: %w", err)
		}
		if first && ready != nil {
			ready(state)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (g *Guest) state() GuestState {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := GuestState{TornLines: g.torn}
	if g.failure != nil {
		s.Error = g.failure.Error()
	}
	if n := len(g.samples); n > 0 {
		last := g.samples[n-1]
		s.Pages, s.Bad = last.Ops, last.Bad
		if time.Since(last.At) < time.Second { // else the guest is silent
			s.PagesPerSecond = max(0, float64(last.Ops)-opsAt(g.samples, last.At.Add(-time.Second)))
		}
	}
	return s
}

const gone = "gone"

// Status returns the state of the lab that is up in dir (default ".lab"), or
// ErrNoLab.
func Status(ctx context.Context, dir string) (State, error) {
	dir, err := absDir(dir)
	if err != nil {
		return State{}, err
	}
	s, err := readState(dir)
	if err != nil {
		return State{}, err
	}
	for i := range s.VMs {
		vm := &s.VMs[i]
		var reply struct{ Status string }
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := execute(short, vm.LabQMP, "query-status", nil, &reply)
		cancel()
		switch {
		case err == nil:
			vm.Status = reply.Status
		case errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist):
			vm.Status = gone
		default:
			vm.Status = "silent: " + err.Error()
		}
	}
	return s, nil
}

func readState(dir string) (State, error) {
	none := fmt.Errorf("%w in %s", ErrNoLab, dir)
	lock, err := tryLock(filepath.Join(dir, stateLock))
	if err == nil {
		lock.Close()
		return State{}, none
	} else if errors.Is(err, os.ErrNotExist) {
		return State{}, none
	}
	f, err := os.Open(filepath.Join(dir, stateFile))
	if errors.Is(err, os.ErrNotExist) {
		return State{}, fmt.Errorf("the lab in %s is still on its way up or down", dir)
	} else if err != nil {
		return State{}, err
	}
	defer f.Close()
	var s State
	if err := json.NewDecoder(io.LimitReader(f, 1<<20)).Decode(&s); err != nil {
		return State{}, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	return s, nil
}

// Down takes down the lab that is up in dir (default ".lab") and waits until it
// is gone. ErrNoLab says that there was none.
func Down(ctx context.Context, dir string) error {
	dir, err := absDir(dir)
	if err != nil {
		return err
	}
	s, err := readState(dir)
	if err != nil {
		return err
	}
	if s.PID <= 1 {
		return fmt.Errorf("take lab down: its state names process %d", s.PID)
	}
	if err := unix.Kill(s.PID, unix.SIGTERM); err != nil && err != unix.ESRCH {
		return fmt.Errorf("take lab down: stop process %d: %w", s.PID, err)
	}
	unlock, err := lockFile(ctx, filepath.Join(dir, stateLock))
	if err != nil {
		return fmt.Errorf("take lab down: %w", err)
	}
	unlock()
	return nil
}

// Exec becomes the command argv, in the network namespace and on the core of a
// host of the lab that is up in dir (default ".lab"). It returns only on error.
func Exec(dir, host string, argv []string) error {
	dir, err := absDir(dir)
	if err != nil {
		return err
	}
	if len(argv) == 0 {
		return errors.New("no command to run on the lab's host")
	}
	s, err := readState(dir)
	if err != nil {
		return err
	}
	for _, h := range s.Hosts {
		if h.Name != host {
			continue
		}
		path, err := exec.LookPath(argv[0])
		if err != nil {
			return err
		}
		ns, err := netns.GetFromPath(h.NetNS)
		if err != nil {
			return fmt.Errorf("open the network of host %s: %w", host, err)
		}
		defer ns.Close()
		runtime.LockOSThread() // exec keeps what this thread has
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("enter the network of host %s: %w", host, err)
		}
		if h.Core >= 0 {
			if err := pin(h.Core); err != nil {
				return err
			}
		}
		return fmt.Errorf("run %s: %w", path, syscall.Exec(path, argv, os.Environ()))
	}
	var names []string
	for _, h := range s.Hosts {
		names = append(names, h.Name)
	}
	return fmt.Errorf("the lab has no host %q: want one of %s", host, strings.Join(names, ", "))
}
