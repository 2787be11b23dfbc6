package inspect

import (
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"
	"strings"

	"golang.org/x/image/font"
	"golang.org/x/image/font/inconsolata"
	"golang.org/x/image/math/fixed"
)

var (
	ink   = color.RGBA{0x22, 0x22, 0x22, 255}
	quiet = color.RGBA{0x66, 0x66, 0x66, 255}
	frame = color.RGBA{0x88, 0x88, 0x88, 255}
)

// PNG writes the picture as a Portable Network Graphic.
func (m *Map) PNG(w io.Writer) error {
	l := m.layout(1)
	img := image.NewRGBA(image.Rect(0, 0, width, m.pictureHeight(&l)))
	c := canvas{img}
	c.fill(img.Bounds(), color.White)
	c.text(margin, margin+16, left, ink, inconsolata.Bold8x16, m.title)
	c.text(margin, margin+40, left, quiet, inconsolata.Regular8x16, m.subtitle(&l))
	for _, r := range l.rows {
		y := mapTop + r.top
		if r.cut {
			c.text(mapLeft+8, y+15, left, quiet, inconsolata.Regular8x16, l.cutText(r))
			continue
		}
		size, hex := l.address(r)
		c.text(margin+80, y+21, right, ink, inconsolata.Regular8x16, size)
		c.text(mapLeft-12, y+21, right, quiet, inconsolata.Regular8x16, hex)
		m.runs(&l, r, func(at, n int, h shade) {
			l.boxes(at, n, func(box image.Rectangle) { c.shade(box.Add(image.Pt(mapLeft, y)), h) })
		})
	}
	x, y := mapLeft+mapWidth+gutter, mapTop
	for _, e := range m.legend() {
		swatch := image.Rect(x, y, x+18, y+18)
		c.fill(swatch, frame)
		c.shade(swatch.Inset(1), e.shade)
		c.text(x+30, y+14, left, ink, inconsolata.Regular8x16, e.shade.String())
		c.text(x+278, y+14, right, ink, inconsolata.Regular8x16, e.size)
		c.text(x+legend, y+14, right, ink, inconsolata.Regular8x16, e.percent)
		y += lineSize
	}
	y += kindSize
	for _, k := range m.kindsWithin(&l) {
		c.text(x+30, y+14, left, quiet, inconsolata.Regular8x16, k.kind)
		c.text(x+278, y+14, right, quiet, inconsolata.Regular8x16, k.size)
		c.text(x+legend, y+14, right, quiet, inconsolata.Regular8x16, k.percent)
		y += kindSize
	}
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(w, img); err != nil {
		return fmt.Errorf("write the map: %w", err)
	}
	return nil
}

type canvas struct{ *image.RGBA }

func (c canvas) fill(r image.Rectangle, with color.Color) {
	draw.Draw(c, r, image.NewUniform(with), image.Point{}, draw.Src)
}

// shade fills with a shade; holes are hatched.
func (c canvas) shade(r image.Rectangle, h shade) {
	c.fill(r, palette[h])
	if h != hole {
		return
	}
	for y := r.Min.Y; y < r.Max.Y; y++ {
		for x := r.Min.X; x < r.Max.X; x++ {
			if (x+y)%6 == 0 {
				c.SetRGBA(x, y, color.RGBA{0xbb, 0xbb, 0xbb, 255})
			}
		}
	}
}

type align int

const (
	left align = iota
	right
)

// text writes a line with its base line at y. Characters that the fonts lack become question marks.
func (c canvas) text(x, y int, a align, ink color.Color, face font.Face, s string) {
	d := font.Drawer{Dst: c, Src: image.NewUniform(ink), Face: face}
	d.Dot = fixed.P(x-d.MeasureString(s).Round()*int(a), y)
	d.DrawString(strings.Map(func(r rune) rune {
		if r > 0xff {
			return '?'
		}
		return r
	}, s))
}
