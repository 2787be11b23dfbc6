// Package pageclass names what a page of a Linux guest is used for. Its kind is as fine as the
// guest's own page descriptors. Its class is as coarse as in the paper on enlightened post-copy
// (Abe et al., "Urgent Virtual Machine Eviction with Enlightened Post-Copy", VEE 2016, section 4).
//
// Readers of a guest's pages, from outside or as an agent inside, describe them in these terms;
// code that orders, counts or draws pages needs no others.
package pageclass

import (
	"fmt"
	"time"
)

// Class is a class of the paper, or one of the two that stand beside its order.
type Class uint8

// The classes. Those from KernelCode to Other are the paper's nine, highest priority first;
// a page in several takes the first.
const (
	Unknown      Class = iota // nothing is known of the page; it must be moved
	KernelCode                // executable code of the kernel
	Kernel                    // memory that the kernel allocated
	MMIO                      // memory that devices or firmware share with the kernel
	PageTable                 // page tables of active processes
	UserCode                  // code of active processes
	UserData                  // data of active processes
	FileActive                // page cache on the active list
	FileInactive              // page cache on the inactive list
	Other                     // inactive processes, everything else
	// the allocator holds it free; whether it may be left out is a matter of its own
	Free
	Classes // the number of classes
)

var classNames = [Classes]string{
	"unknown", "kernel code", "kernel", "mmio", "page table", "user code", "user data",
	"file active", "file inactive", "other", "free",
}

func (c Class) String() string {
	if c < Classes {
		return classNames[c]
	}
	return fmt.Sprintf("class %d", c)
}

// MarshalText is String, so that classes are keys and values in JSON.
func (c Class) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText takes what String gives for one of the classes.
func (c *Class) UnmarshalText(text []byte) error {
	for i, name := range classNames {
		if name == string(text) {
			*c = Class(i)
			return nil
		}
	}
	return fmt.Errorf("no class of pages is called %q", text)
}

// Kind is what a page is, as finely as it can be told.
type Kind uint8

// The kinds.
const (
	None            Kind = iota // no page of memory, or nothing is known of it
	FreeBuddy                   // in a block of the buddy allocator
	FreePerCPU                  // on a CPU's list of free pages
	Offline                     // ballooned, unplugged or not yet online: the guest does not use it
	Poisoned                    // the guest found its memory broken
	KernelText                  // the kernel image's code
	KernelImage                 // the rest of the image: data, read-only data, bss
	KernelStack                 // the stack of a task
	PerCPU                      // the kernel's per-CPU areas
	UserPageTable               // page tables
	Slab                        // small objects of the kernel
	PageDescriptors             // the memory map itself (vmemmap)
	// no reference and no flag, yet not free: mostly tails of blocks of the kernel
	Unreferenced
	KernelOther // other allocations of the kernel
	Reserved    // set aside at boot: firmware, ACPI, holes
	ZeroPage    // the page of zeroes that all share, small or huge
	Anon        // anonymous memory of processes, huge or not
	Shmem       // shared memory and tmpfs
	File        // page cache
	Hugetlb     // pages of hugetlbfs, used or in its pool
	Kinds       // the number of kinds
)

var kindNames = [Kinds]string{
	"none", "free", "free per cpu", "offline", "poisoned", "kernel text", "kernel image",
	"kernel stack",
	"per cpu", "page table", "slab", "page descriptors", "unreferenced", "kernel other", "reserved",
	"zero page", "anonymous", "shared memory", "file", "hugetlb",
}

func (k Kind) String() string {
	if k < Kinds {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", k)
}

// MarshalText is String.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText takes what String gives for one of the kinds.
func (k *Kind) UnmarshalText(text []byte) error {
	for i, name := range kindNames {
		if name == string(text) {
			*k = Kind(i)
			return nil
		}
	}
	return fmt.Errorf("no kind of page is called %q", text)
}

// Flags are what else is known of a page.
type Flags uint8

// The flags.
const (
	// a page table of a process says that it was used since that was last cleared
	Accessed Flags = 1 << iota
	// on an active list, or its like (workingset, referenced often) under multi-generational LRU
	Active
	Dirty     // file pages that wait to be written back
	Exec      // mapped executable
	Mapped    // some process maps it
	Skippable // free beyond doubt: need not be moved, as long as it reads as zero
)

// A Page is what is known of one page of 4 KiB.
type Page struct {
	Kind  Kind
	Class Class
	Flags Flags
	// Owner is the process that owns or maps the page: 1 + its index in a list that goes
	// with the pages; 0 for none. Of several it is the one that matters most.
	Owner uint16
}

// A Process is a process of the guest. Texts come from the guest and may hold anything.
type Process struct {
	PID     int
	Name    string
	Active  bool          // ran within the time that counts as active
	OnCPU   bool          // a CPU was running it
	LastRun time.Duration // before the survey
	CPUTime time.Duration // in all, of all of its threads
	// Recent is the CPU time that it used of late, in about the last 100 ms; negative if that is
	// not known.
	Recent time.Duration
}

// A Survey is what is known of all pages of a guest. Its maker has bounded it: it is no
// larger than the guest's memory makes necessary.
type Survey struct {
	// Pages is indexed by guest page frame number (guest-physical address / 4096). Numbers
	// behind its end, and pages of kind None, are not known.
	Pages     []Page
	Processes []Process
	// Sequence lists the frames that processes map, process by process in the order of
	// their virtual addresses, huge pages as all of their frames. A frame is in it once.
	Sequence []uint32
	// Fresh says that the flag Accessed tells something: it is set on few enough of the
	// mapped pages, because something clears it now and then.
	Fresh bool
}

// Counts returns how many pages are of each class; those of kind None are left out.
func (s *Survey) Counts() (counts [Classes]int) {
	for _, p := range s.Pages {
		if p.Kind != None {
			counts[p.Class]++
		}
	}
	return counts
}
