// Package fleethosts makes up hosts of a fleet in one process. They speak to its brain over the
// stream that vacated speaks, each with a certificate of its own, and carry out orders with VMs
// that there are not. Their loads swing; an eviction takes as long as its memory takes over a link.
// Daemon answers what a page asks a host's daemon.
package fleethosts

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/fleet/orders"
	"vacate/internal/link/certs"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// Options are what hosts there are.
type Options struct {
	Hosts int
	VMs   int // on each
	// CA is the directory of the CA that issues their certificates; Dir is where these go.
	CA, Dir string
	// Brains are members of the brain, NAME@HOST:PORT.
	Brains []string
	Every  time.Duration // how often they report
	// Rate is that of a link, in bytes per second; 0: 1.25e9.
	Rate float64
	// Host and VM name them; nil: rack01-01 and so on, vm00000 and so on.
	Host, VM func(n int) string
	Seed     uint64
}

const (
	cores    = 32.0
	memory   = 256 << 30
	pageSize = 4096
	// transfer is how long the execution transfer of each takes.
	transfer = 200 * time.Millisecond
)

// Fleet is all of them.
type Fleet struct {
	options Options
	life    context.Context
	began   time.Time
	names   []string

	mu    sync.Mutex // guards what follows, and hosts and evictions
	hosts map[string]*host
	tasks sync.WaitGroup
}

type host struct {
	*Fleet
	name      string
	rack      string
	identity  *certs.Identity
	mark      orders.Mark
	vms       map[string]*vm
	evictions []*eviction
	silent    bool
	refuse    string
	leave     context.CancelFunc
}

type vm struct {
	name            string
	incarnation     int
	base, amp       float64
	phase           float64
	size, resident  uint64
	barred          string
	leaves, arrives *eviction
	moved           time.Time
}

// eviction is one of a host's.
type eviction struct {
	plan, id string
	of       *vm
	from, to string
	began    time.Time
	takes    time.Duration
	outcome  string
	ended    time.Time
	there    bool // the VM runs there
}

// Start begins to simulate. It ends with ctx; Wait waits for that.
func Start(ctx context.Context, o Options) (*Fleet, error) {
	if o.Rate == 0 {
		o.Rate = 1.25e9
	}
	if o.Host == nil {
		o.Host = func(n int) string { return fmt.Sprintf("rack%02d-%02d", n/40+1, n%40+1) }
	}
	if o.VM == nil {
		o.VM = func(n int) string { return fmt.Sprintf("vm%05d", n) }
	}
	f := &Fleet{options: o, life: ctx, began: time.Now(), hosts: map[string]*host{}}
	for n := range o.Hosts {
		name := o.Host(n)
		dir := filepath.Join(o.Dir, name)
		if err := certs.Issue(o.CA, name, dir, certs.DefaultDays, false); err != nil {
			return nil, err
		}
		identity, err := certs.Load(dir, func(error) {})
		if err != nil {
			return nil, err
		}
		h := &host{Fleet: f, name: name, rack: fmt.Sprintf("r%d", n/40+1), identity: identity,
			vms: map[string]*vm{}}
		r := mathrand.New(mathrand.NewPCG(o.Seed, uint64(n))) // #nosec G404 -- made-up loads
		busy := 0.3 + 0.5*r.Float64()
		if r.IntN(12) == 0 {
			busy = 1.05 + 0.2*r.Float64() // too much to do
		}
		for i := range o.VMs {
			v := &vm{name: o.VM(n*o.VMs + i), amp: 0.1 + 0.1*r.Float64(),
				phase: r.Float64() * 2 * math.Pi,
				base:  busy * cores / float64(o.VMs) * (0.2 + 1.6*r.Float64()),
				size:  uint64(4+r.IntN(4)) << 30}
			v.resident = v.size / 10 * uint64(4+r.IntN(6))
			h.vms[v.name] = v
		}
		f.hosts[name] = h
		f.names = append(f.names, name)
	}
	for i, name := range f.names {
		h := f.hosts[name]
		ctx, leave := context.WithCancel(ctx)
		h.leave = leave
		// Not all at once.
		wait := o.Every * time.Duration(i) / time.Duration(o.Hosts)
		f.tasks.Go(func() { h.run(ctx, wait) })
	}
	return f, nil
}

