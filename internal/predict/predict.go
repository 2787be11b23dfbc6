// Package predict tells beforehand what comes of an eviction: what it gains, and how long it takes.
// It calculates with numbers alone. All CPU is in cores, all sizes are in bytes.
//
// A host's VMs want some CPU: what they have and what they wait for. As long as that fits into its
// cores, each gets what it wants; beyond, they get the cores there are. The gain of an eviction is
// how many more cores the VMs of both hosts get together.
//
// How long it takes follows from the memory to be moved, as post-copy moves each page once:
//
//	transfer   until the VM runs on the other host, and the others have this one for themselves
//	total      transfer, then all memory in use over the link
//	back       until all VMs together do 90 % of what they will in the end
//
// back is between the two. Moving memory takes CPU at both ends, engineCost for each byte, which
// goes ahead of VMs. Should they not do 90 % with what that leaves of the hosts' cores, back is
// total.
//
// Otherwise, those that stay are back when the VM has moved. Should they be 90 % of all, back is
// transfer. If not, the VM that moved must reach the share x of its own speed that is missing.
// While it lacks pages it waits for those that it touches, each fetchCost times as long as what it
// does with one. With the share p of its hot memory there, its speed is 1 ÷ (1 + fetchCost (1-p)),
// so that it is at x once p = 1 - (1÷x - 1) ÷ fetchCost; and hot memory goes first.
package predict

import (
	"math"
	"time"
)

// VM is a VM that may be evicted.
type VM struct {
	CPU, Waiting float64 // cores its vCPUs have, and cores they wait for
	Overhead     float64 // cores that the rest of its QEMU uses
	InUse        uint64  // what has to be sent
	Hot          uint64  // of that, what it works on
}

// Wants is the CPU that the VM would use if it got it.
func (v VM) Wants() float64 { return v.CPU + v.Waiting }

// Likely is the CPU that the VM will most likely use if it gets it. A vCPU that shares a core waits
// half of the time, whether it wants all of a core or little more than it has.
func (v VM) Likely() float64 { return v.CPU + v.Waiting/2 }

// Host is a host with its VMs.
type Host struct {
	CPUs    float64
	Used    float64 // by everything on it
	Waiting float64 // what its VMs want beyond that
}

// Wants is the CPU that all on the host would use if they got it.
func (h Host) Wants() float64 { return h.Used + h.Waiting }

func (h Host) likely() float64 { return h.Used + h.Waiting/2 }

// Without is the host once a VM has left it: what it had, those take that wait.
func (h Host) Without(v VM) Host {
	waiting := max(0, h.Waiting-v.Waiting)
	taken := min(waiting, v.CPU+v.Overhead)
	h.Used, h.Waiting = max(0, h.Used-v.CPU-v.Overhead)+taken, waiting-taken
	return h
}

// With is the host once a VM has come to it.
func (h Host) With(v VM) Host {
	// Without its overhead: a host that has just the cores for a VM is good enough.
	wants := h.Wants() + v.Wants()
	h.Used, h.Waiting = min(wants, h.CPUs), max(0, wants-h.CPUs)
	return h
}

// Move is an eviction that may be.
type Move struct {
	VM       VM
	From, To Host
	// Stay is the sum of what is likely of all other VMs on the host that the VM leaves.
	Stay     float64
	Rate     float64       // bytes per second that go between the hosts; 0: not known
	Transfer time.Duration // how long execution transfer takes
}

// Outcome is what comes of it.
type Outcome struct {
	Gain float64 // cores that all VMs together get more
	// Load is what is wanted for each core once it has moved, here and there.
	LoadHere, LoadThere float64
	// What takes so long, from the decision on. Back and Total are 0 if the rate is not known.
	Transfer, Back, Total time.Duration
}

// loadOfTwice is the load of the other host that weighs as much as twice the time until all are
// back. Its unit is what is wanted for each core.
const loadOfTwice = 0.25

// Cost orders the moves that relieve a host: the least is the best. It weighs the time until all
// are back against the load of the other host, so that noise in one does not outweigh a plain
// difference in the other. It has no unit.
func (o Outcome) Cost() float64 {
	return math.Log2(max(o.Back, time.Millisecond).Seconds()) + o.LoadThere/loadOfTwice
}

// Outcome tells what comes of a move.
func (m Move) Outcome() Outcome {
	left, come := m.From.Without(m.VM), m.To.Wants()+m.VM.Wants()
	o := Outcome{
		Gain: left.Used + min(come, m.To.CPUs) - min(m.From.Used, m.From.CPUs) -
			min(m.To.Used, m.To.CPUs),
		LoadHere: left.Wants() / m.From.CPUs, LoadThere: come / m.To.CPUs, Transfer: m.Transfer,
	}
	if m.Rate > 0 {
		o.Total = o.Transfer + OverLink(m.VM.InUse, m.Rate)
		o.Back = o.Total
		if share, ok := m.hotShare(); ok {
			o.Back = o.Transfer +
				time.Duration(share*float64(OverLink(min(m.VM.Hot, m.VM.InUse), m.Rate)))
		}
	}
	return o
}

// OverLink is how long bytes take at a rate.
func OverLink(bytes uint64, rate float64) time.Duration {
	const most = 10000 * time.Hour // longer than anybody waits, and a duration to calculate with
	return time.Duration(min(float64(bytes)/rate, most.Seconds()) * 1e9)
}

// fetchCost is how much longer a guest waits for a page from the other host than it works with one
// that it has: some 0.5 ms to 50 µs.
const fetchCost = 10

// engineCost is the CPU that it takes to send or to receive a byte, in seconds. Measured with TLS:
// 4.2 ns to send, 4.4 to 9.6 to receive and place.
const engineCost = 5e-9

// engineMost is how many cores sending or receiving takes at most: it is the work of one thread.
const engineMost = 1.0

// Back is the share of their final speed at which VMs count as recovered, as in the paper.
const Back = 0.9

// hotShare is the share of the VM's hot memory that must have arrived for all to be back. It is
// false if all are only when the engines, which take some CPU at both ends, are done.
func (m Move) hotShare() (share float64, ok bool) {
	wants := m.VM.Likely()
	// The share that each gets of what it wants, of the host that the VM has left and of the one
	// that it has come to.
	left := m.From.likely() - wants - m.VM.Overhead
	come := m.To.likely() + wants + m.VM.Overhead
	engine := min(engineMost, m.Rate*engineCost)
	final := Back * (m.Stay*got(left, m.From.CPUs) + wants*got(come, m.To.CPUs))
	reach := final - m.Stay*got(left, m.From.CPUs-engine)
	if reach <= 0 {
		return 0, true
	}
	most := wants * got(come, m.To.CPUs-engine) // with all of its memory
	if reach > most {
		return 0, false
	}
	return max(0, 1-(most/reach-1)/fetchCost), true
}

// got is the share of the CPU wanted that is got.
func got(wanted, cpus float64) float64 {
	if wanted <= 0 {
		return 1
	}
	return min(1, max(0, cpus)/wanted)
}
