package evict

import (
	"context"
	"errors"
	"net"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

// The engines share everything about an eviction: the wire, the order, the pages, the marks. VMs
// differ in who owns their QEMU. That is the operator who started it and who reaches its QMP
// socket, or a manager. Each side asks the owner for little, by the interfaces below.
//
// An owner decides nothing. The engine asks it to freeze, to resume or to discard when the rules
// allow that (docs/protocol.md). The engine does not trust it either: a frozen guest cannot run
// because its process is stopped, which needs nobody's cooperation. The exception is libvirt where
// it moves a domain by itself: see Carried.

// sourceOwner owns the VM's QEMU at the source. Only one of its methods runs at a time, except
// monitor and ended.
type sourceOwner interface {
	// open connects to the VM's QEMU. It may be called again until it succeeds. It fails with
	// errAnother for a QEMU that is not the eviction's. notThere holds for its error if there is no
	// QEMU, and notYet if the QEMU cannot answer at the moment.
	open(ctx context.Context) error
	// monitor answers questions about the VM. It is nil before open, and safe for concurrent use.
	monitor() *qmp.Client
	// ended waits until the owner shows that the eviction cannot go on, and returns why: QEMU has
	// closed its monitor, or a manager has given up. It returns nil when ctx ends.
	ended(ctx context.Context) error
	// describe makes sure that the VM can be evicted, without touching it, and describes it.
	describe(ctx context.Context) (described, error)
	// arm gets ready to freeze the VM. The guest does not notice.
	arm(ctx context.Context, mem *guestmem.Memory) error
	// freeze pauses a VM that ran, and makes QEMU save its devices; see freezer.freeze.
	freeze(ctx context.Context, ran bool) (saved, error)
	// hold stops the process of the frozen VM. It makes sure that the guest did not run since its
	// devices were saved.
	hold(ctx context.Context, qemu process.Process) error
	// disarm undoes arm, if it was called. QEMU does so by itself when its last monitor is closed.
	disarm(ctx context.Context) error
	// catch finds out what a VM does after its engine died. With stop, it stops the process of one
	// that stands, and makes sure that the guest did not run in between.
	catch(ctx context.Context, qemu process.Process, stop bool) (copyState, error)
	// resume runs a VM that ran before it was frozen. Another one gets its disks back, and stands
	// as it did. resume returns what the VM does then. The caller has let the process continue.
	resume(ctx context.Context, ran bool, stood string) (qmp.Status, error)
	// release gives a VM that stays here back to its owner, as it was. resume does that, too.
	release(ctx context.Context) error
	// discard ends the QEMU, which nobody needs any more. Its process is stopped, or has ended. The
	// owner must not start the VM any more.
	discard(ctx context.Context, qemu process.Process) error
	// byHand says what an operator types to resume the frozen VM without a journal.
	byHand(qemu process.Process) string
	// ownRemedy says what an operator does after a failure if the owner decides what becomes of the
	// VM. Else it is empty: the engine knows.
	ownRemedy() string
	close()
}

// described is what the source's owner knows of a VM that may be evicted.
type described struct {
	offer  offer // except its memory and disks
	status qmp.Status
	mem    *guestmem.Memory
	disks  fit.Disks
	flash  []string // blocks that QEMU reads when it is told to run the VM
	// the number of the RAM section, if QEMU's own stream may follow that of the engine
	section uint32
}

// errNotOpen is the error for a QEMU to which no engine has connected yet.
var errNotOpen = errors.New("the engine has not connected to the VM's QEMU yet")

// notYet reports whether an error says that a QEMU may answer in a moment.
func notYet(err error) bool { return errors.Is(err, qmp.ErrBusy) || errors.Is(err, qmp.ErrStopped) }

// twinOwner owns the QEMU that takes the VM at the destination, the twin. Only one of its methods
// runs at a time, except run, over and lastWords.
type twinOwner interface {
	// look makes sure that this host waits for a VM. It touches nothing.
	look(ctx context.Context) error
	// ready prepares the QEMU for a VM. letGo undoes it.
	ready(ctx context.Context) error
	// twin returns the QEMU and its memory. They are known after look if the QEMU waits for an
	// offer, else after accept. Before that the memory is nil.
	twin() twinQEMU
	// accept makes sure that the offered VM fits. decline undoes accept, and closes the connection
	// that connect returned.
	accept(ctx context.Context, o offer) error
	decline(ctx context.Context)
	// connect gives the twin its stream and returns the other end. begin makes the twin read it.
	connect(ctx context.Context) (net.Conn, error)
	begin(ctx context.Context) error
	// loaded reports whether the twin has all devices, and stands still.
	loaded(ctx context.Context) (bool, error)
	// run makes the twin run the VM. It may take long, as the owner may wait for a page. An error
	// that wraps errNotRun says that the twin never ran, and never will if it is killed.
	run(ctx context.Context) error
	// announce tells the network where the VM is.
	announce(ctx context.Context)
	// over gets the reason if the guest ended itself and the twin is paused with it.
	over() <-chan string
	// lastWords returns why the guest ended itself, empty if it did not, and why else the twin
	// ended. It waits until all was heard.
	lastWords() (guest, host string)
	// reason returns why the twin's migration failed, if the twin says so. The error wraps
	// qmp.ErrClosed if the twin does not answer any more.
	reason(ctx context.Context) (string, error)
	// open connects anew to a twin whose engine died, or that lost its monitor.
	open(ctx context.Context) error
	// renew gives a twin whose stream broke a new one. The twin reads hello first.
	renew(ctx context.Context, hello []byte) (renewed, error)
	// letGo gives the twin its own settings back, and ends it if its guest ended itself. over says
	// that the twin's migration is over.
	letGo(life context.Context, over bool)
	// quit ends a twin whose guest ended itself.
	quit(ctx context.Context) error
	// kill ends the twin, and returns when it has ended.
	kill(ctx context.Context) error
	// ownRemedy is that of sourceOwner.
	ownRemedy() string
	// record adds what another engine needs to know. That engine passes it to recall.
	record(t *twin)
	recall(t twin) error
	close()
}

// twinQEMU is the QEMU that takes a VM.
type twinQEMU struct {
	process process.Process
	mem     *guestmem.Memory
	here    offer // the machine that it was started as
}

// renewed is a twin with a new stream.
type renewed struct {
	conn    net.Conn
	same    bool   // it is the one of before: QEMU did not lose it, and repeats nothing
	pending bool   // the twin was not told to run the VM yet
	over    string // why the guest ended itself, if it did; there is no stream then
}

// errNotRun is wrapped by the error for a twin that should have run, and did not.
var errNotRun = errors.New("the VM was not run")
