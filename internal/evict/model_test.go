package evict

import (
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"testing"
)

// This is a model of the protocol in docs/protocol.md, small enough to try everything that can
// happen in it. It tries every order of the two engines' steps and of every fault, with any number
// of faults, since the model has finitely many states. The functions of decide.go decide here what
// they decide in the engines. docs/protocol.md says what the model takes into account and what it
// leaves out.

// rules are the rules of the model. Each mutant of TestModelMutants breaks one.
type rules struct {
	mayCommit          func(Mark, bool) bool
	mayCont            func(Mark, bool) bool
	sourceStep         func(Mark, copyState) step
	sourceOnAnswer     func(copyState, bool, Answer) step
	destinationStep    func(Mark, copyState) step
	destinationOnAbort func(Mark) step
	answerOf           func(Mark, copyState) Answer
	clear              func(m Mark, lives, starting bool) bool

	killFirst     bool // abandon kills before it marks. This is allowed
	tellFirst     bool // abandon says never ran before it kills
	spare         bool // abandon does not kill
	believeResume bool // a resume counts as a commit where the mark is accepted
	eager         bool // a paused twin runs without hearing from the source again
	impatient     bool // a destination that does not answer counts as one that never ran it
	askOn         bool // a source goes on asking when the operator's decision could not be written
	lateWords     bool // what was said in one session may be heard in the next
	keepBooks     bool // pages sent in one session count as sent in the next
	trustBuffers  bool // pages received count as placed
	hasty         bool // memory is given back before it is durable that the copy is not whole
	generous      bool // memory is given back that the destination has only received
	forgetful     bool // an operator may resume a copy that gave memory back
	// the twin of a guest that ended itself is told to quit before that is durable
	quitFirst  bool
	unheeding  bool // a destination ignores that a guest ended itself when its QEMU is gone
	deaf       bool // an operator may resume a guest that ended itself, though the source knows
	noteFirst  bool // a source writes may-run before its QEMU's process is stopped
	blind      bool // a source does not check whether the guest ran before its process was stopped
	unasserted bool // an operator need not assert that the destination is fenced
	desert     bool // a destination that cannot go on says lost although the twin runs
	mute       bool // a source does not say that the guest was resumed there
	faint      bool // a destination that finds no memory for pages gives the guest up
	// pages that were dropped with their session, for want of memory, count as received
	hoard bool
	// a destination that was started anew answers before it has found which pages are placed
	guess     bool
	imposing  bool // a source that rolls back runs the guest, though it stood
	oblivious bool // a destination does not write that the guest stood
	meddling  bool // a destination ignores that its twin ran already
	// a twin that was not told to run counts as one that never ran, though its operator may have
	// run it
	ignorant bool
	unasked  bool // a VM is started without asking the other host
	// a source treats the job that a manager holds on its VM like a stopped process
	trusting bool
	// the source's manager may start the VM when its host boots, also after the commit
	autostarts bool
	deciding   bool // a twin whose manager was told to run it counts as one that never ran

	// managed: both QEMUs belong to a manager. It may run the twin some time after it was told to,
	// even if the engine that told it has ended. It starts its VMs when its host boots.
	managed bool

	// restless keeps the guest from standing when it is frozen. It breaks no rule. It leaves out
	// half of the states, for the mutants of rules that are not about such a guest.
	restless bool
	// calm leaves out the worlds that rare names, which are ten of eleven. It breaks no rule.
	calm bool
}

func realRules() rules {
	return rules{mayCommit: mayCommit, mayCont: mayCont, sourceStep: sourceStep,
		sourceOnAnswer:  sourceOnAnswer,
		destinationStep: destinationStep, destinationOnAbort: destinationOnAbort,
		answerOf: answerOf, clear: Clear}
}

// phase is where an engine stands: what it would forget if it were killed.
type phase uint8

const (
	down phase = iota
	idle
	ended

	// The source's.
	offering  // until the offer is accepted
	loading   // the guest is frozen, no commit was sent
	committed // the commit was sent, and no answer came
	asking    // after a loss of the session, or a restart
	pushing   // the twin runs
	holding   // contradiction, or the twin lacks what is gone here
	rolling   // it must write the mark, and then
	resuming  // resume the guest here
	retiring  // it must write the mark, and then
	burying   // the guest ended itself there: it must write the mark, and then end the QEMU
	quitting  // it must end the QEMU
	losing

	// The destination's.
	arming   // accepted; the device state did not come yet
	prepared // the twin is loaded and paused
	marking  // the commit came, may-run must be written
	starting // may-run is written, `cont` must be sent
	awaiting // after a restart: the twin is paused, its mark is may-run
	looking  // after a restart: the twin runs, and the engine must find out which pages are placed
	running
	completing
	marksNeverRan // it must write the mark, and then
	kills         // kill the twin
	marksLast     // the same in the other order
	marksShutDown // the guest ended itself: it must write the mark, and then
	quitsTwin     // make the twin quit
	tellsLost
)

// word is a message on the control lane.
type word uint8

const (
	silence word = iota
	offers
	loads // the device state
	commits
	resumes
	aborts
	accepts
	loaded
	runs // in answer to a commit
	// Answers to a resume, and at the end of the session that accepted.
	unknown
	neverRan
	stands
	runsWith0 // the twin runs and has no page; +1: the one in use, +2: the one left out
	runsWith1
	runsWith2
	runsWith3
	completes
	shutsDown
	lost
)

var answers = map[word]Answer{unknown: AnswerUnknown, neverRan: AnswerNeverRan,
	stands: AnswerPaused, runs: AnswerRunning, runsWith0: AnswerRunning,
	runsWith1: AnswerRunning, runsWith2: AnswerRunning, runsWith3: AnswerRunning,
	completes: AnswerComplete, shutsDown: AnswerShutDown, lost: AnswerLost}

// pages is a set of the model's two pages: one in use, and one left out. The destination needs to
// hear about the latter only that it is left out.
type pages uint8

const (
	inUse   pages = 1
	leftOut pages = 2
	all           = inUse | leftOut
)

// guest is what the source's QEMU does.
type guest uint8

const (
	gone     guest = iota
	runsHere       // before the eviction, after it was rolled back, and when somebody says cont
	standing       // its state is saved; QEMU runs it if somebody tells it to
	stopped        // its process is stopped: QEMU obeys nobody
	// its manager lets nobody run it while its job lasts. Only if that rule is broken
	kept
)

func (g guest) state() copyState {
	return [...]copyState{copyGone, copyRunning, copyPaused, copyPaused, copyPaused}[g]
}

var marks = []Mark{"", MarkBegun, MarkAccepted, MarkMayRun, MarkRolledBack, MarkNeverRan,
	MarkCompleted, MarkShutDown, MarkLost, MarkResumedHere, MarkDiscarded}

// record is a Mark as its index in marks, which makes a world small.
type record uint8

func (r record) mark() Mark { return marks[r] }

func recordOf(m Mark) record { return record(slices.Index(marks, m)) }

// queue is what is under way on the control lane, in one direction.
type queue [5]word

func (q *queue) put(w word) {
	i := slices.Index(q[:], silence)
	if i < 0 {
		panic(fmt.Sprintf("model: no room behind %v", *q))
	}
	q[i] = w
}

func (q *queue) take() (w word) {
	w = q[0]
	copy(q[:], q[1:])
	q[len(q)-1] = silence
	return w
}

// start is how far a host is with starting the VM anew.
type start uint8

const (
	notStarted start = iota
	// nobody else begins anything with the VM on this host, and the other host is clear of it
	taken
	started // a QEMU runs it, from its disks
)

