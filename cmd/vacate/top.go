package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	fleetv1 "vacate/internal/fleet/api/v1"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/sys/units"
	"vacate/internal/ui"

	tea "github.com/charmbracelet/bubbletea"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
)

func topCommand() *cobra.Command {
	var f hostsFlags
	c := &cobra.Command{
		Use:   "top",
		Short: "Show hosts, VMs and evictions in a terminal as they go",
		Long: `Shows in a terminal what vacate ui shows in a browser: this host and its peers, or
the hosts that --host names, which VMs starve, and evictions as they go. It only
looks; it says what to type for the VM that is chosen. With --fleet or
VACATE_FLEET it shows a fleet: plans that wait for a yes, drains, and all hosts.

  ↑ ↓ PgUp PgDn  from line to line
  s              hosts that starve first
  v              with or without the VMs
  q, Ctrl-C      end`,
		Example: `  vacate top
  vacate top --host hosta --host hostb --operator-certs ~/.vacate
  vacate top --fleet brain1,brain2,brain3`,
		Args: cobra.NoArgs,
	}
	f.add(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		ctx, cancel := context.WithCancel(c.Context())
		var polling sync.WaitGroup
		defer polling.Wait()
		defer cancel()
		hub := ui.NewHub()
		if _, _, _, err := f.feed(ctx, hub, &polling); err != nil {
			return err
		}
		changed, leave := hub.Attend()
		defer leave()
		_, err := tea.NewProgram(newTop(hub, changed), tea.WithAltScreen(),
			tea.WithContext(ctx), tea.WithInput(c.InOrStdin()),
			tea.WithOutput(c.OutOrStdout())).Run()
		return err
	}
	return c
}

// top is the model of the screen of `vacate top`.
type top struct {
	hub     *ui.Hub
	changed <-chan struct{}

	hosts     []*ui.Host
	fleet     *ui.Fleet // nil: there is none
	decisions []*fleetv1.Decision
	evictions []*hostv1.Eviction
	says      []string // of each eviction
	now       time.Time

	width, height int
	at            int // the chosen line
	above         int // lines scrolled away
	starving      bool
	compact       bool
}

func newTop(hub *ui.Hub, changed <-chan struct{}) *top {
	return &top{hub: hub, changed: changed, width: 80, height: 24, now: time.Now()}
}

type (
	newsMsg struct{}
	tickMsg time.Time
)

// topPause is the least time between two pictures.
const topPause = 250 * time.Millisecond

func (m *top) listen() tea.Cmd {
	return func() tea.Msg {
		<-m.changed
		time.Sleep(topPause)
		return newsMsg{}
	}
}

func tick() tea.Cmd {
	return tea.Tick(time.Second, func(t time.Time) tea.Msg { return tickMsg(t) })
}

// Init implements tea.Model.
func (m *top) Init() tea.Cmd { return tea.Batch(m.listen(), tick()) }

// Update implements tea.Model.
func (m *top) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case newsMsg:
		m.look()
		return m, m.listen()
	case tickMsg:
		m.now = time.Time(msg)
		return m, tick()
	case tea.KeyMsg:
		page := max(1, m.height-4)
		switch msg.String() {
		case "q", "ctrl+c", "esc":
			return m, tea.Quit
		case "up", "k":
			m.at--
		case "down", "j":
			m.at++
		case "pgup":
			m.at -= page
		case "pgdown", " ":
			m.at += page
		case "home":
			m.at = 0
		case "end":
			m.at = 1 << 30
		case "s":
			m.starving = !m.starving
			m.look()
		case "v":
			m.compact = !m.compact
		}
	}
	return m, nil
}

// manyHosts are so many that their VMs are left out at first.
const manyHosts = 20

