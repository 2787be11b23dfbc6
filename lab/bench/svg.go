package bench

import (
	"fmt"
	"html"
	"io"
	"math"
	"slices"
	"strings"
)

// The plot, in pixels.
const (
	plotWidth, plotHeight = 960, 560
	left, right           = 70, 940 // of the axes
	top                   = 84
	legendLine            = 22
	drawn                 = 3 // steps averaged in a line
)

// style tells strategies apart, also for the colour-blind (colours of Okabe
// and Ito) and in black and white.
var style = map[string]struct{ colour, dash string }{
	"vacate":                {"#0072b2", ""},
	"qemu-postcopy":         {"#d55e00", "7 3"},
	"qemu-postcopy-preempt": {"#cc79a7", "2 3"},
	"qemu-precopy":          {"#009e73", "9 3 2 3"},
	"stop-and-copy":         {"#e69f00", "4 3"},

	"qemu-precopy-autoconverge": {"#56b4e9", "12 4"},
	"qemu-precopy-multifd":      {"#7f7f7f", "9 3 2 3 2 3"},
}

// SVG draws the guest's throughput over time: a line per strategy, for the
// repetition of median total duration, and faint ones for the others.
func (r *Result) SVG(w io.Writer) error {
	names := r.strategies()
	bottom := plotHeight - 66 - legendLine*len(names)
	end := r.plotEnd()
	x := func(t float64) float64 { return left + (t+2)/(end+2)*(right-left) }
	most := r.plotTop()
	y := func(share float64) float64 {
		return float64(bottom) - min(share/most, 1.02)*float64(bottom-top)
	}

	var b strings.Builder
	text := func(x, y float64, attrs, s string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" %s>%s</text>`+"\n", x, y, attrs,
			html.EscapeString(s))
	}
	line := func(x1, y1, x2, y2 float64, attrs string) {
		fmt.Fprintf(&b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" %s/>`+"\n", x1, y1, x2, y2,
			attrs)
	}
	fmt.Fprintf(&b,
		`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%[1]d" height="%[2]d" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222">`+"\n", plotWidth, plotHeight)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", plotWidth, plotHeight)
	text(left, 28, `font-size="17" font-weight="bold"`, "Guest throughput while its VM moves")
	text(left, 48, "", r.title())
	text(left, 66, `font-size="11" fill="#555"`, r.subtitle())

	for share := 0.0; share < most+0.01; share += 0.2 {
		line(left, y(share), right, y(share), `stroke="#e4e4e4"`)
		text(left-8, y(share)+4, `text-anchor="end"`, fmt.Sprintf("%.0f %%", share*100))
	}
	line(left, y(1), right, y(1), `stroke="#999"`)
	tick := niceStep(end + 2)
	for t := math.Ceil(-2/tick) * tick; t <= end+1e-9; t += tick {
		line(x(t), y(0), x(t), y(0)+5, `stroke="#222"`)
		text(x(t), y(0)+19, `text-anchor="middle"`, fmt.Sprintf("%g", round(t)+0))
	}
	line(left, y(0), right, y(0), `stroke="#222"`)
	line(left, y(0), left, top, `stroke="#222"`)
	line(x(0), y(0), x(0), top, `stroke="#222" stroke-dasharray="1 3"`)
	text(x(0)+5, top+8, `font-size="11" fill="#555"`, "start")
	text((left+right)/2, y(0)+36, `text-anchor="middle"`, "seconds since the start of the eviction")
	text(0, 0, fmt.Sprintf(`transform="translate(20 %.1f) rotate(-90)" text-anchor="middle"`,
		(y(0)+top)/2), "of its own throughput before")

	fmt.Fprintf(&b, `<clipPath id="axes"><rect x="%d" y="%d" width="%d" height="%d"/></clipPath>`+
		"\n", left, top-6, right-left+6, bottom-top+12)
	b.WriteString(`<g clip-path="url(#axes)" fill="none" stroke-linejoin="round">` + "\n")
	for _, faint := range []bool{true, false} {
		for _, name := range slices.Backward(names) { // the first on top
			typical := r.typical(name)
			for i := range r.Runs {
				run := &r.Runs[i]
				if run.Strategy != name || (run == typical) == faint || run.Before == nil {
					continue
				}
				s := style[name]
				attrs := fmt.Sprintf(`stroke="%s" stroke-width="1" stroke-opacity="0.2"`, s.colour)
				if !faint {
					attrs = fmt.Sprintf(`stroke="%s" stroke-width="2.2" stroke-dasharray="%s"`,
						s.colour, s.dash)
				}
				fmt.Fprintf(&b, `<polyline points="%s" %s/>`+"\n", points(run, x, y), attrs)
				if !faint {
					mark(&b, run, s.colour, x, y)
				}
			}
		}
	}
	b.WriteString("</g>\n")
	for i, name := range names {
		at := float64(plotHeight - legendLine*(len(names)-i) + 4)
		s := style[name]
		line(left, at-4, left+40, at-4,
			fmt.Sprintf(`stroke="%s" stroke-width="2.6" stroke-dasharray="%s"`, s.colour, s.dash))
		text(left+50, at, `font-weight="bold"`, name)
		text(left+220, at, "", r.legend(name))
	}
	text(right, y(0)+36, `text-anchor="end" font-size="11" fill="#555"`,
		"● runs on the destination   ■ source holds nothing")
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// plotEnd returns where the plot ends: some time after the longest completed
// run. A pre-copy that is given up late is cut off there.
func (r *Result) plotEnd() float64 {
	last, data := 0.0, 1.0
	for i := range r.Runs {
		run := &r.Runs[i]
		if n := len(run.Throughput); n > 0 {
			data = max(data, run.Throughput[n-1][0]+stepS)
		}
		if run.Outcome == Completed && run.Total != nil && r.typical(run.Strategy) == run {
			last = max(last, *run.Total)
			if run.Recovery != nil {
				last = max(last, *run.Recovery+1)
			}
		}
	}
	if last == 0 {
		return data
	}
	return min(data, last*1.2+1)
}

