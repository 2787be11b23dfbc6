package linux

import (
	"cmp"
	"context"
	"fmt"
	"math"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// census is who lives in the guest: its tasks, and the pages that their address spaces
// hold. It lives as long as the Guest, so that taking it allocates next to nothing.
type census struct {
	layout taskLayout
	absent error // why there is none

	threads   []thread
	processes []process
	list      []pageclass.Process
	sequence  []uint32
	doubts    []string
	partial   bool // some processes or mappings may be missing
	mapped    int  // pages of processes, as often as they are mapped
	accessed  int  // of these, by mappings with the accessed bit set
	wild      int  // entries that lead where no page table can be
	freeUsed  int  // pages in use that the scan held to be free
	unskipped int  // of these, those that were Skippable until then

	task        []byte              // room for a task
	ranks       []int               // place in processes, by the number of a thread's process
	seen        map[uint64]struct{} // tasks
	queues      map[uint64]runQueue
	spaces      map[uint64]struct{} // of mm_structs
	addrs, more []uint64
	lost        []int
	ranges      []Range
	bytes       []byte
	arena       []uint64 // page tables, a batch at a time
	items, next []item
	visited     []uint64          // bits by page number: page tables that are in items, or were
	placed      []uint64          // bits by page number: pages that are in sequence
	blocks      []pageclass.Flags // by number of 2 MiB: bit blockTaken, and flags
}

// item is a page table to be read, or 2 MiB of pages that a process maps as one.
type item struct {
	addr  uint64 // guest-physical
	owner uint16 // 1 + number of the process
	block bool
	noExec,
	active bool
}

const (
	// x86-64's bits of an entry that were not needed so far (Intel SDM volume 3, 4.5).
	accessed = 1 << 5
	dirty    = 1 << 6
	noExec   = 1 << 63
	// protNone is Linux's bit for pages that are there but may not be accessed, by
	// mprotect or to find out which node uses them; the CPU takes the entry for not present. Swap
	// entries have it and largePage clear (arch/x86/include/asm/pgtable_64.h).
	protNone = 1 << 8

	blockPages = 512
	blockTaken = pageclass.Flags(1 << 7)

	tableBatch = 256 // page tables read at once: 1 MiB, which a CPU's cache holds
	maxDoubts  = 8
)

func (c *census) doubt(format string, args ...any) {
	c.partial = true
	if len(c.doubts) < maxDoubts {
		c.doubts = append(c.doubts, fmt.Sprintf(format, args...))
	}
}

// room returns n bytes to be used until it is called again.
func (c *census) room(n uint64) []byte {
	if uint64(len(c.bytes)) < n {
		c.bytes = make([]byte, n)
	}
	return c.bytes[:n]
}

// prepareCensus does what can be done while the guest runs, so that takeCensus is quick. It learns
// how tasks look, and makes room. Where tasks cannot be read, takeCensus says so.
func (g *Guest) prepareCensus(pages int) {
	c := &g.census
	if c.absent = g.learnTasks(); c.absent == nil {
		g.makeRoom(pages)
	}
}

// makeRoom makes room for a census of so many pages.
func (g *Guest) makeRoom(pages int) {
	c := &g.census
	ram := 0
	for _, e := range g.mem.Extents() {
		ram += int(e.Len / units.PageSize)
	}
	c.seen, c.queues, c.spaces = map[uint64]struct{}{}, map[uint64]runQueue{}, map[uint64]struct{}{}
	c.threads, c.processes, c.list = make([]thread, 0, 512), make([]process, 0,
		512), make([]pageclass.Process, 0, 512)
	c.arena = make([]uint64, tableBatch*512)
	c.items, c.next = make([]item, 0, 4096), make([]item, 0, 4096)
	c.ranges = make([]Range, 0, 1024)
	c.room(64 << 10)
	c.sequence = make([]uint32, 0, ram)
	c.fit(pages)
	clear(c.arena)
}

// fit makes room for page numbers below pages.
func (c *census) fit(pages int) {
	if n := (pages + 63) / 64; len(c.visited) < n {
		c.visited, c.placed = make([]uint64, n), make([]uint64, n)
		c.blocks = make([]pageclass.Flags, pages/blockPages+1)
	}
	clear(c.visited)
	clear(c.placed)
	clear(c.blocks)
}

// takeCensus finds the processes of the stopped guest and what they map, and completes in r what
// the scan of the page descriptors has begun. An error means that memory cannot be read any more,
// or ctx is over.
//
// A page's class becomes, where processes are concerned:
//
//   - of an active process, that is one that ran within the time active: UserCode if some
//     process may execute the page, else UserData. A page in several classes takes the first. So do
//     pages of files that it maps: they are its code and data, whatever list they are on.
//   - of inactive processes alone: FileActive or FileInactive for pages of files and shared
//     memory, as the scan has it, since the page cache comes before Other; Other for the rest.
//   - Page tables of active processes are PageTable, of inactive ones Other. Those that no
//     process has are the kernel's own: Kernel.
//   - Memory of the kernel that processes map (vDSO, rings) stays the kernel's. The page
//     of zeroes belongs to nobody.
//   - Anonymous pages and those of hugetlbfs that nobody maps are Other.
//
// When the census is not complete, pages of processes that it has not met keep the class of the
// scan.
//
// A page that a process or a page table of one uses, but that the scan holds to be free, is no
// longer Skippable: it never happens in a sane guest.
func (g *Guest) takeCensus(ctx context.Context, r *Result) error {
	c, pages := &g.census, r.Pages
	c.doubts, c.partial = c.doubts[:0], false
	c.list, c.sequence = c.list[:0], c.sequence[:0]
	c.mapped, c.accessed, c.wild, c.freeUsed, c.unskipped = 0, 0, 0, 0, 0
	if err := g.count(ctx, pages); err != nil {
		return err
	}
	if c.wild > 0 {
		c.doubt("%d entries of page tables lead nowhere", c.wild)
	}
	if c.freeUsed > 0 {
		c.doubt("%d pages in use are held to be free", c.freeUsed)
	}
	for _, d := range c.doubts {
		r.note("processes: %s", d)
	}
	r.Skippable -= c.unskipped
	r.Processes, r.Sequence = c.list, c.sequence
	r.Fresh = c.accessed*10 < c.mapped*7
	return nil
}

func (g *Guest) count(ctx context.Context, pages []pageclass.Page) error {
	c := &g.census
	if c.absent != nil {
		c.doubt("%v", c.absent)
		return nil
	}
	if len(pages) > math.MaxUint32 {
		pages = pages[:math.MaxUint32]
	}
	if err := g.readTasks(ctx); err != nil {
		return err
	}
	if err := g.sumUp(cmp.Or(g.ActiveWithin, DefaultActive)); err != nil {
		return err
	}
	c.rankProcesses()
	for i := range c.processes {
		c.list = append(c.list, c.processes[i].Process)
	}
	if !c.partial {
		for i := range pages {
			switch p := &pages[i]; p.Kind {
			case pageclass.Anon, pageclass.Hugetlb:
				p.Class = pageclass.Other
			case pageclass.UserPageTable:
				p.Class = pageclass.Kernel
			}
		}
	}
	c.fit(len(pages))
	g.findStacks(pages)
	return g.walkSpaces(ctx, pages)
}

// findStacks marks the stacks of all tasks, which are the kernel's memory and the first
// that a task touches.
func (g *Guest) findStacks(pages []pageclass.Page) {
	c := &g.census
	for i := range c.threads {
		t := &c.threads[i]
		if t.stack>>63 == 0 || t.stack%units.PageSize != 0 {
			continue // an ended task has none
		}
		for at := uint64(0); at < c.layout.stackSize; at += units.PageSize {
			addr, _, err := g.space.translate(t.stack + at)
			if err != nil || addr/units.PageSize >= uint64(len(pages)) {
				continue
			}
			p := &pages[addr/units.PageSize]
			switch p.Kind {
			case pageclass.KernelOther, pageclass.Unreferenced, pageclass.KernelStack:
				p.Kind, p.Class = pageclass.KernelStack, pageclass.Kernel
				if n := c.ownerOf(t); n != 0 && (p.Owner == 0 || n < p.Owner) {
					p.Owner = n
				}
			case pageclass.FreeBuddy, pageclass.FreePerCPU:
				c.unfree(p)
			}
		}
	}
}

// ownerOf returns 1 + the number of a thread's process by rank, or 0 for an idle task.
func (c *census) ownerOf(t *thread) uint16 {
	if t.process < 0 {
		return 0
	}
	return uint16(c.ranks[t.process] + 1)
}

func (c *census) unfree(p *pageclass.Page) {
	c.freeUsed++
	if p.Flags&pageclass.Skippable != 0 {
		c.unskipped++
		p.Flags &^= pageclass.Skippable
	}
}

// walkSpaces reads the page tables of all processes, level by level: one call reads many
// tables. Those that matter most come first, so that of several processes that map a page,
// or share a table, it is the owner.
func (g *Guest) walkSpaces(ctx context.Context, pages []pageclass.Page) error {
	c := &g.census
	if err := g.findRoots(pages); err != nil {
		return err
	}
	for level := g.space.levels; level >= 1; level-- {
		c.next = c.next[:0]
		size := 512
		if level == g.space.levels {
			size = 256 // the other half is the kernel's
		}
		for at := 0; at < len(c.items); {
			if err := ctx.Err(); err != nil {
				return err
			}
			list, end := c.ranges[:0], at
			for ; end < len(c.items) && len(list) < tableBatch; end++ {
				if it := &c.items[end]; !it.block {
					list = append(list, Range{it.addr, uint64(size) * 8})
				}
			}
			c.ranges = list
			tables := c.arena[:len(list)*size]
			if err := g.mem.ReadRanges(bytesOf(tables), list); err != nil {
				return fmt.Errorf("read page tables of processes: %w", err)
			}
			for ; at < end; at++ {
				it := c.items[at]
				switch {
				case it.block && level > 1:
					c.next = append(c.next, it)
					continue
				case it.block:
					c.placeBlock(it, pages)
					continue
				case level > 1:
					c.descend(it, tables[:size], level, level == g.space.levels, pages)
				default:
					c.place(it, tables[:size], pages)
				}
				tables = tables[size:]
			}
		}
		c.items, c.next = c.next, c.items
	}
	return nil
}

// findRoots fills census.items with the top tables of all address spaces.
func (g *Guest) findRoots(pages []pageclass.Page) error {
	c := &g.census
	clear(c.spaces)
	c.items, c.addrs, c.more = c.items[:0], c.addrs[:0], c.more[:0]
	for i := range c.processes {
		mm := c.processes[i].mm
		if _, shared := c.spaces[mm]; mm == 0 || shared {
			continue
		}
		c.spaces[mm] = struct{}{}
		c.addrs = append(c.addrs, mm+c.layout.pgd.offset)
		c.more = append(c.more, uint64(i))
	}
	roots := c.room(uint64(len(c.addrs)) * 8)
	if err := g.gather(roots, 8, c.addrs); err != nil {
		return err
	}
	for i, n := range c.more {
		addr, _, err := g.space.translate(u64(roots[i*8:]))
		if err != nil || addr%units.PageSize != 0 {
			c.doubt("process %d has no page tables", c.processes[n].PID)
			continue
		}
		it := item{addr: addr, owner: uint16(n + 1), active: c.processes[n].Active}
		if c.enter(&it, pages) {
			c.items = append(c.items, it)
		}
	}
	return nil
}

// enter reports whether the page table must be read: it lies in memory of the kernel, and was not
// met before. So each table is read once, wherever entries lead.
func (c *census) enter(it *item, pages []pageclass.Page) bool {
	pfn := it.addr / units.PageSize
	if pfn >= uint64(len(pages)) {
		c.wild++
		return false
	}
	p := &pages[pfn]
	switch p.Kind {
	case pageclass.UserPageTable, pageclass.KernelOther, pageclass.Unreferenced:
	case pageclass.FreeBuddy, pageclass.FreePerCPU:
		c.unfree(p)
		return false
	default:
		c.wild++
		return false
	}
	if c.visited[pfn/64]>>(pfn%64)&1 != 0 {
		return false
	}
	c.visited[pfn/64] |= 1 << (pfn % 64)
	c.ownTable(it, p)
	return true
}

func (c *census) ownTable(it *item, p *pageclass.Page) {
	p.Kind, p.Class, p.Owner = pageclass.UserPageTable, pageclass.Other, it.owner
	if it.active {
		p.Class = pageclass.PageTable
	}
}

// descend adds what the table of a level above the last leads to.
func (c *census) descend(it item, table []uint64, level int, top bool, pages []pageclass.Page) {
	twin := false
	for _, e := range table {
		if e&(present|protNone|largePage) == 0 {
			continue // nothing, or in swap
		}
		next := item{owner: it.owner, active: it.active, noExec: it.noExec}
		if top {
			// Under page table isolation, a table beside this one is in force in user mode;
			// in this one, Linux forbids execution for all of user memory.
			twin = twin || e&noExec != 0
		} else {
			next.noExec = it.noExec || e&noExec != 0
		}
		if e&largePage == 0 || level > 3 {
			if e&present != 0 {
				next.addr = e & addrMask
				if c.enter(&next, pages) {
					c.next = append(c.next, next)
				}
			}
			continue
		}
		if e&present == 0 {
			e ^= addrMask // Linux inverts addresses in entries that are not present
		}
		size := uint64(1) << (12 + 9*(level-1))
		first := e & addrMask &^ (size - 1)
		for addr := first; addr < first+size; addr += blockPages * units.PageSize {
			b := addr / (blockPages * units.PageSize)
			if b >= uint64(len(c.blocks)) {
				break // a device's
			}
			if c.blocks[b]&blockTaken == 0 {
				next.addr, next.block = addr, true
				c.next = append(c.next, next)
			}
			c.blocks[b] |= blockTaken | flagsOf(e, next.noExec)
		}
	}
	if pfn := it.addr/units.PageSize + 1; twin && pfn%2 == 1 && pfn < uint64(len(pages)) {
		switch p := &pages[pfn]; p.Kind {
		case pageclass.UserPageTable, pageclass.KernelOther, pageclass.Unreferenced:
			c.ownTable(&it, p)
		}
	}
}

// flagsOf returns the flags that a mapping gives to pages.
func flagsOf(e uint64, forbidden bool) pageclass.Flags {
	f := pageclass.Mapped
	if e&accessed != 0 {
		f |= pageclass.Accessed
	}
	if e&dirty != 0 {
		f |= pageclass.Dirty
	}
	if e&noExec == 0 && !forbidden {
		f |= pageclass.Exec
	}
	return f
}

// place adds the pages of a table of the last level.
func (c *census) place(it item, table []uint64, pages []pageclass.Page) {
	for _, e := range table {
		if e&(present|protNone) == 0 {
			continue
		}
		if e&present == 0 {
			e ^= addrMask
		}
		if pfn := e & addrMask / units.PageSize; pfn < uint64(len(pages)) {
			c.placePage(it.owner, it.active, pfn, flagsOf(e, it.noExec), &pages[pfn])
		}
	}
}

func (c *census) placeBlock(it item, pages []pageclass.Page) {
	first := it.addr / units.PageSize
	f := c.blocks[first/blockPages] &^ blockTaken
	for pfn := first; pfn < min(first+blockPages, uint64(len(pages))); pfn++ {
		c.placePage(it.owner, it.active, pfn, f, &pages[pfn])
	}
}

// How a page of a kind takes to being mapped.
const (
	asDevice  = iota // nothing is known of it
	asShared         // it belongs to nobody
	asKernel         // it stays what it is
	asProcess        // it is the process's
	asFree           // that cannot be
)

var treatment = [pageclass.Kinds]uint8{
	pageclass.FreeBuddy: asFree, pageclass.FreePerCPU: asFree, pageclass.Offline: asShared,
	pageclass.Poisoned:   asShared,
	pageclass.KernelText: asKernel, pageclass.KernelImage: asKernel,
	pageclass.KernelStack: asKernel, pageclass.PerCPU: asKernel,
	pageclass.UserPageTable: asShared, pageclass.Slab: asKernel,
	pageclass.PageDescriptors: asShared, pageclass.Unreferenced: asKernel,
	pageclass.KernelOther: asKernel, pageclass.Reserved: asKernel, pageclass.ZeroPage: asShared,
	pageclass.Anon: asProcess, pageclass.Shmem: asProcess, pageclass.File: asProcess,
	pageclass.Hugetlb: asProcess,
}

// placePage notes that a process maps a page.
func (c *census) placePage(owner uint16, active bool, pfn uint64, f pageclass.Flags,
	p *pageclass.Page) {
	switch treatment[p.Kind] {
	case asFree:
		c.unfree(p)
		return
	case asDevice:
		return
	case asShared:
		p.Flags |= pageclass.Mapped
		return
	case asProcess:
		c.mapped++
		if f&pageclass.Accessed != 0 {
			c.accessed++
		}
		if p.Kind != pageclass.File {
			f &^= pageclass.Dirty // there is nowhere to write it back to
		}
		if active {
			class := pageclass.UserData
			if f&pageclass.Exec != 0 {
				class = pageclass.UserCode
			}
			p.Class = min(p.Class, class)
		}
	default:
		f &^= pageclass.Dirty
	}
	p.Flags |= f
	if p.Owner == 0 || owner < p.Owner {
		p.Owner = owner
	}
	if word, bit := &c.placed[pfn/64], uint64(1)<<(pfn%64); *word&bit == 0 {
		*word |= bit
		c.sequence = append(c.sequence, uint32(pfn))
	}
}
