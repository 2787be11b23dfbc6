package place

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"vacate/internal/fleet/view"
	"vacate/internal/predict"
	"vacate/internal/sys/units"
)

// How many hosts are looked at for each VM. They are those with the least load that can have it, so
// that more would tell little. A VM with rules that should be kept is worth a longer look.
const (
	fewTargets  = 4
	moreTargets = 32
)

// mostAlternatives is how many alternatives a decision names.
const mostAlternatives = 5

// Round returns what shall happen now, the most urgent first. It counts its own decisions as if
// they had begun. Each must be told to Began or Ended before the next round; one that is not counts
// as given up.
//
// A new leader waits with its first round until all hosts have reported that will: the VMs of a
// host that has not are not known, and no rule is kept for them.
func (p *Planner) Round(now time.Time) []view.Decision {
	p.now = later(p.now, now)
	for _, m := range p.proposed {
		if m.proposed {
			p.Ended(m.VM, p.now, "nobody carried it out")
		}
	}
	p.proposed = p.proposed[:0]
	maps.DeleteFunc(p.refused, func(_ pair, r refusal) bool { return !p.now.Before(r.until) })
	r := round{Planner: p}
	r.drain()
	if !p.policy.QuietAt(now) {
		r.mend()
		r.restore()
		r.relieve()
	}
	return r.decisions
}

// round is one round as it goes on.
type round struct {
	*Planner
	decisions []view.Decision
}

// candidate is a VM that may go to a host.
type candidate struct {
	vm     *vm
	to     *host
	out    predict.Outcome
	meets  bool // nobody starves on the host that it leaves
	broken int  // how many rules are broken that should hold
}

// targets returns the best hosts for a VM, in no order.
func (p *Planner) targets(v *vm, cause view.Cause, maxLoad float64) []candidate {
	most := fewTargets
	var some []*host // the VM may only be on these
	limited := false
	for _, r := range v.rules {
		if r.Force == view.Should {
			most = moreTargets
		}
		if hosts, ok := p.only(r, v); ok && (!limited || len(hosts) < len(some)) {
			some, limited = hosts, true
		}
	}
	var found []candidate
	try := func(h *host) bool {
		if p.fit(v, h, cause, maxLoad).kind == none {
			found = append(found, p.predict(v, h, cause))
		}
		return len(found) < most
	}
	if limited {
		most = len(some)
		for _, h := range some {
			try(h)
		}
		return found
	}
	// Hosts that should have it are looked at, however full they are.
	for _, r := range v.rules {
		if r.Force == view.Should && (r.Relation == view.On || r.Relation == view.Together) {
			hosts, _ := p.hostsOf(r, v)
			for i, h := range hosts {
				if i < moreTargets && p.fit(v, h, cause, maxLoad).kind == none {
					found = append(found, p.predict(v, h, cause))
				}
			}
		}
	}
	most += len(found)
	p.index.visit(v.Memory, func(h *host) bool {
		if h.load() > maxLoad { // as are all that follow, or nearly
			return h.load() <= maxLoad+1.0/40
		}
		return try(h)
	})
	return found
}

// only are the hosts that a rule limits a VM to, if it does.
func (p *Planner) only(r *rule, v *vm) ([]*host, bool) {
	if r.Force != view.Must {
		return nil, false
	}
	return p.hostsOf(r, v)
}

func (p *Planner) hostsOf(r *rule, v *vm) (hosts []*host, ok bool) {
	switch {
	case r.Relation == view.On && r.Force != view.Never:
		return p.allowed(r), true
	case r.Relation == view.Together && r.By == "":
		for _, o := range r.vm {
			if h := o.finally(); o != v && h != nil && h != v.host && !slices.Contains(hosts, h) {
				hosts = append(hosts, h)
			}
		}
		return hosts, len(hosts) > 0
	}
	return nil, false
}

