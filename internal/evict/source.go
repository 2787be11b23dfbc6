package evict

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"vacate/internal/evict/journal"
	"vacate/internal/evict/pushorder"
	"vacate/internal/link"
	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
	"vacate/internal/sys/units"
)

// Source moves a VM away from this host.
type Source struct {
	Eviction ID     // zero for a new one
	VM       string // its name at the destination; empty if a QEMU waits for just this VM
	// this host's name, for messages that the destination may show; empty without a daemon
	Host string
	QMP  string // path of the QMP socket of the VM's QEMU
	// Libvirt is set for a VM that is a domain of this host's libvirt, instead of QMP.
	Libvirt *Libvirt
	// Carried is set for a domain that libvirt itself moves, instead of QMP.
	Carried *Carried
	// Process is the QEMU. If Resume and Decide find another one, started since, they conclude that
	// this one ended. Zero: any.
	Process process.Process
	// Connect makes a session with the destination. The engine calls it again whenever the link is
	// lost after the commit.
	Connect func(context.Context) (*link.Session, error)
	// LoadTimeout is how long the destination may take to load the devices. The guest stands still
	// meanwhile, for this long at most before the eviction is aborted. Default 5 s.
	LoadTimeout time.Duration
	// Order is the order of the push; the zero value is pushorder.Default.
	Order pushorder.Policy
	// Enlightenment says how the engine learns what the guest's pages are used for. Default Auto.
	Enlightenment Enlightenment
	// SendFree makes the engine send free pages, too.
	SendFree bool
	// Path is what the eviction shares with others; nil if it is alone.
	Path *Path
	// TrustDisks names disks, with their cache modes, whose images at the destination the operator
	// asserts to be the same; see fit.Drive.Name.
	TrustDisks []string
	// Forced makes the destination take the VM although it keeps VMs off: an operator wants that.
	Forced bool
	// Limit is the most bytes per second to send; nil for no limit. Fetched pages count but never
	// wait.
	Limit *Limit
	// Yield makes the push give way to other traffic on the path.
	Yield bool
	// GiveBack is how long the VM must have run at the destination before its memory here is given
	// back early. After that time, memory is given back to the host as soon as the destination has
	// it; otherwise, at the end. From then on the VM can no longer be resumed here or exported,
	// should it be lost there. 0, or no Journal: never. Only the memory of files without a name is
	// ever given back early.
	GiveBack time.Duration
	// Journal survives the engine; without one its death leaves the VM frozen.
	Journal Journal
	Log     *slog.Logger
	// Map, if it is not nil, can be asked for the memory while the engine works.
	Map *Map
	// Show is called from one goroutine at a time, at least every 100 ms; it may be nil.
	Show func(Progress)
}

// Timeouts of the source, before the commit.
const (
	prepareTimeout = 30 * time.Second
	commitTimeout  = 20 * time.Second
	rollbackTime   = 30 * time.Second
	// settleTime is how long the push must last before its rate means something.
	settleTime = 300 * time.Millisecond
)

// Evict moves the VM. When ctx is done before the commit, the eviction is aborted and the VM runs
// on here. After the commit that could no longer save the VM, so Evict obeys only the cause
// ErrLeave: it leaves the eviction as it is, for Resume. It fills in the report as far as it got,
// even if there is an error. Its errors are *Error.
func (s Source) Evict(ctx context.Context) (Report, error) {
	e := s.engine(Preparing)
	return e.done(e.run(ctx))
}

// engine makes an engine in a state, and starts to show its progress.
func (s Source) engine(first State) *source {
	e := &source{Source: s, started: time.Now()}
	if e.Map != nil {
		e.Map.of.Store(&e.departures.trace)
	}
	e.sessions.now = &e.at
	if e.Eviction == (ID{}) {
		e.Eviction = journal.NewID()
	}
	if e.Log == nil {
		e.Log = slog.New(slog.DiscardHandler)
	}
	e.owner = &qemuSource{path: e.QMP, vm: e.VM, expect: e.Process}
	if e.Libvirt != nil {
		e.owner = newLibvirtSource(e.Source)
	} else if e.Carried != nil {
		e.owner = newCarriedSource(e.Source)
	}
	if e.LoadTimeout == 0 {
		e.LoadTimeout = 5 * time.Second
	}
	if e.Order.Base == pushorder.Unset {
		e.Order = pushorder.Default
	}
	if e.Enlightenment == "" {
		e.Enlightenment = Auto
	}
	if e.Order.Base == pushorder.DemandOnly {
		e.touched = make(chan struct{}, 1)
	}
	if e.Path == nil {
		e.Path = NewPath(0)
	}
	e.life, e.die = context.WithCancelCause(context.Background())
	note := func(st State) {
		e.Log.Info("state", "state", st)
		e.show(st)
	}
	e.machine = newMachine(first, note)
	note(first)
	e.tasks.Go(e.tick)
	return e
}

