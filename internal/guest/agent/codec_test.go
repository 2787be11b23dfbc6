package agent

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"vacate/internal/guest/pageclass"
)

func drawSurvey(t *rapid.T) *pageclass.Survey {
	s := &pageclass.Survey{Fresh: rapid.Bool().Draw(t, "fresh")}
	micro := rapid.Map(rapid.Int64Range(0, 1<<40),
		func(n int64) time.Duration { return time.Duration(n) * time.Microsecond })
	for range rapid.IntRange(0, 5).Draw(t, "processes") {
		p := pageclass.Process{
			PID:     rapid.IntRange(0, 1<<22).Draw(t, "pid"),
			Name:    string(rapid.SliceOfN(rapid.Byte(), 0, maxName).Draw(t, "name")),
			Active:  rapid.Bool().Draw(t, "active"),
			OnCPU:   rapid.Bool().Draw(t, "on cpu"),
			LastRun: micro.Draw(t, "last run"),
			CPUTime: micro.Draw(t, "cpu"),
			Recent:  -1,
		}
		if rapid.Bool().Draw(t, "recent known") {
			p.Recent = micro.Draw(t, "recent")
		}
		s.Processes = append(s.Processes, p)
	}
	for range rapid.IntRange(0, 20).Draw(t, "runs") {
		p := pageclass.Page{
			Kind:  pageclass.Kind(rapid.IntRange(0, int(pageclass.Kinds)-1).Draw(t, "kind")),
			Class: pageclass.Class(rapid.IntRange(0, int(pageclass.Classes)-1).Draw(t, "class")),
			Flags: pageclass.Flags(rapid.Byte().Draw(t, "flags")) & knownFlags,
			Owner: uint16(rapid.IntRange(0, len(s.Processes)).Draw(t, "owner")),
		}
		if p.Kind == pageclass.None {
			p = pageclass.Page{}
		}
		for range rapid.SampledFrom([]int{1, 2, 3, 600}).Draw(t, "length") {
			s.Pages = append(s.Pages, p)
		}
	}
	if n := len(s.Pages); n > 0 {
		all := make([]uint32, n)
		for i := range all {
			all[i] = uint32(i)
		}
		// Stretches in any order: the whole of it shuffled would hardly have runs.
		for range rapid.IntRange(0, 4).Draw(t, "cuts") {
			cut := rapid.IntRange(0, n-1).Draw(t, "cut")
			all = append(append([]uint32{}, all[cut:]...), all[:cut]...)
			all = all[:rapid.IntRange(0, len(all)).Draw(t, "kept")]
			if n = len(all); n == 0 {
				all = nil
				break
			}
		}
		s.Sequence = all
	}
	return s
}

func body(frame []byte) []byte { return frame[headerSize:] }

func TestSurveyRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSurvey(t)
		c := Costs{Elapsed: time.Second, CPU: time.Millisecond, Prepared: -1, Processes: 3}
		if rapid.Bool().Draw(t, "prepared") {
			c.Prepared = 5 * time.Second
		}
		frame := AppendSurvey([]byte("before"), 7, &c, s, false, 1<<30)[len("before"):]
		h, at, ok := findHeader(frame)
		if !ok || at != 0 || h.id != 7 || h.typ != typeSurvey ||
			int(h.length) != len(frame)-headerSize {
			t.Fatalf("header %+v at %d, %v", h, at, ok)
		}
		got, gotCosts, incomplete, err := decodeSurvey(body(frame), uint64(len(s.Pages)))
		if err != nil || incomplete {
			t.Fatal(err, incomplete)
		}
		// Microseconds to before the prepare are all there is.
		gotCosts.Prepared = gotCosts.Prepared.Truncate(time.Second)
		if c.Prepared < 0 {
			gotCosts.Prepared = min(gotCosts.Prepared, -1)
			c.Prepared = gotCosts.Prepared
		}
		if diff := cmp.Diff(c, gotCosts); diff != "" {
			t.Fatal(diff)
		}
		if len(s.Pages) == 0 {
			s.Pages = got.Pages
		}
		if len(s.Processes) == 0 {
			s.Processes = got.Processes
		}
		if diff := cmp.Diff(s, got); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestSurveyIsCut(t *testing.T) {
	s := &pageclass.Survey{Processes: []pageclass.Process{{Name: strings.Repeat("x", 1000),
		Recent: -1}}}
	for i := range 4096 {
		s.Pages = append(s.Pages,
			pageclass.Page{Kind: pageclass.Anon, Class: pageclass.UserData, Owner: 1,
				Flags: pageclass.Flags(i%7)&knownFlags | pageclass.Skippable})
		s.Sequence = append(s.Sequence, uint32(4095-i))
	}
	c := &Costs{Prepared: -1}
	for _, tt := range []struct {
		most               int
		sequence, detailed bool
	}{{1 << 20, true, true}, {10000, false, true}, {500, false, false}} {
		frame := AppendSurvey(nil, 1, c, s, false, tt.most)
		got, _, incomplete, err := decodeSurvey(body(frame), 4096)
		if err != nil {
			t.Fatal(tt.most, err)
		}
		if len(frame)-headerSize > tt.most || incomplete == tt.sequence ||
			(got.Sequence != nil) != tt.sequence || (got.Pages[1].Flags != 0) != tt.detailed ||
			got.Pages[0].Class != pageclass.UserData {
			t.Errorf("%d: %d bytes, incomplete %v, %d in sequence, page %+v", tt.most, len(frame),
				incomplete, len(got.Sequence), got.Pages[1])
		}
		for _, p := range got.Pages {
			if p.Flags&pageclass.Skippable != 0 {
				t.Fatal("the coding calls a page skippable")
			}
		}
		if len(got.Processes[0].Name) != maxName {
			t.Errorf("name of %d bytes", len(got.Processes[0].Name))
		}
	}
	h, _, _ := findHeader(AppendSurvey(nil, 1, c, s, false, 10))
	if h.typ != typeRefusal {
		t.Errorf("type %d for a survey that does not fit", h.typ)
	}
}

