// Package view has the words that all parts of a fleet share: what its hosts and VMs are like,
// which rules hold for them, what is on its way, and what was decided. The types are plain: they do
// nothing, and nothing in them is a lock, a channel or a connection.
//
//	who tells            what                          type
//	a host, by a report  itself and its VMs            Host, VM
//	an operator          rules, maintenance, a policy  Rule, Maintenance, Policy
//	the fleet's leader   what is on its way            Move
//	package place        what shall happen, and why    Decision
//
// All CPU is in cores, all sizes are in bytes, all rates in bytes per second. A VM wants the CPU
// that it has and the CPU that it waits for; its steal is the share of it that it waits for.
package view

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// Labels are what an operator says of a host or a VM. The label "name" is its name, always.
type Labels map[string]string

// Host is a host, by its own word. What the fleet makes of it, such as that it is being drained, is
// not in here: see Maintenance, and Late of Policy.
type Host struct {
	Name   string `json:"name"`
	Labels Labels `json:"labels,omitempty"`

	CPUs    float64 `json:"cpus"`
	Used    float64 `json:"used"`    // by everything on it
	Waiting float64 `json:"waiting"` // what its VMs want beyond that

	Total     uint64 `json:"total"`     // memory
	Available uint64 `json:"available"` // memory

	// Rate is what its link takes, in either direction.
	Rate float64 `json:"rate"`
	// Link names the link that it shares with others, such as that of its rack; empty: none.
	Link string `json:"link,omitempty"`
	// Transfer is how long execution transfer took here lately; 0: not known.
	Transfer time.Duration `json:"transfer_ns,omitempty"`
	// Closed is why the host itself takes no VM now; empty: it does.
	Closed string `json:"closed,omitempty"`
}

// Wants is the CPU that all on the host would use if they got it.
func (h Host) Wants() float64 { return h.Used + h.Waiting }

// VM is a VM, by the word of the host that it runs on.
type VM struct {
	Name string `json:"name"`
	// Incarnation is another one each time that the VM begins to run somewhere: an order that
	// names an earlier one is stale.
	Incarnation string `json:"incarnation,omitempty"`
	Labels      Labels `json:"labels,omitempty"`

	VCPUs    int     `json:"vcpus,omitempty"`
	CPU      float64 `json:"cpu"`                // cores its vCPUs have
	Waiting  float64 `json:"waiting"`            // cores they wait for
	Overhead float64 `json:"overhead,omitempty"` // cores that the rest of its QEMU uses

	Memory   uint64 `json:"memory"`   // its size, which another host must have room for
	Resident uint64 `json:"resident"` // what its host gets back
	InUse    uint64 `json:"in_use"`   // what has to be sent
	Hot      uint64 `json:"hot"`      // of that, what it works on

	Priority int    `json:"priority,omitempty"` // those with the least leave first; 0 is usual
	Pinned   bool   `json:"pinned,omitempty"`   // it never leaves
	Barred   string `json:"barred,omitempty"`   // why it cannot be evicted now; empty: it can
	// Moved is when it was evicted last, or that was tried; zero: it is not known.
	Moved time.Time `json:"moved,omitzero"`
}

// Wants is the CPU that the VM would use if it got it.
func (v VM) Wants() float64 { return v.CPU + v.Waiting }

// Steal is the share of the CPU it wants that the VM does not get, 0 to 1.
func (v VM) Steal() float64 {
	if v.Waiting <= 0 {
		return 0
	}
	return v.Waiting / v.Wants()
}

// Report is what a host tells at a moment. Seen is when it came, by the clock of the one it came
// to: hosts' own clocks are not compared.
type Report struct {
	Host Host      `json:"host"`
	VMs  []VM      `json:"vms"`
	Seen time.Time `json:"seen"`
}

// Bounds of what a report may say. They are far above what hosts are like, and far below what sums
// of them overflow.
const (
	mostCores  = 1 << 16
	mostBytes  = 1 << 50
	mostRate   = 1e12
	mostVMs    = 1 << 14
	mostLabels = 64
	mostName   = 253
	mostText   = 1 << 10
)

