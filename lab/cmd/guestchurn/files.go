package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A file's page i was filled with seeds[i], or is a hole.
type file struct {
	*os.File
	seeds []uint64
}

// files writes, reads, maps, moves, punches, truncates and removes files in dir.
func (w *worker) files(dir string) error {
	buf, err := mmap(64*pageSize, 0) // aligned, for direct transfers
	if err != nil {
		return err
	}
	s := &fileSet{worker: w, what: filepath.Base(dir) + " file", buf: buf}
	if s.dir, err = os.MkdirTemp(dir, ""); err != nil {
		return err
	}
	for {
		if err := w.checkNow(s.readAll); err != nil {
			return err
		}
		if err := s.change(); err != nil {
			return err
		}
	}
}

// A fileSet is the files that a worker has open.
type fileSet struct {
	*worker
	what   string // for messages
	dir    string
	buf    []byte
	open   []*file
	serial int // of the last one
	total  int // pages of all
}

func (s *fileSet) readAll() error {
	for _, f := range s.open {
		if err := s.readWhole(f); err != nil {
			return err
		}
	}
	return nil
}

func (s *fileSet) readWhole(f *file) error {
	for at := 0; at < len(f.seeds); at += 64 {
		n := min(64, len(f.seeds)-at)
		if err := s.read(s.what, f, at, s.buf[:n*pageSize]); err != nil {
			return err
		}
	}
	return nil
}

// change does something with some pages of one file.
func (s *fileSet) change() error {
	op := s.IntN(12)
	if s.total > s.budget {
		op = 11
	}
	if len(s.open) == 0 || op == 0 || s.total < s.budget*7/8 {
		s.serial++
		f, err := os.Create(filepath.Join(s.dir, fmt.Sprint("file-", s.serial)))
		if err != nil {
			return err
		}
		s.open = append(s.open, &file{File: f})
		op = 1
	}
	k := s.IntN(len(s.open))
	if op == 1 {
		k = len(s.open) - 1
	}
	f := s.open[k]
	if len(f.seeds) == 0 {
		op = 1
	}
	from, to := 0, 1+s.IntN(64)
	if len(f.seeds) > 0 {
		from = s.IntN(len(f.seeds))
	}
	if op > 1 {
		to = min(len(f.seeds)-from, to)
	}
	to += from
	part := s.buf[:(to-from)*pageSize]
	var err error
	switch op {
	case 1, 2:
		err = s.write(f, from, part)
	case 3, 4, 5:
		err = s.read(s.what, f, from, part)
	case 6:
		err = s.readAnew(f, from, part)
	case 7, 8:
		err = s.throughMapping(f, from, len(part))
	case 9:
		err = s.punch(f, from, part)
	case 10: // shorter
		if err = f.Truncate(int64(from) * pageSize); err == nil {
			s.total -= len(f.seeds) - from
			f.seeds = f.seeds[:from]
		}
	default:
		err = s.remove(k)
	}
	if err == nil {
		s.did(to - from)
	}
	return err
}

// write writes pages, beyond the end too.
func (s *fileSet) write(f *file, from int, part []byte) error {
	for i := range len(part) / pageSize {
		s.put(f, from+i, part[i*pageSize:(i+1)*pageSize])
	}
	_, err := f.WriteAt(part, int64(from)*pageSize)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM) {
		return fmt.Errorf("%s of %d pages, %d in all: %w", s.what, len(f.seeds), s.total, err)
	}
	return err
}

// put chooses the content of page i of a file that will be written.
func (s *fileSet) put(f *file, i int, p []byte) {
	for len(f.seeds) <= i {
		f.seeds = append(f.seeds, 0)
		s.total++
	}
	f.seeds[i] = s.seed()
	s.fill(p, f.seeds[i])
}

