package host

import (
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"

	hostv1 "vacate/hostapi/v1"

	"connectrpc.com/connect"
)

// A VM goes to the other host by its name, and comes back; daemons that are started anew find it.
func TestThereAndBack(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	a, b := sites(t, l)
	vm := boot(t, l.A, lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 32, IdleMiB: 32}})
	a.describe("web1", vm.QMP, vm.Args)
	there := b.expect("web1", vm)
	a.start()
	b.start()
	e, err := a.evict("web1", "hostb")
	if err != nil {
		t.Fatal(err)
	}
	end, err := a.watch(e.Id, time.Minute)
	if err != nil || end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	if end, err = b.watch(e.Id, time.Minute); err != nil || end.Outcome != "completed" || end.Role != "destination" || end.Peer != "hosta" {
		t.Fatalf("%v, %v", end, err)
	}
	trace, err := a.api.GetTrace(t.Context(), connect.NewRequest(&hostv1.GetTraceRequest{Id: e.Id}))
	if err != nil || len(trace.Msg.Trace) < 1000 {
		t.Errorf("trace: %v, %v", trace, err)
	}
	if _, err := b.api.GetTrace(t.Context(), connect.NewRequest(&hostv1.GetTraceRequest{Id: e.Id})); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("trace at the destination: %v", err)
	}
	twin, err := there.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Wait(labtest.Within(t, 10*time.Second)); err == nil && vm.Alive() {
		t.Error("the source's QEMU is still there")
	}
	back := a.expect("web1", twin)
	b.stop()
	a.kill()
	b.start()
	a.start()
	vms, err := b.api.ListVMs(t.Context(), connect.NewRequest(&hostv1.ListVMsRequest{}))
	if err != nil || len(vms.Msg.Vms) != 1 || vms.Msg.Vms[0].State != "running" || vms.Msg.Vms[0].EvictionId != "" {
		t.Fatalf("%v, %v", vms, err)
	}
	if e, err = b.evict("web1", "hosta"); err != nil {
		t.Fatal(err)
	}
	if end, err := b.watch(e.Id, time.Minute); err != nil || end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	vm, err = back.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	labtest.MustCheck(t, vm)
}
