package fleetsim

import (
	"cmp"
	"fmt"
	"math"
	"runtime"
	"slices"
	"time"

	"vacate/internal/fleet/place"
	"vacate/internal/fleet/view"
)

// balancer keeps a fleet in balance.
type balancer interface {
	report(r view.Report)
	round(now time.Time) []view.Move
	began(m view.Move)
	// ended tells of a move's end. The move was over that long before anybody could know.
	ended(m view.Move, at time.Time, over time.Duration, problem string)
	// memory is how much it has in use. It is asked last.
	memory() uint64
}

func newBalancer(w *world) (balancer, error) {
	switch w.Balancer {
	case "none":
		return &rival{w: w, decide: func(*rival, time.Time) []view.Move { return nil }}, nil
	case "utilisation":
		return &rival{w: w, decide: utilisation, high: map[int]int{}}, nil
	case "greedy":
		return &rival{w: w, decide: greedy}, nil
	case "vacate":
		s := &steal{p: place.New(fleetPolicy(w.Step)), w: w, under: map[string]view.Move{}}
		s.p.SetRules(w.rules)
		return s, nil
	}
	return nil, fmt.Errorf("balancer %q: want one of %q", w.Balancer, Balancers)
}

// steal is the planner of package place.
type steal struct {
	p    *place.Planner
	w    *world
	left []string // who left the host that is drained
	// maintained counts decisions for it, and for hosts that are back.
	maintained int
	under      map[string]view.Move // by VM
}

func (s *steal) report(r view.Report) {
	_ = s.p.Report(r) // what makes no sense is refused; the host is late then
}

func (s *steal) round(now time.Time) (all []view.Move) {
	for _, d := range s.p.Round(now) {
		if d.Cause == view.Drain {
			s.left = append(s.left, d.VM)
		}
		if d.Cause == view.Drain || d.Cause == view.Restore {
			s.maintained++
		}
		all = append(all, d.Move)
	}
	return all
}

func (s *steal) began(m view.Move) {
	s.under[m.VM] = m
	s.p.Began(m)
}

func (s *steal) ended(m view.Move, at time.Time, over time.Duration, problem string) {
	if problem == "the host refused" {
		s.p.Refused(m.VM, m.To, problem, at.Add(5*time.Minute))
	}
	s.p.Ended(m.VM, at, problem)
	began := s.under[m.VM]
	delete(s.under, m.VM)
	if took := at.Sub(began.Began); problem == "" && took >= transfer {
		s.p.Learn(view.Outcome{From: began.From, To: began.To, InUse: began.InUse, Ended: at,
			Took: took, Moving: max(0, took-over-transfer)})
	}
}

func (s *steal) memory() uint64 {
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	with := heap()
	s.p = nil
	return with - min(with, heap())
}

// rival is one that goes by how much of a host is in use. It knows the rules, and asks the world
// for them; what is on its way it does not count.
type rival struct {
	w      *world
	decide func(r *rival, now time.Time) []view.Move
	high   map[int]int // how many rounds a cluster was out of balance
}

func (r *rival) report(view.Report)                                {} // it reads what hosts told last
func (r *rival) began(view.Move)                                   {}
func (r *rival) memory() uint64                                    { return 0 }
func (r *rival) ended(view.Move, time.Time, time.Duration, string) {}

func (r *rival) round(now time.Time) []view.Move { return r.decide(r, now) }

// knows reports whether a host's last report makes sense and is new.
func (r *rival) knows(i int) bool {
	m := &r.w.machines[i]
	return m.report.Seen.Equal(r.w.now()) && !math.IsNaN(m.report.Host.Used)
}

// may reports whether a VM may go to a host, by rules and by what the host has available.
func (r *rival) may(vm, to int) bool {
	g := &r.w.guests[vm]
	return !g.pinned && g.to < 0 && g.host != to && !r.w.breaks(vm, to) &&
		r.w.machines[to].report.Host.Available >= g.size
}

// cluster is how many hosts a cluster of Proxmox has here: its documents advise no more than 32,
// and in larger ones no single move improves the whole by a tenth.
const cluster = 16

// utilisation is a balancer by the rules of Proxmox 9.2: if the hosts of a cluster are out of
// balance by more than 0.3 for three rounds, the one move that improves that the most is made, if
// it does by a tenth. Out of balance is, as we read it, the standard deviation of the hosts' loads
// as a share of their mean; a load is the mean of the CPU and memory in use.
func utilisation(r *rival, now time.Time) (all []view.Move) {
	for first := 0; first < r.w.Hosts; first += cluster {
		last := min(first+cluster, r.w.Hosts)
		loads := make([]float64, last-first)
		busy := false
		for i := range loads {
			m := &r.w.machines[first+i]
			h := m.report.Host
			loads[i] = (h.Used/cores + 1 - float64(h.Available)/memory) / 2
			busy = busy || m.under > 0
		}
		before := imbalance(loads)
		if !(before > 0.3) {
			r.high[first] = 0
			continue
		}
		if r.high[first]++; r.high[first] < 3 || busy {
			continue
		}
		best, gain := view.Move{}, 0.1
		for from := first; from < last; from++ {
			if !r.knows(from) {
				continue
			}
			for _, vm := range r.w.machines[from].guests {
				g := &r.w.guests[vm]
				share := (g.want*r.w.machines[from].share/cores + float64(g.size)/memory) / 2
				for to := first; to < last; to++ {
					if !r.knows(to) || !r.may(vm, to) {
						continue
					}
					loads[from-first] -= share
					loads[to-first] += share
					if better := (before - imbalance(loads)) / before; better >= gain {
						gain = better
						best = r.move(vm, to, now)
					}
					loads[from-first] += share
					loads[to-first] -= share
				}
			}
		}
		if best.VM != "" {
			all = append(all, best)
			r.high[first] = 0
		}
	}
	return all
}

func imbalance(loads []float64) float64 {
	sum, squares := 0.0, 0.0
	for _, l := range loads {
		sum += l
		squares += l * l
	}
	mean := sum / float64(len(loads))
	return math.Sqrt(max(0, squares/float64(len(loads))-mean*mean)) / mean
}

func (r *rival) move(vm, to int, now time.Time) view.Move {
	g := &r.w.guests[vm]
	return view.Move{VM: g.name, From: r.w.machines[g.host].name, To: r.w.machines[to].name,
		Began: now, Memory: g.size, Wants: g.want}
}

// greedy has the VM that uses the most CPU leave each host that uses more than 80 % of its own, for
// the one that uses the least of those that may have it. It does so at once, and each round.
func greedy(r *rival, now time.Time) (all []view.Move) {
	order := make([]int, 0, r.w.Hosts)
	for i := range r.w.machines {
		if r.knows(i) {
			order = append(order, i)
		}
	}
	used := func(i int) float64 { return r.w.machines[i].report.Host.Used }
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(used(a), used(b)) })
	for n := len(order) - 1; n >= 0 && used(order[n]) > 0.8*cores; n-- {
		m := &r.w.machines[order[n]]
		if m.under > 0 {
			continue
		}
		vms := slices.Clone(m.guests)
		slices.SortFunc(vms, func(a, b int) int {
			return cmp.Compare(r.w.guests[b].want, r.w.guests[a].want)
		})
	pick:
		for _, vm := range vms {
			for _, to := range order[:min(len(order), 20)] {
				if used(to) < 0.8*cores && r.may(vm, to) {
					all = append(all, r.move(vm, to, now))
					break pick
				}
			}
		}
	}
	return all
}