// world is a state of everything.
type world struct {
	s struct {
		phase   phase
		journal record
		guest   guest
		stale   bool  // the guest ran since its state was saved
		session bool  // has not noticed that its session ended
		loaded  bool  // heard
		heard   bool  // that the twin runs
		sent    pages // need not be sent
		given   pages // given back to the host
		noted   bool  // in the journal: some may have been given back
		start   start
		auto    bool // its manager starts the VM when the host boots
	}
	d struct {
		phase     phase
		journal   record
		twin      copyState
		session   bool
		committed bool  // heard
		ended     bool  // heard that the guest ended itself
		stands    bool  // heard, or read in the journal, that the guest stood
		noted     bool  // in the journal: it stood
		ran       bool  // in the journal: the twin ran
		held      pages // in the engine's memory: received and not placed, or known to be left out
		placed    pages
		claimed   pages // said to be there, and not; only if that rule is broken
		short     bool  // there is no memory to place pages
		start     start
		told      bool // its manager was told to run the twin, and has not done so yet
	}
	toD, toS         queue
	moving           pages // under way to the destination
	lateToD, lateToS word  // of an older session

	// the guest stood when it was frozen: wherever it is, its operator decides whether it runs
	stands bool

	// What no engine knows: what was true at some time.
	ran     bool // the twin did
	whole   bool // it has had every page
	aborted bool // the operator was told that the eviction was aborted
	// fault: the twin is dead, and the destination's journal has said that it may have run
	bereft bool
	died   bool // fault: the source's QEMU died
	forgot bool // fault: the destination's journal was lost
	over   bool // the guest ended itself, at the destination
	// fault: and its QEMU ended before that was durable, or the destination could not be asked
	unheard bool
	resumed bool // the operator resumed the guest here
	lied    bool // the operator asserted that the destination is fenced, and it was not
	gaveUp  bool // the operator gave up the copy here

	bad flaw // what must never happen, and did
}

// flaw is a text as its index in flaws. So a world has no pointers, and is quickly hashed.
type flaw uint8

var flaws = struct {
	sync.Mutex
	texts []string
}{texts: []string{""}}

func flawOf(text string) flaw {
	flaws.Lock()
	defer flaws.Unlock()
	i := slices.Index(flaws.texts, text)
	if i < 0 {
		i, flaws.texts = len(flaws.texts), append(flaws.texts, text)
	}
	return flaw(i)
}

func (f flaw) String() string {
	flaws.Lock()
	defer flaws.Unlock()
	return flaws.texts[f]
}

// edge is a step from one world to the next.
type edge struct {
	what  string
	fault bool // or an operator's action: nobody can rely on it to happen
	to    world
}

// model finds out what may happen next.
type model struct {
	rules
	from, to world
	edges    []edge
	texts    map[writing]string // of earlier writings
}

// writing is the writing of a mark, and its result.
type writing struct {
	who  string
	mark Mark
	end  string
}

// says names a writing. Millions of edges share a few names.
func (m *model) says(w writing) string {
	s, ok := m.texts[w]
	if !ok {
		s = fmt.Sprintf("%s writes %q%s", w.who, w.mark, w.end)
		m.texts[w] = s
	}
	return s
}

func (m *model) add(what string, fault bool, do func(w *world)) {
	m.to = m.from
	w := &m.to
	do(w)
	switch there := w.d.twin == copyRunning || w.d.twin == copyComplete; {
	case w.bad != 0:
	case there && w.s.guest == runsHere && !w.lied:
		w.bad = flawOf("two copies run")
	case (w.s.start == started || w.d.start == started) && (there || w.s.guest == runsHere) &&
		!w.lied, w.s.start == started && w.d.start == started:
		w.bad = flawOf("a VM was started that runs")
	case there && w.aborted:
		w.bad = flawOf("the twin runs after the operator was told that the eviction was aborted")
	case w.s.guest == runsHere && w.s.given != 0:
		w.bad = flawOf("the guest runs here without memory that was given back")
	case w.ran && w.s.guest == runsHere && !w.resumed:
		w.bad =
			flawOf("the guest runs here from an older state than it had there, and nobody said so")
	case w.over && w.s.guest == runsHere && !w.unheard && !w.forgot:
		w.bad = flawOf("the guest runs here, and it ended itself there")
	}
	// Forget what no longer makes a difference, to have fewer worlds.
	if w.over && w.d.twin != copyComplete {
		w.d.held, w.d.placed, w.moving = 0, 0, 0
	}
	if w.d.twin != copyRunning && w.d.twin != copyPaused {
		w.d.short, w.d.ran = false, false
	}
	if w.d.twin != copyPaused {
		w.d.told = false
	}
	if w.s.guest == gone {
		w.unheard = false
	}
	if (w.s.start != notStarted || w.d.start != notStarted) && w.d.twin != copyComplete {
		w.d.held, w.d.placed, w.d.claimed, w.d.short, w.moving, w.s.sent = 0, 0, 0, false, 0, 0
	}
	m.edges = append(m.edges, edge{what, fault, *w})
}

// write adds the possible results of writing a mark. It is written, or it is not, or it is and the
// writer gets an error.
func (m *model) write(who string, source bool, mark Mark, done, failed func(w *world)) {
	set := func(w *world) {
		if source {
			w.s.journal = recordOf(mark)
		} else {
			w.d.journal = recordOf(mark)
			// ahead of the mark
			w.d.noted = w.d.noted || mark == MarkMayRun && w.d.stands && !m.oblivious
			w.bereft = w.bereft || mark == MarkMayRun && w.d.twin == copyGone
			w.unheard = w.unheard && (mark != MarkShutDown || w.resumed)
		}
	}
	m.add(m.says(writing{who, mark, ""}), false, func(w *world) { set(w); done(w) })
	m.add(m.says(writing{who, mark, ", which fails"}), true, failed)
	m.add(m.says(writing{who, mark, ", which seems to fail"}), true,
		func(w *world) { set(w); failed(w) })
}

func (w *world) sayToD(what word) {
	if w.d.session {
		w.toD.put(what)
	}
}

func (w *world) sayToS(what word) {
	if what == neverRan && w.d.twin != copyGone {
		w.bad = flawOf("the destination says never ran while the twin lives")
	}
	if what == lost && w.d.ended && !w.resumed {
		w.bad = flawOf("the destination says lost, and heard that the guest ended itself")
	}
	if w.s.session {
		w.toS.put(what)
	}
}

// leaveS: the source considers its session ended. It reads nothing more in it.
func (m *model) leaveS(w *world) {
	if m.lateWords && w.toS[0] != silence {
		w.lateToS = w.toS[0]
	}
	w.s.session, w.toS = false, queue{}
}

func (m *model) leaveD(w *world) {
	if m.lateWords && w.toD[0] != silence {
		w.lateToD = w.toD[0]
	}
	w.d.session, w.toD, w.moving = false, queue{}, 0
	// What waits for memory is dropped with its session, and sent again in the next.
	if w.d.short && w.d.held&inUse != 0 {
		w.d.held &^= inUse
		if m.hoard {
			w.d.claimed = inUse
		}
	}
}

// connect begins a new session.
func (m *model) connect(w *world, first word) {
	m.leaveD(w)
	m.leaveS(w)
	w.s.session, w.d.session = true, true
	w.toD.put(first)
}

func (m *model) next(w world) []edge {
	m.from, m.edges = w, m.edges[:0]
	if w.s.phase == down {
		m.add("source starts again", false, func(w *world) {
			if mark := w.s.journal.mark(); w.s.guest == standing &&
				(mark == MarkMayRun || mark == MarkLost) {
				w.s.guest = stopped
			}
			m.sourceTakes(w, m.sourceStep(w.s.journal.mark(), w.s.guest.state()))
		})
	} else {
		m.source(w)
	}
	if w.d.phase == down {
		m.add("destination starts again", false, func(w *world) {
			w.d.phase, w.d.stands = idle, w.d.noted
			if w.d.journal != 0 {
				m.destinationTakes(w, m.destinationStep(w.d.journal.mark(), m.found(w)))
			}
		})
	} else {
		m.destination(w)
	}
	m.qemu(w)
	m.starts("source", w.sClear, w.dClear, func(w *world) *start { return &w.s.start },
		w.s.phase == down, w.d.phase == down)
	m.starts("destination", w.dClear, w.sClear, func(w *world) *start { return &w.d.start },
		w.d.phase == down, w.s.phase == down)
	return m.edges
}

