package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
)

// word is what an operator decided of a VM that an eviction left in two places, or may have.
type word struct {
	decision evict.Decision
	// For evict.Discard: the VM's name. The operator accepts that the VM is lost.
	lose string
	// For evict.ResumeHere: the other host. The operator asserts that the VM can run there no more.
	fenced string
	// In place of fenced: the daemon fences the other host first, by its command.
	fence bool
	by    string // who says so
}

// offerAfter is how long the other host must have been silent before the remedies are told that it
// cannot undo.
const offerAfter = time.Minute

// decidable reports whether an operator may decide. At the source, the VM stands frozen here and
// may have run on the other host, and that host does not answer or has lost it. At the destination,
// the VM runs here without all of its memory, and the source does not answer.
func (v *eviction) decidable() bool {
	r := v.entry.Record()
	if v.ended() {
		return false
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	m := evict.Mark(r.Mark)
	switch {
	case r.Role == journal.Destination:
		return m == evict.MarkMayRun && (v.state == evict.CutOff || v.cancel == nil)
	case m == evict.MarkLost:
		return v.cancel == nil
	case m == evict.MarkMayRun:
		return v.state == evict.InDoubt || v.state == evict.Reconnecting || v.cancel == nil
	}
	return false
}

// dead reports whether the VM is known to run no more on the other host, without an operator's
// word.
func (v *eviction) dead() bool { return evict.DeadThere(record{v.entry}) }

// last reports whether the copy of the VM here may be the last one that is whole, or the newest.
func (v *eviction) last() bool {
	r := record{v.entry}
	if r.Record().Role == journal.Destination {
		return true
	}
	return v.process().Alive() && (evict.Whole(r) == nil || !evict.DeadThere(r))
}

// silence is how long nothing has come from the other host.
func (v *eviction) silence() time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	since := v.alone
	if since.IsZero() {
		since = v.host.started
	}
	return time.Since(since)
}

// stands is QEMU's word for the state that the VM stood in when it was frozen; empty if it ran.
func (v *eviction) stands() string {
	v.mu.Lock()
	stands := v.progress.Stands
	v.mu.Unlock()
	return cmp.Or(stands, evict.StoodThere(record{v.entry}))
}

// does says what the VM does where it is, as far as vacate knows.
func (v *eviction) does() string {
	if v.stands() != "" {
		return "stands"
	}
	return "runs"
}

// prospects says what is waited for, or may have happened, and lists the commands that an operator
// may choose between.
func (v *eviction) prospects() (advice string, remedies []string) {
	r, here := v.entry.Record(), v.host.name()
	if r.Untold && !v.ended() {
		return fmt.Sprintf(
			"An operator decided that VM %s goes on on host %s. It stands frozen until its QEMU "+
				"can "+
				"run it: a QEMU of it on host %s may hold the locks of its disks. That host is "+
				"told "+
				"as soon as vacated there answers, and ends that QEMU", r.VM, here, r.Peer), nil
	}
	if r.Untold {
		return fmt.Sprintf(
			"VM %s is on host %s again by an operator's word. Host %s has not heard that yet: "+
				"it is told as soon as vacated "+
				"there answers. A copy of the VM that still runs there is ended then", r.VM, here,
			r.Peer), nil
	}
	if !v.decidable() {
		return "", nil
	}
	silent := v.silence()
	if _, ok := v.host.config.Peers[r.Peer]; !ok {
		defer func() {
			if advice != "" {
				advice += fmt.Sprintf(". Host %s is no peer of host %s any more: put "+
					"[peers.%[1]s] back into the configuration, and start vacated again", r.Peer,
					here)
			}
		}()
	}
	// without what it accepts: that is asked for
	discard := fmt.Sprintf("vacate decide %v discard", r.ID)
	if !v.last() {
		discard += " --confirm " + r.VM
	}
	if r.Role == journal.Destination {
		is := fmt.Sprintf("runs on host %s, until it needs memory", here)
		if v.stands() != "" {
			is = fmt.Sprintf("stands on host %s, and lacks memory", here)
		}
		advice = fmt.Sprintf(
			"VM %[1]s %[4]s that only host %[3]s has, which has not answered for %.0[5]f s. "+
				"When vacated on %[3]s is back, the eviction goes on by itself. But if an "+
				"operator resumed the VM on %[3]s meanwhile, two copies run: look there (vacate "+
				"status %[1]s). If it runs there, end the copy on %[2]s; %[3]s does so, too, as "+
				"soon as it reaches %[2]s", r.VM, here, r.Peer, is, silent.Seconds())
		if silent >= offerAfter {
			remedies = []string{discard}
		}
		return advice, remedies
	}
	resume := fmt.Sprintf("vacate decide %v resume-here --confirm %s", r.ID, r.VM)
	if v.dead() {
		remedies = []string{resume}
		advice =
			fmt.Sprintf("VM %s stands frozen on host %s, with all of its memory. It runs no "+
				"more on host %s", r.VM, here, r.Peer)
	} else {
		// Without what it asserts: that is asked for.
		remedies = []string{fmt.Sprintf("vacate decide %v resume-here", r.ID)}
		if len(v.host.config.Peers[r.Peer].Fence) > 0 {
			remedies = append(remedies, resume+" --fence")
		}
		if evict.Mark(r.Mark) == evict.MarkLost {
			advice =
				fmt.Sprintf("VM %s stands frozen on host %s, and may run on host %s: look there "+
					"before you decide", r.VM, here, r.Peer)
		} else {
			advice = fmt.Sprintf(
				"VM %s stands frozen on host %s, and may run on host %s, which has not answered "+
					"for %.0f s. "+
					"As soon as it does, the eviction goes on by itself: see that vacated runs "+
					"there and that the link is up. "+
					"Only should host %[3]s never come back is there something to decide", r.VM,
				here, r.Peer, silent.Seconds())
			if silent < offerAfter {
				return advice, nil
			}
		}
	}
	if evict.Whole(record{v.entry}) != nil {
		return fmt.Sprintf(
			"The copy of VM %s that stands frozen on host %s is not whole, as memory of it was "+
				"given back: it cannot run any more. "+
				"Look on host %s what became of the VM", r.VM, here, r.Peer), []string{discard}
	}
	return advice, append(append([]string{fmt.Sprintf("vacate export %v FILE", r.ID)}, remedies...),
		discard)
}

