package evict

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/link"
	"vacate/internal/qemu/migstream"
)

// takeHead makes sure that the head is what a source may send, and learns the layout.
func (e *destination) takeHead(head []byte) error {
	l, r, err := parseHead(head)
	if err != nil {
		return err
	}
	if err := e.here.holds(l); err != nil {
		return err
	}
	e.adopt(head, l, r)
	return nil
}

// adopt takes a layout over, with no page received yet.
func (e *destination) adopt(head []byte, l layout, r *migstream.Reader) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.head, e.layout, e.reader = head, l, r
	for _, b := range l {
		e.received = append(e.received, pageset.New(b.Pages))
		e.skipped = append(e.skipped, pageset.New(b.Pages))
	}
	e.missing = l.pages()
	if e.stream != nil {
		e.placer = newPlacer(e.stream.conn, r.SectionID(), l)
	}
}

// parseHead takes a head apart, which may hold nothing but what a post-copy migration begins with.
func parseHead(head []byte) (l layout, r *migstream.Reader, err error) {
	r = migstream.NewReader(bytes.NewReader(head))
	for {
		item, err := r.Next()
		if err != nil {
			return nil, nil, fmt.Errorf("the stream's head: %w", err)
		}
		switch it := item.(type) {
		case migstream.Header, migstream.Configuration, migstream.SectionStart, migstream.EOS:
		case migstream.Command:
			switch it.ID {
			case migstream.CmdOpenReturnPath, migstream.CmdPing, migstream.CmdPostcopyAdvise:
			default:
				return nil, nil, fmt.Errorf("%w: %v in the stream's head", errFrame, it.ID)
			}
		case migstream.MemSize:
			if l, err = newLayout(it.Blocks); err != nil {
				return nil, nil, err
			}
		case migstream.Footer:
			if r.Offset() != int64(len(head)) {
				return nil, nil, fmt.Errorf("%w: bytes behind the stream's head", errFrame)
			}
			return l, r, nil
		default:
			return nil, nil, fmt.Errorf("%w: %T in the stream's head", errFrame, item)
		}
	}
}

// receivePackage receives the pages that come ahead of the package, and the package, and
// hands them to QEMU. In between it has QEMU drop what it has of all other pages: it wrote
// ROMs into them when it started.
func (e *destination) receivePackage(ctx context.Context) error {
	control := e.at.Load().control
	for {
		f, err := control.await(ctx, framePages, msgLoad)
		if err != nil {
			return err
		}
		if f.kind == framePages {
			if _, err := e.receive(parcel{}, f.payload); err != nil {
				return err
			}
			continue
		}
		load, err := checkLoad(e.reader.Resume(bytes.NewReader(f.payload)))
		if err != nil {
			return err
		}
		return e.placer.raw(append(e.discards(), load...))
	}
}

// checkLoad makes sure that the load is a package and no more.
func checkLoad(r *migstream.Reader) ([]byte, error) {
	var b []byte
	for {
		item, err := r.Next()
		if err != nil {
			return nil, fmt.Errorf("the package: %w", err)
		}
		b = item.Append(b)
		switch it := item.(type) {
		case migstream.Packaged:
			if _, err := r.Next(); !errors.Is(err, io.ErrUnexpectedEOF) {
				return nil, fmt.Errorf("%w: bytes behind the package", errFrame)
			}
			return b, nil
		case migstream.Command:
			if it.ID != migstream.CmdSwitchoverStart {
				return nil, fmt.Errorf("%w: %v with the package", errFrame, it.ID)
			}
		default:
			return nil, fmt.Errorf("%w: %T with the package", errFrame, item)
		}
	}
}

// discards encodes commands to drop all pages but those received.
func (e *destination) discards() []byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	var b []byte
	for i, set := range e.received {
		absent := pageset.Full(set.Size())
		for p := pageset.Page(0); ; {
			first, n := set.Next(p, set.Size())
			if n == 0 {
				break
			}
			absent.RemoveRun(first, n)
			p = first + pageset.Page(n)
		}
		size := e.layout[i].PageSize
		var ranges []migstream.Range
		for p := pageset.Page(0); ; {
			first, n := absent.Next(p, absent.Size())
			if n > 0 {
				ranges = append(ranges, migstream.Range{Start: uint64(first) * size, Length: uint64(n) * size})
			}
			if len(ranges) == migstream.MaxDiscardRanges || n == 0 && len(ranges) > 0 {
				b = migstream.DiscardCommand(e.layout[i].Name, ranges).Append(b)
				ranges = nil
			}
			if n == 0 {
				break
			}
			p = first + pageset.Page(n)
		}
	}
	return b
}

