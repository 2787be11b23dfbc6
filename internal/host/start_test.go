package host

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/link"
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

// small is the command line of a QEMU with little memory and no guest.
func small(program, qmp string) []string {
	return []string{program, "-nodefaults", "-display", "none", "-machine", "pc,accel=tcg", "-m",
		"64", "-qmp", "unix:" + qmp + ",server=on,wait=off"}
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
	for _, s := range []*site{a, b} { // the destination's end may come later
		if end, err := s.watch(e.Id, time.Minute); err != nil || end.Outcome != "completed" {
			t.Fatalf("%v, %v", end, err)
		}
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
	a.describe("web1", vm.QMP, small(vm.Args[0], vm.QMP))
	_, err = a.startVM("web1", "hosta")
	refusedWith(t, err, connect.CodeInvalidArgument, "is this host")
	here, err := a.startVM("web1")
	if err != nil || here.State != "running" {
		t.Fatalf("%v, %v", here, err)
	}
	if err := a.stopVM("web1", 0, true); err != nil {
		t.Error(err)
	}
	// On an operator's word, which does not count while hostb can be asked.
	b.describe("web1", there.QMP, small(vm.Args[0], there.QMP))
	if there, err := b.startVM("web1"); err != nil || there.State != "running" {
		t.Fatalf("%v, %v", there, err)
	}
	_, err = a.startVM("web1", "hostb")
	refusedWith(t, err, connect.CodeFailedPrecondition, "on host hostb it is there, running")
	if err := b.stopVM("web1", 0, true); err != nil {
		t.Fatal(err)
	}
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

// A QEMU that a daemon was starting when it died is there, though it does not answer yet.
func TestStartInterrupted(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	a, b := sites(t, l)
	hold, begun := filepath.Join(a.dir, "hold"), filepath.Join(a.dir, "begun")
	script := filepath.Join(a.dir, "qemu")
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	text := "#!/bin/sh\necho $$ >" + begun + "\nwhile test -e " + hold + "; do sleep 0.1; done\n" +
		"exec " + qemu + " \"$@\"\n"
	if err := errors.Join(os.WriteFile(hold, nil, 0o600),
		os.WriteFile(script, []byte(text), 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*site{a, b} {
		qmp := filepath.Join(s.dir, "web1.qmp")
		s.describe("web1", qmp, small(script, qmp))
		s.start()
	}
	go a.api.Start(t.Context(), connect.NewRequest(&hostv1.StartRequest{Vm: "web1"}))
	for limit := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if pid, err := os.ReadFile(begun); err == nil && len(pid) > 0 {
			break
		}
		if time.Now().After(limit) {
			t.Fatal("nothing was started")
		}
	}
	a.kill()
	a.start()
	_, err = b.startVM("web1")
	refusedWith(t, err, connect.CodeFailedPrecondition, "on host hosta it is there, starting")
	_, err = a.startVM("web1")
	refusedWith(t, err, connect.CodeFailedPrecondition, "on host hosta it is there, starting")
	if err := os.Remove(hold); err != nil {
		t.Fatal(err)
	}
	for limit := time.Now().Add(time.Minute); a.stopVM("web1", 0, true) != nil; {
		if time.Now().After(limit) {
			t.Fatal("the QEMU never answered")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// answering is a host that answers whether it is clear of a VM, one time after the other.
func answering(t *testing.T, answers ...func() vmAnswer) Peer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sessions := link.NewListener(ln, link.ListenOptions{})
	t.Cleanup(func() { sessions.Close() })
	go func() {
		defer sessions.Close()
		for _, answer := range answers {
			s, err := sessions.Accept(t.Context())
			if err != nil {
				return
			}
			if r, err := evict.ReadRequest(t.Context(), s); err == nil {
				r.Tell(answer())
			}
		}
	}()
	return Peer{Address: ln.Addr().String()}
}

// While the other hosts are asked, the VM may move from one that is asked late to one that was
// asked early. Then it is not started.
func TestStartWhileMoved(t *testing.T) {
	clear := func(last string) func() vmAnswer {
		a := vmAnswer{Presence: evict.Presence{Clear: true, Last: last}}
		return func() vmAnswer { return a }
	}
	start := func(b, c Peer) error {
		h := &Host{
			config: Config{Name: "hosta", VMs: t.TempDir(),
				Peers: map[string]Peer{"hostb": b, "hostc": c}},
			evictions: map[journal.ID]*eviction{}, taken: map[string]bool{"web1": true},
		}
		return h.clearOf(labtest.Within(t, time.Minute), "web1", nil)
	}
	if err := start(answering(t, clear("1"), clear("1")),
		answering(t, clear(""), clear(""))); err != nil {
		t.Errorf("a VM that no host has: %v", err)
	}
	asked := make(chan bool)
	err := start(answering(t, func() vmAnswer {
		defer close(asked)
		return clear("1")()
	}, func() vmAnswer {
		return vmAnswer{Presence: evict.Presence{Last: "2"}, Why: "it is there, running"}
	}), answering(t, func() vmAnswer {
		<-asked // it goes to hostb now
		a := clear("2")()
		a.Left = "hostb"
		return a
	}, clear("2")))
	if err == nil || !strings.Contains(err.Error(), "it was moved from or to host hostb just now") {
		t.Errorf("a VM that moved meanwhile: %v", err)
	}
	// There and back.
	err = start(answering(t, clear("1"), clear("3")), answering(t, clear("1"), clear("3")))
	if err == nil || !strings.Contains(err.Error(), "just now: try again") {
		t.Errorf("a VM that moved there and back meanwhile: %v", err)
	}
	err = start(answering(t, clear("1")), answering(t, clear(""), clear("")))
	if err == nil || !strings.Contains(err.Error(), "does not answer any more") {
		t.Errorf("a host that answers once: %v", err)
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
		if got := h.left("db1"); got.Left != c.want || got.Last != entry.ID().String() {
			t.Errorf("%s, %s: host %q has it by %s, want %q", c.role, c.mark, got.Left, got.Last,
				c.want)
		}
		if got := h.left("web2"); got != (vmAnswer{}) {
			t.Errorf("%v of a VM that was never evicted", got)
		}
	}
}
