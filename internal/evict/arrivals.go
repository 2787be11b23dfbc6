package evict

import (
	"slices"
	"sync"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/qemu/migstream"
)

// arrivals are the pages of a VM at its destination: which came, which were left out, and which the
// guest waits for. They come on two lanes, and QEMU asks for them by its stream, all at once.
//
// Two things must hold at every moment. QEMU gets each page once: it treats a second copy as an
// error. And "whole" is not said while the guest waits for a page: QEMU would be told that it has
// all, and the guest would wait for ever. So one lock guards all of it.
type arrivals struct {
	mu     sync.Mutex // guards all below
	layout layout
	// by block: pages that a task places or placed, and those left out
	received []*pageset.Set
	skipped  []*pageset.Set        // left out, and not yet placed as zero
	missing  int                   // pages neither placed nor left out
	whole    chan struct{}         // closed when missing falls to 0
	waiting  map[pageKey]time.Time // pages that the guest waits for, and since when
	delays   []float64             // how long it waited for each, in seconds
	stats    Received
}

type pageKey struct {
	block int
	page  pageset.Page
}

// begin sets the layout of the VM's memory. No page has come yet.
func (p *arrivals) begin(l layout) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.layout, p.missing, p.whole, p.waiting = l, l.pages(), make(chan struct{}),
		map[pageKey]time.Time{}
	for _, b := range l {
		p.received = append(p.received, pageset.New(b.Pages))
		p.skipped = append(p.skipped, pageset.New(b.Pages))
	}
}

// progress returns how many pages are placed or left out, how many there are, and how many were
// fetched.
func (p *arrivals) progress() (placed, total, fetches int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	total = p.layout.pages()
	return total - p.missing, total, p.stats.Fetches
}

// left returns how many pages are neither placed nor left out.
func (p *arrivals) left() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.missing
}

// lack returns how many bytes of memory the remaining pages may take.
func (p *arrivals) lack() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	size := uint64(0)
	for _, b := range p.layout {
		size = max(size, b.PageSize)
	}
	return uint64(p.missing) * size
}

// done returns a channel that is closed when no page is left. After restock it is another one.
func (p *arrivals) done() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.whole
}

// claim marks pages as received and drops those that already were.
func (p *arrivals) claim(runs []pageRun, data []byte) (fresh []pageRun, kept []byte, all bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	twice := false
	for _, r := range runs {
		if _, n := p.received[r.Block].Next(r.First, r.End(), 1); n > 0 {
			twice = true
		}
	}
	if !twice {
		for _, r := range runs {
			p.received[r.Block].AddRun(r.First, r.Count)
		}
		return runs, data, true
	}
	for _, r := range runs {
		size := int(p.layout[r.Block].PageSize)
		for i := range r.Count {
			page := r.First + pageset.Page(i)
			if !p.received[r.Block].Add(page) {
				p.stats.Duplicate++
				continue
			}
			fresh = append(fresh,
				pageRun{pageset.Run{Block: r.Block, First: page, Count: 1}, r.Zero})
			if !r.Zero {
				kept = append(kept, data[i*size:(i+1)*size]...)
			}
		}
		if !r.Zero {
			data = data[r.Count*size:]
		}
	}
	return fresh, kept, false
}

// disclaim undoes claim: the pages were dropped, and will come again. The guest asks for a page
// only once, so asked counts all of them as waited for.
func (p *arrivals) disclaim(runs []pageRun, asked bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range runs {
		p.received[r.Block].RemoveRun(r.First, r.Count)
		for page := r.First; asked && page < r.End(); page++ {
			p.waiting[pageKey{r.Block, page}] = time.Now()
		}
	}
}

// skip notes pages that never come. It returns those that the guest waits for: the caller must
// place them as zeroes.
func (p *arrivals) skip(runs []pageRun) (wanted []pageRun) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range runs {
		received, fresh := p.received[r.Block], 0
		for first, n := range received.Gaps(r.First, r.End()) {
			received.AddRun(first, n)
			p.skipped[r.Block].AddRun(first, n)
			p.missing -= n
			fresh += n
			for _, page := range p.waitingIn(pageset.Run{Block: r.Block, First: first, Count: n}) {
				p.skipped[r.Block].Remove(page)
				p.missing++
				wanted = append(wanted,
					pageRun{pageset.Run{Block: r.Block, First: page, Count: 1}, true})
			}
		}
		p.stats.Duplicate += r.Count - fresh
	}
	p.stats.FreeTouched += len(wanted)
	p.checkWhole()
	return wanted
}

// placed notes that QEMU was given pages.
func (p *arrivals) placed(runs []pageRun) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, r := range runs {
		p.missing -= r.Count
		for _, page := range p.waitingIn(r.Run) {
			since := p.waiting[pageKey{r.Block, page}]
			delete(p.waiting, pageKey{r.Block, page})
			p.stats.Fetches++
			if len(p.delays) < maxDelays {
				p.delays = append(p.delays, now.Sub(since).Seconds())
			}
		}
	}
	p.checkWhole()
}

