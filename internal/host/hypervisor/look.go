package hypervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

// State is what there is of a VM on this host.
type State string

// The states.
const (
	None     State = "none"     // nothing answers at its QMP socket
	Running  State = "running"  // it runs
	Paused   State = "paused"   // it is stopped, and could be told to run
	Incoming State = "incoming" // its QEMU waits for it to arrive, or loads it
	// it has left, or is leaving: its process is stopped, or QEMU would not run it just so
	Frozen State = "frozen"
	// its monitor does not answer: a client has it, such as an eviction, or QEMU is stuck
	Silent State = "silent"
	// its process is there, and has no monitor: only Search finds that
	Starting State = "starting"
)

// states has QEMU's run states, RunState in qapi/run-state.json of QEMU 7.2 to 10.0. A twin that
// has loaded and was started with -S is paused.
var states = map[string]State{
	"running":        Running,
	"inmigrate":      Incoming,
	"finish-migrate": Frozen,
	"postmigrate":    Frozen,
	"restore-vm":     Frozen,
	"save-vm":        Frozen,
	"colo":           Frozen,
	// debug, guest-panicked, internal-error, io-error, paused, prelaunch, shutdown, suspended,
	// watchdog: paused
}

// Seen is a VM as it was found.
type Seen struct {
	State  State
	Status string // QEMU's run state: "running", "postmigrate"…
	// status of its last migration, out or in: "postcopy-active", "completed"…; may be empty
	Migration string
	Process   process.Process // the QEMU, in this PID namespace
	Threads   []int           // of the process: those that are virtual CPUs
	Version   qmp.Version     // of QEMU
	Memory    uint64          // bytes of guest memory
	VCPUs     int
}

// lookTime is how long a QEMU may take to answer.
const lookTime = 5 * time.Second

// Look tells what there is of a VM here. For None, Silent, and a Frozen one whose Status is
// "stopped", no more is filled in. A VM whose monitor an eviction of this process holds is Silent,
// which takes five seconds to find out: better not ask. The error wraps ErrUnknown for a domain
// that libvirt does not have.
func Look(ctx context.Context, vm VM) (Seen, error) {
	if vm.Libvirt != "" {
		return lookAtDomain(ctx, vm)
	}
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	q, err := qmp.Dial(ctx, vm.QMP)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return Seen{State: None}, nil
	case errors.Is(err, qmp.ErrStopped): // as an eviction leaves the frozen VM
		return Seen{State: Frozen, Status: "stopped"}, nil
	case errors.Is(err, qmp.ErrBusy):
		return Seen{State: Silent}, nil
	case err != nil:
		return Seen{}, err
	}
	defer q.Close()
	seen, err := ask(ctx, q)
	switch {
	case errors.Is(err, qmp.ErrClosed): // it ended just now
		return Seen{State: None}, nil
	case errors.Is(err, context.DeadlineExceeded):
		return Seen{State: Silent}, nil
	case err != nil:
		return Seen{}, fmt.Errorf("look at VM %s: %w", vm.Name, err)
	}
	return seen, nil
}

func ask(ctx context.Context, q *qmp.Client) (Seen, error) {
	s := Seen{Version: q.Version()}
	status, err := q.QueryStatus(ctx)
	if err != nil {
		return s, err
	}
	s.Status, s.State = status.Status, states[status.Status]
	if s.State == "" {
		s.State = Paused
	}
	pid, threads, err := q.Process(ctx)
	if err != nil {
		return s, err
	}
	s.Threads, s.VCPUs = threads, len(threads)
	if s.Process, err = process.Find(pid); err != nil {
		return s, fmt.Errorf("find the process of QEMU: %w", err)
	}
	migration, err := q.QueryMigrate(ctx)
	if err != nil {
		return s, err
	}
	s.Migration = migration.Status
	var memory struct {
		Base    uint64 `json:"base-memory"`
		Plugged uint64 `json:"plugged-memory"`
	}
	if err := q.Run(ctx, "query-memory-size-summary", nil, &memory); err != nil {
		return s, err
	}
	s.Memory = memory.Base + memory.Plugged
	return s, nil
}

// Search is Look, which also finds a QEMU that answers at no socket yet, or no more: one that a
// daemon before this one was starting when it died, say. It takes longer.
func Search(ctx context.Context, vm VM) (Seen, error) {
	seen, err := Look(ctx, vm)
	if err != nil || seen.State != None {
		return seen, err
	}
	for _, twin := range []bool{false, true} {
		list, err := processes(vm, twin)
		if err != nil {
			return seen, fmt.Errorf("look for the process of VM %s: %w", vm.Name, err)
		}
		if len(list) > 0 {
			return Seen{State: Starting, Process: list[0]}, nil
		}
	}
	return seen, nil
}

// Twins returns the processes whose command line is that of the VM's twin, or that are about to
// become it, in this PID namespace.
func Twins(vm VM) ([]process.Process, error) { return processes(vm, true) }

// processes is Twins, also of VMs that were started to run at once. Of a process that is about to
// become the QEMU, such as a script, the command line ends with the QEMU's.
func processes(vm VM, twin bool) ([]process.Process, error) {
	want := []byte("\x00" + strings.Join(vm.Args(twin), "\x00") + "\x00")
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var list []process.Process
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		// The start first: if the process ends and its number is given anew, that is no longer it.
		p, err := process.Find(pid)
		if err != nil {
			continue
		}
		if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil &&
			bytes.HasSuffix(append([]byte{0}, line...), want) {
			list = append(list, p)
		}
	}
	return list, nil
}
