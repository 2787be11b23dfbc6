// Package fleetsim simulates fleets of hosts, with loads that swing by the day, burst and are
// noisy, and with hosts that are late, lie, vanish and come back. It has them kept in balance by
// the planner of package place, or by a rival, and counts what comes of it.
//
// All rivals get the same loads and the same faults from one seed. What VMs get is what is left of
// their host's cores: each gets the same share of what it wants. An eviction takes as long as its
// memory takes over links that are shared; engines take CPU from VMs at both ends, and the VM that
// moves is slower until most of its hot memory has arrived.
package fleetsim

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"time"

	"vacate/internal/fleet/place"
	"vacate/internal/fleet/view"

	"golang.org/x/sys/unix"
)

// Options are what is simulated.
type Options struct {
	Hosts    int
	VMs      int // on each host
	For      time.Duration
	Step     time.Duration // how often hosts report, and how often there is a round
	Seed     uint64
	Load     float64 // how much more VMs want than usual; 1: their hosts are half busy
	Faults   bool
	Drains   time.Duration // how often a host is drained, by the planner only; 0: never
	Balancer string        // one of Balancers
}

// Balancers are what a fleet may be kept in balance by.
var Balancers = []string{"none", "utilisation", "greedy", "vacate"}

// Result is what came of it.
type Result struct {
	Options
	Wanted  float64 // core hours
	Lacked  float64 // of these
	Starved float64 // VM hours in which one got less than 90 % of what it wanted
	Moves   int     // that were begun
	Failed  int     // of these
	// Maintained are moves from hosts that were drained, and back.
	Maintained int
	Refused    int // orders that a host refused
	// Again are moves of a VM that had moved less than 30 minutes before.
	Again int
	// Overfilled are moves to hosts that had, with all that was on its way there, not the memory.
	Overfilled int
	// Broken are moves that broke a rule that must hold.
	Broken int
	// From the moment that VMs starve on a host to the first order for one of them to leave.
	Orders []time.Duration
	// Episodes are how often VMs began to starve on a host; Passed are those that were over before
	// any order.
	Episodes, Passed int
	Drained          []Drained
	// CPU that the planner took for a report, and for a round.
	Report time.Duration
	Rounds []time.Duration // in order of size
	Memory uint64          // of the planner
}

// Drained is a drain that is over.
type Drained struct {
	Host          string
	VMs, Stayed   int
	Forecast, Was time.Duration
}

const (
	gib      = 1 << 30
	cores    = 32.0
	memory   = 512 * gib
	linkRate = 1.25e9
	rack     = 40 // hosts
	starving = 0.9
	transfer = 200 * time.Millisecond
)

// machine is a host.
type machine struct {
	name   string
	labels view.Labels
	rack   string
	guests []int
	used   uint64 // memory of its VMs
	coming uint64 // memory that is on its way to it
	under  int    // moves from it or to it
	wants  float64
	share  float64 // of what they want that its VMs get

	late, lies, gone int // until which step
	since            int // step at which its VMs began to starve; -1: they do not
	ordered          bool
	report           view.Report
}

// guest is a VM.
type guest struct {
	name             string
	labels           view.Labels
	group            int // of VMs that must run apart; -1: none
	gpu, pinned      bool
	vcpus            int
	size             uint64
	base, amp, phase float64
	burst, noise     float64
	want             float64
	host, to         int // to is -1 if it does not move
	left             float64
	wait             time.Duration
	moved            int // step of its last move; -1: none
	incarnation      int
}

type world struct {
	Options
	random   *rand.Rand
	faults   *rand.Rand
	machines []machine
	guests   []guest
	groups   [][]int
	rules    []view.Rule
	moving   []int
	step     int
	start    time.Time
	result   Result
	b        balancer
	drain    drain
}

// drain is one that goes on.
type drain struct {
	host           int // -1: none
	began, restore int
	forecast       time.Duration
	vms            int
}

func (w *world) now() time.Time { return w.start.Add(time.Duration(w.step) * w.Step) }

