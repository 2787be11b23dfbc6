package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/host/hypervisor"
	"vacate/internal/sys/process"
)

// maxIncoming is how many VMs may come at the same time.
const maxIncoming = 16

// request serves what a peer wants with a session.
func (h *Host) request(r *evict.Request) {
	peer := r.Session.PeerName()
	if h.identity == nil {
		var err error
		if peer, err = h.config.peerAt(r.Session.Peer()); err != nil {
			r.Refuse(err)
			h.turnedAway(r.Session.Peer(), err)
			return
		}
	}
	switch r.Purpose {
	case evict.ToOffer:
		if err := h.offered(r, peer); err != nil {
			r.Refuse(fmt.Errorf("host %s: %w", h.name(), err))
			h.metrics.offersRefused.Inc()
			h.log.Warn("offer refused", "vm", r.VM, "peer", peer, "error", err)
		}
	case evict.ToRelay:
		if err := h.relayed(r, peer); err != nil {
			r.Refuse(fmt.Errorf("host %s: %w", h.name(), err))
			h.log.Warn("a stream is not relayed", "vm", r.VM, "peer", peer, "error", err)
		}
	case evict.ToResume:
		h.resumed(r, peer)
	case evict.ToAsk:
		answer, err := h.asked(r, peer)
		if err != nil {
			r.Refuse(err)
			return
		}
		if err := r.Tell(answer); err != nil {
			h.log.Debug("an answer did not reach its peer", "peer", peer, "error", err)
		}
	}
}

// offered takes a VM that a peer offers. The request is the engine's unless there is an error.
func (h *Host) offered(r *evict.Request, peer string) error {
	if err := h.config.mayCome(peer, h.name()); err != nil {
		return err
	}
	if err := hypervisor.CheckName(r.VM); err != nil {
		return err
	}
	if r.Carried() {
		return h.offeredCarried(r, peer)
	}
	vm, err := hypervisor.Find(h.config.VMs, r.VM)
	uri := "" // of the libvirt that takes a domain
	if r.Domain() {
		if err = h.mayTakeDomain(r.VM, peer, err); err == nil {
			uri = h.config.Libvirt.uri()
		}
	}
	if err != nil {
		return err
	}
	release, err := h.reserve(r, peer)
	if err != nil {
		return err
	}
	defer release()
	// Ahead of the record: a daemon that finds it after our death ends all that looks like the
	// twin, and so does a VM that came here once.
	if r.Domain() {
		err = noDomain(h.life, uri, r.VM)
	} else {
		err = hypervisor.Absent(h.life, vm)
	}
	if err != nil {
		return err
	}
	entry, err := h.journal.Create(journal.Record{
		ID: r.Eviction, Role: journal.Destination, VM: r.VM, Peer: peer, PeerAddr: r.Session.Peer(),
		QMP: vm.QMP, Libvirt: uri, Mark: string(evict.MarkAccepted),
	})
	if err != nil {
		return err
	}
	v := h.newEviction(entry)
	h.add(v)
	h.log.Info("offer taken", "eviction", entry.ID(), "vm", r.VM, "peer", peer)
	if !r.Domain() { // else libvirt starts it, when the engine has the domain's description
		if err := v.startTwin(r, vm); err != nil {
			v.finish(evict.MarkNeverRan, evict.Refused, err, nil)
			return err
		}
	}
	v.requests <- r
	v.receive(false)
	return nil
}

// reserve reserves an offered VM until what it returns is called, if it may come to this host now.
func (h *Host) reserve(r *evict.Request, peer string) (release func(), err error) {
	release, err = h.take(r.VM)
	if err != nil {
		return nil, err
	}
	if off := h.admit(h.life, r.VM); off != nil && !r.Forced() {
		release()
		return nil, off
	} else if off != nil {
		h.log.Warn("an operator forces a VM upon this host", "vm", r.VM, "peer", peer, "against",
			off)
	}
	if n := h.incoming(); n >= maxIncoming {
		release()
		return nil, fmt.Errorf("%d VMs are coming in already: try again later", n)
	}
	return release, nil
}

// startTwin starts the QEMU that takes an offered VM, and writes down which it is.
func (v *eviction) startTwin(r *evict.Request, vm hypervisor.VM) error {
	h := v.host
	var twin process.Process
	err := r.While(h.life, fmt.Sprintf("host %s starts a QEMU for VM %s", h.name(), vm.Name),
		func(ctx context.Context) (err error) {
			twin, err = hypervisor.StartTwin(ctx, vm)
			return err
		})
	if err == nil {
		err = v.noteProcess(twin)
	}
	if err != nil {
		if twin.PID != 0 {
			err = errors.Join(err, twin.Kill(context.Background()))
		}
		return err
	}
	h.log.Info("twin started", "eviction", v.entry.ID(), "vm", r.VM, "peer", v.entry.Record().Peer,
		"pid", twin.PID)
	return nil
}

