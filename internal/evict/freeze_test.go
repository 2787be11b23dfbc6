package evict

import (
	"context"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

// Freeze brings the VM behind a QMP socket to the point where an eviction would commit, and leaves
// it there. A source that has lost its destination does the same.
func Freeze(ctx context.Context, socket string) (head, load []byte, facts hostFacts, err error) {
	q, err := qmp.Dial(ctx, socket)
	if err != nil {
		return nil, nil, facts, err
	}
	defer q.Close()
	mem, err := guestmem.Attach(ctx, q)
	if err != nil {
		return nil, nil, facts, err
	}
	defer mem.Close()
	o, err := describe(ctx, q)
	if err != nil {
		return nil, nil, facts, err
	}
	head, _, err = makeHead(o.Machine, ramSection, mem.Blocks())
	if err != nil {
		return nil, nil, facts, err
	}
	f, err := newFreezer(ctx, q, mem)
	if err != nil {
		return nil, nil, facts, err
	}
	defer f.close()
	s, err := f.freeze(ctx, true)
	if err != nil {
		return nil, nil, facts, err
	}
	facts.Blocks = mem.Blocks()
	if facts.Process, err = process.Find(mem.PID()); err != nil {
		return nil, nil, facts, err
	}
	return head, s.load, facts, f.hold(ctx, facts.Process)
}
