package pushorder

import (
	"fmt"
	"strings"
)

// Base is how the plan orders pages.
type Base uint8

// The bases. All but Enlightened and Address serve comparisons.
const (
	Unset       Base = iota
	Enlightened      // by what is known about each page's use: see tier
	Classes          // by the paper's nine classes, active processes by their last run
	Address          // by address
	Reverse          // by address, from the last to the first
	Random           // at random, the same each time
	DemandOnly       // no plan: only what the guest waits for
	bases
)

var baseNames = [bases]string{"unset", "enlightened", "classes", "address", "reverse", "random",
	"demand-only"}

func (b Base) String() string { return baseNames[min(b, bases-1)] }

// Policy is an order of the push.
type Policy struct {
	Base Base
	// Near puts the neighbours of fetched pages ahead of the plan: with Enlightened those in
	// the guest's address spaces where these are known, else those in its physical memory.
	Near bool
}

// Default is the policy that performed best.
var Default = Policy{Enlightened, true}

func (p Policy) String() string {
	if p.Near {
		return p.Base.String() + "+near"
	}
	return p.Base.String()
}

// ParsePolicy is the inverse of String.
func ParsePolicy(s string) (Policy, error) {
	name, near := strings.CutSuffix(s, "+near")
	for b := Unset + 1; b < bases; b++ {
		if b.String() == name {
			return Policy{b, near}, nil
		}
	}
	var names []string
	for _, p := range Policies() {
		names = append(names, p.String())
	}
	return Policy{}, fmt.Errorf("no order of pages is called %q: there are %s", s,
		strings.Join(names, ", "))
}

// Policies returns all policies.
func Policies() []Policy {
	var list []Policy
	for b := Unset + 1; b < bases; b++ {
		list = append(list, Policy{b, false}, Policy{b, true})
	}
	return list
}

// Knows reports whether the policy's plan uses what is known about the pages.
func (p Policy) Knows() bool { return p.Base == Enlightened || p.Base == Classes }
