// Package leader is a member of a fleet's brain. All members stand for election; the one that leads
// takes the hosts' reports, asks package place for decisions, and sends orders.
//
//	vacated ══ Join ══► term ──Report──► place.Planner
//	   ▲                 │ ▲                  │ decisions
//	   └──── orders ─────┘ └── store.Begin ◄──┘
//
// A term is the time for which this member leads. All that it knows of loads goes with it: the next
// leader hears it anew within seconds. Which orders count is in docs/protocol.md, F1 to F5.
package leader

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/fleet/orders"
	"vacate/internal/fleet/place"
	"vacate/internal/fleet/store"
	"vacate/internal/fleet/view"
)

// Times of a term.
const (
	tick = time.Second
	// gatherTime is how long a new leader waits for hosts that it knows of, before it decides.
	gatherTime = 15 * time.Second
	// askTime is how long a decision waits for an operator.
	askTime = 10 * time.Minute
	// After an order was refused its VM is not sent again to that host for leastRefused, as the
	// daemon there may just have been started anew; then for twice as long each time.
	leastRefused = 15 * time.Second
	mostRefused  = 10 * time.Minute
	// retryTime is how long this member waits after a term, or an attempt to get one, has failed.
	retryTime = time.Second
	// sayTime is how long others that are asked who leads may believe what this member heard.
	sayTime = time.Second
)

// Brain is one member.
type Brain struct {
	config  Config
	store   *store.Store
	log     *slog.Logger
	metrics *metrics
	hooks   *hooks

	mu     sync.Mutex
	term   *term // nil: this member does not lead
	leader string
	heard  time.Time
}

// New makes a member.
func New(c Config, s *store.Store, log *slog.Logger) *Brain {
	b := &Brain{config: c, store: s, log: log, hooks: newHooks(c.Hooks)}
	b.metrics = newMetrics(b)
	return b
}

// Run stands for election, and leads when it is this member's turn, until ctx is done.
func (b *Brain) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := b.lead(ctx); err != nil && ctx.Err() == nil {
			b.log.Warn("this member does not lead the fleet", "error", err)
		}
		select {
		case <-time.After(retryTime):
		case <-ctx.Done():
		}
	}
}

// lead is one term.
func (b *Brain) lead(ctx context.Context) error {
	c, err := b.store.Campaign(ctx, b.config.Me)
	if err != nil {
		return err
	}
	defer c.Leave(ctx)
	ctx, end := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer end(nil)
	all, err := b.store.ReadAll(ctx)
	if err != nil {
		return err
	}
	for _, p := range all.Problems {
		b.log.Error("the fleet's store has something odd", "problem", p)
	}
	t := newTerm(ctx, b, c.Term, all, end)
	defer t.calls.Wait()
	defer end(nil)
	b.mu.Lock()
	b.term = t
	b.mu.Unlock()
	b.log.Info("this member leads the fleet", "epoch", t.Epoch, "hosts", len(all.Hosts), "plans",
		len(all.Plans))
	defer func() {
		b.mu.Lock()
		b.term = nil
		b.mu.Unlock()
		t.close()
	}()
	watching.Go(func() {
		select {
		case <-c.Over():
			end(store.ErrDeposed)
		case <-ctx.Done():
		}
	})
	return t.run(ctx)
}

// leads returns the present term; nil if this member does not lead.
func (b *Brain) leads() *term {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.term
}

// who is the member that leads, as this one knows.
func (b *Brain) who(ctx context.Context) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.term != nil {
		return b.config.Me
	}
	if time.Since(b.heard) > sayTime {
		who, err := b.store.Leader(ctx)
		if err != nil {
			who = ""
		}
		if who == b.config.Me { // of a term that is over, or of one that begins
			who = ""
		}
		b.leader, b.heard = who, time.Now()
	}
	return b.leader
}

