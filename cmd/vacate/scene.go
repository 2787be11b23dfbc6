package main

import (
	"cmp"
	"fmt"
	"strings"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/qemu/fit"
	"vacate/internal/sys/units"
)

// A scene is who takes part in an eviction, as people call them.
type scene struct {
	vm      string
	other   string // the other host
	arrives bool   // the VM comes to this host
	verbose bool   // pages, rates and fetches, too
}

// sceneOf is that of an eviction of the daemon.
func sceneOf(e *hostv1.Eviction, verbose bool) scene {
	s := scene{vm: clean(e.Vm), other: clean(e.Peer), arrives: e.Role == "destination",
		verbose: verbose}
	if s.other == "" {
		s.other = clean(e.PeerAddress)
	}
	return s
}

// sentences say where the VM is in each state. In braces are the VM, the other host, what the VM
// does ("runs"), where it is at first and later ("here"), and how much of its memory has gone.
var sentences = map[evict.State]string{
	evict.Preparing:  "{vm} {runs} {first}; {waits}",
	evict.Switching:  "{vm} stands still; vacate saves its devices",
	evict.Loading:    "{vm} stands still; its twin loads its devices",
	evict.Committing: "{vm} stands still; {other} is told to take it",
	evict.InDoubt:    "{other} does not answer; {vm} may run there",
	evict.Pushing:    "{vm} {runs} {later}{down}; {share} of its memory has followed",
	evict.Reconnecting: "the link to {other} is lost; {vm} {runs} {later} with {share} of its " +
		"memory",
	evict.Retiring:    "{vm} {runs} {later} with all of its memory; its QEMU here ends",
	evict.RollingBack: "the move failed; {vm} goes on {first}",

	evict.Waiting:    "a QEMU waits here for {vm}",
	evict.Arming:     "{vm} {runs} {first}; its twin learns what memory it has",
	evict.Prepared:   "{vm} stands still; its twin is ready",
	evict.Running:    "{vm} {runs} {later}; {share} of its memory has come",
	evict.CutOff:     "the link to {other} is lost; {vm} {runs} {later} with {share} of its memory",
	evict.Completing: "{vm} {runs} {later} with all of its memory",

	evict.Completed: "{vm} {runs} {later} with all of its memory",
	evict.ShutDown:  "{vm} has shut itself down {later}",
	evict.Refused:   "{vm} stays {first}",
	evict.Aborted:   "{vm} stays {first}",
	evict.Lost:      "contact with {vm} is lost",
}

// tell says in a sentence where the VM is, then what may be left out for want of room.
func (s scene) tell(p evict.Progress) (sentence string, more []string) {
	runs, first, later := "runs", "here", "on "+s.other
	if p.Stands != "" {
		runs = "stands"
	}
	if s.arrives {
		first, later = later, first
	}
	waits := "vacate prepares the move to " + s.other
	if p.Awaits != "" {
		waits = fmt.Sprintf("%s: %d s", clean(p.Awaits), int(p.AwaitedFor.Seconds()))
	}
	share, down := "none", ""
	if p.Total > 0 {
		share = fmt.Sprintf("%.0f %%", wholePercent(p.Pages, p.Total))
	}
	if p.Down > 0 {
		down = " (down " + timeText(p.Down.Seconds()) + ")"
	}
	sentence = strings.NewReplacer("{vm}", s.vm, "{other}", s.other, "{runs}", runs, "{first}",
		first, "{later}", later, "{waits}", waits, "{share}", share, "{down}",
		down).Replace(cmp.Or(sentences[p.State], string(p.State)))
	switch on := p.State == evict.Pushing || p.State == evict.Running; {
	case on && p.Short != "":
		more = append(more, ", and it waits for memory there")
	case on && p.ETA > 0:
		more = append(more, ", "+etaText(p.ETA)+" left")
	}
	if p.Stands != "" {
		more = append(more, " (it "+clean(fit.Stands(p.Stands))+")")
	}
	if s.verbose && p.Pages > 0 {
		more = append(more, fmt.Sprintf(" [%s, %d/%d pages", p.State, p.Pages, p.Total))
		if p.Rate > 0 {
			more = append(more, ", "+bytesText(p.Rate)+"/s")
		}
		more = append(more, fmt.Sprintf(", %d fetches]", p.Fetches))
	}
	return sentence, more
}

// progressLine puts progress in at most width columns; what does not fit is left out, the least
// telling first.
func (s scene) progressLine(p evict.Progress, width int) string {
	sentence, more := s.tell(p)
	line := []rune(fmt.Sprintf("%6.1f s  %s", p.Elapsed.Seconds(), sentence))
	for _, m := range more {
		if len(line)+len([]rune(m)) > width {
			break
		}
		line = append(line, []rune(m)...)
	}
	return string(line[:min(len(line), max(width, 0))])
}

// wholePercent is rounded down: 100 is all.
func wholePercent(part, whole int) float64 { return float64(int(percent(part, whole))) }

// summary sums an eviction up: where the VM is, how long each part took, and how its memory went.
// What was not reached is left out, as are warnings where there are none.
func (s scene) summary(r evict.Report) string {
	var lines []string
	end := evict.State(r.Outcome)
	sentence, _ := s.tell(evict.Progress{State: end, Stands: r.Stood})
	if end == evict.ShutDown {
		sentence += ": " + clean(r.Reason)
	}
	if strings.HasPrefix(sentence, "the ") {
		sentence = strings.ToUpper(sentence[:1]) + sentence[1:]
	}
	lines = append(lines, sentence+".")
	var times []string
	add := func(format string, seconds *float64) {
		if seconds != nil {
			times = append(times, fmt.Sprintf(format, timeText(*seconds)))
		}
	}
	add("it stood still for %s", r.Down)
	if r.Stood != "" {
		add("it could run there after %s", r.Transfer)
	} else {
		add("it ran there after %s", r.Transfer)
	}
	add("the eviction took %s", r.Total)
	if len(times) > 0 {
		text := strings.Join(times, "; ")
		lines = append(lines, strings.ToUpper(text[:1])+text[1:]+".")
	}
	if p := r.Pages; p.Total > 0 && r.LinkBytes > 0 {
		line := fmt.Sprintf("%s crossed the link for %s of memory", bytesText(float64(r.LinkBytes)),
			units.Size(uint64(p.Total)*units.PageSize))
		if f := r.Fetch; f != nil && r.Stood == "" {
			line += fmt.Sprintf("; it waited for %d pages, 99 %% of them at most %s", f.Count,
				shortText(f.P99))
		}
		lines = append(lines, line+".")
	}
	for _, w := range r.Warnings {
		lines = append(lines, "Warning: "+clean(w))
	}
	return strings.Join(lines, "\n") + "\n"
}
