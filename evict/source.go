package evict

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"vacate/guestmem"
	"vacate/link"
	"vacate/migstream"
	"vacate/pageset"
	"vacate/pushorder"
	"vacate/qmp"
)

// Source moves a VM away from this host.
type Source struct {
	QMP string // path of the QMP socket of the VM's QEMU
	To  string // host:port where the destination listens
	// Dial makes the connections to it; nil for the usual way.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// LoadTimeout is how long the destination may take to load the devices, which is how
	// long the guest may stand still before the eviction is aborted. Default 5 s.
	LoadTimeout time.Duration
	// Order is that of the push; the zero value is pushorder.Default.
	Order pushorder.Policy
	// Enlightenment is where it is learnt what the guest's pages are used for. Default Auto.
	Enlightenment Enlightenment
	// SendFree moves free pages, too.
	SendFree bool
	Log      *slog.Logger
	Show     func(Progress) // called from one goroutine at a time, at least every 100 ms; may be nil
}

// Timeouts of the source, before the commit.
const (
	prepareTimeout = 30 * time.Second
	commitTimeout  = 20 * time.Second
	rollbackTime   = 30 * time.Second
	// settleTime is how long the push must have gone on for its rate to mean something.
	settleTime = 300 * time.Millisecond
	// demandTime is how long nothing is pushed where the order is demand-only; as the guest
	// may never touch some pages, the eviction would not end otherwise.
	demandTime = 20 * time.Second
)

// Evict moves the VM. When ctx is done before the commit, the eviction is aborted and the
// VM runs on here; after it, ctx is no longer heeded, as the VM could no longer be saved.
// The report is filled in as far as things came, also when there is an error, which is an
// *Error.
func (s Source) Evict(ctx context.Context) (Report, error) {
	e := &source{Source: s, started: time.Now(), died: make(chan error, 1), touched: make(chan struct{}, 1)}
	if e.Log == nil {
		e.Log = slog.New(slog.DiscardHandler)
	}
	if e.LoadTimeout == 0 {
		e.LoadTimeout = 5 * time.Second
	}
	if e.Order.Base == pushorder.Unset {
		e.Order = pushorder.Default
	}
	e.machine = newMachine(Preparing, func(st State) {
		e.Log.Info("state", "state", st)
		e.show(st)
	})
	e.Log.Info("state", "state", Preparing)
	e.show(Preparing)
	ticking, stop := context.WithCancel(context.WithoutCancel(ctx))
	var ticker sync.WaitGroup
	ticker.Go(func() { e.tick(ticking) })
	err := e.run(ctx)
	stop()
	ticker.Wait()
	e.close()
	report := e.report(err)
	e.show(e.machine.current())
	return report, err
}

// source is one eviction.
type source struct {
	Source
	started time.Time
	machine *machine

	q       *qmp.Client
	events  *qmp.Subscription
	mem     *guestmem.Memory
	session *link.Session
	changed settings
	offer   offer
	conn    net.Conn // to the source's QEMU
	cap     *capture // nil until QEMU migrates
	frozen  *frozen
	pushed  *frame // of the push lane, and before the push of the control lane
	fetched *frame // of the fetch lane

	frozenAt atomic.Pointer[time.Time]
	control  *controlLane
	died     chan error // the source's QEMU
	window   *window
	summary  summary

	mu    sync.Mutex
	order *pushorder.Order // guarded by mu; nil before the package was read
	light light            // guarded by mu

	touched chan struct{} // capacity 1: something was fetched

	sent  [pushorder.Reasons]atomic.Int64 // pages by reason
	zero  atomic.Int64
	total atomic.Int64
	asked atomic.Int64
	shown sync.Mutex // serialises Show
	tasks sync.WaitGroup
}

func (e *source) run(ctx context.Context) error {
	if err := e.prepare(ctx); err != nil {
		return e.refuse(err)
	}
	if err := e.machine.enter(Switching); err != nil {
		return e.refuse(err)
	}
	if err := e.transfer(ctx); err != nil {
		return e.rollBack(err)
	}
	if err := e.commit(); err != nil {
		return err
	}
	return e.finish()
}

