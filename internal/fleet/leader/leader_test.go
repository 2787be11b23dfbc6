package leader

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/fleet/member"
	"vacate/internal/fleet/orders"
	"vacate/internal/fleet/place"
	"vacate/internal/fleet/store"
	"vacate/internal/fleet/view"
	"vacate/internal/link/certs"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// site has an etcd, a CA, and brains of one fleet.
type site struct {
	*testing.T
	dir   string
	etcd  *member.Member
	hooks Hooks
	log   words
	// generation of the store, for members that serve from now on
	generation uint64
}

// words are what was logged.
type words struct {
	mu  sync.Mutex
	buf strings.Builder // guarded by mu
}

func (w *words) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.Write(b)
}

// has reports whether a line has all of these words.
func (w *words) has(all ...string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for line := range strings.Lines(w.buf.String()) {
		found := true
		for _, x := range all {
			found = found && strings.Contains(line, x)
		}
		if found {
			return true
		}
	}
	return false
}

func newSite(t *testing.T) *site {
	t.Parallel() // most of the time each waits
	s := &site{T: t, dir: t.TempDir()}
	if err := certs.Init(filepath.Join(s.dir, "ca")); err != nil {
		t.Fatal(err)
	}
	var err error
	s.etcd, err = member.Start(t.Context(), member.Config{Name: "brain1", Dir: s.dir},
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.etcd.Close() })
	return s
}

// identity is that of a name, issued the first time.
func (s *site) identity(name string) *certs.Identity {
	s.Helper()
	dir := filepath.Join(s.dir, "certs", name)
	i, err := certs.Load(dir, nil)
	if err != nil {
		err = certs.Issue(filepath.Join(s.dir, "ca"), name, dir, certs.DefaultDays, false)
		if err == nil {
			i, err = certs.Load(dir, nil)
		}
	}
	if err != nil {
		s.Fatal(err)
	}
	return i
}

// server is a member that serves.
type server struct {
	*Brain
	name, address string
	stop          func()
}

func (s *site) serve(name string) *server {
	s.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.Fatal(err)
	}
	st, err := store.New(s.etcd.Client, s.generation)
	if err != nil {
		s.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(io.MultiWriter(s.Output(), &s.log), nil))
	b := New(Config{Me: name + "@" + ln.Addr().String(), View: []string{"viewer"},
		Act: []string{"actor"}, Admin: []string{"boss"}, Members: []string{"brain1", "brain2"},
		Hosts: []string{"host*"}, Hooks: s.hooks}, st, log)
	ctx, cancel := context.WithCancel(s.Context())
	var tasks sync.WaitGroup
	tasks.Go(func() { b.Run(ctx) })
	tasks.Go(func() {
		if err := b.Serve(ctx, ln, s.identity(name)); err != nil {
			s.Error(err)
		}
	})
	stop := sync.OnceFunc(func() {
		cancel()
		tasks.Wait()
	})
	s.Cleanup(stop)
	return &server{b, name, ln.Addr().String(), stop}
}

func (s *site) transport(b *server, as string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig: s.identity(as).Client(b.name), ForceAttemptHTTP2: true}}
}

func (s *site) operator(b *server, as string) fleetv1.FleetClient {
	return fleetv1.NewFleetClient(s.transport(b, as), "https://"+b.address)
}

// until waits for a condition.
func (s *site) until(what string, ok func() bool) {
	s.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			s.Fatalf("%s: that never came", what)
		}
	}
}

func (s *site) leads(b *server) fleetv1.FleetClient {
	s.Helper()
	boss := s.operator(b, "boss")
	s.until(b.name+" leads", func() bool {
		r, err := boss.Status(s.Context(), connect.NewRequest(&fleetv1.StatusRequest{}))
		return err == nil && r.Msg.Leads
	})
	return boss
}

// fake is a host: what it does is what a vacated does, without VMs.
type fake struct {
	*site
	name string

	mu        sync.Mutex
	mark      orders.Mark
	vms       map[string]string // incarnations
	labels    map[string]string
	refuse    string
	waits     float64 // cores that each VM waits for
	odd       bool    // what it says of ends makes no sense
	standing  *fleetv1.Standing
	ruled     []string // all rules that it was ever told
	old       bool     // it knows no Standing
	here      []string // VMs that need it and do not run there
	evictions []*fleetv1.OrderedEviction
	refused   []string // orders, by why
	stream    *connect.BidiStreamForClient[fleetv1.HostSays, fleetv1.LeaderSays]
	ended     error
}

func (s *site) host(name string, vms ...string) *fake {
	f := &fake{site: s, name: name, vms: map[string]string{}}
	for _, v := range vms {
		f.vms[v] = v + "/0"
	}
	return f
}

// join joins a brain, and reports until the test or the stream ends.
func (f *fake) join(b *server) {
	f.Helper()
	ctx, cancel := context.WithCancel(f.Context())
	stream := fleetv1.NewHostsClient(f.transport(b, f.name), "https://"+b.address).Join(ctx)
	if err := stream.Send(&fleetv1.HostSays{What: &fleetv1.HostSays_Hello{
		Hello: &fleetv1.Hello{Version: "test", HeedsStanding: !f.old}}}); err != nil {
		f.Fatal(err)
	}
	first, err := stream.Receive()
	if err != nil || first.GetWelcome() == nil {
		f.Fatalf("%v, %v", first, err)
	}
	f.mu.Lock()
	f.stream = stream
	f.mark, err = f.mark.Hear(first.GetWelcome().Epoch)
	f.mu.Unlock()
	if err != nil {
		f.Fatal(err)
	}
	var tasks sync.WaitGroup
	f.Cleanup(func() {
		cancel()
		tasks.Wait()
	})
	tasks.Go(func() {
		for ctx.Err() == nil && f.tell(stream) == nil {
			time.Sleep(50 * time.Millisecond)
		}
	})
	tasks.Go(func() {
		for {
			m, err := stream.Receive()
			if err != nil {
				f.mu.Lock()
				f.ended = err
				f.mu.Unlock()
				return
			}
			if s := m.GetStanding(); s != nil {
				f.mu.Lock()
				f.standing, f.ruled = s, append(f.ruled, s.Rules...)
				f.mu.Unlock()
				continue
			}
			f.obey(m.GetOrder())
		}
	})
}

