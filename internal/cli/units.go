package cli

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// MiB is a flag for a size such as 512M or 1G, kept in MiB.
type MiB int

func (m *MiB) Type() string { return "SIZE" }

func (m MiB) String() string {
	if m != 0 && m%1024 == 0 {
		return strconv.Itoa(int(m)/1024) + "G"
	}
	return strconv.Itoa(int(m)) + "M"
}

func (m *MiB) Set(s string) error {
	factor := 1
	digits, ok := strings.CutSuffix(s, "M")
	if !ok {
		if digits, ok = strings.CutSuffix(s, "G"); ok {
			factor = 1024
		}
	}
	n, err := strconv.ParseUint(digits, 10, 20)
	if !ok || err != nil {
		return fmt.Errorf("size %.40q: want a whole number of MiB or GiB, such as 512M or 1G, "+
			"below 1048576", s)
	}
	*m = MiB(int(n) * factor)
	return nil
}

// Rate is a flag for bits per second, such as 1Gbit; "none" is 0.
type Rate uint64

func (r *Rate) Type() string { return "RATE" }

var rateUnits = []struct {
	suffix string
	bits   float64
}{{"Gbit", 1e9}, {"Mbit", 1e6}, {"kbit", 1e3}}

func (r Rate) String() string {
	if r == 0 {
		return "none"
	}
	for _, u := range rateUnits {
		if float64(r) >= u.bits {
			return strconv.FormatFloat(float64(r)/u.bits, 'f', -1, 64) + u.suffix
		}
	}
	return strconv.FormatUint(uint64(r), 10) + "bit"
}

// Limits of what the link's shaper can do.
const (
	leastRate = 1e5
	mostRate  = 4e11
)

func (r *Rate) Set(s string) error {
	if s == "none" {
		*r = 0
		return nil
	}
	for _, u := range rateUnits {
		digits, ok := strings.CutSuffix(s, u.suffix)
		if !ok || strings.Trim(digits, "0123456789.") != "" {
			continue
		}
		n, err := strconv.ParseFloat(digits, 64)
		n = math.Round(n * u.bits)
		if err != nil || !(n >= leastRate && n <= mostRate) {
			break
		}
		*r = Rate(n)
		return nil
	}
	return fmt.Errorf("rate %.40q: want none, or 100kbit to 400Gbit with one of the units kbit, "+
		"Mbit, Gbit, such as 1Gbit", s)
}
