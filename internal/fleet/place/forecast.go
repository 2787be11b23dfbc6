package place

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"vacate/internal/fleet/view"
)

// Forecast is what a drain would come to.
type Forecast struct {
	Takes time.Duration  `json:"takes_ns"` // until all have left that can
	Steps []ForecastStep `json:"steps"`    // in the order in which they end
	Stay  []Stay         `json:"stay,omitempty"`
	// Empty says when each host that will be empty is, from now on.
	Empty map[string]time.Duration `json:"empty_ns"`
	// Pace says by what evictions from each of the hosts are that fast, in words.
	Pace []string `json:"pace,omitempty"`
}

// ForecastStep is one VM that will have left.
type ForecastStep struct {
	VM    string        `json:"vm"`
	From  string        `json:"from"`
	To    string        `json:"to"`
	Begin time.Duration `json:"begin_ns"` // from now on
	End   time.Duration `json:"end_ns"`
	Why   []string      `json:"why,omitempty"`
}

// farthest is how far a forecast looks. What takes longer does not come to its end in it.
const farthest = 10 * 365 * 24 * time.Hour

// Rounds say when the planner will be asked for decisions: first, and then every so often.
type Rounds struct{ First, Every time.Duration }

// after is the first round at a time or later.
func (r Rounds) after(at time.Duration) time.Duration {
	if at <= r.First {
		return r.First
	}
	every := max(r.Every, time.Millisecond)
	return r.First + (at-r.First+every-1)/every*every
}

// Forecast tells what comes of draining these hosts together, with each eviction at a rate at most
// (in bytes per second; 0: any), without a change to anything. It has a copy of the planner drain
// them in simulated time: what it says is what the planner would do. How long that takes follows
// from what came of earlier evictions: see pace.
func (p *Planner) Forecast(now time.Time, rounds Rounds, rate float64, hosts ...string) Forecast {
	q := p.clone(now)
	f := Forecast{Empty: map[string]time.Duration{}}
	for _, name := range hosts {
		if h := q.hosts[name]; h != nil {
			h.maintenance = view.Maintenance{Host: name, Phase: view.Draining, Rate: rate}
			q.weigh(h)
		}
	}
	// Others that are being drained go on, and take room, too.
	s := simulation{q: q, rounds: rounds, start: q.now, f: &f, paces: map[*host]pace{},
		moving: map[*host]int{}}
	s.run()
	for _, name := range hosts {
		h := q.hosts[name]
		if h == nil {
			f.Stay = append(f.Stay, Stay{Host: name, Why: "there is no such host"})
			continue
		}
		going, stay := q.remaining(h)
		f.Stay = append(f.Stay, stay...)
		if len(going)+len(stay) == 0 {
			f.Empty[name] = 0
		}
	}
	f.Steps = slices.DeleteFunc(f.Steps,
		func(s ForecastStep) bool { return !slices.Contains(hosts, s.From) })
	for _, step := range f.Steps {
		f.Takes = max(f.Takes, step.End)
		if at, ok := f.Empty[step.From]; ok { // a round finds that
			f.Empty[step.From] = max(at, rounds.after(step.End))
		}
		text := s.pace(q.hosts[step.From]).String()
		if !slices.Contains(f.Pace, text) {
			f.Pace = append(f.Pace, text)
		}
	}
	return f
}

// simulation is a planner whose moves are as fast as those before, links being shared.
type simulation struct {
	q      *Planner
	rounds Rounds
	start  time.Time
	under  []*transfer
	f      *Forecast
	paces  map[*host]pace
	moving map[*host]int // how many move memory from it or to it
}

// transfer is a move in simulated time.
type transfer struct {
	*move
	pace
	begin time.Time
	wait  time.Duration // until its memory moves
	left  float64       // bytes
	why   []string
}

func (s *simulation) pace(h *host) pace {
	if _, ok := s.paces[h]; !ok {
		s.paces[h] = s.q.pace(h)
	}
	return s.paces[h]
}

func (s *simulation) run() {
	for _, m := range s.q.moves {
		if m.ended.IsZero() {
			t := &transfer{move: m, pace: s.pace(m.from), begin: m.Began}
			took := s.q.now.Sub(m.Began)
			t.wait = max(0, t.besides-took)
			t.left = max(0, float64(m.InUse)-
				max(0, took-t.besides).Seconds()*t.share*rate(m.from, m.to, 0))
			s.under = append(s.under, t)
		}
	}
	slices.SortFunc(s.under, func(a, b *transfer) int { return byName(a.from, b.From) })
	s.reach(s.start.Add(s.rounds.First))
	const most = 1 << 20 // steps: more than there can be
	for range most {
		r := round{Planner: s.q}
		r.drain()
		s.q.proposed = s.q.proposed[:0]
		for _, d := range r.decisions {
			m := s.q.moves[d.VM]
			m.proposed = false
			t := &transfer{move: m, pace: s.pace(m.from), begin: s.q.now, left: float64(m.InUse),
				why: d.Reasons}
			t.wait = t.besides
			s.under = append(s.under, t)
		}
		if len(s.under) == 0 {
			return
		}
		if !s.step() {
			return
		}
	}
}