// predict tells what comes of a VM's going to a host.
func (p *Planner) predict(v *vm, to *host, cause view.Cause) candidate {
	c := candidate{vm: v, to: to}
	from := v.host
	transfer := from.Transfer
	if transfer == 0 {
		transfer = usualTransfer
	}
	c.out = predict.Move{VM: v.predicted(), From: from.after, To: to.after,
		Stay: max(0, from.stay-v.predicted().Likely()), Rate: rate(from, to, 1),
		Transfer: transfer}.Outcome()
	c.broken, _, _ = v.broken(to, cause)
	if cause == view.Relieve {
		c.meets = p.met(from, from.after.Without(v.predicted()), v.Resident)
	}
	return c
}

// usualTransfer is how long execution transfer takes where it is not known.
const usualTransfer = 150 * time.Millisecond

// rate is what goes from one host to another, at most what its drain allows. The moves under way
// share the hosts' links, and so many more.
func rate(from, to *host, more int) float64 {
	r := min(from.Rate/float64(max(1, from.under+more)), to.Rate/float64(max(1, to.under+more)))
	if m := from.maintenance; m.Phase == view.Draining && m.Rate > 0 {
		r = min(r, m.Rate)
	}
	return r
}

// met reports whether a host is as it should be, once it is like this and so much memory is free
// in addition.
func (p *Planner) met(h *host, after predict.Host, freed uint64) bool {
	starving := after.Waiting >= leastWait && after.Wants() > after.CPUs &&
		after.CPUs < p.policy.Starving*after.Wants()
	return !starving && float64(h.Available+freed) >= p.policy.Free*float64(h.Total)
}

// less compares candidates, and names what decides.
func less(a, b candidate, cause view.Cause) (int, criterion) {
	if c := cmp.Compare(a.broken, b.broken); c != 0 {
		return c, byRules
	}
	if cause != view.Relieve {
		if c := cmp.Compare(a.out.LoadThere, b.out.LoadThere); c != 0 {
			return c, byLoadThere
		}
		return cmp.Compare(a.to.Name, b.to.Name), byOrder
	}
	if a.meets != b.meets {
		if a.meets {
			return -1, byMeeting
		}
		return 1, byMeeting
	}
	if c := cmp.Compare(a.vm.Priority, b.vm.Priority); c != 0 {
		return c, byPriority
	}
	if a.meets {
		if c := cmp.Compare(a.out.Cost(), b.out.Cost()); c != 0 {
			alone := a.out // would the time alone decide so?
			alone.LoadThere = b.out.LoadThere
			if cmp.Compare(alone.Cost(), b.out.Cost()) == c {
				return c, byBack
			}
			return c, byLoadThere
		}
	} else {
		if c := cmp.Compare(a.out.LoadHere, b.out.LoadHere); c != 0 {
			return c, byLoadHere
		}
		if c := cmp.Compare(a.out.LoadThere, b.out.LoadThere); c != 0 {
			return c, byLoadThere
		}
	}
	return cmp.Or(cmp.Compare(a.vm.Name, b.vm.Name), cmp.Compare(a.to.Name, b.to.Name)), byOrder
}

// criterion is what decided between two candidates.
type criterion int

const (
	byRules criterion = iota
	byMeeting
	byPriority
	byBack
	byLoadHere
	byLoadThere
	byOrder
)

// beaten says why a candidate is not the one.
func beaten(c, best candidate, cause view.Cause) string {
	_, by := less(best, c, cause)
	switch by {
	case byRules:
		_, r, who := c.vm.broken(c.to, cause)
		return "a rule that should hold would be broken: " + r.refuses(c.to, who)
	case byMeeting:
		return fmt.Sprintf("VMs on %s would starve on: %.2f wanted for each core", c.vm.host.Name,
			c.out.LoadHere)
	case byPriority:
		return fmt.Sprintf("its priority is %d, that of %s is %d", c.vm.Priority, best.vm.Name,
			best.vm.Priority)
	case byBack:
		return fmt.Sprintf("all would be back after %v, not %v", brief(c.out.Back),
			brief(best.out.Back))
	case byLoadHere:
		return fmt.Sprintf("%s would stay fuller: %.2f wanted for each core, not %.2f",
			c.vm.host.Name, c.out.LoadHere, best.out.LoadHere)
	case byLoadThere:
		return fmt.Sprintf("%s would be fuller: %.2f wanted for each core, not %.2f", c.to.Name,
			c.out.LoadThere, best.out.LoadThere)
	}
	return "it is as good"
}

