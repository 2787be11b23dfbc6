package linux

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"

	"golang.org/x/sys/unix"
)

// made is the memory of a guest that never ran: page descriptors, lists of free blocks, tasks and
// page tables as Linux 6.1 has them, and nothing else. The memory is sparse, so a large guest takes
// little of the host's.
type made struct {
	data  []byte
	words []uint64
	next  uint64 // the next guest-physical address that nothing is at
	root  uint64 // of the kernel's page tables
	descs uint64 // guest-physical, of the descriptors

	lay    layout
	tasks  taskLayout
	ends   [11][6]uint64 // the last block of each list, plus 1
	counts [11]uint64
	zone   uint64
	tables uint64 // the next free page for page tables of processes
}

const (
	madeDirect  = 0xffff888000000000 // all memory is mapped here
	madeVmemmap = 0xffffea0000000000
	madeRelease = "6.1.0-made"
)

func (m *made) Extents() []Range { return []Range{{0, uint64(len(m.data))}} }

// ReadRanges reads as the engine reads a QEMU: by the kernel.
func (m *made) ReadRanges(dst []byte, ranges []Range) error {
	var remote []unix.RemoteIovec
	for i, r := range ranges {
		if inRAM(m.Extents(), r) < 0 {
			return errNotRAM(r)
		}
		remote = append(remote, unix.RemoteIovec{Base: uintptr(unsafe.Pointer(&m.data[r.Addr])),
			Len: int(r.Len)})
		if len(remote) == 1024 || i == len(ranges)-1 {
			n := 0
			for _, v := range remote {
				n += v.Len
			}
			got, err := unix.ProcessVMReadv(os.Getpid(),
				[]unix.Iovec{{Base: unsafe.SliceData(dst), Len: uint64(n)}}, remote, 0)
			if err != nil || got != n {
				return fmt.Errorf("read %d bytes of %d: %w", got, n, err)
			}
			dst, remote = dst[n:], remote[:0]
		}
	}
	return nil
}

func (m *made) Populated(_, _ uint64, dst []uint64) error {
	clear(dst)
	return nil
}

func (m *made) CPUs(context.Context) ([]CPU, error) {
	return []CPU{{CR0: cr0Paging, CR3: m.root}}, nil
}

// page returns the address of new, empty pages.
func (m *made) page(n uint64) uint64 {
	at := m.next
	m.next += n * units.PageSize
	return at
}

func (m *made) set(addr, v uint64) { m.words[addr/8] = v }

// desc sets the descriptor of a page.
func (m *made) desc(pfn, flags, head, mapping, private, mapcount, refcount uint64) {
	copy(m.words[m.descs/8+pfn*8:], []uint64{flags, head, 0, mapping, 0, private,
		mapcount&0xffffffff | refcount<<32, 0})
}

// The words of a descriptor of Linux 6.1.
func madeLayout() layout {
	return layout{flags: 0, head: 1, lru: 1, mapping: 3, private: 5, counts: 6, mapShift: 0,
		refShift: 32, lruBit: 1 << 4, headBit: 1 << 16, slab: 1 << 9, hwpoison: 1 << 22,
		reserved: 1 << 12, swapbacked: 1 << 19, active: 1 << 5, dirty: 1 << 3, allFlags: 1<<24 - 1,
		buddy: 0xffffff7f, typeWords: [3]uint32{0xfffffeff, 0xfffffdff, 0xfffffbff},
		hugetlbDtor: -1, sectionPages: 1 << 15, perRoot: 256, sectionSize: 16, roots: 1 << 17,
		zoneSize: 1536, zoneCount: 1, freeArea: 256, areaSize: 104, nrFree: 96, orders: 11,
		lists: 6, zoneLock: 200, zoneStart: 128, zoneManaged: 136, zoneSpan: 144, zonePCP: 208,
		nodes: 1}
}

func madeTasks() taskLayout {
	at := func(offset, size uint64) field { return field{offset: offset, size: size, count: 1} }
	return taskLayout{size: 128, comm: at(0, 16), tasks: at(16, 16), thread: at(32, 16),
		tgid: at(48, 4), pid: at(52, 4), onCPU: at(56, 4), stack: at(64, 8), mm: at(72, 8),
		signal: at(80, 8), execStart: at(88, 8), runtime: at(96, 8), util: at(104, 8),
		arrival: at(112, 8), queue: at(120, 8), threads: at(0, 16), pastRuntime: at(16, 8),
		queueRQ: at(0, 8), clock: at(0, 8), clockTask: at(8, 8), pgd: at(0, 8), stackSize: 16 << 10}
}

const entry = present | canWrite | 4 | accessed