// plotTop returns the share of the rate before at which the plot ends.
func (r *Result) plotTop() float64 {
	most := 1.2
	for i := range r.Runs {
		run := &r.Runs[i]
		if run.Before == nil || run != r.typical(run.Strategy) {
			continue
		}
		for i := range run.Throughput {
			most = max(most, smoothed(run, i))
		}
	}
	return min(math.Ceil(most/0.2-0.01)*0.2, 2)
}

// niceStep returns a step of 1, 2 or 5 times a power of ten that divides a
// span in at most twelve parts.
func niceStep(span float64) float64 {
	p := math.Pow(10, math.Floor(math.Log10(span/12)))
	for _, f := range []float64{1, 2, 5} {
		if span/(f*p) <= 12 {
			return f * p
		}
	}
	return 10 * p
}

// typical returns the run of a strategy with the median total duration, or
// its first.
func (r *Result) typical(name string) *Run {
	var runs []*Run
	for i := range r.Runs {
		if r.Runs[i].Strategy == name {
			runs = append(runs, &r.Runs[i])
		}
	}
	var done []*Run
	for _, run := range runs {
		if run.Total != nil {
			done = append(done, run)
		}
	}
	if done == nil {
		return runs[0]
	}
	slices.SortStableFunc(done, func(a, b *Run) int {
		switch {
		case *a.Total < *b.Total:
			return -1
		case *a.Total > *b.Total:
			return 1
		}
		return 0
	})
	return done[(len(done)-1)/2]
}

// points returns a run's line: the mean of some steps around each.
func points(run *Run, x, y func(float64) float64) string {
	var b strings.Builder
	for i, p := range run.Throughput {
		fmt.Fprintf(&b, "%.1f,%.1f ", x(p[0]+stepS/2), y(smoothed(run, i)))
	}
	return strings.TrimSpace(b.String())
}

// smoothed returns the share of the rate before around step i.
func smoothed(run *Run, i int) float64 {
	around := run.Throughput[max(0, i-drawn/2):min(len(run.Throughput), i+drawn/2+1)]
	var sum float64
	for _, p := range around {
		sum += p[1]
	}
	return sum / float64(len(around)) / *run.Before
}

// mark draws where the guest ran on the destination, and the end.
func mark(b *strings.Builder, run *Run, colour string, x, y func(float64) float64) {
	at := func(t float64) float64 {
		for i, p := range run.Throughput {
			if p[0] <= t && t < p[0]+stepS {
				return y(smoothed(run, i))
			}
		}
		return y(0)
	}
	if t := run.Transfer; t != nil {
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="5" fill="%s" stroke="#fff"/>`+"\n", x(*t),
			at(*t), colour)
	}
	if t := run.Total; t != nil {
		fmt.Fprintf(b, `<rect x="%.1f" y="%.1f" width="9" height="9" fill="%s" stroke="#fff"/>`+
			"\n", x(*t)-4.5, at(*t)-4.5, colour)
	}
}

// legend says in words what a strategy's typical run did.
func (r *Result) legend(name string) string {
	run := r.typical(name)
	if run.Outcome != Completed {
		s := run.Outcome
		if run.Outcome == NotConverged && run.Total != nil {
			s += fmt.Sprintf(", given up after %.1f s", *run.Total)
		}
		return s
	}
	var parts []string
	add := func(format string, v *float64) {
		if v != nil {
			parts = append(parts, fmt.Sprintf(format, *v))
		}
	}
	add("runs there after %.2f s", run.Transfer)
	add("back to 90 %% after %.1f s", run.Recovery)
	add("done after %.1f s", run.Total)
	return strings.Join(parts, ", ")
}
