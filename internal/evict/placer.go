package evict

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"

	"vacate/internal/qemu/migstream"
)

// Sizes of the sections written to the destination's QEMU. They are small, so that a fetched page
// soon gets in between two of them.
const (
	sectionBytes = 64 << 10
	sectionZeros = 256
)

// placer gives pages to a QEMU: directly where it can, else as parts of the RAM section of QEMU's
// migration stream. Several goroutines may use it. Urgent writes to the stream go first.
type placer struct {
	conn    net.Conn
	section uint32
	layout  layout
	direct  atomic.Pointer[direct] // nil until QEMU listens for pages
	gate    *gate                  // checked before pages are placed directly; may be nil

	mu     sync.Mutex
	free   *sync.Cond // uses mu: busy was cleared, or urgent fell to zero
	busy   bool
	urgent int // urgent writes waiting
	heads  []byte
	vec    net.Buffers
}

func newPlacer(conn net.Conn, section uint32, l layout) *placer {
	p := &placer{conn: conn, section: section, layout: l}
	p.free = sync.NewCond(&p.mu)
	return p
}

// errQEMU is wrapped by failures of the destination's QEMU.
var errQEMU = errors.New("the destination's QEMU failed")

// acquire makes the caller the one writer.
func (p *placer) acquire(urgent bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if urgent {
		p.urgent++
		defer func() { p.urgent-- }()
	}
	for p.busy || p.urgent > 0 && !urgent {
		p.free.Wait()
	}
	p.busy = true
}

func (p *placer) release() {
	p.mu.Lock()
	p.busy = false
	p.mu.Unlock()
	p.free.Broadcast()
}

// raw writes bytes of the stream between two sections.
func (p *placer) raw(b []byte) error {
	p.acquire(true)
	defer p.release()
	if _, err := p.conn.Write(b); err != nil {
		return fmt.Errorf("%w: write to it: %w", errQEMU, err)
	}
	return nil
}

// place gives QEMU the pages of the runs; data holds those that are not zero. It reports whether
// they are in QEMU's memory; else they may still be on their way there. If the error wraps
// errNoMemory, it returns which runs it placed, in order.
func (p *placer) place(runs []pageRun, data []byte,
	urgent bool) (held bool, done []pageRun, err error) {
	d := p.direct.Load()
	if d == nil {
		return false, nil, p.stream(runs, data, urgent)
	}
	held = true
	for i, r := range runs {
		size := p.layout[r.Block].PageSize
		n := uint64(r.Count) * size
		if r.Zero {
			n = 0
		}
		if d.places(r.Block) {
			if size == migstream.TargetPageSize {
				err = p.gate.pass(uint64(r.Count)*size, urgent)
			}
			pages := 0
			if err == nil {
				pages, err = d.place(r, size, data[:n])
			}
			if err != nil && pages > 0 {
				part := r
				part.Count = pages
				return false, append(slices.Clone(runs[:i]), part), err
			}
		} else {
			held = false
			err = p.stream(runs[i:i+1], data[:n], urgent)
		}
		if err != nil {
			return false, runs[:i], err
		}
		data = data[n:]
	}
	return held, nil, nil
}

// stream writes the pages of the runs to QEMU's stream.
func (p *placer) stream(runs []pageRun, data []byte, urgent bool) error {
	next := 0 // page of runs[0] to be written next
	for len(runs) > 0 {
		p.acquire(urgent)
		var err error
		runs, next, data, err = p.writeSection(runs, next, data)
		p.release()
		if err != nil {
			return fmt.Errorf("%w: write to it: %w", errQEMU, err)
		}
	}
	return nil
}

// writeSection writes as many pages as fit in one section and returns the rest. It never splits a
// page of a block's back end: QEMU places such a page when its last record has come.
func (p *placer) writeSection(runs []pageRun, next int,
	data []byte) ([]pageRun, int, []byte, error) {
	vec := p.vec[:0]
	heads, from := migstream.SectionPart{ID: p.section}.Append(p.heads[:0]), 0
	last, bytes, zeros := -1, 0, 0
	for len(runs) > 0 && bytes < sectionBytes && zeros < sectionZeros {
		r := runs[0]
		blk := p.layout[r.Block]
		offset := (uint64(r.First) + uint64(next)) * blk.PageSize
		for end := offset + blk.PageSize; offset < end; offset += migstream.TargetPageSize {
			rec := migstream.Page{Block: blk.Name, Offset: offset, Continue: last == r.Block}
			last = r.Block
			if r.Zero {
				heads = append(rec.AppendRecordHead(heads), 0)
				zeros++
				continue
			}
			rec.Data = data[:migstream.TargetPageSize]
			data = data[migstream.TargetPageSize:]
			heads = rec.AppendRecordHead(heads)
			vec = append(vec, heads[from:], rec.Data)
			from = len(heads)
			bytes += migstream.TargetPageSize
		}
		if next++; next == r.Count {
			runs, next = runs[1:], 0
		}
	}
	heads = migstream.Footer{ID: p.section}.Append(migstream.EOS{}.Append(heads))
	vec = append(vec, heads[from:])
	p.heads, p.vec = heads, vec
	_, err := vec.WriteTo(p.conn)
	return runs, next, data, err
}

// end closes the RAM section and the stream. QEMU then considers the migration complete.
func (p *placer) end() error {
	b := migstream.SectionEnd{ID: p.section}.Append(nil)
	b = migstream.Footer{ID: p.section}.Append(migstream.EOS{}.Append(b))
	return p.raw(migstream.EOF{}.Append(b))
}
