// Package room reports whether a host has room for the memory of a VM that is about to come, and
// why not.
//
//	/proc/meminfo, sysfs ──────────┐
//	/proc/PID/cgroup ─► its control ├─► Limits ──┐
//	groups and all above them       │            ├─► Check ─► *ShortError: limit, amount, remedy
//	file systems of memory files ──┘  Memory ────┘
//
// A limit is on one kind of memory: pages of the usual size, or huge pages of one size. What is
// used of it counts without what the kernel takes back when it has to (page cache, slab). Swap is
// no room: a VM whose pages go there while they arrive is not usable. A VM needs room for all of
// its memory that it does not have yet, as a guest may come to use all of it. Memory that is
// preallocated or left in a file is not counted again.
//
// Files and their meaning: proc(5), and cgroup-v1/memory.rst, cgroup-v1/hugetlb.rst, cgroup-v2.rst
// and mm/hugetlbpage.rst of Linux's admin guide.
package room

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"vacate/internal/sys/units"
)

const (
	// addresses stands for a size of pages where it is not memory that is bounded, but how much a
	// process maps.
	addresses = 1
)

// Limit is what bounds memory of one kind on a host. Sizes are in bytes.
type Limit struct {
	Page uint64 `json:"page"` // size of the pages that it counts
	// of what it is, which may begin a sentence: "the control group /sys/fs/cgroup/a.slice"
	Name string `json:"name"`
	// in which it is written down; "" if there is none that could be changed
	File string `json:"file"`
	Max  uint64 `json:"max"`
	Used uint64 `json:"used"` // by anybody, and the kernel cannot take it back
	// Swap is what may go to swap in place of memory that is used.
	Swap uint64 `json:"swap,omitempty"`
	// Spare tells that memory which was set aside before counts as used.
	Spare bool `json:"spare,omitempty"`
	// Device is the file system's, by number, where only memory in its files counts; else 0.
	Device uint64 `json:"device,omitempty"`
}

// Free is what can still be had.
func (l Limit) Free() uint64 { return l.Max - min(l.Max, l.Used) }

// Memory is a piece of a VM's memory. Sizes are in bytes.
type Memory struct {
	Page   uint64 // size of its pages
	Size   uint64
	Has    uint64 // of Size, that is there already
	Spare  bool   // huge pages that were set aside for it when it was mapped
	Device uint64 // of the file system of its file, if that has a limit; else 0
}

// lacks is what is still to come.
func (m Memory) lacks() uint64 { return m.Size - min(m.Size, m.Has) }

// counts reports whether a limit bounds the memory.
func (l Limit) counts(m Memory) bool {
	return l.Page == m.Page && (l.Device == 0 || l.Device == m.Device) && (!l.Spare || !m.Spare)
}

// What QEMU needs beside the guest's memory to take a VM: page tables, with 8 bytes for each page,
// and what QEMU allocates while it loads devices and runs code for the first time.
const (
	perEntry = units.PageSize / 8
	own      = 64 << 20
)

// reserve is what must be left of memory that is not placed page by page, lest the kernel ends
// processes to have some.
const reserve = own / 4

// Needs returns what memory needs of a limit.
func (l Limit) Needs(memory []Memory) (need uint64) {
	for _, m := range memory {
		if l.counts(m) {
			need = plus(need, m.lacks())
		}
	}
	if need > 0 && l.Page == units.PageSize && l.Device == 0 {
		need = plus(need, need/perEntry+own)
	}
	return need
}

func plus(a, b uint64) uint64 {
	if a+b < a {
		return ^uint64(0)
	}
	return a + b
}

// ShortError says which limit has no room for a VM.
type ShortError struct {
	Limit  Limit
	Need   uint64 // of the VM
	Others uint64 // of VMs that are coming, too
}

// Check returns a *ShortError for the tightest limit that memory does not fit into. others is what
// VMs that are coming will still take of each limit; nil means nothing.
func Check(limits []Limit, memory []Memory, others func(Limit) uint64) error {
	var worst *ShortError
	missing := uint64(0)
	for _, l := range limits {
		s := &ShortError{Limit: l, Need: l.Needs(memory)}
		if s.Need == 0 {
			continue
		}
		if others != nil {
			s.Others = others(l)
		}
		if all := plus(s.Need, s.Others); all > l.Free() && all-l.Free() > missing {
			worst, missing = s, all-l.Free()
		}
	}
	if worst == nil {
		return nil
	}
	return worst
}

