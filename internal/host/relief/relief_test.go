package relief

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/sys/units"

	"pgregory.net/rapid"
)

const gib = 1 << 30

// pair is two VMs that share a host's only core, one of them with more memory; beside an idle host.
func pair() (Host, []VM, []Host) {
	vms := []VM{
		{Name: "big", CPU: 0.5, Waiting: 0.5, Memory: 4 * gib, Resident: 3 * gib, InUse: 3 * gib,
			Hot: 2 * gib},
		{Name: "small", CPU: 0.5, Waiting: 0.5, Memory: 2 * gib, Resident: gib, InUse: gib,
			Hot: gib / 2},
	}
	here := Host{Name: "a", CPUs: 1, Used: 1, Waiting: 1, Total: 16 * gib, Available: 8 * gib}
	return here, vms, []Host{{Name: "b", CPUs: 1, Used: 0.02, Total: 16 * gib, Available: 15 * gib,
		Rate: 125e6}}
}

func TestChoose(t *testing.T) {
	here, vms, others := pair()
	list := Choose(here, vms, others, DefaultGoal, DefaultLimits)
	if len(list) != 2 {
		t.Fatalf("%+v", list)
	}
	c := list[0]
	if c.VM != "small" || c.To != "b" || c.Refused != "" || !c.Meets || c.Gain < 0.97 ||
		c.Gain > 1.0 || c.Freed != gib {
		t.Errorf("%+v", c)
	}
	// A GiB takes 8.6 s at 1 Gbit/s; both VMs are half of all, so that the one that moves has to
	// reach 80 %.
	if c.Total < 8700*time.Millisecond || c.Total > 8800*time.Millisecond ||
		c.Transfer != DefaultLimits.Transfer || c.Back != c.Total {
		t.Errorf("%+v: the engines leave too little of the cores until the end", c)
	}
	for i := range vms {
		vms[i].CPU, vms[i].Waiting = 0.3, 0.1
	}
	here.Used, here.Waiting = 0.6, 0.2
	if c := Choose(here, vms, others, Goal{CPU: 0.5}, DefaultLimits)[0]; c.VM != "small" ||
		c.Back < 4*time.Second || c.Back > 4500*time.Millisecond {
		t.Errorf("%+v: half of its memory is hot", c)
	}
	// Noise in the loads must not send the larger VM (the figures of a real run). Both times are
	// within a factor of two.
	noisy := []VM{
		{Name: "big", CPU: 0.421, Waiting: 0.547, InUse: 187 << 20, Memory: gib / 4, Hot: gib / 8},
		{Name: "small", CPU: 0.422, Waiting: 0.564, InUse: 110 << 20, Memory: gib / 4,
			Hot: gib / 16},
	}
	near := []Host{{Name: "b", CPUs: 1, Used: 0.05, Total: 16 * gib, Available: 15 * gib,
		Rate: 75e6}}
	busy := Host{Name: "a", CPUs: 1, Used: 0.967, Waiting: 1.075, Total: 16 * gib,
		Available: 8 * gib}
	if list := Choose(busy, noisy, near, DefaultGoal, DefaultLimits); !list[1].Meets ||
		list[0].VM != "small" || list[0].LoadThere <= list[1].LoadThere ||
		list[1].Back > 2*list[0].Back {
		t.Errorf("%+v", list)
	}
	here, vms, _ = pair()
	// One that is a tenth of all need not be waited for.
	vms[1].CPU, vms[1].Waiting = 0.05, 0.05
	if c := Choose(here, vms, others, Goal{CPU: 2}, DefaultLimits); c[0].Refused == "" {
		t.Errorf("the goal is met: %+v", c)
	}
	here.Waiting, others[0].Rate = 0.1, 1e6 // which costs the hosts nothing
	c = candidate(here, vms[1], others[0], vms, DefaultLimits)
	if c.Back != c.Transfer {
		t.Errorf("%+v", c)
	}
}

