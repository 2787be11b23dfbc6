package ui

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
)

// leader is a member of a brain that says what a test has it say.
type leader struct {
	fleetv1.FleetClient

	mu        sync.Mutex
	failed    error
	status    *fleetv1.StatusResponse
	hosts     []*fleetv1.Host
	decisions []*fleetv1.Decision
	asked     atomic.Int32 // orders
}

func (l *leader) Status(context.Context, *connect.Request[fleetv1.StatusRequest]) (
	*connect.Response[fleetv1.StatusResponse], error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return connect.NewResponse(l.status), l.failed
}

func (l *leader) ListRules(context.Context, *connect.Request[fleetv1.ListRulesRequest]) (
	*connect.Response[fleetv1.ListRulesResponse], error) {
	return connect.NewResponse(&fleetv1.ListRulesResponse{}), nil
}

func (l *leader) ListHosts(context.Context, *connect.Request[fleetv1.ListHostsRequest]) (
	*connect.Response[fleetv1.ListHostsResponse], error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return connect.NewResponse(&fleetv1.ListHostsResponse{Hosts: l.hosts}), nil
}

func (l *leader) ListDecisions(context.Context, *connect.Request[fleetv1.ListDecisionsRequest]) (
	*connect.Response[fleetv1.ListDecisionsResponse], error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return connect.NewResponse(&fleetv1.ListDecisionsResponse{Decisions: l.decisions}), nil
}

func (l *leader) SetMode(context.Context, *connect.Request[fleetv1.SetModeRequest]) (
	*connect.Response[fleetv1.StatusResponse], error) {
	l.asked.Add(1)
	return connect.NewResponse(l.status), nil
}

func (l *leader) Approve(context.Context, *connect.Request[fleetv1.ApproveRequest]) (
	*connect.Response[fleetv1.Decision], error) {
	l.asked.Add(1)
	return connect.NewResponse(&fleetv1.Decision{}), nil
}

func newLeader() *leader {
	return &leader{status: &fleetv1.StatusResponse{Leads: true, Leader: "brain1@x:1", Mode: "ask",
		Role: "admin"}}
}

func (l *leader) brain() *Brain {
	return &Brain{Find: func(context.Context) (fleetv1.FleetClient, error) { return l, nil },
		Daemon: func(string) (Remote, error) { return Remote{}, errors.New("no daemon") }}
}

// feed keeps a hub up to date about a fleet, with somebody who looks.
func feed(t *testing.T, b *Brain) (*Hub, *viewer) {
	t.Helper()
	hub := NewHub()
	v := hub.look()
	pollFleet(t, hub, b)
	return hub, v
}

// pollFleet keeps a hub up to date about a fleet while somebody looks.
func pollFleet(t testing.TB, hub *Hub, b *Brain) {
	ctx, cancel := context.WithCancel(t.Context())
	var task sync.WaitGroup
	task.Go(func() {
		hub.PollFleet(ctx, b, func(e *hostv1.Eviction) string {
			return fmt.Sprintf("%s is %s", e.Vm, e.State)
		})
	})
	t.Cleanup(func() {
		cancel()
		task.Wait()
	})
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(3 * time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: that never came", what)
		}
	}
}

// With a fleet, too, only the page itself gives orders: nothing else reaches the brain.
func TestSecretsFleet(t *testing.T) {
	l := newLeader()
	address, token := serveFor(t, &Server{Hub: NewHub(), Brain: l.brain(), Who: "boss"})
	refusals(t, address, token, `{"kind": "mode", "mode": "auto"}`, http.StatusOK)
	if n := l.asked.Load(); n != 1 {
		t.Errorf("the brain was asked %d times, and should be once", n)
	}
}

