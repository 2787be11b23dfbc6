package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"vacate/internal/qemu/qmp"
	"vacate/lab"
)

// monitor is a connection to a VM's second monitor that remembers what
// happened when. Of a domain of libvirt's it is what virsh tells of its events: libvirt has the
// monitor.
type monitor struct {
	*qmp.Client // nil for a domain
	name        string
	done        <-chan struct{} // closed when no more is heard
	why         func() error    // then
	stop        func()
	all         sync.WaitGroup
	mu          sync.Mutex
	events      []event       // guarded by mu
	changed     chan struct{} // closed and replaced with every event; guarded by mu
}

type event struct {
	name   string
	status string // of MIGRATION
	at     time.Time
}

func watch(ctx context.Context, vm *lab.VM, log *slog.Logger) (*monitor, error) {
	c, err := qmp.Dial(ctx, vm.LabQMP)
	if err != nil {
		return nil, err
	}
	m := &monitor{Client: c, name: vm.Name, changed: make(chan struct{}), done: c.Done(),
		why: c.Err, stop: func() { c.Close() }}
	events := c.Subscribe(1024)
	m.all.Go(func() {
		for e := range events.C {
			log.Debug("event", "vm", m.name, "event", e.Name, "data", string(e.Data), "at", e.Time)
			m.take(e, time.Now())
		}
	})
	return m, nil
}

func (m *monitor) close() {
	m.stop()
	m.all.Wait()
}

// take notes an event with the time that QEMU gives it, on the wall clock; now has that clock's
// offset. The event arrives here late, by as long as this process waits for a core.
func (m *monitor) take(e qmp.Event, now time.Time) {
	var data struct{ Status string }
	if e.Data != nil && json.Unmarshal(e.Data, &data) != nil {
		data.Status = "" // another event's
	}
	at := now
	if late := now.Round(0).Sub(e.Time); !e.Time.IsZero() && late > 0 && late < 10*time.Second {
		at = now.Add(-late)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.events = append(m.events, event{e.Name, data.Status, at})
	close(m.changed)
	m.changed = make(chan struct{})
}

// wait returns the first event, at or after the time since, that match takes;
// match may refuse to wait on.
func (m *monitor) wait(ctx context.Context, since time.Time, what string,
	match func(event) (bool, error)) (event, error) {
	for next := 0; ; {
		m.mu.Lock()
		events, changed := m.events[next:], m.changed
		m.mu.Unlock()
		for _, e := range events {
			if e.at.Before(since) {
				continue
			}
			if ok, err := match(e); ok || err != nil {
				return e, err
			}
		}
		next += len(events)
		select {
		case <-changed:
		case <-m.done:
			return event{}, fmt.Errorf("wait for %s on VM %s: %w", what, m.name, m.why())
		case <-ctx.Done():
			return event{}, fmt.Errorf("wait for %s on VM %s: %w", what, m.name, context.Cause(ctx))
		}
	}
}

// named matches an event by its name.
func named(name string) func(event) (bool, error) {
	return func(e event) (bool, error) { return e.name == name, nil }
}

// last returns when the last event of a name happened, or zero.
func (m *monitor) last(name string, since, until time.Time) (at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range m.events {
		if e.name == name && !e.at.Before(since) && !e.at.After(until) {
			at = e.at
		}
	}
	return at
}
