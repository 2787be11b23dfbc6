package doctor

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// textWidth is the most columns that Text writes, of characters that are one column wide.
const textWidth = 100

// Text writes findings as a table, the worst first, each with its remedy beneath it, and then a
// line that sums them up.
func Text(w io.Writer, findings []Finding) error {
	sorted := slices.Clone(findings)
	slices.SortStableFunc(sorted, func(a, b Finding) int { return cmp.Compare(b.Level, a.Level) })
	var hostWidth, checkWidth int
	for _, f := range sorted {
		hostWidth = min(max(hostWidth, utf8.RuneCountInString(f.Host)), 20)
		checkWidth = min(max(checkWidth, utf8.RuneCountInString(f.Check)), 20)
	}
	indent := 7 + 2 + hostWidth + 2 + checkWidth + 2
	var b strings.Builder
	var count [len(levels)]int
	for _, f := range sorted {
		if f.Level < OK || f.Level > Fatal {
			f.Level = Fatal // of whom this is not known, the worst is assumed
		}
		count[f.Level]++
		fmt.Fprintf(&b, "%-7s  %s  %s  ", f.Level, column(f.Host, hostWidth),
			column(f.Check, checkWidth))
		wrap(&b, f.Text, indent, indent)
		if f.Remedy != "" {
			b.WriteString(strings.Repeat(" ", indent) + "→ ")
			wrap(&b, f.Remedy, indent+2, indent+2)
		}
	}
	verdict := "ready"
	switch {
	case count[Fatal] > 0:
		verdict = "not possible as it is"
	case count[Warning] > 0:
		verdict = "possible, with care"
	}
	fmt.Fprintf(&b, "\n%s: %d fatal, %s, %s, %d ok\n", verdict, count[Fatal],
		plural(count[Warning], "warning"), plural(count[Note], "note"), count[OK])
	_, err := io.WriteString(w, b.String())
	return err
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// column pads or cuts a word to a width.
func column(s string, width int) string {
	r := []rune(strings.Join(strings.Fields(s), " "))
	if len(r) > width {
		r = append(r[:width-1], '…')
	}
	return string(r) + strings.Repeat(" ", width-len(r))
}

// wrap writes a text from a column on, its further lines indented, and ends the last. A word that
// is longer than a line is broken.
func wrap(b *strings.Builder, text string, at, indent int) {
	first := true
	for _, word := range strings.Fields(text) {
		r := []rune(word)
		if !first && at+1+len(r) > textWidth {
			b.WriteString("\n" + strings.Repeat(" ", indent))
			at, first = indent, true
		}
		if !first {
			b.WriteByte(' ')
			at++
		}
		for len(r) > textWidth-at {
			b.WriteString(string(r[:textWidth-at]) + "\n" + strings.Repeat(" ", indent))
			r, at = r[textWidth-at:], indent
		}
		b.WriteString(string(r))
		at, first = at+len(r), false
	}
	b.WriteByte('\n')
}
