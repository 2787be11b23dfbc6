// Package htmlreport writes self-contained HTML: what an eviction did, as one file that needs no
// network to be looked at. Its charts are drawn by uPlot (https://github.com/leeoniya/uPlot, MIT),
// which is part of the file.
package htmlreport

import (
	"embed"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"time"

	"vacate/internal/evict"
)

//go:embed assets/*
var assets embed.FS

// Eviction is what a page tells of one. All texts in it may come from elsewhere: the page shows
// them as texts.
type Eviction struct {
	ID      string       `json:"id"`
	VM      string       `json:"vm"`
	From    string       `json:"from"`
	To      string       `json:"to"`
	Started time.Time    `json:"started"`
	Outcome string       `json:"outcome"`
	Reason  string       `json:"reason,omitempty"`
	Report  evict.Report `json:"report"`
	Trace   *evict.Trace `json:"trace,omitempty"` // nil: not known
	// Charts are what others have measured, such as the throughput of guests. Times in them are
	// seconds after the report's Begun.
	Charts []Chart `json:"charts,omitempty"`
	// Notes are paragraphs ahead of all.
	Notes []string `json:"notes,omitempty"`
}

// Chart is lines over time.
type Chart struct {
	Title string `json:"title"`
	Unit  string `json:"unit"` // of the values
	Lines []Line `json:"lines"`
}

// Line is points of a time, in seconds, and a value; in order of time.
type Line struct {
	Name   string       `json:"name"`
	Points [][2]float64 `json:"points"`
}

// Write writes the page of an eviction.
func Write(w io.Writer, e Eviction) error {
	script, err := assets.ReadFile("assets/eviction.js")
	if err != nil {
		return err
	}
	return WritePage(w, fmt.Sprintf("Eviction of %s", e.VM), string(script), e)
}

var frame = template.Must(template.New("page").Parse(`<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{{.Title}}</title>
<style>{{.Style}}</style>
<body>
<main id="main"><noscript>The figures of this page are drawn by a script that is part of it.</noscript></main>
<script type="application/json" id="data">{{.Data}}</script>
<script>{{.Script}}</script>
</body>
</html>
`))

// WritePage writes a page whose script draws the data, with what all pages have (assets/page.js).
// The script must put in all texts as texts.
func WritePage(w io.Writer, title, script string, data any) error {
	read := func(names ...string) (string, error) {
		all := ""
		for _, n := range names {
			b, err := assets.ReadFile("assets/" + n)
			if err != nil {
				return "", err
			}
			all += string(b) + "\n"
		}
		return all, nil
	}
	style, err := read("uPlot.min.css", "page.css")
	if err != nil {
		return err
	}
	shared, err := read("uPlot.iife.min.js", "page.js")
	if err != nil {
		return err
	}
	// Marshal writes <, > and & as escapes: nothing in it can end the element.
	b, err := json.Marshal(data)
	if err != nil {
		return err
	}
	return frame.Execute(w, struct {
		Title  string
		Style  template.CSS
		Script template.JS
		Data   template.JS
	}{title, template.CSS(style), template.JS(shared + script), template.JS(b)}) // #nosec G203 -- ours, and JSON without < and >
}
