package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/host/hypervisor"
	"vacate/internal/sys/process"
)

// recover gives each eviction in the journal that has not ended an engine again.
func (h *Host) recover() {
	for _, entry := range h.journal.List() {
		v := h.newEviction(entry)
		h.add(v)
		if err := entry.Err(); err != nil {
			h.log.Error("an eviction in the journal is damaged: nothing is done about it, as "+
				"nobody can tell what it promised", "eviction", entry.ID(), "error", err)
			continue
		}
		if v.ended() {
			if v.mark() == evict.MarkLost {
				v.releaseDomain(evict.MarkLost)
			}
			v.tell()
			v.restoreHuge()
			continue
		}
		r := entry.Record()
		h.log.Info("eviction taken up", "eviction", r.ID, "vm", r.VM, "role", r.Role, "peer",
			r.Peer, "mark", r.Mark)
		if r.Carried {
			v.dropCarried()
			continue
		}
		var err error
		if r.Role == journal.Source {
			err = v.recoverSource()
		} else {
			err = v.recoverDestination()
		}
		if err != nil {
			v.change(func() { v.reason = err.Error() })
			h.log.Error("an eviction cannot be taken up", "eviction", r.ID, "vm", r.VM, "error",
				err)
		}
	}
}

func (v *eviction) recoverSource() error {
	switch v.mark() {
	case evict.MarkLost:
		if !v.process().Alive() {
			v.finish(evict.MarkLost, evict.Lost,
				errors.New("the VM that stood frozen here is gone"), nil)
			return nil
		}
		v.undecided(v.entry.Record().Reason)
		return nil
	case evict.MarkBegun:
		if v.entry.Torn() {
			// What is torn may have been may-run: to ask costs nothing but time.
			if err := v.entry.Note(string(evict.MarkMayRun),
				"the journal is torn behind the mark begun", nil); err != nil {
				return err
			}
		}
	}
	v.send(true)
	return nil
}

// killTime is how long a twin may take to end.
const killTime = 10 * time.Second

func (v *eviction) recoverDestination() error {
	switch v.mark() {
	case evict.MarkCompleted:
		v.host.tasks.Go(func() {
			if err := v.destination().LetGo(v.host.life); err != nil {
				v.host.log.Warn("it is not known whether the QEMU has its own settings back",
					"eviction", v.entry.ID(), "error", err)
			}
			v.finish(evict.MarkCompleted, evict.Completed, nil, nil)
			v.restoreHuge()
		})
		return nil
	case evict.MarkShutDown:
		// The disks were written when the guest stood still, before the mark was.
		if err := v.killTwin(); err != nil {
			return err
		}
		v.finish(evict.MarkShutDown, evict.ShutDown, errors.New(v.entry.Record().Reason), nil)
		return nil
	case evict.MarkLost:
		v.finish(evict.MarkLost, evict.Lost, errors.New(v.entry.Record().Reason), nil)
		return nil
	case evict.MarkAccepted:
		ran, err := v.mayHaveRun()
		if err != nil {
			return err
		}
		if ran {
			if err := v.entry.Note(string(evict.MarkMayRun),
				"the journal is torn behind the mark accepted", nil); err != nil {
				return err
			}
			break
		}
		fallthrough
	case evict.MarkNeverRan:
		if err := v.killTwin(); err != nil {
			return err
		}
		v.finish(evict.MarkNeverRan, evict.Aborted,
			errors.New("the daemon ended before the VM was told to run here"), nil)
		return nil
	}
	v.receive(true)
	return nil
}

// mayHaveRun reports whether a twin may have run although its last mark says that it never did: the
// record behind the mark is torn, and the twin does not stand still.
func (v *eviction) mayHaveRun() (bool, error) {
	if !v.entry.Torn() {
		return false, nil
	}
	if evict.StoodThere(record{v.entry}) != "" { // which is written behind the commit
		return true, nil
	}
	if r := v.entry.Record(); r.Libvirt != "" { // it may have been told to run the domain
		seen, err := findDomain(v.host.life, r.Libvirt, r.VM)
		if errors.Is(err, hypervisor.ErrUnknown) {
			return false, nil
		}
		return seen.State == hypervisor.Running, err
	}
	vm, err := hypervisor.Find(v.host.config.VMs, v.entry.Record().VM)
	if err != nil {
		return false, err
	}
	seen, err := hypervisor.Look(v.host.life, vm)
	if err != nil {
		return false, err
	}
	return seen.State != hypervisor.Incoming && seen.State != hypervisor.Paused, nil
}

// killTwin ends the QEMU that was to take the VM: the one in the journal, or one that was started
// and did not get there.
func (v *eviction) killTwin() error {
	ctx, cancel := context.WithTimeout(v.host.life, killTime)
	defer cancel()
	r := v.entry.Record()
	if r.Boot != process.BootID() {
		return nil
	}
	if r.Libvirt != "" {
		twin := v.process()
		if r.PID == 0 {
			twin = process.Process{}
		}
		return v.destination().EndTwin(ctx, twin)
	}
	if r.PID != 0 {
		return v.process().Kill(ctx)
	}
	vm, err := hypervisor.Find(v.host.config.VMs, r.VM)
	if err != nil {
		return fmt.Errorf("cannot find out whether a twin was started: %w", err)
	}
	twins, err := hypervisor.Twins(vm)
	for _, p := range twins {
		err = errors.Join(err, p.Kill(ctx))
	}
	return err
}
