package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Fetch is where the time of one touch of a missing page went, from the touch to the guest's next
// step.
type Fetch struct {
	At   time.Duration // of the touch, on the host's monotonic clock
	Took time.Duration
	// Steps has how long each of FetchSteps took. It is nil if the page came otherwise: the push
	// brought it before the source answered.
	Steps []FetchStep
	// Others is how long, of Took, the core of the guest's host ran what belongs neither to the
	// hosts' engines and VMs nor to the kernel.
	Others time.Duration
}

// FetchStep is one step of a fetch.
type FetchStep struct{ Took, Others time.Duration }

// FetchSteps are the steps of a fetch, in their order, and the host on whose core each happens.
var FetchSteps = []struct{ Name, Host string }{
	{"the kernel tells QEMU's fault thread", "b"},
	{"that thread waits for the core", "b"},
	{"it writes its request", "b"},
	{"the engine takes it and sends it on", "b"},
	{"the link, and the source's engine gets the core", "a"},
	{"it looks up what to send", "a"},
	{"it reads the page", "a"},
	{"it sends it; the link; the engine gets the core", "b"},
	{"the engine takes the page", "b"},
	{"it places the page", "b"},
	{"the vCPU waits for the core", "b"},
	{"the guest goes on", "b"},
}

// The processes of a run, as a trace tells them apart.
type party int

const (
	outsider party = iota
	twinQEMU
	sourceQEMU
	destinationEngine
	sourceEngine
	labItself
)

// parties are the threads of a run's processes. A trace adds those that start meanwhile.
type parties map[int]party

// add adds the threads that a process has now.
func (p parties) add(who party, pid int) error {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(tasks) == 0 {
		return fmt.Errorf("process %d has no threads", pid)
	}
	for _, t := range tasks {
		if tid, err := strconv.Atoi(filepath.Base(t)); err == nil {
			p[tid] = who
		}
	}
	return nil
}

// tracing moves the guest as move does, and finds the fetches.
func tracing(move func(*trial, context.Context) error) func(*trial, context.Context) error {
	return func(t *trial, ctx context.Context) error {
		p, err := t.parties()
		if err != nil {
			return err
		}
		k, err := startTrace()
		if err != nil {
			return err
		}
		moved := move(t, ctx)
		events, err := k.stop()
		if err = errors.Join(moved, err); err != nil {
			return err
		}
		t.run.Fetches, err = fetches(events, p, [2]int{t.vm.Host.Core, t.twin.Host.Core})
		return err
	}
}

