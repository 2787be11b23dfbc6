package evict

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
	"vacate/internal/sys/room"
)

// Destination receives a VM on this host.
type Destination struct {
	// QMP is the path of the QMP socket of a QEMU. That was started like the source's, with `-S
	// -incoming defer` added.
	QMP string
	// Libvirt is set on a host that takes domains of libvirt, instead of QMP.
	Libvirt *Libvirt
	// Carried is set to take a domain that libvirt itself moves, instead of QMP.
	Carried *Carried
	// ThroughQEMU makes QEMU load all pages itself. By default the engine places them in QEMU's
	// memory directly if this process may, which is several times faster.
	ThroughQEMU bool
	// Host is the name of this host, and Description the file that says how it starts the VM's
	// QEMU. Both are for messages, which the source may show. Both are empty without a daemon.
	Host, Description string
	// Patient goes on waiting after an offer that does not fit.
	Patient bool
	// Room knows how much memory other VMs on their way to this host will still take; nil if there
	// are none.
	Room *room.Ledger
	// Journal survives the engine; without one the engine's death costs the VM. It must have the
	// mark MarkAccepted before the QEMU is started.
	Journal Journal
	// Started is told which QEMU takes a domain of libvirt, as soon as it is known; may be nil.
	Started func(process.Process) error
	// HugePages gets the task that restores the VM's speed once it is whole here, before Receive
	// returns; nil drops it.
	HugePages func(*HugePages)
	Log       *slog.Logger
	Show      func(Progress) // Show is called from one goroutine at a time; it may be nil.
}

// Receive takes the VM of a source. The first requests are offers: it refuses a VM that does not
// fit, without touching the QEMU. Once QEMU has read a byte of the stream, it cannot be reused. It
// then either runs the VM, or Receive kills it before it ran.
//
// While the VM runs here, a source that lost the link comes back with a request to resume the
// eviction. Receive waits for it without limit. Receive answers all requests. Its errors are
// *Error.
//
// When ctx is done, Receive aborts the eviction, unless the source committed it. If the cause is
// ErrLeave, it leaves a committed eviction.
func (d Destination) Receive(ctx context.Context, requests <-chan *Request) (Received, error) {
	e := d.engine(Waiting)
	defer e.close()
	if err := e.prepare(ctx); err != nil {
		if ctx.Err() == nil {
			e.lastWord(requests, err)
		}
		e.letGo(true)
		return Received{}, &Error{ErrRefused, Waiting, errors.Join(err, e.machine.enter(Refused)),
			""}
	}
	e.report(Waiting)
	loadTimeout, err := e.awaitOffer(ctx, requests)
	if err != nil {
		e.letGo(true)
		return Received{}, &Error{ErrRefused, Waiting, errors.Join(err, e.machine.enter(Refused)),
			"The QEMU that waits here was not touched"}
	}
	e.tasks.Go(func() { e.sort(requests) })
	if err := e.take(ctx, loadTimeout); err != nil {
		return Received{}, err
	}
	return e.summary(), nil
}

// destination is one eviction.
type destination struct {
	Destination
	started time.Time
	machine *machine
	// life ends when the QEMU does, or this engine. Its cause says why.
	life context.Context
	die  context.CancelCauseFunc

	ended chan struct{} // closed when the engine ends

	eviction ID
	owner    twinOwner // of the QEMU
	messages process.Messages
	process  process.Process // the QEMU
	mem      *guestmem.Memory
	at       atomic.Pointer[attachment] // nil while the source is not there
	rejoin   chan *Request              // capacity 1: the source came back

	incoming incoming
	pages    arrivals
	units    hugeUnits
	placer   *placer
	supply   supply
	recovery recovery // of QEMU's stream
	mark     Mark     // the last durable one
	said     said
	vm       vmHere
	kept     chan error // gets nil once everything needed is stored, or an error
	tasks    sync.WaitGroup
	shown    sync.Mutex // held while Show is called
}

// incoming is the start of the stream, by which the memory of the VM is known. It does not change
// once it has been adopted.
type incoming struct {
	head   []byte
	reader *migstream.Reader // of the head
	layout layout
}

// said is what the source said. The task that serves it owns what is not atomic.
type said struct {
	hungUp    bool // it ended the last session itself, or its process ended
	committed bool // it has said in the present session that it committed
	// the same for the session in which the VM came
	heard atomic.Bool
}

