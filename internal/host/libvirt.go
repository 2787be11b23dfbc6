package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/host/doctor"
	"vacate/internal/host/hypervisor"
	"vacate/internal/qemu/libvirt"
	"vacate/internal/qemu/qmp"
)

// Libvirt is which domains of libvirt's the daemon knows, and what those may name that come from
// other hosts.
type Libvirt struct {
	URI       string   `toml:"uri"`
	Paths     []string `toml:"paths"`
	Networks  []string `toml:"networks"`
	Emulators []string `toml:"emulators"`
	// TrustDisks has libvirt not judge whether the other hosts reach a domain's disks.
	TrustDisks bool `toml:"trust_disks"`
	// Migrations is a directory of sockets for the streams of libvirt's own migrations; empty: none
	Migrations string `toml:"migrations"`
}

// usualEmulators are those of distributions.
var usualEmulators = []string{"/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm"}

// carries reports whether libvirt's own migrations pass through the daemon.
func (l *Libvirt) carries() bool { return l != nil && l.Migrations != "" }

func (l Libvirt) check() error {
	if _, err := libvirt.ParseURI(l.URI); err != nil {
		return err
	}
	if l.Migrations != "" && !filepath.IsAbs(l.Migrations) {
		return fmt.Errorf("migrations = %q: want a path from the root, such as "+
			"/run/vacate/migrations: libvirt at both hosts must name it", l.Migrations)
	}
	return l.policy().Valid()
}

func (l Libvirt) policy() libvirt.Policy {
	p := libvirt.Policy{Emulators: l.Emulators, Paths: l.Paths, Networks: l.Networks}
	if p.Emulators == nil {
		p.Emulators = usualEmulators
	}
	return p
}

// uri is never empty.
func (l Libvirt) uri() string { return cmp.Or(l.URI, "qemu:///system") }

