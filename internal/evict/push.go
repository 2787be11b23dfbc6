package evict

import (
	"context"
	"fmt"
	"sync"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/evict/pushorder"
	"vacate/internal/guest/linux"
	"vacate/internal/link"
	"vacate/internal/qemu/migstream"
	"vacate/internal/sys/units"
)

// demandTime is how long a demand-only order pushes nothing. The guest may never touch some pages,
// so the eviction would not end otherwise.
const demandTime = 20 * time.Second

// sendEarly sends the pages that loading the devices touches, ahead of the device state. Otherwise
// the destination's QEMU would fetch them one by one while the VM stands still. On a long path the
// pages that the vCPUs touch at once go with them: there, each costs more than finding them all.
func (e *source) sendEarly(a *attachment) error {
	addresses := touchedByLoading(e.halted.saved.load, e.image.frozen.readGuest)
	if e.proposal.far && e.mayLook() {
		atOnce, err := e.touchedAtOnce()
		if err != nil {
			e.Log.Debug("what the vCPUs touch at once is not sent ahead", "error", err)
		}
		addresses = append(addresses, atOnce...)
	}
	wanted := e.image.frozen.runs(addresses)
	l := e.image.frozen.layout
	for _, name := range e.proposal.flash {
		if i := l.find(name); i >= 0 && l[i].Length <= maxFlash {
			wanted = append(wanted, pageset.Run{Block: i, Count: l[i].Pages})
		}
	}
	runs := e.departures.take(wanted, pushorder.Early)
	return e.send(a.control.Conn, e.image.pushed, pushorder.Early, runs, func() {})
}

// farTrip is how long it takes on a long path to open TCP's window. At 1 Gbit/s the bytes alone
// take 6 ms. Only tests change it.
var farTrip = 20 * time.Millisecond

const (
	// maxAtOnce bounds the pages that the vCPUs touch at once and that are sent ahead.
	maxAtOnce = 128
	// atOnceTime is how long QEMU may take to tell the registers, while the VM stands still.
	atOnceTime = 100 * time.Millisecond
)

// touchedAtOnce returns guest-physical addresses that the frozen guest's vCPUs touch at once.
func (e *source) touchedAtOnce() (addresses []uint64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), atOnceTime)
	defer cancel()
	if err := e.readRegisters(ctx); err != nil {
		return nil, err
	}
	live, err := linux.NewLive(e.mem, e.facts.Registers)
	if err != nil {
		return nil, err
	}
	list, err := linux.AtOnce(ctx, live)
	for _, page := range list[:min(len(list), maxAtOnce)] {
		addresses = append(addresses, page*units.PageSize)
	}
	return addresses, err
}

// send sends pages on a lane, in as many frames f as they need. It calls note before it writes
// each.
func (e *source) send(lane *link.Conn, f *frame, why pushorder.Reason, runs []pageset.Run,
	note func()) error {
	e.departures.count(why, runs)
	for len(runs) > 0 {
		var err error
		if runs, err = f.fill(runs); err != nil {
			return err
		}
		note()
		if err := f.write(lane); err != nil {
			return err
		}
	}
	return nil
}

// beginPush pushes in a session that already serves fetches. The VM need not run there yet: pages
// are only data.
func (e *source) beginPush(a *attachment) {
	e.giving.ledger.begin()
	e.sessions.beginPush(a, e.departures.sentPages())
	p := &pusher{source: e, a: a, held: e.Order.Base == pushorder.DemandOnly && e.facts.Stood == "",
		again: time.NewTimer(0)}
	a.begin(p.readPlaced)
	a.begin(p.run)
}

// pusher is the push of one session. Two goroutines send frames when there is room. The reader of
// the destination's reports does, as each report makes room. When something else does, run sends.
// Waking run for each frame would take a fifth more of a core that VMs want.
type pusher struct {
	*source
	a     *attachment
	again *time.Timer // run must look for room then

	mu   sync.Mutex // guards what follows, and the frame
	held bool       // the pusher pushes only neighbours of fetches
	over bool       // nothing is left
}

// run pushes pages in order until none is left.
func (p *pusher) run() error {
	defer p.again.Stop()
	release := time.NewTimer(demandTime)
	defer release.Stop()
	for {
		if over, err := p.push(); over || err != nil {
			return err
		}
		select {
		case <-p.a.window.wake:
		case <-p.again.C:
		case <-p.touched:
		case <-release.C:
			p.mu.Lock()
			p.held = false
			p.mu.Unlock()
		case <-p.a.Done():
			return nil
		}
	}
}

// push sends what there is room for. It reports whether nothing is left.
func (p *pusher) push() (over bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	window := p.a.window
	for !p.over {
		room, again := window.room()
		if room == 0 {
			p.again.Reset(again)
			return false, nil
		}
		runs, reason, left := p.departures.next(p.held, max(1, room/migstream.TargetPageSize))
		if len(runs) == 0 {
			window.pass()
			p.over = left == 0 // if pages are left, they wait until something is fetched
			return p.over, nil
		}
		runs, err := p.withMemory(runs)
		if err != nil {
			return false, err
		}
		err = p.send(p.a.Lane(link.Push), p.image.pushed, reason, runs, func() {
			window.send(p.image.pushed.size())
			p.giving.ledger.add(p.image.pushed.size(), p.image.pushed.runs)
		})
		if err != nil {
			return false, err
		}
	}
	return true, nil
}

// withMemory returns those of the pages for which QEMU has memory, and leaves out the others. The
// push may come to pages before leaveOutUnused does, which gives way to everybody.
func (p *pusher) withMemory(runs []pageset.Run) ([]pageset.Run, error) {
	if p.image.unusedKnown.Load() {
		return runs, nil
	}
	var used, unused []pageset.Run
	for _, r := range runs {
		with, without, err := p.image.frozen.split(r)
		if err != nil {
			return runs, nil // leaveOutUnused says so
		}
		used, unused = append(used, with...), append(unused, without...)
	}
	if len(unused) == 0 {
		return runs, nil
	}
	p.departures.leaveOut(unused, pushorder.Unused)
	return used, sendSkipped(p.a, unused)
}

// serveFetches answers the destination's requests until the lane ends.
func (e *source) serveFetches(a *attachment) error {
	lane, f := a.Lane(link.Fetch), e.image.fetched
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
		run, err := e.image.frozen.layout.parseRequest(payload)
		if err != nil {
			return err
		}
		runs := e.departures.fetch(run)
		select {
		case e.touched <- struct{}{}:
		default:
		}
		// If there are none, they are on their way already.
		if err := e.send(lane, f, pushorder.Fetched, runs,
			func() { a.window.fetched(f.size()) }); err != nil {
			return err
		}
	}
}

// readPlaced handles the destination's reports of what it has placed.
func (p *pusher) readPlaced() error {
	lane := p.a.Lane(link.Push)
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
		if !p.a.window.report(placed) {
			return fmt.Errorf("%w: report of pages that were not sent", errFrame)
		}
		p.giving.ledger.report(placed, held)
		if _, err := p.push(); err != nil {
			return err
		}
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
