package linux

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"slices"
	"unsafe"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// desc is a page descriptor, as words.
type desc = [descSize / 8]uint64

// pages is what Survey fills. It lives as long as the Guest, so that a survey allocates
// next to nothing. Of the descriptors, which take 1/64 of the guest's memory, it keeps no copy but
// of those that head free blocks.
type pages struct {
	vmemmap  uint64 // address of the descriptor of page 0
	sections []bool // by number: pieces of memory whose descriptors lie together, if there are any
	list     []pageclass.Page
	heads    []freeHead // by page number
	headsAt  []uint32   // by block of 2 MiB, and one more: the first head in it, or behind it
	words    []uint64   // room for a batch of descriptors
	backing  []Range    // guest-physical memory of the descriptors
	table    []byte     // a root of mem_section
	highest  uint64     // page number, exclusive, that is looked at
	beyond   bool       // there was more
}

// freeHead is the descriptor that heads a block of free pages. Links to other descriptors are page
// numbers. Those that lead elsewhere, as at both ends of a list, are elsewhere.
type freeHead struct {
	pfn, next, prev uint32
	order           uint8
}

const elsewhere = ^uint32(0)

// sparseness bounds how much more page numbers than pages of RAM there may be: the index of
// pages has room for each number. Holes of some GiB are usual.
const sparseness, usualHoles = 8, 16 << 30 / units.PageSize

// findSections reads mem_section (mm/sparse.c, CONFIG_SPARSEMEM_EXTREME): an array of
// pointers to pages full of struct mem_section, whose member section_mem_map has flags in
// its low bits and the address of the descriptors, as that of page 0.
func (g *Guest) findSections() error {
	l, p := &g.layout, &g.pages
	clear(p.sections)
	ram := uint64(0)
	for _, e := range g.mem.Extents() {
		ram += e.Len / units.PageSize
	}
	limit := ram*sparseness + usualHoles
	p.vmemmap, p.beyond, p.highest = 0, false, 0
	if p.table == nil {
		p.table = make([]byte, units.PageSize)
	}
	loaded := ^uint64(0) // root in p.table
	last := ^uint64(0)
	for _, e := range g.mem.Extents() {
		for s := e.Addr / units.PageSize / l.sectionPages; s*l.sectionPages*units.PageSize < e.Addr+
			e.Len; s++ {
			if s == last {
				continue // two extents lie in it
			}
			last = s
			root := s / l.perRoot
			if root >= l.roots {
				break
			}
			if root != loaded {
				va, err := g.readU64(l.sectionTable + root*8)
				if err != nil {
					return fmt.Errorf("read mem_section: %w", err)
				}
				clear(p.table)
				if va != 0 {
					if err := g.read(p.table, va); err != nil {
						return fmt.Errorf("read mem_section: %w", err)
					}
				}
				loaded = root
			}
			coded := u64(p.table[s%l.perRoot*l.sectionSize+l.mapOffset:])
			const wanted = 7 // present, has a map, online
			if coded&wanted != wanted {
				continue
			}
			base := coded &^ (units.PageSize - 1)
			if p.vmemmap == 0 {
				p.vmemmap = base
			}
			if base != p.vmemmap || base>>63 == 0 {
				return errors.New("its page descriptors are not in one array: build the kernel " +
					"with CONFIG_SPARSEMEM_VMEMMAP")
			}
			if (s+1)*l.sectionPages > limit {
				p.beyond = true
				continue
			}
			p.highest = max(p.highest, (s+1)*l.sectionPages)
			for uint64(len(p.sections)) <= s {
				p.sections = append(p.sections, false)
			}
			p.sections[s] = true
		}
	}
	if p.vmemmap == 0 {
		return errors.New("it has no memory online")
	}
	if uint64(len(p.list)) < p.highest {
		p.list = make([]pageclass.Page, p.highest)
		p.headsAt = make([]uint32, p.highest/blockPages+2)
	}
	if p.words == nil {
		p.words = make([]uint64, batch*descSize/8)
	}
	return nil
}

// link returns where a link of a descriptor leads, by its word.
func (p *pages) link(word uint64, lru uint8) uint32 {
	off := word - uint64(lru)*8 - p.vmemmap
	if off%descSize != 0 || off/descSize >= uint64(elsewhere) {
		return elsewhere
	}
	return uint32(off / descSize)
}

