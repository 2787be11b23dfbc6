package ui

import (
	"math"
	"unicode/utf8"

	hostv1 "vacate/internal/host/api/v1"
)

// What daemons and a fleet's brain tell may be wrong, and may be much. These bounds are far above
// what they tell, and far below what keeps a browser from its work.
const (
	mostVMs      = 1000 // of a host
	mostTexts    = 200  // of a list
	mostText     = 2000 // bytes
	mostPeers    = 200
	mostListed   = 1000 // evictions of a host
	mostAtOnce   = 64   // evictions of a host that are followed
	mostOfOne    = 64 << 10
	mostClasses  = 64
	mostMapParts = 2 * mapParts
	mostStalls   = 8
	mostName     = 253
	mostLabels   = 64
	mostRules    = 1000
)

// mostReport is how large a report may be that the page shows, in bytes.
const mostReport = 16 << 20

// MaxAnswer bounds what a daemon or a brain answers at once, in bytes: 10,000 hosts have room.
const MaxAnswer = 64 << 20

// brief cuts a text that is too long.
func brief(s string) string {
	if len(s) <= mostText {
		return s
	}
	at := mostText
	for at > 0 && !utf8.RuneStart(s[at]) {
		at--
	}
	return s[:at] + "…"
}

// briefs does so with a list of texts.
func briefs(list []string) []string {
	out := make([]string, 0, min(len(list), mostTexts))
	for _, s := range list[:min(len(list), mostTexts)] {
		out = append(out, brief(s))
	}
	return out
}

func within(n, most float64) bool { return n >= 0 && n <= most }

// finite is a number that JSON can have; nil for none.
func finite(n *float64) *float64 {
	if n == nil || math.IsNaN(*n) || math.IsInf(*n, 0) {
		return nil
	}
	return n
}

// odd reports whether a map is none that was asked for.
func odd(m *hostv1.GetMapResponse) bool {
	n := len(m.Came)
	if n > mostMapParts || len(m.Why) != n || len(m.Class) != n ||
		len(m.Reasons) > mostClasses || len(m.Classes) > mostClasses {
		return true
	}
	for i := range n {
		if int(m.Why[i]) >= max(1, len(m.Reasons)) || int(m.Class[i]) >= max(1, len(m.Classes)) {
			return true
		}
	}
	return false
}