// receiveLanes receives what comes on the lanes for pages.
func (e *destination) receiveLanes(a *attachment) {
	for _, lane := range []link.Lane{link.Push, link.Fetch} {
		a.begin(func() error {
			err := e.receivePages(a, lane)
			e.failed(nil, err)
			return err
		})
	}
}

// receivePages receives the pages of a lane and hands them to QEMU, until the session
// ends, and returns why it did.
func (e *destination) receivePages(a *attachment, l link.Lane) error {
	lane := a.Lane(l)
	as := parcel{a: a, urgent: l == link.Fetch}
	if l == link.Push {
		as.push = &tally{lane: lane}
	}
	var buf []byte
	for {
		kind, payload, err := lane.Read(buf, maxPages)
		if err != nil {
			return err
		}
		buf = payload[:cap(payload)]
		if kind == frameSkipped && l == link.Push {
			if err := e.skip(payload); err != nil {
				return err
			}
			continue
		}
		if kind != framePages {
			return fmt.Errorf("%w: type %d on the %v lane", errFrame, kind, l)
		}
		held, err := e.receive(as, payload)
		if err != nil {
			return err
		}
		if held {
			buf = nil
			e.mayRead(a)
		}
	}
}

// receive takes a frame of pages, which come as is told by a parcel, and hands those to QEMU that it does not have yet. It tells whether
// they are held, and the payload with them.
func (e *destination) receive(as parcel, payload []byte) (held bool, err error) {
	runs, data, err := e.layout.parsePages(nil, payload)
	if err != nil {
		return false, err
	}
	as.bytes = len(payload)
	as.runs, as.data, as.all = e.claim(runs, data)
	return e.settle(as)
}

// skip notes pages that never come: they read as zero, since QEMU was told to drop all
// that did not come ahead of the package. Those that the guest waits for are placed now.
func (e *destination) skip(payload []byte) error {
	runs, _, err := e.layout.parsePages(nil, payload)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(runs, func(r pageRun) bool { return !r.Zero }) {
		return fmt.Errorf("%w: pages that are left out, with data", errFrame)
	}
	var wanted []pageRun
	n := 0
	e.mu.Lock()
	for _, r := range runs {
		for p := r.First; p < r.End(); p++ {
			if !e.received[r.Block].Add(p) {
				e.stats.Duplicate++
			} else if _, ok := e.waiting[pageKey{r.Block, p}]; ok {
				wanted = append(wanted, pageRun{pageset.Run{Block: r.Block, First: p, Count: 1}, true})
			} else {
				e.skipped[r.Block].Add(p)
				n++
			}
		}
	}
	e.missing -= n
	e.stats.FreeTouched += len(wanted)
	e.checkWhole()
	e.mu.Unlock()
	_, err = e.settle(parcel{runs: wanted, urgent: true})
	return err
}

// claim marks pages as received and drops those that already were: QEMU takes a page that
// comes twice for an error.
func (e *destination) claim(runs []pageRun, data []byte) (fresh []pageRun, kept []byte, all bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	twice := false
	for _, r := range runs {
		set := e.received[r.Block]
		if first, n := set.Next(r.First, 1); n > 0 && first < r.End() {
			twice = true
		}
	}
	if !twice {
		for _, r := range runs {
			e.received[r.Block].AddRun(r.First, r.Count)
		}
		return runs, data, true
	}
	for _, r := range runs {
		size := int(e.layout[r.Block].PageSize)
		for i := range r.Count {
			p := r.First + pageset.Page(i)
			if e.received[r.Block].Add(p) {
				fresh = append(fresh, pageRun{pageset.Run{Block: r.Block, First: p, Count: 1}, r.Zero})
				if !r.Zero {
					kept = append(kept, data[i*size:(i+1)*size]...)
				}
			} else {
				e.stats.Duplicate++
			}
		}
		if !r.Zero {
			data = data[r.Count*size:]
		}
	}
	return fresh, kept, false
}

// placed notes that QEMU was handed pages.
func (e *destination) placed(runs []pageRun) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	for _, r := range runs {
		e.missing -= r.Count
		for p := r.First; p < r.End() && len(e.waiting) > 0; p++ {
			if since, ok := e.waiting[pageKey{r.Block, p}]; ok {
				delete(e.waiting, pageKey{r.Block, p})
				e.stats.Fetches++
				if len(e.delays) < maxDelays {
					e.delays = append(e.delays, now.Sub(since).Seconds())
				}
			}
		}
	}
	e.checkWhole()
}

