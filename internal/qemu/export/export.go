// Package export writes the memory and devices of a VM that an eviction has frozen at the source to
// a file. QEMU can start the VM from it, as it was at the freeze.
//
// An operator needs that when the destination is dead and may have run the VM: a copy of what the
// source holds, before the decision what becomes of it. What is written is the stream of a plain
// pre-copy migration:
//
//	QEVM, configuration                     of the captured head, without its commands
//	SectionStart "ram", MemSize, EOS        the same, less the page sizes, see below
//	SectionEnd "ram", every page, EOS       from QEMU's memory
//	FULL section of each device             of the captured package, without its commands
//	EOF, VMDescription "{}"
//
// The head and the package come from a post-copy migration. Its commands must go: QEMU
// would take the stream for post-copy upon POSTCOPY_ADVISE. Without that, it wants no page
// size behind a block of huge pages (parse_ramblock in migration/ram.c). The device
// sections are the same in both. The description only serves debugging, but a QEMU
// says that it misses one if there is none (qemu_loadvm_state in migration/savevm.c).
//
// # Starting the VM from it
//
// It takes a QEMU of the same version, started with the options that the source's QEMU was
// started with, and in addition
//
//	-S -incoming "exec:cat 'FILE'"
//
// or, from QEMU 8.2 on, and where QEMU's sandbox lets it start no programs,
//
//	-S -incoming file:FILE
//
// Once its monitor says "paused" to `info status` (before, it says "inmigrate"), the VM is
// loaded, and `cont` runs it. The file stays as it is and serves any number of times.
//
// The disks are not in it. If the VM ran on at the destination after the freeze, the disks are
// ahead of the memory in the file. To run it may then ruin its file systems, unless the disks go
// back to the time of the freeze, too. And at no time may two copies of it run: not this one beside
// the source's, nor beside the destination's.
//
// Tried with QEMU 7.2, 10.0 and 11.1.
package export

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
)

const (
	pageSize = migstream.TargetPageSize
	// maxHead is the size of the longest head that is accepted. MaxBlocks names fit.
	maxHead = 1 << 20
	// chunk is how many pages are read and written in one go.
	chunk = 256
	// maxRecord is the size of the head of a page's record, with the block's name.
	maxRecord = 8 + 1 + migstream.MaxName
	// pageRecord and zeroRecord are the sizes of records without a name.
	pageRecord, zeroRecord = 8 + pageSize, 8 + 1
)

// Memory is the RAM of the frozen VM, as *guestmem.Memory reads it.
type Memory interface {
	Blocks() []guestmem.Block
	Populated(block int, first, n uint64, dst []uint64) error
	ReadRanges(dst []byte, ranges []guestmem.Range) error
}

// VM is a VM that is frozen: its QEMU lives, and does not run it. Nothing in it is changed,
// so it may be exported while an eviction reads the same memory. All bytes are checked, and
// may be hostile.
type VM struct {
	Memory Memory
	// Head is QEMU's migration stream from its header to the footer of the RAM section's
	// start, as it was captured.
	Head []byte
	// Load is the package with the state of all devices, with or without the command
	// SWITCHOVER_START ahead, as it was captured.
	Load []byte
}

// Write writes the VM as a migration stream. It takes some MiB of memory, whatever the size of the
// VM. After every MiB it calls progress, if that is not nil, with pages of 4 KiB, and looks at ctx.
// On an error, what was written is of no use.
func (v VM) Write(ctx context.Context, w io.Writer, progress func(done, total int)) error {
	s, err := v.stream()
	if err != nil {
		return fmt.Errorf("export VM: %w", err)
	}
	if err := s.write(ctx, w, progress); err != nil {
		return fmt.Errorf("export VM: %w", err)
	}
	return nil
}

// stream is what Write writes.
type stream struct {
	memory  Memory
	head    []byte // up to the footer of the RAM section's start
	ram     uint32 // id of the RAM section
	blocks  []block
	devices []byte // their sections
}

// block is a RAM block.
type block struct {
	name  string
	pages uint64 // of 4 KiB
	index int    // in the memory's blocks
}

