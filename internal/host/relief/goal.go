package relief

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Goal is the state that a host shall reach. The zero value is no goal, and always met.
type Goal struct {
	// CPU is how much may be wanted for each core, such as 0.8; 0: whatever.
	CPU float64
	// Free is how much memory shall be available, in bytes; 0: any.
	Free uint64
}

// DefaultGoal is that no VM starves.
var DefaultGoal = Goal{CPU: 1 / Starving}

// Met reports whether a host is as it should be.
func (g Goal) Met(h Host) bool {
	return (g.CPU == 0 || h.wants() <= g.CPU*h.CPUs) && (g.Free == 0 || h.Available >= g.Free)
}

// String is what ParseGoal takes.
func (g Goal) String() string {
	var parts []string
	if g.CPU != 0 {
		parts = append(parts, "cpu<"+strconv.FormatFloat(math.Round(g.CPU*1e4)/100, 'f', -1, 64)+
			"%")
	}
	if g.Free != 0 {
		for _, u := range suffixes {
			if g.Free%u.bytes == 0 {
				parts = append(parts, fmt.Sprintf("free %d%s", g.Free/u.bytes, u.name))
				break
			}
		}
	}
	return strings.Join(parts, ", ")
}

var suffixes = []struct {
	name  string
	bytes uint64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

// ParseGoal reads a goal: "cpu<80%" (of what is wanted, for each core: it may be more than 100 %),
// "free 8GiB", or both with a comma.
func ParseGoal(s string) (Goal, error) {
	var g Goal
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		if p, ok := strings.CutPrefix(part, "cpu<"); ok && g.CPU == 0 {
			n, err := strconv.ParseFloat(strings.TrimSuffix(p, "%"), 64)
			if err != nil || !strings.HasSuffix(p, "%") || !(n >= 1 && n <= 1000) {
				return Goal{},
					fmt.Errorf("goal %.40q: want a share of CPU from 1%% to 1000%%, such as "+
						"cpu<80%%", part)
			}
			g.CPU = n / 100
			continue
		}
		if p, ok := strings.CutPrefix(part, "free "); ok && g.Free == 0 {
			p = strings.TrimSpace(p)
			for _, u := range suffixes {
				number, is := strings.CutSuffix(p, u.name)
				if !is {
					continue
				}
				n, err := strconv.ParseUint(strings.TrimSpace(number), 10, 64)
				if err != nil || n == 0 || n > math.MaxInt64/u.bytes {
					break
				}
				g.Free = n * u.bytes
				break
			}
			if g.Free != 0 {
				continue
			}
			return Goal{}, fmt.Errorf("goal %.40q: want a size of memory, such as free 8GiB", part)
		}
		return Goal{}, fmt.Errorf("goal %.40q: want cpu<80%%, free 8GiB, or both with a comma", s)
	}
	return g, nil
}