// look takes what is known.
func (m *top) look() {
	if m.hosts == nil && len(m.hub.Hosts()) > manyHosts {
		m.compact = true
	}
	m.hosts, m.fleet, m.decisions = m.hub.Hosts(), m.hub.Fleet(), m.hub.Decisions()
	if m.starving {
		slices.SortStableFunc(m.hosts, func(a, b *ui.Host) int {
			return cmp.Compare(b.Waiting, a.Waiting)
		})
	}
	m.evictions, m.says = nil, nil
	seen := map[string]int{}
	for _, e := range m.hub.Open() {
		var of hostv1.Eviction
		if protojson.Unmarshal(e.Of, &of) != nil {
			continue
		}
		// Both hosts speak of most: the source's word counts.
		i, ok := seen[of.Id]
		if !ok {
			i = len(m.evictions)
			seen[of.Id] = i
			m.evictions, m.says = append(m.evictions, &of), append(m.says, e.Says)
		} else if of.Role == "source" {
			m.evictions[i], m.says[i] = &of, e.Says
		}
	}
}

// A topLine is a line of the list, and what to type for what is in it.
type topLine struct{ text, hint string }

// Colours (ECMA-48: SGR).
const (
	sgrBold    = "\x1b[1m"
	sgrSoft    = "\x1b[2m"
	sgrHot     = "\x1b[38;5;209m"
	sgrGood    = "\x1b[38;5;78m"
	sgrMove    = "\x1b[38;5;141m"
	sgrAccent  = "\x1b[38;5;75m"
	sgrReverse = "\x1b[7m"
	sgrOff     = "\x1b[0m"
)

// topBar is one of a width: what is had, and what is waited for.
func topBar(width int, had, waited, whole ui.Num) string {
	if whole <= 0 {
		return strings.Repeat(" ", width)
	}
	full := min(width, int(float64(had/whole)*float64(width)+0.5))
	lack := min(width-full, int(float64(waited/whole)*float64(width)+0.5))
	return sgrAccent + strings.Repeat("█", full) + sgrHot + strings.Repeat("▒", lack) + sgrSoft +
		strings.Repeat("·", width-full-lack) + sgrOff
}

// starvesFrom is the steal from which a VM starves, as the daemon's goal has it.
const starvesFrom = 0.1

func starved(v ui.VM) bool { return v.Steal >= starvesFrom && v.Waiting >= 0.05 }

// pad makes a text so many columns wide.
func pad(s string, width int) string {
	s = clean(s)
	if n := utf8.RuneCountInString(s); n > width {
		return string([]rune(s)[:max(0, width-1)]) + "…"
	} else {
		return s + strings.Repeat(" ", width-n)
	}
}

