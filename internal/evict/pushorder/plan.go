package pushorder

import (
	"cmp"
	"iter"
	"math/rand/v2"
	"slices"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// Frames maps some of the guest's page frames to pages of a block. The frames from First on
// (counted in 4 KiB of guest-physical address) fill the pages of Run, in order. Each page has as
// many frames as fit in its block's page size.
type Frames struct {
	First uint64
	Run   pageset.Run
}

// Plan is runs of pages, in the order in which they are pushed. In a guest whose memory is in small
// pieces there are nearly as many runs as pages, so a run takes 8 bytes.
type Plan []planned

// planned is a run: its block, its first page, and the number of its pages, as bits.
type planned uint64

const (
	firstBits, countBits = 34, 18
	maxBlock             = 1<<(64-firstBits-countBits) - 1
	maxFirst             = 1<<firstBits - 1
	maxCount             = 1<<countBits - 1
)

// pack packs a run. It reports whether it fits. Runs that do not fit are left to the end of the
// push: there are none in less than 64 TiB.
func pack(r pageset.Run) (p planned, fits bool) {
	if r.Block < 0 || r.Block > maxBlock || r.First > maxFirst || r.Count < 0 ||
		r.Count > maxCount {
		return 0, false
	}
	return planned(uint64(r.Block)<<(firstBits+countBits) | uint64(r.First)<<countBits |
		uint64(r.Count)), true
}

func (p planned) run() pageset.Run {
	return pageset.Run{Block: int(p >> (firstBits + countBits)),
		First: pageset.Page(p >> countBits & maxFirst), Count: int(p & maxCount)}
}

// pieces calls found with a run, in pieces that fit.
func pieces(r pageset.Run, found func(planned)) {
	for r.Count > 0 {
		piece := r
		piece.Count = min(r.Count, maxCount)
		if p, fits := pack(piece); fits {
			found(p)
		}
		r.First, r.Count = piece.End(), r.Count-piece.Count
	}
}

// PlanOf returns the plan that follows the given runs.
func PlanOf(runs []pageset.Run) Plan {
	p := make(Plan, 0, len(runs))
	for _, r := range runs {
		pieces(r, func(x planned) { p = append(p, x) })
	}
	return p
}

// NewPlan returns the pages in the order of a policy, behind those that come first. If the policy
// needs to know the pages, s describes them, and frames says where they are; unknown pages come
// last. Otherwise s may be nil.
func NewPlan(p Policy, blocks []Block, s *pageclass.Survey, frames []Frames,
	first ...pageset.Run) Plan {
	head := PlanOf(first)
	switch {
	case p.Base == Reverse:
		return append(head, reverse(blocks)...)
	case p.Base == Random:
		return append(head, shuffled(blocks)...)
	case !p.Knows() || s == nil:
		return head
	}
	return byRank(newRanking(p.Base, s), blocks, s.Pages, frames, head)
}

func reverse(blocks []Block) Plan {
	var runs Plan
	for i := len(blocks) - 1; i >= 0; i-- {
		for p := blocks[i].Pages - 1; p >= 0; p-- {
			pieces(pageset.Run{Block: i, First: pageset.Page(p), Count: 1},
				func(x planned) { runs = append(runs, x) })
		}
	}
	return runs
}

func shuffled(blocks []Block) Plan {
	runs := reverse(blocks)
	r := rand.New(rand.NewPCG(1, 2)) // #nosec G404 -- the order must be the same each time
	r.Shuffle(len(runs), func(i, j int) { runs[i], runs[j] = runs[j], runs[i] })
	return runs
}

// ranking gives each page its rank: the lower, the sooner.
type ranking struct {
	base  Base
	fresh bool
	heat  []uint16 // by process: its rank among the others, from 0 to maxHeat
	busy  []bool   // by process
}

const (
	maxHeat = 63 // how many processes are told apart
	tiers   = 16
	// hotTiers are the tiers of what busy processes work on, and of what the kernel needs for any
	// process.
	hotTiers = 3
	ranks    = tiers * (maxHeat + 1)
)

// A process is busy if it had busyTime of the CPU of late. If that is not known, it is busy if it
// last ran less than busyRun ago.
const (
	busyTime = time.Millisecond
	busyRun  = 100 * time.Millisecond
)

func newRanking(base Base, s *pageclass.Survey) *ranking {
	r := &ranking{base: base, fresh: s.Fresh, heat: make([]uint16, len(s.Processes)),
		busy: make([]bool, len(s.Processes))}
	order := make([]int, len(s.Processes))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(i, j int) int {
		a, b := &s.Processes[i], &s.Processes[j]
		if base == Enlightened {
			// Idle language runtimes wake now and then, so the last run says little about how much
			// memory a process will soon use. Its recent CPU time does.
			if c := cmp.Compare(b.Recent, a.Recent); c != 0 {
				return c
			}
		}
		return cmp.Compare(a.LastRun, b.LastRun)
	})
	for rank, i := range order {
		p := &s.Processes[i]
		r.heat[i] = uint16(min(rank, maxHeat))
		r.busy[i] = p.OnCPU || p.Recent >= busyTime || p.Recent < 0 && p.LastRun < busyRun
	}
	return r
}

