package host

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"vacate/internal/evict/journal"
	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/fleet/leader"
	"vacate/internal/fleet/member"
	"vacate/internal/fleet/store"
	"vacate/internal/fleet/view"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/link/certs"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"
)

// deposed is a brain that believes it leads, in an epoch that is over.
type deposed struct{ orders atomic.Int32 }

func (d *deposed) Join(_ context.Context,
	s *connect.BidiStream[fleetv1.HostSays, fleetv1.LeaderSays]) error {
	if _, err := s.Receive(); err != nil {
		return err
	}
	for _, m := range []*fleetv1.LeaderSays{
		{What: &fleetv1.LeaderSays_Welcome{Welcome: &fleetv1.Welcome{Epoch: 1}}},
		{What: &fleetv1.LeaderSays_Order{Order: &fleetv1.Order{Epoch: 1, Plan: 1 << 60,
			PlanId: "0", Vm: "web1", To: "hosta"}}},
	} {
		if err := s.Send(m); err != nil {
			return err
		}
	}
	d.orders.Add(1)
	s.Receive()
	return nil
}

// fleetConfig is what a daemon's configuration says of a fleet, but for its brain.
const fleetConfig = "[fleet]\nbrains = [%q]\ninterval = \"500ms\"\n"

// listenForFleet listens on the first host where a brain does.
func listenForFleet(t *testing.T, l *lab.Lab) (ln net.Listener) {
	t.Helper()
	if err := l.A.Do(func() (err error) {
		ln, err = net.Listen("tcp", net.JoinHostPort(l.A.Addr, "7610"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return ln
}

// identify has the CA of a site and its peers give somebody a certificate.
func identify(s *site, name string) *certs.Identity {
	s.t.Helper()
	dir := filepath.Dir(s.dir)
	err := certs.Issue(filepath.Join(dir, "ca"), name, filepath.Join(dir, name), certs.DefaultDays,
		false)
	if err != nil {
		s.t.Fatal(err)
	}
	i, err := certs.Load(filepath.Join(dir, name), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return i
}

// A fleet with real daemons drains a host of a real VM, while the host's daemon dies in the midst
// of the order. A brain whose epoch is over orders nothing.
func TestFleet(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	a, b := sites(t, l)
	vm := boot(t, l.A, lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 32, IdleMiB: 64}})
	a.describe("web1", vm.QMP, vm.Args)
	there := b.expect("web1", vm)

	ln := listenForFleet(t, l)
	address := ln.Addr().String()
	etcd, err := member.Start(t.Context(), member.Config{Name: "brain1", Dir: filepath.Dir(a.dir)},
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(etcd.Close)
	s, err := store.New(etcd.Client, 0)
	if err != nil {
		t.Fatal(err)
	}
	// Both hosts are this machine, which other tests may keep busy: that must not matter here.
	policy := view.DefaultPolicy()
	policy.MaxLoad, policy.Starving, policy.Reserve = 10, 0.01, 0
	policy.Late = time.Minute
	settings, err := json.Marshal(store.Settings{Policy: &policy})
	if err == nil {
		_, err = etcd.Client.Put(t.Context(), "/vacate/settings", string(settings))
	}
	if err != nil {
		t.Fatal(err)
	}
	brain := leader.New(leader.Config{Me: "brain1@" + address, Admin: []string{"boss"},
		Members: []string{"brain1"}}, s, slog.New(slog.NewTextHandler(t.Output(), nil)))
	var handler atomic.Value
	handler.Store(http.Handler(http.HandlerFunc(brain.Handler().ServeHTTP)))
	server := &http.Server{ConnContext: leader.WithConn,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handler.Load().(http.Handler).ServeHTTP(w, r)
		}), TLSConfig: identify(a, "brain1").Web(func(string) error { return nil })}
	ctx, end := context.WithCancel(t.Context())
	led := make(chan struct{})
	go func() {
		brain.Run(ctx)
		close(led)
	}()
	go server.ServeTLS(ln, "", "")
	t.Cleanup(func() {
		end()
		server.Close()
		<-led
	})
	for _, s := range []*site{a, b} {
		s.configure(fmt.Sprintf(fleetConfig, "brain1@"+address))
		s.start()
	}
	boss := fleetv1.NewFleetClient(&http.Client{Transport: &http.Transport{
		TLSClientConfig: identify(a, "boss").Client("brain1"), DialContext: l.A.Dial}},
		"https://"+address)
	drain := func(dry bool) *fleetv1.DrainResponse {
		r, err := boss.Drain(t.Context(), connect.NewRequest(&fleetv1.DrainRequest{Host: "hosta",
			DryRun: dry, Rate: 20e6}))
		if err != nil {
			return &fleetv1.DrainResponse{}
		}
		return r.Msg
	}
	defer func() {
		if t.Failed() {
			t.Log("the forecast says", drain(true))
		}
	}()
	until(t, "the forecast has the VM", func() bool { return len(drain(true).Steps) == 1 })
	drain(false)
	if !a.reach("source/pushing", 3*time.Minute) {
		t.Fatal("the VM is not evicted")
	}
	a.kill()
	a.start()
	decisions := func() []*fleetv1.Decision {
		r, err := boss.ListDecisions(t.Context(),
			connect.NewRequest(&fleetv1.ListDecisionsRequest{}))
		if err != nil {
			return nil
		}
		return r.Msg.Decisions
	}
	until(t, "the leader hears that it is complete", func() bool {
		d := decisions()
		return len(d) > 0 && d[0].State == "completed"
	})
	if d := decisions(); len(d) != 1 || d[0].Vm != "web1" || d[0].To != "hostb" {
		t.Errorf("decided: %v", d)
	}
	until(t, "the host is drained", func() bool {
		r, err := boss.ListHosts(t.Context(), connect.NewRequest(&fleetv1.ListHostsRequest{}))
		return err == nil && len(r.Msg.Hosts) == 2 && r.Msg.Hosts[0].Maintenance == "drained" &&
			len(r.Msg.Hosts[1].Vms) == 1
	})
	twin, err := there.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	labtest.MustCheck(t, twin)

	// It takes no VM from anybody, unless an operator forces it to.
	var last error
	until(t, "the drained host refuses it", func() bool {
		_, last = b.evictWith("web1", "hosta", &hostv1.EvictOptions{})
		return last != nil && strings.Contains(last.Error(), "is drained, and takes no VM")
	})
	if !strings.Contains(last.Error(), "remedy: `vacate fleet restore hosta`") {
		t.Errorf("it is refused with %v", last)
	}
	unchecked, err := b.evict("web1", "hosta")
	if err == nil {
		unchecked, err = b.watch(unchecked.Id, time.Minute)
	}
	if err != nil || unchecked.Outcome != "refused" ||
		!strings.Contains(unchecked.Reason, "is drained, and takes no VM") {
		t.Errorf("without checks it ended as %v, %v", unchecked, err)
	}
	plan, err := b.api.Plan(labtest.Within(t, time.Minute),
		connect.NewRequest(&hostv1.PlanRequest{OverMs: 200}))
	if err != nil || len(plan.Msg.Hosts) != 2 ||
		!strings.Contains(plan.Msg.Hosts[1].Barred, "hosta takes no VM: it is drained") {
		t.Errorf("relieve plans with %v, %v", plan, err)
	}
	here := a.expect("web1", vm)
	forced, err := b.evictWith("web1", "hosta", &hostv1.EvictOptions{Force: true})
	if err == nil {
		forced, err = b.watch(forced.Id, 3*time.Minute)
	}
	if err != nil || forced.Outcome != "completed" || !forced.Options.Force {
		t.Fatalf("by force it ended as %v, %v", forced, err)
	}
	if twin, err = here.Started(labtest.Within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	labtest.MustCheck(t, twin)

	// Hosts remember the epoch, also after a restart.
	var old deposed
	mux := http.NewServeMux()
	mux.Handle(fleetv1.NewHostsHandler(&old))
	handler.Store(http.Handler(http.HandlerFunc(mux.ServeHTTP)))
	b.kill()
	b.start()
	until(t, "hostb refuses the deposed leader", func() bool {
		log, _ := os.ReadFile(b.log.Name())
		return old.orders.Load() > 0 &&
			strings.Contains(string(log), "a later leader of the fleet was heard")
	})
	j, err := os.ReadFile(filepath.Join(b.dir, "journal", journal.OrdersFile))
	if err != nil || strings.Contains(string(j), `"plan":1152921504606846976`) {
		t.Errorf("%s, %v", j, err)
	}
	labtest.MustCheck(t, twin)
}

// A host says beforehand of a VM that it cannot be migrated, and why.
func TestFleetHears(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	a, _ := sites(t, l)
	vm, err := l.A.Boot(labtest.Within(t, 3*time.Minute), lab.Spec{BareMetal: true, MemoryMiB: 64,
		Load: lab.Load{Sleep: true}, Extra: []string{"-object",
			"memory-backend-ram,id=shared,size=1M,share=on", "-device",
			"ivshmem-plain,memdev=shared"}})
	if err != nil {
		t.Fatal(err)
	}
	a.describe("web1", vm.QMP, vm.Args)
	brain := &script{make(chan *fleetv1.LeaderSays, 1), make(chan *fleetv1.HostSays, 1000)}
	brain.says <- &fleetv1.LeaderSays{What: &fleetv1.LeaderSays_Welcome{
		Welcome: &fleetv1.Welcome{Epoch: 1}}}
	mux := http.NewServeMux()
	mux.Handle(fleetv1.NewHostsHandler(brain))
	ln := listenForFleet(t, l)
	server := &http.Server{Handler: mux,
		TLSConfig: identify(a, "brain1").Web(func(string) error { return nil })}
	go server.ServeTLS(ln, "", "")
	t.Cleanup(func() { server.Close() })
	a.configure(fmt.Sprintf(fleetConfig, "brain1@"+ln.Addr().String()))
	a.start()
	told := ""
	for ctx := labtest.Within(t, 2*time.Minute); !strings.Contains(told, "ivshmem"); {
		select {
		case m := <-brain.said:
			for _, v := range m.GetReport().GetVms() {
				told = v.Barred
			}
		case <-ctx.Done():
			t.Fatalf("the host says of the VM: %q", told)
		}
	}
}
