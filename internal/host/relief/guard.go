package relief

import (
	"fmt"
	"time"
)

// Policy is how a host is guarded without an operator.
type Policy struct {
	Goal   Goal
	Limits Limits
	// Sustain is how long the goal must have been missed without a break.
	Sustain time.Duration
	// Settle is how long the host is left alone after an eviction has ended, as what it brought has
	// to show first, and after none would have helped.
	Settle time.Duration
	// CoolDown is how long a VM stays where it came to, or from where it could not be evicted.
	CoolDown time.Duration
	// Concurrent is how many evictions there may be at once.
	Concurrent int
}

// DefaultPolicy is slow to act. It sends VMs only to hosts that are well below the load that would
// make their own guard act. So a load that swings around one of the two limits moves nothing to and
// fro.
var DefaultPolicy = Policy{
	Goal: DefaultGoal, Limits: Limits{MaxLoad: 0.8, Reserve: 0.1, Transfer: DefaultLimits.Transfer},
	Sustain: 30 * time.Second, Settle: time.Minute, CoolDown: 30 * time.Minute, Concurrent: 1,
}

// Guard watches one host by a policy. Its methods may not be called by several goroutines at once.
type Guard struct {
	Policy Policy

	missed time.Time // since when the goal is missed; zero: it is met
	quiet  time.Time // since when no eviction is under way; zero: one is, or none ever was
	busy   bool
	futile time.Time // when it was found last that no eviction helps
}

// Due reports whether Observe could return a candidate for this observation. If not, Observe needs
// to know nothing of VMs and other hosts.
func (g *Guard) Due(now time.Time, here Host, under int) bool {
	return !g.Policy.Goal.Met(here) && !g.missed.IsZero() && g.wait(now, under) == ""
}

// wait is why the guard does nothing at a moment although the goal is missed.
func (g *Guard) wait(now time.Time, under int) string {
	switch {
	case under >= g.Policy.Concurrent:
		return fmt.Sprintf("%d evictions are under way", under)
	case now.Sub(g.missed) < g.Policy.Sustain:
		return fmt.Sprintf("the goal is missed, not for %v yet", g.Policy.Sustain)
	case !g.busy && !g.quiet.IsZero() && now.Sub(g.quiet) < g.Policy.Settle:
		return fmt.Sprintf("an eviction has ended less than %v ago", g.Policy.Settle)
	case !g.futile.IsZero() && now.Sub(g.futile) < g.Policy.Settle:
		return fmt.Sprintf("less than %v ago no eviction would have helped", g.Policy.Settle)
	}
	return ""
}

// Observe is told what the host, its VMs and the others are like at a moment, and how many
// evictions from it are under way. It returns what Choose does with the policy's limits, its first
// being the eviction to begin now; or no candidate, and why not. Moments must not go back.
func (g *Guard) Observe(now time.Time, here Host, vms []VM, others []Host,
	under int) ([]Candidate, string) {
	if under > 0 {
		g.busy = true
	} else if g.busy {
		g.busy, g.quiet = false, now
	}
	if g.Policy.Goal.Met(here) {
		g.missed = time.Time{}
		return nil, "the goal is met"
	}
	if g.missed.IsZero() {
		g.missed = now
	}
	if why := g.wait(now, under); why != "" {
		return nil, why
	}
	rested := make([]VM, len(vms))
	for i, v := range vms {
		if left := g.Policy.CoolDown - now.Sub(v.Moved); !v.Moved.IsZero() && left > 0 &&
			v.Barred == "" {
			v.Barred = fmt.Sprintf("it was evicted lately, or that was tried: it stays for %v more",
				left.Round(time.Second))
		}
		rested[i] = v
	}
	list := Choose(here, rested, others, g.Policy.Goal, g.Policy.Limits)
	if len(list) == 0 {
		return nil, "no VM can go, or there is no host to go to"
	}
	if list[0].Refused != "" {
		g.futile = now // to look again costs more than it tells
		return nil, fmt.Sprintf("no eviction helps: %s to %s: %s", list[0].VM, list[0].To,
			list[0].Refused)
	}
	// What was missed until now is answered by this one: the next has to have reasons of its own.
	g.missed = time.Time{}
	return list, ""
}