// step goes on to the first round after a move has ended.
func (s *simulation) step() bool {
	for {
		next, ok := s.next()
		if !ok {
			return false // links whose rate is not known, or that are too slow
		}
		if s.reach(s.start.Add(s.rounds.after(next.Sub(s.start)))) {
			return true
		}
	}
}

// next is when a move comes to move memory, or has ended.
func (s *simulation) next() (next time.Time, ok bool) {
	clear(s.moving)
	for _, t := range s.under {
		if t.wait == 0 {
			s.moving[t.from]++
			s.moving[t.to]++
		}
	}
	for _, t := range s.under {
		at := s.q.now.Add(t.wait)
		if t.wait == 0 {
			takes := t.left / s.rate(t) // not a number, or too many, if the rate is not known
			if !(s.q.now.Sub(s.start).Seconds()+takes < farthest.Seconds()) {
				continue
			}
			at = at.Add(time.Duration(takes*1e9) + 1)
		}
		if !ok || at.Before(next) {
			next, ok = at, true
		}
	}
	return next, ok
}

// rate is what goes over the links of a move. Those that move memory share them.
func (s *simulation) rate(t *transfer) float64 {
	r := t.share * min(t.from.Rate/float64(max(1, s.moving[t.from])),
		t.to.Rate/float64(max(1, s.moving[t.to])))
	if m := t.from.maintenance; m.Phase == view.Draining && m.Rate > 0 {
		r = min(r, m.Rate)
	}
	return r
}

// reach has time go on until a moment. It reports whether a move has ended.
func (s *simulation) reach(until time.Time) (ended bool) {
	for s.q.now.Before(until) {
		to := until
		if next, ok := s.next(); ok && next.Before(to) {
			to = next
		}
		ended = s.pass(to) || ended
	}
	return ended
}

// pass has time go on, in which nothing of next happens but at its end. It reports whether a move
// has ended.
func (s *simulation) pass(until time.Time) (ended bool) {
	d := until.Sub(s.q.now)
	for _, t := range s.under {
		if t.wait > 0 {
			t.wait -= d
		} else {
			t.left -= d.Seconds() * s.rate(t)
		}
	}
	s.q.now = until
	var done []*transfer
	s.under = slices.DeleteFunc(s.under, func(t *transfer) bool {
		if t.wait > 0 || t.left > 1 {
			return false
		}
		done = append(done, t)
		return true
	})
	for _, t := range done {
		s.f.Steps = append(s.f.Steps, ForecastStep{VM: t.VM, From: t.From, To: t.To,
			Begin: t.begin.Sub(s.start), End: until.Sub(s.start), Why: t.why})
		s.q.land(t.move)
	}
	return len(done) > 0
}

// land has a move have ended well, as the reports that follow would tell it.
func (p *Planner) land(m *move) {
	v, from, to := m.vm, m.from, m.to
	had := v.predicted()
	left, come := from.host().Without(had), to.host().With(had)
	from.Used, from.Waiting = left.Used, left.Waiting
	to.Used, to.Waiting = come.Used, come.Waiting
	from.Available = min(from.Total, from.Available+v.Resident)
	to.Available -= min(to.Available, v.Resident)
	p.drop(m)
	v.CPU, v.Waiting = v.Wants(), 0
	v.Moved = p.now
	is := func(o *vm) bool { return o == v }
	from.guests = slices.DeleteFunc(slices.Clone(from.guests), is)
	if !slices.ContainsFunc(to.guests, is) {
		to.guests = append(slices.Clone(to.guests), v)
		slices.SortFunc(to.guests, func(a, b *vm) int { return cmp.Compare(a.Name, b.Name) })
	}
	p.leaveRules(v)
	v.claims, v.host = []*host{to}, to
	p.enterRules(v)
	p.weigh(from)
	p.weigh(to)
}

// clone copies a planner, at a moment. All hosts count as seen just now that are not late.
func (p *Planner) clone(now time.Time) *Planner {
	p.now = later(p.now, now)
	q := New(p.policy)
	q.now = p.now
	q.policy.Late = 1 << 60 // nobody reports in what follows
	for _, h := range p.names {
		n := *h
		n.guests, n.moves, n.inIndex, n.listed, n.under = nil, nil, 0, 0, 0
		if p.late(h) && n.Closed == "" {
			n.Closed = "it is late with its reports"
		}
		q.hosts[h.Name] = &n
		q.names = append(q.names, &n)
	}
	maps.Copy(q.refused, p.refused)
	q.past = p.past
	for _, h := range p.names {
		guests := make([]*vm, len(h.guests))
		for i, v := range h.guests {
			c := q.vms[v.Name]
			if c == nil {
				c = &vm{VM: v.VM, tried: v.tried, failed: v.failed, problem: v.problem}
				if v.host != nil {
					c.host = q.hosts[v.host.Name]
				}
				q.vms[v.Name] = c
			}
			c.claims = append(c.claims, q.hosts[h.Name])
			guests[i] = c
		}
		q.hosts[h.Name].guests = guests
	}
	var rules []view.Rule
	for _, r := range p.rules {
		rules = append(rules, r.Rule)
	}
	q.SetRules(rules)
	for _, m := range p.moves {
		if m.ended.IsZero() {
			q.begin(m.Move, false)
		}
	}
	for _, h := range q.names {
		q.weigh(h)
	}
	return q
}
