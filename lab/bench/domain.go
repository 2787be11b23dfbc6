package bench

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/daemons"
	"vacate/lab/libvirtlab"
)

// domainBaseline is the strategy that all others that move domains are compared with.
const domainBaseline = "virsh-postcopy"

// domainStrategies move a domain of libvirt's. Those of virsh are made with [virsh].
var domainStrategies = []strategy{
	{name: "vacate", move: evictDomain()},
	{name: "vacate-carried", move: virsh(migration{carried: true}, "--postcopy", "--p2p",
		"--migrateuri", "unix:///run/libvirt/to/hostb.sock")},
	{name: domainBaseline, move: virsh(migration{switched: true}, "--postcopy")},
	{name: "virsh-postcopy-after-precopy",
		move: virsh(migration{}, "--postcopy", "--postcopy-after-precopy")},
	{name: "virsh-precopy", move: virsh(migration{bounded: true})},
	{name: "virsh-precopy-timeout",
		move: virsh(migration{}, "--postcopy", "--timeout", "3", "--timeout-postcopy")},
}

// DomainStrategies are the names of all strategies that move a domain of libvirt's.
func DomainStrategies() []string { return namesOf(domainStrategies) }

// domains are what a bench with libvirt has besides its lab.
type domains struct {
	hosts   *libvirtlab.Hosts
	daemons *daemons.Site
	count   int // of domains so far
}

// startLibvirt gives each host a libvirt, and a vacated that knows its domains.
func (b *bench) startLibvirt(ctx context.Context) (err error) {
	d := &domains{}
	b.domains = d
	if d.hosts, err = libvirtlab.New(ctx, b.lab,
		libvirtlab.Setup{Release: b.opts.Release}); err != nil {
		return err
	}
	if d.daemons, err = daemons.New(ctx, b.lab, b.opts.Vacate, d.hosts); err != nil {
		return err
	}
	for _, h := range []*lab.Host{b.lab.A, b.lab.B} {
		if err := d.daemons.Start(ctx, h); err != nil {
			return err
		}
	}
	return nil
}

func (d *domains) close() (err error) {
	if d.daemons != nil {
		err = d.daemons.Close()
	}
	if d.hosts != nil {
		d.hosts.Close()
	}
	return err
}

// versions are those of libvirt and of its QEMU.
func (d *domains) versions(ctx context.Context) (libvirt, qemu string, err error) {
	said, err := d.hosts.A.Virsh(ctx, "version", "--daemon")
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(said) {
		what, version, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch what {
		case "Running against daemon":
			libvirt = strings.TrimSpace(version)
		case "Running hypervisor":
			qemu = strings.TrimPrefix(strings.TrimSpace(version), "QEMU ")
		}
	}
	return libvirt, qemu, nil
}

// setUpDomain boots the guest as a domain of host a's libvirt. libvirt starts its twin.
func (t *trial) setUpDomain(ctx context.Context, result *Result) (err error) {
	d := t.domains
	d.count++
	name := fmt.Sprintf("web%d-%d", os.Getpid(), d.count)
	if t.domain, err = d.hosts.Start(ctx, name, libvirtlab.Spec{VM: t.opts.Spec}); err != nil {
		return err
	}
	t.vm = t.domain.VM
	if t.release, err = warm(t.opts.Spec.MemoryMiB << 20); err != nil {
		return err
	}
	if result.Machine.QEMU == "" {
		if err := describe(result, t.vm, t.opts.Lab.Rate); err != nil {
			return err
		}
		libvirt, qemu, err := d.versions(ctx)
		if err != nil {
			return err
		}
		result.Machine.Libvirt, result.Machine.QEMU = &libvirt, qemu
	}
	if t.src, err = watchDomain(d.hosts.A, name, t.opts.Log); err != nil {
		return err
	}
	t.dst, err = watchDomain(d.hosts.B, name, t.opts.Log)
	return err
}

// closeDomain ends what there is of the domain.
func (t *trial) closeDomain() {
	for _, vm := range slices.Concat(t.domain.A.VMs(), t.domain.B.VMs()) {
		vm.Kill()
	}
	for _, h := range []*libvirtlab.Host{t.domains.hosts.A, t.domains.hosts.B} {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		h.Virsh(ctx, "undefine", t.domain.Name) // if it is there
		cancel()
	}
	// An eviction that failed may have left what holds its connection to libvirt.
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		line, _ := os.ReadFile(file)
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil || !bytes.HasSuffix(line, []byte("\x00hold\x00"+t.domain.Name+"\x00")) {
			continue
		}
		if p, err := os.FindProcess(pid); err == nil {
			p.Kill()
		}
	}
}

// virshEvent is how virsh tells of an event. The time is QEMU's.
var virshEvent = regexp.MustCompile(`^event (\S+) at (\d+)\.(\d+) for domain '([^']*)': (.*)$`)