// waitingIn returns the pages of a run that the guest waits for. The run may be long, while the
// guest waits for few pages. The caller holds mu.
func (p *arrivals) waitingIn(r pageset.Run) (pages []pageset.Page) {
	if len(p.waiting) < r.Count {
		for k := range p.waiting {
			if k.block == r.Block && k.page >= r.First && k.page < r.End() {
				pages = append(pages, k.page)
			}
		}
		slices.Sort(pages)
		return pages
	}
	for page := r.First; page < r.End(); page++ {
		if _, ok := p.waiting[pageKey{r.Block, page}]; ok {
			pages = append(pages, page)
		}
	}
	return pages
}

// recount closes done after restock if no page is missing.
func (p *arrivals) recount() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.checkWhole()
}

// checkWhole notes when no page is missing any more. The caller holds mu.
func (p *arrivals) checkWhole() {
	if p.missing > 0 {
		return
	}
	select {
	case <-p.whole:
	default:
		close(p.whole)
	}
}

// want notes that the guest waits for pages and reports whether they must be requested. It returns
// those that were left out, and the pages left out around them. The caller must place these as
// zeroes.
func (p *arrivals) want(r pageset.Run) (missing bool, free []pageRun) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for page := r.First; page < r.End(); page++ {
		switch {
		case !p.received[r.Block].Has(page):
			missing = true
			p.waiting[pageKey{r.Block, page}] = now
		case p.skipped[r.Block].Has(page):
			p.stats.FreeTouched++
			// They count as missing until they are placed, so that QEMU goes on waiting for pages.
			// If none is missing, QEMU is about to stop: then they read as zero by themselves.
			if p.missing > 0 {
				n := pageset.Page(max(1, freeAround/p.layout[r.Block].PageSize))
				free = p.takeSkipped(free, r.Block, page/n*n, page/n*n+n)
			}
		}
	}
	return missing, free
}

// freeAround is how much left-out memory is placed at once when the guest touches it. A guest that
// allocated one free page will probably use the next.
const freeAround = 128 << 10

// takeSkipped appends the pages of [at, end) that were left out. They count as missing from now on.
// The caller holds mu.
func (p *arrivals) takeSkipped(runs []pageRun, block int, at, end pageset.Page) []pageRun {
	set := p.skipped[block]
	for first, n := range set.Runs(at, end) {
		set.RemoveRun(first, n)
		p.missing += n
		runs = append(runs, pageRun{pageset.Run{Block: block, First: first, Count: n}, true})
	}
	return runs
}

// takeAllSkipped returns all pages that were left out, in runs of at most maxZeroPages. They count
// as missing from now on.
func (p *arrivals) takeAllSkipped() (runs []pageRun) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, b := range p.layout {
		most := pageset.Page(max(1, maxZeroPages*migstream.TargetPageSize/b.PageSize))
		for at := pageset.Page(0); int(at) < b.Pages; at += most {
			runs = p.takeSkipped(runs, i, at, min(at+most, pageset.Page(b.Pages)))
		}
	}
	return runs
}

// restock counts the pages anew: count returns the placed pages of each block. Pages that were left
// out stay so. No other method may note anything meanwhile. restock does not close done: recount
// does.
func (p *arrivals) restock(count func() ([]*pageset.Set, error)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	placed, err := count()
	if err != nil {
		return err
	}
	p.missing, p.whole = 0, make(chan struct{})
	for i, set := range placed {
		for first, n := range p.skipped[i].Runs(0, set.End()) {
			set.AddRun(first, n)
		}
		p.received[i] = set
		p.missing += set.Size() - set.Count()
	}
	for k := range p.waiting {
		if p.received[k.block].Has(k.page) && !p.skipped[k.block].Has(k.page) {
			delete(p.waiting, k)
		}
	}
	return nil
}

// awaited returns the pages that the guest waits for.
func (p *arrivals) awaited() []pageset.Run {
	p.mu.Lock()
	defer p.mu.Unlock()
	runs := make([]pageset.Run, 0, len(p.waiting))
	for k := range p.waiting {
		runs = append(runs, pageset.Run{Block: k.block, First: k.page, Count: 1})
	}
	return runs
}

// appendPresent appends the frame that tells the source which of n pages of a block were received,
// from first on.
func (p *arrivals) appendPresent(b []byte, block, first, n int) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return appendPresent(b, block, first, n, p.received[block])
}

// summary sums up what was received.
func (p *arrivals) summary() Received {
	p.mu.Lock()
	defer p.mu.Unlock()
	slices.Sort(p.delays)
	stats := p.stats
	step := len(p.delays)/1000 + 1
	for i := len(p.delays) - 1; i >= 0; i -= step {
		stats.FetchDelays = append(stats.FetchDelays, p.delays[i])
	}
	slices.Reverse(stats.FetchDelays)
	return stats
}

// maxDelays bounds the fetch latencies that are kept.
const maxDelays = 1 << 20
