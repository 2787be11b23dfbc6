package evict

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/libvirt"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// libvirtSource is a VM that is a domain of libvirt. The engine asks and freezes its QEMU through
// libvirt, like any other. Two things differ. libvirt holds a job, from describe to resume or
// discard, or until the connection ends on which it began. And it passes no descriptors on to QEMU.
type libvirtSource struct {
	qemuSource
	Libvirt
	id      ID
	journal Journal
	log     *slog.Logger
	life    context.Context // ends when close is called
	stop    context.CancelFunc
	conn    *libvirt.Conn
	domain  libvirt.Domain
	// the job began on it, and nothing else happens on it; nil for what another engine began
	anchor *libvirt.Conn
	facts  *domainFacts // nil until the domain is about to be touched
	file   string       // our name for the file that QEMU saves to; empty before arm
}

func newLibvirtSource(s Source) *libvirtSource {
	o := &libvirtSource{Libvirt: *s.Libvirt, id: s.Eviction, journal: s.Journal, log: s.Log,
		qemuSource: qemuSource{vm: s.VM, expect: s.Process}}
	var err error
	if o.facts, err = recallDomain(o.journal); err != nil {
		o.log.Error("the libvirt of this host may go on with what another engine began", "error",
			err)
	}
	o.life, o.stop = context.WithCancel(context.Background())
	o.subscribe, o.drain, o.cont = o.watch, o.hear, o.goOn
	return o
}

func (o *libvirtSource) open(ctx context.Context) (err error) {
	if err := o.reach(ctx); err != nil {
		return err
	}
	qemu, err := o.conn.Process(o.domain)
	if err != nil {
		return err
	}
	if o.expect != (process.Process{}) && qemu != o.expect {
		return fmt.Errorf("%w: process %d had the VM, and process %d is the domain's now",
			errAnother, o.expect.PID, qemu.PID)
	}
	return o.dial(ctx)
}

// reach connects to libvirt, and finds the domain. It asks QEMU nothing.
func (o *libvirtSource) reach(ctx context.Context) error {
	if o.conn != nil {
		o.conn.Close()
	}
	conn, err := redial(ctx, o.URI)
	if err != nil {
		return err
	}
	o.conn = conn
	if o.facts != nil {
		o.domain, err = o.facts.find(ctx, conn)
	} else {
		o.domain, err = conn.Find(ctx, o.Domain)
	}
	if errors.Is(err, libvirt.ErrNoDomain) {
		return fmt.Errorf("%w: %w", err, fs.ErrNotExist)
	}
	return err
}

// dial makes the monitor, which lasts as long as the connection.
func (o *libvirtSource) dial(ctx context.Context) error {
	life, cancel := context.WithCancel(o.life)
	stop := context.AfterFunc(ctx, cancel)
	socket, err := o.conn.Monitor(life, o.domain)
	if err == nil {
		o.q, err = qmp.NewClient(ctx, socket)
	}
	stop()
	if err != nil {
		cancel()
	}
	return err
}

// ended returns at once: when libvirt ends, its domains do not.
func (o *libvirtSource) ended(context.Context) error { return nil }

func (o *libvirtSource) describe(ctx context.Context) (d described, err error) {
	info, err := o.conn.Info(ctx, o.domain)
	if err != nil {
		return d, err
	}
	offer := &domainOffer{Name: o.domain.Name, Persistent: info.Persistent,
		Autostart: info.Autostart}
	if info.Persistent {
		if offer.Inactive, err = o.conn.XML(ctx, o.domain, libvirt.Inactive); err != nil {
			return d, err
		}
	}
	if err := o.begin(ctx, offer); err != nil {
		return d, err
	}
	if d, err = o.qemuSource.describe(ctx); err != nil {
		return d, err
	}
	if !d.status.Running {
		return d, fmt.Errorf("the domain %s does not run, and libvirt's domains are evicted only "+
			"while they do: `virsh resume %[1]s`, or move it with `virsh migrate`", o.domain.Name)
	}
	for _, b := range d.mem.Blocks() {
		offer.Totals = append(offer.Totals, b.Total)
	}
	d.offer.Domain = offer
	return d, offer.check()
}

