package evict

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"vacate/internal/qemu/qmp"
)

// This file handles a twin whose guest ends itself while its memory comes in: it powers itself off,
// resets itself, or panics, and its QEMU would then end by its own setting. The rules are under R10
// in docs/protocol.md.

// actions are what a QEMU's command line tells it to do when its guest ends itself. QEMU does not
// report that at its monitor.
type actions struct {
	shutdown string // "poweroff" (QEMU ends) or "pause"
	// "shutdown", "exit-failure" (QEMU 7.1; both as shutdown says), "pause" or "none"
	panic string
}

// actionsOf finds the actions of a command line: -no-shutdown, -action shutdown=…,panic=…. The
// last one counts.
func actionsOf(args []string) actions {
	a := actions{shutdown: "poweroff", panic: "shutdown"}
	for i, arg := range args {
		switch {
		case arg == "-no-shutdown" || arg == "--no-shutdown":
			a.shutdown = "pause"
		case (arg == "-action" || arg == "--action") && i+1 < len(args):
			for _, option := range strings.Split(args[i+1], ",") {
				switch name, value, _ := strings.Cut(option, "="); name {
				case "shutdown":
					a.shutdown = value
				case "panic":
					a.panic = value
				}
			}
		}
	}
	return a
}

// ends reports whether a QEMU in a run state would have ended by its own setting because its guest
// ended itself. The QEMU was told to pause instead.
func (a actions) ends(status string) bool {
	if a.shutdown == "pause" {
		return false
	}
	return status == "shutdown" ||
		status == "guest-panicked" && (a.panic == "shutdown" || a.panic == "exit-failure")
}

// commandLine returns the arguments of a process.
func commandLine(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, fmt.Errorf("read QEMU's command line: %w", err)
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"), nil
}

// ending is what a twin said about its end. It is safe for concurrent use.
type ending struct {
	mu sync.Mutex
	// why the guest ended itself, in QEMU's words; empty if it did not. Guarded by mu, as all below
	guest     string
	host      string          // why QEMU ends though its guest did not end itself
	listeners []chan struct{} // each closed when its listener has read all that a monitor says
}

// runs is called when the twin says that its guest runs.
func (e *destination) runs() {
	if !e.untold() {
		return
	}
	e.die(errStrayCont)
	if err := e.kill(); err != nil {
		e.Log.Error("the QEMU here runs the VM before the source committed: end it by hand",
			"pid", e.process.PID, "error", err)
	}
}

// errStrayCont is why the engine killed a QEMU that began to run the VM before the source
// committed.
var errStrayCont = errors.New("somebody made the destination's QEMU run the VM before it was " +
	"told to, and it was ended: leave its monitor alone")

// untold reports whether the QEMU must not run the VM yet: the source may still resume it there
// without asking.
func (e *destination) untold() bool {
	switch e.machine.current() {
	case Waiting, Arming, Loading, Prepared:
		return !e.said.heard.Load()
	}
	return false
}

// hear notes an event, and reports whether it says that the guest may have ended itself.
func (d *ending) hear(ev qmp.Event) bool {
	switch ev.Name {
	case "SHUTDOWN":
		var s struct {
			Guest  bool   `json:"guest"`
			Reason string `json:"reason"` // none before QEMU 4.0
		}
		if json.Unmarshal(ev.Data, &s) != nil {
			return false
		}
		if s.Reason = plain(s.Reason); s.Reason == "" {
			s.Reason = "no reason given"
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if !s.Guest {
			d.host = s.Reason
			return false
		}
		d.guest = s.Reason
		return true
	case "RESUME": // it was reset since, and is alive
		d.mu.Lock()
		d.guest = ""
		d.mu.Unlock()
	case "GUEST_PANICKED": // QEMU pauses then; its run state says whether that counts
		return true
	}
	return false
}

// said returns why the guest ended itself, as QEMU said; empty if it did not.
func (d *ending) said() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.guest
}

// wait waits for a moment until all is read that QEMU said before it ended.
func (d *ending) wait() {
	d.mu.Lock()
	listeners := d.listeners
	d.mu.Unlock()
	timer := time.NewTimer(lastWords)
	defer timer.Stop()
	for _, heard := range listeners {
		select {
		case <-heard:
		case <-timer.C:
			return
		}
	}
}

// letGo gives the QEMU its own settings back, when the eviction is over and the QEMU lives on. over
// says that its migration is over, too.
func (e *destination) letGo(over bool) {
	if e.life.Err() == nil {
		e.owner.letGo(e.life, over)
	}
}

// LetGo gives a QEMU its own settings back if its eviction completed and the engine died before it
// did that. The journal holds those settings. A QEMU that has ended since needs nothing.
func (d Destination) LetGo(ctx context.Context) error {
	e := d.engine(Completing)
	defer e.close()
	err := e.find()
	if errors.Is(err, errTwinGone) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	if err := e.owner.open(ctx); err != nil {
		return err
	}
	e.letGo(true)
	return nil
}

// twinGone ends an eviction whose QEMU here ended after the VM ran. What the QEMU said tells why.
func (e *destination) twinGone(left context.Context) error {
	if why, _ := e.owner.lastWords(); why != "" {
		return e.shutDown(left, why)
	}
	return e.lost(context.Cause(e.life), goneHere)
}

// shutDown ends an eviction whose guest ended itself here. The QEMU may still be there, paused, or
// have ended. It is not told to quit before the reason is durable: after that only the journal
// knows it.
func (e *destination) shutDown(left context.Context, why string) error {
	why = fmt.Sprintf("the guest ended itself on the destination (%s)", why)
	for {
		err := note(e.Journal, MarkShutDown, why)
		if err == nil {
			break
		}
		e.Log.Warn("cannot record in the journal that the VM was shut down here: trying again",
			"error", err)
		select {
		case <-time.After(mendPause):
		case <-left.Done():
			return &Error{ErrLeft, e.machine.current(), context.Cause(left),
				"The VM was shut down here. Another engine can go on with the eviction"}
		}
	}
	e.vm.shutDown.set(why)
	e.say(msgShutDown, farewell{Reason: why})
	if err := e.quit(); err != nil {
		e.Log.Warn("the QEMU here does not end: end it by hand", "pid", e.process.PID, "error", err)
	}
	e.awaitHeard(nil, func(r *Request) bool { return r.Answer(AnswerShutDown, why, false, nil) })
	return e.machine.enter(ShutDown)
}

// quit tells the QEMU here to quit, and kills it if it does not.
func (e *destination) quit() error {
	ctx, cancel := context.WithTimeout(context.Background(), quitTime)
	defer cancel()
	if e.life.Err() == nil {
		if err := e.owner.quit(ctx); err == nil && e.process.Wait(ctx) == nil {
			return nil
		}
	}
	return e.kill()
}

// plain makes a text of another process fit for a sentence: one line, and not too long.
func plain(s string) string {
	const most = 4096
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if unicode.IsGraphic(r) {
			return r
		}
		return ' '
	}, strings.ToValidUTF8(s, "?")))
}
