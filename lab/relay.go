package lab

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Relay stands in for a long path where the kernel has no netem. It passes TCP connections on to
// an address, and each byte that goes either way arrives a delay later. It does not limit the
// rate, except that maxUnderway bytes at most are under way in one direction of a connection.
//
// What it cannot show is TCP's own behaviour on such a path: the kernels at both ends see two short
// connections, with their acknowledgements at once. Connections come about at once, too.
type Relay struct {
	ln   net.Listener
	dial func() (net.Conn, error)

	mu     sync.Mutex
	delay  time.Duration         // guarded by mu
	refuse bool                  // new connections are closed; guarded by mu
	conns  map[net.Conn]struct{} // guarded by mu
	tasks  sync.WaitGroup
}

const (
	// maxUnderway is what a path of 10 Gbit/s and 200 ms each way holds.
	maxUnderway = 256 << 20
	relayChunk  = 256 << 10
)

// NewRelay relays connections that come to ln to what dial reaches. Close it after use; it closes
// ln then.
func NewRelay(ln net.Listener, dial func() (net.Conn, error), delay time.Duration) *Relay {
	r := &Relay{ln: ln, dial: dial, delay: delay, conns: map[net.Conn]struct{}{}}
	r.tasks.Go(r.run)
	return r
}

// Relay makes a relay on the host, to an address that can be reached from there.
func (h *Host) Relay(to string, delay time.Duration) (*Relay, error) {
	var ln net.Listener
	err := h.Do(func() (err error) {
		ln, err = net.Listen("tcp", net.JoinHostPort(h.Addr, "0"))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("relay on host %s: %w", h.Name, err)
	}
	return NewRelay(ln, func() (c net.Conn, err error) {
		err = h.Do(func() error {
			c, err = net.DialTimeout("tcp", to, 2*time.Second)
			return err
		})
		return c, err
	}, delay), nil
}

// Addr is where the relay listens.
func (r *Relay) Addr() string { return r.ln.Addr().String() }

// SetDelay changes the delay of bytes that come from now on. Bytes stay in order.
func (r *Relay) SetDelay(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.delay = d
}

// Cut ends all connections, and has new ones end at once until Mend.
func (r *Relay) Cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refuse = true
	r.end()
}

// Mend lets connections in again.
func (r *Relay) Mend() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refuse = false
}

// Close ends the relay and all of its connections.
func (r *Relay) Close() {
	r.mu.Lock()
	r.refuse = true
	r.end()
	r.mu.Unlock()
	r.ln.Close()
	r.tasks.Wait()
}

// end closes all connections. The caller holds mu.
func (r *Relay) end() {
	for c := range r.conns {
		c.Close()
	}
	clear(r.conns)
}

// run takes connections until the listener ends.
func (r *Relay) run() {
	for {
		near, err := r.ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			continue
		}
		r.tasks.Go(func() { r.join(near) })
	}
}

// join makes the second half of a connection, and passes bytes on between both.
func (r *Relay) join(near net.Conn) {
	far, err := r.dial()
	if err != nil {
		near.Close()
		return
	}
	r.mu.Lock()
	refuse := r.refuse
	if !refuse {
		r.conns[near], r.conns[far] = struct{}{}, struct{}{}
	}
	r.mu.Unlock()
	if !refuse {
		var ways sync.WaitGroup
		ways.Go(func() { r.pass(near, far) })
		ways.Go(func() { r.pass(far, near) })
		ways.Wait()
	}
	near.Close()
	far.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, near)
	delete(r.conns, far)
}

// pass passes bytes on in one direction, and at last their end. A connection that is reset loses
// what is under way.
func (r *Relay) pass(from, to net.Conn) {
	u := newUnderway()
	var reading sync.WaitGroup
	reading.Go(func() {
		buf := make([]byte, relayChunk)
		for {
			n, err := from.Read(buf)
			r.mu.Lock()
			due := time.Now().Add(r.delay)
			r.mu.Unlock()
			if n > 0 && !u.put(parcel{due, append([]byte(nil), buf[:n]...)}) {
				return
			}
			switch {
			case err == io.EOF:
				u.put(parcel{due, nil})
				return
			case err != nil:
				u.stop()
				return
			}
		}
	})
	for {
		p, ok := u.take()
		if ok {
			time.Sleep(time.Until(p.due))
			if p.b == nil {
				closeWrite(to)
				break
			}
			_, err := to.Write(p.b)
			ok = err == nil
		}
		if !ok {
			u.stop()
			from.Close()
			to.Close()
			break
		}
	}
	reading.Wait()
}

func closeWrite(c net.Conn) {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
		return
	}
	c.Close()
}

// parcel is some bytes, and when they are to arrive. Without bytes it is the end.
type parcel struct {
	due time.Time
	b   []byte
}

// underway is what is under way in one direction of a connection.
type underway struct {
	mu      sync.Mutex
	changed *sync.Cond // with mu
	parcels []parcel   // guarded by mu
	bytes   int        // of them; guarded by mu
	stopped bool       // guarded by mu
}

func newUnderway() *underway {
	u := &underway{}
	u.changed = sync.NewCond(&u.mu)
	return u
}

// put waits for room and adds a parcel. It reports whether anybody still wants it.
func (u *underway) put(p parcel) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	for !u.stopped && u.bytes > maxUnderway {
		u.changed.Wait()
	}
	u.parcels = append(u.parcels, p)
	u.bytes += len(p.b)
	u.changed.Broadcast()
	return !u.stopped
}

// take waits for a parcel. It reports whether there will be any.
func (u *underway) take() (parcel, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for !u.stopped && len(u.parcels) == 0 {
		u.changed.Wait()
	}
	if u.stopped {
		return parcel{}, false
	}
	p := u.parcels[0]
	u.parcels = u.parcels[1:]
	u.bytes -= len(p.b)
	u.changed.Broadcast()
	return p, true
}

func (u *underway) stop() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.stopped = true
	u.changed.Broadcast()
}
