package lab

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// JumpClock has the time of day of one process jump, as a bad server of time has it: all that the
// process reads from then on is that much later, or earlier. Its other clocks go on, and so do
// those of all other processes. It is for programs that read clocks by the vDSO, as those in Go do:
// the process's own copy of that code is replaced.
func JumpClock(pid int, by time.Duration) error {
	err := jumpClock(pid, by)
	if err != nil {
		return fmt.Errorf("have the clock of process %d jump: %w", pid, err)
	}
	return nil
}

// clockCode is the code of clock_gettime (AMD64): it asks the kernel, and adds some seconds to the
// time of day.
func clockCode(by time.Duration) []byte {
	code := []byte{
		0xb8, 228, 0, 0, 0, // mov eax, SYS_clock_gettime
		0x0f, 0x05, // syscall
		0x85, 0xff, // test edi, edi: CLOCK_REALTIME is 0
		0x75, 13, // jne to the return
		0x48, 0xb9, // mov rcx, ...
	}
	code = binary.LittleEndian.AppendUint64(code, uint64(int64(by/time.Second)))
	return append(code,
		0x48, 0x01, 0x0e, // add [rsi], rcx
		0xc3) // ret
}

func jumpClock(pid int, by time.Duration) error {
	from, to, err := vdso(pid)
	if err != nil {
		return err
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer mem.Close()
	image := make([]byte, to-from)
	if _, err := mem.ReadAt(image, from); err != nil {
		return fmt.Errorf("read its vDSO: %w", err)
	}
	file, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return fmt.Errorf("its vDSO: %w", err)
	}
	symbols, err := file.DynamicSymbols()
	if err != nil {
		return fmt.Errorf("its vDSO: %w", err)
	}
	code := clockCode(by)
	for _, s := range symbols {
		if s.Name != "__vdso_clock_gettime" {
			continue
		}
		if s.Size < uint64(len(code)) {
			return fmt.Errorf("its vDSO's clock_gettime has %d bytes only", s.Size)
		}
		at := from + int64(s.Value) // the vDSO is linked for address 0
		return whileStopped(pid, at, at+int64(s.Size), func() error {
			_, err := mem.WriteAt(code, at)
			return err
		})
	}
	return errors.New("its vDSO has no clock_gettime")
}

// vdso returns where a process has its vDSO.
func vdso(pid int) (from, to int64, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(line, "[vdso]\n") {
			_, err := fmt.Sscanf(line, "%x-%x", &from, &to)
			return from, to, err
		}
	}
	return 0, 0, errors.New("it has no vDSO")
}

// whileStopped does something while no thread of a process is between two addresses.
func whileStopped(pid int, from, to int64, do func() error) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	for range 1000 {
		if err := p.Signal(syscall.SIGSTOP); err != nil {
			return err
		}
		away, err := threadsAway(pid, from, to)
		if away && err == nil {
			err = do()
		}
		if err := errors.Join(err, p.Signal(syscall.SIGCONT)); err != nil || away {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return errors.New("it reads its clock all the time")
}

// threadsAway waits until all threads of a process have stopped, and reports whether none is
// between two addresses.
func threadsAway(pid int, from, to int64) (bool, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		return false, err
	}
	for _, task := range tasks {
		var fields []string
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			// "running", or its system call, the call's arguments, and the addresses of its stack
			// and its code; -1 where it is in none.
			b, err := os.ReadFile(filepath.Join(task, "syscall"))
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
				break // it has ended
			} else if err != nil {
				return false, err
			}
			if fields = strings.Fields(string(b)); len(fields) > 1 {
				break
			}
			if time.Now().After(end) {
				return false, fmt.Errorf("a thread does not stop: %s", b)
			}
		}
		if len(fields) == 0 {
			continue
		}
		at, err := strconv.ParseUint(fields[len(fields)-1], 0, 64)
		if err != nil {
			return false, err
		}
		if int64(at) >= from && int64(at) < to {
			return false, nil
		}
	}
	return true, nil
}
