package migstream

import (
	"encoding/binary"
	"fmt"
)

// Item is one element of the forward stream.
type Item interface {
	// Append appends the element's encoding to b. It does not check lengths: an item
	// from a Reader always fits its encoding.
	Append(b []byte) []byte
}

// Types of the top-level elements (QEMU: migration/savevm.h).
const (
	typeEOF           = 0x00
	typeSectionStart  = 0x01
	typeSectionPart   = 0x02
	typeSectionEnd    = 0x03
	typeSectionFull   = 0x04
	typeSubsection    = 0x05
	typeVMDescription = 0x06
	typeConfiguration = 0x07
	typeCommand       = 0x08
	typeFooter        = 0x7e
)

// Flags of a RAM record (QEMU: migration/ram.c).
const (
	flagZero     = 0x02
	flagMemSize  = 0x04
	flagPage     = 0x08
	flagEOS      = 0x10
	flagContinue = 0x20
	flagXBZRLE   = 0x40
	flagHook     = 0x80
	flagCompress = 0x100
	flagMultiFD  = 0x200
	flagMask     = TargetPageSize - 1
)

// RAMVersion is the version of the RAM section.
const RAMVersion = 4

var be = binary.BigEndian

// Header opens a stream. It has no fields: only version 3 exists.
type Header struct{}

// Append implements Item.
func (Header) Append(b []byte) []byte {
	return be.AppendUint32(append(b, "QEVM"...), Version)
}

// Configuration names the machine type that both ends must have, e.g. "pc-i440fx-7.2".
type Configuration struct{ Machine string }

// Append implements Item.
func (c Configuration) Append(b []byte) []byte {
	b = be.AppendUint32(append(b, typeConfiguration), uint32(len(c.Machine)))
	return append(b, c.Machine...)
}

// CommandID says what a Command asks of the destination.
type CommandID uint16

// The commands of the forward stream (QEMU: migration/savevm.c).
const (
	CmdOpenReturnPath  CommandID = 1
	CmdPing            CommandID = 2
	CmdPostcopyAdvise  CommandID = 3
	CmdPostcopyListen  CommandID = 4
	CmdPostcopyRun     CommandID = 5
	CmdRAMDiscard      CommandID = 6
	CmdPackaged        CommandID = 7
	CmdPostcopyResume  CommandID = 9
	CmdRecvBitmap      CommandID = 10
	CmdSwitchoverStart CommandID = 11
)

var commandNames = map[CommandID]string{
	CmdOpenReturnPath: "open-return-path", CmdPing: "ping", CmdPostcopyAdvise: "postcopy-advise",
	CmdPostcopyListen: "postcopy-listen", CmdPostcopyRun: "postcopy-run",
	CmdRAMDiscard: "ram-discard",
	CmdPackaged:   "packaged", CmdPostcopyResume: "postcopy-resume", CmdRecvBitmap: "recv-bitmap",
	CmdSwitchoverStart: "switchover-start",
}

