package evict

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/libvirt"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// libvirtTwin is a twin that libvirt starts when a domain is offered. While it takes the VM,
// libvirt's job blocks its monitor. So the engine finds its memory in its process, and libvirt's
// events say that it runs. The stream is the only way to it, and cannot be replaced. libvirt
// destroys the twin if the connection ends on which it was prepared. So a holder keeps both open,
// and another engine takes the stream from it.
//
// What of the stream can an engine take to its grave? It reads all that QEMU has written at a time,
// and QEMU writes whole messages: none is torn. Those that it has read are requests for pages. Each
// missing page is pushed in any case, and pages that were left out are placed by the next engine.
// After the commit the engine writes nothing but the stream's end, in one write that the kernel
// takes as a whole: pages are placed directly, or the eviction does not come that far.
type libvirtTwin struct {
	Libvirt
	journal Journal
	log     *slog.Logger
	runs    func() // called when its QEMU says that the guest runs
	ending  ending
	began   chan struct{}   // closed when its QEMU has said that the guest runs
	life    context.Context // ends when close is called
	stop    context.CancelFunc

	conn   *libvirt.Conn
	finish *libvirt.Conn // for Finish3 alone, which takes as long as the eviction
	// the twin was prepared on it, and nothing else happens on it; nil for what another engine did
	anchor *libvirt.Conn
	facts  *domainFacts // nil before a domain is accepted
	coming bool         // this engine has prepared it, and did not tell it to run
	domain libvirt.Domain
	found  twinQEMU
	socket *os.File // that becomes the stream
	path   string   // where the twin listens
	stream net.Conn

	mu       sync.Mutex
	finished chan error // gets the result of Finish3; nil before run; guarded by mu
}

func newLibvirtTwin(d Destination, runs func()) *libvirtTwin {
	o := &libvirtTwin{Libvirt: *d.Libvirt, journal: d.Journal, log: d.Log, runs: runs,
		began: make(chan struct{})}
	o.life, o.stop = context.WithCancel(context.Background())
	var err error
	if o.facts, err = recallDomain(o.journal); err != nil {
		o.log.Error("which domain of libvirt came is not known", "error", err)
	}
	return o
}

func (o *libvirtTwin) look(ctx context.Context) error { return o.open(ctx) }

func (o *libvirtTwin) open(ctx context.Context) (err error) {
	o.hangUp()
	if o.conn, err = redial(ctx, o.URI); err == nil {
		o.finish, err = redial(ctx, o.URI)
	}
	if err == nil && o.facts != nil {
		o.domain, err = o.facts.find(ctx, o.conn)
	}
	return err
}

// hangUp ends the connections on which nothing began.
func (o *libvirtTwin) hangUp() {
	for _, c := range []*libvirt.Conn{o.conn, o.finish} {
		if c != nil {
			c.Close()
		}
	}
	o.conn, o.finish = nil, nil
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
	f := &domainFacts{Name: d.Name, UUID: checked.UUID, Flags: domainFlags(d.Persistent, true),
		Persistent: d.Persistent, Autostart: d.Autostart}
	if d.Persistent {
		inactive, err := o.Policy.Check(d.Inactive)
		if err == nil && (inactive.Name != d.Name || inactive.UUID != checked.UUID) {
			err = fmt.Errorf("%w: the domain %.40q is defined as another", errFrame, d.Name)
		}
		if err != nil {
			return err
		}
		f.Inactive = inactive.XML
	}
	if err := o.conn.MayCome(ctx, checked); err != nil {
		return err
	}
	cookie, err := libvirt.PlainCookie(d.Cookie)
	if err != nil {
		return err
	}
	if err := o.prepare(ctx, f, checked.XML, cookie, offered); err != nil {
		o.decline(ctx)
		return err
	}
	return nil
}

// prepare has libvirt start the QEMU, and finds it. A holder gets what must outlive this engine
// before there is anything to lose.
func (o *libvirtTwin) prepare(ctx context.Context, f *domainFacts, xml string, cookie []byte,
	offered offer) (err error) {
	if o.anchor, err = libvirt.Dial(ctx, o.URI); err != nil {
		return err
	}
	connection, err := o.anchor.File()
	if err != nil {
		return err
	}
	defer connection.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	o.socket = os.NewFile(uintptr(fd), "the stream to the twin")
	if err := o.keepOpen(f, connection, o.socket); err != nil {
		return fmt.Errorf("keep the stream to the twin open: %w", err)
	}
	o.facts, o.coming = f, true
	if err := f.keep(o.journal); err != nil {
		return err
	}
	uri, ours := o.conn.ListenPath(offered.Eviction.String())
	_, err = o.anchor.Prepare(ctx, f.Name, xml, uri, cookie, f.Flags)
	if err != nil && strings.Contains(err.Error(), "ostcopy") { // it is QEMU that says so
		return explainPostcopy(err)
	} else if err != nil {
		return err
	}
	o.path = ours
	return o.meet(ctx, offered)
}

