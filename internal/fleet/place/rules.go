package place

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"vacate/internal/fleet/view"
	"vacate/internal/sys/units"
)

// rule is a rule with the VMs that it is about.
type rule struct {
	view.Rule
	at map[string][]*vm // by place; a VM that moves is at both
	vm []*vm            // all
	// hosts are those that a rule of kind On allows; nil: not worked out yet.
	hosts []*host
	// out are its VMs that should move, if that is known.
	out   []*vm
	known bool
}

// presence is a VM's entry in a rule.
type presence struct {
	rule  *rule
	place string
}

// SetRules has these rules hold from now on, and no other.
func (p *Planner) SetRules(rules []view.Rule) {
	for _, v := range p.vms {
		p.leaveRules(v)
		v.rules = nil
	}
	p.rules, p.byLabel = nil, map[string][]*rule{}
	for _, r := range rules {
		n := &rule{Rule: r, at: map[string][]*vm{}}
		p.rules = append(p.rules, n)
		key, value, _ := r.VMs.Exact()
		p.byLabel[key+"="+value] = append(p.byLabel[key+"="+value], n)
	}
	for _, h := range p.names {
		for _, v := range h.guests {
			if v.rules == nil {
				v.rules = p.about(v)
				p.enterRules(v)
			}
		}
	}
	for _, m := range p.moves {
		if m.vm.rules == nil {
			m.vm.rules = p.about(m.vm)
			p.enterRules(m.vm)
		}
	}
}

// about are the rules that are about a VM.
func (p *Planner) about(v *vm) []*rule {
	about := []*rule{}
	look := func(key, value string) {
		for _, r := range p.byLabel[key+"="+value] {
			if r.VMs.Picks(v.Name, v.Labels) {
				about = append(about, r)
			}
		}
	}
	look("", "")
	look("name", v.Name)
	for _, key := range slices.Sorted(maps.Keys(v.Labels)) {
		look(key, v.Labels[key])
	}
	return about
}

func (p *Planner) enterRules(v *vm) {
	for _, r := range v.rules {
		r.vm, r.known = append(r.vm, v), false
		for _, h := range v.at() {
			place := r.place(h)
			if !slices.Contains(r.at[place], v) {
				r.at[place] = append(r.at[place], v)
				v.present = append(v.present, presence{r, place})
			}
		}
	}
}

func (p *Planner) leaveRules(v *vm) {
	is := func(o *vm) bool { return o == v }
	for _, r := range v.rules {
		r.vm, r.known = slices.DeleteFunc(r.vm, is), false
	}
	for _, at := range v.present {
		if left := slices.DeleteFunc(at.rule.at[at.place], is); len(left) > 0 {
			at.rule.at[at.place] = left
		} else {
			delete(at.rule.at, at.place)
		}
	}
	v.present = v.present[:0]
}

// at are the hosts that a VM is on for now, and may be on soon.
func (v *vm) at() []*host {
	var all []*host
	if v.host != nil {
		all = append(all, v.host)
	}
	if v.move != nil && v.move.to != v.host {
		all = append(all, v.move.to)
	}
	return all
}

// finally is the host that a VM will be on.
func (v *vm) finally() *host {
	if v.move != nil {
		return v.move.to
	}
	return v.host
}

// place names the place that a host is in, for a rule.
func (r *rule) place(h *host) string {
	if value, ok := h.Labels[r.By]; ok && r.By != "" {
		return value
	}
	return "\x00" + h.Name // which no label's value is
}

// allows reports whether a rule of kind On lets its VMs be on a host.
func (r *rule) allows(h *host) bool {
	return r.Hosts.Picks(h.Name, h.Labels) != (r.Force == view.Never)
}

func (p *Planner) forgetLists() {
	for _, r := range p.rules {
		r.hosts, r.known = nil, false
	}
}

// allowed are the hosts that a rule of kind On lets its VMs be on.
func (p *Planner) allowed(r *rule) []*host {
	if r.hosts == nil {
		r.hosts = []*host{}
		for _, h := range p.names {
			if r.allows(h) {
				r.hosts = append(r.hosts, h)
			}
		}
	}
	return r.hosts
}

