package host

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/ui"
	"vacate/lab"
	"vacate/lab/browser"
	"vacate/lab/labtest"
)

// pageOf serves the page of `vacate ui` for some hosts, and returns the address that opens it.
func pageOf(t *testing.T, list ...*site) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	hub, tokens := ui.NewHub(), make(chan string, 100)
	s := &ui.Server{Hub: hub, Who: "user tester", Log: slog.New(slog.DiscardHandler),
		Token: func(token string) { tokens <- token }}
	var tasks sync.WaitGroup
	for _, of := range list {
		r := ui.Remote{HostClient: of.api, Key: of.name, Label: of.name,
			Explain: func(err error) error { return err }}
		s.Remotes = append(s.Remotes, r)
		tasks.Go(func() {
			hub.Poll(ctx, r, func(e *hostv1.Eviction) string {
				return fmt.Sprintf("%s is %s", e.Vm, e.State)
			})
		})
	}
	tasks.Go(func() {
		if err := s.Serve(ctx, ln); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		stop()
		tasks.Wait()
	})
	return fmt.Sprintf("http://%s/#token=%s", ln.Addr(), <-tokens)
}

// onlooker is a person in front of the page.
type onlooker struct {
	t   *testing.T
	ctx context.Context
	p   *browser.Page
}

func (o *onlooker) ok(err error) {
	o.t.Helper()
	if err != nil {
		o.t.Fatal(err)
	}
}

// sees waits for an expression of JavaScript to be true.
func (o *onlooker) sees(expression string) { o.t.Helper(); o.ok(o.p.Wait(o.ctx, expression)) }
func (o *onlooker) clicks(selector string) { o.t.Helper(); o.ok(o.p.Click(o.ctx, selector)) }

// reads waits until an element has a text.
func (o *onlooker) reads(selector, text string) {
	o.t.Helper()
	o.sees(fmt.Sprintf("[...document.querySelectorAll(%q)].some(e => e.textContent.includes(%q))",
		selector, text))
}

// picture takes one, where they are wanted.
func (o *onlooker) picture(name string) {
	if dir := os.Getenv("VACATE_UI_PICTURES"); dir != "" {
		o.ok(o.p.Picture(o.ctx, filepath.Join(dir, name)))
	}
}

