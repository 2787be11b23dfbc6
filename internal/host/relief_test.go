package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"

	"connectrpc.com/connect"
)

// contend boots two VMs on host a that want all of its core, and gets host b ready for either.
func contend(t *testing.T, l *lab.Lab,
	a, b *site) (small, big *lab.VM, there map[string]*lab.Expected) {
	t.Helper()
	there = map[string]*lab.Expected{}
	for _, v := range []struct {
		name string
		vm   **lab.VM
		load lab.Load
	}{{"small", &small, lab.Load{HotMiB: 32, IdleMiB: 16, Seed: 1}},
		{"big", &big, lab.Load{HotMiB: 80, IdleMiB: 40, Seed: 2}}} {
		*v.vm = bootBusy(t, l.A, lab.Spec{MemoryMiB: 256, Load: v.load})
		a.describe(v.name, (*v.vm).QMP, (*v.vm).Args)
		there[v.name] = b.expect(v.name, *v.vm)
		if v.vm == &small { // it leaves the core to the other one until that has begun, too
			execute(t, small, "stop")
		}
	}
	execute(t, small, "cont")
	return small, big, there
}

// execute gives a command to a VM's QEMU.
func execute(t *testing.T, vm *lab.VM, command string) {
	t.Helper()
	if err := vm.Execute(labtest.Within(t, 20*time.Second), command, nil, nil); err != nil {
		t.Fatalf("%s: %v", command, err)
	}
}

func (s *site) pressure() *hostv1.PressureResponse {
	s.t.Helper()
	r, err := s.api.Pressure(labtest.Within(s.t, time.Minute),
		connect.NewRequest(&hostv1.PressureRequest{OverMs: 1500}))
	if err != nil {
		s.t.Fatal(err)
	}
	return r.Msg
}

// starves makes sure that two VMs of a host share its only core.
func (s *site) starves() {
	s.t.Helper()
	p := s.pressure()
	s.t.Logf("%v", p)
	if p.Cpus != 1 || p.CpuCores < 0.8 || p.WaitingCores < 0.6 || len(p.Vms) != 2 ||
		p.MemoryBytes == 0 {
		s.t.Errorf("host %s: %v", s.name, p)
	}
	for _, v := range p.Vms {
		if v.Steal < 0.2 || v.Steal > 0.8 || v.ResidentBytes < 50<<20 || v.Problem != "" {
			s.t.Errorf("%v", v)
		}
	}
}

func (s *site) plan(goal string, all bool) *hostv1.PlanResponse {
	s.t.Helper()
	r, err := s.api.Plan(labtest.Within(s.t, time.Minute),
		connect.NewRequest(&hostv1.PlanRequest{Goal: goal, All: all, OverMs: 1500}))
	if err != nil {
		s.t.Fatal(err)
	}
	return r.Msg
}

// TestRelieveVMs has two VMs starve each other on one core, and one of them leave.
func TestRelieveVMs(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	a, b := sites(t, l)
	_, _, there := contend(t, l, a, b)
	a.start()
	b.start()

	a.starves()
	plan := a.plan("", false)
	t.Logf("%v", plan)
	if plan.Met || plan.Goal != "cpu<111.11%" || len(plan.Hosts) != 2 || len(plan.Candidates) != 2 {
		t.Fatalf("%v", plan)
	}
	best := plan.Candidates[0]
	if best.Vm != "small" || best.To != "hostb" || best.Refused != "" || !best.Meets ||
		best.GainCores < 0.5 ||
		!(best.TransferS > 0 && best.TransferS <= best.BackS && best.BackS <= best.TotalS) {
		t.Errorf("%v", best)
	}
	// Both cannot go: the other host has one core, too.
	all := a.plan("", true)
	if len(all.Candidates) != 2 || all.Candidates[0].Refused != "" ||
		!strings.Contains(all.Candidates[1].Refused, "starve") {
		t.Errorf("%v", all)
	}
	r, err := a.api.Plan(labtest.Within(t, time.Minute),
		connect.NewRequest(&hostv1.PlanRequest{All: true, OverMs: 500, To: "hostb",
			Except: []string{"small"}, Force: true}))
	if err != nil || len(r.Msg.Candidates) != 2 || r.Msg.Candidates[0].Vm != "big" ||
		r.Msg.Candidates[1].Refused != "it is excepted" {
		t.Errorf("%v, %v", r, err)
	}
	r, err = a.api.Plan(labtest.Within(t, time.Minute),
		connect.NewRequest(&hostv1.PlanRequest{All: true, OverMs: 500, Force: true}))
	if err != nil || len(r.Msg.Candidates) != 2 || r.Msg.Candidates[1].Refused != "" ||
		!strings.Contains(r.Msg.Candidates[1].Beyond, "starve") {
		t.Errorf("%v, %v", r, err)
	}
	if p := a.plan("free 1MiB", false); !p.Met {
		t.Errorf("%v", p)
	}

	e, err := a.evict(best.Vm, best.To)
	if err != nil {
		t.Fatal(err)
	}
	if p := a.pressure(); len(p.Vms) == 0 { // an eviction under way is no reason not to tell
		t.Errorf("%v", p)
	}
	if end, err := a.watch(e.Id, time.Minute); err != nil || end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	for i := 0; ; i++ {
		plan := a.plan("", false)
		if plan.Met && len(plan.Candidates) == 1 && plan.Candidates[0].Refused != "" {
			break
		} else if i == 5 {
			t.Fatalf("host a is not relieved: %v", plan)
		}
	}
	for _, s := range []*site{a, b} {
		if p := s.pressure(); len(p.Vms) != 1 || p.Vms[0].CpuCores < 0.6 || p.Vms[0].Steal > 0.35 {
			t.Errorf("%s: %v", s.name, p)
		}
	}
	vm, err := there[best.Vm].Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	labtest.MustCheck(t, vm)

	for _, r := range []*hostv1.PlanRequest{{Goal: "fast"}, {To: "hostb"}, {Force: true},
		{Except: []string{"small"}}, {All: true, Except: []string{"../x"}},
		{Goal: "cpu<80%", All: true}, {OverMs: 1}, {OverMs: 100_000}} {
		if _, err := a.api.Plan(t.Context(),
			connect.NewRequest(r)); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%v: %v", r, err)
		}
	}
}

