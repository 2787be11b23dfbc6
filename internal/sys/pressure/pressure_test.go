package pressure

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"vacate/internal/sys/process"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// busy starts a program that always wants to run, on one core.
func busy(t *testing.T, core int) process.Process {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", "echo; while :; do :; done")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var set unix.CPUSet
	set.Set(core)
	if err := unix.SchedSetaffinity(cmd.Process.Pid, &set); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadByte(); err != nil {
		t.Fatal(err)
	}
	p, err := process.Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func read(t *testing.T, p process.Process) VM {
	t.Helper()
	vm, err := ReadVM(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

// TestSteal has two programs share a core.
func TestSteal(t *testing.T) {
	core := -1
	for c := range usable() {
		core = max(core, int(c))
	}
	a, b := busy(t, core), busy(t, core)
	host, err := ReadHost()
	if err != nil {
		t.Fatal(err)
	}
	before := []VM{read(t, a), read(t, b)}
	time.Sleep(time.Second)
	after := []VM{read(t, a), read(t, b)}
	later, err := ReadHost()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for i := range before {
		l := after[i].Since(before[i])
		t.Logf("%+v: wants %.2f, steal %.2f", l, l.Wants(), l.Steal())
		if l.Wants() < 0.9 || l.Wants() > 1.1 {
			t.Errorf("it wants %.2f of a core, and always wanted to run", l.Wants())
		}
		if l.VCPUs != 0 || l.Resident == 0 || l.Over < time.Second {
			t.Errorf("%+v", l)
		}
		sum += l.CPU
	}
	if sum > 1.1 {
		t.Errorf("on one core, they had %.2f", sum)
	}
	l := later.Since(host)
	t.Logf("%+v", l)
	if l.CPU < sum*0.9 || l.CPU > float64(l.CPUs) || l.CPUs != len(usable()) {
		t.Errorf("%.2f of %d cores in use; these two used %.2f", l.CPU, l.CPUs, sum)
	}
	if m := l.Memory; m.Total == 0 || m.Available == 0 || m.Available > m.Total {
		t.Errorf("%+v", m)
	}
}

func TestGone(t *testing.T) {
	p := busy(t, 0)
	other := p
	other.StartTime--
	if _, err := ReadVM(other, nil); !errors.Is(err, process.ErrGone) {
		t.Errorf("an earlier process of the number: %v", err)
	}
	if err := p.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for { // until somebody has waited for it, there are files of it, but it is none to measure
		if _, err := ReadVM(p, nil); errors.Is(err, process.ErrGone) {
			return
		}
		unix.Wait4(p.PID, nil, 0, nil)
	}
}

// put writes a tree of files.
func put(t *testing.T, dir string, texts map[string]string) {
	t.Helper()
	for name, text := range texts {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

const stall = "some avg10=1.00 avg60=0.00 avg300=0.00 total=3000000\nfull avg10=0.00 avg60=0.00 " +
	"avg300=0.00 total=1000000\n"

// TestVCPUs reads a QEMU that names its threads, in control groups of either version, and in both.
func TestVCPUs(t *testing.T) {
	const stat = "7 (qemu) S 1 7 7 0 -1 4194304 100 0 42 0 500 250 0 0 20 0 4 0 1000 1000 1000 " +
		"18446744073709551615 1 1 1 1 1 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
	proc := map[string]string{
		"proc/7/stat": stat, "proc/7/status": "Name:\tqemu\nVmRSS:\t 1024 kB\nVmSwap:\t 8 kB\n",
		"proc/7/task/7/comm": "qemu-system-x86\n", "proc/7/task/7/schedstat": "1000 2000 3\n",
		"proc/7/task/8/comm": "CPU 0/KVM\n", "proc/7/task/8/schedstat": "3000000000 1000000000 5\n",
		"proc/7/task/9/comm": "CPU 1/KVM\n", "proc/7/task/9/schedstat": "1000000000 500000000 5\n",
		"proc/7/task/10/comm": "worker\n", "proc/7/task/10/schedstat": "7 7 7\n",
	}
	v1 := map[string]string{
		"sys/memory/m/vm/memory.stat": "cache 1\nworkingset_refault_anon " +
			"2\nworkingset_refault_file 3\n", "sys/memory/m/vm/memory.usage_in_bytes": "4096\n",
		"sys/cpu/c/vm/cpu.stat": "nr_periods 5\nnr_throttled 2\nthrottled_time 1500000000\n",
	}
	v2 := map[string]string{
		"cpu.pressure": stall, "memory.pressure": stall, "io.pressure": stall,
		"cpu.stat":       "usage_usec 1\nthrottled_usec 1500000\n",
		"memory.stat":    "anon 1\nworkingset_refault_anon 2\nworkingset_refault_file 3\n",
		"memory.current": "4096\n", "memory.max": "max\n",
	}
	under := func(dir string) map[string]string {
		moved := map[string]string{}
		for name, text := range v2 {
			moved[filepath.Join("sys", dir, name)] = text
		}
		return moved
	}
	some := map[string]Stall{}
	for _, what := range resources {
		some[what] = Stall{3 * time.Second, time.Second}
	}
	all := &Cgroup{Stalls: some, Throttled: 1500 * time.Millisecond, Memory: 4096, Refaults: 5}
	for name, c := range map[string]struct {
		groups string
		trees  []map[string]string
		want   *Cgroup
	}{
		"none":     {"0::/\n", nil, nil},
		"no files": {"0::/gone\n3:cpu:/gone\n", nil, nil},
		"version 1": {"4:memory:/m/vm\n3:cpu,cpuacct:/c/vm\n0::/\n", []map[string]string{v1},
			&Cgroup{Stalls: map[string]Stall{}, Throttled: all.Throttled, Memory: 4096,
				Refaults: 5}},
		"version 2": {"0::/machine/vm\n", []map[string]string{under("machine/vm")}, all},
		"both": {"4:memory:/m/vm\n0::/vm\n", []map[string]string{v1, under("unified/vm")},
			all},
		"no /proc it": {"", nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, proc)
			put(t, dir, map[string]string{"proc/7/cgroup": c.groups})
			for _, tree := range c.trees {
				put(t, dir, tree)
			}
			f := files{filepath.Join(dir, "proc"), filepath.Join(dir, "sys")}
			vm, err := f.vm(7, nil)
			if err != nil {
				t.Fatal(err)
			}
			want := VM{At: vm.At, VCPUs: 2, Ran: 4 * time.Second, Waited: 1500 * time.Millisecond,
				Used:     7500 * time.Millisecond,
				Resident: 1 << 20, Swapped: 8 << 10, MajorFaults: 42, Cgroup: c.want}
			if d := cmp.Diff(want, vm); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestUnnamed reads a QEMU that does not name its threads: those are vCPUs that it has told of by
// QMP.
func TestUnnamed(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{
		"proc/7/stat": "7 (qemu) S 1 7 7 0 -1 4194304 100 0 42 0 500 250 0 0 20 0 4 0 1000 " +
			"1000 1000 18446744073709551615 1 1 1 1 1 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 " +
			"0 0\n",
		"proc/7/status": "Name:\tqemu\nVmRSS:\t 1024 kB\n", "proc/7/cgroup": "0::/\n",
		"proc/7/task/7/comm":      "qemu-system-x86\n",
		"proc/7/task/7/schedstat": "2000000000 900000000 3\n",
		"proc/7/task/8/comm":      "qemu-system-x86\n",
		"proc/7/task/8/schedstat": "3000000000 1000000000 5\n",
		"proc/7/task/9/comm":      "qemu-system-x86\n",
		"proc/7/task/9/schedstat": "1000000000 500000000 5\n",
	})
	f := files{filepath.Join(dir, "proc"), filepath.Join(dir, "sys")}
	for _, c := range []struct {
		vcpus       []int
		n           int
		ran, waited time.Duration
	}{
		{[]int{8}, 1, 3 * time.Second, time.Second},
		{[]int{8, 9, 99}, 2, 4 * time.Second, 1500 * time.Millisecond}, // one was unplugged
		{nil, 0, 6 * time.Second, 2400 * time.Millisecond},
		{[]int{99}, 0, 6 * time.Second, 2400 * time.Millisecond},
	} {
		vm, err := f.vm(7, c.vcpus)
		if err != nil || vm.VCPUs != c.n || vm.Ran != c.ran || vm.Waited != c.waited {
			t.Errorf("threads %v: %+v, %v", c.vcpus, vm, err)
		}
	}
}

// TestRealGroups has a program run in control groups of this machine, as far as it has any.
func TestRealGroups(t *testing.T) {
	p := busy(t, 0)
	for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup/cpu",
		"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		dir := filepath.Join(root, fmt.Sprintf("vacate-test-%d", os.Getpid()))
		var fs unix.Statfs_t
		if err := unix.Statfs(root, &fs); err != nil ||
			fs.Type != unix.CGROUP_SUPER_MAGIC && fs.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Logf("no group there: %v", err)
			continue
		}
		t.Cleanup(func() { // before the program ends: it has to be out of the group
			os.WriteFile(filepath.Join(root, "cgroup.procs"), fmt.Append(nil, p.PID), 0)
			if err := unix.Rmdir(dir); err != nil {
				t.Error(err)
			}
		})
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, p.PID),
			0); err != nil {
			t.Logf("%s: %v", dir, err)
			continue
		}
		os.WriteFile(filepath.Join(dir, "cpu.cfs_quota_us"), []byte("2000"), 0) // of 100000
		before := read(t, p)
		var l VMLoad
		// On a busy machine it takes a while until it has used its quota up.
		for range 60 {
			time.Sleep(500 * time.Millisecond)
			if l = read(t, p).Since(before); root != "/sys/fs/cgroup/cpu" || l.Throttled > 0 {
				break
			}
		}
		t.Logf("%s: %+v", root, l)
		if before.Cgroup == nil {
			t.Errorf("%s: nothing was read of its group", root)
		}
		// How much, depends on when Linux takes it into account: at the end of each wait.
		if root == "/sys/fs/cgroup/cpu" && l.Throttled == 0 {
			t.Errorf("not throttled with a quota of 0.02 cores: %+v", l)
		}
	}
}

// TestBroken has files that are cut, empty, or hold something else.
func TestBroken(t *testing.T) {
	for _, text := range []string{"", "x", "some\n", "some total=\n", "some total=-1\n",
		"full avg10=0 total=5\n", "some total=9223372036854775807\n"} {
		if s, err := parseStall([]byte(text)); err == nil {
			t.Errorf("%q: %+v", text, s)
		}
	}
	for _, text := range []string{"a b c\n", "A-b 1\n", "a 99999999999999999999\n", "\x00 1\n",
		"\n"} {
		if k, err := parseKeys([]byte(text)); err == nil {
			t.Errorf("%q: %v", text, k)
		}
	}
	dir := t.TempDir()
	put(t, dir, map[string]string{"cpu/vm/cpu.stat": "throttled_time many cores\n"})
	if g, err := (files{cgroup: dir}).group([]procfs.Cgroup{{HierarchyID: 1,
		Controllers: []string{"cpu"}, Path: "/vm"}}); err == nil {
		t.Errorf("%+v", g)
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"vmstat", "memory.stat", "pressure", "cpu.stat"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseStall(b); err == nil && (s.Some < 0 || s.Full < 0) {
			t.Errorf("%+v", s)
		}
		keys, err := parseKeys(b)
		for name := range keys {
			if err == nil && name != "" && !word(name) {
				t.Errorf("%q", name)
			}
		}
	})
}

// BenchmarkHost and BenchmarkVM tell what a look costs: as many a second as a daemon takes make its
// share of a core.
func BenchmarkHost(b *testing.B) {
	for b.Loop() {
		if _, err := ReadHost(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVM(b *testing.B) {
	p, err := process.Find(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := ReadVM(p, nil); err != nil {
			b.Fatal(err)
		}
	}
	threads, _ := os.ReadDir("/proc/self/task")
	b.ReportMetric(float64(len(threads)), "threads")
}
