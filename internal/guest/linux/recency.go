package linux

import (
	"math"
	"time"
)

// What of the scheduler says when a task ran, tried on Linux 5.10 to 7.3:
//
//   - se.exec_start is set whenever the task's run time is added up: when it is given a
//     CPU, at each tick while it runs, and when it gives it up. So it is when the task last ran, to
//     within a tick, for tasks of all scheduling classes but those that are stopped. It
//     counts by clock_task of the CPU's run queue, which leaves out interrupts and, in virtual
//     machines, time that the host has stolen. It must not be compared with anything else. It is
//     0 from when the task moves to another CPU until it runs there.
//   - sched_info.last_arrival is when the task was last given a CPU, by the run queue's
//     clock, which all CPUs share but for small differences.
//   - The run queue's own clocks stand still while its CPU is idle. The latest of all CPUs is
//     taken for now: a guest in which nothing at all has run for a while was frozen, for all that
//     can be said, when something last ran.
//   - se.avg.util_avg is the share of a CPU that the task used, an average whose weights halve
//     every 32 periods of 1024 µs (PELT, kernel/sched/pelt.c). It is brought up to date
//     together with exec_start, but not while the task sleeps or waits: so it decays here by
//     the time since the last run.
//
// The run queue is found by way of the task's cfs_rq, which takes no symbols and so works
// with kernels before 6.0, too.

// runQueue has the clocks of a CPU, in ns.
type runQueue struct{ clock, clockTask uint64 }

const (
	// DefaultActive is within which time a process must have run to be active, by the paper.
	DefaultActive = 16 * time.Second

	halfLife = 32 * 1024 * time.Microsecond
	window   = 100 * time.Millisecond // of pageclass.Process.Recent
)

// Limits of what is read of run queues.
const (
	maxQueues    = 1 << 14
	maxClockSpan = 512 // bytes that hold both clocks
)

// readClocks fills census.queues with the clocks of each cfs_rq in use, and returns the
// latest of all.
func (g *Guest) readClocks() (now uint64, err error) {
	c := &g.census
	l := &c.layout
	clear(c.queues)
	queues := c.addrs[:0]
	for _, t := range c.threads {
		if _, ok := c.queues[t.queue]; !ok && len(queues) < maxQueues {
			c.queues[t.queue] = runQueue{}
			queues = append(queues, t.queue)
		}
	}
	c.addrs = queues
	at := c.more[:0]
	for _, q := range queues {
		at = append(at, q+l.queueRQ.offset)
	}
	c.more = at
	buf := c.room(uint64(len(at)) * 8)
	if err := g.gather(buf, 8, at); err != nil {
		return 0, err
	}
	first := min(l.clock.offset, l.clockTask.offset)
	span := max(l.clock.offset, l.clockTask.offset) - first + 8
	for i := range at {
		at[i] = u64(buf[i*8:]) + first
	}
	buf = c.room(uint64(len(at)) * span)
	if err := g.gather(buf, span, at); err != nil {
		return 0, err
	}
	for i, q := range queues {
		b := buf[uint64(i)*span:]
		r := runQueue{u64(b[l.clock.offset-first:]), u64(b[l.clockTask.offset-first:])}
		if r.clock > math.MaxInt64 || r.clockTask > math.MaxInt64 {
			continue // nonsense
		}
		c.queues[q] = r
		now = max(now, r.clock)
	}
	return now, nil
}

// since returns how long ago a thread ran. Times that the guest has wrong are 0, or long ago.
func (t *thread) since(now uint64, q runQueue) time.Duration {
	if t.onCPU {
		return 0
	}
	ago := now // since the guest started
	if t.arrival != 0 {
		ago = min(ago, now-min(now, t.arrival))
	}
	if t.execStart != 0 && q.clock != 0 {
		idle := now - min(now, q.clock)
		ago = min(ago, q.clockTask-min(q.clockTask, t.execStart)+idle)
	}
	return time.Duration(min(ago, math.MaxInt64))
}

// sumUp fills in when and how much each process ran.
func (g *Guest) sumUp(active time.Duration) error {
	c := &g.census
	now, err := g.readClocks()
	if err != nil {
		return err
	}
	if now == 0 && len(c.threads) > 0 {
		c.doubt("its run queues have no clocks")
	}
	for i := range c.processes {
		c.processes[i].LastRun = math.MaxInt64
	}
	for i := range c.threads {
		t := &c.threads[i]
		if t.process < 0 {
			continue
		}
		p := &c.processes[t.process]
		ago := t.since(now, c.queues[t.queue])
		p.LastRun = min(p.LastRun, ago)
		p.OnCPU = p.OnCPU || t.onCPU
		share := float64(min(t.util, 1024)) / 1024 * math.Exp2(-float64(ago)/float64(halfLife))
		p.Recent += time.Duration(share * float64(window))
		p.CPUTime = add(p.CPUTime, t.runtime)
	}
	// Threads that have ended left their run time here.
	c.addrs = c.addrs[:0]
	for i := range c.processes {
		c.addrs = append(c.addrs, c.processes[i].signal+c.layout.pastRuntime.offset)
	}
	past := c.room(uint64(len(c.addrs)) * 8)
	if err := g.gather(past, 8, c.addrs); err != nil {
		return err
	}
	for i := range c.processes {
		p := &c.processes[i]
		p.CPUTime = add(p.CPUTime, u64(past[i*8:]))
		p.Active = p.LastRun <= active
	}
	return nil
}

// add adds ns to d, which stays within its type.
func add(d time.Duration, ns uint64) time.Duration {
	return time.Duration(min(uint64(d)+min(ns, math.MaxInt64), math.MaxInt64))
}
