// Package guestmodules loads kernel modules in the guests of a lab.
package guestmodules

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Load loads all modules of a directory. Which module needs which differs between kernels: one that
// lacks another's symbols is tried again as long as others get in.
func Load(dir string) error {
	files, err := filepath.Glob(dir + "/*")
	for len(files) > 0 {
		var waiting []string
		for _, name := range files {
			if err = load(name); errors.Is(err, unix.ENOENT) {
				waiting = append(waiting, name)
			} else if err != nil {
				return fmt.Errorf("load module %s: %w", name, err)
			}
		}
		if len(waiting) == len(files) {
			return fmt.Errorf("load module %s: it needs one that is not in the image", waiting[0])
		}
		files, err = waiting, nil
	}
	return err
}

func load(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	var flags int
	if filepath.Ext(name) != ".ko" { // but .ko.xz, for the kernel to unpack
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	if err := unix.FinitModule(int(f.Fd()), "", flags); err != unix.EEXIST {
		return err
	}
	return nil
}
