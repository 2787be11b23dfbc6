package evict

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"sync"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/evict/pushorder"
	"vacate/internal/guest/pageclass"
)

// Trace is what a source did, page by page and over time; a report draws it. Its size does not grow
// with the VM's.
type Trace struct {
	// Blocks are the VM's RAM blocks. Cells holds their pages one after the other.
	Blocks []TraceBlock `json:"blocks"`
	// PagesPerCell is how many pages of a block make a cell; a block's last cell may have fewer.
	PagesPerCell int `json:"pages_per_cell"`
	// When, Why and Class have a value for each cell. When is milliseconds after Begun when its
	// first page was sent or left out; -1 if none was. Why is the reason, as an index in Reasons.
	// Class is the cell's use, as an index in Classes.
	When  []int32 `json:"when_ms"`
	Why   []uint8 `json:"why"`
	Class []uint8 `json:"class"`
	// These describe steps of the time after Begun, each StepMS long: pages by reason, and fetches
	// by class.
	StepMS  int        `json:"step_ms"`
	Pages   [][]uint32 `json:"pages"` // by step, then by reason
	Fetched [][]uint32 `json:"fetched"`
	Reasons []string   `json:"reasons"`
	Classes []string   `json:"classes"`
}

// TraceBlock is a RAM block.
type TraceBlock struct {
	Name     string `json:"name"`
	Cell     int    `json:"cell"` // its first
	Pages    int    `json:"pages"`
	PageSize uint64 `json:"page_size"`
}

// Limits of a trace.
const (
	maxCells   = 1 << 16
	maxSteps   = 1024
	maxFetches = 1 << 18
	leastStep  = 10 * time.Millisecond
)

// tracer notes what is sent as it is sent. Several goroutines may call its methods. They do nothing
// before open.
type tracer struct {
	mu      sync.Mutex
	begun   time.Time
	trace   Trace
	step    time.Duration
	steps   [][pushorder.Reasons]uint32
	fetches []tracedFetch
}

// tracedFetch is a page that the guest waited for; its class becomes known later.
type tracedFetch struct {
	after time.Duration
	block int
	page  pageset.Page
}

// open gets ready for the pages of a layout.
func (t *tracer) open(begun time.Time, l layout) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.begun, t.step = begun, leastStep
	per := 1
	for l.pages()/per > maxCells-len(l) {
		per *= 2
	}
	tr := &t.trace
	*tr = Trace{PagesPerCell: per}
	cells := 0
	for _, b := range l {
		tr.Blocks = append(tr.Blocks, TraceBlock{b.Name, cells, b.Pages, b.PageSize})
		cells += (b.Pages + per - 1) / per
	}
	tr.When, tr.Why, tr.Class = make([]int32, cells), make([]uint8, cells), make([]uint8, cells)
	for i := range tr.When {
		tr.When[i] = -1
	}
	t.steps, t.fetches = nil, nil
}

// note notes pages that are sent now, or left out.
func (t *tracer) note(why pushorder.Reason, runs []pageset.Run) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.trace.PagesPerCell == 0 || len(runs) == 0 {
		return
	}
	after := max(0, time.Since(t.begun))
	for after/t.step >= maxSteps {
		for i := range t.steps {
			if i%2 == 0 {
				t.steps[i/2] = t.steps[i]
				continue
			}
			for why, n := range t.steps[i] {
				t.steps[i/2][why] += n
			}
		}
		t.steps = t.steps[:(len(t.steps)+1)/2]
		t.step *= 2
	}
	at := int(after / t.step)
	for len(t.steps) <= at {
		t.steps = append(t.steps, [pushorder.Reasons]uint32{})
	}
	t.steps[at][why] += uint32(pageset.Pages(runs))
	ms := int32(min(after.Milliseconds(), 1<<31-1))
	for _, r := range runs {
		if r.Count == 0 {
			continue
		}
		first := t.trace.cell(r.Block, r.First)
		for c := first; c <= t.trace.cell(r.Block, r.End()-1); c++ {
			if t.trace.When[c] < 0 {
				t.trace.When[c], t.trace.Why[c] = ms, uint8(why)
			}
		}
		if why == pushorder.Fetched && len(t.fetches) < maxFetches {
			t.fetches = append(t.fetches, tracedFetch{after, r.Block, r.First})
		}
	}
}

func (t *Trace) cell(block int, p pageset.Page) int {
	return t.Blocks[block].Cell + int(p)/t.PagesPerCell
}

// classify fills in the class of each cell, which is that of its first page. classes has that of
// each page, by block; it may be nil.
func (t *Trace) classify(class []uint8, classes [][]pageclass.Class) {
	for i, of := range classes {
		for p := 0; p < len(of); p += t.PagesPerCell {
			class[t.cell(i, pageset.Page(p))] = uint8(of[p])
		}
	}
}

// learn sets the classes of the cells while pages are still noted. It takes the lock only for a
// moment: the push needs that, too.
func (t *tracer) learn(classes [][]pageclass.Class) {
	t.mu.Lock()
	known := Trace{Blocks: t.trace.Blocks, PagesPerCell: t.trace.PagesPerCell}
	class := make([]uint8, len(t.trace.Class))
	t.mu.Unlock()
	if known.PagesPerCell == 0 {
		return
	}
	known.classify(class, classes)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.trace.Class = class
}

// result returns the trace, with the classes of the pages, which may be nil. No more may be noted.
func (t *tracer) result(classes [][]pageclass.Class) (Trace, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tr := t.trace
	if tr.PagesPerCell == 0 {
		return tr, false
	}
	for why := range pushorder.Reasons {
		tr.Reasons = append(tr.Reasons, why.String())
	}
	for c := range pageclass.Classes {
		tr.Classes = append(tr.Classes, c.String())
	}
	tr.classify(tr.Class, classes)
	tr.StepMS = int(t.step.Milliseconds())
	tr.Pages, tr.Fetched = make([][]uint32, len(t.steps)), make([][]uint32, len(t.steps))
	for i, by := range t.steps {
		tr.Pages[i], tr.Fetched[i] = by[:], make([]uint32, pageclass.Classes)
	}
	for _, f := range t.fetches {
		c := pageclass.Unknown
		if classes != nil {
			c = classes[f.block][f.page]
		}
		tr.Fetched[min(int(f.after/t.step), len(t.steps)-1)][c]++
	}
	return tr, true
}

// encode encodes the trace for the journal: JSON, compressed with gzip.
func (t *Trace) encode() ([]byte, error) {
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if err := json.NewEncoder(z).Encode(t); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// keepTrace stores the trace, if there is a journal. A failure to do so fails nothing else.
func (e *source) keepTrace() {
	if e.Journal == nil {
		return
	}
	t, ok := e.departures.trace.result(e.survey.classes)
	if !ok {
		return
	}
	b, err := t.encode()
	if err == nil {
		err = e.Journal.Keep(KeptTrace, b)
	}
	if err != nil {
		e.Log.Warn("cannot keep the trace of the eviction", "error", err)
	}
}
