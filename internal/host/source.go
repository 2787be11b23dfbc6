package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/evict/pushorder"
	"vacate/internal/fleet/orders"
	"vacate/internal/host/hypervisor"
	"vacate/internal/link"
)

// options are those of an eviction, as they are in the journal.
type options struct {
	Order         string `json:"order,omitempty"`
	Enlightenment string `json:"enlightenment,omitempty"`
	SendFree      bool   `json:"send_free,omitempty"`
	RateLimit     uint64 `json:"rate_limit,omitempty"` // bytes a second
	Yield         bool   `json:"yield,omitempty"`
	LoadTimeout   uint32 `json:"load_timeout_ms,omitempty"`
	// TrustDisks is what the VM's description says.
	TrustDisks []string `json:"trust_disks,omitempty"`
	// Force: the other host takes it although it keeps VMs off.
	Force bool `json:"force,omitempty"`
	// Plan is the ID of the fleet's plan that ordered it, which names this incarnation of the VM.
	Plan        string `json:"plan,omitempty"`
	incarnation string
}

// maxLoadTimeout is the longest that a VM may be asked to stand still.
const maxLoadTimeout = 10 * time.Minute

// source is an engine for an eviction from here.
func (v *eviction) source() (evict.Source, error) {
	r := v.entry.Record()
	var o options
	if len(r.Options) > 0 {
		if err := json.Unmarshal(r.Options, &o); err != nil {
			return evict.Source{}, fmt.Errorf("options of the eviction: %w", err)
		}
	}
	return v.host.sourceWith(r, o, v)
}

// sourceWith makes an engine with options, which may be wrong.
func (h *Host) sourceWith(r journal.Record, o options, v *eviction) (s evict.Source, err error) {
	if o.Order != "" {
		if s.Order, err = pushorder.ParsePolicy(o.Order); err != nil {
			return s, err
		}
	}
	s.Enlightenment = evict.Enlightenment(o.Enlightenment)
	if o.Enlightenment != "" && !slices.Contains(evict.Enlightenments(), s.Enlightenment) {
		return s, fmt.Errorf("enlightenment %q: there are %v", o.Enlightenment,
			evict.Enlightenments())
	}
	if s.LoadTimeout = time.Duration(o.LoadTimeout) * time.Millisecond; s.LoadTimeout >
		maxLoadTimeout {
		return s, fmt.Errorf("load timeout of %v: it is %v at most", s.LoadTimeout, maxLoadTimeout)
	}
	s.Host = h.name()
	s.Eviction, s.VM, s.QMP, s.SendFree = r.ID, r.VM, r.QMP, o.SendFree
	if d, err := h.dialer(r.Peer); err == nil {
		s.Connect = d.Session
	} else {
		// The peer is out of the configuration since the eviction began. Much needs no peer: to
		// roll back, to end the QEMU here, to do an operator's word.
		s.Connect = func(context.Context) (*link.Session, error) { return nil, err }
	}
	s.TrustDisks, s.Forced = o.TrustDisks, o.Force
	s.Libvirt = h.libvirtOf(r)
	s.Path, s.Yield, s.GiveBack = h.paths[r.Peer], o.Yield, h.config.GiveBack
	if o.RateLimit > 0 {
		s.Limit = new(evict.Limit)
		s.Limit.Set(int64(min(o.RateLimit, math.MaxInt64)))
	}
	if v != nil {
		s.Process = v.process()
		s.Journal = record{v.entry}
		s.Log = h.log.With("eviction", r.ID, "vm", r.VM, "role", r.Role)
		s.Show, s.Map = v.show, &v.memory
	}
	return s, nil
}

// evict begins an eviction of a VM here to another host.
func (h *Host) evict(ctx context.Context, name, to string, o options,
	skipChecks bool) (*eviction, error) {
	if err := hypervisor.CheckName(name); err != nil {
		return nil, &argumentError{err}
	}
	vm, err := h.vms().Find(ctx, name)
	if err != nil {
		return nil, err
	}
	r := journal.Record{ID: journal.NewID(), Role: journal.Source, VM: name, Peer: to,
		PeerAddr: h.config.Peers[to].Address, QMP: vm.QMP, Libvirt: vm.Libvirt,
		Mark: string(evict.MarkBegun)}
	if _, err := h.dialer(to); err != nil {
		return nil, &unknownError{err}
	}
	if _, err := h.sourceWith(r, o, nil); err != nil {
		return nil, &argumentError{err}
	}
	release, err := h.takeSoon(ctx, name)
	if err != nil {
		return nil, err
	}
	defer release()
	h.leaveHuge(name)
	if o.Plan != "" && vm.Pinned {
		return nil, &stateError{fmt.Errorf("VM %s is pinned on host %s: the fleet does not move it",
			name, h.name())}
	}
	if !skipChecks {
		if err := h.checks(ctx, name, to, o.Force); err != nil {
			return nil, err
		}
	}
	seen, err := hypervisor.Look(ctx, vm)
	if err != nil {
		return nil, err
	}
	if err := h.mayLeave(vm, seen); err != nil {
		return nil, err
	}
	if o.Plan != "" && h.incarnation(name, seen.Process) != o.incarnation {
		return nil, &stateError{fmt.Errorf("VM %s on host %s: %w", name, h.name(), orders.ErrStale)}
	}
	r.PID, r.StartTime = seen.Process.PID, seen.Process.StartTime
	o.TrustDisks = vm.TrustDisks
	if r.Options, err = json.Marshal(o); err != nil {
		return nil, err
	}
	entry, err := h.journal.Create(r)
	if err != nil {
		return nil, err
	}
	v := h.newEviction(entry)
	h.add(v)
	v.send(false)
	h.log.Info("eviction begun", "eviction", r.ID, "vm", name, "to", to)
	return v, nil
}