// Only what waits can be approved, and a dry run asks the brain for nothing.
func TestFleetAsk(t *testing.T) {
	l := newLeader()
	l.decisions = []*fleetv1.Decision{{Id: strings.Repeat("a", 32), State: "waits", Vm: "web1",
		From: "hosta", To: "hostb", Reasons: []string{"VMs starve"}}}
	hub, _ := feed(t, l.brain())
	until(t, "the decision", func() bool { return hub.waiting() == 1 })
	s := &Server{Hub: hub, Brain: l.brain(), Who: "boss"}
	ask := func(o order) string {
		p, err := s.ask(t.Context(), o)
		if err != nil {
			return err.Error()
		}
		b, _ := json.Marshal(p)
		return string(b)
	}
	for want, o := range map[string]order{
		"VM web1 leaves host hosta and runs on host hostb.": {Kind: "approve",
			ID: strings.Repeat("a", 32)},
		"vacate fleet approve " + strings.Repeat("a", 32) + " --reject": {Kind: "reject",
			ID: strings.Repeat("a", 32)},
		"does not wait any more": {Kind: "approve",
			ID: strings.Repeat("b", 32)},
		"1 decisions that wait for a yes are given up": {Kind: "mode", Mode: "watch"},
		"no mode":           {Kind: "mode", Mode: "best"},
		"want HH:MM":        {Kind: "drain", Host: "hosta", By: "soon"},
		"A rule has a name": {Kind: "rule"},
		"no host":           {Kind: "evict", Host: "nowhere"},
	} {
		if got := ask(o); !strings.Contains(got, want) {
			t.Errorf("%+v: %s, want %q", o, got, want)
		}
	}
	if n := l.asked.Load(); n != 0 {
		t.Errorf("%d orders were given", n)
	}
}

// A viewer is told of hosts as they come, change and go, and of a brain that does not answer.
func TestPollFleet(t *testing.T) {
	l := newLeader()
	silent := 1.0
	l.hosts = []*fleetv1.Host{{Name: "hosta", State: "reporting", SilentS: &silent},
		{Name: "hostb", State: "new"}}
	hub, v := feed(t, l.brain())
	until(t, "both hosts", func() bool { return len(hub.Hosts()) == 2 })
	hub.take(v)
	l.mu.Lock()
	l.hosts = []*fleetv1.Host{{Name: "hosta", State: "late", SilentS: &silent,
		Maintenance: "draining", Staying: []string{"db1: it is pinned"}}}
	l.mu.Unlock()
	until(t, "one host is gone", func() bool { return len(hub.Hosts()) == 1 })
	until(t, "the other is late", func() bool {
		h := hub.Host("hosta")
		return h.State == "late" && h.Maintenance != nil && h.Maintenance.Staying[0] ==
			"db1: it is pinned"
	})
	gone := hub.take(v).Gone
	if len(gone) != 1 || gone[0] != "hostb" {
		t.Errorf("gone: %v", gone)
	}
	l.mu.Lock()
	l.failed = connect.NewError(connect.CodeUnavailable, errors.New("it is on holiday"))
	l.mu.Unlock()
	until(t, "the page says so", func() bool { return hub.Fleet().Error == "it is on holiday" })
	if hub.Host("hosta") == nil {
		t.Error("what was known of the hosts is gone")
	}
	l.mu.Lock()
	l.failed = nil
	l.mu.Unlock()
	until(t, "it is back", func() bool { return hub.Fleet().Error == "" })
}

// weigh is how much a viewer is told at once; it must be JSON.
func weigh(t *testing.T, hub *Hub, v *viewer) int {
	t.Helper()
	b, err := json.Marshal(hub.take(v))
	if err != nil {
		t.Fatalf("the stream breaks: %v", err)
	}
	return len(b)
}

// mostTold is far below what keeps a browser from its work.
const mostTold = 8 << 20

