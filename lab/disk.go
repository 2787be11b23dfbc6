package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// diskPrefix begins the names of small disks in a run directory.
const diskPrefix = "disk-"

// SmallDisk is a file system that is soon full, for what a daemon writes. All processes of the
// machine see it; it is gone when the lab is closed, or else with the lab's run directory.
type SmallDisk struct {
	Dir    string // a directory on it, empty at first
	filler string // file that takes what is left
}

// SmallDisk makes a file system (in memory, tmpfs) of a size in bytes, rounded up to pages.
func (l *Lab) SmallDisk(bytes uint64) (*SmallDisk, error) {
	if bytes == 0 { // which means no limit to tmpfs
		return nil, errors.New("make small disk: want a size")
	}
	at, err := os.MkdirTemp(l.run, diskPrefix)
	if err != nil {
		return nil, fmt.Errorf("make small disk: %w", err)
	}
	if err := unix.Mount("vacate-lab", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("size=%d,mode=700", bytes)); err != nil {
		return nil, fmt.Errorf("make small disk: mount tmpfs at %s: %w", at, err)
	}
	d := &SmallDisk{filepath.Join(at, "dir"), filepath.Join(at, "filler")}
	return d, os.Mkdir(d.Dir, 0o700)
}

// Fill takes all space that is left, so that whoever writes more gets ENOSPC.
func (d *SmallDisk) Fill() error {
	f, err := os.OpenFile(d.filler, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("fill small disk: %w", err)
	}
	defer f.Close()
	chunk := make([]byte, os.Getpagesize())
	for {
		if _, err := f.Write(chunk); errors.Is(err, unix.ENOSPC) {
			return nil
		} else if err != nil {
			return fmt.Errorf("fill small disk: %w", err)
		}
	}
}

// Free gives back what Fill took.
func (d *SmallDisk) Free() error {
	if err := os.Remove(d.filler); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("free small disk: %w", err)
	}
	return nil
}
