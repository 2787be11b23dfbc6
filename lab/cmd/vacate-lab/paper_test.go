package main

import (
	"bytes"
	"encoding/json"
	"regexp"
	"testing"

	"vacate/lab/bench"
)

// The page of a measurement holds what was measured, and the one drawing of it.
func TestPaperPage(t *testing.T) {
	total := 2.5
	run := bench.ContentionRun{Server: "memcached", Strategy: "vacate", Rate: 1e8,
		Outcome: bench.Completed, Total: &total, Moves: []bench.Step{{0, 1, 2, 3}},
		Stays: []bench.Step{{0, 1, 2, 3}}}
	var page, svg bytes.Buffer
	c := bench.Contention{Version: bench.Version, Runs: []bench.ContentionRun{run}}
	if err := writePaperPage(&page, c); err != nil {
		t.Fatal(err)
	}
	data := regexp.MustCompile(`(?s)id="data">(.*?)</script>`).FindSubmatch(page.Bytes())
	if data == nil {
		t.Fatal("no data in the page")
	}
	var again paperPage
	if err := json.Unmarshal(data[1], &again); err != nil {
		t.Fatal(err)
	}
	if runs := again.Contention.Runs; len(runs) != 1 || *runs[0].Total != total {
		t.Errorf("%+v", runs)
	}
	if err := c.SVG(&svg); err != nil || !bytes.Equal(again.SVG, svg.Bytes()) {
		t.Errorf("another drawing: %.200s; %v", again.SVG, err)
	}
}