// configure adds to a host's configuration.
func (s *site) configure(more string) {
	s.t.Helper()
	name := filepath.Join(s.dir, "vacated.toml")
	b, err := os.ReadFile(name)
	if err == nil {
		err = os.WriteFile(name, append(b, more...), 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// TestGuardVMs has daemons relieve their hosts by themselves, once.
func TestGuardVMs(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	a, b := sites(t, l)
	contend(t, l, a, b)
	for _, s := range []*site{a, b} {
		s.configure("[guard]\nmax_load = 1.5\nsustain = \"1s\"\nsettle = \"500ms\"\ninterval = " +
			"\"500ms\"\n")
		s.start()
	}
	evictions := func() []*hostv1.Eviction {
		r, err := a.api.ListEvictions(labtest.Within(t, time.Minute),
			connect.NewRequest(&hostv1.ListEvictionsRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		return r.Msg.Evictions
	}
	for i := 0; len(evictions()) == 0; i++ {
		if i == 600 {
			t.Fatal("nothing was evicted")
		}
		time.Sleep(100 * time.Millisecond)
	}
	// Which of the two depends on how loaded this machine is just then.
	if end, err := a.watch(evictions()[0].Id, time.Minute); err != nil ||
		end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	// Nothing is to happen for longer than the guard would wait for (sustain, settle, interval).
	time.Sleep(3 * time.Second)
	if n := len(evictions()); n != 1 {
		t.Errorf("%d evictions: %v", n, evictions())
	}
	r, err := a.api.Status(t.Context(), connect.NewRequest(&hostv1.StatusRequest{}))
	if err != nil || r.Msg.Guard == "" || r.Msg.Counters["vacate_guard_evictions_total"] != 1 {
		t.Errorf("%v, %v", r, err)
	}
}

// twoDomains starts two domains of libvirt's on a host, web1 and web2, which is the larger one.
func twoDomains(t *testing.T, slow bool) (*managed, map[string]*libvirtlab.Domain) {
	t.Helper()
	spec := func(hot, idle int) libvirtlab.Spec {
		return libvirtlab.Spec{Once: true, VM: lab.Spec{MemoryMiB: 256, Devices: lab.Full,
			Load: lab.Load{HotMiB: hot, IdleMiB: idle, Slow: slow, Seed: uint64(hot)}}}
	}
	m := startManaged(t, spec(32, 16))
	// It leaves the core to the other one until that has begun, too.
	m.Virsh(m.Hosts.A, "suspend", "web1")
	web2, err := m.Hosts.Start(labtest.Within(t, 3*time.Minute), "web2", spec(80, 40))
	m.Check(err)
	m.Virsh(m.Hosts.A, "resume", "web1")
	return m, map[string]*libvirtlab.Domain{"web1": m.Domain, "web2": web2}
}

// refused returns why a VM stays, by a plan.
func refused(plan *hostv1.PlanResponse, vm string) string {
	for _, c := range plan.Candidates {
		if c.Vm == vm {
			return c.Refused
		}
	}
	return "it is not in the plan"
}

// mark sets what a domain's metadata tells vacate.
func (m *managed) mark(name, element string) {
	m.Virsh(m.Hosts.A, "metadata", name, "urn:vacate:domain:1", "--key", "vacate", "--live",
		"--config", "--set", element)
}

// mustBeAtB checks that a domain that left host a has come, and that its memory is right.
func (m *managed) mustBeAtB(d *libvirtlab.Domain) {
	m.Helper()
	if end, err := m.b.watch(m.a.last(d.Name).Id, time.Minute); err != nil ||
		end.Outcome != "completed" {
		m.Errorf("%s at b: %v, %v", d.Name, end, err)
	}
	if s := m.Virsh(m.Hosts.B, "domstate", "--reason", d.Name); s != "running (migrated)" {
		m.Errorf("%s at b: %s", d.Name, s)
	}
	vm, err := d.Came(labtest.Within(m.T, time.Minute))
	m.Check(err)
	labtest.MustCheck(m.T, vm)
}

// Two domains of libvirt's starve each other on one core. The operator is told of both, and why one
// stays. Then the guard evicts one of them.
func TestRelieveDomains(t *testing.T) {
	m, domains := twoDomains(t, false)
	a, b := m.a, m.b

	a.starves()
	plan := a.plan("", false)
	t.Logf("%v", plan)
	if plan.Met || len(plan.Candidates) != 2 {
		t.Fatalf("%v", plan)
	}
	// Both would be back about as soon, so which of them is better is a matter of chance.
	if best := plan.Candidates[0]; best.To != "hostb" || best.Refused != "" || !best.Meets ||
		best.GainCores < 0.5 {
		t.Errorf("%v", best)
	}
	all := a.plan("", true) // the other host has one core, too
	if refused(all, "web1") != "" || !strings.Contains(refused(all, "web2"), "starve") {
		t.Errorf("%v", all)
	}
	// planned waits for a plan that is as it should be. What else this machine does may be in the
	// way for a while.
	planned := func(what string, ok func(*hostv1.PlanResponse) bool) {
		t.Helper()
		var plan *hostv1.PlanResponse
		for range 30 {
			if plan = a.plan("", false); len(plan.Candidates) == 2 && ok(plan) {
				return
			}
			time.Sleep(time.Second)
		}
		t.Errorf("%s: %v", what, plan)
	}
	m.mark("web1", `<vm pinned="yes"/>`)
	planned("one is pinned", func(plan *hostv1.PlanResponse) bool {
		return refused(plan, "web1") == "the VM is pinned" && refused(plan, "web2") == ""
	})
	for priority, first := range map[int]string{1: "web2", -1: "web1"} {
		m.mark("web1", fmt.Sprintf(`<vm priority="%d"/>`, priority))
		planned("the least goes first", func(plan *hostv1.PlanResponse) bool {
			return plan.Candidates[0].Vm == first && plan.Candidates[1].Refused == ""
		})
	}

	a.stop()
	a.configure("[guard]\nsustain = \"1s\"\nsettle = \"500ms\"\ninterval = \"500ms\"\n" +
		"max_load = 1.5\n")
	a.start()
	first := a.evictions(1)[0]
	if end, err := a.watch(first.Id, 2*time.Minute); err != nil || end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	if r, err := a.api.Status(t.Context(),
		connect.NewRequest(&hostv1.StatusRequest{})); err != nil ||
		r.Msg.Guard == "" || r.Msg.Counters["vacate_guard_evictions_total"] != 1 {
		t.Errorf("%v, %v", r, err)
	}
	for _, s := range []*site{a, b} {
		if p := s.pressure(); len(p.Vms) != 1 || p.Vms[0].CpuCores < 0.6 || p.Vms[0].Steal > 0.35 {
			t.Errorf("%s: %v", s.name, p)
		}
	}
	// Which of the two depends on how loaded this machine is just then.
	m.mustBeAtB(domains[first.Vm])
}

// A domain says in its metadata what plans do with it, and one that is paused stays. The operator
// evicts one after the other. No load of this machine changes that.
func TestPlanDomains(t *testing.T) {
	m, domains := twoDomains(t, true)
	a := m.a
	evacuation := func() *hostv1.PlanResponse {
		t.Helper()
		r, err := a.api.Plan(labtest.Within(t, time.Minute),
			connect.NewRequest(&hostv1.PlanRequest{All: true, OverMs: 200, Force: true}))
		m.Check(err)
		return r.Msg
	}
	for element, why := range map[string]string{
		`<vm pinned="yes"/>`:  "the VM is pinned",
		`<vm pinned="sure"/>`: "want yes or no",
	} {
		m.mark("web1", element)
		if plan := evacuation(); len(plan.Candidates) != 2 ||
			!strings.Contains(refused(plan, "web1"), why) || refused(plan, "web2") != "" {
			t.Errorf("%s: %v", element, plan)
		}
	}
	for priority, first := range map[int]string{1: "web2", -1: "web1"} {
		m.mark("web1", fmt.Sprintf(`<vm priority="%d"/>`, priority))
		if plan := evacuation(); len(plan.Candidates) != 2 || plan.Candidates[0].Vm != first ||
			plan.Candidates[0].Refused != "" || plan.Candidates[1].Refused != "" {
			t.Errorf("the least goes first: %v", plan)
		}
	}
	m.Virsh(m.Hosts.A, "suspend", "web1")
	if why := refused(a.plan("", true), "web1"); !strings.Contains(why, "paused (user)") {
		t.Errorf("it is paused, and stays as %q", why)
	}
	m.Virsh(m.Hosts.A, "resume", "web1")

	for i, name := range []string{"web1", "web2"} {
		if plan := evacuation(); len(plan.Candidates) != 2-i || refused(plan, name) != "" {
			t.Fatalf("%v", plan)
		}
		e, err := a.evict(name, "hostb")
		m.Check(err)
		if end, err := a.watch(e.Id, 2*time.Minute); err != nil || end.Outcome != "completed" {
			t.Fatalf("%v, %v", end, err)
		}
	}
	if out := m.Virsh(m.Hosts.A, "list", "--all", "--name"); out != "" {
		t.Errorf("a still has %q", out)
	}
	for _, d := range domains {
		m.mustBeAtB(d)
	}
}

// evictions waits until the host's journal has so many.
func (s *site) evictions(n int) []*hostv1.Eviction {
	s.t.Helper()
	for ctx := labtest.Within(s.t, 2*time.Minute); ; {
		r, err := s.api.ListEvictions(ctx, connect.NewRequest(&hostv1.ListEvictionsRequest{}))
		if err != nil {
			s.t.Fatalf("%d evictions have not begun: %v", n, err)
		}
		if len(r.Msg.Evictions) >= n {
			return r.Msg.Evictions
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// last returns the last eviction of a VM.
func (s *site) last(vm string) *hostv1.Eviction {
	s.t.Helper()
	r, err := s.api.ListEvictions(labtest.Within(s.t, time.Minute),
		connect.NewRequest(&hostv1.ListEvictionsRequest{Vm: vm}))
	if err != nil || len(r.Msg.Evictions) == 0 {
		s.t.Fatalf("%v, %v", r, err)
	}
	return r.Msg.Evictions[len(r.Msg.Evictions)-1]
}

func TestGuardConfig(t *testing.T) {
	read := func(text string) (Config, error) {
		file := filepath.Join(t.TempDir(), "vacated.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return ReadConfig(file)
	}
	if c, err := read(""); err != nil || c.Guard != nil {
		t.Errorf("off unless it is there: %+v, %v", c.Guard, err)
	}
	c, err :=
		read("[guard]\ngoal = \"cpu<90%\"\nsustain = \"10s\"\ncool_down = \"2h\"\nreserve = 0.0\n")
	if err != nil {
		t.Fatal(err)
	}
	if p, err := c.Guard.policy(); err != nil || p.Goal.CPU != 0.9 || p.Sustain != 10*time.Second ||
		p.CoolDown != 2*time.Hour || p.Limits.Reserve != 0 || p.Settle != time.Minute ||
		p.Concurrent != 1 || p.Limits.MaxLoad != 0.8 {
		t.Errorf("%+v, %v", p, err)
	}
	for _, wrong := range []string{"goal = \"fast\"", "max_load = -1.0", "max_load = nan",
		"reserve = 1.0", "sustain = \"-1s\"", "sustain = \"soon\"", "interval = \"1ms\"",
		"interval = \"2h\"", "concurrent = -1", "speed = 1"} {
		if c, err := read(fmt.Sprintf("[guard]\n%s\n", wrong)); err == nil {
			t.Errorf("%s: %+v", wrong, c.Guard)
		}
	}
}

// TestLoadOfPeers refuses what no host is like.
func TestLoadOfPeers(t *testing.T) {
	good := loadAnswer{CPUs: 4, Used: 2, Waiting: 1, Total: 8 << 30, Available: 4 << 30}
	if err := good.check(); err != nil {
		t.Error(err)
	}
	for _, change := range []func(*loadAnswer){
		func(a *loadAnswer) { a.CPUs = 0 }, func(a *loadAnswer) { a.CPUs = 1e9 },
		func(a *loadAnswer) { a.Used = -1 },
		func(a *loadAnswer) { a.Waiting = 1e300 }, func(a *loadAnswer) { a.Available = 1 << 62 },
	} {
		a := good
		change(&a)
		if err := a.check(); err == nil {
			t.Errorf("%+v", a)
		}
	}
}