// TestRefused has each reason not to evict.
func TestRefused(t *testing.T) {
	for want, change := range map[string]func(*Host, *[]VM, *[]Host, *Goal, *Limits){
		"pinned": func(_ *Host, vms *[]VM, _ *[]Host, _ *Goal, _ *Limits) {
			(*vms)[1].Pinned = true
		},
		"no monitor": func(_ *Host, vms *[]VM, _ *[]Host, _ *Goal, _ *Limits) {
			(*vms)[1].Barred = "no monitor"
		},
		"does not answer": func(_ *Host, _ *[]VM, to *[]Host, _ *Goal, _ *Limits) {
			(*to)[0].Barred = "it does not answer"
		},
		"how fast": func(_ *Host, _ *[]VM, to *[]Host, _ *Goal, _ *Limits) { (*to)[0].Rate = 0 },
		"has room for 1.5 GiB, the VM has 2 GiB": func(_ *Host, _ *[]VM, to *[]Host, _ *Goal,
			l *Limits) {
			(*to)[0].Total, (*to)[0].Available, l.Reserve = 8*gib, 2*gib, 1.0/16
		},
		"has room for 0 bytes": func(_ *Host, _ *[]VM, to *[]Host, _ *Goal, _ *Limits) {
			(*to)[0].Incoming = 20 * gib
		},
		"starve: 1.50 cores": func(_ *Host, _ *[]VM, to *[]Host, _ *Goal, _ *Limits) {
			(*to)[0].Used = 0.5
		},
		"goal is met": func(_ *Host, _ *[]VM, _ *[]Host, g *Goal, _ *Limits) { g.CPU = 3 },
		"gain 0.00 cores": func(h *Host, vms *[]VM, _ *[]Host, g *Goal, _ *Limits) {
			*h, (*vms)[1] = Host{Name: "a", CPUs: 4, Used: 1.5}, VM{Name: "small", CPU: 0.5,
				Memory: gib}
			g.CPU = 0.1
		},
	} {
		here, vms, others := pair()
		g, l := DefaultGoal, DefaultLimits
		change(&here, &vms, &others, &g, &l)
		found := false
		for _, c := range Choose(here, vms, others, g, l) {
			found = found || c.VM == "small" && strings.Contains(c.Refused, want)
		}
		if !found {
			t.Errorf("%s: %+v", want, Choose(here, vms, others, g, l))
		}
	}
}

func TestPriority(t *testing.T) {
	here, vms, others := pair()
	vms[1].Priority = 1
	if c := Choose(here, vms, others, DefaultGoal, DefaultLimits)[0]; c.VM != "big" ||
		c.Refused != "" {
		t.Errorf("%+v", c)
	}
}

// TestMemory frees memory: the VM that suffices and is the quickest, or else the one that gives
// back the most.
func TestMemory(t *testing.T) {
	here, vms, others := pair()
	for free, want := range map[uint64]string{9 * gib: "small", 11 * gib: "big", 12 * gib: "big"} {
		c := Choose(here, vms, others, Goal{Free: free}, DefaultLimits)[0]
		if c.VM != want || c.Refused != "" || c.Meets != (free < 12*gib) {
			t.Errorf("%s: %+v", units.Size(free), c)
		}
	}
}