// newWorld makes a fleet in which all rules are kept and no host has too much memory in use.
func newWorld(o Options) (*world, error) {
	w := &world{Options: o, random: rand.New(rand.NewPCG(o.Seed, 1)), // #nosec G404 -- a simulation
		faults:   rand.New(rand.NewPCG(o.Seed, 2)), // #nosec G404 -- the same
		machines: make([]machine, o.Hosts), guests: make([]guest, 0, o.Hosts*o.VMs),
		start: time.Date(2026, 11, 30, 0, 0, 0, 0, time.UTC)}
	w.result.Options = o
	w.drain.host = -1
	for i := range w.machines {
		m := &w.machines[i]
		m.name, m.rack = fmt.Sprintf("h%05d", i), fmt.Sprintf("r%d", i/rack)
		m.labels = view.Labels{"rack": m.rack}
		if i%5 == 0 {
			m.labels["gpu"] = "yes"
		}
		m.since = -1
		for j := range o.VMs {
			w.addGuest(i, j)
		}
	}
	// Of every five hosts, a VM on three of them are one service: it must run apart.
	for i := 0; i+5 <= o.Hosts; i += 5 {
		n := len(w.groups)
		app := fmt.Sprintf("app%d", n)
		var group []int
		for _, at := range []int{i + 1, i + 2, i + 4} {
			g := &w.guests[at*o.VMs+o.VMs/2]
			g.group, g.labels = n, view.Labels{"app": app}
			group = append(group, at*o.VMs+o.VMs/2)
		}
		w.groups = append(w.groups, group)
		r, err := view.ParseRule(fmt.Sprintf("%s: vms app=%s must run apart", app, app))
		if err != nil {
			return nil, err
		}
		w.rules = append(w.rules, r)
	}
	r, err := view.ParseRule("gpu: vms gpu=yes must run on hosts gpu=yes")
	w.rules = append(w.rules, r)
	return w, err
}

// addGuest makes the VM of a number on a host.
func (w *world) addGuest(host, number int) {
	r, m := w.random, &w.machines[host]
	g := guest{name: fmt.Sprintf("v%07d", len(w.guests)), group: -1, host: host, to: -1, moved: -1,
		vcpus: []int{1, 1, 1, 2, 2, 2, 4, 4, 4, 8}[r.IntN(10)]}
	g.size = uint64(g.vcpus) * 4 * gib
	for m.used+g.size > memory/10*8 {
		g.vcpus, g.size = max(1, g.vcpus/2), max(gib, g.size/2)
		if g.size == gib {
			break
		}
	}
	m.used += g.size
	g.base = w.Load * float64(g.vcpus) * (0.05 + 0.5*r.Float64())
	g.amp = 0.3 + 0.4*r.Float64()
	g.phase = 14 + 3*r.NormFloat64() // o'clock
	if r.IntN(5) == 0 {
		g.phase = 3 + r.NormFloat64() // it works at night
	}
	switch {
	case number < 2 && host%5 == 0:
		g.gpu, g.labels = true, view.Labels{"gpu": "yes"}
	case r.IntN(50) == 0:
		g.pinned = true
	}
	w.guests = append(w.guests, g)
	m.guests = append(m.guests, len(w.guests)-1)
}

// load has all VMs want what they want now. It goes by VM, so that it is the same wherever they
// run.
func (w *world) load() {
	hour := float64(w.now().Sub(w.start)%(24*time.Hour)) / float64(time.Hour)
	var day [24 * 4]float64 // of a VM that wants the most so many quarters of an hour ago
	for i := range day {
		day[i] = math.Cos(2 * math.Pi * float64(i) / float64(len(day)))
	}
	often := uint32(float64(w.Step) / float64(8*time.Hour) * math.MaxUint32)
	fade := math.Exp(-float64(w.Step) / float64(10*time.Minute))
	keep := math.Exp(-float64(w.Step) / float64(time.Minute))
	for i := range w.guests {
		g := &w.guests[i]
		x := w.random.Uint64()
		if uint32(x) < often { // a burst: it wants up to four times as much
			g.burst = 3 * float64(x>>48) / (1 << 16)
		}
		g.burst *= fade
		g.noise = g.noise*keep + (float64(x>>32)/(1<<32)-0.5)*0.25
		at := int((hour-g.phase+48)*4) % len(day)
		g.want = min(float64(g.vcpus), max(0.01, g.base*(1+g.amp*day[at]+g.burst+g.noise)))
	}
}

