package linux

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// ram is a guest's memory that a test may change.
type ram struct {
	extents []Range
	data    []byte // of all extents, one after another
	cpus    []CPU
	reading func() // called before each read, if it is not nil
}

func (r *ram) Extents() []Range {
	if r.extents == nil {
		r.extents = []Range{{0, uint64(len(r.data))}}
	}
	return r.extents
}

// at is the memory from addr to the end of its extent.
func (r *ram) at(addr uint64) []byte {
	sum := uint64(0)
	for _, e := range r.Extents() {
		if addr >= e.Addr && addr-e.Addr < e.Len {
			return r.data[sum+addr-e.Addr : sum+e.Len]
		}
		sum += e.Len
	}
	return nil
}

func (r *ram) ReadRanges(dst []byte, ranges []Range) error {
	if r.reading != nil {
		r.reading()
	}
	for _, x := range ranges {
		if inRAM(r.Extents(), x) < 0 {
			return errNotRAM(x)
		}
		copy(dst[:x.Len], r.at(x.Addr))
		dst = dst[x.Len:]
	}
	return nil
}

func (r *ram) Populated(addr, n uint64, dst []uint64) error {
	clear(dst)
	for i := range n {
		dst[i/64] |= 1 << (i % 64)
	}
	return nil
}

func (r *ram) CPUs(context.Context) ([]CPU, error) { return r.cpus, nil }

