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
	Dir   string // a directory on it, empty at first
	mount string
	bytes uint64
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
	if err := unix.Mount("vacate-lab", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV,
		fmt.Sprintf("size=%d,mode=700", bytes)); err != nil {
		return nil, fmt.Errorf("make small disk: mount tmpfs at %s: %w", at, err)
	}
	d := &SmallDisk{filepath.Join(at, "dir"), at, bytes}
	return d, os.Mkdir(d.Dir, 0o700)
}

// Fill takes all space that is left, at once, so that a program that needs more gets ENOSPC. Memory
// that is mapped from a file there gets ENOMEM, or SIGBUS.
func (d *SmallDisk) Fill() error {
	for {
		var fs unix.Statfs_t
		if err := unix.Statfs(d.mount, &fs); err != nil {
			return fmt.Errorf("fill small disk: %w", err)
		}
		// The kernel makes no file system smaller than what is in it.
		err := d.resize((fs.Blocks - fs.Bfree) * uint64(fs.Bsize))
		if errors.Is(err, unix.EINVAL) {
			continue // somebody wrote meanwhile
		}
		if err != nil {
			return fmt.Errorf("fill small disk: %w", err)
		}
		return nil
	}
}

// Free gives back what Fill took.
func (d *SmallDisk) Free() error {
	if err := d.resize(d.bytes); err != nil {
		return fmt.Errorf("free small disk: %w", err)
	}
	return nil
}

// resize has another size than 0, which means no limit to tmpfs.
func (d *SmallDisk) resize(bytes uint64) error {
	page := uint64(os.Getpagesize())
	options := fmt.Sprintf("size=%d", max(bytes, page))
	return unix.Mount("vacate-lab", d.mount, "tmpfs", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV,
		options)
}

// Close takes the file system away before the lab is closed; files there may be open still.
func (d *SmallDisk) Close() error {
	if err := unix.Unmount(d.mount, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("remove small disk: %w", err)
	}
	return os.Remove(d.mount)
}
