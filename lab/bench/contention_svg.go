package bench

import (
	"fmt"
	"html"
	"io"
	"slices"
	"strings"
)

// SVG draws the answers of both VMs together over time: a panel for each server and rate of the
// link, a line for each strategy, of its first run there.
func (c *Contention) SVG(w io.Writer) error {
	const width, height, gap, margin, head = 380.0, 210.0, 66.0, 60.0, 92.0
	var servers, strategies []string
	var rates []uint64
	for _, r := range c.Runs {
		if r.Server == string(Idle) {
			continue
		}
		if !slices.Contains(servers, r.Server) {
			servers = append(servers, r.Server)
		}
		if !slices.Contains(rates, r.Rate) {
			rates = append(rates, r.Rate)
		}
		if !slices.Contains(strategies, r.Strategy) {
			strategies = append(strategies, r.Strategy)
		}
	}
	var b strings.Builder
	fullWidth, fullHeight := margin+float64(len(rates))*(width+gap), head+
		float64(len(servers))*(height+gap)
	fmt.Fprintf(&b,
		`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222">`+"\n", fullWidth, fullHeight)
	fmt.Fprintf(&b,
		`<rect width="100%%" height="100%%" fill="#fff"/><text x="%g" y="26" font-size="17" font-weight="bold">Two VMs on one core, and one of them leaves at 0 s: answers of both per second</text>`+"\n", margin)
	for i, s := range strategies {
		x, st := margin+float64(i%6)*215, contentionStyle(s)
		fmt.Fprintf(&b,
			`<line x1="%g" y1="50" x2="%g" y2="50" stroke="%s" stroke-width="2.4" stroke-dasharray="%s"/><text x="%g" y="54">%s</text>`+"\n", x, x+30, st.colour, st.dash, x+36, html.EscapeString(s))
	}
	for row, server := range servers {
		for column, rate := range rates {
			left, top := margin+float64(column)*(width+gap), head+float64(row)*(height+gap)
			end, most := 1.0, 1.0
			for _, r := range c.Runs {
				if r.Server != server || r.Rate != rate {
					continue
				}
				most = max(most, 1.15*(r.Final[0]+r.Final[1]))
				if r.Total != nil {
					end = max(end, *r.Total+4)
				}
			}
			x := func(t float64) float64 { return left + (t+2)/(end+2)*width }
			y := func(v float64) float64 { return top + height - min(v/most, 1.05)*height }
			fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" font-weight="bold">%s, %s</text>`+"\n", left,
				top-8, html.EscapeString(server), bits(rate))
			for f := 0.0; f <= 1; f += 0.25 {
				fmt.Fprintf(&b,
					`<path d="M%.1f %.1fh%g" stroke="#e4e4e4"/><text x="%.1f" y="%.1f" text-anchor="end" fill="#555">%.0f</text>`+"\n", left, y(f*most), width, left-5, y(f*most)+4, f*most)
			}
			tick := niceStep((end + 2) * 1.8)
			for t := 0.0; t <= end; t += tick {
				fmt.Fprintf(&b,
					`<path d="M%.1f %.1fv5" stroke="#222"/><text x="%.1f" y="%.1f" text-anchor="middle" fill="#555">%g s</text>`+"\n", x(t), y(0), x(t), y(0)+18, t)
			}
			fmt.Fprintf(&b, `<path d="M%.1f %.1fV%.1f" stroke="#222" stroke-dasharray="1 3"/>`+"\n",
				x(0), y(0), top)
			for _, s := range slices.Backward(strategies) { // the first on top
				i := slices.IndexFunc(c.Runs,
					func(r ContentionRun) bool {
						return r.Server == server && r.Rate == rate && r.Strategy == s
					})
				if i < 0 {
					continue
				}
				st := contentionStyle(s)
				fmt.Fprintf(&b,
					`<polyline fill="none" stroke="%s" stroke-width="1.8" stroke-dasharray="%s" points="%s"/>`+"\n", st.colour, st.dash, c.Runs[i].line(end, x, y))
			}
		}
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// line is the sum of both VMs, averaged over half a second, as points of a polyline.
func (r *ContentionRun) line(end float64, x, y func(float64) float64) string {
	var points []string
	n := min(len(r.Moves), len(r.Stays))
	for i := range n {
		if at := r.Moves[i][0]; at < -2 || at > end {
			continue
		}
		sum, from, to := 0.0, max(0, i-2), min(n, i+3)
		for j := from; j < to; j++ {
			sum += r.Moves[j][1] + r.Stays[j][1]
		}
		points = append(points, fmt.Sprintf("%.1f,%.1f", x(r.Moves[i][0]), y(sum/float64(to-from))))
	}
	return strings.Join(points, " ")
}

// contentionStyle is how a strategy is drawn; variants of vacate are grey.
func contentionStyle(strategy string) struct{ colour, dash string } {
	if s, ok := style[strategy]; ok {
		return s
	}
	return struct{ colour, dash string }{"#777777", "2 2"}
}
