package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"vacate/internal/guest/inspect"
	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// shownProcesses is how many processes are listed unless all are asked for.
const shownProcesses = 20

// memoryText sums up a survey for people, in at most 80 columns as long as processes have
// names of no more than 15 characters, as those of Linux do.
func memoryText(m inspect.Memory, paused, all bool) string {
	var b strings.Builder
	surveyText(&b, m, paused)
	classesText(&b, m)
	kindsText(&b, m)
	processesText(&b, m, all)
	return b.String()
}

// lineText writes a line without spaces at its end.
func lineText(b *strings.Builder, format string, args ...any) {
	b.WriteString(strings.TrimRight(fmt.Sprintf(format, args...), " ") + "\n")
}

// surveyText says of what guest a survey is, and what it took.
func surveyText(b *strings.Builder, m inspect.Memory, paused bool) {
	row := func(name, format string, args ...any) {
		lineText(b, "%-13s %s", name, fmt.Sprintf(format, args...))
	}
	row("kernel", "Linux %s", clean(m.Kernel))
	row("memory", "%s in %d pages of 4 KiB", units.Size(uint64(m.Pages)*units.PageSize), m.Pages)
	f := m.Free
	row("free", "%s MiB; of that skippable %s (%s), on lists of CPUs %s", mib(f.Pages),
		mib(f.Skippable), share(f.Skippable, f.Pages), mib(f.PerCPU))
	spent := func(name string, seconds float64, what string) {
		row(name, "%8s  %s", shortText(seconds), what)
	}
	switch {
	case m.Source == "core":
		spent("attached in", m.Times.Attach, "")
	case paused:
		spent("attached in", m.Times.Attach, "")
		row("stood still", "%8s  before, and still does", "")
	default:
		spent("attached in", m.Times.Attach, "while the VM ran")
		spent("stood still", m.Times.Frozen, "from stop to cont; in between")
	}
	for _, s := range m.Times.Stages {
		spent("", s.Seconds, clean(s.Name))
	}
	for _, note := range m.Notes {
		for i, line := range wrap(clean(note), 66) {
			if i > 0 {
				row("", "%s", line)
			} else {
				row("note", "%s", line)
			}
		}
	}
}

// classesText has a row for each class of pages.
func classesText(b *strings.Builder, m inspect.Memory) {
	fmt.Fprintf(b, "\n%-14s %9s %10s %7s\n", "CLASS", "PAGES", "MiB", "")
	var order []inspect.ClassPages // what is not known comes behind the paper's order
	for _, c := range m.Classes {
		if c.Class != pageclass.Unknown && c.Class != pageclass.Free {
			order = append(order, c)
		}
	}
	for _, last := range []pageclass.Class{pageclass.Unknown, pageclass.Free} {
		for _, c := range m.Classes {
			if c.Class == last {
				order = append(order, c)
			}
		}
	}
	largest := 0
	for _, c := range order {
		largest = max(largest, c.Pages)
	}
	for _, c := range order {
		lineText(b, "%-14s %9d %10s %7s  %s", c.Class, c.Pages, mib(c.Pages),
			share(c.Pages, m.Pages), bar(c.Pages, largest, 34))
	}
	fmt.Fprintf(b, "%-14s %9d %10s\n", "all", m.Pages, mib(m.Pages))
}

// kindsText has a row for each kind of pages.
func kindsText(b *strings.Builder, m inspect.Memory) {
	fmt.Fprintf(b, "\n%-17s %9s %9s %7s %6s %6s %5s %6s %5s\n", "KIND", "PAGES", "MiB", "", "used",
		"active", "dirty", "mapped", "exec")
	for _, k := range m.Kinds {
		part := func(n int) string {
			if n == 0 {
				return ""
			}
			if n*200 < k.Pages {
				return "<1%"
			}
			return fmt.Sprintf("%.0f%%", 100*float64(n)/float64(k.Pages))
		}
		lineText(b, "%-17s %9d %9s %7s %6s %6s %5s %6s %5s", k.Kind, k.Pages, mib(k.Pages),
			share(k.Pages, m.Pages),
			part(k.Accessed), part(k.Active), part(k.Dirty), part(k.Mapped), part(k.Exec))
	}
	if !m.Fresh {
		b.WriteString("(used tells nothing here: nobody clears the marks in the page tables)\n")
	}
}

