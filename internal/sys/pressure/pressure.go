// Package pressure measures from Linux's own accounting how short of CPU, memory and link a host
// and the VMs on it are. It only reads files of /proc and /sys/fs/cgroup (proc(5), and
// Documentation/accounting/psi.rst and admin-guide/cgroup-v2.rst of Linux); it asks neither QEMU
// nor the guest.
//
//	ReadHost, ReadVM ─► counters at a moment ─┐
//	                                          ├─ Since ─► HostLoad, VMLoad: shares and rates
//	ReadHost, ReadVM ─► counters, later ──────┘
//
// A VM feels contention for CPU as steal: one of its vCPUs wants to run and waits for a core. For
// QEMU a vCPU is a thread, and Linux counts for each thread how long it ran, and how long it waited
// while it could have run (its run delay). Both together are the CPU that the VM wants:
//
//	wants = ran + waited        steal = waited ÷ wants
package pressure

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"time"

	"vacate/internal/sys/process"
	"vacate/internal/sys/room"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// Host has what Linux had counted of a host at a moment. Times and counts are since the host
// booted.
type Host struct {
	At   time.Time
	CPUs int           // that this process may use, and the VMs of its host with it
	Busy time.Duration // that these CPUs were not idle; a guest's time included
	// Stalls has pressure stall information, by "cpu", "memory" and "io", of the whole machine;
	// empty where the kernel keeps none.
	Stalls map[string]Stall
	Memory Memory
	// Pages that were read again soon after they had been dropped, and that came back from swap.
	Refaults, SwappedIn uint64
	// Links is what passed each network interface, but for loopback.
	Links map[string]Traffic

	yielders map[process.Process]yielder
}

// Stall is for how long tasks stood still for want of something.
type Stall struct {
	Some, Full time.Duration // at least one task; all that were not idle
}

// Memory is in bytes.
type Memory struct {
	Total, Available, SwapTotal, SwapFree uint64
}

// Traffic is in bytes.
type Traffic struct {
	Received, Sent uint64
}

// VM has what Linux had counted of a VM's QEMU at a moment, since it started.
type VM struct {
	At    time.Time
	VCPUs int // threads that are vCPUs; 0 where these are not known
	// Ran and Waited are of the vCPUs; of all threads where these are not known.
	Ran, Waited time.Duration
	Used        time.Duration // CPU time of the whole process
	Resident    uint64        // bytes of memory, shared ones included
	Swapped     uint64        // bytes
	MajorFaults uint64        // pages of the process that had to be read from a disk
	Cgroup      *Cgroup       // nil: none that has anything to tell
}

// Cgroup has what a VM's control group tells; whatever else is in the group is part of it.
type Cgroup struct {
	Stalls    map[string]Stall // version 2 only
	Throttled time.Duration    // waited because the group had used up its quota of CPU
	Memory    uint64           // bytes
	Refaults  uint64           // pages
}

// files are the roots of what is read; others in tests.
type files struct{ proc, cgroup string }

var system = files{"/proc", "/sys/fs/cgroup"}

// ReadHost counts a host. It takes some 200 µs, and 1 µs for each process.
func ReadHost() (Host, error) {
	h, err := system.host(usable())
	if err == nil {
		h.yielders = system.yielders()
	}
	return h, err
}

// usable are the CPUs that this process may use.
func usable() map[int64]bool {
	var set unix.CPUSet
	list := map[int64]bool{}
	if unix.SchedGetaffinity(0, &set) == nil {
		for i := range int64(len(set) * 64) {
			if set.IsSet(int(i)) {
				list[i] = true
			}
		}
	}
	return list
}

