package ui

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/link/certs"
	"vacate/lab/browser"
	"vacate/lab/fleethosts"

	"connectrpc.com/connect"
)

// logOf is what a program has logged.
type logOf struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logOf) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logOf) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// ensemble is a real vacate-fleet, with made-up hosts.
type ensemble struct {
	*fleethosts.Fleet
	t       *testing.T
	dir     string
	address string
	daemons string
	log     logOf
	stop    func() // ends vacate-fleet
}

// newEnsemble builds and starts vacate-fleet, with its store in it, and has hosts join.
func newEnsemble(t *testing.T, o fleethosts.Options) *ensemble {
	t.Helper()
	e := &ensemble{t: t, dir: t.TempDir()}
	program := filepath.Join(e.dir, "vacate-fleet")
	if out, err := exec.Command("go", "build", "-o", program, "vacate/cmd/vacate-fleet").
		CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	o.CA, o.Dir = filepath.Join(e.dir, "ca"), filepath.Join(e.dir, "hosts")
	must(t, certs.Init(o.CA))
	for _, name := range []string{"brain1", "boss", "looker"} {
		must(t, certs.Issue(o.CA, name, filepath.Join(e.dir, name), certs.DefaultDays, false))
	}
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	e.address = ln.Addr().String()
	ln.Close()
	file := filepath.Join(e.dir, "vacate-fleet.toml")
	must(t, os.WriteFile(file, fmt.Appendf(nil, "certs = %q\nlisten = %q\naddress = %q\n"+
		"data = %q\n[operators]\nadmin = [\"boss\"]\nview = [\"looker\"]\n",
		filepath.Join(e.dir, "brain1"), e.address, e.address, filepath.Join(e.dir, "data")), 0o600))
	brain := exec.Command(program, "--config", file)
	brain.Stderr = &e.log
	must(t, brain.Start())
	e.stop = sync.OnceFunc(func() {
		brain.Process.Kill()
		brain.Wait()
	})
	t.Cleanup(e.stop)
	ctx, cancel := context.WithCancel(t.Context())
	o.Brains = []string{"brain1@" + e.address}
	e.Fleet, err = fleethosts.Start(ctx, o)
	must(t, err)
	e.daemons, err = e.Listen(ctx)
	must(t, err)
	t.Cleanup(func() {
		cancel()
		e.Wait()
	})
	return e
}

// brain is the fleet's, as an operator asks it.
func (e *ensemble) brain(operator string) *Brain {
	e.t.Helper()
	identity, err := certs.Load(filepath.Join(e.dir, operator), func(error) {})
	must(e.t, err)
	client := fleetv1.NewFleetClient(&http.Client{Transport: &http.Transport{
		TLSClientConfig: identity.Client("brain1")}}, "https://"+e.address)
	return &Brain{
		Find: func(context.Context) (fleetv1.FleetClient, error) { return client, nil },
		Daemon: func(host string) (Remote, error) {
			return Remote{HostClient: hostv1.NewHostClient(http.DefaultClient,
				e.daemons+"/"+host), Key: host, Label: host,
				Explain: func(err error) error { return err }}, nil
		},
	}
}

// fleetPage serves the page of a fleet, and returns the address that opens it.
func fleetPage(t testing.TB, b *Brain, who string) string {
	t.Helper()
	hub := NewHub()
	address, token := serveFor(t, &Server{Hub: hub, Brain: b, Who: who})
	pollFleet(t, hub, b)
	return address + "/#token=" + token()
}

// onlooker is a person in front of the page.
type onlooker struct {
	*testing.T
	ctx context.Context
	p   *browser.Page
}

func look(t *testing.T, b *browser.Browser, address string, limit time.Duration, width,
	height int) *onlooker {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	p, err := b.Open(ctx, address, width, height)
	must(t, err)
	must(t, p.Dark(ctx, true))
	return &onlooker{t, ctx, p}
}

// sees waits for an expression of JavaScript to be true.
func (o *onlooker) sees(expression string, args ...any) {
	o.Helper()
	ctx, cancel := context.WithTimeout(o.ctx, 2*time.Minute)
	defer cancel()
	must(o, o.p.Wait(ctx, fmt.Sprintf(expression, args...)))
}

