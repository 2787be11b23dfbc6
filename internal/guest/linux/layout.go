package linux

import (
	"errors"
	"fmt"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// layout is where things are in the guest kernel's page descriptors (struct page), of
// 64 bytes, taken as eight words, and in the structures around them.
type layout struct {
	// Numbers of words in a descriptor, below 8.
	flags, head, mapping, private, lru, counts uint8
	mapShift, refShift                         uint8 // _mapcount and _refcount in the word counts

	// Masks for the word flags. Those that a kernel does not have are 0.
	lruBit, headBit, slab, hwpoison, reserved, swapbacked uint64
	active, workingset, dirty, reported, allFlags         uint64

	// Types of pages that are in _mapcount. From 6.12 its top byte is the type, before that
	// all of it is. typeWords holds the latter, typeBytes the former.
	byteTypes bool
	buddy     uint32
	typeBytes [256]pageclass.Kind
	typeWords [3]uint32 // offline, table, guard
	// before 6.7: the byte of the second descriptor says which compound page it is; -1 if not
	hugetlbDtor int16
	dtorWord    uint8
	dtorShift   uint8

	sectionPages uint64 // page descriptors a section
	perRoot      uint64 // sections a root of mem_section
	sectionSize  uint64 // bytes of a mem_section
	roots        uint64
	sectionTable uint64 // address of the array of roots
	mapOffset    uint64 // of section_mem_map

	zoneSize, zoneCount                                 uint64
	nodeZones                                           uint64
	freeArea, areaSize, nrFree                          uint64
	orders, lists                                       uint64 // MAX_ORDER (+1) and migrate types
	zoneLock, zoneStart, zoneSpan, zoneManaged, zonePCP uint64
	nodeData, nodes                                     uint64

	pcp struct { // per-CPU lists, if their lock is known
		ok                 bool
		size               uint64
		lock, count, lists uint64
		n                  uint64 // lists
		types              uint64 // lists an order
	}
	offsets uint64 // __per_cpu_offset
	cpus    []uint32
}

const descSize = 64

// A asker gathers what is missing, so that an error names all of it.
type asker struct {
	g    *Guest
	errs []error
}

func (a *asker) miss(err error) { a.errs = append(a.errs, err) }

// number is a number from VMCOREINFO between lo and hi.
func (a *asker) number(key string, lo, hi int64) uint64 {
	n, ok := a.g.info.number(key)
	if !ok || n < lo || n > hi {
		a.miss(fmt.Errorf("vmcoreinfo has no usable %s", key))
		return uint64(lo)
	}
	return uint64(n)
}

// word is the number of the word at which a member of struct page starts.
func (a *asker) word(key string) uint8 {
	n := a.number("OFFSET(page."+key+")", 0, descSize-8)
	if n%8 != 0 {
		a.miss(fmt.Errorf("page.%s is at %d", key, n))
	}
	return uint8(n/8) & 7
}

// half is the word, and the shift in it, of a member of struct page of 32 bits.
func (a *asker) half(key string) (word, shift uint8) {
	n := a.number("OFFSET(page."+key+")", 0, descSize-4)
	if n%4 != 0 {
		a.miss(fmt.Errorf("page.%s is at %d", key, n))
	}
	return uint8(n/8) & 7, uint8(n % 8 * 8)
}

// field is a member of a structure of at least size bytes.
func (a *asker) field(name, path string, size uint64) field {
	f, err := a.g.types.field(name, path)
	if err == nil && f.size < size {
		err = fmt.Errorf("field %s of %s has %d bytes: want %d", path, name, f.size, size)
	}
	if err != nil {
		a.miss(err)
	}
	return f
}

// flag is the mask of a page flag, 0 if the kernel does not have it.
func (a *asker) flag(name string) uint64 {
	if n, ok := a.g.info.number("NUMBER(" + name + ")"); ok && n >= 0 && n < 64 {
		return 1 << n
	}
	if n, err := a.g.types.enum("pageflags", name); err == nil && n >= 0 && n < 64 {
		return 1 << n
	}
	return 0
}

func (a *asker) mustFlag(name string) uint64 {
	m := a.flag(name)
	if m == 0 {
		a.miss(fmt.Errorf("there is no page flag %s", name))
	}
	return m
}

// learnLayout finds out how this kernel describes its pages.
func (g *Guest) learnLayout() error {
	a := &asker{g: g}
	l := &g.layout
	if n := a.number("SIZE(page)", 1, 1<<20); n != descSize {
		return fmt.Errorf("page descriptors of %d bytes: only %d is supported", n, descSize)
	}
	l.flags, l.mapping, l.private, l.lru = a.word("flags"), a.word("mapping"), a.word("private"),
		a.word("lru")
	if _, ok := g.info.number("OFFSET(page.compound_info)"); ok { // 7.x
		l.head = a.word("compound_info")
	} else {
		l.head = a.word("compound_head")
	}
	var ref uint8
	l.counts, l.mapShift = a.half("_mapcount")
	ref, l.refShift = a.half("_refcount")
	if ref != l.counts {
		return errors.New("_mapcount and _refcount are not side by side")
	}

	l.lruBit, l.reserved, l.swapbacked = a.mustFlag("PG_lru"), a.mustFlag("PG_reserved"),
		a.mustFlag("PG_swapbacked")
	l.headBit = a.number("NUMBER(PG_head_mask)", 1, 1<<62)
	l.active, l.dirty = a.mustFlag("PG_active"), a.mustFlag("PG_dirty")|a.mustFlag("PG_writeback")
	l.workingset, l.hwpoison, l.reported = a.flag("PG_workingset"), a.flag("PG_hwpoison"),
		a.flag("PG_reported")
	n, err := g.types.enum("pageflags", "__NR_PAGEFLAGS")
	if err != nil || n < 1 || n > 63 {
		a.miss(errors.New("the number of page flags is not known"))
	}
	l.allFlags = 1<<(n&63) - 1
	g.learnPageTypes(a)

	bits := a.number("NUMBER(SECTION_SIZE_BITS)", 24, 30)
	l.sectionPages = 1 << (bits - 12)
	l.sectionSize = a.number("SIZE(mem_section)", 8, 4096)
	l.perRoot = units.PageSize / l.sectionSize
	if l.perRoot&(l.perRoot-1) != 0 {
		a.miss(errors.New("sections do not fill a page"))
	}
	l.roots = a.number("LENGTH(mem_section)", 1, 1<<24)
	l.mapOffset = a.number("OFFSET(mem_section.section_mem_map)", 0, int64(l.sectionSize)-8)
	var ok bool
	if l.sectionTable, ok = g.info.symbol("mem_section"); !ok {
		a.miss(
			errors.New("vmcoreinfo lacks mem_section: build the kernel with " +
				"CONFIG_SPARSEMEM_EXTREME"))
	}

	l.zoneSize = a.number("SIZE(zone)", 64, 1<<16)
	zones := a.field("pglist_data", "node_zones", 8)
	l.nodeZones, l.zoneCount = zones.offset, min(zones.count, 16)
	if zones.elem() != l.zoneSize {
		a.miss(errors.New("vmcoreinfo and btf disagree on struct zone"))
	}
	l.freeArea = a.number("OFFSET(zone.free_area)", 0, int64(l.zoneSize))
	l.areaSize = a.number("SIZE(free_area)", 16, 4096)
	l.orders = a.number("LENGTH(zone.free_area)", 1, 20)
	l.lists = a.number("LENGTH(free_area.free_list)", 1, 64)
	l.nrFree = a.field("free_area", "nr_free", 8).offset
	if l.freeArea+l.orders*l.areaSize > l.zoneSize || l.lists*16 > l.areaSize ||
		l.nrFree+8 > l.areaSize {
		a.miss(errors.New("free lists do not fit into struct zone"))
	}
	lock := a.field("zone", "lock", 4)
	if lock.size != 4 {
		a.miss(
			fmt.Errorf("a spin lock of %d bytes: real-time kernels and those that debug locks "+
				"are not supported", lock.size))
	}
	l.zoneLock = lock.offset
	l.zoneStart, l.zoneSpan = a.field("zone", "zone_start_pfn", 8).offset, a.field("zone",
		"spanned_pages", 8).offset
	l.zoneManaged = a.field("zone", "managed_pages", 8).offset
	for _, at := range []uint64{l.zoneLock, l.zoneStart, l.zoneSpan, l.zoneManaged} {
		if at+8 > l.zoneSize {
			a.miss(errors.New("members lie outside struct zone"))
		}
	}
	if l.nodeData, ok = g.info.symbol("node_data"); !ok {
		a.miss(
			errors.New("vmcoreinfo lacks node_data: build the kernel with CONFIG_NUMA"))
	}
	l.nodes = a.number("LENGTH(node_data)", 1, 1024)
	if len(a.errs) > 0 {
		return errors.Join(a.errs...)
	}
	g.learnPerCPU()
	return nil
}

// learnPageTypes finds the values by which _mapcount tells what a page is.
func (g *Guest) learnPageTypes(a *asker) {
	l := &g.layout
	l.hugetlbDtor = -1
	l.buddy = uint32(a.number("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", -1<<31, 1<<32-1))
	offline := uint32(a.number("NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)", -1<<31, 1<<32-1))
	if l.byteTypes = l.buddy&0xffffff == 0; l.byteTypes {
		for name, kind := range map[string]pageclass.Kind{
			"PGTY_offline": pageclass.Offline, "PGTY_table": pageclass.UserPageTable,
			"PGTY_guard":   pageclass.KernelOther,
			"PGTY_hugetlb": pageclass.Hugetlb, "PGTY_slab": pageclass.Slab,
			"PGTY_zsmalloc":   pageclass.KernelOther,
			"PGTY_unaccepted": pageclass.Offline, "PGTY_large_kmalloc": pageclass.KernelOther,
		} {
			if n, err := g.types.enum("pagetype", name); err == nil && n >= 0xf0 && n < 0xff {
				l.typeBytes[n] = kind
			}
		}
		l.typeBytes[l.buddy>>24] = pageclass.FreeBuddy
		l.typeBytes[offline>>24] = pageclass.Offline
		if l.buddy>>24 < 0x80 || l.buddy>>24 == 0xff || offline>>24 == l.buddy>>24 {
			a.miss(errors.New("the type of free pages makes no sense"))
		}
		return
	}
	l.slab = a.mustFlag("PG_slab")
	l.typeWords = [3]uint32{offline, 0, 0}
	if n, err := g.types.enum("pagetype", "PG_table"); err == nil { // 6.10, 6.11
		l.typeWords[1] = ^uint32(n)
	} else if _, err := g.types.field("page", "memcg_data"); err == nil {
		l.typeWords[1], l.typeWords[2] = ^uint32(0x200), ^uint32(0x400)
	} else { // before 5.11 there was one more type
		l.typeWords[1], l.typeWords[2] = ^uint32(0x400), ^uint32(0x800)
	}
	if int32(l.buddy) >= -1 || offline == l.buddy {
		a.miss(errors.New("the type of free pages makes no sense"))
	}
	dtor, ok1 := g.info.number("NUMBER(HUGETLB_PAGE_DTOR)")
	at, ok2 := g.info.number("OFFSET(page.compound_dtor)")
	if ok1 && ok2 && dtor >= 0 && dtor < 256 && at >= 0 && at < descSize {
		l.hugetlbDtor, l.dtorWord, l.dtorShift = int16(dtor), uint8(at/8)&7, uint8(at%8*8)
	}
}

// learnPerCPU finds the per-CPU lists of free pages. Without, they are not looked at.
func (g *Guest) learnPerCPU() {
	l := &g.layout
	set, err1 := g.types.field("zone", "per_cpu_pageset")
	if err1 != nil || set.size != 8 || set.offset+8 > l.zoneSize {
		return
	}
	l.zonePCP = set.offset
	size, err1 := g.types.size("per_cpu_pages")
	lock, err2 := g.types.field("per_cpu_pages", "lock") // from 6.0
	count, err3 := g.types.field("per_cpu_pages", "count")
	lists, err4 := g.types.field("per_cpu_pages", "lists")
	types, err5 := g.types.enum("migratetype", "MIGRATE_PCPTYPES")
	offsets, ok1 := g.symbol("__per_cpu_offset")
	mask, ok2 := g.symbol("__cpu_possible_mask")
	ids, ok3 := g.symbol("nr_cpu_ids")
	if errors.Join(err1, err2, err3, err4, err5) != nil || !ok1 || !ok2 || !ok3 {
		return
	}
	if size > units.PageSize || lock.size != 4 || count.size != 4 || lists.elem() != 16 ||
		types < 1 || types > 8 || lists.count > 64 ||
		lock.offset+4 > size || count.offset+4 > size || lists.offset+lists.size > size {
		return
	}
	n, err := g.readU32(ids)
	if err != nil || n == 0 || n > maxCPUs {
		return
	}
	bitmap := make([]byte, (n+63)/64*8)
	if g.read(bitmap, mask) != nil {
		return
	}
	for cpu := range n {
		if bitmap[cpu/8]>>(cpu%8)&1 != 0 {
			l.cpus = append(l.cpus, cpu)
		}
	}
	l.offsets = offsets
	p := &l.pcp
	p.ok, p.size, p.lock, p.count, p.lists, p.n, p.types = true, size, lock.offset, count.offset,
		lists.offset, lists.count, uint64(types)
}
