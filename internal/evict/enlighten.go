package evict

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime/debug"
	"strings"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/evict/pushorder"
	"vacate/internal/guest/agent"
	"vacate/internal/guest/linux"
	"vacate/internal/guest/pageclass"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/sys/sched"
)

// Enlightenment is the source of what is known about the use of the guest's pages.
type Enlightenment string

// The places.
const (
	Auto Enlightenment = "auto" // the guest's memory; failing that its agent
	// the guest's own page descriptors, read from outside once it is frozen
	Host Enlightenment = "host"
	// an agent in the guest, asked while it still runs. Its answer never makes the engine leave a
	// page out
	Agent Enlightenment = "agent"
	Off   Enlightenment = "off"
)

// Enlightenments lists them.
func Enlightenments() []Enlightenment { return []Enlightenment{Auto, Host, Agent, Off} }

// Limits of what a survey may take: the VM's host is overloaded, and its guest may be hostile.
const (
	lookLimit   = 5 * time.Second  // to find its kernel; the agent has a limit of its own
	surveyLimit = 15 * time.Second // for all that runs beside the push, of a small VM
	// surveyLimitGiB comes on top for each GiB of memory: more than twice the CPU time it takes
	// (docs/results/growth.md).
	surveyLimitGiB = 100 * time.Millisecond
)

// surveyLimit returns how long all may take that runs beside the push. With one limit for all VMs,
// large ones would lose the survey, and their memory would go by address.
func (l layout) surveyLimit() time.Duration {
	size := uint64(0)
	for _, b := range l {
		size += b.Length
	}
	return surveyLimit + time.Duration(size>>30)*surveyLimitGiB
}

// survey is what is known about the guest's pages.
type survey struct {
	agent   string // the agent's socket; empty if it cannot be asked, for the reason in noAgent
	noAgent error
	// These two take many bytes a page, and are nil once the push follows what they say.
	guest *linux.Guest      // nil if the engine cannot look into it, too
	pages *pageclass.Survey // nil until it is made, too

	classes [][]pageclass.Class // of each page, by block; nil unless the push follows the survey
	report  Enlightening
}

// findAgent finds out whether an agent in the guest can be asked.
func (e *source) findAgent(ctx context.Context) {
	if e.mayLook() && e.Enlightenment != Host {
		e.survey.agent, e.survey.noAgent = agent.Find(ctx, e.owner.monitor())
	}
}

// look does the part of the survey that needs a running guest: only a running agent can answer. All
// else waits for the freeze, as the VMs of this host starve until then.
func (e *source) look(ctx context.Context) {
	if e.survey.agent != "" {
		e.lookInside(ctx)
	}
}

// mayLook reports whether the engine may learn anything about the guest's pages.
func (e *source) mayLook() bool {
	return e.Enlightenment != Off && (e.Order.Knows() || !e.SendFree)
}

// lookInside looks into the guest or asks its agent, as the setting says. If both fail, the engine
// pushes the pages in address order.
func (e *source) lookInside(ctx context.Context) {
	s := &e.survey
	start := time.Now()
	if e.Enlightenment != Agent {
		var err error
		if s.guest, err = e.attach(ctx); err == nil {
			s.report.Source, s.report.Kernel = Host, s.guest.Release()
		} else {
			s.doubt("cannot look into the guest from outside", err)
		}
	}
	if e.Enlightenment == Agent || e.Enlightenment == Auto && s.guest == nil {
		err := s.noAgent
		if err == nil {
			err = e.ask(ctx, s.agent)
		}
		if err == nil {
			s.report.Source = Agent
		} else {
			s.doubt("the guest's agent", err)
		}
	}
	s.report.Attach = time.Since(start).Seconds()
}

// agentTime is how long the guest's agent may take to answer. It is a variable so that tests on a
// loaded machine can set a longer time.
var agentTime = agent.DefaultDeadline