// lines are all lines of the list.
func (m *top) lines() (list []topLine) {
	add := func(hint, format string, args ...any) {
		list = append(list, topLine{fmt.Sprintf(format, args...), hint})
	}
	wide := max(6, min(30, m.width-70))
	m.fleetLines(add)
	for i, e := range m.evictions {
		p := e.GetProgress()
		share := 0.0
		if p.GetPagesTotal() > 0 {
			share = float64(p.PagesSent) / float64(p.PagesTotal)
		}
		way := "→ " + clean(e.Peer)
		if e.Role == "destination" {
			way = "← " + clean(e.Peer)
		}
		left := ""
		if p.GetEtaS() > 0 {
			left = etaText(time.Duration(p.GetEtaS()*float64(time.Second))) + " left"
		}
		hint := fmt.Sprintf("vacate status %.8s", clean(e.Id))
		if e.Abortable {
			hint = fmt.Sprintf("vacate abort %.8s", clean(e.Id))
		}
		mark := sgrMove + "▶ " + sgrOff
		if len(e.Remedy) > 0 || e.Decidable && e.State == "" {
			mark = sgrHot + "! " + sgrOff
		}
		add(hint, "%s%s%s%s %s %s %3.0f %%  %s/s  %d fetches  %s", mark, sgrBold,
			pad(e.Vm, 14), sgrOff, pad(way, 14), topBar(wide, ui.Num(share), 0, 1), 100*share,
			bytesText(p.GetRateBytesPerS()), p.GetFetches(), left)
		add(hint, "    %s%s%s", sgrSoft, clean(m.says[i]), sgrOff)
	}
	if len(m.evictions) > 0 {
		add("", "")
	}
	for _, h := range m.hosts {
		n := 0
		for _, v := range h.VMs {
			if starved(v) {
				n++
			}
		}
		mood := sgrGood + "well" + sgrOff
		since := m.now.Sub(time.UnixMilli(h.At))
		switch {
		case h.Error != "":
			mood = sgrHot + clean(h.Error) + sgrOff
		case h.State != "" && h.At == 0:
			mood = sgrHot + "not heard yet" + sgrOff
		case h.State == "late" || h.State == "" && since > 12*time.Second:
			mood = fmt.Sprintf("%slate: last heard %v ago%s", sgrHot, since.Round(time.Second),
				sgrOff)
		case n > 0:
			mood = fmt.Sprintf("%s%d starve%s", sgrHot, n, sgrOff)
		}
		where := clean(h.Name)
		hint := "vacate relieve --dry-run     (on " + where + ")"
		if m.fleet != nil {
			hint = "vacate fleet drain " + where + " --dry-run"
		}
		if x := h.Maintenance; x != nil {
			hint = "vacate fleet restore " + where
			mood = sgrAccent + clean(x.Phase) + sgrOff + ", " + mood
		}
		add(hint, "%s%s%s %s %5.2f of %.0f cores%s  %s of %s  %s", sgrBold, pad(h.Name, 16), sgrOff,
			topBar(wide, h.Cores, h.Waiting, h.CPUs*1.3), h.Cores, h.CPUs, wanted(h.Waiting),
			units.Size(h.Memory-h.Available), units.Size(h.Memory), mood)
		if m.compact {
			continue
		}
		for _, v := range h.VMs {
			m.vmLine(add, h, v, wide)
		}
	}
	return list
}

// fleetLines adds those of a fleet as a whole: its plans, its drains, and what is wrong.
func (m *top) fleetLines(add func(hint, format string, args ...any)) {
	if m.fleet == nil {
		return
	}
	if m.fleet.Error != "" {
		add("", "%s! what you see is old: %s%s", sgrHot, clean(m.fleet.Error), sgrOff)
	}
	told := map[string]bool{}
	for _, e := range m.evictions {
		told[e.Id] = true
	}
	for _, d := range m.decisions {
		switch {
		case d.State == "waits":
			add("vacate fleet approve "+clean(d.Id), "%s? %s%s%s waits for your yes: %s → %s: %s",
				sgrHot, sgrBold, pad(d.Vm, 14), sgrOff, clean(d.From), clean(d.To),
				clean(strings.Join(d.Reasons, "; ")))
		case d.State == "goes on" && !told[d.EvictionId]:
			add("vacate fleet decisions", "%s▶ %s%s%s%s %s → %s", sgrMove, sgrOff, sgrBold,
				pad(d.Vm, 14), sgrOff, clean(d.From), clean(d.To))
		}
	}
	for _, h := range m.hosts {
		x := h.Maintenance
		if x == nil || x.Phase != "draining" {
			continue
		}
		forecast := ""
		if x.Takes != nil {
			end := time.UnixMilli(max(x.Asked,
				x.At)).Add(time.Duration(float64(*x.Takes) * float64(time.Second)))
			forecast = ", empty at " + end.Format("15:04") + " by the forecast"
		}
		add("vacate fleet restore "+clean(h.Name), "%s↧ %s%s%s%s is being drained: %d to go, "+
			"%d stay%s", sgrAccent, sgrOff, sgrBold, clean(h.Name), sgrOff, len(x.Going),
			len(x.Staying), forecast)
	}
	for _, t := range m.fleet.Troubles[:min(len(m.fleet.Troubles), 5)] {
		add("vacate fleet rules", "%s- %s%s", sgrSoft, clean(t), sgrOff)
	}
}

