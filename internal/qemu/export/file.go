package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// WriteFile writes the VM to a new file that only its owner can read, as it holds all that the
// guest has in memory. It is called name+".part" until it is whole and on the disk, and removed
// if it does not come to that. A file that is there already is left alone, and is an error that
// wraps os.ErrExist. Room for all of it is reserved first, so a disk without that much is told
// at once, by an error that wraps the system's. See Write for ctx and progress.
func (v VM) WriteFile(ctx context.Context, name string,
	progress func(done, total int)) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("export VM to %s: %w", name, err)
		}
	}()
	s, err := v.stream()
	if err != nil {
		return err
	}
	if _, err := os.Lstat(name); err == nil {
		return fmt.Errorf("%w: remove it, or choose another name", os.ErrExist)
	}
	part := name + ".part"
	f, err := os.OpenFile(part, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%s: %w: an export is writing it, or one was cut off; remove it in "+
			"that case", part, os.ErrExist)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(part)
		}
	}()
	size, err := s.size(ctx)
	if err != nil {
		return err
	}
	if err := reserve(ctx, f, size); err != nil {
		return full(err, size)
	}
	if err := s.write(ctx, f, progress); err != nil {
		return full(err, size)
	}
	written, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	// What was reserved for pages that turned out to be zero.
	if err := f.Truncate(written); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return full(err, size)
	}
	if err := f.Close(); err != nil {
		return full(err, size)
	}
	return publish(part, name)
}

// reserve has the file system set size bytes aside, if it can.
func reserve(ctx context.Context, f *os.File, size int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, 0, size)
		switch {
		case err == unix.EINTR && ctx.Err() == nil:
			continue // it goes on where it was
		case err == unix.EINTR:
			return context.Cause(ctx)
		case err == unix.EOPNOTSUPP || err == unix.ENOSYS:
			return nil
		case err != nil:
			return os.NewSyscallError("fallocate", err)
		}
		return nil
	}
}

// full says what to do where there is no room.
func full(err error, size int64) error {
	for _, e := range []error{unix.ENOSPC, unix.EDQUOT, unix.EFBIG} {
		if errors.Is(err, e) {
			return fmt.Errorf("up to %d MiB are needed, and there is no room: make some, or "+
				"choose another file system: %w", size>>20+1, err)
		}
	}
	return err
}

// publish gives the file its name, for good, unless that is taken by now.
func publish(part, name string) error {
	err := unix.Renameat2(unix.AT_FDCWD, part, unix.AT_FDCWD, name, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || err == unix.ENOSYS { // a file system that cannot tell
		err = os.Rename(part, name)
	}
	if err == unix.EEXIST {
		return fmt.Errorf("%w: it came while the VM was written", os.ErrExist)
	}
	if err != nil {
		return fmt.Errorf("rename %s: %w", part, err)
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