// term is the time for which this member leads.
type term struct {
	*Brain
	store.Term
	since time.Time
	life  context.Context // until the term is over
	end   context.CancelCauseFunc
	wake  chan struct{}
	calls sync.WaitGroup // of hooks

	// writes is held while the store is written. Orders of a host are sent under it, in the order
	// of their numbers.
	writes sync.Mutex

	mu          sync.Mutex // guards what follows
	over        bool
	planner     *place.Planner
	policy      view.Policy
	rules       map[string]store.Rule
	standing    []string // the rules that hosts hold by themselves
	maintenance map[string]store.Maintenance
	hosts       map[string]*hostState
	plans       map[string]*plan
	waiting     map[string]*waiting
	decisions   []store.Decision // the latest last
	ending      []store.Decision // to be written: what came of plans
	noted       []store.Decision // the same of decisions that never became plans
	unwritten   map[string]bool  // IDs of those that could not be, which was logged
	refusals    map[string]int   // by VM, since an order was last carried out
	beginning   map[string]bool  // hosts whose planned drain begins once the hook was told
	asked       time.Time        // when the planner was last asked for decisions; zero: not yet
	apart       time.Duration    // of rounds
}

// hostState is a host of the fleet, and what it has told this leader.
type hostState struct {
	store.Host
	session *session // nil: it is not connected
	version string
	report  *fleetv1.Report // nil: it has not reported to this leader
	told    view.Report
}

// plan is one that goes on.
type plan struct {
	store.Plan
	sent     *session // to which its order was sent
	eviction *fleetv1.OrderedEviction
	ending   bool
}

// waiting is a decision that an operator has to approve.
type waiting struct {
	store.Plan // that it becomes
	until      time.Time
}

func newTerm(ctx context.Context, b *Brain, c store.Term, all store.Everything,
	end context.CancelCauseFunc) *term {
	t := &term{Brain: b, Term: c, since: time.Now(), life: ctx, end: end,
		wake:   make(chan struct{}, 1),
		policy: view.DefaultPolicy(), rules: map[string]store.Rule{},
		maintenance: map[string]store.Maintenance{}, hosts: map[string]*hostState{},
		plans: map[string]*plan{}, waiting: map[string]*waiting{}, decisions: all.Decisions,
		unwritten: map[string]bool{}, refusals: map[string]int{}, beginning: map[string]bool{},
		apart: tick}
	if all.Settings.Policy != nil {
		t.policy = *all.Settings.Policy
	}
	t.planner = place.New(t.policy)
	for _, h := range all.Hosts {
		t.hosts[h.Name] = &hostState{Host: h}
	}
	for _, r := range all.Rules {
		t.rules[r.Name] = r
	}
	t.setRules()
	for _, m := range all.Maintenance {
		t.maintenance[m.Host] = m
		t.planner.Maintain(m.Maintenance)
	}
	for _, d := range all.Decisions {
		t.learn(d)
	}
	for _, p := range all.Plans {
		t.plans[p.ID] = &plan{Plan: p}
		t.planner.Began(p.Decision.Move)
	}
	return t
}

// parseRules parses rules, in order of their names. It logs one that it does not understand any
// more, and leaves it out.
func (t *term) parseRules(texts map[string]store.Rule) (rules []view.Rule) {
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		r, err := view.ParseRule(texts[name].Text)
		if err != nil {
			t.log.Error("a rule of the fleet is not heeded", "rule", name, "error", err)
			continue
		}
		r.Name = name
		rules = append(rules, r)
	}
	return rules
}

// mostStanding bounds the rules that a host is told, in bytes.
const mostStanding = 256 << 10

// setRules gives the rules to the planner, and to hosts those that they hold by themselves.
func (t *term) setRules() {
	rules := t.parseRules(t.rules)
	t.planner.SetRules(rules)
	t.standing = nil
	size := 0
	for _, r := range rules {
		if r.Force == view.Should || r.Relation != view.Apart && r.Relation != view.On {
			continue
		}
		text := r.String()
		if size += len(text); size > mostStanding {
			break
		}
		t.standing = append(t.standing, text)
	}
	for _, h := range t.hosts {
		t.tellStanding(h)
	}
}