// parties returns those of the trial, which is about to start the source's engine.
func (t *trial) parties() (parties, error) {
	p := parties{}
	for _, of := range []struct {
		who party
		pid int
	}{
		{labItself, os.Getpid()}, {sourceQEMU, t.vm.PID()}, {twinQEMU, t.twin.PID()},
		{destinationEngine, t.receiver.Process.Pid},
	} {
		if err := p.add(of.who, of.pid); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// follow adds the threads and processes that start in the trace. What the lab starts is the
// source's engine.
func (p parties) follow(events []traceEvent) {
	for i := range events {
		e := &events[i]
		if e.name != "sched_process_fork" {
			continue
		}
		switch who := p[e.number("pid=", 10)]; who {
		case outsider:
		case labItself:
			p[e.number("child_pid=", 10)] = sourceEngine
		default:
			p[e.number("child_pid=", 10)] = who
		}
	}
}

// requestPayload is the payload of a request on the fetch lane; frameHead that of any frame.
const (
	requestPayload = 16
	frameHead      = 12
)

// fetches finds the fetches of a VM with one vCPU in a trace. The hosts a and b have a core each.
func fetches(events []traceEvent, p parties, cores [2]int) ([]Fetch, error) {
	p.follow(events)
	vcpu, faults := -1, -1
	lane := "" // descriptor of the fetch lane at the destination
	for i := range events {
		e := &events[i]
		next := e.number("next_pid=", 10)
		switch {
		case e.name == "kvm_try_async_get_page" && p[e.tid] == twinQEMU:
			vcpu = e.tid
		case e.name == "sched_switch" && p[next] == twinQEMU && nextIs(e.rest, "mig/dst/fault",
			"fault-default", "postcopy/fault"):
			faults = next
		// A request is the destination's only frame of its size.
		case e.name == "sys_sendmsg ->" && p[e.tid] == destinationEngine && lane == "" &&
			e.result() == frameHead+requestPayload:
			lane = fieldOf(e.call, "fd:")
		}
	}
	if vcpu < 0 || faults < 0 || lane == "" {
		return nil,
			fmt.Errorf("the trace of %d events has no fetch: vCPU %d, fault thread %d, lane %q",
				len(events), vcpu, faults, lane)
	}
	others := [2]busy{othersOn(events, p, cores[0]), othersOn(events, p, cores[1])}
	var found []Fetch
	for i := range events {
		e := &events[i]
		if e.tid != vcpu || e.name != "kvm_try_async_get_page" {
			continue
		}
		if f, ok := follow(events[i:], p, vcpu, faults, lane, others); ok {
			found = append(found, f)
		}
	}
	return found, nil
}

// follow follows the fetch whose touch is the first event. It reports whether the guest went on.
func follow(events []traceEvent, p parties, vcpu, faults int, lane string,
	others [2]busy) (Fetch, bool) {
	gfn := events[0].number("gfn =", 16)
	begin := events[0].at
	end := slices.IndexFunc(events, func(e traceEvent) bool {
		return e.tid == vcpu && e.name == "kvm_mmu_set_spte" && e.number("gfn", 16) == gfn
	})
	if end < 0 {
		return Fetch{}, false
	}
	f := Fetch{At: begin, Took: events[end].at - begin}
	f.Others = others[1].within(begin, events[end].at)
	events = events[:end+1]
	at := 0
	// next finds the next event that fits, and notes when it was.
	marks := []time.Duration{begin}
	next := func(fits func(e *traceEvent) bool) bool {
		for i := at; i < len(events); i++ {
			if fits(&events[i]) {
				at = i
				marks = append(marks, max(events[i].at, marks[len(marks)-1]))
				return true
			}
		}
		return false
	}
	thread := 0
	toSwitch := func(tid int) func(*traceEvent) bool {
		return func(e *traceEvent) bool {
			return e.name == "sched_switch" && e.number("next_pid=", 10) == tid
		}
	}
	by := func(name string) func(*traceEvent) bool {
		return func(e *traceEvent) bool { return e.tid == thread && e.name == name }
	}
	ok := next(func(e *traceEvent) bool {
		return e.name == "sched_wakeup" && e.number("pid=", 10) == faults ||
			toSwitch(faults)(e)
	}) && next(func(e *traceEvent) bool {
		return toSwitch(faults)(e) || e.tid == faults
	}) && next(func(e *traceEvent) bool {
		return e.tid == faults && e.name == "sys_sendmsg"
	}) && next(func(e *traceEvent) bool {
		return p[e.tid] == destinationEngine && e.name == "sys_sendmsg" && e.field("fd:") == lane
	}) && next(func(e *traceEvent) bool {
		if p[e.tid] != sourceEngine || e.name != "sys_recvfrom ->" ||
			hexadecimal(fieldOf(e.call, "size:")) != requestPayload {
			return false
		}
		thread = e.tid
		return true
	}) && next(by("sys_process_vm_readv")) && next(by("sys_process_vm_readv ->")) &&
		next(func(e *traceEvent) bool {
			if p[e.tid] != destinationEngine || e.name != "sys_recvfrom ->" ||
				e.result() != frameHead || fieldOf(e.call, "fd:") != lane {
				return false
			}
			thread = e.tid
			return true
		}) && next(by("sys_ioctl")) && next(by("sys_ioctl ->")) && next(toSwitch(vcpu)) &&
		next(func(e *traceEvent) bool { return e == &events[len(events)-1] })
	if !ok {
		return f, true
	}
	for i, s := range FetchSteps {
		from, to := marks[i], marks[i+1]
		host := 1
		if s.Host == "a" {
			host = 0
		}
		f.Steps = append(f.Steps, FetchStep{to - from, others[host].within(from, to)})
	}
	return f, true
}

// busy are the spans, in their order, in which a core ran others.
type busy []struct{ from, to time.Duration }

// othersOn finds the spans in which a core ran what is neither a party's nor the kernel's.
func othersOn(events []traceEvent, p parties, core int) (b busy) {
	since := time.Duration(-1)
	for i := range events {
		e := &events[i]
		if e.cpu != core || e.name != "sched_switch" {
			continue
		}
		if since >= 0 {
			b = append(b, struct{ from, to time.Duration }{since, e.at})
			since = -1
		}
		tid := e.number("next_pid=", 10)
		if who := p[tid]; tid > 0 && (who == outsider || who == labItself) && !ofKernel(e.rest) {
			since = e.at
		}
	}
	return b
}

// ofKernel reports whether a switch is to one of the kernel's threads that a fetch may need.
func ofKernel(rest string) bool {
	return nextIs(rest, "kworker/", "ksoftirqd/", "rcu", "migration/")
}

// nextIs reports whether a switch is to a thread whose name begins so.
func nextIs(rest string, names ...string) bool {
	_, next, _ := strings.Cut(rest, "next_comm=")
	return slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(next, n) })
}