// readAnew reads pages from the disk.
func (s *fileSet) readAnew(f *file, from int, part []byte) error {
	if err := f.Sync(); err != nil {
		return err
	}
	if err := unix.Fadvise(int(f.Fd()), int64(from)*pageSize, int64(len(part)),
		unix.FADV_DONTNEED); err != nil {
		return err
	}
	if s.IntN(3) != 0 {
		return s.read(s.what+", read anew", f, from, part)
	}
	direct, err := os.OpenFile(f.Name(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil { // tmpfs has none before 6.6
		return nil
	}
	defer direct.Close()
	return s.read(s.what+", direct", &file{direct, f.seeds}, from, part)
}

// throughMapping verifies pages through a mapping, and rewrites some.
func (s *fileSet) throughMapping(f *file, from, size int) error {
	shared := unix.MAP_SHARED
	if s.IntN(3) == 0 {
		shared = unix.MAP_PRIVATE
	}
	mem, err := unix.Mmap(int(f.Fd()), int64(from)*pageSize, size,
		unix.PROT_READ|unix.PROT_WRITE, shared)
	if err != nil {
		return fmt.Errorf("map %s: %w", s.what, err)
	}
	for i := range size / pageSize {
		p := mem[i*pageSize : (i+1)*pageSize]
		if !s.check(s.what+", mapped", p, f.seeds[from+i], addressOf(p)) {
			f.seeds[from+i] = s.seed()
			s.fill(p, f.seeds[from+i])
		}
		if s.IntN(3) == 0 {
			seed := s.seed()
			s.fill(p, seed)
			if shared == unix.MAP_SHARED {
				f.seeds[from+i] = seed
			}
		}
	}
	return unix.Munmap(mem)
}

// punch makes a hole of pages.
func (s *fileSet) punch(f *file, from int, part []byte) error {
	if err := s.read(s.what, f, from, part); err != nil {
		return err
	}
	if err := unix.Fallocate(int(f.Fd()),
		unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(from)*pageSize,
		int64(len(part))); err != nil {
		return fmt.Errorf("punch hole: %w", err)
	}
	clear(f.seeds[from : from+len(part)/pageSize])
	return nil
}

// remove removes the file at a place.
func (s *fileSet) remove(k int) error {
	f := s.open[k]
	if err := s.readWhole(f); err != nil {
		return err
	}
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	f.Close()
	s.total -= len(f.seeds)
	s.open[k] = s.open[len(s.open)-1]
	s.open = s.open[:len(s.open)-1]
	return nil
}

// read reads and verifies pages of a file from page "from" on.
func (w *worker) read(what string, f *file, from int, buf []byte) error {
	if _, err := f.ReadAt(buf, int64(from)*pageSize); err != nil {
		return fmt.Errorf("read %s at page %d of %d: %w", what, from, len(f.seeds), err)
	}
	for i := range len(buf) / pageSize {
		p := buf[i*pageSize : (i+1)*pageSize]
		if !w.check(what, p, f.seeds[from+i], uint64(from+i)*pageSize) {
			f.seeds[from+i] = w.seed()
			w.fill(p, f.seeds[from+i])
			g, err := os.OpenFile(f.Name(), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = g.WriteAt(p, int64(from+i)*pageSize)
			g.Close()
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// names keeps small objects in the kernel: directory entries, inodes, symbolic links,
// extended attributes, messages and keys. All of them say what they are.
func (w *worker) names() error {
	dirs := []string{shmemDir}
	if _, err := os.Stat(diskDir + "/lost+found"); err == nil {
		dirs = append(dirs, diskDir)
	}
	for i := range dirs {
		var err error
		if dirs[i], err = os.MkdirTemp(dirs[i], ""); err != nil {
			return err
		}
	}
	queue, err := newQueue()
	if err != nil {
		return err
	}
	alive := map[string]uint64{} // path: seed
	serial := 0
	for {
		if err := w.checkNow(func() error {
			for name, seed := range alive {
				if err := w.look(name, seed); err != nil {
					return err
				}
			}
			return queue.drain(w, len(queue.seeds))
		}); err != nil {
			return err
		}
		switch w.IntN(3) {
		case 0: // make
			for range 40 {
				serial++
				name := filepath.Join(dirs[w.IntN(len(dirs))],
					fmt.Sprintf("%0*d", 1+w.IntN(60), serial))
				seed := w.seed()
				if err := os.Symlink(text(seed, 20+int(seed%900)), name); err != nil {
					return err
				}
				// Not of "user.": a symbolic link has none.
				if err := unix.Lsetxattr(name, "trusted.churn",
					[]byte(text(seed+1, 100+int(seed%1500))),
					0); err != nil && err != unix.EOPNOTSUPP && err != unix.ENOSPC {
					return fmt.Errorf("setxattr: %w", err)
				}
				alive[name] = seed
			}
		case 1: // look
			n := 0
			for name, seed := range alive {
				if err := w.look(name, seed); err != nil {
					return err
				}
				if n++; n > 60 {
					break
				}
			}
		default: // remove
			n := 0
			for name, seed := range alive {
				if n++; n > 60 || len(alive) < 500 {
					break
				}
				if err := w.look(name, seed); err != nil {
					return err
				}
				if err := os.Remove(name); err != nil {
					return err
				}
				delete(alive, name)
			}
		}
		if err := queue.turn(w); err != nil {
			return err
		}
		w.did(0)
	}
}

func (w *worker) look(name string, seed uint64) error {
	target, err := os.Readlink(name)
	if err != nil {
		return fmt.Errorf("a name is gone: %w", err)
	}
	w.same("symbolic link", []byte(target), []byte(text(seed, 20+int(seed%900))))
	var buf [2048]byte
	n, err := unix.Lgetxattr(name, "trusted.churn", buf[:])
	if err == unix.ENODATA || err == unix.EOPNOTSUPP {
		return nil
	}
	if err != nil {
		return fmt.Errorf("getxattr: %w", err)
	}
	w.same("extended attribute", buf[:n], []byte(text(seed+1, 100+int(seed%1500))))
	return nil
}

// text returns n printable bytes that belong to a seed.
func text(seed uint64, n int) string {
	b := make([]byte, n)
	for i := range b {
		seed = seed*6364136223846793005 + 1442695040888963407
		b[i] = 'a' + byte(seed>>59)%26
	}
	return string(b)
}

// same compares bytes, and reports the first that differ, eight at a time.
func (w *worker) same(what string, found, want []byte) bool {
	if bytes.Equal(found, want) {
		return true
	}
	at := 0
	for at < len(found) && at < len(want) && found[at] == want[at] {
		at++
	}
	at &^= 7
	w.bad(fmt.Sprintf("%s of %d bytes, now %d", what, len(want), len(found)), uint64(at),
		word(want, at), word(found, at))
	return false
}

func word(b []byte, at int) uint64 {
	var w [8]byte
	if at < len(b) {
		copy(w[:], b[at:])
	}
	return *(*uint64)(unsafe.Pointer(&w))
}

// A queue is a System V message queue: its messages lie in the kernel's slabs.
type queue struct {
	id    uintptr
	seeds []uint64
}

func newQueue() (*queue, error) {
	if err := os.WriteFile("/proc/sys/kernel/msgmnb", []byte("2000000"), 0); err != nil {
		return nil, err
	}
	id, _, e := unix.Syscall(unix.SYS_MSGGET, 0, 0o600|0o1000, 0) // IPC_PRIVATE, IPC_CREAT
	if e != 0 {
		return nil, fmt.Errorf("msgget: %w", e)
	}
	return &queue{id: id}, nil
}

type message struct {
	kind int64
	text [8192]byte
}

func (q *queue) turn(w *worker) error {
	var msg message
	for range w.IntN(20) {
		seed := w.seed()
		n := 1 + seed%6000
		msg.kind = 1
		copy(msg.text[:], text(seed, int(n)))
		if _, _, e := unix.Syscall6(unix.SYS_MSGSND, q.id, uintptr(unsafe.Pointer(&msg)),
			uintptr(n), 0o4000, 0, 0); e == unix.EAGAIN {
			break
		} else if e != 0 {
			return fmt.Errorf("msgsnd: %w", e)
		}
		q.seeds = append(q.seeds, seed)
	}
	time.Sleep(time.Duration(w.IntN(5)) * time.Millisecond)
	return q.drain(w, min(len(q.seeds), w.IntN(20)))
}

// drain takes n messages.
func (q *queue) drain(w *worker, n int) error {
	var msg message
	for range n {
		n, _, e := unix.Syscall6(unix.SYS_MSGRCV, q.id, uintptr(unsafe.Pointer(&msg)), 8192, 0,
			0o4000, 0)
		if e != 0 {
			return fmt.Errorf("msgrcv: %w", e)
		}
		seed := q.seeds[0]
		q.seeds = q.seeds[1:]
		w.same("message", msg.text[:n], []byte(text(seed, int(1+seed%6000))))
	}
	return nil
}