// processesText has a row for each process.
func processesText(b *strings.Builder, m inspect.Memory, all bool) {
	if len(m.Processes) == 0 {
		return
	}
	fmt.Fprintf(b, "\n%7s %7s %7s %7s %6s %6s %7s %7s %-6s %s\n", "PID", "MiB", "code", "data",
		"tables", "rest", "ran ago", "CPU", "", "NAME")
	list := m.Processes
	if !all {
		list = list[:min(len(list), shownProcesses)]
	}
	for _, p := range list {
		code, data, tables := p.Classes[pageclass.UserCode], p.Classes[pageclass.UserData],
			p.Classes[pageclass.PageTable]
		state := ""
		switch {
		case p.OnCPU:
			state = "on CPU"
		case p.Active:
			state = "active"
		}
		lineText(b, "%7d %7s %7s %7s %6s %6s %7s %7s %-6s %s", p.PID,
			mib(p.Pages), mib(code), mib(data), mib(tables), mib(p.Pages-code-data-tables),
			timeText(p.LastRun), timeText(p.CPU), state, escape(p.Name))
	}
	if rest := m.Processes[len(list):]; len(rest) > 0 {
		pages := 0
		for _, p := range rest {
			pages += p.Pages
		}
		fmt.Fprintf(b, "%7s %7s in %d more; --all lists them\n", "", mib(pages), len(rest))
	}
}

// mib writes the size of pages in MiB.
func mib(pages int) string {
	switch {
	case pages == 0:
		return "-"
	case pages*20 < 256:
		return "<0.1"
	}
	return fmt.Sprintf("%.1f", float64(pages)/256)
}

// share writes a part of a whole in percent.
func share(part, whole int) string {
	switch {
	case part == 0:
		return "-"
	case part*2000 < whole:
		return "<0.1%"
	}
	return fmt.Sprintf("%.1f%%", 100*float64(part)/float64(max(whole, 1)))
}

// bar draws a part of a whole that is width characters long, to an eighth of a character.
func bar(part, whole, width int) string {
	eighths := int(math.Ceil(8 * float64(width) * float64(part) / float64(max(whole, 1))))
	s := strings.Repeat("█", eighths/8)
	if rest := eighths % 8; rest > 0 {
		s += string([]rune("▏▎▍▌▋▊▉")[rest-1])
	}
	return s
}

// timeText writes a time, given in seconds, in at most 7 characters.
func timeText(s float64) string {
	switch {
	case math.IsNaN(s) || s < 0:
		return "?"
	case s < 0.9995:
		return fmt.Sprintf("%.0f ms", 1000*s)
	case s < 99.95:
		return fmt.Sprintf("%.1f s", s)
	case s < 5999.5:
		return fmt.Sprintf("%.0f min", s/60)
	case s < 99.5*3600:
		return fmt.Sprintf("%.0f h", s/3600)
	case s < 9999*86400:
		return fmt.Sprintf("%.0f d", s/86400)
	}
	return "> 27 a"
}

// maxName is how many bytes of a process' name are shown. Linux has at most 15.
const maxName = 32

// escape makes a name that a guest gave fit for a terminal, and to be told from any other:
// what is not a plain letter, digit or sign is written as in a string of Go.
func escape(name string) string {
	cut := ""
	if len(name) > maxName {
		name, cut = name[:maxName], "..."
	}
	var b strings.Builder
	for name != "" {
		r, n := utf8.DecodeRuneInString(name)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, name[0])
		case r == '\\' || !strconv.IsPrint(r) || unicode.Is(unicode.M, r):
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		default:
			b.WriteRune(r)
		}
		name = name[n:]
	}
	return b.String() + cut
}

// wrap breaks a text into lines of at most width bytes, where it has spaces for that.
func wrap(s string, width int) []string {
	var lines []string
	for _, word := range strings.Fields(s) {
		if n := len(lines) - 1; n >= 0 && len(lines[n])+1+len(word) <= width {
			lines[n] += " " + word
		} else {
			lines = append(lines, word)
		}
	}
	return lines
}
