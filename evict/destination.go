package evict

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"vacate/guestmem"
	"vacate/link"
	"vacate/migstream"
	"vacate/pageset"
	"vacate/qmp"

	"golang.org/x/sys/unix"
)

// Destination receives a VM on this host.
type Destination struct {
	// QMP is the path of the QMP socket of a QEMU that was started as the source's was,
	// with `-S -incoming defer` in addition.
	QMP string
	// ThroughQEMU has all pages loaded by QEMU itself. By default they are placed in its
	// memory directly where this process has the right to, which is several times faster.
	ThroughQEMU bool
	Log         *slog.Logger
}

// Receive waits on ln for a source and takes its VM. A source whose VM does not fit, or a
// peer that is none, is turned away without touching the QEMU, and the wait goes on until
// ctx is done. From the first byte given to the QEMU on, it is used up: it runs the VM in
// the end, or it was killed and never ran it. Errors are *Error.
func (d Destination) Receive(ctx context.Context, ln net.Listener) error {
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	e := &destination{Destination: d}
	e.machine = newMachine(Waiting, func(st State) { d.Log.Info("state", "state", st) })
	defer e.close()
	d.Log.Info("state", "state", Waiting)
	if err := e.prepare(ctx); err != nil {
		return &Error{ErrRefused, Waiting, err, ""}
	}
	sessions := link.NewListener(ln, link.ListenOptions{TurnedAway: func(from string, err error) {
		d.Log.Warn("peer turned away", "from", from, "error", err)
	}})
	defer sessions.Close()
	var offered offer
	for {
		session, err := sessions.Accept(ctx)
		if err != nil {
			return &Error{ErrRefused, Waiting, err, "The QEMU that waits here was not touched"}
		}
		e.session = session
		e.control = newControlLane(session)
		e.tasks.Go(func() { e.control.run(maxControl) })
		offered, err = e.consider(ctx)
		if err != nil {
			d.Log.Warn("offer refused", "source", session.Peer(), "error", err)
			session.Close()
			select {
			case <-e.q.Done():
				return &Error{ErrRefused, Waiting, err, "The QEMU that waited here is gone"}
			default:
			}
			continue
		}
		d.Log.Info("offer accepted", "source", session.Peer(), "machine", offered.Machine)
		break
	}
	sessions.Close()
	return e.take(ctx, time.Duration(offered.LoadTimeout)*time.Millisecond)
}

// destination is one eviction.
type destination struct {
	Destination
	machine *machine

	q       *qmp.Client
	process int // pidfd of the QEMU
	mem     *guestmem.Memory
	here    offer
	session *link.Session
	control *controlLane
	failed  chan error // something here broke

	conn   net.Conn // to the QEMU
	pongs  chan uint32
	ended  chan struct{} // closed when QEMU has ended its migration
	status uint32        // with which it did; set before ended is closed
	layout layout
	placer *placer
	tasks  sync.WaitGroup

	mu       sync.Mutex
	received []*pageset.Set        // guarded by mu; those left out count as received
	skipped  []*pageset.Set        // left out and not yet placed as zero; guarded by mu
	missing  int                   // pages not received; guarded by mu
	whole    chan struct{}         // closed when missing falls to 0
	waiting  map[pageKey]time.Time // pages asked for and when; guarded by mu
	delays   []float64             // seconds; guarded by mu
	stats    summary               // guarded by mu
}

type pageKey struct {
	block int
	page  pageset.Page
}

// maxLoadTimeout is the longest that a source may have us wait with the devices loaded.
const maxLoadTimeout = 10 * time.Minute

// maxDelays bounds the fetch latencies that are kept.
const maxDelays = 1 << 20

// prepare looks at the QEMU that waits here.
func (e *destination) prepare(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, prepareTimeout, errors.New("preparing took too long"))
	defer cancel()
	e.process = -1
	if e.q, err = qmp.Dial(ctx, e.QMP); err != nil {
		return err
	}
	if err := recent(e.q.Version()); err != nil {
		return err
	}
	status, err := e.q.QueryStatus(ctx)
	if err != nil {
		return err
	}
	var m struct {
		Status    string `json:"status"`
		Listening []any  `json:"socket-address"`
	}
	if err := e.q.Run(ctx, "query-migrate", nil, &m); err != nil {
		return err
	}
	if m.Listening != nil && m.Status == "" {
		m.Status = "listening for another source"
	}
	if status.Status != "inmigrate" || m.Status != "" && m.Status != "none" {
		return fmt.Errorf("the QEMU at %s does not wait for a VM (its state is %q %s): start it as the source's, with -S -incoming defer in addition", e.QMP, status.Status, m.Status)
	}
	if e.mem, err = guestmem.Attach(ctx, e.q); err != nil {
		return err
	}
	if e.process, err = unix.PidfdOpen(e.mem.PID(), 0); err != nil {
		return fmt.Errorf("hold on to QEMU's process %d: %w", e.mem.PID(), err)
	}
	if err := startsPaused(e.mem.PID()); err != nil {
		return err
	}
	if e.here, err = describe(ctx, e.q); err != nil {
		return err
	}
	e.here = e.here.withMemory(e.mem)
	if err := hasRoom(e.mem); err != nil {
		return err
	}
	before, err := settingsOf(ctx, e.q)
	if err != nil {
		return err
	}
	if _, err := before.configure(ctx, e.q, nil); err != nil {
		return explainPostcopy(err)
	}
	return nil
}