// keeps returns what is in the way of a rule if a VM goes to a host; empty: nothing.
func (r *rule) keeps(v *vm, h *host, cause view.Cause) (who string, ok bool) {
	place := r.place(h)
	switch r.Relation {
	case view.On:
		return h.Name, r.allows(h)
	case view.Apart:
		for _, o := range r.at[place] {
			if o != v {
				return o.Name, false
			}
		}
	case view.Together:
		other := ""
		for _, o := range r.vm {
			if o == v || o.finally() == nil {
				continue
			}
			if r.place(o.finally()) == place {
				return "", true
			}
			other = o.Name
		}
		// The first of those that must leave goes ahead, and the others follow it.
		return other, other == "" || cause == view.Drain && v.host != nil && r.leads(v, h)
	}
	return "", true
}

// leads reports whether a host has what all VMs of the rule want that are where the VM is.
func (r *rule) leads(v *vm, h *host) bool {
	memory, wants := uint64(0), 0.0
	for _, o := range r.vm {
		if o.finally() == nil || r.place(o.finally()) != r.place(v.host) {
			return false
		}
		if o.Pinned || o.Barred != "" {
			return false
		}
		memory, wants = memory+o.Memory, wants+o.Wants()
	}
	return int64(memory) <= h.room && h.after.Wants()+wants <= h.CPUs/emergency
}

// broken counts the rules with should that a VM does not keep on a host, and names one.
func (v *vm) broken(h *host, cause view.Cause) (n int, example *rule, who string) {
	for _, r := range v.rules {
		if r.Force == view.Should && r.Relation != view.Stay {
			if other, ok := r.keeps(v, h, cause); !ok {
				n, example, who = n+1, r, other
			}
		}
	}
	return n, example, who
}

// kind is a kind of obstacle.
type kind int

const (
	none kind = iota
	isHere
	unseen
	isLate
	isClosed
	maintained
	busyHost
	busyLink
	busyFleet
	hasRefused
	noRoom
	noCPU
	byRule
)

// obstacle is why a VM cannot go to a host; the zero value: it can.
type obstacle struct {
	kind kind
	rule *rule
	who  string
}

// emergency is the share of the CPU they want that VMs get at least where VMs go that have to leave
// their host: nobody starves.
const emergency = 0.9

// opens is why no VM may come to a host; empty: one may.
func (p *Planner) opens(h *host) string {
	switch {
	case h.seen.IsZero():
		return "it has not reported yet"
	case h.Closed != "":
		return h.Closed
	case !h.maintenance.Open():
		return "it is " + string(h.maintenance.Phase)
	case p.full(h):
		return fmt.Sprintf("%d evictions from it or to it are under way", h.under)
	}
	return ""
}

func (p *Planner) full(h *host) bool { return p.policy.PerHost > 0 && h.under >= p.policy.PerHost }

// fit returns why a VM cannot go to a host.
func (p *Planner) fit(v *vm, h *host, cause view.Cause, maxLoad float64) obstacle {
	switch {
	case h == v.host:
		return obstacle{kind: isHere}
	case h.seen.IsZero():
		return obstacle{kind: unseen}
	case p.late(h):
		return obstacle{kind: isLate}
	case h.Closed != "":
		return obstacle{kind: isClosed}
	case !h.maintenance.Open():
		return obstacle{kind: maintained}
	}
	if r, ok := p.refused[pair{v.Name, h.Name}]; ok && p.now.Before(r.until) {
		return obstacle{kind: hasRefused, who: r.why}
	}
	for _, r := range v.rules {
		if r.Force != view.Should && r.Relation != view.Stay {
			if who, ok := r.keeps(v, h, cause); !ok {
				return obstacle{byRule, r, who}
			}
		}
	}
	switch {
	case int64(v.Memory) > h.room:
		return obstacle{kind: noRoom}
	case h.after.Wants()+v.Wants() > maxLoad*h.CPUs:
		return obstacle{kind: noCPU}
	case p.full(h):
		return obstacle{kind: busyHost}
	case v.host != nil && p.policy.PerLink > 0:
		for _, l := range links(v.host, h) {
			if p.links[l] >= p.policy.PerLink {
				return obstacle{kind: busyLink, who: l}
			}
		}
	}
	if p.policy.InAll > 0 && p.under >= p.policy.InAll {
		return obstacle{kind: busyFleet}
	}
	return obstacle{}
}

// passes reports whether an obstacle goes away by itself as moves end and reports come.
func (o obstacle) passes() bool {
	return o.kind == busyHost || o.kind == busyLink || o.kind == busyFleet || o.kind == isLate
}

