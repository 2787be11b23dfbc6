package pressure

import (
	"math"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"vacate/internal/sys/process"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// Not all that uses a host's CPUs keeps them from a VM. A process of lower priority (nice 10, say)
// leaves most of a core to a vCPU that wants it. It keeps a share by the weights that Linux gives
// both: each step of nice is a factor of 1.25. So it counts as so much of a core as it weighs
// compared with the vCPU, 0.11 for nice 10, and the rest yields.
//
// A priority only matters among tasks of one control group of the CPU controller, or where there is
// none, of one session (Linux groups these by itself, sched(7)). Tasks of two groups share by the
// weights of the groups, however low the priority of one is. So a process counts in full unless it
// is in the group of all VMs. Groups of less weight than a VM's count in full, too, which is more
// than they are: a host then takes less than it could.

// A yielder is a process of lower priority than usual.
type yielder struct {
	used  time.Duration
	step  float64 // how often its weight was divided by 1.25
	group string
}

// idleStep is the weight of SCHED_IDLE, 3 of 1024, in steps of nice.
const idleStep = 26

// schedIdle is SCHED_IDLE of sched.h.
const schedIdle = 5

// yielders returns all processes of lower priority than usual. It takes a microsecond for each of
// the others.
func (f files) yielders() map[process.Process]yielder {
	list := map[process.Process]yielder{}
	entries, err := os.ReadDir(f.proc)
	if err != nil {
		return list
	}
	proc, err := procfs.NewFS(f.proc)
	if err != nil {
		return list
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		step := priority(pid)
		if step <= 0 {
			continue
		}
		// One that has ended meanwhile, or tells nothing, counts in full.
		p, err := proc.Proc(pid)
		if err != nil {
			continue
		}
		stat, err := p.Stat()
		if err != nil {
			continue
		}
		list[process.Process{PID: pid,
			StartTime: stat.Starttime}] = yielder{seconds(stat.CPUTime()), step, f.cpuGroup(pid)}
	}
	return list
}

// priority is the nice value of a process's first thread, or that of SCHED_IDLE.
func priority(pid int) float64 {
	if policy, err := unix.SchedGetAttr(pid, 0); err == nil && policy.Policy == schedIdle {
		return idleStep
	}
	n, err := unix.Getpriority(unix.PRIO_PROCESS, pid)
	if err != nil {
		return 0
	}
	return float64(20 - n) // as Linux returns it, to tell it from an error
}

// cpuGroup names the group in which a process's priority matters; "" if that cannot be told.
func (f files) cpuGroup(pid int) string {
	proc, err := procfs.NewFS(f.proc)
	if err != nil {
		return ""
	}
	p, err := proc.Proc(pid)
	if err != nil {
		return ""
	}
	groups, err := p.Cgroups()
	if err != nil && !absent(err) {
		return ""
	}
	root := true
	name := ""
	for _, g := range groups {
		if g.HierarchyID == 0 {
			for dir := g.Path; dir != "/" && dir != "." && root; dir = path.Dir(dir) {
				for _, at := range []string{path.Join(f.cgroup, dir),
					path.Join(f.cgroup, "unified", dir)} {
					if _, err := os.Stat(path.Join(at, "cpu.weight")); err == nil {
						name, root = "v2:"+dir, false
						break
					}
				}
			}
		}
		for _, c := range g.Controllers {
			if c == "cpu" && g.Path != "/" {
				name, root = "v1:"+g.Path, false
			}
		}
	}
	if !root {
		return name
	}
	if on, err := os.ReadFile(path.Join(f.proc, "sys/kernel/sched_autogroup_enabled")); err !=
		nil || strings.TrimSpace(string(on)) != "1" {
		return "root"
	}
	b, err := os.ReadFile(path.Join(f.proc, strconv.Itoa(pid), "autogroup"))
	if err != nil {
		return ""
	}
	session, _, _ := strings.Cut(strings.TrimSpace(string(b)), " ") // "/autogroup-5 nice 0"
	if session == "" {
		// of the session that the host's first process began with
		return "/"
	}
	return session
}

// yielding is how much CPU, in cores, was used since before by processes that would leave it to
// VMs. vms are those on the host. Where there are none, it assumes a child of this process, with
// the usual priority and a session of its own.
func (f files) yielding(now, before Host, vms []process.Process) float64 {
	if len(now.yielders) == 0 {
		return 0
	}
	over := now.At.Sub(before.At)
	group, least := f.cpuGroup(os.Getpid()), 0.0
	own := map[process.Process]bool{}
	for i, vm := range vms {
		own[vm] = true
		g, step := f.cpuGroup(vm.PID), priority(vm.PID)
		if i == 0 {
			group, least = g, step
		} else if g != group {
			return 0 // none is in the group of all
		}
		least = max(least, step)
	}
	if group == "" || len(vms) == 0 && strings.HasPrefix(group, "/") {
		return 0
	}
	sum := 0.0
	for p, y := range now.yielders {
		// One that began since has used all of it since. One that ended counts in full.
		if used := share(y.used-before.yielders[p].used, over); !own[p] && y.group == group &&
			y.step > least {
			sum += used * (1 - math.Pow(1.25, least-y.step))
		}
	}
	return sum
}
