package orders

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	header         = "vacate-orders1 "
	standingHeader = "vacate-standing1 "
	maxFile        = 8 << 10
	maxStanding    = 1 << 20
)

// File keeps a mark on a disk: one line with a header, a checksum and JSON. It is replaced as a
// whole.
type File struct {
	path string
	mark Mark
}

// Open reads a file; there need be none. One that does not read as it was written is an error: then
// nobody knows which leaders the host has heard.
func Open(path string) (*File, error) {
	f := &File{path: path}
	b, err := read(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err == nil {
		f.mark, err = parse[Mark](header, b)
	}
	if err != nil {
		return nil, fmt.Errorf("%s, which tells what leaders of the fleet this host has heard, "+
			"cannot be used: %w. No order was heeded. If no other leader than the present one is "+
			"at work, remove the file", path, err)
	}
	return f, nil
}

func read(path string, most int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0) // #nosec G304
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, errors.New("it is no regular file")
	}
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("it has more than %d bytes", most)
	}
	return b, err
}

func parse[T any](header string, b []byte) (v T, err error) {
	rest, ok := bytes.CutPrefix(b, []byte(header))
	sum, text, found := bytes.Cut(rest, []byte(" "))
	if !ok || !found {
		return v, errors.New("it does not begin as such a file does")
	}
	if text, ok = bytes.CutSuffix(text, []byte("\n")); !ok || string(sum) != checksum(text) {
		return v, errors.New("it is damaged: its checksum differs")
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	err = d.Decode(&v)
	return v, err
}

func checksum(b []byte) string { return fmt.Sprintf("%08x", crc32.ChecksumIEEE(b)) }

func format(header string, v any) ([]byte, error) {
	text, err := json.Marshal(v)
	return []byte(header + checksum(text) + " " + string(text) + "\n"), err
}

// Mark is what the file has.
func (f *File) Mark() Mark { return f.mark }

// Write makes a mark durable. If it fails, the mark of before counts, though the file may have the
// new one: that refuses more.
func (f *File) Write(m Mark) error {
	if m == f.mark {
		return nil
	}
	b, err := format(header, m)
	if err == nil {
		err = replace(f.path, b)
	}
	if err == nil {
		f.mark = m
	}
	return err
}

// replace makes a file durable in place of the one that there was.
func replace(path string, b []byte) error {
	tmp := path + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	t, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) // #nosec G304
	if err != nil {
		return err
	}
	_, err = t.Write(b)
	err = errors.Join(err, t.Sync(), t.Close())
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
