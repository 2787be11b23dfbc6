package host

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/fleet/orders"
	"vacate/internal/fleet/view"
	"vacate/internal/host/hypervisor"
	"vacate/internal/sys/process"
	"vacate/internal/sys/settings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Fleet is what fleet the host belongs to.
type Fleet struct {
	Brains   []string          `toml:"brains"` // NAME[@HOST:PORT]
	Labels   map[string]string `toml:"labels"`
	Rate     uint64            `toml:"rate"` // Mbit/s
	Link     string            `toml:"link"`
	Interval time.Duration     `toml:"interval"`
}

const (
	fleetPort        = "7610"
	usualFleetRate   = 1000 // Mbit/s
	usualInterval    = 3 * time.Second
	mostInterval     = 10 * time.Second // of a report: see mostOver
	leastInterval    = 500 * time.Millisecond
	rejoinPause      = time.Second
	fleetMessage     = 1 << 20 // bytes that a leader says at most at once
	mostOrdered      = 64      // evictions that are reported
	orderedTime      = time.Hour
	estimateFleetAge = 5 * time.Minute
)

// brain is a member of the fleet's brain.
type brain struct{ name, address string }

func parseBrain(text string) (brain, error) {
	name, address, given := strings.Cut(text, "@")
	if !given {
		address = net.JoinHostPort(name, fleetPort)
	}
	if err := hypervisor.CheckName(name); err != nil {
		return brain{}, err
	}
	if err := certified(name); err != nil {
		return brain{}, err
	}
	if _, err := settings.SplitAddress(address, 1); err != nil {
		return brain{}, fmt.Errorf("brain %q: %q %w", text, address, err)
	}
	return brain{name, address}, nil
}

func (f Fleet) check(plain bool) error {
	if plain {
		return errors.New("a fleet needs certificates: there is none with plain = true")
	}
	if len(f.Brains) == 0 {
		return errors.New("brains is empty: name the members of the fleet's brain, such as " +
			"brains = [\"brain1\"]")
	}
	for _, text := range f.Brains {
		if _, err := parseBrain(text); err != nil {
			return fmt.Errorf("brains: %w", err)
		}
	}
	if f.Rate > maxRate {
		return fmt.Errorf("rate = %d is more than %d Mbit/s", f.Rate, maxRate)
	}
	if f.Interval != 0 && (f.Interval < leastInterval || f.Interval > mostInterval) {
		return fmt.Errorf("interval = %v: want %v to %v", f.Interval, leastInterval, mostInterval)
	}
	return view.Report{Host: view.Host{Name: "host", CPUs: 1, Labels: f.Labels,
		Link: f.Link}}.Check()
}

// fleetMember is this host as a member of a fleet. Rules F3 to F5 of docs/protocol.md.
type fleetMember struct {
	*Host
	config Fleet
	brains []brain

	// orders is held while an order is carried out, and while a leader is heard: one comes after
	// the other.
	orders sync.Mutex
	file   *orders.File

	standing orders.Standing // guarded by Host.mu

	// For report alone: the VMs of the last one, and the VM that it looked ahead for last.
	pictured []portrait
	looked   string
}

func (h *Host) openFleet() (*fleetMember, error) {
	m := &fleetMember{Host: h, config: *h.config.Fleet}
	for _, text := range m.config.Brains {
		b, err := parseBrain(text)
		if err != nil {
			return nil, err
		}
		m.brains = append(m.brains, b)
	}
	var err error
	m.file, err = orders.Open(filepath.Join(h.config.Journal, journal.OrdersFile))
	m.readStanding()
	return m, err
}

// run keeps a stream to the leader until ctx is done. Without one the host goes on as it is.
func (m *fleetMember) run(ctx context.Context) {
	next, said := m.brains[0], ""
	for at := 0; ctx.Err() == nil; {
		elsewhere, err := m.join(ctx, next)
		if ctx.Err() != nil {
			return
		}
		if text := fmt.Sprint(err); err != nil && text != said {
			said = text
			m.log.Warn("no leader of the fleet hears this host: it goes on by itself", "brain",
				next.name, "error", err)
		}
		// Only those that are configured are believed.
		i := slices.IndexFunc(m.brains, func(b brain) bool { return b.name == elsewhere })
		if i < 0 || m.brains[i] == next {
			at = (at + 1) % len(m.brains)
			i = at
		}
		next = m.brains[i]
		select {
		case <-time.After(rejoinPause):
		case <-ctx.Done():
		}
	}
}

