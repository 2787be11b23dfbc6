package inspect

import (
	"cmp"
	"math/bits"
	"slices"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// Memory sums up a survey of a guest's memory. Its JSON is documented in docs/inspect.md.
// Sizes are in pages of 4 KiB, times in seconds. Texts come from the guest: they may hold
// anything but, in JSON, invalid UTF-8.
type Memory struct {
	Source   string `json:"source"` // "vm" or "core"; the caller's
	Kernel   string `json:"kernel"` // the guest's release; the caller's
	PageSize int    `json:"page_size"`
	Pages    int    `json:"pages"` // known ones
	// Classes has all of them in their order, Kinds those that occur, largest first.
	Classes   []ClassPages `json:"classes"`
	Kinds     []KindPages  `json:"kinds"`
	Free      FreePages    `json:"free"`
	Processes []Process    `json:"processes"` // active ones first, then by pages
	// Fresh says that the counts of accessed pages tell something.
	Fresh bool     `json:"accessed_is_fresh"`
	Notes []string `json:"notes"` // reasons for distrust; the caller's
	Times Times    `json:"times"` // the caller's
}

// ClassPages is how many pages are of a class.
type ClassPages struct {
	Class pageclass.Class `json:"class"`
	Pages int             `json:"pages"`
}

// KindPages is how many pages are of a kind, and what else is known of how many of them.
type KindPages struct {
	Kind      pageclass.Kind          `json:"kind"`
	Pages     int                     `json:"pages"`
	Classes   map[pageclass.Class]int `json:"classes"` // those that occur
	Accessed  int                     `json:"accessed"`
	Active    int                     `json:"active"`
	Dirty     int                     `json:"dirty"`
	Exec      int                     `json:"exec"`
	Mapped    int                     `json:"mapped"`
	Skippable int                     `json:"skippable"`
}

// FreePages counts the pages of the class Free.
type FreePages struct {
	Pages     int `json:"pages"`
	Skippable int `json:"skippable"` // need not be moved
	PerCPU    int `json:"per_cpu"`   // on lists of CPUs
}

// Process is a process with the pages that it owns, as the survey tells: a page of several
// processes counts for one of them.
type Process struct {
	PID     int                     `json:"pid"`
	Name    string                  `json:"name"`
	Active  bool                    `json:"active"`
	OnCPU   bool                    `json:"on_cpu"`
	LastRun float64                 `json:"last_run_s"` // before the survey
	CPU     float64                 `json:"cpu_s"`
	Recent  *float64                `json:"recent_cpu_s"` // null if not known
	Pages   int                     `json:"pages"`
	Classes map[pageclass.Class]int `json:"classes"` // those that occur
}

// Times is how long a survey took.
type Times struct {
	Attach float64 `json:"attach_s"` // while the VM ran
	Frozen float64 `json:"frozen_s"` // the VM stood still for the survey's sake; 0 if it did anyway
	Stages []Stage `json:"stages"`   // of the survey
}

// Stage is a part of a survey.
type Stage struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"s"`
}

// NewMemory sums up a survey. What it does not tell is left for the caller to fill in.
func NewMemory(s *pageclass.Survey) Memory {
	m := Memory{PageSize: units.PageSize, Fresh: s.Fresh, Kinds: []KindPages{},
		Processes: make([]Process, len(s.Processes)),
		Notes:     []string{}, Times: Times{Stages: []Stage{}}}
	for i, p := range s.Processes {
		q := Process{
			PID: p.PID, Name: p.Name, Active: p.Active, OnCPU: p.OnCPU,
			LastRun: p.LastRun.Seconds(), CPU: p.CPUTime.Seconds(),
		}
		if p.Recent >= 0 {
			recent := p.Recent.Seconds()
			q.Recent = &recent
		}
		m.Processes[i] = q
	}
	var kinds [pageclass.Kinds]struct {
		classes [pageclass.Classes]int
		flags   [8]int
	}
	owned := make([][pageclass.Classes]int, len(s.Processes))
	for _, p := range s.Pages {
		if p.Kind == pageclass.None || p.Kind >= pageclass.Kinds || p.Class >= pageclass.Classes {
			continue
		}
		k := &kinds[p.Kind]
		k.classes[p.Class]++
		for f := p.Flags; f != 0; f &= f - 1 {
			k.flags[bits.TrailingZeros8(uint8(f))]++
		}
		if p.Owner != 0 && int(p.Owner) <= len(owned) {
			owned[p.Owner-1][p.Class]++
		}
		if p.Class == pageclass.Free && p.Flags&pageclass.Skippable != 0 {
			m.Free.Skippable++
		}
	}
	var classes [pageclass.Classes]int
	for kind, k := range kinds {
		sum, by := occurring(&k.classes)
		if sum == 0 {
			continue
		}
		for c, n := range by {
			classes[c] += n
		}
		flag := func(f pageclass.Flags) int { return k.flags[bits.TrailingZeros8(uint8(f))] }
		m.Pages += sum
		m.Kinds = append(m.Kinds, KindPages{
			Kind: pageclass.Kind(kind), Pages: sum, Classes: by,
			Accessed: flag(pageclass.Accessed), Active: flag(pageclass.Active),
			Dirty: flag(pageclass.Dirty),
			Exec:  flag(pageclass.Exec), Mapped: flag(pageclass.Mapped),
			Skippable: flag(pageclass.Skippable),
		})
	}
	slices.SortStableFunc(m.Kinds,
		func(a, b KindPages) int { return cmp.Compare(b.Pages, a.Pages) })
	for c, n := range classes {
		m.Classes = append(m.Classes, ClassPages{pageclass.Class(c), n})
	}
	m.Free.Pages = classes[pageclass.Free]
	m.Free.PerCPU = kinds[pageclass.FreePerCPU].classes[pageclass.Free]
	for i := range m.Processes {
		m.Processes[i].Pages, m.Processes[i].Classes = occurring(&owned[i])
	}
	slices.SortStableFunc(m.Processes, func(a, b Process) int {
		if a.Active != b.Active {
			if a.Active {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(b.Pages, a.Pages), cmp.Compare(a.LastRun, b.LastRun),
			cmp.Compare(a.PID, b.PID))
	})
	return m
}

// occurring returns the classes that have pages, and their sum.
func occurring(counts *[pageclass.Classes]int) (sum int, by map[pageclass.Class]int) {
	by = map[pageclass.Class]int{}
	for c, n := range counts {
		if n > 0 {
			by[pageclass.Class(c)] = n
			sum += n
		}
	}
	return sum, by
}
