package view

import (
	"fmt"
	"slices"
	"strings"
)

// Force is how much a rule weighs.
type Force string

const (
	Must   Force = "must"   // no decision breaks it; one that mends it is looked for
	Should Force = "should" // of what is possible otherwise, what keeps it is preferred
	Never  Force = "never"  // only with On: as must, for all other hosts
)

// Relation is what a rule asks of its VMs.
type Relation string

const (
	Together Relation = "together" // all in one place
	Apart    Relation = "apart"    // no two in one place
	On       Relation = "on"       // on hosts of a kind
	Stay     Relation = "stay"     // where they are: must, always; should, unless a host is drained
)

// Rule is a rule for VMs. A place is a host or, with By, all hosts that have the same value of that
// label. Hosts without the label are each a place of their own.
type Rule struct {
	Name     string   `json:"name"`
	VMs      Selector `json:"vms"`
	Force    Force    `json:"force"`
	Relation Relation `json:"relation"`
	By       string   `json:"by,omitempty"`   // with Together and Apart
	Hosts    Selector `json:"hosts,omitzero"` // with On
}

// String is what ParseRule takes.
func (r Rule) String() string {
	var b strings.Builder
	if r.Name != "" {
		fmt.Fprintf(&b, "%s: ", r.Name)
	}
	fmt.Fprintf(&b, "vms %s %s run %s", r.VMs, r.Force, r.Relation)
	switch {
	case r.Relation == On:
		fmt.Fprintf(&b, " hosts %s", r.Hosts)
	case r.By != "":
		fmt.Fprintf(&b, " by %s", r.By)
	}
	return strings.Replace(b.String(), " run stay", " stay", 1)
}

const ruleForms = "want \"vms SELECTOR must|should run together|apart [by LABEL]\", \"vms " +
	"SELECTOR must|should|never run on hosts SELECTOR\" or \"vms SELECTOR must|should stay\", " +
	"with \"NAME:\" before it if you like"

// ParseRule reads a rule:
//
//	db: vms app=db must run apart by rack
//	vms name=web1|web2 should run together
//	vms gpu must run on hosts gpu=a100
//	vms tier=test never run on hosts rack=r1
//	vms app=legacy must stay
func ParseRule(s string) (Rule, error) {
	if len(s) > 4*mostText {
		return Rule{}, fmt.Errorf("rule %.40q: more than %d bytes", s, 4*mostText)
	}
	words := strings.Fields(s)
	var r Rule
	if len(words) > 0 && strings.HasSuffix(words[0], ":") {
		r.Name, words = strings.TrimSuffix(words[0], ":"), words[1:]
	}
	if len(words) < 4 || words[0] != "vms" {
		return Rule{}, fmt.Errorf("rule %.60q: %s", s, ruleForms)
	}
	var err error
	if r.VMs, err = ParseSelector(words[1]); err != nil {
		return Rule{}, fmt.Errorf("rule %.60q: %w", s, err)
	}
	r.Force, words = Force(words[2]), words[3:]
	if words[0] != "run" {
		r.Relation, words = Relation(words[0]), words[1:]
		if r.Relation != Stay {
			return Rule{}, fmt.Errorf("rule %.60q: %s", s, ruleForms)
		}
	} else if len(words) > 1 {
		r.Relation, words = Relation(words[1]), words[2:]
		if r.Relation == Stay {
			return Rule{}, fmt.Errorf("rule %.60q: %s", s, ruleForms)
		}
	}
	switch {
	case r.Relation == On && len(words) == 2 && words[0] == "hosts":
		if r.Hosts, err = ParseSelector(words[1]); err != nil {
			return Rule{}, fmt.Errorf("rule %.60q: %w", s, err)
		}
	case r.Relation != On && len(words) == 2 && words[0] == "by":
		r.By = words[1]
	case r.Relation == On || len(words) != 0:
		return Rule{}, fmt.Errorf("rule %.60q: %s", s, ruleForms)
	}
	if err := r.Check(); err != nil {
		return Rule{}, err
	}
	return r, nil
}

// Check refuses what is no rule.
func (r Rule) Check() error {
	bad := func(why string) error { return fmt.Errorf("rule %.60q: %s", r.String(), why) }
	switch {
	case r.Name != "" && !isWord(r.Name):
		return bad("its name may have letters, digits, -, _, . and /")
	case len(r.VMs.terms) == 0:
		return bad("it does not name its VMs")
	case r.Force != Must && r.Force != Should && r.Force != Never:
		return bad("want must, should or never")
	case r.Force == Never && r.Relation != On:
		return bad("never is for hosts: for VMs say must run apart, or must run together")
	case r.By != "" && (!isWord(r.By) || r.Relation != Together && r.Relation != Apart):
		return bad("by names a label of hosts, after together or apart")
	}
	switch r.Relation {
	case Together, Apart, Stay:
		if len(r.Hosts.terms) != 0 {
			return bad("only on has hosts")
		}
	case On:
		if len(r.Hosts.terms) == 0 {
			return bad("it does not name its hosts")
		}
	default:
		return bad(ruleForms)
	}
	return nil
}