// makeGuest makes up a guest's memory. 30 % of its memory is anonymous and in huge pages, 10 % in
// large free blocks. The rest is in blocks of 1 to 32 pages: 35 % anonymous, 45 % of files, half of
// them mapped, 15 % free, 5 % the kernel's. In a shredded guest each block of the rest is one page,
// and there is nothing else.
func makeGuest(t testing.TB, size uint64, shredded bool) *made {
	t.Helper()
	data, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(data) })
	m := &made{data: data, words: unsafe.Slice((*uint64)(unsafe.Pointer(&data[0])), size/8),
		next: 1 << 20, lay: madeLayout(), tasks: madeTasks()}
	pages := size / units.PageSize
	m.makeKernel(pages)
	const chunk = 4 << 20
	m.next = (m.next + chunk - 1) &^ (chunk - 1)
	first := m.next / units.PageSize
	// Room for page tables: twice those of all pages, and some that each process has beside.
	count := 100 + 8*int(size>>30)
	m.tables = m.page(pages/256 + uint64(count)*6)
	processes := m.makeTasks(count)
	m.next = (m.next + chunk - 1) &^ (chunk - 1)
	for pfn := range m.next / units.PageSize {
		if pfn < first {
			m.desc(pfn, m.lay.reserved, 0, 0, 0, ^uint64(0), 1)
		} else {
			m.desc(pfn, 0, 0, 0, 0, uint64(m.lay.typeWords[1]), 1)
		}
	}
	m.makeUse(m.next/units.PageSize, pages, shredded, processes)
	for order, lists := range m.ends {
		for list, last := range lists {
			m.link(uint64(order), uint64(list), last, 0)
		}
		m.set(m.zone+m.lay.freeArea+uint64(order)*m.lay.areaSize+m.lay.nrFree, m.counts[order])
	}
	return m
}

// makeKernel makes the kernel's page tables, its table of sections and its one zone.
func (m *made) makeKernel(pages uint64) {
	m.root = m.page(1)
	direct, vmemmap := m.page(1), m.page(1)
	m.set(m.root+273*8, direct|entry)
	m.set(m.root+468*8, vmemmap|entry)
	for i := range uint64(512) {
		m.set(direct+i*8, i<<30|entry|largePage)
	}
	size := pages * descSize
	dirs := make([]uint64, (size+1<<30-1)>>30)
	for i := range dirs {
		dirs[i] = m.page(1)
		m.set(vmemmap+uint64(i)*8, dirs[i]|entry)
	}
	roots := m.page((m.lay.roots*8 + units.PageSize - 1) / units.PageSize)
	m.lay.sectionTable = madeDirect + roots
	for s := range (pages + m.lay.sectionPages - 1) / m.lay.sectionPages {
		root := roots + s/m.lay.perRoot*8
		if m.words[root/8] == 0 {
			m.set(root, madeDirect+m.page(1))
		}
		m.set(m.words[root/8]-madeDirect+s%m.lay.perRoot*16, madeVmemmap|7)
	}
	node := m.page(1)
	m.zone = node
	m.lay.nodeData = madeDirect + m.page(1)
	m.set(m.lay.nodeData-madeDirect, madeDirect+node)
	m.set(m.zone+m.lay.zoneSpan, pages)
	m.set(m.zone+m.lay.zoneManaged, pages)
	m.next = (m.next + 2<<20 - 1) &^ (2<<20 - 1)
	m.descs = m.page((size + units.PageSize - 1) / units.PageSize)
	for at := uint64(0); at < size; at += 2 << 20 {
		m.set(dirs[at>>30]+at>>21%512*8, m.descs+at|entry|largePage)
	}
}

// madeProcess is a process that gets pages, one behind the other.
type madeProcess struct {
	pgd, pdpt, pd, pt uint64 // where the first is kept; tables
	va                uint64
}

// makeTasks makes processes, each with one thread.
func (m *made) makeTasks(n int) []*madeProcess {
	const each = 256 // bytes of a task, and of what belongs to it
	room := m.page(uint64(n+1)*each/units.PageSize + 2)
	queue := room
	m.set(queue, madeDirect+queue+16)
	m.set(queue+16, 1e12)
	m.set(queue+24, 1e12)
	task := func(i int) uint64 { return room + uint64(i+1)*each }
	m.tasks.initTask = madeDirect + task(0)
	list := make([]*madeProcess, n)
	for i := range n + 1 {
		at := task(i)
		signal := madeDirect + at + 128
		m.set(at+m.tasks.tasks.offset, madeDirect+task((i+1)%(n+1))+m.tasks.tasks.offset)
		m.set(at+m.tasks.thread.offset, signal)
		m.set(at+m.tasks.thread.offset+8, signal)
		m.set(at+m.tasks.tgid.offset, uint64(i)|uint64(i)<<32)
		m.set(at+m.tasks.signal.offset, signal)
		m.set(at+m.tasks.queue.offset, madeDirect+queue)
		m.set(at+m.tasks.execStart.offset, 1e12-uint64(i)*1e8)
		m.set(at+m.tasks.arrival.offset, 1e12-uint64(i)*1e8)
		m.set(at+m.tasks.util.offset, uint64(1000/(i+1)))
		if i > 0 {
			list[i-1] = &madeProcess{pgd: at + 192}
			m.set(at+m.tasks.mm.offset, madeDirect+at+192)
			m.grow(list[i-1], false)
		}
	}
	return list
}

