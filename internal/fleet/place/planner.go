package place

import (
	"cmp"
	"math"
	"slices"
	"time"

	"vacate/internal/fleet/view"
	"vacate/internal/predict"
)

// Planner knows a fleet. Its methods may not be called by several goroutines at once. Moments must
// not go back.
type Planner struct {
	policy view.Policy
	rules  []*rule
	// byLabel has the rules that are only about VMs with one value of a label, by "label=value";
	// the others are at "=".
	byLabel map[string][]*rule
	hosts   map[string]*host
	names   []*host // the same, in order of name
	vms     map[string]*vm
	moves   map[string]*move // by VM
	links   map[string]int   // how many moves go over each link that hosts share
	under   int              // how many moves have not ended
	index   index
	short   set // hosts with VMs that starve, or with too little memory
	// refused has why a host would not have a VM, until when; "" is all hosts.
	refused map[pair]refusal
	// proposed are the last round's decisions.
	proposed []*move
	// past has the latest moves from each host that completed; at "", of all hosts.
	past map[string][]view.Outcome
	now  time.Time
}

type pair struct{ vm, to string }

type refusal struct {
	why   string
	until time.Time
}

// host is a host, and what the planner makes of it.
type host struct {
	view.Host
	seen        time.Time     // zero: only its maintenance is known
	every       time.Duration // that its reports are apart; 0: not known
	guests      []*vm         // by its word, in order of name
	maintenance view.Maintenance

	moves []*move // from it or to it
	under int     // of these, how many have not ended
	// Of the host once all moves that are under way have ended.
	after predict.Host
	room  int64   // memory that a VM may have
	stay  float64 // what is likely of its VMs

	missed time.Time // since when VMs starve; zero: none does
	quiet  time.Time // when a move from it or to it ended last
	futile time.Time // when nothing helped last
	why    string    // why nothing helped

	slot            slot
	inIndex, listed int // where it is in its slot, and in the list of those that are short; from 1
}

// vm is a VM, by the word of the host that it is taken to run on.
type vm struct {
	view.VM
	host    *host
	claims  []*host // all hosts that tell of it
	rules   []*rule // that are about it; nil: not worked out yet
	present []presence
	tried   time.Time // when a move of it ended, or was given up
	failed  time.Time // when one ended with a problem
	problem string
	move    *move
}

// move is a move that is under way, was decided a moment ago, or has ended while its target has
// not told of the VM yet.
type move struct {
	view.Move
	vm       *vm
	from, to *host
	proposed bool      // by the last round; nobody has told yet what becomes of it
	ended    time.Time // zero: it is under way
}

// New returns a planner that knows no host yet.
func New(p view.Policy) *Planner {
	return &Planner{policy: p, hosts: map[string]*host{}, vms: map[string]*vm{},
		moves: map[string]*move{}, links: map[string]int{}, refused: map[pair]refusal{},
		past: map[string][]view.Outcome{}}
}

// SetPolicy has another policy hold from now on.
func (p *Planner) SetPolicy(policy view.Policy) {
	p.policy = policy
	for _, h := range p.names {
		p.weigh(h)
	}
}

// Maintain has a host be in a phase of maintenance from now on; with none, it is in service.
func (p *Planner) Maintain(m view.Maintenance) {
	h := p.host(m.Host)
	h.maintenance = m
	p.weigh(h)
}

// host returns a host, known or not.
func (p *Planner) host(name string) *host {
	h := p.hosts[name]
	if h == nil {
		h = &host{Host: view.Host{Name: name}}
		p.hosts[name] = h
		at, _ := slices.BinarySearchFunc(p.names, name, byName)
		p.names = slices.Insert(p.names, at, h)
		p.forgetLists()
	}
	return h
}

func byName(h *host, name string) int { return cmp.Compare(h.Name, name) }

// Report takes what a host tells. A report that makes no sense is refused; what the host told
// before is then still what is known of it.
func (p *Planner) Report(r view.Report) error {
	if err := r.Check(); err != nil {
		return err
	}
	p.now = later(p.now, r.Seen)
	h := p.host(r.Host.Name)
	if !sameLabels(h.Labels, r.Host.Labels) {
		here := slices.Clone(h.guests)
		for _, m := range h.moves {
			if !slices.Contains(here, m.vm) {
				here = append(here, m.vm)
			}
		}
		for _, v := range here {
			p.leaveRules(v)
		}
		h.Labels = r.Host.Labels
		p.forgetLists()
		for _, v := range here {
			p.enterRules(v)
		}
	}
	if apart := r.Seen.Sub(h.seen); !h.seen.IsZero() && apart > 0 && apart <= p.policy.Late {
		h.every = cmp.Or(h.every, apart)
		h.every += (apart - h.every) / 8
	}
	h.Host, h.seen = r.Host, later(h.seen, r.Seen)
	p.take(h, r.VMs)
	for _, m := range slices.Clone(h.moves) {
		p.settle(m)
	}
	p.weigh(h)
	return nil
}

