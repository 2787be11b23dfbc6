package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/host/doctor"
	"vacate/internal/host/hypervisor"
	"vacate/internal/host/relief"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/pressure"
	"vacate/internal/sys/process"
	"vacate/internal/sys/sched"
)

// loadQuestion is how loaded a host is, over a time.
type loadQuestion struct {
	OverMS uint32 `json:"over_ms"`
}

// loadAnswer is what a host tells of itself, in cores and bytes.
type loadAnswer struct {
	CPUs      float64 `json:"cpus"`
	Used      float64 `json:"used"`
	Waiting   float64 `json:"waiting"`
	Total     uint64  `json:"total"`
	Available uint64  `json:"available"`
	Incoming  uint64  `json:"incoming"`
	// Closed is why no VM may come; empty: one may.
	Closed string `json:"closed,omitempty"`
}

// check refuses what no host can be like.
func (a loadAnswer) check() error {
	const mostCores, mostBytes = 1 << 16, 1 << 60
	cores := func(n float64) bool { return n >= 0 && n <= mostCores }
	if len(a.Closed) > mostClosed {
		return fmt.Errorf("it tells in %d bytes why it is closed", len(a.Closed))
	}
	if !cores(a.CPUs) || a.CPUs == 0 || !cores(a.Used) || !cores(a.Waiting) ||
		max(a.Total, a.Available, a.Incoming) > mostBytes {
		return fmt.Errorf("its load makes no sense: %+v", a)
	}
	return nil
}

// mostClosed bounds why a host is closed, in bytes.
const mostClosed = 4096

// Times over which a load may be measured: less is noise, and for longer nobody waits.
const (
	leastOver = 100 * time.Millisecond
	mostOver  = 10 * time.Second
	usualOver = 2 * time.Second
)

// A picture is this host with its VMs, over a time.
type picture struct {
	load pressure.HostLoad
	vms  []portrait // in order of name
}

// portrait is a VM that runs here, or may.
type portrait struct {
	vm       hypervisor.VM
	process  process.Process
	vcpus    []int  // its threads that are virtual CPUs, if that is known
	evicting string // which eviction it is in, in words; empty: none
	load     pressure.VMLoad
	problem  string // why it has no load
}

// portraits looks at all VMs of this host, also those whose descriptions cannot be read.
func (h *Host) portraits(ctx context.Context) []portrait {
	vms, err := h.vms().All(ctx)
	if err != nil {
		h.log.Debug("cannot look at some VMs", "error", err)
	}
	found := make([]portrait, len(vms))
	var looks sync.WaitGroup
	for i, vm := range vms {
		looks.Go(func() { found[i] = h.portray(ctx, vm) })
	}
	looks.Wait()
	for _, e := range hypervisor.Unread(err) {
		found = append(found, portrait{vm: hypervisor.VM{Name: e.VM},
			problem: fmt.Sprintf("it is not known whether it is here: %v", e)})
	}
	return found
}

// measure looks at this host and its VMs over a time.
func (h *Host) measure(ctx context.Context, over time.Duration) (picture, error) {
	found := h.portraits(ctx)
	before, err := pressure.ReadHost()
	if err != nil {
		return picture{}, err
	}
	earlier := make([]pressure.VM, len(found))
	for i, p := range found {
		if p.process.PID > 0 {
			if earlier[i], err = pressure.ReadVM(p.process, p.vcpus); err != nil {
				found[i].problem = err.Error()
			}
		}
	}
	select {
	case <-time.After(over):
	case <-ctx.Done():
		return picture{}, ctx.Err()
	}
	after, err := pressure.ReadHost()
	if err != nil {
		return picture{}, err
	}
	var qemus []process.Process
	for _, v := range found {
		if v.process.PID > 0 {
			qemus = append(qemus, v.process)
		}
	}
	p := picture{load: after.Since(before, qemus...)}
	for i, v := range found {
		if v.process.PID <= 0 && v.problem == "" && v.evicting == "" {
			continue
		}
		if v.problem == "" && v.process.PID > 0 {
			later, err := pressure.ReadVM(v.process, v.vcpus)
			if errors.Is(err, process.ErrGone) {
				continue
			} else if err != nil {
				v.problem = err.Error()
			} else {
				v.load = later.Since(earlier[i])
			}
		}
		p.vms = append(p.vms, v)
	}
	return p, nil
}

// knownQEMU is a QEMU, and its threads that are virtual CPUs.
type knownQEMU struct {
	process.Process
	vcpus []int
}

