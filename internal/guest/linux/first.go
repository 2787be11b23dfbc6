package linux

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"vacate/internal/sys/units"
)

// A Position says where a virtual CPU was: its registers RIP and RSP, and the bases of GS,
// of the task state segment (TR) and of the tables of segments and interrupts. 0 is unknown.
type Position struct{ RIP, RSP, GS, TR, GDT, IDT uint64 }

// parse takes what a line of QEMU's "info registers" has of it: NAME=HEX, or, of segments,
// "GS =SELECTOR BASE ...", and of tables "IDT=     BASE LIMIT".
func (c *Position) parse(line string) {
	base := func(text string) uint64 {
		text, _, _ = strings.Cut(strings.TrimSpace(text), " ")
		n, _ := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
		return n
	}
	for _, r := range []struct {
		name string
		skip int
		to   *uint64
	}{{"RIP=", 0, &c.RIP}, {"RSP=", 0, &c.RSP}, {"GS =", 4, &c.GS}, {"TR =", 4, &c.TR},
		{"GDT=", 0, &c.GDT}, {"IDT=", 0, &c.IDT}} {
		if _, after, ok := strings.Cut(line, r.name); ok && len(after) > r.skip {
			*r.to = base(after[r.skip:])
		}
	}
}

// corePosition takes it from a note of a core file; see parseNotes. The registers are in the order
// of rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15, rip, rflags; the segments in that of cs,
// ds, es, fs, gs, ss, ldt, tr, gdt, idt, each with its base at byte 16.
func corePosition(desc []byte) Position {
	reg := func(n int) uint64 { return u64(desc[8+8*n:]) }
	base := func(n int) uint64 { return u64(desc[8+18*8+24*n+16:]) }
	return Position{RIP: reg(16), RSP: reg(6), GS: base(4), TR: base(7), GDT: base(8), IDT: base(9)}
}

const (
	maxFirst = 16 << 10 // pages
	tssSize  = 104      // of the part that the CPU reads (Intel SDM volume 3, 8.7)
)

