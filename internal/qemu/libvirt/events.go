package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// An Event is what happened to a domain. QEMU is set for an event of its QEMU, else Lifecycle is
// what libvirt has to say.
type Event struct {
	UUID UUID
	Name string

	QEMU string // "STOP", "RESUME"…
	Data json.RawMessage
	Time time.Time // of QEMU's clock

	Lifecycle Lifecycle
	Detail    int // virDomainEvent…DetailType
}

// Lifecycle is a virDomainEventType.
type Lifecycle int

// What libvirt tells of a domain.
const (
	Defined Lifecycle = iota
	Undefined
	Started
	Suspended
	Resumed
	Stopped
	Shutdown
	PMSuspended
	Crashed
)

func (l Lifecycle) String() string {
	names := []string{
		"defined",
		"undefined",
		"started",
		"suspended",
		"resumed",
		"stopped",
		"shutdown",
		"pmsuspended",
		"crashed",
	}
	if l < 0 || int(l) >= len(names) {
		return fmt.Sprintf("event %d", int(l))
	}
	return names[l]
}

func (e Event) String() string {
	if e.QEMU != "" {
		return e.QEMU
	}
	return fmt.Sprintf("%v/%d", e.Lifecycle, e.Detail)
}

// A Subscription delivers events on C in libvirt's order, until Close of either it or the
// connection. When C is full, newer events are dropped and counted.
//
// libvirt sends an event by another thread than an answer: an event may come after the answer of
// a call that was made later.
type Subscription struct {
	C       <-chan Event
	c       chan Event
	conn    *Conn
	domain  *UUID
	dropped atomic.Uint64
}

// Dropped returns how many events the reader was too slow for.
func (s *Subscription) Dropped() uint64 { return s.dropped.Load() }

// Close ends the subscription.
func (s *Subscription) Close() {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	delete(s.conn.subs, s)
}

// Subscribe returns the coming events of a domain, or of all where d is nil; up to n wait unread.
func (c *Conn) Subscribe(ctx context.Context, d *Domain, n int) (*Subscription, error) {
	ch := make(chan Event, max(n, 1))
	s := &Subscription{C: ch, c: ch, conn: c}
	if d != nil {
		id := d.UUID
		s.domain = &id
	}
	c.mu.Lock()
	c.subs[s] = true
	c.mu.Unlock()
	if err := c.ask(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// ask has libvirt send events of all domains.
func (c *Conn) ask(ctx context.Context) error {
	c.register.Lock()
	defer c.register.Unlock()
	c.mu.Lock()
	asked := c.asked
	c.mu.Unlock()
	if asked {
		return nil
	}
	err := do(ctx, c, "have libvirt send events", func() error {
		_, err := c.l.ConnectDomainEventCallbackRegisterAny(
			int32(golibvirt.DomainEventIDLifecycle),
			nil,
		)
		if err != nil {
			return err
		}
		_, err = c.l.QEMUConnectDomainMonitorEventRegister(nil, nil, 0)
		return err
	})
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = true
	return nil
}

const (
	remoteProgram  = 0x20008086 // REMOTE_PROGRAM
	qemuProgram    = 0x20008087 // QEMU_PROGRAM
	lifecycleEvent = 318        // REMOTE_PROC_DOMAIN_EVENT_CALLBACK_LIFECYCLE
	monitorEvent   = 6          // QEMU_PROC_DOMAIN_MONITOR_EVENT
)

// event takes an event of the daemon's. One that does not read as it should is dropped.
func (c *Conn) event(program, procedure uint32, payload []byte) {
	var ev Event
	var err error
	switch {
	case program == remoteProgram && procedure == lifecycleEvent:
		ev, err = parseLifecycle(payload)
	case program == qemuProgram && procedure == monitorEvent:
		ev, err = parseMonitorEvent(payload)
	default:
		return
	}
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		if s.domain != nil && *s.domain != ev.UUID {
			continue
		}
		select {
		case s.c <- ev:
		default:
			s.dropped.Add(1)
		}
	}
}

// parseLifecycle reads a remote_domain_event_callback_lifecycle_msg.
func parseLifecycle(b []byte) (Event, error) {
	x := xdr{b: b}
	x.u32() // callback
	ev := Event{Name: x.text(), UUID: x.uuid()}
	x.u32() // the domain's ID
	ev.Lifecycle, ev.Detail = Lifecycle(int32(x.u32())), int(int32(x.u32()))
	return ev, x.end()
}

// parseMonitorEvent reads a qemu_domain_monitor_event_msg.
func parseMonitorEvent(b []byte) (Event, error) {
	x := xdr{b: b}
	x.u32() // callback
	ev := Event{Name: x.text(), UUID: x.uuid()}
	x.u32() // the domain's ID
	ev.QEMU = x.text()
	seconds := int64(uint64(x.u32())<<32 | uint64(x.u32()))
	micros := x.u32()
	if x.u32() != 0 { // there are details
		ev.Data = json.RawMessage(x.text())
		if !json.Valid(ev.Data) {
			x.failed = true
		}
	}
	if ev.QEMU == "" || micros >= 1e6 {
		x.failed = true
	}
	ev.Time = time.Unix(seconds, int64(micros)*1000)
	return ev, x.end()
}

// xdr takes fields off a payload. After the first one that is not there, all read as zero.
type xdr struct {
	b      []byte
	failed bool
}

func (x *xdr) take(n int) []byte {
	if x.failed || n < 0 || len(x.b) < n {
		x.failed = true
		return nil
	}
	taken := x.b[:n]
	x.b = x.b[n:]
	return taken
}

func (x *xdr) u32() uint32 {
	if b := x.take(4); b != nil {
		return be.Uint32(b)
	}
	return 0
}

func (x *xdr) text() string {
	n := x.u32()
	if n > maxPacket {
		x.failed = true
		return ""
	}
	s := string(x.take(int(n)))
	x.take(int(-n & 3))
	return s
}

func (x *xdr) uuid() (u UUID) {
	copy(u[:], x.take(len(u)))
	return u
}

func (x *xdr) end() error {
	if x.failed || len(x.b) > 0 {
		return errors.New("an event of libvirt's that does not read as it should")
	}
	return nil
}