// stream checks all that can be, before a byte is written.
func (v VM) stream() (*stream, error) {
	s := &stream{memory: v.Memory}
	r, blocks, err := s.takeHead(v.Head)
	if err != nil {
		return nil, fmt.Errorf("captured head: %w", err)
	}
	if s.devices, err = takeDevices(r, v.Load); err != nil {
		return nil, fmt.Errorf("captured devices: %w", err)
	}
	for _, b := range blocks {
		found, err := v.find(b)
		if err != nil {
			return nil, err
		}
		s.blocks = append(s.blocks, found)
	}
	return s, nil
}

var errUnexpected = fmt.Errorf("%w: not as an eviction captures it", migstream.ErrMalformed)

// takeHead takes the head apart, and makes that of a pre-copy migration.
func (s *stream) takeHead(head []byte) (*migstream.Reader, []migstream.Block, error) {
	if len(head) > maxHead {
		return nil, nil, fmt.Errorf("%w: %d bytes, more than %d", errUnexpected, len(head), maxHead)
	}
	r := migstream.NewReader(bytes.NewReader(head))
	var blocks []migstream.Block
	for {
		item, err := r.Next()
		if err != nil {
			return nil, nil, err
		}
		switch it := item.(type) {
		case migstream.Header, migstream.Configuration, migstream.SectionStart, migstream.EOS:
			s.head = item.Append(s.head)
		case migstream.MemSize:
			blocks = it.Blocks
			var plain migstream.MemSize
			for _, b := range blocks {
				b.PageSize = pageSize
				plain.Blocks = append(plain.Blocks, b)
			}
			s.head = plain.Append(s.head)
		case migstream.Command:
			switch it.ID {
			case migstream.CmdOpenReturnPath, migstream.CmdPing, migstream.CmdPostcopyAdvise:
			default:
				return nil, nil, fmt.Errorf("%w: %v", errUnexpected, it.ID)
			}
		case migstream.Footer:
			if r.Offset() != int64(len(head)) {
				return nil, nil, fmt.Errorf("%w: %d bytes behind it", errUnexpected,
					int64(len(head))-r.Offset())
			}
			s.head, s.ram = item.Append(s.head), it.ID
			return r, blocks, nil
		default:
			return nil, nil, fmt.Errorf("%w: %T", errUnexpected, item)
		}
	}
}

// takeDevices returns the device sections of the package in load; r has read the head.
func takeDevices(r *migstream.Reader, load []byte) ([]byte, error) {
	r = r.Resume(bytes.NewReader(load))
	for {
		item, err := r.Next()
		if err != nil {
			return nil, err
		}
		switch it := item.(type) {
		case migstream.Packaged:
			if r.Offset() != int64(len(load)) {
				return nil, fmt.Errorf("%w: %d bytes behind the package", errUnexpected,
					int64(len(load))-r.Offset())
			}
			return sections(it.Data)
		case migstream.Command:
			// Only devices that migrate over connections of their own heed it.
			if it.ID != migstream.CmdSwitchoverStart {
				return nil, fmt.Errorf("%w: %v", errUnexpected, it.ID)
			}
		default:
			return nil, fmt.Errorf("%w: %T", errUnexpected, item)
		}
	}
}

// sections strips a package (postcopy_start in migration/migration.c) of its commands:
// LISTEN in front, and RUN behind, with pings ahead. Where a section ends is not told, but
// the last one ends in its footer, which cannot be mistaken for a ping's end.
func sections(data []byte) ([]byte, error) {
	const typeFull, typeFooter, footerSize = 0x04, 0x7e, 5
	data, listens := bytes.CutPrefix(data,
		migstream.Command{ID: migstream.CmdPostcopyListen}.Append(nil))
	data, runs := bytes.CutSuffix(data, migstream.Command{ID: migstream.CmdPostcopyRun}.Append(nil))
	if !listens || !runs {
		return nil, fmt.Errorf("%w: a package without LISTEN in front and RUN at its end",
			errUnexpected)
	}
	ping := migstream.PingCommand(0).Append(nil)
	for n := len(data) - len(ping); n >= 0 &&
		bytes.HasPrefix(data[n:], ping[:len(ping)-4]); n -= len(ping) {
		data = data[:n]
	}
	if n := len(data) - footerSize; n <= 0 || data[0] != typeFull || data[n] != typeFooter {
		return nil, fmt.Errorf("%w: a package without sections of devices", errUnexpected)
	}
	return data, nil
}

