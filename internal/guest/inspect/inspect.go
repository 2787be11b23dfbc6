// Package inspect sums up recorded migration streams of QEMU 7.2 to 11.1, in either
// direction, as package migstream decodes them. A recording is the bytes as they went over
// the socket, plain or compressed with gzip.
//
// Which direction it is shows in its first byte:
//
//	'Q'        forward, from its header "QEVM" on
//	00         return path: its messages start with a u16 type below 8
//	01 to 08   forward, going on after a recovery: it has no header, and the blocks that
//	           its pages belong to are in the recording that it goes on from
package inspect

import (
	"bufio"
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"vacate/internal/qemu/migstream"
)

// Stream sums up what was understood of a recording. Sizes are in bytes.
type Stream struct {
	Direction string `json:"direction"` // "forward" or "return"
	// Bytes understood, uncompressed. Where Error is set, it is about what follows them.
	Bytes    int64    `json:"bytes"`
	Machine  string   `json:"machine"`
	Commands []Count  `json:"commands"`
	Blocks   []Block  `json:"blocks"`
	Sections Sections `json:"sections"`
	Packages []Pack   `json:"packages"`
	// DeviceState is the size of what follows the RAM of a pre-copy migration.
	DeviceState int64     `json:"device_state_bytes"`
	Messages    []Count   `json:"messages"` // of the return path
	Requests    []Request `json:"requests"` // of the return path
	// Cuts is how often the stream broke off and went on in the next recording.
	Cuts  int  `json:"cuts"`
	Ended bool `json:"ended"` // with its end mark; on the return path, a "shut"
	// Status is the one that a return path ended with, 0 for success.
	Status uint32 `json:"status"`
	Error  string `json:"error"`
}

// Count is how many there were of a kind.
type Count struct {
	Name  string `json:"name"`
	Count int    `json:"count"`
}

// Block is a RAM block and what was sent of it, in records of 4 KiB.
type Block struct {
	Name      string `json:"name"`
	Size      uint64 `json:"size"`
	PageSize  uint64 `json:"page_size"`
	Data      int    `json:"data_pages"`
	Zero      int    `json:"zero_pages"` // sent as a mark
	Discarded uint64 `json:"discarded"`  // by commands
}

// Sections counts the sections of RAM.
type Sections struct {
	Start int `json:"start"`
	Part  int `json:"part"`
	End   int `json:"end"`
}

// Pack is a package of device state.
type Pack struct {
	Offset  int64    `json:"offset"`
	Size    int      `json:"size"`
	Devices []Device `json:"devices"`
	Error   string   `json:"error"` // why Devices is not the whole
}

// Device is the state of one device, with its framing.
type Device struct {
	Name     string `json:"name"`
	Instance uint32 `json:"instance"`
	Version  uint32 `json:"version"`
	Size     int    `json:"size"`
}

// Request is what the destination asked for of one block.
type Request struct {
	Block string `json:"block"`
	Count int    `json:"count"`
	Bytes uint64 `json:"bytes"`
}

// Record is one element of a recording.
type Record struct {
	Offset int64  `json:"offset"` // in the uncompressed recording
	Item   string `json:"item"`
}

// maxType is the greatest type of an element that a stream can go on with.
const maxType = 8

// maxPages bounds the bitmaps of a return path: those of a block of 1 TiB.
const maxPages = 1 << 28

// Read sums up the stream in parts: one recording, or the recordings of one direction of a
// migration that was cut and recovered, in order. Each element is given to record, which
// may be nil; an error from it ends the reading. The sum is of what was understood, also
// where there is an error. Memory use does not grow with the recording.
func Read(record func(Record) error, parts ...io.Reader) (Stream, error) {
	s := summary{record: record, commands: map[string]int{}, messages: map[string]int{}}
	err := s.read(parts)
	s.Commands, s.Messages = counts(s.commands), counts(s.messages)
	if err != nil {
		s.Error = err.Error()
	}
	return s.Stream, err
}

type summary struct {
	Stream
	record             func(Record) error
	commands, messages map[string]int
	reader             *migstream.Reader // of the part before
}