// startsPaused makes sure that QEMU was started with -S. Without it, it would run the VM
// as soon as the devices are loaded, before anyone agreed to that.
func startsPaused(pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return fmt.Errorf("read QEMU's command line: %w", err)
	}
	args := strings.Split(string(b), "\x00")
	if !slices.Contains(args, "-S") && !slices.Contains(args, "--S") {
		return errors.New("the QEMU that waits here was started without -S and would run the VM without being told to: start it with -S -incoming defer")
	}
	return nil
}

// explainPostcopy adds what to do to QEMU's refusal of post-copy.
func explainPostcopy(err error) error {
	b, readErr := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd")
	if readErr != nil {
		return fmt.Errorf("%w: this kernel has no userfaultfd, which post-copy needs", err)
	}
	if strings.TrimSpace(string(b)) == "0" {
		return fmt.Errorf("%w: QEMU may not use userfaultfd: run `sysctl vm.unprivileged_userfaultfd=1`, or run QEMU with CAP_SYS_PTRACE", err)
	}
	return err
}

// consider reads an offer and answers it.
func (e *destination) consider(ctx context.Context) (o offer, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, prepareTimeout, errors.New("no offer came"))
	defer cancel()
	f, err := e.control.await(ctx, nil, msgOffer)
	if err != nil {
		return o, err
	}
	err = decode(f.payload, &o)
	if err == nil && (o.LoadTimeout <= 0 || o.LoadTimeout > maxLoadTimeout.Milliseconds()) {
		err = fmt.Errorf("%w: %d ms for loading the devices", errFrame, o.LoadTimeout)
	}
	if err == nil {
		err = o.mismatch(e.here)
	}
	if err == nil {
		if e.conn != nil {
			e.conn.Close() // of an offer before, whose source went away
		}
		// That QEMU takes it shows that it is not stuck, while nothing is lost yet.
		e.conn, err = socketTo(ctx, e.q, destinationFD, qemuBuffer)
	}
	if err != nil {
		writeJSON(e.control.Conn, msgAbort, farewell{err.Error()})
		return o, err
	}
	return o, e.control.Write(msgAccepted)
}

// take receives the VM.
func (e *destination) take(ctx context.Context, loadTimeout time.Duration) error {
	committing, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(prepareTimeout+switchTimeout, func() { cancel(errors.New("no package came")) })
	defer timer.Stop()
	reader, err := e.arm(committing)
	if err == nil {
		err = e.receivePackage(committing, reader)
	}
	if err == nil {
		timer.Stop()
		timer = time.AfterFunc(loadTimeout, func() { cancel(errors.New("no commit came in time")) })
		defer timer.Stop()
		err = e.load(committing)
	}
	if err == nil {
		_, err = e.control.await(committing, e.failed, msgCommit)
	}
	if err != nil {
		return e.abort(err)
	}
	if err := e.machine.enter(Running); err != nil {
		return e.abort(err)
	}
	if err := e.q.Cont(context.WithoutCancel(ctx)); err != nil {
		if isRefusal(err) {
			return e.abort(fmt.Errorf("the VM could not be started here: %w", err))
		}
		return e.lost(err, "QEMU was told to run the VM and did not answer: ask it with `query-status`")
	}
	if err := e.finish(); err != nil {
		// Not the farewell of one that never ran the VM.
		writeJSON(e.control.Conn, msgFailed, farewell{err.Error()})
		select {
		case <-e.q.Done():
			return e.lost(err, "The QEMU here ended, and with it the VM as it was here. The source holds its memory and devices as they were when it was frozen there: do not end its QEMU")
		default:
		}
		e.mu.Lock()
		missing := e.missing
		e.mu.Unlock()
		return e.lost(err, fmt.Sprintf("The VM runs here and stops where it touches one of the %d pages that are missing. The source holds them, frozen: end neither QEMU", missing))
	}
	return e.machine.enter(Completed)
}

