package host

import (
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"
)

// A VM that an operator has paused is evicted, and nobody runs it, nor do daemons that are killed
// in the middle. An operator may have it back at the source, where it is paused as before.
func TestStanding(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	r := newRun(t, l,
		lab.Spec{MemoryMiB: 320, Load: lab.Load{HotMiB: 32, IdleMiB: 128}})
	r.a.start()
	r.b.start()
	do := func(vm *lab.VM, command string) {
		t.Helper()
		if err := vm.Execute(labtest.Within(t, 20*time.Second), command, nil, nil); err != nil {
			t.Fatalf("%s: %v", command, err)
		}
	}
	is := func(s *site, want string) {
		t.Helper()
		vms, err := s.api.ListVMs(t.Context(), connect.NewRequest(&hostv1.ListVMsRequest{}))
		if err != nil || len(vms.Msg.Vms) != 1 || vms.Msg.Vms[0].State != want {
			t.Errorf("on %s it is to be %q: %v, %v", s.name, want, vms, err)
		}
	}
	begin := func(checks bool) {
		t.Helper()
		e, err := r.a.evictWith("web1", "hostb",
			&hostv1.EvictOptions{SkipChecks: !checks, RateLimit: 10 << 20})
		if err != nil {
			t.Fatal(err)
		}
		r.eviction = e.Id
		at := r.wait(r.b, "arriving",
			func(e *hostv1.Eviction) bool {
				return e.State == string(evict.Running) && e.Progress.PagesSent > 1000
			})
		if at.Progress.Stands != "paused" {
			t.Errorf("at the destination: %v", at)
		}
	}
	do(r.vm, "stop")
	// An evacuation moves it; it is no relief to a host that is short of CPU.
	p, err := r.a.api.Plan(labtest.Within(t, time.Minute),
		connect.NewRequest(&hostv1.PlanRequest{All: true, Force: true}))
	if err != nil || len(p.Msg.Candidates) != 1 || p.Msg.Candidates[0].Refused != "" ||
		p.Msg.Candidates[0].To != "hostb" {
		t.Errorf("an evacuation of it: %v, %v", p, err)
	}
	if p, err = r.a.api.Plan(labtest.Within(t, time.Minute),
		connect.NewRequest(&hostv1.PlanRequest{Goal: "cpu<1%"})); err != nil ||
		len(p.Msg.Candidates) > 0 && p.Msg.Candidates[0].Refused == "" {
		t.Errorf("relief of the host by it: %v, %v", p, err)
	}
	begin(true)
	is(r.a, "frozen")
	is(r.b, "paused")
	// An operator's word takes the frozen copy back, and leaves it paused.
	r.b.kill()
	r.wait(r.a, "out of reach",
		func(e *hostv1.Eviction) bool {
			return e.Decidable && e.State == string(evict.Reconnecting)
		})
	twin, err := r.expected.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	twin.Kill()
	if err := r.say(r.a, hostv1.Decision_DECISION_RESUME_HERE, "hostb", false); err != nil {
		t.Fatal(err)
	}
	if e := r.over(r.a, "resumed here"); !strings.Contains(e.Reason,
		"as before the eviction, the VM is paused") {
		t.Errorf("resumed here: %q", e.Reason)
	}
	is(r.a, "paused")
	r.b.start()
	if e := r.over(r.b, "lost contact"); e == nil {
		t.Error("nothing is known at the destination")
	}

	// Once more, and both daemons are killed in the middle.
	r.expected = r.b.expect("web1", r.vm)
	r.b.kill()
	r.b.start()
	begin(false)
	r.b.kill()
	r.a.kill()
	r.a.start()
	r.b.start()
	e := r.wait(r.b, "arriving again",
		func(e *hostv1.Eviction) bool { return e.State == string(evict.Running) })
	if e.Progress.Stands != "paused" {
		t.Errorf("after a restart: %v", e)
	}
	if twin, err = r.expected.Started(labtest.Within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if s := status(twin); s != "paused" {
		t.Errorf("after a restart the twin is %q", s)
	}
	end, err := r.a.watch(r.eviction, time.Minute)
	if err != nil || end.Outcome != "completed" ||
		end.Report.GetStood() != "paused" || end.Report.DownTimeS != nil {
		t.Fatalf("%v, %v", end, err)
	}
	is(r.a, "none")
	is(r.b, "paused")
	if s := status(twin); s != "paused" {
		t.Errorf("in the end the twin is %q", s)
	}
	do(twin, "cont")
	if err := twin.Guest.WaitOps(labtest.Within(t, time.Minute), 1000); err != nil {
		t.Error(err)
	}
	labtest.MustCheck(t, twin)
}

// An operator may pause the VM while its memory comes to the destination. It stays paused, also
// where the daemon there dies and the next one goes on.
func TestPausedThere(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	r := &run{t: t, lab: l}
	r.vm = boot(t, l.A, lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 32, IdleMiB: 64}})
	r.a, r.b = sites(t, l)
	r.a.describe("web1", r.vm.QMP, r.vm.Args)
	r.expected = r.b.expect("web1", r.vm)
	r.a.start()
	r.b.start()
	e, err := r.a.evictAt("web1", "hostb", 5<<20)
	if err != nil {
		t.Fatal(err)
	}
	r.eviction = e.Id
	arriving := func(e *hostv1.Eviction) bool {
		return e.State == string(evict.Running) && e.Progress.PagesSent > 1000
	}
	r.wait(r.b, "arriving", arriving)
	twin, err := r.expected.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	do := func(command string) {
		t.Helper()
		if err := twin.Execute(labtest.Within(t, 20*time.Second), command, nil, nil); err != nil {
			t.Fatalf("%s: %v", command, err)
		}
	}
	do("stop")
	r.b.kill()
	r.b.start()
	r.wait(r.b, "arriving again", arriving)
	if s := status(twin); s != "paused" {
		t.Errorf("after a restart the twin is %q", s)
	}
	end, err := r.a.watch(r.eviction, 2*time.Minute)
	if err != nil || end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	if s := status(twin); s != "paused" {
		t.Errorf("in the end the twin is %q", s)
	}
	do("cont")
	labtest.MustCheck(t, twin)
}