// mayLeave returns an error if no VM can be evicted in the state in which it was seen.
func (h *Host) mayLeave(vm hypervisor.VM, seen hypervisor.Seen) error {
	switch {
	case vm.Libvirt != "" && seen.State == hypervisor.Paused:
		return &stateError{fmt.Errorf(
			"the domain %s is %s, and libvirt's domains are evicted only "+
				"while they run: `virsh resume %[1]s`, or move it with `virsh migrate`", vm.Name,
			seen.Status)}
	case seen.State != hypervisor.Running && seen.State != hypervisor.Paused:
		return &stateError{fmt.Errorf("VM %s is not here, or cannot leave: its state on host %s "+
			"is %s", vm.Name, h.name(), seen.State)}
	}
	return nil
}

// send has an engine evict the VM, or resume that.
func (v *eviction) send(resume bool) {
	v.start(resume, func(ctx context.Context, resumed bool) (any, error) {
		s, err := v.source()
		switch {
		case err != nil && resumed:
			return nil, &evict.Error{Outcome: evict.ErrLeft, State: evict.InDoubt, Err: err,
				Remedy: "Nothing was touched"}
		case err != nil:
			return nil, &evict.Error{Outcome: evict.ErrRefused, State: evict.Preparing, Err: err,
				Remedy: "Nothing was touched"}
		case resumed:
			return s.Resume(ctx, v.mark())
		}
		return s.Evict(ctx)
	}, v.sent)
}

// sent notes the end of an eviction from here.
func (v *eviction) sent(report json.RawMessage, err error) {
	var told evict.Report
	json.Unmarshal(report, &told) // it is the engine's
	switch {
	case err == nil && told.Outcome == string(evict.ShutDown):
		why := told.Reason
		if v.mark() == evict.MarkShutDown { // by an engine before, maybe
			why = v.entry.Record().Reason
		}
		v.finish(evict.MarkShutDown, evict.ShutDown, errors.New(why), report)
	case err == nil:
		// What an engine had come to when a daemon died stays.
		m := v.mark()
		if m == evict.MarkBegun || m == evict.MarkMayRun {
			m = evict.MarkCompleted
			v.host.metrics.left(told)
		}
		v.finish(m, evict.State(outcomes[m]), nil, report)
	case errors.Is(err, evict.ErrRefused):
		v.finish(evict.MarkRolledBack, evict.Refused, err, report)
	case errors.Is(err, evict.ErrAborted):
		m := v.mark()
		if m != evict.MarkResumedHere {
			m = evict.MarkRolledBack
		}
		v.finish(m, evict.State(outcomes[m]), err, report)
	case v.process().Alive():
		// The VM stands frozen here: an operator has to decide.
		v.undecided(err.Error())
		v.host.log.Error("eviction needs an operator", "eviction", v.entry.ID(), "vm",
			v.entry.Record().VM, "error", err)
	default:
		v.finish(evict.MarkLost, evict.Lost, err, report)
	}
}

// undecided has the eviction wait for an operator, or for the end of the QEMU here.
func (v *eviction) undecided(reason string) {
	v.change(func() { v.outcome, v.reason = string(evict.Lost), reason })
	v.host.tasks.Go(func() {
		// What an operator decides ends the QEMU, too, or has the VM run on.
		if v.process().Wait(v.host.life) == nil && v.mark() == evict.MarkLost && !v.ended() {
			v.finish(evict.MarkLost, evict.Lost,
				errors.New(reason+". The QEMU that held it here has ended since"), nil)
		}
	})
}

// export writes a VM that stands frozen here to a file.
func (v *eviction) export(ctx context.Context, file string) error {
	v.operator.Lock()
	defer v.operator.Unlock()
	if !v.decidable() || v.entry.Record().Role != journal.Source {
		return &stateError{errors.New(v.undecidable())}
	}
	if err := evict.Whole(record{v.entry}); err != nil {
		return &stateError{err}
	}
	s, err := v.source()
	if err != nil {
		return err
	}
	s.Show, s.Map = nil, nil
	// An operator who leaves must not leave the eviction without an engine.
	if err := v.stop(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	err = s.Export(ctx, file)
	if v.mark() == evict.MarkMayRun {
		v.send(true)
	}
	return err
}