// Hot returns a function that reports whether the guest works on a page of the survey, as far as is
// known. These pages belong to busy processes, or to the kernel, and come first in the default
// order.
func Hot(s *pageclass.Survey) func(pageclass.Page) bool {
	r := newRanking(Enlightened, s)
	return func(p pageclass.Page) bool {
		return p.Kind != pageclass.None && p.Class != pageclass.Free && r.tier(p) < hotTiers
	}
}

// rank returns the rank of a page, less than ranks.
func (r *ranking) rank(p pageclass.Page) uint16 {
	heat := uint16(maxHeat)
	if n := int(p.Owner); n > 0 && n <= len(r.heat) {
		heat = r.heat[n-1]
	}
	if r.base == Classes {
		if p.Class == pageclass.Unknown || p.Kind == pageclass.None {
			return ranks - 1
		}
		return uint16(p.Class)*(maxHeat+1) + heat
	}
	return r.tier(p)*(maxHeat+1) + heat
}

// tier orders pages by how likely the guest is to need them soon, per byte sent.
func (r *ranking) tier(p pageclass.Page) uint16 {
	n := int(p.Owner)
	busy := n > 0 && n <= len(r.busy) && r.busy[n-1]
	user := p.Class == pageclass.UserCode || p.Class == pageclass.UserData
	cold := r.fresh && p.Flags&(pageclass.Mapped|pageclass.Accessed) == pageclass.Mapped
	switch p.Kind {
	case pageclass.KernelStack, pageclass.PerCPU, pageclass.Unreferenced:
		return 0
	case pageclass.UserPageTable:
		switch {
		case busy:
			return 0
		case p.Class == pageclass.PageTable:
			return 5
		}
		return 9
	case pageclass.KernelText, pageclass.KernelImage:
		// The guest needs a small part of it, which is contiguous, so a few fetches bring it.
		return 3
	case pageclass.Anon, pageclass.Shmem, pageclass.Hugetlb, pageclass.ZeroPage:
		switch {
		case busy && p.Class == pageclass.UserCode:
			return 1
		case busy && !cold:
			return 2
		case busy:
			return 8
		case user && !cold:
			return 6
		}
		return 10
	case pageclass.File:
		switch {
		case busy && p.Class == pageclass.UserCode && !cold:
			return 1
		case busy && !cold:
			return 2
		case p.Flags&pageclass.Active != 0 && !cold:
			return 3
		case p.Flags&pageclass.Dirty != 0:
			return 7
		case user && !cold:
			return 6
		}
		return 11
	case pageclass.Slab, pageclass.KernelOther:
		return 4
	case pageclass.PageDescriptors:
		return 5
	case pageclass.Reserved, pageclass.Poisoned:
		return 12
	case pageclass.FreePerCPU:
		return 13
	case pageclass.FreeBuddy, pageclass.Offline:
		return 14
	}
	return 15
}

// byRank sorts the pages by rank, behind head. Within a rank they stay in the order of addresses,
// so that they make long runs. It looks at all pages twice instead of storing what it found: fresh
// memory would cost more.
func byRank(r *ranking, blocks []Block, pages []pageclass.Page, frames []Frames, head Plan) Plan {
	// where the runs of a rank begin; at first, how many runs the rank before has
	var at [ranks + 1]int
	at[0] = len(head)
	eachRun(r, blocks, pages, frames, func(rank uint16, _ planned) { at[rank+1]++ })
	for i := range ranks {
		at[i+1] += at[i]
	}
	sorted := make(Plan, at[ranks])
	copy(sorted, head)
	eachRun(r, blocks, pages, frames, func(rank uint16, run planned) {
		sorted[at[rank]] = run
		at[rank]++
	})
	return sorted
}

// eachRun calls found for all runs of pages of one rank, in the order of frames.
func eachRun(r *ranking, blocks []Block, pages []pageclass.Page, frames []Frames,
	found func(rank uint16, run planned)) {
	// Neighbouring pages are mostly alike.
	var like pageclass.Page
	rankOfLike := r.rank(like)
	for _, f := range frames {
		each := uint64(blocks[f.Run.Block].PageSize / units.PageSize)
		current, first := uint16(ranks), f.Run.First
		end := func(at pageset.Page) {
			pieces(pageset.Run{Block: f.Run.Block, First: first, Count: int(at - first)},
				func(p planned) { found(current, p) })
		}
		known := pages[min(f.First, uint64(len(pages))):]
		f.Run.Count = min(f.Run.Count, int((uint64(len(known))+each-1)/each))
		for i := range f.Run.Count {
			if each == 1 && known[i] == like && current == rankOfLike {
				continue // as most do
			}
			from := uint64(i) * each
			rank := uint16(ranks - 1)
			for _, p := range known[from:min(from+each, uint64(len(known)))] {
				if p != like {
					like, rankOfLike = p, r.rank(p)
				}
				rank = min(rank, rankOfLike)
			}
			if rank != current {
				end(f.Run.First + pageset.Page(i))
				current, first = rank, f.Run.First+pageset.Page(i)
			}
		}
		end(f.Run.End())
	}
}

