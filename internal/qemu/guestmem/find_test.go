package guestmem

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"vacate/internal/sys/units"

	"golang.org/x/sys/unix"
)

// A memory is a made-up process.
type memory struct {
	vmas []vma
	data map[uint64][]byte // of each mapping that has any, by its start
	read []uint64          // where it was read
}

func (p *memory) image() image {
	return image{p.vmas, func(dst []byte, at uint64) error {
		p.read = append(p.read, at)
		for _, v := range p.vmas {
			if v.start <= at && at+uint64(len(dst)) <= v.end && p.data[v.start] != nil {
				copy(dst, p.data[v.start][at-v.start:])
				return nil
			}
		}
		return unix.EFAULT
	}, func(first, n uint64, dst []uint64) error {
		for i := range n {
			for start, d := range p.data {
				if at := (first + i) * units.PageSize; start <= at && at < start+uint64(len(d)) {
					dst[i/64] |= 1 << (i % 64)
				}
			}
		}
		return nil
	}}
}

func (p *memory) put(at uint64, words ...uint64) {
	for start, d := range p.data {
		if start <= at && at < start+uint64(len(d)) {
			for i, w := range words {
				binary.LittleEndian.PutUint64(d[at-start+uint64(i*8):], w)
			}
			return
		}
	}
	panic("nowhere")
}

// A ramblock is what a struct RAMBlock is made of here.
type ramblock struct {
	at, host, used, max, page, link uint64
	name                            string
}

func (p *memory) add(b ramblock) {
	r := make([]byte, recordSize)
	binary.LittleEndian.PutUint64(r[recordHost:], b.host)
	binary.LittleEndian.PutUint64(r[recordUsed:], b.used)
	binary.LittleEndian.PutUint64(r[recordMax:], b.max)
	copy(r[recordName:], b.name)
	binary.LittleEndian.PutUint64(r[recordLink:], b.link)
	binary.LittleEndian.PutUint64(r[recordTail+16:], b.page)
	for i := 0; i < recordSize; i += 8 {
		p.put(b.at+uint64(i), binary.LittleEndian.Uint64(r[i:]))
	}
	p.put(b.link, b.at)
}

const (
	testHeap = 0x555500000000
	testData = 0x555400000000
	testRAM  = 0x7f0000000000
	testROM  = 0x7f0010000000
)

// qemu is a made-up QEMU with two blocks: RAM of 16 MiB, and a ROM of 8 KiB that may grow to 64.
func qemu() (*memory, ramblock, ramblock, []Extent) {
	p := &memory{
		vmas: []vma{
			{start: testData, end: testData + 0x1000, read: true, write: true, inode: 7,
				path: "/qemu"},
			{start: testHeap, end: testHeap + 3<<20, read: true, write: true, path: "[heap]"},
			{start: testRAM, end: testRAM + 16<<20, read: true, write: true},
			{start: testRAM + 16<<20, end: testRAM + 16<<20 + 0x1000},
			{start: testROM, end: testROM + 0x10000, read: true, write: true},
			{start: testROM + 0x10000, end: testROM + 0x11000},
		},
		data: map[uint64][]byte{testData: make([]byte, 0x1000), testHeap: make([]byte, 3<<20),
			testRAM: make([]byte, 16<<20)},
	}
	// The second lies across the border of two windows, and of two pages.
	ram := ramblock{at: testHeap + 0x1230, host: testRAM, used: 16 << 20, max: 16 << 20,
		page: units.PageSize, link: testData + 0x100, name: "pc.ram"}
	rom := ramblock{at: testHeap + 1<<20 - 64, host: testROM, used: 0x2000, max: 0x10000,
		page: units.PageSize, link: ram.at + recordLink - 8, name: "/rom@etc/acpi/tables"}
	p.add(ram)
	p.add(rom)
	return p, ram, rom, []Extent{{"pc.ram", 16 << 20, 16 << 20, units.PageSize},
		{"/rom@etc/acpi/tables", 0x2000, 0, units.PageSize}}
}

