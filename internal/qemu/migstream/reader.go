package migstream

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// Reader decodes a forward stream. It is strict: an element out of place, a name or
// length out of bounds, or an unknown flag is an error that wraps ErrMalformed or
// ErrUnsupported, and after an error it returns that error for ever. It is not safe for
// concurrent use.
type Reader struct {
	r   *bufio.Reader
	off int64
	err error

	place   place
	section uint32 // id of the RAM section, once started
	started bool
	blocks  map[string]Block
	last    string // block of the last page record
	page    [TargetPageSize]byte
	opaque  []byte
}

// place is where in the grammar the reader is.
type place int

const (
	atHeader        place = iota
	atConfiguration       // a Configuration or any top-level element
	atTop
	atMemSize // right behind SectionStart
	atRecords // inside a section
	atFooter
	atOpaque
	atEnd
)

// NewReader returns a reader of the stream in r, which it reads ahead of what it has
// returned by no more than 64 KiB.
func NewReader(r io.Reader) *Reader {
	return &Reader{r: bufio.NewReaderSize(r, 64<<10)}
}

// Resume returns a reader of the stream that goes on in in after QEMU's post-copy recovery:
// it has no header, and knows the blocks of r's stream.
func (r *Reader) Resume(in io.Reader) *Reader {
	return &Reader{
		r: bufio.NewReaderSize(in, 64<<10), place: atTop,
		section: r.section, started: r.started, blocks: r.blocks,
	}
}

// Offset is the number of bytes of the items returned so far.
func (r *Reader) Offset() int64 { return r.off }

// SectionID is the id of the RAM section, once SectionStart was returned.
func (r *Reader) SectionID() uint32 { return r.section }

// Next returns the next item, io.EOF after the last one, and io.ErrUnexpectedEOF, wrapped,
// where the input ends in mid-stream.
func (r *Reader) Next() (Item, error) {
	if r.err != nil {
		return nil, r.err
	}
	item, err := r.next()
	if err != nil {
		if errors.Is(err, io.EOF) && r.place != atEnd && r.place != atOpaque {
			err = fmt.Errorf("the stream ends in its middle: %w", io.ErrUnexpectedEOF)
		}
		if err != io.EOF {
			err = fmt.Errorf("at byte %d: %w", r.off, err)
		}
		r.err = err
		return nil, err
	}
	return item, nil
}

func (r *Reader) next() (Item, error) {
	switch r.place {
	case atHeader:
		return r.header()
	case atMemSize:
		return r.memSize()
	case atRecords:
		return r.record()
	case atFooter:
		return r.footer()
	case atOpaque:
		return r.rest()
	case atEnd:
		if _, err := r.r.ReadByte(); err == nil {
			return nil, fmt.Errorf("%w: bytes behind the end", ErrMalformed)
		}
		return nil, io.EOF
	}
	kind, err := r.r.ReadByte()
	if err != nil {
		return nil, err
	}
	r.off++
	if kind == typeConfiguration && r.place == atConfiguration {
		return r.configuration()
	}
	r.place = atTop
	switch kind {
	case typeCommand:
		return r.command()
	case typeSectionStart:
		return r.sectionStart()
	case typeSectionPart, typeSectionEnd:
		id, err := r.u32()
		if err != nil {
			return nil, err
		}
		if !r.started || id != r.section {
			return nil, fmt.Errorf("%w: part of section %d, which was not started", ErrMalformed,
				id)
		}
		r.place = atRecords
		if kind == typeSectionPart {
			return SectionPart{id}, nil
		}
		return SectionEnd{id}, nil
	case typeSectionFull:
		if !r.started {
			return nil,
				fmt.Errorf("%w: a device saves state ahead of RAM (virtio-mem does): such a VM "+
					"cannot be evicted", ErrUnsupported)
		}
		r.place = atOpaque
		r.off--
		if err := r.r.UnreadByte(); err != nil {
			return nil, err
		}
		return r.rest()
	case typeEOF:
		r.place = atEnd
		return EOF{}, nil
	}
	return nil, fmt.Errorf("%w: no element starts with byte %#02x", ErrMalformed, kind)
}

func (r *Reader) header() (Item, error) {
	b, err := r.bytes(8)
	if err != nil {
		return nil, err
	}
	if string(b[:4]) != "QEVM" || be.Uint32(b[4:]) != Version {
		return nil, fmt.Errorf("%w: it starts with % x, not with QEMU's mark and version 3",
			ErrMalformed, b)
	}
	r.place = atConfiguration
	return Header{}, nil
}