// head returns the descriptor of a page that heads a free block, or nil if it does not.
func (p *pages) head(pfn uint64) *freeHead {
	b := pfn / blockPages
	if pfn >= p.highest {
		return nil
	}
	heads := p.heads[p.headsAt[b]:p.headsAt[b+1]]
	i, found := slices.BinarySearchFunc(heads, uint32(pfn),
		func(h freeHead, pfn uint32) int { return cmp.Compare(h.pfn, pfn) })
	if !found {
		return nil
	}
	return &heads[i]
}

// indexHeads makes head work, once all heads are known.
func (p *pages) indexHeads() {
	at := 0
	for b := range p.headsAt {
		for at < len(p.heads) && uint64(p.heads[at].pfn) < uint64(b)*blockPages {
			at++
		}
		p.headsAt[b] = uint32(at)
	}
}

// online yields the pages of each section that there is, by the section's number.
func (g *Guest) online() iter.Seq2[uint64, []pageclass.Page] {
	return func(yield func(uint64, []pageclass.Page) bool) {
		per := g.layout.sectionPages
		for s := range g.pages.sections {
			if g.pages.sections[s] &&
				!yield(uint64(s), g.pages.list[uint64(s)*per:][:per]) {
				return
			}
		}
	}
}

// batch is how many descriptors are read before they are looked at. They are few enough to be in
// the CPU's cache then, and more than the largest block of free pages, which is aligned.
const batch = 4096

// scan reads all descriptors and classifies the pages.
func (g *Guest) scan(ctx context.Context) error {
	l, p := &g.layout, &g.pages
	clear(p.list)
	p.backing, p.heads = p.backing[:0], p.heads[:0]
	for _, e := range g.mem.Extents() {
		first, end := e.Addr/units.PageSize, min((e.Addr+e.Len)/units.PageSize, p.highest)
		for first < end {
			s := first / l.sectionPages
			stop := min(end, (s+1)*l.sectionPages)
			if s < uint64(len(p.sections)) && p.sections[s] {
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := g.scanSection(first, stop); err != nil {
					return err
				}
			}
			first = stop
		}
	}
	p.indexHeads()
	return nil
}

// scanSection reads and classifies pages first to end, which lie in one section.
func (g *Guest) scanSection(first, end uint64) error {
	p := &g.pages
	viewer, _ := g.mem.(viewer)
	for first < end {
		addr, left, err := g.space.translate(p.vmemmap + first*descSize)
		if err != nil {
			// Part of a section need not have descriptors.
			first = min(end, (first&^(units.PageSize/descSize-1))+units.PageSize/descSize)
			continue
		}
		n := min(end-first, left/descSize)
		if n == 0 {
			return errors.New("page descriptors are not aligned")
		}
		p.noteBacking(Range{addr, n * descSize})
		for n > 0 {
			// Up to the next border of a batch, so that no free block is cut.
			part := min(n, batch-first%batch)
			var words []uint64
			if viewer != nil {
				if view := viewer.View(addr, part*descSize); view != nil {
					words = unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(view))), part*8)
				}
			}
			if words == nil {
				words = p.words[:part*8]
				if err := readPhys(g.mem, bytesOf(words), addr); err != nil {
					return fmt.Errorf("read page descriptors: %w", err)
				}
			}
			g.classify(words, first, p.list[first:first+part])
			first, addr, n = first+part, addr+part*descSize, n-part
		}
	}
	return nil
}

func (p *pages) noteBacking(r Range) {
	if n := len(p.backing); n > 0 && p.backing[n-1].Addr+p.backing[n-1].Len == r.Addr {
		p.backing[n-1].Len += r.Len
		return
	}
	p.backing = append(p.backing, r)
}

// classOf is the class of each kind, before it is known which processes use a page.
// Reserved pages are mostly the kernel's early allocations (its hash tables, its own
// page tables); firmware has little of them.
var classOf = [pageclass.Kinds]pageclass.Class{
	pageclass.None:            pageclass.Unknown,
	pageclass.FreeBuddy:       pageclass.Free,
	pageclass.FreePerCPU:      pageclass.Free,
	pageclass.Offline:         pageclass.Other,
	pageclass.Poisoned:        pageclass.Other,
	pageclass.KernelText:      pageclass.KernelCode,
	pageclass.KernelImage:     pageclass.Kernel,
	pageclass.KernelStack:     pageclass.Kernel,
	pageclass.PerCPU:          pageclass.Kernel,
	pageclass.UserPageTable:   pageclass.PageTable,
	pageclass.Slab:            pageclass.Kernel,
	pageclass.PageDescriptors: pageclass.Kernel,
	pageclass.Unreferenced:    pageclass.Kernel,
	pageclass.KernelOther:     pageclass.Kernel,
	pageclass.Reserved:        pageclass.Kernel,
	pageclass.ZeroPage:        pageclass.Kernel,
	pageclass.Anon:            pageclass.UserData,
	pageclass.Shmem:           pageclass.FileInactive,
	pageclass.File:            pageclass.FileInactive,
	pageclass.Hugetlb:         pageclass.UserData,
}

