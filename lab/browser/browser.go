// Package browser drives a Chromium for tests, by its DevTools protocol over a pair of pipes.
package browser

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// Browser is a Chromium without a window.
type Browser struct {
	cmd  *exec.Cmd
	dir  string
	send *os.File
	done chan struct{}

	mu      sync.Mutex
	next    int
	waiting map[int]chan reply
	said    []string
}

type reply struct {
	Result json.RawMessage
	Error  *struct{ Message string }
}

// Find returns the path of a Chromium; empty for none.
func Find() string {
	for _, name := range []string{"chromium-headless-shell", "chromium"} {
		if p, err := exec.LookPath(name); err == nil {
			return p
		}
	}
	return ""
}

// Start starts a Chromium with a profile of its own.
func Start() (*Browser, error) {
	path := Find()
	if path == "" {
		return nil, errors.New("there is no Chromium: install the package chromium-headless-shell")
	}
	dir, err := os.MkdirTemp("", "browser")
	if err != nil {
		return nil, err
	}
	in, send, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	receive, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	b := &Browser{dir: dir, send: send, done: make(chan struct{}), waiting: map[int]chan reply{}}
	// Root may use no sandbox.
	b.cmd = exec.Command(path, "--headless", "--no-sandbox", "--remote-debugging-pipe",
		"--user-data-dir="+dir, "--disable-gpu", "--hide-scrollbars", "--no-first-run",
		"--disable-dev-shm-usage", "--force-color-profile=srgb", "about:blank")
	b.cmd.ExtraFiles = []*os.File{in, out} // 3 and 4
	if err := b.cmd.Start(); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	in.Close()
	out.Close()
	go b.receive(receive)
	return b, nil
}

// Close ends it.
func (b *Browser) Close() {
	b.send.Close()
	b.cmd.Process.Kill()
	b.cmd.Wait()
	<-b.done
	// Processes of it may still be writing there.
	for range 20 {
		if os.RemoveAll(b.dir) == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (b *Browser) receive(f *os.File) {
	defer close(b.done)
	defer f.Close()
	in := bufio.NewReader(f)
	for {
		line, err := in.ReadBytes(0)
		if err != nil {
			return
		}
		var m struct {
			ID        int
			SessionID string
			Method    string
			Params    json.RawMessage
			reply
		}
		if json.Unmarshal(line[:len(line)-1], &m) != nil {
			continue
		}
		b.mu.Lock()
		to := b.waiting[m.ID]
		delete(b.waiting, m.ID)
		b.mu.Unlock()
		if m.ID != 0 && to != nil {
			to <- m.reply
			continue
		}
		b.note(m.Method, m.Params)
	}
}

// note keeps what pages say that should say nothing: errors, and what their policy forbade.
func (b *Browser) note(method string, params json.RawMessage) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch method {
	case "Runtime.exceptionThrown", "Log.entryAdded":
		b.said = append(b.said, method+": "+string(params))
	}
}

// Said returns what pages complained about.
func (b *Browser) Said() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.said
}

// call calls a method of the protocol.
func (b *Browser) call(ctx context.Context, session, method string, params, result any) error {
	b.mu.Lock()
	b.next++
	id, to := b.next, make(chan reply, 1)
	b.waiting[id] = to
	b.mu.Unlock()
	m := map[string]any{"id": id, "method": method, "params": params}
	if params == nil {
		m["params"] = struct{}{}
	}
	if session != "" {
		m["sessionId"] = session
	}
	line, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if _, err := b.send.Write(append(line, 0)); err != nil {
		return err
	}
	select {
	case r := <-to:
		if r.Error != nil {
			return fmt.Errorf("%s: %s", method, r.Error.Message)
		}
		if result != nil {
			return json.Unmarshal(r.Result, result)
		}
		return nil
	case <-b.done:
		return fmt.Errorf("%s: the browser has ended", method)
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", method, context.Cause(ctx))
	}
}

// Page is a tab.
type Page struct {
	b       *Browser
	session string
}

// Open opens a tab of a size, and an address in it.
func (b *Browser) Open(ctx context.Context, address string, width, height int) (*Page, error) {
	var target struct{ TargetID string }
	if err := b.call(ctx, "", "Target.createTarget", map[string]any{"url": "about:blank"},
		&target); err != nil {
		return nil, err
	}
	var attached struct{ SessionID string }
	if err := b.call(ctx, "", "Target.attachToTarget",
		map[string]any{"targetId": target.TargetID, "flatten": true}, &attached); err != nil {
		return nil, err
	}
	p := &Page{b, attached.SessionID}
	for _, domain := range []string{"Page", "Runtime", "Log"} {
		if err := b.call(ctx, p.session, domain+".enable", nil, nil); err != nil {
			return nil, err
		}
	}
	if err := p.b.call(ctx, p.session, "Performance.enable",
		map[string]any{"timeDomain": "threadTicks"}, nil); err != nil {
		return nil, err
	}
	if err := p.Size(ctx, width, height); err != nil {
		return nil, err
	}
	return p, p.Go(ctx, address)
}

// Size changes the size of the tab.
func (p *Page) Size(ctx context.Context, width, height int) error {
	return p.b.call(ctx, p.session, "Emulation.setDeviceMetricsOverride",
		map[string]any{"width": width, "height": height, "deviceScaleFactor": 1,
			"mobile": width < 600}, nil)
}

