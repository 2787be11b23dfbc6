package migstream

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// MessageType is the kind of a return path message (QEMU: enum mig_rp_message_type).
type MessageType uint16

// The messages of the return path.
const (
	MsgShut          MessageType = 1 // u32 status, 0 for success
	MsgPong          MessageType = 2 // u32, the value of the ping
	MsgReqPagesID    MessageType = 3 // u64 start, u32 length, u8 n, block name
	MsgReqPages      MessageType = 4 // u64 start, u32 length; the block last named
	MsgRecvBitmap    MessageType = 5 // u8 n, block name; then, outside the length, the bitmap
	MsgResumeAck     MessageType = 6 // u32, 1
	MsgSwitchoverAck MessageType = 7 // empty
)

const (
	resumeAckValue = 1
	bitmapEnd      = 0x0123456789abcdef
)

// Message is one message of the return path, from destination to source. Which fields
// are in use depends on the type.
type Message struct {
	Type   MessageType
	Value  uint32 // MsgShut: status; MsgPong: the ping's value
	Block  string // MsgReqPagesID, MsgRecvBitmap; a Reader also fills it in for MsgReqPages
	Start  uint64 // MsgReqPages…: first byte wanted
	Length uint32 // MsgReqPages…: bytes wanted
	// Bitmap of MsgRecvBitmap has one bit per TargetPageSize bytes of the block, lowest bit
	// first, set where the page was received; its size is a multiple of 8 bytes.
	Bitmap []byte
}

// Append appends the message's encoding to b.
func (m Message) Append(b []byte) []byte {
	var p []byte
	switch m.Type {
	case MsgShut, MsgPong:
		p = be.AppendUint32(nil, m.Value)
	case MsgResumeAck:
		p = be.AppendUint32(nil, resumeAckValue)
	case MsgReqPages, MsgReqPagesID:
		p = be.AppendUint32(be.AppendUint64(nil, m.Start), m.Length)
		if m.Type == MsgReqPagesID {
			p = appendName(p, m.Block)
		}
	case MsgRecvBitmap:
		p = appendName(nil, m.Block)
	}
	b = be.AppendUint16(be.AppendUint16(b, uint16(m.Type)), uint16(len(p)))
	b = append(b, p...)
	if m.Type == MsgRecvBitmap {
		b = be.AppendUint64(b, uint64(len(m.Bitmap)))
		b = be.AppendUint64(append(b, m.Bitmap...), bitmapEnd)
	}
	return b
}

// ReturnReader decodes a return path. Like Reader it is strict, and not safe for
// concurrent use.
type ReturnReader struct {
	r         *bufio.Reader
	block     string
	maxBitmap uint64
}

// returnBuffer is more than QEMU can have on its way in a socket, by Linux's own setting
// (net.core.wmem_default). So a reader that dies leaves whole messages behind, as QEMU writes each
// at once.
const returnBuffer = 256 << 10

// NewReturnReader returns a reader of the return path in r that accepts bitmaps for
// blocks of up to maxPages pages.
func NewReturnReader(r io.Reader, maxPages int) *ReturnReader {
	return &ReturnReader{r: bufio.NewReaderSize(r, returnBuffer),
		maxBitmap: (uint64(maxPages) + 63) / 64 * 8}
}

// Next returns the next message, io.EOF at the end of the input between two messages.
func (r *ReturnReader) Next() (Message, error) {
	m, err := r.next()
	if err != nil && err != io.EOF {
		err = fmt.Errorf("return path: %w", err)
	}
	return m, err
}

func (r *ReturnReader) next() (Message, error) {
	var head [4]byte
	if _, err := io.ReadFull(r.r, head[:]); err != nil {
		return Message{}, err
	}
	m := Message{Type: MessageType(be.Uint16(head[:]))}
	// The longest message names a block.
	n := int(be.Uint16(head[2:]))
	if n > 12+1+MaxName {
		return Message{}, fmt.Errorf("%w: message %d of %d bytes", ErrMalformed, m.Type, n)
	}
	payload := make([]byte, n)
	if err := readAll(r.r, payload); err != nil {
		return Message{}, err
	}
	cur := cursor{b: payload}
	ok := true
	switch m.Type {
	case MsgShut, MsgPong:
		m.Value = cur.u32()
	case MsgResumeAck:
		ok = cur.u32() == resumeAckValue
	case MsgReqPagesID, MsgReqPages:
		m.Start, m.Length = cur.u64(), cur.u32()
		if m.Type == MsgReqPagesID {
			r.block = cur.name()
		}
		m.Block = r.block
		ok = m.Block != "" && m.Length != 0 && m.Length%TargetPageSize == 0 &&
			m.Start%TargetPageSize == 0
	case MsgRecvBitmap:
		m.Block = cur.name()
		ok = m.Block != ""
	case MsgSwitchoverAck:
	default:
		ok = false
	}
	if !ok || cur.failed || len(cur.b) != 0 {
		return Message{}, fmt.Errorf("%w: message %d with payload % x", ErrMalformed, m.Type,
			payload)
	}
	if m.Type == MsgRecvBitmap {
		return m, r.bitmap(&m)
	}
	return m, nil
}

func (r *ReturnReader) bitmap(m *Message) error {
	var word [8]byte
	if err := readAll(r.r, word[:]); err != nil {
		return err
	}
	size := be.Uint64(word[:])
	if size%8 != 0 || size > r.maxBitmap {
		return fmt.Errorf("%w: bitmap of %d bytes for block %q", ErrMalformed, size, m.Block)
	}
	m.Bitmap = make([]byte, size)
	if err := readAll(r.r, m.Bitmap); err != nil {
		return err
	}
	if err := readAll(r.r, word[:]); err != nil {
		return err
	}
	if be.Uint64(word[:]) != bitmapEnd {
		return fmt.Errorf("%w: bitmap of block %q has no end mark", ErrMalformed, m.Block)
	}
	return nil
}

func readAll(r io.Reader, b []byte) error {
	_, err := io.ReadFull(r, b)
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
