// Package settings reads the configuration file of a daemon.
package settings

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/BurntSushi/toml"
)

// maxFile bounds a file, in bytes.
const maxFile = 1 << 20

// Read reads a file of TOML into a struct that has the defaults. A setting that the struct does not
// have is an error. help is the command that explains the file. It returns the absolute path of the
// file's directory, from which relative paths count.
func Read(file, help string, into any) (dir string, err error) {
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: make one, see %s", err, help)
	} else if err != nil {
		return "", err
	}
	if info.Size() > maxFile {
		return "", fmt.Errorf("%s has more than %d bytes", file, maxFile)
	}
	meta, err := toml.DecodeFile(file, into)
	if err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return "", fmt.Errorf("%s: there is no setting %q", file, unknown[0].String())
	}
	return filepath.Abs(filepath.Dir(file))
}

// SplitAddress returns the host of HOST:PORT, whose port must be one, and least at least.
func SplitAddress(addr string, least int) (host string, err error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", errors.New("is not HOST:PORT")
	}
	if n, err := net.LookupPort("tcp", port); err != nil || n < least {
		return "", fmt.Errorf("has no port %q: want a number from %d to 65535", port, least)
	}
	return host, nil
}
