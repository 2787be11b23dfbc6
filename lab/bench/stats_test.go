package bench

import (
	"math"
	"testing"
)

// series makes steps from -2 s on: 20 at the rate before, then the others.
func series(before float64, rates ...float64) []Point {
	var s []Point
	for i := range 20 + len(rates) {
		rate := before
		if i >= 20 {
			rate = rates[i-20]
		}
		s = append(s, Point{round(float64(i-20) * stepS), rate})
	}
	return s
}

func repeat(rate float64, n int) []float64 {
	r := make([]float64, n)
	for i := range r {
		r[i] = rate
	}
	return r
}

func join(parts ...[]float64) (all []float64) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func TestRecovery(t *testing.T) {
	for name, c := range map[string]struct {
		rates []float64
		from  float64
		want  float64 // NaN: never
	}{
		"a step":                {join(repeat(0, 10), repeat(100, 30)), 0.3, 1.0},
		"exactly 90 %":          {join(repeat(0, 10), repeat(90, 30)), 0.3, 1.0},
		"a little less":         {join(repeat(0, 10), repeat(89, 30)), 0.3, math.NaN()},
		"not before the switch": {repeat(100, 40), 0.52, 0.6},
		"switch at a step":      {repeat(100, 40), 0.5, 0.5},
		"never down":            {repeat(100, 40), 0, 0},
		// One lost step pulls 500 ms below 90 %, wherever it is.
		"a relapse within a second": {join(repeat(0, 10), repeat(100, 9), []float64{0},
			repeat(100, 30)), 0.1, 2.0},
		"a relapse later": {join(repeat(0, 10), repeat(100, 14), []float64{0}, repeat(100, 30)),
			0.1, 1.0},
		"too short a series": {join(repeat(0, 10), repeat(100, 13)), 0.1, math.NaN()},
		"just long enough":   {join(repeat(0, 10), repeat(100, 14)), 0.1, 1.0},
		"smoothed": {join(repeat(0, 10), []float64{80, 100, 80, 100, 100},
			repeat(100, 20)), 0.1, 1.0},
		"never":     {repeat(0, 40), 0.1, math.NaN()},
		"no series": {nil, 0, math.NaN()},
	} {
		got := recovery(series(100, c.rates...), 100, c.from)
		switch {
		case got == nil && math.IsNaN(c.want):
		case got == nil || math.Abs(*got-c.want) > 1e-9:
			t.Errorf("%s: recovery %v, want %v", name, show(got), c.want)
		}
	}
}

func show(v *float64) any {
	if v == nil {
		return nil
	}
	return *v
}

func TestWorkLost(t *testing.T) {
	for name, c := range map[string]struct {
		rates []float64
		end   float64
		want  float64
	}{
		"nothing":          {repeat(100, 20), 2, 0},
		"all":              {repeat(0, 20), 2, 2},
		"a half":           {repeat(50, 20), 2, 1},
		"up to the end":    {repeat(0, 20), 1.25, 1.25},
		"more than before": {repeat(150, 20), 1, -0.5},
		"no eviction":      {nil, 0, 0},
	} {
		if got := workLost(series(100, c.rates...), 100, c.end); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%s: lost %v s, want %v", name, got, c.want)
		}
	}
}

func TestRateBefore(t *testing.T) {
	if got := rateBefore(series(100, repeat(7, 100)...)); got == nil || *got != 100 {
		t.Errorf("rate before is %v, want 100", show(got))
	}
	if got := rateBefore(series(0, 1, 2)); got != nil {
		t.Errorf("rate of a guest that did nothing is %v, want none", *got)
	}
	if got := rateBefore(nil); got != nil {
		t.Errorf("rate of no series is %v, want none", *got)
	}
}

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   spread
	}{
		{nil, spread{}},
		{[]float64{3}, spread{3, 3, 3, 1}},
		{[]float64{4, 1, 2}, spread{2, 1, 4, 3}},
		{[]float64{4, 1, 2, 3}, spread{2.5, 1, 4, 4}},
	} {
		if got := spreadOf(c.values); got != c.want {
			t.Errorf("spread of %v is %v, want %v", c.values, got, c.want)
		}
	}
}

// Ratios are of the same repetition, where both have the figure.
func TestRatio(t *testing.T) {
	r := Result{Runs: []Run{
		{Strategy: "vacate", Rep: 1, Total: ptr(1.0)},
		{Strategy: baseline, Rep: 1, Total: ptr(2.0)},
		{Strategy: "vacate", Rep: 2, Total: ptr(30.0)},
		{Strategy: baseline, Rep: 2, Total: ptr(10.0)},
		{Strategy: "vacate", Rep: 3, Total: ptr(30.0)},
		{Strategy: baseline, Rep: 3},
	}}
	total := times[3]
	if got := spreadOf(r.ratio("vacate", total)); got != (spread{1.75, 0.5, 3, 2}) {
		t.Errorf("ratios of %s: %v", total.title, got)
	}
}
