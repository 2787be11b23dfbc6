package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"vacate/lab/churnproto"
)

// kernel keeps data in memory that the kernel allocates for itself: the values of BPF
// arrays, in pages of its own or, by CPU, in its per-CPU areas.
func (w *worker) kernel() error {
	const mapArray, mapPerCPUArray = 2, 6 // enum bpf_map_type
	// Before 5.11 this bounds the memory of such arrays.
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK,
		&unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
		return err
	}
	cpus := runtime.NumCPU()
	var arrays []*array
	total := 0
	buf := make([]byte, 64<<10)
	for {
		if len(arrays) == 0 || total < w.budget/2 || total < w.budget && w.IntN(8) == 0 {
			// no smaller: each entry takes a system call
			a := &array{size: 128 << w.IntN(9), cpus: 1}
			a.entries = 1 + w.IntN(max(1, 256<<10/a.size))
			kind := mapArray
			if w.IntN(2) == 0 {
				kind, a.cpus = mapPerCPUArray, cpus
				a.size = min(a.size, 4096)
				a.entries = 1 + w.IntN(max(1, 32<<10/a.size))
			}
			fd, err := bpfCreate(kind, a.size, a.entries)
			if err == unix.ENOMEM && kind == mapPerCPUArray {
				continue // its chunks are too fragmented
			}
			if err != nil {
				return fmt.Errorf("make bpf array: %w", err)
			}
			a.fd = fd
			a.seeds = make([]uint64, a.entries)
			arrays = append(arrays, a)
			total += a.pages()
		}
		if err := w.checkNow(func() error {
			for _, a := range arrays {
				for i := range a.entries {
					if err := w.checkEntry(a, i, buf); err != nil {
						return err
					}
				}
			}
			return nil
		}); err != nil {
			return err
		}
		k := w.IntN(len(arrays))
		a := arrays[k]
		remove := w.IntN(6) == 0
		for i := range a.entries {
			if !remove && w.IntN(3) > 0 {
				continue
			}
			if err := w.checkEntry(a, i, buf); err != nil {
				return err
			}
			value := buf[:a.size*a.cpus]
			a.seeds[i] = w.seed()
			for at := range len(value) / 8 {
				*(*uint64)(unsafe.Pointer(&value[at*8])) = a.seeds[i] + uint64(at)*w.step()
			}
			if err := bpfElement(bpfUpdate, a.fd, i, value); err != nil {
				return fmt.Errorf("update bpf array: %w", err)
			}
		}
		w.did(a.pages())
		if remove {
			unix.Close(a.fd)
			total -= a.pages()
			arrays[k] = arrays[len(arrays)-1]
			arrays = arrays[:len(arrays)-1]
		}
		time.Sleep(time.Duration(w.IntN(10)) * time.Millisecond)
	}
}

// An array is a BPF map. Its entry i holds numbers that seeds[i] tells, or zeroes.
type array struct {
	fd, entries, size, cpus int // size of an entry, in bytes; one of each CPU
	seeds                   []uint64
}

func (a *array) pages() int { return (a.entries*a.size*a.cpus + pageSize - 1) / pageSize }

// checkEntry verifies entry i of an array, by way of buf.
func (w *worker) checkEntry(a *array, i int, buf []byte) error {
	value := buf[:a.size*a.cpus]
	if err := bpfElement(bpfLookup, a.fd, i, value); err != nil {
		return fmt.Errorf("look up in bpf array: %w", err)
	}
	for at := range len(value) / 8 {
		want := uint64(0)
		if a.seeds[i] != 0 {
			want = a.seeds[i] + uint64(at)*w.step()
		}
		if found := word(value, at*8); found != want {
			what := "bpf array"
			if a.cpus > 1 {
				what = "bpf per-cpu array"
			}
			w.bad(what, uint64(i*a.size+at*8), want, found)
			break
		}
	}
	return nil
}

// Commands of bpf(2).
const (
	bpfMapCreate = 0
	bpfLookup    = 1
	bpfUpdate    = 2
)

func bpfCreate(kind, size, entries int) (int, error) {
	attr := struct{ kind, keySize, valueSize, entries, flags uint32 }{uint32(kind), 4, uint32(size),
		uint32(entries), 0}
	fd, _, e := unix.Syscall(unix.SYS_BPF, bpfMapCreate, uintptr(unsafe.Pointer(&attr)),
		unsafe.Sizeof(attr))
	if e != 0 {
		return 0, e
	}
	return int(fd), nil
}

func bpfElement(command uintptr, fd, index int, value []byte) error {
	key := uint32(index)
	attr := struct {
		fd    uint64
		key   *uint32
		value *byte
		flags uint64
	}{uint64(fd), &key, &value[0], 0}
	if _, _, e := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(&attr)),
		unsafe.Sizeof(attr)); e != 0 {
		return e
	}
	return nil
}

// A stream gives out what was put in; what it holds is on its way in the kernel.
type stream struct {
	in, out   int // descriptors
	seed      uint64
	sent, got int // bytes, since it was made
}

// flow puts data into and takes data out of a stream whose ends never block.
func (w *worker) flow(what string, s *stream, buf []byte, moves int) error {
	for range moves {
		if w.IntN(2) == 0 {
			w.fill(buf, s.seed+uint64(s.sent/pageSize)*8)
			n, err := unix.Write(s.in, buf[s.sent%pageSize:])
			if err == nil {
				s.sent += n
			} else if err != unix.EAGAIN && err != unix.EINTR {
				return fmt.Errorf("write to %s: %w", what, err)
			}
		} else if _, err := w.take(what, s, buf); err != nil {
			return err
		}
	}
	return nil
}