// tellStanding tells a host what it goes by itself when a VM shall come (F6).
func (t *term) tellStanding(h *hostState) {
	if h.session == nil || !h.session.heeds {
		return
	}
	m := t.maintenance[h.Name]
	s := &fleetv1.Standing{Epoch: uint64(t.Epoch), Rules: t.standing}
	if !m.Open() {
		s.Maintenance, s.Reason = string(m.Phase), m.Reason
	}
	h.session.say(&fleetv1.LeaderSays{What: &fleetv1.LeaderSays_Standing{Standing: s}})
}

func (t *term) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	for _, h := range t.hosts {
		if h.session != nil {
			h.session.cancel(errElsewhere)
		}
	}
}

var errElsewhere = errors.New("this member does not lead the fleet any more")

// write writes to the store. A member that does not know whether it did leads no longer. So a write
// goes on when the one who asked for it is gone: an operator who gives up must not depose the
// leader.
func (t *term) write(f func(context.Context) error) error {
	start := time.Now()
	err := f(t.life)
	t.metrics.writes.WithLabelValues(strconv.FormatBool(err == nil)).Observe(
		time.Since(start).Seconds())
	if errors.Is(err, store.ErrUnclear) || errors.Is(err, store.ErrDeposed) {
		t.end(err)
	}
	return err
}