func (o *onlooker) clicks(selector string) { o.Helper(); must(o, o.p.Click(o.ctx, selector)) }

// reads waits until an element has a text.
func (o *onlooker) reads(selector, text string) {
	o.Helper()
	o.sees("[...document.querySelectorAll(%q)].some(e => e.textContent.includes(%q))", selector,
		text)
}

// pictures takes some at three widths, dark and light, where they are wanted.
func (o *onlooker) pictures(name string) {
	o.Helper()
	if os.Getenv("VACATE_UI_PICTURES") == "" {
		return
	}
	for _, s := range []struct {
		name          string
		width, height int
		dark          bool
	}{{"", 1500, 1100, true}, {"-light", 900, 1200, false}, {"-phone", 390, 844, true}} {
		must(o, o.p.Size(o.ctx, s.width, s.height))
		must(o, o.p.Dark(o.ctx, s.dark))
		must(o, o.p.Eval(o.ctx, "scrollTo(0, 0); new Promise(f => setTimeout(f, 700))",
			nil))
		o.picture(name + s.name + ".png")
	}
	must(o, o.p.Size(o.ctx, 1500, 1100))
	must(o, o.p.Dark(o.ctx, true))
}

// shuts waits for the end of an order, and closes the host that is open.
func (o *onlooker) shuts() {
	o.Helper()
	o.sees("!document.querySelector('#dialog').open")
	must(o, o.p.Press(o.ctx, "Escape"))
	o.sees("!document.querySelector('dialog[open]')")
}

// fills types into a field, and leaves it.
func (o *onlooker) fills(selector, text string) {
	o.Helper()
	o.clicks(selector)
	must(o, o.p.Eval(o.ctx, fmt.Sprintf("document.querySelector(%q).select()", selector), nil))
	must(o, o.p.Type(o.ctx, text))
	must(o, o.p.Press(o.ctx, "Tab"))
}

// picture takes one, where they are wanted.
func (o *onlooker) picture(name string) {
	o.Helper()
	if dir := os.Getenv("VACATE_UI_PICTURES"); dir != "" {
		must(o, o.p.Picture(o.ctx, filepath.Join(dir, name)))
	}
}

// named are hosts whose VMs have names that people give.
var named = fleethosts.Options{Hosts: 12, VMs: 6, Every: 500 * time.Millisecond, Rate: 3e8, Seed: 1,
	VM: func(n int) string {
		return fmt.Sprintf("%s%d", []string{"web", "db", "cache", "mail", "ci", "ml"}[n%6], n/6+1)
	}}

// audited expects the brain's log to say what boss asked for.
func (e *ensemble) audited(all ...string) {
	e.t.Helper()
	for _, asked := range all {
		found := slices.ContainsFunc(strings.Split(e.log.String(), "\n"), func(line string) bool {
			return strings.Contains(line, "did what an operator asked") &&
				strings.Contains(line, "operator=boss") && strings.Contains(line, "asks="+asked)
		})
		if !found {
			e.t.Errorf("the brain's log does not say that boss asked for %s", asked)
		}
	}
}

// complaints are what pages complain about, but for answers that something is refused.
func complaints(b *browser.Browser) []string {
	return slices.DeleteFunc(b.Said(), func(s string) bool { return strings.Contains(s, "409") })
}

