package evict

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/sys/room"
)

// memoryOf is the memory of a QEMU that takes a VM, as if none of it were there, and the limits
// that bound it on this host. Limits that cannot be found out are left out, and told as an error
// beside the others.
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

// hasRoom makes sure that this host can hold the VM's memory, beside what others that are coming
// will take: when a page finds no room after the commit, the VM has to wait. What fits is promised
// to it, in place of what was before.
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
		e.Log.Warn("some of what bounds the VM's memory here cannot be found out", "error", err)
	}
	e.promised.Release()
	if e.promised, err = e.Room.Take(e.process, limits, memory); err != nil {
		return fmt.Errorf("no room for the VM: %w", err)
	}
	return nil
}

// tight says which limit on the VM's memory has nothing left; "" if none.
func (e *destination) tight() string {
	memory, limits, _ := memoryOf(e.mem)
	return room.Tight(limits, memory)
}

// gate keeps pages back while this host, or a control group of the QEMU, has so little memory left
// that the kernel's OOM killer might end the QEMU over the next.
type gate struct {
	look func() (left uint64, why string) // room.Deadly of the QEMU's limits
	rest func() uint64                    // what the VM still lacks, in bytes

	mu   sync.Mutex
	left uint64    // bytes that may be placed until limits are looked at anew; guarded by mu
	next time.Time // when they are in any case; guarded by mu
	shut string    // why nothing may be placed; "" if it may; guarded by mu
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

// reopen is how much there must be before pages are placed again, lest every few bytes that become
// free begin and end a wait. It is enough that all that the VM lacks fits: that ends the wait for
// good.
const reopen = 8 << 20

// lookAgain is how long what limits leave is believed.
const lookAgain = 200 * time.Millisecond

// pass asks whether so many bytes may be placed. What the guest waits for may as soon as it fits.
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
			left = 0 // for others
		}
		// Others use memory, too.
		g.left, g.next = max(n, left/4), now.Add(lookAgain)
	}
	g.left -= n
	return nil
}