// share has each host's VMs get what there is, and counts.
func (w *world) share() {
	hours := w.Step.Hours()
	for i := range w.machines {
		m := &w.machines[i]
		m.wants, m.share = 0, 0
		if m.gone > w.step {
			m.since = -1
			continue
		}
		for _, g := range m.guests {
			m.wants += w.guests[g].want
		}
		has := cores
		has -= min(float64(m.under), linkRate*5e-9) // a thread each, and what the link's rate takes
		m.share = min(1, has/m.wants)
		w.result.Wanted += m.wants * hours
		w.result.Lacked += m.wants * (1 - m.share) * hours
		switch {
		case m.share < starving:
			w.result.Starved += float64(len(m.guests)) * hours
			if m.since < 0 {
				m.since, m.ordered = w.step, false
				w.result.Episodes++
			}
		case m.since >= 0:
			if !m.ordered {
				w.result.Passed++
			}
			m.since = -1
		}
	}
}

// trouble has hosts be late, lie, vanish and come back. It is the same for all rivals but for
// hosts that are late as they starve.
func (w *world) trouble() {
	often := func(every time.Duration) bool {
		return w.faults.Float64() < float64(w.Hosts)*float64(w.Step)/float64(every)
	}
	lasts := func(most time.Duration) int {
		return w.step + 1 + w.faults.IntN(max(1, int(most/w.Step)))
	}
	if !w.Faults {
		return
	}
	m := &w.machines[w.faults.IntN(w.Hosts)]
	if often(24 * time.Hour) { // each host once in a day
		m.late = lasts(5 * time.Minute)
	}
	if often(48 * time.Hour) {
		m = &w.machines[w.faults.IntN(w.Hosts)]
		m.lies = lasts(10 * time.Minute)
	}
	if often(30 * 24 * time.Hour) {
		m = &w.machines[w.faults.IntN(w.Hosts)]
		m.gone = lasts(40 * time.Minute)
		m.late = max(m.late, m.gone)
	}
	for i := range w.machines {
		if m := &w.machines[i]; m.since == w.step && w.faults.IntN(20) == 0 {
			m.late = lasts(2 * time.Minute)
		}
	}
}

// tell makes a host's report.
func (w *world) tell(m *machine) view.Report {
	r := &m.report
	r.Seen = w.now()
	r.Host = view.Host{Name: m.name, Labels: m.labels, CPUs: cores, Used: m.wants * m.share,
		Waiting: m.wants * (1 - m.share), Total: memory, Available: memory - min(memory, m.used),
		Rate: linkRate, Link: m.rack, Transfer: transfer}
	r.VMs = r.VMs[:0]
	for _, i := range m.guests {
		r.VMs = append(r.VMs, w.portray(&w.guests[i], m.share))
	}
	if m.lies > w.step {
		if m.lies%2 == 0 {
			r.Host.Used = math.NaN()
		} else { // it has nothing to do, and nothing but room
			r.Host.Used, r.Host.Waiting, r.Host.Available = 1, 0, memory
			for i := range r.VMs {
				r.VMs[i].CPU, r.VMs[i].Waiting = 0.01, 0
			}
		}
	}
	return *r
}

func (w *world) portray(g *guest, share float64) view.VM {
	return view.VM{Name: g.name, Incarnation: strconv.Itoa(g.incarnation), Labels: g.labels,
		VCPUs: g.vcpus, CPU: g.want * share, Waiting: g.want * (1 - share), Memory: g.size,
		Resident: g.size, InUse: g.size / 10 * 7, Hot: g.size / 8, Pinned: g.pinned}
}

