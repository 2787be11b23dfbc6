// Package relief decides which VM leaves a host that is short of CPU or memory, and where to. For
// every VM and every other host it predicts what an eviction would gain and how long it would take.
// Where it advises against one, it says why.
//
// It decides by numbers alone: package pressure and the caller read them. All CPU is in cores, all
// sizes are in bytes. Package predict says what is predicted, and how.
package relief

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"vacate/internal/predict"
	"vacate/internal/sys/units"
)

// VM is a VM on the overloaded host.
type VM struct {
	Name         string
	CPU, Waiting float64 // cores its vCPUs have, and cores they wait for
	Overhead     float64 // cores that the rest of its QEMU uses
	Memory       uint64  // size of its memory, which the other host must have room for
	Resident     uint64  // what this host gets back
	InUse        uint64  // what has to be sent
	Hot          uint64  // of that, what it works on
	Priority     int     // those with the least leave first; 0 is usual
	Pinned       bool    // it never leaves
	Barred       string  // why it cannot be evicted now; empty: it can
	// Check is asked last, as it may take long: why the VM cannot go to a host after all. Empty, or
	// no Check: it can.
	Check func(to string) string
	Moved time.Time // when it was evicted last, or that was tried; only a Guard minds
}

// check is Check, also where there is none.
func (v VM) check(to string) string {
	if v.Check == nil {
		return ""
	}
	return v.Check(to)
}

// Wants is the CPU that the VM would use if it got it.
func (v VM) Wants() float64 { return v.CPU + v.Waiting }

// Host is a host with its VMs.
type Host struct {
	Name             string
	CPUs             float64
	Used             float64 // by everything on it
	Waiting          float64 // what its VMs want beyond that
	Total, Available uint64  // memory
	Rate             float64 // bytes per second that go there from the host to be relieved
	Incoming         uint64  // memory of VMs that are on their way to it
	Barred           string  // why no VM can go there now; empty: it can
}

// wants is the CPU that all on the host would use if they got it.
func (h Host) wants() float64 { return h.Used + h.Waiting }

// Limits are what must not come of an eviction, and what is known of evictions here.
type Limits struct {
	// MaxLoad of the host that a VM goes to, with it: CPU wanted for each core.
	MaxLoad float64
	// Reserve is the share of a host's memory, 0 to 1, that a VM must leave there.
	Reserve float64
	// Transfer is how long execution transfer takes here.
	Transfer time.Duration
}

// Starving is the share of the CPU it wants below which a VM starves: less than all by as much as
// counts for "back".
const Starving = predict.Back

// DefaultLimits have a VM go only to where nobody starves for it.
var DefaultLimits = Limits{MaxLoad: 1 / Starving, Reserve: 0.05, Transfer: 150 * time.Millisecond}

// Candidate is one VM going to one host.
type Candidate struct {
	VM   string
	To   string
	Gain float64 // cores that all VMs together get more
	// Load is what is wanted for each core once it has moved, here and there.
	LoadHere  float64
	LoadThere float64
	Freed     uint64
	// What is predicted to take so long, from the decision on.
	Transfer time.Duration
	Back     time.Duration
	Total    time.Duration
	Meets    bool   // the goal is reached with it
	Refused  string // why it is not to be; empty: it may be
	// Beyond is the limit of the host it goes to that it breaks; empty: none. Only Evacuate lets
	// a VM go then, and only if it is told to.
	Beyond string

	priority int
	cost     float64 // predict.Outcome.Cost
}

// Choose returns every pair of a VM and another host, the best first. Pairs that are allowed and
// reach the goal come first, of these the VMs of the least priority, and of these the pair of the
// least cost: all VMs are back soon, and the other host is not loaded much (predict.Outcome.Cost).
// Where none reaches the goal, the one that comes the nearest to it.
// The others follow with their reasons. If the goal is met already, all are refused. Only the first
// is checked with its VM's Check, and those that were refused by that.
func Choose(here Host, vms []VM, others []Host, g Goal, l Limits) []Candidate {
	met := g.Met(here)
	list := []Candidate{}
	for _, v := range vms {
		for _, to := range others {
			c := candidate(here, v, to, vms, l).within()
			after := here
			left := here.forecast().Without(v.forecast())
			after.Used, after.Waiting = left.Used, left.Waiting
			after.Available += v.Resident
			c.Meets = g.Met(after)
			switch {
			case met && c.Refused == "":
				c.Refused = "the goal is met as it is"
			case c.Refused == "" && g.CPU > 0 && g.Free == 0 && c.Gain < leastGain:
				c.Refused = fmt.Sprintf("it would gain %.2f cores", max(0, c.Gain))
			}
			list = append(list, c)
		}
	}
	nearest := func(c Candidate) float64 {
		if g.Free > 0 {
			return -float64(c.Freed)
		}
		return c.LoadHere
	}
	slices.SortStableFunc(list, func(a, b Candidate) int {
		if c := cmp.Or(first(a.Refused == "", b.Refused == ""), first(a.Meets, b.Meets),
			cmp.Compare(a.priority, b.priority)); c != 0 {
			return c
		}
		if a.Meets {
			return cmp.Compare(a.cost, b.cost)
		}
		return cmp.Or(cmp.Compare(nearest(a), nearest(b)), cmp.Compare(a.Back, b.Back),
			cmp.Compare(a.LoadThere, b.LoadThere))
	})
	of := map[string]VM{}
	for _, v := range vms {
		of[v.Name] = v
	}
	for len(list) > 0 && list[0].Refused == "" {
		best := list[0]
		if best.Refused = of[best.VM].check(best.To); best.Refused == "" {
			break
		}
		list = append(list[1:], best)
	}
	return list
}

