package inspect_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"vacate/internal/guest/inspect"
	"vacate/internal/guest/pageclass"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// recording is a survey as testdata/survey.gz has it: JSON, compressed with gzip.
type recording struct {
	Kernel    string
	Processes []pageclass.Process
	Fresh     bool
	Runs      [][5]uint64 // of pages alike: how many, kind, class, flags, owner
}

func readSurvey(t testing.TB) (*pageclass.Survey, string) {
	t.Helper()
	b, err := os.ReadFile("testdata/survey.gz")
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	var r recording
	if err := json.NewDecoder(z).Decode(&r); err != nil {
		t.Fatal(err)
	}
	s := &pageclass.Survey{Processes: r.Processes, Fresh: r.Fresh}
	for _, run := range r.Runs {
		for range run[0] {
			s.Pages = append(s.Pages,
				pageclass.Page{Kind: pageclass.Kind(run[1]), Class: pageclass.Class(run[2]),
					Flags: pageclass.Flags(run[3]), Owner: uint16(run[4])})
		}
	}
	return s, r.Kernel
}

// same compares with a golden file, or writes it.
func same(t *testing.T, name string, got []byte) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(name, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: %s", name, cmp.Diff(string(want), string(got)))
	}
}

// A recorded survey of a real guest, as JSON. Its sums agree with each other and with it.
func TestMemory(t *testing.T) {
	s, kernel := readSurvey(t)
	m := inspect.NewMemory(s)
	m.Source, m.Kernel = "vm", kernel
	b, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	same(t, "survey.json", append(b, '\n'))
	var again inspect.Memory
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(m, again); diff != "" {
		t.Errorf("JSON loses something: %s", diff)
	}

	counts := s.Counts()
	sum, kinds, owned := 0, 0, 0
	for _, c := range m.Classes {
		sum += c.Pages
		if c.Pages != counts[c.Class] {
			t.Errorf("%d pages of class %v, want %d", c.Pages, c.Class, counts[c.Class])
		}
	}
	for _, k := range m.Kinds {
		kinds += k.Pages
	}
	for _, p := range m.Processes {
		owned += p.Pages
	}
	want := 0
	for _, p := range s.Pages {
		if p.Owner != 0 {
			want++
		}
	}
	if sum != m.Pages || kinds != m.Pages || owned != want || m.Pages == 0 ||
		(want == 0) != (len(s.Processes) == 0) {
		t.Errorf("%d pages, %d of classes, %d of kinds; %d owned, want %d", m.Pages, sum, kinds,
			owned, want)
	}
	if m.Free.Pages == 0 || m.Free.Skippable == 0 || m.Free.Skippable > m.Free.Pages ||
		m.Free.PerCPU > m.Free.Pages {
		t.Errorf("%+v", m.Free)
	}
}

// What contradicts itself is left out of the sums, or is not looked at.
func TestMemoryNonsense(t *testing.T) {
	m := inspect.NewMemory(&pageclass.Survey{
		Pages: []pageclass.Page{
			{Kind: 255, Class: pageclass.Kernel},
			{Kind: pageclass.Slab, Class: 255},
			{Kind: pageclass.None, Class: pageclass.Kernel},
			{Kind: pageclass.Anon, Class: pageclass.UserData, Flags: 255, Owner: 65535},
			{Kind: pageclass.Anon, Class: pageclass.UserData, Owner: 2},
		},
		Processes: []pageclass.Process{{PID: 7, Recent: -1},
			{PID: -3, Name: "\xff\x00", LastRun: -1, Recent: 1e9}},
	})
	if m.Pages != 2 || len(m.Kinds) != 1 || m.Kinds[0].Mapped != 1 || m.Free.Pages != 0 {
		t.Errorf("%+v", m)
	}
	if p := m.Processes; p[0].PID != -3 || p[0].Pages != 1 || *p[0].Recent != 1 ||
		p[1].Recent != nil {
		t.Errorf("%+v", p)
	}
	if _, err := json.Marshal(m); err != nil {
		t.Error(err)
	}
	if b, err := json.Marshal(inspect.NewMemory(&pageclass.Survey{})); err != nil ||
		bytes.Contains(b, []byte("null")) {
		t.Errorf("%s, %v", b, err)
	}
}

// Active processes come first, then those with more pages.
func TestProcessOrder(t *testing.T) {
	s := &pageclass.Survey{Processes: []pageclass.Process{{PID: 1}, {PID: 2},
		{PID: 3, Active: true}, {PID: 4, Active: true}}}
	for owner, n := range []int{0, 5, 9, 1, 2} {
		for range n {
			s.Pages = append(s.Pages,
				pageclass.Page{Kind: pageclass.Anon, Class: pageclass.UserData,
					Owner: uint16(owner)})
		}
	}
	var got []int
	for _, p := range inspect.NewMemory(s).Processes {
		got = append(got, p.PID)
	}
	if want := []int{4, 3, 2, 1}; !cmp.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