// TestChoices checks what must be true of every choice.
func TestChoices(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		cores := func(name string, most float64) float64 {
			return rapid.Float64Range(0, most).Draw(r, name)
		}
		size := func(name string) uint64 { return rapid.Uint64Range(0, 64).Draw(r, name) * gib }
		here := Host{Name: "here", CPUs: float64(rapid.IntRange(1, 8).Draw(r, "cpus")),
			Available: size("available")}
		var vms []VM
		for i := range rapid.IntRange(0, 6).Draw(r, "vms") {
			v := VM{Name: fmt.Sprint("vm", i), CPU: cores("cpu", here.CPUs/7),
				Overhead: cores("overhead", here.CPUs/50), Waiting: cores("waiting", 2),
				Memory: size("memory"), Pinned: rapid.Bool().Draw(r, "pinned"),
				Priority: rapid.IntRange(-1, 1).Draw(r, "priority")}
			v.InUse, v.Resident = v.Memory/2, v.Memory/2
			v.Hot = v.InUse / 2
			here.Used, here.Waiting = here.Used+v.CPU+v.Overhead, here.Waiting+v.Waiting
			vms = append(vms, v)
		}
		var others []Host
		for i := range rapid.IntRange(0, 3).Draw(r, "hosts") {
			h := Host{Name: fmt.Sprint("host", i),
				CPUs: float64(rapid.IntRange(1, 8).Draw(r, "cpus there")), Total: 64 * gib,
				Available: size("available there"), Rate: cores("rate", 1e9)}
			h.Used = cores("used there", h.CPUs)
			others = append(others, h)
		}
		g := Goal{CPU: cores("goal", 2), Free: size("goal memory")}
		list := Choose(here, vms, others, g, DefaultLimits)
		if len(list) != len(vms)*len(others) {
			r.Fatalf("%d candidates of %d VMs and %d hosts", len(list), len(vms), len(others))
		}
		refused := false
		for _, c := range list {
			if refused && c.Refused == "" {
				r.Fatalf("a possible one behind one that is refused: %+v", list)
			}
			refused = refused || c.Refused != ""
			if c.Refused != "" {
				continue
			}
			if g.Met(here) || c.LoadThere > DefaultLimits.MaxLoad || c.Transfer > c.Back ||
				c.Back > c.Total {
				r.Fatalf("%+v", c)
			}
			for _, v := range vms {
				if v.Name == c.VM && v.Pinned {
					r.Fatalf("pinned: %+v", c)
				}
			}
		}
		// All together have room where they are sent.
		given := map[string]uint64{}
		wanted := map[string]float64{}
		seen := map[string]bool{}
		for _, c := range Evacuate(here, vms, others, DefaultLimits, Evacuation{}) {
			if seen[c.VM] {
				r.Fatalf("twice: %s", c.VM)
			}
			seen[c.VM] = true
			for _, v := range vms {
				if v.Name == c.VM && c.Refused == "" {
					given[c.To] += v.Memory
					wanted[c.To] += v.Wants()
				}
			}
		}
		if len(seen) != len(vms) {
			r.Fatalf("%d of %d VMs", len(seen), len(vms))
		}
		for _, h := range others {
			if given[h.Name] > h.Available ||
				wanted[h.Name] > 0 && h.wants()+wanted[h.Name] > DefaultLimits.MaxLoad*h.CPUs+1e-9 {
				r.Fatalf("%s gets %d and %.2f", h.Name, given[h.Name], wanted[h.Name])
			}
		}
	})
}

func TestEvacuate(t *testing.T) {
	here, vms, others := pair()
	others = append(others, Host{Name: "c", CPUs: 1, Total: 16 * gib, Available: 15 * gib,
		Rate: 125e6})
	vms = append(vms, VM{Name: "pin", Pinned: true})
	var said []string
	for _, c := range Evacuate(here, vms, others, DefaultLimits, Evacuation{}) {
		said = append(said, c.VM+" "+c.To+" "+c.Refused)
	}
	if got := strings.Join(said, ", "); got != "small c , big b , pin  the VM is pinned" {
		t.Error(got)
	}
	if c := Evacuate(here, vms[:1], nil, DefaultLimits, Evacuation{}); len(c) != 1 ||
		c[0].Refused != "there is no other host" {
		t.Errorf("%+v", c)
	}
}