// done ends the engine.
func (e *source) done(err error) (Report, error) {
	e.close()
	if e.Map != nil {
		e.Map.of.CompareAndSwap(&e.departures.trace, nil)
	}
	if !errors.Is(err, ErrLeft) {
		e.keepTrace()
	}
	report := e.report(err)
	e.show(e.machine.current())
	return report, err
}

// source is one eviction.
type source struct {
	Source
	started time.Time
	machine *machine
	// life ends when the QEMU does, or this engine. Its cause says why.
	life context.Context
	die  context.CancelCauseFunc

	owner    sourceOwner     // of the VM's QEMU
	qemu     process.Process // the QEMU; zero until it is known
	facts    hostFacts       // empty until the freeze is about to begin
	mem      *guestmem.Memory
	proposal proposal
	mark     Mark // the last durable one
	halted   halted
	image    image
	heard    heard
	giving   giving

	at       atomic.Pointer[attachment] // nil while there is no session
	sessions sessions

	departures departures
	// used by prepare, then by the task that enlightens, then by report: never by two at once
	survey  survey
	touched chan struct{} // capacity 1: something was fetched; nil if nothing waits for that

	display display
	tasks   sync.WaitGroup
}

// proposal is what the source tells the destination of the VM before it is frozen. prepare makes
// it, or a resumed engine recalls it. It does not change afterwards.
type proposal struct {
	first  qmp.Status // what the VM did at the first check
	offer  offer
	head   []byte // of the stream; like layout, nil until it is made
	layout layout
	flash  []string // blocks that QEMU reads when it is told to run the VM
	warned []string // warnings to the operator about a VM that is moved all the same
	far    bool     // the path to the destination is long
}

// halted is how the VM was frozen. The task that runs the eviction writes it.
type halted struct {
	saved  saved
	held   bool                      // the QEMU's process is stopped
	stands text                      // facts.Stood, to show
	at     atomic.Pointer[time.Time] // when the guest stopped; nil until it has
}

// since returns how long the guest has been frozen here, in seconds.
func (h *halted) since() float64 { return time.Since(*h.at.Load()).Seconds() }

// display is what progress needs beside the eviction's own state.
type display struct {
	mu      sync.Mutex              // held while Show is called
	highest int                     // pages shown, which only grow; guarded by mu
	awaits  atomic.Pointer[awaited] // what the offer waits for; nil for nothing
}

func (e *source) run(ctx context.Context) error {
	if err := e.prepare(ctx); err != nil {
		return e.refuse(because(ctx, err))
	}
	if err := e.machine.enter(Switching); err != nil {
		return e.refuse(err)
	}
	if err := e.transfer(ctx); err != nil {
		return e.rollBack(because(ctx, err))
	}
	return e.commit(ctx)
}

// because returns why ctx has ended, in place of an error that only says that it has: what the
// engine was about to do then is no reason.
func because(ctx context.Context, err error) error {
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// bound returns a context that also ends with the QEMU, or after a time.
func (e *source) bound(ctx context.Context, limit time.Duration,
	late error) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(e.life, func() { cancel(context.Cause(e.life)) })
	timer := time.AfterFunc(limit, func() { cancel(late) })
	return ctx, func() {
		stop()
		timer.Stop()
		cancel(nil)
	}
}

