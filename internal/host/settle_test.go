package host

import (
	"syscall"
	"testing"
	"time"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"
)

// A daemon that settles before it stops costs no eviction, at either host.
func TestSettle(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	a, b := sites(t, l)
	vm := boot(t, l.A, lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 32, IdleMiB: 32}})
	a.describe("web1", vm.QMP, vm.Args)
	there := b.expect("web1", vm)
	a.describe("web2", vm.QMP, vm.Args)
	b.describe("web2", there.QMP, there.Args)
	a.start("source/preparing")
	b.start("destination/waiting")
	e, err := a.evictAt("web1", "hostb", 20e6)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []struct {
		*site
		held string
	}{{a, "source/preparing"}, {b, "destination/waiting"}} {
		if !s.reach(s.held, time.Minute) {
			t.Fatalf("%s does not come to %s", s.name, s.held)
		}
		s.daemon.Process.Signal(syscall.SIGHUP)
		ctx := labtest.Within(t, 10*time.Second)
		for { // the signal was heard
			r, err := s.api.Status(ctx, connect.NewRequest(&hostv1.StatusRequest{}))
			if err != nil {
				t.Fatal(err)
			}
			if r.Msg.Stopping {
				break
			}
		}
		other := map[string]string{"hosta": "hostb", "hostb": "hosta"}[s.name]
		if _, err := s.evict("web2", other); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("%s was asked to begin an eviction while it settled: %v", s.name, err)
		}
		select {
		case <-s.ended:
			t.Fatalf("the daemon of %s stopped while it could abort an eviction", s.name)
		default:
		}
		s.release(s.held)
	}
	for _, s := range []*site{a, b} {
		select {
		case <-s.ended:
		case <-time.After(time.Minute):
			t.Fatalf("the daemon of %s does not stop", s.name)
		}
	}
	a.start()
	b.start()
	if end, err := a.watch(e.Id, 2*time.Minute); err != nil || end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	twin, err := there.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	labtest.MustCheck(t, twin)
}