// recorded copies all memory of a stopped guest.
func recordMemory(t testing.TB, m *machine) *ram {
	t.Helper()
	r := &ram{}
	var err error
	if r.cpus, err = m.CPUs(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, e := range m.Extents() {
		b := make([]byte, e.Len)
		if err := readPhys(m, b, e.Addr); err != nil {
			t.Fatal(err)
		}
		r.extents = append(r.extents, e)
		r.data = append(r.data, b...)
	}
	return r
}

// patient is a recorded guest, and how to break it and put it together again.
type patient struct {
	*ram
	*Guest
	t     testing.TB
	clean []pageclass.Page
	undo  []func()
}

// recorded is the memory of one healthy guest. Tests have copies of it.
var recorded *ram

// newPatient returns a guest that no other test breaks.
func newPatient(t testing.TB) *patient {
	if recorded == nil {
		recorded = recordHealthy(t)
	}
	r := *recorded
	r.data = bytes.Clone(r.data)
	p := &patient{ram: &r, t: t}
	result := p.attach(t)
	p.clean = append(p.clean, result.Pages...)
	return p
}

// attach makes the survey of a patient that is healthy.
func (p *patient) attach(t testing.TB) *Result {
	var err error
	if p.Guest, err = Attach(t.Context(), p.ram); err != nil {
		t.Fatal(err)
	}
	r, err := p.Survey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// recordHealthy copies a guest at a moment at which nothing spoils a survey.
func recordHealthy(t testing.TB) *ram {
	m := boot(t, spec{kernel: kernels(t)[0], mib: 192, cpus: 2})
	for range 10 {
		m.stop(t)
		p := &patient{ram: recordMemory(t, m), t: t}
		r := p.attach(t)
		if r.Skippable >= 1000 && len(r.Notes) == 0 {
			m.Kill(t)
			return p.ram
		}
		// A guest that was stopped while it held a lock of its free pages has a note of that.
		t.Logf("%d skippable pages; notes %q", r.Skippable, r.Notes)
		m.cont(t)
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("an unbroken guest has notes, or few skippable pages, at each of ten moments")
	return nil
}

func (m *machine) Kill(t testing.TB) {
	if err := m.Quit(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// phys is the place of a kernel address.
func (p *patient) phys(va uint64) []byte {
	p.t.Helper()
	addr, _, err := p.space.translate(va)
	if err != nil {
		p.t.Fatal(err)
	}
	return p.at(addr)
}

func (p *patient) set(b []byte, with ...byte) {
	old := bytes.Clone(b[:len(with)])
	p.undo = append(p.undo, func() { copy(b, old) })
	copy(b, with)
}

func (p *patient) set64(b []byte, v uint64) {
	p.set(b, binary.LittleEndian.AppendUint64(nil, v)...)
}
func (p *patient) set32(b []byte, v uint32) {
	p.set(b, binary.LittleEndian.AppendUint32(nil, v)...)
}

// word is word w of the descriptor of a page.
func (p *patient) word(pfn uint64, w uint8) []byte {
	return p.phys(p.pages.vmemmap + pfn*descSize + uint64(w)*8)
}

func (p *patient) descAddr(pfn uint64) uint64 { return p.pages.vmemmap + pfn*descSize }

func (p *patient) heal() {
	for i := len(p.undo) - 1; i >= 0; i-- {
		p.undo[i]()
	}
	p.undo = nil
}

// survey runs a survey of the broken guest with g. Whatever it says, no page may be
// skippable that was not in the healthy guest.
func (p *patient) survey(g *Guest) *Result {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
	defer cancel()
	r, err := g.Survey(ctx)
	if ctx.Err() != nil {
		p.t.Fatal("the survey hangs")
	}
	if err != nil {
		return nil
	}
	for i, page := range r.Pages {
		if page.Flags&pageclass.Skippable != 0 &&
			(i >= len(p.clean) || p.clean[i].Flags&pageclass.Skippable == 0) {
			p.t.Fatalf("page %#x became skippable: it was %v", i, p.clean[i])
		}
	}
	return r
}

// zonesWith returns the addresses of the zones that have free blocks.
func (p *patient) zonesWith(t testing.TB) (zones []uint64) {
	node, err := p.readU64(p.layout.nodeData)
	if err != nil {
		t.Fatal(err)
	}
	for i := range p.layout.zoneCount {
		at := node + p.layout.nodeZones + i*p.layout.zoneSize
		if n, err := p.readU64(at + p.layout.zoneManaged); err == nil && n > 0 {
			zones = append(zones, at)
		}
	}
	if len(zones) == 0 {
		t.Fatal("no zones")
	}
	return zones
}

// firstBlock returns a list of free blocks with at least two: the address of its head, its order,
// and the first two blocks' pages.
func (p *patient) firstBlocks(t testing.TB) (zone, head, order, a, b uint64) {
	for _, z := range p.zonesWith(t) {
		for order := range p.layout.orders {
			for list := range p.layout.lists {
				head := z + p.layout.freeArea + order*p.layout.areaSize + list*16
				var page [3]uint64
				at := head
				for i := range page {
					next, err := p.readU64(at)
					if err != nil {
						t.Fatal(err)
					}
					page[i], at = next, next
				}
				if page[0] != head && page[1] != head && page[2] != head {
					pfn := func(at uint64) uint64 {
						return (at - uint64(p.layout.lru)*8 - p.pages.vmemmap) / descSize
					}
					return z, head, order, pfn(page[0]), pfn(page[1])
				}
			}
		}
	}
	t.Fatal("no list with three blocks")
	return
}

func TestHostileStructures(t *testing.T) {
	p := newPatient(t)
	l := &p.layout
	zone, head, order, a, b := p.firstBlocks(t)
	area := zone + l.freeArea + order*l.areaSize
	lruOf := func(pfn uint64) uint64 { return p.descAddr(pfn) + uint64(l.lru)*8 }
	var used uint64 // a page in use, alone
	for i, page := range p.clean {
		if page.Kind == pageclass.Anon && i > 4096 && i%2 == 1 {
			used = uint64(i)
		}
	}
	looksFree := func(pfn, order uint64) {
		p.set64(p.word(pfn, l.flags), 0)
		p.set64(p.word(pfn, l.mapping), 0)
		p.set64(p.word(pfn, l.private), order)
		p.set64(p.word(pfn, l.counts), uint64(l.buddy)<<l.mapShift)
		p.set64(p.word(pfn, l.head), 0)
	}
	start, span := u64(p.phys(zone+l.zoneStart)), u64(p.phys(zone+l.zoneSpan))
	// trust says whether the zone's free pages may still be skippable.
	for name, test := range map[string]struct {
		break_ func()
		trust  bool
	}{
		"block leads to itself":          {func() { p.set64(p.word(a, l.lru), lruOf(a)) }, false},
		"two blocks in a circle":         {func() { p.set64(p.word(b, l.lru), lruOf(a)) }, false},
		"list is empty":                  {func() { p.set64(p.phys(head), head) }, false},
		"list leads nowhere":             {func() { p.set64(p.phys(head), 0) }, false},
		"list leads out of descriptors":  {func() { p.set64(p.phys(head), head+8) }, false},
		"list leads between descriptors": {func() { p.set64(p.phys(head), lruOf(a)+8) }, false},
		"list leads to the last page":    {func() { p.set64(p.phys(head), lruOf(1<<40)) }, false},
		"broken backwards":               {func() { p.set64(p.word(b, l.lru+1), lruOf(b)) }, false},
		"other end":                      {func() { p.set64(p.phys(head)[8:], lruOf(a)) }, false},
		"one more counted": {func() {
			n := p.phys(area + l.nrFree)
			p.set64(n, u64(n)+1)
		}, false},
		"endless count": {func() { p.set64(p.phys(area+l.nrFree), ^uint64(0)) }, false},
		"lock held":     {func() { p.set32(p.phys(zone+l.zoneLock), 1) }, false},
		"other order":   {func() { p.set64(p.word(a, l.private), order+1) }, false},
		"endless order": {func() { p.set64(p.word(a, l.private), ^uint64(0)) }, false},
		"order 64":      {func() { p.set64(p.word(a, l.private), 64) }, false},
		"has a reference": {func() {
			p.set64(p.word(a, l.counts), uint64(l.buddy)<<l.mapShift|1<<l.refShift)
		}, false},
		"has a flag": {func() { p.set64(p.word(a, l.flags), l.lruBit) }, false},
		"not free": {func() { p.set64(p.word(a, l.counts), 0xffffffff<<l.mapShift) },
			false},
		"zone without end":     {func() { p.set64(p.phys(zone+l.zoneSpan), ^uint64(0)) }, true},
		"zone elsewhere":       {func() { p.set64(p.phys(zone+l.zoneStart), 1<<50) }, false},
		"zone of one page":     {func() { p.set64(p.phys(zone+l.zoneSpan), 1) }, false},
		"used page looks free": {func() { looksFree(used, 0) }, true},
		"used page looks free, on list": {func() {
			looksFree(used, order)
			p.set64(p.word(used, l.lru), lruOf(a))
			p.set64(p.word(used, l.lru+1), head)
			p.set64(p.word(a, l.lru+1), lruOf(used))
			p.set64(p.phys(head), lruOf(used))
		}, false},
		"tail of itself": {func() { p.set64(p.word(used, l.head), p.descAddr(used)+1) },
			true},
		"tail of a later page": {func() { p.set64(p.word(used, l.head), p.descAddr(used+1)+1) },
			true},
		"tail of a free page": {func() { p.set64(p.word(used, l.head), p.descAddr(a)+1) }, true},
		"tail of nothing":     {func() { p.set64(p.word(used, l.head), 1) }, true},
		"tail, all ones":      {func() { p.set64(p.word(used, l.head), ^uint64(0)) }, true},
		"free pages are poisoned": {func() {
			for i, page := range p.clean {
				if page.Flags&pageclass.Skippable != 0 {
					p.set(p.at(uint64(i)*units.PageSize),
						bytes.Repeat([]byte{0xaa}, units.PageSize)...)
				}
			}
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			defer p.heal()
			p.t = t
			test.break_()
			r := p.survey(p.Guest)
			if r == nil {
				t.Fatal("survey failed")
			}
			skipped := 0
			for i := start; i < start+span; i++ {
				if r.Pages[i].Flags&pageclass.Skippable != 0 {
					skipped++
				}
			}
			if test.trust != (skipped > 0) ||
				!test.trust && len(r.Notes) == 0 && name != "zone elsewhere" {
				t.Errorf("%d pages skippable, notes %q", skipped, r.Notes)
			}
			if r.Pages[used].Flags&pageclass.Skippable != 0 {
				t.Error("a page in use is skippable")
			}
		})
	}
	p.t = t
	if r := p.survey(p.Guest); r == nil || r.Skippable == 0 {
		t.Fatal("the guest did not recover: the test is broken")
	}
}

// A survey that is called off, at whichever of its reads, has a result or says why it has none.
func TestCalledOff(t *testing.T) {
	p := newPatient(t)
	for last, done := 0, false; !done; last++ {
		ctx, cancel := context.WithCancel(t.Context())
		reads := 0
		p.reading = func() {
			if reads++; reads == last {
				cancel()
			}
		}
		if r, err := p.Survey(ctx); (r == nil) == (err == nil) {
			t.Errorf("called off at read %d: %v, %v", last, r, err)
		}
		done = last > reads
		cancel()
	}
}

// Where another kernel runs, what vacate reads makes no sense. The error then says that.
func TestOverwrittenByAnother(t *testing.T) {
	p := newPatient(t)
	sections, ok := p.symbol("mem_section")
	if !ok {
		t.Fatal("no mem_section")
	}
	p.set64(p.phys(sections), 0xffff800000000000) // mapped nowhere
	_, err := p.Survey(t.Context())
	if err == nil || errors.Is(err, ErrChanged) {
		t.Errorf("a broken table in the same kernel: %v", err)
	}
	cpus := p.cpus
	p.cpus = []CPU{{}, {}} // as a reset leaves them
	if _, err := p.Survey(t.Context()); !errors.Is(err, ErrChanged) {
		t.Errorf("a broken table after a reset: %v", err)
	}
	p.cpus = cpus
	p.heal()
	if _, err := p.Survey(t.Context()); err != nil {
		t.Error(err)
	}
}

// Per-CPU lists: a fault there must cost only these.
func TestHostilePerCPULists(t *testing.T) {
	p := newPatient(t)
	l := &p.layout
	if !l.pcp.ok {
		t.Skip("this kernel's per-CPU lists have no lock")
	}
	set := func() (at uint64) { // the one with the most pages
		most := uint32(0)
		for _, z := range p.zones {
			for _, off := range p.cpuOffsets {
				if n := u32(p.phys(z.pcp + off + l.pcp.count)); n > most {
					at, most = z.pcp+off, n
				}
			}
		}
		return at
	}()
	if set == 0 {
		t.Skip("no pages on per-CPU lists")
	}
	list := uint64(0)
	for i := range l.pcp.n {
		if at := set + l.pcp.lists + i*16; u64(p.phys(at)) != at {
			list = at
			break
		}
	}
	first := u64(p.phys(list))
	for name, break_ := range map[string]func(){
		"lock held": func() { p.set32(p.phys(set+l.pcp.lock), 1) },
		"one more":  func() { n := p.phys(set + l.pcp.count); p.set32(n, u32(n)+1) },
		"minus one": func() { p.set32(p.phys(set+l.pcp.count), ^uint32(0)) },
		"circle":    func() { p.set64(p.phys(first), first) },
		"broken":    func() { p.set64(p.phys(first+8), first) },
		"nowhere":   func() { p.set64(p.phys(list), 0) },
		"page in use": func() {
			p.set64(p.phys(first-uint64(l.lru)*8+uint64(l.counts)*8), 1<<l.refShift)
		},
		"page has flag": func() {
			p.set64(p.phys(first-uint64(l.lru)*8+uint64(l.flags)*8), l.lruBit)
		},
	} {
		t.Run(name, func(t *testing.T) {
			defer p.heal()
			p.t = t
			break_()
			r := p.survey(p.Guest)
			if r == nil || len(r.Notes) == 0 || r.Skippable == 0 {
				t.Errorf("got %v", r)
			}
			pfn := (first - uint64(l.lru)*8 - p.pages.vmemmap) / descSize
			if r.Pages[pfn].Flags&pageclass.Skippable != 0 {
				t.Error("a page of the broken list is skippable")
			}
		})
	}
}

// Random damage to all that is read, before and after attaching.
func TestHostileNoise(t *testing.T) {
	p := newPatient(t)
	l := &p.layout
	rng := rand.New(rand.NewPCG(1, 2))
	node, err := p.readU64(l.nodeData)
	if err != nil {
		t.Fatal(err)
	}
	root, err := p.readU64(l.sectionTable)
	if err != nil {
		t.Fatal(err)
	}
	uts, _ := p.info.symbol("init_uts_ns")
	offsets, _ := p.symbol("kallsyms_offsets")
	if offsets == 0 {
		offsets, _ = p.info.symbol("kallsyms_offsets")
	}
	btf, _ := p.kallsym("__start_BTF")
	names, _ := p.info.symbol("kallsyms_names")
	tables := make([]uint64, 0, 64)
	p.space.forget()
	if _, err := p.Survey(t.Context()); err != nil {
		t.Fatal(err)
	}
	for addr := range p.space.tables {
		tables = append(tables, addr)
	}
	value := func() uint64 {
		switch rng.IntN(8) {
		case 0:
			return 0
		case 1:
			return ^uint64(0)
		case 2:
			return p.descAddr(rng.Uint64N(uint64(len(p.clean)))) + uint64(l.lru)*8
		case 3:
			return p.descAddr(rng.Uint64N(uint64(len(p.clean)))) + 1
		case 4:
			return 1 << rng.UintN(64)
		case 5:
			return rng.Uint64N(1024)
		case 6:
			return tables[rng.IntN(len(tables))] | 0x63
		}
		return rng.Uint64()
	}
	// Where an address is, as far as the damage so far leaves it somewhere.
	place := func(va uint64) []byte {
		addr, _, err := p.space.translate(va)
		if err != nil {
			return nil
		}
		return p.at(addr)
	}
	damage := func() {
		for range 1 + rng.IntN(32) {
			var b []byte
			switch rng.IntN(10) {
			case 0:
				b = p.at(p.noteAddr)[rng.Uint64N(4096)&^7:]
			case 1:
				b = place(root + rng.Uint64N(4096)&^7)
			case 2:
				b = p.at(tables[rng.IntN(len(tables))])[rng.Uint64N(4096)&^7:]
			case 3:
				b = place(node + rng.Uint64N(l.nodeZones+l.zoneSize*l.zoneCount)&^7)
			case 4:
				b = place(uts + rng.Uint64N(512)&^7)
			case 5:
				b = place((offsets|names)&^7 + rng.Uint64N(1<<16)&^7)
			case 6:
				b = place(btf&^7 + rng.Uint64N(3<<20)&^7)
			default:
				b = place(p.descAddr(rng.Uint64N(uint64(len(p.clean)))) + rng.Uint64N(descSize)&^7)
			}
			if len(b) < 8 {
				continue
			}
			if rng.IntN(2) == 0 {
				p.set(b, b[0]^1<<rng.UintN(8))
			} else {
				p.set64(b, value())
			}
		}
	}
	surveyed, attached := 0, 0
	for i := range 400 {
		p.space.forget() // or the damage would be done by broken tables
		damage()
		if p.survey(p.Guest) != nil {
			surveyed++
		}
		if i%8 == 0 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			if g, err := Attach(ctx, p.ram); err == nil {
				attached++
				p.survey(g)
			}
			if ctx.Err() != nil {
				t.Fatal("attaching hangs")
			}
			cancel()
		}
		p.heal()
	}
	t.Logf("of 400 damaged guests %d could be surveyed; of 50 %d attached", surveyed, attached)
	p.space.forget()
	if r := p.survey(p.Guest); r == nil || r.Skippable == 0 {
		t.Fatal("the guest did not recover: the test is broken")
	}
}
