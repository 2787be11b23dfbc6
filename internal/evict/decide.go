package evict

// What each side of an eviction does when something failed, decided by nothing but what its
// journal says and what it finds: so the functions below are pure, and model_test.go tries
// them with every sequence of failures. The rules they embody are in docs/protocol.md.

// Mark is the last thing that the journal of one side says of an eviction; "" if it has no
// record of it. Its text is what is stored on disk.
//
//	source       begun ──► may-run ──► completed
//	               │          ├──────► shut down
//	               │          ├──────► lost ──► resumed here, discarded   (the operator's word)
//	               │          ├──────► resumed here, discarded            (the same)
//	               └──────────┴──────► rolled back
//
//	destination  accepted ──► may-run ──► completed
//	                 │           ├──────► shut down
//	                 │           ├──────► lost
//	                 └───────────┴──────► never ran
//
// A write that failed may still have reached the disk, so what follows a failure must be right
// either way. Without begun, accepted and may-run nothing goes on: the source refuses or rolls
// back, the destination abandons. The operator's word is not acted upon, and the journal is
// read again. Where a destination cannot write shut down, it keeps its twin and tries again. All
// other marks only save asking again; where one cannot be written, what it says is done all the
// same.
type Mark string

// The marks.
const (
	MarkBegun      Mark = "begun"       // source: the guest may be frozen, and no commit was sent
	MarkAccepted   Mark = "accepted"    // destination: a twin may live, and it never ran
	MarkMayRun     Mark = "may-run"     // the twin may run, or may have run, from here on
	MarkRolledBack Mark = "rolled back" // source: the twin never runs; the guest is to run here
	// destination: the twin never ran and never will; it is to be killed
	MarkNeverRan Mark = "never ran"
	// the twin has every page; the source's QEMU is to be ended
	MarkCompleted Mark = "completed"
	// the guest ended itself at the destination; both QEMUs are to be ended
	MarkShutDown Mark = "shut down"
	// one QEMU ended too early, and the other cannot go on alone
	MarkLost Mark = "lost"
	// source: the operator says that the guest is to run here, and that the twin is dead for good
	MarkResumedHere Mark = "resumed here"
	MarkDiscarded   Mark = "discarded" // source: the operator gives up the copy here
)

// Final tells whether the two sides have nothing left to settle. What follows a final mark
// is the operator's word, or the end of what was begun after the mark was written.
func (m Mark) Final() bool {
	switch m {
	case "", MarkBegun, MarkAccepted, MarkMayRun:
		return false
	}
	return true
}

// Answer is what a destination says of an eviction when its source asks. It is sent as it is.
type Answer string

// The answers.
const (
	AnswerNone Answer = "" // none yet: something is to be done first
	// no record: it was never accepted here, or the journal is gone
	AnswerUnknown  Answer = "unknown"
	AnswerNeverRan Answer = "never ran" // and never will
	// the twin is loaded and waits to hear that the source committed
	AnswerPaused   Answer = "paused"
	AnswerRunning  Answer = "running"   // pages are missing
	AnswerComplete Answer = "complete"  // the twin has every page
	AnswerShutDown Answer = "shut down" // the guest ran and ended itself
	AnswerLost     Answer = "lost"      // the twin is dead, and it may have run
)

// copyState is what the QEMU of one side, as the journal identifies it, is found doing.
type copyState int

const (
	copyGone     copyState = iota
	copyIncoming           // a twin that has not loaded the devices
	// at the source: frozen, or stopped with its process. A twin: loaded, its migration not over,
	// and not running
	copyPaused
	copyRunning  // at the source: the guest runs. A twin: the guest runs, or waits for pages
	copyEnded    // a twin whose guest ended itself: its QEMU stands still, or said so and has ended
	copyComplete // a twin whose migration is over, whether its guest runs or was paused since
)

// step is what is to be done.
type step string

const (
	stepNone step = "none"
	// Of a source.
	// mark rolled back (resumed here stays), have the guest run here, and tell the destination
	stepRollBack step = "roll back"
	// look again and ask (again), with back-off; say what the operator may choose
	stepAsk  step = "ask"
	stepPush step = "push" // send what is missing
	// mark completed, then end the QEMU; where the operator discards, so is its mark
	stepRetire step = "retire"
	// Of a destination.
	stepAbandon step = "abandon" // mark never ran, kill the twin, only then say so
	// keep the twin paused until the source says that it committed
	stepAwait    step = "await commit"
	stepTakeUp   step = "take up"  // learn which pages are placed, and take the others
	stepComplete step = "complete" // mark completed, then say so
	// Of both.
	stepEnd step = "end" // mark shut down, end the QEMU; a destination then says so
	// mark lost and say so; a source keeps its QEMU, a destination kills what is left of the twin
	stepLose step = "lose"
	stepHold step = "hold" // two facts contradict one another: touch nothing, say so
)

// Clear reports whether a host has nothing of a VM (R12): its journal has no eviction of it that
// goes on, and no QEMU of it lives there. A VM is started anew only on a host that is clear of it,
// and that has heard the same of each other host since it began to start the VM. A host that begins
// to is not clear for the others. The mark is for the moments in which an eviction is about to
// start a QEMU.
func Clear(m Mark, lives, starting bool) bool {
	return (m == "" || m.Final()) && !lives && !starting
}