func (m *made) table() uint64 {
	at := m.tables
	m.tables += units.PageSize
	return at
}

// grow makes sure that a process has the tables for its next address.
func (m *made) grow(p *madeProcess, huge bool) {
	const unit = 2 << 20
	if huge {
		p.va = (p.va + unit - 1) &^ (unit - 1)
	}
	if p.pdpt == 0 {
		top := m.table()
		m.set(p.pgd, madeDirect+top)
		p.pdpt = m.table()
		m.set(top, p.pdpt|entry)
	}
	if p.va%(1<<30) == 0 || p.pd == 0 {
		p.pd = m.table()
		m.set(p.pdpt+p.va>>30*8, p.pd|entry)
		p.pt = 0
	}
	if !huge && (p.va%unit == 0 || p.pt == 0) {
		p.pt = m.table()
		m.set(p.pd+p.va>>21%512*8, p.pt|entry)
	}
}

func (m *made) mapPage(p *madeProcess, pfn uint64) {
	m.grow(p, false)
	m.set(p.pt+p.va>>12%512*8, pfn<<12|entry)
	p.va += units.PageSize
}

func (m *made) mapHuge(p *madeProcess, pfn uint64) {
	m.grow(p, true)
	m.set(p.pd+p.va>>21%512*8, pfn<<12|entry|largePage)
	p.va += 2 << 20
	p.pt = 0
}

// link puts a block of free pages behind another one of its list, both plus 1; 0 is the list.
func (m *made) link(order, list, from, to uint64) {
	head := m.zone + m.lay.freeArea + order*m.lay.areaSize + list*16
	at, va := head, madeDirect+head
	if from != 0 {
		at = m.descs + (from-1)*descSize + 8
	}
	toAt := head
	if to != 0 {
		toAt, va = m.descs+(to-1)*descSize+8, madeVmemmap+(to-1)*descSize+8
	}
	m.set(at, va)
	back := madeDirect + head
	if from != 0 {
		back = madeVmemmap + (from-1)*descSize + 8
	}
	m.set(toAt+8, back)
}

// makeUse gives pages a use, from a page on that begins a block of 1,024.
func (m *made) makeUse(first, pages uint64, shredded bool, processes []*madeProcess) {
	r := rand.New(rand.NewPCG(5, 6))
	const none = ^uint64(0) & 0xffffffff
	free := func(pfn, order uint64) {
		m.desc(pfn, 0, 0, 0, order, uint64(m.lay.buddy), 0)
		for i := uint64(1); i < 1<<order; i++ {
			m.desc(pfn+i, 0, 0, 0, 0, none, 0)
		}
		list := r.Uint64N(3)
		last := &m.ends[order][list]
		m.link(order, list, *last, pfn+1)
		*last = pfn + 1
		m.counts[order]++
	}
	type block struct {
		pfn   uint32
		count uint16
	}
	var mapped []block
	anon := func(pfn, n, head uint64) {
		m.desc(pfn, m.lay.lruBit|m.lay.swapbacked|head, 0, madeDirect|1, 0, 0, 1)
		for i := uint64(1); i < n; i++ {
			if head != 0 {
				m.desc(pfn+i, 0, madeVmemmap+pfn*descSize+1, 0, 0, none, 0)
			} else {
				m.desc(pfn+i, m.lay.lruBit|m.lay.swapbacked, 0, madeDirect|1, 0, 0, 1)
			}
		}
		mapped = append(mapped, block{uint32(pfn), uint16(n)})
	}
	for at := first; at < pages; at += 1024 {
		if !shredded {
			switch n := r.IntN(10); {
			case n < 1:
				free(at, 10)
				continue
			case n < 4:
				anon(at, 512, m.lay.headBit)
				anon(at+512, 512, m.lay.headBit)
				continue
			}
		}
		for pfn := at; pfn < at+1024; {
			order := uint64(0)
			if !shredded {
				for order = r.Uint64N(6); pfn%(1<<order) != 0; {
					order--
				}
			}
			n := uint64(1) << order
			switch use := r.IntN(100); {
			case use < 15:
				free(pfn, order)
			case use < 50:
				anon(pfn, n, 0)
			case use < 95:
				for i := range n {
					m.desc(pfn+i, m.lay.lruBit, 0, madeDirect|0x1000, 0, none, 1)
				}
				if use%2 == 0 {
					mapped = append(mapped, block{uint32(pfn), uint16(n)})
				}
			default:
				for i := range n {
					m.desc(pfn+i, m.lay.slab, 0, 0, 0, none, 1)
				}
			}
			pfn += n
		}
	}
	r.Shuffle(len(mapped), func(i, j int) { mapped[i], mapped[j] = mapped[j], mapped[i] })
	for _, b := range mapped {
		p := processes[r.IntN(len(processes))]
		if b.count == 512 {
			m.mapHuge(p, uint64(b.pfn))
			continue
		}
		for i := range uint64(b.count) {
			m.mapPage(p, uint64(b.pfn)+i)
		}
	}
}

