package host

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/host/hypervisor"
	"vacate/internal/qemu/qmp"
)

// vmQuestion is whether a host is clear of a VM (R12 in docs/protocol.md).
type vmQuestion struct {
	Name string `json:"name"`
}

// vmAnswer is what a host has of a VM.
type vmAnswer struct {
	evict.Presence
	Why string `json:"why,omitempty"` // it is not clear of it, in words
	// the host that has it by the last eviction of it here; empty: this one, if any
	Left string `json:"left,omitempty"`
}

// vmHere answers whether this host is clear of a VM. begun: this host has taken the VM for that
// itself.
func (h *Host) vmHere(ctx context.Context, name string, begun bool) vmAnswer {
	a := h.left(name) // ahead of all else: a later eviction is one that the next answer tells of
	mark, lives := evict.Mark(""), false
	if v := h.openFor(name); v != nil {
		mark, a.Why = evict.MarkMayRun,
			fmt.Sprintf("an eviction of it is under way: see vacate status %.8s there",
				v.entry.ID())
	}
	h.mu.Lock()
	starting := h.taken[name] && !begun
	h.mu.Unlock()
	if starting {
		a.Why = "that host starts, stops or evicts it"
	}
	vm, err := hypervisor.Find(h.config.VMs, name)
	switch {
	case errors.Is(err, hypervisor.ErrUnknown) && h.config.Libvirt != nil:
		// Of a VM without a description libvirt knows.
		switch seen, err := findDomain(ctx, h.config.Libvirt.uri(), name); {
		case errors.Is(err, hypervisor.ErrUnknown):
		case err != nil:
			lives, a.Why = true, err.Error()
		case seen.State != hypervisor.None:
			lives, a.Why = true, fmt.Sprintf("libvirt has it there, %s", seen.Status)
		}
	case errors.Is(err, hypervisor.ErrUnknown): // no description, no socket to look at
	case err != nil:
		lives, a.Why = true, "its description cannot be read: "+err.Error()
	case mark == "" && !starting:
		seen, err := hypervisor.Search(ctx, vm)
		switch lives = err != nil || seen.State != hypervisor.None; {
		case err != nil:
			a.Why = err.Error()
		case lives:
			a.Why = fmt.Sprintf("it is there, %s", seen.State)
		}
	}
	a.Clear = evict.Clear(mark, lives, starting)
	return a
}

// left says which the last eviction of a VM is in this host's journal, and what host has the VM by
// it.
func (h *Host) left(vm string) (a vmAnswer) {
	for _, v := range slices.Backward(h.list()) {
		r := v.entry.Record()
		if r.VM != vm {
			continue
		}
		a.Last = r.ID.String()
		switch m := evict.Mark(r.Mark); {
		case r.Role == journal.Source &&
			(m == evict.MarkCompleted || m == evict.MarkDiscarded || m == evict.MarkLost),
			r.Role == journal.Destination && (m == evict.MarkNeverRan || m == evict.MarkLost):
			a.Left = r.Peer
		}
		break
	}
	return a
}

// startVM starts a VM anew. Of hosts that are fenced an operator asserts that the VM does not run
// there.
func (h *Host) startVM(ctx context.Context, name string, fenced []string) error {
	if err := hypervisor.CheckName(name); err != nil {
		return &argumentError{err}
	}
	vm, err := h.described(ctx, name, "start")
	if err != nil {
		return err
	}
	for _, host := range fenced {
		if host == h.name() {
			return &argumentError{fmt.Errorf("fenced: %s is this host", host)}
		}
	}
	// Before the others are asked: two hosts that start it at once then hear of one another.
	release, err := h.takeSoon(ctx, name)
	if err != nil {
		return err
	}
	defer release()
	if err := h.clearOf(ctx, name, fenced); err != nil {
		return &stateError{err}
	}
	// The client may leave: what ends now is a VM that runs.
	p, err := hypervisor.Start(context.WithoutCancel(ctx), vm)
	if err != nil {
		return &stateError{err}
	}
	h.log.Info("VM started", "vm", name, "pid", p.PID)
	return nil
}

// clearTime is how long another host may take to say whether it has a VM.
const clearTime = 10 * time.Second

// clearOf says why a VM must not be started here.
func (h *Host) clearOf(ctx context.Context, name string, fenced []string) error {
	here := h.vmHere(ctx, name, true)
	if !here.Clear {
		return fmt.Errorf("VM %s was not started: on host %s %s", name, h.name(), here.Why)
	}
	others := slices.Sorted(maps.Keys(h.config.Peers))
	ctx, cancel := context.WithTimeout(ctx, clearTime)
	defer cancel()
	answers, errs := h.vmThere(ctx, name, others)
	var asked, why []string
	left := map[string]string{h.name(): here.Left}
	silent := false
	for i, host := range others {
		switch a := answers[i]; {
		case errs[i] == nil && a.Clear:
			asked = append(asked, host)
			left[host] = a.Left
		case errs[i] == nil: // which counts more than what anybody asserts
			why = append(why, fmt.Sprintf("on host %s %s", host, a.Why))
		case !slices.Contains(fenced, host):
			silent = true
			why = append(why, fmt.Sprintf("host %s does not say whether it has it (%v)", host,
				errs[i]))
		}
	}
	for _, from := range slices.Sorted(maps.Keys(left)) {
		to := left[from]
		if to != "" && to != h.name() && !slices.Contains(others, to) &&
			!slices.Contains(fenced, to) {
			silent = true
			why = append(why, fmt.Sprintf("it left host %s for host %s, which host %s cannot ask",
				from, to, h.name()))
		}
	}
	if why == nil {
		why = h.stillAbsent(ctx, name, asked, others, answers)
	}
	if why == nil {
		return nil
	}
	err := fmt.Errorf("VM %s was not started, as it may run elsewhere: %s", name,
		strings.Join(why, "; "))
	if silent {
		err = fmt.Errorf("%w. If you know that a host is off, or has no QEMU of it: vacate start "+
			"%s --fenced HOST", err, name)
	}
	return err
}

