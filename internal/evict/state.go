package evict

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// State is where an eviction stands, on one side. The package comment shows both state machines.
type State string

// The states.
const (
	Preparing  State = "preparing"  // source: checks, connection, offer; the VM is untouched
	Waiting    State = "waiting"    // destination: for an offer; the VM's QEMU is untouched
	Arming     State = "arming"     // destination: QEMU takes the head of the stream
	Switching  State = "switching"  // source: QEMU freezes the guest and saves its devices
	Loading    State = "loading"    // the destination's QEMU loads the devices
	Prepared   State = "prepared"   // destination: loaded and paused, waits for the commit
	Committing State = "committing" // source: the destination was told to run the VM
	Running    State = "running"    // destination: the VM runs, pages arrive
	Pushing    State = "pushing"    // source: the VM runs on the destination, pages leave
	// destination: all pages are placed, QEMU ends its migration
	Completing State = "completing"
	// source: the commit was sent, and its result is not known; the guest stays frozen
	InDoubt State = "in doubt"
	// source: the link is lost; the VM runs on the destination until it needs a missing page
	Reconnecting State = "reconnecting"
	// destination: the source is not connected; the VM runs until it needs a missing page
	CutOff State = "cut off"
	// source: the destination has every page, and the source's QEMU is being killed
	Retiring    State = "retiring"
	RollingBack State = "rolling back" // source: the guest is being resumed where it was
	Refused     State = "refused"
	Aborted     State = "aborted"
	Completed   State = "completed"
	// the guest ended itself on the destination before all of its memory was there
	ShutDown State = "shut down"
	Lost     State = "lost contact"
)

// next lists the states that may follow a state. A state that is not in it is final.
var next = map[State][]State{
	Preparing:    {Switching, Refused},
	Waiting:      {Arming, Refused},
	Arming:       {Loading, Aborted},
	Switching:    {Loading, RollingBack},
	Loading:      {Committing, Prepared, RollingBack, Aborted},
	Prepared:     {Running, Aborted, Lost},
	Committing:   {Pushing, InDoubt, RollingBack, Lost},
	InDoubt:      {Pushing, Retiring, RollingBack, Lost},
	Reconnecting: {Pushing, Retiring, Lost},
	Running:      {CutOff, Completing, ShutDown, Aborted, Lost},
	CutOff:       {Running, Completing, ShutDown, Aborted, Lost},
	Pushing:      {Reconnecting, Retiring, Lost},
	Completing:   {Completed, ShutDown, Lost},
	Retiring:     {Completed, ShutDown},
	RollingBack:  {Aborted, Lost},
}

// SourceStates returns the states that a source can be in.
func SourceStates() []State { return reach([]State{Preparing}, Prepared) }

// DestinationStates returns the states that a destination can be in.
func DestinationStates() []State { return reach([]State{Waiting}, Committing, RollingBack) }

// reach adds all states that may follow those in a list, except some states of the other side.
func reach(list []State, but ...State) []State {
	for i := 0; i < len(list); i++ {
		for _, s := range next[list[i]] {
			if !slices.Contains(list, s) && !slices.Contains(but, s) {
				list = append(list, s)
			}
		}
	}
	return list
}

// machine is the state of one side and its history. It is safe for concurrent use. It calls onEnter
// for every state but the first.
type machine struct {
	onEnter func(State)

	mu      sync.Mutex
	start   time.Time               // of the first period
	history []period                // in order, the present one last; guarded by mu
	first   map[State]time.Time     // when each state was entered first; guarded by mu
	past    map[State]time.Duration // spent in each state before the present period; guarded by mu
}

// period is a time in one state.
type period struct {
	state    State
	at, left time.Time // left is zero for the present one
}

// maxHistory bounds how many periods are kept: a link may be lost any number of times.
const maxHistory = 256

