package evict

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// retire ends the QEMU here, as the destination has every page.
func (e *source) retire() error { return e.finish(MarkCompleted, "", Completed) }

// bury ends the QEMU here, as the guest ended itself at the destination. It wrote its disks last
// there.
func (e *source) bury(why error) error {
	e.heard.shutDown = why.Error()
	return e.finish(MarkShutDown, why.Error(), ShutDown)
}

// finish ends the QEMU here, as nobody needs it any more.
func (e *source) finish(m Mark, why string, as State) error {
	if err := e.machine.enter(Retiring); err != nil {
		return e.lost(err, "The VM on the destination does not need the copy here. Nothing is lost")
	}
	if err := e.note(m, why); err != nil {
		e.Log.Warn("cannot record in the journal how the eviction ended", "mark", m, "error", err)
	}
	if a := e.at.Load(); a != nil {
		a.control.Write(msgHeard)
	}
	ended := e.kill()
	err := e.machine.enter(as)
	<-ended
	return err
}

// quitTime is how long a killed QEMU may take to end.
const quitTime = 10 * time.Second

// kill ends the QEMU here, which nobody needs any more. It returns a channel that is closed when
// the QEMU has ended.
func (e *source) kill() <-chan struct{} {
	ended := make(chan struct{})
	e.tasks.Go(func() {
		defer close(ended)
		ctx, cancel := context.WithTimeout(context.Background(), quitTime)
		defer cancel()
		if err := e.owner.discard(ctx, e.qemu); err != nil {
			e.Log.Warn("the source's QEMU does not end; end it by hand", "pid", e.qemu.PID, "error",
				err)
		}
	})
	return ended
}

// frozenRemedy says what an operator can do with a VM that is frozen here.
func (e *source) frozenRemedy() string {
	if e.giving.begun.Load() {
		return fmt.Sprintf(
			"The copy here is of no use, as memory of it was given back. Find out on the "+
				"destination what became of the VM; `vacate decide %s discard --confirm %s` "+
				"ends this copy", e.Eviction, e.VM)
	}
	const keep = "Here it stays frozen, with all of its memory: do not end its QEMU. Find out " +
		"on the destination what became of it"
	if e.Journal == nil {
		return fmt.Sprintf(keep+
			". Its process is stopped. Only if the VM is gone on the destination for good: %s. "+
			"It then goes on here", e.owner.byHand(e.qemu))
	}
	return keep + ". " + e.remedies()
}

// remedies says where an operator finds the choices. They depend on what the destination said, and
// may still say.
func (e *source) remedies() string {
	return fmt.Sprintf("`vacate status %s` says what it waits for, and what you can decide", e.VM)
}

// lost returns, as an error, what a destination says that has lost the VM.
func (st status) lost() error {
	if st.Dead {
		return fmt.Errorf("%w, %w: %s", errFailed, errDead, st.Reason)
	}
	return fmt.Errorf("%w: %s", errFailed, st.Reason)
}

// lostThere ends an eviction whose VM is lost at the destination. Unless the destination said that
// the twin is dead, the twin may still run: lostThere remembers that.
func (e *source) lostThere(err error) error {
	if errors.Is(err, errDead) || errors.Is(err, errFarewell) {
		if err := keep(e.Journal, keptDead, nil); err != nil {
			e.Log.Warn("cannot record in the journal that the VM's QEMU on the destination has "+
				"ended", "error", err)
		}
	}
	return e.lost(err,
		fmt.Sprintf("The VM may have run on the destination, with %d of %d pages settled. What "+
			"it did there is lost. %s", e.departures.settled(),
			e.departures.total.Load(), e.frozenRemedy()))
}

// lostHere ends an eviction whose frozen VM ended before all of its pages were sent. The
// destination must know that no more will come. If it is connected and does not confirm that it has
// heard, the eviction is not over. The error then says why.
func (e *source) lostHere(err error) (done bool, _ error) {
	if a := e.at.Load(); a != nil {
		heard := writeJSON(a.control.Conn, msgFailed, farewell{Reason: saidBy(e.Host, err).Error()})
		ctx, cancel := context.WithTimeout(context.Background(), answerTime)
		defer cancel()
		var f controlFrame
		for heard == nil && f.kind != msgComplete {
			f, heard = a.control.await(ctx, msgPresent, msgReady, msgShort, msgComplete)
		}
		if heard == nil {
			heard = decode(f.payload, &e.heard.summary)
		}
		switch {
		case heard == nil:
			return true, e.retire() // it needs none of the missing pages
		case errors.Is(heard, errShutDown):
			return true, e.bury(heard)
		case !errors.Is(heard, errFailed) && !errors.Is(heard, errFarewell):
			return false, heard
		}
	}
	return true, e.lost(err,
		"The frozen VM here is gone, and so are the pages that the destination lacks. There the "+
			"VM runs until it touches one of them: save from it what you can")
}

func (e *source) left() error {
	return &Error{ErrLeft, e.machine.current(), ErrLeave,
		"The VM stays frozen here. Another engine can go on with the eviction"}
}