// Each button of a fleet's page does what `vacate fleet` does, in a real browser, with a real
// vacate-fleet and made-up hosts: dry run first. The brain's log says who asked.
func TestBrowserFleet(t *testing.T) {
	b := chromium(t)
	e := newEnsemble(t, named)
	o := look(t, b, fleetPage(t, e.brain("boss"), "boss"), 8*time.Minute, 1500, 1100)
	o.sees("document.querySelectorAll('.tile').length == 12")
	o.reads("#leader", "brain1 leads")
	o.sees("document.querySelector('#mode [aria-pressed=true]').dataset.mode == 'watch'")

	// A rule, with what is in its way, and without it.
	o.clicks("#rules")
	o.clicks("#dialog .add")
	o.fills("#dialog [name=name]", "db")
	o.fills("#dialog [name=rule]", "vms name=db* must run apart by nonsense nonsense")
	o.sees("document.querySelector('#dialog .refused') && " +
		"document.querySelector('#dialog .act').disabled")
	o.fills("#dialog [name=rule]", "vms name=db1|cache1 must run apart")
	o.reads("#dialog .what", "The rule is not kept yet")
	o.reads("#dialog .command", `vacate fleet rules --set db "vms name=db1|cache1 must run apart"`)
	o.picture("fleet-rule.png")
	o.clicks("#dialog .act")
	o.reads("#rules", "Rules: 1")
	o.clicks("#rules")
	o.reads("#dialog .rulelist", "by boss")
	o.clicks("#dialog .remove")
	o.reads("#dialog .what", "holds no longer")
	o.clicks("#dialog .act")
	o.sees("document.querySelector('#rules').textContent == 'Rules'")

	// Where a new VM would start.
	o.clicks("#place")
	o.reads("#dialog .command", "vacate fleet place --memory 8192M --cpu 2")
	o.sees("document.querySelectorAll('#dialog .lines li').length == 5")
	o.fills("#dialog [name=memory]", "99999999")
	o.reads("#dialog .refused", "No host can have it")
	o.clicks("#dialog .cancel")

	// A drain: forecast first. A VM that cannot leave stays, and is named.
	names := e.Names()
	e.Bar(names[4], "db5", "it has a device of the host")
	o.clicks(fmt.Sprintf(".tile[data-host=%q]", names[4]))
	o.reads("#panel h2", names[4])
	o.sees("[...document.querySelectorAll('#panel .vm')].some(e => e.title.includes('device'))")
	o.clicks("#panel .drain")
	o.sees("document.querySelectorAll('#dialog .leaves tbody tr').length == 5")
	o.reads("#dialog .staying", "it has a device of the host")
	o.reads("#dialog .lines", "all that can leave "+names[4]+" will have left in")
	o.fills("#dialog [name=reason]", "new memory")
	must(t, o.p.Eval(o.ctx, "(i => { i.value = '00:00'; i.dispatchEvent(new Event('change')); })("+
		"document.querySelector('#dialog [name=by]'))", nil))
	o.reads("#dialog .command", "vacate fleet drain "+names[4]+
		` --by 00:00 --reason "new memory"`)
	o.picture("fleet-drain.png")
	if strings.Contains(e.log.String(), "a VM will be evicted") {
		t.Error("a dry run moves VMs")
	}
	o.clicks("#dialog .act")
	o.shuts()
	o.reads(".drain .asked", "by boss: new memory")
	o.reads(".drain .told", "forecast:")
	o.reads(".live h2", names[4]+" →")
	o.sees("document.querySelector('.live .key').textContent.includes('user data')")
	o.reads(".drain .told", "5 of 6 VMs have left")
	o.reads(".drain .staying", "db5")
	o.reads(".decision .came", "predicted")
	o.clicks(".decision[data-is=good] summary")
	o.sees("document.querySelector('.decision[open] .predicted').textContent.includes(" +
		"'done after')")
	o.clicks(".decision[open] .report")
	o.sees("document.querySelector('#dialog iframe')")
	o.clicks("#dialog .buttons button")

	// Restore.
	o.clicks(".drain .restore")
	o.reads("#dialog .what", ": takes VMs again; 6 that were there come back if that helps")
	o.clicks("#dialog .act")
	o.sees("[...document.querySelectorAll('.drain .restore')].every(e => " +
		"!e.getClientRects().length)")

	e.audited("Drain", "Restore", "PutRule", "RemoveRule")
	if said := complaints(b); len(said) > 0 {
		t.Errorf("the page says %s", said)
	}
}