// checkWhole notes when no page is missing any more. The caller holds mu.
func (e *destination) checkWhole() {
	if e.missing > 0 {
		return
	}
	select {
	case <-e.whole:
	default:
		close(e.whole)
	}
}

// readReturnPath follows what QEMU says of a stream, and asks the source for the pages it wants.
func (e *destination) readReturnPath(s *stream, r *migstream.ReturnReader) error {
	for {
		m, err := r.Next()
		if err != nil {
			return fmt.Errorf("%w: it closed its migration: %w", errQEMU, err)
		}
		switch m.Type {
		case migstream.MsgPong:
			select {
			case s.pongs <- m.Value:
			default:
				return errors.New("QEMU answers pings that nobody sent")
			}
		case migstream.MsgShut:
			s.status = m.Value
			close(s.ended)
			return nil
		case migstream.MsgReqPagesID, migstream.MsgReqPages:
			i := e.layout.find(m.Block)
			if i < 0 {
				return fmt.Errorf("QEMU wants a page of unknown memory %q", m.Block)
			}
			size := e.layout[i].PageSize
			run := pageset.Run{Block: i, First: pageset.Page(m.Start / size), Count: int((uint64(m.Length) + size - 1) / size)}
			if err := e.layout.check(run); err != nil {
				return fmt.Errorf("QEMU wants what is not in memory: %w", err)
			}
			missing, free := e.want(run)
			if _, err := e.settle(parcel{runs: free, urgent: true}); err != nil {
				return err
			}
			if !missing {
				continue
			}
			if st := e.machine.current(); st != Running || !e.running.Load() {
				// While the VM stands still, each of these makes it stand longer: by a round trip.
				e.Log.Debug("fetch", "state", st, "block", m.Block, "offset", m.Start, "length", m.Length)
			}
			if a := e.at.Load(); a != nil { // else it is asked for when the source is back
				if err := a.Lane(link.Fetch).Write(frameRequest, appendRequest(nil, run)); err != nil {
					a.FailSoon(err)
				}
			}
		}
	}
}

// want notes that the guest waits for pages and tells whether they must be asked for. It
// returns those that were left out, with what was left out around them: they are to be
// placed as zero.
func (e *destination) want(r pageset.Run) (missing bool, free []pageRun) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	for p := r.First; p < r.End(); p++ {
		switch {
		case !e.received[r.Block].Has(p):
			missing = true
			e.waiting[pageKey{r.Block, p}] = now
		case e.skipped[r.Block].Has(p):
			e.stats.FreeTouched++
			// Until they are placed they are missing, lest QEMU stops waiting for pages meanwhile.
			// When none is, it is about to: then they read as zero by themselves.
			if e.missing > 0 {
				free = e.takeSkipped(free, r.Block, p)
			}
		}
	}
	return missing, free
}

// freeAround is how much memory that was left out is placed at once when the guest touches
// it: whoever allocated one free page is likely to use the next.
const freeAround = 128 << 10

// takeSkipped takes the pages around p that were left out. The caller holds mu.
func (e *destination) takeSkipped(runs []pageRun, block int, p pageset.Page) []pageRun {
	n := pageset.Page(max(1, freeAround/e.layout[block].PageSize))
	set := e.skipped[block]
	for at, end := p/n*n, p/n*n+n; ; {
		first, count := set.Next(at, int(n))
		if count == 0 || first >= end {
			return runs
		}
		count = min(count, int(end-first))
		set.RemoveRun(first, count)
		e.missing += count
		runs = append(runs, pageRun{pageset.Run{Block: block, First: first, Count: count}, true})
		at = first + pageset.Page(count)
	}
}

// fillLeftOut places all pages that were left out. A QEMU that does not answer may wait for one of
// them, which it asked an engine for that died.
func (e *destination) fillLeftOut() {
	if e.placer.direct.Load() == nil {
		return
	}
	var runs []pageRun
	e.mu.Lock()
	for i, set := range e.skipped {
		most := int(max(1, maxZeroPages*migstream.TargetPageSize/e.layout[i].PageSize))
		for first, n := set.Next(0, most); n > 0; first, n = set.Next(first, most) {
			set.RemoveRun(first, n)
			e.missing += n
			runs = append(runs, pageRun{pageset.Run{Block: i, First: first, Count: n}, true})
		}
	}
	e.mu.Unlock()
	for _, r := range runs {
		if _, err := e.settle(parcel{runs: []pageRun{r}, urgent: true}); err != nil {
			e.failed(nil, err)
		}
	}
}
