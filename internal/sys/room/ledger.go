package room

import (
	"fmt"
	"slices"
	"sync"

	"vacate/internal/sys/process"
	"vacate/internal/sys/units"
)

// Ledger knows what VMs that are coming to this host will still take, so that each of several is
// not told the same memory is free. The zero value is empty. Its methods may be called by several
// goroutines.
type Ledger struct {
	mu     sync.Mutex
	claims map[*Claim]bool // guarded by mu
}

// Claim is the memory of a VM that is coming.
type Claim struct {
	ledger  *Ledger
	process process.Process
	memory  []Memory
	files   []string // of the limits that bound it
}

// Take makes sure that memory of a process fits into limits beside what others will still take, and
// claims it.
func (l *Ledger) Take(p process.Process, limits []Limit, memory []Memory) (*Claim, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := Check(limits, memory, l.others); err != nil {
		return nil, err
	}
	return l.add(p, limits, memory), nil
}

// Note claims memory that is being used already, whether it fits or not.
func (l *Ledger) Note(p process.Process, limits []Limit, memory []Memory) *Claim {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.add(p, limits, memory)
}

// add is called with mu held.
func (l *Ledger) add(p process.Process, limits []Limit, memory []Memory) *Claim {
	c := &Claim{ledger: l, process: p, memory: slices.Clone(memory)}
	for i := range c.memory {
		c.memory[i].Has = 0 // the process tells, when it is asked
	}
	for _, limit := range limits {
		c.files = append(c.files, limit.key())
	}
	if l.claims == nil {
		l.claims = map[*Claim]bool{}
	}
	l.claims[c] = true
	return c
}

// Release ends a claim. It may be called more than once, and of nil.
func (c *Claim) Release() {
	if c == nil {
		return
	}
	c.ledger.mu.Lock()
	defer c.ledger.mu.Unlock()
	delete(c.ledger.claims, c)
}

// Others is what VMs that are coming will still take of a limit.
func (l *Ledger) Others(limit Limit) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.others(limit)
}

// others is called with mu held.
func (l *Ledger) others(limit Limit) (sum uint64) {
	for c := range l.claims {
		if slices.Contains(c.files, limit.key()) {
			sum = plus(sum, c.left(limit))
		}
	}
	return sum
}

// key tells limits apart.
func (l Limit) key() string { return fmt.Sprint(l.Page, " ", l.Device, " ", l.Name, " ", l.File) }

// left is what a claim will still take of a limit: what it needs of it in all, less what its
// process has of that kind.
func (c *Claim) left(limit Limit) uint64 {
	if limit.Page == addresses {
		return 0
	}
	need := limit.Needs(c.memory)
	b, err := system.read(fmt.Sprintf("/proc/%d/status", c.process.PID))
	if err != nil || !c.process.Alive() {
		return 0 // what has ended takes no more
	}
	has := Meminfo(b)
	if limit.Page != units.PageSize {
		return need - min(need, has["HugetlbPages"])
	}
	return need - min(need, plus(plus(has["RssAnon"], has["RssShmem"]), has["VmSwap"]))
}