// A brain that tells too much, or numbers that are none, breaks no page.
func TestHostileBrain(t *testing.T) {
	nan, long := math.NaN(), strings.Repeat("x", 1<<20)
	h := &fleetv1.Host{Name: "hosta", State: long, Version: long, Guard: long, SilentS: &nan,
		Maintenance: long, MaintenanceReason: long, MaintenanceTakesS: &nan,
		Load: &fleetv1.Load{Cpus: nan, Used: math.Inf(1), Waiting: -math.MaxFloat64, Closed: long}}
	for range 3000 {
		h.Going, h.Staying = append(h.Going, "a"), append(h.Staying, long)
	}
	for n := range 20_000 {
		h.Vms = append(h.Vms, &fleetv1.VM{Name: fmt.Sprint(n), Cpu: nan, Waiting: math.Inf(-1)})
	}
	h.Vms[0].Name, h.Vms[0].Barred = long, long
	l := newLeader()
	l.hosts = []*fleetv1.Host{h}
	l.status.Mode, l.status.Leader = long, long
	for range 1000 {
		l.status.Troubles = append(l.status.Troubles, long)
		l.decisions = append(l.decisions, &fleetv1.Decision{Id: long, State: "waits",
			GainCores: nan, Reasons: []string{long}})
	}
	hub, v := feed(t, l.brain())
	until(t, "the host", func() bool { return hub.Host("hosta") != nil })
	if n := weigh(t, hub, v); n > mostTold {
		t.Errorf("the page is told %d bytes at once", n)
	}
}

// rubbish answers all calls with something.
func rubbish(t *testing.T, serve http.HandlerFunc) Remote {
	t.Helper()
	server := httptest.NewServer(serve)
	t.Cleanup(server.Close)
	return Remote{HostClient: hostv1.NewHostClient(server.Client(), server.URL,
		connect.WithReadMaxBytes(MaxAnswer)), Key: "a", Label: "a",
		Explain: func(err error) error { return err }}
}

// hostile is a daemon that says what it likes.
type hostile struct {
	hostv1.UnimplementedHostHandler
}

func (hostile) Status(context.Context, *connect.Request[hostv1.StatusRequest]) (
	*connect.Response[hostv1.StatusResponse], error) {
	s := &hostv1.StatusResponse{Host: strings.Repeat("x", 1<<20)}
	for n := range 10_000 {
		s.Peers = append(s.Peers, &hostv1.Peer{Name: fmt.Sprint(n), Address: "a:1"})
	}
	return connect.NewResponse(s), nil
}

func (hostile) ListVMs(context.Context, *connect.Request[hostv1.ListVMsRequest]) (
	*connect.Response[hostv1.ListVMsResponse], error) {
	r := &hostv1.ListVMsResponse{}
	for n := range 5000 {
		r.Vms = append(r.Vms, &hostv1.VM{Name: fmt.Sprint(n), State: "running"})
		r.Problems = append(r.Problems, "it is odd")
	}
	return connect.NewResponse(r), nil
}

func (hostile) Pressure(context.Context, *connect.Request[hostv1.PressureRequest]) (
	*connect.Response[hostv1.PressureResponse], error) {
	r := &hostv1.PressureResponse{Cpus: math.MaxUint32, CpuCores: math.Inf(1),
		Stalls: map[string]*hostv1.Stall{}}
	for n := range 10_000 {
		r.Stalls[fmt.Sprint(n)] = &hostv1.Stall{Some: math.NaN()}
	}
	r.Vms = append(r.Vms, &hostv1.VMPressure{Name: "0", CpuCores: math.NaN(), Steal: math.Inf(1)})
	return connect.NewResponse(r), nil
}

func (hostile) ListEvictions(context.Context, *connect.Request[hostv1.ListEvictionsRequest]) (
	*connect.Response[hostv1.ListEvictionsResponse], error) {
	nan := math.NaN()
	r := &hostv1.ListEvictionsResponse{}
	for n := range 3000 {
		r.Evictions = append(r.Evictions, &hostv1.Eviction{Id: fmt.Sprintf("%032x", n),
			Role: "source", State: "pushing", Progress: &hostv1.Progress{EtaS: &nan},
			Report: &hostv1.Report{TotalS: &nan, DownTimeS: &nan}})
	}
	r.Evictions[2999].Reason = strings.Repeat("x", 10<<20)
	return connect.NewResponse(r), nil
}