// prepare checks all that it can without touching the VM, and connects.
func (e *source) prepare(all context.Context) (err error) {
	ctx, cancel := e.bound(all, prepareTimeout, errLongPreparation)
	defer func() { cancel() }()
	if err := e.open(ctx); err != nil {
		return err
	}
	if err := e.meet(ctx); err != nil {
		return err
	}
	control := e.at.Load().control
	err = together(
		func() error { return e.owner.arm(ctx, e.mem) },
		func() error {
			if err := writeJSON(control.Conn, msgOffer, e.proposal.offer); err != nil {
				return err
			}
			return e.awaitTaken(all, control, prepareTimeout)
		})
	cancel()
	if err != nil {
		return err
	}
	ctx, cancel = e.bound(all, prepareTimeout, errLongPreparation)
	defer cancel()
	e.image.pushed, e.image.fetched = newFrame(e.mem), newFrame(e.mem)
	e.facts = hostFacts{
		Process: e.qemu, Blocks: e.mem.Blocks(), Mappings: e.mem.Mappings(),
		Machine: e.proposal.offer.Machine, QEMU: e.proposal.offer.QEMU,
	}
	err = together(
		func() error { return e.keepFacts() },
		func() error {
			// From here on the twin can take no other VM. If it cannot take the VM's memory, it
			// says so now, while the VM runs.
			begun := time.Now()
			flash := e.proposal.flashBytes(e.mem.Blocks())
			err := control.openWindow(ctx, flash+maxAtOnce*units.PageSize)
			if err != nil {
				return err
			}
			e.proposal.far = time.Since(begun) >= farTrip
			if err := control.Write(msgHead, e.proposal.head); err != nil {
				return err
			}
			_, err = control.await(ctx, msgArmed)
			return err
		})
	if err != nil {
		return err
	}
	// This comes late on purpose. If an operator pauses the VM before the freeze, it stays paused,
	// whatever happens to this engine.
	if e.facts.Ran = e.proposal.first.Running; !e.facts.Ran {
		e.facts.Stood = e.proposal.first.Status
	}
	return e.keepFacts()
}

// meet looks at the VM and connects to the destination, both at once. Then it checks whether the VM
// can be evicted, and writes the offer.
func (e *source) meet(ctx context.Context) error {
	var d described
	err := together(
		func() (err error) {
			d, err = e.owner.describe(ctx)
			return err
		},
		func() error {
			e.findAgent(ctx)
			return nil
		},
		func() error {
			s, err := e.Connect(ctx)
			if err != nil {
				return err
			}
			a := attach(s, maxJSON)
			e.at.Store(a)
			return a.prove(ctx)
		})
	p := &e.proposal
	p.offer, e.mem, p.flash, p.first = d.offer, d.mem, d.flash, d.status
	if p.first.Status != "" && !p.first.Running {
		e.halted.stands.set(p.first.Status)
	}
	if err != nil {
		return err
	}
	if err := e.movable(); err != nil {
		return err
	}
	e.watch()
	e.look(ctx)
	if err := d.disks.Trust(e.TrustDisks); err != nil {
		return err
	}
	e.warnOfBitmaps(d.disks)
	p.offer.Disks = d.disks
	p.offer = p.offer.withMemory(e.mem)
	p.offer.Eviction, p.offer.VM, p.offer.LoadTimeout = e.Eviction, e.VM,
		e.LoadTimeout.Milliseconds()
	p.offer.Forced = e.Forced
	if !p.first.Running {
		p.offer.Stands = p.first.Status
	}
	p.head, p.layout, err = makeHead(p.offer.Machine, cmp.Or(d.section, ramSection),
		e.mem.Blocks())
	return err
}

// movable makes sure that no device holds the VM on this host, that its memory can be read, and
// that its QEMU can be stopped.
func (e *source) movable() (err error) {
	if err := e.proposal.offer.Devices.Held().Err(); err != nil {
		return err
	}
	if err := e.mem.Missing(); err != nil {
		return err
	}
	if e.qemu, err = process.Find(e.mem.PID()); err != nil {
		return fmt.Errorf("hold on to QEMU's process %d: %w", e.mem.PID(), err)
	}
	if keeper, name, _ := e.qemu.Keeper(); keeper != 0 {
		e.Log.Warn("the VM's QEMU is a job of another process: if that ends before the eviction "+
			"does, the kernel ends this QEMU, and the VM may be lost. Let it go on until then, "+
			"and start QEMUs by setsid, -daemonize or a unit", "qemu", e.qemu.PID, "job_of",
			keeper, "name", name)
	}
	return e.qemu.MayStop()
}

var errLongPreparation = errors.New("preparing took too long")

// maxTaking is the longest that a source waits for a destination that keeps saying what it does.
const maxTaking = time.Hour + prepareTimeout

