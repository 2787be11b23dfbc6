package view

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Mode is what becomes of decisions.
type Mode string

const (
	Watch Mode = "watch" // they are logged
	Ask   Mode = "ask"   // they wait for an operator's yes
	Auto  Mode = "auto"  // they are carried out
)

// Policy is how a fleet is kept in balance.
type Policy struct {
	Mode Mode `json:"mode"`

	// A VM starves that gets less than Starving of the CPU it wants.
	Starving float64 `json:"starving"`
	// Free is the share of its memory that a host shall have available; VMs leave one that has
	// less. 0: whatever.
	Free float64 `json:"free,omitempty"`
	// Sustain is how long VMs must have starved without a break.
	Sustain time.Duration `json:"sustain_ns"`
	// Settle is how long a host is left alone after a VM has left it or has come, as what that
	// brought has to show first, and after nothing would have helped.
	Settle time.Duration `json:"settle_ns"`
	// CoolDown is how long a VM stays where it came to, or from where it could not be evicted.
	// Drains do not wait for it.
	CoolDown time.Duration `json:"cool_down_ns"`
	// MinGain is how many more cores all VMs must get by a move that is for the sake of CPU.
	MinGain float64 `json:"min_gain"`

	// MaxLoad of the host that a VM goes to, with it: CPU wanted for each core.
	MaxLoad float64 `json:"max_load"`
	// Reserve is the share of a host's memory that must be left there.
	Reserve float64 `json:"reserve"`
	// Overcommit is how much memory a host's VMs may have together by their size, as a share of
	// its own.
	Overcommit float64 `json:"overcommit"`

	// How many evictions may be under way at once: from or to one host, over one link that hosts
	// share, and in all. 0: as many as there may be otherwise.
	PerHost int `json:"per_host"`
	PerLink int `json:"per_link,omitempty"`
	InAll   int `json:"in_all,omitempty"`

	// Late is how old the last report of a host may be. One that is late neither gives nor takes
	// a VM; it is not taken for dead.
	Late time.Duration `json:"late_ns"`
	// Quiet are the hours in which nothing is moved but for drains.
	Quiet []Hours `json:"quiet,omitempty"`
}

// DefaultPolicy is slow to act, and sends VMs only where there is room to spare.
func DefaultPolicy() Policy {
	return Policy{
		Mode: Watch, Starving: 0.9, Sustain: 30 * time.Second, Settle: time.Minute,
		CoolDown: 30 * time.Minute, MinGain: 0.1, MaxLoad: 0.8, Reserve: 0.1, Overcommit: 1,
		PerHost: 2, PerLink: 8, InAll: 0, Late: 15 * time.Second,
	}
}

// Check refuses a policy that cannot be followed.
func (p Policy) Check() error {
	switch {
	case p.Mode != Watch && p.Mode != Ask && p.Mode != Auto:
		return fmt.Errorf("policy: mode %.20q: want watch, ask or auto", p.Mode)
	case !(p.Starving > 0 && p.Starving <= 1):
		return fmt.Errorf("policy: starving is %g: want more than 0, at most 1", p.Starving)
	case !within(p.Free, 0.9) || !within(p.Reserve, 0.9):
		return fmt.Errorf("policy: free is %g, reserve %g: want shares of memory from 0 to 0.9",
			p.Free, p.Reserve)
	case !(p.MaxLoad > 0 && p.MaxLoad <= 10):
		return fmt.Errorf("policy: max_load is %g: want more than 0, at most 10", p.MaxLoad)
	case !(p.Overcommit > 0 && p.Overcommit <= 10):
		return fmt.Errorf("policy: overcommit is %g: want more than 0, at most 10", p.Overcommit)
	case !within(p.MinGain, mostCores):
		return fmt.Errorf("policy: min_gain is %g: want cores, from 0 to %d", p.MinGain,
			mostCores)
	case min(p.PerHost, p.PerLink, p.InAll) < 0:
		return fmt.Errorf("policy: per_host, per_link and in_all are from 0")
	case min(p.Sustain, p.Settle, p.CoolDown) < 0:
		return fmt.Errorf("policy: sustain, settle and cool_down are from 0")
	case p.Late < time.Second:
		return fmt.Errorf("policy: late is %v: want at least a second", p.Late)
	}
	for _, h := range p.Quiet {
		if err := h.check(); err != nil {
			return fmt.Errorf("policy: %w", err)
		}
	}
	return nil
}

