package pressure

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// parseKeys reads what memory.stat, cpu.stat and vmstat have, a name and a number in each line; or
// a number alone, which gets the name "". Lines with another word in place of the number, such as
// "max", are left out.
func parseKeys(b []byte) (map[string]uint64, error) {
	keys := map[string]uint64{}
	for line := range bytes.Lines(b) {
		name, number, two := strings.Cut(strings.TrimSuffix(string(line), "\n"), " ")
		if !two {
			name, number = "", name
		}
		n, err := strconv.ParseUint(number, 10, 64)
		switch {
		case two && !word(name):
			return nil, fmt.Errorf("not a name and a number: %.100q", line)
		case errors.Is(err, strconv.ErrRange), err != nil && !word(number):
			return nil, fmt.Errorf("not a number: %.100q", line)
		case err == nil:
			keys[name] = n
		}
	}
	return keys, nil
}

// parseStall reads a file of pressure stall information (Documentation/accounting/psi.rst), of
// which it takes the totals:
//
//	some avg10=0.00 avg60=0.00 avg300=0.00 total=0
//	full avg10=0.00 avg60=0.00 avg300=0.00 total=0
//
// Before Linux 5.13, there is no second line for cpu.
func parseStall(b []byte) (Stall, error) {
	var s Stall
	seen := false
	for line := range bytes.Lines(b) {
		fields := strings.Fields(string(line))
		if len(fields) < 2 {
			return s, fmt.Errorf("not pressure stall information: %.100q", line)
		}
		total, ok := strings.CutPrefix(fields[len(fields)-1], "total=")
		n, err := strconv.ParseInt(total, 10, 64)
		if !ok || err != nil || n < 0 || n > int64(1<<63-1)/int64(time.Microsecond) {
			return s, fmt.Errorf("no total of pressure stall information: %.100q", line)
		}
		switch d := time.Duration(n) * time.Microsecond; fields[0] {
		case "some":
			s.Some, seen = d, true
		case "full":
			s.Full = d
		}
	}
	if !seen {
		return s, errors.New("pressure stall information lacks its line \"some\"")
	}
	return s, nil
}

// word reports whether a string may be the name of a key.
func word(s string) bool {
	return s != "" && strings.IndexFunc(s, func(c rune) bool {
		return c != '_' && c != '.' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') &&
			(c < '0' || c > '9')
	}) < 0
}