// fail notes that something here broke. Whoever waits for the source or QEMU then stops waiting.
func (e *destination) fail(err error) {
	select {
	case e.failed <- err:
	default: // the first counts
	}
}

// arm has QEMU wait for the stream, and gives it its head.
func (e *destination) arm(ctx context.Context) (*migstream.Reader, error) {
	if err := e.machine.enter(Arming); err != nil {
		return nil, err
	}
	if err := e.q.MigrateIncoming(ctx, "fd:"+destinationFD); err != nil {
		return nil, err
	}
	f, err := e.control.await(ctx, nil, msgHead)
	if err != nil {
		return nil, err
	}
	head := f.payload
	reader, err := e.checkHead(head)
	if err != nil {
		return nil, err
	}
	e.pongs, e.ended, e.failed = make(chan uint32, 16), make(chan struct{}), make(chan error, 1)
	e.tasks.Go(func() {
		if err := e.readReturnPath(); err != nil {
			e.fail(err)
		}
	})
	return reader, e.placer.raw(head)
}

// load hands the package's pages on and waits until the VM is loaded and paused.
func (e *destination) load(ctx context.Context) error {
	if err := e.machine.enter(Loading); err != nil {
		return err
	}
	for _, lane := range []link.Lane{link.Push, link.Fetch} {
		e.tasks.Go(func() {
			if err := e.receivePages(lane); errors.Is(err, errQEMU) {
				e.fail(err)
			} else {
				e.session.FailSoon(err)
			}
		})
	}
	// The package's own ping, which QEMU sends ahead of RUN, comes back when the devices are loaded.
	if err := e.awaitPong(ctx, pingLoaded); err != nil {
		return err
	}
	for {
		status, err := e.q.QueryStatus(ctx)
		if err != nil {
			return err
		}
		if status.Status == "paused" {
			break
		}
		if status.Status != "inmigrate" {
			return fmt.Errorf("the destination's QEMU went to state %q in place of paused", status.Status)
		}
		if err := e.pause(ctx); err != nil {
			return err
		}
	}
	if err := e.machine.enter(Prepared); err != nil {
		return err
	}
	if err := e.control.Write(msgLoaded); err != nil {
		return err
	}
	if !e.ThroughQEMU {
		d, err := openDirect(e.process, e.mem, e.layout)
		if err != nil {
			e.Log.Info("pages go through QEMU's stream", "reason", err)
		} else {
			e.placer.direct.Store(d)
		}
	}
	return nil
}

const (
	destinationFD = "vacate-destination" // QEMU's name for its end of our socket
	pingLoaded    = 3                    // QEMU's, at the end of the package
	// qemuBuffer is the socket buffer of what is written to QEMU: a fetched page waits
	// behind what is in it.
	qemuBuffer = 128 << 10
)

// checkHead makes sure that the head is what a source may send, and learns the layout.
func (e *destination) checkHead(head []byte) (*migstream.Reader, error) {
	r := migstream.NewReader(bytes.NewReader(head))
	for {
		item, err := r.Next()
		if err != nil {
			return nil, fmt.Errorf("the stream's head: %w", err)
		}
		switch it := item.(type) {
		case migstream.Header, migstream.Configuration, migstream.SectionStart, migstream.EOS:
		case migstream.Command:
			switch it.ID {
			case migstream.CmdOpenReturnPath, migstream.CmdPing, migstream.CmdPostcopyAdvise:
			default:
				return nil, fmt.Errorf("%w: %v in the stream's head", errFrame, it.ID)
			}
		case migstream.MemSize:
			if e.layout, err = newLayout(it.Blocks); err != nil {
				return nil, err
			}
			if err := e.here.holds(e.layout); err != nil {
				return nil, err
			}
		case migstream.Footer:
			if r.Offset() != int64(len(head)) {
				return nil, fmt.Errorf("%w: bytes behind the stream's head", errFrame)
			}
			e.placer = newPlacer(e.conn, r.SectionID(), e.layout)
			for _, b := range e.layout {
				e.received = append(e.received, pageset.New(b.Pages))
				e.skipped = append(e.skipped, pageset.New(b.Pages))
			}
			e.missing = e.layout.pages()
			e.whole = make(chan struct{})
			e.waiting = map[pageKey]time.Time{}
			return r, nil
		default:
			return nil, fmt.Errorf("%w: %T in the stream's head", errFrame, item)
		}
	}
}