func (c CommandID) String() string {
	if s, ok := commandNames[c]; ok {
		return s
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// Command is any command but CmdPackaged. Its payload has been checked to be what the
// command wants: Ping, Advise, Discard and BlockName read it.
type Command struct {
	ID      CommandID
	Payload []byte
}

// Append implements Item.
func (c Command) Append(b []byte) []byte {
	b = be.AppendUint16(append(b, typeCommand), uint16(c.ID))
	b = be.AppendUint16(b, uint16(len(c.Payload)))
	return append(b, c.Payload...)
}

// PingCommand asks the destination for a pong with the same value, once all before it was loaded.
func PingCommand(value uint32) Command {
	return Command{CmdPing, be.AppendUint32(nil, value)}
}

// AdviseCommand tells the destination that the migration may go to post-copy. pageSizes is the OR
// of the page sizes of all blocks.
func AdviseCommand(pageSizes uint64) Command {
	return Command{CmdPostcopyAdvise,
		be.AppendUint64(be.AppendUint64(nil, pageSizes), TargetPageSize)}
}

// RecvBitmapCommand asks the destination which pages of a block it has.
func RecvBitmapCommand(block string) Command {
	return Command{CmdRecvBitmap, appendName(nil, block)}
}

// Range is part of a block, in bytes.
type Range struct{ Start, Length uint64 }

// MaxDiscardRanges is how many ranges fit in one discard command.
const MaxDiscardRanges = (1<<16 - 1 - 2 - MaxName - 1) / 16

// DiscardCommand tells the destination to drop what it has of ranges of a block. There
// are at most MaxDiscardRanges of them.
func DiscardCommand(block string, ranges []Range) Command {
	p := append(appendName([]byte{0}, block), 0)
	for _, r := range ranges {
		p = be.AppendUint64(be.AppendUint64(p, r.Start), r.Length)
	}
	return Command{CmdRAMDiscard, p}
}

// Discard returns block and ranges of a CmdRAMDiscard.
func (c Command) Discard() (block string, ranges []Range, err error) {
	cur := cursor{b: c.Payload}
	version := cur.u8()
	block = cur.name()
	zero := cur.u8()
	for !cur.failed && len(cur.b) > 0 {
		ranges = append(ranges, Range{cur.u64(), cur.u64()})
	}
	if c.ID != CmdRAMDiscard || cur.failed || version != 0 || zero != 0 || len(ranges) == 0 {
		return "", nil, fmt.Errorf("%w: discard command of %d bytes", ErrMalformed, len(c.Payload))
	}
	return block, ranges, nil
}

// BlockName returns the block of a CmdRecvBitmap.
func (c Command) BlockName() (string, error) {
	cur := cursor{b: c.Payload}
	name := cur.name()
	if c.ID != CmdRecvBitmap || cur.failed || len(cur.b) != 0 {
		return "", fmt.Errorf("%w: recv-bitmap command of %d bytes", ErrMalformed, len(c.Payload))
	}
	return name, nil
}

// Value returns the value of a CmdPing.
func (c Command) Value() (uint32, error) {
	if c.ID != CmdPing || len(c.Payload) != 4 {
		return 0, fmt.Errorf("%w: ping command of %d bytes", ErrMalformed, len(c.Payload))
	}
	return be.Uint32(c.Payload), nil
}

// check reports whether the payload is what the command wants.
func (c Command) check() error {
	want := 0
	switch c.ID {
	case CmdRAMDiscard:
		_, _, err := c.Discard()
		return err
	case CmdRecvBitmap:
		_, err := c.BlockName()
		return err
	case CmdPing:
		want = 4
	case CmdPostcopyAdvise:
		want = 16
		if len(c.Payload) == 16 && be.Uint64(c.Payload[8:]) != TargetPageSize {
			return fmt.Errorf("%w: the guest's pages are %d bytes, not 4096", ErrUnsupported,
				be.Uint64(c.Payload[8:]))
		}
	case CmdOpenReturnPath, CmdPostcopyListen, CmdPostcopyRun, CmdPostcopyResume,
		CmdSwitchoverStart:
	default:
		return fmt.Errorf("%w: %v", ErrUnsupported, c.ID)
	}
	if len(c.Payload) != want {
		return fmt.Errorf("%w: %v has a payload of %d bytes, not %d", ErrMalformed, c.ID,
			len(c.Payload), want)
	}
	return nil
}

// Packaged carries a whole stream, here one that loads all devices but RAM. The reader
// does not look inside; Commands and DeviceSections do.
type Packaged struct{ Data []byte }

// Append implements Item.
func (p Packaged) Append(b []byte) []byte {
	b = be.AppendUint16(append(b, typeCommand), uint16(CmdPackaged))
	b = be.AppendUint32(be.AppendUint16(b, 4), uint32(len(p.Data)))
	return append(b, p.Data...)
}

// SectionStart opens the RAM section; MemSize and EOS follow.
type SectionStart struct {
	ID       uint32
	Name     string // always "ram"
	Instance uint32
	Version  uint32
}

// Append implements Item.
func (s SectionStart) Append(b []byte) []byte {
	b = be.AppendUint32(append(b, typeSectionStart), s.ID)
	b = appendName(b, s.Name)
	return be.AppendUint32(be.AppendUint32(b, s.Instance), s.Version)
}

// SectionPart opens a run of RAM records in mid-migration, SectionEnd the last one.
type (
	SectionPart struct{ ID uint32 }
	SectionEnd  struct{ ID uint32 }
	// Footer closes every section.
	Footer struct{ ID uint32 }
)

// Append implements Item.
func (s SectionPart) Append(b []byte) []byte { return appendTyped(b, typeSectionPart, s.ID) }

// Append implements Item.
func (s SectionEnd) Append(b []byte) []byte { return appendTyped(b, typeSectionEnd, s.ID) }

// Append implements Item.
func (f Footer) Append(b []byte) []byte { return appendTyped(b, typeFooter, f.ID) }

// Block is a RAM block as the source sizes it: bytes in use and bytes per page of its back end.
type Block struct {
	Name     string
	Length   uint64
	PageSize uint64
}

// MemSize is the list of RAM blocks. It is in the stream once, in SectionStart.
type MemSize struct{ Blocks []Block }

// Append implements Item.
func (m MemSize) Append(b []byte) []byte {
	total := uint64(0)
	for _, blk := range m.Blocks {
		total += blk.Length
	}
	b = be.AppendUint64(b, total|flagMemSize)
	for _, blk := range m.Blocks {
		b = be.AppendUint64(appendName(b, blk.Name), blk.Length)
		if blk.PageSize != TargetPageSize {
			b = be.AppendUint64(b, blk.PageSize)
		}
	}
	return b
}

// Page is one page of a block. Data is 4096 bytes, or nil for a page filled with Fill
// (always 0 since QEMU 9). Data that a Reader returned is valid until its next call.
type Page struct {
	Block    string
	Offset   uint64 // in bytes, a multiple of TargetPageSize
	Data     []byte
	Fill     byte
	Continue bool // the encoding leaves the block's name out: it is that of the record before
}

// Append implements Item.
func (p Page) Append(b []byte) []byte {
	b = p.AppendRecordHead(b)
	if p.Data == nil {
		return append(b, p.Fill)
	}
	return append(b, p.Data...)
}

// AppendRecordHead appends what comes before the page's bytes, for writers that send
// those from elsewhere. Whether Data is nil still says what kind of record it is.
func (p Page) AppendRecordHead(b []byte) []byte {
	word := p.Offset | flagPage
	if p.Data == nil {
		word = p.Offset | flagZero
	}
	if p.Continue {
		return be.AppendUint64(b, word|flagContinue)
	}
	return appendName(be.AppendUint64(b, word), p.Block)
}

// EOS ends the RAM records of a section.
type EOS struct{}

// Append implements Item.
func (EOS) Append(b []byte) []byte { return be.AppendUint64(b, flagEOS) }

// EOF ends the stream of a post-copy migration.
type EOF struct{}

// Append implements Item.
func (EOF) Append(b []byte) []byte { return append(b, typeEOF) }

// Opaque is what follows the RAM of a pre-copy migration: device state, whose length only
// QEMU knows. The reader hands it out in pieces, up to the end of its input.
type Opaque struct{ Data []byte }

// Append implements Item.
func (o Opaque) Append(b []byte) []byte { return append(b, o.Data...) }

func appendTyped(b []byte, kind byte, id uint32) []byte {
	return be.AppendUint32(append(b, kind), id)
}

func appendName(b []byte, name string) []byte {
	return append(append(b, byte(len(name))), name...)
}

// cursor takes fields off a byte slice. After the first one that is not there, failed is
// set and every field reads as zero.
type cursor struct {
	b      []byte
	failed bool
}

func (c *cursor) take(n int) []byte {
	if c.failed || len(c.b) < n {
		c.failed = true
		return nil
	}
	taken := c.b[:n]
	c.b = c.b[n:]
	return taken
}

func (c *cursor) u8() byte {
	if b := c.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if b := c.take(4); b != nil {
		return be.Uint32(b)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if b := c.take(8); b != nil {
		return be.Uint64(b)
	}
	return 0
}

func (c *cursor) name() string { return string(c.take(int(c.u8()))) }
