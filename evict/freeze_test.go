package evict

import (
	"context"
	"errors"

	"vacate/guestmem"
	"vacate/qmp"
)

// Captured is what an eviction knows of a VM that it has frozen.
type Captured struct {
	Head, Load []byte
	Streamed   map[string][]byte
}

// Freeze takes the VM behind a QMP socket to where an eviction would commit, and leaves it
// there, as a source does that has lost its destination.
func Freeze(ctx context.Context, socket string) (f Captured, err error) {
	q, err := qmp.Dial(ctx, socket)
	if err != nil {
		return f, err
	}
	defer q.Close()
	mem, err := guestmem.Attach(ctx, q)
	if err != nil {
		return f, err
	}
	defer mem.Close()
	before, err := settingsOf(ctx, q)
	if err != nil {
		return f, err
	}
	want, _ := before.plan(captureParameters(mem))
	if err := want.apply(ctx, q); err != nil {
		return f, err
	}
	conn, err := socketTo(ctx, q, sourceFD, 0)
	if err != nil {
		return f, err
	}
	defer conn.Close()
	c, err := startCapture(ctx, q, conn)
	if err != nil {
		return f, err
	}
	if err := errors.Join(c.readHead(ctx), c.readPackage(ctx)); err != nil {
		return f, err
	}
	frozen, err := newFrozen(mem, c.layout)
	if err != nil {
		return f, err
	}
	streamed, err := c.blocks(ctx, frozen.unlocated())
	if err != nil {
		return f, err
	}
	f = Captured{c.head, c.load, map[string][]byte{}}
	for i, data := range streamed {
		f.Streamed[c.layout[i].Name] = data
	}
	return f, c.settle(ctx, q)
}