// advice is prospects without the commands.
func (v *eviction) advice() string {
	advice, _ := v.prospects()
	return advice
}

// undecidable says why it is not for an operator to decide.
func (v *eviction) undecidable() string {
	r, here := v.entry.Record(), v.host.name()
	m := evict.Mark(r.Mark)
	switch {
	case v.entry.Err() != nil:
		return v.entry.Err().Error()
	case v.ended():
		return fmt.Sprintf("the eviction of VM %s has ended: %s", r.VM, outcomeOf(r))
	case m == evict.MarkResumedHere:
		return fmt.Sprintf(
			"an operator decided already that VM %s goes on on host %s, and vacated "+
				"sees to that: vacate status %[1]s", r.VM, here)
	case m == evict.MarkAccepted:
		return fmt.Sprintf("VM %s was not told to run on host %s yet: `vacate abort %.8v` keeps "+
			"it on host %s", r.VM, here, r.ID, r.Peer)
	case r.Role == journal.Destination:
		return fmt.Sprintf("VM %s %s on host %s, and host %s, which has the rest of its memory, "+
			"answers: the eviction goes on by itself", r.VM, v.does(), here, r.Peer)
	case m == evict.MarkBegun:
		return fmt.Sprintf("VM %s was never told to run on host %s: it is being evicted, or "+
			"comes back by itself", r.VM, r.Peer)
	}
	return fmt.Sprintf("VM %s %s on host %s, which answers: the eviction goes on by itself", r.VM,
		v.does(), r.Peer)
}

// unabortable says why an eviction cannot be aborted any more, and where the VM is.
func (v *eviction) unabortable() string {
	r, here := v.entry.Record(), v.host.name()
	v.mu.Lock()
	state := v.state
	v.mu.Unlock()
	where :=
		fmt.Sprintf("VM %s may run on host %s, which does not answer at the moment: see vacate "+
			"status %[1]s", r.VM, r.Peer)
	switch {
	case v.ended(), v.entry.Err() != nil:
		return v.undecidable()
	case evict.Mark(r.Mark) == evict.MarkAccepted && state == "":
		return fmt.Sprintf("the eviction cannot be aborted on host %s yet: the VM's twin is just "+
			"starting here, and VM %s runs on host %s. Run `vacate abort %.8v` on host %[3]s", here,
			r.VM, r.Peer, r.ID)
	case state == evict.CutOff:
		where =
			fmt.Sprintf("VM %s %s on host %s with the memory that has come, and host %s does "+
				"not answer at the moment: see vacate status %[1]s", r.VM, v.does(), here, r.Peer)
	case r.Role == journal.Destination && (state == evict.Running || state == evict.Completing):
		where =
			fmt.Sprintf("VM %s %s on host %s, and its memory is coming from host %s. Nothing "+
				"need be done", r.VM, v.does(), here, r.Peer)
	case state == evict.Pushing || state == evict.Committing || state == evict.Retiring:
		where =
			fmt.Sprintf("VM %s %s on host %s, and its memory is on its way there. Nothing need "+
				"be done", r.VM, v.does(), r.Peer)
	case state == evict.RollingBack:
		where = fmt.Sprintf("VM %s is coming back to host %s already", r.VM, here)
	}
	return "the eviction cannot be aborted any more: " + where
}

