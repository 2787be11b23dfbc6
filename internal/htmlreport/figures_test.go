package htmlreport

import (
	"bytes"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/pushorder"
)

// stub is as much of a browser as the page's script needs to say its figures, one to a line, and
// what it draws.
const stub = `
const out = [];
function element(name) {
  const e = { name, children: [], style: {}, attributes: {}, value: 1000,
    setAttribute(k, v) { this.attributes[k] = v; }, addEventListener() {}, append(...c) { this.children.push(...c); },
    getContext() { return { createImageData: (w, h) => ({ data: new Uint8ClampedArray(4 * w * h) }), putImageData() {} }; },
    get text() { return (this.textContent || "") + this.children.map(c => c && c.name ? c.text : c).join(""); } };
  if (name === "select") e.value = "why";
  return e;
}
const body = element("main");
globalThis.document = { createElement: element, documentElement: {}, getElementById: id => id === "main" ? body : { textContent: PAGE } };
globalThis.getComputedStyle = () => ({ getPropertyValue: () => "" });
globalThis.ResizeObserver = class { observe() {} };
globalThis.devicePixelRatio = 1;
`

const tell = `
function walk(e) {
  if (!e || !e.name) return;
  const c = (e.attributes || {}).class;
  if (c === "tile") out.push("tile: " + e.children.map(x => x.text).join(": "));
  else if (e.name === "tr") out.push("row: " + e.children.map(x => x.text).join(": "));
  else if (c === "phase") out.push("phase: " + e.attributes.title);
  else { if (e.name === "span" && e.textContent !== undefined) out.push("span: " + e.text); e.children.forEach(walk); }
}
walk(body);
console.log(out.join("\n"));
`

// figures are what a page shows, line by line.
func figures(t *testing.T, e Eviction) []string {
	t.Helper()
	node, err := exec.LookPath("node")
	if err != nil {
		t.Skip("needs node: install the package nodejs")
	}
	var b bytes.Buffer
	if err := Write(&b, e); err != nil {
		t.Fatal(err)
	}
	scripts := regexp.MustCompile(`(?s)<script>(.*?)</script>`).FindStringSubmatch(b.String())
	if scripts == nil {
		t.Fatal("the page has no script")
	}
	drawn := "uPlot = class { constructor(o, d) { d.slice(1).forEach((v, i) => out.push(\"line: " +
		"\" + o.series[i + 1].label + \": \" + Math.max(...v))); } };\n"
	script := strings.Replace(scripts[1], "const data = JSON.parse(",
		drawn+"const data = JSON.parse(", 1)
	cmd := exec.Command(node, "-")
	cmd.Stdin = strings.NewReader(strings.Replace(stub, "PAGE",
		"`"+strings.ReplaceAll(dataOf(t, b.String()), `\`, `\\`)+"`", 1) + script + tell)
	said, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	return strings.Split(strings.TrimSpace(string(said)), "\n")
}

// Of an eviction whose link was lost in mid-push, and of one that another engine ended, the page
// shows what is so.
func TestFigures(t *testing.T) {
	begun := time.Unix(1000, 0)
	f := func(v float64) *float64 { return new(v) }
	trace := &evict.Trace{
		Blocks:       []evict.TraceBlock{{Name: "pc.ram", Pages: 1000, PageSize: 4096}},
		PagesPerCell: 250,
		When:         []int32{100, 200, 300, 400},
		Why: []uint8{uint8(pushorder.Planned), uint8(pushorder.Skipped),
			uint8(pushorder.Unused), uint8(pushorder.Before)}, Class: make([]uint8, 4),
		StepMS: 1000, Classes: []string{"unknown"}, Fetched: [][]uint32{{0}},
	}
	steps := make([]uint32, pushorder.Reasons)
	for why := range pushorder.Reasons {
		trace.Reasons = append(trace.Reasons, why.String())
	}
	steps[pushorder.Planned] = 512
	for _, why := range []pushorder.Reason{pushorder.Skipped, pushorder.Unused, pushorder.Before} {
		steps[why] = 1 << 20
	}
	trace.Pages = [][]uint32{steps}
	said := figures(t, Eviction{VM: "web1", Outcome: "completed", Trace: trace,
		Report: evict.Report{
			Outcome: "completed", Begun: &begun, Prepare: f(0.25), Transfer: f(0.5), Down: f(0.05),
			Total: f(9.75),
			Phases: []evict.Phase{{State: evict.Preparing, At: 0, For: 0.25},
				{State: evict.Switching, At: 0.25, For: 0.5},
				{State: evict.Pushing, At: 0.75, For: 2},
				{State: evict.Reconnecting, At: 2.75, For: 3},
				{State: evict.Pushing, At: 5.75, For: 4},
				{State: evict.Retiring, At: 9.75, For: 0.25}, {State: evict.Completed, At: 10}},
			Gaps: []evict.Gap{{At: 2.75, For: 3, Again: 7, Why: "the link is down"}},
			Pages: evict.PageCounts{Total: 1000, Pushed: 150, Fetched: 50, Skipped: 300,
				Unused: 400, Before: 100},
			Rate: 1e6,
		}})
	has := func(lines ...string) {
		t.Helper()
		for _, line := range lines {
			found := false
			for _, s := range said {
				found = found || s == line
			}
			if !found {
				t.Errorf("nothing says %q", line)
			}
		}
	}
	has("tile: 500 ms: until the VM ran on the other host",
		"tile: 50.0 ms: in which it ran nowhere", "tile: 9.75 s: until nothing was left here",
		"tile: 2.73 MiB: never sent: free, or not there",
		"tile: 25.00 %: of the memory the guest waited for",
		"phase: preparing: 250 ms", "phase: switching: 500 ms", "phase: pushing: 2.00 s",
		"phase: reconnecting: 3.00 s", "phase: pushing: 4.00 s", "phase: retiring: 250 ms",
		"row: down time: 50.0 ms: in which it ran nowhere",
		"row: execution transfer: 500 ms: from then until the VM ran on the other host",
		"row: link lost: 3.00 s: 1 times after the commit",
		"row: rate: 8 Mbit/s: while pages were pushed, without the times when the link was lost",
		"row: never sent: 300: free in the guest",
		"row: not there: 400: at the source, and never sent",
		"row: before: 100: were there when the eviction was taken up again",
		"line: planned: 2")
	for _, s := range said {
		if strings.HasPrefix(s, "line: ") && s != "line: planned: 2" {
			t.Errorf("as sent is drawn %q", s)
		}
	}
	if t.Failed() {
		t.Logf("the page says:\n%s", strings.Join(said, "\n"))
	}

	// Of one that another engine froze it is not known how long that took.
	said = figures(t, Eviction{VM: "web1", Outcome: "completed", Report: evict.Report{
		Outcome: "completed", Phases: []evict.Phase{{State: evict.InDoubt, At: 0, For: 1},
			{State: evict.Pushing, At: 1, For: 2}, {State: evict.Completed, At: 3}},
		Gaps: []evict.Gap{{For: 1}}, Pages: evict.PageCounts{Total: 1000, Before: 1000},
	}})
	has("tile: –: until the VM ran on the other host", "tile: –: in which it ran nowhere",
		"tile: –: until nothing was left here", "tile: 0.00 %: of the memory the guest waited for",
		"phase: in doubt: 1.00 s", "phase: pushing: 2.00 s",
		"row: link lost: 1.00 s: 1 times after the commit")
}
