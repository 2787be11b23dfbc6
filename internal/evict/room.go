package evict

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/sys/room"
)

// memoryOf returns the memory of a QEMU that takes a VM, as if none of it were there. It also
// returns the limits that bound it on this host. It leaves out limits that it cannot read, and
// returns an error beside the others.
func memoryOf(mem *guestmem.Memory) (memory []room.Memory, limits []room.Limit, err error) {
	limits, err = room.Limits(mem.PID())
	errs := []error{err}
	reserved, err := mem.Reserved()
	if err != nil {
		errs = append(errs, err)
		reserved = make([]bool, len(mem.Blocks()))
	}
	for i, b := range mem.Blocks() {
		m := room.Memory{Page: b.PageSize, Size: b.Size, Spare: reserved[i]}
		if f := mem.File(i); f != nil {
			l, ok, err := room.FileSystem(f, b.PageSize)
			if ok {
				m.Device = l.Device
				limits = append(limits, l)
			}
			errs = append(errs, err)
		}
		memory = append(memory, m)
	}
	return append(memory, room.ToMap), limits, errors.Join(errs...)
}

// hasRoom makes sure that this host can hold the VM's memory, beside what other VMs on their way
// will take. If a page finds no room after the commit, the VM must wait. hasRoom reserves the
// memory, in place of an earlier reservation.
func (e *destination) hasRoom() error {
	memory, limits, err := memoryOf(e.mem)
	errs := []error{err}
	for i, b := range e.mem.Blocks() {
		if b.Located {
			memory[i].Has, err = e.mem.Held(i)
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		e.Log.Warn("cannot read some of the limits on the VM's memory here", "error", err)
	}
	e.supply.promised.Release()
	if e.supply.promised, err = e.Room.Take(e.process, limits, memory); err != nil {
		return fmt.Errorf("no room for the VM: %w", err)
	}
	return nil
}

// tight says which limit on the VM's memory has nothing left; "" if none.
func (e *destination) tight() string {
	memory, limits, _ := memoryOf(e.mem)
	return room.Tight(limits, memory)
}

// gate holds pages back while this host, or a control group of the QEMU, is nearly out of memory.
// Otherwise the kernel's OOM killer might end the QEMU over the next page.
type gate struct {
	look func() (left uint64, why string) // room.Deadly for the QEMU's limits
	rest func() uint64                    // what the VM still lacks, in bytes

	mu   sync.Mutex
	left uint64    // bytes that may be placed before the next look at the limits; guarded by mu
	next time.Time // when the next look is due in any case; guarded by mu
	shut string    // why nothing may be placed; "" if pages may be placed; guarded by mu
}

func (e *destination) newGate() *gate {
	return &gate{
		look: func() (uint64, string) {
			limits, _ := room.Limits(e.mem.PID())
			return room.Deadly(limits)
		},
		rest: e.pages.lack,
	}
}

// reopen is how many bytes must be free before pages are placed again. Without it, every few bytes
// that become free would begin and end a wait. Less is enough if all that the VM lacks fits: that
// ends the wait for good.
const reopen = 8 << 20

// lookAgain is how long a look at the limits stays valid.
const lookAgain = 200 * time.Millisecond

// pass returns an error if n bytes may not be placed now. What the guest waits for may be placed as
// soon as it fits.
func (g *gate) pass(n uint64, urgent bool) error {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if now := time.Now(); n > g.left || now.After(g.next) {
		left, why := g.look()
		if g.left = 0; why != "" || left >= min(reopen, g.rest()) {
			g.shut = why
		}
		if g.shut != "" {
			if !urgent || n > left {
				return fmt.Errorf("%w: %w: %s", errQEMU, errNoMemory, g.shut)
			}
			left = 0 // nothing for other pages
		}
		// Others use memory, too.
		g.left, g.next = max(n, left/4), now.Add(lookAgain)
	}
	g.left -= n
	return nil
}
