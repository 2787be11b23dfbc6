package agent

import (
	"cmp"
	"encoding/binary"
	"slices"
	"time"

	"vacate/internal/guest/pageclass"
)

// The body of a survey's frame; numbers are unsigned varints as in encoding/binary unless
// said otherwise:
//
//	costs      elapsed, CPU time, time since the last "prepare" plus 1 or 0 for none (all in
//	           microseconds), processes prepared; the body of "done" ends here
//	marks      byte: 1 fresh, 2 incomplete
//	processes  number, then for each: PID; byte: 1 active, 2 on a CPU, 4 recent is known;
//	           time since it ran, CPU time, recent CPU time if known (microseconds); length
//	           of the name, name
//	palette    number, then for each: kind, class, flags (a byte each), owner
//	pages      number, then runs: twice the index in the palette, for one page; or the
//	           same plus 1, then the number of pages less 2
//	sequence   number, then runs of ascending frames: first frame less the frame behind the
//	           run before (signed varint), number
const (
	markFresh = 1 << iota
	markIncomplete
)

const (
	procActive = 1 << iota
	procOnCPU
	procRecent
)

// Limits of the coding. They bound what a hostile answer can cost.
const (
	maxFrames    = 1 << 32 // 16 TiB
	maxAnswer    = 64 << 20
	maxProcesses = 1<<16 - 1
	maxPalette   = 1 << 16
	maxName      = 64
	// knownFlags are those that an agent may set. Skippable is not among them.
	knownFlags = pageclass.Accessed | pageclass.Active | pageclass.Dirty | pageclass.Exec |
		pageclass.Mapped
)

// Costs are what an answer cost the guest.
type Costs struct {
	Elapsed time.Duration // from when the agent read the request
	CPU     time.Duration // of the agent, for this request
	// Prepared is how long before the answer the last "prepare" was; negative if there was none.
	Prepared  time.Duration
	Processes int // whose accessed bits the last "prepare" cleared
}

func appendCosts(b []byte, c *Costs) []byte {
	b = binary.AppendUvarint(b, micros(c.Elapsed))
	b = binary.AppendUvarint(b, micros(c.CPU))
	since := uint64(0)
	if c.Prepared >= 0 {
		since = micros(c.Prepared) + 1
	}
	b = binary.AppendUvarint(b, since)
	return binary.AppendUvarint(b, uint64(c.Processes))
}

func micros(d time.Duration) uint64 { return uint64(max(d, 0) / time.Microsecond) }

// AppendDone appends the frame that answers a "prepare".
func AppendDone(b []byte, id uint64, c *Costs) []byte {
	return appendFrame(b, typeDone, id, appendCosts(nil, c))
}

// AppendRefusal appends the frame that says why there is no answer.
func AppendRefusal(b []byte, id uint64, why string) []byte {
	return appendFrame(b, typeRefusal, id, []byte(why[:min(len(why), maxText)]))
}

// AppendSurvey appends the frame that answers an "ask". If the body would be longer than maxBytes,
// it leaves out the sequence, then flags and owners as well. If that is not enough, it refuses.
// incomplete says that there was not time for everything. The survey's texts are cut at 64 bytes,
// its flag Skippable is left out, and so are processes behind the 65535th.
func AppendSurvey(b []byte, id uint64, c *Costs, s *pageclass.Survey, incomplete bool,
	maxBytes int) []byte {
	start := appendCosts(nil, c)
	body := appendSurvey(start, s, incomplete, true, true)
	if len(body) > maxBytes {
		body = appendSurvey(start, s, true, true, false)
	}
	if len(body) > maxBytes {
		body = appendSurvey(start, s, true, false, false)
	}
	if len(body) > maxBytes {
		return AppendRefusal(b, id, "the answer would be longer than the host reads")
	}
	return appendFrame(b, typeSurvey, id, body)
}

