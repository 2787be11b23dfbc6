package evict

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/libvirt"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

// libvirtTwin is a twin that libvirt starts when a domain is offered. While it takes the VM,
// libvirt's job blocks its monitor. So the engine finds its memory in its process, and libvirt's
// events say that it runs. The stream is the only way to it, and cannot be replaced.
type libvirtTwin struct {
	Libvirt
	log    *slog.Logger
	runs   func() // called when its QEMU says that the guest runs
	ending ending
	began  chan struct{}   // closed when its QEMU has said that the guest runs
	heard  chan struct{}   // closed when no more events come
	life   context.Context // ends when close is called
	stop   context.CancelFunc

	conn   *libvirt.Conn
	finish *libvirt.Conn // for Finish3 alone, which takes as long as the eviction
	offer  *domainOffer  // nil before accept
	domain libvirt.Domain
	flags  libvirt.Flags
	found  twinQEMU
	stream net.Conn
	socket string // path

	mu       sync.Mutex
	finished chan error // gets the result of Finish3; nil before run; guarded by mu
}

func newLibvirtTwin(d Destination, runs func()) *libvirtTwin {
	o := &libvirtTwin{Libvirt: *d.Libvirt, log: d.Log, runs: runs, began: make(chan struct{}),
		heard: make(chan struct{})}
	o.life, o.stop = context.WithCancel(context.Background())
	return o
}

func (o *libvirtTwin) look(ctx context.Context) error { return o.open(ctx) }

func (o *libvirtTwin) open(ctx context.Context) (err error) {
	if o.conn, err = libvirt.Dial(ctx, o.URI); err == nil {
		o.finish, err = libvirt.Dial(ctx, o.URI)
	}
	return err
}

func (o *libvirtTwin) ready(context.Context) error { return nil }

func (o *libvirtTwin) twin() twinQEMU { return o.found }

func (o *libvirtTwin) accept(ctx context.Context, offered offer) (err error) {
	d := offered.Domain
	switch {
	case d == nil:
		return errors.New("the VM is no domain of libvirt at the source, and this host takes " +
			"only domains of libvirt")
	case offered.Stands != "":
		return errors.New("the domain does not run, and libvirt's domains are taken only while " +
			"they do")
	case len(d.Totals) != len(offered.Blocks):
		return fmt.Errorf("%w: %d blocks of memory, and how much %d may grow to", errFrame,
			len(offered.Blocks), len(d.Totals))
	}
	checked, err := o.Policy.Check(d.XML)
	if err != nil {
		return err
	}
	if checked.Name != d.Name {
		return fmt.Errorf("%w: the domain %.40q is described as %.40q", errFrame, d.Name,
			checked.Name)
	}
	kept := *d
	if d.Persistent {
		inactive, err := o.Policy.Check(d.Inactive)
		if err == nil && (inactive.Name != d.Name || inactive.UUID != checked.UUID) {
			err = fmt.Errorf("%w: the domain %.40q is defined as another", errFrame, d.Name)
		}
		if err != nil {
			return err
		}
		kept.Inactive = inactive.XML
	}
	if _, err := o.conn.Find(ctx, d.Name); err == nil {
		return fmt.Errorf("libvirt here has a domain %s already: if it is not needed, "+
			"`virsh undefine %[1]s`", d.Name)
	} else if !errors.Is(err, libvirt.ErrNoDomain) {
		return err
	}
	cookie, err := libvirt.PlainCookie(d.Cookie)
	if err != nil {
		return err
	}
	o.flags = d.flags(true)
	uri, ours := o.conn.ListenPath(offered.Eviction.String())
	if _, err := o.conn.Prepare(ctx, d.Name, checked.XML, uri, cookie, o.flags); err != nil {
		return err
	}
	o.offer, o.socket = &kept, ours
	if err := o.meet(ctx, offered); err != nil {
		o.decline(ctx)
		return err
	}
	return nil
}

// meet finds the QEMU that libvirt has started, and its memory.
func (o *libvirtTwin) meet(ctx context.Context, offered offer) (err error) {
	if o.domain, err = o.conn.Find(ctx, o.offer.Name); err != nil {
		return err
	}
	if o.found.process, err = o.conn.Process(o.domain); err != nil {
		return err
	}
	events, err := o.conn.Subscribe(ctx, &o.domain, 256)
	if err != nil {
		return err
	}
	go o.listen(events)
	extents := make([]guestmem.Extent, len(offered.Blocks))
	for i, b := range offered.Blocks {
		extents[i] = guestmem.Extent{Name: b.Name, Size: b.Size, Total: o.offer.Totals[i],
			PageSize: b.PageSize}
	}
	blocks, err := guestmem.Find(ctx, o.found.process.PID, extents)
	if err != nil {
		return err
	}
	if o.found.mem, err = guestmem.Reopen(o.found.process.PID, blocks); err != nil {
		return err
	}
	o.found.here = offered
	return nil
}

// listen handles QEMU's events.
func (o *libvirtTwin) listen(events *libvirt.Subscription) {
	defer close(o.heard)
	defer events.Close()
	for {
		select {
		case ev := <-events.C:
			if ev.QEMU == "" {
				continue
			}
			o.ending.hear(qmp.Event{Name: ev.QEMU, Data: ev.Data})
			if ev.QEMU == "RESUME" {
				select {
				case <-o.began:
				default:
					close(o.began)
				}
				o.runs()
			}
		case <-o.life.Done():
			return
		case <-o.conn.Done():
			return
		}
	}
}

