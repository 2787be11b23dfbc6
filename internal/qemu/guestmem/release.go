package guestmem

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Releasable reports whether Release may be called for a block. Its memory must be a file in memory
// without a name (memfd, or what QEMU makes in a directory of huge pages). A file with a name may
// be somebody's, like that of an ivshmem device; and private memory is only a process's own to give
// back.
func (m *Memory) Releasable(block int) bool {
	return m.blocks[block].Kind == SharedFile && m.backing[block].unnamed
}

// Release gives the memory of whole pages of a block back to the host. From then on they read as
// zero, for QEMU and for every other process that has the file. What they held is gone, so that the
// guest must never run again. It is an error unless the block is Releasable.
func (m *Memory) Release(block int, offset, length uint64) error {
	if err := m.within(block, offset, length); err != nil {
		return fmt.Errorf("give memory back: %w", err)
	}
	b, page := &m.backing[block], m.blocks[block].PageSize
	if offset%page != 0 || length%page != 0 || length == 0 {
		return fmt.Errorf("give memory back: %d bytes at %d are no whole pages of block %s", length,
			offset, m.blocks[block].Name)
	}
	f, err := m.writable(block)
	if err == nil {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, b.offset+int64(offset), int64(length)) // #nosec G115 -- within the block
	}
	if err != nil {
		return fmt.Errorf("give memory of block %s back: %w", m.blocks[block].Name, m.explain(err))
	}
	return nil
}

// writable returns the block's file, open for writing.
func (m *Memory) writable(block int) (*os.File, error) {
	m.viewing.Lock()
	defer m.viewing.Unlock()
	b := &m.backing[block]
	if b.written != nil {
		return b.written, nil
	}
	if !m.Releasable(block) {
		return nil, fmt.Errorf("it is not in a file without a name")
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", b.file.Fd()), os.O_RDWR, 0)
	if err == nil {
		b.written = f
	}
	return f, err
}