// order has a VM begin to move, if its hosts let it.
func (w *world) order(m view.Move) {
	vm, to := number(m.VM), number(m.To)
	g, target := &w.guests[vm], &w.machines[to]
	source := &w.machines[g.host]
	refuse := func() {
		w.result.Refused++
		w.b.ended(m, w.now(), 0, "the host refused")
	}
	if source.name != m.From || g.to >= 0 || target.gone > w.step || source.gone > w.step ||
		to == g.host || g.pinned {
		refuse()
		return
	}
	if w.Balancer == "vacate" {
		truth := w.truth(target)
		coming := make([]view.Move, 0, 4)
		for _, o := range w.moving {
			if w.guests[o].to == to {
				coming = append(coming, view.Move{VM: w.guests[o].name, To: m.To,
					From: w.machines[w.guests[o].host].name, Memory: w.guests[o].size})
			}
		}
		if place.Admit(w.now(), truth, w.portray(g, source.share), coming, nil,
			fleetPolicy(w.Step)) !=
			"" {
			refuse()
			return
		}
	}
	if target.used+target.coming+g.size > memory {
		w.result.Overfilled++
	}
	if w.breaks(vm, to) {
		w.result.Broken++
	}
	if source.since >= 0 && !source.ordered {
		source.ordered = true
		w.result.Orders = append(w.result.Orders, time.Duration(w.step-source.since)*w.Step)
	}
	if g.moved >= 0 && time.Duration(w.step-g.moved)*w.Step < 30*time.Minute {
		w.result.Again++
	}
	w.result.Moves++
	g.to, g.left, g.wait = to, float64(g.size/10*7), transfer
	target.coming += g.size
	source.under++
	target.under++
	w.moving = append(w.moving, vm)
	w.b.began(m)
}

// truth is a host's own report of itself, that is never a lie.
func (w *world) truth(m *machine) view.Report {
	lies := m.lies
	m.lies = 0
	r := w.tell(m)
	m.lies = lies
	return r
}

// breaks reports whether a VM's coming to a host breaks a rule that must hold.
func (w *world) breaks(vm, to int) bool {
	g := &w.guests[vm]
	if g.gpu && to%5 != 0 {
		return true
	}
	if g.group < 0 {
		return false
	}
	return slices.ContainsFunc(w.groups[g.group], func(o int) bool {
		return o != vm && (w.guests[o].host == to || w.guests[o].to == to)
	})
}

func number(name string) int {
	n, _ := strconv.Atoi(name[1:])
	return n
}

// move has memory arrive.
func (w *world) move() {
	w.moving = slices.DeleteFunc(w.moving, func(vm int) bool {
		g := &w.guests[vm]
		source, target := &w.machines[g.host], &w.machines[g.to]
		m := view.Move{VM: g.name, From: source.name, To: target.name}
		failed := source.gone > w.step || target.gone > w.step
		rate := linkRate / float64(max(source.under, target.under))
		g.left -= rate * max(0, w.Step-g.wait).Seconds()
		g.wait = 0
		if !failed && g.left > 0 {
			return false
		}
		source.under--
		target.under--
		target.coming -= g.size
		g.moved = w.step
		if failed {
			w.result.Failed++
			g.to = -1
			w.b.ended(m, w.now(), 0, "a host is gone")
			return true
		}
		// Until its hot memory is there, it does half of what it would.
		hot := time.Duration(float64(g.size/8) / rate * 1e9)
		w.result.Lacked += g.want / 2 * (transfer + hot).Hours()
		source.guests = slices.DeleteFunc(source.guests, func(o int) bool { return o == vm })
		at, _ := slices.BinarySearch(target.guests, vm)
		target.guests = slices.Insert(target.guests, at, vm)
		source.used -= g.size
		target.used += g.size
		g.host, g.to = g.to, -1
		g.incarnation++
		w.b.ended(m, w.now(), time.Duration(-g.left/rate*1e9), "")
		return true
	})
}