// Some stay because they are excepted; and when told to, others go where they break a limit, if
// there is no better host and memory enough.
func TestEvacuateAsAsked(t *testing.T) {
	here, vms, others := pair()
	plan := func(e Evacuation) string {
		var said []string
		for _, c := range Evacuate(here, vms, others, DefaultLimits, e) {
			said = append(said,
				strings.TrimRight(fmt.Sprintf("%s>%s %s%s", c.VM, c.To, c.Refused, c.Beyond), " "))
		}
		return strings.Join(said, ", ")
	}
	if got := plan(Evacuation{}); got != "small>b, big> b would starve: 2.02 cores wanted, of 1" {
		t.Error(got)
	}
	if got := plan(Evacuation{Except: []string{"small"}}); got != "big>b, small> it is excepted" {
		t.Error(got)
	}
	if got := plan(Evacuation{Force: true}); got !=
		"small>b, big>b b would starve: 2.02 cores wanted, of 1" {
		t.Error(got)
	}
	// A host within its limits is better than one that is not.
	others = append(others, Host{Name: "slow", CPUs: 4, Total: 16 * gib, Available: 15 * gib,
		Rate: 1e6})
	if got := plan(Evacuation{Force: true}); got != "small>slow, big>slow" {
		t.Error(got)
	}
	// Force makes no memory.
	others = []Host{{Name: "b", CPUs: 4, Total: 80 * gib, Available: 5 * gib, Rate: 125e6}}
	if got := plan(Evacuation{Force: true}); got !=
		"small>b b has room for 1 GiB, the VM has 2 GiB, big> b has room for 0 bytes, the VM "+
			"has 4 GiB" {
		t.Error(got)
	}
	vms[0].Pinned, vms[1].Barred = true, "it is being evicted"
	if got := plan(Evacuation{Force: true}); got !=
		"small> it is being evicted, big> the VM is pinned" {
		t.Error(got)
	}
}

func TestParseGoal(t *testing.T) {
	for text, want := range map[string]Goal{
		"cpu<80%": {CPU: 0.8}, "free 8GiB": {Free: 8 * gib},
		" cpu<150% , free 512 MiB": {CPU: 1.5, Free: 512 << 20}, "free 3B": {Free: 3},
	} {
		g, err := ParseGoal(text)
		if err != nil || g != want {
			t.Errorf("%q: %+v, %v", text, g, err)
		}
		if again, err := ParseGoal(g.String()); err != nil || again != g {
			t.Errorf("%q: %v, %v", g, again, err)
		}
	}
	for _, text := range []string{"", "cpu", "cpu<80", "cpu<%", "cpu<NaN%", "cpu<-1%", "cpu<2000%",
		"free", "free 8", "free GiB", "free 0GiB", "free 99999999999999999999GiB",
		"free 99999999TiB", "cpu<80%,cpu<70%", "load<3"} {
		if g, err := ParseGoal(text); err == nil {
			t.Errorf("%q: %+v", text, g)
		}
	}
}

func FuzzParseGoal(f *testing.F) {
	f.Add("cpu<80%")
	f.Add("free 8GiB, cpu<150.5%")
	f.Fuzz(func(t *testing.T, s string) {
		g, err := ParseGoal(s)
		if err != nil {
			return
		}
		if again, err := ParseGoal(g.String()); err != nil || again.Free != g.Free {
			t.Errorf("%q becomes %q: %+v, %v", s, g, again, err)
		}
	})
}

// world is hosts with VMs whose loads change, in simulated time.
type world struct {
	now    time.Time
	random *rand.Rand
	cpus   float64
	vms    []*simVM
	guards []*Guard // of each host
	moves  int
	starve time.Duration // sum over VMs
}

type simVM struct {
	VM
	host   int
	base   float64       // cores it wants on the average
	phase  float64       // of its day
	burst  float64       // of late
	noise  float64       // from one observation to the next
	to     int           // where it goes; -1: nowhere
	left   time.Duration // until it is there
	starts []time.Time   // of its evictions
}

// want is the load of a VM at a time: by the hour of the day, with bursts and noise.
func (w *world) want(v *simVM, seconds float64) float64 {
	day := 1 + 0.6*math.Sin(2*math.Pi*(seconds/86400+v.phase))
	if w.random.Float64() < 1.0/600 { // once in ten minutes, at an observation a second
		v.burst = w.random.Float64() * 2
	}
	v.burst *= 0.995 // gone after some minutes
	return max(0.01, v.base*(day+v.burst+v.noise*w.random.NormFloat64()))
}