// within returns how much of a span others had.
func (b busy) within(from, to time.Duration) (sum time.Duration) {
	i, _ := slices.BinarySearchFunc(b, from, func(s struct{ from, to time.Duration },
		t time.Duration) int {
		return int(s.to - t)
	})
	for ; i < len(b) && b[i].from < to; i++ {
		sum += max(0, min(to, b[i].to)-max(from, b[i].from))
	}
	return sum
}

// quantile returns a quantile of values, by the nearest rank.
func quantile(values []time.Duration, q float64) time.Duration {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(len(sorted)-1, int(math.Ceil(q*float64(len(sorted))))-1)]
}

// FetchReport draws where the time of fetches goes, as text.
func FetchReport(w io.Writer, title string, all []Fetch) {
	var whole, alone, byPush []time.Duration
	steps, without := make([][]time.Duration, len(FetchSteps)), make([][]time.Duration,
		len(FetchSteps))
	for _, f := range all {
		if f.Steps == nil {
			byPush = append(byPush, f.Took)
			continue
		}
		whole, alone = append(whole, f.Took), append(alone, f.Took)
		for i, s := range f.Steps {
			steps[i] = append(steps[i], s.Took)
			without[i] = append(without[i], s.Took-s.Others)
			alone[len(alone)-1] -= s.Others
		}
	}
	fmt.Fprintf(w,
		"\n## %s\n\n%d touches of missing pages; the source answered %d, and the push was "+
			"first for %d.\n\n```\n", title, len(all), len(whole), len(byPush))
	const width = 28
	longest := time.Duration(1)
	for i := range steps {
		longest = max(longest, quantile(steps[i], 0.99))
	}
	fmt.Fprintf(w, "%-4s %-49s %9s %9s %9s   [µs]\n", "host", "step", "median", "p99", "of us")
	line := func(host, name string, took, mine []time.Duration) {
		bar := ""
		if host != "" {
			// by the square root, so that short steps can be seen
			n := func(d time.Duration) int {
				return int(width * math.Sqrt(float64(d)/float64(longest)))
			}
			median := min(width, n(quantile(took, 0.5)))
			bar = strings.Repeat("█", median) +
				strings.Repeat("░", max(0, min(width, n(quantile(took, 0.99)))-median))
		}
		fmt.Fprintf(w, "%-4s %-49s %9d %9d %9d   %s\n", host, name,
			quantile(took, 0.5).Microseconds(),
			quantile(took, 0.99).Microseconds(), quantile(mine, 0.99).Microseconds(), bar)
	}
	for i, s := range FetchSteps {
		line(s.Host, s.Name, steps[i], without[i])
	}
	line("", "the whole fetch", whole, alone)
	if len(byPush) > 0 {
		line("", "touches that the push answered", byPush, byPush)
	}
	fmt.Fprint(w, "```\n")
}