func (f files) host(cpus map[int64]bool) (Host, error) {
	h := Host{At: time.Now(), Stalls: map[string]Stall{}, Links: map[string]Traffic{}}
	proc, err := procfs.NewFS(f.proc)
	if err != nil {
		return h, err
	}
	stat, err := proc.Stat()
	if err != nil {
		return h, err
	}
	for i, c := range stat.CPU {
		if cpus[i] || len(cpus) == 0 {
			h.CPUs++
			// User has Guest in it
			h.Busy += seconds(c.User + c.Nice + c.System + c.IRQ + c.SoftIRQ)
		}
	}
	if h.CPUs == 0 {
		return h, fmt.Errorf("%s/stat has none of the CPUs that may be used", f.proc)
	}
	b, err := os.ReadFile(path.Join(f.proc, "meminfo"))
	if err != nil {
		return h, err
	}
	mem := room.Meminfo(b)
	h.Memory = Memory{mem["MemTotal"], mem["MemAvailable"], mem["SwapTotal"], mem["SwapFree"]}
	vm, err := readKeys(path.Join(f.proc, "vmstat"))
	if err != nil {
		return h, err
	}
	h.Refaults, h.SwappedIn = refaults(vm), vm["pswpin"]
	for _, what := range resources {
		if s, err := readStall(path.Join(f.proc, "pressure", what)); err == nil {
			h.Stalls[what] = s
		} else if !absent(err) {
			return h, err
		}
	}
	dev, err := proc.NetDev()
	if err != nil {
		return h, err
	}
	for name, d := range dev {
		if name != "lo" {
			h.Links[name] = Traffic{d.RxBytes, d.TxBytes}
		}
	}
	return h, nil
}

// resources that Linux has pressure stall information of.
var resources = []string{"cpu", "memory", "io"}

// absent reports whether an error says that a kernel keeps no such account. One that was told to
// keep none has the files, and no operation on them.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EOPNOTSUPP) ||
		errors.Is(err, unix.ENOTDIR)
}

// refaults of a vmstat or memory.stat. Before Linux 5.9 there was one count of all.
func refaults(keys map[string]uint64) uint64 {
	return keys["workingset_refault_anon"] + keys["workingset_refault_file"] +
		keys["workingset_refault"]
}

// ReadVM counts the QEMU of a VM. vcpus are its threads that are vCPUs, as QEMU tells them by QMP;
// those that are not there any more do not count. So do threads that have a vCPU's name, if QEMU
// names its threads (-name debug-threads=on). Where neither is known, all threads count. It wraps
// process.ErrGone when the QEMU has ended. It takes some 30 µs for each thread.
func ReadVM(p process.Process, vcpus []int) (VM, error) {
	vm, err := system.vm(p.PID, vcpus)
	// The start last: what was read is of this process only if the number is still its own.
	if now, ferr := process.Find(p.PID); ferr != nil {
		return VM{}, ferr
	} else if now != p {
		return VM{}, process.ErrGone
	}
	return vm, err
}

// vcpuName is what QEMU calls the thread of a vCPU: CPU 0/KVM, CPU 0/TCG, or ALL CPUs/TCG where one
// thread runs all.
var vcpuName = regexp.MustCompile(`^(CPU \d+|ALL CPUs)/`)

func (f files) vm(pid int, vcpus []int) (VM, error) {
	vm := VM{At: time.Now()}
	proc, err := procfs.NewFS(f.proc)
	if err != nil {
		return vm, err
	}
	p, err := proc.Proc(pid)
	if err != nil {
		return vm, err
	}
	stat, err := p.Stat()
	if err != nil {
		return vm, err
	}
	vm.Used, vm.MajorFaults = seconds(stat.CPUTime()), uint64(stat.MajFlt)
	status, err := p.NewStatus()
	if err != nil {
		return vm, err
	}
	vm.Resident, vm.Swapped = status.VmRSS, status.VmSwap
	threads, err := proc.AllThreads(pid)
	if err != nil {
		return vm, err
	}
	var all VM
	for _, t := range threads {
		name, err := t.Comm()
		if err != nil {
			continue // it has ended
		}
		s, err := t.Schedstat()
		if absent(err) {
			continue
		} else if err != nil {
			return vm, fmt.Errorf("thread %d: %w", t.PID, err)
		}
		for _, sum := range []struct {
			of   *VM
			is   bool
			vcpu int
		}{{&vm, slices.Contains(vcpus, t.PID) || vcpuName.MatchString(name), 1}, {&all, true, 0}} {
			if sum.is {
				sum.of.VCPUs += sum.vcpu
				sum.of.Ran += time.Duration(s.RunningNanoseconds)
				sum.of.Waited += time.Duration(s.WaitingNanoseconds)
			}
		}
	}
	if vm.VCPUs == 0 {
		vm.Ran, vm.Waited = all.Ran, all.Waited
	}
	groups, err := p.Cgroups()
	if err != nil && !absent(err) {
		return vm, err
	}
	vm.Cgroup, err = f.group(groups)
	return vm, err
}