// prepare checks everything that can be checked without touching the VM, and connects.
func (e *source) prepare(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, prepareTimeout, errors.New("preparing took too long"))
	defer cancel()
	if e.q, err = qmp.Dial(ctx, e.QMP); err != nil {
		return err
	}
	e.events = e.q.Subscribe(256)
	if err := recent(e.q.Version()); err != nil {
		return err
	}
	var before settings
	err = together(
		func() error { return e.fit(ctx) },
		func() (err error) {
			before, err = settingsOf(ctx, e.q)
			return err
		},
		func() (err error) {
			e.offer, err = describe(ctx, e.q)
			return err
		},
		func() (err error) {
			if e.mem, err = guestmem.Attach(ctx, e.q); err != nil {
				return err
			}
			e.look(ctx)
			return nil
		},
		func() (err error) {
			e.session, err = link.Dialer{Addr: e.To, Dial: e.Dial}.Session(ctx)
			return err
		})
	if err != nil {
		return err
	}
	e.offer = e.offer.withMemory(e.mem)
	e.offer.LoadTimeout = e.LoadTimeout.Milliseconds()
	e.control = newControlLane(e.session)
	e.tasks.Go(func() { e.control.run(maxJSON) })
	e.tasks.Go(e.watch)
	if err := writeJSON(e.control.Conn, msgOffer, e.offer); err != nil {
		return err
	}
	if _, err := e.await(ctx, msgAccepted); err != nil {
		return err
	}
	e.pushed, e.fetched = newFrame(e.mem), newFrame(e.mem)
	return together(
		func() (err error) {
			e.changed, err = before.configure(ctx, e.q, map[string]any{"max-bandwidth": preCopyBandwidth, "max-postcopy-bandwidth": 0})
			return err
		},
		func() (err error) {
			e.conn, err = socketTo(ctx, e.q, sourceFD, 0)
			return err
		})
}

// fit makes sure that the VM is in a state from which it can be evicted.
func (e *source) fit(ctx context.Context) error {
	status, err := e.q.QueryStatus(ctx)
	if err != nil {
		return err
	}
	m, err := e.q.QueryMigrate(ctx)
	if err != nil {
		return err
	}
	if !over(m.Status) {
		return fmt.Errorf("the VM is being migrated already, the state of that is %q: wait for its end or cancel it", m.Status)
	}
	if !status.Running {
		return fmt.Errorf("the VM is not running, its state is %q: a VM that stands still can be moved at leisure by other means", status.Status)
	}
	return nil
}

// over tells whether a migration of that state leaves room for a new one.
func over(status string) bool {
	switch status {
	case "", "none", "completed", "failed", "cancelled":
		return true
	}
	return false
}

// await waits for a message of the destination.
func (e *source) await(ctx context.Context, kind uint8) ([]byte, error) {
	f, err := e.control.await(ctx, e.died, kind)
	return f.payload, err
}

// watch notices the end of the source's QEMU.
func (e *source) watch() {
	select {
	case <-e.q.Done():
		e.died <- fmt.Errorf("the source's QEMU is gone: %w", e.q.Err())
	case <-e.session.Done():
	}
}

// transfer takes the VM from running here to loaded and paused there.
func (e *source) transfer(ctx context.Context) error {
	if err := e.capture(); err != nil {
		return err
	}
	loading, cancel := context.WithTimeoutCause(ctx, e.LoadTimeout, fmt.Errorf("the destination did not load the devices within %v", e.LoadTimeout))
	defer cancel()
	if err := e.machine.enter(Loading); err != nil {
		return err
	}
	if err := e.sendEarly(); err != nil {
		return err
	}
	if err := e.control.Write(msgLoad, e.cap.load); err != nil {
		return err
	}
	e.window = newWindow(migstream.TargetPageSize)
	e.begin(e.serveFetches)
	settled := make(chan error, 1)
	e.tasks.Go(func() {
		err := e.settle(loading)
		settled <- err
		// Not sooner: on a host with a single core to spare, QEMU needs that until then.
		if err == nil {
			e.enlighten()
		}
	})
	if _, err := e.await(loading, msgLoaded); err != nil {
		cancel()
		<-settled
		return err
	}
	return <-settled
}

// capture freezes the guest and takes the state of its devices from QEMU. It is not to be
// given up half-way: some versions of QEMU never recover from a package that nobody reads.
// So it heeds no context but bounds its time.
func (e *source) capture() error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), switchTimeout, errors.New("saving the devices took too long"))
	defer cancel()
	var err error
	if e.cap, err = startCapture(ctx, e.q, e.conn); err != nil {
		return err
	}
	if err := e.cap.readHead(ctx); err != nil {
		return err
	}
	// The destination's QEMU may look at it while the package is being made.
	headErr := e.control.Write(msgHead, e.cap.head)
	if err := e.cap.readPackage(ctx); err != nil {
		return err
	}
	e.noteFreeze()
	if headErr != nil {
		return headErr
	}
	if e.frozen, err = newFrozen(e.mem, e.cap.layout); err != nil {
		return err
	}
	e.pushed.f, e.fetched.f = e.frozen, e.frozen
	e.total.Store(int64(e.cap.layout.pages()))
	blocks := e.cap.layout.blocks()
	e.order = pushorder.New(blocks, e.Order.Near)
	e.order.SetPlan(pushorder.NewPlan(e.Order, blocks, nil, nil))
	return nil
}

