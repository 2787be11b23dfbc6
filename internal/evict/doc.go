// Package evict moves one running VM from this host to another, by post-copy: the VM runs at the
// destination first, and its memory follows. docs/concepts.md explains the terms.
//
// An eviction has an engine at each end. A [Source] moves a VM away: it freezes the VM, sends its
// devices, commits, and then sends the memory. A [Destination] receives it in the twin, a QEMU that
// waits for a VM. The engines talk by sessions of package link. Both QEMUs obey their operator
// (field QMP) or libvirt (field Libvirt); owner.go has the two ports.
//
// # Use
//
// The destination's host listens, and passes what its peers want to Receive:
//
//	sessions := link.NewListener(listener, link.ListenOptions{TurnedAway: turnedAway})
//	defer sessions.Close()
//	requests, stop := evict.Requests(ctx, sessions.Accept, turnedAway, stopped)
//	defer stop()
//	d := evict.Destination{QMP: "/run/twin.qmp"} // QEMU with -S -incoming defer
//	received, err := d.Receive(ctx, requests)
//
// The source's host calls Evict:
//
//	s := evict.Source{
//		QMP:     "/run/web1.qmp",
//		Connect: link.Dialer{Addr: "hostb:7601"}.Session,
//		Show:    func(p evict.Progress) { log.Print(p.State, p.Pages, p.Total) },
//	}
//	report, err := s.Evict(ctx)
//
// An error is an [*Error]: it wraps [ErrRefused], [ErrAborted], [ErrLost] or [ErrLeft], and its
// Remedy says what to do. Cancelling ctx aborts the eviction until the commit. After the commit
// only a cause of [ErrLeave] ends an engine early. The eviction then stays as it is, and Resume
// continues it.
//
// A daemon uses Requests for all VMs at once, and gives each request to the eviction that it names.
// [Request.Refuse], [Request.Answer] and [Request.Tell] end a request that no engine takes.
//
// # States
//
// Each engine is in one [State] at a time. The source's states:
//
//	preparing ─► switching ─► loading ─► committing ─► pushing ◄──► reconnecting
//	    │            │           │         │    │         │  │           │
//	    ▼            └─────┬─────┘         │    ▼         │  └─► lost ◄──┤
//	 refused               ▼               │ in doubt ────┤        ▲     │
//	                 rolling back ◄────────┴────┤         ▼        │     │
//	                       │   it never ran     └──────► retiring ◄┼─────┘
//	                       ▼   there                      │        │
//	                    aborted                           ▼        └── in doubt, rolling back
//	                                                  completed, shut down
//
// and the destination's:
//
//	waiting ─► arming ─► loading ─► prepared ─► running ◄─► cut off
//	   │          │         │          │         │    │        │
//	   ▼          └─────────┴────┬─────┴─────────┤    ▼        ▼
//	refused                      ▼       QEMU    │   completing ─► completed
//	                          aborted  refuses ──┘        │
//	                                   to run it          └─► lost, shut down ◄─ running, cut off
//
// The guest runs on the source up to switching and after aborted. It runs on the destination from
// running on. In between it is frozen. An engine that resumes an eviction begins in rolling back or
// in doubt at the source, and in cut off at the destination. docs/architecture.md says what happens
// in each state.
//
// # Rules
//
// The rules in docs/protocol.md keep a VM from running twice, and its last copy from being lost.
// The functions in decide.go decide by them, for the engines and for the model in model_test.go.
// Each side notes in its journal how far it is: its [Mark].
//
//	R1   run there     the twin runs only after this session's commit, and its own durable may-run
//	R2   accepted      without may-run, a destination that fails kills its twin: it never ran
//	R3   commit        the source commits once QEMU is stopped, and its own may-run is durable
//	R4   begun         without may-run, a source that fails rolls back, and asks nobody
//	R5   may-run       with it, a source asks, and rolls back only if the twin never ran
//	R6   paused twin   a twin that never ran awaits the commit again; one that ran is left alone
//	R7   operator      resuming a frozen VM needs a dead twin, and discarding it an accepted loss
//	R8   sessions      only the present session counts, and of pages only those that are placed
//	R9   give back     memory is freed early only if placed; a copy with gaps never runs again
//	R10  shut down     a guest that ended itself at the destination never runs at the source again
//	R11  standing      no engine runs a VM that stood when it was frozen
//	R12  start         a daemon starts a VM anew only if all hosts are clear of it (Clear, Absent)
//
// # When an engine dies
//
// With a [Journal], another engine continues the eviction by [Source.Resume] or
// [Destination.Resume]. At the source two things survive: the VM's QEMU, whose process is stopped
// from before the commit on, and the journal, with the head, the device state and the facts of that
// QEMU. At the destination the twin survives, which runs on, and the journal says which process it
// is. Its page tables say which pages are placed.
//
// Sessions do not survive, nor do pages on their way: those go again. The next source looks at the
// guest's pages once more, unless some were given back. A twin of libvirt does not survive the
// engine of its destination, as its stream ends (docs/libvirt.md).
//
// Without a Journal the death of a source leaves the VM frozen, and the death of a destination
// costs the VM. Either way, a lost link only delays it.
//
// # Goroutines
//
// Evict, Receive and both Resume run in the caller's goroutine, and end all goroutines that they
// start. They call Show from several goroutines, but only from one at a time:
//
//   - from the caller's, when the engine enters a state
//   - from one of their own, every 100 ms: a source's
//   - from the caller's, every 500 ms while the VM runs: a destination's
//   - from one that serves a session or places pages, when memory at the destination runs out or is
//     there again
//
// The engine waits for Show. So Show must return soon, and must not wait for the engine.
package evict