// group reads the control groups of a process: the one of version 2, or where that has nothing to
// tell those of version 1.
func (f files) group(groups []procfs.Cgroup) (*Cgroup, error) {
	g := Cgroup{Stalls: map[string]Stall{}}
	told := false
	keys := func(name string, take func(map[string]uint64)) error {
		k, err := readKeys(name)
		if err == nil {
			take(k)
			told = true
		} else if absent(err) {
			err = nil
		}
		return err
	}
	number := func(name string, n *uint64) error {
		return keys(name, func(k map[string]uint64) { *n = k[""] })
	}
	var errs []error
	for _, c := range groups {
		own := func(parts ...string) string {
			return path.Join(append([]string{f.cgroup}, parts...)...)
		}
		if c.Path == "/" {
			continue // that is the machine
		}
		if c.HierarchyID == 0 {
			dir := own(c.Path)
			if _, err := os.Stat(dir); err != nil {
				dir = own("unified", c.Path) // beside version 1
			}
			for _, what := range resources {
				s, err := readStall(path.Join(dir, what+".pressure"))
				if err == nil {
					g.Stalls[what] = s
					told = true
				} else if !absent(err) {
					errs = append(errs, err)
				}
			}
			errs = append(errs,
				keys(path.Join(dir, "cpu.stat"), func(k map[string]uint64) {
					if n, ok := k["throttled_usec"]; ok { // where this version controls the CPU
						g.Throttled = time.Duration(n) * time.Microsecond
					}
				}),
				keys(path.Join(dir, "memory.stat"),
					func(k map[string]uint64) { g.Refaults = refaults(k) }),
				number(path.Join(dir, "memory.current"), &g.Memory))
			continue
		}
		for _, controller := range c.Controllers {
			dir := own(controller, c.Path)
			switch controller {
			case "cpu":
				errs = append(errs,
					keys(path.Join(dir, "cpu.stat"),
						func(k map[string]uint64) {
							g.Throttled = time.Duration(k["throttled_time"])
						}))
			case "memory":
				errs = append(errs,
					keys(path.Join(dir, "memory.stat"),
						func(k map[string]uint64) { g.Refaults = refaults(k) }),
					number(path.Join(dir, "memory.usage_in_bytes"), &g.Memory))
			}
		}
	}
	if err := errors.Join(errs...); err != nil || !told {
		return nil, err
	}
	return &g, nil
}

// maxFile bounds what is read of a file.
const maxFile = 64 << 10

// readKeys reads lines of a name and a number; a number alone has the name "".
func readKeys(name string) (map[string]uint64, error) {
	b, err := readFile(name)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeys(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return keys, nil
}

func readStall(name string) (Stall, error) {
	b, err := readFile(name)
	if err != nil {
		return Stall{}, err
	}
	s, err := parseStall(b)
	if err != nil {
		return s, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFile))
}

// HostLoad is how loaded a host was between two moments.
type HostLoad struct {
	Over time.Duration
	CPUs int
	CPU  float64 // cores in use
	// Yielding is the share of these that processes of lower priority use, and would leave to VMs.
	Yielding float64
	// Some and Full are the shares of the time, 0 to 1, in which at least one task, or all, stood
	// still for want of "cpu", "memory" or "io".
	Some, Full map[string]float64
	Memory     Memory // at the end
	Refaults   float64
	SwappedIn  float64            // as Refaults, in pages per second
	Links      map[string]float64 // bytes per second, the busier direction
}