// take reads at most what is left of a page, and verifies it.
func (w *worker) take(what string, s *stream, buf []byte) (none bool, err error) {
	if s.got == s.sent {
		return true, nil
	}
	at := s.got % pageSize
	n, err := unix.Read(s.out, buf[at:min(pageSize, at+s.sent-s.got)])
	if err == unix.EAGAIN || err == unix.EINTR {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read from %s: %w", what, err)
	}
	if n == 0 {
		return false, fmt.Errorf("read from %s: %w", what, io.ErrUnexpectedEOF)
	}
	var want churnproto.Words
	want.Fill(s.seed+uint64(s.got/pageSize)*8, w.step())
	w.same(what, buf[at:at+n], unsafe.Slice((*byte)(unsafe.Pointer(&want)), pageSize)[at:at+n])
	s.got += n
	w.did(1)
	return false, nil
}

// streams keeps some streams in flow, and replaces them now and then.
func (w *worker) streams(what string, count int, open func() (*stream, error),
	tune func(*stream) error) error {
	buf := make([]byte, pageSize)
	var all []*stream
	for {
		if len(all) < count {
			s, err := open()
			if err != nil {
				return fmt.Errorf("open %s: %w", what, err)
			}
			s.seed = w.seed()
			all = append(all, s)
		}
		if err := w.checkNow(func() error {
			for _, s := range all {
				if err := w.drain(what, s, buf); err != nil && !broken(what, err) {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
		k := w.IntN(len(all))
		s := all[k]
		if tune != nil && w.IntN(30) == 0 {
			if err := tune(s); err != nil {
				return fmt.Errorf("tune %s: %w", what, err)
			}
		}
		err := w.flow(what, s, buf, w.IntN(40))
		done := w.IntN(100) == 0
		if err == nil && done {
			err = w.drain(what, s, buf)
		}
		if err != nil && !broken(what, err) {
			return err
		}
		if done || err != nil {
			unix.Close(s.in)
			if s.in != s.out {
				unix.Close(s.out)
			}
			all[k] = all[len(all)-1]
			all = all[:len(all)-1]
		}
		w.did(0)
		if w.IntN(8) == 0 {
			time.Sleep(time.Duration(w.IntN(6)) * time.Millisecond)
		}
	}
}

// drain takes all that is in a stream.
func (w *worker) drain(what string, s *stream, buf []byte) error {
	for last := time.Now(); s.got < s.sent; {
		none, err := w.take(what, s, buf)
		if err != nil {
			return err
		}
		if !none {
			last = time.Now()
		} else if what == network && time.Since(last) > 5*time.Second {
			return io.ErrUnexpectedEOF // from such a connection nothing comes at all
		} else {
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

const network = "network"

// broken says whether a connection's end is nothing to worry about: QEMU's network forgets
// connections when the VM is set back.
func broken(what string, err error) bool {
	return what == network && (errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) ||
		errors.Is(err, io.ErrUnexpectedEOF))
}

func (w *worker) pipes() error {
	return w.streams("pipe", max(2, w.budget/16), func() (*stream, error) {
		var p [2]int
		err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC)
		return &stream{in: p[1], out: p[0]}, err
	}, func(s *stream) error {
		_, err := unix.FcntlInt(uintptr(s.in), unix.F_SETPIPE_SZ, pageSize<<w.IntN(7))
		if errors.Is(err, unix.EBUSY) { // more than that is in it
			err = nil
		}
		return err
	})
}

func (w *worker) sockets() error {
	return w.streams("socket", max(2, w.budget/32), func() (*stream, error) {
		if w.IntN(2) == 0 {
			p, err := unix.Socketpair(unix.AF_UNIX,
				unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			return &stream{in: p[0], out: p[1]}, err
		}
		return loopback()
	}, nil)
}

// loopback returns a TCP connection of the guest with itself.
func loopback() (*stream, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, err
	}
	defer a.Close()
	b, err := l.Accept()
	if err != nil {
		return nil, err
	}
	defer b.Close()
	s := &stream{}
	for _, end := range []struct {
		conn net.Conn
		fd   *int
	}{{a, &s.in}, {b, &s.out}} {
		f, err := end.conn.(*net.TCPConn).File()
		if err != nil {
			return nil, err
		}
		*end.fd, err = unix.Dup(int(f.Fd()))
		f.Close()
		if err == nil {
			err = unix.SetNonblock(*end.fd, true)
		}
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// echo sends to the host over the virtio network card, and verifies what comes back.
func (w *worker) echo() error {
	return w.streams(network, 2, func() (*stream, error) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		if err := unix.Connect(fd, &echoAddr); err != nil {
			return nil, err
		}
		return &stream{in: fd, out: fd}, unix.SetNonblock(fd, true)
	}, nil)
}

// ftraceSum sums up what ftrace's records say. The kernel keeps them, from boot on, in
// blocks of pages; all but the first have no reference.
func ftraceSum() (sum uint64, err error) {
	f, err := os.Open(traceDir + "/available_filter_functions")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		for _, c := range buf[:n] {
			sum = (sum ^ uint64(c)) * 0x100000001b3
		}
		if err == io.EOF {
			return sum, nil
		}
		if err != nil {
			return 0, err
		}
	}
}