func wanted(cores ui.Num) string {
	if cores < 0.05 {
		return ""
	}
	return fmt.Sprintf(" + %.2f wanted", cores)
}

// vmLine adds the line of a VM.
func (m *top) vmLine(add func(hint, format string, args ...any), h *ui.Host, v ui.VM, wide int) {
	if v.State == "none" {
		add(fmt.Sprintf("vacate start %s     (on %s)", clean(v.Name), clean(h.Name)),
			"  %s%s not here%s", sgrSoft, pad(v.Name, 14), sgrOff)
		return
	}
	to := "HOST"
	if len(h.Peers) > 0 {
		to = clean(h.Peers[0])
	}
	steal, state := "", ""
	if v.Steal >= 0.02 {
		steal = fmt.Sprintf("steal %2.0f %%", 100*v.Steal)
		if starved(v) {
			steal = sgrHot + steal + sgrOff
		}
	}
	if v.State != "running" {
		state = clean(v.State)
	}
	hint := fmt.Sprintf("vacate evict %s --to %s     (on %s)", clean(v.Name), to, clean(h.Name))
	if m.fleet != nil {
		hint = ""
	}
	add(hint, "  %s %s %5.2f cores%s  %s  %s %s", pad(v.Name, 14),
		topBar(wide, v.Cores, v.Waiting, h.CPUs*1.3), v.Cores, wanted(v.Waiting),
		units.Size(v.Resident), steal, state)
}

// View implements tea.Model.
func (m *top) View() string {
	vms, n := 0, 0
	for _, h := range m.hosts {
		for _, v := range h.VMs {
			if v.State != "none" {
				vms++
			}
			if starved(v) {
				n++
			}
		}
	}
	moving, mode := len(m.evictions), ""
	if m.fleet != nil {
		moving = 0
		for _, d := range m.decisions {
			if d.State == "goes on" {
				moving++
			}
		}
		leader, _, _ := strings.Cut(m.fleet.Leader, "@")
		mode = fmt.Sprintf(", mode %s, %s leads", clean(m.fleet.Mode), clean(leader))
	}
	head := cut(fmt.Sprintf("%svacate top%s  %d hosts, %d VMs, %d starve, %d moving%s  %s%s%s",
		sgrBold, sgrOff, len(m.hosts), vms, n, moving, mode, sgrSoft,
		m.now.Format(time.TimeOnly), sgrOff), m.width)
	list := m.lines()
	room := max(1, m.height-3)
	m.at = max(0, min(m.at, len(list)-1))
	m.above = max(0, min(m.above, len(list)-room))
	m.above = max(min(m.above, m.at), m.at-room+1)
	out := []string{head, ""}
	hint := ""
	for i := m.above; i < min(len(list), m.above+room); i++ {
		line := cut(list[i].text, m.width)
		if i == m.at {
			hint = list[i].hint
			line = sgrReverse + " " + sgrOff + cut(list[i].text, m.width-1)
		}
		out = append(out, line)
	}
	for len(out) < m.height-1 {
		out = append(out, "")
	}
	foot := "q ends  ↑↓ choose  s starving first  v VMs"
	if hint != "" {
		foot = hint + "   " + foot
	}
	return strings.Join(append(out, sgrSoft+cut(foot, m.width)+sgrOff), "\n")
}

// cut ends a line after so many columns. What it takes for colours takes no column.
func cut(s string, width int) string {
	var b strings.Builder
	n, escape := 0, false
	for _, r := range s {
		switch {
		case escape:
			escape = r != 'm'
		case r == '\x1b':
			escape = true
		case n >= width:
			continue
		default:
			n++
		}
		b.WriteRune(r)
	}
	return b.String()
}
