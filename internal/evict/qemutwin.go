package evict

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

// qemuTwin is a QEMU that its operator started to take a VM. It waits behind its monitor.
type qemuTwin struct {
	path        string // of its QMP socket
	description string // the file that says how it is started; empty without a daemon
	log         *slog.Logger
	runs        func() // called when the QEMU says that the guest runs
	found       twinQEMU
	own         actions  // the QEMU's
	held        bool     // it was told to pause when its guest ends itself
	changed     settings // the QEMU's own, as they were
	conn        net.Conn // our end of its last stream; nil before the first
	ending      ending
	// capacity 1: why the guest ended itself, once the QEMU is paused with it
	ended chan string
	life  context.Context    // ends when close is called
	stop  context.CancelFunc // of life
	tasks sync.WaitGroup

	// A twin that ran may get a new stream before it has answered that it runs.
	mu sync.Mutex
	q  *qmp.Client // nil when it does not answer; guarded by mu
}

func newQEMUTwin(d Destination, runs func()) *qemuTwin {
	o := &qemuTwin{path: d.QMP, description: d.Description, log: d.Log, runs: runs,
		ended: make(chan string, 1)}
	o.life, o.stop = context.WithCancel(context.Background())
	return o
}

// client returns the QEMU's monitor; nil if it does not answer.
func (o *qemuTwin) client() *qmp.Client {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.q
}

// open dials the QEMU's monitor, unless that answers.
func (o *qemuTwin) open(ctx context.Context) error {
	was := o.client()
	if was != nil && was.Err() == nil {
		return nil
	}
	q, err := qmp.Dial(ctx, o.path)
	if err != nil {
		return err
	}
	if was != nil {
		was.Close()
	}
	o.mu.Lock()
	o.q = q
	o.mu.Unlock()
	return nil
}

func (o *qemuTwin) twin() twinQEMU { return o.found }

func (o *qemuTwin) over() <-chan string { return o.ended }

func (o *qemuTwin) look(ctx context.Context) error {
	if err := o.open(ctx); err != nil {
		return err
	}
	q := o.client()
	if err := recent(q.Version()); err != nil {
		return err
	}
	status, err := q.QueryStatus(ctx)
	if err != nil {
		return err
	}
	var m struct {
		Status    string `json:"status"`
		Listening []any  `json:"socket-address"`
	}
	if err := q.Run(ctx, "query-migrate", nil, &m); err != nil {
		return err
	}
	if m.Listening != nil && m.Status == "" {
		m.Status = "listening for another source"
	}
	if status.Status != "inmigrate" || m.Status != "" && m.Status != "none" {
		return fmt.Errorf("the destination's QEMU at %s does not wait for a VM (its state is %q "+
			"%s): %s", o.path, status.Status, m.Status, o.startRemedy())
	}
	if err := handsOver(ctx, q, o.path); err != nil {
		return err
	}
	if o.found.mem, err = guestmem.Attach(ctx, q); err != nil {
		return err
	}
	pid := o.found.mem.PID()
	if o.found.process, err = process.Find(pid); err != nil {
		return fmt.Errorf("hold on to QEMU's process %d: %w", pid, err)
	}
	o.listen(q)
	args, err := commandLine(pid)
	if err != nil {
		return err
	}
	if err := startsPaused(args); err != nil {
		return fmt.Errorf("%w: %s", err, o.startRemedy())
	}
	o.own = actionsOf(args)
	if o.found.here, err = describe(ctx, q); err != nil {
		return err
	}
	o.found.here = o.found.here.withMemory(o.found.mem)
	return nil
}

func (o *qemuTwin) ready(ctx context.Context) error {
	before, err := settingsOf(ctx, o.client())
	if err != nil {
		return err
	}
	want, was := before.plan(nil)
	o.changed = was
	if err := want.apply(ctx, o.client()); err != nil {
		return explainPostcopy(err)
	}
	return o.hold(ctx)
}

func (o *qemuTwin) accept(ctx context.Context, offered offer) (err error) {
	if err := atRest(ctx, o.client(), "the QEMU that waits at the destination"); err != nil {
		return err
	}
	// It is asked again, as somebody may have changed it since the wait began, by QEMU's monitor.
	here := o.found.here
	if here.Disks, err = fit.DisksOf(ctx, o.client()); err != nil {
		return err
	}
	err = offered.mismatch(here)
	if err != nil && o.description != "" {
		err = fmt.Errorf("%w. How it is started is in %s", err, o.description)
	}
	return err
}

func (o *qemuTwin) decline(context.Context) {
	if o.conn != nil {
		o.conn.Close()
	}
}