// brief rounds a time for people.
func brief(d time.Duration) time.Duration {
	if d >= 10*time.Second {
		return d.Round(time.Second)
	}
	return d.Round(10 * time.Millisecond)
}

// decide has the best of some candidates be done.
func (r *round) decide(all []candidate, cause view.Cause, reasons ...string) {
	slices.SortFunc(all, func(a, b candidate) int { n, _ := less(a, b, cause); return n })
	best := all[0]
	from := best.vm.host
	d := view.Decision{At: r.now, Cause: cause, VM: best.vm.Name,
		Incarnation: best.vm.Incarnation, From: from.Name, To: best.to.Name,
		Predicted: best.prediction()}
	d.Reasons = append(reasons, fmt.Sprintf("%s has room for %s, with all that is on its way "+
		"there; the VM has %s", best.to.Name, units.Size(uint64(max(0, best.to.room))),
		units.Size(best.vm.Memory)))
	named := map[*vm]int{}
	for _, c := range all[1:] {
		if len(d.Alternatives) == mostAlternatives {
			break
		}
		if named[c.vm]++; named[c.vm] > 2 {
			continue
		}
		d.Alternatives = append(d.Alternatives, view.Alternative{VM: c.vm.Name, To: c.to.Name,
			Beaten: beaten(c, best, cause), Predicted: c.prediction()})
	}
	d.Move = view.Move{VM: d.VM, Incarnation: d.Incarnation, From: d.From, To: d.To, Began: r.now,
		Memory: best.vm.Memory, InUse: best.vm.InUse, Wants: best.vm.Wants()}
	r.proposed = append(r.proposed, r.begin(d.Move, true))
	r.decisions = append(r.decisions, d)
}

func (c candidate) prediction() view.Prediction {
	return view.Prediction{Gain: c.out.Gain, LoadHere: c.out.LoadHere,
		LoadThere: c.out.LoadThere, Freed: c.vm.Resident, Transfer: c.out.Transfer,
		Back: c.out.Back, Total: c.out.Total}
}

// relieve has VMs leave hosts where VMs starve.
func (r *round) relieve() {
	due := make([]*host, 0, len(r.short))
	for _, h := range r.short {
		if r.waits(h) == "" {
			due = append(due, h)
		}
	}
	slices.SortFunc(due, func(a, b *host) int {
		return cmp.Or(cmp.Compare(b.Waiting, a.Waiting), cmp.Compare(a.Name, b.Name))
	})
	for _, h := range due {
		if r.policy.InAll > 0 && r.under >= r.policy.InAll {
			return
		}
		for first := true; !r.full(h) && !r.met(h, h.after, h.leaving()); first = false {
			all, why := r.reliefs(h)
			if len(all) == 0 {
				if first {
					h.futile, h.why = r.now, why
				}
				break
			}
			starve, wants, has := 0, 0.0, 0.0
			for _, v := range h.guests {
				if v.starves(r.policy) {
					starve++
				}
				wants, has = wants+v.Wants(), has+v.CPU
			}
			reason := fmt.Sprintf("%d of %d VMs on %s starve: all get %.0f %% of the CPU they want",
				starve, len(h.guests), h.Name, 100*has/max(wants, 0.001))
			if starve == 0 {
				reason = fmt.Sprintf("%s has %s of memory available, of %s", h.Name,
					units.Size(h.Available), units.Size(h.Total))
			}
			since := fmt.Sprintf("for %v", r.now.Sub(h.missed).Round(time.Second))
			slices.SortFunc(all,
				func(a, b candidate) int { n, _ := less(a, b, view.Relieve); return n })
			best := all[0]
			r.decide(all, view.Relieve, reason+", "+since,
				fmt.Sprintf("all VMs get %.2f cores more, and are back after %v", best.out.Gain,
					brief(best.out.Back)),
				fmt.Sprintf("wanted for each core: %.2f on %s then, %.2f on %s", best.out.LoadHere,
					h.Name, best.out.LoadThere, best.to.Name))
			h.missed = r.now // the next must have reasons of its own
		}
	}
}