// take has a host tell of these VMs, and of no others.
func (p *Planner) take(h *host, told []view.VM) {
	byName := func(a, b view.VM) int { return cmp.Compare(a.Name, b.Name) }
	if !slices.IsSortedFunc(told, byName) {
		told = slices.SortedFunc(slices.Values(told), byName)
	}
	before := h.guests
	same := len(before) == len(told)
	for i := range told {
		if same = same && before[i].Name == told[i].Name; !same {
			break
		}
	}
	if !same {
		h.guests = make([]*vm, len(told))
		for i, t := range told {
			v := p.vms[t.Name]
			if v == nil {
				v = &vm{VM: t}
				p.vms[t.Name] = v
			}
			h.guests[i] = v
			if !slices.Contains(v.claims, h) {
				v.claims = append(v.claims, h)
			}
		}
		i := 0
		for _, v := range before {
			for i < len(told) && told[i].Name < v.Name {
				i++
			}
			if i == len(told) || told[i].Name != v.Name {
				p.lose(v, h)
			}
		}
	}
	for i, v := range h.guests {
		p.locate(v)
		if v.host != h {
			continue
		}
		if !sameLabels(v.Labels, told[i].Labels) {
			p.leaveRules(v)
			v.VM = told[i]
			v.rules = p.about(v)
			p.enterRules(v)
		}
		v.VM = told[i]
	}
}

// lose is called when a host does not tell of a VM any more.
func (p *Planner) lose(v *vm, h *host) {
	v.claims = slices.DeleteFunc(v.claims, func(o *host) bool { return o == h })
	p.locate(v)
}

// locate settles which host a VM runs on: while it moves, the one that it leaves as long as that
// tells of it; of several hosts, the one that it was on, unless that is late.
func (p *Planner) locate(v *vm) {
	at := v.host
	switch {
	case len(v.claims) == 0:
		if v.move != nil {
			return // neither end tells of it for a moment
		}
		at = nil
	case len(v.claims) == 1:
		at = v.claims[0]
	case v.move != nil && slices.Contains(v.claims, v.move.from):
		at = v.move.from
	case !slices.Contains(v.claims, at) || p.late(at):
		at = v.claims[0]
		for _, h := range v.claims {
			if h.seen.After(at.seen) {
				at = h
			}
		}
	}
	p.put(v, at)
}

// put notes which host a VM runs on; nil: it runs nowhere any more.
func (p *Planner) put(v *vm, at *host) {
	if at == v.host && at != nil {
		return
	}
	p.leaveRules(v)
	v.host = at
	if at == nil {
		if p.vms[v.Name] == v {
			delete(p.vms, v.Name)
		}
		return
	}
	if v.rules == nil {
		v.rules = p.about(v)
	}
	p.enterRules(v)
}

// Forget removes a host that has left the fleet.
func (p *Planner) Forget(name string) {
	h := p.hosts[name]
	if h == nil {
		return
	}
	for _, m := range slices.Clone(h.moves) {
		p.drop(m)
	}
	for _, v := range h.guests {
		p.lose(v, h)
	}
	p.index.remove(h)
	p.short.remove(h)
	delete(p.hosts, name)
	delete(p.past, name)
	p.names = slices.DeleteFunc(p.names, func(o *host) bool { return o == h })
	p.forgetLists()
}

// Began is told of each move that has been ordered, and by a new leader of each that is under way.
// From here on the target's room, CPU and link are kept for it.
func (p *Planner) Began(m view.Move) {
	if known := p.moves[m.VM]; known != nil {
		if known.From == m.From && known.To == m.To && known.ended.IsZero() {
			known.Move, known.proposed = m, false
			p.weigh(known.to)
			return
		}
		p.drop(known)
	}
	p.begin(m, false)
}

func (p *Planner) begin(m view.Move, proposed bool) *move {
	v := p.vms[m.VM]
	if v == nil { // no report has told of it yet
		v = &vm{VM: view.VM{Name: m.VM, Incarnation: m.Incarnation, Memory: m.Memory,
			InUse: m.InUse}}
		p.vms[m.VM] = v
		v.rules = p.about(v)
	}
	n := &move{Move: m, vm: v, from: p.host(m.From), to: p.host(m.To), proposed: proposed}
	p.leaveRules(v)
	v.move = n
	p.enterRules(v)
	p.moves[m.VM] = n
	n.from.moves, n.to.moves = append(n.from.moves, n), append(n.to.moves, n)
	p.count(n, 1)
	return n
}

// count has a move that is under way count, or no longer.
func (p *Planner) count(m *move, by int) {
	p.under += by
	m.from.under += by
	m.to.under += by
	for _, l := range m.links() {
		p.links[l] += by
	}
	p.weigh(m.from)
	p.weigh(m.to)
}

// links are those that hosts share and that the move goes over.
func (m *move) links() []string { return links(m.from, m.to) }