// nameLabel is the label that everything has.
const nameLabel = "name"

// Selector picks hosts or VMs by their labels. The zero value picks all.
type Selector struct{ terms []term }

// term is one condition.
type term struct {
	key    string
	not    bool
	values []string // patterns; none: the label is there, with any value
}

// ParseSelector reads a selector: conditions with commas between. All must be met.
//
//	app=db           the label app is db
//	app=db|cache     it is one of these
//	app!=db          it is not, or is not there
//	name=web*        a * stands for any text
//	gpu, !gpu        the label is there, or not
func ParseSelector(s string) (Selector, error) {
	if len(s) > mostText {
		return Selector{}, fmt.Errorf("selector %.40q: more than %d bytes", s, mostText)
	}
	var sel Selector
	for part := range strings.SplitSeq(s, ",") {
		t, err := parseTerm(part)
		if err != nil {
			return Selector{}, fmt.Errorf("selector %.60q: %w", s, err)
		}
		sel.terms = append(sel.terms, t)
	}
	return sel, nil
}

func parseTerm(s string) (term, error) {
	if key, values, ok := strings.Cut(s, "="); ok {
		key, not := strings.CutSuffix(key, "!")
		t := term{key: key, not: not, values: strings.Split(values, "|")}
		for _, v := range t.values {
			if !isPattern(v) {
				return term{}, fmt.Errorf("%.40q: a value has letters, digits, -, _, ., / and *",
					s)
			}
		}
		if !isWord(key) {
			return term{}, errNoKey(s)
		}
		return t, nil
	}
	key, not := strings.CutPrefix(s, "!")
	if !isWord(key) {
		return term{}, errNoKey(s)
	}
	return term{key: key, not: not}, nil
}

func errNoKey(s string) error {
	return fmt.Errorf("%.40q: want a label, such as app=db, app!=db, app or !app", s)
}

// isPattern reports whether a string may be a value of a selector. Names of VMs may have what
// labels may not; a * stands for it.
func isPattern(s string) bool {
	return s != "" && len(s) <= mostName &&
		strings.IndexFunc(s, func(r rune) bool { return !wordRune(r) && r != '*' }) < 0
}

// String is what ParseSelector takes.
func (s Selector) String() string {
	parts := make([]string, len(s.terms))
	for i, t := range s.terms {
		switch {
		case len(t.values) > 0 && t.not:
			parts[i] = t.key + "!=" + strings.Join(t.values, "|")
		case len(t.values) > 0:
			parts[i] = t.key + "=" + strings.Join(t.values, "|")
		case t.not:
			parts[i] = "!" + t.key
		default:
			parts[i] = t.key
		}
	}
	return strings.Join(parts, ",")
}

// Picks reports whether something of this name with these labels is picked.
func (s Selector) Picks(name string, labels Labels) bool {
	for _, t := range s.terms {
		value, ok := labels[t.key]
		if t.key == nameLabel {
			value, ok = name, true
		}
		met := ok && (len(t.values) == 0 ||
			slices.ContainsFunc(t.values, func(p string) bool { return glob(p, value) }))
		if met == t.not {
			return false
		}
	}
	return true
}

// glob reports whether a text is as a pattern has it, in which * stands for any text.
func glob(pattern, text string) bool {
	first, rest, ok := strings.Cut(pattern, "*")
	if !ok {
		return pattern == text
	}
	text, ok = strings.CutPrefix(text, first)
	if !ok {
		return false
	}
	for {
		next, more, another := strings.Cut(rest, "*")
		if !another {
			return strings.HasSuffix(text, rest)
		}
		at := strings.Index(text, next)
		if at < 0 {
			return false
		}
		text, rest = text[at+len(next):], more
	}
}

// MarshalText writes a selector as ParseSelector takes it; one that picks all as nothing.
func (s Selector) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is the reverse.
func (s *Selector) UnmarshalText(b []byte) (err error) {
	*s = Selector{}
	if len(b) > 0 {
		*s, err = ParseSelector(string(b))
	}
	return err
}

// Exact returns a label and its only value, if nothing without it is picked.
func (s Selector) Exact() (key, value string, ok bool) {
	for _, t := range s.terms {
		if !t.not && len(t.values) == 1 && !strings.Contains(t.values[0], "*") {
			return t.key, t.values[0], true
		}
	}
	return "", "", false
}

// IsZero reports whether it picks all for want of conditions.
func (s Selector) IsZero() bool { return len(s.terms) == 0 }
