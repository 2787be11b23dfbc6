package place

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"vacate/internal/fleet/view"
	"vacate/internal/sys/units"
)

// Trouble is what cannot be as it should, and who is in the way.
type Trouble struct {
	Rule string   `json:"rule,omitempty"` // as text; empty: it is no rule's
	Host string   `json:"host,omitempty"`
	VMs  []string `json:"vms,omitempty"` // that it is about
	Why  string   `json:"why"`
	// Mending says that moves are under way, or will be, that end it.
	Mending bool `json:"mending,omitempty"`
}

// Troubles returns rules that are not kept, hosts that nothing helps, VMs that cannot leave a host
// that shall be empty, and VMs that several hosts tell of.
func (p *Planner) Troubles(now time.Time) (all []Trouble) {
	p.now = later(p.now, now)
	for _, r := range p.rules {
		all = append(all, p.unmet(r)...)
	}
	for _, h := range p.names {
		if h.maintenance.Phase == view.Draining {
			_, stay := p.remaining(h)
			for _, s := range stay {
				all = append(all, Trouble{Host: h.Name, VMs: []string{s.VM}, Why: s.Why})
			}
			continue
		}
		if h.listed > 0 {
			why := p.waits(h)
			all = append(all, Trouble{Host: h.Name, VMs: h.starving(p.policy),
				Why:     "VMs starve: " + cmp.Or(why, "a VM leaves with the next round"),
				Mending: h.leaving() > 0})
		}
		for _, v := range h.guests {
			if len(v.claims) > 1 && v.claims[0] == h && v.move == nil {
				all = append(all, Trouble{Host: h.Name, VMs: []string{v.Name},
					Why: p.tie(v, view.Relieve)})
			}
		}
	}
	return all
}

func (h *host) starving(policy view.Policy) (names []string) {
	for _, v := range h.guests {
		if v.starves(policy) {
			names = append(names, v.Name)
		}
	}
	return names
}

// unmet tells of VMs that do not keep a rule, and what is in the way of mending it.
func (p *Planner) unmet(r *rule) (all []Trouble) {
	for _, v := range r.misplaced() {
		t := Trouble{Rule: r.String(), VMs: []string{v.Name}}
		switch h := v.finally(); {
		case h == nil:
			continue
		case v.move == nil:
			t.Host = h.Name
			who, _ := r.keeps(v, h, view.Mend)
			t.Why = r.refuses(h, who)
			if r.Force == view.Should {
				t.Why += "; it is only kept where a VM moves anyhow"
				break
			}
			if tie := p.stays(v, view.Mend); tie != "" {
				t.Why += ". It cannot move: " + tie
				break
			}
			if len(p.targets(v, view.Mend, p.policy.MaxLoad)) > 0 {
				t.Mending = true
				break
			}
			t.Why += ". It has nowhere to go: " + p.nowhere(v, view.Mend, p.policy.MaxLoad)
		default:
			t.Why, t.Mending = "it is on its way to "+h.Name, true
		}
		all = append(all, t)
	}
	return all
}

// nowhere says why no host can have a VM: of each kind of obstacle one example, and of how many
// hosts it is true. Few hosts are named one by one.
func (p *Planner) nowhere(v *vm, cause view.Cause, maxLoad float64) string {
	type group struct {
		first string
		hosts int
	}
	var order []kind
	groups := map[kind]*group{}
	others := 0
	for _, h := range p.names {
		o := p.fit(v, h, cause, maxLoad)
		if o.kind == none || o.kind == isHere {
			continue
		}
		others++
		if groups[o.kind] == nil {
			groups[o.kind] = &group{first: p.say(o, v, h)}
			order = append(order, o.kind)
		} else if groups[o.kind].hosts < 3 {
			groups[o.kind].first += "; " + p.say(o, v, h)
		}
		groups[o.kind].hosts++
	}
	if others == 0 {
		return "there is no other host"
	}
	slices.SortStableFunc(order,
		func(a, b kind) int { return cmp.Compare(groups[b].hosts, groups[a].hosts) })
	var parts []string
	for _, k := range order {
		text := groups[k].first
		if n := groups[k].hosts; n > 3 {
			text += fmt.Sprintf("; and likewise %d more hosts", n-3)
		}
		parts = append(parts, text)
	}
	return strings.Join(parts, "; ")
}

// Stay is a VM that stays where it is, and why.
type Stay struct {
	VM   string `json:"vm"`
	Host string `json:"host"`
	Why  string `json:"why"`
}

// Remaining tells how far the maintenance of a host is: the VMs that are still to leave a host that
// is being drained, or to come back to one that is restored; and those that will not, with the
// reason. Once none is left to go, it is over.
func (p *Planner) Remaining(now time.Time, host string) (going []string, stay []Stay) {
	p.now = later(p.now, now)
	h := p.hosts[host]
	switch {
	case h == nil:
	case h.maintenance.Phase == view.Restoring:
		for _, name := range h.maintenance.Left {
			v := p.vms[name]
			if v == nil || v.host == nil {
				stay = append(stay, Stay{VM: name, Why: "no host tells of it"})
				continue
			}
			why, passes := p.returns(v, h)
			switch {
			case v.host == h:
			case why == "" || passes || v.move != nil && v.move.to == h:
				going = append(going, name)
			default:
				stay = append(stay, Stay{VM: name, Host: v.host.Name, Why: why})
			}
		}
	default:
		return p.remaining(h)
	}
	return going, stay
}