// decide does what an operator decided.
func (v *eviction) decide(ctx context.Context, w word) error {
	v.operator.Lock()
	defer v.operator.Unlock()
	r := v.entry.Record()
	if !v.decidable() {
		return &stateError{errors.New(v.undecidable())}
	}
	if w.decision == evict.Discard {
		if err := v.discardable(w); err != nil {
			return err
		}
	}
	if r.Role == journal.Destination {
		return v.giveUpTwin(w)
	}
	if w.decision == evict.ResumeHere {
		if err := v.resumable(w); err != nil {
			return err
		}
	}
	s, err := v.source()
	if err != nil {
		return err
	}
	s.Show = nil // no engine is at work
	// The client may have left, and without an engine nothing would go on with the eviction.
	if err := v.stop(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	m := v.mark()
	if m != evict.MarkMayRun && m != evict.MarkLost {
		return &stateError{errors.New(v.undecidable())} // it came to an end by itself
	}
	if err := v.carryOut(ctx, s, m, w); err != nil {
		return err
	}
	m = evict.MarkResumedHere
	if w.decision == evict.Discard {
		m = evict.MarkDiscarded
	}
	v.finish(m, evict.State(outcomes[m]), errors.New(v.entry.Record().Reason), nil)
	return nil
}

// carryOut does what an operator decided at the source, whose engine has left at the mark m. If it
// cannot, the eviction goes on as before.
func (v *eviction) carryOut(ctx context.Context, s evict.Source, m evict.Mark, w word) error {
	peer := v.entry.Record().Peer
	// What was decided is done, whether or not the client still listens.
	decide := func(fenced string) error {
		if fenced != "" {
			if err := v.movedOn(ctx); err != nil {
				return err
			}
		}
		return s.Decide(context.WithoutCancel(ctx), m, w.decision, fenced)
	}
	fenced := ""
	if w.fenced != "" {
		fenced = fmt.Sprintf("%s asserted that host %s is fenced", w.by, peer)
	}
	// The destination is asked first: one that answers must not be fenced.
	err := decide(fenced)
	if w.fence && errors.Is(err, evict.ErrUnfenced) {
		if err := v.host.fence(peer); err != nil {
			return v.goOn(
				fmt.Errorf("%w. Nothing was decided: VM %s stands frozen on host %s as before", err,
					s.VM, v.host.name()))
		}
		err = decide(fmt.Sprintf("host %s was fenced, by its command", peer))
	}
	switch {
	case errors.Is(err, evict.ErrAnswers):
		return v.goOn(
			fmt.Errorf("host %s answers for VM %s: %w. Nothing was decided, and the eviction "+
				"goes on by itself", peer, s.VM, err))
	case errors.Is(err, evict.ErrUnfenced):
		return v.goOn(errors.New(v.unfenced()))
	case errors.Is(err, errMovedOn):
		return v.goOn(err)
	case errors.Is(err, evict.ErrUndecided):
		return err
	case err != nil:
		v.recoverSource()
		if v.mark() == evict.MarkResumedHere {
			return &stateError{fmt.Errorf("%w. The decision stands, and vacated tries again. %s",
				err, v.advice())}
		}
	}
	return err
}

// errMovedOn is wrapped by the error of a VM that is on a third host.
var errMovedOn = errors.New("nothing was decided")

// movedOn returns an error if a host that is neither this one nor the destination has the VM: that
// may have moved on from there before it was fenced. Hosts that do not answer are left out.
func (v *eviction) movedOn(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), clearTime)
	defer cancel()
	r := v.entry.Record()
	others := slices.Sorted(maps.Keys(v.host.config.Peers))
	others = slices.DeleteFunc(others, func(host string) bool { return host == r.Peer })
	answers, errs := v.host.vmThere(ctx, r.VM, others)
	for i, host := range others {
		if errs[i] == nil && !answers[i].Clear {
			return fmt.Errorf("VM %s may have moved on from host %s: on host %s %s: %w",
				r.VM, r.Peer, host, answers[i].Why, errMovedOn)
		}
	}
	return nil
}