// ask asks the guest's agent, behind a socket, what its pages are used for.
func (e *source) ask(ctx context.Context, path string) error {
	client, err := agent.Dial(ctx, path)
	if err != nil {
		return err
	}
	defer client.Close()
	end := uint64(0)
	for _, m := range e.mem.Mappings() {
		end = max(end, (m.GPA+m.Size)/migstream.TargetPageSize)
	}
	survey, stats, err := client.Ask(ctx, agent.Options{Frames: end, Deadline: agentTime})
	if err != nil {
		return err
	}
	e.survey.pages, e.survey.report.AnswerBytes, e.survey.report.AnswerCPU = survey, stats.Bytes,
		stats.CPU.Seconds()
	return nil
}

func (e *source) attach(ctx context.Context) (*linux.Guest, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lookLimit,
		fmt.Errorf("it took longer than %v", lookLimit))
	defer cancel()
	return attachGuest(ctx, e.mem, monitor{e})
}

// monitor answers package linux's questions about the VM's QEMU. Once QEMU is stopped, it repeats
// what QEMU said before.
type monitor struct{ *source }

// HMP implements linux.Monitor.
func (m monitor) HMP(ctx context.Context, line string) (string, error) {
	if r := m.image.registers.Load(); r != nil {
		return r.HMP(ctx, line)
	}
	return m.owner.monitor().HMP(ctx, line)
}

// attachGuest gets ready to look at the pages of a guest, which may be running.
func attachGuest(ctx context.Context, m *guestmem.Memory, q linux.Monitor) (*linux.Guest, error) {
	live, err := linux.NewLive(m, q)
	if err != nil {
		return nil, err
	}
	guest, err := linux.Attach(ctx, live)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return guest, err
}

func (s *survey) doubt(what string, err error) {
	if s.report.Doubts != "" {
		s.report.Doubts += "; "
	}
	s.report.Doubts += what + ": " + strings.ReplaceAll(err.Error(), "\n", "; ")
}

// enlighten learns what the frozen guest's pages are used for, and makes the push follow that. By
// then the guest may run at the destination, and the push may be under way. It gives way to the VMs
// of this host, which starved until now.
func (e *source) enlighten() {
	e.tasks.Go(func() {
		sched.Patiently(func() {
			e.tellHuge()
			e.leaveOutUnused()
		})
	})
	sched.Patiently(e.learn)
}

// unusedStep is how much memory leaveOutUnused checks in one go.
const unusedStep = 64 << 20

// leaveOutUnused leaves out pages for which QEMU has no memory: it never had any, or gave it back
// (a balloon's, virtio-mem's). Otherwise they would be sent as zeroes, and a shared memory file at
// the destination would then have memory for them. Reading them would cost time, too.
func (e *source) leaveOutUnused() {
	for i, b := range e.image.frozen.layout {
		step := int(max(1, unusedStep/b.PageSize))
		for first := 0; first < b.Pages; first += step {
			_, unused, err := e.image.frozen.split(pageset.Run{Block: i, First: pageset.Page(first),
				Count: min(step, b.Pages-first)})
			if errors.Is(err, guestmem.ErrGone) {
				return // the eviction is over
			} else if err != nil {
				e.Log.Warn("memory that the VM never used is sent, too", "error", err)
				return
			}
			e.leaveOut(unused, pushorder.Unused)
		}
	}
	e.image.unusedKnown.Store(true)
}

// leaveOut leaves out the given pages that were not sent yet, and tells the destination.
func (e *source) leaveOut(runs []pageset.Run, why pushorder.Reason) {
	out := e.departures.take(runs, why)
	e.departures.count(why, out)
	if a := e.at.Load(); a != nil { // else the destination hears of them when it is back
		if err := sendSkipped(a, out); err != nil {
			a.FailSoon(err)
		}
	}
}

// leaveOutFree leaves out the free pages, a few at a time: fetches must not wait until all are
// taken.
func (e *source) leaveOutFree(runs iter.Seq[pageset.Run]) {
	var some []pageset.Run
	for r := range runs {
		if some = append(some, r); len(some) == maxRuns {
			e.leaveOut(some, pushorder.Skipped)
			some = some[:0]
		}
	}
	e.leaveOut(some, pushorder.Skipped)
}

