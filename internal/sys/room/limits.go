package room

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"vacate/internal/sys/units"

	"golang.org/x/sys/unix"
)

// files are the roots of what is read; others in tests. Directories of control groups come from
// mountinfo, and are below root.
type files struct{ root string }

var system = files{""}

// maxFile bounds what is read of a file.
const maxFile = 1 << 20

// read returns a file's content, or nothing if there is no such file.
func (f files) read(name string) ([]byte, error) {
	file, err := os.Open(f.root + name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxFile))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ESRCH) {
		// such a file, and no such account
		return nil, nil
	}
	return b, err
}

// Limits returns what bounds the memory of a process on this host: that which is available, its
// control groups and those above, huge pages, and how much it may map. It takes some 0.5 ms. What
// can be found out is returned with an error, too.
func Limits(pid int) ([]Limit, error) { return system.limits(pid) }

func (f files) limits(pid int) (limits []Limit, err error) {
	var errs []error
	b, err := f.read("/proc/meminfo")
	mem := Meminfo(b)
	if mem["MemAvailable"] > 0 {
		limits = append(limits,
			Limit{Page: units.PageSize, Name: "this host", Max: mem["MemTotal"],
				Used: mem["MemTotal"] - min(mem["MemTotal"], mem["MemAvailable"]),
				Swap: mem["SwapFree"]})
	}
	errs = append(errs, err)
	limits = append(limits, f.pools()...)
	groups, err := f.groups(pid)
	errs = append(errs, err)
	for i, g := range groups {
		limits = append(limits, f.group(g, f.swap(groups[i:], mem["SwapFree"]))...)
	}
	l, ok, err := f.mayMap(pid)
	if ok {
		limits = append(limits, l)
	}
	return limits, errors.Join(append(errs, err)...)
}

// pools are the host's huge pages.
func (f files) pools() (limits []Limit) {
	const dir = "/sys/kernel/mm/hugepages"
	names, _ := filepath.Glob(f.root + dir + "/hugepages-*kB")
	for _, name := range names {
		name = dir + "/" + filepath.Base(name)
		var kib uint64
		if n, _ := fmt.Sscanf(path.Base(name), "hugepages-%dkB", &kib); n != 1 || kib == 0 ||
			kib > 1<<40 {
			continue
		}
		page := kib << 10
		count := func(file string) uint64 {
			b, _ := f.read(name + "/" + file)
			n, _ := parseNumber(b)
			return min(n, endless/4/page)
		}
		all, free, set := count("nr_hugepages"), count("free_hugepages"), count("resv_hugepages")
		more := count("nr_overcommit_hugepages")
		more -= min(more, count("surplus_hugepages"))
		limits = append(limits, Limit{
			Page: page, Name: "this host's pool of huge pages", File: name + "/nr_hugepages",
			Spare: true,
			Max:   (all + more) * page, Used: (all - min(all, free) + set) * page,
		})
	}
	slices.SortFunc(limits, func(a, b Limit) int { return strings.Compare(a.File, b.File) })
	return limits
}

// controlGroup is a directory of one of them.
type controlGroup struct {
	dir        string
	controller string // memory or hugetlb: of version 1; "" is version 2
}

// groups returns the control groups that bound the memory of a process, up to the root of what is
// mounted.
func (f files) groups(pid int) (all []controlGroup, err error) {
	b, err := f.read(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, err
	}
	of := parseGroups(b)
	if b, err = f.read("/proc/self/mountinfo"); err != nil {
		return nil, err
	}
	for _, m := range parseMounts(b) {
		controllers := []string{""}
		if m.kind == "cgroup" {
			controllers = []string{"memory", "hugetlb"}
		} else if m.kind != "cgroup2" {
			continue
		}
		for _, c := range controllers {
			at, ok := of[c]
			if !ok || c != "" && !slices.Contains(m.options, c) {
				continue
			}
			at, ok = below(at, m.root)
			if !ok {
				continue // not seen from here
			}
			for ; ; at = path.Dir(at) {
				g := controlGroup{path.Join(m.point, at), c}
				if !slices.Contains(all, g) {
					all = append(all, g)
				}
				if at == "/" || at == "." {
					break
				}
			}
		}
	}
	return all, nil
}

// below returns a control group's path as seen from another one above it. Both are told from the
// control group namespace of this process: what is not below its root begins with as many "/.." as
// it takes.
func below(at, root string) (string, bool) {
	rest, ok := strings.CutPrefix(at+"/", strings.TrimSuffix(root, "/")+"/")
	if !ok || strings.HasPrefix(rest, "../") {
		return "", false
	}
	return path.Clean("/" + rest), true
}

// swap is how much the first of some control groups may still swap out, on a host with so much free
// swap. The groups above it, which follow in the list, bound it, too. Version 1 has no limit on
// swap alone.
func (f files) swap(groups []controlGroup, free uint64) uint64 {
	for _, g := range groups {
		if g.controller != "" || groups[0].controller != "" {
			break
		}
		if most, ok := f.number(g, "memory.swap.max"); ok {
			used, _ := f.number(g, "memory.swap.current")
			free = min(free, most-min(most, used))
		}
	}
	return free
}

// number reads a file of a control group with a number, and false if that is none: "max".
func (f files) number(g controlGroup, file string) (uint64, bool) {
	b, err := f.read(g.dir + "/" + file)
	n, ok := parseNumber(b)
	return n, err == nil && ok && n < endless
}