// found is what a destination finds its twin doing. A twin that stands as its guest did needs no
// `cont`: its operator may have run it. Nor does a twin that ran before: its operator paused it.
func (m *model) found(w *world) copyState {
	if w.d.ended && !m.unheeding {
		return copyEnded
	}
	own := w.d.stands && !m.ignorant || w.d.ran && !m.meddling
	if own && w.d.twin == copyPaused && w.d.journal.mark() == MarkMayRun {
		return copyRunning
	}
	return w.d.twin
}

// sourceTakes makes the source's engine do a step.
func (m *model) sourceTakes(w *world, st step) {
	switch st {
	case stepRollBack:
		w.s.phase = rolling
		if w.s.session {
			w.sayToD(aborts)
		}
		m.leaveS(w)
	case stepAsk:
		w.s.phase = asking
		m.leaveS(w)
	case stepPush:
		w.s.phase, w.s.heard = pushing, true
	case stepRetire:
		w.s.phase = retiring
	case stepEnd:
		w.s.phase = burying
	case stepLose:
		w.s.phase = losing
	case stepHold:
		w.s.phase = holding
		if w.s.guest != gone {
			w.bad = flawOf("the source finds a contradiction")
		}
	default:
		w.s.phase = ended
	}
}

func (m *model) source(w world) {
	// A source that sent no commit, and knows it, counts as begun.
	m.add("source is killed", true, func(w *world) {
		m.leaveS(w)
		w.s.phase, w.s.loaded, w.s.heard, w.s.sent = down, false, false, 0
		w.s.start = w.s.start.afterDeath()
		w.dropJob() // a manager drops it with the connection
	})
	state := w.s.guest.state()
	early := w.s.phase == offering || w.s.phase == loading
	if w.s.session {
		notice := func(w *world) {
			m.leaveS(w)
			switch {
			case early:
				m.sourceTakes(w, m.sourceStep(MarkBegun, state))
			case w.s.phase == committed || w.s.phase == pushing || w.s.phase == holding:
				w.s.phase = asking
			}
		}
		m.add("source loses its session", w.d.session, notice)
		if w.toS[0] != silence {
			m.add("source hears", false, func(w *world) { m.sourceHears(w, w.toS.take()) })
		}
		if w.s.phase == offering && w.toS[0] == accepts && !m.restless {
			m.add("source hears, and the guest stands when it is frozen", false, func(w *world) {
				w.stands = true
				w.d.placed = leftOut // such a world has one page, to be fewer
				m.sourceHears(w, w.toS.take())
			})
		}
		if w.lateToS != silence {
			m.add("source hears late", false, func(w *world) {
				said := w.lateToS
				w.lateToS = silence
				m.sourceHears(w, said)
			})
		}
		if (w.s.phase == loading || w.s.phase == committed || w.s.phase == pushing) &&
			w.s.guest != gone {
			for _, p := range []pages{inUse, leftOut} {
				if w.s.sent&p == 0 && !(w.stands && p == leftOut) {
					m.add(fmt.Sprintf("source sends page %d", p), false, func(w *world) {
						if w.s.given&p&^w.d.placed != 0 && !w.over {
							w.bad = flawOf("the source sends zeroes for a page that it gave back")
						}
						w.s.sent |= p
						if w.d.session {
							w.moving |= p
						}
					})
				}
			}
		}
	}
	if early {
		m.add("source gives up, or the operator does", true,
			func(w *world) { m.sourceTakes(w, m.sourceStep(MarkBegun, state)) })
		if w.s.guest == gone {
			m.add("source notices that its QEMU died", false,
				func(w *world) { m.sourceTakes(w, m.sourceStep(MarkBegun, copyGone)) })
		}
	}
	switch w.s.phase {
	case idle:
		if w.s.start == taken {
			break
		}
		m.write("source", true, MarkBegun, func(w *world) { w.s.phase = offering },
			func(w *world) { w.s.phase = ended })
	case offering:
		if !w.s.session && w.d.phase != down {
			m.add("source offers", false, func(w *world) {
				w.s.auto = w.s.auto && m.autostarts
				m.connect(w, offers)
			})
		}
	case loading:
		if w.s.guest == standing || w.s.guest == runsHere {
			m.add("source stops its QEMU's process", false, func(w *world) {
				if ran := w.s.guest == runsHere || w.s.stale; ran && !m.blind {
					m.sourceTakes(w, m.sourceStep(MarkBegun, state))
					return
				}
				if w.s.guest = stopped; m.trusting {
					w.s.guest = kept
				}
			})
		}
		held := w.s.guest == stopped || w.s.guest == kept
		if w.s.journal.mark() == MarkBegun && (held || m.noteFirst) {
			m.write("source", true, MarkMayRun, func(w *world) {},
				func(w *world) { m.sourceTakes(w, m.sourceStep(MarkBegun, state)) })
		}
		if w.s.loaded && w.s.session && w.s.guest != gone &&
			m.mayCommit(w.s.journal.mark(), held) {
			m.add("source commits", false, func(w *world) {
				w.s.phase = committed
				w.sayToD(commits)
			})
		}
	case pushing:
		if w.s.guest == gone {
			m.add("source notices that its QEMU died", false,
				func(w *world) { w.s.phase = holding })
			break
		}
		// This may happen at any time. It depends on an operator's setting, so nothing relies on
		// it.
		reported := w.d.placed
		if m.generous {
			reported |= w.d.held
		}
		switch {
		case w.s.given != 0 || w.over || !w.s.session || !w.d.session ||
			w.s.sent&reported&inUse == 0:
		case !w.s.noted && !m.hasty:
			m.add("source writes that the copy is not whole", true,
				func(w *world) { w.s.noted = true })
		default:
			m.add("source gives a page back", true, func(w *world) { w.s.given = inUse })
		}
	case asking:
		if w.s.session {
			break
		}
		if st := m.sourceStep(w.s.journal.mark(), state); st != stepAsk {
			m.add("source looks again", false, func(w *world) { m.sourceTakes(w, st) })
		} else if w.d.phase != down {
			m.add("source asks", false, func(w *world) { m.connect(w, resumes) })
		} else if m.impatient {
			m.add("source tires of asking", false, func(w *world) { w.s.phase = rolling })
		}
	case rolling:
		do := func(w *world) { w.s.phase = resuming }
		if w.s.journal.mark() == MarkResumedHere {
			m.add("source begins to resume the guest", false, do)
		} else {
			m.write("source", true, MarkRolledBack, do, do)
		}
	case resuming:
		if w.s.guest == gone {
			m.add("source finds its QEMU dead", false, func(w *world) { w.s.phase = losing })
		} else {
			m.add("source resumes the guest", false, func(w *world) {
				w.s.auto = m.managed
				if w.s.phase, w.aborted = ended, !w.resumed; !w.stands {
					w.s.guest = runsHere
				} else if m.imposing {
					w.bad = flawOf("the source runs a guest that stood")
				} else if w.s.guest == stopped || w.s.guest == kept {
					w.s.guest = standing
				}
			})
		}
	case retiring:
		do := func(w *world) { w.s.phase = quitting }
		if mark := w.s.journal.mark(); mark == MarkDiscarded || mark == MarkShutDown {
			m.add("source begins to end its QEMU", false, do)
		} else {
			m.write("source", true, MarkCompleted, do, do)
		}
	case burying:
		do := func(w *world) { w.s.phase = quitting }
		m.write("source", true, MarkShutDown, do, do)
	case quitting:
		m.add("source ends its QEMU", false, func(w *world) {
			if w.s.guest != gone && !w.whole && !w.gaveUp && !w.over {
				w.bad = flawOf("the source ends its QEMU, and the twin lacks pages")
			}
			w.s.phase, w.s.guest, w.s.auto = ended, gone, false
			m.leaveS(w)
		})
	case losing:
		do := func(w *world) {
			w.s.phase = ended
			m.leaveS(w)
		}
		m.write("source", true, MarkLost, do, do)
	case ended:
		if w.s.journal.mark() != MarkResumedHere || m.mute || w.s.session || w.d.phase == down ||
			w.d.journal == 0 {
			break
		}
		// Until the destination has heard it.
		if !w.d.journal.mark().Final() || w.d.twin != copyGone {
			m.add("source tells that it resumed the guest", false,
				func(w *world) { m.connect(w, aborts) })
		}
	}
	m.operator(w)
}

