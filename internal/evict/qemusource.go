package evict

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/libvirt"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

// qemuSource is a VM whose QEMU was started by its operator. It obeys anybody who reaches its
// monitor.
type qemuSource struct {
	path    string          // of its QMP socket
	vm      string          // its name; may be empty
	expect  process.Process // the QEMU; zero for any
	q       *qmp.Client     // nil before open
	freezer *freezer        // nil before arm

	// What a manager's monitor does differently; nil for QEMU's own. See freezer.
	subscribe func(context.Context) (events, error)
	drain     func(context.Context, process.Process) error
	cont      func(context.Context) error
}

func (o *qemuSource) monitor() *qmp.Client { return o.q }

func (o *qemuSource) ended(ctx context.Context) error {
	q := o.q
	select {
	case <-q.Done():
		return fmt.Errorf("the source's QEMU is gone: %w", q.Err())
	case <-ctx.Done():
		return nil
	}
}

func (o *qemuSource) open(ctx context.Context) error {
	q, err := qmp.Dial(ctx, o.path)
	if err != nil {
		return err
	}
	if err := o.own(ctx, q); err != nil {
		q.Close()
		return err
	}
	o.q = q
	return nil
}

// own makes sure that the QEMU behind a monitor is the eviction's.
func (o *qemuSource) own(ctx context.Context, q *qmp.Client) error {
	if o.expect == (process.Process{}) {
		return nil
	}
	pid, _, err := q.Process(ctx)
	if err != nil {
		return err
	}
	answers, err := process.Find(pid)
	switch {
	case err != nil && !errors.Is(err, process.ErrGone):
		return err
	case err != nil || answers != o.expect:
		return fmt.Errorf("%w: process %d had the VM, and process %d answers now", errAnother,
			o.expect.PID, pid)
	}
	return nil
}

// errAnother is wrapped by the error of a QEMU that is not the one that had the VM.
var errAnother = errors.New("the VM's QEMU ended")

func (o *qemuSource) describe(ctx context.Context) (d described, err error) {
	if err := recent(o.q.Version()); err != nil {
		return d, err
	}
	err = together(
		func() error { return canSave(ctx, o.q) },
		func() error { return atRest(ctx, o.q, cmp.Or(o.vm, "the VM")) },
		func() (err error) {
			d.status, err = o.fit(ctx)
			return err
		},
		func() (err error) {
			d.offer, err = describe(ctx, o.q)
			return err
		},
		func() error { return held(ctx, o.q) },
		func() (err error) {
			d.flash, err = writableFlash(ctx, o.q)
			return err
		},
		func() (err error) {
			d.disks, err = fit.DisksOf(ctx, o.q)
			return err
		},
		func() (err error) {
			d.mem, err = guestmem.Attach(ctx, o.q)
			return err
		},
		func() error {
			if o.path == "" {
				return nil // a monitor that the caller dialled passes no descriptors
			}
			return handsOver(ctx, o.q, o.path)
		})
	return d, err
}

// fit makes sure that the VM's state allows an eviction, and returns that state.
func (o *qemuSource) fit(ctx context.Context) (qmp.Status, error) {
	status, err := o.q.QueryStatus(ctx)
	if err != nil {
		return status, err
	}
	m, err := o.q.QueryMigrate(ctx)
	if err != nil {
		return status, err
	}
	m.Blocked = nil // these reasons are reported elsewhere, with remedies
	if err := mayLeave(m); err != nil {
		return status, err
	}
	// The destination checks its own QEMU's version.
	reasons := fit.StateOf(status.Status, o.q.Version(), o.q.Version())
	if err := reasons.Err(); err != nil {
		return status, fmt.Errorf("%s %w", vmName(o.vm), err)
	}
	if status.Running {
		return status, nil
	}
	// The VM may have arrived here standing, or have been rolled back: QEMU before 10.0 does not
	// survive giving up its disks twice.
	return status, fit.Activate(ctx, o.q)
}

