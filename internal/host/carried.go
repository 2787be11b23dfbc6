package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/host/hypervisor"
	"vacate/internal/qemu/libvirt"
	"vacate/internal/sys/process"
)

// errCarried is why a daemon does not go on with a migration that it carried.
var errCarried = errors.New(
	"the daemon ended while it carried libvirt's own migration. Where the " +
		"domain runs is libvirt's to say: `virsh domstate --reason`. Where that says \"post-copy " +
		"failed\", the same `virsh migrate` with --postcopy-resume goes on with it")

var errNoMigrations = errors.New(
	"libvirt moves the domain, and [libvirt] in vacated.toml there has " +
		"no migrations: add it")

// carrying is the migration from here of a domain that an engine carries, or nil.
func (h *Host) carrying(domain string) *eviction {
	v := h.openFor(domain)
	if v == nil {
		return nil
	}
	if r := v.entry.Record(); !r.Carried || r.Role != journal.Source {
		return nil
	}
	return v
}

// settle waits until no engine carries the migration of a domain. It has failed, which the engine
// is about to notice.
func (h *Host) settle(domain string) {
	v := h.carrying(domain)
	if v == nil {
		return
	}
	_, idle := v.engine()
	select {
	case <-idle:
	case <-h.life.Done():
	}
}

// carryAway starts an engine that carries a migration from here.
func (h *Host) carryAway(d libvirt.Domain, qemu process.Process, peer string,
	stream net.Conn) error {
	if err := hypervisor.CheckName(d.Name); err != nil {
		return err
	}
	release, err := h.takeSoon(h.life, d.Name)
	if err != nil {
		return err
	}
	defer release()
	h.leaveHuge(d.Name)
	entry, err := h.journal.Create(journal.Record{ID: journal.NewID(), Role: journal.Source,
		VM: d.Name, Peer: peer, PeerAddr: h.config.Peers[peer].Address,
		Libvirt: h.config.Libvirt.uri(), Carried: true, PID: qemu.PID, StartTime: qemu.StartTime,
		Mark: string(evict.MarkBegun)})
	if err != nil {
		return err
	}
	v := h.newEviction(entry)
	h.add(v)
	h.log.Info("carrying libvirt's migration", "eviction", entry.ID(), "vm", d.Name, "to", peer)
	v.start(false, func(ctx context.Context, resumed bool) (any, error) {
		if resumed {
			return nil, errCarried
		}
		s, err := v.source()
		if err != nil {
			stream.Close()
			return nil, &evict.Error{Outcome: evict.ErrRefused, State: evict.Preparing, Err: err}
		}
		// The journal is not the engine's: no other engine can go on.
		s.Libvirt, s.Journal, s.LoadTimeout = nil, nil, maxLoadTimeout
		s.Carried = &evict.Carried{URI: v.entry.Record().Libvirt, Domain: d.Name, Stream: stream}
		return s.Evict(ctx)
	}, v.carriedAway)
	return nil
}

// carriedAway notes the end of a migration from here.
func (v *eviction) carriedAway(report json.RawMessage, err error) {
	if err == nil || errors.Is(err, evict.ErrRefused) || errors.Is(err, evict.ErrAborted) {
		v.sent(report, err)
		return
	}
	v.finish(evict.MarkLost, evict.Lost, err, report)
	// The peer may not have heard: the link may be away.
	v.host.tasks.Go(func() { v.giveUpThere(time.Now()) })
}

// offeredCarried takes a domain that libvirt moves here.
func (h *Host) offeredCarried(r *evict.Request, peer string) error {
	c := h.config.Libvirt
	if !c.carries() {
		return errNoMigrations
	}
	release, err := h.reserve(r, peer)
	if err != nil {
		return err
	}
	defer release()
	entry, err := h.journal.Create(journal.Record{ID: r.Eviction, Role: journal.Destination,
		VM: r.VM, Peer: peer, PeerAddr: r.Session.Peer(), Libvirt: c.uri(), Carried: true,
		Mark: string(evict.MarkAccepted)})
	if err != nil {
		return err
	}
	v := h.newEviction(entry)
	h.add(v)
	h.log.Info("taking libvirt's migration", "eviction", entry.ID(), "vm", r.VM, "peer", peer)
	v.requests <- r
	v.start(false, func(ctx context.Context, resumed bool) (any, error) {
		if resumed {
			return nil, errCarried
		}
		d := v.destination()
		d.Libvirt, d.Journal, d.Started = nil, nil, nil
		d.Carried = &evict.Carried{URI: c.uri(), Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", c.carrySocket(h.name()))
		}}
		return d.Receive(ctx, v.requests)
	}, v.carriedHere)
	return nil
}

// carriedHere notes the end of a migration to here.
func (v *eviction) carriedHere(report json.RawMessage, err error) {
	switch {
	case err == nil:
		v.taken(report, nil)
	case errors.Is(err, evict.ErrRefused):
		v.finish(evict.MarkNeverRan, evict.Aborted, err, nil)
	case errors.Is(err, evict.ErrAborted): // libvirt may have run the domain all the same
		v.expectResume()
		v.finish(evict.MarkNeverRan, evict.Aborted, err, nil)
	default:
		v.expectResume()
		v.finish(evict.MarkLost, evict.Lost, err, nil)
	}
}

// dropCarried ends a migration that another daemon carried. Its end has closed the stream here.
func (v *eviction) dropCarried() {
	r := v.entry.Record()
	if r.Role == journal.Destination {
		v.expectResume()
	}
	v.finish(evict.MarkLost, evict.Lost, errCarried, nil)
	if r.Role == journal.Source {
		v.host.tasks.Go(func() { v.giveUpThere(r.At) })
	}
}

// giveUpThere makes the peer end a migration from here that was carried until then, unless it has
// lost patience by itself.
func (v *eviction) giveUpThere(then time.Time) {
	for {
		s, err := v.source()
		if err == nil {
			err = s.GiveUp(v.host.life)
		}
		if err == nil || time.Since(then) > evict.CarriedPatience {
			return
		}
		select {
		case <-time.After(retryPause):
		case <-v.host.life.Done():
			return
		}
	}
}

// giveUp ends a migration to here whose source does not carry it any more.
func (v *eviction) giveUp(r *evict.Request) {
	if err := v.stop(v.host.life); err != nil {
		r.Refuse(err)
		return
	}
	if !v.ended() {
		v.expectResume()
		v.finish(evict.MarkLost, evict.Lost, fmt.Errorf("host %s: %w", v.entry.Record().Peer,
			errCarried), nil)
	}
	r.Answer(evict.AnswerLost, v.describe(), false, nil)
}