// QuietAt reports whether a moment is in the quiet hours, in its own time zone.
func (p Policy) QuietAt(at time.Time) bool {
	for _, h := range p.Quiet {
		if h.Has(at) {
			return true
		}
	}
	return false
}

// Hours are some hours of some days of the week. Those that end before they begin last into the
// next day.
type Hours struct {
	Days     [7]bool // on which they begin, from Sunday
	From, To int     // minutes of the day
}

var days = []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

// ParseHours reads hours, such as "22:00-06:00", "mon-fri 08:00-18:00" or "sat,sun 00:00-24:00".
func ParseHours(s string) (Hours, error) {
	words := strings.Fields(s)
	var h Hours
	bad := fmt.Errorf("hours %.40q: want such as 22:00-06:00, mon-fri 08:00-18:00 or sat,sun "+
		"00:00-24:00", s)
	switch len(words) {
	case 1:
		h.Days = [7]bool{true, true, true, true, true, true, true}
	case 2:
		for part := range strings.SplitSeq(words[0], ",") {
			from, to, ok := strings.Cut(part, "-")
			if !ok {
				to = from
			}
			first, last := day(from), day(to)
			if first < 0 || last < 0 {
				return Hours{}, bad
			}
			for d := first; ; d = (d + 1) % 7 {
				h.Days[d] = true
				if d == last {
					break
				}
			}
		}
	default:
		return Hours{}, bad
	}
	from, to, _ := strings.Cut(words[len(words)-1], "-")
	var ok, also bool
	h.From, ok = minutes(from)
	h.To, also = minutes(to)
	if !ok || !also || h.check() != nil {
		return Hours{}, bad
	}
	return h, nil
}

func day(s string) int {
	for i, d := range days {
		if d == s {
			return i
		}
	}
	return -1
}

// minutes of the day that a clock's time is; 24:00 is the end of one.
func minutes(s string) (int, bool) {
	if len(s) != 5 || s[2] != ':' {
		return 0, false
	}
	digit := func(i int) int {
		if s[i] < '0' || s[i] > '9' {
			return 1000
		}
		return int(s[i] - '0')
	}
	h, m := 10*digit(0)+digit(1), 10*digit(3)+digit(4)
	return 60*h + m, h <= 24 && m < 60 && 60*h+m <= 24*60
}

func (h Hours) check() error {
	if h.Days == [7]bool{} {
		return errors.New("hours of no day")
	}
	if h.From < 0 || h.From >= 24*60 || h.To < 0 || h.To > 24*60 || h.From == h.To {
		return fmt.Errorf("hours from minute %d to %d of a day: want times of a day that differ",
			h.From, h.To)
	}
	return nil
}

// Has reports whether a moment is in these hours, in its own time zone.
func (h Hours) Has(at time.Time) bool {
	minute, today := 60*at.Hour()+at.Minute(), int(at.Weekday())
	if h.From < h.To {
		return h.Days[today] && minute >= h.From && minute < h.To
	}
	return h.Days[today] && minute >= h.From || h.Days[(today+6)%7] && minute < h.To
}

// String is what ParseHours takes.
func (h Hours) String() string {
	text := fmt.Sprintf("%02d:%02d-%02d:%02d", h.From/60, h.From%60, h.To/60, h.To%60)
	var on []string
	for i, d := range days {
		if h.Days[i] {
			on = append(on, d)
		}
	}
	if len(on) == 7 {
		return text
	}
	return strings.Join(on, ",") + " " + text
}

// MarshalText writes hours as ParseHours takes them.
func (h Hours) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText is the reverse.
func (h *Hours) UnmarshalText(b []byte) (err error) {
	*h, err = ParseHours(string(b))
	return err
}
