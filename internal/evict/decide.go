package evict

// The functions below decide what each side of an eviction does when something failed. They use
// only what the side's journal says and what it finds. So they are pure, and model_test.go tries
// them with every sequence of failures. Their rules are in docs/protocol.md.

// Mark is the last thing that one side's journal says of an eviction; "" if it has no record. Its
// text is stored on disk.
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
// either way. Without begun, accepted and may-run the eviction stops: the source refuses or rolls
// back, and the destination abandons. If the operator's decision cannot be written, the engine does
// not act on it and reads the journal again. If a destination cannot write shut down, it keeps its
// twin and tries again. All other marks only save asking again. If one cannot be written, the
// engine acts all the same.
type Mark string

// The marks.
const (
	MarkBegun      Mark = "begun"       // source: the guest may be frozen, and no commit was sent
	MarkAccepted   Mark = "accepted"    // destination: a twin may live, and it never ran
	MarkMayRun     Mark = "may-run"     // the twin may run, or may have run, from here on
	MarkRolledBack Mark = "rolled back" // source: the twin never runs; the guest must run here
	// destination: the twin never ran and never will; it must be killed
	MarkNeverRan Mark = "never ran"
	// the twin has every page; the source's QEMU must end
	MarkCompleted Mark = "completed"
	// the guest ended itself at the destination; both QEMUs must end
	MarkShutDown Mark = "shut down"
	// one QEMU ended too early, and the other cannot go on alone
	MarkLost Mark = "lost"
	// source: the operator decided that the guest runs here, and that the twin is dead for good
	MarkResumedHere Mark = "resumed here"
	MarkDiscarded   Mark = "discarded" // source: the operator gives up the copy here
)

// Final reports whether the two sides have nothing left to settle. After a final mark come only the
// operator's decision, or the end of what began once the mark was written.
func (m Mark) Final() bool {
	switch m {
	case "", MarkBegun, MarkAccepted, MarkMayRun:
		return false
	}
	return true
}

// Answer is what a destination tells a source that asks about an eviction. The text itself is sent.
type Answer string

// The answers.
const (
	AnswerNone Answer = "" // none yet: the destination must do something first
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

// copyState is what the QEMU of one side, as the journal identifies it, does.
type copyState uint8

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

// step is what an engine must do next.
type step string

const (
	stepNone step = "none"
	// Of a source.
	// mark rolled back (resumed here stays), resume the guest here, and tell the destination
	stepRollBack step = "roll back"
	// look again and ask (again), with back-off; say what the operator may choose
	stepAsk  step = "ask"
	stepPush step = "push" // send what is missing
	// mark completed, or discarded if the operator says so; then end the QEMU
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

// Clear reports whether a host has nothing of a VM (R12). Its journal has no unfinished eviction of
// the VM, no QEMU of the VM lives there, and the host is not starting it.
//
// A host may start a VM anew only if it is clear, and each other host said the same since the start
// began. A host that begins to start the VM is not clear for the others. The mark covers the
// moments in which an eviction is about to start a QEMU.
func Clear(m Mark, lives, starting bool) bool {
	return (m == "" || m.Final()) && !lives && !starting
}

// Presence is a host's answer about a VM that another host wants to start anew.
type Presence struct {
	Clear bool   `json:"clear"`
	Last  string `json:"last,omitempty"` // the VM's last eviction in the host's journal
}

// Absent reports whether a host that was asked twice had nothing of a VM all the time between. Each
// host is asked again once all have answered. So all were clear of the VM at one moment, however it
// moved meanwhile.
func Absent(first, second Presence) bool {
	return first.Clear && second.Clear && first.Last == second.Last
}

// mayCommit reports whether a source may send the commit. Its mark must be durable, and the process
// of its QEMU stopped, so that no command can run the guest. The guest must not have run between
// the freeze and that (R3).
func mayCommit(m Mark, held bool) bool { return m == MarkMayRun && held }

// mayCont reports whether a destination may tell its twin to run the VM. Its mark must be durable,
// and the source must have said in the present session that it committed (R1).
func mayCont(m Mark, committed bool) bool { return m == MarkMayRun && committed }

// sourceStep is what a source does when it starts again, and each time before it asks. A source
// that was not restarted, and knows that it sent no commit, counts as begun. It asks with a resume
// which says that it committed. That is true wherever the destination's mark is may-run, and
// elsewhere the destination does not believe it.
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

// sourceOnAnswer is what a source whose mark is may-run does with an answer. heardRunning says that
// it heard before that the twin runs.
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

// destinationStep is what a destination does with an eviction after any failure: when it starts
// again, loses its session, or is asked in a new one.
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

// destinationOnAbort is what a destination does when it hears that its source rolled back, or that
// an operator resumed the guest there. A source that says so after the twin became whole never
// heard that it did, and its operator was wrong. The twin ends all the same, since the operator's
// decision counts.
func destinationOnAbort(m Mark) step {
	switch m {
	case MarkAccepted, MarkNeverRan:
		return stepAbandon
	case MarkMayRun, MarkLost, MarkCompleted:
		return stepLose
	}
	return stepNone
}

// ResumedThere is a destination's mark after an operator resumed the guest at the source. The
// destination comes to it once its twin is dead.
func ResumedThere(m Mark) Mark {
	switch destinationOnAbort(m) {
	case stepAbandon:
		return MarkNeverRan
	case stepLose:
		return MarkLost
	}
	return m
}

// AnswerOf is the destination's answer for an eviction on which no engine works there.
func AnswerOf(m Mark) Answer {
	if !m.Final() {
		return AnswerUnknown
	}
	return answerOf(m, copyGone)
}

// answerOf is the destination's answer after it did what destinationStep says.
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