func appendSurvey(start []byte, s *pageclass.Survey, incomplete, detail, sequence bool) []byte {
	b := slices.Clip(start)
	var marks byte
	if s.Fresh {
		marks |= markFresh
	}
	if incomplete {
		marks |= markIncomplete
	}
	b = append(b, marks)
	b = appendProcesses(b, s.Processes[:min(len(s.Processes), maxProcesses)])
	b = appendPages(b, s.Pages, detail)
	if !sequence {
		return append(b, 0)
	}
	return appendSequence(b, s.Sequence)
}

func appendProcesses(b []byte, list []pageclass.Process) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for i := range list {
		p := &list[i]
		b = binary.AppendUvarint(b, uint64(max(p.PID, 0)))
		var marks byte
		if p.Active {
			marks |= procActive
		}
		if p.OnCPU {
			marks |= procOnCPU
		}
		if p.Recent >= 0 {
			marks |= procRecent
		}
		b = append(b, marks)
		b = binary.AppendUvarint(b, micros(p.LastRun))
		b = binary.AppendUvarint(b, micros(p.CPUTime))
		if p.Recent >= 0 {
			b = binary.AppendUvarint(b, micros(p.Recent))
		}
		name := p.Name[:min(len(p.Name), maxName)]
		b = binary.AppendUvarint(b, uint64(len(name)))
		b = append(b, name...)
	}
	return b
}

// appendPages gives the kinds of pages that begin the most runs the shortest indices.
func appendPages(b []byte, pages []pageclass.Page, detail bool) []byte {
	told := func(p pageclass.Page) pageclass.Page {
		p.Flags &= knownFlags
		if !detail {
			p.Flags, p.Owner = 0, 0
		}
		return p
	}
	type run struct {
		index int32
		n     uint32
	}
	runs := make([]run, 0, 4096)
	index := map[pageclass.Page]int32{}
	var palette []pageclass.Page
	var begun []int // runs of each
	for at := 0; at < len(pages); {
		p := told(pages[at])
		n := 1
		for at+n < len(pages) && (pages[at+n] == pages[at] || told(pages[at+n]) == p) {
			n++
		}
		at += n
		i, ok := index[p]
		if !ok && len(palette) == maxPalette-1 { // hostile or absurd; tell less
			return appendPages(b, pages, false)
		}
		if !ok {
			i = int32(len(palette))
			index[p] = i
			palette = append(palette, p)
			begun = append(begun, 0)
		}
		begun[i]++
		runs = append(runs, run{i, uint32(n)})
	}
	order := make([]int32, len(palette))
	for i := range order {
		order[i] = int32(i)
	}
	slices.SortStableFunc(order, func(x, y int32) int { return cmp.Compare(begun[y], begun[x]) })
	rank := make([]uint64, len(palette))
	b = binary.AppendUvarint(b, uint64(len(palette)))
	for r, i := range order {
		rank[i] = uint64(r)
		p := palette[i]
		b = append(b, byte(p.Kind), byte(p.Class), byte(p.Flags))
		b = binary.AppendUvarint(b, uint64(p.Owner))
	}
	b = binary.AppendUvarint(b, uint64(len(pages)))
	for _, r := range runs {
		if r.n == 1 {
			b = binary.AppendUvarint(b, rank[r.index]<<1)
			continue
		}
		b = binary.AppendUvarint(b, rank[r.index]<<1|1)
		b = binary.AppendUvarint(b, uint64(r.n-2))
	}
	return b
}

func appendSequence(b []byte, frames []uint32) []byte {
	b = binary.AppendUvarint(b, uint64(len(frames)))
	var behind int64
	for at := 0; at < len(frames); {
		n := 1
		for at+n < len(frames) && frames[at+n] == frames[at]+uint32(n) {
			n++
		}
		first := int64(frames[at])
		b = binary.AppendVarint(b, first-behind)
		b = binary.AppendUvarint(b, uint64(n))
		behind = first + int64(n)
		at += n
	}
	return b
}