// What a heap holds may be old, somebody else's or made by a guest: nothing but the truth is taken.
func TestFindDoubts(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(p *memory, ram, rom *ramblock, want []Extent)
		err   string // "": both are found
	}{
		"nothing": {func(*memory, *ramblock, *ramblock, []Extent) {}, ""},
		"freed: another is where the list went on": {func(p *memory, _, rom *ramblock, _ []Extent) {
			p.put(rom.link, rom.at+8)
		}, "none"},
		"freed, and its memory's copy elsewhere": {func(p *memory, ram, rom *ramblock, _ []Extent) {
			old := *rom
			old.at, old.link = testHeap+0x20000, ram.at+recordLink-8
			p.add(old)
			p.put(rom.link, rom.at)
		}, ""},
		"two that are both in a list": {func(p *memory, _, rom *ramblock, _ []Extent) {
			twin := *rom
			twin.at, twin.link = testHeap+0x20000, testHeap+0x30000
			p.add(twin)
		}, "several places"},
		"another name": {func(p *memory, _, _ *ramblock, w []Extent) {
			w[1].Name = "/rom@etc/acpi/table"
		}, "none"},
		"name goes on": {func(p *memory, _, rom *ramblock, _ []Extent) {
			rom.name += "\x00x"
			p.add(*rom)
		}, "none"},
		"name without end": {func(p *memory, _, rom *ramblock, _ []Extent) {
			rom.name = strings.Repeat("x", 256)
			p.add(*rom)
		}, "none"},
		"another length": {func(_ *memory, _, _ *ramblock, w []Extent) {
			w[1].Size = 0x3000
		}, "none"},
		"another total": {func(_ *memory, _, _ *ramblock, w []Extent) {
			w[1].Total = 0x20000
		}, "none"},
		"shorter than in use": {func(p *memory, _, rom *ramblock, _ []Extent) {
			rom.max = 0x1000
			p.add(*rom)
		}, "none"},
		"larger than its place": {func(p *memory, _, rom *ramblock, _ []Extent) {
			rom.max = 0x20000
			p.add(*rom)
		}, "none"},
		"boundless": {func(p *memory, _, rom *ramblock, _ []Extent) {
			rom.max = ^uint64(0)
			p.add(*rom)
		}, "none"},
		"another page size": {func(_ *memory, _, _ *ramblock, w []Extent) {
			w[0].PageSize = 2 << 20
		}, "none"},
		"in the midst of memory": {func(p *memory, _, rom *ramblock, _ []Extent) {
			rom.host = testRAM + 0x10000
			p.add(*rom)
		}, "none"},
		"not whole pages": {func(p *memory, _, rom *ramblock, _ []Extent) {
			rom.host += 8
			p.add(*rom)
		}, "none"},
		"nowhere": {func(p *memory, _, rom *ramblock, _ []Extent) {
			rom.host = 0
			p.add(*rom)
		}, "none"},
		"unreadable": {func(p *memory, _, _ *ramblock, _ []Extent) {
			p.vmas[4].read = false
		}, "none"},
		"listed from nowhere": {func(p *memory, _, rom *ramblock, _ []Extent) {
			p.put(rom.at+recordLink, 0x1000)
		}, "none"},
		"listed from the guest's shared memory": {func(p *memory, _, rom *ramblock, _ []Extent) {
			p.vmas[2].shared = true
			rom.link = testRAM + 0x100
			p.add(*rom)
		}, "none"},
		"two in one place": {func(p *memory, ram, rom *ramblock, w []Extent) {
			rom.host, rom.used, rom.max = ram.host, ram.used, ram.max
			w[1].Size = ram.used
			p.add(*rom)
		}, "one place"},
		"made by the guest": {func(p *memory, _, rom *ramblock, _ []Extent) {
			p.put(rom.link, 0)
			rom.at, rom.link = testRAM+0x5000, testRAM+0x100
			p.add(*rom)
		}, "guest's own memory"},
		"no such block": {func(_ *memory, _, _ *ramblock, w []Extent) { w[1].Name = "" },
			"no such block"},
		"asked twice": {func(_ *memory, _, _ *ramblock, w []Extent) { w[1] = w[0] },
			"no such block"},
		"odd page size": {func(_ *memory, _, _ *ramblock, w []Extent) {
			w[1].PageSize = 3 * units.PageSize
		}, "no such block"},
		"no page size": {func(_ *memory, _, _ *ramblock, w []Extent) { w[1].PageSize = 0 },
			"no such block"},
		"beyond reason": {func(_ *memory, _, _ *ramblock, w []Extent) { w[1].Size = 1 << 60 },
			"no such block"},
		"a heap in code": {func(p *memory, _, _ *ramblock, _ []Extent) { p.vmas[1].exec = true },
			"none"},
	} {
		t.Run(name, func(t *testing.T) {
			p, ram, rom, want := qemu()
			c.spoil(p, &ram, &rom, want)
			got, err := p.image().find(t.Context(), want, nil)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("%+v, %v", got, err)
				}
				if c.err != "no such block" && !strings.Contains(err.Error(), want[0].Name) &&
					!strings.Contains(err.Error(), want[1].Name) {
					t.Errorf("it names no block: %v", err)
				}
				return
			}
			wanted := []Block{
				{Name: "pc.ram", Size: 16 << 20, Total: 16 << 20, PageSize: units.PageSize,
					HVA: testRAM, Located: true, Kind: Anonymous},
				{Name: "/rom@etc/acpi/tables", Size: 0x2000, Total: 0x10000,
					PageSize: units.PageSize, HVA: testROM, Located: true, Kind: Anonymous},
			}
			if err != nil || !slices.Equal(got, wanted) {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}

// A search reads neither what is known to be the guest's nor what is not there, and ends in time.
func TestFindReads(t *testing.T) {
	p, _, _, want := qemu()
	known := []Block{{Name: "pc.ram", HVA: testRAM, Total: 16 << 20, PageSize: units.PageSize,
		Located: true}}
	if _, err := p.image().find(t.Context(), want, known); err != nil {
		t.Fatal(err)
	}
	for _, at := range p.read {
		if at >= testRAM {
			t.Errorf("it read at %#x", at)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("time is over")
	cancel(why)
	p.read = nil
	if _, err := p.image().find(ctx, want, nil); !errors.Is(err, why) || len(p.read) > 3 {
		t.Errorf("with its time over it read %d times: %v", len(p.read), err)
	}
	gone := p.image()
	gone.read = func([]byte, uint64) error { return fmt.Errorf("%w: process 1", ErrGone) }
	if _, err := gone.find(t.Context(), want, nil); !errors.Is(err, ErrGone) {
		t.Errorf("of a QEMU that has ended: %v", err)
	}
}

func FuzzMatch(f *testing.F) {
	p, ram, _, _ := qemu()
	heap := p.data[testHeap]
	f.Add(heap[ram.at-testHeap:][:recordSize], "pc.ram", uint64(16<<20), uint64(0), uint8(0))
	f.Fuzz(func(t *testing.T, b []byte, name string, size, total uint64, huge uint8) {
		if len(b) < recordSize {
			return
		}
		w := Extent{name, size, total, units.PageSize << (huge % 32)}
		r, ok := match(b[:recordSize], map[string]Extent{name: w})
		if ok && (r.name != name || r.host == 0 || r.host%w.PageSize != 0 || r.max < size ||
			r.max > 1<<52 || total != 0 && r.max != total) {
			t.Errorf("%+v for %+v", r, w)
		}
	})
}

func BenchmarkFind(b *testing.B) {
	p, _, _, want := qemu()
	b.SetBytes(19 << 20)
	for b.Loop() {
		if _, err := p.image().find(b.Context(), want, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// On an overloaded host a search may wait long for the CPU.
func TestFindOnABusyHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, ram, _, extents := qemu()
		slow := p.image()
		read := slow.read
		slow.read = func(dst []byte, at uint64) error {
			time.Sleep(20 * time.Second)
			return read(dst, at)
		}
		found, err := slow.find(t.Context(), extents, nil)
		if err != nil || found[0].HVA != ram.host {
			t.Errorf("found %+v, %v", found, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := slow.find(ctx, extents, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a search whose time is over: %v", err)
		}
	})
}
