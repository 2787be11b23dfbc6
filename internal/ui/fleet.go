package ui

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Brain is that of a fleet, which is asked in place of daemons. These are asked only about
// evictions that the fleet has ordered.
type Brain struct {
	// Find finds the member that leads.
	Find func(context.Context) (fleetv1.FleetClient, error)
	// Daemon makes a client of a host's daemon. Its key is the host's name.
	Daemon func(host string) (Remote, error)

	mu      sync.Mutex // guards what follows
	client  fleetv1.FleetClient
	daemons map[string]Remote
}

// Fleet is a fleet as viewers see it.
type Fleet struct {
	// Error is why its brain could not be asked; empty if it could.
	Error   string `json:"error,omitempty"`
	Leader  string `json:"leader"`
	Since   int64  `json:"since_ms"`
	Version string `json:"version"`
	Mode    string `json:"mode"`
	// Role is what the one who looks may do: view, act or admin.
	Role     string   `json:"role"`
	Troubles []string `json:"troubles"`
	Rules    []Rule   `json:"rules"`
	// Unheard are hosts with evictions under way whose daemons could not be asked, and why.
	Unheard map[string]string `json:"unheard,omitempty"`
}

// Rule is a rule of a fleet.
type Rule struct {
	Name string `json:"name"`
	Rule string `json:"rule"`
	By   string `json:"by"`
}

// Maintenance is how far that of a host has come.
type Maintenance struct {
	Phase  string `json:"phase"`
	Reason string `json:"reason,omitempty"`
	Who    string `json:"who"`
	Asked  int64  `json:"asked_ms"`
	At     int64  `json:"at_ms,omitempty"` // when one that is planned begins
	By     int64  `json:"by_ms,omitempty"`
	// Takes is how long it would take, as was said at first; nil: that was not known.
	Takes *Num `json:"takes_s"`
	// VMs is how many were there. Going have yet to leave, or to come back; Staying will not.
	VMs     uint32   `json:"vms"`
	Going   []string `json:"going"`
	Staying []string `json:"staying"`
}

// Bounds of asking a fleet's brain.
const (
	fleetPause    = 2 * time.Second // between two times
	hostsPerSec   = 500             // so many hosts are shown anew in a second
	spread        = streamPause     // between parts of the hosts
	mostDecisions = 200
	mostFollowed  = 12 // hosts whose evictions are followed at a time
)

// lead is the member that leads.
func (b *Brain) lead(ctx context.Context) (fleetv1.FleetClient, error) {
	b.mu.Lock()
	c := b.client
	b.mu.Unlock()
	if c != nil {
		return c, nil
	}
	c, err := b.Find(ctx)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.client = c
	return c, nil
}

// lost has the member that leads be looked for anew.
func (b *Brain) lost() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.client = nil
}

// daemon is that of a host.
func (b *Brain) daemon(host string) (Remote, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if d, ok := b.daemons[host]; ok {
		return d, nil
	}
	d, err := b.Daemon(host)
	if err != nil {
		return Remote{}, err
	}
	if b.daemons == nil {
		b.daemons = map[string]Remote{}
	}
	b.daemons[host] = d
	return d, nil
}

// told is the text of an error of a fleet's brain.
func told(err error) error {
	var said *connect.Error
	if errors.As(err, &said) {
		return errors.New(brief(said.Message()))
	}
	return err
}

// PollFleet keeps a hub up to date about a fleet until ctx is done, while anybody looks.
func (h *Hub) PollFleet(ctx context.Context, b *Brain, tell func(*hostv1.Eviction) string) {
	p := &fleetPoller{life: ctx, hub: h, brain: b, tell: tell, daemons: map[string]*poller{}}
	defer p.tasks.Wait()
	for {
		select {
		case <-h.Watched():
		case <-ctx.Done():
			return
		}
		began := time.Now()
		if err := p.poll(ctx); err != nil && ctx.Err() == nil {
			b.lost()
			f := Fleet{Troubles: []string{}, Rules: []Rule{}}
			if was := h.Fleet(); was != nil {
				f = *was
			}
			f.Error = told(err).Error()
			h.PutFleet(&f)
		}
		select {
		case <-time.After(fleetPause - time.Since(began)):
		case <-ctx.Done():
			return
		}
	}
}

