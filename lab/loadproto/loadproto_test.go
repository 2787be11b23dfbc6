package loadproto

import (
	"bytes"
	"math"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func samples() []Message {
	var some, one Touches
	some.Add(SlowTouch)
	some.Add(3_000_000)
	some.Add(3_000_001)
	some.Add(1 << 60)
	one.Add(987654321)
	return []Message{
		Hello{Version, 131072, 2},
		Report{0, 5, 0, 0, Touches{}, Touches{}},
		Report{math.MaxUint64, 12345678901, 99, 1, some, one},
		Clocks{12345678901, 1 << 40, 100, 0, 7},
		BadWord{SetHot, 7, 511, 0xdeadbeef, 0},
		SetResult{SetCache, 100, 0},
		Final{131072, 3},
		Fail{"open /dev/vda: no such device"},
		Fail{""},
	}
}

func TestLinesRoundTrip(t *testing.T) {
	for _, m := range samples() {
		line := Append(nil, m)
		got, err := Parse(bytes.TrimSuffix(line, []byte("\n")))
		if err != nil {
			t.Errorf("%q: %v", line, err)
		} else if !reflect.DeepEqual(got, m) {
			t.Errorf("%q: got %+v, want %+v", line, got, m)
		}
	}
}

// Halves of two lines glued together, and every single damaged byte, must be
// noticed: that is how the host knows a line torn by an eviction.
func TestTornLines(t *testing.T) {
	a := bytes.TrimSuffix(Append(nil, samples()[2]), []byte("\n"))
	b := bytes.TrimSuffix(Append(nil, Report{Seq: 77, Clock: 12345678999, Ops: 199}), []byte("\n"))
	for i := 1; i < len(a); i++ {
		for _, torn := range [][]byte{a[:i], a[i:], append(a[:i:i], b...),
			append(a[:i:i], b[min(i, len(b)):]...)} {
			if m, err := Parse(torn); err == nil && !bytes.Equal(torn, b) {
				t.Fatalf("%q was read as %+v", torn, m)
			}
		}
		damaged := bytes.Clone(a)
		damaged[i] ^= 1
		if m, err := Parse(damaged); err == nil {
			t.Fatalf("%q was read as %+v", damaged, m)
		}
	}
}

func TestLongestLineFits(t *testing.T) {
	var full Touches
	full.Sum, full.Max = math.MaxUint64, math.MaxUint64
	for i := range full.Bins {
		full.Bins[i] = math.MaxUint32
	}
	line := Append(nil, Report{math.MaxUint64, math.MaxUint64, math.MaxUint64, math.MaxUint64, full,
		full})
	if len(line)-1 > MaxLine {
		t.Errorf("a line may have %d bytes, MaxLine is %d", len(line)-1, MaxLine)
	}
}

func TestTouchesQuantiles(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ns := rapid.SliceOfN(rapid.Uint64Range(SlowTouch, 1e11), 1, 200).Draw(t, "ns")
		q := rapid.Float64Range(0, 1).Draw(t, "q")
		var h, left, right Touches
		for i, n := range ns {
			h.Add(n)
			if i%2 == 0 {
				left.Add(n)
			} else {
				right.Add(n)
			}
		}
		left.Merge(&right)
		if left != h {
			t.Fatalf("merged parts differ from the whole")
		}
		if h.Count() != uint64(len(ns)) {
			t.Fatalf("counted %d of %d", h.Count(), len(ns))
		}
		got := h.Quantile(q)
		within, nearby := 0, false
		for _, n := range ns {
			if n <= got+1 {
				within++
			}
			// The bound is at most a bin away from a touch.
			if f := float64(n); f <= float64(got)+1 && f*BinRatio*1.0001 >= float64(got) {
				nearby = true
			}
		}
		if float64(within) < q*float64(len(ns))-1e-6 || !nearby {
			t.Fatalf("quantile %v is %d ns: %d of %d within, near one: %v", q, got, within, len(ns),
				nearby)
		}
	})
	var h Touches
	h.Add(SlowTouch - 1)
	if h.Count() != 0 || h.Quantile(0.5) != 0 {
		t.Errorf("a fast touch was counted")
	}
}

func TestPages(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed, n, gen := rapid.Uint64().Draw(t, "seed"), rapid.Uint64Range(0, 1<<30).Draw(t,
			"page"), rapid.Uint64Range(0, 1<<30).Draw(t, "gen")
		var p Page
		p.Fill(Base(seed, n, gen))
		if !p.Good(Base(seed, n, gen)) {
			t.Fatal("a filled page is bad")
		}
		for _, other := range []uint64{Base(seed, n+1, gen), Base(seed, n, gen+1),
			Base(seed+1, n, gen)} {
			if p.Good(other) {
				t.Fatal("another page, generation or seed passes for this one")
			}
		}
		word, bit := rapid.IntRange(0, len(p)-1).Draw(t, "word"), rapid.IntRange(0, 63).Draw(t,
			"bit")
		p[word] ^= 1 << bit
		i, want, got := p.FirstBad(Base(seed, n, gen))
		if p.Good(Base(seed, n, gen)) || i != word || want != got^1<<bit {
			t.Fatalf("flipped bit %d of word %d: found word %d, want %x, got %x", bit, word, i,
				want, got)
		}
	})
}

func TestSetSeedsDiffer(t *testing.T) {
	seen := map[uint64]string{}
	for _, s := range []string{SetHot, SetIdle, SetOther, SetCache, SetFile} {
		if prev, ok := seen[SetSeed(1, s)]; ok {
			t.Errorf("sets %s and %s have the same seed", s, prev)
		}
		seen[SetSeed(1, s)] = s
	}
}

func FuzzParse(f *testing.F) {
	for _, m := range samples() {
		f.Add(strings.TrimSuffix(string(Append(nil, m)), "\n"), false)
		f.Add(string(m.appendFields(nil)), true)
	}
	f.Add("r 1 2 3 4 5,5,zz:1 -", true)
	f.Add("r 1 2 3 4 5,5,1:0 -", true)
	f.Fuzz(func(t *testing.T, s string, seal bool) {
		line := []byte(s)
		if seal { // give the fields a true checksum, to get past it
			line = bytes.TrimSuffix(Append(nil, sealed(s)), []byte("\n"))
		}
		m, err := Parse(line)
		if err != nil {
			return
		}
		if again := Append(nil, m); string(again) != string(line)+"\n" {
			t.Fatalf("%q was written again as %q", line, again)
		}
	})
}

type sealed string

func (s sealed) appendFields(b []byte) []byte { return append(b, s...) }