func page(k pageclass.Kind, f pageclass.Flags) pageclass.Page {
	c := classOf[k]
	if c == pageclass.FileInactive && f&pageclass.Active != 0 {
		c = pageclass.FileActive
	}
	return pageclass.Page{Kind: k, Class: c, Flags: f}
}

// classify tells what the pages from number first on are. What is decided, and why:
//
//   - A block of free pages (FreeBuddy) is one only as a whole: its head has the type of
//     free pages, no reference, no flag but "reported", an order below the limit for which
//     its number is aligned; every other page has no reference, flag, mapping or type. If
//     anything else is found the head is KernelOther and the others are what they are
//     by themselves. Whether such a block may be left out is decided by the free lists.
//   - A tail of a compound page is what its head is, with the head's flags: huge pages
//     of processes, large folios of files, slabs, hugetlb. A tail whose head is not in
//     front of it, or is free, is KernelOther.
//   - Types of pages (offline, page table, guard, slab, hugetlb) come before flags, as they
//     share room with what the flags are about. Guard pages and those of zsmalloc are
//     KernelOther; memory not accepted yet is Offline.
//   - Offline pages (ballooned, unplugged) are never skippable: nothing but the one type vouches
//     for it, and where the machine has taken them away they read as zero anyway.
//   - A page with a reference and a mapping that is not on an LRU list is on its way to it, or
//     isolated from it for migration or reclaim: it is Anon, Shmem or File all the same.
//   - A page without reference, flags, mapping and type is Unreferenced. It may be on a
//     CPU's list of free pages, which is looked at later. Or the kernel is just allocating or
//     freeing it, or it is part of a block that is not a compound page. It counts as in use.
//   - hwpoison is Poisoned whatever else it is.
func (g *Guest) classify(words []uint64, first uint64, out []pageclass.Page) {
	l, p := &g.layout, &g.pages
	kernelOther := page(pageclass.KernelOther, 0)
	unreferenced := page(pageclass.Unreferenced, 0)
	const noMapcount = 1<<32 - 1
	free := uint64(noMapcount) << (l.mapShift & 63) // counts of a page without type and reference
	for i := 0; i < len(out); {
		d := (*desc)(words[i*8:])
		flags, counts := d[l.flags&7], d[l.counts&7]
		mapcount, refcount := uint32(counts>>(l.mapShift&63)), uint32(counts>>(l.refShift&63))
		if flags&l.hwpoison != 0 {
			out[i] = page(pageclass.Poisoned, 0)
			i++
			continue
		}
		if info := d[l.head&7]; info&1 != 0 { // a tail
			pfn := first + uint64(i)
			head := p.headOf(info, pfn)
			out[i] = kernelOther
			if head < pfn && p.list[head].Kind != pageclass.FreeBuddy &&
				p.list[head].Kind != pageclass.None {
				out[i] = p.list[head]
			}
			i++
			continue
		}
		if flags&l.slab != 0 {
			out[i] = page(pageclass.Slab, 0)
			i++
			continue
		}
		if int32(mapcount) < -1 { // a type
			kind := pageclass.KernelOther
			if l.byteTypes {
				if k := l.typeBytes[mapcount>>24]; k != pageclass.None {
					kind = k
				}
			} else {
				switch mapcount {
				case l.buddy:
					kind = pageclass.FreeBuddy
				case l.typeWords[0]:
					kind = pageclass.Offline
				case l.typeWords[1]:
					kind = pageclass.UserPageTable
				}
			}
			if kind == pageclass.FreeBuddy {
				n := g.freeBlock(words, i, len(out), first, refcount, free)
				if n == 0 {
					out[i] = kernelOther
					i++
					continue
				}
				if pfn := first + uint64(i); pfn < uint64(elsewhere) {
					// else no list may lead to it
					p.heads = append(p.heads, freeHead{pfn: uint32(pfn),
						next:  p.link(d[l.lru&7], l.lru),
						prev:  p.link(d[(l.lru+1)&7], l.lru),
						order: uint8(d[l.private&7])})
				}
				block := out[i : i+n]
				for j := range block {
					block[j] = pageclass.Page{Kind: pageclass.FreeBuddy, Class: pageclass.Free}
				}
				i += n
				continue
			}
			out[i] = page(kind, 0)
			i++
			continue
		}
		mapping := d[l.mapping&7]
		switch {
		case flags&l.reserved != 0:
			out[i] = page(pageclass.Reserved, 0)
		case flags&l.lruBit != 0, mapping != 0 && refcount != 0 &&
			(mapping&1 != 0 || mapping&3 == 0 && mapping>>47 == 1<<17-1):
			out[i] = g.userPage(d, words[i*8:], flags, mapcount, mapping)
		case refcount == 0 && flags&l.allFlags == 0 && mapping == 0 && mapcount == noMapcount:
			out[i] = unreferenced
		case l.hugetlbDtor >= 0 && flags&l.headBit != 0 && g.isHugetlb(words[i*8:]):
			out[i] = page(pageclass.Hugetlb, 0)
		default:
			out[i] = kernelOther
		}
		i++
	}
}