// hosts returns each host as its guard would see it.
func (w *world) hosts(n int) ([]Host, [][]VM) {
	hosts, vms := make([]Host, n), make([][]VM, n)
	for i := range hosts {
		hosts[i] = Host{Name: fmt.Sprint(i), CPUs: w.cpus, Total: 64 * gib, Available: 64 * gib,
			Rate: 125e6}
	}
	for _, v := range w.vms {
		hosts[v.host].Used += v.CPU
		hosts[v.host].Waiting += v.Waiting
		hosts[v.host].Available -= v.Memory
		if v.to >= 0 {
			hosts[v.to].Incoming += v.Memory
		}
		vm := v.VM
		if v.to >= 0 {
			vm.Barred = "it is being evicted"
		}
		vms[v.host] = append(vms[v.host], vm)
	}
	return hosts, vms
}

// newWorld makes hosts of 4 cores with 4 VMs each.
func newWorld(seed uint64, hosts int) *world {
	w := &world{now: time.Unix(1e9, 0), random: rand.New(rand.NewPCG(seed, 7)), cpus: 4}
	for i := range 4 * hosts {
		size := uint64(1+i%4) * gib
		w.vms = append(w.vms, &simVM{
			VM: VM{Name: fmt.Sprint("vm", i), Memory: size, InUse: size * 3 / 4, Hot: gib / 2,
				Resident: size},
			host: i % hosts, base: 0.2 + w.random.Float64()*0.9, phase: w.random.Float64(),
			noise: 0.3 * w.random.Float64(), to: -1,
		})
	}
	for range hosts {
		w.guards = append(w.guards, &Guard{Policy: DefaultPolicy})
	}
	return w
}

// TestDay has guards of four hosts live through days of loads that swing, burst and are noisy,
// observed every second.
func TestDay(t *testing.T) {
	const hosts = 4
	for seed := range uint64(6) {
		alone, w := newWorld(seed, hosts), newWorld(seed, hosts)
		alone.day(t, hosts, false)
		w.day(t, hosts, true)
		for _, v := range w.vms {
			for i := 1; i < len(v.starts); i++ {
				if d := v.starts[i].Sub(v.starts[i-1]); d < DefaultPolicy.CoolDown {
					t.Errorf("seed %d: %s left again after %v", seed, v.Name, d)
				}
			}
		}
		t.Logf("seed %d: %d evictions in a day; VMs starved for %v, without any for %v", seed,
			w.moves, w.starve, alone.starve)
		if w.moves == 0 || w.starve >= alone.starve {
			t.Errorf("seed %d: %d evictions do not help: %v, %v", seed, w.moves, w.starve,
				alone.starve)
		}
	}
}

// day lets one pass.
func (w *world) day(t *testing.T, n int, guarded bool) {
	for s := range 86400 {
		w.now = w.now.Add(time.Second)
		sums := make([]float64, n)
		for _, v := range w.vms {
			v.CPU = w.want(v, float64(s)) // what it wants, for now
			sums[v.host] += v.CPU
		}
		under := make([]int, n)
		for _, v := range w.vms {
			wants := v.CPU
			if over := sums[v.host] / w.cpus; over > 1 {
				v.CPU /= over
			}
			v.Waiting = wants - v.CPU
			if v.CPU < Starving*wants {
				w.starve += time.Second
			}
			if v.to < 0 {
				continue
			}
			if v.left -= time.Second; v.left > 0 {
				under[v.host]++
				continue
			}
			v.host, v.to, v.Moved = v.to, -1, w.now
			w.moves++
		}
		if !guarded {
			continue
		}
		hosts, vms := w.hosts(n)
		for i, g := range w.guards {
			others := make([]Host, 0, n-1)
			for j, h := range hosts {
				if j != i {
					others = append(others, h)
				}
			}
			list, _ := g.Observe(w.now, hosts[i], vms[i], others, under[i])
			if len(list) == 0 {
				continue
			}
			for _, v := range w.vms {
				if v.Name == list[0].VM {
					if v.host != i || v.to >= 0 {
						t.Fatalf("%s is on host %d, on its way to %d: %+v", v.Name, v.host, v.to,
							list[0])
					}
					fmt.Sscan(list[0].To, &v.to)
					v.left = list[0].Total
					v.starts = append(v.starts, w.now)
				}
			}
		}
	}
}

