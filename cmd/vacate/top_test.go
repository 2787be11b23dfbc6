package main

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	fleetv1 "vacate/internal/fleet/api/v1"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/ui"

	tea "github.com/charmbracelet/bubbletea"
)

var sgr = regexp.MustCompile("\x1b\\[[0-9;]*m")

// shot is what a screen shows, without colours.
func shot(m *top) string { return sgr.ReplaceAllString(m.View(), "") }

func key(m *top, keys ...string) {
	for _, k := range keys {
		msg := tea.KeyMsg{Type: tea.KeyRunes, Runes: []rune(k)}
		switch k {
		case "down":
			msg = tea.KeyMsg{Type: tea.KeyDown}
		case "end":
			msg = tea.KeyMsg{Type: tea.KeyEnd}
		}
		m.Update(msg)
	}
}

// twoHosts are one whose VMs starve, and one that is late and would like to be more than texts.
func twoHosts(now time.Time) *ui.Hub {
	hub := ui.NewHub()
	hub.PutHost(&ui.Host{Key: "a", Name: "hosta", At: now.UnixMilli(), Peers: []string{"hostb"},
		CPUs: 2, Cores: 1.9, Waiting: 0.6, Memory: 24 << 30, Available: 9 << 30, VMs: []ui.VM{
			{Name: "web1", State: "running", Cores: 0.7, Waiting: 0.3, Steal: 0.3,
				Resident: 3 << 30},
			{Name: "web2", State: "running", Cores: 1.2, Waiting: 0.3, Steal: 0.2,
				Resident: 4 << 30},
			{Name: "db1", State: "none"}}})
	hub.PutHost(&ui.Host{Key: "b", Name: "ho\x1b[31mstb", At: now.Add(-time.Minute).UnixMilli(),
		CPUs: 2, Memory: 24 << 30, Available: 20 << 30})
	return hub
}