// vmHere is what the VM does at the destination. The task that serves the source writes it.
type vmHere struct {
	stands text // QEMU's word for the state that it stood in at the source; empty: it ran
	// ranSince is when this engine told the QEMU to run the VM; zero if another engine did.
	ranSince time.Time
	running  atomic.Bool  // the QEMU has answered that it runs the VM
	hasRun   atomic.Bool  // the VM ran at some time, as this engine or another one found
	told     atomic.Bool  // the source knows that the VM runs here
	cont     <-chan error // how the QEMU answers when that takes long
	shutDown text         // why the guest ended itself here; empty if it did not
}

// supply is the memory of this host for the VM's pages.
type supply struct {
	promised *room.Claim // for the VM
	kills    room.Kills  // when the QEMU was found
	held     heldPages   // found no memory yet
	short    text        // why pages find no memory; empty if they do
	telling  sync.Mutex  // held while the engine tells the source whether they do
}

// maxLoadTimeout is the longest time for which a source may make us wait with the devices loaded.
const maxLoadTimeout = 10 * time.Minute

const (
	destinationFD = "vacate-destination" // QEMU's name for its end of our socket
	pingHead      = 2                    // ours, behind the head: QEMU took it
	pingLoaded    = 3                    // ours, at the end of the device state
	// qemuBuffer is the socket buffer for writes to QEMU. A fetched page waits behind what is in
	// it.
	qemuBuffer = 128 << 10
)

// engine makes an engine in a state.
func (d Destination) engine(first State) *destination {
	e := &destination{
		Destination: d, started: time.Now(),
		rejoin: make(chan *Request, 1), kept: make(chan error, 1), ended: make(chan struct{}),
	}
	if e.Log == nil {
		e.Log = slog.New(slog.DiscardHandler)
	}
	if e.Room == nil {
		e.Room = new(room.Ledger)
	}
	if e.Libvirt != nil {
		e.owner = newLibvirtTwin(e.Destination, e.runs)
	} else if e.Carried != nil {
		// QEMU's own list of what it has must be true, should libvirt resume the migration.
		e.ThroughQEMU = true
		e.owner = newCarriedTwin(e.Destination)
	} else {
		e.owner = newQEMUTwin(e.Destination, e.runs)
	}
	e.recovery.owner = e.owner
	e.life, e.die = context.WithCancelCause(context.Background())
	e.machine = newMachine(first, e.report)
	return e
}

// report logs a state that was entered, and shows the progress.
func (e *destination) report(st State) {
	e.Log.Info("state", "state", st, "stands", e.vm.stands.get())
	e.show(st)
}

func (e *destination) show(st State) {
	if e.Show == nil {
		return
	}
	e.shown.Lock()
	defer e.shown.Unlock()
	if st == "" { // the lock comes first, so that the state never seems to go backwards
		st = e.machine.current()
	}
	p := Progress{State: st, Elapsed: time.Since(e.started)}
	p.Pages, p.Total, p.Fetches = e.pages.progress()
	p.Stands = e.vm.stands.get()
	p.Short = shortText("this host", e.supply.short.get())
	e.Show(p)
}

// prepare checks the QEMU that waits here.
func (e *destination) prepare(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, prepareTimeout,
		errors.New("preparing took too long"))
	defer cancel()
	if err := e.owner.look(ctx); err != nil {
		return err
	}
	if e.owner.twin().mem == nil {
		return nil // its QEMU is started for an offer
	}
	if err := e.meet(); err != nil {
		return err
	}
	return e.owner.ready(ctx)
}

// meet notes which QEMU takes the VM. It makes sure that pages can be placed in its memory, and
// that the host has room for them.
func (e *destination) meet() error {
	found := e.owner.twin()
	e.process, e.mem = found.process, found.mem
	e.messages = process.MessagesOf(e.process.PID)
	e.lookAfter()
	if e.Started != nil {
		if err := e.Started(e.process); err != nil {
			return err
		}
	}
	for i := range e.mem.Blocks() {
		if err := e.mem.CanFault(i); err != nil {
			return fmt.Errorf("%w: start the QEMU here with memory of another kind, such as "+
				"-object memory-backend-memfd,share=on,…, or with a file in /dev/shm or on "+
				"hugetlbfs", err)
		}
	}
	return e.hasRoom()
}

// errTwinGone is wrapped by the reason for which life ends when the QEMU does.
var errTwinGone = errors.New("the destination's QEMU ended")