func (r *Reader) configuration() (Item, error) {
	n, err := r.u32()
	if err != nil {
		return nil, err
	}
	if n == 0 || n > MaxName {
		return nil, fmt.Errorf("%w: machine type of %d bytes", ErrMalformed, n)
	}
	name, err := r.bytes(int(n))
	if err != nil {
		return nil, err
	}
	machine := string(name)
	next, err := r.r.Peek(1)
	if err == nil && next[0] == typeSubsection {
		return nil,
			fmt.Errorf("%w: the configuration has subsections; turn the capabilities "+
				"x-ignore-shared, mapped-ram and validate-uuid off", ErrUnsupported)
	}
	r.place = atTop
	return Configuration{machine}, nil
}

func (r *Reader) command() (Item, error) {
	head, err := r.bytes(4)
	if err != nil {
		return nil, err
	}
	id, n := CommandID(be.Uint16(head)), be.Uint16(head[2:])
	if id == CmdPackaged {
		if n != 4 {
			return nil, fmt.Errorf("%w: package command of %d bytes", ErrMalformed, n)
		}
		size, err := r.u32()
		if err != nil {
			return nil, err
		}
		if size == 0 || size > MaxPackage {
			return nil, fmt.Errorf("%w: package of %d bytes; QEMU's limit is %d", ErrMalformed,
				size, MaxPackage)
		}
		// Grown as it arrives: a lying length costs no more memory than the bytes sent.
		data, err := io.ReadAll(io.LimitReader(r.r, int64(size)))
		r.off += int64(len(data))
		if err != nil {
			return nil, err
		}
		if len(data) < int(size) {
			return nil, io.EOF
		}
		return Packaged{data}, nil
	}
	payload, err := r.bytes(int(n))
	if err != nil {
		return nil, err
	}
	c := Command{id, payload}
	return c, c.check()
}

func (r *Reader) sectionStart() (Item, error) {
	id, err := r.u32()
	if err != nil {
		return nil, err
	}
	name, err := r.name()
	if err != nil {
		return nil, err
	}
	b, err := r.bytes(8)
	if err != nil {
		return nil, err
	}
	s := SectionStart{id, name, be.Uint32(b), be.Uint32(b[4:])}
	switch {
	case name != "ram":
		return nil,
			fmt.Errorf("%w: section %q is sent in parts; only RAM may be (turn dirty-bitmaps "+
				"and block migration off)", ErrUnsupported, name)
	case r.started:
		return nil, fmt.Errorf("%w: a second RAM section", ErrMalformed)
	case s.Instance != 0 || s.Version != RAMVersion:
		return nil, fmt.Errorf("%w: RAM section of instance %d, version %d", ErrUnsupported,
			s.Instance, s.Version)
	}
	r.section, r.started, r.place = id, true, atMemSize
	return s, nil
}

// memSize reads the block list. Whether a page size follows a block's length is not in the
// bytes: QEMU sends it in post-copy for blocks whose back end has other than the host's
// pages. A name cannot be mistaken for one: a page size's first byte is 0, a name's is not.
func (r *Reader) memSize() (Item, error) {
	word, err := r.u64()
	if err != nil {
		return nil, err
	}
	if word&flagMask != flagMemSize {
		return nil,
			fmt.Errorf("%w: the RAM section starts with record flags %#x, not with the blocks",
				ErrMalformed, word&flagMask)
	}
	total := word &^ flagMask
	var m MemSize
	r.blocks = map[string]Block{}
	for total > 0 {
		name, err := r.name()
		if err != nil {
			return nil, err
		}
		length, err := r.u64()
		if err != nil {
			return nil, err
		}
		_, twice := r.blocks[name]
		switch {
		case len(m.Blocks) == MaxBlocks:
			return nil, fmt.Errorf("%w: more than %d RAM blocks", ErrUnsupported, MaxBlocks)
		case name == "" || twice:
			return nil, fmt.Errorf("%w: block name %q is empty or used twice", ErrMalformed, name)
		case length == 0 || length%TargetPageSize != 0 || length > total || length > maxBlockLength:
			return nil, fmt.Errorf("%w: block %q of %d bytes, with %d bytes of RAM left",
				ErrMalformed, name, length, total)
		}
		blk := Block{name, length, TargetPageSize}
		// A page size's high bytes are 0; an EOS, which also starts with 0, ends in 0x10.
		next, err := r.r.Peek(8)
		if err != nil {
			return nil, err
		}
		if size := be.Uint64(next); next[0] == 0 && size != flagEOS {
			if size <= TargetPageSize || size&(size-1) != 0 || size > 1<<30 || length%size != 0 {
				return nil, fmt.Errorf("%w: block %q has pages of %d bytes", ErrMalformed, name,
					size)
			}
			blk.PageSize = size
			if _, err := r.u64(); err != nil {
				return nil, err
			}
		}
		total -= length
		r.blocks[name] = blk
		m.Blocks = append(m.Blocks, blk)
	}
	if len(m.Blocks) == 0 {
		return nil, fmt.Errorf("%w: no RAM blocks", ErrMalformed)
	}
	r.place = atRecords
	return m, nil
}