// In mode ask, plans wait for a yes, or a no. Hosts are late, and are forgotten when they are gone.
// One who may only look gets no buttons; and when the brain is gone, the page says so.
func TestBrowserFleetAsk(t *testing.T) {
	b := chromium(t)
	e := newEnsemble(t, named)
	o := look(t, b, fleetPage(t, e.brain("boss"), "boss"), 8*time.Minute, 1500, 1100)
	o.sees("document.querySelectorAll('.tile').length == 12")
	names := e.Names()
	o.clicks("#mode [data-mode=ask]")
	o.reads("#dialog .what", "Each decision waits for an operator's yes")
	o.clicks("#dialog .act")
	o.sees("document.querySelector('#mode [aria-pressed=true]').dataset.mode == 'ask'")
	e.Want(names[0], 1.3)
	e.Want(names[1], 1.3)
	o.reads("#asktitle", "2 plans wait for your yes")
	// A drain is carried out in each mode.
	o.clicks(fmt.Sprintf(".tile[data-host=%q]", names[6]))
	o.clicks("#panel .drain")
	o.clicks("#dialog .act")
	o.shuts()
	o.reads(".live h2", names[6]+" →")
	o.sees("document.querySelector('.live .key').textContent.includes('user data')")
	o.pictures("fleet")
	var id string
	must(t, o.p.Eval(o.ctx, "document.querySelector('.asks').dataset.id", &id))
	o.clicks(".asks .approve")
	o.reads("#dialog .what", "leaves host")
	o.reads("#dialog .command", "vacate fleet approve "+id)
	o.clicks("#dialog .act")
	o.reads(".decision[data-is=good] .outcome", "approved by boss")
	o.clicks(".asks .reject")
	o.reads("#dialog .command", "--reject")
	must(t, o.p.Eval(o.ctx, "document.querySelector('#dialog .command').textContent.match("+
		"/[0-9a-f]{32}/)[0]", &id))
	o.clicks("#dialog .act")
	o.reads(fmt.Sprintf(`.decision[data-id="%s"] .came`, id), "boss said no")

	// One host is silent, and is late; another is gone, and is forgotten.
	e.Silence(names[7], true)
	e.Leave(names[8])
	o.reads(fmt.Sprintf(".tile[data-host=%q] .figures", names[7]), "late")
	o.reads(fmt.Sprintf(".tile[data-host=%q] .figures", names[8]), "late")
	o.clicks(fmt.Sprintf(".tile[data-host=%q]", names[7]))
	o.clicks("#panel .forget")
	o.clicks("#dialog .act")
	o.reads("#dialog .refused", "is connected")
	o.clicks("#dialog .cancel")
	o.shuts()
	o.clicks(fmt.Sprintf(".tile[data-host=%q]", names[8]))
	o.clicks("#panel .forget")
	o.clicks("#dialog .act")
	o.sees("document.querySelectorAll('.tile').length == 11 && " +
		"!document.querySelector('#panel').open")

	e.audited("Drain", "SetMode", "Approve", "Forget")

	// One who may only look gets no buttons that do something, and is refused by the brain.
	l := look(t, b, fleetPage(t, e.brain("looker"), "looker"), time.Minute, 1500, 1100)
	l.sees("document.querySelectorAll('.tile').length == 11")
	l.sees("[...document.querySelectorAll('#mode button, .asks footer button')].every(b => " +
		"b.disabled)")
	l.clicks(".tile")
	l.sees("document.querySelector('#panel .drain').disabled")

	// The brain is gone: what is shown is old, and the page says so.
	e.stop()
	o.reads("#silent", "What you see is old")
	if said := complaints(b); len(said) > 0 {
		t.Errorf("the page says %s", said)
	}
}

// Names that a real brain accepts from its hosts are shown as texts, whatever is in them.
func TestBrowserFleetHostileNames(t *testing.T) {
	const evil = `<img src=x onerror="window.hit=1"><script>window.hit=2</script>`
	b := chromium(t)
	e := newEnsemble(t, fleethosts.Options{Hosts: 8, VMs: 3, Every: 500 * time.Millisecond,
		Rate: 1e8, VM: func(n int) string { return fmt.Sprint(n, evil) }})
	o := look(t, b, fleetPage(t, e.brain("boss"), evil), 4*time.Minute, 1300, 1000)
	o.sees("document.querySelectorAll('.tile').length == 8")
	names := e.Names()
	e.Bar(names[1], fmt.Sprint(3, evil), evil)
	e.Refuse(names[2], evil)
	quoted, _ := json.Marshal(evil)
	for _, host := range names[1:3] {
		o.clicks(fmt.Sprintf(".tile[data-host=%q]", host))
		o.sees("document.querySelectorAll('#panel .vm .name').length == 3 && [..."+
			"document.querySelectorAll('#panel .vm .name')].every(e => e.textContent.includes(%s))",
			quoted)
		o.clicks("#panel .drain")
		o.sees("[...document.querySelectorAll('#dialog .leaves th')].some(e => "+
			"e.textContent.includes(%s))", quoted)
		o.fills("#dialog [name=reason]", evil)
		o.sees("document.querySelector('#dialog .command').textContent.includes('img')")
		o.clicks("#dialog .act")
		o.shuts()
	}
	for _, selector := range []string{".drain .asked", ".drain .staying", ".live h2",
		".decision .name", ".decision .came"} {
		o.sees("[...document.querySelectorAll(%q)].some(e => e.textContent.includes(%s))",
			selector, quoted)
	}
	var hit any
	must(t, o.p.Eval(o.ctx, "window.hit || document.querySelectorAll('main img, dialog img, "+
		"main script').length || null", &hit))
	if hit != nil {
		t.Errorf("a name became part of the page: %v", hit)
	}
	if said := b.Said(); said != nil {
		t.Errorf("the page says %s", said)
	}
}

