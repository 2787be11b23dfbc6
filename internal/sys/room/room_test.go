package room

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"vacate/internal/sys/process"
	"vacate/internal/sys/units"
)

const mib = 1 << 20

// tree makes files below a directory and returns it as the root of what is read.
func tree(t testing.TB, list map[string]string) files {
	t.Helper()
	root := t.TempDir()
	for name, text := range list {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return files{root}
}

// version1 is a process in a control group of a group, as Linux 6.18 tells of it.
var version1 = map[string]string{
	"/proc/meminfo": "MemTotal:       24684092 kB\nMemFree:        21000000 kB\nMemAvailable:   " +
		"23068672 kB\nSwapTotal:             0 kB\nSwapFree:              0 kB\n",
	"/proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n" +
		"35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n" +
		"36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices\n" +
		"41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n",
	"/proc/77/cgroup": "9:name=systemd:/\n5:devices:/\n4:memory:/vms/web1\n1:cpu:/\n0::/\n",
	"/proc/77/limits": "Limit                     Soft Limit           Hard Limit           " +
		"Units     \nMax cpu time              unlimited            unlimited            " +
		"seconds   \nMax address space         unlimited            unlimited            bytes  " +
		"   \n",

	"/sys/fs/cgroup/memory/memory.limit_in_bytes":     "9223372036854771712\n",
	"/sys/fs/cgroup/memory/memory.usage_in_bytes":     "1371525120\n",
	"/sys/fs/cgroup/memory/vms/memory.limit_in_bytes": "1073741824\n",
	"/sys/fs/cgroup/memory/vms/memory.usage_in_bytes": "734003200\n",
	"/sys/fs/cgroup/memory/vms/memory.stat": "cache 308363264\nrss " +
		"1055375360\ninactive_file 1\nactive_file 2\ntotal_cache 308363264\ntotal_inactive_file " +
		"104857600\ntotal_active_file 104857600\n",
	"/sys/fs/cgroup/memory/vms/memory.oom_control": "oom_kill_disable " +
		"0\nunder_oom 0\noom_kill 3\n",
	"/sys/fs/cgroup/memory/vms/web1/memory.limit_in_bytes":       "9223372036854771712\n",
	"/sys/fs/cgroup/memory/vms/web1/memory.usage_in_bytes":       "52428800\n",
	"/sys/fs/cgroup/memory/vms/web1/memory.memsw.limit_in_bytes": "209715200\n",
	"/sys/fs/cgroup/memory/vms/web1/memory.memsw.usage_in_bytes": "52428800\n",
}

// version2 is a process in a service, whose daemon sees no more of the hierarchy than a
// container's.
var version2 = map[string]string{
	"/proc/meminfo": "MemTotal:       24684092 kB\nMemAvailable:   23068672 " +
		"kB\nSwapFree:        1048576 kB\n",
	"/proc/self/mountinfo": "35 24 0:29 /machine.slice/c1 /sys/fs/cg\\040roup rw,nosuid " +
		"shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n",
	"/proc/77/cgroup": "0::/machine.slice/c1/vms.slice/web1.service\n",
	"/proc/77/limits": "Max address space         1073741824           unlimited            " +
		"bytes     \n",
	"/proc/77/status": "Name:\tqemu\nVmSize:\t  917504 kB\n",

	// a root has no limits
	"/sys/fs/cg roup/memory.stat":                                        "anon 5\n",
	"/sys/fs/cg roup/vms.slice/memory.max":                               "3221225472\n",
	"/sys/fs/cg roup/vms.slice/memory.high":                              "max\n",
	"/sys/fs/cg roup/vms.slice/memory.current":                           "1073741824\n",
	"/sys/fs/cg roup/vms.slice/memory.swap.max":                          "104857600\n",
	"/sys/fs/cg roup/vms.slice/memory.swap.current":                      "4194304\n",
	"/sys/fs/cg roup/vms.slice/memory.stat":                              "anon 700000000\nfile 300000000\nslab_reclaimable 10485760\nslab_unreclaimable 99\ninactive_anon 0\ninactive_file 104857600\nactive_file 209715200\n",
	"/sys/fs/cg roup/vms.slice/memory.events":                            "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 0\n",
	"/sys/fs/cg roup/vms.slice/web1.service/memory.max":                  "max\n",
	"/sys/fs/cg roup/vms.slice/web1.service/memory.high":                 "2147483648\n",
	"/sys/fs/cg roup/vms.slice/web1.service/memory.current":              "104857600\n",
	"/sys/fs/cg roup/vms.slice/web1.service/hugetlb.2MB.max":             "104857600\n",
	"/sys/fs/cg roup/vms.slice/web1.service/hugetlb.2MB.current":         "41943040\n",
	"/sys/fs/cg roup/vms.slice/web1.service/hugetlb.2MB.rsvd.max":        "max\n",
	"/sys/fs/cg roup/vms.slice/web1.service/hugetlb.1GB.rsvd.max":        "4294967296\n",
	"/sys/fs/cg roup/vms.slice/web1.service/hugetlb.1GB.rsvd.current":    "0\n",
	"/sys/fs/cg roup/vms.slice/web1.service/hugetlb.1GB.max":             "max\n",
	"/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages":             "100\n",
	"/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages":           "60\n",
	"/sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages":           "20\n",
	"/sys/kernel/mm/hugepages/hugepages-2048kB/surplus_hugepages":        "0\n",
	"/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages":  "8\n",
	"/sys/kernel/mm/hugepages/hugepages-xkB/nr_hugepages":                "1\n",
	"/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages":          "2\n",
	"/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages":        "1\n",
	"/sys/kernel/mm/hugepages/hugepages-1048576kB/resv_hugepages":        "3\n",
	"/sys/kernel/mm/hugepages/hugepages-1048576kB/surplus_hugepages":     "5\n",
	"/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages.backup": "junk",
}

func TestLimits(t *testing.T) {
	const memory = "/sys/fs/cgroup/memory/vms"
	const slice = "/sys/fs/cg roup/vms.slice"
	const pools = "/sys/kernel/mm/hugepages/hugepages-"
	for name, c := range map[string]struct {
		list map[string]string
		want []Limit
	}{
		"version 1": {version1, []Limit{
			{Page: units.PageSize, Name: "this host", Max: 24684092 << 10, Used: 1615420 << 10},
			{Page: units.PageSize, Name: "the control group " + memory + "/web1",
				File: memory + "/web1/memory.memsw.limit_in_bytes", Max: 200 * mib, Used: 50 * mib},
			{Page: units.PageSize, Name: "the control group " + memory,
				File: memory + "/memory.limit_in_bytes", Max: 1024 * mib, Used: 500 * mib},
		}},
		"version 2": {version2, []Limit{
			{Page: units.PageSize, Name: "this host", Max: 24684092 << 10, Used: 1615420 << 10,
				Swap: 1 << 30},
			{Page: 1 << 30, Name: "this host's pool of huge pages",
				File: pools + "1048576kB/nr_hugepages", Max: 2 << 30, Used: 4 << 30, Spare: true},
			{Page: 2 << 20, Name: "this host's pool of huge pages",
				File: pools + "2048kB/nr_hugepages", Max: 108 << 21, Used: 60 << 21, Spare: true},
			{Page: units.PageSize, Name: "the control group " + slice + "/web1.service",
				File: slice + "/web1.service/memory.high", Max: 2 << 30, Used: 100 * mib},
			{Page: 1 << 30, Name: "the control group " + slice + "/web1.service",
				File: slice + "/web1.service/hugetlb.1GB.rsvd.max", Max: 4 << 30, Spare: true},
			{Page: 2 << 20, Name: "the control group " + slice + "/web1.service",
				File: slice + "/web1.service/hugetlb.2MB.max", Max: 100 * mib, Used: 40 * mib},
			{Page: units.PageSize, Name: "the control group " + slice, File: slice + "/memory.max",
				Max: 3 << 30, Used: 714 * mib, Swap: 96 * mib},
			{Page: addresses, Name: "the address space of process 77", File: "RLIMIT_AS",
				Max: 1 << 30, Used: 917504 << 10},
		}},
	} {
		got, err := tree(t, c.list).limits(77)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !slices.Equal(got, c.want) {
			for i := range max(len(got), len(c.want)) {
				t.Errorf("%s, limit %d:\n got %+v\nwant %+v", name, i, at(got, i), at(c.want, i))
			}
		}
	}
}

// What a control group of version 2 allows, at the edges of what cgroup-v2.rst has of it.
func TestVersion2(t *testing.T) {
	const outer, inner = "/sys/fs/cgroup/vms.slice", "/sys/fs/cgroup/vms.slice/web1.service"
	for name, c := range map[string]struct {
		list map[string]string
		want []Limit
	}{
		"no limits": {map[string]string{inner + "/memory.max": "max\n",
			inner + "/memory.high": "max\n", inner + "/memory.swap.max": "max\n",
			inner + "/hugetlb.2MB.max": "max\n", inner + "/hugetlb.2MB.rsvd.max": "max\n"}, nil},
		"no controllers": {map[string]string{inner + "/cgroup.procs": "77\n",
			outer + "/cpu.max": "max 100000\n"}, nil},
		"nothing allowed": {map[string]string{inner + "/memory.max": "0\n",
			inner + "/memory.current": "0\n", inner + "/hugetlb.1GB.max": "0\n",
			inner + "/hugetlb.1GB.current": "0\n"},
			[]Limit{{Page: units.PageSize, File: inner + "/memory.max", Swap: 1 << 30},
				{Page: 1 << 30, File: inner + "/hugetlb.1GB.max"}}},
		"used beyond a limit that was lowered": {map[string]string{inner +
			"/memory.max": "1048576\n", inner + "/memory.current": "2097152\n",
			inner + "/memory.swap.max": "4096\n", inner + "/memory.swap.current": "8192\n"},
			[]Limit{{Page: units.PageSize, File: inner + "/memory.max", Max: mib, Used: 2 * mib}}},
		"more to take back than is used": {map[string]string{inner + "/memory.max": "1048576\n",
			inner + "/memory.current": "4096\n", inner + "/memory.stat": "inactive_file 8192\n"},
			[]Limit{{Page: units.PageSize, File: inner + "/memory.max", Max: mib, Swap: 1 << 30}}},
		"no swap allowed": {map[string]string{inner + "/memory.max": "1048576\n",
			inner + "/memory.current": "4096\n", inner + "/memory.swap.max": "0\n"},
			[]Limit{{Page: units.PageSize, File: inner + "/memory.max", Max: mib, Used: 4096}}},
		// A limit on swap holds for all below, and not for what is above.
		"swap of the group above": {map[string]string{inner + "/memory.max": "1048576\n",
			inner + "/memory.current": "0\n", inner + "/memory.swap.max": "max\n",
			outer + "/memory.max": "2097152\n", outer + "/memory.current": "0\n",
			outer + "/memory.swap.max": "12288\n", outer + "/memory.swap.current": "8192\n"},
			[]Limit{{Page: units.PageSize, File: inner + "/memory.max", Max: mib, Swap: 4096},
				{Page: units.PageSize, File: outer + "/memory.max", Max: 2 * mib, Swap: 4096}}},
		"swap of the group below": {map[string]string{inner + "/memory.max": "1048576\n",
			inner + "/memory.current": "0\n", inner + "/memory.swap.max": "4096\n",
			outer + "/memory.max": "2097152\n", outer + "/memory.current": "0\n",
			outer + "/memory.swap.max": "8192\n"},
			[]Limit{{Page: units.PageSize, File: inner + "/memory.max", Max: mib, Swap: 4096},
				{Page: units.PageSize, File: outer + "/memory.max", Max: 2 * mib, Swap: 8192}}},
	} {
		list := map[string]string{
			"/proc/meminfo":        "SwapFree: 1048576 kB\n",
			"/proc/self/mountinfo": "35 24 0:29 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
			"/proc/77/cgroup":      "0::/vms.slice/web1.service\n",
		}
		maps.Copy(list, c.list)
		got, err := tree(t, list).limits(77)
		for i := range got {
			got[i].Name = ""
		}
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v\n got %+v\nwant %+v", name, err, got, c.want)
		}
	}
}

