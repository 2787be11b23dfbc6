package bench

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

// contended is a run whose VMs are back at different times.
func contended() ContentionRun {
	r := ContentionRun{Server: "memcached", Strategy: "vacate", Rate: 1e8, Rep: 1,
		Outcome: Completed, Total: seconds(2), Final: [2]float64{100, 100}}
	for i := range 60 {
		at := round(float64(i)/10 - 2)
		moves, stays := 50.0, 50.0
		if at >= 0.5 {
			stays = 100
		}
		if at >= 2 {
			moves = 100
		}
		r.Moves, r.Stays = append(r.Moves, Step{at, moves, 0.001, 0.002}), append(r.Stays,
			Step{at, stays, 0.001, 0.002})
	}
	return r
}

func TestContentionFiles(t *testing.T) {
	failed := contended()
	failed.Strategy, failed.Outcome, failed.Total, failed.Moves = "vacate:demand-only", Failed, nil,
		nil
	c := Contention{Version: Version, Runs: []ContentionRun{contended(), failed}}
	var svg, csv bytes.Buffer
	if err := errors.Join(c.SVG(&svg), c.CSV(&csv)); err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(&svg)
	lines := 0
	for {
		token, err := d.Token()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "polyline" {
			lines++
		}
	}
	if lines != 2 {
		t.Errorf("%d lines", lines)
	}
	if got := strings.Split(strings.TrimSpace(csv.String()), "\n"); len(got) != 3 ||
		!strings.HasPrefix(got[1], "memcached,vacate,100000000,1,completed,,,,2,") {
		t.Errorf("%q", got)
	}
	if s := failed.String(); !strings.Contains(s, "failed; runs there never") {
		t.Error(s)
	}
}

// TestRecoveries has both back when the sum is.
func TestRecoveries(t *testing.T) {
	r := contended()
	var stays, both []Point
	for i := range r.Stays {
		stays = append(stays, Point{r.Stays[i][0], r.Stays[i][1]})
		both = append(both, Point{r.Stays[i][0], r.Stays[i][1] + r.Moves[i][1]})
	}
	if m := mean(both, 3, 3.8); m != 200 {
		t.Errorf("the final level is %v", m)
	}
	if m := mean(both, 100, 200); m != 0 {
		t.Errorf("nothing is %v", m)
	}
	for _, c := range []struct {
		series []Point
		level  float64
		least  float64
		most   float64
	}{{stays, 100, 0.3, 0.5}, {both, 200, 1.7, 2}} {
		if back := recovery(c.series, c.level, 0); back == nil || *back < c.least ||
			*back > c.most {
			t.Errorf("back after %v, want %v to %v", back, c.least, c.most)
		}
	}
}