// maxWhat bounds the text that says what an offer waits for, in bytes.
const maxWhat = 200

// awaitTaken waits until the destination accepts the offer. That may take long, as long as the
// destination says what it does. If it says nothing for the time patience, awaitTaken gives up.
func (e *source) awaitTaken(ctx context.Context, control *controlLane,
	patience time.Duration) error {
	ctx, cancel := e.bound(ctx, maxTaking, fmt.Errorf("it took longer than %v", maxTaking))
	defer cancel()
	defer e.display.awaits.Store(nil)
	for {
		bounded, stop := context.WithTimeoutCause(ctx, patience,
			fmt.Errorf("it has said nothing for %v", patience))
		f, err := control.await(bounded, msgAccepted, msgWaiting)
		late := bounded.Err() != nil
		stop()
		switch {
		case err != nil && late:
			return fmt.Errorf("the destination neither accepted nor refused the offer: %w", err)
		case err != nil:
			return err
		case f.kind == msgAccepted:
			return nil
		}
		var w waiting
		if err := decode(f.payload, &w); err != nil {
			return err
		}
		w.What = w.What[:min(len(w.What), maxWhat)]
		if was := e.display.awaits.Load(); was == nil || was.what != w.What {
			e.Log.Info("the destination is not ready to accept the offer yet", "what", w.What)
			e.display.awaits.Store(&awaited{w.What, time.Now()})
		}
	}
}

// awaited is what the offer waits for, and since when.
type awaited struct {
	what  string
	since time.Time
}

// keepFacts stores what another engine must know to find the VM's QEMU, and to resume the VM.
func (e *source) keepFacts() error {
	b, err := json.Marshal(e.facts)
	if err != nil {
		return fmt.Errorf("encode the facts about the VM's QEMU: %w", err)
	}
	return keep(e.Journal, keptFacts, b)
}

// open connects to the VM's QEMU.
func (e *source) open(ctx context.Context) error {
	if err := e.owner.open(ctx); err != nil {
		return err
	}
	e.tasks.Go(func() {
		if err := e.owner.ended(e.life); err != nil {
			e.die(err)
		}
	})
	return nil
}

// pid returns the process of the QEMU, if that is known: another process may have made its
// monitor's socket.
func (e *source) pid() int {
	if e.mem != nil {
		return e.mem.PID()
	}
	return e.owner.monitor().PeerPID()
}

// watch notices when the QEMU's process ends, even while it is stopped.
func (e *source) watch() {
	e.tasks.Go(func() {
		if e.qemu.Wait(e.life) == nil {
			e.die(errQEMUGone)
		}
	})
}

var errQEMUGone = errors.New("the source's QEMU has ended")

// vmName returns how messages name a VM.
func vmName(vm string) string {
	if vm == "" {
		return "the VM"
	}
	return "VM " + vm
}

// mayLeave returns an error if QEMU cannot move its VM: another migration is under way, or
// something blocks migration.
func mayLeave(m qmp.Migration) error {
	if !over(m.Status) {
		return fmt.Errorf("the VM is being migrated already (state %q): wait for its end or "+
			"cancel it", m.Status)
	}
	if len(m.Blocked) > 0 {
		return fmt.Errorf("QEMU says that the VM cannot be moved: %s",
			strings.Join(m.Blocked, "; "))
	}
	return nil
}

// over reports whether a migration in that state leaves room for a new one.
func over(status string) bool {
	switch status {
	case "", "none", "completed", "failed", "cancelled":
		return true
	}
	return false
}

// transfer takes the VM from running here to loaded and paused there.
func (e *source) transfer(ctx context.Context) error {
	if err := e.freeze(); err != nil {
		return err
	}
	loading, cancel := e.bound(ctx, e.LoadTimeout,
		fmt.Errorf("the destination did not load the devices within %v", e.LoadTimeout))
	defer cancel()
	if err := e.machine.enter(Loading); err != nil {
		return err
	}
	a := e.at.Load()
	if err := e.sendEarly(a); err != nil {
		return err
	}
	if err := a.control.Write(msgLoad, e.halted.saved.load); err != nil {
		return err
	}
	a.window = e.Path.join(migstream.TargetPageSize, e.Limit, e.Yield)
	a.begin(func() error { return e.serveFetches(a) })
	settled := make(chan error, 1)
	e.tasks.Go(func() {
		err := e.hold(loading)
		if err == nil {
			// This happens during the loading, so that the commit need not wait for the disk.
			err = e.keep()
		}
		settled <- err
		if err != nil {
			cancel() // nothing is left to wait for
		}
		// On a host with a single core to spare, QEMU needs that core until here.
		if err == nil {
			e.enlighten()
		}
	})
	_, err := a.control.await(loading, msgLoaded)
	if err != nil {
		cancel()
	}
	why := <-settled
	if why != nil && !errors.Is(why, context.Canceled) {
		return why
	}
	if err == nil {
		// Until the commit an abort counts, even if the destination's answer came with it.
		err = context.Cause(loading)
	}
	return err
}