// settle does what the destination need not wait for, while it loads the devices: blocks
// that cannot be read from the process are read from the stream, and QEMU gets to where
// it no longer resumes the guest by itself.
func (e *source) settle(ctx context.Context) error {
	defer close(e.frozen.ready)
	if unlocated := e.frozen.unlocated(); len(unlocated) > 0 {
		var err error
		if e.frozen.streamed, err = e.cap.blocks(ctx, unlocated); err != nil {
			return err
		}
	}
	return e.cap.settle(ctx, e.q)
}

// begin has a task of a lane done. Whoever waits on the control lane notices its failure.
func (e *source) begin(task func() error) {
	e.tasks.Go(func() {
		if err := task(); err != nil {
			e.session.FailSoon(err)
		}
	})
}

// noteFreeze finds out when the guest was frozen, from QEMU's event.
func (e *source) noteFreeze() {
	now := time.Now()
	for {
		select {
		case ev, ok := <-e.events.C:
			if ok && ev.Name == "STOP" {
				// Events carry QEMU's wall clock, which is ours.
				if at := ev.Time; !at.IsZero() && at.After(e.started) && at.Before(now) {
					now = at
				}
			} else if ok {
				continue
			}
		default:
		}
		e.frozenAt.Store(&now)
		return
	}
}

// sendEarly sends the pages that loading the devices touches, ahead of the package: the
// destination's QEMU would fetch them one by one while the VM stands still.
func (e *source) sendEarly() error {
	var runs []pageset.Run
	e.mu.Lock()
	for _, w := range e.frozen.runs(touchedByLoading(e.cap.load)) {
		runs = append(runs, e.order.Take(w, pushorder.Early)...)
	}
	e.mu.Unlock()
	e.sent[pushorder.Early].Add(int64(pageset.Pages(runs)))
	f := e.pushed
	for len(runs) > 0 {
		var err error
		if runs, err = f.fill(runs); err != nil {
			return err
		}
		e.zero.Add(int64(f.zero))
		if err := f.write(e.control.Conn); err != nil {
			return err
		}
	}
	return nil
}