// find finds the data of a block of the head.
func (v VM) find(b migstream.Block) (block, error) {
	found := block{name: b.Name, pages: b.Length / pageSize}
	for i, m := range v.Memory.Blocks() {
		if m.Name != b.Name || !m.Located {
			continue
		}
		if m.Size < b.Length || m.PageSize != b.PageSize {
			return block{},
				fmt.Errorf("memory %q has %d KiB in pages of %d KiB, and %d in pages of %d when "+
					"it was frozen: is this QEMU the one that was?",
					b.Name, m.Size>>10, m.PageSize>>10, b.Length>>10, b.PageSize>>10)
		}
		found.index = i
		return found, nil
	}
	return block{}, fmt.Errorf("memory %q: %w", b.Name, guestmem.ErrNotLocated)
}

// pages is the number of all pages.
func (s *stream) pages() int {
	n := uint64(0)
	for _, b := range s.blocks {
		n += b.pages
	}
	return int(n)
}

// end is what follows the devices.
func end() []byte {
	const typeVMDescription = 0x06
	return append(migstream.EOF{}.Append(nil), typeVMDescription, 0, 0, 0, 2, '{', '}')
}

func (s *stream) write(ctx context.Context, w io.Writer, progress func(done, total int)) error {
	out := migstream.SectionEnd{ID: s.ram}.Append(s.head)
	if _, err := w.Write(out); err != nil {
		return err
	}
	done, total := 0, s.pages()
	out = make([]byte, 0, chunk*pageRecord+maxRecord)
	buf := make([]byte, chunk*pageSize)
	for _, b := range s.blocks {
		for first := uint64(0); first < b.pages; first += chunk {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(chunk, b.pages-first)
			populated, data, err := s.read(b, first, n, buf)
			if err != nil {
				return err
			}
			if _, err := w.Write(b.appendPages(out[:0], first, n, populated, data)); err != nil {
				return err
			}
			done += int(n)
			if progress != nil {
				progress(done, total)
			}
		}
	}
	out = migstream.Footer{ID: s.ram}.Append(migstream.EOS{}.Append(out[:0]))
	for _, b := range [][]byte{out, s.devices, end()} {
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// populated has a bit for each page of a chunk that may hold anything but zero.
type populated [chunk / 64]uint64

func (p *populated) has(i uint64) bool { return p[i/64]>>(i%64)&1 != 0 }

// read reads those of n pages from first on that are populated. buf takes them.
func (s *stream) read(b block, first, n uint64, buf []byte) (p populated, data []byte, err error) {
	if err = s.memory.Populated(b.index, first, n, p[:]); err != nil {
		return p, nil, err
	}
	var ranges []guestmem.Range
	size := 0
	for i := range n {
		if !p.has(i) {
			continue
		}
		if last := len(ranges) - 1; i > 0 && p.has(i-1) {
			ranges[last].Length += pageSize
		} else {
			ranges = append(ranges,
				guestmem.Range{Block: b.index, Offset: (first + i) * pageSize, Length: pageSize})
		}
		size += pageSize
	}
	return p, buf[:size], s.memory.ReadRanges(buf[:size], ranges)
}

// appendPages appends records of n pages from first on; data holds those that are populated.
// Zero pages are written, too: QEMU fills some blocks when it starts.
func (b block) appendPages(out []byte, first, n uint64, p populated, data []byte) []byte {
	for i := range n {
		page := migstream.Page{Block: b.name, Offset: (first + i) * pageSize, Continue: i > 0}
		if p.has(i) {
			if !guestmem.IsZero(data[:pageSize]) {
				page.Data = data[:pageSize]
			}
			data = data[pageSize:]
		}
		out = page.Append(out)
	}
	return out
}

// size is the most bytes that write can write, as the memory is now.
func (s *stream) size(ctx context.Context) (int64, error) {
	size := int64(len(s.head) + len(s.devices) + len(end()) + 32)
	for _, b := range s.blocks {
		for first := uint64(0); first < b.pages; first += chunk {
			if ctx.Err() != nil {
				return 0, context.Cause(ctx)
			}
			n := min(chunk, b.pages-first)
			var p populated
			if err := s.memory.Populated(b.index, first, n, p[:]); err != nil {
				return 0, err
			}
			size += maxRecord
			for i := range n {
				if p.has(i) {
					size += pageRecord
				} else {
					size += zeroRecord
				}
			}
		}
	}
	return size, nil
}

var _ Memory = (*guestmem.Memory)(nil)