// freeze freezes the guest and takes the state of its devices from QEMU. A roll-back needs a QEMU
// that has finished this, so it obeys no context; its own limit bounds its time.
func (e *source) freeze() error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), switchTimeout,
		errors.New("saving the devices took too long"))
	defer cancel()
	var err error
	e.halted.saved, err = e.owner.freeze(ctx, e.facts.Ran)
	if errors.Is(err, errRuns) {
		e.facts.Ran, e.facts.Stood = true, ""
		if err = e.keepFacts(); err == nil {
			e.halted.saved, err = e.owner.freeze(ctx, true)
		}
	}
	at := byOurClock(e.halted.saved.at, e.started)
	e.halted.at.Store(&at)
	// QEMU itself makes it stand in save-vm, as for a dump, and then runs it again.
	if was := e.halted.saved.was; !was.Running && was.Status != "" && was.Status != "save-vm" &&
		was.Status != e.facts.Stood {
		e.facts.Ran, e.facts.Stood = false, was.Status // this holds whatever fails after it
		err = errors.Join(err, e.keepFacts())
	}
	e.halted.stands.set(e.facts.Stood)
	if err != nil {
		return fmt.Errorf("freeze the VM: %w", err)
	}
	if e.facts.Stood == "suspended" && e.proposal.offer.Stands != "suspended" {
		return errors.New("the VM was suspended since it was offered: try again")
	}
	return e.layOut(e.proposal.layout)
}

// byOurClock makes a time of a QEMU's event, which is of this host's wall clock, one that keeps its
// distance to others when somebody sets that clock. A time that cannot be becomes now.
func byOurClock(at, started time.Time) time.Time {
	now := time.Now()
	if at.After(started) && at.Before(now) {
		now = now.Add(at.Sub(now))
	}
	return now
}

// hold stops the process of the QEMU whose guest is frozen. After that, QEMU cannot answer any
// more.
func (e *source) hold(ctx context.Context) error {
	err := together(
		func() error { return e.owner.disarm(ctx) },
		func() error {
			if !e.mayLook() {
				return nil
			}
			return e.readRegisters(ctx)
		})
	if err != nil {
		return err
	}
	if err := e.owner.hold(ctx, e.qemu); err != nil {
		return err
	}
	e.halted.held = true
	e.image.registers.Store(&e.facts.Registers)
	return nil
}

// readRegisters reads the registers of the frozen guest's vCPUs, if they are not known yet.
func (e *source) readRegisters(ctx context.Context) error {
	if e.facts.Registers != "" {
		return nil
	}
	text, err := e.owner.monitor().HMP(ctx, registersCommand)
	e.facts.Registers = registers(text)
	return err
}

// layOut gets ready to send the pages of a layout.
func (e *source) layOut(l layout) error {
	if err := e.image.open(e.mem, l); err != nil {
		return err
	}
	if e.GiveBack > 0 && e.Journal != nil && e.image.frozen.anyReleasable() {
		e.giving.ledger = &ledger{}
	}
	begun := e.machine.at(Switching)
	if begun.IsZero() { // it is not known if another engine began
		begun = time.Now()
	}
	e.departures.begin(l, e.Order, begun)
	return nil
}

// keep stores what another engine needs to go on. Last comes the mark without which the commit must
// not be sent.
func (e *source) keep() error {
	if err := errors.Join(keep(e.Journal, keptHead, e.proposal.head),
		keep(e.Journal, keptLoad, e.halted.saved.load), e.keepFacts()); err != nil {
		return err
	}
	return e.note(MarkMayRun, "")
}

