package libvirt

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
	"vacate/lab/libvirttest"
)

// rig is two hosts with a domain on host a.
type rig struct {
	*testing.T
	ctx    context.Context
	l      *lab.Lab
	h      *libvirtlab.Hosts
	a, b   *Conn
	lab    *libvirtlab.Domain
	domain Domain
}

func newRig(t *testing.T, spec libvirtlab.Spec) *rig {
	m := libvirttest.Start(t, lab.Options{}, spec)
	r := &rig{T: t, ctx: labtest.Within(t, 4*time.Minute), l: m.Lab, h: m.Hosts, lab: m.Domain}
	var err error
	r.a, r.b = r.dial(r.h.A), r.dial(r.h.B)
	r.domain, err = r.a.Find(r.ctx, "web1")
	r.check(err)
	return r
}

func (r *rig) check(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rig) dial(h *libvirtlab.Host) *Conn {
	r.Helper()
	c, err := Dial(r.ctx, "qemu:///system?socket="+h.Socket)
	r.check(err)
	r.Cleanup(func() { c.Close() })
	return c
}

// virsh runs a command of an operator's.
func (r *rig) virsh(h *libvirtlab.Host, args ...string) string {
	r.Helper()
	out, err := h.Virsh(r.ctx, args...)
	r.check(err)
	return out
}

// monitor is a client of the domain's QEMU on host a.
func (r *rig) monitor(c *Conn, d Domain) *qmp.Client {
	r.Helper()
	conn, err := c.Monitor(r.ctx, d)
	r.check(err)
	q, err := qmp.NewClient(r.ctx, conn)
	r.check(err)
	r.Cleanup(func() { q.Close() })
	return q
}

var small = lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 24, IdleMiB: 24, Slow: true}}

const tagged = `<metadata><vacate:vm xmlns:vacate="urn:vacate:domain:1" pinned="yes"
 priority="3"/></metadata>`

// A running domain is listed, its QEMU answers through libvirt and its events come, its migration
// can be begun and taken back, and calls end with their context and their connection.
func TestDomain(t *testing.T) {
	r := newRig(t, libvirtlab.Spec{VM: small, Domain: tagged})
	t.Run("list", r.list)
	t.Run("process", r.process)
	t.Run("monitor", r.queries)
	t.Run("events", r.events)
	t.Run("begin", r.begin)
	t.Run("job", r.holds)
	t.Run("connection", r.closes)
	labtest.MustCheck(t, r.lab.VM)
}

func (r rig) list(t *testing.T) {
	r.T = t
	list, err := r.a.List(r.ctx)
	r.check(err)
	if len(list) != 1 {
		t.Fatalf("%+v", list)
	}
	d, err := r.a.Info(r.ctx, list[0])
	r.check(err)
	if d.Name != "web1" || d.ID < 1 || d.UUID.String() != r.lab.UUID || d.State.State != Running ||
		!d.Persistent || d.Autostart {
		t.Errorf("%+v", d)
	}
	if m, err := r.a.Metadata(r.ctx, list[0]); err != nil ||
		m != (Metadata{Pinned: true, Priority: 3}) {
		t.Errorf("%+v, %v", m, err)
	}
	if want := r.virsh(r.h.A, "domstate", "--reason", "web1"); d.State.String() != want {
		t.Errorf("%v; virsh says %v", d.State, want)
	}
	r.check(r.a.SetAutostart(r.ctx, r.domain, true))
	if d, err := r.a.Info(r.ctx, r.domain); err != nil || !d.Autostart {
		t.Errorf("%+v, %v", d, err)
	}
	r.check(r.a.SetAutostart(r.ctx, r.domain, false))
	for kind, flags := range map[XMLKind][]string{
		Live: nil, Inactive: {"--inactive"}, Migratable: {"--migratable"},
	} {
		text, err := r.a.XML(r.ctx, r.domain, kind)
		r.check(err)
		if want := r.virsh(
			r.h.A,
			append([]string{"dumpxml", "--security-info", "web1"}, flags...)...); strings.TrimSpace(
			text,
		) != want {
			t.Errorf("kind %v:\n%s\nvirsh has\n%s", kind, text, want)
		}
	}
	if _, err := r.a.Find(r.ctx, "web9"); !errors.Is(err, ErrNoDomain) {
		t.Error(err)
	}
}