func (f *fake) tell(
	stream *connect.BidiStreamForClient[fleetv1.HostSays, fleetv1.LeaderSays]) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := &fleetv1.Report{Mark: &fleetv1.Mark{Epoch: f.mark.Epoch, Plan: f.mark.Plan},
		Evictions: f.evictions, Here: f.here, Load: &fleetv1.Load{Cpus: 8, Used: 1, Total: 64 << 30,
			Available: 60 << 30, Rate: 1e9, Labels: f.labels,
			Waiting: f.waits * float64(len(f.vms))}}
	if !f.old {
		r.Heeds = f.standing.GetMaintenance()
	}
	if f.waits > 0 {
		r.Load.Used = r.Load.Cpus
	}
	for name, incarnation := range f.vms {
		r.Vms = append(r.Vms, &fleetv1.VM{Name: name, Incarnation: incarnation, Cpu: 0.1,
			Labels:  map[string]string{"app": strings.TrimRight(name, "0123456789")},
			Waiting: f.waits, Memory: 1 << 30, Resident: 1 << 30, InUse: 1 << 29, Hot: 1 << 28})
	}
	return stream.Send(&fleetv1.HostSays{What: &fleetv1.HostSays_Report{Report: r}})
}

func (f *fake) obey(o *fleetv1.Order) {
	f.mu.Lock()
	defer f.mu.Unlock()
	mark, err := f.mark.Spend(o.Epoch, o.Plan)
	if err == nil {
		f.mark = mark
		if f.vms[o.Vm] != o.Incarnation {
			err = orders.ErrStale
		} else if f.refuse != "" {
			err = errors.New(f.refuse)
		}
	}
	if err != nil {
		f.refused = append(f.refused, err.Error())
		f.stream.Send(&fleetv1.HostSays{What: &fleetv1.HostSays_Answer{
			Answer: &fleetv1.Answer{PlanId: o.PlanId, Plan: o.Plan, Refused: err.Error()}}})
		return
	}
	f.vms[o.Vm] += "+"
	f.evictions = append(f.evictions, &fleetv1.OrderedEviction{PlanId: o.PlanId,
		EvictionId: fmt.Sprint("eviction of ", o.Vm), Vm: o.Vm, State: "pushing"})
}

// end has all evictions of the host have ended at another one.
func (f *fake) end(to *fake) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.evictions {
		if e.Outcome == "" {
			down, total := 1.4, 1.5
			e.Outcome, e.EndedAt, e.DownS, e.TotalS = "completed", timestamppb.Now(), &down, &total
			if f.odd {
				total = math.NaN()
				e.EvictionId, e.Reason = strings.Repeat("x", 1<<16), strings.Repeat("y", 1<<16)
			}
			delete(f.vms, e.Vm)
			to.mu.Lock()
			to.vms[e.Vm] = e.Vm + "/" + to.name
			to.mu.Unlock()
		}
	}
}

func (f *fake) begun() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.evictions)
}

func decisions(t *testing.T, c fleetv1.FleetClient) []*fleetv1.Decision {
	t.Helper()
	r, err := c.ListDecisions(t.Context(), connect.NewRequest(&fleetv1.ListDecisionsRequest{}))
	if err != nil {
		return nil
	}
	return r.Msg.Decisions
}

// A new leader's forecasts go by what came of evictions that earlier ones ordered.
func TestTermLearns(t *testing.T) {
	at := time.Unix(1e9, 0).UTC()
	down, total := 0.5, 8.5
	came := func(outcome string, took time.Duration, d, s *float64) store.Decision {
		return store.Decision{Outcome: outcome, Ended: at.Add(took), DownS: d, TotalS: s,
			Plan: store.Plan{Decision: view.Decision{Move: view.Move{VM: "web1", From: "hosta",
				To: "hostb", Began: at, InUse: 4e8}}}}
	}
	b := New(Config{}, nil, slog.New(slog.DiscardHandler))
	term := newTerm(t.Context(), b, store.Term{}, store.Everything{Decisions: []store.Decision{
		came("completed", 10*time.Second, &down, &total),
		came("completed", 12*time.Second, nil, &total), // it was paused
		came("completed", time.Second, nil, nil),       // it is not known how long it took
		came("completed", time.Second, &down, &total),  // by another clock
		came("aborted", 100*time.Second, &down, &total),
	}}, nil)
	for i, name := range []string{"hosta", "hostb"} {
		r := view.Report{Seen: at, Host: view.Host{Name: name, CPUs: 8, Rate: 1e8, Total: 1 << 36,
			Available: 1 << 36}}
		if i == 0 {
			r.VMs = []view.VM{{Name: "web1", Memory: 1 << 30, InUse: 4e8}}
		}
		if err := term.planner.Report(r); err != nil {
			t.Fatal(err)
		}
	}
	f := term.planner.Forecast(at, place.Rounds{Every: tick}, 0, "hosta")
	if len(f.Pace) != 1 || !strings.HasPrefix(f.Pace[0],
		"as the last 2 evictions from hosta, each takes 2.8s besides its memory") {
		t.Errorf("%+v", f)
	}
}

