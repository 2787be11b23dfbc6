package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"

	hostv1 "vacate/internal/host/api/v1"
)

// set has the daemon's configuration begin with a line.
func (s *site) set(line string) {
	s.t.Helper()
	file := filepath.Join(s.dir, "vacated.toml")
	b, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, append([]byte(line+"\n"), b...), 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// shared is how much shared memory a process uses, in KiB.
func shared(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "RssShmem:")
	n, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// giving evicts a VM whose host wants its memory back at once, and returns when it has some, long
// before the end.
func giving(t *testing.T, spec lab.Spec) *run {
	l := labtest.New(t, lab.Options{Rate: 1e8})
	r := &run{t: t, lab: l, vm: boot(t, l.A, spec)}
	r.a, r.b = sites(t, l)
	r.a.set(`give_back = "1ms"`)
	r.a.describe("web1", r.vm.QMP, r.vm.Args)
	r.expected = r.b.expect("web1", r.vm)
	r.a.start()
	r.b.start()
	before := shared(t, r.vm.PID())
	e, err := r.a.evict("web1", "hostb")
	if err != nil {
		t.Fatal(err)
	}
	r.eviction = e.Id
	for limit := time.Now().Add(30 * time.Second); shared(t,
		r.vm.PID()) > before-20<<10; time.Sleep(20 * time.Millisecond) {
		if e := r.look(r.a); e.Outcome != "" || time.Now().After(limit) {
			t.Fatalf("QEMU had %d KiB, and has %d: %v", before, shared(t, r.vm.PID()), e)
		}
	}
	if e := r.look(r.a); e.Outcome != "" {
		t.Fatalf("it is over: %v", e)
	}
	return r
}

var shareable = lab.Spec{MemoryMiB: 256, Memfd: true, Load: lab.Load{HotMiB: 32, IdleMiB: 96}}

// Memory that the destination has is given back while the rest is on its way; nothing is lost for
// it, whichever engine dies in between.
func TestGiveBack(t *testing.T) {
	r := giving(t, shareable)
	r.b.kill()
	r.a.kill()
	r.b.start()
	r.a.start()
	end, err := r.a.watch(r.eviction, time.Minute)
	if err != nil || end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	if n := reportOf(t, end).Pages.GivenBack; n < 1000 {
		t.Errorf("%d pages were given back after the restart", n)
	}
	twin, err := r.expected.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	labtest.MustCheck(t, twin)
	r.clean()
}

// What is left of a VM when its twin dies then is not run, nor saved as if it were whole.
func TestGiveBackAndLose(t *testing.T) {
	r := giving(t, shareable)
	twin, err := r.expected.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	twin.Kill()
	var e *hostv1.Eviction
	for limit := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if e = r.look(r.a); e.Decidable && e.Outcome == string(evict.Lost) {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("%v", e)
		}
	}
	if len(e.Remedy) != 1 || !strings.Contains(e.Remedy[0], "discard") ||
		!strings.Contains(e.Reason, "given back") {
		t.Errorf("the operator is told %q, %q", e.Reason, e.Remedy)
	}
	if words := "it left no message in " +
		filepath.Join(r.b.dir, "web1.log"); !strings.Contains(e.Reason, words) {
		t.Errorf("the reason is %q, and does not say %q", e.Reason, words)
	}
	for range 2 {
		_, err = r.a.api.Decide(t.Context(),
			connect.NewRequest(&hostv1.DecideRequest{Id: e.Id,
				Decision: hostv1.Decision_DECISION_RESUME_HERE, Confirm: "web1"}))
		if err == nil || !strings.Contains(err.Error(), "given back") {
			t.Errorf("resume here: %v", err)
		}
		_, err = r.a.api.Export(t.Context(),
			connect.NewRequest(&hostv1.ExportRequest{Id: e.Id,
				Path: filepath.Join(r.a.dir, "saved")}))
		if err == nil || !strings.Contains(err.Error(), "given back") {
			t.Errorf("export: %v", err)
		}
		if s := status(r.vm); s == "running" || s == "" {
			t.Errorf("the VM is %q", s)
		}
		// It is known to those who come later, too.
		r.a.kill()
		r.a.start()
		for limit := time.Now().Add(time.Minute); !r.look(r.a).Decidable; time.Sleep(20 *
			time.Millisecond) {
			if time.Now().After(limit) {
				t.Fatalf("%v", r.look(r.a))
			}
		}
	}
	if _, err := r.a.api.Decide(t.Context(),
		connect.NewRequest(&hostv1.DecideRequest{Id: e.Id,
			Decision: hostv1.Decision_DECISION_DISCARD, Confirm: "web1"})); err != nil {
		t.Error(err)
	}
}