func TestGuard(t *testing.T) {
	here, vms, others := pair()
	g := Guard{Policy: DefaultPolicy}
	g.Policy.Limits.MaxLoad = 1.05
	now := time.Unix(1e9, 0)
	observe := func(after time.Duration, under int, want string) {
		t.Helper()
		now = now.Add(after)
		list, why := g.Observe(now, here, vms, others, under)
		if len(list) > 0 {
			why = "evict " + list[0].VM
		}
		if !strings.Contains(why, want) {
			t.Errorf("%s; want %s", why, want)
		}
	}
	observe(0, 0, "not for 30s yet")
	observe(29*time.Second, 0, "not for 30s yet")
	here.Waiting = 0
	observe(time.Second, 0, "goal is met")
	here.Waiting = 1
	observe(time.Second, 0, "not for 30s yet")
	observe(30*time.Second, 0, "evict small")
	observe(time.Second, 1, "under way")
	observe(60*time.Second, 0, "ended less than")
	vms[1].Moved = now
	observe(61*time.Second, 0, "evict big")
	vms[0].Moved = now
	observe(61*time.Second, 0, "not for 30s yet")
	observe(61*time.Second, 0, "stays for")
	observe(time.Second, 0, "less than 1m0s ago no eviction")
	observe(30*time.Minute, 0, "evict small")
	others = nil
	observe(time.Second, 0, "not for 30s yet")
	observe(30*time.Second, 0, "no host to go to")
}

// A VM is checked last, and only where it would go. What a check refuses stays in the list, and the
// next best is chosen.
func TestCheck(t *testing.T) {
	here, vms, others := pair()
	others = append(others, others[0])
	others[1].Name, others[1].Used = "c", 0.1
	var asked []string
	check := func(refuse ...string) {
		asked = nil
		for i, v := range vms {
			vms[i].Check = func(to string) string {
				pair := v.Name + " to " + to
				asked = append(asked, pair)
				if slices.Contains(refuse, pair) {
					return to + " has it already"
				}
				return ""
			}
		}
	}
	choose := func() string {
		list := Choose(here, vms, others, DefaultGoal, DefaultLimits)
		if len(list) != 4 {
			t.Errorf("%+v", list)
		}
		if list[0].Refused != "" {
			return list[0].Refused
		}
		return list[0].VM + " to " + list[0].To
	}
	check()
	if c := choose(); c != "small to b" || !slices.Equal(asked, []string{"small to b"}) {
		t.Errorf("%q, after %q", c, asked)
	}
	check("small to b")
	if c := choose(); c != "small to c" || len(asked) != 2 {
		t.Errorf("%q, after %q", c, asked)
	}
	check("small to b", "small to c", "big to b", "big to c")
	if c := choose(); !strings.HasSuffix(c, "has it already") || len(asked) != 4 {
		t.Errorf("%q, after %q", c, asked)
	}
	check()
	vms[1].Pinned = true
	if c := choose(); c != "big to b" || len(asked) != 1 {
		t.Errorf("%q, after %q", c, asked)
	}
	vms[1].Pinned = false

	check("small to b", "big to b", "big to c")
	list := Evacuate(here, vms, others, DefaultLimits, Evacuation{})
	if len(list) != 2 || list[0].VM != "small" || list[0].To != "c" || list[1].VM != "big" ||
		list[1].Refused != "b has it already; c would starve: 2.10 cores wanted, of 1" {
		t.Errorf("%+v", list)
	}
	for _, pair := range asked {
		if pair == "big to c" {
			t.Error("it was checked for a host that would starve")
		}
	}
}