// operator adds an operator's decisions, for when the source cannot know. If the destination has
// not said that the twin is dead, the operator must assert it, and may be wrong.
func (m *model) operator(w world) {
	mark := w.s.journal.mark()
	told := mark == MarkShutDown && m.deaf
	idle := w.s.phase == asking || w.s.phase == holding || w.s.phase == ended || told
	if w.here() || w.s.guest == gone || w.s.guest == runsHere ||
		mark != MarkMayRun && mark != MarkLost && !told || !idle {
		return
	}
	// Reading the journal again shows whether the decision was written.
	failed := func(w *world) {
		if !m.askOn {
			m.leaveS(w)
			w.s.phase = down
		}
	}
	// The operator checks there whether the guest ended itself, if that is possible.
	over := w.d.ended || w.d.journal.mark() == MarkShutDown && w.d.phase != down
	// A twin that was never told to run, on a host that is off, never will run. A twin that its
	// operator may run, or paused, may.
	fenced := w.d.twin == copyGone ||
		w.d.twin == copyPaused && w.d.phase == down && !w.d.noted && !w.ran && !w.d.told
	resume := func(what string, lie bool) {
		say := func(w *world) {
			w.resumed, w.lied = true, w.lied || lie
			w.unheard = w.unheard || (lie || w.d.phase == down) && !told
		}
		m.word(what, MarkResumedHere, func(w *world) {
			say(w)
			m.sourceTakes(w, stepRollBack)
		}, func(w *world) {
			say(w)
			failed(w)
		})
	}
	switch {
	case w.s.noted && !m.forgetful:
	case fenced && over && !told:
	case mark == MarkLost || told || m.unasserted:
		resume("operator has the guest resumed here: source", false)
	case fenced:
		resume("operator asserts that the destination is fenced, and has the guest resumed "+
			"here: source", false)
	default:
		resume("operator asserts falsely that the destination is fenced, and has the guest "+
			"resumed here: source", true)
	}
	m.word("operator gives up the copy here: source", MarkDiscarded, func(w *world) {
		w.gaveUp, w.s.phase = true, retiring
		m.leaveS(w)
	}, func(w *world) { w.gaveUp = true; failed(w) })
}

func (m *model) word(what string, mark Mark, done, failed func(*world)) {
	from := len(m.edges)
	m.write(what, true, mark, done, failed)
	for i := from; i < len(m.edges); i++ {
		m.edges[i].fault = true
	}
}

func (m *model) sourceHears(w *world, said word) {
	switch w.s.phase {
	case offering, loading:
		switch said {
		case accepts:
			if w.s.guest == gone {
				return
			}
			w.s.phase, w.s.guest = loading, standing
			w.sayToD(loads)
		case loaded:
			w.s.loaded = true
		case neverRan, unknown:
			m.sourceTakes(w, m.sourceStep(MarkBegun, w.s.guest.state()))
		default:
			w.bad = flawOf("a source that did not commit hears that the twin may run")
		}
	case committed, asking, pushing, holding:
		a, ok := answers[said]
		if !ok {
			return
		}
		if said >= runsWith0 && said <= runsWith3 {
			if !m.keepBooks {
				w.s.sent = 0
			}
			w.s.sent |= pages(said - runsWith0)
		}
		m.sourceTakes(w, m.sourceOnAnswer(w.s.guest.state(), w.s.heard || w.s.noted, a))
	}
}

// destinationTakes makes the destination's engine do a step.
func (m *model) destinationTakes(w *world, st step) {
	switch st {
	case stepAbandon:
		w.d.phase = marksNeverRan
		if m.killFirst {
			w.d.phase = kills
		}
		if m.tellFirst && w.d.session {
			w.sayToS(neverRan)
		}
	case stepAwait:
		w.d.phase = awaiting
	case stepTakeUp:
		w.d.phase = looking
	case stepComplete:
		w.d.phase = completing
	case stepEnd:
		w.d.phase, w.d.ended = marksShutDown, true
		if m.quitFirst || w.d.journal.mark() == MarkShutDown {
			w.d.phase = quitsTwin
		}
	case stepLose:
		w.d.phase = tellsLost
	case stepHold:
		w.bad = flawOf("the destination finds a contradiction")
	default:
		w.d.phase = ended
	}
}

