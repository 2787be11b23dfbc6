package lab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// Records of QEMU's migration stream, and flags of the entries of its section "ram"
// (migration/savevm.c, migration/ram.c).
const (
	streamStart   = 1
	streamPart    = 2
	streamEnd     = 3
	streamFull    = 4
	streamConfig  = 7
	streamCommand = 8
	streamFooter  = 0x7e

	ramZero     = 2
	ramSizes    = 4
	ramPage     = 8
	ramEnd      = 0x10
	ramContinue = 0x20
	ramFlags    = 0xfff
)

// dropZeroes removes the pages of zeroes from a file with a migration stream.
func dropZeroes(file string) error {
	data, err := os.ReadFile(file)
	if err == nil {
		data, err = WithoutZeroes(data)
	}
	if err != nil {
		return fmt.Errorf("migration stream %s: %w", file, err)
	}
	return os.WriteFile(file, data, 0o600)
}

// WithoutZeroes returns a migration stream without its pages of zeroes. QEMU would read each before
// it writes none, and the VM would have memory that its guest never touched.
func WithoutZeroes(data []byte) ([]byte, error) {
	s := stream{in: data, out: bytes.NewBuffer(make([]byte, 0, len(data)))}
	if err := s.copy(); err != nil {
		return nil, fmt.Errorf("at byte %d: %w", s.at, err)
	}
	return s.out.Bytes(), nil
}

type stream struct {
	in  []byte
	at  int
	out *bytes.Buffer
	err error
	// block is the name of that of the page before, with its length. It outlives a section.
	block []byte
}

// take reads bytes, and pass also writes them.
func (s *stream) take(n int) []byte {
	if s.err != nil || n > len(s.in)-s.at {
		s.err = errors.New("it is cut")
		return make([]byte, max(n, 0)%4096)
	}
	s.at += n
	return s.in[s.at-n : s.at]
}

func (s *stream) pass(n int) []byte {
	b := s.take(n)
	s.out.Write(b)
	return b
}

func (s *stream) passName() string { return string(s.pass(int(s.pass(1)[0]))) }

// copy copies the stream up to the first section that is whole, which follows all of RAM, by its
// records, and the rest as it is.
func (s *stream) copy() error {
	s.pass(8) // magic, version
	for s.err == nil {
		switch kind := s.pass(1)[0]; kind {
		case streamConfig:
			s.pass(int(binary.BigEndian.Uint32(s.pass(4))))
		case streamCommand:
			s.pass(2)
			s.pass(int(binary.BigEndian.Uint16(s.pass(2))))
		case streamStart:
			s.pass(4) // id
			if name := s.passName(); name != "ram" {
				return fmt.Errorf("it has a section %.40q", name)
			}
			s.pass(8) // instance, version
			s.ram()
		case streamPart, streamEnd:
			s.pass(4)
			s.ram()
		case streamFooter:
			s.pass(4)
		case streamFull:
			s.pass(len(s.in) - s.at)
			return s.err
		default:
			return fmt.Errorf("it has a record of type %d", kind)
		}
	}
	return s.err
}

// ram copies the entries of one section.
func (s *stream) ram() {
	var written []byte // the block of the last page that was kept, in this section
	for s.err == nil {
		word := binary.BigEndian.Uint64(s.take(8))
		address, flags := word&^ramFlags, word&ramFlags
		if flags&ramContinue == 0 && flags&(ramZero|ramPage) != 0 {
			n := int(s.in[min(s.at, len(s.in)-1)])
			s.block = s.take(1 + n)
		}
		switch flags &^ ramContinue {
		case ramSizes:
			s.out.Write(binary.BigEndian.AppendUint64(nil, word))
			for left := int64(address); left > 0 && s.err == nil; {
				s.passName()
				left -= int64(binary.BigEndian.Uint64(s.pass(8)))
			}
		case ramZero:
			if s.take(1)[0] != 0 {
				s.err = errors.New("a page is filled with another byte than zero")
			}
		case ramPage:
			flags = ramPage
			if bytes.Equal(s.block, written) {
				flags |= ramContinue
			}
			s.out.Write(binary.BigEndian.AppendUint64(nil, address|flags))
			if flags&ramContinue == 0 {
				s.out.Write(s.block)
				written = s.block
			}
			s.pass(4096)
		case ramEnd:
			s.out.Write(binary.BigEndian.AppendUint64(nil, word))
			return
		default:
			s.err = fmt.Errorf("RAM has an entry with flags %#x", flags)
		}
	}
}
