package evict

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"slices"
	"testing"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/evict/pushorder"
	"vacate/internal/guest/pageclass"

	"github.com/google/go-cmp/cmp"
)

func TestTrace(t *testing.T) {
	var tr tracer
	tr.note(pushorder.Planned, []pageset.Run{{Count: 1}}) // nothing is known about the pages yet
	if _, ok := tr.result(nil); ok {
		t.Error("a trace of nothing")
	}
	l := layout{{Name: "ram", PageSize: 4096, Pages: 10}, {Name: "rom", PageSize: 4096, Pages: 3}}
	tr.open(time.Now().Add(-time.Second), l)
	tr.note(pushorder.Fetched, []pageset.Run{{Block: 0, First: 4, Count: 1}})
	tr.note(pushorder.Planned,
		[]pageset.Run{{Block: 0, First: 3, Count: 4}, {Block: 1, First: 0, Count: 3},
			{Block: 0, First: 9, Count: 0}})
	got, ok := tr.result([][]pageclass.Class{
		slices.Repeat([]pageclass.Class{pageclass.UserData}, 10), make([]pageclass.Class, 3)})
	if !ok || got.PagesPerCell != 1 || len(got.When) != 13 || got.StepMS != 10 {
		t.Fatalf("%+v", got)
	}
	why := []string{}
	for i, w := range got.Why {
		if got.When[i] < 0 {
			why = append(why, "")
		} else if why = append(why, got.Reasons[w]); got.When[i] < 1000 || got.When[i] > 60_000 {
			t.Errorf("cell %d after %d ms", i, got.When[i])
		}
	}
	want := []string{"", "", "", "planned", "fetched", "planned", "planned", "", "", "", "planned",
		"planned", "planned"}
	if d := cmp.Diff(want, why); d != "" {
		t.Error(d)
	}
	if c := got.Classes[got.Class[9]]; c != "user data" || got.Classes[got.Class[10]] != "unknown" {
		t.Errorf("%s", c)
	}
	pages, fetched := 0, 0
	for i := range got.Pages {
		for _, n := range got.Pages[i] {
			pages += int(n)
		}
		fetched += int(got.Fetched[i][pageclass.UserData])
	}
	if pages != 8 || fetched != 1 {
		t.Errorf("%d pages, %d fetches", pages, fetched)
	}

	b, err := got.encode()
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	var again Trace
	if err := json.NewDecoder(z).Decode(&again); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(got, again); d != "" {
		t.Error(d)
	}
}

// TestTraceIsBounded checks that a trace grows neither with the VM nor with the time.
func TestTraceIsBounded(t *testing.T) {
	var tr tracer
	const pages = 1 << 25 // 128 GiB
	tr.open(time.Now(), layout{{Name: "ram", PageSize: 4096, Pages: pages},
		{Name: "rom", PageSize: 4096, Pages: 1}})
	for _, after := range []time.Duration{0, time.Second, time.Minute, 100 * time.Hour} {
		tr.begun = time.Now().Add(-after)
		tr.note(pushorder.Fetched, []pageset.Run{{First: pages - 1, Count: 1}})
	}
	tr.note(pushorder.Skipped, []pageset.Run{{Count: pages}})
	got, _ := tr.result(nil)
	if len(got.When) > maxCells || len(got.Pages) > maxSteps {
		t.Errorf("%d cells, %d steps", len(got.When), len(got.Pages))
	}
	sum := map[pushorder.Reason]int{}
	for _, by := range got.Pages {
		for why, n := range by {
			sum[pushorder.Reason(why)] += int(n)
		}
	}
	if sum[pushorder.Fetched] != 4 || sum[pushorder.Skipped] != pages {
		t.Errorf("%v", sum)
	}
	for i, when := range got.When {
		if when < 0 && i != len(got.When)-1 {
			t.Fatalf("cell %d of %d never came", i, len(got.When))
		}
	}
}

// While pages go, the memory can be seen in few parts: how much of each went, why, and what it is
// used for.
func TestMap(t *testing.T) {
	var m Map
	if _, ok := m.Squares(4); ok {
		t.Error("a map without an engine")
	}
	var tr tracer
	m.of.Store(&tr)
	if _, ok := m.Squares(4); ok {
		t.Error("a map of nothing")
	}
	tr.open(time.Now(), layout{{Name: "ram", PageSize: 4096, Pages: 16}})
	tr.note(pushorder.Planned, []pageset.Run{{First: 0, Count: 3}})
	tr.note(pushorder.Fetched, []pageset.Run{{First: 3, Count: 1}, {First: 8, Count: 2}})
	tr.learn([][]pageclass.Class{append(
		slices.Repeat([]pageclass.Class{pageclass.UserData}, 8), make([]pageclass.Class, 8)...)})
	got, ok := m.Squares(4)
	unknown, data := uint8(pageclass.Unknown), uint8(pageclass.UserData)
	want := Squares{Pages: 4, Came: []uint8{255, 0, 127, 0}, Reasons: got.Reasons,
		Why:     []uint8{uint8(pushorder.Planned), 0, uint8(pushorder.Fetched), 0},
		Class:   []uint8{data, data, unknown, unknown},
		Classes: got.Classes}
	if d := cmp.Diff(want, got); !ok || d != "" {
		t.Error(d)
	}
	if got.Reasons[got.Why[2]] != "fetched" || got.Classes[got.Class[0]] != "user data" {
		t.Errorf("%v, %v", got.Reasons, got.Classes)
	}
	if got, _ := m.Squares(5); len(got.Came) > 5 {
		t.Errorf("%d parts, not 5", len(got.Came))
	}
}