// leastGain is how much an eviction for the sake of CPU must gain, in cores: less is noise.
const leastGain = 0.02

func first(a, b bool) int {
	switch {
	case a && !b:
		return -1
	case b && !a:
		return 1
	}
	return 0
}

// candidate tells what comes of one eviction.
func candidate(here Host, v VM, to Host, all []VM, l Limits) Candidate {
	c := Candidate{VM: v.Name, To: to.Name, Freed: v.Resident, priority: v.Priority}
	o := predict.Move{VM: v.forecast(), From: here.forecast(), To: to.forecast(), Rate: to.Rate,
		Transfer: l.Transfer, Stay: stay(all, v.Name)}.Outcome()
	c.Gain, c.LoadHere, c.LoadThere = o.Gain, o.LoadHere, o.LoadThere
	c.Transfer, c.Back, c.Total, c.cost = o.Transfer, o.Back, o.Total, o.Cost()
	room := float64(to.Available) - float64(to.Incoming) - l.Reserve*float64(to.Total)
	switch {
	case v.Pinned:
		c.Refused = "the VM is pinned"
	case v.Barred != "":
		c.Refused = v.Barred
	case to.Barred != "":
		c.Refused = to.Barred
	case to.Rate <= 0:
		c.Refused = "it is not known how fast the link is"
	case float64(v.Memory) > room+l.Reserve*float64(to.Total):
		c.Refused = fmt.Sprintf("%s has room for %s, the VM has %s", to.Name,
			units.Size(uint64(max(0, room))), units.Size(v.Memory))
	case float64(v.Memory) > room:
		c.Beyond = fmt.Sprintf("%s has room for %s, the VM has %s", to.Name,
			units.Size(uint64(max(0, room))), units.Size(v.Memory))
	case c.LoadThere > l.MaxLoad:
		c.Beyond = fmt.Sprintf("%s would starve: %.2f cores wanted, of %.0f", to.Name,
			to.wants()+v.Wants(), to.CPUs)
	}
	return c
}

// within refuses what breaks a limit.
func (c Candidate) within() Candidate {
	c.Refused, c.Beyond = cmp.Or(c.Refused, c.Beyond), ""
	return c
}

// stay is what is likely of all VMs but one.
func stay(all []VM, but string) (sum float64) {
	for _, v := range all {
		if v.Name != but {
			sum += v.forecast().Likely()
		}
	}
	return sum
}

func (v VM) forecast() predict.VM {
	return predict.VM{CPU: v.CPU, Waiting: v.Waiting, Overhead: v.Overhead, InUse: v.InUse,
		Hot: v.Hot}
}

func (h Host) forecast() predict.Host {
	return predict.Host{CPUs: h.CPUs, Used: h.Used, Waiting: h.Waiting}
}

// Evacuation is what is asked of Evacuate.
type Evacuation struct {
	Except []string // VMs that stay
	// Force lets VMs go beyond the limits of a host, though not beyond its memory: a host that
	// starves is better than none.
	Force bool
}

// Excepted is why a VM stays that an Evacuation leaves out.
const Excepted = "it is excepted"

// Evacuate says where each VM of a host goes, in the order that frees the host the soonest. VMs
// whose memory takes the least time come first: each VM that has gone gives back its CPU and its
// memory at once. What a host has room for is counted down as VMs are given to it. Those that
// cannot go anywhere are last, with a reason.
func Evacuate(here Host, vms []VM, others []Host, l Limits, e Evacuation) []Candidate {
	others = slices.Clone(others)
	vms = slices.Clone(vms)
	slices.SortStableFunc(vms, func(a, b VM) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.InUse, b.InUse))
	})
	var going, staying []Candidate
	for _, v := range vms {
		if slices.Contains(e.Except, v.Name) {
			staying = append(staying, Candidate{VM: v.Name, Refused: Excepted})
			continue
		}
		var may []Candidate
		var refused []string
		for _, to := range others {
			c := candidate(here, v, to, vms, l)
			if !e.Force {
				c = c.within()
			}
			if c.Refused != "" {
				refused = append(refused, c.Refused)
				continue
			}
			may = append(may, c)
		}
		slices.SortStableFunc(may, func(a, b Candidate) int {
			return cmp.Or(first(a.Beyond == "", b.Beyond == ""),
				cmp.Compare(a.LoadThere, b.LoadThere))
		})
		for len(may) > 0 {
			why := v.check(may[0].To)
			if why == "" {
				break
			}
			refused, may = append(refused, why), may[1:]
		}
		if len(may) == 0 {
			slices.Sort(refused)
			why := strings.Join(slices.Compact(refused), "; ")
			if len(others) == 0 {
				why = "there is no other host"
			}
			staying = append(staying, Candidate{VM: v.Name, Refused: why})
			continue
		}
		chosen := may[0]
		to := &others[slices.IndexFunc(others, func(h Host) bool { return h.Name == chosen.To })]
		with := to.forecast().With(v.forecast())
		to.Used, to.Waiting = with.Used, with.Waiting
		to.Incoming += v.Memory
		going = append(going, chosen)
	}
	return append(going, staying...)
}