func (s *summary) read(parts []io.Reader) error {
	if len(parts) == 0 {
		return errors.New("no recording to read")
	}
	for i, part := range parts {
		in, err := plain(part)
		if err != nil {
			return err
		}
		first, err := in.Peek(1)
		if errors.Is(err, io.EOF) {
			return errors.New("the recording is empty")
		}
		if err != nil {
			return fmt.Errorf("read the recording: %w", err)
		}
		direction := "forward"
		if first[0] == 0 {
			direction = "return"
		}
		if s.Direction == "" {
			s.Direction = direction
		}
		switch {
		case direction != s.Direction:
			return fmt.Errorf("recording %d is of the %s path and the ones before are of the %s "+
				"path", i+1, direction, s.Direction)
		case direction == "return":
			err = s.returnPath(in)
		case i > 0 && first[0] == 'Q':
			return fmt.Errorf("recording %d is a stream of its own, not the continuation of the "+
				"one before", i+1)
		default:
			err = s.forward(in, first[0] <= maxType)
		}
		if errors.Is(err, io.ErrUnexpectedEOF) && i < len(parts)-1 {
			s.Cuts++ // as it must be ahead of a recovery
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// plain undoes the compression of r, if it has any.
func plain(r io.Reader) (*bufio.Reader, error) {
	in := bufio.NewReaderSize(r, 64<<10)
	if magic, err := in.Peek(2); err != nil || magic[0] != 0x1f || magic[1] != 0x8b {
		return in, nil
	}
	z, err := gzip.NewReader(in)
	if err != nil {
		return nil, fmt.Errorf("uncompress the recording: %w", err)
	}
	return bufio.NewReaderSize(z, 64<<10), nil
}

func (s *summary) forward(in io.Reader, continues bool) error {
	orphan := continues && s.reader == nil
	switch {
	case s.reader != nil:
		s.reader = s.reader.Resume(in)
	case continues:
		s.reader = migstream.NewReader(nil).Resume(in)
	default:
		s.reader = migstream.NewReader(in)
	}
	before := s.Bytes
	for {
		offset := s.reader.Offset()
		item, err := s.reader.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			if orphan && errors.Is(err, migstream.ErrMalformed) {
				err =
					fmt.Errorf("%w (the recording begins without a header, as after a recovery: "+
						"name the one it goes on from first)", err)
			}
			return err
		}
		s.Bytes = before + s.reader.Offset()
		s.add(item, offset)
		if s.record != nil {
			if err := s.record(Record{offset, describe(item)}); err != nil {
				return err
			}
		}
	}
}

func (s *summary) add(item migstream.Item, offset int64) {
	switch it := item.(type) {
	case migstream.Configuration:
		s.Machine = it.Machine
	case migstream.Command:
		s.commands[it.ID.String()]++
		if block, ranges, err := it.Discard(); err == nil {
			if b := s.block(block); b != nil {
				for _, r := range ranges {
					b.Discarded += r.Length
				}
			}
		}
	case migstream.Packaged:
		s.commands[migstream.CmdPackaged.String()]++
		if len(s.Packages) == maxPackages {
			return
		}
		p := Pack{Offset: offset, Size: len(it.Data), Devices: []Device{}}
		devices, err := it.Sections()
		for _, d := range devices {
			p.Devices = append(p.Devices, Device(d))
		}
		if err != nil {
			p.Error = err.Error()
		}
		s.Packages = append(s.Packages, p)
	case migstream.SectionStart:
		s.Sections.Start++
	case migstream.SectionPart:
		s.Sections.Part++
	case migstream.SectionEnd:
		s.Sections.End++
	case migstream.MemSize:
		for _, b := range it.Blocks {
			s.Blocks = append(s.Blocks, Block{Name: b.Name, Size: b.Length, PageSize: b.PageSize})
		}
	case migstream.Page:
		b := s.block(it.Block)
		if it.Data == nil {
			b.Zero++
		} else {
			b.Data++
		}
	case migstream.Opaque:
		s.DeviceState += int64(len(it.Data))
	case migstream.EOF:
		s.Ended = true
	}
}

// maxPackages is how many packages are described; QEMU sends one.
const maxPackages = 16

// block returns the block called name, or nil.
func (s *summary) block(name string) *Block {
	for i := range s.Blocks {
		if s.Blocks[i].Name == name {
			return &s.Blocks[i]
		}
	}
	return nil
}

func (s *summary) returnPath(in io.Reader) error {
	r := migstream.NewReturnReader(in, maxPages)
	offset := int64(0)
	for {
		m, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("at byte %d: %w", offset, err)
		}
		size := int64(len(m.Append(nil)))
		s.Bytes += size
		s.messages[messageName(m.Type)]++
		switch m.Type {
		case migstream.MsgShut:
			s.Ended, s.Status = true, m.Value
		case migstream.MsgReqPages, migstream.MsgReqPagesID:
			if err := s.request(m); err != nil {
				return fmt.Errorf("at byte %d: %w", offset, err)
			}
		}
		if s.record != nil {
			if err := s.record(Record{offset, describeMessage(m)}); err != nil {
				return err
			}
		}
		offset += size
	}
}

func (s *summary) request(m migstream.Message) error {
	for i := range s.Requests {
		if r := &s.Requests[i]; r.Block == m.Block {
			r.Count++
			r.Bytes += uint64(m.Length)
			return nil
		}
	}
	if len(s.Requests) == migstream.MaxBlocks {
		return fmt.Errorf("%w: requests for more than %d blocks", migstream.ErrMalformed,
			migstream.MaxBlocks)
	}
	s.Requests = append(s.Requests, Request{m.Block, 1, uint64(m.Length)})
	return nil
}

func counts(m map[string]int) []Count {
	var list []Count
	for _, name := range slices.Sorted(maps.Keys(m)) {
		list = append(list, Count{name, m[name]})
	}
	slices.SortStableFunc(list, func(a, b Count) int { return cmp.Compare(b.Count, a.Count) })
	return list
}

var messageNames = map[migstream.MessageType]string{
	migstream.MsgShut: "shut", migstream.MsgPong: "pong",
	migstream.MsgReqPagesID: "request-pages-of",
	migstream.MsgReqPages:   "request-pages", migstream.MsgRecvBitmap: "recv-bitmap",
	migstream.MsgResumeAck: "resume-ack", migstream.MsgSwitchoverAck: "switchover-ack",
}

func messageName(t migstream.MessageType) string {
	if name, ok := messageNames[t]; ok {
		return name
	}
	return fmt.Sprintf("message %d", t)
}

func describe(item migstream.Item) string {
	switch it := item.(type) {
	case migstream.Header:
		return fmt.Sprintf("header, version %d", migstream.Version)
	case migstream.Configuration:
		return fmt.Sprintf("machine %q", it.Machine)
	case migstream.Command:
		return describeCommand(it)
	case migstream.Packaged:
		return fmt.Sprintf("packaged, %d bytes", len(it.Data))
	case migstream.SectionStart:
		return fmt.Sprintf("start of section %d %q, version %d", it.ID, it.Name, it.Version)
	case migstream.SectionPart:
		return fmt.Sprintf("part of section %d", it.ID)
	case migstream.SectionEnd:
		return fmt.Sprintf("end of section %d", it.ID)
	case migstream.Footer:
		return fmt.Sprintf("footer of section %d", it.ID)
	case migstream.MemSize:
		return fmt.Sprintf("%d memory blocks", len(it.Blocks))
	case migstream.Page:
		kind := "data"
		switch {
		case it.Data == nil && it.Fill != 0:
			kind = fmt.Sprintf("filled with %#02x", it.Fill)
		case it.Data == nil:
			kind = "zero"
		}
		return fmt.Sprintf("page %#x of %q, %s", it.Offset, it.Block, kind)
	case migstream.EOS:
		return "end of records"
	case migstream.EOF:
		return "end of stream"
	case migstream.Opaque:
		return fmt.Sprintf("device state, %d bytes", len(it.Data))
	}
	return fmt.Sprintf("%T", item)
}

func describeCommand(c migstream.Command) string {
	switch c.ID {
	case migstream.CmdPing:
		if v, err := c.Value(); err == nil {
			return fmt.Sprintf("ping %#x", v)
		}
	case migstream.CmdRecvBitmap:
		if name, err := c.BlockName(); err == nil {
			return fmt.Sprintf("recv-bitmap of %q", name)
		}
	case migstream.CmdRAMDiscard:
		if name, ranges, err := c.Discard(); err == nil {
			var b strings.Builder
			fmt.Fprintf(&b, "ram-discard of %q:", name)
			for i, r := range ranges {
				if i == 4 {
					fmt.Fprintf(&b, " and %d more", len(ranges)-i)
					break
				}
				fmt.Fprintf(&b, " %#x+%#x", r.Start, r.Length)
			}
			return b.String()
		}
	}
	if len(c.Payload) > 0 {
		return fmt.Sprintf("%v % x", c.ID, c.Payload)
	}
	return c.ID.String()
}

func describeMessage(m migstream.Message) string {
	name := messageName(m.Type)
	switch m.Type {
	case migstream.MsgShut:
		return fmt.Sprintf("%s, status %d", name, m.Value)
	case migstream.MsgPong:
		return fmt.Sprintf("%s %#x", name, m.Value)
	case migstream.MsgReqPages, migstream.MsgReqPagesID:
		return fmt.Sprintf("%s %q: %#x+%#x", name, m.Block, m.Start, m.Length)
	case migstream.MsgRecvBitmap:
		return fmt.Sprintf("%s of %q, %d bytes", name, m.Block, len(m.Bitmap))
	}
	return name
}