// freeBlock returns the size of the free block whose head is descriptor i, or 0 if it is not one.
func (g *Guest) freeBlock(words []uint64, i, n int, first uint64, refcount uint32,
	free uint64) int {
	l := &g.layout
	d := (*desc)(words[i*8:])
	order := d[l.private&7]
	if refcount != 0 || d[l.flags&7]&l.allFlags&^l.reported != 0 || order >= l.orders {
		return 0
	}
	size := 1 << order
	if (first+uint64(i))&uint64(size-1) != 0 || size > n-i {
		return 0
	}
	bad := uint64(0)
	for tail := words[i*8+8 : (i+size)*8]; len(tail) >= 8; tail = tail[8:] {
		t := (*desc)(tail)
		bad |= t[l.flags&7]&l.allFlags | t[l.mapping&7] | t[l.counts&7] ^ free | t[l.head&7]&1
	}
	if bad != 0 {
		return 0
	}
	return size
}

// userPage is a page of a process or of a file, by the descriptor of it or its head.
func (g *Guest) userPage(d *desc, words []uint64, flags uint64, mapcount uint32,
	mapping uint64) pageclass.Page {
	l := &g.layout
	var f pageclass.Flags
	if flags&(l.active|g.hot) != 0 {
		f |= pageclass.Active
	}
	if int32(mapcount) >= 0 {
		f |= pageclass.Mapped
	}
	switch {
	case flags&l.headBit != 0 && l.hugetlbDtor >= 0 && g.isHugetlb(words):
		// mapped privately, it is anonymous, too
		return page(pageclass.Hugetlb, f)
	case mapping&1 != 0: // PAGE_MAPPING_ANON
		return page(pageclass.Anon, f)
	case flags&l.swapbacked != 0:
		return page(pageclass.Shmem, f)
	}
	if flags&l.dirty != 0 {
		f |= pageclass.Dirty
	}
	return page(pageclass.File, f)
}

// isHugetlb reports whether the head at the start of words is of hugetlbfs, before 6.7.
func (g *Guest) isHugetlb(words []uint64) bool {
	l := &g.layout
	return len(words) >= 16 && words[8+l.dtorWord&7]>>(l.dtorShift&63)&0xff == uint64(l.hugetlbDtor)
}

// headOf returns the number of the head of a compound page by a tail's word. That is a pointer plus
// 1. From 7.3 on it is a mask plus 1 that turns the tail's address into the head's. It returns a
// number at least pfn if there is none in front of pfn.
func (p *pages) headOf(info, pfn uint64) uint64 {
	head := info - 1
	if size := -head; bits.OnesCount64(size) == 1 {
		head &= p.vmemmap + pfn*descSize
	}
	off := head - p.vmemmap
	if off%descSize != 0 || off/descSize >= uint64(len(p.list)) {
		return ^uint64(0)
	}
	return off / descSize
}

// bytesOf gives the bytes of words in memory order. Host and guest are both x86-64.
func bytesOf(w []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), len(w)*8)
}
