package churn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"vacate/internal/qemu/guestmem"
	"vacate/lab"
)

// ports is what the guest says on one VM after the other, as one stream: a message may
// begin on one and end on the next.
type ports struct {
	now  net.Conn
	next <-chan net.Conn
}

func (p *ports) Read(b []byte) (int, error) {
	for {
		n, err := p.now.Read(b)
		if n > 0 || err == nil {
			return n, nil
		}
		p.now.Close()
		next, ok := <-p.next
		if !ok {
			return 0, io.EOF
		}
		p.now = next
	}
}

// Move moves a guest that is Movable to a new VM on a host. It calls evict, which must move the
// guest from vm to its twin and end the VM that it has left. The guest runs on, and has said so,
// when Move returns. If evict fails the twin is killed. To be surveyed the guest must be attached
// again.
func (g *Guest) Move(ctx context.Context, to *lab.Host, evict func(ctx context.Context,
	vm, twin *lab.VM) error) (err error) {
	if !g.Config.Movable {
		return errors.New("move churn guest: it is not movable")
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("move churn guest from %s to host %s: %w", g.vm.Name, to.Name, err)
		}
	}()
	vm := g.vm
	// Both VMs listen for a client of the guest's port.
	port := fmt.Sprintf("%sport-%d", g.files, runs.Add(1))
	vm.Spec.Extra = g.devices(port)
	twin, err := to.Incoming(ctx, vm, lab.IncomingOptions{})
	if err != nil {
		return err
	}
	client, conn, err := connect(ctx, twin, port)
	if err != nil {
		twin.Kill()
		return err
	}
	events := client.Subscribe(64)
	g.Problems() // takes what waits
	if err := evict(ctx, vm, twin); err != nil {
		twin.Kill()
		conn.Close()
		events.Close()
		client.Close()
		return err
	}
	err = vm.Ended(ctx)
	vm.Kill()
	found := g.console.read()
	g.console.name, g.console.at = twin.Console, 0
	g.events.Close()
	g.qmp.Close()
	g.mem.Close()
	g.vm, g.qmp, g.events, g.conn, g.mem, g.linux = twin, client, events, conn, nil, nil
	select {
	case g.moves <- conn:
	case <-ctx.Done(): // nobody follows the guest any more
		return ctx.Err()
	}
	g.mu.Lock()
	now := time.Now()
	for _, text := range found {
		g.problem(Problem{now, "kernel", text})
	}
	g.beatAt = now // it could not while it stood
	for i := range g.moved {
		g.moved[i] = now
	}
	g.mu.Unlock()
	if err != nil {
		return err
	}
	if g.mem, err = guestmem.Attach(ctx, g.qmp); err != nil {
		return err
	}
	return g.Hear(ctx, 1)
}

// Hear waits until the guest has told so many times more of its work, and with that of each
// problem that it knew of before.
func (g *Guest) Hear(ctx context.Context, beats int) error {
	g.mu.Lock()
	goal := g.beats + beats
	g.mu.Unlock()
	return g.wait(ctx, time.Minute, "the guest to tell of its work",
		func() bool { return g.beats >= goal })
}

// Host is the host that the guest is on.
func (g *Guest) Host() *lab.Host { return g.vm.Host }