// underWay says what an eviction that has not ended does with its VM.
func (v *eviction) underWay() string {
	r := v.entry.Record()
	v.mu.Lock()
	working := v.cancel != nil
	v.mu.Unlock()
	switch {
	case !working:
		return fmt.Sprintf("its eviction is not over: see vacate status %.8s", v.entry.ID())
	case r.Role == journal.Destination:
		return fmt.Sprintf("it is arriving from %s", r.Peer)
	}
	return fmt.Sprintf("it is being evicted to %s", r.Peer)
}

// portray finds the QEMU of a VM here. Its monitor is asked only if need be.
func (h *Host) portray(ctx context.Context, vm hypervisor.VM) portrait {
	p := portrait{vm: vm}
	if errors.Is(vm.Unfit, hypervisor.ErrTwice) { // what is known by its name is of the other one
		p.problem = vm.Unfit.Error()
		return p
	}
	h.mu.Lock()
	known := h.known[vm.Name]
	h.mu.Unlock()
	if v := h.openFor(vm.Name); v != nil {
		// Its monitor is the engine's. What it told before is still true of a VM that leaves.
		p.evicting = v.underWay()
		if p.process = v.process(); p.process == known.Process {
			p.vcpus = known.vcpus
		}
		return p
	}
	if known.Alive() {
		p.process, p.vcpus = known.Process, known.vcpus
		return p
	}
	seen, err := hypervisor.Look(ctx, vm)
	switch {
	case err != nil:
		p.problem = err.Error()
	case seen.State == hypervisor.Silent:
		p.problem = "its monitor does not answer"
	case seen.State == hypervisor.Frozen:
		p.problem = "it stands frozen here, and no eviction that vacated knows of has it: " +
			"look whether it runs on another host"
	case seen.State == hypervisor.Incoming:
		p.problem = fmt.Sprintf("a QEMU waits here for it to arrive (process %d), and no eviction "+
			"that vacated knows of has it", seen.Process.PID)
	case seen.State == hypervisor.Running, seen.State == hypervisor.Paused:
		p.process, p.vcpus = seen.Process, seen.Threads
		h.mu.Lock()
		h.known[vm.Name] = knownQEMU{seen.Process, seen.Threads}
		h.mu.Unlock()
	}
	return p
}

// answer is the picture as other hosts are told. What yields to VMs is not used as far as they are
// concerned.
func (p picture) answer(incoming uint64) loadAnswer {
	a := loadAnswer{CPUs: float64(p.load.CPUs), Used: p.load.CPU - p.load.Yielding,
		Total: p.load.Memory.Total, Available: p.load.Memory.Available, Incoming: incoming}
	for _, v := range p.vms {
		a.Waiting += v.load.Waiting
	}
	return a
}

// relief is the answer as package relief has it.
func (a loadAnswer) relief(name string) relief.Host {
	return relief.Host{Name: name, CPUs: a.CPUs, Used: a.Used, Waiting: a.Waiting, Total: a.Total,
		Available: a.Available, Incoming: a.Incoming}
}

// arriving is how much memory VMs that are on their way here will still come to use.
func (h *Host) arriving(vms []portrait) uint64 {
	sum := uint64(0)
	for _, p := range vms {
		v := h.openFor(p.vm.Name)
		if v == nil || v.entry.Record().Role != journal.Destination {
			continue
		}
		v.mu.Lock()
		memory := uint64(v.progress.Total) * migstream.TargetPageSize
		v.mu.Unlock()
		if memory > p.load.Resident {
			sum += memory - p.load.Resident
		}
	}
	return sum
}

// scene is all that a choice is made from.
type scene struct {
	here   relief.Host
	vms    []relief.VM
	others []relief.Host
	limits relief.Limits
}