func (m *model) destination(w world) {
	m.add("destination is killed", true, func(w *world) {
		m.leaveD(w)
		w.d.phase, w.d.held, w.d.claimed, w.d.committed, w.d.ended, w.d.stands = down, 0, 0, false,
			false, false
		w.d.start = w.d.start.afterDeath()
	})
	ph := w.d.phase
	// Between these it does one thing after the other, and hears nothing.
	stable := ph == idle || ph == arming || ph == prepared || ph == awaiting || ph == running ||
		ph == ended
	early := ph == arming || ph == prepared
	look := func(w *world) {
		m.destinationTakes(w, m.destinationStep(w.d.journal.mark(), m.found(w)))
	}
	if w.d.session {
		m.add("destination loses its session", w.s.session, func(w *world) {
			m.leaveD(w)
			if early {
				look(w)
			}
		})
		if stable && w.toD[0] != silence {
			m.add("destination hears", false,
				func(w *world) { m.destinationHears(w, w.toD.take()) })
		}
		if stable && w.lateToD != silence {
			m.add("destination hears late", false, func(w *world) {
				said := w.lateToD
				w.lateToD = silence
				m.destinationHears(w, said)
			})
		}
		if w.moving != 0 && (early || ph == marking || ph == starting || ph == running) {
			m.add("destination receives pages", false, func(w *world) {
				w.d.held |= w.moving &^ w.d.placed
				w.moving = 0
			})
		}
	}
	if early {
		m.add("destination gives up", true, look)
	}
	if w.d.twin == copyGone && (early || ph == awaiting || ph == looking || ph == running) {
		m.add("destination notices that the twin died", false, look)
	}
	mayCont := w.d.twin == copyPaused && (ph == prepared || ph == marking || ph == starting) &&
		m.mayCont(w.d.journal.mark(), w.d.committed)
	if mayCont && w.d.stands {
		m.add("destination has the twin stand", false, func(w *world) {
			if w.d.phase = running; m.ignorant {
				w.d.phase = awaiting
			}
			w.sayToSIfAny(runs)
		})
	} else if mayCont && m.managed {
		m.add("destination tells the manager to run the twin", false, func(w *world) {
			w.d.told, w.d.phase = true, running
			w.sayToSIfAny(runs)
		})
		m.add("the manager has ended, and was not told", true,
			func(w *world) { m.destinationTakes(w, stepAbandon) })
	} else if mayCont {
		m.add("destination says cont", false, func(w *world) {
			m.cont(w)
			w.sayToSIfAny(runs)
		})
		m.add("the twin refuses cont", true, func(w *world) { m.destinationTakes(w, stepAbandon) })
	}
	switch ph {
	case marking:
		if w.d.twin == copyGone {
			m.add("destination notices that the twin died", false, look)
		}
		m.write("destination", false, MarkMayRun, func(w *world) { w.d.phase = starting },
			func(w *world) { m.destinationTakes(w, stepAbandon) })
	case starting:
		if w.d.twin == copyGone {
			m.add("destination finds the twin dead, which had no cont", false,
				func(w *world) { m.destinationTakes(w, stepAbandon) })
		}
	case awaiting:
		if m.eager && w.d.twin == copyPaused {
			m.add("destination says cont unasked", false, m.cont)
		}
	case looking:
		if w.d.twin != copyGone {
			m.add("destination finds which pages are placed", false,
				func(w *world) { w.d.phase = running })
		}
		if m.guess && w.d.session && w.toD[0] == resumes {
			m.add("destination answers before it looked", false, func(w *world) {
				w.toD.take()
				w.sayToS(runsWith3)
			})
		}
	case running:
		if w.d.told && m.deciding {
			m.add("the manager does not answer in time", true,
				func(w *world) { m.destinationTakes(w, stepAbandon) })
		}
		if w.d.short && m.faint {
			m.add("destination gives up without memory", true,
				func(w *world) { m.destinationTakes(w, stepLose) })
		}
		if w.d.twin == copyEnded {
			m.add("destination finds that the guest ended itself", false, look)
		}
		// If the mark cannot be written, it goes on all the same.
		if (w.d.twin == copyRunning || w.d.twin == copyPaused) && !w.d.ran && !w.d.told &&
			!w.stands {
			m.add("destination writes that the twin ran", false, func(w *world) { w.d.ran = true })
		}
		if w.d.journal.mark() == MarkAccepted { // only if that rule is broken
			m.write("destination", false, MarkMayRun, func(w *world) {}, func(w *world) {})
		}
		if m.desert {
			m.add("destination cannot go on", true, func(w *world) {
				w.d.journal, w.d.phase = recordOf(MarkLost), ended
				w.sayToSIfAny(lost)
			})
		}
		if w.d.held&inUse != 0 && w.d.twin != copyGone && !w.d.short {
			m.add("destination places a page", false, func(w *world) {
				w.d.held &^= inUse
				w.d.placed |= inUse
			})
		}
		if has := w.d.placed | w.d.held&leftOut; w.d.twin != copyGone && !w.d.told &&
			(has == all || m.trustBuffers && w.d.held|w.d.placed == all) {
			m.add("destination ends the twin's migration", false, func(w *world) {
				w.d.twin, w.whole, w.d.phase = copyComplete, has == all, completing
			})
		}
	case completing:
		do := func(w *world) { w.d.phase = ended; w.sayToSIfAny(completes) }
		m.write("destination", false, MarkCompleted, do, do)
	case marksNeverRan:
		do := func(w *world) { w.d.phase = kills }
		if m.killFirst {
			do = m.toldNeverRan
		}
		m.write("destination", false, MarkNeverRan, do, do)
	case kills:
		m.add("destination kills the twin", false, func(w *world) {
			if w.ran && !w.resumed {
				w.bad = flawOf("the destination kills a twin that ran")
			}
			if w.d.twin != copyGone && w.d.journal.mark() == MarkMayRun {
				w.bereft = true // by what is on disk, it dies after it may have run
			}
			if !m.spare {
				w.d.twin = copyGone
			}
			if m.killFirst {
				w.d.phase = marksNeverRan
			} else {
				m.toldNeverRan(w)
			}
		})
	case marksShutDown:
		do := func(w *world) { w.d.phase = quitsTwin; w.sayToSIfAny(shutsDown) }
		if m.quitFirst {
			do = func(w *world) { w.d.phase = ended; w.sayToSIfAny(shutsDown) }
		}
		m.write("destination", false, MarkShutDown, do, func(w *world) {})
	case quitsTwin:
		m.add("destination has the twin quit", false, func(w *world) {
			w.d.twin = copyGone
			if m.quitFirst && w.d.journal.mark() != MarkShutDown {
				w.d.phase = marksShutDown
				w.bereft = true
				return
			}
			w.d.phase, w.d.ended = ended, false
		})
	case tellsLost:
		do := func(w *world) {
			if w.d.twin != copyGone && w.ran && !w.resumed {
				w.bad = flawOf("the destination kills a twin that ran")
			}
			w.d.twin, w.d.phase = copyGone, ended
			w.sayToSIfAny(lost)
		}
		m.write("destination", false, MarkLost, do, do)
	}
}

func (m *model) cont(w *world) {
	switch {
	case w.stands:
		w.bad = flawOf("the destination runs a guest that stood")
	case w.d.ran:
		w.bad = flawOf("the destination runs a guest that its operator paused")
	}
	w.d.phase = running
	m.runs(w)
}

// runs is what happens to a twin that is told to run.
func (m *model) runs(w *world) {
	w.d.twin, w.ran = copyRunning, true
	if w.s.stale && !w.resumed {
		w.bad = flawOf("the twin runs from an older state than the guest had here")
	}
	if w.s.guest == gone && !w.died && !w.gaveUp {
		w.bad = flawOf("the twin runs though its source was retired")
	}
}

func (m *model) toldNeverRan(w *world) {
	w.d.phase = ended
	w.sayToSIfAny(neverRan)
}

// sayToSIfAny says something if there is a session for it.
func (w *world) sayToSIfAny(what word) {
	if w.d.session {
		w.sayToS(what)
	}
}

func (m *model) destinationHears(w *world, said word) {
	mark := w.d.journal.mark()
	switch said {
	case offers:
		if w.d.phase != idle {
			return
		}
		refuse := func(w *world) { w.d.phase = ended; w.sayToSIfAny(neverRan) }
		w.d.phase = ended
		refused := *w
		refuse(&refused)
		m.edges = append(m.edges,
			edge{"destination writes \"accepted\", which fails", true, refused})
		refused.d.journal = recordOf(MarkAccepted)
		m.edges = append(m.edges,
			edge{"destination writes \"accepted\", which seems to fail", true, refused})
		w.d.journal, w.d.twin, w.d.phase = recordOf(MarkAccepted), copyIncoming, arming
		w.sayToSIfAny(accepts)
	case loads:
		if w.d.phase == arming && w.d.twin == copyIncoming {
			w.d.twin, w.d.phase = copyPaused, prepared
			w.sayToSIfAny(loaded)
		}
	case commits:
		if w.d.phase == prepared {
			w.d.committed, w.d.phase, w.d.stands = true, marking, w.stands
		}
	case aborts:
		// Where all was over, and the twin is alive all the same, it must not be.
		if st := m.destinationOnAbort(mark); mark != "" &&
			(w.d.phase != ended || w.d.twin != copyGone) {
			m.destinationTakes(w, st)
		}
	case resumes:
		switch w.d.phase {
		case running:
			w.sayToSIfAny(runsWith0 + word(w.d.held|w.d.placed|w.d.claimed))
			return
		case prepared:
			if m.believeResume {
				w.d.committed, w.d.phase = true, marking
				return
			}
		case awaiting:
			if m.managed && w.d.twin == copyRunning { // its manager was told by an engine that died
				w.d.phase = running
				w.sayToSIfAny(runsWith0 + word(w.d.held|w.d.placed))
				return
			}
			if w.d.twin != copyPaused {
				break
			}
			if !m.mayCont(mark, true) {
				w.sayToSIfAny(stands)
				return
			}
			if m.managed { // which is told once more
				w.d.told, w.d.phase = true, running
				w.sayToSIfAny(runsWith0 + word(w.d.held|w.d.placed))
				return
			}
			refused := *w
			refused.sayToSIfAny(stands)
			m.edges = append(m.edges, edge{"the twin refuses cont", true, refused})
			m.cont(w)
			w.sayToSIfAny(runsWith0 + word(w.d.held|w.d.placed))
			return
		case ended, idle:
			if mark != "" && !mark.Final() {
				break // its end could not be written
			}
			for said, a := range answers {
				if a == m.answerOf(mark, w.d.twin) && said != runs {
					w.sayToSIfAny(said)
					return
				}
			}
			return
		}
		// A new session is the end of the one before.
		m.destinationTakes(w, m.destinationStep(mark, m.found(w)))
	}
}