// goOn has the engine go on after a word that cannot be heeded, for a reason.
func (v *eviction) goOn(why error) error {
	v.recoverSource()
	return &stateError{why}
}

// resumable says what is missing for a VM to be resumed here.
func (v *eviction) resumable(w word) error {
	r := v.entry.Record()
	if err := evict.Whole(record{v.entry}); err != nil {
		return &stateError{err}
	}
	switch {
	case w.fenced != "" && w.fence:
		return &argumentError{
			errors.New("fenced and fence exclude each other: either you assert that the other " +
				"host is fenced, or this daemon fences it")}
	case w.fenced != "" && w.fenced != r.Peer:
		return &argumentError{fmt.Errorf("fenced is %q, and the other host of this eviction is %q",
			w.fenced, r.Peer)}
	case w.fenced == "" && !w.fence && !v.dead() && v.mark() != evict.MarkLost:
		// Of one that is lost, the other host may have said that its QEMU has ended while the
		// journal was full. The engine asks it once more.
		return &stateError{errors.New(v.unfenced())}
	}
	return nil
}

// discardable says what is missing for the copy here to be given up.
func (v *eviction) discardable(w word) error {
	r, here := v.entry.Record(), v.host.name()
	switch {
	case w.lose == r.VM || w.lose == "" && !v.last():
		return nil
	case w.lose != "":
		return &argumentError{fmt.Errorf("lose is %q, and the VM of this eviction is %q", w.lose,
			r.VM)}
	case r.Role == journal.Destination:
		return &stateError{fmt.Errorf(
			"VM %[1]s runs on host %[2]s, and that is its newest copy: what it did since it "+
				"came would be lost, "+
				"and all of it where host %[3]s has no copy any more. Look on host %[3]s first "+
				"(vacate status %[1]s). "+
				"If host %[3]s comes back, the eviction goes on by itself. --lose %[1]s says "+
				"that you accept the loss", r.VM, here, r.Peer)}
	}
	where := fmt.Sprintf("host %s has not said that it has all of the VM's memory", r.Peer)
	if v.dead() {
		where = fmt.Sprintf("the VM runs no more on host %s", r.Peer)
	}
	text := fmt.Sprintf(
		"the copy of VM %s that stands frozen on host %s may be the last one: %s. Without it "+
			"the VM is lost, with its memory "+
			"and what it had not written to its disks, unless it runs on host %s and has all of "+
			"its memory there", r.VM, here, where, r.Peer)
	if evict.Whole(record{v.entry}) == nil {
		text += fmt.Sprintf(". `vacate export %v FILE` keeps a copy", r.ID)
	}
	return &stateError{fmt.Errorf("%s. --lose %s says that you accept the loss", text, r.VM)}
}

// unfenced says that an assertion is missing.
func (v *eviction) unfenced() string {
	r := v.entry.Record()
	text := fmt.Sprintf(
		"VM %s may run on host %s, which has not said that it does not: if it does, two copies "+
			"of it would spoil their disks. "+
			"If host %[2]s comes back, the eviction goes on by itself. If it never does: "+
			"--fenced %[2]s asserts that host %[2]s is powered off, or cut off "+
			"from the VM's disks and network, or that the QEMU of VM %[1]s there has ended; and "+
			"that "+
			"VM %[1]s was not moved on from there", r.VM, r.Peer)
	if len(v.host.config.Peers[r.Peer].Fence) > 0 {
		text += fmt.Sprintf("; --fence has vacated fence host %s", r.Peer)
	}
	return text
}

// endTime is how long an engine may take to find that its twin was ended.
const endTime = 10 * time.Second

// giveUpTwin ends the copy of a VM here. An operator knows that another copy is the VM.
func (v *eviction) giveUpTwin(w word) error {
	r := v.entry.Record()
	if w.decision != evict.Discard {
		return &stateError{fmt.Errorf(
			"VM %s runs on host %s already: there is discard alone, which ends this copy. "+
				"A copy that stands frozen is on host %s", r.VM, v.host.name(), r.Peer)}
	}
	return v.endTwin(fmt.Errorf("%s gave up the copy of VM %s on host %s: its QEMU was ended", w.by,
		r.VM, v.host.name()))
}