// Dark has pages be told that the person likes dark, or light.
func (p *Page) Dark(ctx context.Context, dark bool) error {
	value := map[bool]string{true: "dark", false: "light"}[dark]
	return p.b.call(ctx, p.session, "Emulation.setEmulatedMedia", map[string]any{
		"features": []any{map[string]string{"name": "prefers-color-scheme", "value": value}}}, nil)
}

// Go opens an address.
func (p *Page) Go(ctx context.Context, address string) error {
	return p.b.call(ctx, p.session, "Page.navigate", map[string]any{"url": address}, nil)
}

// Eval evaluates JavaScript, waits for a promise, and returns the value in result.
func (p *Page) Eval(ctx context.Context, script string, result any) error {
	var r struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails *struct {
			Text      string
			Exception struct{ Description string }
		}
	}
	if err := p.b.call(ctx, p.session, "Runtime.evaluate",
		map[string]any{"expression": script, "awaitPromise": true, "returnByValue": true},
		&r); err != nil {
		return err
	}
	if x := r.ExceptionDetails; x != nil {
		return fmt.Errorf("%s: %s %s", script, x.Text, x.Exception.Description)
	}
	if result == nil || r.Result.Value == nil {
		return nil
	}
	return json.Unmarshal(r.Result.Value, result)
}

// Wait waits until an expression is true.
func (p *Page) Wait(ctx context.Context, expression string) error {
	for {
		var ok bool
		if err := p.Eval(ctx, "!!("+expression+")", &ok); err == nil && ok {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			var body string
			p.Eval(context.WithoutCancel(ctx), "document.body.innerText", &body)
			return fmt.Errorf("%s: %w; the page says: %s", expression, context.Cause(ctx), body)
		}
	}
}

// Click clicks on the first element of a selector, as a mouse does, once it is there and enabled.
func (p *Page) Click(ctx context.Context, selector string) error {
	quoted, _ := json.Marshal(selector)
	find := "document.querySelector(" + string(quoted) + ")"
	if err := p.Wait(ctx, find+" && !"+find+".disabled && "+find+".getClientRects().length"); err !=
		nil {
		return err
	}
	var at struct{ X, Y float64 }
	if err := p.Eval(ctx, "(() => { const e = "+find+"; e.scrollIntoView({block: 'center'}); "+
		"const r = e.getBoundingClientRect(); return {X: r.x + r.width / 2, Y: r.y + r.height / "+
		"2}; })()",
		&at); err != nil {
		return err
	}
	for _, kind := range []string{"mousePressed", "mouseReleased"} {
		if err := p.b.call(ctx, p.session, "Input.dispatchMouseEvent", map[string]any{"type": kind,
			"x": at.X, "y": at.Y, "button": "left", "clickCount": 1}, nil); err != nil {
			return err
		}
	}
	return nil
}

// Type types a text where the focus is.
func (p *Page) Type(ctx context.Context, text string) error {
	return p.b.call(ctx, p.session, "Input.insertText", map[string]any{"text": text}, nil)
}

// Press presses a key, such as "Enter" or "a".
func (p *Page) Press(ctx context.Context, key string) error {
	code := map[string]int{"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39,
		"ArrowDown": 40, "ArrowLeft": 37, "ArrowUp": 38}[key]
	text := ""
	if len(key) == 1 {
		text, code = key, int(strings.ToUpper(key)[0])
	} else if key == "Enter" {
		text = "\r"
	}
	for _, kind := range []string{"keyDown", "keyUp"} {
		m := map[string]any{"type": kind, "key": key, "windowsVirtualKeyCode": code}
		if kind == "keyDown" && text != "" {
			m["text"] = text
		}
		if err := p.b.call(ctx, p.session, "Input.dispatchKeyEvent", m, nil); err != nil {
			return err
		}
	}
	return nil
}

// Picture takes a picture of the tab: PNG, or WebP for a name that ends so.
func (p *Page) Picture(ctx context.Context, file string) error {
	params := map[string]any{"format": "png"}
	if strings.HasSuffix(file, ".webp") {
		params = map[string]any{"format": "webp", "quality": 82}
	}
	var shot struct{ Data string }
	if err := p.b.call(ctx, p.session, "Page.captureScreenshot", params, &shot); err != nil {
		return err
	}
	data, err := base64.StdEncoding.DecodeString(shot.Data)
	if err != nil {
		return err
	}
	return os.WriteFile(file, data, 0o644)
}

// Busy is how much CPU time the main thread of the tab has taken.
func (p *Page) Busy(ctx context.Context) (time.Duration, error) {
	var r struct {
		Metrics []struct {
			Name  string
			Value float64
		}
	}
	if err := p.b.call(ctx, p.session, "Performance.getMetrics", nil, &r); err != nil {
		return 0, err
	}
	for _, m := range r.Metrics {
		if m.Name == "TaskDuration" {
			return time.Duration(m.Value * float64(time.Second)), nil
		}
	}
	return 0, errors.New("Performance.getMetrics: no TaskDuration")
}

// Close closes the tab.
func (p *Page) Close(ctx context.Context) error {
	return p.b.call(ctx, p.session, "Page.close", nil, nil)
}