// join holds one stream. It returns the name of the member that leads, if another one does.
func (m *fleetMember) join(ctx context.Context, b brain) (elsewhere string, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	transport := &http.Transport{TLSClientConfig: m.identity.Client(b.name),
		ForceAttemptHTTP2: true, TLSHandshakeTimeout: requestTime,
		DialContext: (&net.Dialer{Timeout: requestTime}).DialContext,
		HTTP2:       &http.HTTP2Config{SendPingTimeout: requestTime, PingTimeout: requestTime}}
	defer transport.CloseIdleConnections()
	client := fleetv1.NewHostsClient(&http.Client{Transport: transport}, "https://"+b.address,
		connect.WithReadMaxBytes(fleetMessage))
	stream := client.Join(ctx)
	defer stream.CloseResponse()
	var sending sync.Mutex
	send := func(s *fleetv1.HostSays) error {
		sending.Lock()
		defer sending.Unlock()
		return stream.Send(s)
	}
	// As long as there may be more to send, net/http does not look at the context.
	context.AfterFunc(ctx, func() {
		sending.Lock()
		defer sending.Unlock()
		stream.CloseRequest()
	})
	defer cancel(nil)
	if err := send(&fleetv1.HostSays{What: &fleetv1.HostSays_Hello{
		Hello: &fleetv1.Hello{Version: m.version, HeedsStanding: true}}}); err != nil {
		_, said := stream.Receive() // which says why
		return "", cmp.Or(said, err)
	}
	first, err := stream.Receive()
	if err != nil {
		return "", err
	}
	if e := first.GetElsewhere(); e != nil {
		name, _, _ := strings.Cut(e.Leader, "@")
		return name, nil
	}
	if first.GetWelcome() == nil {
		return "", fmt.Errorf("%s does not say whether it leads", b.name)
	}
	if err := m.hear(first.GetWelcome().Epoch); err != nil {
		m.log.Warn("refused a leader of the fleet", "brain", b.name, "error", err)
		return "", err
	}
	m.log.Info("joined the fleet", "leader", b.name, "epoch", first.GetWelcome().Epoch)

	var reports sync.WaitGroup
	defer reports.Wait()
	defer cancel(nil)
	reports.Go(func() {
		for ctx.Err() == nil {
			r, err := m.report(ctx)
			if err == nil {
				err = send(&fleetv1.HostSays{What: &fleetv1.HostSays_Report{Report: r}})
				if err != nil {
					cancel(err)
					return
				}
				continue
			}
			if ctx.Err() == nil {
				m.log.Warn("this host does not know what to report to its fleet", "error", err)
			}
			select {
			case <-time.After(rejoinPause):
			case <-ctx.Done():
			}
		}
	})
	for {
		s, err := stream.Receive()
		if err != nil {
			return "", err
		}
		if told := s.GetStanding(); told != nil {
			if err := m.heed(told); errors.Is(err, orders.ErrDeposed) {
				return "", err
			} else if err != nil {
				m.log.Error("what the fleet's leader tells of this host is not kept on the disk",
					"error", err)
			}
			continue
		}
		o := s.GetOrder()
		if o == nil {
			return "", fmt.Errorf("%s says what this daemon does not know: it is older", b.name)
		}
		a := &fleetv1.Answer{PlanId: o.PlanId, Plan: o.Plan}
		if v, err := m.obey(ctx, b, o); err != nil {
			a.Refused = err.Error()
			if len(a.Refused) > 1000 {
				a.Refused = a.Refused[:1000]
			}
		} else {
			a.EvictionId = v.entry.ID().String()
		}
		if err := send(&fleetv1.HostSays{What: &fleetv1.HostSays_Answer{Answer: a}}); err != nil {
			return "", err
		}
	}
}