func (hostile) GetMap(context.Context, *connect.Request[hostv1.GetMapRequest]) (
	*connect.Response[hostv1.GetMapResponse], error) {
	return connect.NewResponse(&hostv1.GetMapResponse{Came: make([]byte, 1<<16),
		Why: make([]byte, 1<<16), Class: make([]byte, 1<<16)}), nil
}

func (hostile) WatchEviction(ctx context.Context, q *connect.Request[hostv1.WatchEvictionRequest],
	stream *connect.ServerStream[hostv1.Eviction]) error {
	for n := range 3 {
		if err := stream.Send(&hostv1.Eviction{Id: fmt.Sprintf("%032x", 1<<32+n),
			Reason: strings.Repeat("x", 1<<20)}); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return nil
}

// A daemon that answers with rubbish, without end, or with too much, is one that cannot be asked,
// or is cut short. The page of the others goes on.
func TestHostileHost(t *testing.T) {
	well := madeUp(0, 0)
	endless := func(kind string, status int) http.HandlerFunc {
		chunk := bytes.Repeat([]byte("a"), 1<<20)
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", kind)
			w.WriteHeader(status)
			for range 80 {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		}
	}
	mux := http.NewServeMux()
	mux.Handle(hostv1.NewHostHandler(hostile{}))
	for name, serve := range map[string]http.HandlerFunc{
		"rubbish": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/proto")
			io.WriteString(w, "\xff\xfe<script>\x00")
		},
		"a page": func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "<html>")
		},
		"80 MB":           endless("application/proto", http.StatusOK),
		"an error, 80 MB": endless("application/json", http.StatusInternalServerError),
		"a long error": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusInternalServerError)
			json.NewEncoder(w).Encode(map[string]string{"code": "internal",
				"message": strings.Repeat("x", 10<<20)})
		},
		"too much": mux.ServeHTTP,
	} {
		t.Run(name, func(t *testing.T) {
			hub := NewHub()
			hub.PutHost(well)
			v := hub.look()
			ctx, cancel := context.WithCancel(t.Context())
			var task sync.WaitGroup
			d := rubbish(t, serve)
			task.Go(func() {
				hub.Poll(ctx, d, func(*hostv1.Eviction) string { return "" })
			})
			defer task.Wait()
			defer cancel()
			until(t, "something is known of the host", func() bool { return hub.Host("a") != nil })
			h := hub.Host("a")
			if name == "too much" && h.Error == "" {
				until(t, "evictions", func() bool { return len(hub.Open()) > mostListed/2 })
			} else if h.Error == "" || len(h.Error) > 2*mostText {
				t.Errorf("%d bytes say what is wrong", len(h.Error))
			}
			if n := weigh(t, hub, v); n > mostTold {
				t.Errorf("the page is told %d bytes at once", n)
			}
		})
	}
}

// A map that was not asked for is none.
func TestOddMap(t *testing.T) {
	good := &hostv1.GetMapResponse{Came: []byte{1, 2}, Why: []byte{0, 1}, Class: []byte{0, 0},
		Reasons: []string{"planned", "fetched"}, Classes: []string{"kernel"}}
	if odd(good) {
		t.Error("a good map is odd")
	}
	for name, spoil := range map[string]func(*hostv1.GetMapResponse){
		"lengths differ":  func(m *hostv1.GetMapResponse) { m.Why = m.Why[:1] },
		"no such reason":  func(m *hostv1.GetMapResponse) { m.Why[0] = 2 },
		"no such class":   func(m *hostv1.GetMapResponse) { m.Class[0] = 9 },
		"too many labels": func(m *hostv1.GetMapResponse) { m.Classes = make([]string, 1000) },
		"too many parts": func(m *hostv1.GetMapResponse) {
			m.Came, m.Why, m.Class = make([]byte, 1<<20), make([]byte, 1<<20), make([]byte, 1<<20)
		},
	} {
		m := proto.CloneOf(good)
		spoil(m)
		if !odd(m) {
			t.Errorf("%s: the map is taken", name)
		}
	}
}
