package churn

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"vacate/internal/guest/pageclass"
	"vacate/lab/churnproto"
)

// An oracle follows the events of the guest's page allocator. The kernel writes that it
// allocates after it did, and that it frees before it does. So at any moment a page whose
// last event is an allocation is allocated; of all others it says nothing.
//
// Pages that the kernel takes without an event (compaction's targets, boot) are not known;
// there is no way for a page to become free without one.
type oracle struct {
	w         *writer
	trace     churnproto.Trace
	rings     [][]uint64 // of each CPU the frames of its ring
	allocated []bool     // by frame
	events    []event
	first     [][]event // of each CPU, the first since the stop before
	buf       []byte

	Events uint64
	Lost   uint64 // records that did not fit: all before is void
}

type event struct {
	time  uint64 // ns of the guest's clock
	pfn   uint64
	order uint32
	alloc bool
}

// These are enum perf_event_type's (include/uapi/linux/perf_event.h).
const (
	recordLost   = 2
	recordSample = 9
)

// newOracle finds the rings of a trace that nobody has read yet. The guest must be stopped.
func newOracle(w *writer, t *churnproto.Trace) (*oracle, error) {
	o := &oracle{w: w, trace: *t, first: make([][]event, len(t.Rings))}
	type page struct{ cpu, index int }
	marks, sums := map[uint64]int{}, map[uint64]page{}
	missing := 0
	for cpu, r := range t.Rings {
		if n := len(r.Sums); n < 1 || n&(n-1) != 0 || n > 1<<16 {
			return nil, fmt.Errorf("guest's trace: a ring of %d pages", n)
		}
		o.rings = append(o.rings, make([]uint64, 1+len(r.Sums)))
		marks[r.Mark] = cpu
		for i, sum := range r.Sums {
			sums[sum] = page{cpu, i}
		}
		missing += 1 + len(r.Sums)
	}
	var words churnproto.Words
	bytes := unsafe.Slice((*byte)(unsafe.Pointer(&words)), pageSize)
	for _, m := range w.mem.Mappings() {
		b := w.mem.Blocks()[m.Block]
		if !b.Located || m.Size < 16<<20 { // devices' memory
			continue
		}
		for gpa := m.GPA; gpa+pageSize <= m.GPA+m.Size; gpa += pageSize {
			if err := w.read(bytes, gpa); err != nil {
				return nil, err
			}
			pfn := gpa / pageSize
			for len(o.allocated) <= int(pfn) {
				o.allocated = append(o.allocated, false)
			}
			var slot *uint64
			if p, ok := sums[churnproto.Sum(&words)]; ok {
				slot = &o.rings[p.cpu][1+p.index]
			} else if cpu, ok := marks[words[churnproto.MarkOffset/8]]; ok &&
				words[churnproto.HeadOffset/8] != 0 {
				slot = &o.rings[cpu][0]
			} else {
				continue
			}
			if *slot != 0 {
				return nil,
					fmt.Errorf("guest's trace: a page of a ring is in memory twice, at %#x and %#x",
						*slot*pageSize, gpa)
			}
			*slot = pfn
			missing--
		}
	}
	if missing > 0 {
		return nil, fmt.Errorf("guest's trace: %d pages of its rings are not to be found", missing)
	}
	return o, nil
}

// read takes the events up to now; the guest must be stopped.
func (o *oracle) read() error {
	o.events = o.events[:0]
	lost := uint64(0)
	for cpu, ring := range o.rings {
		n := len(o.events)
		b, head, err := o.records(ring)
		var missing uint64
		if err == nil {
			o.events, missing, err = parseRecords(o.events, b, &o.trace)
		}
		if err == nil {
			err = o.w.write(ring[0]*pageSize+churnproto.TailOffset, head)
		}
		if err != nil {
			return fmt.Errorf("guest's trace of CPU %d: %w", cpu, err)
		}
		lost += missing
		o.first[cpu] = append(o.first[cpu][:0], o.events[n:min(len(o.events), n+16)]...)
	}
	o.Events += uint64(len(o.events))
	if lost > 0 { // what was freed, too
		o.Lost += lost
		clear(o.allocated)
		return nil
	}
	if len(o.rings) > 1 {
		slices.SortStableFunc(o.events, func(a, b event) int { return cmp.Compare(a.time, b.time) })
	}
	for _, e := range o.events {
		if e.pfn >= uint64(len(o.allocated)) {
			continue
		}
		for pfn := e.pfn; pfn < min(e.pfn+1<<e.order, uint64(len(o.allocated))); pfn++ {
			o.allocated[pfn] = e.alloc
		}
	}
	return nil
}

