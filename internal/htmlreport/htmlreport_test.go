package htmlreport

import (
	"bytes"
	"encoding/json"
	"regexp"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
)

// data returns what a page's script is given.
func dataOf(t *testing.T, html string) string {
	t.Helper()
	m :=
		regexp.MustCompile(
			`(?s)<script type="application/json" id="data">(.*?)</script>`).FindStringSubmatch(html)
	if m == nil {
		t.Fatal("no data in the page")
	}
	return m[1]
}

// TestWrite has texts from elsewhere that would like to be more than texts.
func TestWrite(t *testing.T) {
	const evil = `</script><script>alert(1)</script><img src=x onerror=alert(2)>` + "\u2028'\"\\"
	e := Eviction{ID: "1", VM: evil, To: evil, Started: time.Unix(0, 0), Outcome: "completed",
		Reason: evil, Notes: []string{evil},
		Report: evict.Report{QEMU: evil},
		Trace: &evict.Trace{Blocks: []evict.TraceBlock{{Name: evil, Pages: 1, PageSize: 4096}},
			PagesPerCell: 1, When: []int32{1}, Why: []uint8{1}, Class: []uint8{0}},
		Charts: []Chart{{Title: evil, Lines: []Line{{Name: evil, Points: [][2]float64{{0, 1}}}}}}}
	var b bytes.Buffer
	if err := Write(&b, e); err != nil {
		t.Fatal(err)
	}
	html := b.String()
	if strings.Contains(html, "<script>alert") || strings.Contains(html, "<img") {
		t.Error("a text became part of the page")
	}
	var again Eviction
	if err := json.Unmarshal([]byte(dataOf(t, html)), &again); err != nil {
		t.Fatal(err)
	}
	if again.VM != evil || again.Trace.Blocks[0].Name != evil ||
		again.Charts[0].Lines[0].Name != evil {
		t.Errorf("%+v", again)
	}
	// It needs nothing from elsewhere.
	if refs := regexp.MustCompile(`(?i)(src|href)\s*=\s*["']?(https?:)?//`).FindAllString(html,
		-1); refs != nil {
		t.Errorf("%v", refs)
	}
	if !strings.Contains(html, "default-src 'none'") {
		t.Error("no policy that keeps the page from loading anything")
	}
}
