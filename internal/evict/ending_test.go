package evict

import (
	"encoding/json"
	"testing"

	"vacate/internal/qemu/qmp"
)

func TestActionsOf(t *testing.T) {
	for _, c := range []struct {
		args []string
		want actions
	}{
		{nil, actions{"poweroff", "shutdown"}},
		{[]string{"qemu", "-S", "-no-reboot"}, actions{"poweroff", "shutdown"}},
		{[]string{"qemu", "-no-shutdown"}, actions{"pause", "shutdown"}},
		{[]string{"qemu", "--no-shutdown", "-action", "shutdown=poweroff"},
			actions{"poweroff", "shutdown"}},
		{[]string{"qemu", "-action", "panic=pause,reboot=shutdown,shutdown=pause"},
			actions{"pause", "pause"}},
		{[]string{"qemu", "-action", "panic=exit-failure", "--action", "watchdog=poweroff"},
			actions{"poweroff", "exit-failure"}},
		{[]string{"qemu", "-action"}, actions{"poweroff", "shutdown"}},
	} {
		if got := actionsOf(c.args); got != c.want {
			t.Errorf("%q: %+v, want %+v", c.args, got, c.want)
		}
	}
}

// QEMU's own settings decide whether it would have ended.
func TestActionsEnd(t *testing.T) {
	for _, c := range []struct {
		a      actions
		status string
		want   bool
	}{
		{actions{"poweroff", "shutdown"}, "shutdown", true},
		{actions{"poweroff", "shutdown"}, "guest-panicked", true},
		{actions{"poweroff", "exit-failure"}, "guest-panicked", true},
		{actions{"poweroff", "pause"}, "guest-panicked", false},
		{actions{"poweroff", "pause"}, "shutdown", true},
		{actions{"pause", "shutdown"}, "shutdown", false},
		{actions{"pause", "shutdown"}, "guest-panicked", false},
		{actions{"poweroff", "shutdown"}, "running", false},
		{actions{"poweroff", "shutdown"}, "paused", false},
		{actions{"poweroff", "shutdown"}, "io-error", false},
	} {
		if got := c.a.ends(c.status); got != c.want {
			t.Errorf("%+v in state %s: %v", c.a, c.status, got)
		}
	}
}

// Only the guest's own action counts as its end. QEMU's events may contain anything.
func TestEndingHear(t *testing.T) {
	for _, c := range []struct {
		name, data  string
		heard       bool
		guest, host string
	}{
		{name: "SHUTDOWN", data: `{"guest": true, "reason": "guest-shutdown"}`, heard: true,
			guest: "guest-shutdown"},
		{name: "SHUTDOWN", data: `{"guest": true}`, heard: true, guest: "no reason given"},
		{name: "SHUTDOWN", data: `{"guest": true, "reason": "a\u001b[31m\nb"}`, heard: true,
			guest: "a [31m b"},
		{name: "SHUTDOWN", data: `{"guest": false, "reason": "host-qmp-quit"}`,
			host: "host-qmp-quit"},
		{name: "SHUTDOWN", data: `{"guest": "yes"}`},
		{name: "SHUTDOWN", data: `[`},
		{name: "SHUTDOWN"},
		{name: "GUEST_PANICKED", data: `{"action": "pause"}`, heard: true},
		{name: "STOP"},
	} {
		var d ending
		if got := d.hear(qmp.Event{Name: c.name, Data: json.RawMessage(c.data)}); got != c.heard ||
			d.said() != c.guest || d.host != c.host {
			t.Errorf("%s %s: %v, guest %q, host %q", c.name, c.data, got, d.said(), d.host)
		}
	}
	// A guest that was reset since is alive: if its QEMU ends now, the guest did not end itself.
	var d ending
	d.hear(qmp.Event{Name: "SHUTDOWN",
		Data: json.RawMessage(`{"guest": true, "reason": "guest-shutdown"}`)})
	if d.hear(qmp.Event{Name: "RESUME"}); d.said() != "" {
		t.Errorf("a guest that runs again has ended itself: %q", d.said())
	}
}

// A source that hears of a shut-down in any message ends the eviction as shut down.
func TestCheckShutDown(t *testing.T) {
	f := controlFrame{kind: msgShutDown, payload: []byte(`{"reason": "guest\u0007"}`)}
	if err := f.check(msgComplete); err == nil || err.Error() != "the VM was shut down: guest" {
		t.Errorf("%v", err)
	}
}