// begin has libvirt begin a migration. From then on nobody else can change the domain, or run it by
// libvirt. What must be undone is in the journal before it is done.
func (o *libvirtSource) begin(ctx context.Context, offer *domainOffer) (err error) {
	f := &domainFacts{Name: o.domain.Name, UUID: o.domain.UUID, Persistent: offer.Persistent,
		Autostart: offer.Autostart,
		Flags:     domainFlags(offer.Persistent, o.TrustDisks) | libvirt.ChangeProtection}
	if o.anchor, err = libvirt.Dial(ctx, o.URI); err != nil {
		return err
	}
	file, err := o.anchor.File()
	if err != nil {
		return err
	}
	defer file.Close()
	if err := o.keepOpen(f, file); err != nil {
		return fmt.Errorf("keep the connection to libvirt open: %w", err)
	}
	o.facts = f
	if err := f.keep(o.journal); err != nil {
		return err
	}
	if f.Autostart { // libvirt would start a second copy if this host booted
		if err := o.conn.SetAutostart(ctx, o.domain, false); err != nil {
			return err
		}
	}
	offer.Cookie, offer.XML, err = o.anchor.Begin(ctx, o.domain, f.Flags)
	return err
}

func (o *libvirtSource) arm(_ context.Context, mem *guestmem.Memory) error {
	theirs, ours, err := libvirt.Directory(mem.PID())
	if err != nil {
		return err
	}
	name := "vacate-" + o.id.String()
	o.file = filepath.Join(ours, name)
	o.freezer = &freezer{q: o.q, mem: mem, name: filepath.Join(theirs, name), late: true,
		subscribe: o.subscribe, drain: o.drain, open: o.openSaved}
	return nil
}

// openSaved opens what QEMU saved, and removes its name.
func (o *libvirtSource) openSaved() (io.ReaderAt, int64, error) {
	f, err := os.OpenFile(o.file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file", o.file)
	}
	if err != nil {
		return nil, 0, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxControl+1))
	return strings.NewReader(string(b)), int64(len(b)), errors.Join(err, os.Remove(o.file))
}

func (o *libvirtSource) freeze(ctx context.Context, ran bool) (saved, error) {
	s, err := o.freezer.freeze(ctx, ran)
	if err == nil && !s.was.Running {
		err = fmt.Errorf("%w, its state is %q", errStood, s.was.Status)
	}
	return s, err
}