// say puts an obstacle into words.
func (p *Planner) say(o obstacle, v *vm, h *host) string {
	switch o.kind {
	case isHere:
		return "the VM is there"
	case unseen:
		return h.Name + " has not reported yet"
	case isLate:
		return h.Name + " is late with its reports"
	case isClosed:
		return h.Name + " takes none: " + h.Closed
	case maintained:
		return fmt.Sprintf("%s is %s", h.Name, h.maintenance.Phase)
	case busyHost:
		return fmt.Sprintf("%d evictions from %s or to it are under way", h.under, h.Name)
	case busyLink:
		return fmt.Sprintf("%d evictions over link %s are under way", p.links[o.who], o.who)
	case busyFleet:
		return fmt.Sprintf("%d evictions are under way in the fleet", p.under)
	case hasRefused:
		return h.Name + ": " + o.who
	case noRoom:
		return fmt.Sprintf("%s has room for %s, the VM has %s", h.Name,
			units.Size(uint64(max(0, h.room))), units.Size(v.Memory))
	case noCPU:
		return fmt.Sprintf("%s would be too full: %.2f cores wanted, of %.0f", h.Name,
			h.after.Wants()+v.Wants(), h.CPUs)
	case byRule:
		return o.rule.refuses(h, o.who)
	}
	return ""
}

// refuses says why a host may not have a VM.
func (r *rule) refuses(h *host, who string) string {
	where := "on " + h.Name
	if r.By != "" {
		if value, ok := h.Labels[r.By]; ok {
			where = fmt.Sprintf("in %s %s", r.By, value)
		}
	}
	switch r.Relation {
	case view.Apart:
		return fmt.Sprintf("%s is %s (rule %q)", who, where, r.short())
	case view.Together:
		return fmt.Sprintf("%s is not %s (rule %q)", who, where, r.short())
	}
	return fmt.Sprintf("it may not be on %s (rule %q)", h.Name, r.short())
}

// short is the rule's name, or its text.
func (r *rule) short() string {
	if r.Name != "" {
		return r.Name
	}
	return r.String()
}

// tie is why a VM may not leave its host for a cause, however long one waits; empty: it may.
func (p *Planner) tie(v *vm, cause view.Cause) string {
	switch {
	case v.Pinned:
		return "it is pinned"
	case v.Barred != "" && v.move == nil:
		return v.Barred
	case v.host == nil:
		return "no host tells of it"
	case len(v.claims) > 1 && v.move == nil:
		names := make([]string, len(v.claims))
		for i, h := range v.claims {
			names[i] = h.Name
		}
		slices.Sort(names)
		return "several hosts tell of it: " + strings.Join(names, ", ")
	}
	for _, r := range v.rules {
		if r.Relation == view.Stay && (r.Force == view.Must || cause != view.Drain) {
			return fmt.Sprintf("it stays (rule %q)", r.short())
		}
	}
	return ""
}

// rests is why a VM does not leave its host just now, though it may later.
func (p *Planner) rests(v *vm, cause view.Cause) string {
	switch {
	case v.move != nil && v.move.ended.IsZero():
		return "it is on its way to " + v.move.to.Name
	case v.move != nil:
		return v.move.to.Name + " has not told of it yet"
	case p.late(v.host):
		return v.host.Name + " is late with its reports"
	}
	if left := p.policy.Settle - p.now.Sub(v.failed); !v.failed.IsZero() && left > 0 {
		return fmt.Sprintf("its last eviction failed: %s; it may be tried again in %v", v.problem,
			left.Round(time.Second))
	}
	if r, ok := p.refused[pair{v.Name, ""}]; ok && p.now.Before(r.until) {
		return r.why
	}
	moved := later(v.Moved, v.tried)
	if left := p.policy.CoolDown - p.now.Sub(moved); cause == view.Relieve && !moved.IsZero() &&
		left > 0 {
		return fmt.Sprintf("it was evicted lately, or that was tried: it stays for %v more",
			left.Round(time.Second))
	}
	return ""
}

// stays is why a VM does not leave its host now; empty: it may.
func (p *Planner) stays(v *vm, cause view.Cause) string {
	if why := p.tie(v, cause); why != "" {
		return why
	}
	return p.rests(v, cause)
}
