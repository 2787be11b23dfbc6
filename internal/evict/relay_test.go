package evict_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"vacate/lab"
)

// relay passes frames between a source and a destination, until the frame for which it waits has
// come. Then it does something unkind.
type relay struct {
	t    testing.TB
	host *lab.Host
	to   string

	lane     int   // 0 control, 1 push, 2 fetch
	upstream bool  // from the destination to the source
	kind     uint8 // of the frame waited for
	do       func(r *relay, frame []byte, to net.Conn)

	stalled atomic.Bool

	mu    sync.Mutex
	conns []net.Conn
	hit   chan struct{}
	tasks sync.WaitGroup
}

// cut ends all connections.
func cut(r *relay, _ []byte, _ net.Conn) { r.close() }

// stall stops passing anything in this direction of the lane, without an error.
func stall(r *relay, _ []byte, _ net.Conn) { r.stalled.Store(true) }

// corrupt flips a bit of the frame.
func corrupt(_ *relay, frame []byte, to net.Conn) {
	frame[len(frame)-1] ^= 0x10
	to.Write(frame)
}

// renameDevice renames a device in the device state. There is none of that name, which only loading
// it shows.
func renameDevice(r *relay, frame []byte, to net.Conn) {
	at := bytes.Index(frame, []byte("/virtio-net"))
	if at < 0 {
		r.t.Error("the package has no device virtio-net")
	} else {
		frame[at+1] = 'x'
	}
	const head = 8 // bytes that the checksum behind them covers, too
	table := crc32.MakeTable(crc32.Castagnoli)
	binary.BigEndian.PutUint32(frame[head:],
		crc32.Update(crc32.Checksum(frame[:head], table), table, frame[head+4:]))
	to.Write(frame)
}

// garbage puts something else in the frame's place.
func garbage(_ *relay, _ []byte, to net.Conn) {
	to.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\nand so on and so forth"))
}

func (r *relay) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.Close()
	}
}

// serve relays one session, whose three connections come in the order of the lanes.
func (r *relay) serve(ln net.Listener) {
	defer ln.Close()
	for lane := range 3 {
		down, err := ln.Accept()
		if err != nil {
			return
		}
		var up net.Conn
		err = r.host.Do(func() (err error) {
			up, err = net.Dial("tcp", r.to)
			return err
		})
		if err != nil {
			down.Close()
			return
		}
		r.mu.Lock()
		r.conns = append(r.conns, down, up)
		r.mu.Unlock()
		r.tasks.Add(2)
		go r.pass(lane, false, down, up, 36)
		go r.pass(lane, true, up, down, 22)
	}
}

// pass relays one direction of one lane, first its greeting, then frames.
func (r *relay) pass(lane int, upstream bool, from, to net.Conn, greeting int) {
	defer r.tasks.Done()
	b := make([]byte, greeting)
	if _, err := io.ReadFull(from, b); err != nil {
		to.Close()
		return
	}
	to.Write(b)
	for {
		head := make([]byte, 12)
		if _, err := io.ReadFull(from, head); err != nil {
			to.Close()
			return
		}
		frame := append(head, make([]byte, binary.BigEndian.Uint32(head[4:]))...)
		if _, err := io.ReadFull(from, frame[12:]); err != nil {
			to.Close()
			return
		}
		here := lane == r.lane && upstream == r.upstream
		if here && r.stalled.Load() {
			continue
		}
		if here && frame[0] == r.kind {
			r.mu.Lock()
			first := r.hit != nil
			if first {
				close(r.hit)
				r.hit = nil
			}
			r.mu.Unlock()
			if first {
				r.do(r, frame, to)
				continue
			}
		}
		if _, err := to.Write(frame); err != nil {
			from.Close()
			return
		}
	}
}