// Wait waits until all have ended.
func (f *Fleet) Wait() { f.tasks.Wait() }

// Names are those of the hosts.
func (f *Fleet) Names() []string { return f.names }

// Silence has a host's reports stop, or go on.
func (f *Fleet) Silence(name string, silent bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hosts[name].silent = silent
}

// Leave has a host be gone, for good.
func (f *Fleet) Leave(name string) { f.hosts[name].leave() }

// Refuse has a host refuse orders, with a reason; with none, it heeds them.
func (f *Fleet) Refuse(name, why string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hosts[name].refuse = why
}

// Bar has a VM be one that cannot be evicted, with a reason.
func (f *Fleet) Bar(host, name, why string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hosts[host].vms[name].barred = why
}

// Want has the VMs of a host want so much CPU for each of its cores.
func (f *Fleet) Want(host string, load float64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := 0.0
	for _, v := range f.hosts[host].vms {
		all += v.base
	}
	for _, v := range f.hosts[host].vms {
		v.base *= load * cores / all
	}
}

// VMs are the names of those that run on a host.
func (f *Fleet) VMs(host string) (list []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name := range f.hosts[host].vms {
		list = append(list, name)
	}
	slices.Sort(list)
	return list
}

// run keeps a stream to the member that leads.
func (h *host) run(ctx context.Context, wait time.Duration) {
	at := 0
	for {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		wait = time.Second
		leader := h.join(ctx, h.options.Brains[at])
		at = (at + 1) % len(h.options.Brains)
		if i := slices.Index(h.options.Brains, leader); i >= 0 {
			at = i
		}
	}
}

