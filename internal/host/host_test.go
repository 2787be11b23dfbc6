package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/lab"
	"vacate/lab/labtest"

	hostv1 "vacate/internal/host/api/v1"

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
	slowTwin(t, a, b, there)
	e, err := a.evict("web1", "hostb")
	if err != nil {
		t.Fatal(err)
	}
	end, err := a.watch(e.Id, time.Minute)
	if err != nil || end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	if end, err = b.watch(e.Id, time.Minute); err != nil || end.Outcome != "completed" ||
		end.Role != "destination" || end.Peer != "hosta" {
		t.Fatalf("%v, %v", end, err)
	}
	trace, err := a.api.GetTrace(t.Context(), connect.NewRequest(&hostv1.GetTraceRequest{Id: e.Id}))
	if err != nil || len(trace.Msg.Trace) < 1000 {
		t.Errorf("trace: %v, %v", trace, err)
	}
	if _, err := a.api.GetMap(t.Context(),
		connect.NewRequest(&hostv1.GetMapRequest{Id: e.Id})); connect.CodeOf(err) !=
		connect.CodeNotFound {
		t.Errorf("map of an eviction that has ended: %v", err)
	}
	if _, err := b.api.GetTrace(t.Context(),
		connect.NewRequest(&hostv1.GetTraceRequest{Id: e.Id})); connect.CodeOf(err) !=
		connect.CodeNotFound {
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
	if err != nil || len(vms.Msg.Vms) != 1 || vms.Msg.Vms[0].State != "running" ||
		vms.Msg.Vms[0].EvictionId != "" {
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

// A twin may take long to start: for how long, its description says, and the source says what is
// awaited. An abort ends it.
func slowTwin(t *testing.T, a, b *site, there *lab.Expected) {
	t.Helper()
	file := filepath.Join(b.vms, "web1.toml")
	quick, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	slow := func(seconds int, more string) {
		t.Helper()
		script := filepath.Join(b.dir, "slow")
		text := fmt.Sprintf("#!/bin/sh\nsleep %d\nexec %s \"$@\"\n", seconds, there.Args[0])
		if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		b.describe("web1", there.QMP, append([]string{script}, there.Args[1:]...))
		text = strings.Replace(string(must(t, os.ReadFile, file)), patient, more, 1)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	begin := func() *hostv1.Eviction {
		t.Helper()
		e, err := a.evict("web1", "hostb")
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	slow(60, `start_timeout = "2s"`)
	end, err := a.watch(begin().Id, time.Minute)
	if err != nil || end.Outcome != "refused" ||
		!strings.Contains(end.Reason,
			"QEMU did not answer at "+there.QMP+" within 2s and was ended") ||
		!strings.Contains(end.Reason, "set start_timeout in "+file) {
		t.Errorf("%v, %v", end, err)
	}

	slow(60, `start_timeout = "2m"`)
	e := begin()
	stream, err := a.api.WatchEviction(labtest.Within(t, time.Minute),
		connect.NewRequest(&hostv1.WatchEvictionRequest{Id: e.Id}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for told := false; stream.Receive(); {
		p := stream.Msg().GetProgress()
		if !told && p.GetAwaits() == "host hostb starts a QEMU for VM web1" && p.AwaitedS >= 1 {
			told = true
			if _, err := a.api.Abort(t.Context(),
				connect.NewRequest(&hostv1.AbortRequest{Id: e.Id})); err != nil {
				t.Error(err)
			}
		}
		if m := stream.Msg(); m.Outcome != "" && (m.Outcome != "aborted" || !told) {
			t.Errorf("it was told what is awaited: %v; %v", told, m)
		}
	}
	if end, err := b.watch(e.Id, 20*time.Second); err != nil || end.Outcome != "refused" {
		t.Errorf("at the destination: %v, %v", end, err)
	}
	if err := os.WriteFile(file, quick, 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, read func(string) ([]byte, error), name string) []byte {
	t.Helper()
	b, err := read(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// That the destination has no memory is the reason for which an eviction does not go on, for as
// long as that is so.
func TestShortReason(t *testing.T) {
	v := &eviction{host: &Host{}, changed: make(chan struct{})}
	for i, step := range []struct {
		state evict.State
		short string
	}{
		{evict.Running, ""}, {evict.Running, "no memory"}, {evict.CutOff, "no memory"},
		{evict.Running, "no memory"}, {evict.Running, "still none"}, {evict.Running, ""},
	} {
		v.show(evict.Progress{State: step.state, Short: step.short})
		if v.reason != step.short {
			t.Errorf("step %d, %s: the reason is %q, want %q", i, step.state, v.reason, step.short)
		}
	}
}