// number strings make bodies by hand.
func bytesOf(v ...any) (b []byte) {
	for _, x := range v {
		switch x := x.(type) {
		case int:
			b = binary.AppendUvarint(b, uint64(x))
		case int64:
			b = binary.AppendVarint(b, x)
		case []byte:
			b = append(b, x...)
		}
	}
	return b
}

func TestDecodeRefuses(t *testing.T) {
	costs := bytesOf(1, 1, 0, 0)
	none := bytesOf(costs, 0, 0)                                    // no marks, no processes
	anon := bytesOf(none, 1, []byte{byte(pageclass.Anon), 6, 0}, 0) // a palette of one
	process := func(v ...any) []byte { return bytesOf(append([]any{costs, 0, 1}, v...)...) }
	palette := func(kind, class, flags byte, owner int) []byte {
		return bytesOf(none, 1, []byte{kind, class, flags}, owner, 1, 0, 0)
	}
	for name, tt := range map[string]struct {
		body []byte
		want string
	}{
		"nothing":              {nil, "elapsed"},
		"endless number":       {bytes.Repeat([]byte{0xff}, 20), "elapsed"},
		"no marks":             {costs, "too early"},
		"unknown marks":        {bytesOf(costs, 64), "marks"},
		"too many processes":   {bytesOf(costs, 0, 1<<16), "too much"},
		"processes without":    {bytesOf(costs, 0, 60000, 1), "60000 processes in 1 bytes"},
		"process marks":        {process(1, 64, 1, 1, 0), "marks 0x40 of a process"},
		"long name":            {process(1, 0, 1, 1, 65), "name"},
		"cut name":             {process(1, 0, 1, 1, 9, 9), "ends too early"},
		"skippable":            {palette(1, 10, 1<<5, 0), "skippable"},
		"unknown flag":         {palette(1, 10, 1<<6, 0), "unknown kind"},
		"unknown kind":         {palette(byte(pageclass.Kinds), 1, 0, 0), "unknown kind"},
		"unknown class":        {palette(1, byte(pageclass.Classes), 0, 0), "unknown kind"},
		"no such owner":        {palette(1, 1, 0, 1), "owner"},
		"something of nothing": {palette(0, 1, 0, 0), "an unknown page"},
		"big palette":          {bytesOf(none, 60000, 1), "60000 kinds"},
		"too many pages":       {bytesOf(anon, 101), "too much"},
		"run too long":         {bytesOf(anon, 100, 1, 99, 0), "outside"},
		"huge run":             {bytesOf(anon, 100, 1, 1<<62, 0), "too much"},
		"no such kind":         {bytesOf(anon, 1, 2, 0), "outside"},
		"no runs":              {bytesOf(anon, 100), "run"},
		"long sequence":        {bytesOf(anon, 1, 0, 2), "too much"},
		"sequence outside":     {bytesOf(anon, 100, 1, 98, 1, int64(100), 1), "outside"},
		"sequence before":      {bytesOf(anon, 100, 1, 98, 1, int64(-1), 1), "outside"},
		"sequence far":         {bytesOf(anon, 100, 1, 98, 1, int64(-1<<63), 1), "outside"},
		"empty run":            {bytesOf(anon, 100, 1, 98, 1, int64(0), 0), "outside"},
		"sequence twice":       {bytesOf(anon, 100, 1, 98, 3, int64(0), 2, int64(-1), 1), "twice"},
		"more":                 {bytesOf(anon, 1, 0, 0, 0), "1 bytes too many"},
	} {
		s, _, _, err := decodeSurvey(tt.body, 100)
		if err == nil || !strings.Contains(err.Error(), tt.want) || s != nil {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	if _, _, _, err := decodeSurvey(bytesOf(anon, 100, 1, 98, 3, int64(5), 2, int64(-7), 1),
		100); err != nil {
		t.Error("what the others are made of:", err)
	}
}

func TestRequests(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := Request{
			ID: rapid.Uint64().Draw(t, "id"), Prepare: rapid.Bool().Draw(t, "prepare"),
			Deadline: time.Duration(rapid.IntRange(0, 60000).Draw(t, "deadline")) *
				time.Millisecond,
			ActiveWithin: 16 * time.Second, MaxBytes: rapid.IntRange(0, maxAnswer).Draw(t, "bytes"),
			Frames: rapid.Uint64Range(0, maxFrames).Draw(t, "frames"),
		}
		// Garbage and cut requests before it, all in pieces.
		stream := rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "garbage")
		for range rapid.IntRange(0, 3).Draw(t, "cut requests") {
			stream = append(stream,
				r.Append(nil)[:rapid.IntRange(0, RequestSize-1).Draw(t, "cut")]...)
		}
		stream = r.Append(stream)
		var buf []byte
		var got []Request
		for len(stream) > 0 {
			n := rapid.IntRange(1, len(stream)).Draw(t, "piece")
			buf = append(buf, stream[:n]...)
			stream = stream[n:]
			for {
				r, refusal, n, ok := NextRequest(buf)
				buf = buf[n:]
				if refusal != nil {
					t.Fatal("refused")
				}
				if !ok {
					break
				}
				got = append(got, r)
			}
			if len(buf) >= RequestSize {
				t.Fatalf("%d bytes are kept", len(buf))
			}
		}
		if len(got) != 1 || got[0] != r {
			t.Fatalf("got %+v, want %+v", got, r)
		}
	})
}

