// Package fleetfaults has things happen to a fleet of real daemons, with real VMs, while it empties
// a host, and judges what came of it: whether each VM runs, and runs once; whether two leaders
// moved it; and whether a leader that was deposed was obeyed.
package fleetfaults

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/daemons"

	"connectrpc.com/connect"
)

// Options say what a campaign is.
type Options struct {
	Lab     lab.Options
	Vacate  string   // the program; vacated and vacate-fleet are beside it
	Runs    int      // how many
	Workers int      // fleets at a time
	Seed    uint64   // of all that is random
	Only    []string // words in the names of faults; empty: all
	Logs    string   // directory for what daemons logged where a run went bad; empty: none
	// Done is told of each run.
	Done func(Result)
}

// Result is what came of a run.
type Result struct {
	Fault   string
	When    string  // what the order had come to: not begun, or the state of its eviction
	Outcome string  // drained, or some stayed
	Seconds float64 // until the host was empty, or it was clear that it would not be
	Talk    int     // hosts that came to a deposed leader
	Notes   []string
	Bad     string // empty: all is well
}

// Each fleet has so many runs at most, then another one is made.
const (
	runsEach = 25
	vms      = 1
)

// settleTime is how long all may take to be well again, on a busy machine.
const settleTime = 4 * time.Minute

