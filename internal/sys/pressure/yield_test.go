package pressure

import (
	"maps"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// TestYielding has processes of lower priority on a core, alone and beside what stands for a VM.
func TestYielding(t *testing.T) {
	core := -1
	for c := range usable() {
		core = max(core, int(c))
	}
	vm, low, idle := busy(t, core), busy(t, core), busy(t, core)
	if err := unix.Setpriority(unix.PRIO_PROCESS, low.PID, 10); err != nil {
		t.Fatal(err)
	}
	if err := unix.SchedSetAttr(idle.PID,
		&unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: schedIdle}, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(vm.PID, unix.SIGSTOP); err != nil { // it wants nothing at first
		t.Fatal(err)
	}
	look := func(vms ...process.Process) (l HostLoad, lowUsed, idleUsed float64) {
		t.Helper()
		before, err := ReadHost()
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(1500 * time.Millisecond)
		after, err := ReadHost()
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range []Host{before, after} { // others of low priority may be about
			maps.DeleteFunc(h.yielders,
				func(p process.Process, _ yielder) bool { return p != low && p != idle })
		}
		used := func(p process.Process) float64 {
			b, ok := before.yielders[p]
			if a, still := after.yielders[p]; ok && still {
				return share(a.used-b.used, after.At.Sub(before.At))
			}
			t.Errorf("process %d has a low priority, and is none of %d that have", p.PID,
				len(after.yielders))
			return 0
		}
		return after.Since(before, vms...), used(low), used(idle)
	}
	for name, vms := range map[string][]process.Process{"no VM": nil, "a VM": {vm}} {
		l, lowUsed, idleUsed := look(vms...)
		want := lowUsed*(1-math.Pow(1.25, -10)) + idleUsed*(1-math.Pow(1.25, -idleStep))
		if strings.HasPrefix(system.cpuGroup(os.Getpid()), "/") && vms == nil {
			want = 0 // a VM's session is another than these have
		}
		t.Logf("%s: %.2f cores in use, %.2f yield; nice 10 used %.2f, idle %.2f", name, l.CPU,
			l.Yielding, lowUsed, idleUsed)
		if lowUsed == 0 || math.Abs(l.Yielding-want) > 0.01 {
			t.Errorf("%s: %.2f cores yield of %.2f, want %.2f", name, l.Yielding, l.CPU, want)
		}
	}
	// A VM of the same priority gets no more than they do.
	if err := unix.Setpriority(unix.PRIO_PROCESS, vm.PID, 10); err != nil {
		t.Fatal(err)
	}
	l, lowUsed, idleUsed := look(vm)
	if want := idleUsed; l.Yielding > want+0.1*lowUsed {
		t.Errorf("beside a VM of the same priority, %.2f cores yield; want at most %.2f",
			l.Yielding, want)
	}
}

// TestGroups tells groups of CPU time apart, in which a priority means something.
func TestGroups(t *testing.T) {
	stat := "7 (x) S 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 1 0 0 0\n"
	for name, c := range map[string]struct {
		files map[string]string
		want  string
	}{
		"version 1": {
			map[string]string{"proc/7/cgroup": "4:memory:/m\n3:cpu,cpuacct:/c/vm\n0::/\n"},
			"v1:/c/vm"},
		"version 1, root": {map[string]string{"proc/7/cgroup": "3:cpu:/\n4:memory:/m\n"},
			"root"},
		"version 2": {map[string]string{"proc/7/cgroup": "0::/a/b\n",
			"sys/a/b/cpu.weight": "100\n", "sys/a/cpu.weight": "100\n"}, "v2:/a/b"},
		"version 2, of its parent": {map[string]string{"proc/7/cgroup": "0::/a/b\n",
			"sys/a/cpu.weight": "100\n"}, "v2:/a"},
		"version 2, no controller": {map[string]string{"proc/7/cgroup": "0::/a/b\n"}, "root"},
		"version 2 beside 1": {map[string]string{"proc/7/cgroup": "4:memory:/m\n0::/a\n",
			"sys/unified/a/cpu.weight": "100\n"}, "v2:/a"},
		"sessions": {map[string]string{"proc/7/cgroup": "0::/\n",
			"proc/7/autogroup":                        "/autogroup-5 nice 0\n",
			"proc/sys/kernel/sched_autogroup_enabled": "1\n"}, "/autogroup-5"},
		"sessions, which says none": {map[string]string{"proc/7/cgroup": "0::/\n",
			"proc/sys/kernel/sched_autogroup_enabled": "1\n"}, ""},
		"sessions, the first": {map[string]string{"proc/7/cgroup": "0::/\n", "proc/7/autogroup": "",
			"proc/sys/kernel/sched_autogroup_enabled": "1\n"}, "/"},
		"sessions, off": {map[string]string{"proc/7/cgroup": "0::/\n",
			"proc/7/autogroup":                        "/autogroup-5 nice 0\n",
			"proc/sys/kernel/sched_autogroup_enabled": "0\n"}, "root"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, map[string]string{"proc/7/stat": stat})
			put(t, dir, c.files)
			f := files{filepath.Join(dir, "proc"), filepath.Join(dir, "sys")}
			if got := f.cpuGroup(7); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
	// In another group, the lowest priority is no reason to leave anything to a VM.
	now := Host{At: time.Unix(10, 0), yielders: map[process.Process]yielder{
		{PID: 1, StartTime: 1}: {10 * time.Second, 19, system.cpuGroup(os.Getpid())},
		{PID: 2, StartTime: 1}: {10 * time.Second, 19, "another"},
		{PID: 3, StartTime: 1}: {10 * time.Second, 19, ""},
	}}
	own, err := process.Find(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if got := system.yielding(now, Host{At: time.Unix(0, 0)}, []process.Process{own}); got < 0.9 ||
		got > 1 {
		t.Errorf("%.2f cores yield, want one less a little", got)
	}
}
