package inspect_test

import (
	"bytes"
	"encoding/xml"
	"errors"
	"image"
	"image/color"
	"image/png"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"vacate/internal/guest/inspect"
	"vacate/internal/guest/pageclass"
)

func svg(t testing.TB, m *inspect.Map) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := m.SVG(&b); err != nil {
		t.Fatal(err)
	}
	if b.Len() > 512<<10 {
		t.Errorf("SVG of %d bytes", b.Len())
	}
	for d := xml.NewDecoder(bytes.NewReader(b.Bytes())); ; {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v: %.2000s", err, b.Bytes())
		}
	}
	return b.Bytes()
}

func pixels(t testing.TB, m *inspect.Map) image.Image {
	t.Helper()
	var b bytes.Buffer
	if err := m.PNG(&b); err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(&b)
	if err != nil {
		t.Fatal(err)
	}
	if s := img.Bounds().Size(); s.X > 1700 || s.Y > 1300 {
		t.Errorf("a picture of %v", s)
	}
	return img
}

// The recorded survey, drawn. What the golden picture looks like was looked at.
func TestMapGolden(t *testing.T) {
	s, kernel := readSurvey(t)
	m := inspect.NewMap(s, "Memory of a guest with Linux "+kernel)
	same(t, "survey.svg", svg(t, m))
}

// Each class covers the area that its pages should, cell by cell and when there are many
// pages in a cell.
func TestMapArea(t *testing.T) {
	colors := map[pageclass.Class]color.RGBA{
		pageclass.UserData: {0xcc, 0x66, 0x77, 255}, pageclass.Other: {0xdd, 0xcc, 0x77, 255},
		pageclass.Free:   {0xec, 0xec, 0xe8, 255},
		pageclass.Kernel: {0x88, 0xcc, 0xee, 255},
	}
	for _, c := range []struct {
		name      string
		pages     int
		tolerance float64
	}{
		{"a page per cell", 1 << 17, 0},
		{"many pages per cell", 1 << 22, 0.005},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			s := &pageclass.Survey{Pages: make([]pageclass.Page, c.pages)}
			want := map[pageclass.Class]int{}
			for i := range s.Pages {
				p := pageclass.Page{Kind: pageclass.FreeBuddy, Class: pageclass.Free,
					Flags: pageclass.Skippable}
				switch n := r.IntN(100); {
				// a minority everywhere: a cell's majority alone would hide it
				case n < 10:
					p = pageclass.Page{Kind: pageclass.Anon, Class: pageclass.UserData}
				case n < 25:
					p = pageclass.Page{Kind: pageclass.Anon, Class: pageclass.Other}
				case n < 50:
					p = pageclass.Page{Kind: pageclass.Slab, Class: pageclass.Kernel}
				}
				s.Pages[i] = p
				want[p.Class]++
			}
			img := pixels(t, inspect.NewMap(s, c.name))
			got, all := map[color.RGBA]int{}, 0
			const left, right = 234, 234 + 1024
			for y := 90; y < img.Bounds().Max.Y; y++ {
				for x := left; x < right; x++ {
					rgba := img.At(x, y).(color.RGBA)
					for _, known := range colors {
						if rgba == known {
							got[rgba]++
							all++
						}
					}
				}
			}
			for class, n := range want {
				w, g := float64(n)/float64(c.pages), float64(got[colors[class]])/float64(all)
				if d := w - g; d > c.tolerance || d < -c.tolerance {
					t.Errorf("%v covers %.3f of the area, want %.3f", class, g, w)
				}
			}
		})
	}
}

// Memory far apart, and gaps within rows, are drawn without the space between.
func TestMapHoles(t *testing.T) {
	s := &pageclass.Survey{Pages: make([]pageclass.Page, 6<<18)} // 6 GiB
	for i := range s.Pages {
		if gib := i >> 18; gib < 1 || gib == 5 && i%2 == 0 {
			s.Pages[i] = pageclass.Page{Kind: pageclass.File, Class: pageclass.FileActive}
		}
	}
	m := inspect.NewMap(s, "")
	text := string(svg(t, m))
	for _, want := range []string{">no memory: 4 GiB<", ">5 GiB<", ">0x140000000<", `url(#hole)`} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q", want)
		}
	}
	if strings.Contains(text, ">3 GiB<") {
		t.Error("an address in the hole")
	}
	pixels(t, m)
	pixels(t, inspect.NewMap(&pageclass.Survey{}, "nothing"))
	svg(t, inspect.NewMap(&pageclass.Survey{Pages: make([]pageclass.Page, 10)}, "nothing"))
}

// However memory is mixed, and however much it is, a picture stays small. 64 GiB take the
// same paths as more.
func TestMapLarge(t *testing.T) {
	if testing.Short() {
		t.Skip("short: 16 million pages")
	}
	s := &pageclass.Survey{Pages: make([]pageclass.Page, 16<<20)}
	for i := range s.Pages {
		s.Pages[i] = pageclass.Page{Kind: pageclass.Anon, Class: pageclass.Class(1 + (i/3)%9)}
	}
	m := inspect.NewMap(s, "all mixed")
	svg(t, m)
	pixels(t, m)
}

// Errors of the output are told.
func TestMapError(t *testing.T) {
	s := &pageclass.Survey{Pages: []pageclass.Page{{Kind: pageclass.Slab, Class: pageclass.Kernel}}}
	m := inspect.NewMap(s, "")
	if err := m.SVG(full{}); !errors.Is(err, io.ErrShortWrite) {
		t.Error(err)
	}
	if err := m.PNG(full{}); !errors.Is(err, io.ErrShortWrite) {
		t.Error(err)
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

// Any title and any memory make a picture that can be read.
func FuzzMap(f *testing.F) {
	f.Add("Memory of a guest", []byte{7, 2, 0, 200, 0, 0, 0, 255, 1, 10, 32, 90}, uint16(100))
	f.Add("<script>\x1b[31m&\"'\xff\u202e]]>", []byte{255, 255, 255, 255}, uint16(65535))
	f.Add(strings.Repeat("漢", 200), []byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, title string, runs []byte, stretch uint16) {
		s := &pageclass.Survey{}
		for ; len(runs) >= 4 && len(s.Pages) < 1<<18; runs = runs[4:] {
			p := pageclass.Page{Kind: pageclass.Kind(runs[0]), Class: pageclass.Class(runs[1]),
				Flags: pageclass.Flags(runs[2])}
			for range int(runs[3]) * (1 + int(stretch)/1024) {
				s.Pages = append(s.Pages, p)
			}
		}
		svg(t, inspect.NewMap(s, title)) // a PNG has the same cells, but takes long
	})
}