// lookAfter begins to watch the QEMU.
func (e *destination) lookAfter() {
	var err error
	if e.supply.kills, err = room.ReadKills(e.process.PID); err != nil {
		e.Log.Debug("cannot watch whether the kernel ends the QEMU for lack of memory", "error",
			err)
	}
	e.tasks.Go(e.watch)
}

// watch notices when the QEMU ends.
func (e *destination) watch() {
	how, err := e.process.End(e.life)
	if err != nil && e.life.Err() != nil {
		return
	}
	_, host := e.owner.lastWords()
	var said []string
	if how != "" {
		said = append(said, how)
	}
	if host != "" {
		said = append(said, "its monitor said "+host)
	}
	if oom := e.supply.kills.Since(); oom != "" {
		said = append(said, oom)
	}
	said = append(said, e.messages.Last())
	e.die(fmt.Errorf("%w (process %d): %s", errTwinGone, e.process.PID, strings.Join(said, "; ")))
}

// lastWords is how long a destination that gives up waits for a source that has just connected.
const lastWords = time.Second

// awaitOffer waits for an offer that fits. It returns how long the source waits for the devices to
// be loaded.
func (e *destination) awaitOffer(ctx context.Context,
	requests <-chan *Request) (time.Duration, error) {
	for {
		var r *Request
		select {
		case r = <-requests:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-e.life.Done():
			e.lastWord(requests, context.Cause(e.life))
			return 0, context.Cause(e.life)
		}
		if r.Purpose != ToOffer {
			r.Refuse(e.named(errors.New("there is no such eviction")))
			continue
		}
		err := e.consider(ctx, r)
		if err == nil {
			e.Log.Info("offer accepted", "source", r.Session.Peer(), "machine", r.offer.Machine)
			e.eviction = r.Eviction
			e.at.Store(r.attachment)
			return time.Duration(r.offer.LoadTimeout) * time.Millisecond, nil
		}
		r.Refuse(e.named(err))
		e.Log.Warn("offer refused", "source", r.Session.Peer(), "error", err)
		if e.life.Err() != nil {
			return 0, context.Cause(e.life)
		}
		if !e.Patient {
			return 0, err
		}
	}
}

// named adds this host's name to an error that the source may show to an operator elsewhere.
func (e *destination) named(err error) error { return saidBy(e.Host, err) }

// lastWord tells a newly connected source why this host takes no VM any more.
func (e *destination) lastWord(requests <-chan *Request, why error) {
	select {
	case r := <-requests:
		r.Refuse(e.named(why))
	case <-time.After(lastWords):
	}
}

// consider checks an offer, and accepts it if it fits.
func (e *destination) consider(ctx context.Context, r *Request) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, prepareTimeout,
		errors.New("preparing took too long"))
	defer cancel()
	o := r.offer
	if o.LoadTimeout <= 0 || o.LoadTimeout > maxLoadTimeout.Milliseconds() {
		return fmt.Errorf("%w: %d ms for loading the devices", errFrame, o.LoadTimeout)
	}
	e.owner.decline(ctx) // there was an offer before, whose source went away
	waited := e.mem != nil
	if err := e.owner.accept(ctx, o); err != nil {
		return err
	}
	if waited {
		err = e.hasRoom() // check again: the last look may be long ago
	} else {
		err = e.meet()
	}
	if err != nil {
		return err
	}
	conn, err := e.owner.connect(ctx)
	if err != nil {
		return err
	}
	e.recovery.present.Store(newStream(conn))
	return r.control.Write(msgAccepted)
}

// sort takes all further requests. It keeps the newest one that resumes this eviction for serve,
// and ends the old session.
func (e *destination) sort(requests <-chan *Request) {
	for {
		select {
		case r := <-requests:
			if r.Purpose != ToResume || r.Eviction != e.eviction {
				r.Refuse(e.named(errors.New("the destination is in use by another eviction")))
				continue
			}
			select {
			case old := <-e.rejoin:
				old.end()
			default:
			}
			e.rejoin <- r
			if a := e.at.Load(); a != nil {
				a.Fail(errors.New("the source has made a new session"))
			}
		case <-e.ended:
			return
		}
	}
}

// bound returns a context that also ends with the QEMU.
func (e *destination) bound(ctx context.Context) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(e.life, func() { cancel(context.Cause(e.life)) })
	return ctx, func(cause error) {
		stop()
		cancel(cause)
	}
}

