package host

import (
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

// A guest powers itself off on the destination while no daemon looks after it and most of its
// memory is on the source. The daemons find that out, say so, and leave nothing behind; and nobody
// is offered, or may have, the old copy resumed.
func TestShutDown(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 4e7})
	r := newRun(t, l,
		lab.Spec{MemoryMiB: 192, Load: lab.Load{HotMiB: 8, IdleMiB: 56}})
	r.a.start()
	r.b.start("destination/running")
	e, err := r.a.evict("web1", "hostb")
	if err != nil {
		t.Fatal(err)
	}
	r.eviction = e.Id
	if !r.b.reach("destination/running", 30*time.Second) {
		t.Fatal("the VM was not told to run on the destination")
	}
	r.b.release("destination/running")
	twin, err := r.expected.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	// Without a daemon there it cannot power itself off while it waits for a page: those that it is
	// likely to need should have come. The others must take longer than it takes to power off.
	for limit := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		e := r.look(r.a)
		if p := e.GetProgress(); p != nil && p.PagesTotal > 0 && p.PagesSent > p.PagesTotal*80/100 {
			break
		}
		if e.Outcome != "" || time.Now().After(limit) {
			t.Fatalf("%v", e)
		}
	}
	if err := r.vm.Guest.PowerOff(twin); err != nil {
		t.Fatal(err)
	}
	r.b.kill()
	for limit := time.Now().Add(3 * time.Second); status(twin) != "shutdown" &&
		time.Now().Before(limit); {
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("before the daemon is back the VM is %q there", status(twin))
	r.b.start()
	var src, dst *hostv1.Eviction
	for limit := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		src, dst = r.look(r.a), r.look(r.b)
		if src.EndedAt != nil && dst.EndedAt != nil {
			break
		}
		if src.Outcome == string(evict.Lost) || time.Now().After(limit) {
			t.Fatalf("source %v; destination %v", src, dst)
		}
	}
	for _, e := range []*hostv1.Eviction{src, dst} {
		if e.Outcome != "shut down" || e.Mark != string(evict.MarkShutDown) || e.State != "" ||
			e.Decidable || len(e.Remedy) > 0 {
			t.Errorf("the %s says %v", e.Role, e)
		}
		if !strings.Contains(e.Reason, "the guest ended itself") {
			t.Errorf("the %s gives the reason %q", e.Role, e.Reason)
		}
	}
	if report, err := src.Report.Engine(); err != nil ||
		report.Outcome != "shut down" || report.Reason != src.Reason {
		t.Errorf("the report says %+v, %v", report, err)
	}
	for _, vm := range []*lab.VM{r.vm, twin} {
		if err := vm.Ended(labtest.Within(t, 10*time.Second)); err != nil {
			t.Errorf("the QEMU on host %s: %v", vm.Host.Name, err)
		}
	}
	_, err = r.a.api.Decide(t.Context(),
		connect.NewRequest(&hostv1.DecideRequest{Id: e.Id,
			Decision: hostv1.Decision_DECISION_RESUME_HERE, Confirm: "web1"}))
	if err == nil || !strings.Contains(err.Error(), "has ended: shut down") {
		t.Errorf("resume here: %v", err)
	}
	for _, s := range []*site{r.a, r.b} {
		vms, err := s.api.ListVMs(t.Context(), connect.NewRequest(&hostv1.ListVMsRequest{}))
		if err != nil || len(vms.Msg.Vms) != 1 || vms.Msg.Vms[0].State != "none" {
			t.Errorf("%s has %v, %v", s.name, vms, err)
		}
		status, err := s.api.Status(t.Context(), connect.NewRequest(&hostv1.StatusRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		role := map[*site]journal.Role{r.a: journal.Source, r.b: journal.Destination}[s]
		if n := status.Msg.Counters["vacate_evictions_ended_total outcome=shut down role="+
			string(role)]; n != 1 {
			t.Errorf("%s counts %v", s.name, status.Msg.Counters)
		}
	}
	r.clean()
	// It is known to those who come later, too.
	r.a.kill()
	r.a.start()
	if e := r.look(r.a); e.Outcome != "shut down" || e.Decidable {
		t.Errorf("after a restart the source says %v", e)
	}
}
