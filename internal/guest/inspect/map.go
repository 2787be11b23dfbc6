package inspect

import (
	"fmt"
	"image"
	"image/color"
	"unicode"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// Map is a picture of all memory of a guest. A row of it is contiguous memory, and rows
// follow each other by their addresses; rows without memory are cut out and named. Within a
// row cells go down, then right, so that what lies together in memory is a spot and no streak:
//
//	title                                                    legend
//	what a row and a cell are
//	0      0x0          1 4 7 ...                            ▓ kernel     92 MiB  9.0%
//	                    2 5 8                                ▒ user data ...
//	                    3 6 9                                ░ free
//	32 MiB 0x2000000    ▓▓▓▓▓▓▓░░░░░░░▓▓▓▓▓▓░░░░▓▓▓▓▓▓▓▓
//	                      no memory: 3 GiB
//	4 GiB  0x100000000  ▓▓▓▓▓▓▓░░░░░░░▓▓▓▓▓▓░░░░▓▓▓▓▓▓▓▓
//
// A cell is one page, or 2, 4, 8... of them where the guest is large. It has the colour of most of
// its pages. Following cells of the row that have pages of the other colours make up for what these
// lose. So each colour covers the area that it should.
type Map struct {
	pages  []pageclass.Page // up to the last known one
	title  string
	memory Memory
	shades [shades]int   // pages
	kinds  [shades]kinds // what the shades are made of
}

type kinds [pageclass.Kinds]int

// A shade is what a colour stands for: a class, or one of what follows.
type shade uint8

const (
	freeMoved shade = shade(pageclass.Classes) + iota // free, but to be moved
	hole                                              // nothing is known to be there
	shades
)

// The palette: the ten colours that Paul Tol's technical note "Colour Schemes" (SRON/EPS/TN/09-002)
// calls muted, which people with any common blindness for colours can tell apart, and
// more greys. The kernel is blue and violet, processes are red, files green.
var palette = [shades]color.RGBA{
	pageclass.KernelCode:   {0x33, 0x22, 0x88, 255},
	pageclass.Kernel:       {0x88, 0xcc, 0xee, 255},
	pageclass.MMIO:         {0x22, 0x22, 0x22, 255},
	pageclass.PageTable:    {0xaa, 0x44, 0x99, 255},
	pageclass.UserCode:     {0x88, 0x22, 0x55, 255},
	pageclass.UserData:     {0xcc, 0x66, 0x77, 255},
	pageclass.FileActive:   {0x11, 0x77, 0x33, 255},
	pageclass.FileInactive: {0x44, 0xaa, 0x99, 255},
	pageclass.Other:        {0xdd, 0xcc, 0x77, 255},
	pageclass.Unknown:      {0x77, 0x77, 0x77, 255},
	pageclass.Free:         {0xec, 0xec, 0xe8, 255},
	freeMoved:              {0xc4, 0xc4, 0xbe, 255},
	hole:                   {0xff, 0xff, 0xff, 255},
}

// legendOrder is the classes' by priority; what is not known comes behind.
var legendOrder = []shade{
	shade(pageclass.KernelCode), shade(pageclass.Kernel), shade(pageclass.MMIO),
	shade(pageclass.PageTable),
	shade(pageclass.UserCode), shade(pageclass.UserData), shade(pageclass.FileActive),
	shade(pageclass.FileInactive),
	shade(pageclass.Other), shade(pageclass.Unknown), freeMoved, shade(pageclass.Free),
}

func shadeOf(p pageclass.Page) shade {
	switch {
	case p.Kind == pageclass.None || p.Kind >= pageclass.Kinds || p.Class >= pageclass.Classes:
		return hole
	case p.Class == pageclass.Free && p.Flags&pageclass.Skippable == 0:
		return freeMoved
	}
	return shade(p.Class)
}

func (s shade) String() string {
	switch s {
	case freeMoved:
		return "free, not proven"
	case hole:
		return "no memory"
	}
	return pageclass.Class(s).String()
}

// maxTitle is how many characters of a title are shown.
const maxTitle = 90

// NewMap prepares a picture. The survey must not change as long as it is used; the title
// may hold anything.
func NewMap(s *pageclass.Survey, title string) *Map {
	m := &Map{memory: NewMemory(s)}
	for _, r := range title {
		if !unicode.IsGraphic(r) {
			r = unicode.ReplacementChar
		}
		m.title += string(r)
	}
	if r := []rune(m.title); len(r) > maxTitle {
		m.title = string(r[:maxTitle-3]) + "..."
	}
	for i, p := range s.Pages {
		h := shadeOf(p)
		m.shades[h]++
		if h != hole {
			m.kinds[h][p.Kind]++
			m.pages = s.Pages[:i+1]
		}
	}
	return m
}

// Measures of a picture, in pixels or the like.
const (
	margin    = 28
	mapLeft   = margin + 206 // left of it are addresses
	mapTop    = margin + 62  // above it is the title
	mapWidth  = 1024
	maxHeight = 1100 // of the map
	rowHeight = 32
	rowGap    = 2
	cutHeight = 22
	maxCell   = 16 // in width and height
	gutter    = 36 // from the map to the legend
	legend    = 352
	lineSize  = 26 // of the legend
	kindSize  = 21 // of the kinds below it
	width     = mapLeft + mapWidth + gutter + legend + margin
)

// A layout says where memory is in a picture.
type layout struct {
	cell   int // pages in a cell
	dx, dy int // width and height of a cell
	rows   []row
	height int // of all rows
}

// A row is one row, or several without memory, which are cut out.
type row struct {
	first, n int // by number, from address 0 on
	cut      bool
	top      int // from the map's top
}

func (l *layout) deep() int { return rowHeight / l.dy }

// rowPages is how many pages are in a row.
func (l *layout) rowPages() int { return mapWidth / l.dx * l.deep() * l.cell }

// layout returns the one with the largest cells that fits the height, where a cell has
// least pages, a power of two, or more.
func (m *Map) layout(least int) layout {
	l := layout{cell: least, dx: maxCell, dy: maxCell}
	fine := l.rowPages()
	used := make([]bool, (len(m.pages)+fine-1)/fine) // by row
	for i, p := range m.pages {
		if shadeOf(p) != hole {
			used[i/fine] = true
		}
	}
	for {
		l.place(used)
		if l.height <= maxHeight {
			return l
		}
		switch { // a row takes twice as much
		case l.dx == l.dy && l.dx > 1:
			l.dx /= 2
		case l.dy > l.dx:
			l.dy /= 2
		default:
			l.cell *= 2
		}
		for i := range (len(used) + 1) / 2 {
			used[i] = used[2*i] || 2*i+1 < len(used) && used[2*i+1]
		}
		used = used[:(len(used)+1)/2]
	}
}

func (l *layout) place(used []bool) {
	l.rows, l.height = l.rows[:0], 0
	for i := 0; i < len(used) && l.height <= maxHeight; {
		r := row{first: i, n: 1, cut: !used[i], top: l.height}
		if r.cut {
			for i+r.n < len(used) && !used[i+r.n] {
				r.n++
			}
			l.height += cutHeight
		} else {
			l.height += rowHeight
		}
		l.height += rowGap
		i += r.n
		l.rows = append(l.rows, r)
	}
}

// runs gives what a row shows to draw, as runs of n cells from number at on that are
// alike. Those without memory are among them.
func (m *Map) runs(l *layout, r row, draw func(at, n int, h shade)) {
	var owed [shades]int
	start, last := 0, hole
	cells := l.rowPages() / l.cell
	for i := range cells {
		at := r.first*l.rowPages() + i*l.cell
		var counts [shades]int
		for _, p := range m.pages[min(at, len(m.pages)):min(at+l.cell, len(m.pages))] {
			counts[shadeOf(p)]++
		}
		h := hole
		for c, n := range counts {
			owed[c] += n
			if n > 0 && (counts[h] == 0 || owed[c] > owed[h]) {
				h = shade(c)
			}
		}
		owed[h] -= l.cell
		if h != last && i > 0 {
			draw(start, i-start, last)
			start = i
		}
		last = h
	}
	draw(start, cells-start, last)
}

// boxes gives a run of n cells from number at on to fill, as at most three rectangles from
// the row's top left corner on.
func (l *layout) boxes(at, n int, fill func(image.Rectangle)) {
	deep := l.deep()
	for n > 0 {
		x, y := at/deep, at%deep
		w, h := 1, min(n, deep-y)
		if y == 0 && n >= deep {
			w, h = n/deep, deep
		}
		fill(image.Rect(x*l.dx, y*l.dy, (x+w)*l.dx, (y+h)*l.dy))
		at, n = at+w*h, n-w*h
	}
}

// address is that of a row, in two ways.
func (l *layout) address(r row) (size, hex string) {
	a := uint64(r.first) * uint64(l.rowPages()) * units.PageSize
	return units.Exact(a), fmt.Sprintf("%#x", a)
}

// subtitle says what the picture shows.
func (m *Map) subtitle(l *layout) string {
	return fmt.Sprintf("%s of memory by guest-physical address. A row is %s; a cell is %s, and "+
		"cells go down, then right.", roundSize(m.memory.Pages),
		units.Exact(uint64(l.rowPages())*units.PageSize),
		units.Exact(uint64(l.cell)*units.PageSize))
}

// An entry is a line of the legend.
type entry struct {
	shade         shade
	size, percent string
	of            string // its kinds, for who wants to know more
}

func (m *Map) legend() []entry {
	var list []entry
	for _, h := range legendOrder {
		n := m.shades[h]
		if n == 0 && (h == freeMoved || h == shade(pageclass.Unknown)) {
			continue
		}
		e := entry{shade: h, size: roundSize(n), percent: percent(n, m.memory.Pages)}
		for _, k := range m.memory.Kinds {
			if n := m.kinds[h][k.Kind]; n > 0 {
				if e.of != "" {
					e.of += ", "
				}
				e.of += fmt.Sprintf("%s %s", k.Kind, roundSize(n))
			}
		}
		list = append(list, e)
	}
	return append(list, entry{shade: hole})
}

// A kindEntry is a line below the legend.
type kindEntry struct{ kind, size, percent string }

// kindsWithin are the kinds of pages, the largest first, as far as there is room below the legend.
func (m *Map) kindsWithin(l *layout) []kindEntry {
	var list []kindEntry
	room := l.height - len(m.legend())*lineSize - kindSize
	for _, k := range m.memory.Kinds {
		if room -= kindSize; room < 0 {
			break
		}
		list = append(list, kindEntry{k.Kind.String(), roundSize(k.Pages),
			percent(k.Pages, m.memory.Pages)})
	}
	return list
}

// pictureHeight is the height of all of it.
func (m *Map) pictureHeight(l *layout) int {
	return mapTop + max(l.height, len(m.legend())*lineSize) + margin
}

// cutText names a cut-out.
func (l *layout) cutText(r row) string {
	return "no memory: " + units.Exact(uint64(r.n)*uint64(l.rowPages())*units.PageSize)
}

// percent writes a part of a whole, with what is little told from nothing.
func percent(part, whole int) string {
	switch {
	case part == 0 || whole == 0:
		return "-"
	case float64(part)/float64(whole) < 0.0005:
		return "<0.1%"
	}
	return fmt.Sprintf("%.1f%%", 100*float64(part)/float64(whole))
}

// roundSize writes the size of pages with three digits or so.
func roundSize(pages int) string {
	f, unit := float64(pages)*units.PageSize/1024, "KiB"
	for _, next := range []string{"MiB", "GiB", "TiB"} {
		if f < 1000 {
			break
		}
		f, unit = f/1024, next
	}
	if pages == 0 {
		return "-"
	}
	if unit == "KiB" || f >= 100 {
		return fmt.Sprintf("%.0f %s", f, unit)
	}
	return fmt.Sprintf("%.1f %s", f, unit)
}