// note sets the eviction's mark in the journal.
func (e *source) note(m Mark, reason string) error {
	err := note(e.Journal, m, reason)
	if err == nil {
		e.mark = m
	}
	return err
}

// commit tells the destination to run the VM. From here on, only the destination's answer allows a
// roll-back.
func (e *source) commit(ctx context.Context) error {
	if !mayCommit(e.mark, e.halted.held) {
		return e.rollBack(fmt.Errorf("bug: a commit at the mark %q, QEMU held %v", e.mark, e.halted.held))
	}
	if err := e.machine.enter(Committing); err != nil {
		return e.rollBack(err)
	}
	await, cancel := e.bound(context.Background(), commitTimeout,
		errors.New("the destination does not answer the commit"))
	defer cancel()
	a := e.at.Load()
	var err error
	if e.facts.Ran {
		err = a.control.Write(msgCommit)
	} else {
		err = writeJSON(a.control.Conn, msgCommit, commitment{e.facts.Stood})
	}
	if err == nil {
		// On a long path the VM's first instructions need pages before the answer can be here. One
		// that QEMU's main thread or an interrupt of the VM waits for would also hold it up.
		if e.proposal.far {
			e.beginPush(a)
		}
		_, err = a.control.await(await, msgRunning)
	}
	if errors.Is(err, errFarewell) {
		return e.rollBack(err)
	}
	if err != nil {
		if stateErr := e.machine.enter(InDoubt); stateErr != nil {
			return e.lost(errors.Join(err, stateErr), "")
		}
		return e.seeThrough(ctx, err)
	}
	e.heard.ran = true
	e.heard.noteRan(0, e.machine)
	if !e.proposal.far {
		// This waits on purpose. Pages that arrive while the twin gets ready take the CPU that it
		// needs.
		e.beginPush(a)
	}
	e.beginGiveBack(a)
	if err := e.machine.enter(Pushing); err != nil {
		return e.lost(err, "")
	}
	return e.seeThrough(ctx, nil)
}

// refuse ends an eviction that touched nothing.
func (e *source) refuse(err error) error {
	from := e.machine.current()
	ctx, cancel := context.WithTimeout(context.Background(), rollbackTime)
	defer cancel()
	if a := e.at.Load(); a != nil {
		writeJSON(a.control.Conn, msgAbort, farewell{Reason: saidBy(e.Host, err).Error()})
	}
	if err := e.owner.release(ctx); err != nil && e.owner.monitor() != nil {
		e.Log.Warn("the VM runs on, and is not all that it was", "error", err)
	}
	outcome := ErrRefused
	if errors.Is(err, context.Canceled) || errors.Is(err, ErrAbort) || errors.Is(err, ErrLeave) {
		outcome = ErrAborted
	}
	if noteErr := e.note(MarkRolledBack, err.Error()); noteErr != nil {
		e.Log.Warn("cannot record in the journal that the VM runs on here", "error", noteErr)
	}
	remedy := "The VM runs on, untouched"
	if q := e.owner.monitor(); q == nil {
		remedy = "The VM was not touched"
	} else if q.Err() != nil {
		remedy = "Its monitor does not answer any more"
		if p, err := process.Find(e.pid()); err != nil || !p.Alive() {
			remedy = "The VM's QEMU has ended, and so has the VM, which was not frozen yet. " +
				"QEMU's log says why. Start it anew"
		}
	} else if now, err := q.QueryStatus(ctx); err == nil && !now.Running {
		remedy = fmt.Sprintf("The VM was not touched: it %s", fit.Stands(now.Status))
	}
	return &Error{outcome, from, errors.Join(err, e.machine.enter(Refused)), remedy}
}

// lost ends an eviction for which this engine can do nothing more.
func (e *source) lost(err error, remedy string) error {
	from := e.machine.current()
	if noteErr := e.note(MarkLost, err.Error()); noteErr != nil {
		e.Log.Warn("cannot record in the journal what became of the VM", "error", noteErr)
	}
	return &Error{ErrLost, from, errors.Join(err, e.machine.enter(Lost)),
		cmp.Or(e.owner.ownRemedy(), remedy)}
}