// learn does enlighten's work.
func (e *source) learn() {
	limit := e.image.frozen.layout.surveyLimit()
	ctx, cancel := e.bound(context.Background(), limit,
		fmt.Errorf("it took longer than %v", limit))
	defer cancel()
	if e.mayLook() && e.survey.agent == "" { // else look has done it
		e.lookInside(ctx)
	}
	start := time.Now()
	survey, guest := e.survey.pages, e.survey.guest
	e.survey.pages, e.survey.guest = nil, nil
	frames := e.image.frozen.frames()
	var first []pageset.Run
	if guest != nil && e.Order.Base == pushorder.Enlightened {
		list, err := guest.First(ctx)
		if err == nil { // else the survey says the same
			first = pushorder.Locate(e.image.frozen.layout.blocks(), list, frames)
			e.departures.plan(pushorder.PlanOf(first))
			e.survey.report.First = e.halted.since()
		}
	}
	mayLeaveOut := guest != nil && !e.SendFree
	if guest != nil {
		r, err := guest.Survey(ctx)
		guest = nil
		if err != nil {
			e.survey.doubt("the frozen guest has changed", err)
			return
		}
		survey = &r.Survey
		e.survey.report.Notes = r.Notes
		e.survey.report.Stages = &r.Timings
	}
	if survey == nil {
		return
	}
	e.departures.plan(pushorder.NewPlan(e.Order, e.image.frozen.layout.blocks(), survey, frames,
		first...))
	e.survey.report.Survey = time.Since(start).Seconds()
	e.survey.report.Known = e.halted.since()
	e.keepKnown(survey, frames, mayLeaveOut)
}

// keepKnown keeps of the survey what the engine needs after the plan, and leaves out the free pages
// if it may. The engine may be one of many on a host that is short of memory. So the survey's list
// of pages, which is larger than all that is kept, goes before more is made of the rest of it.
func (e *source) keepKnown(survey *pageclass.Survey, frames []pushorder.Frames, mayLeaveOut bool) {
	blocks := e.image.frozen.layout.blocks()
	if mayLeaveOut {
		e.leaveOutFree(pushorder.Skippable(blocks, survey, frames))
	}
	e.survey.classes = e.image.frozen.layout.classes(survey.Pages, frames)
	survey.Pages = nil
	if e.Map != nil {
		e.departures.trace.learn(e.survey.classes)
	}
	debug.FreeOSMemory()
	// Until this is known, neighbours are those in physical memory.
	e.departures.relate(pushorder.NewKinship(e.Order, blocks, survey, frames))
}

// frames returns which guest page frames fill which pages of the blocks. It leaves out blocks that
// the guest sees at several addresses, and pages that it sees only in part.
func (f *frozen) frames() []pushorder.Frames {
	var frames []pushorder.Frames
	seen := make([]*pageset.Set, len(f.layout))
	twice := make([]bool, len(f.layout))
	for _, m := range f.mem.Mappings() {
		i := -1
		for n, j := range f.index {
			if j == m.Block {
				i = n
			}
		}
		if i < 0 || m.GPA%migstream.TargetPageSize != 0 || m.Offset >= f.layout[i].Length {
			continue
		}
		b := f.layout[i]
		skip := (b.PageSize - m.Offset%b.PageSize) % b.PageSize
		size := min(m.Size, b.Length-m.Offset)
		if size < skip+b.PageSize || (m.GPA+skip)%migstream.TargetPageSize != 0 {
			continue
		}
		run := pageset.Run{Block: i, First: pageset.Page((m.Offset + skip) / b.PageSize),
			Count: int((size - skip) / b.PageSize)}
		frames = append(frames,
			pushorder.Frames{First: (m.GPA + skip) / migstream.TargetPageSize, Run: run})
		if seen[i] == nil {
			seen[i] = pageset.New(b.Pages)
		}
		if seen[i].AddRun(run.First, run.Count) != run.Count {
			twice[i] = true
		}
	}
	once := frames[:0]
	for _, fr := range frames {
		if !twice[fr.Run.Block] {
			once = append(once, fr)
		}
	}
	return once
}