// qemu adds what the two QEMUs and the disks do by themselves.
func (m *model) qemu(w world) {
	if w.s.guest == standing {
		m.add("somebody has the guest run here", true,
			func(w *world) { w.s.guest, w.s.stale = runsHere, true })
		m.add("somebody has the guest run here, and pauses it again", true,
			func(w *world) { w.s.stale = true })
	}
	if w.d.told {
		m.add("the manager runs the twin", false, func(w *world) {
			w.d.told = false
			if w.d.ran {
				w.bad = flawOf("the manager runs a guest that its operator paused")
			}
			m.runs(w)
		})
	}
	if w.s.auto && w.s.guest != gone {
		m.add("the source's host boots, and its manager starts the VM", true, func(w *world) {
			m.leaveS(w)
			w.s.phase, w.s.loaded, w.s.heard, w.s.sent = down, false, false, 0
			w.s.guest, w.died, w.s.start = gone, true, started
		})
	}
	if w.s.guest == kept {
		m.add("the daemon of the source's manager dies", true, (*world).dropJob)
	}
	if (w.stands || w.ran) && w.d.twin == copyPaused && w.d.journal.mark() == MarkMayRun &&
		(w.d.phase == running || w.d.phase == completing || w.d.phase == down) {
		m.add("an operator has the guest run there", true, m.runs)
	}
	if w.s.guest != gone && !(w.s.phase == ended && w.here()) {
		m.add("source's QEMU dies", true, func(w *world) { w.s.guest, w.died = gone, true })
	}
	if w.d.twin != copyGone && w.d.twin != copyComplete {
		m.add("the twin dies", true, func(w *world) {
			w.d.twin = copyGone
			w.bereft = w.bereft || w.d.journal.mark() == MarkMayRun
			w.unheard = w.unheard || w.over && w.d.journal.mark() != MarkShutDown
		})
	}
	if w.d.short {
		m.add("the destination has memory again", false, func(w *world) { w.d.short = false })
	} else if w.d.twin == copyRunning && w.d.placed&inUse == 0 {
		m.add("the destination has no memory left", true, func(w *world) { w.d.short = true })
	}
	if w.d.twin == copyRunning {
		m.add("the guest ends itself", true, func(w *world) { w.d.twin, w.over = copyEnded, true })
		m.add("the guest ends itself, and its QEMU at once", true, func(w *world) {
			w.d.twin, w.over, w.unheard = copyGone, true, true
			w.d.ended = w.d.phase != down
			w.bereft = w.bereft || w.d.journal.mark() == MarkMayRun
		})
		m.add("somebody pauses the twin", true, func(w *world) { w.d.twin = copyPaused })
	}
	if w.d.phase == down && w.d.journal != 0 {
		m.add("the destination's journal is lost", true,
			func(w *world) { w.d.journal, w.d.ran, w.forgot = 0, false, true })
	}
}

// dropJob makes the source's manager drop its job: from then on an operator's commands reach QEMU.
func (w *world) dropJob() {
	if w.s.guest == kept {
		w.s.guest = standing
	}
}

// here reports whether the guest is the source's: it runs, or stands as it did before.
func (w *world) here() bool {
	return w.s.guest == runsHere ||
		w.s.guest == standing && w.stands && w.s.phase == ended && (w.aborted || w.resumed)
}

// sClear and dClear are the hosts' answers to the question whether they are clear of the VM.
func (w *world) sClear(m *model, starting bool) bool {
	return m.clear(w.s.journal.mark(), w.s.guest != gone, starting && w.s.start != notStarted)
}

func (w *world) dClear(m *model, starting bool) bool {
	return m.clear(w.d.journal.mark(), w.d.twin != copyGone, starting && w.d.start != notStarted)
}

// afterDeath is what remains of a start when the daemon is killed.
func (s start) afterDeath() start {
	if s == started {
		return started
	}
	return notStarted
}

// starts lets an operator start the VM on a host that is clear of it.
func (m *model) starts(host string, here, there func(*model, bool) bool, of func(*world) *start,
	down, otherDown bool) {
	w := m.from
	set := func(to start) func(*world) { return func(w *world) { *of(w) = to } }
	if *of(&w) == started {
		m.add("the VM that was started at the "+host+" ends", true, set(notStarted))
	}
	if down || !here(m, false) {
		return
	}
	switch *of(&w) {
	case notStarted:
		// Asking the other host takes no time here. One that begins meanwhile asks this host, and
		// hears that.
		if !otherDown && (there(m, true) || m.unasked) {
			m.add("operator starts the VM at the "+host, true, set(taken))
		}
		// What a host that is down would say is unknown. But no QEMU is alive there.
		lives := &model{rules: rules{clear: func(_ Mark, lives, starting bool) bool {
			return !lives && !starting
		}}}
		if otherDown && there(lives, true) {
			m.add("operator asserts that the VM runs nowhere else, and starts it at the "+host,
				true, set(taken))
		}
	case taken:
		m.add("the "+host+" starts the VM", false, set(started))
	}
}

// rare reports whether something has happened that few rules are about.
func (w *world) rare() bool {
	return w.died || w.forgot || w.lied || w.gaveUp || w.s.start != notStarted ||
		w.d.start != notStarted
}

// settled reports whether the eviction has come to an end that docs/protocol.md promises.
func settled(w *world) bool {
	if w.s.phase == down || w.d.phase == down {
		return false
	}
	over := w.s.phase == ended
	there := w.d.twin == copyRunning || w.d.twin == copyComplete
	switch {
	case over && w.here() && w.d.twin == copyGone && (w.d.phase == ended || w.d.phase == idle):
		return true // it runs here
	case over && w.here() && w.forgot && !there:
		return true // the same, but nobody knows about the twin any more
	case over && w.s.guest == gone && w.d.twin == copyComplete &&
		(w.d.phase == ended || w.forgot) && w.whole:
		return true // it runs there
	case w.over && over && w.s.guest == gone &&
		(w.d.twin == copyGone && w.d.phase == ended || w.forgot):
		return true // it was shut down there
	case w.bereft && over && w.s.guest != runsHere && w.d.twin == copyGone:
		return true // lost, and kept here
	case w.died && w.s.guest == gone && (over || w.s.phase == holding) &&
		(w.d.twin == copyGone || w.d.phase == running || w.forgot || w.resumed):
		return true // the source's QEMU died; a twin that runs lacks pages
	case w.forgot && w.s.journal.mark() == MarkMayRun && w.s.phase == asking &&
		w.s.guest != runsHere:
		return true // it stands here until the operator reports what is there
	case w.lied && w.forgot && over && w.here():
		return true // two copies may run, and no journal knows of the other one
	case w.s.start == started || w.d.start == started:
		return true // it was over, and the VM was started anew
	case w.gaveUp:
		return over && w.s.guest == gone
	}
	return false
}

// verdict is the result of trying everything.
type verdict struct {
	states, steps int
	settled       int
	bad           string
	trace         []string
}

// worldIndex finds worlds by their hashes. A map does so, too, with twice as many of the reads that
// no cache has.
type worldIndex struct {
	seed maphash.Seed
	// the number of a world, plus one, and above that the upper half of its hash; 0: none
	slots  []uint64
	hashes []uint64 // of the worlds
	found  uint64   // what fetch read, so that it does read
}

func newWorldIndex() *worldIndex {
	return &worldIndex{seed: maphash.MakeSeed(), slots: make([]uint64, 1<<16)}
}

