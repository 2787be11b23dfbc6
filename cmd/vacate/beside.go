package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// beside makes a new file in the directory of the file name, to be renamed to it once it is whole.
// Nobody can guess its name, and one that is there already is never opened: in a directory
// like /tmp others may plant symbolic links. Its mode is as the umask has it.
func beside(name string) (*os.File, error) {
	for {
		temp := filepath.Join(filepath.Dir(name),
			fmt.Sprintf(".%s.%s.part", filepath.Base(name), rand.Text()))
		f, err := os.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o666) // #nosec G302 -- see above
		if !errors.Is(err, fs.ErrExist) {
			return f, err
		}
	}
}