// survey gathers it, over a time, with only one of the other hosts if that is named.
func (h *Host) survey(ctx context.Context, over time.Duration, to string) (scene, error) {
	var s scene
	var asked sync.WaitGroup
	names := slices.Sorted(maps.Keys(h.config.Peers))
	names = slices.DeleteFunc(names,
		func(n string) bool { return h.config.Peers[n].Address == "" || to != "" && n != to })
	s.others = make([]relief.Host, len(names))
	for i, name := range names {
		asked.Go(func() { s.others[i] = h.other(ctx, name, over) })
	}
	p, err := h.measure(ctx, over)
	asked.Wait()
	if err != nil {
		return s, err
	}
	s.here = p.answer(h.arriving(p.vms)).relief(h.name())
	s.limits = relief.DefaultLimits
	if t, ok := h.transferTime(); ok {
		s.limits.Transfer = t
	}
	for _, v := range p.vms {
		vm := relief.VM{Name: v.vm.Name, CPU: v.load.CPU, Waiting: v.load.Waiting,
			Overhead: v.load.Overhead, Resident: v.load.Resident, Pinned: v.vm.Pinned,
			Priority: v.vm.Priority, Moved: h.movedAt(v.vm.Name)}
		// Until more is known: all that its QEMU has.
		vm.Memory, vm.InUse, vm.Hot = vm.Resident, vm.Resident, vm.Resident
		switch {
		case v.evicting != "":
			vm.Barred = v.evicting
		case v.problem != "":
			vm.Barred = v.problem
		case v.vm.Unfit != nil:
			vm.Barred = v.vm.Unfit.Error()
		default:
			e, err := h.lookAhead(ctx, v, estimateAge)
			if err != nil {
				vm.Barred = err.Error()
				break
			}
			vm.Memory, vm.InUse, vm.Hot = pageBytes(e.Total), pageBytes(e.InUse), pageBytes(e.Hot)
			vm.Check = h.mayGo(ctx, v.vm)
		}
		s.vms = append(s.vms, vm)
	}
	return s, nil
}

// mayGo returns a function that tells why a VM cannot go to another host: all that vacate evict
// would refuse. What is wrong here is found once.
func (h *Host) mayGo(ctx context.Context, vm hypervisor.VM) func(to string) string {
	here := ""
	return func(to string) string {
		if here != "" {
			return here
		}
		seen, err := hypervisor.Look(ctx, vm)
		if err == nil {
			err = h.mayLeave(vm, seen)
		}
		if err != nil {
			here = err.Error()
			return here
		}
		found, err := h.examine(ctx, vm.Name, to)
		if err != nil {
			return err.Error()
		}
		for _, f := range found {
			switch {
			case f.Level != doctor.Fatal:
			case f.Host == to:
				return fmt.Sprintf("%s: %s: %s", to, f.Check, f.Text)
			default:
				here = fmt.Sprintf("%s: %s", f.Check, f.Text)
				return here
			}
		}
		return ""
	}
}

func pageBytes(pages int) uint64 { return uint64(pages) * migstream.TargetPageSize }

// other is another host, as it tells of itself.
func (h *Host) other(ctx context.Context, name string, over time.Duration) relief.Host {
	ctx, cancel := context.WithTimeout(ctx, over+askTime)
	defer cancel()
	var a loadAnswer
	d, err := h.dialer(name)
	if err == nil {
		_, err = putTo(ctx, d, 0, question{Load: &loadQuestion{uint32(over.Milliseconds())}}, &a)
	}
	if err == nil {
		err = a.check()
	}
	if err != nil {
		return relief.Host{Name: name, Barred: fmt.Sprintf("%s cannot be asked: %v", name, err)}
	}
	to := a.relief(name)
	if a.Closed != "" {
		to.Barred = fmt.Sprintf("%s takes no VM: %s", name, a.Closed)
		return to
	}
	if to.Rate, err = h.rate(ctx, name); err != nil {
		to.Barred = fmt.Sprintf("the link to %s cannot be measured: %v", name, err)
	}
	return to
}

// rate is how fast memory goes to another host, in bytes per second: as is measured now, and at
// most as is configured.
func (h *Host) rate(ctx context.Context, to string) (float64, error) {
	d, err := h.dialer(to)
	if err != nil {
		return 0, err
	}
	link, err := measureLink(ctx, d)
	if err != nil {
		return 0, err
	}
	if most := h.config.Peers[to].Rate; most > 0 {
		return min(link.Rate, float64(most*bytesPerMbit)), nil
	}
	return link.Rate, nil
}

// transferTime is how long it took of late from the decision until a VM ran elsewhere: the median
// of what is known.
func (h *Host) transferTime() (time.Duration, bool) {
	var took []time.Duration
	for _, v := range slices.Backward(h.list()) {
		r := v.entry.Record()
		var report evict.Report
		if len(took) == 9 {
			break
		}
		if v.entry.Err() != nil || r.Role != journal.Source ||
			evict.Mark(r.Mark) != evict.MarkCompleted || json.Unmarshal(r.Report, &report) != nil {
			continue
		}
		if report.Transfer != nil && report.Prepare != nil {
			took = append(took,
				time.Duration((*report.Prepare+*report.Transfer)*float64(time.Second)))
		}
	}
	if len(took) == 0 {
		return 0, false
	}
	slices.Sort(took)
	return took[len(took)/2], true
}