// pushAll pushes pages in order until none is left.
func (e *source) pushAll() error {
	lane, f := e.session.Lane(link.Push), e.pushed
	held := e.Order.Base == pushorder.DemandOnly
	release := time.NewTimer(demandTime)
	defer release.Stop()
	for {
		for wait := e.window.room(); wait != nil; wait = e.window.room() {
			select {
			case <-wait:
			case <-e.session.Done():
				return nil
			}
		}
		pages := max(1, e.window.batch()/migstream.TargetPageSize)
		runs, reason, left := e.next(held, pages)
		switch {
		case left == 0 && len(runs) == 0:
			return nil
		case len(runs) == 0:
			select {
			case <-e.touched:
			case <-release.C:
				held = false
			case <-e.session.Done():
				return nil
			}
			continue
		}
		e.sent[reason].Add(int64(pageset.Pages(runs)))
		for len(runs) > 0 {
			var err error
			if runs, err = f.fill(runs); err != nil {
				return err
			}
			e.zero.Add(int64(f.zero))
			e.window.send(f.size())
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
func (e *source) serveFetches() error {
	lane, f := e.session.Lane(link.Fetch), e.fetched
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
		run, err := e.cap.layout.parseRequest(payload)
		if err != nil {
			return err
		}
		e.asked.Add(1)
		e.mu.Lock()
		runs := e.order.Fetch(run)
		e.mu.Unlock()
		e.sent[pushorder.Fetched].Add(int64(pageset.Pages(runs)))
		select {
		case e.touched <- struct{}{}:
		default:
		}
		for len(runs) > 0 { // else it is on its way already
			if runs, err = f.fill(runs); err != nil {
				return err
			}
			e.zero.Add(int64(f.zero))
			if err := f.write(lane); err != nil {
				return err
			}
		}
	}
}

// readPlaced follows the destination's reports of what it has placed.
func (e *source) readPlaced() error {
	lane := e.session.Lane(link.Push)
	var buf []byte
	for {
		kind, payload, err := lane.Read(buf, 8)
		if err != nil {
			return err
		}
		buf = payload
		if kind != framePlaced || len(payload) != 8 || !e.window.report(binary.BigEndian.Uint64(payload)) {
			return fmt.Errorf("%w: report of type %d on the push lane", errFrame, kind)
		}
	}
}

// commit tells the destination to run the VM. Its word is the only way back from here.
func (e *source) commit() error {
	if err := e.machine.enter(Committing); err != nil {
		return e.rollBack(err)
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), commitTimeout, errors.New("the destination does not answer to the commit"))
	defer cancel()
	err := e.control.Write(msgCommit)
	if err == nil {
		_, err = e.await(ctx, msgRunning)
	}
	if errors.Is(err, errFarewell) {
		return e.rollBack(err)
	}
	if err != nil {
		return e.lost(err, "The commit was sent, so the VM may be running on the destination; here it stays frozen, with its memory intact. "+
			"Ask the destination's QEMU with `query-status`. If it says \"running\", let it run as far as it gets. Only if that QEMU is gone or never ran: quit it, and this VM may be brought back here")
	}
	// Not sooner: pages that arrive while the destination loads the devices take the CPU
	// that it needs for that.
	e.begin(e.readPlaced)
	e.begin(e.pushAll)
	// From here on nothing must resume the source. Its stream is not at its end, so
	// closing it leaves the guest frozen.
	e.conn.Close()
	return e.machine.enter(Pushing)
}

// finish waits until the destination has everything and retires the source.
func (e *source) finish() error {
	payload, err := e.await(context.Background(), msgComplete)
	if err == nil {
		err = decode(payload, &e.summary)
	}
	if err != nil {
		return e.lost(err, fmt.Sprintf("The VM was running on the destination, with %d of %d pages dealt with; if its QEMU still lives, it stops where it touches one that is missing. "+
			"Here it stays frozen, with all of its memory: do not resume it and do not end its QEMU", e.settled(), e.total.Load()))
	}
	if err := e.machine.enter(Retiring); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), rollbackTime)
	defer cancel()
	if err := e.q.Quit(ctx); err != nil {
		e.Log.Warn("the source's QEMU does not quit; the VM is safe on the destination, end it by hand", "pid", e.q.PeerPID(), "error", err)
	}
	return e.machine.enter(Completed)
}

func (e *source) lost(err error, remedy string) error {
	from := e.machine.current()
	return &Error{ErrLost, from, errors.Join(err, e.machine.enter(Lost)), remedy}
}

// refuse ends an eviction that touched nothing.
func (e *source) refuse(err error) error {
	from := e.machine.current()
	ctx, cancel := context.WithTimeout(context.Background(), rollbackTime)
	defer cancel()
	if e.control != nil {
		writeJSON(e.control.Conn, msgAbort, farewell{err.Error()})
	}
	if e.q != nil {
		err = errors.Join(err, e.changed.restore(ctx, e.q))
	}
	outcome := ErrRefused
	if errors.Is(err, context.Canceled) {
		outcome = ErrAborted
	}
	return &Error{outcome, from, errors.Join(err, e.machine.enter(Refused)), "The VM runs on, untouched"}
}

// rollBack resumes the guest here. It is legal only while the destination cannot run it:
// before the commit, or when the destination says that it never did.
func (e *source) rollBack(cause error) error {
	from := e.machine.current()
	if err := e.machine.enter(RollingBack); err != nil {
		return err
	}
	if e.control != nil {
		// Without a commit the destination never runs the VM, whether this arrives or not.
		writeJSON(e.control.Conn, msgAbort, farewell{cause.Error()})
		e.session.Fail(cause)
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), rollbackTime, errors.New("rolling back took too long"))
	defer cancel()
	if err := e.resume(ctx); err != nil {
		if e.gone() {
			return &Error{ErrLost, from, errors.Join(cause, err, e.machine.enter(Lost)),
				"The source's QEMU ended during the eviction, and with it the VM; the destination never ran it. Start it anew"}
		}
		return &Error{ErrLost, from, errors.Join(cause, fmt.Errorf("roll back: %w", err), e.machine.enter(Lost)),
			"The VM stands frozen here, with its memory intact; the destination never ran it. Try `cont` on its QMP socket"}
	}
	if err := e.changed.restore(ctx, e.q); err != nil {
		e.Log.Warn("could not put the migration settings of the VM's QEMU back", "error", err)
	}
	return &Error{ErrAborted, from, errors.Join(cause, e.machine.enter(Aborted)), "The VM runs on here, unharmed"}
}

func (e *source) gone() bool {
	select {
	case <-e.q.Done():
		return true
	default:
		return false
	}
}