// remaining is the same of a host that is drained. A VM that runs at its target already needs the
// host until its move has ended.
func (p *Planner) remaining(h *host) (going []string, stay []Stay) {
	for _, m := range h.moves {
		here := slices.ContainsFunc(h.guests, func(v *vm) bool { return v.Name == m.VM })
		if m.from == h && m.ended.IsZero() && !here {
			going = append(going, m.VM)
		}
	}
	for _, v := range leavers(h) {
		if v.move != nil && v.move.from == h {
			going = append(going, v.Name)
			continue
		}
		why := p.tie(v, view.Drain)
		if why == "" && !p.couldLeave(v) {
			why = p.nowhere(v, view.Drain, max(p.policy.MaxLoad, 1/emergency))
		}
		if why != "" {
			stay = append(stay, Stay{VM: v.Name, Host: h.Name, Why: why})
		} else {
			going = append(going, v.Name)
		}
	}
	return going, stay
}

// couldLeave reports whether there is a host that a VM can go to, now or when moves have ended.
func (p *Planner) couldLeave(v *vm) bool {
	most := max(p.policy.MaxLoad, 1/emergency)
	return slices.ContainsFunc(p.names, func(h *host) bool {
		o := p.fit(v, h, view.Drain, most)
		return o.kind == none || o.passes()
	})
}

// Ask is a new VM that needs a host.
type Ask struct {
	Name   string      `json:"name,omitempty"` // rules may be about it
	Labels view.Labels `json:"labels,omitempty"`
	Memory uint64      `json:"memory"`
	CPU    float64     `json:"cpu"` // cores that it will want
}

// Choice is a host for it.
type Choice struct {
	Host    string   `json:"host"`
	Load    float64  `json:"load"` // CPU wanted for each core, with it
	Room    uint64   `json:"room"` // memory that is left then, beyond the reserve
	Reasons []string `json:"reasons"`
}

// Where returns the best hosts for a new VM, at most a number of them, the best first; if there is
// none, why.
func (p *Planner) Where(now time.Time, a Ask, most int) (best []Choice, why string) {
	p.now = later(p.now, now)
	v := &vm{VM: view.VM{Name: a.Name, Labels: a.Labels, Memory: a.Memory, CPU: a.CPU}}
	v.rules = p.about(v)
	type found struct {
		h      *host
		broken int
		load   float64
	}
	var all []found
	for _, h := range p.names {
		if o := p.fit(v, h, "", p.policy.MaxLoad); o.kind == none || o.kind == busyHost ||
			o.kind == busyFleet {
			n, _, _ := v.broken(h, "")
			all = append(all, found{h, n, (h.after.Wants() + a.CPU) / h.CPUs})
		}
	}
	if len(all) == 0 {
		return nil, p.nowhere(v, "", p.policy.MaxLoad)
	}
	slices.SortStableFunc(all, func(a, b found) int {
		return cmp.Or(cmp.Compare(a.broken, b.broken), cmp.Compare(a.load, b.load))
	})
	for _, f := range all[:min(most, len(all))] {
		c := Choice{Host: f.h.Name, Load: f.load, Room: uint64(f.h.room) - a.Memory}
		c.Reasons = []string{
			fmt.Sprintf("%.2f cores would be wanted, of %.0f", f.load*f.h.CPUs, f.h.CPUs),
			fmt.Sprintf("%s of memory would be left beyond the reserve", units.Size(c.Room)),
		}
		if f.broken > 0 {
			_, r, who := v.broken(f.h, "")
			c.Reasons = append(c.Reasons,
				"a rule that should hold would be broken: "+r.refuses(f.h, who))
		}
		best = append(best, c)
	}
	return best, ""
}

// Admit is the last word of the host that a VM shall come to, by what it knows itself: its own
// report, the rules, and the moves that are on their way to it. It returns why the VM may not come;
// empty: it may. CPU is not looked at: a host that is asked to take a VM from one that is drained
// may get fuller than is good.
func Admit(now time.Time, here view.Report, v view.VM, coming []view.Move, rules []view.Rule,
	policy view.Policy) string {
	p := New(policy)
	p.SetRules(rules)
	if err := p.Report(here); err != nil {
		return err.Error()
	}
	p.now = later(p.now, now)
	for _, m := range coming {
		if m.VM != v.Name {
			p.Began(m)
		}
	}
	guest := &vm{VM: v}
	guest.rules = p.about(guest)
	h := p.hosts[here.Host.Name]
	if o := p.fit(guest, h, view.Drain, 1e9); o.kind != none {
		return p.say(o, guest, h)
	}
	return ""
}
