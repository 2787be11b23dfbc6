package host

import (
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A fencing command is believed only when it ends well, in time; and it can neither stay nor say
// too much.
func TestFence(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, "left")
	for _, test := range []struct {
		name   string
		script string // empty: there is none
		limit  time.Duration
		says   []string // empty: the peer is fenced
	}{
		{"succeeds", "test \"$1\" = hostb-bmc", time.Minute, nil},
		{"leaves something behind", "sleep 60 & echo $! > " + left, time.Minute, nil},
		{"fails", "echo no power >&2; exit 7", time.Minute,
			[]string{"host hostb could not be fenced", "exit status 7", `it said "no power"`}},
		{"is killed", "kill -9 $$", time.Minute, []string{"signal: killed"}},
		{"stays", "sleep 60 & echo $! > " + left + "; wait", 300 * time.Millisecond,
			[]string{"it did not end within 300ms, and was killed"}},
		{"says too much", "yes | head -c 1000000; exit 1", time.Minute, []string{"exit status 1"}},
		{"is not there", "", time.Minute, []string{"no such file"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			os.Remove(left)
			file := filepath.Join(dir, strings.ReplaceAll(test.name, " ", "-"))
			if test.script != "" {
				if err := os.WriteFile(file, []byte("#!/bin/sh\n"+test.script+"\n"),
					0o755); err != nil {
					t.Fatal(err)
				}
			}
			h := &Host{log: slog.New(slog.DiscardHandler),
				config: Config{Peers: map[string]Peer{"hostb": {Fence: []string{file, "{host}-bmc"},
					FenceTime: test.limit}}}}
			err := h.fence("hostb")
			if (err == nil) != (test.says == nil) {
				t.Fatalf("fenced: %v", err)
			}
			for _, text := range test.says {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("nothing says %q: %v", text, err)
				}
			}
			if err != nil && len(err.Error()) > 8*maxFenceOutput {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			pid, _ := os.ReadFile(left)
			if len(pid) == 0 {
				return
			}
			proc := "/proc/" + strings.TrimSpace(string(pid))
			if test.says == nil { // its own to end, and this test's
				if n, err := strconv.Atoi(strings.TrimSpace(string(pid))); err == nil {
					syscall.Kill(n, syscall.SIGKILL)
				}
				return
			}
			for limit := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				b, err := os.ReadFile(proc + "/stat")
				if err != nil || strings.Contains(string(b), ") Z ") {
					break
				}
				if time.Now().After(limit) {
					t.Fatalf("what it started lives on: %s", b)
				}
			}
		})
	}
}

// A fencing command that cannot be run is found when the configuration is read.
func TestFenceConfig(t *testing.T) {
	for name, test := range map[string]struct {
		p    Peer
		says string
	}{
		"none":      {Peer{}, ""},
		"a program": {Peer{Fence: []string{"/bin/off", "{host}"}, FenceTime: time.Minute}, ""},
		"a shell's": {Peer{Fence: []string{"ipmitool power off"}}, "no absolute path"},
		"zero byte": {Peer{Fence: []string{"/bin/off", "a\x00b"}}, "zero byte"},
		"too long":  {Peer{Fence: []string{"/bin/off", strings.Repeat("x", 5000)}}, "4096"},
		"many words": {Peer{Fence: append([]string{"/bin/off"}, make([]string, 64)...)},
			"65 words"},
		"no time":  {Peer{Fence: []string{"/bin/off"}, FenceTime: -time.Second}, "fence_time"},
		"too late": {Peer{Fence: []string{"/bin/off"}, FenceTime: 2 * time.Hour}, "fence_time"},
	} {
		err := test.p.checkFence()
		if (err == nil) != (test.says == "") ||
			err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v, not %q", name, err, test.says)
		}
	}
}
