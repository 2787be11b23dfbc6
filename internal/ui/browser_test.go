package ui

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab/browser"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// serve serves the page, and returns its address and one that opens it.
func serve(t testing.TB, hub *Hub, remotes ...Remote) (address string, token func() string) {
	t.Helper()
	return serveFor(t, &Server{Hub: hub, Remotes: remotes, Who: "user tester"})
}

// serveFor does so with a server, which logs nothing unless it has a log.
func serveFor(t testing.TB, s *Server) (address string, token func() string) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tokens := make(chan string, 100)
	ctx, stop := context.WithCancel(t.Context())
	s.Token = func(token string) { tokens <- token }
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return "http://" + ln.Addr().String(), func() string { return <-tokens }
}

// chromium starts a browser.
func chromium(t testing.TB) *browser.Browser {
	t.Helper()
	if browser.Find() == "" && os.Getenv("VACATE_REQUIRE") != "1" {
		t.Skip("needs a Chromium: install the package chromium-headless-shell")
	}
	b, err := browser.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// must ends the test on an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// madeUp is a host that there is not, at a time.
func madeUp(n int, now int) *Host {
	r := rand.New(rand.NewPCG(uint64(n), 1))
	h := &Host{Key: fmt.Sprintf("h%d", n), Name: fmt.Sprintf("rack%02d-%02d", n/40+1, n%40+1),
		At: time.Now().UnixMilli(), Peers: []string{"rack01-01", "rack01-02"},
		CPUs: 32, Memory: 256 << 30, Stalls: map[string]Num{}, Problems: []string{}}
	busy := 0.35 + r.Float64()*0.9
	want := 0.0
	for i := range 20 {
		wants := busy * 32 / 20 * (0.2 + 1.6*r.Float64()) *
			(1 + 0.15*math.Sin(float64(now)/3+float64(i+n)))
		want += wants
		h.VMs = append(h.VMs, VM{Name: fmt.Sprintf("vm%05d", n*20+i), State: "running",
			Memory: 8 << 30, VCPUs: 4, Cores: Num(wants), Resident: uint64(r.IntN(10)+1) << 30})
	}
	share := Num(min(1, 31.2/want))
	for i := range h.VMs {
		v := &h.VMs[i]
		v.Waiting, v.Cores = v.Cores*(1-share), v.Cores*share
		v.Steal = 1 - share
		h.Cores += v.Cores
		h.Waiting += v.Waiting
		h.Available += v.Resident
	}
	h.Available = h.Memory - h.Available - 12<<30
	h.Cores += 0.4
	return h
}

// madeUpEviction is one of a host's, that has ended or goes on.
func madeUpEviction(host, id, vm, peer string, ago, took time.Duration, outcome string) *Eviction {
	began := time.Now().Add(-ago)
	m := &hostv1.Eviction{Id: id, Vm: vm, Role: "source", Peer: peer, Outcome: outcome,
		StartedAt: timestamppb.New(began)}
	e := &Eviction{Host: host, id: id, open: outcome == ""}
	if outcome != "" {
		m.EndedAt = timestamppb.New(began.Add(took))
		down, total := 0.031, took.Seconds()
		e.Down, e.Total, e.Bytes, e.Fetches, e.Report = &down, &total, 311<<20, 412, true
	}
	e.Of = hostv1.JSON(m)
	return e
}

// The page shows names from elsewhere as texts, whatever is in them.
func TestBrowserHostileNames(t *testing.T) {
	const evil = `<img src=x onerror="window.hit=1"><script>window.hit=2</script>` +
		`"onfocus="window.hit=3" javascript:alert(1)`
	hub := NewHub()
	h := madeUp(0, 0)
	h.Name, h.Guard, h.Error, h.Problems = evil, evil, evil, []string{evil}
	h.Peers = []string{evil}
	for i := range h.VMs {
		h.VMs[i].Name, h.VMs[i].Problem = fmt.Sprint(evil, i), evil
		h.VMs[i].State = []string{"running", evil}[i%2]
	}
	hub.PutHost(h)
	for n := 1; n < 10; n++ { // so that there are tiles, too
		other := madeUp(n, 0)
		other.Name = fmt.Sprint(n, evil)
		hub.PutHost(other)
	}
	hub.PutEviction(madeUpEviction("h0", strings.Repeat("1", 32), evil, evil, time.Minute,
		time.Second, evil))
	live := madeUpEviction("h0", strings.Repeat("2", 32), evil, evil, time.Minute, 0, "")
	live.Says = evil
	hub.PutEviction(live)
	urgent := &hostv1.Eviction{Id: strings.Repeat("3", 32), Vm: evil, Role: "source", Peer: evil,
		Reason: evil, Advice: evil, Remedy: []string{evil}, Decidable: true,
		StartedAt: timestamppb.Now()}
	hub.PutEviction(&Eviction{Host: "h0", id: urgent.Id, open: true, Of: hostv1.JSON(urgent)})
	hub.PutMap(Map{"h0", strings.Repeat("2", 32), &hostv1.GetMapResponse{PagesPerPart: 1,
		Came: []byte{255}, Why: []byte{0}, Class: []byte{0}, Reasons: []string{evil},
		Classes: []string{evil}}})
	hub.putJob(&Job{Host: "h0", Kind: "relieve"}, evil, false)
	address, token := serve(t, hub)
	b := chromium(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	p, err := b.Open(ctx, address+"/#token="+token(), 1200, 900)
	must(t, err)
	must(t, p.Wait(ctx, "document.querySelectorAll('.tile').length == 10"))
	must(t, p.Wait(ctx, "document.querySelector('.live .key').textContent"))
	must(t, p.Click(ctx, ".tile"))
	must(t, p.Wait(ctx, "document.querySelectorAll('#panel .vm').length == 20"))
	// Each VM that has CPU has its part of the tower, as high as that is.
	must(t, p.Wait(ctx, "[...document.querySelectorAll('#panel .have .seg')].every(e => "+
		"/^[0-9.]+%$/.test(e.style.height) && e.getBoundingClientRect().height > 0)"))
	for selector, n := range map[string]int{"#urgent": 1, "#live": 1, "#past .entry": 1,
		"#jobs li": 1, "#panel .vm": 20, ".tile": 10} {
		var shown int
		quoted, _ := json.Marshal(evil)
		must(t, p.Eval(ctx, fmt.Sprintf(
			"[...document.querySelectorAll(%q)].filter(e => e.textContent.includes(%s)).length",
			selector, quoted), &shown))
		if shown != n {
			t.Errorf("%s: the name is shown as a text in %d places, not %d", selector, shown, n)
		}
	}
	// The order's dialog, too. No daemon answers it.
	must(t, p.Click(ctx, "#panel .evict"))
	must(t, p.Wait(ctx, "document.querySelector('#dialog .refused')"))
	var hit any
	must(t, p.Eval(ctx, "window.hit || document.querySelectorAll('#hosts img, #panel img, "+
		"#dialog img, #live img, main script').length || null", &hit))
	if hit != nil {
		t.Errorf("a name became part of the page: %v", hit)
	}
	for _, s := range b.Said() {
		if !strings.Contains(s, "409") { // the answer that no such host is known
			t.Errorf("the page says %s", s)
		}
	}
}

// At 1,000 hosts the page has no more elements than can be seen, goes on when scrolled, by keys,
// and by a filter. The log has the times.
func TestBrowserManyHosts(t *testing.T) {
	hub := NewHub()
	for n := range 1000 {
		hub.PutHost(madeUp(n, 0))
	}
	address, token := serve(t, hub)
	b := chromium(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	p, err := b.Open(ctx, address+"/#token="+token(), 1400, 900)
	must(t, err)
	must(t, p.Wait(ctx, "document.querySelectorAll('.tile').length > 20"))
	loaded, err := p.Busy(ctx)
	must(t, err)
	var first, paint float64
	must(t, p.Eval(ctx, "performance.getEntriesByName('vacate-update')[0].startTime + "+
		"performance.getEntriesByName('vacate-update')[0].duration", &first))
	must(t, p.Eval(ctx, "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0",
		&paint))
	var there int
	must(t, p.Eval(ctx, "document.querySelectorAll('.tile').length", &there))
	if there > 120 {
		t.Errorf("%d of 1000 hosts are in the page: only those that can be seen should be", there)
	}
	must(t, p.Eval(ctx, "scrollTo(0, document.body.scrollHeight / 2)", nil))
	must(t, p.Wait(ctx, "[...document.querySelectorAll('.tile .name')].some(e => "+
		"/^rack1[0-9]/.test(e.textContent))"))
	must(t, p.Eval(ctx, "scrollTo(0, 0)", nil))
	must(t, p.Wait(ctx, "document.querySelector('.tile .name').textContent == 'rack01-01'"))
	must(t, p.Press(ctx, "ArrowRight"))
	must(t, p.Press(ctx, "ArrowRight"))
	must(t, p.Wait(ctx, "document.activeElement.dataset.host == 'h1'"))
	must(t, p.Press(ctx, "Enter"))
	must(t, p.Wait(ctx, "document.querySelector('#panel h2')?.textContent == 'rack01-02'"))
	must(t, p.Press(ctx, "Escape"))
	must(t, p.Wait(ctx, "!document.querySelector('#panel').open && "+
		"document.activeElement.dataset.host == 'h1'"))
	// The main thread's time is CPU time: the machine may do something else, too.
	const drawn = "performance.getEntriesByName('vacate-update').length"
	var updates []time.Duration
	for now := range 10 {
		var before int
		must(t, p.Eval(ctx, drawn, &before))
		was, err := p.Busy(ctx)
		must(t, err)
		for n := range 1000 {
			hub.PutHost(madeUp(n, now+1))
		}
		must(t, p.Wait(ctx, fmt.Sprintf("%s > %d", drawn, before)))
		must(t, p.Eval(ctx, "new Promise(f => requestAnimationFrame(() => setTimeout(f)))", nil))
		is, err := p.Busy(ctx)
		must(t, err)
		updates = append(updates, is-was)
	}
	slices.Sort(updates)
	t.Logf("1000 hosts of 20 VMs: first contentful paint after %.0f ms, all hosts after %.0f ms; "+
		"CPU time of the main thread: %v until then, %v for an update of all hosts (median; "+
		"longest %v)", paint, first, loaded.Round(time.Millisecond),
		updates[len(updates)/2].Round(time.Millisecond),
		updates[len(updates)-1].Round(time.Millisecond))
	must(t, p.Press(ctx, "/"))
	must(t, p.Type(ctx, "rack07-1"))
	must(t, p.Wait(ctx, "document.querySelectorAll('.tile').length == 10"))
	must(t, p.Press(ctx, "Escape"))
	must(t, p.Click(ctx, "#starving"))
	must(t, p.Wait(ctx, "document.querySelector('.tile').dataset.is == 'hot'"))
	if dir := os.Getenv("VACATE_UI_PICTURES"); dir != "" {
		must(t, p.Picture(ctx, filepath.Join(dir, "many.webp")))
	}
	if said := b.Said(); said != nil {
		t.Errorf("the page says %s", said)
	}
}
