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

// Forecast tells what comes of draining these hosts together, with each eviction at a rate at most
// (in bytes per second; 0: any), without a change to anything. It has a copy of the planner drain
// them in simulated time, with a round every so often: what it says is what the planner would do.
func (p *Planner) Forecast(now time.Time, every time.Duration, rate float64,
	hosts ...string) Forecast {
	q := p.clone(now)
	f := Forecast{Empty: map[string]time.Duration{}}
	for _, name := range hosts {
		if h := q.hosts[name]; h != nil {
			h.maintenance = view.Maintenance{Host: name, Phase: view.Draining, Rate: rate}
			q.weigh(h)
		}
	}
	// Others that are being drained go on, and take room, too.
	s := simulation{q: q, every: max(every, time.Millisecond), start: q.now, f: &f}
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
	for _, s := range f.Steps {
		f.Takes = max(f.Takes, s.End)
		if at, ok := f.Empty[s.From]; ok {
			f.Empty[s.From] = max(at, s.End)
		}
	}
	return f
}

// simulation is a planner whose moves take as long as it is predicted, links being shared.
type simulation struct {
	q     *Planner
	every time.Duration
	start time.Time
	under []*transfer
	f     *Forecast
}

// transfer is a move in simulated time.
type transfer struct {
	*move
	begin time.Time
	wait  time.Duration // until its memory goes
	left  float64       // bytes
	why   []string
}

func (s *simulation) run() {
	for _, m := range s.q.moves {
		if m.ended.IsZero() {
			took := s.q.now.Sub(m.Began)
			s.under = append(s.under, &transfer{move: m, begin: m.Began, left: max(0,
				float64(m.InUse)-took.Seconds()*rate(m.from, m.to, 1))})
		}
	}
	slices.SortFunc(s.under, func(a, b *transfer) int { return byName(a.from, b.From) })
	const most = 1 << 20 // steps: more than there can be
	for range most {
		r := round{Planner: s.q}
		r.drain()
		s.q.proposed = s.q.proposed[:0]
		for _, d := range r.decisions {
			m := s.q.moves[d.VM]
			m.proposed = false
			s.under = append(s.under, &transfer{move: m, begin: s.q.now,
				wait: d.Predicted.Transfer, left: float64(m.InUse), why: d.Reasons})
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
		next := time.Duration(-1)
		for _, t := range s.under {
			if d, ok := t.lasts(); ok && (next < 0 || d < next) {
				next = d
			}
		}
		if next < 0 {
			return false // a link whose rate is not known
		}
		// The planner looks again only at its next round.
		ahead := s.q.now.Add(next).Sub(s.start)
		if over := ahead % s.every; over > 0 {
			ahead += s.every - over
		}
		until := s.start.Add(ahead)
		ended := s.pass(s.q.now.Add(next))
		for s.q.now.Before(until) {
			first := until
			for _, t := range s.under {
				if d, ok := t.lasts(); ok && s.q.now.Add(d).Before(first) {
					first = s.q.now.Add(d)
				}
			}
			ended = s.pass(first) || ended
		}
		if ended {
			return true
		}
	}
}

// lasts is how long a move takes from now on, with its present share of the links.
func (t *transfer) lasts() (time.Duration, bool) {
	r := t.rate()
	if r <= 0 {
		return 0, false
	}
	return t.wait + time.Duration(t.left/r*1e9) + 1, true
}

func (t *transfer) rate() float64 {
	return rate(t.from, t.to, 0)
}

// pass has time go on, in which no move ends but at its end. It reports whether one has.
func (s *simulation) pass(until time.Time) (ended bool) {
	d := until.Sub(s.q.now)
	for _, t := range s.under {
		left := d
		waited := min(t.wait, left)
		t.wait, left = t.wait-waited, left-waited
		t.left -= left.Seconds() * t.rate()
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