func (o *qemuTwin) connect(ctx context.Context) (_ net.Conn, err error) {
	// If QEMU takes it, it is not stuck. Nothing is lost yet.
	o.conn, err = socketTo(ctx, o.client(), destinationFD, qemuBuffer)
	return o.conn, err
}

func (o *qemuTwin) begin(ctx context.Context) error {
	return o.client().MigrateIncoming(ctx, "fd:"+destinationFD)
}

func (o *qemuTwin) loaded(ctx context.Context) (bool, error) {
	status, err := o.client().QueryStatus(ctx)
	switch {
	case err != nil:
		return false, err
	case status.Status == "paused":
		return true, nil
	case status.Status != "inmigrate":
		return false, fmt.Errorf("the destination's QEMU went to state %q, not to paused",
			status.Status)
	}
	return false, nil
}

func (o *qemuTwin) run(ctx context.Context) error {
	err := o.client().Cont(ctx)
	if isRefusal(err) {
		return notRun{fmt.Errorf("the destination's QEMU refuses to run the VM: %w", err)}
	}
	return err
}

// notRun is an error that wraps errNotRun, and does not repeat its text.
type notRun struct{ error }

func (e notRun) Unwrap() []error { return []error{e.error, errNotRun} }

func (o *qemuTwin) announce(ctx context.Context) { announce(ctx, o.client(), o.log) }

func (o *qemuTwin) reason(ctx context.Context) (string, error) {
	q := o.client()
	if q == nil {
		return "", nil
	}
	m, err := q.QueryMigrate(ctx)
	return m.ErrorDesc, err
}

// renew uses QEMU's own recovery of a post-copy migration.
func (o *qemuTwin) renew(ctx context.Context, hello []byte) (r renewed, err error) {
	before := o.client()
	if err := o.open(ctx); err != nil {
		return r, err
	}
	q := o.client()
	if q != before {
		o.listen(q)
	}
	// This catches what the guest did while no engine listened.
	if st, err := q.QueryStatus(ctx); err != nil {
		return r, err
	} else if o.own.ends(st.Status) {
		return renewed{over: "QEMU found in the state " + st.Status}, nil
	}
	if err := awaitPaused(ctx, q); err != nil {
		return r, err
	}
	st, err := q.QueryStatus(ctx)
	if err != nil {
		return r, err
	}
	// A QEMU that took the VM, has all devices and never ran says "paused" if it was not told to
	// run.
	r.pending = st.Status == "paused"
	if r.conn, err = socketTo(ctx, q, recoverFD, 0); err != nil {
		return r, err
	}
	// It is one write, before QEMU reads any of it: some versions do not survive a connection that
	// ends too early.
	if _, err = r.conn.Write(hello); err != nil {
		err = fmt.Errorf("write to QEMU: %w", err)
	} else {
		err = q.MigrateRecover(ctx, "fd:"+recoverFD)
	}
	if err != nil {
		r.conn.Close()
	}
	return r, err
}

// awaitPaused waits until QEMU has noticed that its stream broke.
func awaitPaused(ctx context.Context, q *qmp.Client) error {
	for asked := false; ; {
		m, err := q.QueryMigrate(ctx)
		switch {
		case err != nil:
			return err
		case m.Status == "postcopy-paused":
			return nil
		case m.Status == "completed":
			return errCompleted
		case m.Status == "failed":
			return fmt.Errorf("QEMU's migration failed: %s", m.ErrorDesc)
		case m.Status == "postcopy-active" && !asked:
			asked = true
			// QEMU refuses if it has just noticed by itself.
			if err := q.MigratePause(ctx); err != nil && !isRefusal(err) {
				return err
			}
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%w; its migration is %q", context.Cause(ctx), m.Status)
		}
	}
}

// hold tells the QEMU to keep a guest that ends itself, if by its own setting QEMU would end then.
// Without that QEMU would announce it and end at once, and perhaps nobody would listen.
func (o *qemuTwin) hold(ctx context.Context) error {
	if o.own.shutdown == "pause" {
		return nil
	}
	q := o.client()
	err := q.Run(ctx, "set-action", map[string]string{"shutdown": "pause"}, nil)
	if errors.Is(err, qmp.ErrCommandNotFound) { // QEMU before 6.0
		o.log.Info("cannot tell the QEMU here to stay when its guest ends itself", "version",
			q.Version())
		return nil
	}
	o.held = err == nil
	return err
}

// giveBackTime is how long a QEMU may take to restore its own settings.
const giveBackTime = 2 * time.Second

func (o *qemuTwin) letGo(life context.Context, over bool) {
	q := o.client()
	if q == nil {
		return
	}
	if over {
		o.putBack(life, q)
	}
	o.release(life, q)
}

