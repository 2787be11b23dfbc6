package churn

import (
	"encoding/json"
	"flag"
	"os"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/churnproto"
)

// recorded is what a guest with Linux 6.1 has said, cut short.
type recorded struct {
	Trace   churnproto.Trace
	Records []byte
	Tables  map[string][]byte
}

const recordedFile = "testdata/linux-6.1.json"

var recordFlag = flag.Bool("record", false, "TestRecord: write "+recordedFile+" anew")

// TestRecord is no test: it makes the corpus of the others.
func TestRecord(t *testing.T) {
	if !*recordFlag {
		t.Skip("without -record")
	}
	k, err := lab.FindKernel("6.1")
	if err != nil {
		t.Fatal(err)
	}
	g := start(t, newLab(t), Config{Kernel: k})
	w := &writer{mem: g.mem}
	o, err := g.oracle(t.Context(), w)
	if err != nil || o == nil {
		t.Fatal(o, err)
	}
	time.Sleep(time.Second)
	if err := g.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	b, _, err := o.records(o.rings[0])
	if err != nil {
		t.Fatal(err)
	}
	r := recorded{Trace: o.trace}
	r.Trace.Rings = nil
	for n := 0; n < min(len(b)-8, 3000); { // whole records
		n += int(b[n+6]) | int(b[n+7])<<8
		r.Records = append(r.Records[:0], b[:n]...)
	}
	if err := g.Cont(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Snapshot(t.Context(), func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	g.mu.Lock()
	r.Tables = g.tables
	g.mu.Unlock()
	for name, b := range r.Tables {
		r.Tables[name] = b[max(0, len(b)/2)&^7:][:min(len(b)/2&^7, 2048)]
		if name == "zoneinfo" {
			r.Tables[name] = b[:min(len(b), 4096)]
		}
		if name == "pagemaps" { // the first process's first frames
			n := min(len(b)/4-2, 100)
			r.Tables[name] = append(append([]byte{}, b[:4]...),
				append([]byte{byte(n), 0, 0, 0}, b[8:8+n*4]...)...)
		}
	}
	out, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("testdata", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(recordedFile, append(out, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

func readRecorded(t testing.TB) (r recorded) {
	b, err := os.ReadFile(recordedFile)
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRecords(t *testing.T) {
	r := readRecorded(t)
	events, lost, err := parseRecords(nil, r.Records, &r.Trace)
	if err != nil || lost != 0 || len(events) < 40 {
		t.Fatalf("%d events, %d lost, %v", len(events), lost, err)
	}
	// An allocator frees what it has allocated, and not twice.
	state := map[uint64]bool{}
	for _, e := range events {
		for pfn := e.pfn; pfn < e.pfn+1<<e.order; pfn++ {
			if was, known := state[pfn]; known && was == e.alloc {
				t.Errorf("page %#x: allocated %v twice", pfn, e.alloc)
			}
			state[pfn] = e.alloc
		}
	}
}

func FuzzRecords(f *testing.F) {
	r := readRecorded(f)
	f.Add(r.Records)
	f.Add(r.Records[:len(r.Records)-3])
	f.Fuzz(func(t *testing.T, b []byte) {
		events, _, err := parseRecords(nil, b, &r.Trace)
		if err == nil && len(events) > len(b)/24 {
			t.Fatalf("%d events from %d bytes", len(events), len(b))
		}
	})
}

func FuzzSnapshot(f *testing.F) {
	r := readRecorded(f)
	f.Add(r.Tables["kpageflags"], r.Tables["kpageflags after"], r.Tables["zoneinfo"],
		r.Tables["pagemaps"])
	s, err := parseSnapshot(r.Tables)
	if err != nil || s.Free == 0 || len(s.Mapped) == 0 || len(s.Mapped[0].Frames) == 0 {
		f.Fatalf("the corpus is not good: %+v, %v", s, err)
	}
	f.Fuzz(func(t *testing.T, before, after, zones, maps []byte) {
		s, err := parseSnapshot(map[string][]byte{"kpageflags": before, "kpageflags after": after,
			"zoneinfo": zones, "pagemaps": maps})
		if err != nil {
			return
		}
		for pfn := range len(before)/8 + 2 {
			if f := s.before(pfn); said(f) == SaidFree && inUse(f) {
				t.Fatalf("flags %#x are both free and in use", f)
			}
		}
	})
}
