package host

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
	"vacate/lab/libvirttest"
)

// managed is a domain on the first of two hosts, each with a daemon.
type managed struct {
	*libvirttest.Managed
	a, b      *site
	inactive  string
	transient bool
}

func startManaged(t *testing.T, spec libvirtlab.Spec, setups ...libvirtlab.Setup) *managed {
	m := manage(libvirttest.Start(t, lab.Options{Rate: 1e9}, spec, setups...), spec.Transient)
	m.a.start()
	m.b.start()
	return m
}

// manage makes the daemons for a domain that runs. It starts with its host, unless it is transient.
func manage(of *libvirttest.Managed, transient bool) *managed {
	m := &managed{Managed: of, transient: transient}
	m.a, m.b = sites(m.T, m.Lab)
	paths, err := json.Marshal(m.Hosts.Paths()) // a list of strings is the same in TOML
	m.Check(err)
	for _, x := range []struct {
		s *site
		h *libvirtlab.Host
	}{{m.a, m.Hosts.A}, {m.b, m.Hosts.B}} {
		x.s.configure(fmt.Sprintf("[libvirt]\nuri = %q\nnetworks = [\"user\", \"br0\"]\n"+
			"trust_disks = true\nemulators = [%q]\npaths = %s\nmigrations = %q\n", x.h.Socket,
			m.Domain.VM.Spec.QEMU.Path, paths, filepath.Join(x.h.Dir, "run/to")))
	}
	m.Cleanup(func() {
		for _, h := range []*libvirtlab.Host{m.Hosts.A, m.Hosts.B} {
			said, err := os.ReadFile(filepath.Join(h.Dir, "log/qemu/web1.log"))
			if m.Failed() && err == nil {
				m.Logf("QEMU of host %s: %s", h.Name, said[max(0, len(said)-1500):])
			}
		}
	})
	if !m.transient {
		m.Virsh(m.Hosts.A, "autostart", m.Domain.Name)
	}
	m.inactive = m.Virsh(m.Hosts.A, "dumpxml", "--inactive", m.Domain.Name)
	return m
}

// evict begins an eviction of the domain.
func (m *managed) evict(rate uint64) *hostv1.Eviction {
	m.Helper()
	e, err := m.a.evictWith(m.Domain.Name, "hostb",
		&hostv1.EvictOptions{SkipChecks: true, RateLimit: rate,
			LoadTimeoutMs: 30_000})
	m.Check(err)
	return e
}

// mustMove waits until the eviction is complete, and checks that everything is at b as it was.
func (m *managed) mustMove(e *hostv1.Eviction) {
	m.Helper()
	end, err := m.a.watch(e.Id, 2*time.Minute)
	if err != nil || end.Outcome != string(evict.Completed) {
		m.Fatalf("%v, %v", end, err)
	}
	// The destination's end may come later.
	if there, err := m.b.watch(e.Id, time.Minute); err != nil ||
		there.Outcome != string(evict.Completed) {
		m.Errorf("at b: %v, %v", there, err)
	}
	if now := m.Virsh(m.Hosts.B, "dumpxml", "--inactive", m.Domain.Name); now != m.inactive {
		m.Errorf("the domain is defined as\n%s\nand was\n%s", now, m.inactive)
	}
	if !m.transient && !m.starts(m.Hosts.B) {
		m.Error("the domain does not start with host b")
	}
	m.mustBeThere("running (migrated)")
}

// mustBeThere checks that the domain is whole at b, in one of these states, and only there.
func (m *managed) mustBeThere(states ...string) {
	m.Helper()
	if out := m.Virsh(m.Hosts.A, "list", "--all", "--name"); out != "" {
		m.Errorf("a still has %q", out)
	}
	if s := m.Virsh(m.Hosts.B, "domstate", "--reason",
		m.Domain.Name); !slices.Contains(states, s) {
		m.Errorf("at b: %s", s)
	}
	vm, err := m.Domain.Came(labtest.Within(m.T, time.Minute))
	m.Check(err)
	m.Check(vm.Guest.WaitOps(labtest.Within(m.T, time.Minute), 100))
	labtest.MustCheck(m.T, vm)
}

// starts reports whether the domain starts with a host.
func (m *managed) starts(h *libvirtlab.Host) bool {
	m.Helper()
	return strings.Contains(m.Virsh(h, "dominfo", m.Domain.Name), "Autostart:      enable")
}