// watchDomain has virsh tell of what happens to a domain that is on a host, or comes there.
func watchDomain(h *libvirtlab.Host, name string, log *slog.Logger) (*monitor, error) {
	// It does not buffer what it writes.
	cmd := exec.Command("stdbuf", "-oL", "virsh", "-q", "-c", h.URI,
		"uri; qemu-monitor-event --loop")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := h.Host.Start(cmd); err != nil {
		return nil, err
	}
	done, connected := make(chan struct{}), make(chan struct{})
	m := &monitor{name: name, changed: make(chan struct{}), done: done,
		why:  func() error { return fmt.Errorf("virsh qemu-monitor-event ended: %s", &said) },
		stop: func() { cmd.Process.Kill() }}
	m.all.Go(func() {
		defer close(done)
		defer cmd.Wait()
		lines := bufio.NewScanner(out)
		if !lines.Scan() { // the URI
			return
		}
		close(connected)
		for lines.Scan() {
			p := virshEvent.FindStringSubmatch(lines.Text())
			if p == nil || p[4] != name {
				continue
			}
			log.Debug("event", "host", h.Name, "line", lines.Text())
			secs, _ := strconv.ParseInt(p[2], 10, 64)
			micros, _ := strconv.ParseInt(p[3], 10, 64)
			e := qmp.Event{Name: p[1], Time: time.Unix(secs, micros*1000)}
			if json.Valid([]byte(p[5])) {
				e.Data = json.RawMessage(p[5])
			}
			m.take(e, time.Now())
		}
	})
	select {
	case <-connected:
		return m, nil
	case <-done:
		m.close()
		return nil, m.why()
	}
}

// status matches a state that a domain's QEMU tells of its migration.
func status(s string) func(event) (bool, error) {
	return func(e event) (bool, error) { return e.name == "MIGRATION" && e.status == s, nil }
}

// evictDomain moves the domain by the daemons of both hosts, with more flags if need be.
func evictDomain(flags ...string) mover {
	return func(t *trial, ctx context.Context) error {
		cmd := t.domains.daemons.Command(ctx, t.lab.A,
			append([]string{"evict", t.domain.Name, "--to", "hostb", "--json"}, flags...)...)
		if err := t.runEngine(ctx, cmd); err != nil {
			return fmt.Errorf("%w; vacated on host a said %s; on host b %s", err,
				t.domains.daemons.Said(t.lab.A), t.domains.daemons.Said(t.lab.B))
		}
		return t.arrived(ctx)
	}
}

// migration is what an operator does besides typing virsh migrate.
type migration struct {
	carried  bool // by the daemons, through which the stream passes
	switched bool // to post-copy as soon as QEMU migrates
	bounded  bool // given up after the bound of pre-copy
}

// virsh moves the domain by virsh migrate --live with more flags, over the lab's link. "{to}" in
// them is the address of the destination.
func virsh(m migration, flags ...string) mover {
	return func(t *trial, ctx context.Context) error { return t.virsh(ctx, m, flags) }
}

func (t *trial) virsh(ctx context.Context, m migration, flags []string) error {
	from, to, name := t.domains.hosts.A, t.domains.hosts.B, t.domain.Name
	// The images are the same files for both hosts, which libvirt cannot know.
	args := []string{"migrate", "--live", "--unsafe", "--persistent", "--undefinesource"}
	if !slices.Contains(flags, "--migrateuri") {
		args = append(args, "--migrateuri", "tcp://{to}")
	}
	args = append(args, flags...)
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "{to}", to.Addr)
	}
	dest := to.URI
	if m.carried {
		dest = to.Remote // host a's daemon connects
	}
	gone := t.exit()
	over := make(chan error, 1)
	running, ended := context.WithCancelCause(ctx)
	t.tasks.Go(func() {
		_, err := from.Virsh(ctx, append(args, name, dest)...)
		over <- err
		ended(cmp.Or(err, errors.New("the migration completed before QEMU was in post-copy")))
	})
	begun, err := t.src.wait(running, t.start, "QEMU to be told to migrate", status("setup"))
	if err == nil {
		t.begunAt(begun.at)
		if m.switched {
			err = t.switchOver(running)
		}
	}
	if err != nil {
		return err
	}
	var bound <-chan time.Time
	if m.bounded {
		bound = time.After(t.opts.PrecopyBound)
	}
	aborted := false
	select {
	case err = <-over:
	case <-bound:
		aborted = true
		if _, err := from.Virsh(ctx, "domjobabort", name); err != nil {
			t.opts.Log.Warn("pre-copy is not given up", "error", err)
		}
		err = <-over
	}
	if err != nil && aborted && ctx.Err() == nil {
		t.end = time.Now()
		t.run.Outcome = NotConverged
		t.run.Reason = fmt.Sprintf("given up after %v", t.opts.PrecopyBound)
		return nil
	}
	if err != nil {
		return err
	}
	if err := t.noteExit(ctx, gone); err != nil {
		return err
	}
	return t.arrived(ctx) // with no counts of pages: libvirt forgets them
}

// switchOver has QEMU go on in post-copy as soon as it migrates.
func (t *trial) switchOver(ctx context.Context) error {
	if _, err := t.src.wait(ctx, t.start, "QEMU to migrate", status("active")); err != nil {
		return err
	}
	for {
		_, err := t.domains.hosts.A.Virsh(ctx, "migrate-postcopy", t.domain.Name)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if time.Since(t.start) > 10*time.Second {
			return err
		}
	}
}

// arrived takes the QEMU that the guest has come to.
func (t *trial) arrived(ctx context.Context) (err error) {
	t.twin, err = t.domain.Came(ctx)
	return err
}