// fetch hashes the worlds of all edges, and reads what find will read of each: the CPU waits for
// many of these reads at once, and for those of find one by one.
func (x *worldIndex) fetch(edges []edge, worlds []world, hashes []uint64) []uint64 {
	hashes = hashes[:0]
	for i := range edges {
		hashes = append(hashes, maphash.Comparable(x.seed, edges[i].to))
	}
	mask, found := uint64(len(x.slots)-1), uint64(0)
	for _, hash := range hashes {
		found += x.slots[hash&mask]
	}
	for _, hash := range hashes {
		if s := x.slots[hash&mask]; s>>32 == hash>>32 {
			found += uint64(worlds[uint32(s)-1].s.phase)
		}
	}
	x.found += found
	return hashes
}

// find returns the number of a world with a hash, or -1 and the slot to note it in.
func (x *worldIndex) find(w *world, hash uint64, worlds []world) (slot uint64, n int32) {
	mask := uint64(len(x.slots) - 1)
	for slot = hash & mask; x.slots[slot] != 0; slot = (slot + 1) & mask {
		s := x.slots[slot]
		if n := int32(uint32(s)) - 1; s>>32 == hash>>32 && worlds[n] == *w {
			return slot, n
		}
	}
	return slot, -1
}

// note notes the number of a new world, which follows the last one.
func (x *worldIndex) note(slot, hash uint64, n int32) {
	x.slots[slot] = hash>>32<<32 | uint64(n+1)
	x.hashes = append(x.hashes, hash)
	if len(x.hashes) < len(x.slots)/2 {
		return
	}
	x.slots = make([]uint64, 2*len(x.slots))
	mask := uint64(len(x.slots) - 1)
	for n, hash := range x.hashes {
		slot := hash & mask
		for x.slots[slot] != 0 {
			slot = (slot + 1) & mask
		}
		x.slots[slot] = hash>>32<<32 | uint64(n+1)
	}
}

// explore tries everything, breadth first, so that its trace is one of the shortest.
func explore(r rules, limit int) verdict {
	var first world
	first.s.phase, first.d.phase, first.s.guest = idle, idle, runsHere
	first.s.auto = r.managed
	m := &model{rules: r, texts: map[writing]string{}}
	worlds, origins := []world{}, []int32{}
	index := newWorldIndex()
	// number returns a world's number, and whether it is new.
	number := func(w *world, hash uint64, from int32) (n int32, isNew bool) {
		at, n := index.find(w, hash, worlds)
		if n >= 0 {
			return n, false
		}
		n = int32(len(worlds))
		worlds, origins = append(worlds, *w), append(origins, from)
		index.note(at, hash, n)
		return n, true
	}
	number(&first, maphash.Comparable(index.seed, first), -1)
	var v verdict
	trace := func(i int32) (t []string) {
		for ; i > 0; i = origins[i] {
			edges := m.next(worlds[origins[i]])
			t = append(t, edges[slices.IndexFunc(edges,
				func(e edge) bool { return e.to == worlds[i] })].what)
		}
		slices.Reverse(t)
		return t
	}
	type arc struct{ from, to int32 }
	var arcs []arc // those that need no fault
	var hashes []uint64
	for i := int32(0); int(i) < len(worlds); i++ {
		edges := m.next(worlds[i])
		hashes = index.fetch(edges, worlds, hashes)
		for j := range edges {
			e := &edges[j]
			if r.calm && e.to.rare() {
				continue
			}
			v.steps++
			n, isNew := number(&e.to, hashes[j], i)
			if isNew {
				if bad := e.to.bad; bad != 0 {
					v.states, v.bad, v.trace = len(worlds), bad.String(), trace(n)
					return v
				}
				if len(worlds) > limit {
					v.states, v.bad = len(worlds), tooMany
					return v
				}
			}
			if !e.fault && n != i {
				arcs = append(arcs, arc{i, n})
			}
		}
	}
	v.states = len(worlds)
	// From where is an end in reach without another fault?
	start := make([]int32, len(worlds)+1)
	for _, a := range arcs {
		start[a.to+1]++
	}
	for i := range worlds {
		start[i+1] += start[i]
	}
	before, fill := make([]int32, len(arcs)), slices.Clone(start)
	for _, a := range arcs {
		before[fill[a.to]] = a.from
		fill[a.to]++
	}
	ends := make([]bool, len(worlds))
	var todo []int32
	for i := range worlds {
		if settled(&worlds[i]) {
			ends[i] = true
			todo = append(todo, int32(i))
			v.settled++
		}
	}
	for len(todo) > 0 {
		i := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, b := range before[start[i]:start[i+1]] {
			if !ends[b] {
				ends[b] = true
				todo = append(todo, b)
			}
		}
	}
	if i := slices.Index(ends, false); i >= 0 {
		v.bad, v.trace = "it does not end", append(trace(int32(i)), fmt.Sprintf("%+v", worlds[i]))
	}
	return v
}

const (
	modelLimit = 10_000_000 // more states than there are if no rule is broken
	tooMany    = "too many states"
)

func TestModel(t *testing.T) {
	if testing.Short() {
		t.Skip("takes minutes")
	}
	for _, kind := range []struct {
		name   string
		change func(*rules)
	}{
		{"a QEMU of its own", func(*rules) {}},
		{"a QEMU of its own, killed first", func(r *rules) { r.killFirst = true }},
		// A manager's VM is moved only while it runs.
		{"a manager's", func(r *rules) { r.managed, r.restless = true, true }},
	} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			r := realRules()
			kind.change(&r)
			v := explore(r, modelLimit)
			t.Logf("%d states, %d of them ends, %d steps", v.states, v.settled, v.steps)
			if v.bad != "" {
				t.Errorf("%s:\n  %s", v.bad, strings.Join(v.trace, "\n  "))
			}
		})
	}
}