// take receives the VM.
func (e *destination) take(ctx context.Context, loadTimeout time.Duration) error {
	committing, cancel := e.bound(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(prepareTimeout+switchTimeout,
		func() { cancel(errors.New("no device state came")) })
	defer timer.Stop()
	control := e.at.Load().control
	err := e.arm(committing)
	if err == nil {
		err = e.receivePackage(committing)
	}
	if err == nil {
		timer.Stop()
		timer = time.AfterFunc(loadTimeout, func() { cancel(errors.New("no commit came in time")) })
		defer timer.Stop()
		err = e.load(committing)
	}
	if err == nil {
		err = e.hearCommit(committing)
	}
	if err == nil {
		err = <-e.kept
	}
	if stands := e.vm.stands.get(); err == nil && stands != "" {
		err = keep(e.Journal, keptStands, []byte(stands))
	}
	if err == nil {
		err = note(e.Journal, MarkMayRun, "")
	}
	if err != nil {
		return e.abort(err)
	}
	e.mark = MarkMayRun
	left, stop := untilLeft(ctx)
	defer stop()
	if err := e.run(left); err != nil {
		return err
	}
	if err := control.Write(msgRunning); err != nil {
		e.at.Load().Fail(err)
	}
	e.vm.told.Store(true)
	if e.supply.short.get() != "" {
		e.passOn()
	}
	return e.serve(left)
}

// hearCommit waits for the commit.
func (e *destination) hearCommit(ctx context.Context) error {
	f, err := e.at.Load().control.await(ctx, msgCommit)
	if err != nil {
		return err
	}
	if len(f.payload) > 0 {
		var c commitment
		if err := decode(f.payload, &c); err != nil {
			return err
		}
		if !fit.Standing(c.Stands) {
			return fmt.Errorf("%w: a VM that stands in the state %.40q", errFrame, c.Stands)
		}
		e.vm.stands.set(c.Stands)
	}
	e.said.committed = true
	e.said.heard.Store(true)
	return nil
}

// contTime is how long QEMU may take to answer `cont`. After that the engine assumes that it waits
// for a page.
const contTime = time.Second

// run tells the QEMU to run the VM, unless the VM stood. The source has committed the eviction, and
// that is durable. The VM may touch a missing page at once. QEMU then cannot answer until the page
// has come. If the session is lost then, only serve can get that page, so serve awaits the answer.
func (e *destination) run(left context.Context) error {
	if !mayCont(e.mark, e.said.committed) {
		return e.abort(fmt.Errorf("bug: told to run the VM here at the mark %q, committed %v",
			e.mark, e.said.committed))
	}
	if err := e.machine.enter(Running); err != nil {
		return e.abort(err)
	}
	e.recovery.pending, e.vm.ranSince = false, time.Now()
	if e.vm.stands.get() != "" { // from now on the VM's operator decides whether it runs
		e.vm.running.Store(true)
		return nil
	}
	answer := make(chan error, 1)
	e.tasks.Go(func() {
		ctx, cancel := e.bound(context.Background())
		defer cancel(nil)
		err := e.owner.run(ctx)
		e.vm.running.Store(err == nil)
		if err == nil {
			e.vm.hasRun.Store(true)
		}
		answer <- err
		if err != nil {
			return
		}
		if err := keep(e.Journal, keptRan, nil); err != nil {
			e.Log.Warn("cannot record in the journal that the VM ran here: if an operator "+
				"pauses it, the next engine would run it again", "error", err)
		}
		e.owner.announce(ctx)
	})
	select {
	case err := <-answer:
		return e.continued(left, err)
	case <-time.After(contTime):
		e.vm.cont = answer
		return nil
	}
}

// continued handles QEMU's answer to `cont`.
func (e *destination) continued(left context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errNotRun):
		return e.abort(err)
	case e.life.Err() != nil:
		return e.twinGone(left)
	}
	return e.lost(err, "QEMU was told to run the VM and did not answer: ask it with `query-status`")
}