func links(from, to *host) []string {
	if from.Link == to.Link { // within a rack, say
		return nil
	}
	var all []string
	for _, l := range []string{from.Link, to.Link} {
		if l != "" {
			all = append(all, l)
		}
	}
	return all
}

// Ended is told when a move has ended, with a problem if it has not moved the VM. It also takes
// decisions that never became a move: an operator said no, or the fleet only watches. What was kept
// for a VM at its target is given up once the target tells of the VM itself.
func (p *Planner) Ended(vm string, at time.Time, problem string) {
	p.now = later(p.now, at)
	m := p.moves[vm]
	if m == nil || !m.ended.IsZero() {
		return
	}
	m.vm.tried, m.ended = at, at
	p.count(m, -1)
	m.from.quiet, m.to.quiet = at, at
	if problem != "" {
		m.vm.failed, m.vm.problem = at, problem
		p.drop(m)
		return
	}
	p.settle(m)
}

// settle gives up what is kept for a move that has ended, if the target's reports have it by now.
func (p *Planner) settle(m *move) {
	if m.ended.IsZero() || !m.to.seen.After(m.ended) {
		return
	}
	if slices.Contains(m.vm.claims, m.to) {
		p.put(m.vm, m.to) // though the host that it left may not have reported since
		p.drop(m)
	} else if p.now.Sub(m.ended) > 2*p.policy.Late {
		p.drop(m)
	}
}

// drop removes a move.
func (p *Planner) drop(m *move) {
	if m.ended.IsZero() {
		m.ended = p.now
		p.count(m, -1)
	}
	is := func(o *move) bool { return o == m }
	m.from.moves = slices.DeleteFunc(m.from.moves, is)
	m.to.moves = slices.DeleteFunc(m.to.moves, is)
	p.leaveRules(m.vm)
	m.vm.move = nil
	p.enterRules(m.vm)
	if p.moves[m.VM] == m {
		delete(p.moves, m.VM)
	}
	p.locate(m.vm)
	p.weigh(m.from)
	p.weigh(m.to)
}

// Refused is told when a host would not give or take a VM: the pair is left alone until then.
func (p *Planner) Refused(vm, to, why string, until time.Time) {
	p.refused[pair{vm, to}] = refusal{why, until}
}

// weigh works out what a host has left once all that is under way has ended, and whether its VMs
// starve.
func (p *Planner) weigh(h *host) {
	if h.seen.IsZero() {
		return
	}
	h.after = h.host()
	var size, kept uint64
	h.stay = 0
	starve := false
	for _, v := range h.guests {
		size += v.Memory
		if v.host == h {
			h.stay += v.predicted().Likely()
			starve = starve || v.starves(p.policy)
		}
	}
	for _, m := range h.moves {
		there := slices.Contains(m.vm.claims, h)
		switch {
		case m.from == h && there && m.vm.host == h:
			h.after = h.after.Without(m.vm.predicted())
		case m.to == h && there && m.vm.host == h: // it runs here by now
			kept += m.Memory - min(m.Memory, m.vm.Resident)
		case m.to == h:
			kept += m.Memory
			h.after = h.after.With(predict.VM{CPU: m.Wants})
			if !there {
				size += m.Memory
			}
		}
	}
	spare := float64(h.Available) - p.policy.Reserve*float64(h.Total) - float64(kept)
	sized := p.policy.Overcommit*float64(h.Total)*(1-p.policy.Reserve) - float64(size)
	h.room = int64(math.Min(spare, sized))

	if p.policy.Free > 0 && float64(h.Available) < p.policy.Free*float64(h.Total) {
		starve = true
	}
	switch {
	case !starve:
		h.missed = time.Time{}
		p.short.remove(h)
	case h.missed.IsZero():
		h.missed = p.now
		fallthrough
	default:
		p.short.add(h)
	}
	if p.opens(h) == "" {
		p.index.put(h)
	} else {
		p.index.remove(h)
	}
}

// leastWait is how much CPU a VM must wait for to starve, in cores: less is noise.
const leastWait = 0.02

// starves reports whether a VM gets too little of the CPU it wants.
func (v *vm) starves(p view.Policy) bool {
	return v.Waiting >= leastWait && v.CPU < p.Starving*v.Wants()
}

func (v *vm) predicted() predict.VM {
	return predict.VM{CPU: v.CPU, Waiting: v.Waiting, Overhead: v.Overhead, InUse: v.InUse,
		Hot: v.Hot}
}

func (h *host) host() predict.Host {
	return predict.Host{CPUs: h.CPUs, Used: h.Used, Waiting: h.Waiting}
}

// load is the CPU that will be wanted for each core.
func (h *host) load() float64 { return h.after.Wants() / h.CPUs }

func (p *Planner) late(h *host) bool { return p.now.Sub(h.seen) > p.policy.Late }

// later is the later one of two moments.
func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func sameLabels(a, b view.Labels) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			return false
		}
	}
	return true
}