// rollBack resumes the guest here. It may be called only while the destination cannot run it:
// before the commit, or when the destination says that it never did and never will.
func (e *source) rollBack(cause error) error {
	from := e.machine.current()
	if from != RollingBack {
		if err := e.machine.enter(RollingBack); err != nil {
			return err
		}
	}
	if a := e.at.Load(); a != nil {
		// Without a commit the destination never runs the VM, whether this arrives or not.
		writeJSON(a.control.Conn, msgAbort, farewell{Reason: saidBy(e.Host, cause).Error()})
		a.Fail(cause)
	}
	// The mark comes before what it says: an engine that finds it resumes the guest, too.
	if e.mark == MarkResumedHere { // the operator's decision stays
		cause = fmt.Errorf("an operator decided so: %w", cause)
	} else if err := e.note(MarkRolledBack, cause.Error()); err != nil {
		e.Log.Warn("cannot record in the journal that the VM runs on here", "error", err)
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), rollbackTime,
		errors.New("rolling back took too long"))
	defer cancel()
	if e.mark == MarkResumedHere {
		// A twin that is still alive may hold the locks of the disks.
		if heard, err := e.Tell(ctx); !heard {
			e.Log.Info("the destination has not heard yet that the VM goes on here", "error", err)
		}
	}
	now, err := e.resume(ctx)
	if err != nil && e.mark == MarkResumedHere {
		// The twin may have run, and may be alive. The decision stays, and the destination must
		// hear of it.
		if e.gone() {
			return &Error{ErrLost, from, errors.Join(cause, err),
				"The VM's QEMU here has ended. Check whether the VM runs on the destination " +
					"before you start it anew"}
		}
		return &Error{ErrLeft, from, errors.Join(cause, err),
			"An operator decided that the VM goes on here, and that is tried again"}
	}
	if err != nil {
		if e.gone() {
			e.keepHere()
			return e.lost(errors.Join(cause, err),
				"The source's QEMU ended during the eviction, and so did the VM; the "+
					"destination never ran it. Start it anew")
		}
		// An operator who resumes the VM by hand need not ask what became of the twin.
		if err := keep(e.Journal, keptDead, nil); err != nil {
			e.Log.Warn("cannot record in the journal that the VM never ran on the destination",
				"error", err)
		}
		remedy := fmt.Sprintf("Try %s", e.owner.byHand(e.qemu))
		if e.Journal != nil {
			remedy = e.remedies()
		}
		return e.lost(errors.Join(cause, fmt.Errorf("roll back: %w", err)),
			"The VM stands frozen here, with its memory intact; the destination never ran it. "+
				remedy)
	}
	remedy := "The VM runs on here, unharmed"
	if now.Running {
		announce(ctx, e.owner.monitor(), e.Log)
	} else {
		remedy = fmt.Sprintf("The VM %s here, unharmed, as it did before the freeze",
			fit.Stands(now.Status))
	}
	return &Error{ErrAborted, from, errors.Join(cause, e.machine.enter(Aborted)), remedy}
}

// gone reports whether the QEMU has ended, or was not there from the start.
func (e *source) gone() bool {
	if e.qemu != (process.Process{}) {
		return !e.qemu.Alive()
	}
	q := e.owner.monitor()
	return q == nil || q.Err() != nil
}

// resume returns the VM to what it did before it was frozen, and returns that state. It does not
// run a VM that stood, but gives its disks back. It may be called only while the destination cannot
// run the VM, or the twin is known or asserted to be dead.
func (e *source) resume(ctx context.Context) (qmp.Status, error) {
	if e.giving.begun.Load() {
		return qmp.Status{}, ErrGivenBack
	}
	// This also covers a process that was only about to be stopped.
	if e.qemu != (process.Process{}) {
		if err := e.qemu.Continue(); err != nil {
			return qmp.Status{}, err
		}
	}
	e.halted.held = false
	for e.owner.monitor() == nil {
		// QEMU first serves clients that came while its process was stopped, even those that have
		// left.
		err := e.open(ctx)
		if err != nil && (ctx.Err() != nil || !notYet(err)) {
			return qmp.Status{}, err
		}
		if err != nil {
			time.Sleep(pollInterval)
		}
	}
	now, err := e.owner.resume(ctx, e.facts.Ran, e.facts.Stood)
	// From now on the VM and its operators decide what it does. An engine that finds it must know
	// that.
	if err == nil && (e.facts.Ran || e.facts.Stood == "suspended") {
		if e.facts.Ran, e.facts.Stood = false, now.Status; now.Running {
			e.facts.Stood = ""
		}
		if err := e.keepFacts(); err != nil {
			e.Log.Warn("cannot record in the journal that the VM was resumed", "error", err)
		}
	}
	return now, err
}