// receivePackage receives the pages that come ahead of the package, and the package, and
// hands them to QEMU. In between it has QEMU drop what it has of all other pages: it wrote
// ROMs into them when it started.
func (e *destination) receivePackage(ctx context.Context, head *migstream.Reader) error {
	for {
		f, err := e.control.await(ctx, e.failed, framePages, msgLoad)
		if err != nil {
			return err
		}
		if f.kind == framePages {
			if err := e.receive(f.payload, false); err != nil {
				return err
			}
			continue
		}
		load, err := checkLoad(head.Resume(bytes.NewReader(f.payload)))
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

// receivePages receives the pages of a lane and hands them to QEMU, until the session
// ends, and returns why it did.
func (e *destination) receivePages(l link.Lane) error {
	lane := e.session.Lane(l)
	var buf, report []byte
	placed := uint64(0)
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
		if err := e.receive(payload, l == link.Fetch); err != nil {
			return err
		}
		if l == link.Push {
			placed += uint64(len(payload))
			report = binary.BigEndian.AppendUint64(report[:0], placed)
			if err := lane.Write(framePlaced, report); err != nil {
				return err
			}
		}
	}
}

// receive takes a frame of pages and hands those to QEMU that it does not have yet.
func (e *destination) receive(payload []byte, urgent bool) error {
	runs, data, err := e.layout.parsePages(nil, payload)
	if err != nil {
		return err
	}
	runs, data = e.claim(runs, data)
	if len(runs) == 0 {
		return nil
	}
	if err := e.placer.place(runs, data, urgent); err != nil {
		return err
	}
	e.placed(runs)
	return nil
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
	if n > 0 && e.missing == 0 {
		close(e.whole)
	}
	e.mu.Unlock()
	if len(wanted) == 0 {
		return nil
	}
	if err := e.placer.place(wanted, nil, true); err != nil {
		return err
	}
	e.placed(wanted)
	return nil
}

// claim marks pages as received and drops those that already were: QEMU takes a page that
// comes twice for an error.
func (e *destination) claim(runs []pageRun, data []byte) ([]pageRun, []byte) {
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
		return runs, data
	}
	var fresh []pageRun
	var kept []byte
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
	return fresh, kept
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
	if e.missing == 0 {
		close(e.whole)
	}
}