func (t *term) run(ctx context.Context) error {
	ticks := time.NewTicker(tick)
	defer ticks.Stop()
	for {
		select {
		case <-ticks.C:
			t.settle()
			t.round()
			t.maintain()
		case <-t.wake:
			t.settle()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// ready reports whether all hosts have told of themselves that will, at the start of a term.
func (t *term) ready(now time.Time) bool {
	if now.Sub(t.since) >= gatherTime {
		return true
	}
	for _, h := range t.hosts {
		if h.report == nil {
			return false
		}
	}
	return len(t.hosts) > 0
}

// round asks the planner for decisions, and does with them what the mode says.
func (t *term) round() {
	now := time.Now()
	t.mu.Lock()
	if !t.ready(now) {
		t.mu.Unlock()
		return
	}
	if !t.asked.IsZero() {
		t.apart += (now.Sub(t.asked) - t.apart) / 8
	}
	t.asked = now
	for id, w := range t.waiting {
		if now.After(w.until) {
			t.reject(id, "no operator approved it in time", now)
		}
	}
	list := t.planner.Round(now)
	mode := t.policy.Mode
	var act []store.Plan
	for _, d := range list {
		p := store.Plan{ID: newID(), Epoch: t.Epoch, Mode: mode, Decision: d}
		// An operator has asked for these.
		asked := d.Cause == view.Drain || d.Cause == view.Restore
		switch {
		case asked || mode == view.Auto:
			act = append(act, p)
		case mode == view.Ask:
			t.waiting[p.ID] = &waiting{p, now.Add(askTime)}
			t.planner.Began(d.Move)
			t.log.Info("a decision waits for an operator", "id", p.ID, "vm", d.VM, "from", d.From,
				"to", d.To, "reasons", d.Reasons)
		default:
			t.log.Info("a VM would be evicted in mode auto", "vm", d.VM, "from", d.From, "to", d.To,
				"reasons", d.Reasons)
			t.planner.Ended(d.VM, now, "")
			t.note(store.Decision{Plan: p, Outcome: "watched", Ended: now})
		}
	}
	t.mu.Unlock()
	for _, p := range act {
		if _, err := t.begin(p); err != nil {
			t.log.Error("a decision is not carried out", "vm", p.Decision.VM, "error", err)
			t.mu.Lock()
			t.planner.Ended(p.Decision.VM, now, err.Error())
			t.mu.Unlock()
		}
	}
}

// closed keeps a decision that the store has by now.
func (t *term) closed(d store.Decision) {
	t.decisions = append(t.decisions, d)
	if n := len(t.decisions) - store.KeepDecisions; n > 0 {
		t.decisions = slices.Delete(t.decisions, 0, n)
	}
}

// learn tells the planner, for its forecasts, what came of a decision.
func (t *term) learn(d store.Decision) {
	if d.Outcome != "completed" || d.TotalS == nil {
		return
	}
	moving := *d.TotalS
	if d.DownS != nil { // of a VM that was paused it is not known, and makes little of it
		moving -= *d.DownS
	}
	m := d.Plan.Decision.Move
	t.planner.Learn(view.Outcome{From: m.From, To: m.To, InUse: m.InUse, Ended: d.Ended,
		Took: d.Ended.Sub(m.Began), Moving: seconds(moving), Limited: d.Plan.Rate > 0})
}

// note keeps a decision that never became a plan, for settle to write. If there are more than the
// store keeps, it drops the earliest.
func (t *term) note(d store.Decision) {
	t.noted = append(t.noted, d)
	if n := len(t.noted) - store.KeepDecisions; n > 0 {
		t.noted = slices.Delete(t.noted, 0, n)
	}
}

// reject gives up a decision that waits.
func (t *term) reject(id, why string, now time.Time) {
	w := t.waiting[id]
	delete(t.waiting, id)
	t.planner.Ended(w.Decision.VM, now, why)
	t.note(store.Decision{Plan: w.Plan, Outcome: "rejected", Reason: why, Ended: now})
}

func newID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// begin writes a plan, then sends its order.
func (t *term) begin(p store.Plan) (store.Plan, error) {
	t.writes.Lock()
	defer t.writes.Unlock()
	p.Decision.Move.Began = time.Now()
	d := p.Decision
	t.mu.Lock()
	if m, ok := t.maintenance[d.From]; ok && d.Cause == view.Drain {
		p.Rate = uint64(m.Rate)
	}
	t.mu.Unlock()
	err := t.write(func(ctx context.Context) (err error) {
		p, err = t.store.Begin(ctx, t.Term, p)
		return err
	})
	if err != nil {
		return p, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	open := &plan{Plan: p}
	t.plans[p.ID] = open
	t.planner.Began(d.Move)
	t.log.Info("a VM will be evicted", "plan", p.Number, "id", p.ID, "vm", d.VM, "from", d.From,
		"to", d.To, "cause", d.Cause, "by", p.By, "reasons", d.Reasons)
	t.order(open)
	return p, nil
}

// order sends the order of a plan, if its host is there.
func (t *term) order(p *plan) {
	h := t.hosts[p.Decision.From]
	if h == nil || h.session == nil || p.sent == h.session || p.Epoch != t.Epoch {
		return
	}
	if h.session.say(&fleetv1.LeaderSays{What: &fleetv1.LeaderSays_Order{Order: &fleetv1.Order{
		Epoch: uint64(t.Epoch), Plan: uint64(p.Number), PlanId: p.ID, Vm: p.Decision.VM,
		Incarnation: p.Decision.Incarnation, To: p.Decision.To, Rate: p.Rate,
	}}}) {
		p.sent = h.session
	}
}

// reported takes what a host tells, and settles its plans by it.
func (t *term) reported(h *hostState, s *session, r *fleetv1.Report) error {
	told := viewOf(h.Name, r)
	told.Seen = time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over || h.session != s {
		return errElsewhere
	}
	if r.GetMark().GetEpoch() != uint64(t.Epoch) {
		return fmt.Errorf("host %s reports of epoch %d, and was welcomed in %d", h.Name,
			r.GetMark().GetEpoch(), t.Epoch)
	}
	if err := t.planner.Report(told); err != nil {
		return err
	}
	h.report, h.told = r, told
	mark := orders.Mark{Epoch: r.Mark.Epoch, Plan: r.Mark.Plan}
	var own []*plan
	for _, p := range t.plans {
		if p.Decision.From == h.Name && !p.ending {
			own = append(own, p)
		}
	}
	slices.SortFunc(own, func(a, b *plan) int { return int(int64(a.Number) - int64(b.Number)) })
	for _, p := range own {
		i := slices.IndexFunc(r.Evictions,
			func(e *fleetv1.OrderedEviction) bool { return e.PlanId == p.ID })
		switch orders.FateOf(uint64(t.Epoch), uint64(p.Epoch), uint64(p.Number), mark, i >= 0) {
		case orders.Begun:
			p.eviction = r.Evictions[i]
			if p.eviction.Outcome != "" && p.eviction.EndedAt != nil {
				t.finish(p, p.eviction.Outcome, p.eviction.Reason)
			}
		case orders.Over:
			t.finish(p, "never began", "the host did not begin it")
		case orders.Pending:
			t.order(p)
		}
	}
	return nil
}

// answered takes what a host says of an order. Refusals end the plan: its number is spent.
func (t *term) answered(h *hostState, a *fleetv1.Answer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.plans[a.PlanId]
	if p == nil || p.Decision.From != h.Name || p.ending || a.Refused == "" {
		return
	}
	t.log.Warn("a host refused an order", "host", h.Name, "vm", p.Decision.VM, "plan", p.Number,
		"reason", a.Refused)
	t.metrics.refused.WithLabelValues("order").Inc()
	p.eviction = &fleetv1.OrderedEviction{Reason: a.Refused}
	// The next report says that it is over; until then the plan stays.
}

// finish ends a plan, and keeps the end for settle to write. What the host says of it may be
// anything.
func (t *term) finish(p *plan, outcome, reason string) {
	p.ending = true
	d := store.Decision{Plan: p.Plan, Number: p.Number, Outcome: clip(outcome, maxWord),
		Reason: clip(reason, maxReason), Ended: time.Now()}
	if e := p.eviction; e != nil {
		d.Eviction = clip(e.EvictionId, maxWord)
		d.DownS, d.TotalS = sensible(e.DownS), sensible(e.TotalS)
		if outcome == "never began" && e.Reason != "" {
			d.Outcome, d.Reason = "refused", clip(e.Reason, maxReason)
		}
	}
	t.ending = append(t.ending, d)
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// Bounds of what a host says of an end, in bytes.
const (
	maxReason = 2000
	maxWord   = 64
)

// clip is the beginning of a text.
func clip(text string, most int) string {
	return strings.ToValidUTF8(text[:min(len(text), most)], "")
}

// sensible is a time in seconds that a host tells; nil if it makes no sense.
func sensible(s *float64) *float64 {
	if s == nil || !(*s >= 0 && *s < 1e9) {
		return nil
	}
	return s
}

// settle writes what has ended: first what came of plans, then the others for as long as that takes
// no longer than a tick. What could not be written is tried again at the next tick.
func (t *term) settle() {
	start := time.Now()
	t.mu.Lock()
	ending, noted := t.ending, t.noted
	t.ending, t.noted = nil, nil
	t.mu.Unlock()
	var again, later []store.Decision
	for _, d := range ending {
		if !t.settleOne(d, true) {
			again = append(again, d)
		}
	}
	for i, d := range noted {
		if time.Since(start) > tick || t.life.Err() != nil {
			later = append(later, noted[i:]...)
			break
		}
		if !t.settleOne(d, false) {
			later = append(later, d)
		}
	}
	t.mu.Lock()
	t.ending, t.noted = append(again, t.ending...), append(later, t.noted...)
	t.mu.Unlock()
}

// settleOne writes one decision that has ended, and reports whether it is written.
func (t *term) settleOne(d store.Decision, planned bool) bool {
	if t.life.Err() != nil {
		return false
	}
	t.writes.Lock()
	defer t.writes.Unlock()
	if !planned {
		d.Number = t.store.Next()
	}
	t.mu.Lock()
	before := store.Number(0)
	if n := len(t.decisions) - store.KeepDecisions; n >= 0 {
		before = t.decisions[n].Number
	}
	t.mu.Unlock()
	err := t.write(func(ctx context.Context) error { return t.store.End(ctx, t.Term, d, before) })
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		if !t.unwritten[d.Plan.ID] {
			t.unwritten[d.Plan.ID] = true
			t.log.Error("what came of a decision is not written: that is tried again", "id",
				d.Plan.ID, "vm", d.Plan.Decision.VM, "outcome", d.Outcome, "error", err)
		}
		return false
	}
	delete(t.unwritten, d.Plan.ID)
	t.closed(d)
	t.learn(d)
	t.metrics.closed(d)
	if !planned {
		return true
	}
	delete(t.plans, d.Plan.ID)
	problem := ""
	if d.Outcome != "completed" {
		problem = d.Outcome + ": " + d.Reason
	}
	v := d.Plan.Decision
	t.planner.Ended(v.VM, d.Ended, problem)
	if d.Outcome == "refused" {
		wait := min(leastRefused<<min(t.refusals[v.VM], 8), mostRefused)
		t.refusals[v.VM]++
		t.planner.Refused(v.VM, v.To, d.Reason, d.Ended.Add(wait))
	} else {
		delete(t.refusals, v.VM)
	}
	t.log.Info("a plan has ended", "plan", d.Number, "id", d.Plan.ID, "vm", v.VM, "from", v.From,
		"to", v.To, "outcome", d.Outcome, "reason", d.Reason)
	return true
}

// maintain takes maintenance to its next phase where that is due.
func (t *term) maintain() {
	now := time.Now()
	t.mu.Lock()
	type step struct{ from, to store.Maintenance }
	var next []step
	for name, m := range t.maintenance {
		h, from := t.hosts[name], m
		if h != nil && m.Phase == view.Planned && !now.Before(m.From) {
			t.beginDrain(h, m)
			continue
		}
		if h == nil || h.report == nil || now.Sub(h.told.Seen) > t.policy.Late || !t.ready(now) {
			continue
		}
		going, _ := t.planner.Remaining(now, name)
		switch {
		case m.Phase == view.Draining && h.empty() && len(going) == 0 && !t.ordered(h):
			m.Phase = view.Drained
			next = append(next, step{from, m})
		case m.Phase == view.Drained && len(h.told.VMs) > 0:
			// Somebody has started a VM, or sent one all the same.
			m.Phase = view.Draining
			next = append(next, step{from, m})
		case m.Phase == view.Restoring && len(going) == 0:
			m.Phase = ""
			next = append(next, step{from, m})
		}
	}
	t.mu.Unlock()
	for _, s := range next {
		if t.comeTo(s.from, s.to) {
			t.announce(s.to)
		}
	}
}

// ordered reports whether a host has a part in a plan that goes on.
func (t *term) ordered(h *hostState) bool {
	for _, p := range t.plans {
		if p.Decision.From == h.Name || p.Decision.To == h.Name {
			return true
		}
	}
	return false
}

// empty reports whether no VM needs the host: it said so, having looked after it heard that none
// may come. A VM that runs elsewhere by now may still need memory that only this host has. A host
// that heeds no Standing only tells which VMs run.
func (h *hostState) empty() bool {
	return h.session != nil && len(h.told.VMs) == 0 && len(h.report.Here) == 0 &&
		(!h.session.heeds || h.report.Heeds == string(view.Draining))
}

// comeTo writes the next phase of maintenance, and reports whether it is written. It is not if an
// operator has asked for something else since it was in the phase from.
func (t *term) comeTo(from, m store.Maintenance) bool {
	t.writes.Lock()
	defer t.writes.Unlock()
	t.mu.Lock()
	now := t.maintenance[m.Host]
	t.mu.Unlock()
	if now.Phase != from.Phase || !now.Asked.Equal(from.Asked) {
		return false
	}
	if err := t.writeMaintenance(m); err != nil {
		t.log.Error("maintenance does not go on", "host", m.Host, "error", err)
		return false
	}
	t.log.Info("maintenance goes on", "host", m.Host, "phase", m.Phase)
	return true
}

// beginDrain begins a planned drain once the hook was told, unless an operator calls it off
// meanwhile.
func (t *term) beginDrain(h *hostState, m store.Maintenance) {
	if t.beginning[h.Name] {
		return
	}
	t.beginning[h.Name] = true
	notice := t.drainNow(h, m)
	t.calls.Go(func() {
		t.tellHook(t.life, notice)
		t.mu.Lock()
		begun := t.drainNow(h, m)
		t.mu.Unlock()
		t.comeTo(m, begun)
		t.mu.Lock()
		delete(t.beginning, h.Name)
		t.mu.Unlock()
	})
}

// drainNow is a drain as it begins: it notes which VMs are on the host.
func (t *term) drainNow(h *hostState, m store.Maintenance) store.Maintenance {
	m.Phase, m.Left = view.Draining, slices.Clone(m.Left)
	for _, v := range h.told.VMs {
		if !slices.Contains(m.Left, v.Name) {
			m.Left = append(m.Left, v.Name)
		}
	}
	return m
}

// setMaintenance writes a host's maintenance, or that it has none.
func (t *term) setMaintenance(m store.Maintenance) error {
	t.writes.Lock()
	defer t.writes.Unlock()
	return t.writeMaintenance(m)
}

// writeMaintenance is setMaintenance, called with writes held.
func (t *term) writeMaintenance(m store.Maintenance) error {
	err := t.write(func(ctx context.Context) error {
		if m.Phase == "" {
			return t.store.RemoveMaintenance(ctx, t.Term, m.Host)
		}
		return t.store.PutMaintenance(ctx, t.Term, m)
	})
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if m.Phase == "" {
		delete(t.maintenance, m.Host)
		t.planner.Maintain(view.Maintenance{Host: m.Host})
	} else {
		t.maintenance[m.Host] = m
		t.planner.Maintain(m.Maintenance)
	}
	if h := t.hosts[m.Host]; h != nil {
		t.tellStanding(h)
	}
	return nil
}

// viewOf is a report as the planner takes it, which checks it.
func viewOf(name string, r *fleetv1.Report) view.Report {
	l := r.GetLoad()
	v := view.Report{Host: view.Host{Name: name, Labels: l.GetLabels(), CPUs: l.GetCpus(),
		Used: l.GetUsed(), Waiting: l.GetWaiting(), Total: l.GetTotal(),
		Available: l.GetAvailable(),
		Rate:      l.GetRate(), Link: l.GetLink(), Closed: l.GetClosed(),
		Transfer: seconds(l.GetTransferS())}}
	for _, m := range r.GetVms() {
		vm := view.VM{Name: m.Name, Incarnation: m.Incarnation, VCPUs: int(m.Vcpus), CPU: m.Cpu,
			Waiting: m.Waiting, Overhead: m.Overhead, Memory: m.Memory, Resident: m.Resident,
			InUse: m.InUse, Hot: m.Hot, Priority: int(m.Priority), Pinned: m.Pinned,
			Barred: m.Barred, Labels: m.Labels}
		if m.MovedAt != nil {
			vm.Moved = m.MovedAt.AsTime()
		}
		v.VMs = append(v.VMs, vm)
	}
	return v
}

// seconds is a time that a peer tells; one that makes no sense is none.
func seconds(s float64) time.Duration {
	if !(s >= 0 && s < 3600) {
		return 0
	}
	return time.Duration(s * float64(time.Second))
}
