package doctor

import (
	"encoding/binary"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// openQuietly opens a file for reading, without leaving a time of access where that is allowed.
func openQuietly(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOATIME|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EPERM) {
		f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	}
	return f, err
}

// maxChain is how many images may back one another.
const maxChain = 32

// backedBy returns the name in a qcow2 image's header of what it is backed by, or "". See
// docs/interop/qcow2.txt of QEMU: magic, u32 version, u64 offset and u32 length of the name.
func backedBy(path string) string {
	f, err := openQuietly(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() && st.Mode()&os.ModeDevice == 0 {
		return ""
	}
	var h [20]byte
	if _, err := f.ReadAt(h[:], 0); err != nil || string(h[:4]) != "QFI\xfb" {
		return ""
	}
	at, n := binary.BigEndian.Uint64(h[8:]), binary.BigEndian.Uint32(h[16:])
	if at == 0 || at > 1<<30 || n == 0 || n > 1023 {
		return ""
	}
	name := make([]byte, n)
	if _, err := f.ReadAt(name, int64(at)); err != nil {
		return ""
	}
	return string(name)
}