func (r rig) process(t *testing.T) {
	r.T = t
	p, err := r.a.Process(r.domain)
	r.check(err)
	if p.PID != r.lab.VM.PID() {
		t.Errorf("process %d; it is %d", p.PID, r.lab.VM.PID())
	}
	theirs, ours, err := Directory(p.PID)
	r.check(err)
	if !strings.HasPrefix(theirs, "/var/lib/libvirt/qemu/domain-") {
		t.Error(theirs)
	}
	if _, err := os.Stat(filepath.Join(ours, "monitor.sock")); err != nil {
		t.Error(err)
	}
	wrong := r.domain
	wrong.UUID[0]++
	if _, err := r.a.Process(wrong); err == nil {
		t.Error("a process was found for another UUID")
	}
}

func (r rig) queries(t *testing.T) {
	r.T = t
	q := r.monitor(r.a, r.domain)
	s, err := q.QueryStatus(r.ctx)
	if err != nil || !s.Running {
		t.Fatalf("%+v, %v", s, err)
	}
	if !q.Version().AtLeast(7, 2) {
		t.Error(q.Version())
	}
	if pid, vcpus, err := q.Process(r.ctx); err != nil || pid != r.lab.VM.PID() || len(vcpus) != 1 {
		t.Errorf("process %d, %v, %v; it is %d", pid, vcpus, err, r.lab.VM.PID())
	}
	text, err := q.HMP(r.ctx, "info ramblock")
	if err != nil || !strings.Contains(text, "pc.ram") {
		t.Errorf("%q, %v", text, err)
	}
	var refusal *qmp.Error
	if err := q.Run(r.ctx, "no-such-command", nil, nil); !errors.Is(err, qmp.ErrCommandNotFound) {
		t.Error(err)
	}
	f, err := os.Open("/dev/null")
	r.check(err)
	defer f.Close()
	if err := q.GetFD(
		r.ctx,
		"x",
		int(f.Fd()),
	); !errors.As(err, &refusal) ||
		!strings.Contains(refusal.Desc, "descriptor") {
		t.Error(err)
	}
	if err := q.RunOOB(r.ctx, "migrate-pause", nil, nil); !errors.Is(err, qmp.ErrNoOOB) {
		t.Error(err)
	}
	// Many at a time are carried out in order.
	if _, err := q.QueryCPUs(r.ctx); err != nil {
		t.Error(err)
	}
}

// next returns the coming events of QEMU's until the one of a name.
func (r *rig) next(s *qmp.Subscription, name string) (names []string) {
	r.Helper()
	for {
		select {
		case ev, ok := <-s.C:
			if !ok {
				r.Fatalf("the events ended after %q", names)
			}
			names = append(names, ev.Name)
			if ev.Name == name {
				if ev.Time.IsZero() {
					r.Errorf("%s has no time", name)
				}
				return names
			}
		case <-time.After(30 * time.Second):
			r.Fatalf("no event %s after %q", name, names)
		}
	}
}

func (r rig) events(t *testing.T) {
	r.T = t
	own, err := r.a.Subscribe(r.ctx, &r.domain, 16)
	r.check(err)
	defer own.Close()
	q := r.monitor(r.a, r.domain)
	s := q.Subscribe(16)
	r.check(r.a.Suspend(r.ctx, r.domain))
	r.next(s, "STOP")
	if now, err := r.a.State(r.ctx, r.domain); err != nil || now != (State{Paused, PausedUser}) {
		t.Errorf("%v, %v", now, err)
	}
	r.check(r.a.Resume(r.ctx, r.domain))
	r.next(s, "RESUME")
	var seen []string
	for len(seen) < 4 {
		select {
		case ev := <-own.C:
			seen = append(seen, ev.String())
		case <-time.After(30 * time.Second):
			t.Fatalf("no more events than %q", seen)
		}
	}
	t.Logf("events: %q", seen)
	for _, want := range []string{"STOP", "suspended/0", "RESUME", "resumed/0"} {
		if !slices.Contains(seen, want) {
			t.Errorf("no event %s among %q", want, seen)
		}
	}
}