// movedAt is when an eviction of a VM ended here last, out or in and however; zero if that is not
// known.
func (h *Host) movedAt(vm string) time.Time {
	var at time.Time
	for _, v := range h.list() {
		if r := v.entry.Record(); r.VM == vm && r.Ended.After(at) {
			at = r.Ended
		}
	}
	return at
}

// lookedAhead is an estimate, of a process that had so much memory, at a time.
type lookedAhead struct {
	evict.Estimate
	process  process.Process
	resident uint64
	at       time.Time
}

// holds reports whether the estimate still tells of a VM, at that age at most. A VM that has come
// to use more memory or less, as one that boots does, is looked at anew.
func (l lookedAhead) holds(v portrait, age time.Duration) bool {
	has, had := v.load.Resident, l.resident
	return l.process == v.process && time.Since(l.at) < age && max(has, had)-min(has, had) <= had/8
}

// estimateAge is how old an estimate may be.
const estimateAge = time.Minute

// lookAhead estimates what an eviction of a VM here would find, if the last estimate is older.
func (h *Host) lookAhead(ctx context.Context, v portrait, age time.Duration) (evict.Estimate,
	error) {
	vm := v.vm
	h.mu.Lock()
	last := h.ahead[vm.Name]
	h.mu.Unlock()
	if last.holds(v, age) {
		return last.Estimate, nil
	}
	release, err := h.take(vm.Name) // nobody else has its monitor meanwhile
	if err != nil {
		return evict.Estimate{}, err
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	var e evict.Estimate
	err = sched.Usual(func() (err error) { // nobody waits for it as for a page
		return hypervisor.Ask(ctx, vm, func(q *qmp.Client) error {
			e, err = evict.LookAhead(ctx, q)
			return err
		})
	})
	if err != nil {
		return e, fmt.Errorf("its memory cannot be looked at: %w", err)
	}
	h.mu.Lock()
	h.ahead[vm.Name] = lookedAhead{e, v.process, v.load.Resident, time.Now()}
	h.mu.Unlock()
	return e, nil
}

// guard evicts by itself, by the policy that is configured, until ctx is done.
func (h *Host) guard(ctx context.Context) {
	policy, _ := h.config.Guard.policy() // which was checked when it was read
	g := relief.Guard{Policy: policy}
	over := h.config.Guard.interval()
	h.log.Info("guarding this host", "goal", policy.Goal, "sustain", policy.Sustain, "cool_down",
		policy.CoolDown)
	for ctx.Err() == nil {
		if err := h.observe(ctx, &g, over); err != nil && ctx.Err() == nil {
			h.saw("cannot measure how loaded the host is: " + err.Error())
			select {
			case <-time.After(over):
			case <-ctx.Done():
			}
		}
	}
}

// saw notes what the guard makes of things.
func (h *Host) saw(verdict string) {
	h.mu.Lock()
	changed := h.verdict != verdict
	h.verdict = verdict
	h.mu.Unlock()
	if changed {
		h.log.Debug("guard", "verdict", verdict)
	}
}

// observe looks once, and evicts if that has to be.
func (h *Host) observe(ctx context.Context, g *relief.Guard, over time.Duration) error {
	p, err := h.measure(ctx, over)
	if err != nil {
		return err
	}
	here := p.answer(0).relief(h.name())
	under := 0
	for _, v := range p.vms {
		if v.evicting != "" {
			under++
		}
	}
	s := scene{here: here}
	if due := g.Due(time.Now(), here, under); due {
		if s, err = h.survey(ctx, time.Second, ""); err != nil {
			return err
		}
		// What was seen for longer tells more.
		s.here.Used, s.here.Waiting = here.Used, here.Waiting
		g.Policy.Limits.Transfer = s.limits.Transfer
	}
	list, why := g.Observe(time.Now(), s.here, s.vms, s.others, under)
	if len(list) == 0 {
		h.saw(why)
		return nil
	}
	best := list[0]
	h.saw(fmt.Sprintf("%s goes to %s", best.VM, best.To))
	h.log.Info("this host is overloaded: a VM is evicted", "vm", best.VM, "to", best.To,
		"gain_cores", best.Gain, "load_here", best.LoadHere, "load_there", best.LoadThere, "back",
		best.Back, "total", best.Total)
	h.metrics.guarded.Inc()
	if _, err := h.evict(ctx, best.VM, best.To, options{}, false); err != nil {
		h.log.Error("the guard's eviction does not begin", "vm", best.VM, "to", best.To, "error",
			err)
	}
	return nil
}