// meet finds the QEMU that libvirt has started, and its memory.
func (o *libvirtTwin) meet(ctx context.Context, offered offer) (err error) {
	if o.domain, err = o.conn.Find(ctx, o.facts.Name); err != nil {
		return err
	}
	return o.find(ctx, offered, offered.Domain.Totals)
}

// find finds the QEMU of the domain, and its memory. totals is how much each block may grow to.
func (o *libvirtTwin) find(ctx context.Context, offered offer, totals []uint64) (err error) {
	if o.found.process, err = o.conn.Process(o.domain); err != nil {
		return err
	}
	if err := o.follow(ctx); err != nil {
		return err
	}
	extents := make([]guestmem.Extent, len(offered.Blocks))
	for i, b := range offered.Blocks {
		extents[i] = guestmem.Extent{Name: b.Name, Size: b.Size, Total: totals[i],
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

// follow begins to handle QEMU's events.
func (o *libvirtTwin) follow(ctx context.Context) error {
	events, err := o.conn.Subscribe(ctx, &o.domain, 256)
	if err != nil {
		return err
	}
	heard := make(chan struct{})
	o.ending.mu.Lock()
	o.ending.listeners = append(o.ending.listeners, heard)
	o.ending.mu.Unlock()
	go o.listen(o.conn, events, heard)
	return nil
}

// isRunning notes that the guest runs.
func (o *libvirtTwin) isRunning() {
	o.mu.Lock()
	defer o.mu.Unlock()
	select {
	case <-o.began:
	default:
		close(o.began)
	}
}

// listen handles QEMU's events.
func (o *libvirtTwin) listen(conn *libvirt.Conn, events *libvirt.Subscription,
	heard chan struct{}) {
	defer close(heard)
	defer events.Close()
	for {
		select {
		case ev := <-events.C:
			if ev.QEMU == "" {
				continue
			}
			o.ending.hear(qmp.Event{Name: ev.QEMU, Data: ev.Data})
			if ev.QEMU == "RESUME" {
				o.isRunning()
				o.runs()
			}
		case <-o.life.Done():
			return
		case <-conn.Done():
			return
		}
	}
}

func (o *libvirtTwin) decline(context.Context) {
	if o.stream != nil {
		o.stream.Close()
	}
	if o.socket != nil {
		o.socket.Close()
	}
	if !o.coming {
		return
	}
	o.coming = false
	// This does not end with the caller: libvirt must not keep what was started.
	ctx, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	if o.finish != nil {
		_, err := o.finish.Finish(ctx, o.facts.Name, nil, o.facts.Flags, true)
		if err != nil && !isRefused(err) { // it refuses where the QEMU has ended
			o.log.Warn("libvirt does not forget the domain that did not come", "domain",
				o.facts.Name, "error", err)
		}
	}
	o.letHolderGo(ctx)
	o.facts = nil
}

// letHolderGo ends the connection on which the twin was prepared. libvirt destroys a twin that has
// not become whole.
func (o *libvirtTwin) letHolderGo(ctx context.Context) {
	if o.anchor != nil {
		o.anchor.Close()
	}
	if err := o.facts.release(ctx); err != nil {
		o.log.Warn("the process that kept the stream to the twin open does not end", "pid",
			o.facts.Holder.PID, "error", err)
	}
}

func (o *libvirtTwin) connect(context.Context) (net.Conn, error) {
	if err := unix.Connect(int(o.socket.Fd()), &unix.SockaddrUnix{Name: o.path}); err != nil {
		return nil, fmt.Errorf("connect to the twin: %w", os.NewSyscallError("connect", err))
	}
	os.Remove(o.path) // nobody else may connect
	c, err := net.FileConn(o.socket)
	if err != nil {
		return nil, err
	}
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
		return fmt.Errorf("process %d listens at %s, and the domain's is %d", cred.Pid, o.path,
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
	o.coming = false
	if o.socket == nil && o.toldBefore(ctx) {
		return nil
	}
	finished, finish := make(chan error, 1), o.finish
	select {
	case <-finish.Done(): // libvirt destroys the twin when it starts anew
		if o.socket != nil { // else another engine may have told it
			return notRun{errors.New("libvirt ended before it was told to run the domain")}
		}
	default:
	}
	o.mu.Lock()
	o.finished = finished
	o.mu.Unlock()
	go func() {
		_, err := finish.Finish(o.life, o.facts.Name, nil, o.facts.Flags, false)
		finished <- err
	}()
	for {
		select {
		case <-o.began:
			return nil
		case err := <-finished:
			finished <- err
			if !errors.Is(err, libvirt.ErrClosed) {
				return err
			}
			// libvirt was started anew, and goes on by what it wrote down. The twin's process shows
			// what comes of it.
			o.log.Warn("libvirt's answer is lost", "error", err)
			return nil
		case <-time.After(firstPause):
			// The event may have come before anybody listened.
			if s, err := o.conn.State(ctx, o.domain); err == nil && s.State == libvirt.Running {
				o.isRunning()
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// toldTime is how long libvirt may take to run a domain after it was told to.
const toldTime = 2 * time.Second

// toldBefore waits until the guest runs because an engine that died told libvirt so. It reports
// whether it does. libvirt 9.0 may crash at the end of a migration that it was told twice to
// finish.
func (o *libvirtTwin) toldBefore(ctx context.Context) bool {
	for late := time.After(toldTime); ; {
		if s, err := o.conn.State(ctx, o.domain); err == nil && s.State == libvirt.Running {
			o.isRunning()
		}
		select {
		case <-o.began:
			return true
		case <-late:
			return false
		case <-ctx.Done():
			return false
		case <-time.After(firstPause):
		}
	}
}

func (o *libvirtTwin) announce(context.Context) {}

// over is nil: libvirt ends a QEMU whose guest ended itself.
func (o *libvirtTwin) over() <-chan string { return nil }

func (o *libvirtTwin) lastWords() (guest, host string) {
	o.ending.wait()
	o.ending.mu.Lock()
	guest, host = o.ending.guest, o.ending.host
	o.ending.mu.Unlock()
	if guest != "" || o.facts == nil {
		return guest, host
	}
	// libvirt remembers what no engine has heard.
	ctx, cancel := context.WithTimeout(context.Background(), quitTime)
	defer cancel()
	conn, err := libvirt.Dial(ctx, o.URI)
	if err != nil {
		return guest, host
	}
	defer conn.Close()
	d, err := o.facts.find(ctx, conn)
	if err != nil {
		return guest, host
	}
	s, err := conn.State(ctx, d)
	if err == nil && s == (libvirt.State{State: libvirt.ShutOff, Reason: libvirt.ShutOffShutdown}) {
		guest = "libvirt says " + s.String()
	} else if err == nil && host == "" {
		host = s.String()
	}
	return guest, host
}

func (o *libvirtTwin) reason(context.Context) (string, error) { return "", nil }

// errNotKept is why an engine cannot go on with a domain that another one took.
var errNotKept = errors.New(
	"no other engine can go on with this domain of libvirt, as no process " +
		"kept its stream open: see docs/libvirt.md")

// renew takes the stream from the holder: libvirt's own recovery does not work in all versions.
func (o *libvirtTwin) renew(ctx context.Context, _ []byte) (r renewed, err error) {
	if o.facts == nil || o.facts.Holder.PID <= 0 {
		return r, errNotKept
	}
	if err := o.open(ctx); err != nil {
		return r, err
	}
	if err := o.follow(ctx); err != nil {
		return r, err
	}
	s, err := o.conn.State(ctx, o.domain)
	if err != nil {
		return r, err
	}
	file, err := o.facts.taken(heldStream)
	if err != nil {
		return r, err
	}
	defer file.Close()
	pending := s == libvirt.State{State: libvirt.Paused, Reason: libvirt.PausedMigration}
	n, _, err := unix.Recvfrom(int(file.Fd()), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if n == 0 && err == nil { // QEMU has closed it
		if pending || s.Reason == libvirt.RunningPostcopy && s.State == libvirt.Running ||
			s.State == libvirt.Paused && slices.Contains(
				[]int{libvirt.PausedPostcopy, libvirt.PausedPostcopyFailed}, s.Reason) {
			return r, fmt.Errorf("the twin closed its stream; libvirt says %q", s)
		}
		return r, errCompleted
	}
	if s.State == libvirt.Running {
		o.isRunning()
	}
	conn, err := net.FileConn(file)
	o.stream = conn
	return renewed{conn: conn, pending: pending, same: true}, err
}

// letGo waits until libvirt has taken the domain over, and defines it as it was.
func (o *libvirtTwin) letGo(life context.Context, over bool) {
	if !over || o.facts == nil {
		return
	}
	ctx, cancel := context.WithTimeout(life, forgetTime)
	defer cancel()
	err := o.becameWhole(ctx)
	if err == nil {
		o.letHolderGo(ctx)
	}
	if err == nil && o.facts.Persistent {
		_, err = o.conn.Define(ctx, o.facts.Inactive)
		if err == nil && o.facts.Autostart && o.Autostart {
			err = o.conn.SetAutostart(ctx, o.domain, true)
		}
	}
	if err != nil {
		o.log.Warn("the domain runs here with all of its memory, but libvirt did not restore "+
			"its definition: see `virsh dumpxml --inactive`", "domain", o.facts.Name, "error", err)
	}
}

// becameWhole returns when libvirt has ended the migration.
func (o *libvirtTwin) becameWhole(ctx context.Context) error {
	o.mu.Lock()
	finished := o.finished
	o.mu.Unlock()
	if finished != nil {
		select {
		case err := <-finished:
			finished <- err
			if err == nil || !errors.Is(err, libvirt.ErrClosed) {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for { // by what another engine told it
		s, err := o.state(ctx)
		if err != nil {
			return err
		}
		if s != (libvirt.State{State: libvirt.Running, Reason: libvirt.RunningPostcopy}) {
			return nil
		}
		select {
		case <-time.After(firstPause):
		case <-ctx.Done():
			return fmt.Errorf("libvirt says %q: %w", s, context.Cause(ctx))
		}
	}
}

// state asks libvirt, even one that was started anew.
func (o *libvirtTwin) state(ctx context.Context) (s libvirt.State, err error) {
	if o.conn != nil {
		if s, err = o.conn.State(ctx, o.domain); !errors.Is(err, libvirt.ErrClosed) {
			return s, err
		}
	}
	if err = o.open(ctx); err == nil {
		s, err = o.conn.State(ctx, o.domain)
	}
	return s, err
}

// quit does nothing: libvirt ends the QEMU of a guest that ended itself.
func (o *libvirtTwin) quit(context.Context) error { return nil }

// kill ends the QEMU without libvirt, whose job may hang. Then it makes libvirt forget the domain.
func (o *libvirtTwin) kill(ctx context.Context) error {
	if err := o.found.process.Kill(ctx); err != nil {
		return err
	}
	if o.coming {
		o.decline(ctx)
		return nil
	}
	return o.forget()
}

func (o *libvirtTwin) ownRemedy() string { return "" }

// forget makes libvirt forget a domain whose QEMU here has ended for good.
func (o *libvirtTwin) forget() error {
	if o.facts == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), forgetTime)
	defer cancel()
	conn, err := libvirt.Dial(ctx, o.URI)
	if err == nil {
		defer conn.Close()
		// This does nothing to a domain that was told to run: libvirt ends its job by itself.
		_, finishErr := conn.Finish(ctx, o.facts.Name, nil, o.facts.Flags, true)
		o.log.Debug("gave up the domain", "error", finishErr)
	}
	o.letHolderGo(ctx)
	if err == nil {
		err = undefine(ctx, conn, o.facts)
	}
	if err != nil {
		o.log.Warn("libvirt may still have the domain, which must not be started here: `virsh "+
			"undefine --keep-nvram --keep-tpm` forgets it", "domain", o.facts.Name, "error", err)
	}
	return nil
}

// EndTwin ends the QEMU that was to take an eviction's VM, or took it, and that must not run it any
// more. The process is zero if no engine has noted it.
func (d Destination) EndTwin(ctx context.Context, qemu process.Process) error {
	if d.Libvirt == nil {
		return qemu.Kill(ctx)
	}
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	o := newLibvirtTwin(d, nil)
	defer o.close()
	if o.facts == nil {
		return qemu.Kill(ctx)
	}
	if o.found.process = qemu; qemu == (process.Process{}) {
		// libvirt destroys what it prepares as soon as nobody holds the connection.
		return o.forget()
	}
	return o.kill(ctx)
}

func (o *libvirtTwin) record(*twin) {}

func (o *libvirtTwin) recall(t twin) error {
	o.found.process = t.process()
	if o.facts == nil || o.facts.Holder.PID <= 0 {
		return errNotKept
	}
	return nil
}

func (o *libvirtTwin) close() {
	o.decline(context.Background())
	o.stop()
	o.hangUp()
	if o.anchor != nil {
		o.anchor.Close()
	}
}
