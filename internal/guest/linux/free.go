package linux

import (
	"fmt"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// maxDropped is how many free blocks in all may look free but be on no list: each CPU of the guest
// can be in the middle of taking or giving back a few.
const maxDropped = 16

// maxNotes bounds Result.Notes.
const maxNotesKept = 32

// freeLists marks as Skippable the pages that the allocator holds free beyond doubt. A
// block must look free by itself (classify) and, besides:
//
//   - the zone's lock is not held: its holder is changing the lists;
//   - the block's head is on the zone's list free_area[order].free_list, for the order that the
//     head itself has, and lies in the zone;
//   - the links of every list fit forwards and backwards, from head to head;
//   - the lists of an order hold as many blocks, of all migrate types, as nr_free says;
//   - no block is met twice.
//
// If one of these fails for a zone, nothing of that zone is skippable; if too many blocks
// look free but are on no list, nothing at all.
//
// Why this is enough: a block's content belongs to the allocator from before it is put on a list
// until after it is taken off, both under the lock. Before the page changes hands, the allocator
// takes it off the list and clears its type and its order. x86 stores become visible in order, and
// a compiler cannot move all of them behind the lock's release.
func (g *Guest) freeLists(r *Result) error {
	l, p := &g.layout, &g.pages
	listed := 0
	g.zones = g.zones[:0]
	if err := g.read(g.nodeBuf, l.nodeData); err != nil {
		return fmt.Errorf("read node_data: %w", err)
	}
	for node := range l.nodes {
		nd := u64(g.nodeBuf[node*8:])
		if nd == 0 {
			continue
		}
		zones := g.zoneBuf
		if err := g.read(zones, nd+l.nodeZones); err != nil {
			return fmt.Errorf("read the zones of node %d: %w", node, err)
		}
		for i := range l.zoneCount {
			z := zones[i*l.zoneSize:][:l.zoneSize]
			if u64(z[l.zoneManaged:]) == 0 {
				continue
			}
			at := nd + l.nodeZones + i*l.zoneSize
			start, span := u64(z[l.zoneStart:]), u64(z[l.zoneSpan:])
			if start >= p.highest || span == 0 {
				continue
			}
			zone := zone{node: int(node), number: int(i), start: start,
				end: start + min(span, p.highest-start)}
			n, err := g.walkZone(z, at, &zone)
			listed += n
			if err != nil {
				r.note("node %d zone %d: nothing is skipped: %v", node, i, err)
				p.distrust(zone.start, zone.end)
				zone.doubted = true
			}
			if l.pcp.ok {
				zone.pcp = u64(z[l.zonePCP:])
			}
			g.zones = append(g.zones, zone)
		}
	}
	if dropped := len(p.heads) - listed; dropped > maxDropped {
		r.note("nothing is skipped: %d blocks look free but are on no list", dropped)
		p.distrust(0, p.highest)
		for i := range g.zones {
			g.zones[i].doubted = true
		}
	}
	return nil
}

// zone is what is kept of one while a survey is made.
type zone struct {
	node, number int
	start, end   uint64 // page numbers
	pcp          uint64 // per_cpu_pageset
	doubted      bool
}

// walkZone walks the lists of the zone whose structure is z, at address at. It returns
// how many blocks it met.
func (g *Guest) walkZone(z []byte, at uint64, zone *zone) (met int, err error) {
	l, p := &g.layout, &g.pages
	if u32(z[l.zoneLock:]) != 0 {
		return 0, fmt.Errorf("its lock is held")
	}
	// The lists lead to descriptors by the address of their member lru.
	lruOffset := uint64(l.lru) * 8
	for order := range l.orders {
		area := z[l.freeArea+order*l.areaSize:][:l.areaSize]
		count := uint64(0)
		size := uint64(1) << order
		for list := range l.lists {
			head := at + l.freeArea + order*l.areaSize + list*16
			next, last := u64(area[list*16:]), u64(area[list*16+8:])
			prev := head
			for next != head {
				off := next - lruOffset - p.vmemmap
				pfn := off / descSize
				if off%descSize != 0 || pfn < zone.start || pfn >= zone.end || size > zone.end-pfn {
					return met, fmt.Errorf("a list of order %d leads out of it", order)
				}
				h := p.head(pfn)
				// Being skippable already, it has been here before.
				if h == nil || p.list[pfn].Kind != pageclass.FreeBuddy ||
					p.list[pfn].Flags&pageclass.Skippable != 0 || uint64(h.order) != order {
					return met,
						fmt.Errorf("a list of order %d holds page %#x, which is no such block",
							order, pfn)
				}
				back, err := g.follow(pfn, h.prev, 1)
				if err != nil {
					return met, err
				}
				if back != prev {
					return met, fmt.Errorf("a list of order %d is broken at page %#x", order, pfn)
				}
				block := p.list[pfn : pfn+size]
				for i := range block {
					if block[i].Kind != pageclass.FreeBuddy {
						// the page descriptors themselves, say
						return met, fmt.Errorf("page %#x is in a free block and in use",
							pfn+uint64(i))
					}
					block[i].Flags |= pageclass.Skippable
				}
				count++
				prev = next
				if next, err = g.follow(pfn, h.next, 0); err != nil {
					return met, err
				}
			}
			if last != prev {
				return met, fmt.Errorf("a list of order %d has another end backwards", order)
			}
		}
		met += int(count)
		if n := u64(area[l.nrFree:]); n != count {
			return met, fmt.Errorf("%d blocks of order %d on lists, but %d counted", count, order,
				n)
		}
	}
	return met, nil
}

// follow returns the address where a link of a free block's head leads, forwards (0) or backwards
// (1). Those that lead elsewhere are few, so it reads them again.
func (g *Guest) follow(pfn uint64, link uint32, word uint64) (uint64, error) {
	lru := uint64(g.layout.lru) * 8
	if link != elsewhere {
		return g.pages.vmemmap + uint64(link)*descSize + lru, nil
	}
	return g.readU64(g.pages.vmemmap + pfn*descSize + lru + word*8)
}

// distrust takes back what was marked as skippable.
func (p *pages) distrust(start, end uint64) {
	for i := start; i < end; i++ {
		p.list[i].Flags &^= pageclass.Skippable
	}
}

// perCPULists marks pages on the CPUs' own lists of free pages (struct per_cpu_pages). It marks
// those of a list only if the list has a lock (from Linux 6.0) that is not held, its links fit
// forwards and backwards, every page on it is Unreferenced and in the zone, and count is their
// number. The lists go by order, MIGRATE_PCPTYPES of them an order up to 3, then those of huge
// pages.
func (g *Guest) perCPULists(r *Result) error {
	l, p := &g.layout, &g.pages
	if !l.pcp.ok {
		return nil
	}
	// All of the structures in one go.
	g.virtual = g.virtual[:0]
	zones := 0
	for _, z := range g.zones {
		if z.pcp == 0 {
			continue
		}
		zones++
		for _, off := range g.cpuOffsets {
			g.virtual = append(g.virtual, Range{z.pcp + off, l.pcp.size})
		}
	}
	want := len(g.virtual) * int(l.pcp.size)
	if want > maxPCP {
		r.note("lists of free pages of %d cpus are not looked at", len(g.cpuOffsets))
		return nil
	}
	if cap(g.pcpBuf) < want {
		g.pcpBuf = make([]byte, want)
	}
	buf := g.pcpBuf[:want]
	if err := g.readMany(buf, g.virtual); err != nil {
		return fmt.Errorf("read per-cpu lists: %w", err)
	}
	i := 0
	for _, z := range g.zones {
		if z.pcp == 0 {
			continue
		}
		for cpu := range g.cpuOffsets {
			g.onPCP = g.onPCP[:0]
			err := g.walkPCP(buf[i*int(l.pcp.size):][:l.pcp.size], g.virtual[i].Addr, &z)
			i++
			mark := pageclass.Page{Kind: pageclass.FreePerCPU, Class: pageclass.Free}
			switch {
			case err != nil: // what they are is not certain
				mark = page(pageclass.Unreferenced, 0)
				r.note("node %d zone %d cpu %d: its free pages are not skipped: %v", z.node,
					z.number, cpu, err)
			case !z.doubted:
				mark.Flags = pageclass.Skippable
			}
			for _, b := range g.onPCP {
				block := p.list[b.pfn : uint64(b.pfn)+1<<b.order]
				for j := range block {
					block[j] = mark
				}
			}
		}
	}
	return nil
}

// maxPCP bounds the bytes of per_cpu_pages read.
const maxPCP = 8 << 20

// pcpBlock is a block on a CPU's list.
type pcpBlock struct {
	pfn   uint32
	order uint8
}

// walkPCP walks one CPU's lists in a zone and gathers what it meets in onPCP. It marks
// these pages as FreePerCPU, so that no page is met twice.
func (g *Guest) walkPCP(s []byte, at uint64, z *zone) error {
	l, p := &g.layout, &g.pages
	if u32(s[l.pcp.lock:]) != 0 {
		return fmt.Errorf("their lock is held")
	}
	const noType = 1<<32 - 1
	free := uint64(noType) << (l.mapShift & 63)
	count := uint64(0)
	for list := range l.pcp.n {
		order := list / l.pcp.types
		if order > 3 { // PAGE_ALLOC_COSTLY_ORDER; what is behind is for huge pages
			order = 9
		}
		size := uint64(1) << order
		head := at + l.pcp.lists + list*16
		next, last := u64(s[l.pcp.lists+list*16:]), u64(s[l.pcp.lists+list*16+8:])
		prev := head
		for next != head {
			off := next - uint64(l.lru)*8 - p.vmemmap
			pfn := off / descSize
			if off%descSize != 0 || pfn < z.start || pfn >= z.end || size > z.end-pfn ||
				pfn&(size-1) != 0 {
				return fmt.Errorf("a list leads out of the zone")
			}
			words := p.words[:size*8]
			if err := g.read(bytesOf(words), p.vmemmap+pfn*descSize); err != nil {
				return err
			}
			d := (*desc)(words)
			if d[(l.lru+1)&7] != prev {
				return fmt.Errorf("a list is broken at page %#x", pfn)
			}
			block := p.list[pfn : pfn+size]
			for i := range block {
				t := (*desc)(words[i*8:])
				if block[i].Kind != pageclass.Unreferenced || t[l.counts&7] != free {
					return fmt.Errorf("page %#x on a list is in use, or met before", pfn+uint64(i))
				}
				block[i].Kind = pageclass.FreePerCPU
				if i == 0 {
					g.onPCP = append(g.onPCP, pcpBlock{uint32(pfn), uint8(order)})
				}
			}
			count += size
			prev, next = next, d[l.lru&7]
		}
		if last != prev {
			return fmt.Errorf("a list has another end backwards")
		}
	}
	if n := u32(s[l.pcp.count:]); uint64(n) != count {
		return fmt.Errorf("%d pages on lists, but %d counted", count, n)
	}
	return nil
}

// minds says why the guest may mind that its free pages come to read as zero; "" if it does not.
//
// Only with page_poison=1 does Linux fill pages when they are freed and verify them when they are
// allocated (mm/page_poison.c; CONFIG_PAGE_POISONING). A static key shows that. Where the key's
// name is not known, the free pages do: they then all hold 0xaa. Everything else that looks into
// free pages accepts zeroes. init_on_free=1 makes them zero itself and relies on nothing else when
// init_on_alloc=0; with init_on_alloc=1 they are cleared again. KASAN and KMSAN keep what they know
// in other pages. debug_pagealloc unmaps them, and page reporting already makes them zero.
func (g *Guest) minds() string {
	for _, name := range []string{"_page_poisoning_enabled", "_page_poisoning_enabled_early",
		"want_page_poisoning", "want_page_poisoning_early"} {
		if va, ok := g.symbol(name); ok {
			// A static key begins with the count of those who enabled it; the others are a bool.
			n, err := g.readU32(va)
			if len(name) > 6 && name[len(name)-6:] == "_early" {
				n &= 0xff
			}
			if err != nil || n != 0 {
				return "the guest poisons free pages"
			}
		}
	}
	return ""
}

const poisonSamples = 64

// poisoned reports whether free pages hold the pattern of page_poison. What is not populated holds
// zeroes, and is not read: the machine would have to make it first, 2 MiB for each where it uses
// huge pages.
func (g *Guest) poisoned() (bool, error) {
	list := g.virtual[:0]
	// From all over memory, as it is likely that some of them were in use before.
	step := max(1, g.pages.highest/poisonSamples)
	next := uint64(0)
	for s, pages := range g.online() {
		for i := range pages {
			pfn := s*g.layout.sectionPages + uint64(i)
			if pfn < next || pages[i].Flags&pageclass.Skippable == 0 || len(list) == poisonSamples {
				continue
			}
			next = pfn + step
			var populated [1]uint64
			if err := g.mem.Populated(pfn*units.PageSize, 1, populated[:]); err != nil {
				return false, err
			}
			if populated[0] != 0 {
				list = append(list, Range{pfn*units.PageSize + 64, 64})
			}
		}
	}
	g.virtual = list
	buf := g.sample[:len(list)*64]
	if err := g.mem.ReadRanges(buf, list); err != nil {
		return false, err
	}
	const pattern = 0xaa
	for ; len(buf) > 0; buf = buf[64:] {
		n := 0
		for n < 64 && buf[n] == pattern {
			n++
		}
		if n == 64 {
			return true, nil
		}
	}
	return false, nil
}