// look looks at all that the section names on this host, and touches nothing. It returns what there
// is; or everything that is wrong, joined.
func (l Libvirt) look() (string, error) {
	var errs []error
	wrong := func(setting, name string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("libvirt: %s: %s: %w", setting, name, err))
		}
	}
	for _, path := range l.Paths {
		if !filepath.IsAbs(path) {
			continue // images of a pool
		}
		info, err := os.Stat(path)
		if err == nil && !info.IsDir() {
			err = errors.New("it is no directory")
		}
		wrong("paths", path, err)
	}
	if l.Migrations != "" {
		// The daemon makes the last two, as it does for its socket.
		_, err := os.Stat(filepath.Dir(filepath.Dir(l.Migrations)))
		if info, there := os.Stat(l.Migrations); there == nil && !info.IsDir() {
			err = errors.New("it is no directory")
		}
		wrong("migrations", l.Migrations, err)
	}
	for _, program := range l.Emulators {
		_, err := exec.LookPath(program)
		wrong("emulators", program, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := libvirt.Dial(ctx, l.uri())
	if err != nil {
		wrong("uri", l.uri(), err)
		return "", errors.Join(errs...)
	}
	defer conn.Close()
	for _, name := range l.Networks {
		if name == "user" {
			continue
		}
		if _, err := os.Stat(filepath.Join("/sys/class/net", name)); err == nil {
			continue
		}
		wrong("networks", name, conn.FindNetwork(ctx, name))
	}
	list, err := conn.List(ctx)
	wrong("uri", l.uri(), err)
	carries := ""
	if l.Migrations != "" {
		carries = ", whose own migrations pass through " + l.Migrations
	}
	return fmt.Sprintf("%d domains of libvirt at %s%s", len(list), l.uri(), carries),
		errors.Join(errs...)
}

// libvirtOf is the libvirt that has the VM of an eviction here; nil if none has.
func (h *Host) libvirtOf(r journal.Record) *evict.Libvirt {
	if r.Libvirt == "" {
		return nil
	}
	l := &evict.Libvirt{URI: r.Libvirt, Domain: r.VM, Autostart: true, Hold: hypervisor.Hold}
	if c := h.config.Libvirt; c != nil {
		l.Policy, l.TrustDisks = c.policy(), c.TrustDisks
	}
	return l
}

// mayTakeDomain reports whether this host takes a domain of a peer's libvirt. undescribed is why it
// has no description of a VM of that name, which it must not have.
func (h *Host) mayTakeDomain(name, peer string, undescribed error) error {
	switch {
	case undescribed == nil:
		return fmt.Errorf("%s describes a VM of that name, which is a domain of libvirt's on host "+
			"%s: rename one", hypervisor.File(h.config.VMs, name), peer)
	case !errors.Is(undescribed, hypervisor.ErrUnknown):
		return undescribed
	case h.config.Libvirt == nil:
		return errors.New("the VM is a domain of libvirt's, and this host takes none: add " +
			"[libvirt] to vacated.toml there")
	}
	return nil
}

// noDomain returns an error if the libvirt at a URI has a domain of that name.
func noDomain(ctx context.Context, uri, name string) error {
	conn, err := libvirt.Dial(ctx, uri)
	if errors.Is(err, libvirt.ErrNone) {
		return nil // the engine says so
	} else if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Vacant(ctx, name, libvirt.UUID{})
}

// findDomain looks at a domain of the libvirt at a URI. The error wraps hypervisor.ErrUnknown if it
// has none of that name.
func findDomain(ctx context.Context, uri, name string) (hypervisor.Seen, error) {
	return hypervisor.Look(ctx, hypervisor.VM{Name: name, Libvirt: uri})
}

// releaseDomain ends what keeps the connection to libvirt open for an eviction that ends with a
// mark. An engine that has the domain whole here has done that, or must do it. A domain that is
// lost here may run until it needs a page that nobody has: libvirt would destroy it.
func (v *eviction) releaseDomain(m evict.Mark) {
	r := v.entry.Record()
	switch {
	case r.Libvirt == "":
		return
	case r.Role == journal.Destination && v.process().Alive():
		if m == evict.MarkLost {
			v.host.tasks.Go(func() {
				if v.process().Wait(v.host.life) == nil {
					v.releaseHolder()
				}
			})
			return
		} else if m == evict.MarkCompleted {
			return
		}
	}
	v.releaseHolder()
}

func (v *eviction) releaseHolder() {
	ctx, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	if err := evict.ReleaseDomain(ctx, record{v.entry}); err != nil {
		v.host.log.Warn("a process still keeps a connection to libvirt open", "eviction",
			v.entry.ID(), "error", err)
	}
}

// vms is where this host's VMs are.
func (h *Host) vms() hypervisor.Host {
	all := hypervisor.Host{Dir: h.config.VMs}
	if h.config.Libvirt != nil {
		all.URI = h.config.Libvirt.uri()
	}
	return all
}

// described finds a VM for what only described ones have, and says by which command of virsh an
// operator does the same with a domain.
func (h *Host) described(ctx context.Context, name, virsh string) (hypervisor.VM, error) {
	vm, err := h.vms().Find(ctx, name)
	if err == nil && vm.Libvirt != "" {
		err = &stateError{fmt.Errorf("%s is a domain of libvirt's: `virsh %s %[1]s`", name, virsh)}
	}
	return vm, err
}

// askEarly asks libvirt what a peer's question will make this host ask it. libvirt then starts each
// QEMU that is new to it, once, which takes seconds: an operator need not wait for that.
func (h *Host) askEarly() {
	conn, err := libvirt.Dial(h.life, h.config.Libvirt.uri())
	if err == nil {
		defer conn.Close()
		_, _, err = conn.Runner(h.life)
	}
	if err != nil {
		h.log.Debug("libvirt does not say yet what its QEMUs can", "error", err)
	}
}

// domainQuestion asks a peer whether a domain may come there.
type domainQuestion struct {
	XML      string `json:"xml"`                // its migratable description
	Inactive string `json:"inactive,omitempty"` // its definition; a transient domain has none
}

// domainAnswer is the peer's. Without a problem, it may.
type domainAnswer struct {
	Problem string `json:"problem,omitempty"`
	Remedy  string `json:"remedy,omitempty"`
	// Migrations is the peer's directory for libvirt's own migrations; empty: it has none.
	Migrations string `json:"migrations,omitempty"`
}

// mayTake answers whether this host's libvirt would take a domain.
func (h *Host) mayTake(ctx context.Context, q domainQuestion) (a domainAnswer) {
	if h.config.Libvirt == nil {
		return domainAnswer{Problem: "its daemon knows no libvirt",
			Remedy: "add [libvirt] to vacated.toml there"}
	}
	a.Migrations = h.config.Libvirt.Migrations
	a.Problem, a.Remedy = h.mayTakeOne(ctx, q)
	return a
}

func (h *Host) mayTakeOne(ctx context.Context, q domainQuestion) (problem, remedy string) {
	policy := h.config.Libvirt.policy()
	checked, err := policy.Check(q.XML)
	if err == nil && q.Inactive != "" {
		_, err = policy.Check(q.Inactive)
	}
	if err != nil {
		return err.Error(), "see [libvirt] in vacated.toml there"
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	conn, err := libvirt.Dial(ctx, h.config.Libvirt.URI)
	if err != nil {
		return err.Error(), "`systemctl start libvirtd` there"
	}
	defer conn.Close()
	user, version := "", ""
	if err = conn.MayCome(ctx, checked); err == nil {
		user, version, err = conn.Runner(ctx)
	}
	var unfit *libvirt.Unfit
	if errors.As(err, &unfit) {
		return unfit.Problem, unfit.Remedy
	} else if err != nil {
		return err.Error(), "see what libvirt says there: `journalctl -u libvirtd`"
	}
	return doctor.MayUserfault(user, version)
}

// examineDomain is examine for a domain of libvirt's. unknown is returned if there is none.
func (h *Host) examineDomain(ctx context.Context, name, to string,
	unknown error) ([]doctor.Finding, error) {
	if h.config.Libvirt == nil {
		return nil, unknown
	}
	conn, err := libvirt.Dial(ctx, h.config.Libvirt.URI)
	if errors.Is(err, libvirt.ErrNone) {
		return nil, unknown
	} else if err != nil {
		return nil, &stateError{err}
	}
	defer conn.Close()
	d, err := conn.Find(ctx, name)
	if errors.Is(err, libvirt.ErrNoDomain) {
		return nil, unknown
	} else if err != nil {
		return nil, &stateError{err}
	}
	if d.ID < 0 {
		return nil, &stateError{fmt.Errorf("the domain %s does not run here: `virsh start %[1]s`",
			name)}
	}
	found, asked, err := h.lookAtDomain(ctx, conn, d)
	if err != nil {
		return nil, &stateError{fmt.Errorf("domain %s: %w", name, err)}
	}
	if to == "" {
		return found, nil
	}
	if _, ok := h.config.Peers[to]; !ok {
		_, err := h.dialer(to)
		return nil, &unknownError{err}
	}
	there, _, way, off, err := h.ask(ctx, to, "")
	if err != nil {
		return append(found, h.silent(to, err)), nil
	}
	found = append(append(found, doctor.Inspect(there, nil)...), off...)
	found = append(found, answers(to, way))
	dialer, err := h.dialer(to)
	if err != nil {
		return nil, err
	}
	var answer domainAnswer
	if _, err := putTo(
		ctx,
		dialer,
		0,
		question{Domain: &asked},
		&answer,
	); err != nil {
		answer = domainAnswer{Problem: err.Error(),
			Remedy: "have the same version of vacated on both hosts"}
	}
	f := doctor.Finding{Host: to, Check: "libvirt", Text: "its libvirt may take the domain"}
	if answer.Problem != "" {
		f.Level, f.Text, f.Remedy = doctor.Fatal, answer.Problem, answer.Remedy
	}
	found = append(found, f)
	if h.config.Libvirt.Migrations == "" || answer.Problem != "" {
		return found, nil
	}
	return append(found, h.lookAtMigrations(to, answer.Migrations)), nil
}

// lookAtMigrations finds whether libvirt's own migrations to a peer can be carried. theirs is the
// peer's directory for them.
func (h *Host) lookAtMigrations(to, theirs string) doctor.Finding {
	c := h.config.Libvirt
	f := doctor.Finding{Host: h.name(), Check: "migrations", Text: fmt.Sprintf(
		"libvirt's own migrations pass through the daemons with `virsh migrate --live --p2p "+
			"--postcopy --migrateuri unix://%s`", c.carrySocket(to))}
	if filepath.Clean(theirs) != filepath.Clean(c.Migrations) {
		f.Level = doctor.Warning
		f.Text = fmt.Sprintf(
			"libvirt's own migrations cannot pass through the daemons: migrations "+
				"in vacated.toml is %q here and %q on host %s", c.Migrations, theirs, to)
		f.Remedy = "name the same directory in [libvirt] on both hosts"
	}
	return f
}

// lookAtDomain examines a domain that runs here, and returns what another host is told of it.
func (h *Host) lookAtDomain(ctx context.Context, conn *libvirt.Conn,
	d libvirt.Domain) (found []doctor.Finding, asked domainQuestion, err error) {
	live, err := conn.XML(ctx, d, libvirt.Live)
	if err != nil {
		return nil, asked, err
	}
	if asked.XML, err = conn.XML(ctx, d, libvirt.Migratable); err != nil {
		return nil, asked, err
	}
	info, err := conn.Info(ctx, d)
	if err == nil && info.Persistent {
		asked.Inactive, err = conn.XML(ctx, d, libvirt.Inactive)
	}
	if err != nil {
		return nil, asked, err
	}
	snapshots, err := conn.Snapshots(ctx, d)
	if err != nil {
		return nil, asked, err
	}
	monitor, err := conn.Monitor(ctx, d)
	if err != nil {
		return nil, asked, err
	}
	q, err := qmp.NewClient(ctx, monitor)
	if err != nil {
		return nil, asked, err
	}
	defer q.Close()
	vm, err := doctor.VM(ctx, q)
	if err != nil {
		return nil, asked, err
	}
	own, err := doctor.Domain(h.name(), live, snapshots, vm, h.config.Libvirt.TrustDisks)
	if err != nil {
		return nil, asked, err
	}
	return append(doctor.Inspect(h.facts(ctx), &vm), own...), asked, nil
}