// Run has a campaign.
func Run(ctx context.Context, o Options) ([]Result, error) {
	random := rand.New(rand.NewPCG(o.Seed, 0))
	var todo []Fault
	for len(todo) < o.Runs {
		n := len(todo)
		for _, i := range random.Perm(len(Faults)) {
			f := Faults[i]
			if len(o.Only) == 0 || slices.ContainsFunc(o.Only,
				func(word string) bool { return strings.Contains(f.Name, word) }) {
				todo = append(todo, f)
			}
		}
		if len(todo) == n {
			return nil, fmt.Errorf("no fault has any of these words in its name: %v", o.Only)
		}
	}
	todo = todo[:o.Runs]
	workers := max(1, o.Workers)
	each := (o.Runs + workers - 1) / workers
	batches := slices.Collect(slices.Chunk(todo, min(each, runsEach)))
	var mu sync.Mutex
	var results []Result
	var errs []error
	done := func(r Result) {
		mu.Lock()
		defer mu.Unlock()
		results = append(results, r)
		if o.Done != nil {
			o.Done(r)
		}
	}
	var working sync.WaitGroup
	for w := range workers {
		working.Go(func() {
			var err error
			for i := w; i < len(batches) && err == nil; i += workers {
				for left := batches[i]; len(left) > 0 && err == nil; {
					left, err = batch(ctx, o, left, o.Seed+uint64(i), done)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	working.Wait()
	return results, errors.Join(errs...)
}

// run is one run, in a fleet that others share one after another.
type run struct {
	*daemons.Fleet
	keep    *keeper
	vms     []*daemons.VM
	random  *rand.Rand
	leader  *daemons.Brain // when the fault began
	drained *lab.Host
	phase   string // of the maintenance of drained, at rest
	clocks  bool   // no times of day can be compared
	talk    int
	notes   []string
}

func (r *run) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// batch tries faults in one fleet. Where a run goes bad, those that are left need another fleet.
func batch(ctx context.Context, o Options, faults []Fault, seed uint64, done func(Result)) (
	left []Fault, err error) {
	opts := o.Lab
	opts.Rate, opts.NoPin = 1e9, true
	f, err := daemons.NewFleet(ctx, daemons.FleetOptions{Lab: opts, Hosts: 3, Vacate: o.Vacate,
		Interval: time.Second, DiskBytes: 256 << 20})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	short, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	if err := f.Begin(short); err != nil {
		return nil, err
	}
	// What others do on this machine must not matter: no host is too busy or too full.
	if _, err := daemons.Ask(short, f, fleetv1.FleetClient.SetPolicy, &fleetv1.SetPolicyRequest{
		Policy: &fleetv1.Policy{Starving: 0.01, MaxLoad: 10, Overcommit: 10, LateS: 60},
		Fields: []string{"starving", "max_load", "reserve", "overcommit", "late_s",
			"settle_s"}}); err != nil {
		return nil, err
	}
	keep := newKeeper(f)
	defer keep.stop()
	random := rand.New(rand.NewPCG(seed, 1))
	var machines []*daemons.VM
	for i := range vms {
		v, err := f.Boot(short, f.Hosts[i%len(f.Hosts)], fmt.Sprint("web", i+1), lab.Spec{
			BareMetal: true, MemoryMiB: 128,
			Load: lab.Load{HotMiB: 8, IdleMiB: 40, Slow: true, Seed: seed + uint64(i)}})
		if err != nil {
			return nil, err
		}
		machines = append(machines, v)
	}
	for i, fault := range faults {
		r := &run{Fleet: f, keep: keep, vms: machines, random: random}
		result, err := r.try(ctx, fault)
		if err != nil && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			result.Bad = err.Error()
			for _, b := range f.Brains {
				result.Notes = append(result.Notes, b.Name+" said: "+b.Said())
			}
			for _, h := range f.Hosts {
				result.Notes = append(result.Notes, daemons.Name(h)+" said: "+f.Said(h))
			}
			if e := f.KeepLogs(o.Logs, fmt.Sprintf("%d-%d-", seed, i)); e != nil {
				result.Notes = append(result.Notes, e.Error())
			}
		}
		done(result)
		if err != nil {
			return faults[i+1:], nil
		}
	}
	// Each page of each guest, in the end.
	for _, v := range machines {
		short, cancel := context.WithTimeout(ctx, settleTime)
		_, err := v.Check(short)
		cancel()
		if err != nil {
			done(Result{Fault: "all of these", Bad: err.Error()})
		}
	}
	return nil, nil
}

// try is one run: a host is drained, something happens, and all comes to rest.
func (r *run) try(ctx context.Context, fault Fault) (result Result, err error) {
	result = Result{Fault: fault.Name}
	r.clocks = strings.Contains(fault.Name, "clock")
	defer func() { result.Notes, result.Talk = r.notes, r.talk }()
	limit, cancel := context.WithTimeout(ctx, 3*settleTime)
	defer cancel()
	if r.leader, err = r.Leader(limit, true); err != nil {
		return result, err
	}
	var busy []*lab.Host
	for _, h := range r.Hosts {
		if len(r.on(h)) > 0 {
			busy = append(busy, h)
		}
	}
	if len(busy) == 0 {
		return result, errors.New("no host has a VM")
	}
	r.drained = busy[r.random.IntN(len(busy))]
	before := r.samples()
	begun, known := time.Now(), r.evictions(limit)
	if _, err := daemons.Ask(limit, r.Fleet, fleetv1.FleetClient.Drain, &fleetv1.DrainRequest{
		Host: daemons.Name(r.drained), Rate: 12e6, Reason: fault.Name}); err != nil {
		return result, err
	}
	// Most faults come when the order is being carried out, some ahead of it.
	if r.random.IntN(4) > 0 {
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end) &&
			len(r.evictions(limit)) == len(known); {
			if err := wait(limit, 100*time.Millisecond); err != nil {
				return result, err
			}
		}
	}
	if err := wait(limit, time.Duration(r.random.IntN(6000))*time.Millisecond); err != nil {
		return result, err
	}
	result.When = "not begun"
	for id, e := range r.evictions(limit) {
		if known[id] == nil {
			result.When = e.State
		}
	}
	if b, _ := r.Leads(limit); b != nil {
		r.leader = b
	}
	if err := fault.do(limit, r); err != nil {
		return result, fmt.Errorf("the fault itself: %w", err)
	}
	// All comes to rest.
	stayed, err := r.rest(limit)
	if err != nil {
		return result, err
	}
	result.Seconds = time.Since(begun).Seconds()
	result.Outcome = "drained"
	switch {
	case r.phase == "":
		return result, fmt.Errorf("the fleet has forgotten that host %s is drained",
			r.drained.Name)
	case len(stayed) > 0:
		result.Outcome = "some stayed"
		r.note("%v", stayed)
	case len(r.on(r.drained)) > 0:
		return result, fmt.Errorf("host %s is %s by the fleet's word, and has VMs",
			r.drained.Name, r.phase)
	}
	if err := r.judge(limit, known, before); err != nil {
		return result, err
	}
	if _, err := daemons.Ask(limit, r.Fleet, fleetv1.FleetClient.Restore,
		&fleetv1.RestoreRequest{Host: daemons.Name(r.drained)}); err != nil {
		return result, err
	}
	if _, err := r.rest(limit); err != nil {
		return result, err
	}
	return result, r.judge(limit, known, before)
}

// on are the VMs that have a QEMU on a host.
func (r *run) on(h *lab.Host) (list []*daemons.VM) {
	for _, v := range r.vms {
		if slices.ContainsFunc(v.Alive(), func(vm *lab.VM) bool { return vm.Host == h }) {
			list = append(list, v)
		}
	}
	return list
}

func (r *run) samples() (n []int) {
	for _, v := range r.vms {
		n = append(n, len(v.Guest.Samples()))
	}
	return n
}

// evictions are those in the journals of all hosts, at their sources.
func (r *run) evictions(ctx context.Context) map[string]*hostv1.Eviction {
	all := map[string]*hostv1.Eviction{}
	for _, h := range r.Hosts {
		l, err := r.Host(h).ListEvictions(ctx, connect.NewRequest(&hostv1.ListEvictionsRequest{}))
		if err != nil {
			continue
		}
		for _, e := range l.Msg.Evictions {
			if e.Role == "source" {
				all[e.Id] = e
			}
		}
	}
	return all
}

// rest waits until a member leads that all hosts report to, no plan goes on, and no maintenance has
// anything left to do. It returns the VMs that stay on the host that is drained, with the reasons.
func (r *run) rest(ctx context.Context) (stayed []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	last, sure := "", false
	for {
		done, text, stay := r.rests(ctx)
		switch {
		case done && (len(stay) == 0 || sure):
			return stay, nil
		case done: // what a host tells may be some seconds old
			sure = true
			if err := wait(ctx, 4*time.Second); err != nil {
				return nil, err
			}
			continue
		}
		sure = false
		if text != "" {
			last = text
		}
		if err := wait(ctx, 300*time.Millisecond); err != nil {
			return nil, fmt.Errorf("it does not come to rest: %s: %w", last, err)
		}
	}
}

func (r *run) rests(ctx context.Context) (done bool, text string, stay []string) {
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	b, s := r.Leads(short)
	if b == nil {
		return false, "nobody leads", nil
	}
	for _, other := range r.Brains {
		if o, err := other.Status(short); err != nil || o.Leader != b.Member() {
			return false, fmt.Sprintf("%s does not follow the leader: %v", other.Name, err), nil
		}
	}
	if int(s.Hosts) != len(r.Hosts) || s.Late > 0 || s.Moving > 0 {
		return false, fmt.Sprintf("%d hosts, %d late, %d plans", s.Hosts, s.Late, s.Moving), nil
	}
	list, err := daemons.Ask(short, r.Fleet, fleetv1.FleetClient.ListHosts,
		&fleetv1.ListHostsRequest{})
	if err != nil {
		return false, err.Error(), nil
	}
	for _, h := range list.Hosts {
		if h.State != "reporting" {
			return false, h.Name + " is " + h.State, nil
		}
		if h.Name == daemons.Name(r.drained) {
			r.phase = h.Maintenance
		}
		switch h.Maintenance {
		case "draining":
			stay = h.Staying
			if len(h.Going) > 0 || len(h.Staying) == 0 {
				return false, fmt.Sprintf("%s is draining: %v are to go", h.Name, h.Going), nil
			}
		case "restoring":
			return false, h.Name + " is restoring", nil
		}
	}
	for _, h := range r.Hosts {
		if _, err := r.Host(h).Status(short,
			connect.NewRequest(&hostv1.StatusRequest{})); err != nil {
			return false, err.Error(), nil
		}
	}
	for _, e := range r.evictions(short) {
		if e.Outcome == "" {
			return false, fmt.Sprintf("an eviction of %s is %s: %s", e.Vm, e.State, e.Reason), nil
		}
	}
	return true, "", stay
}

// judge says what is not as it must be. known are evictions of before this run.
func (r *run) judge(ctx context.Context, known map[string]*hostv1.Eviction, before []int) error {
	if ended := r.keep.ended(); len(ended) > 0 {
		return fmt.Errorf("ended by itself: %v", ended)
	}
	var evictions []*hostv1.Eviction
	moves := map[string]int{}
	for id, e := range r.evictions(ctx) {
		if known[id] == nil {
			evictions = append(evictions, e)
			if e.Outcome == "completed" {
				moves[e.Vm]++
			}
		}
	}
	// Each VM runs, once, and knows its memory.
	for i, v := range r.vms {
		if err := r.runs(ctx, v); err != nil {
			return err
		}
		samples := v.Guest.Samples()
		if err := ranOnce(v.Name, samples[min(before[i], len(samples)):],
			moves[v.Name]); err != nil {
			return err
		}
		if last := samples[len(samples)-1]; last.Bad > 0 {
			return fmt.Errorf("%s has met %d bad pages", v.Name, last.Bad)
		}
	}
	decided, err := daemons.Ask(ctx, r.Fleet, fleetv1.FleetClient.ListDecisions,
		&fleetv1.ListDecisionsRequest{Most: 1000})
	if err != nil {
		return err
	}
	return orderly(decided.Decisions, evictions, r.clocks)
}

// runs says whether a VM runs, on one QEMU.
func (r *run) runs(ctx context.Context, v *daemons.VM) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	vm, err := v.Only(ctx)
	if err != nil {
		return err
	}
	status, err := vm.Status(ctx)
	if err != nil {
		return err
	}
	if status != "running" {
		return fmt.Errorf("%s is %s on host %s", v.Name, status, vm.Host.Name)
	}
	return v.Guest.WaitOps(ctx, 10)
}

// ranOnce says whether a guest that moved some times ran on two QEMUs at once. One that did reports
// the same amounts of work from one and the other, in turns.
func ranOnce(name string, samples []lab.Sample, moves int) error {
	samples = slices.Clone(samples)
	slices.SortStableFunc(samples, func(a, b lab.Sample) int { return cmp.Compare(a.Ops, b.Ops) })
	var turns []string
	for _, s := range samples {
		if n := len(turns); n == 0 || turns[n-1] != s.VM {
			turns = append(turns, s.VM)
		}
	}
	if len(turns) > moves+1 {
		return fmt.Errorf("%s moved %d times, and reported from QEMUs in turns: %v", name, moves,
			turns)
	}
	return nil
}

// orderly says whether all evictions are the fleet's, each of a plan of its own that the leader
// knows of, and no two of a VM at once.
func orderly(decisions []*fleetv1.Decision, evictions []*hostv1.Eviction,
	clocks bool) error {
	plans := map[string]*fleetv1.Decision{}
	for _, d := range decisions {
		if d.Id == deposedID {
			return errors.New("a plan of a deposed leader is among the decisions")
		}
		if d.EvictionId == "" {
			continue
		}
		if other := plans[d.EvictionId]; other != nil {
			return fmt.Errorf("eviction %s is of two plans: %s and %s", d.EvictionId, other.Id,
				d.Id)
		}
		plans[d.EvictionId] = d
	}
	for _, e := range evictions {
		d := plans[e.Id]
		switch {
		case d == nil:
			return fmt.Errorf("eviction %s of %s to %s is of no plan that the leader knows of",
				e.Id,
				e.Vm, e.Peer)
		case d.Vm != e.Vm || d.To != e.Peer:
			return fmt.Errorf("eviction %s of %s to %s is not what plan %s says: %s to %s", e.Id,
				e.Vm, e.Peer, d.Id, d.Vm, d.To)
		case d.State != e.Outcome:
			return fmt.Errorf("eviction %s of %s is %s, and the leader says %s", e.Id, e.Vm,
				e.Outcome, d.State)
		}
		for _, o := range evictions {
			if !clocks && o.Vm == e.Vm && o.Id != e.Id && plans[o.Id] != nil &&
				plans[o.Id].At.AsTime().Before(d.EndedAt.AsTime()) &&
				d.At.AsTime().Before(plans[o.Id].EndedAt.AsTime()) {
				return fmt.Errorf("%s was moved by two plans at once: %s and %s", e.Vm, d.Id,
					plans[o.Id].Id)
			}
		}
	}
	return nil
}

// keeper starts members that have ended, as systemd does.
type keeper struct {
	fleet *daemons.Fleet
	over  chan struct{}
	done  chan struct{}

	mu   sync.Mutex
	held map[*daemons.Brain]bool // guarded by mu
	dead []string                // daemons that must not end; guarded by mu
}

func newKeeper(f *daemons.Fleet) *keeper {
	k := &keeper{fleet: f, over: make(chan struct{}), done: make(chan struct{}),
		held: map[*daemons.Brain]bool{}}
	go k.run()
	return k
}

func (k *keeper) run() {
	defer close(k.done)
	for {
		select {
		case <-time.After(brief):
		case <-k.over:
			return
		}
		k.mu.Lock()
		for _, b := range k.fleet.Brains {
			if !k.held[b] && b.PID() == 0 {
				if err := b.Start(); err != nil {
					k.dead = append(k.dead, b.Name+": "+err.Error())
				}
			}
		}
		k.mu.Unlock()
	}
}

// hold has a member stay dead, or not any more.
func (k *keeper) hold(b *daemons.Brain, held bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.held[b] = held
}

// ended are daemons that have ended and must not.
func (k *keeper) ended() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	list := slices.Clone(k.dead)
	for _, h := range k.fleet.Hosts {
		if k.fleet.PID(h) == 0 {
			list = append(list, "vacated on host "+h.Name)
		}
	}
	return list
}

func (k *keeper) stop() {
	close(k.over)
	<-k.done
}

// Write writes what a campaign came to.
func Write(w io.Writer, results []Result) error {
	type row struct {
		runs, drained, stayed, bad, talk int
		seconds                          []float64
		when                             map[string]int
	}
	rows := map[string]*row{}
	all := &row{when: map[string]int{}}
	names := []string{}
	for _, f := range Faults {
		names = append(names, f.Name)
	}
	for _, x := range results {
		if rows[x.Fault] == nil {
			rows[x.Fault] = &row{when: map[string]int{}}
			if !slices.Contains(names, x.Fault) {
				names = append(names, x.Fault)
			}
		}
		for _, r := range []*row{rows[x.Fault], all} {
			r.runs++
			r.talk += x.Talk
			switch {
			case x.Bad != "":
				r.bad++
			case x.Outcome == "drained":
				r.drained++
				r.seconds = append(r.seconds, x.Seconds)
			default:
				r.stayed++
			}
			r.when[x.When]++
		}
	}
	var b strings.Builder
	b.WriteString("| fault | runs | host empty | some stayed | seconds, median (longest) | " +
		"hosts that a deposed leader met | bad |\n|---|---|---|---|---|---|---|\n")
	line := func(name string, r *row) {
		slices.Sort(r.seconds)
		took := "–"
		if n := len(r.seconds); n > 0 {
			took = fmt.Sprintf("%.0f (%.0f)", r.seconds[n/2], r.seconds[n-1])
		}
		talk := "–"
		if r.talk > 0 {
			talk = fmt.Sprint(r.talk)
		}
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %s | %s | %d |\n", name, r.runs, r.drained, r.stayed,
			took, talk, r.bad)
	}
	for _, name := range names {
		if rows[name] != nil {
			line(name, rows[name])
		}
	}
	line("**all**", all)
	b.WriteString("\nWhat the order had come to when the fault happened:")
	for i, s := range sorted(all.when) {
		if i > 0 {
			b.WriteString(",")
		}
		fmt.Fprintf(&b, " %s %d", s, all.when[s])
	}
	b.WriteString(".\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func sorted(m map[string]int) (list []string) {
	for s := range m {
		if s != "" {
			list = append(list, s)
		}
	}
	slices.SortFunc(list, func(a, b string) int { return m[b] - m[a] })
	return list
}

// Read reads results that were written as lines.
func Read(r io.Reader) (list []Result, err error) {
	for d := json.NewDecoder(r); ; {
		var x Result
		if err := d.Decode(&x); errors.Is(err, io.EOF) {
			return list, nil
		} else if err != nil {
			return nil, err
		}
		list = append(list, x)
	}
}

// Line is a result as a line of JSON.
func (r Result) Line() []byte {
	b, _ := json.Marshal(r)
	return append(b, '\n')
}
