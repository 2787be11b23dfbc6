package bench

import (
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	pageSize = 4 << 10
	// kept is how far apart those pages are that stay taken. What lies between them is too
	// small to be reported as free: Linux does not go below 2 MiB.
	kept = 1 << 20
)

// warm keeps so many bytes of the machine's memory ready for the next program that takes some,
// until the returned function is called. A machine that is a VM itself may have given its free
// memory back to its own host (free page reporting). That host then makes every page anew when it
// is touched. That takes 5 to 9 µs, which have nothing to do with the measurement or with real
// hosts, and hit some runs and not others.
func warm(size int) (release func(), err error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("touch the machine's free memory: %w", err)
	}
	release = func() { unix.Munmap(b) }
	unix.Madvise(b, unix.MADV_NOHUGEPAGE) // a kernel without huge pages does not know it
	for i := 0; i < size; i += pageSize {
		b[i] = 1
	}
	for i := 0; i < size; i += kept {
		if err := unix.Madvise(b[i+pageSize:min(i+kept, size)], unix.MADV_DONTNEED); err != nil {
			release()
			return nil, fmt.Errorf("give memory back: %w", err)
		}
	}
	return release, nil
}
