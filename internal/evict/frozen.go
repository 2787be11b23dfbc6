package evict

import (
	"fmt"
	"slices"
	"sync/atomic"

	"vacate/internal/evict/pageset"
	"vacate/internal/evict/pushorder"
	"vacate/internal/link"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
)

// image is the frozen VM as the engine reads it, and what it sends with. It is empty until the
// layout of the VM's memory is known.
type image struct {
	frozen  *frozen
	pushed  *frame // of the push lane; before the push, of the control lane
	fetched *frame // of the fetch lane
	// registers are those of the frozen guest, once its QEMU cannot answer any more.
	registers atomic.Pointer[registers]
	// by block, which units are huge pages; nil until that is known
	huge atomic.Pointer[[][]bool]
	// leaveOutUnused has come to all pages
	unusedKnown atomic.Bool
}

// open gets ready to send the pages of a layout.
func (i *image) open(mem *guestmem.Memory, l layout) (err error) {
	if i.frozen, err = newFrozen(mem, l); err != nil {
		return err
	}
	i.pushed.f, i.fetched.f = i.frozen, i.frozen
	return nil
}

// zeroPages returns how many of the sent pages went as a mark only. Each counts once, however often
// it was sent. Nothing may be sent any more.
func (i *image) zeroPages(d *departures) (n int) {
	if i.frozen == nil {
		return 0
	}
	d.each(i.frozen.layout, func(block int, p pageset.Page, why pushorder.Reason, _ bool) {
		switch why {
		case pushorder.Left, pushorder.Skipped, pushorder.Unused, pushorder.Before:
		default:
			if i.pushed.wasZero(block, p) || i.fetched.wasZero(block, p) {
				n++
			}
		}
	})
	return n
}

// frozen is the memory of the VM on the source. Its blocks have the numbers that they have on the
// link. Several goroutines may read it at once.
type frozen struct {
	mem    *guestmem.Memory
	layout layout
	index  []int // of each block in mem
}

func newFrozen(mem *guestmem.Memory, l layout) (*frozen, error) {
	f := &frozen{mem: mem, layout: l, index: make([]int, len(l))}
	for i, b := range l {
		j := slices.IndexFunc(mem.Blocks(), func(m guestmem.Block) bool { return m.Name == b.Name })
		switch {
		case j < 0 || !mem.Blocks()[j].Located:
			return nil, fmt.Errorf("memory %q: %w", b.Name, guestmem.ErrNotLocated)
		case mem.Blocks()[j].PageSize != b.PageSize || mem.Blocks()[j].Size < b.Length:
			return nil, fmt.Errorf("memory %q changed its size or pages during the eviction",
				b.Name)
		}
		f.index[i] = j
	}
	return f, nil
}

// read reads the pages of a run into dst, whose length must match.
func (f *frozen) read(dst []byte, r pageset.Run) error {
	return f.mem.Read(dst, f.index[r.Block], uint64(r.First)*f.layout[r.Block].PageSize)
}

// split tells the pages of a run for which QEMU has memory from the others, which read as zero.
func (f *frozen) split(r pageset.Run) (used, unused []pageset.Run, err error) {
	per := f.layout[r.Block].PageSize / migstream.TargetPageSize
	there := make([]uint64, (uint64(r.Count)*per+63)/64)
	if err := f.mem.Populated(f.index[r.Block], uint64(r.First)*per, uint64(r.Count)*per,
		there); err != nil {
		return nil, nil, err
	}
	for p := range pageset.Page(r.Count) {
		to := &unused
		for i := uint64(p) * per; i < (uint64(p)+1)*per; i++ {
			if there[i/64]>>(i%64)&1 != 0 {
				to = &used
				break
			}
		}
		if n := len(*to) - 1; n >= 0 && (*to)[n].End() == r.First+p {
			(*to)[n].Count++
			continue
		}
		*to = append(*to, pageset.Run{Block: r.Block, First: r.First + p, Count: 1})
	}
	return used, unused, nil
}

// releasable reports whether memory of a block can be given back to the host.
func (f *frozen) releasable(block int) bool {
	return f.mem.Releasable(f.index[block])
}

// anyReleasable reports whether memory of any block can be given back.
func (f *frozen) anyReleasable() bool {
	for i := range f.layout {
		if f.releasable(i) {
			return true
		}
	}
	return false
}

// release gives the memory of a run back to the host.
func (f *frozen) release(r pageset.Run) error {
	size := f.layout[r.Block].PageSize
	return f.mem.Release(f.index[r.Block], uint64(r.First)*size, uint64(r.Count)*size)
}

