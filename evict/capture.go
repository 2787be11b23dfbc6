package evict

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"vacate/guestmem"
	"vacate/migstream"
	"vacate/pageset"
	"vacate/qmp"
)

// capture is the migration stream that the source's QEMU sends us, and what it says.
//
// QEMU believes that it migrates to us, in post-copy from the start. Should it begin with
// pre-copy all the same, its bandwidth for that is so low (preCopyBandwidth) that next to
// no pages come, unless they are huge. Nobody wants them: they are read from its memory later. To wake it from
// waiting out that bandwidth, the return path asks for a page.
type capture struct {
	conn net.Conn
	r    *migstream.Reader

	head   []byte // the stream from its header to the footer of the RAM section's start
	layout layout
	load   []byte // what the destination's QEMU needs to load the devices
	pages  int    // page records read
}

// pingSwitchover is the ping by which QEMU from 10.2 on learns that the destination has
// loaded its devices (QEMU: QEMU_VM_PING_PACKAGED_LOADED).
const pingSwitchover = 0x42

// startCapture has QEMU freeze the guest and save its devices, to a socket that it knows
// by sourceFD and whose other end is conn.
func startCapture(ctx context.Context, q *qmp.Client, conn net.Conn) (*capture, error) {
	c := &capture{conn: conn, r: migstream.NewReader(conn)}
	if err := q.Migrate(ctx, "fd:"+sourceFD, false); err != nil {
		return nil, err
	}
	// From here on there is a migration to be rolled back.
	return c, q.MigrateStartPostcopy(ctx)
}

const sourceFD = "vacate-source"

// next returns the next item of the stream. It answers pings. A read past ctx fails.
func (c *capture) next(ctx context.Context) (migstream.Item, error) {
	item, err := c.r.Next()
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("read QEMU's migration stream: %w", err)
	}
	switch it := item.(type) {
	case migstream.Page:
		c.pages++
	case migstream.Command:
		if it.ID == migstream.CmdPing {
			v, err := it.Value()
			if err != nil {
				return nil, err
			}
			return item, c.answer(migstream.Message{Type: migstream.MsgPong, Value: v})
		}
	case migstream.EOF:
		return nil, errors.New("QEMU ended its migration stream by itself")
	}
	return item, nil
}

// answer writes to the return path.
func (c *capture) answer(m migstream.Message) error {
	if _, err := c.conn.Write(m.Append(nil)); err != nil {
		return fmt.Errorf("write to QEMU's return path: %w", err)
	}
	return nil
}

// bound makes reads fail when ctx is done, until the returned function is called.
func (c *capture) bound(ctx context.Context) (release func()) {
	stop := context.AfterFunc(ctx, func() { c.conn.SetReadDeadline(time.Unix(1, 0)) })
	return func() {
		stop()
		c.conn.SetReadDeadline(time.Time{})
	}
}

// readHead reads the stream up to the list of RAM blocks.
func (c *capture) readHead(ctx context.Context) error {
	defer c.bound(ctx)()
	for {
		item, err := c.next(ctx)
		if err != nil {
			return err
		}
		c.head = item.Append(c.head)
		if len(c.head) > maxHead {
			return fmt.Errorf("the head of QEMU's migration stream is longer than %d bytes", maxHead)
		}
		switch it := item.(type) {
		case migstream.MemSize:
			if c.layout, err = newLayout(it.Blocks); err != nil {
				return err
			}
		case migstream.Footer:
			return nil
		case migstream.Page, migstream.Packaged:
			return errors.New("QEMU's migration stream has pages ahead of the list of its memory")
		}
	}
}

// readPackage reads the stream to the end of the package that holds the state of the
// devices.
func (c *capture) readPackage(ctx context.Context) error {
	defer c.bound(ctx)()
	largest := 0
	for i, b := range c.layout {
		if b.Length > c.layout[largest].Length {
			largest = i
		}
	}
	wake := c.layout[largest]
	if err := c.answer(migstream.Message{Type: migstream.MsgReqPagesID, Block: wake.Name, Length: uint32(wake.PageSize)}); err != nil {
		return err
	}
	for {
		item, err := c.next(ctx)
		if err != nil {
			return err
		}
		switch it := item.(type) {
		case migstream.Command:
			if it.ID == migstream.CmdSwitchoverStart {
				c.load = it.Append(c.load)
			}
		case migstream.Packaged:
			c.load = it.Append(c.load)
			return nil
		}
	}
}

// blocks reads whole blocks from the stream, those that cannot be read from the process:
// it asks QEMU for their pages and passes over all others. The stream must not be read to
// its end, as QEMU would then take the migration for done, so it gives up half-way.
func (c *capture) blocks(ctx context.Context, want []int) (map[int][]byte, error) {
	defer c.bound(ctx)()
	got := map[int][]byte{}
	missing := map[int]*pageset.Set{}
	left := 0
	for _, i := range want {
		b := c.layout[i]
		if b.Length > maxStreamed {
			return nil, fmt.Errorf("memory %q of %d MiB cannot be found in QEMU's address space", b.Name, b.Length>>20)
		}
		got[i] = make([]byte, b.Length)
		missing[i] = pageset.Full(int(b.Length / migstream.TargetPageSize))
		left += missing[i].Count()
		if err := c.answer(migstream.Message{Type: migstream.MsgReqPagesID, Block: b.Name, Length: uint32(b.Length)}); err != nil {
			return nil, err
		}
	}
	half := c.records() / 2
	for left > 0 {
		if c.pages > half {
			return nil, fmt.Errorf("QEMU sent half of its memory, but not all of %d small blocks that were asked for", len(want))
		}
		item, err := c.next(ctx)
		if err != nil {
			return nil, err
		}
		p, ok := item.(migstream.Page)
		if !ok {
			continue
		}
		i := c.layout.find(p.Block)
		if got[i] == nil {
			continue
		}
		if p.Data == nil && p.Fill != 0 {
			return nil, fmt.Errorf("QEMU sent a page filled with %#02x; only zero is supported", p.Fill)
		}
		copy(got[i][p.Offset:], p.Data)
		if missing[i].Remove(pageset.Page(p.Offset / migstream.TargetPageSize)) {
			left--
		}
	}
	return got, nil
}