// records returns what has come into a ring, and where it ends there.
func (o *oracle) records(ring []uint64) (b []byte, head uint64, err error) {
	control, data := ring[0]*pageSize, ring[1:]
	var ends [16]byte
	if err := o.w.read(ends[:], control+churnproto.HeadOffset); err != nil {
		return nil, 0, err
	}
	head, tail := binary.LittleEndian.Uint64(ends[:]), binary.LittleEndian.Uint64(ends[8:])
	size := uint64(len(data)) * pageSize
	if head < tail || head-tail > size {
		return nil, 0, fmt.Errorf("head %d, tail %d", head, tail)
	}
	o.buf = slices.Grow(o.buf[:0], int(head-tail))[:head-tail]
	for at := tail; at < head; {
		n := min(head-at, pageSize-at%pageSize)
		if err := o.w.read(o.buf[at-tail:at-tail+n],
			data[at%size/pageSize]*pageSize+at%pageSize); err != nil {
			return nil, 0, err
		}
		at += n
	}
	return o.buf, head, nil
}

// parseRecords appends the events of perf records: u32 type, u16 flags, u16 size in bytes with this
// header. Of samples follow u64 time, u32 size and what the tracepoint's format says; of lost
// records u64 id, u64 how many.
func parseRecords(events []event, b []byte,
	t *churnproto.Trace) (_ []event, lost uint64, err error) {
	le := binary.LittleEndian
	for len(b) > 0 {
		if len(b) < 8 {
			return nil, 0, errors.New("a record is cut")
		}
		n := int(le.Uint16(b[6:]))
		if n < 8 || n > len(b) {
			return nil, 0, fmt.Errorf("a record of %d bytes", n)
		}
		r := b[:n]
		b = b[n:]
		switch le.Uint32(r) {
		case recordLost:
			if n < 24 {
				return nil, 0, fmt.Errorf("a note of a loss of %d bytes", n)
			}
			lost += max(1, le.Uint64(r[16:])&(1<<40-1))
		case recordSample:
			if n < 24 {
				return nil, 0, fmt.Errorf("a sample of %d bytes", n)
			}
			raw := r[20:]
			layout := &t.Alloc
			if id := int(le.Uint16(raw)); id == t.Free.ID {
				layout = &t.Free
			} else if id != t.Alloc.ID {
				return nil, 0, fmt.Errorf("a sample of event %d", id)
			}
			if min(layout.PFN, layout.Order) < 0 || max(layout.PFN, layout.Order) > 1<<16 ||
				layout.PFN+8 > len(raw) || layout.Order+4 > len(raw) {
				return nil, 0, fmt.Errorf("a sample of %d bytes", len(raw))
			}
			e := event{time: le.Uint64(r[8:]), pfn: le.Uint64(raw[layout.PFN:]),
				order: le.Uint32(raw[layout.Order:]), alloc: layout == &t.Alloc}
			if e.pfn == 0 || e.pfn == ^uint64(0) { // no page: it failed
				continue
			}
			if e.order > 20 || e.pfn > 1<<52 {
				return nil, 0, fmt.Errorf("an event of order %d at page %#x", e.order, e.pfn)
			}
			events = append(events, e)
		}
	}
	return events, lost, nil
}

// cover counts the pages of each kind, and those that are allocated for all that the oracle knows.
func (o *oracle) cover(kinds *[pageclass.Kinds]Coverage, s *pageclass.Survey) {
	for pfn, p := range s.Pages {
		kinds[p.Kind].Pages++
		if pfn < len(o.allocated) && o.allocated[pfn] {
			kinds[p.Kind].Known++
		}
	}
}

// contradictions returns the pages that are allocated and yet skippable.
func (o *oracle) contradictions(s *pageclass.Survey) (pfns []uint64) {
	for pfn, a := range o.allocated {
		if a && pfn < len(s.Pages) && s.Pages[pfn].Flags&pageclass.Skippable != 0 {
			pfns = append(pfns, uint64(pfn))
		}
	}
	return pfns
}

// belated reports whether the first events after the last stop free a page. A record that an
// interrupt wrote into the middle of another one is published only with that one.
func (o *oracle) belated(pfn uint64) bool {
	for _, events := range o.first {
		for _, e := range events {
			if !e.alloc && pfn >= e.pfn && pfn < e.pfn+1<<e.order {
				return true
			}
		}
	}
	return false
}