// hear makes durable that a leader has been heard.
func (m *fleetMember) hear(epoch uint64) error {
	m.orders.Lock()
	defer m.orders.Unlock()
	mark, err := m.file.Mark().Hear(epoch)
	if err != nil {
		return err
	}
	return m.file.Write(mark)
}

// obey carries out an order, if that counts and this host agrees.
func (m *fleetMember) obey(ctx context.Context, b brain, o *fleetv1.Order) (*eviction, error) {
	m.orders.Lock()
	defer m.orders.Unlock()
	log := m.log.With("brain", b.name, "epoch", o.Epoch, "plan", o.Plan, "vm", o.Vm, "to", o.To)
	mark, err := m.file.Mark().Spend(o.Epoch, o.Plan)
	if err == nil {
		err = m.file.Write(mark)
	}
	if err == nil && (o.PlanId == "" || len(o.PlanId) > 64) {
		err = errors.New("the order has no ID of a plan")
	}
	var v *eviction
	if err == nil {
		// Once it is begun it goes on, whether the leader listens or not.
		v, err = m.evict(ctx, o.Vm, o.To, options{Plan: o.PlanId, incarnation: o.Incarnation,
			RateLimit: o.Rate}, false)
	}
	if err != nil {
		log.Warn("refused an order of the fleet", "error", err)
		return nil, err
	}
	log.Info("carries out an order of the fleet", "eviction", v.entry.ID())
	return v, nil
}

// incarnation tells this run of a VM here from all others: by its QEMU, and its last eviction.
func (h *Host) incarnation(vm string, p process.Process) string {
	return fmt.Sprintf("%s/%d/%d/%s", process.BootID(), p.PID, p.StartTime, h.left(vm).Last)
}

// report is what this host is like, which it measures for as long as a report is apart from the
// next.
func (m *fleetMember) report(ctx context.Context) (*fleetv1.Report, error) {
	m.estimate(ctx)
	// Ahead of the VMs: what comes later is kept off.
	m.mu.Lock()
	heeds, here := m.standing.Phase, slices.Collect(maps.Keys(m.taken))
	m.mu.Unlock()
	p, err := m.measure(ctx, cmp.Or(m.config.Interval, usualInterval))
	if err != nil {
		return nil, err
	}
	m.pictured = p.vms
	// No order is carried out between the mark, the evictions and the VMs.
	m.orders.Lock()
	defer m.orders.Unlock()
	mark := m.file.Mark()
	load := p.answer(0)
	r := &fleetv1.Report{
		Mark:      &fleetv1.Mark{Epoch: mark.Epoch, Plan: mark.Plan},
		Evictions: m.ordered(),
		Load: &fleetv1.Load{Cpus: load.CPUs, Used: max(0, load.Used), Waiting: load.Waiting,
			Total: load.Total, Available: min(load.Available, load.Total),
			Rate:   float64(cmp.Or(m.config.Rate, usualFleetRate) * bytesPerMbit),
			Link:   m.config.Link,
			Labels: m.config.Labels},
	}
	if t, ok := m.transferTime(); ok {
		r.Load.TransferS = t.Seconds()
	}
	m.mu.Lock()
	r.Guard = m.verdict
	if m.stopping {
		r.Load.Closed = "its daemon is stopping"
	}
	m.mu.Unlock()
	if m.link == nil {
		r.Load.Closed = "its daemon takes no VMs: listen is not set in its vacated.toml"
	}
	for _, v := range p.vms {
		here = append(here, v.vm.Name)
		if vm := m.tell(v); vm != nil {
			r.Vms = append(r.Vms, vm)
		}
	}
	for _, v := range m.list() {
		if e := v.entry.Record(); e.Ended.IsZero() {
			here = append(here, e.VM)
		}
	}
	slices.Sort(here)
	r.Heeds, r.Here = heeds, slices.Compact(here)
	return r, nil
}

