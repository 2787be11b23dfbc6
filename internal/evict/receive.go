package evict

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"vacate/internal/evict/pageset"
	"vacate/internal/link"
	"vacate/internal/qemu/migstream"
)

// takeHead makes sure that a source may send this head, and learns the layout.
func (e *destination) takeHead(head []byte) error {
	l, r, err := parseHead(head)
	if err != nil {
		return err
	}
	if err := e.owner.twin().here.holds(l); err != nil {
		return err
	}
	e.adopt(head, l, r)
	return nil
}

// adopt sets a layout. No page has been received yet.
func (e *destination) adopt(head []byte, l layout, r *migstream.Reader) {
	e.incoming.head, e.incoming.layout, e.incoming.reader = head, l, r
	e.pages.begin(l)
	e.units.begin(l)
	if s := e.recovery.stream(); s != nil {
		e.placer = newPlacer(s.conn, r.SectionID(), l)
	}
}

// parseHead parses a head. It accepts nothing but what begins a post-copy migration.
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

// receivePackage receives the pages ahead of the device state, and the device state, and passes
// them to QEMU, which has dropped all of its memory before.
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
		load, err := checkLoad(e.incoming.reader.Resume(bytes.NewReader(f.payload)))
		if err != nil {
			return err
		}
		return e.placer.raw(load)
	}
}

// checkLoad makes sure that the device state is one package and no more.
func checkLoad(r *migstream.Reader) ([]byte, error) {
	var b []byte
	for {
		item, err := r.Next()
		if err != nil {
			return nil, fmt.Errorf("the device state: %w", err)
		}
		b = item.Append(b)
		switch it := item.(type) {
		case migstream.Packaged:
			if _, err := r.Next(); !errors.Is(err, io.ErrUnexpectedEOF) {
				return nil, fmt.Errorf("%w: bytes behind the device state", errFrame)
			}
			return b, nil
		case migstream.Command:
			if it.ID != migstream.CmdSwitchoverStart {
				return nil, fmt.Errorf("%w: %v with the device state", errFrame, it.ID)
			}
		default:
			return nil, fmt.Errorf("%w: %T with the device state", errFrame, item)
		}
	}
}

// receiveLanes starts to receive on the lanes for pages.
func (e *destination) receiveLanes(a *attachment) {
	for _, lane := range []link.Lane{link.Push, link.Fetch} {
		a.begin(func() error {
			err := e.receivePages(a, lane)
			e.failed(nil, err)
			return err
		})
	}
}

// receivePages receives the pages of a lane and passes them to QEMU. It returns when the session
// ends, with the reason.
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
		if kind == frameHuge && l == link.Push {
			if err := e.takeHuge(payload); err != nil {
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
			e.supply.held.mayRead(a)
		}
	}
}

// receive takes a frame of pages, and passes those to QEMU that QEMU lacks; as says how they came.
// It reports whether they are held: then the payload is held, too.
func (e *destination) receive(as parcel, payload []byte) (held bool, err error) {
	runs, data, err := e.incoming.layout.parsePages(nil, payload)
	if err != nil {
		return false, err
	}
	e.units.arrived(runs)
	as.bytes = len(payload)
	as.runs, as.data, as.all = e.pages.claim(runs, data)
	return e.settle(as)
}

// skip notes pages that never come. They read as zero, since QEMU dropped all that did not come
// ahead of the device state. It places those that the guest waits for now.
func (e *destination) skip(payload []byte) error {
	runs, _, err := e.incoming.layout.parsePages(nil, payload)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(runs, func(r pageRun) bool { return !r.Zero }) {
		return fmt.Errorf("%w: pages that are left out, with data", errFrame)
	}
	wanted := e.pages.skip(runs)
	if e.recovery.unasked.Load() { // the guest may wait for any of them
		wanted = append(wanted, e.pages.takeAllSkipped()...)
	}
	_, err = e.settle(parcel{runs: wanted, urgent: true})
	return err
}

// readReturnPath handles what QEMU says on a stream's return path, and requests the pages that QEMU
// wants.
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
			if err := e.fetch(m); err != nil {
				return err
			}
		}
	}
}

// fetch gets the pages that QEMU requests. Those that were left out it places at once, and it
// requests the others from the source.
func (e *destination) fetch(m migstream.Message) error {
	i := e.incoming.layout.find(m.Block)
	if i < 0 {
		return fmt.Errorf("QEMU requested a page of unknown memory %q", m.Block)
	}
	size := e.incoming.layout[i].PageSize
	run := pageset.Run{Block: i, First: pageset.Page(m.Start / size),
		Count: int((uint64(m.Length) + size - 1) / size)}
	if err := e.incoming.layout.check(run); err != nil {
		return fmt.Errorf("QEMU requested pages outside of its memory: %w", err)
	}
	missing, free := e.pages.want(run)
	if _, err := e.settle(parcel{runs: free, urgent: true}); err != nil || !missing {
		return err
	}
	if st := e.machine.current(); st != Running || !e.vm.running.Load() {
		// While the VM stands still, each of these adds a round trip to its down time.
		e.Log.Debug("fetch", "state", st, "block", m.Block, "offset", m.Start, "length", m.Length)
	}
	if a := e.at.Load(); a != nil { // else it is requested when the source is back
		if err := a.Lane(link.Fetch).Write(frameRequest, appendRequest(nil, run)); err != nil {
			a.FailSoon(err)
		}
	}
	return nil
}

// fillLeftOut places all pages that were left out. A QEMU that does not answer may wait for one
// that it requested from an engine which has died.
func (e *destination) fillLeftOut() {
	if e.placer.direct.Load() == nil {
		return
	}
	for _, r := range e.pages.takeAllSkipped() {
		if _, err := e.settle(parcel{runs: []pageRun{r}, urgent: true}); err != nil {
			e.failed(nil, err)
		}
	}
}
