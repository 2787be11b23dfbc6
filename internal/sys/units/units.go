// Package units has the size of a page, and writes sizes for people.
package units

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// PageSize is the smallest page of x86-64, in bytes. QEMU migrates memory in this unit.
const PageSize = 4096

var prefixes = []string{"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}

// Size writes a number of bytes with a binary prefix: as a whole number if it is one or has three
// digits, else with one decimal.
func Size(n uint64) string {
	f, i := float64(n), 0
	for f >= 1024 && i < len(prefixes)-1 {
		f, i = f/1024, i+1
	}
	if f == float64(uint64(f)) || f >= 100 {
		return fmt.Sprintf("%.0f %s", f, prefixes[i])
	}
	return fmt.Sprintf("%.1f %s", f, prefixes[i])
}

// Fine writes a number of bytes rounded down to KiB or MiB, for sizes that a sentence compares and
// that may differ by little.
func Fine(n uint64) string {
	switch {
	case n < 10<<10:
		return fmt.Sprintf("%d bytes", n)
	case n < 10<<20:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

// Exact writes a number of bytes with the largest binary prefix that leaves at most three
// decimals. Two numbers that differ never read the same.
func Exact(n uint64) string {
	if n == 0 {
		return "0"
	}
	i := min((bits.Len64(n)-1)/10, 5) // n modulo the unit, times 1000, is less than 1<<64
	for unit := uint64(1) << (10 * i); n%unit*1000%unit != 0; unit >>= 10 {
		i--
	}
	// The part below the point is a multiple of 1/1000 of the unit, so that no digit is lost.
	unit := uint64(1) << (10 * i)
	text := strconv.FormatUint(n/unit, 10)
	if rest := n % unit * 1000 / unit; rest > 0 {
		text += "." + strings.TrimRight(fmt.Sprintf("%03d", rest), "0")
	}
	return text + " " + prefixes[i]
}
