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

// Libvirt says that the VM's QEMU belongs to this host's libvirt.
type Libvirt struct {
	URI    string // of the daemon; empty: qemu:///system
	Domain string // its name at the source
	// Policy limits what the description of an offered domain may name on this host.
	Policy libvirt.Policy
	// TrustDisks makes libvirt skip its check that both hosts reach the domain's disks.
	TrustDisks bool
	Autostart  bool // a received domain starts with this host if it did with the other
}

// migrateFlags are those of all phases.
const migrateFlags = libvirt.MigrateLive | libvirt.Postcopy

// bounds of what an offer says of a domain, in bytes.
const (
	maxDomainXML = 256 << 10
	maxCookie    = 64 << 10
)

// domainOffer is what libvirt at the destination needs to know about a domain. The destination must
// not trust any of it.
type domainOffer struct {
	Name       string `json:"name"`
	XML        string `json:"xml"`    // as the source's libvirt wants it at the destination
	Cookie     []byte `json:"cookie"` // of Begin3
	Persistent bool   `json:"persistent"`
	Inactive   string `json:"inactive,omitempty"` // the definition of a persistent domain
	Autostart  bool   `json:"autostart,omitempty"`
	// Totals is the size to which each block of memory may grow, in their order.
	Totals []uint64 `json:"totals"`
}

func (d *domainOffer) check() error {
	switch {
	case d == nil:
		return nil
	case d.Name == "" || strings.Contains(d.Name, "/"):
		return fmt.Errorf("%w: a domain named %.40q", errFrame, d.Name)
	case len(d.XML) > maxDomainXML || len(d.Inactive) > maxDomainXML || len(d.Cookie) > maxCookie:
		return fmt.Errorf("%w: a domain's description of %d and %d bytes, a cookie of %d", errFrame,
			len(d.XML), len(d.Inactive), len(d.Cookie))
	}
	return nil
}

// flags returns the flags of the domain's migration.
func (d *domainOffer) flags(trust bool) libvirt.Flags {
	f := migrateFlags
	if d.Persistent {
		f |= libvirt.PersistDest | libvirt.UndefineSource
	}
	if trust {
		f |= libvirt.Unsafe
	}
	return f
}

// libvirtSource is a VM that is a domain of libvirt. The engine asks and freezes its QEMU through
// libvirt, like any other. Two things differ. libvirt holds a job, from describe to resume or
// discard, or until the connection ends. And it passes no descriptors on to QEMU.
type libvirtSource struct {
	qemuSource
	Libvirt
	id     ID
	log    *slog.Logger
	life   context.Context // ends when close is called
	stop   context.CancelFunc
	conn   *libvirt.Conn
	domain libvirt.Domain
	offer  *domainOffer // nil before Begin3: then there is no job
	file   string       // our name for the file that QEMU saves to; empty before arm
}

func newLibvirtSource(s Source) *libvirtSource {
	o := &libvirtSource{Libvirt: *s.Libvirt, id: s.Eviction, log: s.Log,
		qemuSource: qemuSource{vm: s.VM, expect: s.Process}}
	o.life, o.stop = context.WithCancel(context.Background())
	o.subscribe, o.drain, o.cont = o.watch, o.hear, o.goOn
	return o
}

func (o *libvirtSource) open(ctx context.Context) (err error) {
	conn, err := libvirt.Dial(ctx, o.URI)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	domain, err := conn.Find(ctx, o.Domain)
	if errors.Is(err, libvirt.ErrNoDomain) {
		return fmt.Errorf("%w: %w", err, fs.ErrNotExist)
	} else if err != nil {
		return err
	}
	qemu, err := conn.Process(domain)
	if err != nil {
		return err
	}
	if o.expect != (process.Process{}) && qemu != o.expect {
		return fmt.Errorf("%w: process %d had the VM, and process %d is the domain's now",
			errAnother, o.expect.PID, qemu.PID)
	}
	o.conn, o.domain = conn, domain
	return o.dial(ctx)
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

// gone is nil: when libvirt ends, its domains do not.
func (o *libvirtSource) gone() <-chan struct{} { return nil }

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
	// From here on nobody else can change the domain, or run it by libvirt.
	offer.Cookie, offer.XML, err = o.conn.Begin(ctx, o.domain,
		offer.flags(o.TrustDisks)|libvirt.ChangeProtection)
	if err != nil {
		return d, err
	}
	o.offer = offer
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

// disarm removes what QEMU saved. The job stays until libvirt ends it with the connection.
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
	if o.offer != nil && !theirs {
		err := o.conn.Confirm(ctx, o.domain, nil,
			o.offer.flags(o.TrustDisks)|libvirt.ChangeProtection, true)
		if err == nil { // libvirt also says so if it could not run the domain
			o.offer = nil
		}
	}
	if o.offer != nil || o.q.Err() != nil {
		// The job ends with the connection.
		o.q.Close()
		o.conn.Close()
		if err := o.open(ctx); err != nil {
			return qmp.Status{}, err
		}
		o.offer = nil
	}
	return o.qemuSource.resume(ctx, ran, stood)
}

// discard makes libvirt end the domain, and forget it if it is defined at the destination. libvirt
// sends SIGTERM first, which a stopped process does not handle. So discard kills it then.
func (o *libvirtSource) discard(ctx context.Context, qemu process.Process) error {
	if o.offer == nil {
		o.log.Warn("libvirt still has the domain, which must not be started here: `virsh "+
			"undefine --keep-nvram --keep-tpm` forgets it", "domain", o.Domain)
		return qemu.Kill(ctx)
	}
	confirmed := make(chan error, 1)
	go func() {
		confirmed <- o.conn.Confirm(ctx, o.domain, nil,
			o.offer.flags(o.TrustDisks)|libvirt.ChangeProtection, false)
	}()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(quitTime / 2); ; {
		select {
		case err := <-confirmed:
			return errors.Join(err, qemu.Kill(ctx))
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
	if o.conn != nil {
		o.conn.Close()
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