// putBack gives the QEMU its own migration settings back.
func (o *qemuTwin) putBack(life context.Context, q *qmp.Client) {
	ctx, cancel := context.WithTimeout(life, giveBackTime)
	defer cancel()
	err := o.changed.apply(ctx, q)
	// QEMU refuses until its migration is over, and that was told to end
	for isRefusal(err) && ctx.Err() == nil {
		select {
		case <-time.After(pollInterval):
			err = o.changed.apply(ctx, q)
		case <-ctx.Done():
		}
	}
	if err != nil && life.Err() == nil {
		o.log.Warn("cannot restore the own migration settings of the QEMU here", "error", err)
	}
}

// release undoes hold, and makes QEMU quit if its guest ended itself before.
func (o *qemuTwin) release(life context.Context, q *qmp.Client) {
	if !o.held || life.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(life, giveBackTime)
	defer cancel()
	err := q.Run(ctx, "set-action", map[string]string{"shutdown": o.own.shutdown}, nil)
	if errors.Is(err, qmp.ErrCommandNotFound) {
		return
	}
	var st qmp.Status
	if err == nil {
		st, err = q.QueryStatus(ctx)
	}
	if err == nil && o.own.ends(st.Status) {
		o.log.Info("the guest has ended itself: telling its QEMU to quit", "state", st.Status)
		err = q.Quit(ctx)
	}
	if err != nil && life.Err() == nil {
		o.log.Warn("the QEMU here stays when its guest ends itself: to change that, tell its "+
			"monitor set-action shutdown=poweroff", "error", err)
	}
}

func (o *qemuTwin) quit(ctx context.Context) error {
	q := o.client()
	if q == nil {
		return errNotOpen
	}
	return q.Quit(ctx)
}

func (o *qemuTwin) kill(ctx context.Context) error { return o.found.process.Kill(ctx) }

func (o *qemuTwin) ownRemedy() string { return "" }

func (o *qemuTwin) record(t *twin) { t.Changed = o.changed }

func (o *qemuTwin) recall(t twin) error {
	args, err := commandLine(t.PID)
	if err != nil {
		return err
	}
	o.found.process = t.process()
	o.changed, o.own = t.Changed, actionsOf(args)
	o.held = o.own.shutdown != "pause"
	return nil
}

func (o *qemuTwin) close() {
	o.stop()
	o.tasks.Wait()
	if q := o.client(); q != nil {
		q.Close()
	}
}

// listen follows what QEMU says at a monitor about its guest's end, and its own. It returns when
// the QEMU or this engine ends.
func (o *qemuTwin) listen(q *qmp.Client) {
	events, heard := q.Subscribe(256), make(chan struct{})
	o.ending.mu.Lock()
	o.ending.listeners = append(o.ending.listeners, heard)
	o.ending.mu.Unlock()
	o.tasks.Go(func() {
		defer close(heard)
		defer events.Close()
		for {
			select {
			case ev, ok := <-events.C:
				if !ok {
					return
				}
				if o.ending.hear(ev) {
					o.tasks.Go(func() { o.confirm(q) })
				}
				if ev.Name == "RESUME" {
					o.runs()
				}
			case <-o.life.Done():
				return
			}
		}
	})
}

// confirm asks a QEMU for its run state if its guest may have ended itself. QEMU answers when the
// guest stands still and its disks are written.
func (o *qemuTwin) confirm(q *qmp.Client) {
	st, err := q.QueryStatus(o.life)
	if err != nil || !o.own.ends(st.Status) {
		return
	}
	why := o.ending.said()
	if why == "" {
		why = "guest-panic" // QEMU's own word for it, if it does not pause
	}
	select {
	case o.ended <- why:
	default:
	}
}

func (o *qemuTwin) lastWords() (guest, host string) {
	o.ending.wait()
	o.ending.mu.Lock()
	defer o.ending.mu.Unlock()
	return o.ending.guest, o.ending.host
}

// startRemedy says how to start the QEMU.
func (o *qemuTwin) startRemedy() string {
	if o.description != "" {
		return fmt.Sprintf("the command in %s must have {incoming} among its arguments",
			o.description)
	}
	return "start it like the source's, with -S -incoming defer added"
}

// startsPaused makes sure that QEMU was started with -S. Otherwise it would run the VM as soon as
// the devices are loaded, before the commit.
func startsPaused(args []string) error {
	if !slices.Contains(args, "-S") && !slices.Contains(args, "--S") {
		return errors.New("the destination's QEMU was started without -S and would run the VM " +
			"without being told to")
	}
	return nil
}
