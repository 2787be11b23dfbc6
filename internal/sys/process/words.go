package process

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Messages is where a process writes its messages (its standard error), from some moment on.
type Messages struct {
	Path string `json:"path"`          // of the file; or what else it is, such as "pipe:[4711]"
	Dev  uint64 `json:"dev,omitempty"` // of the file; zero if it is none
	Ino  uint64 `json:"ino,omitempty"`
	From int64  `json:"from,omitempty"` // bytes that were in it at that moment

	file *os.File // nil if it is no file, or could not be opened
}

// MessagesOf finds out where a process writes its messages from now on. Close frees the file.
func MessagesOf(pid int) Messages {
	at := fmt.Sprintf("/proc/%d/fd/2", pid)
	var m Messages
	var err error
	if m.Path, err = os.Readlink(at); err != nil {
		return Messages{}
	}
	var st unix.Stat_t
	if unix.Stat(at, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return m
	}
	// By this path it is that very file, whatever its name is now.
	return m.open(at, 0, st.Dev, st.Ino, st.Size)
}

// Reopen returns messages that were stored, of a process that may have ended. A file that has
// another's name since is not read.
func (m Messages) Reopen() Messages {
	if m.Ino == 0 {
		return m
	}
	return m.open(m.Path, unix.O_NOFOLLOW, m.Dev, m.Ino, m.From)
}

func (m Messages) open(path string, flags int, dev, ino uint64, from int64) Messages {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|flags, 0)
	if err != nil {
		return m
	}
	info, err := f.Stat()
	if err == nil {
		st, ok := info.Sys().(*syscall.Stat_t)
		if ok && info.Mode().IsRegular() && st.Dev == dev && st.Ino == ino {
			m.Dev, m.Ino, m.From, m.file = dev, ino, from, f
			return m
		}
	}
	f.Close()
	return m
}

// Close frees the file.
func (m Messages) Close() {
	if m.file != nil {
		m.file.Close()
	}
}

// Last quotes the process's last messages since that moment or, where they cannot be read, tells
// where they went. It is a part of a sentence, fit for a terminal.
func (m Messages) Last() string {
	switch {
	case m.file != nil:
		if words := LastWords(m.file, m.From); words != "" {
			return "its last messages: " + words
		}
		return "it left no message in " + printable(m.Path)
	case m.Path == "":
		return "it is not known where its messages went"
	case m.Path == os.DevNull:
		return "its messages were thrown away, to " + os.DevNull
	}
	return "its messages went to " + printable(m.Path)
}

// maxWords bounds what is quoted, in bytes.
const maxWords = 1000

// LastWords returns the last lines that were written to a file from an offset on, in one line and
// fit for a terminal. Who writes them may be hostile.
func LastWords(f *os.File, from int64) string {
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	end := info.Size()
	if end < from {
		from = 0 // it was cut
	}
	b := make([]byte, min(end-from, maxWords))
	n, err := f.ReadAt(b, end-int64(len(b)))
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	if b = b[:n]; int64(len(b)) < end-from { // it begins within a line, or a character
		if i := strings.IndexByte(string(b), '\n'); i >= 0 && i < len(b)-1 {
			b = b[i+1:]
		}
	}
	return printable(string(b))
}

// printable puts a text in one line that does nothing to a terminal.
func printable(s string) string {
	var lines []string
	for line := range strings.Lines(s) {
		line = strings.Map(func(r rune) rune {
			if r == utf8.RuneError || !unicode.IsGraphic(r) {
				return '?'
			}
			return r
		}, strings.TrimSpace(line))
		if line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "; ")
}

// reapTime is how long the kernel may take from a process's end until it tells how that was: until
// its parent has heard of it.
const reapTime = 100 * time.Millisecond

// ended tells in words how the process of a pidfd ended, which has. It is empty where the kernel
// does not tell, as before Linux 6.15.
func ended(pidfd int) string {
	// linux/pidfd.h: struct pidfd_info, PIDFD_GET_INFO, PIDFD_INFO_EXIT.
	type info struct {
		mask, cgroup uint64
		ids          [11]uint32
		status       int32
	}
	const getInfo, exit = 0xc040ff0b, 1 << 3
	for limit := time.Now().Add(reapTime); ; time.Sleep(time.Millisecond) {
		i := info{mask: exit}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(pidfd), getInfo,
			uintptr(unsafe.Pointer(&i)))
		switch {
		case errno == 0 && i.mask&exit != 0:
			return describe(unix.WaitStatus(i.status))
		case errno == unix.ENOTTY || errno == unix.EINVAL || time.Now().After(limit):
			return ""
		}
	}
}

// describe puts the end of a process in words.
func describe(s unix.WaitStatus) string {
	if s.Signaled() {
		return fmt.Sprintf("killed by signal %d (%v)", s.Signal(), s.Signal())
	}
	return fmt.Sprintf("with exit status %d", s.ExitStatus())
}