func (o *qemuSource) arm(ctx context.Context, mem *guestmem.Memory) (err error) {
	o.freezer, err = newFreezer(ctx, o.q, mem)
	return err
}

func (o *qemuSource) freeze(ctx context.Context, ran bool) (saved, error) {
	return o.freezer.freeze(ctx, ran)
}

func (o *qemuSource) hold(ctx context.Context, qemu process.Process) error {
	return o.freezer.hold(ctx, qemu)
}

func (o *qemuSource) disarm(ctx context.Context) error {
	if o.freezer == nil {
		return nil
	}
	return o.freezer.forget(ctx)
}

func (o *qemuSource) catch(ctx context.Context, qemu process.Process,
	stop bool) (copyState, error) {
	events, err := subscribe(ctx, o.q, o.subscribe)
	if err != nil {
		return copyGone, err
	}
	defer events.Close()
	status, err := o.q.QueryStatus(ctx)
	switch {
	case err != nil:
		return copyGone, err
	case status.Running:
		return copyRunning, nil
	case !stop:
		return copyPaused, nil
	}
	if err := qemu.Stop(ctx); err != nil {
		return copyGone, err
	}
	if err := drain(ctx, o.q, o.drain, qemu); err != nil {
		return copyGone, err
	}
	for {
		name, _, ok := events.next()
		switch {
		case name == "RESUME" || events.Dropped() > 0 || o.q.Err() != nil:
			return copyGone, errors.Join(errMoved, qemu.Continue())
		case !ok:
			return copyPaused, nil
		}
	}
}

func (o *qemuSource) resume(ctx context.Context, ran bool, stood string) (qmp.Status, error) {
	o.disarm(ctx)
	var refused error // why QEMU did not run the VM when it was last told to
	// late says so where time runs out while QEMU is asked once more.
	late := func(err error) error {
		if ctx.Err() == nil || refused == nil {
			return err
		}
		return fmt.Errorf("QEMU cannot run the VM: %w", refused)
	}
	for told := false; ; {
		status, err := o.q.QueryStatus(ctx)
		if err != nil {
			return status, late(err)
		}
		if status.Running || told || o.freezer != nil && o.freezer.resumed() {
			return status, nil
		}
		// While the destination's QEMU lives, it may hold the locks of the disks.
		if ran || stood == "suspended" && status.Status == "paused" {
			err = o.run(ctx) // a guest that was suspended is again, and does not run
		} else {
			err = fit.Activate(ctx, o.q)
		}
		var manager *libvirt.Error
		if err != nil && !isRefusal(err) && !errors.Is(err, fit.ErrInactive) &&
			!errors.As(err, &manager) {
			return status, late(err)
		}
		refused = err
		if told = refused == nil; told {
			continue
		}
		select {
		case <-ctx.Done():
			return status, errors.Join(refused,
				fmt.Errorf("%w; the VM's state is %q", context.Cause(ctx), status.Status))
		case <-time.After(pollInterval):
		}
	}
}

func (o *qemuSource) run(ctx context.Context) error {
	if o.cont != nil {
		return o.cont(ctx)
	}
	return o.q.Cont(ctx)
}

func (o *qemuSource) release(ctx context.Context) error { return o.disarm(ctx) }

// discard kills the QEMU, whose process is stopped. To quit, it would have to run again, and could
// first carry out a `cont` that somebody sent meanwhile.
func (o *qemuSource) discard(ctx context.Context, qemu process.Process) error {
	return qemu.Kill(ctx)
}

func (o *qemuSource) byHand(qemu process.Process) string {
	return fmt.Sprintf("`kill -CONT %d`, then `cont` on its QMP socket", qemu.PID)
}

func (o *qemuSource) ownRemedy() string { return "" }

func (o *qemuSource) close() {
	if o.freezer != nil {
		o.freezer.close()
	}
	if o.q != nil {
		o.q.Close()
	}
}
