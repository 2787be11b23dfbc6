package bench

import (
	"math"
	"slices"
	"time"
)

const (
	step       = 100 * time.Millisecond
	stepS      = 0.1
	beforeTime = 2 * time.Second // how long the series begins before the eviction

	// Of recovery.
	smooth  = 5   // steps averaged
	hold    = 10  // steps that the average must hold
	enough  = 0.9 // of the rate before
	epsilon = stepS / 1000
)

// rateBefore returns the median rate of the steps before the eviction, or nil
// if the guest did no work.
func rateBefore(series []Point) *float64 {
	var rates []float64
	for _, p := range series {
		if p[0] < -epsilon {
			rates = append(rates, p[1])
		}
	}
	if m := median(rates); m > 0 {
		return &m
	}
	return nil
}

// Recovery is recovery for others' series, in steps of 100 ms.
func Recovery(series []Point, level, from float64) *float64 { return recovery(series, level, from) }

// recovery returns the begin of the first step, not before the time from, from
// which on for a second the mean rate over 500 ms is at least 90 % of before;
// nil if there is none in the series.
func recovery(series []Point, before, from float64) *float64 {
	held := 0
	for i := 0; i+smooth <= len(series); i++ {
		if series[i][0] < from-epsilon {
			continue
		}
		var sum float64
		for _, p := range series[i : i+smooth] {
			sum += p[1]
		}
		if sum/smooth < enough*before {
			held = 0
			continue
		}
		if held++; held == hold {
			return ptr(series[i-hold+1][0])
		}
	}
	return nil
}

// workLost returns how many seconds of work at the rate before are missing
// between 0 and end. It is negative if the guest did more.
func workLost(series []Point, before, end float64) float64 {
	var lost float64
	for _, p := range series {
		from, to := max(p[0], 0), min(p[0]+stepS, end)
		if from < to {
			lost += (to - from) * (before - p[1]) / before
		}
	}
	return lost
}

// median returns NaN for no values.
func median(values []float64) float64 {
	v := slices.Sorted(slices.Values(values))
	n := len(v)
	if n == 0 {
		return math.NaN()
	}
	return (v[(n-1)/2] + v[n/2]) / 2
}

// A spread is the median of a figure over repetitions, and its range.
type spread struct {
	median, min, max float64
	n                int
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	return spread{median(values), slices.Min(values), slices.Max(values), len(values)}
}