func newMachine(first State, onEnter func(State)) *machine {
	now := time.Now()
	return &machine{
		onEnter: onEnter, start: now, history: []period{{state: first, at: now}},
		first: map[State]time.Time{first: now}, past: map[State]time.Duration{},
	}
}

// enter moves to a state. It returns an error for a move that the diagram does not have, which is a
// bug, and does not make it.
func (m *machine) enter(s State) error {
	m.mu.Lock()
	now, present := time.Now(), &m.history[len(m.history)-1]
	if !slices.Contains(next[present.state], s) {
		defer m.mu.Unlock()
		return fmt.Errorf("bug: an eviction cannot go from %s to %s", present.state, s)
	}
	present.left = now
	m.past[present.state] += now.Sub(present.at)
	if len(m.history) == maxHistory { // the beginning and the end say the most
		m.history = slices.Delete(m.history, maxHistory/2, maxHistory/2+1)
	}
	m.history = append(m.history, period{state: s, at: now})
	if _, ok := m.first[s]; !ok {
		m.first[s] = now
	}
	m.mu.Unlock()
	m.onEnter(s)
	return nil
}

func (m *machine) current() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.history[len(m.history)-1].state
}

// at returns when a state was first entered; zero if it was not.
func (m *machine) at(s State) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.first[s]
}

// lasted returns how long the machine has been in its state.
func (m *machine) lasted() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Since(m.history[len(m.history)-1].at)
}

// spent returns how long the machine was in a state, over all periods.
func (m *machine) spent(s State) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	sum := m.past[s]
	if p := m.history[len(m.history)-1]; p.state == s {
		sum += time.Since(p.at)
	}
	return sum
}

// phases returns the history in order of time.
func (m *machine) phases() []Phase {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]Phase, len(m.history))
	for i, p := range m.history {
		list[i] = Phase{State: p.state, At: p.at.Sub(m.start).Seconds()}
		if !p.left.IsZero() {
			list[i].For = p.left.Sub(p.at).Seconds()
		}
	}
	return list
}

// An eviction that did not complete ends in an *Error, which wraps one of these.
var (
	// ErrRefused: nothing was touched; the VM runs on the source as before.
	ErrRefused = errors.New("refused")
	// ErrAborted: the VM runs on the source, after a moment's pause at worst.
	ErrAborted = errors.New("aborted")
	// ErrLost: the VM runs, or may run, on the destination without all of its memory, or is frozen
	// on the source. The message says what is known and what to do.
	ErrLost = errors.New("lost contact")
	// ErrLeft: the engine left the eviction as it is, so that another can continue it
	// (Source.Resume, Destination.Resume).
	ErrLeft = errors.New("left")
)

// ErrLeave is the cause with which to cancel an engine's context to make it leave. If the eviction
// can no longer be aborted, the engine ends with ErrLeft and touches nothing.
var ErrLeave = errors.New("the engine was told to leave")

// untilLeft returns a context that ends when the engine of ctx is told to leave. Nothing else ends
// it before the returned function is called.
func untilLeft(ctx context.Context) (context.Context, func()) {
	left, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		if errors.Is(context.Cause(ctx), ErrLeave) {
			cancel(ErrLeave)
		}
	})
	return left, func() {
		stop()
		cancel(nil)
	}
}

// ErrAbort must be wrapped by the cause with which a caller cancels an engine's context to abort.
var ErrAbort = errors.New("it was told to abort")

// Error is why an eviction did not complete.
type Error struct {
	Outcome error // ErrRefused, ErrAborted or ErrLost
	State   State // where it was when it failed
	Err     error
	// Remedy says what is known of the VM and what to do, in sentences.
	Remedy string
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%v while %s: %v", e.Outcome, e.State, e.Err)
	if e.Remedy != "" {
		s = strings.TrimRight(s, ".?") + ". " + e.Remedy
	}
	return s
}

// Unwrap lets errors.Is find the outcome and the cause.
func (e *Error) Unwrap() []error { return []error{e.Outcome, e.Err} }