// A drain is carried out, outlives a change of leader in the midst of its evictions, and is undone.
func TestDrain(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b := s.host("hosta", "web1", "web2"), s.host("hostb")
	a.join(one)
	b.join(one)
	drain := func(dry bool) *fleetv1.DrainResponse {
		r, err := boss.Drain(t.Context(),
			connect.NewRequest(&fleetv1.DrainRequest{Host: "hosta", DryRun: dry}))
		if err != nil {
			t.Fatal(err)
		}
		return r.Msg
	}
	s.until("the forecast has both VMs", func() bool { return len(drain(true).Steps) == 2 })
	if a.begun() != 0 {
		t.Error("a dry run moves VMs")
	}
	apart := &fleetv1.PutRuleRequest{Name: "web", Rule: "vms name=web* must run apart",
		DryRun: true}
	if r, err := boss.PutRule(t.Context(), connect.NewRequest(apart)); err != nil ||
		len(r.Msg.Troubles) == 0 || !strings.Contains(r.Msg.Troubles[0], "web") {
		t.Errorf("a rule that is not kept, tried: %v, %v", r, err)
	}
	if r, err := boss.ListRules(t.Context(),
		connect.NewRequest(&fleetv1.ListRulesRequest{})); err != nil || len(r.Msg.Rules) > 0 ||
		len(r.Msg.Troubles) > 0 {
		t.Errorf("a rule that was tried holds: %v, %v", r, err)
	}
	drain(false)
	if r, err := boss.ListHosts(t.Context(),
		connect.NewRequest(&fleetv1.ListHostsRequest{})); err != nil ||
		r.Msg.Hosts[0].MaintenanceWho != "boss" || r.Msg.Hosts[0].MaintenanceVms != 2 ||
		r.Msg.Hosts[0].GetMaintenanceTakesS() <= 0 {
		t.Errorf("the drain is told as %v, %v", r, err)
	}
	s.until("both evictions begin", func() bool { return a.begun() == 2 })

	// The leader ends. The next one knows of both, and orders neither again.
	two := s.serve("brain2")
	if r, err := s.operator(two, "viewer").Status(t.Context(),
		connect.NewRequest(&fleetv1.StatusRequest{})); err != nil || r.Msg.Leads ||
		!strings.HasPrefix(r.Msg.Leader, "brain1@") {
		t.Errorf("a follower says %v, %v", r, err)
	}
	one.stop()
	boss = s.leads(two)
	if got := decisions(t, boss); len(got) != 2 || got[0].State != "goes on" {
		t.Errorf("the next leader knows of %v", got)
	}
	a.join(two)
	b.join(two)
	a.end(b)
	s.until("both have ended", func() bool {
		got := decisions(t, boss)
		return len(got) == 2 && got[0].State == "completed" && got[1].State == "completed" &&
			got[0].GetCameTotalS() == 1.5
	})
	if n := a.begun(); n != 2 {
		t.Errorf("%d evictions began", n)
	}
	phase := func() string {
		r, err := boss.ListHosts(t.Context(), connect.NewRequest(&fleetv1.ListHostsRequest{}))
		if err != nil || len(r.Msg.Hosts) != 2 {
			t.Fatal(r, err)
		}
		return r.Msg.Hosts[0].Maintenance
	}
	s.until("the host is drained", func() bool { return phase() == "drained" })
	if r, err := boss.Restore(t.Context(), connect.NewRequest(&fleetv1.RestoreRequest{
		Host: "hosta", DryRun: true})); err != nil || len(r.Msg.Vms) != 2 || phase() != "drained" {
		t.Errorf("a restore, tried: %v, %v, and the host is %s", r, err, phase())
	}
	// Somebody starts a VM there: it has to leave, too.
	a.mu.Lock()
	a.vms["web3"] = "web3/0"
	a.mu.Unlock()
	s.until("it is drained again", func() bool { return phase() == "draining" })
	s.until("the VM leaves", func() bool { return a.begun() == 3 })
	// How long that takes is known from the two before.
	if got := drain(true).Pace; len(got) != 1 ||
		!strings.HasPrefix(got[0], "as the last 2 evictions from hosta, each takes ") {
		t.Errorf("%q", got)
	}
	a.end(b)
	s.until("the host is empty again", func() bool { return phase() == "drained" })
	if _, err := boss.Restore(t.Context(),
		connect.NewRequest(&fleetv1.RestoreRequest{Host: "hosta"})); err != nil {
		t.Error(err)
	}
	if got := phase(); got == "drained" {
		t.Error("it is not restored")
	}
}

// A host is empty when it says so, having looked after it heard that no VM may come.
func TestEmpty(t *testing.T) {
	is := func(heeds bool, r *fleetv1.Report) bool {
		h := &hostState{session: &session{heeds: heeds}, report: r, told: viewOf("hosta", r)}
		return h.empty()
	}
	for what, c := range map[string]struct {
		heeds bool
		r     *fleetv1.Report
		empty bool
	}{
		"nothing is there": {true, &fleetv1.Report{Heeds: "draining"}, true},
		"a VM runs": {true, &fleetv1.Report{Heeds: "draining",
			Vms: []*fleetv1.VM{{Name: "web1"}}}, false},
		"a VM starts": {true,
			&fleetv1.Report{Heeds: "draining", Here: []string{"web1"}}, false},
		"it had not heard that":         {true, &fleetv1.Report{}, false},
		"an older one hears none of it": {false, &fleetv1.Report{}, true},
	} {
		if is(c.heeds, c.r) != c.empty {
			t.Errorf("%s: it is empty: %v", what, !c.empty)
		}
	}
	if (&hostState{report: &fleetv1.Report{Heeds: "draining"}}).empty() {
		t.Error("one that is not connected is empty")
	}
}

// An order that its host refuses is over, with the host's words, and no eviction of it ever begins.
func TestRefusedOrder(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b := s.host("hosta", "web1"), s.host("hostb")
	a.refuse = "hostb is no peer"
	a.join(one)
	b.join(one)
	s.until("the host is known", func() bool {
		_, err := boss.Drain(t.Context(), connect.NewRequest(&fleetv1.DrainRequest{Host: "hosta"}))
		return err == nil
	})
	s.until("it is refused", func() bool {
		got := decisions(t, boss)
		return len(got) > 0 && got[len(got)-1].State == "refused" &&
			got[len(got)-1].Reason == "hostb is no peer"
	})
	if a.begun() != 0 {
		t.Error("it began")
	}
	// What was in the way may be gone soon.
	a.mu.Lock()
	a.refuse = ""
	a.mu.Unlock()
	s.until("it is tried again", func() bool { return a.begun() == 1 })
}

