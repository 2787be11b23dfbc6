package host

import (
	"os"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"
)

func (s *site) startVM(name string, fenced ...string) (*hostv1.VM, error) {
	r, err := s.api.Start(labtest.Within(s.t, time.Minute),
		connect.NewRequest(&hostv1.StartRequest{Vm: name, Fenced: fenced}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

func (s *site) stopVM(name string, limit time.Duration, force bool) error {
	_, err := s.api.Stop(labtest.Within(s.t, 2*time.Minute),
		connect.NewRequest(&hostv1.StopRequest{Vm: name, TimeoutMs: uint32(limit.Milliseconds()),
			Force: force}))
	return err
}

// refusedWith fails unless an error is of a code and says something.
func refusedWith(t *testing.T, err error, code connect.Code, say string) {
	t.Helper()
	if connect.CodeOf(err) != code || err == nil || !strings.Contains(err.Error(), say) {
		t.Errorf("got %v, want %v with %q", err, code, say)
	}
}

// A VM starts only where no other host has it, whatever its journal says.
func TestStart(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	a, b := sites(t, l)
	vm := boot(t, l.A, lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 32, IdleMiB: 32}})
	a.describe("web1", vm.QMP, vm.Args)
	there := b.expect("web1", vm)
	a.start()
	b.start()
	_, err := b.startVM("web1")
	refusedWith(t, err, connect.CodeFailedPrecondition, "on host hosta it is there, running")
	_, err = a.startVM("web1")
	refusedWith(t, err, connect.CodeFailedPrecondition, "on host hosta it is there, running")

	e, err := a.evictAt("web1", "hostb", 20e6)
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.startVM("web1")
	refusedWith(t, err, connect.CodeAlreadyExists, "is being evicted already")
	refusedWith(t, a.stopVM("web1", time.Second, true), connect.CodeAlreadyExists,
		"is being evicted already")
	if end, err := a.watch(e.Id, time.Minute); err != nil || end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	_, err = a.startVM("web1")
	refusedWith(t, err, connect.CodeFailedPrecondition, "on host hostb it is there, running")

	b.kill()
	_, err = a.startVM("web1")
	refusedWith(t, err, connect.CodeFailedPrecondition, "host hostb does not say whether it has it")
	b.start()
	twin, err := there.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	labtest.MustCheck(t, twin)

	// Its guest has no driver for the power button.
	refusedWith(t, b.stopVM("web1", time.Second, false), connect.CodeFailedPrecondition,
		"it runs on")
	if err := b.stopVM("web1", 0, true); err != nil {
		t.Fatal(err)
	}
	refusedWith(t, b.stopVM("web1", 0, true), connect.CodeFailedPrecondition,
		"has no QEMU on host hostb")
	// What the lab's VMs have besides is not there any more.
	a.describe("web1", vm.QMP,
		[]string{vm.Args[0], "-nodefaults", "-display", "none", "-machine", "pc,accel=tcg", "-m",
			"64",
			"-qmp", "unix:" + vm.QMP + ",server=on,wait=off"})
	_, err = a.startVM("web1", "hosta")
	refusedWith(t, err, connect.CodeInvalidArgument, "is this host")
	here, err := a.startVM("web1")
	if err != nil || here.State != "running" {
		t.Fatalf("%v, %v", here, err)
	}
	if err := a.stopVM("web1", 0, true); err != nil {
		t.Error(err)
	}
	// With hostb off, on an operator's word.
	b.kill()
	if here, err = a.startVM("web1", "hostb"); err != nil || here.State != "running" {
		t.Fatalf("%v, %v", here, err)
	}
	if err := a.stopVM("web1", 0, true); err != nil {
		t.Error(err)
	}
	log, err := os.ReadFile(a.log.Name())
	for _, line := range []string{"asks=Start vm=web1 fenced=[hostb]",
		"asks=Stop vm=web1 force=true"} {
		if err != nil || !strings.Contains(string(log), line) {
			t.Errorf("the log lacks %q: %v", line, err)
		}
	}
}

// Which host has a VM by the journal.
func TestLeft(t *testing.T) {
	for _, c := range []struct {
		role journal.Role
		mark evict.Mark
		want string
	}{
		{journal.Source, evict.MarkCompleted, "hostb"},
		{journal.Source, evict.MarkDiscarded, "hostb"}, {journal.Source, evict.MarkLost, "hostb"},
		{journal.Source, evict.MarkRolledBack, ""}, {journal.Source, evict.MarkResumedHere, ""},
		{journal.Source, evict.MarkShutDown, ""},
		{journal.Destination, evict.MarkCompleted, ""},
		{journal.Destination, evict.MarkShutDown, ""},
		{journal.Destination, evict.MarkNeverRan, "hostb"},
		{journal.Destination, evict.MarkLost, "hostb"},
	} {
		h, _ := measured(t)
		entry, err := h.journal.Create(journal.Record{ID: journal.NewID(), Role: c.role, VM: "db1",
			Peer: "hostb", Mark: string(c.mark)})
		if err != nil {
			t.Fatal(err)
		}
		h.add(h.newEviction(entry))
		if got := h.left("db1"); got != c.want {
			t.Errorf("%s, %s: host %q has it, want %q", c.role, c.mark, got, c.want)
		}
		if got := h.left("web2"); got != "" {
			t.Errorf("host %q has a VM that was never evicted", got)
		}
	}
}
