// Package orders is what makes an order of a fleet's leader count at a host, at both ends. It is
// pure but for [File], so that host, leader and the model check of F1 to F5 in docs/protocol.md use
// the same functions.
//
// Leaders are elected, and one that is cut off goes on talking until it notices. So each order
// carries an epoch, that of its leader's term, and the number of its plan. Both only grow, over all
// leaders. A host remembers the highest of each, on its disk.
package orders

import (
	"errors"
	"fmt"
)

// Mark is what a host remembers of orders.
type Mark struct {
	Epoch uint64 `json:"epoch"` // the highest that it has heard
	Plan  uint64 `json:"plan"`  // the highest that it was told, whatever came of it
}

// Reasons to refuse an order.
var (
	// ErrDeposed: the one who orders leads no longer.
	ErrDeposed = errors.New("a later leader of the fleet was heard")
	// ErrSpent: the order, or a later one, was told before.
	ErrSpent = errors.New("this order, or a later one, was told before")
	// ErrStale: the VM is not any more what it was when that was decided.
	ErrStale = errors.New("the VM was started, or evicted, since this was decided")
)

// Hear is the mark once a leader of an epoch has been heard, or ErrDeposed.
func (m Mark) Hear(epoch uint64) (Mark, error) {
	if epoch < m.Epoch {
		return m, fmt.Errorf("%w: epoch %d, this one has %d", ErrDeposed, m.Epoch, epoch)
	}
	m.Epoch = epoch
	return m, nil
}

// Spend is the mark once an order has been told, or why the order must not be heeded. The mark must
// be durable before anything is done for the order.
func (m Mark) Spend(epoch, plan uint64) (Mark, error) {
	m, err := m.Hear(epoch)
	if err != nil {
		return m, err
	}
	if plan <= m.Plan {
		return m, fmt.Errorf("%w: plan %d, this one is %d", ErrSpent, m.Plan, plan)
	}
	m.Plan = plan
	return m, nil
}

// Fate is what a leader knows of a plan.
type Fate string

// What may be known.
const (
	// Unknown: the host has not answered this leader. The plan's eviction may have begun, or begin
	// yet.
	Unknown Fate = "unknown"
	// Begun: its eviction is in the host's journal, under way or ended.
	Begun Fate = "begun"
	// Pending: it has not begun. The order may be sent, again if need be.
	Pending Fate = "pending"
	// Over: it did not begin, and never will; or it ended so long ago that the host has forgotten.
	Over Fate = "over"
)

// FateOf tells what became of a plan, by a host's word: its mark, when no order was being carried
// out, and whether its journal then had the plan's eviction. epoch is that of the leader who asks.
func FateOf(epoch, planEpoch, plan uint64, told Mark, has bool) Fate {
	switch {
	case has:
		return Begun
	case told.Epoch != epoch:
		return Unknown // an order of a leader before may still be heeded
	case plan <= told.Plan, planEpoch != epoch:
		return Over
	}
	return Pending
}