// First lists pages that the stopped guest touches within its first instructions, as page numbers,
// each once, the most urgent first. They are the code and the stack that each virtual CPU was at,
// with the page tables on the way there. Then come what an interrupt or a system call needs, the
// per-CPU variables of scheduler and timers, and the stacks of the tasks that were running. It
// takes far less time than a survey, and may be called before one. It is a guess: what cannot be
// found is left out. The error is that of Revalidate.
func (g *Guest) First(ctx context.Context) ([]uint64, error) {
	cpus, err := g.mem.CPUs(ctx)
	if err == nil {
		if err = g.refresh(); err == nil {
			if err = g.inForce(cpus); err != nil {
				err = fmt.Errorf("%w: %w", ErrChanged, err)
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("find the guest's first pages: %w", err)
	}
	f := newFirst()
	for i, cpu := range cpus {
		own := newSpace(g.mem, cpu.CR3, g.space.levels)
		touch := func(va uint64) {
			if va != 0 && !f.path(own, va) && va>>63 != 0 {
				f.path(g.space, va) // not in the tables that are in force in user mode
			}
		}
		f.atOnce(cpu, touch, g.read)
		if va, ok := g.symbol("entry_SYSCALL_64"); ok {
			touch(va)
		}
		if n := g.census.layout.stackSize; cpu.RSP>>63 != 0 && n != 0 {
			for at := cpu.RSP &^ (n - 1); at < cpu.RSP|(n-1); at += units.PageSize {
				// stacks are aligned
				touch(at)
			}
		}
		area := cpu.GS
		if area>>63 == 0 && len(g.cpuOffsets) == len(cpus) {
			area = g.cpuOffsets[i] // it was in user mode
		}
		if area>>63 != 0 {
			touch(area)
			for _, name := range []string{"pcpu_hot", "current_task", "cpu_tlbstate", "runqueues",
				"tick_cpu_sched", "hrtimer_bases", "timer_bases"} {
				if va, ok := g.symbol(name); ok {
					touch(area + va)
					touch(area + va + units.PageSize - 1)
				}
			}
		}
	}
	if g.census.absent == nil {
		g.census.doubts = g.census.doubts[:0]
		if err := g.readTasks(ctx); err != nil {
			return nil, fmt.Errorf("find the guest's first pages: %w", err)
		}
		for i := range g.census.threads {
			t := &g.census.threads[i]
			for at := uint64(0); t.onCPU && t.stack>>63 != 0 &&
				at < g.census.layout.stackSize; at += units.PageSize {
				f.path(g.space, t.stack+at)
			}
		}
	}
	return f.list, nil
}

// AtOnce lists pages that the virtual CPUs of a stopped x86-64 guest touch at once, whatever system
// it runs, as page numbers, each once, the most urgent first. They are the code and the stack that
// each CPU was at, and what its next interrupt needs. It only follows the registers, which takes
// about a millisecond for each CPU. It is a guess: what cannot be found is left out.
func AtOnce(ctx context.Context, mem Memory) ([]uint64, error) {
	cpus, err := mem.CPUs(ctx)
	if err != nil {
		return nil, fmt.Errorf("find the guest's first pages: %w", err)
	}
	f := newFirst()
	for _, cpu := range cpus {
		if cpu.CR0&cr0Paging == 0 {
			continue
		}
		own := newSpace(mem, cpu.CR3, cpu.levels())
		f.atOnce(cpu, func(va uint64) {
			if va != 0 {
				f.path(own, va)
			}
		}, own.read)
	}
	return f.list, nil
}

// handlers returns where the handlers of interrupts are, one address of each page.
func handlers(idt uint64, read func(dst []byte, va uint64) error) (list []uint64) {
	var gates [256 * 16]byte
	if idt == 0 || read(gates[:], idt) != nil {
		return nil
	}
	pages := map[uint64]struct{}{}
	for i := 0; i < len(gates); i += 16 {
		b := gates[i:]
		va := uint64(u16(b)) | uint64(u16(b[6:]))<<16 | uint64(u32(b[8:]))<<32
		if _, known := pages[va/units.PageSize]; b[5]&0x80 != 0 && !known {
			pages[va/units.PageSize] = struct{}{}
			list = append(list, va)
		}
	}
	return list
}

// first collects page numbers.
type first struct {
	list []uint64
	seen map[uint64]struct{}
}

func newFirst() *first { return &first{seen: map[uint64]struct{}{}} }

// atOnce adds what a CPU touches at its next instruction and at its next interrupt: code, stack,
// and the tables of the CPU. touch adds the page at an address, and read reads from there on.
func (f *first) atOnce(cpu CPU, touch func(va uint64), read func(dst []byte, va uint64) error) {
	touch(cpu.RIP)
	touch(cpu.RSP)
	f.add(cpu.CR3 &^ units.PageSize & addrMask)
	for _, va := range []uint64{cpu.IDT, cpu.IDT + units.PageSize - 1, cpu.GDT, cpu.TR,
		cpu.TR + tssSize - 1} {
		touch(va)
	}
	var tss [tssSize]byte
	if cpu.TR != 0 && read(tss[:], cpu.TR) == nil {
		touch(u64(tss[4:]) - 8) // the stack on entry from user mode
	}
	for _, va := range handlers(cpu.IDT, read) {
		touch(va)
	}
}

func (f *first) add(addr uint64) {
	pfn := addr / units.PageSize
	if _, known := f.seen[pfn]; !known && len(f.list) < maxFirst {
		f.seen[pfn] = struct{}{}
		f.list = append(f.list, pfn)
	}
}

// path adds the page at va after the page tables that lead to it, and reports whether
// there is one.
func (f *first) path(s *space, va uint64) bool {
	addr, _, err := s.translate(va)
	if err != nil || inRAM(s.mem.Extents(),
		Range{addr &^ (units.PageSize - 1), units.PageSize}) < 0 {
		return false
	}
	at := s.root
	for shift := 12 + 9*uint(s.levels-1); shift >= 12; shift -= 9 {
		f.add(at)
		t, err := s.table(at)
		if err != nil {
			return false
		}
		e := t[va>>shift&511]
		if e&largePage != 0 && shift <= 30 {
			break
		}
		at = e & addrMask
	}
	f.add(addr)
	return true
}
