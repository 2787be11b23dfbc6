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