// mustStay waits until the eviction is aborted, and checks that everything is at a as it was.
func (m *managed) mustStay(e *hostv1.Eviction) {
	m.Helper()
	end, err := m.a.watch(e.Id, time.Minute)
	if err != nil || end.Outcome != string(evict.Aborted) {
		m.Fatalf("%v, %v", end, err)
	}
	if there, err := m.b.watch(e.Id, time.Minute); err == nil &&
		there.Outcome != string(evict.Aborted) {
		m.Errorf("at b: %v", there)
	}
	if s := m.Virsh(m.Hosts.A, "domstate", "--reason", m.Domain.Name); !strings.HasPrefix(s,
		"running") {
		m.Errorf("at a: %s", s)
	}
	if now := m.Virsh(m.Hosts.A, "dumpxml", "--inactive", m.Domain.Name); now != m.inactive {
		m.Errorf("the domain is defined as\n%s\nand was\n%s", now, m.inactive)
	}
	if !m.starts(m.Hosts.A) {
		m.Error("the domain does not start with host a any more")
	}
	if out := m.Virsh(m.Hosts.B, "list", "--all", "--name"); out != "" {
		m.Errorf("b still has %q", out)
	}
	m.Check(m.Domain.VM.Guest.WaitOps(labtest.Within(m.T, time.Minute), 100))
}

var managedSpec = libvirtlab.Spec{Once: true, VM: lab.Spec{MemoryMiB: 256,
	Load: lab.Load{HotMiB: 24, IdleMiB: 24, Slow: true}, Devices: lab.Full}}

// Two daemons evict a domain of libvirt's. The one at the source is killed when the guest is
// frozen: started again, it rolls back. Then the domain moves. libvirt's own migration takes it
// back.
func TestEvictDomain(t *testing.T) {
	m := startManaged(t, managedSpec)
	m.a.kill()
	m.a.start("source/loading")
	e := m.evict(0)
	if !m.a.reach("source/loading", time.Minute) {
		t.Fatal("the source does not come to loading")
	}
	if m.starts(m.Hosts.A) {
		t.Error("a domain that is about to leave starts with host a")
	}
	m.a.kill()
	m.a.start()
	m.mustStay(e)

	m.mustMove(m.evict(0))
	m.migrateBack()
}

// migrateBack moves the domain from b to a as an operator does.
func (m *managed) migrateBack() {
	m.Helper()
	m.migrate(m.Hosts.B, m.Hosts.A)
}

func (m *managed) migrate(from, to *libvirtlab.Host) {
	m.Helper()
	dir, err := os.MkdirTemp("", "vacate") // both hosts see it, and all users, unlike TempDir
	m.Check(err)
	m.Cleanup(func() { os.RemoveAll(dir) })
	m.Check(os.Chmod(dir, 0o777))
	// It stands meanwhile: see libvirtlab's TestMigrate.
	args := []string{"migrate", "--unsafe", "web1", to.URI, "--migrateuri",
		"unix://" + filepath.Join(dir, "migrate.sock")}
	if !m.transient {
		args = append(args, "--persistent", "--undefinesource")
	}
	m.Virsh(from, args...)
	if s := m.Virsh(to, "domstate", "--reason", "web1"); !strings.HasPrefix(s, "running") {
		m.Error(s)
	}
}

// A daemon that is killed at either end after the commit goes on when it is started again.
func TestEvictDomainThroughDeaths(t *testing.T) {
	m := startManaged(t, managedSpec)
	e := m.evict(8 << 20)
	if !m.a.reach("source/pushing", time.Minute) {
		t.Fatal("the source does not come to pushing")
	}
	m.b.kill()
	time.Sleep(500 * time.Millisecond)
	m.b.start()
	if !m.a.reach("source/pushing", time.Minute) {
		t.Fatal("the source does not come back to pushing")
	}
	m.a.kill()
	m.a.start()
	m.mustMove(e)
}

// of returns the domain as a test has it that begins or goes on.
func (m *managed) of(t *testing.T) *managed {
	sub, lab := *m, *m.Managed
	lab.T, m.a.t, m.b.t = t, t, t
	sub.Managed = &lab
	return &sub
}

// A daemon dies in a state, and is started again. What has not been committed is rolled back, and
// all else comes to its end. A domain that stays is there for the next state.
func TestEvictDomainInEachState(t *testing.T) {
	for name, states := range map[string][]struct {
		at    string
		moves bool
	}{
		"moves at last": {
			{"destination/prepared", false},
			{"source/committing", false},  // the commit was not sent: the destination never ran it
			{"destination/running", true}, // libvirt was not told yet
		},
		"moves": {{"destination/completing", true}},
		"left":  {{"source/retiring", true}},
	} {
		t.Run(name, func(t *testing.T) {
			m := startManaged(t, managedSpec)
			for _, c := range states {
				if !t.Run(c.at, func(t *testing.T) { m.of(t).dies(c.at, c.moves) }) {
					break
				}
				m.of(t)
			}
		})
	}
}

// dies has a daemon die in a state of an eviction, and start again.
func (m *managed) dies(at string, moves bool) {
	m.Helper()
	s := m.b
	if strings.HasPrefix(at, "source") {
		s = m.a
	}
	s.kill()
	s.start(at)
	e := m.evict(0)
	if !s.reach(at, time.Minute) {
		m.Fatal("it does not come to that")
	}
	s.kill()
	s.start()
	if moves {
		m.mustMove(e)
		return
	}
	m.mustStay(e)
}