// With 1,000 hosts of 20 VMs that report to a real vacate-fleet, the page has no more elements than
// can be seen. The log has the times.
func TestBrowserFleetManyHosts(t *testing.T) {
	b := chromium(t)
	e := newEnsemble(t, fleethosts.Options{Hosts: 1000, VMs: 20, Every: 3 * time.Second, Seed: 2})
	brain := e.brain("boss")
	address := fleetPage(t, brain, "boss")
	for {
		c, err := brain.Find(t.Context())
		must(t, err)
		if n := reporting(t, c); n == 1000 {
			break
		}
		time.Sleep(time.Second)
	}
	o := look(t, b, address, 4*time.Minute, 1400, 900)
	o.sees("document.querySelectorAll('.tile').length > 20")
	o.reads("#tallies", "1000")
	loaded, err := o.p.Busy(o.ctx)
	must(t, err)
	var paint float64
	must(t, o.p.Eval(o.ctx, "performance.getEntriesByName('first-contentful-paint')[0]"+
		"?.startTime ?? 0", &paint))
	var there int
	must(t, o.p.Eval(o.ctx, "document.querySelectorAll('.tile').length", &there))
	if there > 120 {
		t.Errorf("%d of 1000 hosts are in the page: only those that can be seen should be", there)
	}
	const drawn = "performance.getEntriesByName('vacate-update').length"
	var updates []time.Duration
	for len(updates) < 40 {
		var before int
		must(t, o.p.Eval(o.ctx, drawn, &before))
		was, err := o.p.Busy(o.ctx)
		must(t, err)
		o.sees("%s > %d", drawn, before)
		must(t, o.p.Eval(o.ctx, "new Promise(f => requestAnimationFrame(() => setTimeout(f)))",
			nil))
		is, err := o.p.Busy(o.ctx)
		must(t, err)
		updates = append(updates, is-was)
	}
	slices.Sort(updates)
	t.Logf("a fleet of 1000 hosts of 20 VMs: first contentful paint after %.0f ms; CPU time of "+
		"the main thread: %v until all hosts were there, %v for an update (median of %d; longest "+
		"%v)", paint, loaded.Round(time.Millisecond),
		updates[len(updates)/2].Round(time.Millisecond), len(updates),
		updates[len(updates)-1].Round(time.Millisecond))
	o.picture("fleet-many.webp")
	must(t, o.p.Press(o.ctx, "/"))
	must(t, o.p.Type(o.ctx, "rack=r3"))
	o.sees("(all => all.length && all.every(e => e.textContent.startsWith('rack03-')))(" +
		"[...document.querySelectorAll('.tile .name')])")
	must(t, o.p.Press(o.ctx, "Escape"))
	o.clicks("#starving")
	o.sees("document.querySelector('.tile').dataset.is == 'hot'")
	if said := b.Said(); said != nil {
		t.Errorf("the page says %s", said)
	}
}

// reporting is how many hosts report.
func reporting(t *testing.T, c fleetv1.FleetClient) int {
	t.Helper()
	r, err := c.Status(t.Context(), connect.NewRequest(&fleetv1.StatusRequest{}))
	if err != nil {
		return 0
	}
	return int(r.Msg.Hosts - r.Msg.Late)
}