// readReturnPath follows what QEMU says, and asks the source for the pages it wants.
func (e *destination) readReturnPath() error {
	r := migstream.NewReturnReader(e.conn, 0)
	lane := e.session.Lane(link.Fetch)
	var request []byte
	for {
		m, err := r.Next()
		if err != nil {
			return fmt.Errorf("%w: it closed its migration: %w", errQEMU, err)
		}
		switch m.Type {
		case migstream.MsgPong:
			select {
			case e.pongs <- m.Value:
			default:
				return errors.New("QEMU answers pings that nobody sent")
			}
		case migstream.MsgShut:
			e.status = m.Value
			close(e.ended)
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
			if len(free) > 0 {
				if err := e.placer.place(free, nil, true); err != nil {
					return err
				}
				e.placed(free)
			}
			if !missing {
				continue
			}
			if st := e.machine.current(); st != Running {
				// While the VM stands still, each of these makes it stand longer.
				e.Log.Debug("fetch", "state", st, "block", m.Block, "offset", m.Start, "length", m.Length)
			}
			request = appendRequest(request[:0], run)
			if err := lane.Write(frameRequest, request); err != nil {
				return err
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

// awaitPong waits until QEMU has loaded all before a ping.
func (e *destination) awaitPong(ctx context.Context, value uint32) error {
	for {
		select {
		case v := <-e.pongs:
			if v == value {
				return nil
			}
		case f := <-e.control.frames:
			return f.check()
		case err := <-e.failed:
			return err
		case <-e.session.Done():
			return e.session.Err()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// pause waits for a moment. It fails at once if the eviction has failed.
func (e *destination) pause(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, pollInterval, errMoment)
	defer cancel()
	if _, err := e.control.await(ctx, e.failed); !errors.Is(err, errMoment) {
		return err
	}
	return nil
}

var errMoment = errors.New("a moment has passed")

// explain finds QEMU's own reason behind an error, if it gives one.
func (e *destination) explain(err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second/2)
	defer cancel()
	m, qerr := e.q.QueryMigrate(ctx)
	switch {
	case qerr == nil && m.ErrorDesc != "":
		return fmt.Errorf("%w; it says: %s", err, m.ErrorDesc)
	case errors.Is(qerr, qmp.ErrClosed):
		return fmt.Errorf("the destination's QEMU ended; its own messages say why (devices or disks that differ from the source's are the usual reason): %w", err)
	}
	return err
}

// finish tells the source that the VM runs, and completes QEMU's migration when all pages are there.
func (e *destination) finish() error {
	if err := e.control.Write(msgRunning); err != nil {
		return err
	}
	wait := func(done <-chan struct{}) error {
		select {
		case <-done:
			return nil
		case err := <-e.failed:
			return e.explain(err)
		case <-e.session.Done():
			return e.session.Err()
		}
	}
	if err := wait(e.whole); err != nil {
		return err
	}
	if err := e.machine.enter(Completing); err != nil {
		return err
	}
	if err := e.placer.end(); err != nil {
		return e.explain(err)
	}
	if err := wait(e.ended); err != nil {
		return err
	}
	if e.status != 0 {
		return e.explain(fmt.Errorf("QEMU ended its migration with status %d", e.status))
	}
	e.mu.Lock()
	slices.Sort(e.delays)
	stats := e.stats
	step := len(e.delays)/1000 + 1
	for i := len(e.delays) - 1; i >= 0; i -= step {
		stats.FetchDelays = append(stats.FetchDelays, e.delays[i])
	}
	slices.Reverse(stats.FetchDelays)
	e.mu.Unlock()
	// The VM is whole here; if the source does not hear it, only the source has a problem.
	if err := writeJSON(e.control.Conn, msgComplete, stats); err != nil {
		e.Log.Warn("the VM is whole here, but the source could not be told", "error", err)
	}
	return nil
}

// abort ends an attempt that never ran the VM: it ends the QEMU, so that it never will,
// and then says so.
func (e *destination) abort(err error) error {
	from := e.machine.current()
	err = e.explain(err)
	if killErr := unix.PidfdSendSignal(e.process, unix.SIGKILL, nil, 0); killErr != nil && !errors.Is(killErr, unix.ESRCH) {
		return e.lost(errors.Join(err, fmt.Errorf("end the QEMU here: %w", killErr)), "The VM never ran here. End this QEMU by hand")
	}
	select {
	case <-e.q.Done():
	case <-time.After(5 * time.Second):
	}
	writeJSON(e.control.Conn, msgAbort, farewell{err.Error()})
	return &Error{ErrAborted, from, errors.Join(err, e.machine.enter(Aborted)), "The VM never ran here, and the QEMU that was to take it was ended; it runs on on the source"}
}

func (e *destination) lost(err error, remedy string) error {
	from := e.machine.current()
	return &Error{ErrLost, from, errors.Join(err, e.machine.enter(Lost)), remedy}
}

func (e *destination) close() {
	if e.session != nil {
		e.session.Close()
	}
	if e.conn != nil {
		e.conn.Close()
	}
	e.tasks.Wait()
	if e.placer != nil {
		if d := e.placer.direct.Load(); d != nil {
			d.close()
		}
	}
	if e.mem != nil {
		e.mem.Close()
	}
	if e.q != nil {
		e.q.Close()
	}
	if e.process >= 0 {
		unix.Close(e.process)
	}
}

// hasRoom makes sure that this host can hold the VM's memory: when a page finds no room
// after the commit, it is too late.
func hasRoom(mem *guestmem.Memory) error {
	var need uint64
	for _, b := range mem.Blocks() {
		if b.PageSize != migstream.TargetPageSize {
			continue // huge pages are reserved when QEMU starts
		}
		need += b.Size
		if b.Kind != guestmem.SharedFile {
			continue
		}
		file := fmt.Sprintf("/proc/%d/map_files/%x-%x", mem.PID(), b.HVA, b.HVA+b.Size)
		var fs unix.Statfs_t
		var st unix.Stat_t
		if unix.Statfs(file, &fs) != nil || unix.Stat(file, &st) != nil || fs.Blocks == 0 {
			continue // memfd, or a file system without a limit
		}
		room := fs.Bavail*uint64(fs.Bsize) + uint64(st.Blocks)*512
		if room < b.Size {
			return fmt.Errorf("memory %q has %d MiB, and the file system of its back end has room for %d MiB only: make room there first", b.Name, b.Size>>20, room>>20)
		}
	}
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return fmt.Errorf("read the memory that is free here: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return fmt.Errorf("read the memory that is free here: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		var kib uint64
		if n, _ := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); n == 1 && kib<<10 < need {
			return fmt.Errorf("the VM has %d MiB of memory and only %d MiB are available here: make room first", need>>20, kib>>10)
		}
	}
	return nil
}