// A leader that is deposed, and does not know it, gets no plan written; the host that has heard a
// later one refuses what it still says.
func TestDeposed(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	s.leads(one)
	a, b := s.host("hosta", "web1"), s.host("hostb")
	a.join(one)
	b.join(one)
	old := one.leads()
	s.until("the first leader has the reports", func() bool {
		old.mu.Lock()
		defer old.mu.Unlock()
		return len(old.hosts) == 2 && old.hosts["hosta"].report != nil
	})
	two := s.serve("brain2")
	// Its lease is gone, as if it had been cut off.
	st, err := store.New(s.etcd.Client, 0)
	if err != nil {
		t.Fatal(err)
	}
	if who, err := st.Leader(t.Context()); err != nil || !strings.HasPrefix(who, "brain1@") {
		t.Fatal(who, err)
	}
	r, err := s.etcd.Client.Delete(t.Context(), old.Key())
	if err != nil || r.Deleted != 1 {
		t.Fatal(r, err)
	}
	s.leads(two)
	if p, err := old.begin(store.Plan{ID: newID(), Mode: view.Auto,
		Decision: view.Decision{VM: "web1", Incarnation: "web1/0", From: "hosta",
			To: "hostb"}}); !errors.Is(err, store.ErrDeposed) {
		t.Errorf("the deposed leader wrote %+v, %v", p, err)
	}
	a.join(two)
	a.obey(&fleetv1.Order{Epoch: uint64(old.Epoch), Plan: 1 << 60, PlanId: newID(), Vm: "web1",
		Incarnation: "web1/0", To: "hostb"})
	if a.begun() != 0 || len(a.refused) != 1 ||
		!strings.Contains(a.refused[0], orders.ErrDeposed.Error()) {
		t.Errorf("an order of the deposed leader: %d evictions, refused %v", a.begun(), a.refused)
	}
}

// A request that ends before it was written does not depose the leader.
func TestAskerIsGone(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	s.leads(one)
	term := one.leads()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (operators{one.Brain}).PutRule(gone, connect.NewRequest(&fleetv1.PutRuleRequest{
		Name: "stays", Rule: "vms name=x must stay"})); err != nil {
		t.Error(err)
	}
	if term.life.Err() != nil {
		t.Errorf("the term is over: %v", context.Cause(term.life))
	}
}

// Nobody does more than its certificate allows.
func TestRoles(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	calls := []struct {
		name string
		need string
		call func(fleetv1.FleetClient) error
	}{
		{"hosts", "viewer", func(c fleetv1.FleetClient) error {
			_, err := c.ListHosts(t.Context(), connect.NewRequest(&fleetv1.ListHostsRequest{}))
			return err
		}},
		{"drain", "actor", func(c fleetv1.FleetClient) error {
			_, err := c.Drain(t.Context(), connect.NewRequest(&fleetv1.DrainRequest{Host: "x"}))
			return err
		}},
		{"mode", "boss", func(c fleetv1.FleetClient) error {
			_, err := c.SetMode(t.Context(),
				connect.NewRequest(&fleetv1.SetModeRequest{Mode: "ask"}))
			return err
		}},
	}
	rank := map[string]int{"hosta": 0, "stranger": 0, "brain2": 0, "viewer": 1, "actor": 2,
		"boss": 3}
	for who, has := range rank {
		for _, c := range calls {
			err := c.call(s.operator(one, who))
			if denied := connect.CodeOf(err) == connect.CodePermissionDenied; err != nil &&
				denied !=
					(has < rank[c.need]) || err == nil && has < rank[c.need] {
				t.Errorf("%s asks for %s: %v", who, c.name, err)
			}
		}
	}
	for who, joins := range map[string]bool{"hostz": true, "stranger": false, "boss": false,
		"viewer": false, "brain2": false} {
		stream := fleetv1.NewHostsClient(s.transport(one, who), "https://"+one.address).
			Join(t.Context())
		stream.Send(&fleetv1.HostSays{What: &fleetv1.HostSays_Hello{Hello: &fleetv1.Hello{}}})
		m, err := stream.Receive()
		if got := err == nil && m.GetWelcome() != nil; got != joins {
			t.Errorf("%s joins as a host: %v, %v", who, m, err)
		}
		stream.CloseRequest()
		stream.CloseResponse()
	}
	if r, err := s.operator(one, "actor").Status(t.Context(),
		connect.NewRequest(&fleetv1.StatusRequest{})); err != nil || r.Msg.Role != "act" {
		t.Errorf("one who may act is told %v, %v", r, err)
	}
	// Without a certificate, not even TLS comes about.
	bare := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true}}} // #nosec G402 -- a test
	if _, err := fleetv1.NewFleetClient(bare, "https://"+one.address).Status(t.Context(),
		connect.NewRequest(&fleetv1.StatusRequest{})); err == nil {
		t.Error("one without a certificate gets an answer")
	}
	if _, err := boss.PutRule(t.Context(), connect.NewRequest(&fleetv1.PutRuleRequest{Name: "x",
		Rule: "vms all of them"})); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a rule that is none: %v", err)
	}
}

// A host that reports nonsense, or of another leader's epoch, is not heeded, and loses its stream.
func TestOddReports(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	s.leads(one)
	for name, spoil := range map[string]func(f *fake){
		"hosta": func(*fake) {},
		"hostb": func(f *fake) { f.vms["\x1b[2J"] = "x" },
	} {
		f := s.host(name, "web1")
		spoil(f)
		f.join(one)
		if name == "hosta" {
			f.mu.Lock()
			f.mark.Epoch++
			f.mu.Unlock()
		}
		s.until(name+" loses its stream", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.ended != nil
		})
	}
}

// settings has the fleet decide by another policy than the usual one.
func (s *site) settings(change func(*view.Policy)) {
	s.Helper()
	policy := view.DefaultPolicy()
	change(&policy)
	text, err := json.Marshal(store.Settings{Policy: &policy})
	if err == nil {
		_, err = s.etcd.Client.Put(s.Context(), "/vacate/settings", string(text))
	}
	if err != nil {
		s.Fatal(err)
	}
}