type fleetPoller struct {
	life  context.Context // ends all that follows evictions
	hub   *Hub
	brain *Brain
	tell  func(*hostv1.Eviction) string
	tasks sync.WaitGroup

	mu      sync.Mutex
	daemons map[string]*poller // of hosts with evictions under way; guarded by mu
	unheard map[string]string  // guarded by mu
}

// poll asks once.
func (p *fleetPoller) poll(ctx context.Context) error {
	asking, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	c, status, err := p.leading(asking)
	if err != nil {
		return err
	}
	rules, err := c.ListRules(asking, connect.NewRequest(&fleetv1.ListRulesRequest{}))
	if err != nil {
		return err
	}
	decisions, err := c.ListDecisions(asking,
		connect.NewRequest(&fleetv1.ListDecisionsRequest{Most: mostDecisions}))
	if err != nil {
		return err
	}
	hosts, err := c.ListHosts(asking, connect.NewRequest(&fleetv1.ListHostsRequest{}))
	if err != nil {
		return err
	}
	p.follow(decisions.Msg.Decisions)
	f := newFleet(status, rules.Msg)
	p.mu.Lock()
	f.Unheard = maps.Clone(p.unheard)
	p.mu.Unlock()
	p.hub.PutFleet(f)
	p.hub.PutDecisions(decisions.Msg.Decisions)
	return p.hosts(ctx, hosts.Msg.Hosts)
}

// leading finds the member that leads, also if that is another one than before.
func (p *fleetPoller) leading(ctx context.Context) (fleetv1.FleetClient, *fleetv1.StatusResponse,
	error) {
	for again := false; ; again = true {
		c, err := p.brain.lead(ctx)
		if err != nil {
			return nil, nil, err
		}
		r, err := c.Status(ctx, connect.NewRequest(&fleetv1.StatusRequest{}))
		switch {
		case err == nil && r.Msg.Leads:
			return c, r.Msg, nil
		case again && err == nil:
			return nil, nil, errors.New("no member leads the fleet at the moment")
		case again:
			return nil, nil, err
		}
		p.brain.lost()
	}
}

func newFleet(s *fleetv1.StatusResponse, r *fleetv1.ListRulesResponse) *Fleet {
	f := &Fleet{Leader: brief(s.Leader), Version: brief(s.Version), Mode: brief(s.Mode),
		Role: s.Role, Since: s.Since.AsTime().UnixMilli(), Troubles: []string{}, Rules: []Rule{}}
	seen := map[string]bool{}
	for _, t := range slices.Concat(briefs(s.Troubles), briefs(r.Troubles)) {
		if !seen[t] {
			seen[t] = true
			f.Troubles = append(f.Troubles, t)
		}
	}
	for _, x := range r.Rules[:min(len(r.Rules), mostRules)] {
		f.Rules = append(f.Rules, Rule{brief(x.Name), brief(x.Rule), brief(x.By)})
	}
	return f
}