// group reads the limits of a control group, which may still swap out so much.
func (f files) group(g controlGroup, swap uint64) (limits []Limit) {
	add := func(limit, usage string, l Limit, back uint64) {
		most, ok := f.number(g, limit)
		if !ok {
			return
		}
		used, _ := f.number(g, usage)
		l.Name, l.File, l.Max, l.Used = "the control group "+g.dir, g.dir+"/"+
			limit, most, used-min(used, back)
		limits = append(limits, l)
	}
	b, _ := f.read(g.dir + "/memory.stat")
	back := reclaimable(parseKeys(b))
	switch g.controller {
	case "memory":
		add("memory.limit_in_bytes", "memory.usage_in_bytes",
			Limit{Page: units.PageSize, Swap: swap}, back)
		add("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes",
			Limit{Page: units.PageSize}, back)
	case "":
		add("memory.max", "memory.current", Limit{Page: units.PageSize, Swap: swap}, back)
		add("memory.high", "memory.current", Limit{Page: units.PageSize}, back)
	}
	limit, usage := "max", "current"
	if g.controller != "" {
		limit, usage = "limit_in_bytes", "usage_in_bytes"
	}
	names, _ := filepath.Glob(f.root + g.dir + "/hugetlb.*." + limit)
	for _, name := range names {
		size, ok := strings.CutSuffix(strings.TrimPrefix(filepath.Base(name), "hugetlb."),
			"."+limit)
		if page := parsePage(size); ok && page > 0 { // not those of "rsvd"
			add("hugetlb."+size+"."+limit, "hugetlb."+size+"."+usage, Limit{Page: page}, 0)
			add("hugetlb."+size+".rsvd."+limit, "hugetlb."+size+".rsvd."+usage,
				Limit{Page: page, Spare: true}, 0)
		}
	}
	return limits
}

// reclaimable is what a control group uses that the kernel takes back when it has to. Version 1
// tells of the groups below, too, under names of their own.
func reclaimable(stat map[string]uint64) (n uint64) {
	for _, name := range []string{"inactive_file", "active_file", "slab_reclaimable"} {
		if all, ok := stat["total_"+name]; ok {
			n = plus(n, all)
		} else {
			n = plus(n, stat[name])
		}
	}
	return n
}

// mayMap is the limit on what a process maps, if it has one.
func (f files) mayMap(pid int) (Limit, bool, error) {
	b, err := f.read(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		return Limit{}, false, err
	}
	most, ok := parseAddressSpace(b)
	if !ok {
		return Limit{}, false, nil
	}
	b, err = f.read(fmt.Sprintf("/proc/%d/status", pid))
	return Limit{Page: addresses, Name: fmt.Sprintf("the address space of process %d", pid),
		File: "RLIMIT_AS", Max: most, Used: Meminfo(b)["VmSize"]}, err == nil, err
}

// ToMap is what a QEMU maps while it takes a VM: stacks and heaps of threads.
var ToMap = Memory{Page: addresses, Size: 64 << 20}

// FileSystem returns the limit of the file system of an open file, and false if it has none. It is
// one on pages of so many bytes.
func FileSystem(f *os.File, page uint64) (Limit, bool, error) {
	var info unix.Statfs_t
	var st unix.Stat_t
	err := unix.Fstatfs(int(f.Fd()), &info)
	if err == nil {
		err = unix.Fstat(int(f.Fd()), &st)
	}
	if err != nil {
		return Limit{}, false, fmt.Errorf("ask for the room in a file system: %w", err)
	}
	if info.Blocks == 0 || info.Bsize <= 0 { // memfd, or without a limit
		return Limit{}, false, nil
	}
	// That of huge pages takes what is set aside off what it has.
	l := Limit{Page: page, Name: "the file system of its memory", Device: st.Dev,
		Spare: page != units.PageSize, Max: info.Blocks * uint64(info.Bsize),
		Used: (info.Blocks - min(info.Blocks, info.Bavail)) * uint64(info.Bsize)}
	b, err := system.read("/proc/self/mountinfo")
	for _, m := range parseMounts(b) {
		if m.device == st.Dev {
			l.Name, l.File = "the file system at "+m.point, m.point
		}
	}
	return l, true, err
}

// Kills counts how many processes the kernel's OOM killer has ended, in the control groups of a
// process and on the host.
type Kills struct {
	files
	groups []groupKills
	host   uint64
}

type groupKills struct {
	controlGroup
	count uint64
}

// ReadKills counts for a process that is alive.
func ReadKills(pid int) (Kills, error) { return system.kills(pid) }

func (f files) kills(pid int) (Kills, error) {
	groups, err := f.groups(pid)
	k := Kills{files: f, host: f.hostKills()}
	for _, g := range groups {
		if g.controller != "hugetlb" {
			k.groups = append(k.groups, groupKills{g, f.groupKills(g)})
		}
	}
	return k, err
}

func (f files) hostKills() uint64 {
	b, _ := f.read("/proc/vmstat")
	return parseKeys(b)["oom_kill"]
}

func (f files) groupKills(g controlGroup) uint64 {
	name := "/memory.events"
	if g.controller != "" {
		name = "/memory.oom_control"
	}
	b, _ := f.read(g.dir + name)
	return parseKeys(b)["oom_kill"]
}

// Since says whom the OOM killer has ended since; "" if nobody.
func (k Kills) Since() string {
	for _, g := range k.groups {
		if k.groupKills(g.controlGroup) <= g.count {
			continue
		}
		text := "the kernel's OOM killer has ended a process of the control group " + g.dir
		for _, l := range k.group(g.controlGroup, 0) {
			if l.Page == units.PageSize {
				return text + ", which ran out of memory: " + l.account()
			}
		}
		return text
	}
	if k.hostKills() > k.host {
		return "the kernel's OOM killer has ended a process of this host, which ran out of memory"
	}
	return ""
}
