package leader

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"vacate/internal/fleet/store"
	"vacate/internal/fleet/view"
)

// Hooks say whom the leader tells of drains, by a call of HTTP.
type Hooks struct {
	URL  string        // empty: nobody
	Time time.Duration // that a call may take
}

// UsualHookTime is how long a call may take unless an operator says otherwise.
const UsualHookTime = 10 * time.Second

// mostHooks is how many calls there may be at once.
const mostHooks = 8

// Notice is what a hook is told, as JSON.
type Notice struct {
	// Event is drain (before VMs leave), drained, restore (before VMs come back), or restored.
	Event  string    `json:"event"`
	Host   string    `json:"host"`
	Reason string    `json:"reason"`
	Who    string    `json:"who"` // the operator
	At     time.Time `json:"at"`
	VMs    []string  `json:"vms"` // that leave, or left
	Leader string    `json:"leader"`
}

// events are those of the phases that maintenance comes to.
var events = map[view.Phase]string{view.Draining: "drain", view.Drained: "drained",
	view.Restoring: "restore", "": "restored"}

// hooks makes calls. What comes of them is logged, and holds nothing up for longer than a call may
// take.
type hooks struct {
	Hooks
	client *http.Client
	slots  chan struct{}
}

func newHooks(c Hooks) *hooks {
	if c.Time == 0 {
		c.Time = UsualHookTime
	}
	return &hooks{Hooks: c, slots: make(chan struct{}, mostHooks), client: &http.Client{
		// Where a notice goes is the operator's to say.
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		}}}
}

// call tells that a host's maintenance comes to a phase, or why that could not be told.
func (h *hooks) call(ctx context.Context, m store.Maintenance, leader string) error {
	ctx, cancel := context.WithTimeout(ctx, h.Time)
	defer cancel()
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	case <-ctx.Done():
		return fmt.Errorf("%d calls are under way: %w", mostHooks, ctx.Err())
	}
	body, err := json.Marshal(Notice{Event: events[m.Phase], Host: m.Host, Reason: m.Reason,
		Who: m.Who, At: time.Now().UTC(), VMs: append([]string{}, m.Left...), Leader: leader})
	if err != nil {
		return err
	}
	q, err := http.NewRequestWithContext(ctx, http.MethodPost, h.URL, bytes.NewReader(body))
	if err != nil {
		return err
	}
	q.Header.Set("Content-Type", "application/json")
	r, err := h.client.Do(q)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	io.Copy(io.Discard, io.LimitReader(r.Body, 64<<10))
	if r.StatusCode/100 != 2 {
		return fmt.Errorf("%s answered %s", q.URL.Redacted(), r.Status)
	}
	return nil
}

// tellHook tells the hook, if there is one, and logs what comes of that.
func (t *term) tellHook(ctx context.Context, m store.Maintenance) error {
	if t.hooks.URL == "" || events[m.Phase] == "" {
		return nil
	}
	err := t.hooks.call(ctx, m, t.config.Me)
	outcome := "answered"
	if err != nil {
		outcome = "failed"
		t.log.Warn("the hook was not told", "host", m.Host, "event", events[m.Phase], "error", err)
		err = fmt.Errorf("the hook was not told that %s comes to %q: %w", m.Host, events[m.Phase],
			err)
	} else {
		t.log.Info("the hook was told", "host", m.Host, "event", events[m.Phase])
	}
	t.metrics.hooks.WithLabelValues(events[m.Phase], outcome).Inc()
	return err
}

// announce is tellHook for what does not wait for it.
func (t *term) announce(m store.Maintenance) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over || t.hooks.URL == "" {
		return
	}
	t.calls.Go(func() { t.tellHook(t.life, m) })
}