// disarm removes what QEMU saved. The job stays.
func (o *libvirtSource) disarm(context.Context) error {
	if o.file == "" {
		return nil
	}
	if err := os.Remove(o.file); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// watch follows the domain's events, in order, by libvirt's own subscription.
func (o *libvirtSource) watch(ctx context.Context) (events, error) {
	s, err := o.conn.Subscribe(ctx, &o.domain, 256)
	if err != nil {
		return nil, err
	}
	return libvirtEvents{s}, nil
}

// hear waits until libvirt has passed on all that the stopped QEMU said.
func (o *libvirtSource) hear(ctx context.Context, qemu process.Process) error {
	return o.conn.Drain(ctx, o.domain, qemu)
}

func (o *libvirtSource) goOn(ctx context.Context) error { return o.conn.Resume(ctx, o.domain) }

func (o *libvirtSource) resume(ctx context.Context, ran bool, stood string) (qmp.Status, error) {
	// If somebody else ran the guest, its state is up to them: Confirm3 would run it once more.
	theirs := o.freezer != nil && o.freezer.resumed()
	if o.facts != nil && !theirs {
		err := o.conn.Confirm(ctx, o.domain, nil, o.facts.Flags, true)
		if err != nil { // libvirt does not say so if it could not run the domain
			o.log.Debug("libvirt has no migration to take back", "error", err)
		}
	}
	o.endJob(ctx)
	for {
		if o.cut() {
			o.q.Close()
			if err := o.open(ctx); err != nil {
				return qmp.Status{}, err
			}
		}
		now, err := o.qemuSource.resume(ctx, ran, stood)
		if err != nil && (o.cut() || errors.Is(err, libvirt.ErrClosed)) && ctx.Err() == nil {
			o.log.Info("libvirt ended: the VM is resumed by the one that follows", "error", err)
			continue
		}
		if err == nil {
			if err := o.release(ctx); err != nil {
				o.log.Warn("the VM runs on, and is not all that it was", "error", err)
			}
		}
		return now, err
	}
}

// cut reports whether the connection to libvirt has ended, and the monitor with it.
func (o *libvirtSource) cut() bool {
	select {
	case <-o.conn.Done():
		return true
	default:
		return o.q.Err() != nil
	}
}

// endJob ends libvirt's job, if there still is one, with the connection on which it began.
func (o *libvirtSource) endJob(ctx context.Context) {
	if o.anchor != nil {
		o.anchor.Close()
	}
	if err := o.facts.release(ctx); err != nil {
		o.log.Warn("libvirt still holds the domain for an eviction: end the process that has the "+
			"connection", "pid", o.facts.Holder.PID, "error", err)
	}
}

func (o *libvirtSource) release(ctx context.Context) error {
	o.disarm(ctx)
	o.endJob(ctx)
	if o.facts == nil || !o.facts.Autostart {
		return nil
	}
	err := errNotOpen
	if o.conn != nil {
		err = o.conn.SetAutostart(ctx, o.domain, true)
	}
	if err != nil && !isRefused(err) {
		if err = o.reach(ctx); err == nil {
			err = o.conn.SetAutostart(ctx, o.domain, true)
		}
	}
	if err != nil {
		return fmt.Errorf("the domain does not start with this host any more, as it did: "+
			"`virsh autostart %s`: %w", o.Domain, err)
	}
	return nil
}

// forgetTime is how long libvirt may take to end a domain, or to forget it.
const forgetTime = time.Minute

// discard makes libvirt end the domain, and forget it if it is defined at the destination. Where
// libvirt has no job any more, it is told to forget a domain whose QEMU died.
func (o *libvirtSource) discard(ctx context.Context, qemu process.Process) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forgetTime)
	defer cancel()
	defer o.endJob(ctx)
	err := o.reach(ctx)
	if err == nil && o.facts != nil {
		err = o.confirm(ctx, qemu)
	}
	if killErr := qemu.Kill(ctx); killErr != nil || err == nil {
		return killErr
	}
	if errors.Is(err, fs.ErrNotExist) || o.facts == nil || !o.facts.Persistent {
		return nil
	}
	o.log.Info("libvirt has no migration of the domain to confirm", "error", err)
	o.endJob(ctx)
	if err = o.reach(ctx); err == nil {
		err = undefine(ctx, o.conn, o.facts)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("libvirt still has the domain, which must not be started here: `virsh "+
			"undefine --keep-nvram --keep-tpm %s` forgets it: %w", o.Domain, err)
	}
	return nil
}

// confirm makes libvirt end a domain that has moved. libvirt sends SIGTERM first, which a stopped
// process does not handle. So confirm kills it then.
func (o *libvirtSource) confirm(ctx context.Context, qemu process.Process) error {
	confirmed := make(chan error, 1)
	go func() { confirmed <- o.conn.Confirm(ctx, o.domain, nil, o.facts.Flags, false) }()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(quitTime / 2); ; {
		select {
		case err := <-confirmed:
			return err
		case <-late:
		case <-tick.C:
			if !termPending(qemu.PID) {
				continue
			}
		}
		if err := qemu.Kill(ctx); err != nil {
			return err
		}
		return <-confirmed
	}
}

// termPending reports whether a process has a SIGTERM that it has not handled.
func termPending(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		var set uint64
		if name, value, _ := strings.Cut(line, ":"); name == "ShdPnd" || name == "SigPnd" {
			if n, _ := fmt.Sscanf(strings.TrimSpace(value), "%x", &set); n == 1 &&
				set>>(unix.SIGTERM-1)&1 != 0 {
				return true
			}
		}
	}
	return false
}

func (o *libvirtSource) byHand(qemu process.Process) string {
	return fmt.Sprintf("`kill -CONT %d`, then `virsh resume %s`", qemu.PID, o.Domain)
}

func (o *libvirtSource) close() {
	o.disarm(context.Background())
	o.qemuSource.close()
	o.stop()
	for _, c := range []*libvirt.Conn{o.conn, o.anchor} {
		if c != nil {
			c.Close()
		}
	}
}

// libvirtEvents are the events of a domain's QEMU.
type libvirtEvents struct{ *libvirt.Subscription }

func (s libvirtEvents) next() (name string, at time.Time, ok bool) {
	for {
		select {
		case ev := <-s.C:
			if ev.QEMU != "" {
				return ev.QEMU, ev.Time, true
			}
		default:
			return "", at, false
		}
	}
}