// leaving is the memory that a host gets back from VMs that leave it.
func (h *host) leaving() (sum uint64) {
	for _, m := range h.moves {
		if m.from == h && m.ended.IsZero() {
			sum += m.vm.Resident
		}
	}
	return sum
}

// waits is why nothing is done now for a host whose VMs starve; empty: something is.
func (p *Planner) waits(h *host) string {
	switch {
	case p.late(h):
		return "it is late with its reports"
	case h.maintenance.Phase == view.Draining:
		return "it is being drained"
	case p.full(h):
		return fmt.Sprintf("%d evictions from it or to it are under way", h.under)
	case p.now.Sub(h.missed) < p.policy.Sustain:
		return fmt.Sprintf("not for %v yet", p.policy.Sustain)
	case h.under == 0 && !h.quiet.IsZero() && p.now.Sub(h.quiet) < p.policy.Settle:
		return fmt.Sprintf("an eviction has ended less than %v ago", p.policy.Settle)
	case !h.futile.IsZero() && p.now.Sub(h.futile) < p.policy.Settle:
		return h.why
	}
	return ""
}

// reliefs returns what would help a host whose VMs starve; if there is nothing, why.
func (p *Planner) reliefs(h *host) (all []candidate, why string) {
	cpu := h.after.CPUs < p.policy.Starving*h.after.Wants()
	tied, nowhere, little := 0, 0, 0
	for _, v := range h.guests {
		if p.stays(v, view.Relieve) != "" {
			tied++
			continue
		}
		found := p.targets(v, view.Relieve, p.policy.MaxLoad)
		if len(found) == 0 {
			nowhere++
		}
		for _, c := range found {
			if cpu && c.out.Gain < p.policy.MinGain {
				little++
				continue
			}
			all = append(all, c)
		}
	}
	return all, fmt.Sprintf("no eviction helps: of its VMs %d may not leave, %d have nowhere to "+
		"go, and %d moves would gain less than %.2f cores", tied, nowhere, little,
		p.policy.MinGain)
}

// drain has VMs leave hosts that shall be empty: those of the least priority first, and of these
// the largest, so that smaller ones find room beside them.
func (r *round) drain() {
	for _, h := range r.draining() {
		for _, v := range leavers(h) {
			if r.full(h) {
				break
			}
			if r.stays(v, view.Drain) != "" {
				continue
			}
			if all := r.refuges(v); len(all) > 0 {
				r.decide(all, view.Drain, h.Name+" shall be empty"+because(h.maintenance))
			}
		}
	}
}

func because(m view.Maintenance) string {
	text := ""
	if !m.By.IsZero() {
		text = " by " + m.By.Format(time.RFC3339)
	}
	if m.Reason != "" {
		text += ": " + m.Reason
	}
	return text
}

// draining are hosts that shall be empty, the one that has the least to move first: if there is not
// room for all, most are empty.
func (p *Planner) draining() (list []*host) {
	left := map[*host]uint64{}
	for _, h := range p.names {
		if h.maintenance.Phase == view.Draining {
			list = append(list, h)
			for _, v := range h.guests {
				left[h] += v.InUse
			}
		}
	}
	slices.SortStableFunc(list, func(a, b *host) int { return cmp.Compare(left[a], left[b]) })
	return list
}

// leavers are the VMs of a host, in the order in which they leave it.
func leavers(h *host) []*vm {
	list := slices.Clone(h.guests)
	slices.SortStableFunc(list, func(a, b *vm) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(b.Memory, a.Memory))
	})
	return list
}

// refuges are where a VM may go that has to leave. A host that gets fuller than is good is better
// than none, as long as nobody starves for it.
func (p *Planner) refuges(v *vm) []candidate {
	if all := p.targets(v, view.Drain, p.policy.MaxLoad); len(all) > 0 {
		return all
	}
	return p.targets(v, view.Drain, max(p.policy.MaxLoad, 1/emergency))
}