// close ends everything that was started.
func (e *source) close() {
	if a := e.at.Load(); a != nil {
		a.end()
	}
	e.die(net.ErrClosed)
	e.tasks.Wait()
	e.owner.close()
	if e.mem != nil {
		e.mem.Close()
	}
}

// report sums the eviction up.
func (e *source) report(err error) Report {
	o := &e.proposal.offer
	r := Report{Outcome: "completed", Machine: o.Machine, QEMU: o.QEMU,
		Phases: e.machine.phases(), Warnings: e.proposal.warned}
	var failed *Error
	if e.heard.shutDown != "" {
		r.Outcome, r.Reason = string(ShutDown), e.heard.shutDown
	}
	if errors.As(err, &failed) {
		r.Outcome, r.Reason = failed.Outcome.Error(), err.Error()
	}
	since := func(from, to time.Time) *float64 {
		if from.IsZero() || to.IsZero() {
			return nil
		}
		return new(to.Sub(from).Seconds())
	}
	begun := e.machine.at(Switching)
	if !begun.IsZero() {
		r.Begun = &begun
	}
	over := e.machine.at(Completed)
	if over.IsZero() {
		over = e.machine.at(ShutDown)
	}
	r.Prepare, r.Total = since(e.started, begun), since(begun, over)
	r.Transfer = since(begun, e.heard.ranSince)
	// If another engine froze the VM, the time is not known.
	if at := e.halted.at.Load(); at != nil && !begun.IsZero() && e.facts.Stood == "" {
		r.Down = since(*at, e.heard.ranSince)
	}
	r.Stood = e.facts.Stood
	d := &e.departures
	r.Pages = PageCounts{
		Total: int(d.total.Load()), Early: d.pages(pushorder.Early), Zero: e.image.zeroPages(d),
		Duplicate: e.heard.summary.Duplicate,
		Pushed:    d.pages(pushorder.Planned), Near: d.pages(pushorder.Near),
		Fetched: d.pages(pushorder.Fetched),
		Skipped: d.pages(pushorder.Skipped), Unused: d.pages(pushorder.Unused),
		SkippedTouched: e.heard.summary.FreeTouched, Before: d.pages(pushorder.Before),
		GivenBack: int(d.given.Load()),
	}
	r.Order, r.Enlightenment = e.Order.String(), e.account()
	r.Fetch = quantiles(e.heard.summary.FetchDelays)
	if r.Fetch != nil {
		r.Fetch.Count = e.heard.summary.Fetches
	}
	e.sessions.account(&r, e.machine.spent(Pushing))
	return r
}

// tick shows the progress every 100 ms.
func (e *source) tick() {
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-e.life.Done():
			return
		case <-t.C:
			e.show("")
		}
	}
}

// show reports the progress in a state; "" is the present state.
func (e *source) show(st State) {
	if e.Show == nil {
		return
	}
	e.display.mu.Lock()
	defer e.display.mu.Unlock()
	if st == "" { // the lock comes first, so that the state never seems to go backwards
		st = e.machine.current()
	}
	// After a lost link, some pages that were on their way are sent once more.
	d := &e.departures
	e.display.highest = max(e.display.highest, d.settled())
	p := Progress{State: st, Elapsed: time.Since(e.started), Pages: e.display.highest,
		Total: int(d.total.Load()), Fetches: int(d.asked.Load())}
	if p.Total > 0 {
		p.Bytes, _ = e.sessions.bytes()
	}
	p.Stands, p.Short = e.halted.stands.get(), e.heard.short.get()
	if w := e.display.awaits.Load(); w != nil && st == Preparing {
		p.Awaits, p.AwaitedFor = w.what, time.Since(w.since)
	}
	if st == Reconnecting || st == InDoubt {
		p.Apart = e.heard.apart.get()
	}
	frozen, ran := e.halted.at.Load(), e.machine.at(Pushing)
	if frozen != nil && !ran.IsZero() && !e.machine.at(Switching).IsZero() && p.Stands == "" {
		p.Down = ran.Sub(*frozen)
	}
	if st == Pushing {
		p.Rate, p.ETA = e.sessions.pace(d.sentPages(), p.Total-d.settled())
	}
	e.Show(p)
}
