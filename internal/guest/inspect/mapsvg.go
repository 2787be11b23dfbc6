package inspect

import (
	"bufio"
	"fmt"
	"html"
	"image"
	"image/color"
	"io"
)

// maxSVG bounds the drawn part of an SVG, in bytes. Cells grow until it is kept.
const maxSVG = 384 << 10

// SVG writes the picture as a Scalable Vector Graphic (1.1) of at most 512 KiB, with no
// scripts. It adapts to light and dark, where the viewer says which; tool tips on the
// legend name the kinds of pages.
func (m *Map) SVG(w io.Writer) error {
	l := m.layout(1)
	paths, ok := m.paths(&l, maxSVG)
	for !ok {
		l = m.layout(2 * l.cell)
		paths, ok = m.paths(&l, maxSVG)
	}
	entries := m.legend()
	height := m.pictureHeight(&l)
	out := bufio.NewWriter(w)
	p := func(format string, args ...any) { fmt.Fprintf(out, format+"\n", args...) }
	p(
		`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`, width, height, width, height)
	p(`<title>%s</title>`, html.EscapeString(m.title))
	p(`<style>`)
	p(`:root{color-scheme:light dark}`)
	p(`text{font-family:system-ui,"DejaVu Sans",sans-serif;font-size:15px;fill:#222}`)
	p(
		`.paper{fill:#fff}.quiet{fill:#666}.small{font-size:13px}.end{text-anchor:end}.num{font-variant-numeric:tabular-nums}`)
	p(`.hatch{stroke:#bbb}.hole{fill:#fff}`)
	p(
		`@media(prefers-color-scheme:dark){text{fill:#e6e6e6}.paper,.hole{fill:#17191c}.quiet{fill:#a0a0a0}.hatch{stroke:#555}}`)
	p(`</style>`)
	p(
		`<defs><pattern id="hole" width="6" height="6" patternUnits="userSpaceOnUse"><rect width="6" height="6" class="hole"/><path class="hatch" d="M0 6L6 0"/></pattern></defs>`)
	p(`<rect class="paper" width="%d" height="%d"/>`, width, height)
	p(`<text x="%d" y="%d" style="font-size:24px;font-weight:600">%s</text>`, margin, margin+20,
		html.EscapeString(m.title))
	p(`<text x="%d" y="%d" class="quiet">%s</text>`, margin, margin+45, m.subtitle(&l))

	for _, r := range l.rows {
		y := mapTop + r.top
		if r.cut {
			p(`<text x="%d" y="%d" class="quiet small">%s</text>`, mapLeft+8, y+15, l.cutText(r))
			continue
		}
		size, hex := l.address(r)
		p(`<text x="%d" y="%d" class="end num">%s</text>`, margin+80, y+21, size)
		p(`<text x="%d" y="%d" class="end num quiet small">%s</text>`, mapLeft-12, y+21, hex)
		p(`<rect fill="url(#hole)" x="%d" y="%d" width="%d" height="%d"/>`, mapLeft, y, mapWidth,
			rowHeight)
	}
	p(`<g transform="translate(%d %d)" shape-rendering="crispEdges">`, mapLeft, mapTop)
	for h, d := range paths {
		if len(d) > 0 {
			p(`<path fill="%s" d="%s"><title>%s</title></path>`, hexColor(palette[h]), d, shade(h))
		}
	}
	p(`</g>`)

	x, y := mapLeft+mapWidth+gutter, mapTop
	for _, e := range entries {
		fill := hexColor(palette[e.shade])
		if e.shade == hole {
			fill = "url(#hole)"
		}
		p(`<g><title>%s</title>`, html.EscapeString(tip(e)))
		p(`<rect fill="%s" stroke="#888" x="%d.5" y="%d.5" width="17" height="17"/>`, fill, x, y)
		p(`<text x="%d" y="%d">%s</text>`, x+30, y+14, e.shade)
		p(`<text x="%d" y="%d" class="end num">%s</text>`, x+278, y+14, e.size)
		p(`<text x="%d" y="%d" class="end num">%s</text></g>`, x+legend, y+14,
			html.EscapeString(e.percent))
		y += lineSize
	}
	y += kindSize
	for _, k := range m.kindsWithin(&l) {
		p(`<text x="%d" y="%d" class="quiet small">%s</text>`, x+30, y+14, k.kind)
		p(`<text x="%d" y="%d" class="end num quiet small">%s</text>`, x+278, y+14, k.size)
		p(`<text x="%d" y="%d" class="end num quiet small">%s</text>`, x+legend, y+14,
			html.EscapeString(k.percent))
		y += kindSize
	}
	p(`</svg>`)
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write the map: %w", err)
	}
	return nil
}

// tip is more on an entry of the legend.
func tip(e entry) string {
	switch {
	case e.shade == hole:
		return "addresses without memory, or unknown"
	case e.of == "":
		return fmt.Sprintf("%s: none", e.shade)
	}
	return fmt.Sprintf("%s: %s", e.shade, e.of)
}

// paths returns the area of each shade as a path, or false if all of them are longer than
// limit.
func (m *Map) paths(l *layout, limit int) (paths [shades][]byte, ok bool) {
	var at [shades]image.Point // where the path's last rectangle begins
	size := 0
	for _, r := range l.rows {
		if r.cut {
			continue
		}
		m.runs(l, r, func(first, n int, h shade) {
			if h == hole || size > limit {
				return
			}
			l.boxes(first, n, func(box image.Rectangle) {
				box = box.Add(image.Pt(0, r.top))
				d := paths[h]
				move := box.Min.Sub(at[h])
				d = fmt.Appendf(d, "m%d", move.X)
				if move.Y >= 0 {
					d = append(d, ' ')
				}
				d = fmt.Appendf(d, "%dh%dv%dh-%dz", move.Y, box.Dx(), box.Dy(), box.Dx())
				size += len(d) - len(paths[h])
				paths[h], at[h] = d, box.Min
			})
		})
	}
	return paths, size <= limit
}

func hexColor(c color.RGBA) string { return fmt.Sprintf("#%02x%02x%02x", c.R, c.G, c.B) }