func (e *ShortError) Error() string { return e.Problem() + ". " + e.Remedy() }

// Problem says what there is no room for.
func (e *ShortError) Problem() string {
	l := e.Limit
	promised := ""
	if e.Others > 0 {
		promised = fmt.Sprintf("; VMs that are coming will take %s of that", units.Fine(e.Others))
	}
	return fmt.Sprintf("the VM needs %s more, and %s has room for %s only%s: %s",
		units.Fine(e.Need), l.Name, units.Fine(l.Free()), promised, l.account())
}

// Remedy says what to type.
func (e *ShortError) Remedy() string { return e.Limit.remedy(plus(e.Need, e.Others)) }

// account says how a limit stands.
func (l Limit) account() string {
	switch {
	case l.File == "" || l.Device != 0:
		return fmt.Sprintf("it has %s, and %s of it are in use", units.Fine(l.Max),
			units.Fine(l.Used))
	case l.Page > units.PageSize:
		return fmt.Sprintf("its %s is worth %d pages of %s, and %d of them are in use or set aside",
			path.Base(l.File), l.Max/l.Page, units.Size(l.Page), l.Used/l.Page)
	}
	return fmt.Sprintf("its %s is %s, and %s of it are in use", path.Base(l.File),
		units.Fine(l.Max), units.Fine(l.Used))
}

// remedy says what to type where so many bytes are needed.
func (l Limit) remedy(need uint64) string {
	const other = ", or choose another host"
	want := plus(l.Used, need)
	group := path.Base(path.Dir(l.File))
	unit := slices.ContainsFunc([]string{".service", ".scope", ".slice"},
		func(s string) bool { return strings.HasSuffix(group, s) })
	property := map[string]string{"memory.max": "MemoryMax", "memory.high": "MemoryHigh",
		"memory.limit_in_bytes": "MemoryMax"}[path.Base(l.File)]
	switch {
	case l.File == "":
		return "Make room there first: move a VM away, for instance with `vacate evict NAME " +
			"--to HOST`" + other
	case unit && property != "":
		return fmt.Sprintf("Raise it with `systemctl set-property --runtime %s %s=%d`%s", group,
			property, want, other)
	case path.Base(l.File) == "nr_hugepages":
		return fmt.Sprintf("Have more with `echo %d >%s`%s", (want+l.Page-1)/l.Page, l.File, other)
	case strings.HasPrefix(l.File, "RLIMIT_"):
		return "Start that QEMU without that limit (`ulimit -v unlimited`)"
	case l.Device != 0:
		return fmt.Sprintf("Make room there first, for instance with `mount -o remount,size=%dM "+
			"%s`%s", want>>20+1, l.File, other)
	}
	return fmt.Sprintf("Raise it with `echo %d >%s`%s", want, l.File, other)
}

// deadly reports whether the kernel ends processes where a limit is reached, in place of refusing
// memory.
func (l Limit) deadly() bool {
	return l.Page == units.PageSize && l.Device == 0 && path.Base(l.File) != "memory.high"
}

// Tight says which of the limits that bound memory has nothing left; "" if none.
func Tight(limits []Limit, memory []Memory) string {
	for _, l := range limits {
		least := l.Page
		if l.deadly() {
			least = reserve
		}
		if l.Page != addresses && l.Free() < least && slices.ContainsFunc(memory, l.counts) {
			return l.full()
		}
	}
	return ""
}

func (l Limit) full() string { return fmt.Sprintf("%s has no room: %s", l.Name, l.account()) }

// Deadly returns how much may be had, swap included, until the kernel ends processes for want of
// memory, and which limit is to blame if that is nothing.
func Deadly(limits []Limit) (left uint64, why string) {
	left = ^uint64(0)
	for _, l := range limits {
		if !l.deadly() {
			continue
		}
		free := plus(l.Free(), l.Swap)
		if free <= reserve {
			return 0, l.full()
		}
		left = min(left, free-reserve)
	}
	return left, ""
}