// arm makes QEMU wait for the stream, and gives it the head.
func (e *destination) arm(ctx context.Context) error {
	if err := e.machine.enter(Arming); err != nil {
		return err
	}
	if err := e.owner.begin(ctx); err != nil {
		return err
	}
	f, err := e.at.Load().control.await(ctx, msgHead)
	if err != nil {
		return err
	}
	if err := e.takeHead(f.payload); err != nil {
		return err
	}
	e.tasks.Go(func() { e.kept <- e.keep() })
	s := e.recovery.stream()
	e.follow(s, migstream.NewReturnReader(s.conn, 0))
	// The twin drops its memory while the VM still runs. If it did so behind the pages that are
	// sent ahead, each of those would make it clear a huge page, and the VM would stand still for
	// that.
	first := slices.Concat(e.incoming.head, e.incoming.layout.discards())
	if err := e.placer.raw(migstream.PingCommand(pingHead).Append(first)); err != nil {
		return err
	}
	if err := e.awaitPong(ctx, pingHead); err != nil {
		return err
	}
	return e.at.Load().control.Write(msgArmed)
}

// keep stores what another engine needs to go on.
func (e *destination) keep() error {
	if e.Journal == nil {
		return nil
	}
	b, err := json.Marshal(e.twin())
	if err != nil {
		return fmt.Errorf("encode the facts about the destination's QEMU: %w", err)
	}
	return errors.Join(e.Journal.Keep(keptMemory, b), e.Journal.Keep(keptHead, e.incoming.head))
}

// follow reads QEMU's return path of a stream, and drops the stream when that path ends.
func (e *destination) follow(s *stream, r *migstream.ReturnReader) {
	s.reader.Go(func() {
		if err := e.readReturnPath(s, r); err != nil {
			s.fail(err)
		}
	})
}

// load waits until the VM is loaded and paused.
func (e *destination) load(ctx context.Context) error {
	if err := e.machine.enter(Loading); err != nil {
		return err
	}
	e.receiveLanes(e.at.Load())
	// The device state ends with a ping of its own. QEMU answers it when the devices are loaded,
	// before it handles RUN.
	if err := e.awaitPong(ctx, pingLoaded); err != nil {
		return err
	}
	for {
		loaded, err := e.owner.loaded(ctx)
		if err != nil {
			return err
		}
		if loaded {
			break
		}
		if err := e.pause(ctx); err != nil {
			return err
		}
	}
	if err := e.machine.enter(Prepared); err != nil {
		return err
	}
	if err := e.at.Load().control.Write(msgLoaded); err != nil {
		return err
	}
	e.placeDirectly()
	if e.Libvirt != nil && e.Libvirt.Hold != nil && !e.placesAll() {
		return errNotDirect
	}
	return nil
}

// errNotDirect: what was written to the stream of a domain's twin must not be torn when the engine
// dies.
var errNotDirect = errors.New("pages of a domain of libvirt must be placed in its QEMU's memory " +
	"directly, and cannot be: see `vacate doctor` on that host")

// placesAll reports whether no page goes through QEMU's stream.
func (e *destination) placesAll() bool {
	d := e.placer.direct.Load()
	for i := range e.incoming.layout {
		if d == nil || !d.places(i) {
			return false
		}
	}
	return true
}

// placeDirectly makes the engine place pages in QEMU's memory itself, if it may.
func (e *destination) placeDirectly() {
	if e.ThroughQEMU {
		return
	}
	d, err := openDirect(e.process, e.mem, e.incoming.layout)
	if err != nil {
		e.Log.Info("pages go through QEMU's stream", "reason", err)
		return
	}
	e.placer.gate = e.newGate()
	e.placer.direct.Store(d)
}