// realAnswers are frames that vacate-guest sent from a guest; TestRecord in its package makes them.
func realAnswers(t testing.TB) [][]byte {
	names, err := filepath.Glob("testdata/answer-*")
	if err != nil || len(names) == 0 {
		t.Fatal("no recorded answer", err)
	}
	var list [][]byte
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, b)
	}
	return list
}

// TestRealAnswer takes an answer apart and makes the same of it again.
func TestRealAnswer(t *testing.T) {
	for _, frame := range realAnswers(t) {
		h, at, ok := findHeader(frame)
		if !ok || at != 0 || h.typ != typeSurvey || int(h.length) != len(frame)-headerSize {
			t.Fatalf("header %+v at %d, %v, of %d bytes", h, at, ok, len(frame))
		}
		s, c, incomplete, err := decodeSurvey(body(frame), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d bytes: %d pages, %d processes, %d in sequence, %v", len(frame), len(s.Pages),
			len(s.Processes), len(s.Sequence), s.Counts())
		again := AppendSurvey(nil, h.id, &c, s, incomplete, 1<<20)
		if !bytes.Equal(again, frame) {
			t.Error("coded again, it differs")
		}
	}
}

// What a broken or hostile agent sends is an error or a survey that holds together.
func FuzzDecodeSurvey(f *testing.F) {
	for _, frame := range realAnswers(f) {
		f.Add(body(frame), uint64(1<<16))
		f.Add(body(frame), uint64(100))
	}
	f.Fuzz(func(t *testing.T, b []byte, frames uint64) {
		frames %= 1 << 17
		s, c, incomplete, err := decodeSurvey(b, frames)
		if err != nil {
			return
		}
		if uint64(len(s.Pages)) > frames {
			t.Fatal("too many pages")
		}
		seen := make([]bool, len(s.Pages))
		for _, n := range s.Sequence {
			if int(n) >= len(s.Pages) || seen[n] {
				t.Fatal("bad sequence")
			}
			seen[n] = true
		}
		for _, p := range s.Pages {
			if p.Flags&^knownFlags != 0 || int(p.Owner) > len(s.Processes) ||
				p.Kind >= pageclass.Kinds || p.Class >= pageclass.Classes {
				t.Fatalf("bad page %+v", p)
			}
		}
		frame := AppendSurvey(nil, 1, &c, s, incomplete, 1<<30)
		again, _, _, err := decodeSurvey(body(frame), frames)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(s, again) {
			t.Fatal("coded and decoded again, it differs")
		}
	})
}

func FuzzNextRequest(f *testing.F) {
	r := Request{ID: 1, Deadline: time.Second, ActiveWithin: DefaultActiveWithin, MaxBytes: 1 << 20,
		Frames: 1 << 18}
	frame := r.Append(nil)
	f.Add(frame)
	f.Add(append(frame[:20:20], frame...))
	f.Add(realAnswers(f)[0])
	f.Fuzz(func(t *testing.T, b []byte) {
		for {
			r, refusal, n, ok := NextRequest(b)
			if n > len(b) || ok && n == 0 || r.MaxBytes < 0 || r.Frames > maxFrames {
				t.Fatalf("%+v, %d of %d bytes", r, n, len(b))
			}
			b = b[n:]
			if !ok && refusal == nil {
				break
			}
		}
		if len(b) >= RequestSize {
			t.Fatalf("%d bytes are kept", len(b))
		}
	})
}
