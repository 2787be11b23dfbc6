package linux

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/sys/units"
)

// Live is the memory of a running QEMU's guest.
type Live struct {
	mem     *guestmem.Memory
	monitor Monitor
	extents []Range
	places  []place // of each extent
	ranges  sync.Pool
}

// place is where an extent lies in a RAM block.
type place struct {
	block  int
	offset uint64
}

// Monitor is QEMU's human monitor, as *qmp.Client has it.
type Monitor interface {
	// HMP runs a line, "info registers -a", and returns its output.
	HMP(ctx context.Context, line string) (string, error)
}

// NewLive serves the memory mem of the QEMU behind c, which must both stay open. It
// sees the blocks that mem has located, where they were when mem was attached.
func NewLive(mem *guestmem.Memory, c Monitor) (*Live, error) {
	l := &Live{mem: mem, monitor: c,
		ranges: sync.Pool{New: func() any { return new([]guestmem.Range) }}}
	maps := slices.Clone(mem.Mappings())
	slices.SortFunc(maps, func(a, b guestmem.Mapping) int { return cmp.Compare(a.GPA, b.GPA) })
	end := uint64(0)
	for _, m := range maps {
		b := mem.Blocks()[m.Block]
		// Only whole pages; a mapping into what another has covered is not RAM to speak of.
		if !b.Located || (m.GPA|m.Offset)%units.PageSize != 0 || m.GPA < end || m.Offset >= b.Size {
			continue
		}
		size := min(m.Size, b.Size-m.Offset) &^ (units.PageSize - 1)
		if size == 0 || m.GPA > 1<<52 || size > 1<<52 {
			continue
		}
		end = m.GPA + size
		if n := len(l.extents); n > 0 {
			last, p := &l.extents[n-1], l.places[n-1]
			if last.Addr+last.Len == m.GPA && p.block == m.Block && p.offset+last.Len == m.Offset {
				last.Len += size
				continue
			}
		}
		l.extents = append(l.extents, Range{m.GPA, size})
		l.places = append(l.places, place{m.Block, m.Offset})
	}
	if len(l.extents) == 0 {
		return nil, errors.New("none of the guest's memory is located in qemu")
	}
	return l, nil
}

// Extents implements Memory.
func (l *Live) Extents() []Range { return l.extents }

// ReadRanges implements Memory. Its errors wrap guestmem.ErrGone if QEMU has exited.
func (l *Live) ReadRanges(dst []byte, ranges []Range) error {
	buf := l.ranges.Get().(*[]guestmem.Range)
	defer l.ranges.Put(buf)
	list := (*buf)[:0]
	for _, r := range ranges {
		i := inRAM(l.extents, r)
		if i < 0 {
			return errNotRAM(r)
		}
		list = append(list, guestmem.Range{Block: l.places[i].block,
			Offset: l.places[i].offset + r.Addr - l.extents[i].Addr, Length: r.Len})
	}
	*buf = list
	return l.mem.ReadRanges(dst, list)
}

// View implements viewer: shared memory need not be copied.
func (l *Live) View(addr, size uint64) []byte {
	i := inRAM(l.extents, Range{addr, size})
	if i < 0 {
		return nil
	}
	view, err := l.mem.View(l.places[i].block)
	if err != nil || view == nil {
		return nil
	}
	return view[l.places[i].offset+addr-l.extents[i].Addr:][:size:size]
}

// Populated implements Memory.
func (l *Live) Populated(addr, n uint64, dst []uint64) error {
	r := Range{addr, n * units.PageSize}
	i := inRAM(l.extents, r)
	if i < 0 || n > 1<<40 {
		return errNotRAM(r)
	}
	return l.mem.Populated(l.places[i].block,
		(l.places[i].offset+addr-l.extents[i].Addr)/units.PageSize, n, dst)
}

// CPUs implements Memory: it asks QEMU's human monitor, which holds each virtual CPU
// for a moment.
func (l *Live) CPUs(ctx context.Context) ([]CPU, error) {
	text, err := l.monitor.HMP(ctx, "info registers -a")
	if err != nil {
		return nil, err
	}
	return parseRegisters(text)
}

// maxCPUs bounds what is taken from QEMU and from core files; Linux has at most 8192.
const maxCPUs = 8192

// parseRegisters reads the answer to "info registers -a", as QEMU 7.2 to 11.1 write
// it: a line "CPU#0", then registers as NAME=HEX, several a line.
func parseRegisters(text string) ([]CPU, error) {
	var cpus []CPU
	found := 0 // registers of the last CPU, as bits
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "CPU#") {
			if len(cpus) > 0 && found != 7 || len(cpus) == maxCPUs {
				break
			}
			cpus, found = append(cpus, CPU{}), 0
			continue
		}
		if len(cpus) == 0 {
			continue
		}
		cpu := &cpus[len(cpus)-1]
		cpu.parse(line)
		for i, reg := range []struct {
			name string
			to   *uint64
		}{{"CR0=", &cpu.CR0}, {"CR3=", &cpu.CR3}, {"CR4=", &cpu.CR4}} {
			_, after, ok := strings.Cut(line, reg.name)
			if !ok {
				continue
			}
			value := after[:len(after)-len(strings.TrimLeft(after, "0123456789abcdefABCDEF"))]
			var err error
			if *reg.to, err = strconv.ParseUint(value, 16, 64); err != nil {
				return nil, fmt.Errorf("parse registers: bad %s%.20q", reg.name, value)
			}
			found |= 1 << i
		}
	}
	if found != 7 {
		return nil, errors.New("parse registers: no CR0, CR3 and CR4 of each cpu")
	}
	return cpus, nil
}