// mend has VMs go where rules that must hold are kept.
func (r *round) mend() {
	for _, broken := range r.rules {
		if broken.Force == view.Should {
			continue
		}
		for _, v := range broken.misplaced() {
			if r.stays(v, view.Mend) != "" || r.full(v.host) ||
				v.host.maintenance.Phase == view.Draining {
				continue
			}
			if all := r.targets(v, view.Mend, r.policy.MaxLoad); len(all) > 0 {
				r.decide(all, view.Mend, fmt.Sprintf("rule %q is broken on %s", broken.short(),
					v.host.Name))
			}
		}
	}
}

// misplaced are the VMs that should move for the rule to be kept, those that leave first first.
func (r *rule) misplaced() []*vm {
	if !r.known {
		r.out, r.known = r.findMisplaced(), true
	}
	return r.out
}

func (r *rule) findMisplaced() (list []*vm) {
	order := func(a, b *vm) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.InUse, b.InUse),
			cmp.Compare(a.Name, b.Name))
	}
	at := map[string][]*vm{}
	for _, v := range r.vm {
		h := v.finally()
		switch {
		case h == nil:
		case r.Relation == view.On:
			if !r.allows(h) {
				list = append(list, v)
			}
		case r.Relation == view.Apart || r.Relation == view.Together:
			at[r.place(h)] = append(at[r.place(h)], v)
		}
	}
	main := ""
	for place, vms := range at {
		if most := at[main]; len(vms) > len(most) || len(vms) == len(most) && place < main {
			main = place
		}
	}
	for place, vms := range at {
		slices.SortFunc(vms, order)
		switch {
		case r.Relation == view.Apart:
			list = append(list, vms[:len(vms)-1]...) // the one of the most priority stays
		case place != main:
			list = append(list, vms...)
		}
	}
	slices.SortFunc(list, order)
	return list
}

// restore has VMs come back to hosts that they left for maintenance.
func (r *round) restore() {
	for _, h := range r.names {
		if h.maintenance.Phase != view.Restoring {
			continue
		}
		for _, name := range h.maintenance.Left {
			v := r.vms[name]
			if v == nil || r.full(h) {
				continue
			}
			if why, _ := r.returns(v, h); why != "" || r.full(v.host) {
				continue
			}
			c := r.predict(v, h, view.Restore)
			r.decide([]candidate{c}, view.Restore,
				fmt.Sprintf("it was on %s before its maintenance", h.Name), r.helps(c))
		}
	}
}

// returns is why a VM does not come back to a host; empty: it does. It may do later, if passes.
func (p *Planner) returns(v *vm, h *host) (why string, passes bool) {
	if v.host == h || v.move != nil && v.move.to == h {
		return "it is there", false
	}
	if why := p.tie(v, view.Restore); why != "" {
		return why, false
	}
	if why := p.rests(v, view.Restore); why != "" {
		return why, true
	}
	if o := p.fit(v, h, view.Restore, p.policy.MaxLoad); o.kind != none {
		return p.say(o, v, h), o.passes()
	}
	if p.helps(p.predict(v, h, view.Restore)) == "" {
		return fmt.Sprintf("it is as well off on %s", v.host.Name), false
	}
	return "", false
}

// evens is by how much two hosts must differ for a VM to come back, as a share of either.
const evens = 0.1

// helps is what a move back is good for; empty: for nothing.
func (p *Planner) helps(c candidate) string {
	from := c.vm.host
	before, _, _ := c.vm.broken(from, view.Restore)
	there := free(c.to) - float64(c.vm.Memory)/float64(max(1, c.to.Total))
	switch {
	case c.broken < before:
		return "rules that should hold are kept there"
	case c.out.Gain >= max(p.policy.MinGain, leastWait):
		return fmt.Sprintf("all VMs get %.2f cores more", c.out.Gain)
	case from.load()-c.out.LoadThere >= evens:
		return fmt.Sprintf("wanted for each core: %.2f on %s now, %.2f on %s then", from.load(),
			from.Name, c.out.LoadThere, c.to.Name)
	case there-free(from) >= evens:
		return fmt.Sprintf("memory available: %.0f %% on %s now, %.0f %% on %s then",
			100*free(from), from.Name, 100*there, c.to.Name)
	}
	return ""
}

func free(h *host) float64 { return float64(h.Available) / float64(max(1, h.Total)) }
