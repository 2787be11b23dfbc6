package evict

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"vacate/internal/qemu/libvirt"
)

// carriedTwin is a twin that libvirt has started for a migration of its own. libvirt runs it. There
// are no domainFacts of it: no other engine can go on with it.
type carriedTwin struct {
	libvirtTwin
	dial func(context.Context) (net.Conn, error)
	// the twin waits for a second connection, for pages that it asks for; none come by it
	preempt bool
	second  net.Conn
}

func newCarriedTwin(d Destination) *carriedTwin {
	d.Journal = nil
	d.Libvirt = &Libvirt{URI: d.Carried.URI}
	// libvirt may run the twin before the source's engine has committed: as soon as the source's
	// QEMU says that it is in post-copy.
	return &carriedTwin{libvirtTwin: *newLibvirtTwin(d, func() {}), dial: d.Carried.Dial}
}

func (o *carriedTwin) accept(ctx context.Context, offered offer) (err error) {
	c := offered.Carried
	switch {
	case c == nil:
		return errors.New("the VM is not moved by libvirt, and this is for such a VM only")
	case len(c.Totals) != len(offered.Blocks):
		return fmt.Errorf("%w: %d blocks of memory, and how much %d may grow to", errFrame,
			len(offered.Blocks), len(c.Totals))
	}
	named := domainFacts{Name: c.Name, UUID: c.UUID}
	if o.domain, err = named.find(ctx, o.conn); err != nil {
		return err
	}
	o.preempt = c.Preempt
	return o.find(ctx, offered, c.Totals)
}

func (o *carriedTwin) decline(ctx context.Context) {
	if o.second != nil {
		o.second.Close()
	}
	o.libvirtTwin.decline(ctx)
}

func (o *carriedTwin) connect(ctx context.Context) (net.Conn, error) {
	var err error
	if o.stream, err = o.toTwin(ctx); err == nil && o.preempt {
		o.second, err = o.toTwin(ctx)
	}
	return o.stream, err
}

// toTwin makes a connection to the twin. QEMU takes the first for the stream.
func (o *carriedTwin) toTwin(ctx context.Context) (net.Conn, error) {
	conn, err := o.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to the twin: %w", err)
	}
	if c, ok := conn.(*net.UnixConn); ok {
		if err := o.isTwin(c); err != nil {
			conn.Close()
			return nil, err
		}
	}
	return conn, nil
}

// run waits until libvirt runs the twin. It does not insist: libvirt may have been told to leave
// the domain paused.
func (o *carriedTwin) run(ctx context.Context) error {
	for {
		select {
		case <-o.began:
			return nil
		case <-time.After(firstPause):
			if s, err := o.conn.State(ctx, o.domain); err == nil && s.State == libvirt.Running {
				o.isRunning()
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// kill ends the stream. What follows is decided by libvirt.
func (o *carriedTwin) kill(ctx context.Context) error {
	o.decline(ctx)
	return nil
}

func (o *carriedTwin) ownRemedy() string { return carriedRemedy(o.domain.Name) }

func (o *carriedTwin) close() {
	o.decline(context.Background())
	o.libvirtTwin.close()
}

// CarriedPatience is how long a migration of libvirt's waits for the link. QEMU's own connection
// would break after about as long.
const CarriedPatience = 15 * time.Minute

// daemonPatience is how long it waits for a source that has closed the connection. One that lives
// comes back within a second or two. QEMU's own connection breaks at once when the other QEMU ends.
const daemonPatience = 15 * time.Second

// carriedOver returns why a migration of libvirt's cannot go on: only libvirt can give the twin
// another stream.
func (e *destination) carriedOver() error {
	patience, what := CarriedPatience, "was not connected"
	if e.said.hungUp {
		patience, what = daemonPatience, "has closed the connection, and was not back"
	}
	switch {
	case e.recovery.stream() == nil:
		return errors.New("the twin has closed its stream")
	case e.machine.current() == CutOff && e.machine.lasted() > patience:
		return fmt.Errorf("the source %s for %v", what, patience)
	}
	return nil
}

// GiveUp tells the destination that a migration of libvirt's is not carried any more, as the engine
// here has died. The twin's stream ends then, as QEMU's here did.
func (s Source) GiveUp(ctx context.Context) error {
	e := &source{Source: s}
	a, _, err := e.inquire(ctx, resume{Eviction: s.Eviction, Resumed: true})
	if err == nil {
		a.end()
	}
	return err
}