// join holds one stream. It returns who leads, if the member says so.
func (h *host) join(ctx context.Context, brain string) (leader string) {
	name, address, ok := strings.Cut(brain, "@")
	if !ok {
		return ""
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	transport := &http.Transport{TLSClientConfig: h.identity.Client(name), ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	stream := fleetv1.NewHostsClient(&http.Client{Transport: transport}, "https://"+address).
		Join(ctx)
	defer stream.CloseResponse()
	var sending sync.Mutex
	send := func(s *fleetv1.HostSays) error {
		sending.Lock()
		defer sending.Unlock()
		return stream.Send(s)
	}
	context.AfterFunc(ctx, func() {
		sending.Lock()
		defer sending.Unlock()
		stream.CloseRequest()
	})
	defer cancel()
	if send(&fleetv1.HostSays{What: &fleetv1.HostSays_Hello{
		Hello: &fleetv1.Hello{Version: "made up"}}}) != nil {
		return ""
	}
	first, err := stream.Receive()
	if err != nil || first.GetWelcome() == nil {
		return first.GetElsewhere().GetLeader()
	}
	h.mu.Lock()
	mark, err := h.mark.Hear(first.GetWelcome().Epoch)
	if err == nil {
		h.mark = mark
	}
	h.mu.Unlock()
	if err != nil {
		return ""
	}
	var reports sync.WaitGroup
	defer reports.Wait()
	defer cancel()
	reports.Go(func() {
		for {
			if r := h.report(time.Now()); r != nil && send(&fleetv1.HostSays{
				What: &fleetv1.HostSays_Report{Report: r}}) != nil {
				cancel()
				return
			}
			select {
			case <-time.After(h.options.Every):
			case <-ctx.Done():
				return
			}
		}
	})
	for {
		m, err := stream.Receive()
		if err != nil {
			return ""
		}
		o := m.GetOrder()
		if o == nil {
			continue
		}
		a := &fleetv1.Answer{PlanId: o.PlanId, Plan: o.Plan}
		if e, err := h.obey(o); err != nil {
			a.Refused = err.Error()
		} else {
			a.EvictionId = e.id
		}
		if send(&fleetv1.HostSays{What: &fleetv1.HostSays_Answer{Answer: a}}) != nil {
			return ""
		}
	}
}

func (v *vm) told() string { return fmt.Sprintf("%s/%d", v.name, v.incarnation) }

// wants is the CPU that a VM would use at a moment.
func (v *vm) wants(after time.Duration) float64 {
	return v.base * (1 + v.amp*math.Sin(after.Seconds()/20+v.phase))
}

// report is what the host is like; nil if it is silent.
func (h *host) report(now time.Time) *fleetv1.Report {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.silent {
		return nil
	}
	h.move(now)
	r := &fleetv1.Report{Mark: &fleetv1.Mark{Epoch: h.mark.Epoch, Plan: h.mark.Plan},
		Load: &fleetv1.Load{Cpus: cores, Total: memory, Rate: h.options.Rate,
			TransferS: transfer.Seconds(), Labels: map[string]string{"rack": h.rack}}}
	after, all := now.Sub(h.began), 0.4
	for _, v := range h.vms {
		all += v.wants(after)
	}
	share := min(1, cores/all)
	used := uint64(4 << 30)
	for _, name := range slices.Sorted(maps.Keys(h.vms)) {
		v := h.vms[name]
		used += v.resident
		wants := v.wants(after)
		m := &fleetv1.VM{Name: name, Incarnation: v.told(), Vcpus: 4, Cpu: wants * share,
			Waiting: wants * (1 - share), Memory: v.size, Resident: v.resident, InUse: v.resident,
			Hot: v.resident / 4, Barred: v.barred}
		if v.leaves != nil || v.arrives != nil {
			m.Barred = "it is being evicted"
		}
		if !v.moved.IsZero() {
			m.MovedAt = timestamppb.New(v.moved)
		}
		r.Vms = append(r.Vms, m)
		r.Load.Used += m.Cpu
		r.Load.Waiting += m.Waiting
	}
	r.Load.Used += 0.4 * share
	r.Load.Available = memory - min(used, memory)
	for _, e := range h.evictions[max(0, len(h.evictions)-64):] {
		o := &fleetv1.OrderedEviction{PlanId: e.plan, EvictionId: e.id, Vm: e.of.name,
			State: e.state(now), Outcome: e.outcome}
		if e.outcome != "" {
			down, total := 0.031, e.ended.Sub(e.began).Seconds()
			o.EndedAt, o.DownS, o.TotalS = timestamppb.New(e.ended), &down, &total
		}
		r.Evictions = append(r.Evictions, o)
	}
	return r
}

// move has evictions of the host go on. It is called with mu held.
func (h *host) move(now time.Time) {
	for _, e := range h.evictions {
		if e.outcome != "" {
			continue
		}
		to := h.hosts[e.to]
		if !e.there && now.Sub(e.began) >= transfer {
			e.there = true
			delete(h.vms, e.of.name)
			e.of.leaves, e.of.arrives, e.of.moved = nil, e, now
			e.of.incarnation++
			to.vms[e.of.name] = e.of
		}
		if e.there && now.Sub(e.began) >= e.takes {
			e.outcome, e.ended, e.of.arrives = "completed", now, nil
		}
	}
}

// obey begins the eviction that an order asks for.
func (h *host) obey(o *fleetv1.Order) (*eviction, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	mark, err := h.mark.Spend(o.Epoch, o.Plan)
	if err != nil {
		return nil, err
	}
	h.mark = mark
	v, to := h.vms[o.Vm], h.hosts[o.To]
	switch {
	case v == nil || v.told() != o.Incarnation:
		return nil, orders.ErrStale
	case h.refuse != "":
		return nil, errors.New(h.refuse)
	case to == nil:
		return nil, fmt.Errorf("%s is no peer", o.To)
	}
	rate := h.options.Rate
	if o.Rate > 0 {
		rate = min(rate, float64(o.Rate))
	}
	for _, e := range h.evictions { // they share the link
		if e.outcome == "" {
			rate /= 2
			break
		}
	}
	e := &eviction{plan: o.PlanId, id: newID(), of: v, from: h.name, to: o.To, began: time.Now(),
		takes: transfer + time.Duration(float64(v.resident)/rate*float64(time.Second))}
	v.leaves = e
	h.evictions = append(h.evictions, e)
	return e, nil
}

func newID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// Listen serves the API of all hosts' daemons until ctx is done, and returns its address. The path
// begins with the host's name.
func (f *Fleet) Listen(ctx context.Context) (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	server := &http.Server{Handler: f.handler(), ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx }}
	f.tasks.Go(func() { server.Serve(ln) })
	f.tasks.Go(func() {
		<-ctx.Done()
		server.Close()
	})
	return "http://" + ln.Addr().String(), nil
}