// Each button of the page does what the command does, in a real browser, with real daemons and a
// real VM: dry run and question first.
func TestBrowserButtons(t *testing.T) {
	if browser.Find() == "" && os.Getenv("VACATE_REQUIRE") != "1" {
		t.Skip("needs a Chromium: install the package chromium-headless-shell")
	}
	l := labtest.New(t, lab.Options{Rate: 2e8})
	r := newRun(t, l, lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 48, IdleMiB: 64}})
	a, b := r.a, r.b
	a.start("source/preparing", "source/pushing")
	b.start()
	chrome, err := browser.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(chrome.Close)
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	p, err := chrome.Open(ctx, pageOf(t, a, b), 1500, 1000)
	if err != nil {
		t.Fatal(err)
	}
	o := &onlooker{t, ctx, p}
	o.ok(p.Dark(ctx, true))
	const here, there = `.host[data-host="hosta"] `, `.host[data-host="hostb"] `
	o.reads(here+".vm .figures", "cores")
	o.reads(there+".vm .state", "not here")

	// Evict, and abort that while it is possible.
	evict := func() {
		t.Helper()
		o.clicks(here + ".vm .evict")
		o.reads("#dialog .what", "VM web1 leaves host hosta and runs on host hostb")
		o.reads("#dialog .findings", "found nothing wrong")
		o.reads("#dialog .command", "vacate evict web1 --to hostb")
		o.picture("evict.png")
		o.clicks("#dialog .act")
	}
	evict()
	if !a.reach("source/preparing", time.Minute) {
		t.Fatal("nothing is evicted")
	}
	o.clicks(".live .abort")
	o.reads("#dialog .what", "Abort the eviction? The VM stays on host hosta.")
	o.clicks("#dialog .act")
	o.sees("document.querySelector('#dialog .act').textContent == '…' || " +
		"!document.querySelector('#dialog').open")
	a.release("source/preparing")
	o.reads("#past .came", "aborted")

	// Evict: the memory is seen to go.
	evict()
	if !a.reach("source/pushing", 2*time.Minute) {
		t.Fatal("the VM does not go")
	}
	a.release("source/pushing")
	o.sees("document.querySelector('.live .map')?.height > 50 && " +
		"document.querySelector('.live .key').children.length > 1")
	o.sees("parseInt(document.querySelector('.live .numbers b')?.textContent) > 40 || " +
		"!document.querySelector('.live')")
	o.picture("live.png")
	o.reads("#past .came", "all there after")
	o.reads(there+".vm .figures", "cores")

	// Its report, in a frame that reaches nothing of the page.
	o.clicks("#past .entry[data-is=good] .report")
	o.sees("document.querySelector('#dialog iframe') && " +
		"document.querySelector('#dialog iframe').contentDocument === null")
	o.sees("new Promise(f => setTimeout(() => f(true), 1500))")
	o.picture("report.png")
	o.clicks("#dialog .buttons button")

	// Relieve: the VM does not starve there.
	o.clicks(there + ".relieve")
	o.sees("document.querySelector('#dialog .refused, #dialog .what')")
	o.reads("#dialog .command", "vacate relieve")
	o.picture("relieve.png")
	o.clicks("#dialog .cancel")

	// Evacuate: the VM goes back.
	twin, err := r.expected.Started(labtest.Within(t, time.Minute))
	o.ok(err)
	back := a.expect("web1", twin)
	o.clicks(there + ".evacuate")
	o.reads("#dialog table", "web1")
	o.sees("document.querySelector('#dialog .refused, #dialog .what')")
	force := "#dialog input[type=checkbox]"
	o.clicks(force)
	o.reads("#dialog .command", "--force")
	o.reads("#dialog .what", "1 of the VMs of host hostb leave")
	o.picture("evacuate.png")
	o.clicks("#dialog .act")
	o.reads("#jobs li", "VM web1 runs on host hosta.")
	o.reads(here+".vm .figures", "cores")

	// Decide: the other host dies in mid-move, and the operator knows.
	home, err := back.Started(labtest.Within(t, time.Minute))
	o.ok(err)
	again := b.expect("web1", home)
	fmt.Fprintln(a.input, "hold", "source/pushing")
	evict()
	if !a.reach("source/pushing", 2*time.Minute) {
		t.Fatal("the VM does not go")
	}
	b.kill()
	for _, vm := range again.VMs() {
		vm.Kill()
	}
	a.release("source/pushing")
	o.clicks("#urgent .resume")
	o.reads("#dialog .question", "Type hostb if so:")
	o.picture("decide.png")
	var disabled bool
	o.ok(p.Eval(ctx, "document.querySelector('#dialog .act').disabled", &disabled))
	if !disabled {
		t.Error("the decision can be taken without a word")
	}
	for field, word := range map[string]string{"fenced": "hostb", "confirm": "web1"} {
		o.clicks("#dialog input[data-field=" + field + "]")
		o.ok(p.Type(ctx, word))
	}
	o.clicks("#dialog .act")
	o.reads("#past .came", "resumed here")
	o.reads(here+".vm .figures", "cores")
	if err := home.Guest.WaitOps(labtest.Within(t, time.Minute), 1000); err != nil {
		t.Error(err)
	}

	// The log says who asked.
	log, err := os.ReadFile(a.log.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, asked := range []string{"asks=Evict", "asks=Abort", "asks=Decide"} {
		found := false
		for line := range strings.Lines(string(log)) {
			found = found || strings.Contains(line, asked) && strings.Contains(line, "operator=")
		}
		if !found {
			t.Errorf("hosta's log has no %s", asked)
		}
	}
	for _, s := range chrome.Said() {
		if !strings.Contains(s, "409") {
			t.Errorf("the page says %s", s)
		}
	}
}