// noteProcess writes down which process the twin is. From the process alone it would have to be
// guessed after our death.
func (v *eviction) noteProcess(twin process.Process) error {
	return v.entry.Note(string(evict.MarkAccepted), "",
		func(r *journal.Record) { r.PID, r.StartTime = twin.PID, twin.StartTime })
}

// incoming counts the VMs that are coming.
func (h *Host) incoming() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, v := range h.evictions {
		if r := v.entry.Record(); r.Role == journal.Destination && !v.ended() {
			n++
		}
	}
	return n
}

// receive has an engine take the VM, or resume that.
func (v *eviction) receive(resume bool) {
	v.start(resume, func(ctx context.Context, resumed bool) (any, error) {
		d := v.destination()
		if resumed {
			return d.Resume(ctx, v.entry.ID(), v.mark(), v.requests)
		}
		return d.Receive(ctx, v.requests)
	}, v.taken)
}

// destination is an engine for an eviction to here.
func (v *eviction) destination() evict.Destination {
	r := v.entry.Record()
	log := v.host.log.With("eviction", r.ID, "vm", r.VM, "role", r.Role)
	host, file := v.host.name(), hypervisor.File(v.host.config.VMs, r.VM)
	d := evict.Destination{Host: host, Description: file, QMP: r.QMP, Room: &v.host.promised,
		Journal: record{v.entry}, Log: log, Show: v.show}
	if d.Libvirt = v.host.libvirtOf(r); d.Libvirt != nil {
		d.Started = v.noteProcess
	}
	if v.host.config.HugePages {
		d.HugePages = v.noteHuge
	}
	return d
}

// taken notes the end of an eviction to here.
func (v *eviction) taken(report json.RawMessage, err error) {
	switch {
	case err == nil && v.mark() == evict.MarkShutDown:
		v.finish(evict.MarkShutDown, evict.ShutDown, errors.New(v.entry.Record().Reason), report)
	case err == nil:
		v.finish(evict.MarkCompleted, evict.Completed, nil, report)
		v.restoreHuge()
	case errors.Is(err, evict.ErrRefused), errors.Is(err, evict.ErrAborted):
		outcome := evict.Aborted
		if errors.Is(err, evict.ErrRefused) {
			outcome = evict.Refused
		}
		err = v.oustedBy(err)
		if killErr := v.process().Kill(context.Background()); killErr != nil {
			v.host.log.Error("a twin that never ran does not end", "eviction", v.entry.ID(), "pid",
				v.process().PID, "error", killErr)
		}
		v.finish(evict.MarkNeverRan, outcome, err, nil)
	default:
		v.finish(evict.MarkLost, evict.Lost, v.oustedBy(err), nil)
	}
	select {
	case r := <-v.requests: // that no engine took
		v.answer(r)
	default:
	}
}

// resumed serves a source that wants to go on with an eviction.
func (h *Host) resumed(r *evict.Request, peer string) {
	v := h.find(r.Eviction)
	if v == nil || v.entry.Record().Role != journal.Destination ||
		v.entry.Err() == nil && v.entry.Record().Peer != peer {
		r.Answer(evict.AnswerUnknown,
			fmt.Sprintf("host %s knows of no such eviction from host %s", h.name(), peer), false,
			nil)
		return
	}
	if r.ResumedThere() && v.entry.Record().Carried {
		v.giveUp(r)
		return
	}
	if r.ResumedThere() {
		v.overrule(r)
		return
	}
	cancel, idle := v.engine()
	if cancel == nil {
		v.answer(r)
		return
	}
	select {
	case v.requests <- r:
	case <-idle:
		v.answer(r)
	case <-time.After(resumeTime):
		r.Refuse(fmt.Errorf("host %s is busy with the eviction", h.name()))
	}
}

// resumeTime is how long an engine may take until it heeds its source.
const resumeTime = 5 * time.Second

// answer tells a source what became of an eviction that nobody works on.
func (v *eviction) answer(r *evict.Request) {
	if r.Purpose != evict.ToResume {
		r.Refuse(errors.New(v.describe()))
		return
	}
	if err := v.entry.Err(); err != nil {
		r.Refuse(fmt.Errorf("the journal of host %s is damaged: %w", v.host.name(), err))
		return
	}
	var received *evict.Received
	rec := v.entry.Record()
	if rec.Report != nil {
		received = new(evict.Received)
		if err := json.Unmarshal(rec.Report, received); err != nil {
			received = nil
		}
	}
	m := evict.Mark(rec.Mark)
	if r.Answer(evict.AnswerOf(m), v.describe(), !v.process().Alive(), received) &&
		m == evict.MarkCompleted {
		if err := v.entry.Keep(evict.KeptHeard, nil); err != nil {
			v.host.log.Warn("cannot record in the journal that the source knows that the VM is "+
				"whole here", "eviction", rec.ID, "error", err)
		}
	}
}

// describe is what is known of the eviction, in a sentence.
func (v *eviction) describe() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.reason != "" {
		return fmt.Sprintf("host %s: %s", v.host.name(), v.reason)
	}
	return fmt.Sprintf("host %s: the eviction is at %q", v.host.name(), v.mark())
}