// runs translates guest-physical addresses to the pages that hold them. It leaves out addresses
// without memory that can be read.
func (f *frozen) runs(addresses []uint64) []pageset.Run {
	var runs []pageset.Run
	for _, gpa := range addresses {
		j, offset, ok := f.mem.Resolve(gpa)
		if !ok {
			continue
		}
		for i, b := range f.layout {
			if f.index[i] == j && offset < b.Length {
				runs = append(runs,
					pageset.Run{Block: i, First: pageset.Page(offset / b.PageSize), Count: 1})
			}
		}
	}
	return runs
}

// readGuest reads guest-physical memory into dst. It reports whether it could: the memory must lie
// in one piece, and be readable from the process.
func (f *frozen) readGuest(gpa uint64, dst []byte) bool {
	j, offset, ok := f.mem.Resolve(gpa)
	if !ok {
		return false
	}
	k, last, ok := f.mem.Resolve(gpa + uint64(len(dst)) - 1)
	return ok && k == j && last == offset+uint64(len(dst))-1 && f.mem.Blocks()[j].Located &&
		f.mem.Read(dst, j, offset) == nil
}

// frame builds frames of pages. It is not safe for concurrent use.
type frame struct {
	f     *frozen
	buf   []byte
	runs  []pageRun
	head  []byte
	parts [][]byte
	zero  int            // zero pages in the frame
	zeros []*pageset.Set // all so far, per block; nil until there is one
}

// newFrame makes a frame that takes pages of mem. The caller must set f before use.
func newFrame(mem *guestmem.Memory) *frame {
	size := uint64(maxBatch)
	for _, b := range mem.Blocks() {
		size = max(size, min(b.PageSize, maxPage))
	}
	buf := make([]byte, size)
	for i := 0; i < len(buf); i += migstream.TargetPageSize {
		buf[i] = 1 // so that the kernel provides the memory now
	}
	return &frame{buf: buf}
}

// fill reads as many of the runs' pages as one frame takes and returns the rest.
func (fr *frame) fill(runs []pageset.Run) ([]pageset.Run, error) {
	fr.runs, fr.parts, fr.zero = fr.runs[:0], fr.parts[:0], 0
	fr.parts = append(fr.parts, nil) // replaced by the head, once that is known
	used := 0
	for len(runs) > 0 && len(fr.runs) < maxRuns/2 && fr.zero < maxZeroPages {
		r := runs[0]
		size := int(fr.f.layout[r.Block].PageSize)
		// At worst every page is a run of its own, as zero pages and others alternate.
		room := min((max(maxBatch, size)-used)/size, maxRuns-len(fr.runs))
		if room <= 0 {
			break
		}
		if r.Count > room {
			runs[0].First += pageset.Page(room)
			runs[0].Count -= room
			r.Count = room
		} else {
			runs = runs[1:]
		}
		data := fr.buf[used : used+r.Count*size]
		if err := fr.f.read(data, r); err != nil {
			return nil, fmt.Errorf("read the frozen guest's memory: %w", err)
		}
		used += len(data)
		fr.add(r, data, size)
	}
	fr.head = appendPages(fr.head[:0], fr.runs)
	return runs, nil
}

// add splits a run into runs of zero pages and runs of others.
func (fr *frame) add(r pageset.Run, data []byte, size int) {
	for at := 0; at < r.Count; {
		zero := guestmem.IsZero(data[at*size : (at+1)*size])
		end := at + 1
		for end < r.Count && guestmem.IsZero(data[end*size:(end+1)*size]) == zero {
			end++
		}
		fr.runs = append(fr.runs,
			pageRun{pageset.Run{Block: r.Block, First: r.First + pageset.Page(at), Count: end - at},
				zero})
		if zero {
			fr.zero += end - at
			fr.note(r.Block, r.First+pageset.Page(at), end-at)
		} else {
			fr.parts = append(fr.parts, data[at*size:end*size])
		}
		at = end
	}
}

// note remembers zero pages.
func (fr *frame) note(block int, first pageset.Page, n int) {
	if fr.zeros == nil {
		for _, b := range fr.f.layout {
			fr.zeros = append(fr.zeros, pageset.New(b.Pages))
		}
	}
	fr.zeros[block].AddRun(first, n)
}

// size returns the number of bytes of the frame's payload.
func (fr *frame) size() int {
	n := len(fr.head)
	for _, p := range fr.parts[1:] {
		n += len(p)
	}
	return n
}

// write sends the frame.
func (fr *frame) write(lane *link.Conn) error {
	fr.parts[0] = fr.head
	return lane.Write(framePages, fr.parts...)
}