// Every rule is needed: if one is broken, the model finds a bad state.
func TestModelMutants(t *testing.T) {
	if testing.Short() {
		t.Skip("takes minutes")
	}
	sourceAnswers := func(when Answer, then step) func(*rules) {
		return func(r *rules) {
			r.sourceOnAnswer = func(here copyState, heard bool, a Answer) step {
				if a == when {
					return then
				}
				return sourceOnAnswer(here, heard, a)
			}
		}
	}
	sourceSteps := func(mark Mark, here copyState, then step) func(*rules) {
		return func(r *rules) {
			r.sourceStep = func(m Mark, c copyState) step {
				if m == mark && c == here {
					return then
				}
				return sourceStep(m, c)
			}
		}
	}
	destinationSteps := func(mark Mark, twin copyState, then step) func(*rules) {
		return func(r *rules) {
			r.destinationStep = func(m Mark, c copyState) step {
				if m == mark && c == twin {
					return then
				}
				return destinationStep(m, c)
			}
		}
	}
	for _, mutant := range []struct {
		rule, name string
		mutate     func(*rules)
	}{
		{"R1", "cont before the destination's may-run is durable",
			func(r *rules) { r.mayCont = func(m Mark, committed bool) bool { return committed } }},
		{"R1", "cont without a commit",
			func(r *rules) { r.mayCont = func(Mark, bool) bool { return true } }},
		{"R1", "a resume counts as a commit", func(r *rules) { r.believeResume = true }},
		{"R2", "a destination that was not told to commit keeps its twin",
			destinationSteps(MarkAccepted, copyPaused, stepAwait)},
		{"R2", "never ran is said before the twin is killed",
			func(r *rules) { r.tellFirst = true }},
		{"R2", "never ran is said and the twin is not killed", func(r *rules) { r.spare = true }},
		{"R2", "a twin that was to be killed is not, after a restart",
			destinationSteps(MarkNeverRan, copyPaused, stepNone)},
		{"R3", "commit before the source's may-run is durable",
			func(r *rules) { r.mayCommit = func(m Mark, held bool) bool { return held } }},
		{"R3", "commit while QEMU can be told to run the guest", func(r *rules) {
			r.noteFirst = true
			r.mayCommit = func(m Mark, held bool) bool { return m == MarkMayRun }
		}},
		{"R3", "commit although the guest ran since the freeze", func(r *rules) { r.blind = true }},
		{"R3", "commit while only a manager's job keeps others from running the guest",
			func(r *rules) { r.trusting = true }},
		{"R13", "the source's manager starts the VM when its host boots",
			func(r *rules) { r.managed, r.autostarts = true, true }},
		{"R13", "a twin whose manager was told to run it is killed as one that never ran",
			func(r *rules) { r.managed, r.deciding = true, true }},
		{"R4", "a source that sent no commit asks", sourceSteps(MarkBegun, copyPaused, stepAsk)},
		{"R5", "a source that may have sent a commit rolls back",
			sourceSteps(MarkMayRun, copyPaused, stepRollBack)},
		{"R5", "a source whose guest runs after all goes on asking",
			sourceSteps(MarkMayRun, copyRunning, stepAsk)},
		{"R9", "memory is given back before that is durable", func(r *rules) { r.hasty = true }},
		{"R9", "memory is given back that was received and not placed",
			func(r *rules) { r.generous = true }},
		{"R9", "a copy of which memory was given back is resumed",
			func(r *rules) { r.forgetful = true }},
		{"R5", "rolls back when there is no answer", func(r *rules) { r.impatient = true }},
		{"R5", "rolls back on unknown", sourceAnswers(AnswerUnknown, stepRollBack)},
		{"R5", "rolls back on paused", sourceAnswers(AnswerPaused, stepRollBack)},
		{"R5", "rolls back on lost", sourceAnswers(AnswerLost, stepRollBack)},
		{"R5", "rolls back on running", sourceAnswers(AnswerRunning, stepRollBack)},
		{"R5", "retires on running", sourceAnswers(AnswerRunning, stepRetire)},
		{"R5", "retires on lost", sourceAnswers(AnswerLost, stepRetire)},
		{"R5", "does not push on running", sourceAnswers(AnswerRunning, stepAsk)},
		{"R5", "asks on never ran", sourceAnswers(AnswerNeverRan, stepAsk)},
		{"R5", "asks on lost", sourceAnswers(AnswerLost, stepAsk)},
		{"R5", "asks on complete", sourceAnswers(AnswerComplete, stepAsk)},
		{"R5", "a roll-back is not finished after a restart",
			sourceSteps(MarkRolledBack, copyPaused, stepNone)},
		{"R5", "a source is not retired after a restart",
			sourceSteps(MarkCompleted, copyPaused, stepNone)},
		{"R6", "cont after a restart without hearing from the source",
			func(r *rules) { r.eager = true }},
		{"R6", "a twin that ran and stands is killed as one that never ran",
			destinationSteps(MarkMayRun, copyPaused, stepAbandon)},
		{"R6", "a twin that ran, and was paused by its operator, is told to run",
			func(r *rules) { r.meddling = true }},
		{"R6", "a twin that runs is killed after a restart",
			destinationSteps(MarkMayRun, copyRunning, stepLose)},
		{"R6", "a dead twin that may have run counts as one that never ran",
			destinationSteps(MarkMayRun, copyGone, stepAbandon)},
		{"R7", "a source asks on although it may have been told to resume",
			func(r *rules) { r.askOn = true }},
		{"R7", "a destination does not heed that the source was resumed", func(r *rules) {
			r.destinationOnAbort = func(m Mark) step {
				if m == MarkMayRun {
					return stepAwait
				}
				return destinationOnAbort(m)
			}
		}},
		{"R10", "rolls back on shut down", sourceAnswers(AnswerShutDown, stepRollBack)},
		{"R10", "keeps the copy on shut down", sourceAnswers(AnswerShutDown, stepLose)},
		{"R10", "asks on shut down", sourceAnswers(AnswerShutDown, stepAsk)},
		{"R10", "a copy of a guest that was shut down is resumed after a restart",
			sourceSteps(MarkShutDown, copyPaused, stepRollBack)},
		{"R10", "a copy of a guest that was shut down stays after a restart",
			sourceSteps(MarkShutDown, copyPaused, stepNone)},
		{"R10", "an operator may resume a guest that was shut down",
			func(r *rules) { r.deaf = true }},
		{"R10", "the twin is told to quit before the mark is durable",
			func(r *rules) { r.quitFirst = true }},
		{"R10", "a twin that is gone is lost, whatever it said",
			func(r *rules) { r.unheeding = true }},
		{"R10", "a twin that stands shut down is killed as one that failed",
			destinationSteps(MarkMayRun, copyEnded, stepLose)},
		{"R10", "a twin that was to quit does not after a restart",
			destinationSteps(MarkShutDown, copyEnded, stepNone)},
		{"R10", "a guest that was shut down counts as one that never ran", func(r *rules) {
			r.answerOf = func(m Mark, c copyState) Answer {
				if m == MarkShutDown && c == copyGone {
					return AnswerNeverRan
				}
				return answerOf(m, c)
			}
		}},
		{"R7", "resume here needs no assertion", func(r *rules) { r.unasserted = true }},
		{"R7", "a source does not tell that the guest was resumed there",
			func(r *rules) { r.mute = true }},
		{"R7", "a destination that is complete does not heed that the source was resumed",
			func(r *rules) {
				r.destinationOnAbort = func(m Mark) step {
					if m == MarkCompleted {
						return stepNone
					}
					return destinationOnAbort(m)
				}
			}},
		{"R7", "a destination says lost although the twin runs",
			func(r *rules) { r.desert = true }},
		{"R11", "a roll-back runs a guest that stood", func(r *rules) { r.imposing = true }},
		{"R11", "it is not written that the guest stood", func(r *rules) { r.oblivious = true }},
		{"R11", "a twin that its operator may have run counts as one that was not told to run",
			func(r *rules) { r.ignorant = true }},
		{"R12", "a VM is started that an eviction may run elsewhere",
			func(r *rules) { r.unasked = true }},
		{"R12", "a host is clear of a VM that has a QEMU", func(r *rules) {
			r.clear = func(m Mark, _, starting bool) bool { return Clear(m, false, starting) }
		}},
		{"R12", "a host is clear of a VM that it is about to start", func(r *rules) {
			r.clear = func(m Mark, lives, _ bool) bool { return Clear(m, lives, false) }
		}},
		{"R8", "words of an older session are heeded", func(r *rules) { r.lateWords = true }},
		{"R8", "pages sent in an older session count as sent",
			func(r *rules) { r.keepBooks = true }},
		{"R8", "pages that were dropped for want of memory count as received",
			func(r *rules) { r.hoard = true }},
		{"R8", "a destination that was started anew says that it has pages before it looked",
			func(r *rules) { r.guess = true }},
		{"R7", "a destination without memory for pages gives the guest up",
			func(r *rules) { r.faint = true }},
		{"R8", "complete is said when every page was received, though not placed",
			func(r *rules) { r.trustBuffers = true }},
	} {
		t.Run(mutant.rule+" "+mutant.name, func(t *testing.T) {
			t.Parallel()
			r := realRules()
			r.restless = mutant.rule != "R11"
			mutant.mutate(&r)
			// What is found among fewer worlds is true of all.
			r.calm = true
			v := explore(r, modelLimit)
			if v.bad == "" {
				r.calm = false
				v = explore(r, modelLimit)
			}
			if v.bad == "" || v.bad == tooMany {
				t.Fatalf("%d states, and nothing bad was found: %s", v.states, v.bad)
			}
			t.Logf("%s (%d states):\n  %s", v.bad, v.states, strings.Join(v.trace, "\n  "))
		})
	}
}