// The screen says which VMs starve, which host is late, and what to type for what is chosen. It has
// no line that is too long, and no more lines than there is room for.
func TestTop(t *testing.T) {
	now := time.Now()
	m := newTop(twoHosts(now), nil)
	m.Update(tea.WindowSizeMsg{Width: 110, Height: 20})
	m.look()
	m.Update(tickMsg(now))
	text := shot(m)
	for _, want := range []string{"2 hosts, 2 VMs, 2 starve, 0 moving", "hosta",
		"1.90 of 2 cores + 0.60 wanted", "2 starve", "0.70 cores + 0.30 wanted", "steal 30 %",
		"db1            not here", "late: last heard 1m0s ago", "vacate relieve --dry-run"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	if strings.Contains(text, "\x1b") {
		t.Errorf("a host's name reaches the terminal:\n%q", text)
	}
	key(m, "down", "down")
	if text := shot(m); !strings.Contains(text, "vacate evict web1 --to hostb     (on hosta)") {
		t.Errorf("no hint in:\n%s", text)
	}
	for _, size := range []tea.WindowSizeMsg{{Width: 30, Height: 5}, {Width: 200, Height: 50},
		{Width: 1, Height: 1}} {
		m.Update(size)
		key(m, "end")
		text := shot(m)
		lines := strings.Split(text, "\n")
		if len(lines) > max(size.Height, 4) {
			t.Errorf("%d lines at %v", len(lines), size)
		}
		for _, line := range lines[1:] {
			if n := utf8.RuneCountInString(line); n > size.Width {
				t.Errorf("%d columns at %v: %s", n, size, line)
			}
		}
	}
	m.Update(tea.WindowSizeMsg{Width: 110, Height: 20})
	key(m, "v")
	if strings.Contains(shot(m), "web1") {
		t.Error("VMs are shown that should not be")
	}
	if _, cmd := m.Update(tea.KeyMsg{Type: tea.KeyRunes, Runes: []rune("q")}); cmd == nil {
		t.Error("q does not end it")
	}
}

// Hosts that starve come first when asked for.
func TestTopStarvingFirst(t *testing.T) {
	hub := twoHosts(time.Now())
	hub.PutHost(&ui.Host{Key: "0", Name: "calm", At: time.Now().UnixMilli(), CPUs: 2})
	m := newTop(hub, nil)
	m.look()
	if at := strings.Index(shot(m), "hosta"); at < strings.Index(shot(m), "calm") {
		t.Error("hosts are not in order of name")
	}
	key(m, "s")
	if at := strings.Index(shot(m), "hosta"); at > strings.Index(shot(m), "calm") {
		t.Error("the host that starves does not come first")
	}
}

// Evictions are at the top, each once, with the source's word.
func TestTopEvictions(t *testing.T) {
	eta := 6.0
	source := &hostv1.Eviction{Id: strings.Repeat("a", 32), Vm: "web1", Role: "source",
		Peer: "hostb", State: "preparing", Abortable: true,
		Progress: &hostv1.Progress{PagesSent: 25, PagesTotal: 100, EtaS: &eta, Fetches: 7,
			RateBytesPerS: 112e6}}
	m := newTop(ui.NewHub(), nil)
	m.Update(tea.WindowSizeMsg{Width: 120, Height: 20})
	hub := twoHosts(time.Now())
	m.hub = hub
	hub.PutEviction(ui.NewEviction("a", source, tellOf))
	there := &hostv1.Eviction{Id: source.Id, Vm: "web1", Role: "destination", Peer: "hosta",
		State: "waiting"}
	hub.PutEviction(ui.NewEviction("b", there, tellOf))
	m.look()
	text := shot(m)
	for _, want := range []string{"1 moving", "web1           → hostb",
		" 25 %  112 MB/s  7 fetches",
		"6 s left", "web1 runs here; vacate prepares the move to hostb", "vacate abort aaaaaaaa"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	if strings.Count(text, "▶") != 1 {
		t.Errorf("the eviction is not there once:\n%s", text)
	}
}

// Of a fleet, the screen has plans that wait for a yes, drains with their forecast, what is wrong,
// and who leads; and what to type for each.
func TestTopFleet(t *testing.T) {
	hub := ui.NewHub()
	now := time.Now()
	takes := ui.Num(90)
	hub.PutFleet(&ui.Fleet{Leader: "brain1@brain1:7610", Mode: "ask",
		Troubles: []string{"db: d3 is in rack r1\x1b[31m"}})
	hub.PutDecisions([]*fleetv1.Decision{
		{Id: strings.Repeat("a", 32), State: "completed", Vm: "old"},
		{Id: strings.Repeat("b", 32), State: "waits", Vm: "web1", From: "hosta", To: "hostb",
			Reasons: []string{"VMs starve"}},
		{Id: strings.Repeat("c", 32), State: "goes on", Vm: "web2", From: "hosta", To: "hostb"}})
	for n := range 30 {
		hub.PutHost(&ui.Host{Key: fmt.Sprint(n), Name: fmt.Sprintf("host%02d", n), CPUs: 2,
			State: "reporting", At: now.UnixMilli(),
			VMs: []ui.VM{{Name: "vm" + fmt.Sprint(n), State: "running"}}})
	}
	hub.PutHost(&ui.Host{Key: "x", Name: "hostx", CPUs: 2, State: "late",
		At: now.Add(-time.Minute).UnixMilli(), Maintenance: &ui.Maintenance{Phase: "draining",
			Asked: now.UnixMilli(), Takes: &takes, Going: []string{"a", "b"},
			Staying: []string{"c: it is pinned"}}})
	m := newTop(hub, nil)
	m.Update(tea.WindowSizeMsg{Width: 140, Height: 60})
	m.look()
	m.Update(tickMsg(now))
	text := shot(m)
	for _, want := range []string{"31 hosts, 30 VMs, 0 starve, 1 moving, mode ask, brain1 leads",
		"web1           waits for your yes: hosta → hostb: VMs starve",
		"hostx is being drained: 2 to go, 1 stay, empty at ", "- db: d3 is in rack r1",
		"▶ web2           hosta → hostb", "draining, late: last heard 1m0s ago",
		"vacate fleet approve " + strings.Repeat("b", 32)} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	for _, not := range []string{"\x1b", "old", "vm29", "vacate evict"} {
		if strings.Contains(text, not) {
			t.Errorf("%q is in:\n%s", not, text)
		}
	}
	key(m, "down", "down", "down", "down")
	if text := shot(m); !strings.Contains(text, "vacate fleet drain host00 --dry-run") {
		t.Errorf("no hint in:\n%s", text)
	}
}