// Presence is what a host says of a VM that is to be started anew on another.
type Presence struct {
	Clear bool   `json:"clear"`
	Last  string `json:"last,omitempty"` // the last eviction of it that is in the host's journal
}

// Absent reports whether a host that was asked twice had nothing of a VM all the time between. Each
// host is asked again once all have answered. So they were clear of the VM at one moment, however
// it moved while they were asked.
func Absent(first, second Presence) bool {
	return first.Clear && second.Clear && first.Last == second.Last
}

// mayCommit tells whether a source may send the commit: its mark is durable, the process of its
// QEMU is stopped, so that nothing that QEMU is told can run the guest, and the guest did not run
// between the freeze and that.
func mayCommit(m Mark, held bool) bool { return m == MarkMayRun && held }

// mayCont tells whether a destination may have its twin run: its mark is durable, and in the
// present session the source said that it committed.
func mayCont(m Mark, committed bool) bool { return m == MarkMayRun && committed }

// sourceStep is what a source does when it starts again, and each time before it asks. A
// source that knows that it sent no commit, since it has not been restarted, counts as begun.
// It asks with a resume that says that it committed: true wherever the destination's mark is
// may-run, and elsewhere not believed.
func sourceStep(m Mark, here copyState) step {
	switch m {
	case MarkBegun:
		if here == copyGone {
			return stepLose
		}
		return stepRollBack // no commit was sent
	case MarkMayRun:
		if here == copyRunning {
			// Its process is not stopped, so no commit was sent; or a roll-back got that far.
			return stepRollBack
		}
		return stepAsk
	case MarkRolledBack, MarkResumedHere:
		if here == copyPaused {
			return stepRollBack
		}
	case MarkCompleted, MarkShutDown, MarkDiscarded:
		switch here {
		case copyPaused:
			return stepRetire
		case copyRunning:
			return stepHold
		}
	}
	return stepNone
}

// sourceOnAnswer is what a source whose mark is may-run does with an answer. heardRunning is
// whether it heard before that the twin runs.
func sourceOnAnswer(here copyState, heardRunning bool, a Answer) step {
	switch {
	case a == AnswerNone || a == AnswerUnknown:
		return stepAsk
	case here == copyRunning && a != AnswerNeverRan, heardRunning && a == AnswerNeverRan:
		return stepHold
	}
	switch a {
	case AnswerNeverRan:
		if here == copyGone {
			return stepLose
		}
		return stepRollBack
	case AnswerRunning:
		if here == copyGone {
			return stepHold // the twin lacks pages that nobody has
		}
		return stepPush
	case AnswerComplete:
		return stepRetire
	case AnswerShutDown:
		return stepEnd
	case AnswerLost:
		return stepLose
	}
	return stepAsk
}

// destinationStep is what a destination does with an eviction when it starts again, loses
// its session, is asked in a new one, or has anything else fail.
func destinationStep(m Mark, twin copyState) step {
	switch m {
	case MarkAccepted:
		return stepAbandon // the source may roll back without asking
	case MarkMayRun:
		switch twin {
		case copyPaused:
			return stepAwait
		case copyRunning:
			return stepTakeUp
		case copyEnded:
			return stepEnd
		case copyComplete:
			return stepComplete
		}
		return stepLose
	case MarkShutDown:
		if twin != copyGone {
			return stepEnd
		}
	case MarkNeverRan:
		if twin != copyGone {
			return stepAbandon
		}
	case MarkLost:
		if twin != copyGone {
			return stepLose
		}
	}
	return stepNone
}

// destinationOnAbort is what a destination does when it hears that its source has rolled
// back, or that the operator had it resume the guest there. A source that says so after the
// twin became whole never heard that, and was given a false word: the twin ends, since the
// operator's word counts.
func destinationOnAbort(m Mark) step {
	switch m {
	case MarkAccepted, MarkNeverRan:
		return stepAbandon
	case MarkMayRun, MarkLost, MarkCompleted:
		return stepLose
	}
	return stepNone
}

// ResumedThere is the mark that a destination comes to, once its twin is dead, when it hears that
// an operator had the guest resumed at the source.
func ResumedThere(m Mark) Mark {
	switch destinationOnAbort(m) {
	case stepAbandon:
		return MarkNeverRan
	case stepLose:
		return MarkLost
	}
	return m
}

// AnswerOf is what a destination says of an eviction that nobody works on there.
func AnswerOf(m Mark) Answer {
	if !m.Final() {
		return AnswerUnknown
	}
	return answerOf(m, copyGone)
}

// answerOf is what a destination says once destinationStep was done.
func answerOf(m Mark, twin copyState) Answer {
	switch m {
	case "":
		return AnswerUnknown
	case MarkCompleted:
		return AnswerComplete
	case MarkMayRun:
		switch twin {
		case copyPaused:
			return AnswerPaused
		case copyRunning:
			return AnswerRunning
		}
		return AnswerNone
	}
	switch {
	case twin != copyGone:
		return AnswerNone
	case m == MarkShutDown:
		return AnswerShutDown
	case m == MarkLost:
		return AnswerLost
	}
	return AnswerNeverRan
}