// stillAbsent asks hosts once more, and says why one of them may have had the VM since it answered
// first.
func (h *Host) stillAbsent(
	ctx context.Context,
	name string,
	asked, others []string,
	first []vmAnswer,
) (why []string) {
	second, errs := h.vmThere(ctx, name, asked)
	for i, host := range asked {
		switch before := first[slices.Index(others, host)]; {
		case errs[i] != nil:
			why = append(why, fmt.Sprintf("host %s said that it does not have it, and does not "+
				"answer any more (%v): try again", host, errs[i]))
		case !evict.Absent(before.Presence, second[i].Presence):
			why = append(why, fmt.Sprintf("it was moved from or to host %s just now: try again",
				host))
		}
	}
	return why
}

// vmThere asks hosts whether they are clear of a VM.
func (h *Host) vmThere(ctx context.Context, name string, hosts []string) ([]vmAnswer, []error) {
	answers, errs := make([]vmAnswer, len(hosts)), make([]error, len(hosts))
	var asks sync.WaitGroup
	for i, host := range hosts {
		asks.Go(func() {
			d, err := h.dialer(host)
			if err == nil {
				_, err = putTo(ctx, d, 0, question{VM: &vmQuestion{name}}, &answers[i])
			}
			errs[i] = err
		})
	}
	asks.Wait()
	return answers, errs
}

// Times for a guest to power itself off.
const (
	usualStop = 2 * time.Minute
	mostStop  = time.Hour
	quitTime  = 10 * time.Second // for QEMU to write what it holds of the disks
	stopLooks = 500 * time.Millisecond
)

// stopVM has the guest of a VM power itself off. With force its QEMU is ended where that takes
// longer than limit.
func (h *Host) stopVM(ctx context.Context, name string, limit time.Duration, force bool) error {
	if err := hypervisor.CheckName(name); err != nil {
		return &argumentError{err}
	}
	vm, err := h.described(ctx, name, "shutdown")
	if err != nil {
		return err
	}
	release, err := h.takeSoon(ctx, name)
	if err != nil {
		return err
	}
	defer release()
	seen, err := hypervisor.Look(ctx, vm)
	if err != nil {
		return err
	}
	switch {
	case seen.State == hypervisor.None:
		return &stateError{fmt.Errorf("VM %s has no QEMU on host %s", name, h.name())}
	case seen.Process.PID == 0:
		return &stateError{fmt.Errorf("VM %s on host %s is %s: it was not touched", name, h.name(),
			seen.State)}
	case seen.State != hypervisor.Running && !force:
		return &stateError{
			fmt.Errorf("VM %s on host %s is %s, and cannot heed its power button: it was not "+
				"touched. To end its QEMU: vacate stop %[1]s --timeout 0 --force", name, h.name(),
				seen.State)}
	}
	if seen.State == hypervisor.Running && limit > 0 {
		ended, off, err := powerOff(ctx, vm, seen, limit)
		if ended || err != nil {
			return err
		}
		force = force || off
	}
	if !force {
		return &stateError{fmt.Errorf(
			"VM %s was told to power itself off, and has not done so within %v: it runs on, and "+
				"may do so later. "+
				"To end its QEMU, as by a loss of power: vacate stop %[1]s --timeout 0 --force",
			name, limit)}
	}
	quit, cancel := context.WithTimeout(ctx, quitTime)
	defer cancel()
	if tell(quit, vm, "quit") == nil && seen.Process.Wait(quit) == nil {
		return nil
	}
	return seen.Process.Kill(context.WithoutCancel(ctx))
}

// powerOff presses a VM's power button, and waits up to the limit for what comes of it: its QEMU
// ended, or the guest is off and its QEMU stays, as with -no-shutdown.
func powerOff(ctx context.Context, vm hypervisor.VM, seen hypervisor.Seen,
	limit time.Duration) (ended, off bool, err error) {
	if err := tell(ctx, vm, "system_powerdown"); err != nil {
		return false, false, fmt.Errorf("tell VM %s to power itself off: %w", vm.Name, err)
	}
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); {
		look, cancel := context.WithTimeout(ctx, stopLooks)
		err := seen.Process.Wait(look)
		cancel()
		if err == nil {
			return true, false, nil
		}
		if ctx.Err() != nil {
			return false, false, ctx.Err()
		}
		if now, err := hypervisor.Look(ctx, vm); err == nil && now.Process == seen.Process &&
			now.Status == "shutdown" {
			return false, true, nil
		}
	}
	return false, false, nil
}

// tell gives a VM's QEMU one command.
func tell(ctx context.Context, vm hypervisor.VM, command string) error {
	q, err := qmp.Dial(ctx, vm.QMP)
	if err != nil {
		return err
	}
	defer q.Close()
	if command == "quit" {
		return q.Quit(ctx)
	}
	return q.Run(ctx, command, nil, nil)
}