// Since tells how loaded the host, which has these VMs, was since an earlier moment.
func (h Host) Since(before Host, vms ...process.Process) HostLoad {
	over := h.At.Sub(before.At)
	l := HostLoad{Over: over, CPUs: h.CPUs, Memory: h.Memory, Some: map[string]float64{},
		Full: map[string]float64{}, Links: map[string]float64{}}
	l.CPU = min(share(h.Busy-before.Busy, over), float64(h.CPUs))
	l.Yielding = min(system.yielding(h, before, vms), l.CPU)
	l.Some, l.Full = shares(h.Stalls, before.Stalls, over)
	l.Refaults, l.SwappedIn = rate(h.Refaults, before.Refaults, over), rate(h.SwappedIn,
		before.SwappedIn, over)
	for name, t := range h.Links {
		if b, ok := before.Links[name]; ok {
			l.Links[name] = max(rate(t.Received, b.Received, over), rate(t.Sent, b.Sent, over))
		}
	}
	return l
}

// VMLoad is how a VM fared between two moments.
type VMLoad struct {
	Over  time.Duration
	VCPUs int
	CPU   float64 // cores that its vCPUs had
	// cores that they waited for, and might have had on an idle host: a quota's throttling is not
	// part of it
	Waiting  float64
	Overhead float64 // cores that the rest of QEMU used
	Resident uint64  // bytes, at the end
	Swapped  uint64  // bytes, at the end
	// MajorFaults per second, and where the VM has a control group of its own what that tells:
	// shares of the time, and pages per second.
	MajorFaults float64
	Some, Full  map[string]float64
	Throttled   float64
	Refaults    float64
}

// Since tells how a VM fared since an earlier moment.
func (vm VM) Since(before VM) VMLoad {
	over := vm.At.Sub(before.At)
	l := VMLoad{Over: over, VCPUs: vm.VCPUs, Resident: vm.Resident, Swapped: vm.Swapped}
	l.CPU, l.Waiting = share(vm.Ran-before.Ran, over), share(vm.Waited-before.Waited, over)
	l.Overhead = max(0, share(vm.Used-before.Used, over)-l.CPU)
	l.MajorFaults = rate(vm.MajorFaults, before.MajorFaults, over)
	if vm.Cgroup != nil && before.Cgroup != nil {
		l.Some, l.Full = shares(vm.Cgroup.Stalls, before.Cgroup.Stalls, over)
		l.Throttled = share(vm.Cgroup.Throttled-before.Cgroup.Throttled, over)
		l.Waiting = max(0, l.Waiting-l.Throttled)
		l.Refaults = rate(vm.Cgroup.Refaults, before.Cgroup.Refaults, over)
	}
	return l
}

// Wants is the CPU that the VM would use if it got it, in cores.
func (l VMLoad) Wants() float64 { return l.CPU + l.Waiting }

// Steal is the share of the CPU it wants that the VM does not get, 0 to 1.
func (l VMLoad) Steal() float64 {
	if l.Waiting <= 0 {
		return 0
	}
	return l.Waiting / l.Wants()
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// share of a time; a counter that went back counts as one that stood still.
func share(d, over time.Duration) float64 {
	if d <= 0 || over <= 0 {
		return 0
	}
	return d.Seconds() / over.Seconds()
}

func rate(now, before uint64, over time.Duration) float64 {
	if now <= before || over <= 0 {
		return 0
	}
	return float64(now-before) / over.Seconds()
}

func shares(now, before map[string]Stall, over time.Duration) (some, full map[string]float64) {
	some, full = map[string]float64{}, map[string]float64{}
	for _, what := range slices.Sorted(maps.Keys(now)) {
		if b, ok := before[what]; ok {
			some[what], full[what] = min(1, share(now[what].Some-b.Some, over)), min(1,
				share(now[what].Full-b.Full, over))
		}
	}
	return some, full
}