// guest attaches to the guest. It has no symbols and no types, so what Attach would learn from
// them is given.
func (m *made) guest(t testing.TB) *Guest {
	t.Helper()
	at := m.tables // nothing is behind the last table
	note := at + units.PageSize
	text := fmt.Sprintf("OSRELEASE=%s\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=%x\n", madeRelease,
		madeDirect+at)
	copy(m.data[at:], madeRelease+"\x00")
	binary.LittleEndian.PutUint32(m.data[note+4:], uint32(len(text)))
	copy(m.data[note+12:], noteName)
	copy(m.data[note+noteHeader:], text)
	info, err := parseVMCOREINFO([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	g := &Guest{mem: m, info: info, noteAddr: note, note: []byte(text),
		space: newSpace(m, m.root, 4), extra: map[string]uint64{}}
	g.layout, g.census.layout = m.lay, m.tasks
	g.nodeBuf, g.zoneBuf = make([]byte, 8), make([]byte, m.lay.zoneSize)
	if err := g.findSections(); err != nil {
		t.Fatal(err)
	}
	g.makeRoom(int(g.pages.highest))
	return g
}

func heap() int {
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int(s.HeapAlloc)
}

// A made-up guest is surveyed as a real one, and a survey takes no more than 0.5 % of the guest's
// memory while it lasts.
func TestMemoryOfASurvey(t *testing.T) {
	const size = 1 << 30
	for _, shredded := range []bool{false, true} {
		t.Run(fmt.Sprintf("shredded=%v", shredded), func(t *testing.T) {
			m := makeGuest(t, size, shredded)
			before := heap()
			g := m.guest(t)
			r, err := g.Survey(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			took := heap() - before
			t.Logf("%.1f bytes a page; %s", float64(took)/(size/4096), describe(r))
			if took > size/200 {
				t.Errorf("%d bytes for a guest of %d: want at most 0.5 %%", took, size)
			}
			if len(r.Notes) != 0 || r.Free != r.Skippable || r.Free < size/4096/10 ||
				len(r.Processes) != 108 || len(r.Sequence) < size/4096/3 {
				t.Errorf("%d free, %d skippable, %d processes, %d pages mapped, notes %q", r.Free,
					r.Skippable, len(r.Processes), len(r.Sequence), r.Notes)
			}
			if n := kinds(&r.Survey); n[pageclass.Anon] < size/4096/4 ||
				n[pageclass.File] < size/4096/5 {
				t.Errorf("kinds: %v", n)
			}
			runtime.KeepAlive(g)
		})
	}
}

// BenchmarkGrowth measures what a survey takes as the guest grows, by page.
func BenchmarkGrowth(b *testing.B) {
	for _, shredded := range []bool{false, true} {
		for _, gib := range []uint64{1, 4, 16, 64} {
			b.Run(fmt.Sprintf("shredded=%v/GiB=%d", shredded, gib), func(b *testing.B) {
				pages := float64(gib << 18)
				m := makeGuest(b, gib<<30, shredded)
				for range b.N {
					before := heap()
					began := cpuTime()
					g := m.guest(b)
					r, err := g.Survey(b.Context())
					if err != nil {
						b.Fatal(err)
					}
					b.ReportMetric(float64(cpuTime()-began)/pages, "survey-ns/page")
					b.ReportMetric(float64(heap()-before)/pages, "heap-B/page")
					b.ReportMetric(0, "ns/op")
					runtime.KeepAlive(g)
					if len(r.Notes) > 0 {
						b.Fatal(r.Notes)
					}
				}
			})
		}
	}
}

func cpuTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t); err != nil {
		panic(err)
	}
	return time.Duration(t.Nano())
}
