package main

import (
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

// tell says in a sentence where the VM is, then what may be left out for want of room.
func (s scene) tell(p evict.Progress) (sentence string, more []string) {
	verb := "runs"
	if p.Stands != "" {
		verb = "stands"
	}
	here, there := "here", "on "+s.other
	if s.arrives {
		here, there = there, here
	}
	is := func(where string) string { return s.vm + " " + verb + " " + where }
	share, end := "none", "followed"
	if p.Total > 0 {
		share = fmt.Sprintf("%.0f %%", wholePercent(p.Pages, p.Total))
	}
	if s.arrives {
		end = "come"
	}
	switch p.State {
	case evict.Preparing:
		sentence = is(here) + "; vacate prepares the move to " + s.other
		if p.Awaits != "" {
			sentence = fmt.Sprintf("%s; %s: %d s", is(here), clean(p.Awaits),
				int(p.AwaitedFor.Seconds()))
		}
	case evict.Waiting:
		sentence = "a QEMU waits here for " + s.vm
	case evict.Arming:
		sentence = is(here) + "; its twin learns what memory it has"
	case evict.Switching:
		sentence = s.vm + " stands still; vacate saves its devices"
	case evict.Loading:
		sentence = s.vm + " stands still; its twin loads its devices"
	case evict.Prepared:
		sentence = s.vm + " stands still; its twin is ready"
	case evict.Committing:
		sentence = s.vm + " stands still; " + s.other + " is told to take it"
	case evict.InDoubt:
		sentence = s.other + " does not answer; " + s.vm + " may run there"
	case evict.Pushing, evict.Running:
		sentence = is(there)
		if p.Down > 0 {
			sentence += " (down " + timeText(p.Down.Seconds()) + ")"
		}
		sentence += "; " + share + " of its memory has " + end
		switch {
		case p.Short != "":
			more = append(more, ", and it waits for memory there")
		case p.ETA > 0:
			more = append(more, ", "+etaText(p.ETA)+" left")
		}
	case evict.Reconnecting, evict.CutOff:
		sentence = fmt.Sprintf("the link to %s is lost; %s with %s of its memory", s.other,
			is(there), share)
	case evict.Retiring:
		sentence = is(there) + " with all of its memory; its QEMU here ends"
	case evict.Completing, evict.Completed:
		sentence = is(there) + " with all of its memory"
	case evict.ShutDown:
		sentence = s.vm + " has shut itself down " + there
	case evict.RollingBack:
		sentence = "the move failed; " + s.vm + " goes on " + here
	case evict.Refused, evict.Aborted:
		sentence = s.vm + " stays " + here
	case evict.Lost:
		sentence = "contact with " + s.vm + " is lost"
	default:
		sentence = string(p.State)
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
	add("all was over after %s", r.Total)
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