func (o *libvirtTwin) decline(context.Context) {
	if o.offer == nil {
		return
	}
	if o.stream != nil {
		o.stream.Close()
	}
	// This does not end with the caller: libvirt must not keep what was started.
	ctx, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	if _, err := o.finish.Finish(ctx, o.offer.Name, nil, o.flags, true); err != nil &&
		!errors.Is(err, libvirt.ErrNoDomain) {
		o.log.Warn("libvirt does not forget the domain that did not come", "domain", o.offer.Name,
			"error", err)
	}
	o.offer = nil
}

func (o *libvirtTwin) connect(ctx context.Context) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", o.socket)
	if err != nil {
		return nil, err
	}
	os.Remove(o.socket) // nobody else may connect
	conn := c.(*net.UnixConn)
	if err := o.isTwin(conn); err != nil {
		conn.Close()
		return nil, err
	}
	o.stream = conn
	return conn, conn.SetWriteBuffer(qemuBuffer)
}

// isTwin makes sure that the process which listens is the one that libvirt names.
func (o *libvirtTwin) isTwin(conn *net.UnixConn) error {
	cred, err := process.PeerOf(conn)
	if err != nil {
		return err
	}
	if int(cred.Pid) != o.found.process.PID {
		return fmt.Errorf("process %d listens at %s, and the domain's is %d", cred.Pid, o.socket,
			o.found.process.PID)
	}
	return nil
}

func (o *libvirtTwin) begin(context.Context) error { return nil }

// loaded holds once the ping of the device state came back: only waiting follows. libvirt does not
// say more, and need not. A QEMU that is told too early to run does so as soon as it can.
func (o *libvirtTwin) loaded(context.Context) (bool, error) { return true, nil }

// run makes libvirt send `cont`. libvirt answers when the stream has ended, so an event says that
// the guest runs. An error does not prove that it did not.
func (o *libvirtTwin) run(ctx context.Context) error {
	finished := make(chan error, 1)
	o.mu.Lock()
	o.finished = finished
	o.mu.Unlock()
	go func() {
		_, err := o.finish.Finish(o.life, o.offer.Name, nil, o.flags, false)
		finished <- err
	}()
	select {
	case <-o.began:
		return nil
	case err := <-finished:
		finished <- err
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (o *libvirtTwin) announce(context.Context) {}

// over is nil: libvirt ends a QEMU whose guest ended itself.
func (o *libvirtTwin) over() <-chan string { return nil }

func (o *libvirtTwin) lastWords() (guest, host string) {
	select {
	case <-o.heard:
	case <-time.After(lastWords):
	}
	o.ending.mu.Lock()
	defer o.ending.mu.Unlock()
	return o.ending.guest, o.ending.host
}

func (o *libvirtTwin) reason(context.Context) (string, error) { return "", nil }

// renew fails: libvirt's own recovery of a stream does not work in all versions.
func (o *libvirtTwin) renew(context.Context, []byte) (renewed, error) {
	return renewed{}, errors.New("the stream of a domain of libvirt cannot be replaced")
}

// letGo waits until libvirt has taken the domain over, and defines it as it was.
func (o *libvirtTwin) letGo(life context.Context, over bool) {
	o.mu.Lock()
	finished := o.finished
	o.mu.Unlock()
	if !over || finished == nil {
		return
	}
	ctx, cancel := context.WithTimeout(life, quitTime)
	defer cancel()
	var err error
	select {
	case err = <-finished:
		finished <- err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err == nil && o.offer.Persistent {
		_, err = o.conn.Define(ctx, o.offer.Inactive)
		if err == nil && o.offer.Autostart && o.Autostart {
			err = o.conn.SetAutostart(ctx, o.domain, true)
		}
	}
	if err != nil {
		o.log.Warn("the domain runs here with all of its memory, but libvirt did not restore "+
			"its definition: see `virsh dumpxml --inactive`", "domain", o.offer.Name, "error", err)
	}
}

// quit does nothing: libvirt ends the QEMU of a guest that ended itself.
func (o *libvirtTwin) quit(context.Context) error { return nil }

// kill ends the QEMU without libvirt, whose job may hang. Then it makes libvirt forget the domain.
func (o *libvirtTwin) kill(ctx context.Context) error {
	if err := o.found.process.Kill(ctx); err != nil {
		return err
	}
	o.mu.Lock()
	told := o.finished != nil
	o.mu.Unlock()
	if !told {
		o.decline(ctx)
	}
	return nil
}

func (o *libvirtTwin) record(*twin) {}

func (o *libvirtTwin) recall(twin) error {
	return errors.New(
		"no other engine can go on with a domain of libvirt, as its stream ended with the first " +
			"engine: see docs/libvirt.md")
}

func (o *libvirtTwin) close() {
	o.mu.Lock()
	told := o.finished != nil
	o.mu.Unlock()
	if !told {
		o.decline(context.Background())
	}
	o.stop()
	for _, c := range []*libvirt.Conn{o.conn, o.finish} {
		if c != nil {
			c.Close()
		}
	}
}