// records is how many page records all memory has in the stream, where huge pages are many.
func (c *capture) records() int {
	n := 0
	for _, b := range c.layout {
		n += int(b.Length / migstream.TargetPageSize)
	}
	return n
}

// settle reads on, discarding, until QEMU is wholly in post-copy: before that it would
// resume the guest by itself when the stream ends. Before QEMU 10.2 it is at once.
func (c *capture) settle(ctx context.Context, q *qmp.Client) error {
	m, err := q.QueryMigrate(ctx)
	if err != nil {
		return err
	}
	if m.Status == "postcopy-active" {
		return nil
	}
	if err := c.answer(migstream.Message{Type: migstream.MsgPong, Value: pingSwitchover}); err != nil {
		return err
	}
	reading, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	go func() {
		defer c.bound(reading)()
		half := c.records() / 2
		for {
			if _, err := c.next(reading); err != nil {
				done <- err
				return
			}
			if c.pages > half {
				done <- errors.New("QEMU sent half of its memory and is still not in post-copy")
				return
			}
		}
	}()
	wait := func() error {
		for {
			m, err := q.QueryMigrate(ctx)
			if err != nil {
				return err
			}
			switch m.Status {
			case "postcopy-active":
				return nil
			case "device", "postcopy-device", "active":
			default:
				return fmt.Errorf("the source's migration went to %q: %s", m.Status, m.ErrorDesc)
			}
			select {
			case err := <-done:
				done <- err
				return err
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(pollInterval):
			}
		}
	}
	err = wait()
	stop()
	<-done
	return err
}

// captureParameters are what QEMU's migration parameters are to be for a capture.
func captureParameters(mem *guestmem.Memory) map[string]any {
	return map[string]any{"max-bandwidth": preCopyBandwidth(mem), "max-postcopy-bandwidth": 0} // 0: no limit
}

// preCopyBandwidth is QEMU's bandwidth in pre-copy, in bytes per second. QEMU spends a
// tenth of it at once and then sleeps out the rest of 100 ms. The tenth must be more than
// the head of the stream, or QEMU sleeps before it has flushed that.
//
// With huge pages there is no limit. QEMU sleeps in the middle of one, too, but looks up between them only, and
// maybe not before it has sent 64: with so little bandwidth that takes minutes (seen with 11.1).
func preCopyBandwidth(mem *guestmem.Memory) int {
	for _, b := range mem.Blocks() {
		if b.PageSize > migstream.TargetPageSize {
			return 0
		}
	}
	return 320 << 10
}

const (
	// switchTimeout is how long QEMU may take to freeze the guest and save its devices.
	switchTimeout = 20 * time.Second
	// maxStreamed is the size of the largest block that is moved through QEMU's stream.
	maxStreamed = 64 << 20
)

// pretendComplete has a QEMU whose guest is frozen in a broken post-copy take the
// migration for complete: we play a destination that recovers and has every page. Its
// guest then stands in "postmigrate", with its memory untouched, and can be resumed.
func pretendComplete(ctx context.Context, q *qmp.Client, mem *guestmem.Memory) error {
	conn, err := socketTo(ctx, q, "vacate-rollback", 0)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := q.Migrate(ctx, "fd:vacate-rollback", true); err != nil {
		return err
	}
	again := &capture{conn: conn, r: migstream.NewRecoveryReader(conn)}
	for {
		item, err := again.r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read QEMU's recovery stream: %w", err)
		}
		switch it := item.(type) {
		case migstream.Page:
			return errors.New("QEMU sends pages although it was told that all have arrived")
		case migstream.EOF:
			return again.answer(migstream.Message{Type: migstream.MsgShut})
		case migstream.Command:
			var reply migstream.Message
			switch it.ID {
			case migstream.CmdRecvBitmap:
				name, err := it.BlockName()
				if err != nil {
					return err
				}
				i := slices.IndexFunc(mem.Blocks(), func(b guestmem.Block) bool { return b.Name == name })
				if i < 0 {
					return fmt.Errorf("QEMU asks for the pages received of unknown memory %q", name)
				}
				bits := mem.Blocks()[i].Size / migstream.TargetPageSize
				reply = migstream.Message{Type: migstream.MsgRecvBitmap, Block: name, Bitmap: bytes.Repeat([]byte{0xff}, int((bits+63)/64*8))}
			case migstream.CmdPostcopyResume:
				reply = migstream.Message{Type: migstream.MsgResumeAck}
			default:
				continue
			}
			if err := again.answer(reply); err != nil {
				return err
			}
		}
	}
}
