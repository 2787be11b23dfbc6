package churnproto

import (
	"bytes"
	"encoding/json"
	"io"
	"testing"
)

func frames(t testing.TB) []byte {
	var b []byte
	for _, m := range []struct {
		t Type
		v any
	}{
		{TypeHello, Hello{Release: "6.1.0", CPUs: 2, Workers: []string{"anon"}}},
		{TypeBeat, Beat{Ops: []uint64{1, 2}, Pages: 7}},
		{TypeBad, Bad{Worker: 1, What: "pipe", Address: 0x1000, Want: 1, Found: 2}},
		{TypeReply, Reply{ID: "3"}},
	} {
		j, err := json.Marshal(m.v)
		if err != nil {
			t.Fatal(err)
		}
		b = AppendFrame(b, m.t, j)
	}
	return AppendFrame(b, TypeTable, AppendTable(nil, "3", "zoneinfo", 5, []byte("Node 0")))
}

// A reader finds the frames behind any cut.
func TestCut(t *testing.T) {
	whole := frames(t)
	for cut := range len(whole) {
		r := NewReader(bytes.NewReader(append(append([]byte{}, whole[:cut]...), whole...)))
		n := 0
		for {
			if _, _, err := r.Next(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			n++
		}
		if n < 5 {
			t.Fatalf("cut at %d: %d frames", cut, n)
		}
	}
}

func TestPage(t *testing.T) {
	var w Words
	w.Fill(77, Step(5))
	if at, _ := w.Check(77, Step(5)); at != -1 {
		t.Fatalf("word %d is wrong", at)
	}
	if owner, ok := StepOwner(w[9] - w[8]); !ok || owner != 5 {
		t.Fatalf("owner %d, %v", owner, ok)
	}
	good := w[300]
	w[300]++
	if at, want := w.Check(77, Step(5)); at != 300 || want != good {
		t.Fatalf("found word %d, want %#x", at, want)
	}
	w = Words{}
	if at, _ := w.Check(0, Step(5)); at != -1 {
		t.Fatal("a page of zeroes is not what seed 0 stands for")
	}
}

func FuzzReader(f *testing.F) {
	f.Add(frames(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := NewReader(bytes.NewReader(b))
		read := uint64(0)
		for {
			typ, payload, err := r.Next()
			if err != nil {
				break
			}
			read += headerSize + uint64(len(payload))
			if typ == TypeTable {
				if id, name, offset, data, err := ParseTable(payload); err == nil &&
					!bytes.Equal(AppendTable(nil, id, name, offset, data), payload) {
					t.Fatal("a table does not come out as it went in")
				}
			}
		}
		if read+r.Skipped > uint64(len(b)) {
			t.Fatalf("%d bytes read and %d skipped of %d", read, r.Skipped, len(b))
		}
	})
}
