// Package place decides where each VM of a fleet runs. It does no I/O, starts no goroutine and has
// no clock: its caller says what hosts report, and what time it is.
//
//	host's stream ──Report──► ┌─────────┐ ──Round──► decisions ──► the journal, then orders
//	operator ─SetRules, ────► │ Planner │                                      │
//	          Maintain        └────▲────┘ ◄──Began, Ended, Refused─────────────┘
//
// # How it decides
//
// A host whose VMs starve (steal), and only such a host, gives VMs away: how much of a host is in
// use says nothing of whether anybody misses it. A VM goes where it fits with all that is on its
// way there already, where no rule that must hold is broken, and where it gains the most for its
// price: package predict tells both. Each decision names its reasons, and what it beat.
//
// Hosts that may take a VM are kept in an index by how much they have left. A round looks at hosts
// that are due, and for each of their VMs at a few hosts of the index: it costs as much for 10,000
// hosts as for 100 if as many are due.
package place

import (
	"time"

	"vacate/internal/fleet/view"
)

// Planner knows a fleet. Its methods may not be called by several goroutines at once. Moments must
// not go back.
type Planner struct {
	policy view.Policy
	rules  []view.Rule
}

// New returns a planner that knows no host yet.
func New(p view.Policy) *Planner { return &Planner{policy: p} }

// SetPolicy has another policy hold from now on.
func (p *Planner) SetPolicy(policy view.Policy) { p.policy = policy }

// SetRules has these rules hold from now on, and no other.
func (p *Planner) SetRules(rules []view.Rule) { p.rules = rules }

// Maintain has a host be in a phase of maintenance from now on; with none, it is in service.
func (p *Planner) Maintain(m view.Maintenance) {}

// Report takes what a host tells. A report that makes no sense is refused; what the host told
// before is then still what is known of it.
func (p *Planner) Report(r view.Report) error { return r.Check() }

// Forget removes a host that has left the fleet.
func (p *Planner) Forget(host string) {}

// Began is told of each move that has been ordered, and by a new leader of each that is under way.
// From here on the target's room, CPU and link are kept for it.
func (p *Planner) Began(m view.Move) {}

// Ended is told when a move has ended, with a problem if it has not moved the VM. It also takes
// decisions that never became a move: an operator said no, or the fleet only watches. What was kept
// for a VM at its target is given up with the target's first report after that.
func (p *Planner) Ended(vm string, at time.Time, problem string) {}

// Refused is told when a host would not give or take a VM: the pair is left alone until then.
func (p *Planner) Refused(vm, to, why string, until time.Time) {}

// Round returns what shall happen now, the most urgent first. It counts its own decisions as if
// they had begun. Until the next round each must be told to Began or Ended.
func (p *Planner) Round(now time.Time) []view.Decision { return nil }

// Trouble is what cannot be as it should, and who is in the way.
type Trouble struct {
	Rule string   `json:"rule,omitempty"` // as text; empty: it is no rule's
	Host string   `json:"host,omitempty"`
	VMs  []string `json:"vms,omitempty"` // whom it is about
	Why  string   `json:"why"`
	// Mending says that moves are under way, or will be, that end it.
	Mending bool `json:"mending,omitempty"`
}

// Troubles returns rules that are not met, hosts that nothing helps, and VMs that cannot leave a
// host that shall be empty.
func (p *Planner) Troubles(now time.Time) []Trouble { return nil }

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

// Stay is a VM that stays where it is, and why.
type Stay struct {
	VM   string `json:"vm"`
	Host string `json:"host"`
	Why  string `json:"why"`
}

// Forecast tells what comes of draining these hosts together, without a change to anything.
func (p *Planner) Forecast(now time.Time, hosts ...string) Forecast { return Forecast{} }

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
// none, why, with how many hosts each reason is about.
func (p *Planner) Where(now time.Time, a Ask, most int) ([]Choice, []string) { return nil, nil }

// Admit is the last word of the host that a VM shall come to, by what it knows itself: its own
// report, the rules, and the moves that are on their way to it. It returns why the VM may not come;
// empty: it may.
func Admit(here view.Report, v view.VM, coming []view.Move, rules []view.Rule,
	p view.Policy) string {
	return ""
}