// cpu is the CPU time of this thread.
func cpu() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// Run simulates a fleet.
func Run(ctx context.Context, o Options) (Result, error) {
	runtime.LockOSThread() // so that its CPU time is told apart
	defer runtime.UnlockOSThread()
	w, err := newWorld(o)
	if err != nil {
		return Result{}, err
	}
	if w.b, err = newBalancer(w); err != nil {
		return Result{}, err
	}
	var reporting time.Duration
	reports := 0
	told := make([]view.Report, 0, o.Hosts)
	for w.step = range int(o.For / o.Step) {
		if w.step%64 == 0 && ctx.Err() != nil {
			return Result{}, ctx.Err()
		}
		w.move()
		w.load()
		w.share()
		w.trouble()
		told = told[:0]
		for i := range w.machines {
			if m := &w.machines[i]; m.late <= w.step && m.gone <= w.step && o.Balancer != "none" {
				told = append(told, w.tell(m))
			}
		}
		begin := cpu()
		for _, r := range told {
			w.b.report(r)
		}
		if w.step > 0 { // at first the planner gets to know the fleet
			reporting += cpu() - begin
			reports += len(told)
		}
		w.drains()
		begin = cpu()
		orders := w.b.round(w.now())
		w.result.Rounds = append(w.result.Rounds, cpu()-begin)
		for _, m := range orders {
			w.order(m)
		}
	}
	slices.Sort(w.result.Rounds)
	slices.Sort(w.result.Orders)
	w.result.Report = reporting / time.Duration(max(1, reports))
	if s, ok := w.b.(*steal); ok {
		w.result.Maintained = s.maintained
	}
	w.result.Memory = w.b.memory()
	return w.result, nil
}

// drains has a host be drained now and then, and restored half an hour after that.
func (w *world) drains() {
	s, ok := w.b.(*steal)
	if !ok || w.Drains == 0 {
		return
	}
	d := &w.drain
	switch {
	case d.host < 0:
		if w.step == 0 || w.step%int(w.Drains/w.Step) != 0 {
			return
		}
		host := w.faults.IntN(w.Hosts)
		m := &w.machines[host]
		if m.late > w.step || m.lies > w.step || m.gone > w.step || m.under > 0 {
			return
		}
		// A round comes with the reports that tell of ends, so nothing waits for one after them.
		f := s.p.Forecast(w.now(), place.Rounds{}, 0, m.name)
		*d = drain{host: host, began: w.step, forecast: f.Takes, vms: len(m.guests)}
		s.p.Maintain(view.Maintenance{Host: m.name, Phase: view.Draining, Asked: w.now()})
		s.left = nil
	case d.restore == 0:
		m := &w.machines[d.host]
		going, stay := s.p.Remaining(w.now(), m.name)
		over := time.Duration(w.step-d.began) * w.Step
		if len(going) > 0 && over < 6*time.Hour {
			return
		}
		w.result.Drained = append(w.result.Drained, Drained{Host: m.name, VMs: d.vms,
			Stayed: len(stay), Forecast: d.forecast, Was: over})
		d.restore = w.step + int(30*time.Minute/w.Step)
	case w.step >= d.restore:
		m := &w.machines[d.host]
		s.p.Maintain(view.Maintenance{Host: m.name, Phase: view.Restoring, Left: s.left})
		if going, _ := s.p.Remaining(w.now(), m.name); len(going) == 0 ||
			w.step > d.restore+int(time.Hour/w.Step) {
			s.p.Maintain(view.Maintenance{Host: m.name})
			d.host = -1
		}
	}
}

// fleetPolicy is the usual one, for hosts that report so often.
func fleetPolicy(step time.Duration) view.Policy {
	p := view.DefaultPolicy()
	p.Mode, p.Late = view.Auto, max(p.Late, 2*step+time.Second)
	p.PerLink = 0 // racks of this simulation have links that are not shared
	return p
}