// tell is a VM as the fleet is told; nil if it does not run here. Of one that is on its way its
// source tells until the commit, then its destination.
func (m *fleetMember) tell(v portrait) *fleetv1.VM {
	if v.process.PID == 0 {
		return nil
	}
	out := &fleetv1.VM{Name: v.vm.Name, Incarnation: m.incarnation(v.vm.Name, v.process),
		Vcpus: uint32(len(v.vcpus)), Cpu: v.load.CPU, Waiting: v.load.Waiting,
		Overhead: v.load.Overhead, Resident: v.load.Resident, Memory: v.load.Resident,
		InUse: v.load.Resident, Hot: v.load.Resident, Priority: int32(v.vm.Priority),
		Pinned: v.vm.Pinned, Barred: v.evicting, Labels: v.vm.Labels}
	if e := m.openFor(v.vm.Name); e != nil {
		e.mu.Lock()
		state := e.state
		e.mu.Unlock()
		switch role := e.entry.Record().Role; state {
		case evict.Running, evict.CutOff, evict.Completing:
		case "", evict.Preparing, evict.Switching, evict.Loading, evict.Committing,
			evict.RollingBack:
			if role == journal.Destination {
				return nil
			}
		default:
			return nil
		}
	}
	if out.Barred == "" && v.vm.Unfit != nil {
		out.Barred = v.vm.Unfit.Error()
	}
	out.Barred = cmp.Or(out.Barred, v.problem)
	m.mu.Lock()
	if e, ok := m.ahead[v.vm.Name]; ok && e.process == v.process {
		out.Memory, out.InUse, out.Hot = pageBytes(e.Total), pageBytes(e.InUse), pageBytes(e.Hot)
		out.Barred = cmp.Or(out.Barred, e.Held)
	}
	m.mu.Unlock()
	out.Barred = out.Barred[:min(len(out.Barred), 1000)]
	if at := m.movedAt(v.vm.Name); !at.IsZero() {
		out.MovedAt = timestamppb.New(at)
	}
	return out
}

// estimate looks ahead for one VM that nothing is known about, or nothing new. They take turns, as
// a VM may be due each time.
func (m *fleetMember) estimate(ctx context.Context) {
	first := 1 + slices.IndexFunc(m.pictured,
		func(v portrait) bool { return v.vm.Name == m.looked })
	for i := range m.pictured {
		v := m.pictured[(first+i)%len(m.pictured)]
		m.mu.Lock()
		last := m.ahead[v.vm.Name]
		m.mu.Unlock()
		if v.process.PID == 0 || v.evicting != "" || v.problem != "" || v.vm.Unfit != nil ||
			last.holds(v, estimateFleetAge) {
			continue
		}
		m.looked = v.vm.Name
		if _, err := m.lookAhead(ctx, v, estimateFleetAge); err != nil {
			m.log.Debug("cannot look ahead", "vm", v.vm.Name, "error", err)
		}
		return
	}
}

// ordered are the evictions that the fleet ordered: those that go on, and the latest that have
// ended.
func (m *fleetMember) ordered() (list []*fleetv1.OrderedEviction) {
	for _, v := range slices.Backward(m.list()) {
		r := v.entry.Record()
		var o options
		if len(list) == mostOrdered || r.Role != journal.Source || len(r.Options) == 0 ||
			json.Unmarshal(r.Options, &o) != nil || o.Plan == "" ||
			!r.Ended.IsZero() && time.Since(r.Ended) > orderedTime {
			continue
		}
		e := &fleetv1.OrderedEviction{PlanId: o.Plan, EvictionId: r.ID.String(), Vm: r.VM}
		v.mu.Lock()
		e.State, e.Outcome, e.Reason = string(v.state), v.outcome, v.reason
		v.mu.Unlock()
		e.Reason = e.Reason[:min(len(e.Reason), 1000)]
		if !r.Ended.IsZero() {
			e.EndedAt = timestamppb.New(r.Ended)
			var report evict.Report
			if json.Unmarshal(r.Report, &report) == nil {
				e.DownS, e.TotalS = report.Down, report.Total
			}
		}
		list = append(list, e)
	}
	return list
}
