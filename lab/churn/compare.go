package churn

import (
	"context"
	"fmt"

	"vacate/internal/guest/linux"
	"vacate/internal/guest/pageclass"
)

// A Said is what kpageflags say a page is.
type Said int

// What can be said. Nothing is said of a page without flags: it may lie in a list of a CPU's
// free pages, or be one of the kernel's.
const (
	SaidNone Said = iota // no page
	SaidFree
	SaidOffline
	SaidPoisoned
	SaidSlab
	SaidPageTable
	SaidHugetlb
	SaidZero
	SaidAnon
	SaidShmem
	SaidFile
	SaidReserved
	SaidMapped // by a process, and nothing else: memory of a driver
	SaidNothing
	Saids
)

var saidNames = [Saids]string{"no page", "free", "offline", "poisoned", "slab", "page table",
	"hugetlb", "zero page", "anonymous", "shared memory", "file", "reserved", "mapped", "(nothing)"}

func (s Said) String() string { return saidNames[s] }

func said(f uint64) Said {
	switch {
	case f&kpfNoPage != 0:
		return SaidNone
	case f&kpfPoison != 0:
		return SaidPoisoned
	case f&kpfBuddy != 0:
		return SaidFree
	case f&kpfOffline != 0:
		return SaidOffline
	case f&kpfSlab != 0:
		return SaidSlab
	case f&kpfPageTable != 0:
		return SaidPageTable
	case f&kpfHuge != 0:
		return SaidHugetlb
	case f&kpfZero != 0:
		return SaidZero
	case f&kpfAnon != 0:
		return SaidAnon
	case f&kpfReserved != 0:
		return SaidReserved
	case f&kpfSwapBacked != 0:
		return SaidShmem
	case f&(kpfLRU|kpfUnevictable) != 0:
		return SaidFile
	case f&kpfMmap != 0:
		return SaidMapped
	}
	return SaidNothing
}

// agree are the kinds that go with what is said. Of what is not said nothing can agree.
var agree = [Saids][]pageclass.Kind{
	SaidNone:      {pageclass.None},
	SaidFree:      {pageclass.FreeBuddy},
	SaidOffline:   {pageclass.Offline},
	SaidPoisoned:  {pageclass.Poisoned},
	SaidSlab:      {pageclass.Slab},
	SaidPageTable: {pageclass.UserPageTable},
	SaidHugetlb:   {pageclass.Hugetlb},
	// where it is, a kernel without kallsyms does not tell
	SaidZero:  {pageclass.ZeroPage, pageclass.Reserved},
	SaidAnon:  {pageclass.Anon},
	SaidShmem: {pageclass.Shmem},
	SaidFile:  {pageclass.File},
	SaidReserved: {pageclass.Reserved, pageclass.KernelText, pageclass.KernelImage,
		pageclass.PageDescriptors, pageclass.PerCPU, pageclass.ZeroPage},
	SaidMapped: {pageclass.KernelOther, pageclass.File},
	// Of page tables only the lower two levels are marked as such before 6.15 or so.
	SaidNothing: {pageclass.FreePerCPU, pageclass.UserPageTable, pageclass.KernelOther,
		pageclass.KernelStack, pageclass.PerCPU, pageclass.Unreferenced,
		pageclass.PageDescriptors, pageclass.KernelText, pageclass.KernelImage, pageclass.Reserved},
}

// Comparison is what snapshots have shown.
type Comparison struct {
	Snapshots int
	Pages     uint64 // compared, over all snapshots
	Moving    uint64 // left out, as they changed between before and after
	Matrix    [Saids][pageclass.Kinds]uint64

	Free, Found uint64 // pages that kpageflags call free; of them skippable
	InUse       uint64 // pages that kpageflags say are in use
	Wrong       []string
	MovingInUse uint64 // called skippable, and seen in use either before or after
	// greatest difference between the allocator's count and the survey's, in pages
	CounterOff    int64
	MappedPages   uint64 // that pagemaps tell, once per process
	MappedAgree   uint64 // of them those that the survey calls mapped
	ActiveSaid    uint64 // file pages on the active list
	ActiveAgree   uint64
	InactiveSaid  uint64
	InactiveAgree uint64
}

// Agreement is the share of pages whose kind is as said, of those about which something is said.
func (c *Comparison) Agreement() float64 {
	all, same := uint64(0), uint64(0)
	for said, row := range c.Matrix {
		if said == int(SaidNone) {
			continue
		}
		for kind, n := range row {
			all += n
			if agrees(Said(said), pageclass.Kind(kind)) {
				same += n
			}
		}
	}
	return float64(same) / float64(max(1, all))
}

func agrees(s Said, k pageclass.Kind) bool {
	for _, a := range agree[s] {
		if a == k {
			return true
		}
	}
	return false
}

// Compare takes a snapshot and a survey at the same moment. The guest must be attached.
func Compare(ctx context.Context, g *Guest, c *Comparison) error {
	var s *linux.Result
	snap, err := g.Snapshot(ctx, func() (err error) {
		s, err = g.Survey(ctx)
		return err
	})
	if err != nil {
		return err
	}
	c.add(snap, &s.Survey)
	return nil
}

func (c *Comparison) add(snap *Snapshot, s *pageclass.Survey) {
	c.Snapshots++
	buddy := int64(0)
	for pfn := range max(len(s.Pages), len(snap.flags[0])) {
		var p pageclass.Page
		if pfn < len(s.Pages) {
			p = s.Pages[pfn]
		}
		skippable := p.Flags&pageclass.Skippable != 0
		if p.Kind == pageclass.FreeBuddy {
			buddy++
		}
		before, after := snap.before(pfn), snap.after(pfn)
		b := said(before)
		if b != said(after) {
			c.Moving++
			if skippable && (inUse(before) || inUse(after)) {
				c.MovingInUse++
			}
			continue
		}
		c.Pages++
		c.Matrix[b][p.Kind]++
		if b == SaidFree {
			c.Free++
			if skippable {
				c.Found++
			}
		}
		if inUse(before) || b == SaidReserved {
			c.InUse++
			if skippable {
				c.Wrong = append(c.Wrong,
					fmt.Sprintf("snapshot %d: page %#x is %v (flags %#x), but was called "+
						"skippable (%v)", c.Snapshots, pfn, b, before, p.Kind))
			}
		}
		if b == SaidFile && p.Kind == pageclass.File {
			if before&kpfActive != 0 {
				c.ActiveSaid++
				if p.Flags&pageclass.Active != 0 {
					c.ActiveAgree++
				}
			} else {
				c.InactiveSaid++
				if p.Flags&pageclass.Active == 0 {
					c.InactiveAgree++
				}
			}
		}
	}
	if off := buddy - int64(snap.Free); abs(off) > abs(c.CounterOff) {
		c.CounterOff = off
	}
	for _, m := range snap.Mapped {
		for _, pfn := range m.Frames {
			c.MappedPages++
			if int(pfn) < len(s.Pages) && s.Pages[pfn].Flags&pageclass.Mapped != 0 {
				c.MappedAgree++
			}
		}
	}
}

func abs(n int64) int64 { return max(n, -n) }
