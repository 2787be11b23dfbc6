package evict

import (
	"errors"
	"fmt"

	"vacate/internal/qemu/migstream"
)

// carriedStream is the stream of a QEMU whose domain libvirt itself moves. A guest that broke out
// of it may send anything.
type carriedStream struct {
	r       *migstream.Reader
	machine string
	blocks  []migstream.Block
	// answer sends QEMU the answer to its ping, for which some versions wait
	answer func(ping uint32) error
}

// errNoPostcopy: the migration was begun without it.
var errNoPostcopy = errors.New("the migration may not go to post-copy, and cannot be carried: " +
	"run `virsh migrate` again with --postcopy")

// head reads what QEMU sends ahead of the first page.
func (s *carriedStream) head() error {
	advised := false
	for {
		item, err := s.r.Next()
		if err != nil {
			return fmt.Errorf("the start of QEMU's stream: %w", err)
		}
		switch it := item.(type) {
		case migstream.Configuration:
			s.machine = it.Machine
		case migstream.MemSize:
			s.blocks = it.Blocks
		case migstream.Command:
			advised = advised || it.ID == migstream.CmdPostcopyAdvise
			if ping, err := it.Value(); err == nil {
				if err := s.answer(ping); err != nil {
					return err
				}
			}
		case migstream.Page, migstream.Packaged, migstream.EOF, migstream.Opaque:
			return fmt.Errorf("the start of QEMU's stream: %w: %T", migstream.ErrMalformed, item)
		case migstream.Footer:
			if !advised {
				return errNoPostcopy
			}
			return nil
		}
	}
}

// load reads up to the state of the devices, and returns that. Pages that come ahead of it are
// dropped: what the guest wrote to them since is not known here.
func (s *carriedStream) load() ([]byte, error) {
	for {
		item, err := s.r.Next()
		if err != nil {
			return nil, fmt.Errorf("QEMU's stream, up to the state of the devices: %w", err)
		}
		switch it := item.(type) {
		case migstream.Packaged:
			return it.Append(nil), nil
		case migstream.Opaque, migstream.EOF:
			return nil, errors.New("QEMU's stream ends without post-copy")
		}
	}
}

// restItems is how many items of the rest come between two signs of life.
const restItems = 1000

// rest reads up to the end. It shows that something still comes.
func (s *carriedStream) rest(alive func()) error {
	for i := 0; ; i++ {
		if i%restItems == 0 {
			alive()
		}
		item, err := s.r.Next()
		if err != nil {
			return fmt.Errorf("the rest of QEMU's stream: %w", err)
		}
		if _, ended := item.(migstream.EOF); ended {
			return nil
		}
	}
}