// endTwin ends the twin, and then the eviction, for a reason. It is called by one that holds
// v.operator.
func (v *eviction) endTwin(why error) error {
	v.change(func() { v.ousted = why })
	if err := v.killTwin(); err != nil {
		return err
	}
	// An engine notices, and comes to an end by itself; one that cannot take the eviction up leaves
	// it.
	_, idle := v.engine()
	select {
	case <-idle:
	case <-time.After(endTime):
		ctx, cancel := context.WithTimeout(context.Background(), endTime)
		defer cancel()
		if err := v.stop(ctx); err != nil {
			return err
		}
	}
	m := evict.ResumedThere(v.mark())
	switch {
	case !v.ended():
		v.finish(m, evict.State(outcomes[m]), why, nil)
	case m != v.mark():
		if err := v.entry.Note(string(m), why.Error(), nil); err != nil {
			return err
		}
		v.change(func() { v.outcome, v.reason = outcomes[m], why.Error() })
	}
	return nil
}

// oustedBy is the reason for which the twin was ended, or else err.
func (v *eviction) oustedBy(err error) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ousted != nil && err != nil {
		return v.ousted
	}
	return err
}

// overrule ends the twin here, as its source says that an operator had the VM resumed there, and
// answers.
func (v *eviction) overrule(r *evict.Request) {
	v.operator.Lock()
	defer v.operator.Unlock()
	if err := v.entry.Err(); err != nil {
		r.Refuse(fmt.Errorf("the journal of host %s is damaged: %w", v.host.name(), err))
		return
	}
	rec := v.entry.Record()
	log := v.host.log.With("eviction", rec.ID, "vm", rec.VM, "peer", rec.Peer)
	switch m := evict.Mark(rec.Mark); {
	case m == evict.MarkAccepted:
		r.Refuse(fmt.Errorf("host %s: VM %s was not told to run, and its QEMU is about to be ended",
			v.host.name(), rec.VM))
		return
	case m == evict.MarkCompleted && v.acknowledged():
		log.Error("the source says that the VM was resumed there, and it had heard that it is " +
			"whole here: nothing is done")
		r.Answer(evict.AnswerComplete,
			fmt.Sprintf("host %s has VM %s whole, as host %s had heard", v.host.name(), rec.VM,
				rec.Peer), false, nil)
		return
	}
	log.Warn("an operator resumed the VM at the source: the copy here is ended", "mark",
		rec.Mark)
	err := v.endTwin(
		fmt.Errorf("an operator resumed VM %s on host %s: the copy on host %s was ended",
			rec.VM, rec.Peer, v.host.name()))
	if err != nil {
		log.Error("the copy of the VM here does not end: end its QEMU by hand", "pid", rec.PID,
			"error", err)
		r.Refuse(fmt.Errorf("host %s: the QEMU of VM %s does not end: %w", v.host.name(), rec.VM,
			err))
		return
	}
	r.Answer(evict.AnswerOf(v.mark()), v.describe(), true, nil)
}

// acknowledged reports whether the source knows that the VM is whole here.
func (v *eviction) acknowledged() bool {
	_, err := v.entry.Blob(evict.KeptHeard)
	return err == nil
}

// How long the source waits before it tells the other host again that the VM was resumed here.
const (
	firstTell = 500 * time.Millisecond
	lastTell  = 10 * time.Second
)

// tell has the other host hear that the VM runs here by an operator's word, for as long as that
// takes.
func (v *eviction) tell() {
	if !v.entry.Record().Untold {
		return
	}
	v.host.tasks.Go(func() {
		r := v.entry.Record()
		log := v.host.log.With("eviction", r.ID, "vm", r.VM, "peer", r.Peer)
		last := ""
		for pause := firstTell; ; pause = min(2*pause, lastTell) {
			heard, err := v.tellOnce()
			if heard && err == nil {
				log.Info("the other host has heard that the VM runs here again")
			} else if text := fmt.Sprint(err); text != last {
				last = text
				log.Warn("the VM runs here again by an operator's word, and what the other host "+
					"has of it is not known", "heard", heard, "error", err)
			}
			if heard && v.toldAll(err) == nil {
				return
			}
			select {
			case <-time.After(pause):
			case <-v.host.life.Done():
				return // the next daemon goes on
			}
		}
	})
}

func (v *eviction) tellOnce() (heard bool, err error) {
	s, err := v.source()
	if err != nil {
		return false, err
	}
	return s.Tell(v.host.life)
}

// toldAll notes that the other host has heard of the operator's word; but is what is wrong all the
// same.
func (v *eviction) toldAll(but error) error {
	r := v.entry.Record()
	reason := r.Reason
	if but != nil {
		reason += fmt.Sprintf("; host %s: %v", r.Peer, but)
	}
	err := v.entry.Note(r.Mark, reason, func(r *journal.Record) { r.Untold = false })
	if err == nil {
		v.change(func() { v.reason = reason })
	}
	return err
}