// Enlightening is what was known about the guest's pages, and how it was used.
type Enlightening struct {
	Source Enlightenment `json:"source"`           // host or agent; off if nothing was known
	Doubts string        `json:"doubts,omitempty"` // why less was known than was asked for
	Kernel string        `json:"kernel,omitempty"` // the guest's own name of its version
	// finding its kernel, or waiting for the agent's answer
	Attach float64 `json:"attach_s"`
	// learning the pages' use when it was frozen, up to the plan
	Survey float64 `json:"survey_s"`
	// from the freeze until the first pages of the plan were known; 0 if none ever was
	First float64 `json:"first_known_s"`
	// from the freeze until all of the plan was known; in an engine that resumed the eviction, from
	// its start
	Known float64 `json:"known_s"`
	// Notes are what the survey found odd in the guest, above all why the engine does not leave
	// free pages out.
	Notes []string `json:"notes,omitempty"`
	// Stages break down the time of package linux's survey.
	Stages *linux.Timings `json:"stages_ns,omitempty"`
	// AnswerBytes and AnswerCPU are the size of the agent's answer and the CPU time it took in the
	// guest.
	AnswerBytes int     `json:"answer_bytes,omitempty"`
	AnswerCPU   float64 `json:"answer_cpu_s,omitempty"`
	// Classes counts all pages by what they were used for; it is empty if nothing was known.
	Classes []ClassCount `json:"classes"`
}

// ClassCount counts the pages of a class by how they came to the destination.
type ClassCount struct {
	Class   pageclass.Class `json:"class"`
	Pages   int             `json:"pages"`
	Bytes   uint64          `json:"bytes"` // of pages sent with their content
	Early   int             `json:"early"`
	Pushed  int             `json:"pushed"` // by the plan
	Near    int             `json:"near"`
	Fetched int             `json:"fetched"` // the guest's first use came before the push
	// of those pushed and near: the guest used them first while they were on their way
	Late    int `json:"late"`
	Skipped int `json:"skipped"`
	Unused  int `json:"unused"`
	Zero    int `json:"zero"`
}

// account sums up by class. Nothing may be sent any more.
func (e *source) account() Enlightening {
	r := e.survey.report
	classes := e.survey.classes
	if classes == nil {
		r.Source = Off
		return r
	}
	var counts [pageclass.Classes]ClassCount
	e.departures.each(e.image.frozen.layout,
		func(i int, p pageset.Page, why pushorder.Reason, late bool) {
			c := &counts[classes[i][p]]
			c.add(why)
			if late {
				c.Late++
			}
			switch {
			case e.image.pushed.wasZero(i, p) || e.image.fetched.wasZero(i, p):
				c.Zero++
			case why != pushorder.Left && why != pushorder.Skipped && why != pushorder.Unused:
				c.Bytes += e.image.frozen.layout[i].PageSize
			}
		})
	for c, count := range counts {
		if count.Class = pageclass.Class(c); count.Pages > 0 {
			r.Classes = append(r.Classes, count)
		}
	}
	return r
}

// classes returns the class of each page, by block. A huge page counts as the first class, in the
// paper's order, of any page in it.
func (l layout) classes(surveyed []pageclass.Page, frames []pushorder.Frames) [][]pageclass.Class {
	classes := make([][]pageclass.Class, len(l))
	for i, b := range l {
		classes[i] = make([]pageclass.Class, b.Pages)
	}
	for _, f := range frames {
		each := l[f.Run.Block].PageSize / migstream.TargetPageSize
		for i := range f.Run.Count {
			from := min(f.First+uint64(i)*each, uint64(len(surveyed)))
			class := pageclass.Unknown
			for _, p := range surveyed[from:min(from+each, uint64(len(surveyed)))] {
				if class == pageclass.Unknown || p.Class != pageclass.Unknown && p.Class < class {
					class = p.Class
				}
			}
			classes[f.Run.Block][f.Run.First+pageset.Page(i)] = class
		}
	}
	return classes
}

// add counts a page by how it went.
func (c *ClassCount) add(why pushorder.Reason) {
	c.Pages++
	switch why {
	case pushorder.Early:
		c.Early++
	case pushorder.Planned:
		c.Pushed++
	case pushorder.Near:
		c.Near++
	case pushorder.Fetched:
		c.Fetched++
	case pushorder.Skipped:
		c.Skipped++
	case pushorder.Unused:
		c.Unused++
	}
}

// wasZero reports whether a page was sent as a page of zeroes.
func (fr *frame) wasZero(block int, p pageset.Page) bool {
	return fr.zeros != nil && fr.zeros[block].Has(p)
}
