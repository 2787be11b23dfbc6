package evict

import (
	"fmt"
	"time"

	"vacate/link"
	"vacate/migstream"
	"vacate/pageset"
	"vacate/pushorder"
)

// demandTime is how long nothing is pushed where the order is demand-only; as the guest
// may never touch some pages, the eviction would not end otherwise.
const demandTime = 20 * time.Second

// sendEarly sends the pages that loading the devices touches, ahead of the package: the
// destination's QEMU would fetch them one by one while the VM stands still.
func (e *source) sendEarly(a *attachment) error {
	var runs []pageset.Run
	e.mu.Lock()
	for _, w := range e.frozen.runs(touchedByLoading(e.cap.load)) {
		runs = append(runs, e.order.Take(w, pushorder.Early)...)
	}
	e.mu.Unlock()
	e.count(pushorder.Early, runs)
	f := e.pushed
	for len(runs) > 0 {
		var err error
		if runs, err = f.fill(runs); err != nil {
			return err
		}
		e.zero.Add(int64(f.zero))
		if err := f.write(a.control.Conn); err != nil {
			return err
		}
	}
	return nil
}

// beginPush pushes in a session, in which fetches are served already.
func (e *source) beginPush(a *attachment) {
	e.ledger.begin()
	a.begin(func() error { return e.readPlaced(a) })
	a.begin(func() error { return e.pushAll(a) })
	if e.ledger != nil {
		a.begin(func() error { return e.giveBack(a) })
	}
}

// pushAll pushes pages in order until none is left.
func (e *source) pushAll(a *attachment) error {
	lane, f := a.Lane(link.Push), e.pushed
	held := e.Order.Base == pushorder.DemandOnly
	release := time.NewTimer(demandTime)
	defer release.Stop()
	for {
		room := a.window.wait(a.Done())
		if room == 0 {
			return nil
		}
		runs, reason, left := e.next(held, max(1, room/migstream.TargetPageSize))
		if len(runs) == 0 {
			a.window.pass()
		}
		switch {
		case left == 0 && len(runs) == 0:
			return nil
		case len(runs) == 0:
			select {
			case <-e.touched:
			case <-release.C:
				held = false
			case <-a.Done():
				return nil
			}
			continue
		}
		e.count(reason, runs)
		for len(runs) > 0 {
			var err error
			if runs, err = f.fill(runs); err != nil {
				return err
			}
			e.zero.Add(int64(f.zero))
			a.window.send(f.size())
			e.ledger.add(f.size(), f.runs)
			if err := f.write(lane); err != nil {
				return err
			}
		}
	}
}

// next hands out the pages to be pushed next; only neighbours of fetches while the plan is held.
func (e *source) next(held bool, limit int) (runs []pageset.Run, reason pushorder.Reason, left int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if held {
		runs, reason = e.order.NextNear(nil, limit), pushorder.Near
	} else {
		runs, reason = e.order.Next(nil, limit)
	}
	return runs, reason, e.order.Left()
}

// serveFetches answers the requests of the destination, until the lane ends.
func (e *source) serveFetches(a *attachment) error {
	lane, f := a.Lane(link.Fetch), e.fetched
	var buf []byte
	for {
		kind, payload, err := lane.Read(buf, runSize)
		if err != nil {
			return err
		}
		buf = payload
		if kind != frameRequest {
			return fmt.Errorf("%w: type %d on the fetch lane", errFrame, kind)
		}
		run, err := e.frozen.layout.parseRequest(payload)
		if err != nil {
			return err
		}
		e.asked.Add(1)
		e.mu.Lock()
		runs := e.order.Fetch(run)
		e.mu.Unlock()
		e.count(pushorder.Fetched, runs)
		select {
		case e.touched <- struct{}{}:
		default:
		}
		for len(runs) > 0 { // else it is on its way already
			if runs, err = f.fill(runs); err != nil {
				return err
			}
			e.zero.Add(int64(f.zero))
			a.window.fetched(f.size())
			if err := f.write(lane); err != nil {
				return err
			}
		}
	}
}

// readPlaced follows the destination's reports of what it has placed.
func (e *source) readPlaced(a *attachment) error {
	lane := a.Lane(link.Push)
	var buf []byte
	for {
		kind, payload, err := lane.Read(buf, placedSize)
		if err != nil {
			return err
		}
		buf = payload
		if kind != framePlaced {
			return fmt.Errorf("%w: type %d on the push lane", errFrame, kind)
		}
		placed, held, err := parsePlaced(payload)
		if err != nil {
			return err
		}
		if !a.window.report(placed) {
			return fmt.Errorf("%w: report of pages that were not sent", errFrame)
		}
		e.ledger.report(placed, held)
	}
}

// sendSkipped tells the destination which pages never come.
func sendSkipped(a *attachment, skipped []pageset.Run) error {
	lane := a.Lane(link.Push)
	for len(skipped) > 0 {
		n := min(len(skipped), maxRuns)
		runs := make([]pageRun, n)
		for i, r := range skipped[:n] {
			runs[i] = pageRun{r, true}
		}
		if err := lane.Write(frameSkipped, appendPages(nil, runs)); err != nil {
			return err
		}
		skipped = skipped[n:]
	}
	return nil
}