// awaitPong waits until QEMU has loaded all before a ping.
func (e *destination) awaitPong(ctx context.Context, value uint32) error {
	a, s := e.at.Load(), e.recovery.stream()
	for {
		select {
		case v := <-s.pongs:
			if v == value {
				return nil
			}
		case f := <-a.control.frames:
			return f.check()
		case <-s.broken:
			return s.why
		case <-a.Done():
			return a.Err()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// pause waits for a moment. It fails at once if the eviction has failed.
func (e *destination) pause(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, pollInterval, errMoment)
	defer cancel()
	if _, err := e.at.Load().control.await(ctx); !errors.Is(err, errMoment) {
		return err
	}
	s := e.recovery.stream()
	select {
	case <-s.broken:
		return s.why
	default:
		return nil
	}
}

var errMoment = errors.New("a moment has passed")

// explain looks for QEMU's own reason behind an error.
func (e *destination) explain(err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second/2)
	defer cancel()
	why, qerr := e.owner.reason(ctx)
	switch {
	case qerr == nil && why != "":
		return fmt.Errorf("%w; it says: %s", err, why)
	case errors.Is(qerr, qmp.ErrClosed):
		select {
		case <-e.life.Done():
		case <-ctx.Done():
			return fmt.Errorf("the monitor of the destination's QEMU ended: %w", err)
		}
		if !errors.Is(err, errTwinGone) {
			err = fmt.Errorf("%w: %w", context.Cause(e.life), err)
		}
		if errors.Is(err, errStrayCont) {
			return err
		}
		return fmt.Errorf("the destination's QEMU ended (devices or disks that differ from the "+
			"source's are the usual reason): %w", err)
	}
	return err
}

// kill ends the QEMU and waits until it is gone.
func (e *destination) kill() error {
	ctx, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	if err := e.owner.kill(ctx); err != nil {
		return fmt.Errorf("end the destination's QEMU: %w", err)
	}
	return nil
}

// killTime is how long a killed QEMU may take to end.
const killTime = 5 * time.Second

// abort ends an attempt that never ran the VM. It kills the QEMU, so that it never will, and only
// then says so.
func (e *destination) abort(err error) error {
	from := e.machine.current()
	err = e.explain(err)
	if killErr := e.kill(); killErr != nil {
		return e.lost(errors.Join(err, killErr), "The VM never ran here. End this QEMU by hand")
	}
	if noteErr := note(e.Journal, MarkNeverRan, err.Error()); noteErr != nil {
		e.Log.Warn("cannot record in the journal that the VM never ran here", "error", noteErr)
	}
	if a := e.at.Load(); a != nil {
		writeJSON(a.control.Conn, msgAbort, farewell{e.named(err).Error(), true})
	}
	e.answerRejoin(AnswerNeverRan, e.named(err).Error(), true)
	return &Error{ErrAborted, from, errors.Join(err, e.machine.enter(Aborted)),
		cmp.Or(e.owner.ownRemedy(), "The VM never ran here, and the QEMU that waited for it was "+
			"ended. The VM runs on at the source")}
}

// lost ends an eviction that cannot complete although the VM ran here.
func (e *destination) lost(err error, remedy string) error {
	from := e.machine.current()
	if noteErr := note(e.Journal, MarkLost, err.Error()); noteErr != nil {
		e.Log.Warn("cannot record in the journal that the VM is lost here", "error", noteErr)
	}
	dead := !e.process.Alive()
	if a := e.at.Load(); a != nil {
		writeJSON(a.control.Conn, msgFailed, farewell{e.named(err).Error(), dead})
	}
	e.answerRejoin(AnswerLost, e.named(err).Error(), dead)
	return &Error{ErrLost, from, errors.Join(err, e.machine.enter(Lost)),
		cmp.Or(e.owner.ownRemedy(), remedy)}
}

// answerRejoin answers a source that comes back after the end. Without a journal nobody remembers
// the end later. So it waits for a source that committed and does not know what became of that.
func (e *destination) answerRejoin(a Answer, reason string, dead bool) {
	select {
	case r := <-e.rejoin:
		r.Answer(a, reason, dead, nil)
		return
	default:
	}
	if e.Journal != nil || e.at.Load() != nil || e.machine.at(Running).IsZero() {
		return
	}
	select {
	case r := <-e.rejoin:
		r.Answer(a, reason, dead, nil)
	case <-time.After(lingerTime):
	}
}

func (e *destination) close() {
	if s := e.recovery.stream(); s != nil {
		s.fail(net.ErrClosed)
		s.reader.Wait()
	}
	if a := e.at.Load(); a != nil {
		a.end()
	}
	e.die(net.ErrClosed)
	close(e.ended)
	e.tasks.Wait()
	select {
	case r := <-e.rejoin:
		r.end()
	default:
	}
	if e.placer != nil {
		if d := e.placer.direct.Load(); d != nil {
			d.close()
		}
	}
	e.supply.promised.Release()
	if e.mem != nil {
		e.mem.Close()
	}
	e.owner.close()
	e.messages.Close()
}

// explainPostcopy adds a remedy to QEMU's refusal of post-copy.
func explainPostcopy(err error) error {
	b, readErr := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd")
	if readErr != nil {
		return fmt.Errorf("%w: this kernel has no userfaultfd, which post-copy needs", err)
	}
	if strings.TrimSpace(string(b)) == "0" {
		return fmt.Errorf("%w: QEMU may not use userfaultfd: run `sysctl "+
			"vm.unprivileged_userfaultfd=1`, or run QEMU with CAP_SYS_PTRACE", err)
	}
	return err
}