// Skippable yields the pages whose frames are all free beyond doubt, by the survey. No run is so
// long that taking it holds up others for long.
func Skippable(blocks []Block, s *pageclass.Survey, frames []Frames) iter.Seq[pageset.Run] {
	return func(yield func(pageset.Run) bool) {
		for _, f := range frames {
			each := uint64(blocks[f.Run.Block].PageSize / units.PageSize)
			run := pageset.Run{Block: f.Run.Block, First: f.Run.First}
			for i := range f.Run.Count {
				from := f.First + uint64(i)*each
				free := from+each <= uint64(len(s.Pages))
				if free {
					for _, p := range s.Pages[from : from+each] {
						free = free && p.Flags&pageclass.Skippable != 0
					}
				}
				if free {
					run.Count++
				}
				if !free || run.Count == maxCount {
					if run.Count > 0 && !yield(run) {
						return
					}
					run.First, run.Count = f.Run.First+pageset.Page(i)+1, 0
				}
			}
			if run.Count > 0 && !yield(run) {
				return
			}
		}
	}
}

// Locate returns the pages that page frames fill, in that order. It leaves out frames that it
// cannot place.
func Locate(blocks []Block, list []uint64, frames []Frames) []pageset.Run {
	var runs []pageset.Run
	find := newFinder(blocks, frames)
	for _, frame := range list {
		if block, page, ok := find.page(frame); ok {
			runs = append(runs, pageset.Run{Block: block, First: page, Count: 1})
		}
	}
	return runs
}

// finder finds the page that contains a page frame.
type finder struct {
	blocks []Block
	frames []Frames // by First
	last   Frames   // the last one found: successive frames are mostly close together
	each   uint64   // frames in a page of it
}

func newFinder(blocks []Block, frames []Frames) *finder {
	frames = slices.Clone(frames)
	slices.SortFunc(frames, func(a, b Frames) int { return cmp.Compare(a.First, b.First) })
	return &finder{blocks: blocks, frames: frames, each: 1}
}

func (f *finder) page(frame uint64) (block int, p pageset.Page, ok bool) {
	if frame < f.last.First || (frame-f.last.First)/f.each >= uint64(f.last.Run.Count) {
		i, _ := slices.BinarySearchFunc(f.frames, frame, func(f Frames, frame uint64) int {
			if f.First <= frame {
				return -1
			}
			return 1
		})
		if i == 0 {
			return 0, 0, false
		}
		f.last = f.frames[i-1]
		f.each = uint64(f.blocks[f.last.Run.Block].PageSize / units.PageSize)
		if (frame-f.last.First)/f.each >= uint64(f.last.Run.Count) {
			return 0, 0, false
		}
	}
	return f.last.Run.Block, f.last.Run.First + pageset.Page((frame-f.last.First)/f.each), true
}

// Kinship knows which pages are neighbours in the address spaces of the guest's processes. A nil
// Kinship knows none.
type Kinship struct {
	// number of each block's first page; all pages have numbers, in one sequence
	base     []uint32
	blocks   []Block    //
	sequence []uint32   // page numbers in virtual order
	places   [][]uint32 // 1 + place in the sequence, of each page of each block
}

const noPage = ^uint32(0)

// NewKinship returns the kinship that a survey knows. It is nil if a policy does not use it. It
// keeps the survey's Sequence, and changes it.
func NewKinship(p Policy, blocks []Block, s *pageclass.Survey, frames []Frames) *Kinship {
	if p.Base != Enlightened || !p.Near {
		return nil
	}
	k := &Kinship{blocks: blocks, sequence: s.Sequence[:0]}
	n := uint64(0)
	for _, b := range blocks {
		if n+uint64(b.Pages) >= uint64(noPage) {
			return nil // more than 16 TiB: physical neighbours must do
		}
		k.base = append(k.base, uint32(n))
		k.places = append(k.places, make([]uint32, b.Pages))
		n += uint64(b.Pages)
	}
	find := newFinder(blocks, frames)
	for _, frame := range s.Sequence {
		block, page, ok := find.page(uint64(frame))
		if !ok {
			continue
		}
		place := &k.places[block][page]
		if *place != 0 {
			continue
		}
		k.sequence = append(k.sequence, k.base[block]+uint32(page))
		*place = uint32(len(k.sequence))
	}
	return k
}

// place returns a page's place in the sequence.
func (k *Kinship) place(block int, p pageset.Page) (pageset.Page, bool) {
	if k == nil || p >= pageset.Page(len(k.places[block])) || k.places[block][p] == 0 {
		return 0, false
	}
	return pageset.Page(k.places[block][p] - 1), true
}

// page returns the page at a place in the sequence.
func (k *Kinship) page(at pageset.Page) (block int, p pageset.Page, ok bool) {
	if at >= pageset.Page(len(k.sequence)) {
		return 0, 0, false
	}
	n := k.sequence[at]
	block, found := slices.BinarySearch(k.base, n)
	if !found {
		block--
	}
	for block+1 < len(k.base) && k.base[block+1] == n { // empty blocks
		block++
	}
	return block, pageset.Page(n - k.base[block]), true
}