// A rack is emptied at once: none of its hosts takes a VM of another one. Rules name VMs by label.
func TestRack(t *testing.T) {
	s := newSite(t)
	s.settings(func(p *view.Policy) { p.PerHost = 4 })
	one := s.serve("brain1")
	boss := s.leads(one)
	hosts := map[string]*fake{"hosta": s.host("hosta", "db1", "db2"),
		"hostb": s.host("hostb", "web1"), "hostc": s.host("hostc"), "hostd": s.host("hostd", "db3")}
	for name, f := range hosts {
		f.labels = map[string]string{"rack": map[string]string{"hosta": "r1", "hostb": "r1",
			"hostc": "r2", "hostd": "r2"}[name]}
		f.join(one)
	}
	if _, err := boss.PutRule(t.Context(), connect.NewRequest(&fleetv1.PutRuleRequest{Name: "db",
		Rule: "vms app=db never run on hosts name=hostd"})); err != nil {
		t.Fatal(err)
	}
	drain := func(what string, dry bool) (*fleetv1.DrainResponse, error) {
		r, err := boss.Drain(t.Context(),
			connect.NewRequest(&fleetv1.DrainRequest{Host: what, DryRun: dry}))
		if err != nil {
			return nil, err
		}
		return r.Msg, nil
	}
	var dry *fleetv1.DrainResponse
	s.until("the forecast has the VMs of the rack", func() (ok bool) {
		dry, _ = drain("rack=r1", true)
		return dry != nil && len(dry.Steps) == 3
	})
	for _, step := range dry.Steps {
		if step.To != "hostc" && (step.To != "hostd" || step.Vm != "web1") {
			t.Errorf("it goes wrong: %v", step)
		}
	}
	if len(dry.Hosts) != 2 || dry.Hosts[0].DoneS == nil || dry.Hosts[1].GetDoneS() <
		dry.Hosts[0].GetDoneS() {
		t.Errorf("the hosts are emptied so: %v", dry.Hosts)
	}
	for what, code := range map[string]connect.Code{"rack=r9": connect.CodeNotFound,
		"hostz": connect.CodeNotFound, "rack=": connect.CodeInvalidArgument} {
		if _, err := drain(what, true); connect.CodeOf(err) != code {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := drain("rack=r1", false); err != nil {
		t.Fatal(err)
	}
	s.until("all evictions begin", func() bool {
		return hosts["hosta"].begun()+hosts["hostb"].begun() == 3
	})
	hosts["hosta"].end(hosts["hostc"])
	hosts["hostb"].end(hosts["hostc"])
	phases := func(want string) bool {
		r, err := boss.ListHosts(t.Context(), connect.NewRequest(&fleetv1.ListHostsRequest{}))
		return err == nil && len(r.Msg.Hosts) == 4 && r.Msg.Hosts[0].Maintenance == want &&
			r.Msg.Hosts[1].Maintenance == want && r.Msg.Hosts[2].Maintenance == ""
	}
	s.until("the rack is empty", func() bool { return phases("drained") })
	r, err := boss.Restore(t.Context(),
		connect.NewRequest(&fleetv1.RestoreRequest{Host: "rack=r1"}))
	if err != nil || !slices.Equal(r.Msg.Hosts, []string{"hosta", "hostb"}) ||
		len(r.Msg.Vms) != 3 {
		t.Errorf("restored %v, %v", r, err)
	}
}

// A policy is changed field by field, and the next leader goes by it.
func TestPolicy(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	set := func(p *fleetv1.Policy, fields ...string) (*fleetv1.Policy, error) {
		r, err := boss.SetPolicy(t.Context(),
			connect.NewRequest(&fleetv1.SetPolicyRequest{Policy: p, Fields: fields}))
		if err != nil {
			return nil, err
		}
		return r.Msg, nil
	}
	want := policyMessage(view.DefaultPolicy())
	want.MinGain, want.CoolDownS, want.InAll, want.PerHost = 0.5, 3600, 20, 0
	want.Quiet = []string{"22:00-06:00", "mon,tue 08:00-18:00"}
	got, err := set(&fleetv1.Policy{MinGain: 0.5, CoolDownS: 3600, InAll: 20, MaxLoad: 7,
		Quiet: []string{"22:00-06:00", "mon-tue 08:00-18:00"}}, "min_gain", "cool_down_s",
		"in_all", "per_host", "quiet")
	if err != nil || !proto.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for field, p := range map[string]*fleetv1.Policy{"nonsense": {}, "late_s": {},
		"max_load": {MaxLoad: math.NaN()}, "reserve": {Reserve: 2}, "settle_s": {SettleS: -1},
		"quiet": {Quiet: []string{"always"}}, "sustain_s": {SustainS: math.Inf(1)},
		"mode": {Mode: "maybe"}} {
		if _, err := set(p, field); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s = %v: %v", field, p, err)
		}
	}
	two := s.serve("brain2")
	one.stop()
	boss = s.leads(two)
	r, err := boss.GetPolicy(t.Context(), connect.NewRequest(&fleetv1.GetPolicyRequest{}))
	if err != nil || !proto.Equal(r.Msg, want) {
		t.Errorf("the next leader goes by %v, %v", r, err)
	}
}

// A rule that the next leader would not read is not taken.
func TestMostRules(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	term := one.leads()
	term.mu.Lock()
	for i := range store.MaxRules {
		name := fmt.Sprint("r", i)
		term.rules[name] = store.Rule{Name: name, Text: "vms app=" + name + " must stay"}
	}
	term.mu.Unlock()
	for name, want := range map[string]connect.Code{"r1": 0,
		"more": connect.CodeFailedPrecondition} {
		_, err := boss.PutRule(t.Context(), connect.NewRequest(&fleetv1.PutRuleRequest{Name: name,
			Rule: "vms app=db must run apart"}))
		if err == nil && want != 0 || err != nil && connect.CodeOf(err) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Two operators change the policy at once, and both changes hold.
func TestPolicyOfTwo(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	term := one.leads()
	term.writes.Lock() // the store is slow
	var both sync.WaitGroup
	both.Go(func() {
		_, err := boss.SetMode(t.Context(),
			connect.NewRequest(&fleetv1.SetModeRequest{Mode: "ask"}))
		if err != nil {
			t.Error(err)
		}
	})
	both.Go(func() {
		_, err := boss.SetPolicy(t.Context(), connect.NewRequest(&fleetv1.SetPolicyRequest{
			Policy: &fleetv1.Policy{MinGain: 0.5}, Fields: []string{"min_gain"}}))
		if err != nil {
			t.Error(err)
		}
	})
	time.Sleep(300 * time.Millisecond)
	term.writes.Unlock()
	both.Wait()
	r, err := boss.GetPolicy(t.Context(), connect.NewRequest(&fleetv1.GetPolicyRequest{}))
	if err != nil || r.Msg.Mode != "ask" || r.Msg.MinGain != 0.5 {
		t.Errorf("%v, %v", r, err)
	}
}

// A drain begins when its time has come, and not if it was called off.
func TestPlannedDrain(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b, c := s.host("hosta", "web1"), s.host("hostb"), s.host("hostc", "web2")
	for _, f := range []*fake{a, b, c} {
		f.join(one)
	}
	drain := func(host string, at time.Time) error {
		_, err := boss.Drain(t.Context(), connect.NewRequest(&fleetv1.DrainRequest{Host: host,
			At: timestamppb.New(at)}))
		return err
	}
	phases := func() (list []string) {
		r, err := boss.ListHosts(t.Context(), connect.NewRequest(&fleetv1.ListHostsRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range r.Msg.Hosts {
			list = append(list, h.Maintenance)
		}
		return list
	}
	s.until("all are known", func() bool {
		r, err := boss.ListHosts(t.Context(), connect.NewRequest(&fleetv1.ListHostsRequest{}))
		return err == nil && len(r.Msg.Hosts) == 3 && len(r.Msg.Hosts[0].Vms) == 1 &&
			len(r.Msg.Hosts[2].Vms) == 1
	})
	later := time.Now().Add(24 * time.Hour)
	if err := errors.Join(drain("hosta", later), drain("hostc", later)); err != nil {
		t.Fatal(err)
	}
	if got := phases(); !slices.Equal(got, []string{"planned", "", "planned"}) {
		t.Errorf("the hosts are %q", got)
	}
	if _, err := boss.Restore(t.Context(),
		connect.NewRequest(&fleetv1.RestoreRequest{Host: "hostc"})); err != nil {
		t.Error(err)
	}
	if err := drain("hosta", time.Now().Add(2*time.Second)); err != nil {
		t.Fatal(err)
	}
	s.until("the VM leaves", func() bool { return a.begun() == 1 })
	if c.begun() != 0 {
		t.Error("a drain that was called off begins")
	}
	if err := drain("hosta", later); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("a drain that has begun is put off: %v", err)
	}
	a.end(b)
	s.until("it is drained", func() bool {
		return slices.Equal(phases(), []string{"drained", "", ""})
	})
}

// A hook is told of each step of a drain. One that does not answer holds up neither a drain nor a
// restore.
func TestHook(t *testing.T) {
	s := newSite(t)
	var mu sync.Mutex
	var heard []string
	answers := true
	gone := make(chan struct{})
	hook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var n Notice
		if err := json.NewDecoder(r.Body).Decode(&n); err != nil || r.Method != http.MethodPost {
			t.Errorf("%s: %v", r.Method, err)
		}
		mu.Lock()
		heard = append(heard, n.Event+" "+n.Host)
		wait := !answers
		mu.Unlock()
		if n.Who != "boss" || n.Reason != "new memory" || n.Leader == "" || n.At.IsZero() {
			t.Errorf("the hook is told %+v", n)
		}
		if wait {
			<-gone
		}
	}))
	defer hook.Close()
	defer close(gone)
	s.hooks = Hooks{URL: hook.URL, Time: 5 * time.Second}
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b := s.host("hosta", "web1"), s.host("hostb")
	a.join(one)
	b.join(one)
	drain := func() ([]string, error) {
		r, err := boss.Drain(t.Context(), connect.NewRequest(&fleetv1.DrainRequest{Host: "hosta",
			Reason: "new memory"}))
		if err != nil {
			return nil, err
		}
		return r.Msg.Warnings, nil
	}
	restore := func() {
		t.Helper()
		if _, err := boss.Restore(t.Context(),
			connect.NewRequest(&fleetv1.RestoreRequest{Host: "hosta"})); err != nil {
			t.Error(err)
		}
	}
	has := func(events ...string) bool {
		mu.Lock()
		defer mu.Unlock()
		for _, e := range events {
			if !slices.Contains(heard, e+" hosta") {
				return false
			}
		}
		return len(heard) == len(events)
	}
	s.until("the host is known", func() bool {
		r, err := boss.ListHosts(t.Context(), connect.NewRequest(&fleetv1.ListHostsRequest{}))
		return err == nil && len(r.Msg.Hosts) == 2 && len(r.Msg.Hosts[0].Vms) == 1
	})
	if warnings, err := drain(); err != nil || len(warnings) != 0 || !has("drain") {
		t.Errorf("%v, %v; the hook heard %v", warnings, err, heard)
	}
	s.until("the eviction begins", func() bool { return a.begun() == 1 })
	a.end(b)
	s.until("it is told that the host is empty", func() bool { return has("drain", "drained") })
	restore()
	s.until("it is told of both ends of the restore", func() bool {
		return has("drain", "drained", "restore", "restored") ||
			has("drain", "drained", "restore") && a.begun() > 1
	})

	mu.Lock()
	answers = false
	mu.Unlock()
	if warnings, err := drain(); err != nil || len(warnings) != 1 ||
		!strings.Contains(warnings[0], "the hook was not told") {
		t.Errorf("with a hook that does not answer: %v, %v", warnings, err)
	}
	restore()
	if !s.log.has("the hook was not told", "host=hosta", "event=drain") {
		t.Error("it is not logged that the hook did not answer")
	}
	metrics := httptest.NewRecorder()
	one.Metrics().ServeHTTP(metrics, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{`vacate_fleet_hooks_total{event="drain",outcome="failed"} 1`,
		`vacate_fleet_hooks_total{event="drained",outcome="answered"} 1`,
		`vacate_fleet_decisions_total{cause="drain",outcome="completed"} 1`,
		`vacate_fleet_took_to_predicted_ratio_count 1`, `vacate_fleet_took_seconds_total 1.5`,
		`vacate_fleet_hosts{state="reporting"} 2`, `vacate_fleet_leads 1`,
		`vacate_fleet_mode{mode="watch"} 1`} {
		if !strings.Contains(metrics.Body.String(), want+"\n") {
			t.Errorf("Prometheus is not told %s", want)
		}
	}
	if t.Failed() {
		t.Log(metrics.Body)
	}
}

// A store that was lost is made anew of a backup, with all that an operator has set. With a higher
// generation, hosts heed its leader; without, they do not.
func TestBackup(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b := s.host("hosta", "web1", "db1"), s.host("hostb")
	a.join(one)
	b.join(one)
	if _, err := boss.PutRule(t.Context(), connect.NewRequest(&fleetv1.PutRuleRequest{Name: "db",
		Rule: "vms name=db* must stay"})); err != nil {
		t.Fatal(err)
	}
	if _, err := boss.SetPolicy(t.Context(), connect.NewRequest(&fleetv1.SetPolicyRequest{
		Policy: &fleetv1.Policy{InAll: 7}, Fields: []string{"in_all"}})); err != nil {
		t.Fatal(err)
	}
	s.until("the host is known", func() bool {
		_, err := boss.Drain(t.Context(), connect.NewRequest(&fleetv1.DrainRequest{Host: "hosta"}))
		return err == nil
	})
	s.until("the eviction begins", func() bool { return a.begun() == 1 })
	file := filepath.Join(t.TempDir(), "snapshot")
	stream, err := boss.Backup(t.Context(), connect.NewRequest(&fleetv1.BackupRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	var data []byte
	whole := false
	for stream.Receive() {
		data, whole = append(data, stream.Msg().Data...), stream.Msg().Whole
	}
	if err := errors.Join(stream.Err(), stream.Close()); err != nil || !whole {
		t.Fatal(whole, err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	plan := decisions(t, boss)[0]
	// What happens after the backup is not in it, but hosts have heard of it.
	for i := range 3 {
		if _, err := boss.PutRule(t.Context(), connect.NewRequest(&fleetv1.PutRuleRequest{
			Name: fmt.Sprint("later", i), Rule: "vms name=x must stay"})); err != nil {
			t.Fatal(err)
		}
	}
	two := s.serve("brain2")
	one.stop()
	s.leads(two)
	a.join(two)
	two.stop()
	s.etcd.Close()

	dir := t.TempDir()
	c := member.Config{Name: "brain1", Dir: dir}
	cut := filepath.Join(t.TempDir(), "cut")
	if err := os.WriteFile(cut, data[:len(data)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := member.Restore(c, cut); err == nil {
		t.Error("half a backup becomes a store")
	}
	if err := member.Restore(c, file); err != nil {
		t.Fatal(err)
	}
	if err := member.Restore(c, file); err == nil ||
		!strings.Contains(err.Error(), "there already") {
		t.Errorf("over a store that is there: %v", err)
	}
	if s.etcd, err = member.Start(t.Context(), c, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}

	// Hosts have heard a later epoch than the copy comes to.
	stale := s.serve("brain1")
	s.leads(stale)
	a.mu.Lock()
	if epoch := uint64(stale.leads().Epoch); epoch >= a.mark.Epoch {
		t.Errorf("the copy comes to epoch %d, hosts have heard %d: the test shows nothing", epoch,
			a.mark.Epoch)
	}
	a.mu.Unlock()
	stale.stop()
	s.generation = 1
	again := s.serve("brain2")
	boss = s.leads(again)
	a.join(again)
	b.join(again)
	r, err := boss.ListRules(t.Context(), connect.NewRequest(&fleetv1.ListRulesRequest{}))
	if err != nil || len(r.Msg.Rules) != 1 || r.Msg.Rules[0].Name != "db" {
		t.Errorf("%v, %v", r, err)
	}
	p, err := boss.GetPolicy(t.Context(), connect.NewRequest(&fleetv1.GetPolicyRequest{}))
	if err != nil || p.Msg.InAll != 7 {
		t.Errorf("%v, %v", p, err)
	}
	if got := decisions(t, boss); len(got) != 1 || got[0].Id != plan.Id ||
		got[0].State != "goes on" {
		t.Errorf("of the plan that was under way it knows %v", got)
	}
	a.end(b)
	s.until("the plan ends by its host's word", func() bool {
		got := decisions(t, boss)
		return len(got) == 1 && got[0].State == "completed"
	})
	if n := a.begun(); n != 1 {
		t.Errorf("%d evictions began", n)
	}
}

// Hosts are told what keeps VMs off them, but for those that would not understand.
func TestStanding(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b := s.host("hosta"), s.host("hostb")
	b.old = true
	a.join(one)
	b.join(one)
	told := func(f *fake) *fleetv1.Standing {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.standing
	}
	s.until("the host is told", func() bool {
		return told(a).GetEpoch() != 0 && told(a).Maintenance == ""
	})
	for name, rule := range map[string]string{"db": "vms name=db* must run apart",
		"web": "vms name=web* should run apart", "pair": "vms name=x* must run together"} {
		if _, err := boss.PutRule(t.Context(),
			connect.NewRequest(&fleetv1.PutRuleRequest{Name: name, Rule: rule})); err != nil {
			t.Fatal(err)
		}
	}
	s.until("it is told the rule that it can hold", func() bool {
		return slices.Equal(told(a).Rules, []string{"db: vms name=db* must run apart"})
	})
	if _, err := boss.PutRule(t.Context(), connect.NewRequest(&fleetv1.PutRuleRequest{
		Name: "tried", Rule: "vms name=t* must run apart", DryRun: true})); err != nil {
		t.Fatal(err)
	}
	s.until("it is told of its drain", func() bool {
		_, err := boss.Drain(t.Context(), connect.NewRequest(&fleetv1.DrainRequest{Host: "hosta",
			Reason: "new memory"}))
		return err == nil && told(a).Maintenance != "" && told(a).Reason == "new memory"
	})
	a.mu.Lock()
	if slices.ContainsFunc(a.ruled, func(r string) bool { return strings.Contains(r, "tried") }) {
		t.Errorf("a rule that was only tried is told to hosts: %q", a.ruled)
	}
	a.mu.Unlock()
	if told(b) != nil {
		t.Errorf("an older host is told %v", told(b))
	}
}

// A host whose last VM runs elsewhere is not drained as long as it has memory of it: an operator
// would switch it off.
func TestDrainedAtTheEnd(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b := s.host("hosta", "web1"), s.host("hostb")
	a.join(one)
	b.join(one)
	s.until("the eviction begins", func() bool {
		boss.Drain(t.Context(), connect.NewRequest(&fleetv1.DrainRequest{Host: "hosta"}))
		return a.begun() == 1
	})
	term := one.leads()
	phase := func() view.Phase {
		term.maintain()
		term.mu.Lock()
		defer term.mu.Unlock()
		return term.maintenance["hosta"].Phase
	}
	told := func(f func(*fleetv1.Report) bool) func() bool {
		return func() bool {
			term.mu.Lock()
			defer term.mu.Unlock()
			return f(term.hosts["hosta"].report)
		}
	}
	// It runs at hostb, and its memory is still on its way.
	a.mu.Lock()
	delete(a.vms, "web1")
	a.mu.Unlock()
	s.until("the host tells of it no more",
		told(func(r *fleetv1.Report) bool { return len(r.Vms) == 0 && len(r.Evictions) == 1 }))
	if got := phase(); got != view.Draining {
		t.Errorf("with an eviction under way that the fleet ordered it is %s", got)
	}
	a.mu.Lock()
	a.here = []string{"web9"} // that an operator evicts
	a.mu.Unlock()
	a.end(b)
	s.until("the plan has ended", func() bool {
		got := decisions(t, boss)
		return len(got) == 1 && got[0].State == "completed"
	})
	s.until("it tells of the other",
		told(func(r *fleetv1.Report) bool { return len(r.Vms) == 0 && len(r.Here) == 1 }))
	if got := phase(); got != view.Draining {
		t.Errorf("with an operator's eviction under way it is %s", got)
	}
	a.mu.Lock()
	a.here = nil
	a.mu.Unlock()
	s.until("it is drained at the end", func() bool { return phase() == view.Drained })
}

// What an operator asks for while the next phase of maintenance waits to be written holds.
func TestOperatorOvertakesMaintenance(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	a := s.host("hosta")
	a.join(one)
	term := one.leads()
	phase := func() view.Phase {
		term.mu.Lock()
		defer term.mu.Unlock()
		return term.maintenance["hosta"].Phase
	}
	s.until("it is known", func() bool {
		_, err := boss.Drain(t.Context(),
			connect.NewRequest(&fleetv1.DrainRequest{Host: "hosta"}))
		return err == nil
	})
	s.until("it is drained", func() bool { return phase() == view.Drained })
	term.writes.Lock() // the store is slow
	var both sync.WaitGroup
	both.Go(func() {
		_, err := boss.Restore(t.Context(),
			connect.NewRequest(&fleetv1.RestoreRequest{Host: "hosta"}))
		if err != nil {
			t.Error(err)
		}
	})
	time.Sleep(300 * time.Millisecond) // it waits for the store first
	a.mu.Lock()
	a.vms["web1"] = "web1/0" // somebody starts it there: so the drain would go on
	a.mu.Unlock()
	s.until("it is told of", func() bool {
		term.mu.Lock()
		defer term.mu.Unlock()
		return len(term.hosts["hosta"].told.VMs) == 1
	})
	both.Go(term.maintain)
	time.Sleep(300 * time.Millisecond)
	term.writes.Unlock()
	both.Wait()
	if got := phase(); got == view.Draining {
		t.Error("it is drained anew, although an operator has restored it")
	}
}

// What a host says of the ends of evictions may be anything: the plans end, each of them.
func TestOddEnds(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b := s.host("hosta", "web1", "web2"), s.host("hostb")
	a.odd = true
	a.join(one)
	b.join(one)
	s.until("the host is known", func() bool {
		_, err := boss.Drain(t.Context(), connect.NewRequest(&fleetv1.DrainRequest{Host: "hosta"}))
		return err == nil
	})
	s.until("both evictions begin", func() bool { return a.begun() == 2 })
	a.end(b)
	s.until("both have ended", func() bool {
		got := decisions(t, boss)
		return len(got) == 2 && got[0].State == "completed" && got[1].State == "completed" &&
			got[0].CameTotalS == nil && len(got[0].EvictionId) <= maxWord
	})
}

// What was decided and not carried out has numbers of its own, and the next leader knows it.
func TestWatched(t *testing.T) {
	s := newSite(t)
	s.settings(func(p *view.Policy) { p.Sustain = 0 })
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b := s.host("hosta", "web1", "web2"), s.host("hostb")
	a.waits = 4
	a.join(one)
	b.join(one)
	s.until("a decision is watched", func() bool {
		got := decisions(t, boss)
		return len(got) > 0 && got[0].State == "watched" && got[0].Plan > got[0].Epoch
	})
	if a.begun() != 0 {
		t.Error("a fleet that watches moves VMs")
	}
	before := decisions(t, boss)
	two := s.serve("brain2")
	one.stop()
	boss = s.leads(two)
	got := decisions(t, boss)
	numbers := map[uint64]bool{}
	for _, d := range got {
		numbers[d.Plan] = true
	}
	if len(got) < len(before) || len(numbers) != len(got) || got[len(got)-1].State != "watched" {
		t.Errorf("the next leader knows of %v, the one before of %v", got, before)
	}
}

// A decision that an operator approves keeps its ID as a plan, and to its end.
func TestApprove(t *testing.T) {
	s := newSite(t)
	s.settings(func(p *view.Policy) { p.Sustain, p.Mode = 0, view.Ask })
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b := s.host("hosta", "web1", "web2"), s.host("hostb")
	a.waits = 4
	a.join(one)
	b.join(one)
	var id string
	s.until("a decision waits", func() bool {
		got := decisions(t, boss)
		if len(got) == 0 || got[0].State != "waits" {
			return false
		}
		id = got[0].Id
		return true
	})
	if a.begun() != 0 {
		t.Error("a fleet that asks moves a VM unasked")
	}
	r, err := boss.Approve(t.Context(), connect.NewRequest(&fleetv1.ApproveRequest{Id: id}))
	if err != nil || r.Msg.Id != id || r.Msg.State != "goes on" || r.Msg.By != "boss" ||
		r.Msg.Mode != string(view.Ask) {
		t.Fatalf("approved: %v, %v", r, err)
	}
	if _, err := boss.Approve(t.Context(), connect.NewRequest(
		&fleetv1.ApproveRequest{Id: id})); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("approved again: %v", err)
	}
	s.until("the eviction begins", func() bool { return a.begun() == 1 })
	a.end(b)
	s.until("it has ended under its ID", func() bool {
		return slices.ContainsFunc(decisions(t, boss), func(d *fleetv1.Decision) bool {
			return d.Id == id && d.State == "completed"
		})
	})
}