func (r *Reader) record() (Item, error) {
	word, err := r.u64()
	if err != nil {
		return nil, err
	}
	flags, offset := word&flagMask, word&^flagMask
	if flags == flagEOS && offset == 0 {
		r.place = atFooter
		return EOS{}, nil
	}
	p := Page{Offset: offset, Continue: flags&flagContinue != 0}
	if kind := flags &^ flagContinue; kind != flagZero && kind != flagPage {
		if what, known := unsupportedFlags[kind]; known {
			return nil, fmt.Errorf("%w: %s", ErrUnsupported, what)
		}
		return nil, fmt.Errorf("%w: record flags %#x", ErrMalformed, flags)
	}
	if p.Continue {
		p.Block = r.last
	} else {
		if p.Block, err = r.name(); err != nil {
			return nil, err
		}
	}
	blk, ok := r.blocks[p.Block]
	if !ok || offset >= blk.Length {
		return nil, fmt.Errorf("%w: page at %#x of block %q, which has %#x bytes", ErrMalformed,
			offset, p.Block, blk.Length)
	}
	r.last = p.Block
	if flags&flagPage != 0 {
		p.Data = r.page[:]
		return p, r.full(p.Data)
	}
	p.Fill, err = r.u8()
	return p, err
}

var unsupportedFlags = map[uint64]string{
	flagXBZRLE:   "a page is delta-coded: turn the capability xbzrle off",
	flagHook:     "the stream is for RDMA: it cannot be carried over a socket",
	flagCompress: "a page is compressed by QEMU: turn the capability compress off",
	flagMultiFD:  "pages travel on other connections: turn the capability multifd off",
}

func (r *Reader) footer() (Item, error) {
	b, err := r.bytes(5)
	if err != nil {
		return nil, err
	}
	if b[0] != typeFooter || be.Uint32(b[1:]) != r.section {
		return nil, fmt.Errorf("%w: % x in place of the footer of section %d", ErrMalformed, b,
			r.section)
	}
	r.place = atTop
	return Footer{r.section}, nil
}

func (r *Reader) rest() (Item, error) {
	r.place = atOpaque
	if r.opaque == nil {
		r.opaque = make([]byte, 64<<10)
	}
	n, err := r.r.Read(r.opaque)
	r.off += int64(n)
	if n == 0 && err == nil {
		err = io.ErrNoProgress
	}
	if n == 0 {
		return nil, err
	}
	return Opaque{r.opaque[:n]}, nil
}

func (r *Reader) full(b []byte) error {
	n, err := io.ReadFull(r.r, b)
	r.off += int64(n)
	if err == io.ErrUnexpectedEOF {
		err = io.EOF
	}
	return err
}

// bytes reads n bytes; n is at most 64 KiB.
func (r *Reader) bytes(n int) ([]byte, error) {
	b := make([]byte, n)
	return b, r.full(b)
}

func (r *Reader) fixed(n int) ([]byte, error) {
	b := r.page[:n]
	return b, r.full(b)
}

func (r *Reader) u8() (byte, error) {
	b, err := r.fixed(1)
	return b[0], err
}

func (r *Reader) u32() (uint32, error) {
	b, err := r.fixed(4)
	return be.Uint32(b), err
}

func (r *Reader) u64() (uint64, error) {
	b, err := r.fixed(8)
	return be.Uint64(b), err
}

func (r *Reader) name() (string, error) {
	n, err := r.u8()
	if err != nil {
		return "", err
	}
	b, err := r.bytes(int(n))
	return string(b), err
}