// A migration that was begun holds the domain against others, and leaves no trace when it is taken
// back.
func (r rig) begin(t *testing.T) {
	r.T = t
	inactive := r.virsh(r.h.A, "dumpxml", "--inactive", "web1")
	cookie, text, err := r.a.Begin(
		r.ctx,
		r.domain,
		MigrateLive|Postcopy|ChangeProtection|PersistDest|UndefineSource,
	)
	r.check(err)
	if !strings.Contains(text, "<name>web1</name>") {
		t.Errorf("%q", text)
	}
	t.Logf("cookie: %s", cookie)
	plain, err := PlainCookie(cookie)
	r.check(err)
	for _, cap := range unwanted {
		if strings.Contains(string(plain), cap) {
			t.Errorf("%s is still in %s", cap, plain)
		}
	}
	// It is the connection's own; an operator's calls wait, but for those that only ask.
	if s := r.virsh(r.h.A, "domstate", "web1"); s != "running" {
		t.Error(s)
	}
	r.check(r.a.Suspend(r.ctx, r.domain))
	if s, err := r.a.State(r.ctx, r.domain); err != nil || s.State != Paused {
		t.Errorf("%v, %v", s, err)
	}
	t.Logf("suspended with the job held: %v", r.virsh(r.h.A, "domstate", "--reason", "web1"))
	r.check(
		r.a.Confirm(
			r.ctx,
			r.domain,
			nil,
			MigrateLive|Postcopy|ChangeProtection|PersistDest|UndefineSource,
			true,
		),
	)
	now, err := r.a.State(r.ctx, r.domain)
	t.Logf("after Confirm(canceled): %v, %v", now, err)
	if now.State != Running {
		r.check(r.a.Resume(r.ctx, r.domain))
	}
	if now, err := r.a.State(r.ctx, r.domain); err != nil || now.State != Running {
		t.Errorf("%v, %v", now, err)
	}
	if now := r.virsh(r.h.A, "dumpxml", "--inactive", "web1"); now != inactive {
		t.Errorf("%s\nwas\n%s", now, inactive)
	}
}

// What others may do while the job is held.
func (r rig) holds(t *testing.T) {
	r.T = t
	const flags = MigrateLive | Postcopy | ChangeProtection
	_, _, err := r.a.Begin(r.ctx, r.domain, flags)
	r.check(err)
	other := r.dial(r.h.A)
	short, cancel := context.WithTimeout(r.ctx, 2*time.Second)
	err = other.Resume(short, r.domain)
	cancel()
	t.Logf("resume by another connection: %v", err)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("another connection resumed a domain whose job is held: %v", err)
	}
	if _, err := r.a.MonitorCommand(r.ctx, r.domain, `{"execute":"query-status"}`); err != nil {
		t.Errorf("a monitor command while the job is held: %v", err)
	}
	r.check(r.a.Confirm(r.ctx, r.domain, nil, flags, true))
}

// The job ends with the connection that holds it.
func (r rig) closes(t *testing.T) {
	r.T = t
	const flags = MigrateLive | Postcopy | ChangeProtection
	c := r.dial(r.h.A)
	_, _, err := c.Begin(r.ctx, r.domain, flags)
	r.check(err)
	conn, err := c.Monitor(r.ctx, r.domain)
	r.check(err)
	q, err := qmp.NewClient(r.ctx, conn)
	r.check(err)
	r.check(c.Close())
	select {
	case <-q.Done():
	case <-time.After(30 * time.Second):
		t.Error("the monitor outlives the connection")
	}
	if _, err := c.State(r.ctx, r.domain); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	// Another can begin then.
	_, _, err = r.a.Begin(r.ctx, r.domain, flags)
	r.check(err)
	r.check(r.a.Confirm(r.ctx, r.domain, nil, flags, true))
	ended, cancel := context.WithCancel(r.ctx)
	cancel()
	if _, err := r.a.List(ended); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
