package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"vacate/internal/guest/pageclass"
)

// cursor reads a body. The first error sticks, and then everything reads as zero.
type cursor struct {
	b   []byte
	err error
}

func (c *cursor) fail(format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf(format, args...)
	}
	c.b = nil
}

func (c *cursor) byte() byte {
	if len(c.b) == 0 {
		c.fail("it ends too early")
		return 0
	}
	v := c.b[0]
	c.b = c.b[1:]
	return v
}

// number reads a number of at most limit.
func (c *cursor) number(what string, limit uint64) uint64 {
	v, n := binary.Uvarint(c.b)
	if n <= 0 {
		c.fail("no number where that of %s should be", what)
		return 0
	}
	if v > limit {
		c.fail("%d is too much for %s, at most %d", v, what, limit)
		return 0
	}
	c.b = c.b[n:]
	return v
}

func (c *cursor) signed() int64 {
	v, n := binary.Varint(c.b)
	if n <= 0 {
		c.fail("no number where one should be")
		return 0
	}
	c.b = c.b[n:]
	return v
}

func (c *cursor) duration(what string) time.Duration {
	const most = uint64(1<<63-1) / uint64(time.Microsecond)
	return time.Duration(c.number(what, most)) * time.Microsecond
}

func (c *cursor) text(what string, limit int) string {
	n := c.number("the length of "+what, uint64(limit))
	if n > uint64(len(c.b)) {
		c.fail("%s ends too early", what)
		return ""
	}
	s := string(c.b[:n])
	c.b = c.b[n:]
	return s
}

func (c *cursor) costs() (k Costs) {
	k.Elapsed = c.duration("the elapsed time")
	k.CPU = c.duration("the CPU time")
	since := c.duration("the time since prepare")
	k.Prepared = since - time.Microsecond
	k.Processes = int(c.number("the prepared processes", 1<<31))
	return k
}

func (c *cursor) end() error {
	if c.err == nil && len(c.b) > 0 {
		c.fail("%d bytes too many", len(c.b))
	}
	return c.err
}

func decodeDone(body []byte) (Costs, error) {
	c := cursor{b: body}
	k := c.costs()
	return k, c.end()
}

// decodeSurvey needs memory for at most frames pages: 10 bytes each, and an eighth.
func decodeSurvey(body []byte, frames uint64) (*pageclass.Survey, Costs, bool, error) {
	c := cursor{b: body}
	k := c.costs()
	marks := c.byte()
	if marks&^(markFresh|markIncomplete) != 0 {
		c.fail("unknown marks %#x", marks)
	}
	s := &pageclass.Survey{Fresh: marks&markFresh != 0}
	s.Processes = c.processes()
	s.Pages = c.pages(len(s.Processes), frames)
	s.Sequence = c.sequence(uint64(len(s.Pages)))
	if err := c.end(); err != nil {
		return nil, Costs{}, false, err
	}
	return s, k, marks&markIncomplete != 0, nil
}

func (c *cursor) processes() []pageclass.Process {
	n := c.number("the processes", maxProcesses)
	if n > uint64(len(c.b))/5 { // the least that one takes
		c.fail("%d processes in %d bytes", n, len(c.b))
		return nil
	}
	list := make([]pageclass.Process, n)
	for i := range list {
		p := &list[i]
		p.PID = int(c.number("a process's number", 1<<31-1))
		marks := c.byte()
		if marks&^(procActive|procOnCPU|procRecent) != 0 {
			c.fail("unknown marks %#x of a process", marks)
		}
		p.Active = marks&procActive != 0
		p.OnCPU = marks&procOnCPU != 0
		p.LastRun = c.duration("a process's last run")
		p.CPUTime = c.duration("a process's CPU time")
		p.Recent = -1
		if marks&procRecent != 0 {
			p.Recent = c.duration("a process's recent CPU time")
		}
		p.Name = c.text("a process's name", maxName)
		if c.err != nil {
			return nil
		}
	}
	return list
}

func (c *cursor) pages(processes int, frames uint64) []pageclass.Page {
	n := c.number("the kinds of pages", maxPalette)
	if n > uint64(len(c.b))/4 {
		c.fail("%d kinds of pages in %d bytes", n, len(c.b))
		return nil
	}
	palette := make([]pageclass.Page, n)
	for i := range palette {
		p := pageclass.Page{Kind: pageclass.Kind(c.byte()), Class: pageclass.Class(c.byte()),
			Flags: pageclass.Flags(c.byte())}
		p.Owner = uint16(c.number("an owner", uint64(processes)))
		switch {
		case p.Flags&pageclass.Skippable != 0:
			c.fail("it calls pages skippable, which an agent cannot know")
		case p.Flags&^knownFlags != 0 || p.Kind >= pageclass.Kinds || p.Class >= pageclass.Classes:
			c.fail("unknown kind, class or flags of a page: %d, %d, %#x", p.Kind, p.Class,
				uint8(p.Flags))
		case p.Kind == pageclass.None && p != pageclass.Page{}:
			c.fail("an unknown page has a class, flags or an owner")
		}
		palette[i] = p
	}
	count := c.number("the pages", frames)
	if c.err != nil {
		return nil
	}
	// Each byte of a run codes at most any number of pages, so the memory is bounded by what
	// the caller says the guest has, not by the answer.
	pages := make([]pageclass.Page, 0, count)
	for left := count; left > 0; {
		v := c.number("a run's kind", 2*maxPalette)
		run := uint64(1)
		if v&1 != 0 {
			run = c.number("a run", left) + 2
		}
		if v>>1 >= uint64(len(palette)) || run > left {
			c.fail("a run of pages leads outside")
		}
		if c.err != nil {
			return nil
		}
		p := palette[v>>1]
		for range run {
			pages = append(pages, p)
		}
		left -= run
	}
	return pages
}

func (c *cursor) sequence(frames uint64) []uint32 {
	count := c.number("the sequence", frames)
	if c.err != nil || count == 0 {
		return nil
	}
	seen := make([]uint64, (frames+63)/64)
	list := make([]uint32, 0, count)
	var behind int64 // at most frames, as is all that follows
	for left := count; left > 0; {
		delta := c.signed()
		run := c.number("a run of the sequence", left)
		first := behind + delta
		if delta < -int64(frames) || delta > int64(frames) || first < 0 || run == 0 ||
			uint64(first)+run > frames {
			c.fail("the sequence leads outside")
		}
		if c.err != nil {
			return nil
		}
		for f := uint64(first); f < uint64(first)+run; f++ {
			if seen[f/64]>>(f%64)&1 != 0 {
				c.fail("frame %d is twice in the sequence", f)
				return nil
			}
			seen[f/64] |= 1 << (f % 64)
			list = append(list, uint32(f))
		}
		behind = first + int64(run)
		left -= run
	}
	return list
}

func decodeRefusal(body []byte) error {
	if len(body) > maxText {
		return errors.New("it refuses at length")
	}
	// Texts of a guest go to terminals.
	return fmt.Errorf("the agent in the guest refuses: %q", strings.ToValidUTF8(string(body), "?"))
}