// hosts takes what the leader tells of all hosts. Those that have told something new are shown part
// by part: a page of a thousand hosts then never has much to do at once.
func (p *fleetPoller) hosts(ctx context.Context, list []*fleetv1.Host) error {
	there := map[string]bool{}
	var changed []*Host
	first := true
	for _, m := range list {
		if len(m.Name) > mostName {
			continue
		}
		there[m.Name] = true
		was, is := p.hub.Host(m.Name), fleetHost(m)
		first = first && was == nil
		if !was.same(is) {
			changed = append(changed, is)
		}
	}
	p.hub.keep(there)
	part := len(changed)
	if !first {
		part = min((part+7)/8, int(hostsPerSec*spread/time.Second))
	}
	for i, list := range slices.Collect(slices.Chunk(changed, max(1, part))) {
		if i > 0 {
			select {
			case <-time.After(spread):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		p.hub.PutHosts(list)
	}
	return nil
}

// same reports whether a host has told nothing new.
func (h *Host) same(o *Host) bool {
	if h == nil || h.State != o.State || math.Abs(float64(h.At-o.At)) > 300 {
		return false
	}
	return reflect.DeepEqual(h.Maintenance, o.Maintenance)
}

// fleetHost is a host as the leader tells.
func fleetHost(m *fleetv1.Host) *Host {
	l := m.GetLoad()
	h := &Host{Key: m.Name, Name: brief(m.Name), State: brief(m.State), Version: brief(m.Version),
		Guard: brief(m.Guard), Peers: []string{}, VMs: []VM{}, CPUs: Num(l.GetCpus()),
		Cores: Num(l.GetUsed()), Waiting: Num(l.GetWaiting()), Memory: l.GetTotal(),
		Available: l.GetAvailable(), Labels: map[string]string{}}
	for k, v := range l.GetLabels() {
		if len(h.Labels) < mostLabels {
			h.Labels[brief(k)] = brief(v)
		}
	}
	if m.SilentS != nil && within(*m.SilentS, 1e9) {
		h.At = time.Now().Add(-time.Duration(*m.SilentS * float64(time.Second))).UnixMilli()
	}
	if c := l.GetClosed(); c != "" {
		h.Problems = append(h.Problems, "It takes no VMs: "+brief(c))
	}
	for _, v := range m.Vms[:min(len(m.Vms), mostVMs)] {
		vm := VM{Name: brief(v.Name), State: "running", Memory: v.Memory, VCPUs: v.Vcpus,
			Cores: Num(v.Cpu), Waiting: Num(v.Waiting), Resident: v.Resident,
			Problem: brief(v.Barred)}
		if wants := v.Cpu + v.Waiting; wants > 0 {
			vm.Steal = Num(v.Waiting / wants)
		}
		h.VMs = append(h.VMs, vm)
	}
	if m.Maintenance == "" {
		return h
	}
	x := &Maintenance{Phase: brief(m.Maintenance), Reason: brief(m.MaintenanceReason),
		Who: brief(m.MaintenanceWho), VMs: m.MaintenanceVms, Going: briefs(m.Going),
		Staying: briefs(m.Staying), Asked: m.MaintenanceAskedAt.AsTime().UnixMilli(),
		At: m.MaintenanceAt.AsTime().UnixMilli(), By: m.MaintenanceBy.AsTime().UnixMilli()}
	if m.MaintenanceTakesS != nil {
		x.Takes = new(Num(*m.MaintenanceTakesS))
	}
	h.Maintenance = x
	return h
}

// follow has the daemons of hosts be asked that carry out orders, and forgets evictions of others.
func (p *fleetPoller) follow(list []*fleetv1.Decision) {
	open := map[string]bool{}
	for _, d := range slices.Backward(list) { // the oldest first
		if d.State == "goes on" && d.EvictionId != "" && len(open) < mostFollowed {
			open[d.From] = true
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for host := range p.daemons {
		if !open[host] && p.daemons[host].idle() {
			delete(p.daemons, host)
			p.hub.dropEvictions(host)
		}
	}
	unheard := map[string]string{}
	for host := range open {
		d := p.daemons[host]
		if d == nil {
			remote, err := p.brain.daemon(host)
			if err != nil {
				unheard[host] = brief(err.Error())
				continue
			}
			d = &poller{life: p.life, hub: p.hub, d: remote, tell: p.tell,
				following: map[string]bool{}}
			p.daemons[host] = d
		}
		if said := p.unheard[host]; said != "" {
			unheard[host] = said
		}
		d.mu.Lock()
		busy := d.asking
		d.asking = true
		d.mu.Unlock()
		if busy {
			continue
		}
		p.tasks.Go(func() {
			err := d.open()
			p.mu.Lock()
			defer p.mu.Unlock()
			delete(p.unheard, host)
			if err != nil {
				p.unheard[host] = brief(err.Error())
			}
		})
	}
	p.unheard = unheard
}

// Texts of what orders to a fleet come to, which the command line says, too.

// Restored says what restoring a host comes to.
func Restored(r *fleetv1.RestoreResponse) string {
	return fmt.Sprintf("%s: takes VMs again; %d that were there come back if that helps",
		strings.Join(r.Hosts, ", "), len(r.Vms))
}

// DrainTakes says how long a drain takes that begins at a time.
func DrainTakes(q *fleetv1.DrainRequest, r *fleetv1.DrainResponse, now time.Time) (list []string) {
	for _, h := range r.Hosts {
		switch {
		case len(r.Hosts) < 2:
		case h.DoneS != nil:
			list = append(list, fmt.Sprintf("%s is empty within %.0f s", h.Host, *h.DoneS))
		default:
			list = append(list, fmt.Sprintf("%s does not get empty", h.Host))
		}
	}
	if r.TakesS == nil {
		return append(list, fmt.Sprintf("%s has not reported: it is not known how long it will "+
			"take", q.Host))
	}
	takes := time.Duration(*r.TakesS * float64(time.Second))
	list = append(list, fmt.Sprintf("all that can leave %s will have left in %v", q.Host,
		takes.Round(time.Second)))
	list = append(list, r.Pace...)
	if q.By != nil && now.Add(takes).After(q.By.AsTime()) {
		list = append(list, fmt.Sprintf("that is later than %s",
			q.By.AsTime().Local().Format("15:04")))
	}
	return list
}

// ClockTime is the next time at which a clock shows HH:MM.
func ClockTime(flag, text string, now time.Time) (time.Time, error) {
	t, err := time.Parse("15:04", text)
	if err != nil {
		return t, fmt.Errorf("%s %q: want HH:MM", flag, text)
	}
	at := time.Date(now.Year(), now.Month(), now.Day(), t.Hour(), t.Minute(), 0, 0, now.Location())
	if at.Before(now) {
		at = at.AddDate(0, 0, 1)
	}
	return at, nil
}

// Modes are what becomes of decisions in each mode.
var Modes = map[string]string{
	"watch": "Decisions are logged, and nothing is moved by them.",
	"ask":   "Each decision waits for an operator's yes, for 10 minutes.",
	"auto":  "Decisions are carried out.",
}

// step is a VM that leaves in a drain.
type step struct {
	VM   string `json:"vm"`
	From string `json:"from"`
	To   string `json:"to"`
	Done Num    `json:"done_s"`
}

// askFleet says what would come of an order to a fleet, and touches nothing.
func (s *Server) askFleet(ctx context.Context, o order) (*preview, error) {
	c, err := s.Brain.lead(ctx)
	if err != nil {
		return nil, err
	}
	p := &preview{}
	switch o.Kind {
	case "drain":
		q, err := o.drain(time.Now())
		if err != nil {
			return nil, err
		}
		q.DryRun = true
		r, err := c.Drain(ctx, connect.NewRequest(q))
		if err != nil {
			return nil, told(err)
		}
		p.Command = "vacate fleet drain " + o.Host
		if o.At != "" {
			p.Command += " --at " + o.At
		}
		if o.By != "" {
			p.Command += " --by " + o.By
		}
		if o.Reason != "" {
			p.Command += fmt.Sprintf(" --reason %q", o.Reason)
		}
		p.Text = fmt.Sprintf("VMs of %s leave for other hosts, and none comes until it is "+
			"restored. No VM is stopped.", o.Host)
		begin := time.Now()
		if q.At != nil {
			begin = q.At.AsTime()
			p.Text += fmt.Sprintf(" The drain begins %s; this is what it would come to now.",
				begin.Local().Format(time.DateTime))
		}
		p.Lines = briefs(append(r.Msg.Warnings, DrainTakes(q, r.Msg, begin)...))
		p.Staying = briefs(r.Msg.Staying)
		for _, x := range r.Msg.Steps[:min(len(r.Msg.Steps), mostVMs)] {
			p.Steps = append(p.Steps, step{brief(x.Vm), brief(x.From), brief(x.To),
				Num(x.DoneS)})
		}
	case "restore":
		r, err := c.Restore(ctx,
			connect.NewRequest(&fleetv1.RestoreRequest{Host: o.Host, DryRun: true}))
		if err != nil {
			return nil, told(err)
		}
		p.Command = "vacate fleet restore " + o.Host
		p.Text = brief(Restored(r.Msg)) + "."
		p.Lines = briefs(r.Msg.Vms)
	case "forget":
		p.Command = "vacate fleet forget " + o.Host
		p.Text = fmt.Sprintf("Host %s is removed from the fleet, with what the fleet has ordered "+
			"it to do. It must not be connected. If it joins again, it belongs to the fleet again.",
			o.Host)
	case "approve", "reject":
		d := s.Hub.decision(o.ID)
		if d == nil || d.State != "waits" {
			return nil, errors.New("this decision does not wait any more")
		}
		p.Command = "vacate fleet approve " + o.ID
		p.Text = fmt.Sprintf("VM %s leaves host %s and runs on host %s.", brief(d.Vm),
			brief(d.From), brief(d.To))
		p.Lines = briefs(d.Reasons)
		if o.Kind == "reject" {
			p.Command += " --reject"
			p.Text = fmt.Sprintf("VM %s stays on host %s, and is left alone for a while.",
				brief(d.Vm), brief(d.From))
		}
	case "mode":
		is, known := Modes[o.Mode]
		if !known {
			return nil, fmt.Errorf("no mode %q", o.Mode)
		}
		p.Command = "vacate fleet mode " + o.Mode
		p.Text = is + " Drains are carried out in each mode."
		if n := s.Hub.waiting(); n > 0 && o.Mode != "ask" {
			p.Text += fmt.Sprintf(" %d decisions that wait for a yes are given up.", n)
		}
	case "rule":
		p.Command = fmt.Sprintf("vacate fleet rules --set %s %q", o.Name, o.Rule)
		if o.Name == "" || o.Rule == "" {
			p.Refused = "A rule has a name, and says what holds."
			break
		}
		r, err := c.PutRule(ctx, connect.NewRequest(&fleetv1.PutRuleRequest{Name: o.Name,
			Rule: o.Rule, DryRun: true}))
		if err != nil {
			return nil, told(err)
		}
		p.Text = "The rule is kept already: no VM has to move for it."
		if p.Lines = briefs(r.Msg.Troubles); len(p.Lines) > 0 {
			p.Text = "The rule is not kept yet. What is in the way:"
		}
	case "unrule":
		p.Command = "vacate fleet rules --remove " + o.Name
		p.Text = fmt.Sprintf("The rule %q holds no longer.", o.Name)
	case "place":
		p.Command = fmt.Sprintf("vacate fleet place --memory %dM --cpu %g", o.Memory, o.CPU)
		if o.Name != "" {
			p.Command += " --name " + o.Name
		}
		r, err := c.Place(ctx, connect.NewRequest(&fleetv1.PlaceRequest{Memory: o.Memory << 20,
			Cpu: o.CPU, Name: o.Name, Most: 5}))
		if err != nil {
			return nil, told(err)
		}
		for _, x := range r.Msg.Choices {
			p.Lines = append(p.Lines, brief(x.Host)+": "+brief(x.Why))
		}
		if len(p.Lines) == 0 {
			p.Refused = "No host can have it: " + brief(r.Msg.Why)
		}
	default:
		return nil, fmt.Errorf("no order %q", o.Kind)
	}
	return p, nil
}

// drain is the order as the fleet's brain takes it.
func (o order) drain(now time.Time) (*fleetv1.DrainRequest, error) {
	q := &fleetv1.DrainRequest{Host: o.Host, Reason: o.Reason}
	begin := now
	if o.At != "" {
		at, err := ClockTime("--at", o.At, now)
		if err != nil {
			return nil, err
		}
		begin, q.At = at, timestamppb.New(at)
	}
	if o.By != "" {
		by, err := ClockTime("--by", o.By, begin)
		if err != nil {
			return nil, err
		}
		q.By = timestamppb.New(by)
	}
	return q, nil
}

// doFleet does what an order to a fleet asks for, and says what came of it.
func (s *Server) doFleet(ctx context.Context, o order) (said string, err error) {
	c, err := s.Brain.lead(ctx)
	if err != nil {
		return "", err
	}
	switch o.Kind {
	case "drain":
		var q *fleetv1.DrainRequest
		if q, err = o.drain(time.Now()); err == nil {
			_, err = c.Drain(ctx, connect.NewRequest(q))
		}
		said = fmt.Sprintf("The drain of %s has begun.", o.Host)
		if o.At != "" {
			said = fmt.Sprintf("%s will be drained at %s.", o.Host, o.At)
		}
	case "restore":
		var r *connect.Response[fleetv1.RestoreResponse]
		r, err = c.Restore(ctx, connect.NewRequest(&fleetv1.RestoreRequest{Host: o.Host}))
		if err == nil {
			said = brief(Restored(r.Msg)) + "."
		}
	case "forget":
		_, err = c.Forget(ctx, connect.NewRequest(&fleetv1.ForgetRequest{Host: o.Host}))
		said = fmt.Sprintf("Host %s is forgotten.", o.Host)
	case "approve", "reject":
		var r *connect.Response[fleetv1.Decision]
		r, err = c.Approve(ctx, connect.NewRequest(&fleetv1.ApproveRequest{Id: o.ID,
			Reject: o.Kind == "reject"}))
		if err == nil {
			said = fmt.Sprintf("VM %s to host %s: %s.", brief(r.Msg.Vm), brief(r.Msg.To),
				brief(r.Msg.State))
		}
	case "mode":
		_, err = c.SetMode(ctx, connect.NewRequest(&fleetv1.SetModeRequest{Mode: o.Mode}))
		said = fmt.Sprintf("The mode is %s.", o.Mode)
	case "rule":
		_, err = c.PutRule(ctx,
			connect.NewRequest(&fleetv1.PutRuleRequest{Name: o.Name, Rule: o.Rule}))
		said = fmt.Sprintf("The rule %q holds.", o.Name)
	case "unrule":
		_, err = c.RemoveRule(ctx,
			connect.NewRequest(&fleetv1.RemoveRuleRequest{Name: o.Name}))
		said = fmt.Sprintf("The rule %q is removed.", o.Name)
	default:
		err = fmt.Errorf("no order %q", o.Kind)
	}
	return said, told(err)
}

// ofFleet are the kinds of orders that a fleet's brain takes.
var ofFleet = []string{"drain", "restore", "forget", "approve", "reject", "mode", "rule", "unrule",
	"place"}

// byTime has decisions that wait first, then those that go on, then the latest.
func byTime(a, b *fleetv1.Decision) int {
	rank := func(d *fleetv1.Decision) int {
		return slices.Index([]string{"goes on", "waits"}, d.State)
	}
	return cmp.Or(cmp.Compare(rank(b), rank(a)), b.At.AsTime().Compare(a.At.AsTime()),
		cmp.Compare(a.Id, b.Id))
}