// Check refuses a report that no host can be like, with the reason.
func (r Report) Check() error {
	h := r.Host
	if err := checkName(h.Name); err != nil {
		return fmt.Errorf("host: %w", err)
	}
	bad := func(format string, args ...any) error {
		return fmt.Errorf("host %s: %s", h.Name, fmt.Sprintf(format, args...))
	}
	switch {
	case !within(h.CPUs, mostCores) || h.CPUs == 0:
		return bad("it tells of %g cores", h.CPUs)
	case !within(h.Used, mostCores) || !within(h.Waiting, mostCores):
		return bad("it tells of %g cores in use and %g waited for", h.Used, h.Waiting)
	case h.Total > mostBytes || h.Available > h.Total:
		return bad("it tells of %d bytes of memory available, of %d", h.Available, h.Total)
	case !within(h.Rate, mostRate):
		return bad("it tells of a link of %g bytes per second", h.Rate)
	case len(r.VMs) > mostVMs:
		return bad("it tells of %d VMs", len(r.VMs))
	case h.Transfer < 0 || h.Transfer > time.Hour:
		return bad("it tells that execution transfer takes %v", h.Transfer)
	case len(h.Link) > mostName || len(h.Closed) > mostText:
		return bad("it tells more than %d bytes of its link or of why it is closed", mostName)
	}
	if err := h.Labels.Check(); err != nil {
		return bad("%v", err)
	}
	var seen map[string]bool // only where they are in no order
	for i, v := range r.VMs {
		if err := v.check(); err != nil {
			return bad("%v", err)
		}
		if seen == nil && (i == 0 || r.VMs[i-1].Name < v.Name) {
			continue
		}
		if seen == nil {
			seen = map[string]bool{}
			for _, o := range r.VMs[:i] {
				seen[o.Name] = true
			}
		}
		if seen[v.Name] {
			return bad("it tells of VM %s twice", v.Name)
		}
		seen[v.Name] = true
	}
	return nil
}

func (v VM) check() error {
	if err := checkName(v.Name); err != nil {
		return fmt.Errorf("VM: %w", err)
	}
	switch {
	case !within(v.CPU, mostCores) || !within(v.Waiting, mostCores) ||
		!within(v.Overhead, mostCores):
		return fmt.Errorf("VM %s has %g cores, waits for %g, and its QEMU has %g", v.Name, v.CPU,
			v.Waiting, v.Overhead)
	case max(v.Memory, v.Resident, v.InUse, v.Hot) > mostBytes:
		return fmt.Errorf("VM %s has more memory than there is", v.Name)
	case v.VCPUs < 0 || v.VCPUs > mostCores:
		return fmt.Errorf("VM %s has %d vCPUs", v.Name, v.VCPUs)
	case len(v.Incarnation) > mostName || len(v.Barred) > mostText:
		return fmt.Errorf("VM %s has too long an incarnation or reason", v.Name)
	}
	if err := v.Labels.Check(); err != nil {
		return fmt.Errorf("VM %s: %w", v.Name, err)
	}
	return nil
}

func within(n, most float64) bool { return n >= 0 && n <= most && !math.IsNaN(n) }

// ParseLabels reads labels with commas between, such as app=db,tier=prod; nothing is none.
func ParseLabels(s string) (Labels, error) {
	if s == "" {
		return nil, nil
	}
	l := Labels{}
	for part := range strings.SplitSeq(s, ",") {
		key, value, ok := strings.Cut(part, "=")
		if _, there := l[key]; there || !ok {
			return nil, fmt.Errorf("labels %.60q: want such as app=db,tier=prod, each once", s)
		}
		l[key] = value
	}
	return l, l.Check()
}

// Check refuses labels that selectors could not name.
func (l Labels) Check() error {
	if len(l) > mostLabels {
		return fmt.Errorf("it has %d labels, at most %d may be", len(l), mostLabels)
	}
	for key, value := range l {
		if !isWord(key) || key == nameLabel {
			return fmt.Errorf("label %.40q: a key has letters, digits, -, _, . and /, and is not "+
				"%q", key, nameLabel)
		}
		if value != "" && !isWord(value) {
			return fmt.Errorf("label %s=%.40q: a value has letters, digits, -, _, . and /", key,
				value)
		}
	}
	return nil
}

// checkName refuses names that rules and pages could not hold.
func checkName(s string) error {
	if s == "" || len(s) > mostName {
		return fmt.Errorf("name %.40q: want 1 to %d bytes", s, mostName)
	}
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return fmt.Errorf("name %.40q: it has a control character, or is not UTF-8", s)
		}
	}
	return nil
}

// isWord reports whether a string may be a label's key or value.
func isWord(s string) bool {
	if s == "" || len(s) > mostName {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool { return !wordRune(r) }) < 0
}

func wordRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' ||
		strings.ContainsRune("-_./", r)
}

// Phase is how far the maintenance of a host has come.
//
//	(none) ──drain──► Draining ──no VM left──► Drained ──restore──► Restoring ──► (none)
//	   │                 ▲ ▲                      │
//	   │                 │ └────a VM is there─────┘
//	   ├──at a time──► Planned ────────────────restore──────────────────────────────►
//	   └────close───► Closed ───────────────────open─────────────────────────────►
type Phase string

const (
	Planned   Phase = "planned"   // it will be drained, and is in service until then
	Closed    Phase = "closed"    // no VM comes, none has to leave
	Draining  Phase = "draining"  // no VM comes, all leave that can
	Drained   Phase = "drained"   // no VM is there, none comes
	Restoring Phase = "restoring" // those that were there come back, if that still helps
)

// Maintenance is what an operator has asked for of a host. A host without one is in service.
type Maintenance struct {
	Host   string    `json:"host"`
	Phase  Phase     `json:"phase"`
	From   time.Time `json:"from,omitzero"` // when it shall begin; zero: at once
	By     time.Time `json:"by,omitzero"`   // when it shall be done; zero: whenever
	Rate   float64   `json:"rate,omitempty"`
	Reason string    `json:"reason,omitempty"`
	Asked  time.Time `json:"asked"`
	// Left are the VMs that have left for it, in that order: those that restore brings back.
	Left []string `json:"left,omitempty"`
}

// Open reports whether VMs may come to the host for the sake of balance.
func (m Maintenance) Open() bool {
	return m.Phase == "" || m.Phase == Planned || m.Phase == Restoring
}

// Move is a VM on its way from one host to another.
type Move struct {
	VM          string    `json:"vm"`
	Incarnation string    `json:"incarnation,omitempty"`
	From        string    `json:"from"`
	To          string    `json:"to"`
	Began       time.Time `json:"began"`
	// What it was like when it was decided: this much its target must have kept for it.
	Memory uint64  `json:"memory"`
	InUse  uint64  `json:"in_use"`
	Wants  float64 `json:"wants"`
}

// Cause is what a decision is for.
type Cause string

const (
	Relieve Cause = "relieve" // VMs starve, or a host is short of memory
	Mend    Cause = "mend"    // a rule is broken
	Drain   Cause = "drain"   // a host shall be empty
	Restore Cause = "restore" // a host is back
)

// Prediction is what is expected to come of a move; package predict says how.
type Prediction struct {
	Gain      float64       `json:"gain"`       // cores that all VMs get more, together
	LoadHere  float64       `json:"load_here"`  // wanted for each core afterwards
	LoadThere float64       `json:"load_there"` // there, too
	Freed     uint64        `json:"freed"`
	Transfer  time.Duration `json:"transfer_ns"` // until the VM runs there
	Back      time.Duration `json:"back_ns"`     // until all do 90 % of what they will do
	Total     time.Duration `json:"total_ns"`    // until all its memory is there
}

// Alternative is what else could have been done, and why it was not.
type Alternative struct {
	VM        string     `json:"vm"`
	To        string     `json:"to"`
	Beaten    string     `json:"beaten"`
	Predicted Prediction `json:"predicted"`
}

// Decision is one VM that shall go from one host to another, and why.
type Decision struct {
	At           time.Time     `json:"at"`
	Cause        Cause         `json:"cause"`
	VM           string        `json:"vm"`
	Incarnation  string        `json:"incarnation,omitempty"`
	From         string        `json:"from"`
	To           string        `json:"to"`
	Reasons      []string      `json:"reasons"`
	Alternatives []Alternative `json:"alternatives,omitempty"`
	Predicted    Prediction    `json:"predicted"`
	// Move is what Began of the planner takes when the move begins.
	Move Move `json:"move"`
}

// Outcome is what came of a move that completed.
type Outcome struct {
	From    string        `json:"from"`
	To      string        `json:"to"`
	InUse   uint64        `json:"in_use"`            // as Move has it
	Ended   time.Time     `json:"ended"`             // when that was known
	Took    time.Duration `json:"took_ns"`           // from the order until then
	Moving  time.Duration `json:"moving_ns"`         // of that, for which memory followed the VM
	Limited bool          `json:"limited,omitempty"` // it had a rate of its own
}
