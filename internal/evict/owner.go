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

// The engines share all that an eviction is: the wire, the order, the pages, the marks. What
// differs between VMs is who owns their QEMU, since QEMU obeys its owner: the operator who started
// it, at its QMP socket, or a manager. Each side asks the owner for little, and that is its port.
//
// An owner decides nothing. The engine asks it to freeze, to resume or to discard when the rules
// allow that (docs/protocol.md). Nor does the engine trust it: what keeps a frozen guest from
// running is that its process is stopped, which needs nobody's cooperation.

// sourceOwner is who owns the VM's QEMU at the source. Its methods are called one at a time, but
// for monitor and gone.
type sourceOwner interface {
	// open takes hold of the VM's QEMU. It may be called again until it succeeds. It fails with
	// errAnother for a QEMU that is not the eviction's, with an error for which notThere holds if
	// there is none, and with one for which notYet holds if it cannot be asked at the moment.
	open(ctx context.Context) error
	// monitor answers questions about the VM. It is nil before open, and safe for concurrent use.
	monitor() *qmp.Client
	// gone is closed when the VM must have ended, as QEMU closed its monitor; nil if that cannot be
	// told so.
	gone() <-chan struct{}
	// describe makes sure that the VM can be evicted, without touching it, and describes it.
	describe(ctx context.Context) (described, error)
	// arm gets ready to freeze the VM. Its guest does not notice.
	arm(ctx context.Context, mem *guestmem.Memory) error
	// freeze pauses a VM that ran, and has QEMU save its devices; see freezer.freeze.
	freeze(ctx context.Context, ran bool) (saved, error)
	// hold stops the process of the frozen VM, and makes sure that its guest did not run since its
	// devices were saved.
	hold(ctx context.Context, qemu process.Process) error
	// disarm undoes arm, if that was done. QEMU does by itself when its last monitor is closed.
	disarm(ctx context.Context) error
	// catch finds out what a VM does whose engine died. With stop, it stops the process of one that
	// stands, and makes sure that the guest did not run in between.
	catch(ctx context.Context, qemu process.Process, stop bool) (copyState, error)
	// resume has a VM run that ran before it was frozen. Another one gets its disks back, and
	// stands as it did. It returns what the VM does then. Its process is not stopped any more.
	resume(ctx context.Context, ran bool, stood string) (qmp.Status, error)
	// discard ends the QEMU, as nobody needs it any more. Its process is stopped.
	discard(ctx context.Context, qemu process.Process) error
	// byHand says what an operator types to resume the frozen VM where no journal is kept.
	byHand(qemu process.Process) string
	close()
}

// described is what the source's owner says of a VM that may be evicted.
type described struct {
	offer  offer // but for its memory and disks
	status qmp.Status
	mem    *guestmem.Memory
	disks  fit.Disks
	flash  []string // blocks that QEMU reads when it is told to run the VM
}

// errNotOpen is the error of a QEMU of which nobody took hold yet.
var errNotOpen = errors.New("nobody has asked the VM's QEMU anything yet")

// notYet reports whether an error of reaching a QEMU says that it may answer in a moment.
func notYet(err error) bool { return errors.Is(err, qmp.ErrBusy) || errors.Is(err, qmp.ErrStopped) }

// twinOwner is who owns the QEMU that takes the VM at the destination, the twin. Its methods are
// called one at a time, but for run, over and lastWords.
type twinOwner interface {
	// look makes sure that this host waits for a VM, and touches nothing.
	look(ctx context.Context) error
	// ready gets the QEMU that was found ready to take a VM. letGo undoes it.
	ready(ctx context.Context) error
	// twin is the QEMU, and its memory: from look on where it waits for an offer, else from accept
	// on. Its memory is nil before.
	twin() twinQEMU
	// accept makes sure that the offered VM fits. decline undoes what it did, and closes what
	// connect returned.
	accept(ctx context.Context, o offer) error
	decline(ctx context.Context)
	// connect gives the twin its stream and returns the other end. begin has it read.
	connect(ctx context.Context) (net.Conn, error)
	begin(ctx context.Context) error
	// loaded reports whether the twin has all devices, and stands still.
	loaded(ctx context.Context) (bool, error)
	// run has the twin run the VM. It may take long, as the owner may wait for a page. An error
	// that wraps errNotRun says that the twin never ran, nor will when it is killed.
	run(ctx context.Context) error
	// announce has the network learn where the VM is.
	announce(ctx context.Context)
	// over tells why the guest ended itself, if it did and the twin stands still with it.
	over() <-chan string
	// lastWords is what was said of the twin's end, when all was heard: why the guest ended itself,
	// empty if it did not; and why else the twin ended.
	lastWords() (guest, host string)
	// reason is why the twin's migration failed, as far as it says so. The error wraps
	// qmp.ErrClosed if it does not answer any more.
	reason(ctx context.Context) (string, error)
	// open takes hold anew of a twin whose engine died, or that lost its monitor.
	open(ctx context.Context) error
	// renew gives a twin whose stream broke a new one, with what it is to read first.
	renew(ctx context.Context, hello []byte) (renewed, error)
	// letGo gives the twin its own settings back, and has it end if its guest ended itself. over
	// says that its migration is.
	letGo(life context.Context, over bool)
	// quit has the twin end whose guest ended itself.
	quit(ctx context.Context) error
	// kill ends the twin, and returns when it is gone.
	kill(ctx context.Context) error
	// record adds to what another engine needs to know, and recall is told it.
	record(t *twin)
	recall(t twin) error
	close()
}

// twinQEMU is the QEMU that is to take a VM.
type twinQEMU struct {
	process process.Process
	mem     *guestmem.Memory
	here    offer // what it was started as
}

// renewed is a twin whose stream broke, found anew.
type renewed struct {
	conn    net.Conn
	pending bool   // it was not told to run the VM yet
	over    string // why the guest ended itself, if it did; there is no stream then
}

// errNotRun is wrapped by the error of a twin that was to run, and did not.
var errNotRun = errors.New("the VM was not run")