// resume brings the guest back to running, from wherever QEMU is in its migration. What
// QEMU does when its stream ends differs by version and moment, so its state decides.
func (e *source) resume(ctx context.Context) error {
	e.conn.Close()
	var refused error
	for {
		m, err := e.q.QueryMigrate(ctx)
		if err != nil {
			return err
		}
		status, err := e.q.QueryStatus(ctx)
		if err != nil {
			return err
		}
		switch {
		case status.Running && over(m.Status):
			return nil
		case m.Status == "postcopy-paused":
			if err := e.cap.pretendComplete(ctx, e.q); err != nil {
				return err
			}
		case over(m.Status) && (status.Status == "postmigrate" || status.Status == "paused"):
			// While the destination's QEMU lives, it may hold the locks of the disks.
			if refused = e.q.Cont(ctx); refused != nil && !isRefusal(refused) {
				return refused
			}
		}
		select {
		case <-ctx.Done():
			return errors.Join(refused, fmt.Errorf("%w; the migration's state is %q, the VM's %q", context.Cause(ctx), m.Status, status.Status))
		case <-time.After(pollInterval):
		}
	}
}

// close ends everything that was started.
func (e *source) close() {
	if e.session != nil {
		e.session.Close()
	}
	if e.conn != nil {
		e.conn.Close()
	}
	e.tasks.Wait()
	if e.mem != nil {
		e.mem.Close()
	}
	if e.q != nil {
		e.q.Close()
	}
}

// report sums the eviction up.
func (e *source) report(err error) Report {
	r := Report{Outcome: "completed", Machine: e.offer.Machine, QEMU: e.offer.QEMU, Phases: e.machine.phases()}
	var failed *Error
	if errors.As(err, &failed) {
		r.Outcome, r.Reason = failed.Outcome.Error(), err.Error()
	}
	since := func(from time.Time, to State) *float64 {
		at := e.machine.at(to)
		if at.IsZero() || from.IsZero() {
			return nil
		}
		s := at.Sub(from).Seconds()
		return &s
	}
	begun := e.machine.at(Switching)
	if !begun.IsZero() {
		r.Begun = &begun
	}
	r.Prepare, r.Transfer, r.Total = since(e.started, Switching), since(begun, Pushing), since(begun, Completed)
	if at := e.frozenAt.Load(); at != nil {
		r.Down = since(*at, Pushing)
	}
	r.Pages = PageCounts{
		Total: int(e.total.Load()), Early: e.pages(pushorder.Early), Zero: int(e.zero.Load()), Duplicate: e.summary.Duplicate,
		Pushed: e.pages(pushorder.Planned), Near: e.pages(pushorder.Near), Fetched: e.pages(pushorder.Fetched),
		Skipped: e.pages(pushorder.Skipped), SkippedTouched: e.summary.FreeTouched,
	}
	r.Order, r.Enlightenment = e.Order.String(), e.account()
	r.Fetch = quantiles(e.summary.FetchDelays)
	if r.Fetch != nil {
		r.Fetch.Count = e.summary.Fetches
	}
	if e.window != nil {
		r.RoundTrip = e.window.roundTrip()
	}
	if e.session != nil {
		sent, received := e.session.Bytes()
		r.LinkBytes = sent + received
		if took := since(e.machine.at(Pushing), Retiring); took != nil {
			r.Rate = float64(sent) / *took
		}
	}
	return r
}

func (e *source) pages(why pushorder.Reason) int { return int(e.sent[why].Load()) }

// settled is the number of pages that are sent, or need not be.
func (e *source) settled() int {
	n := int64(0)
	for i := range e.sent {
		n += e.sent[i].Load()
	}
	return int(n)
}

// tick shows the progress every 100 ms.
func (e *source) tick(ctx context.Context) {
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			e.show(e.machine.current())
		}
	}
}

func (e *source) show(st State) {
	if e.Show == nil {
		return
	}
	e.shown.Lock()
	defer e.shown.Unlock()
	p := Progress{State: st, Elapsed: time.Since(e.started), Pages: e.settled(), Total: int(e.total.Load()), Fetches: int(e.asked.Load())}
	if p.Total > 0 {
		sent, _ := e.session.Bytes()
		p.Bytes = sent
	}
	if at := e.machine.at(Pushing); !at.IsZero() {
		if took := time.Since(at); took > settleTime {
			p.Rate = float64(p.Bytes) / took.Seconds()
			sent := p.Pages - e.pages(pushorder.Skipped)
			p.ETA = time.Duration(float64(took) * float64(p.Total-p.Pages) / float64(max(1, sent)))
		}
	}
	e.Show(p)
}
