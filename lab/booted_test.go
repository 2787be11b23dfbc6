package lab

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// VMs of a kind start from one guest that has booted, each with the load and disk that are its own.
// Memory that the guest never used is not there. After a reboot its load begins anew.
func TestBootOnce(t *testing.T) {
	l := newTestLab(t, Options{BootOnce: true})
	var file string
	for _, s := range []Spec{
		{MemoryMiB: 320, Memfd: true, Devices: Full,
			Load: Load{HotMiB: 8, CacheMiB: 16, Slow: true, Seed: 1}},
		{MemoryMiB: 320, Memfd: true, Devices: Full,
			Load: Load{HotMiB: 16, IdleMiB: 8, CacheMiB: 4, Slow: true, Seed: 2}},
	} {
		vm, err := l.A.Boot(deadline(t, 3*time.Minute), s)
		if err != nil {
			t.Fatal(err)
		}
		from := incomingFile(t, vm)
		if file != "" && from != file {
			t.Errorf("the second VM started from %s, the first from %s", from, file)
		}
		file = from
		if n := memfdMiB(t, vm); n == 0 || n > 200 {
			t.Errorf("%d MiB of the guest's 320 are there", n)
		}
		pages := uint64(s.Load.HotMiB+s.Load.IdleMiB+s.Load.CacheMiB) * pagesPerMiB
		mustCheck(t, vm.Guest, vm, pages)
		if s.Load.Seed == 2 {
			if err := vm.Guest.Reboot(deadline(t, 2*time.Minute), vm); err != nil {
				t.Fatal(err)
			}
			mustCheck(t, vm.Guest, vm, pages)
		}
		vm.Kill()
	}
}

// incomingFile returns the file that a VM started from.
func incomingFile(t *testing.T, vm *VM) string {
	t.Helper()
	args, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(vm.PID()), "cmdline"))
	if err != nil {
		t.Fatal(err)
	}
	_, file, ok := strings.Cut(string(args), "\x00exec:cat ")
	if !ok {
		t.Fatal("the VM's guest booted")
	}
	return file
}

// memfdMiB returns how much of a VM's memfd is there.
func memfdMiB(t *testing.T, vm *VM) int64 {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(vm.PID()), "fd/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		var st syscall.Stat_t
		if name, err := os.Readlink(f); err == nil && strings.HasPrefix(name, "/memfd:memory") &&
			syscall.Stat(f, &st) == nil {
			return st.Blocks * 512 >> 20
		}
	}
	t.Fatal("the VM has no memfd")
	return 0
}

func TestDropZeroes(t *testing.T) {
	word := func(v uint64) string { return string(binary.BigEndian.AppendUint64(nil, v)) }
	page := strings.Repeat("p", 4096)
	const (
		head = "QEVM\x00\x00\x00\x03" + "\x07\x00\x00\x00\x02pc"
		ram  = "\x00\x00\x00\x02\x03ram\x00\x00\x00\x00\x00\x00\x00\x04"
		part = "\x02\x00\x00\x00\x02"
		foot = "\x7e\x00\x00\x00\x02"
		rest = "\x04anything\x02\x00"
	)
	sizes := word(0x3000|ramSizes) + "\x01a" + word(0x2000) + "\x01b" + word(0x1000) + word(ramEnd)
	in := head + "\x01" + ram + sizes + foot +
		part + word(0|ramZero) + "\x01a\x00" + word(0x1000|ramPage|ramContinue) + page +
		word(0|ramPage) + "\x01b" + page + word(ramEnd) + foot +
		"\x08\x00\x0a\x00\x01x" + "\x03\x00\x00\x00\x02" +
		word(0x1000|ramPage|ramContinue) + page + word(0x1000|ramZero) + "\x01a\x00" +
		word(0x2000|ramPage|ramContinue) + page + word(0x3000|ramPage|ramContinue) + page +
		word(ramEnd) + foot + rest
	want := head + "\x01" + ram + sizes + foot +
		part + word(0x1000|ramPage) + "\x01a" + page +
		word(0|ramPage) + "\x01b" + page + word(ramEnd) + foot +
		"\x08\x00\x0a\x00\x01x" + "\x03\x00\x00\x00\x02" +
		word(0x1000|ramPage) + "\x01b" + page +
		word(0x2000|ramPage) + "\x01a" + page + word(0x3000|ramPage|ramContinue) + page +
		word(ramEnd) + foot + rest
	file := filepath.Join(t.TempDir(), "stream")
	drop := func(in string) ([]byte, error) {
		if err := os.WriteFile(file, []byte(in), 0o600); err != nil {
			t.Fatal(err)
		}
		err := dropZeroes(file)
		out, _ := os.ReadFile(file)
		return out, err
	}
	if got, err := drop(in); err != nil || !bytes.Equal(got, []byte(want)) {
		t.Errorf("%v; got %d bytes, want %d", err, len(got), len(want))
	}
	for name, bad := range map[string]string{
		"cut": in[:200], "a record": head + "\x09", "a section": head + "\x01\x00\x00\x00\x02\x01x",
		"a page of ones": head + part + word(ramZero) + "\x01a\x01",
		"a flag":         head + part + word(0x40),
	} {
		if _, err := drop(bad); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}
