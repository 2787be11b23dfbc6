package host

import (
	"strings"
	"testing"
	"time"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"
)

// The pre-flight finds nothing fatal between two hosts of the lab, and refuses an eviction that
// cannot succeed before the VM is touched.
func TestDoctor(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	a, b := sites(t, l)
	vm := boot(t, l.A, lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 16}})
	a.describe("web1", vm.QMP, vm.Args)
	a.start()
	b.start()
	examine := func() map[string]*hostv1.Finding {
		t.Helper()
		r, err := a.api.Doctor(labtest.Within(t, time.Minute),
			connect.NewRequest(&hostv1.DoctorRequest{Vm: "web1", To: "hostb"}))
		if err != nil {
			t.Fatal(err)
		}
		worst := map[string]*hostv1.Finding{}
		for _, f := range r.Msg.Findings {
			t.Logf("%v %s %s: %s; %s", f.Level, f.Host, f.Check, f.Text, f.Remedy)
			if old := worst[f.Check]; old == nil || old.Level < f.Level {
				worst[f.Check] = f
			}
		}
		return worst
	}
	fatal := func() (list []string) {
		for check, f := range examine() {
			if f.Level == hostv1.Level_LEVEL_FATAL {
				list = append(list, check)
			}
		}
		return list
	}
	if list := fatal(); len(list) != 1 {
		t.Errorf("without a description on the other host: %v; want one finding", list)
	}
	_, err := a.api.Evict(labtest.Within(t, time.Minute),
		connect.NewRequest(&hostv1.EvictRequest{Vm: "web1", To: "hostb"}))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition ||
		!strings.Contains(err.Error(), "web1") {
		t.Errorf("evicted to where it is not described: %v", err)
	}
	b.expect("web1", vm)
	if list := fatal(); len(list) != 0 {
		t.Errorf("fatal findings: %v", list)
	}
	b.kill()
	if f := examine()["link"]; f == nil || f.Level != hostv1.Level_LEVEL_FATAL {
		t.Errorf("nobody answers there, and the finding is %v", f)
	}
	if status, err := vm.Status(t.Context()); err != nil || status != "running" {
		t.Errorf("the VM is %q, %v", status, err)
	}
}