func at(l []Limit, i int) any {
	if i < len(l) {
		return l[i]
	}
	return nil
}

// This process has limits, too: those of its host at least.
func TestLimitsHere(t *testing.T) {
	limits, err := Limits(os.Getpid())
	if err != nil || len(limits) == 0 || limits[0].Name != "this host" || limits[0].Free() == 0 {
		t.Errorf("%+v, %v", limits, err)
	}
	if k, err := ReadKills(os.Getpid()); err != nil || k.Since() != "" && k.hostKills() == k.host {
		t.Errorf("%q, %v", k.Since(), err)
	}
}

func TestCheck(t *testing.T) {
	host := Limit{Page: units.PageSize, Name: "this host", Max: 8 << 30, Used: 4 << 30}
	group := Limit{Page: units.PageSize, Name: "the control group /sys/fs/cgroup/a",
		File: "/sys/fs/cgroup/a/memory.max", Max: 600 * mib, Used: 100 * mib}
	unit := group
	unit.File = "/sys/fs/cgroup/vms.slice/memory.high"
	pool := Limit{Page: 2 * mib, Name: "this host's pool of huge pages",
		File: "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", Max: 60 * 2 * mib,
		Used: 10 * 2 * mib, Spare: true}
	huge := Limit{Page: 2 * mib, Name: "the control group /sys/fs/cgroup/a",
		File: "/sys/fs/cgroup/a/hugetlb.2MB.max", Max: 100 * mib}
	disk := Limit{Page: units.PageSize, Name: "the file system at /mem", File: "/mem", Device: 7,
		Max: 400 * mib, Used: 300 * mib}
	space := Limit{Page: addresses, Name: "the address space of process 5", File: "RLIMIT_AS",
		Max: 1 << 30, Used: 1000 * mib}
	normal := func(size, has uint64) Memory {
		return Memory{Page: units.PageSize, Size: size * mib, Has: has * mib}
	}
	large := func(size, has uint64, spare bool) Memory {
		return Memory{Page: 2 * mib, Size: size * mib, Has: has * mib, Spare: spare}
	}
	file := normal(256, 0)
	file.Device = 7
	for _, c := range []struct {
		name   string
		limits []Limit
		memory []Memory
		others uint64 // MiB, of each limit
		says   string // "": it fits
	}{
		{"fits", []Limit{host, group}, []Memory{normal(400, 0)}, 0, ""},
		{"host", []Limit{host}, []Memory{normal(5000, 0)}, 0,
			"the VM needs 5073 MiB more, and this host has room for 4096 MiB only: it has 8192 " +
				"MiB, and 4096 MiB of it are in use. Make room there first"},
		{"group", []Limit{host, group}, []Memory{normal(512, 0)}, 0,
			"the VM needs 577 MiB more, and the control group /sys/fs/cgroup/a has room for 500 " +
				"MiB only: its memory.max is 600 MiB, and 100 MiB of it are in use. Raise it " +
				"with `echo 709885952 >/sys/fs/cgroup/a/memory.max`, or choose another host"},
		{"unit", []Limit{unit}, []Memory{normal(512, 0)}, 0,
			"`systemctl set-property --runtime vms.slice MemoryHigh=709885952`"},
		{"what is there counts once", []Limit{host, group}, []Memory{normal(512, 100)}, 0, ""},
		{"what is there counts once, all of it", []Limit{group}, []Memory{normal(5000, 5000)}, 0,
			""},
		{"others", []Limit{host, group}, []Memory{normal(400, 0)}, 100,
			"VMs that are coming will take 100 MiB of that"},
		{"pool", []Limit{pool}, []Memory{large(128, 0, false)}, 0,
			"this host's pool of huge pages has room for 100 MiB only: its nr_hugepages is " +
				"worth 60 pages of 2 MiB, and 10 of them are in use or set aside. Have more " +
				"with `echo 74 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages`"},
		{"pool, set aside", []Limit{pool}, []Memory{large(128, 0, true)}, 0, ""},
		{"pool, there in part", []Limit{pool}, []Memory{large(128, 28, false)}, 0, ""},
		{"huge pages of a group, set aside", []Limit{pool, huge}, []Memory{large(128, 0, true)}, 0,
			"its hugetlb.2MB.max is worth 50 pages"},
		{"huge pages need no normal ones", []Limit{{Page: units.PageSize, Max: 1}},
			[]Memory{large(128, 0, true)}, 0, ""},
		{"file system", []Limit{host, disk}, []Memory{file}, 0,
			"the VM needs 256 MiB more, and the file system at /mem has room for 100 MiB only: " +
				"it has 400 MiB, and 300 MiB of it are in use. Make room there first, for " +
				"instance with `mount -o remount,size=557M /mem`"},
		{"another file system", []Limit{host, disk}, []Memory{normal(256, 0)}, 0, ""},
		{"address space", []Limit{space}, []Memory{ToMap}, 0,
			"its RLIMIT_AS is 1024 MiB, and 1000 MiB of it are in use. Start that QEMU without " +
				"that limit"},
		{"used beyond the limit", []Limit{{Page: units.PageSize, Name: "x", Max: 1, Used: 2}},
			[]Memory{normal(1, 0)}, 0, "x has room for 0 bytes only"},
		{"the tightest is told", []Limit{host, group}, []Memory{normal(1<<20, 0)}, 0,
			"control group"},
		{"without end", []Limit{host},
			[]Memory{{Page: units.PageSize, Size: ^uint64(0)},
				{Page: units.PageSize, Size: ^uint64(0)}}, 0, "this host"},
	} {
		err := Check(c.limits, c.memory, func(Limit) uint64 { return c.others * mib })
		var short *ShortError
		switch {
		case c.says == "" && err != nil, c.says != "" && err == nil:
			t.Errorf("%s: %v", c.name, err)
		case err != nil && (!errors.As(err, &short) || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s: %v\nwant: %s", c.name, err, c.says)
		}
	}
}

func TestTight(t *testing.T) {
	memory := []Memory{{Page: units.PageSize, Size: mib},
		{Page: 2 * mib, Size: 2 * mib, Spare: true}}
	full := Limit{Page: units.PageSize, Name: "the control group /a", File: "/a/memory.max",
		Max: 100 * mib, Used: 99 * mib}
	swapping := full
	swapping.Swap = 50 * mib
	for _, c := range []struct {
		limit Limit
		tight bool
		left  uint64
	}{
		{full, true, 0},
		{swapping, true, 35 * mib},
		{Limit{Page: units.PageSize, Max: 100 * mib, Used: 50 * mib}, false, 34 * mib},
		{Limit{Page: units.PageSize, File: "/a/memory.high", Max: 100 * mib, Used: 100 * mib}, true,
			^uint64(0)},
		{Limit{Page: units.PageSize, Device: 3, Max: 100 * mib, Used: 100 * mib}, false,
			^uint64(0)},
		{Limit{Page: 2 * mib, File: "/a/nr_hugepages", Max: 2 * mib, Used: 2 * mib, Spare: true},
			false, ^uint64(0)},
		{Limit{Page: 2 * mib, File: "/a/hugetlb.2MB.max", Max: 2 * mib, Used: 2 * mib}, true,
			^uint64(0)},
		{Limit{Page: addresses, Max: 1}, false, ^uint64(0)},
	} {
		if why := Tight([]Limit{c.limit}, memory); (why != "") != c.tight {
			t.Errorf("%+v: %q", c.limit, why)
		}
		if left, why := Deadly([]Limit{c.limit}); left != c.left || (why != "") != (left == 0) {
			t.Errorf("%+v: %d left, %q", c.limit, left, why)
		}
	}
}

func TestKills(t *testing.T) {
	for name, list := range map[string]map[string]string{"version 1": version1,
		"version 2": version2} {
		f := tree(t, list)
		k, err := f.kills(77)
		if err != nil || k.Since() != "" {
			t.Fatalf("%s: %q, %v", name, k.Since(), err)
		}
		put := func(file, text string) {
			if err := os.WriteFile(f.root+file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		put("/proc/vmstat", "nr_free_pages 1\noom_kill 1\n")
		if why := k.Since(); !strings.Contains(why, "of this host") {
			t.Errorf("%s: %q", name, why)
		}
		if name == "version 1" {
			put("/sys/fs/cgroup/memory/vms/memory.oom_control",
				"oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
		} else {
			put("/sys/fs/cg roup/vms.slice/memory.events", "oom 2\noom_kill 2\n")
		}
		if why := k.Since(); !strings.Contains(why, "vms") || !strings.Contains(why, "memory.") ||
			!strings.Contains(why, "MiB of it are in use") {
			t.Errorf("%s: %q", name, why)
		}
	}
}

// What is promised to VMs that are coming is promised once.
func TestLedger(t *testing.T) {
	self, err := process.Find(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	limits := []Limit{{Page: units.PageSize, Name: "this host", Max: 1 << 40},
		{Page: units.PageSize, Name: "the control group /a", File: "/a/memory.max", Max: 3 << 40}}
	vm := []Memory{{Page: units.PageSize, Size: 700 << 30}, ToMap}
	var l Ledger
	first, err := l.Take(self, limits, vm)
	if err != nil {
		t.Fatal(err)
	}
	// All but what the process has already.
	if n := l.Others(limits[0]); n > 702<<30 || n < 690<<30 {
		t.Errorf("%d MiB are promised", n/mib)
	}
	var short *ShortError
	if _, err := l.Take(self, limits, vm); !errors.As(err, &short) ||
		short.Limit.Name != "this host" || short.Others < 690<<30 {
		t.Errorf("a second VM: %v", err)
	}
	if _, err := l.Take(self, limits[1:], vm); err != nil {
		t.Errorf("one of another host's limits: %v", err)
	}
	if n := l.Others(Limit{Page: units.PageSize, Name: "the control group /b",
		File: "/b/memory.max"}); n != 0 {
		t.Errorf("%d MiB are promised of a group that no VM is in", n/mib)
	}
	first.Release()
	first.Release()
	(*Claim)(nil).Release()
	if _, err := l.Take(self, limits, vm); err != nil {
		t.Errorf("after the first has come: %v", err)
	}
	// One that has ended takes nothing any more.
	gone := self
	gone.StartTime++
	var other Ledger
	other.Note(gone, limits, vm)
	if n := other.Others(limits[0]); n != 0 {
		t.Errorf("%d MiB are promised to a process that has ended", n/mib)
	}
}

func TestFileSystem(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, ok, err := FileSystem(f, units.PageSize)
	if err != nil || ok && (l.Device == 0 || l.Max == 0 || l.Spare) {
		t.Errorf("%+v, %v, %v", l, ok, err)
	}
}

func TestParse(t *testing.T) {
	mem := Meminfo(
		[]byte("MemTotal:       24684092 kB\nHugePages_Total:       0\nMemAvailable:   1 " +
			"kB\nBad: 99999999999999999999 kB\n"))
	if want := map[string]uint64{"MemTotal": 24684092 << 10,
		"MemAvailable": 1024}; !reflect.DeepEqual(mem, want) {
		t.Errorf("%v", mem)
	}
	for at, want := range map[[2]string]string{
		{"/a/b", "/"}: "/a/b", {"/a/b", "/a"}: "/b", {"/a", "/a"}: "/", {"/ab", "/a"}: "",
		{"/../x", "/"}: "", {"/", "/"}: "/", {"x", "/"}: "",
		// From a namespace: the mount shows more than that, or as much, or less.
		{"/..", "/"}: "", {"/../../vms/a", "/../.."}: "/vms/a", {"/../..", "/../.."}: "/",
		{"/../../../a", "/../.."}: "", {"/a", "/.."}: "", {"/../a", "/../.."}: "",
		{"/../ab", "/../a"}: "",
	} {
		if got, ok := below(at[0], at[1]); ok != (want != "") || ok && got != want {
			t.Errorf("%v: %q, %v", at, got, ok)
		}
	}
}

// Whatever the kernel writes one day, or a container shows in its place, reading it ends, and sums
// do not run over.
func FuzzFiles(f *testing.F) {
	for _, list := range []map[string]string{version1, version2} {
		for name, text := range list {
			f.Add(name, text)
		}
	}
	f.Fuzz(func(t *testing.T, name, text string) {
		b := []byte(text)
		parseGroups(b)
		parseAddressSpace(b)
		for _, m := range parseMounts(b) {
			below(text, m.root)
		}
		for _, r := range []uint64{reclaimable(parseKeys(b)), Meminfo(b)["MemTotal"]} {
			l := Limit{Page: units.PageSize, Name: name, File: text, Max: r, Used: r / 2}
			memory := []Memory{{Page: units.PageSize, Size: r, Has: parsePage(text)}}
			if err := Check([]Limit{l}, memory, nil); err == nil && l.Needs(memory) > l.Free() {
				t.Errorf("%+v has room for %+v", l, memory)
			}
			Tight([]Limit{l}, memory)
		}
	})
}
