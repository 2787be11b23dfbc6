package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"vacate/internal/guest/agent"
	"vacate/internal/guest/pageclass"
)

// guest is where the kernel tells of itself, and what the agent remembers of it.
type guest struct {
	proc, sys string
	small     []byte // for small files
	scanEmpty bool   // the kernel may have the ioctl PAGEMAP_SCAN
	scan      scanArg
	region    region

	prepared  sample // the last "prepare"
	processes int    // how many it was for
}

func newGuest(proc, sys string) *guest {
	return &guest{proc: proc, sys: sys, small: make([]byte, 16<<10), scanEmpty: true}
}

// check says what would keep the agent from its work.
func (g *guest) check() error {
	f, err := os.Open(g.proc + "/kpageflags")
	switch {
	case errors.Is(err, os.ErrPermission):
		return errors.New("/proc/kpageflags may not be read: run as root")
	case err != nil:
		return fmt.Errorf("%w: the kernel needs CONFIG_PROC_PAGE_MONITOR", err)
	}
	f.Close()
	_, err = g.lastFrame()
	return err
}

// survey is one under way.
type survey struct {
	pageclass.Survey
	g       *guest
	whole   bool   // all page flags were read
	entries []byte // for pagemap
}

// recentSpan is how old CPU times may be to compare with.
const recentSpan = 30 * time.Second

// survey finds out what it can until the time is over. Then incomplete is true. Page flags
// get at most half of the time, and of what is left the processes that matter most come first.
func (g *guest) survey(r *agent.Request,
	begin time.Time) (_ *pageclass.Survey, incomplete bool, err error) {
	// The rest is for coding and the way to the host.
	until := begin.Add(r.Deadline * 3 / 4)
	before := g.prepared
	if time.Since(before.at) > recentSpan {
		before.at = time.Now()
		if before.times, err = g.cpuTimes(); err != nil {
			return nil, false, err
		}
	}
	s := &survey{g: g, entries: make([]byte, 8<<16)}
	s.Pages, s.whole, err = g.readPages(r.Frames, begin.Add(r.Deadline/2))
	if err != nil {
		return nil, false, err
	}
	tasks, err := g.tasks(r.ActiveWithin, before, until)
	if err != nil {
		return nil, false, err
	}
	tasks = tasks[:min(len(tasks), 1<<16-1)]
	done := true
	for i := range tasks {
		s.Processes = append(s.Processes, tasks[i].Process)
	}
	for _, active := range []bool{true, false} {
		for i := range tasks {
			if tasks[i].Active == active {
				done = done && s.claim(uint16(i+1), &tasks[i], until)
			}
		}
	}
	read, err := s.readTables(until)
	if err != nil { // without /proc/kcore there are no accessed bits
		read = true
	}
	for i := range s.Pages { // the host takes it for a lie if something is known of an unknown page
		if s.Pages[i].Kind == pageclass.None {
			s.Pages[i] = pageclass.Page{}
		}
	}
	return &s.Survey, !s.whole || !done || !read, nil
}

// minClear is how many pages a process has whose accessed bits are worth clearing.
const minClear = 256

// prepare notes CPU times and clears the accessed bits of processes, until the time is over.
// Writing 1 to clear_refs does not flush TLBs. So a page that a CPU has just used may look unused
// until its entry falls out of that CPU's TLB.
func (g *guest) prepare(until time.Time) error {
	list, err := g.userPIDs()
	if err != nil {
		return err
	}
	n := 0
	for _, pid := range list {
		dir := g.proc + "/" + strconv.Itoa(pid)
		st, err := g.stat(dir)
		if err != nil || st.kernel || st.rss < minClear {
			continue
		}
		if time.Now().After(until) {
			break
		}
		if os.WriteFile(dir+"/clear_refs", []byte("1"), 0) == nil {
			n++
		}
	}
	times, err := g.cpuTimes()
	if err != nil {
		return err
	}
	g.prepared = sample{at: time.Now(), times: times}
	g.processes = n
	return nil
}

// answer does what a request asks and returns the frame to send.
func (g *guest) answer(r *agent.Request, begin time.Time) []byte {
	cpu := cpuTime()
	costs := func() *agent.Costs {
		c := &agent.Costs{Elapsed: time.Since(begin), CPU: cpuTime() - cpu, Prepared: -1,
			Processes: g.processes}
		if !g.prepared.at.IsZero() {
			c.Prepared = time.Since(g.prepared.at)
		}
		return c
	}
	if r.Prepare {
		if err := g.prepare(begin.Add(r.Deadline * 3 / 4)); err != nil {
			return agent.AppendRefusal(nil, r.ID, err.Error())
		}
		return agent.AppendDone(nil, r.ID, costs())
	}
	s, incomplete, err := g.survey(r, begin)
	if err != nil {
		return agent.AppendRefusal(nil, r.ID, err.Error())
	}
	return agent.AppendSurvey(nil, r.ID, costs(), s, incomplete, r.MaxBytes)
}

// cpuTime is this process's.
func cpuTime() time.Duration {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// print shows what the host would be told.
func (g *guest) print(w io.Writer) error {
	begin, cpu := time.Now(), cpuTime()
	r := &agent.Request{Deadline: time.Minute, ActiveWithin: agent.DefaultActiveWithin,
		MaxBytes: 64 << 20, Frames: 1 << 32}
	s, _, err := g.survey(r, begin)
	if err != nil {
		return err
	}
	costs := &agent.Costs{Elapsed: time.Since(begin), CPU: cpuTime() - cpu, Prepared: -1}
	frame := agent.AppendSurvey(nil, 0, costs, s, false, r.MaxBytes)
	fmt.Fprintf(w, "%d pages, %d processes, %d bytes, in %v (CPU %v)\n", len(s.Pages),
		len(s.Processes), len(frame),
		costs.Elapsed.Round(time.Millisecond), costs.CPU.Round(time.Millisecond))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "class\tpages\tMiB\t\n")
	for c, n := range s.Counts() {
		if n > 0 {
			fmt.Fprintf(t, "%v\t%d\t%.1f\t\n", pageclass.Class(c), n, float64(n)/256)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	type sum struct{ owned, accessed int }
	sums := make([]sum, len(s.Processes)+1)
	for _, p := range s.Pages {
		sums[p.Owner].owned++
		if p.Flags&pageclass.Accessed != 0 {
			sums[p.Owner].accessed++
		}
	}
	fmt.Fprintf(w, "\naccessed bits are fresh: %v\n", s.Fresh)
	fmt.Fprint(t, "process\tname\tactive\tlast run\tCPU\trecent\tpages\taccessed\t\n")
	for i, p := range s.Processes {
		fmt.Fprintf(t, "%d\t%q\t%v\t%v\t%v\t%v\t%d\t%d\t\n", p.PID, p.Name, p.Active,
			p.LastRun.Round(time.Microsecond),
			p.CPUTime.Round(time.Millisecond), p.Recent.Round(time.Microsecond), sums[i+1].owned,
			sums[i+1].accessed)
	}
	return t.Flush()
}

// forget gives the memory of an answer back to the guest.
func forget() { debug.FreeOSMemory() }
