package evict_test

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/qemu/migstream"
	"vacate/lab"
	"vacate/lab/labtest"
)

var recordLoading = flag.Bool("record-loading", false,
	"TestRecordLoading: print what memory devices read when they are loaded")

// standing notes each page that a twin requests before it runs the VM, and the thread that waits
// for it.
type standing struct {
	slog.Handler
	pid int

	mu   sync.Mutex
	list []string // guarded by mu

	commit, ran *evict.Progress // the first of these states at the source
	before      int             // of the twin's memory that is in use when it begins, in KiB
	peak        int             // the most of it until the devices are loaded, in KiB
}

// showTwin notes how much memory the twin takes until the devices are loaded.
func (s *standing) showTwin(p evict.Progress) {
	if p.State == evict.Prepared {
		s.peak = statusOf(s.pid, "VmHWM")
	}
}

// statusOf returns a figure of /proc/PID/status.
func statusOf(pid int, name string) (kib int) {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if _, after, ok := strings.Cut(string(text), name+":"); ok {
		fmt.Sscan(after, &kib)
	}
	return kib
}

// show notes what the source has sent when it commits, and when it hears that the VM runs.
func (s *standing) show(p evict.Progress) {
	switch {
	case p.State == evict.Committing && s.commit == nil:
		s.commit = &p
	case p.State == evict.Pushing && s.ran == nil:
		s.ran = &p
	}
}

func (s *standing) WithAttrs(a []slog.Attr) slog.Handler { return s }

func (s *standing) Enabled(context.Context, slog.Level) bool { return true }

func (s *standing) Handle(_ context.Context, r slog.Record) error {
	if r.Message != "fetch" {
		return nil
	}
	var state, block string
	var offset uint64
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "state":
			state = a.Value.String()
		case "block":
			block = a.Value.String()
		case "offset":
			offset = a.Value.Uint64()
		}
		return true
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, fmt.Sprintf("%s %s %#x by %s", state, block, offset, faulting(s.pid)))
	return nil
}

// faulting names the threads of a process that wait for a page.
func faulting(pid int) string {
	var names []string
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, task := range tasks {
		wchan, _ := os.ReadFile(task + "/wchan")
		comm, _ := os.ReadFile(task + "/comm")
		if strings.Contains(string(wchan), "userfault") {
			name := strings.TrimSpace(string(comm))
			if filepath.Base(task) == strconv.Itoa(pid) {
				name = "main"
			}
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, "+")
}

// heldUp returns the pages that kept the VM from running: those requested before a vCPU waited for
// one itself.
func (s *standing) heldUp() (list []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.list {
		_, who, _ := strings.Cut(f, " by ")
		if strings.Contains(who, "CPU ") {
			break // it runs
		}
		list = append(list, f)
	}
	return list
}

// A kind is a VM that differs in what its QEMU reads before it runs.
type kind struct {
	name    string
	machine string
	devices lab.Devices
	extra   []string
}

// kinds lists kinds of VMs with as many devices as the lab's guest, or its BIOS, has drivers for.
func kinds(t *testing.T) []kind {
	dir := t.TempDir()
	image := func(name string, size int, from string) string {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(i>>12) | 1
		}
		if from != "" {
			rom, err := os.ReadFile(from)
			if err != nil {
				t.Fatal(err)
			}
			copy(b, rom)
		}
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return file
	}
	bios := image("code.fd", 256<<10, "/usr/share/seabios/bios-256k.bin")
	vars := image("vars.fd", 528<<10, "")
	disk := func(id string) []string {
		return []string{"-drive",
			"if=none,id=" + id + ",format=raw,file.locking=off,file=" + image(id, 1<<20, "")}
	}
	flash := []string{"-drive", "if=pflash,format=raw,unit=0,readonly=on,file=" + bios, "-drive",
		"if=pflash,format=raw,unit=1,file=" + vars}
	uefi := []string{"-drive",
		"if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd", "-drive",
		"if=pflash,format=raw,unit=1,file=" + image("uefi.fd", 528<<10,
			"/usr/share/OVMF/OVMF_VARS_4M.fd"), "-vga", "std"}
	usb := []string{"-device", "qemu-xhci,id=xhci", "-device", "usb-tablet,bus=xhci.0", "-device",
		"usb-kbd,bus=xhci.0", "-device", "usb-storage,bus=xhci.0,drive=usb"}
	return []kind{
		{"flash, USB, SCSI", "q35", lab.Full,
			slices.Concat(flash, disk("usb"), disk("d0"), usb,
				[]string{"-device", "vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
					"-device", "virtio-scsi-pci,id=scsi", "-device", "scsi-hd,bus=scsi.0,drive=d0",
					"-device", "virtio-rng-pci"})},
		{"UEFI", "q35", lab.Bare, uefi},
		{"virtio", "pc", lab.Full,
			[]string{"-device", "virtio-keyboard-pci", "-device", "virtio-tablet-pci", "-netdev",
				"user,id=n2,restrict=on", "-device", "virtio-net-pci,netdev=n2,mq=on,packed=on"}},
		{"old", "pc", lab.Bare,
			slices.Concat(disk("d0"), disk("d1"), disk("d2"),
				[]string{"-device", "cirrus-vga", "-device", "e1000", "-device", "rtl8139",
					"-device", "vmxnet3", "-device", "e1000e",
					"-device", "ide-hd,drive=d0", "-device", "lsi53c895a,id=lsi", "-device",
					"scsi-hd,bus=lsi.0,drive=d1", "-device", "megasas,id=mega", "-device",
					"scsi-hd,bus=mega.0,drive=d2",
					"-device", "piix3-usb-uhci,id=uhci", "-device", "usb-mouse,bus=uhci.0",
					"-device", "usb-ehci,id=ehci", "-device", "intel-hda", "-audiodev",
					"none,id=audio", "-device", "hda-duplex,audiodev=audio", "-device", "i6300esb",
					"-device", "pvpanic"})},
		{"AHCI", "q35", lab.Bare,
			slices.Concat(disk("d0"), disk("d1"),
				[]string{"-vga", "std", "-device", "ide-hd,drive=d0,bus=ide.0", "-device",
					"pvscsi,id=pv", "-device", "scsi-hd,bus=pv.0,drive=d1"})},
	}
}

// loadOver evicts a VM of a kind over a path with a delay each way, and returns what it read before
// it ran.
func loadOver(t *testing.T, l *lab.Lab, q lab.QEMU, k kind, delay time.Duration) *standing {
	vm := boot(t, l, lab.Spec{QEMU: q, Machine: k.machine, MemoryMiB: 256, Devices: k.devices,
		Extra: k.extra, Load: lab.Load{HotMiB: 10}})
	twin := incoming(t, l, vm)
	t.Cleanup(twin.Kill)
	t.Cleanup(vm.Kill)
	ln := listen(t, l.B)
	path, err := l.B.Relay(ln.Addr().String(), delay)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(path.Close)
	heard := &standing{Handler: slog.DiscardHandler, pid: twin.PID(),
		before: statusOf(twin.PID(), "VmRSS")}
	received := make(chan error, 1)
	ctx := labtest.Within(t, 2*time.Minute)
	go func() {
		received <- receiveOn(ctx, evict.Destination{QMP: twin.QMP, Log: slog.New(heard),
			Show: heard.showTwin}, ln)
	}()
	report, err := evict.Source{QMP: vm.QMP, Connect: connectTo(l.A, path.Addr()),
		Show: heard.show}.Evict(ctx)
	if destErr := <-received; err != nil || destErr != nil {
		t.Fatal(err, destErr)
	}
	t.Logf("down time %.3f s, round trip of the path %v; %d pages early; fetched before it "+
		"ran:\n%s",
		*report.Down, 2*delay, report.Pages.Early, strings.Join(heard.list, "\n"))
	labtest.MustCheck(t, twin)
	return heard
}

// No page is fetched while a VM stands still, however many its devices need: each would cost a
// round trip. Two round trips are left: to load the devices, and to run the VM. What the VM's first
// instructions need is on its way by then. If an interrupt waited for that, so would the answer
// that the VM runs.
func TestNothingFetchedStanding(t *testing.T) {
	const most = 4 << 10 // KiB
	l := labtest.New(t, lab.Options{})
	for _, k := range kinds(t)[:2] {
		t.Run(k.name, func(t *testing.T) {
			heard := loadOver(t, l, lab.QEMU{}, k, 50*time.Millisecond)
			if list := heard.heldUp(); len(list) > 0 {
				t.Errorf("the VM stood still for %d pages:\n%s", len(list),
					strings.Join(list, "\n"))
			}
			// A huge page around each page that comes ahead would have to be cleared first.
			if took := heard.peak - heard.before; heard.peak == 0 || took > most {
				t.Errorf("the twin took %d KiB until its devices were loaded", took)
			}
			if heard.commit == nil || heard.ran == nil {
				t.Fatal("the source showed no commit, or no push")
			}
			if pushed := heard.ran.Bytes - heard.commit.Bytes; pushed < migstream.TargetPageSize {
				t.Errorf("%d bytes were pushed until the source heard that the VM runs", pushed)
			}
		})
	}
}

// TestRecordLoading prints what twins read before they run the VM, for all kinds and some versions
// of QEMU.
func TestRecordLoading(t *testing.T) {
	if !*recordLoading {
		return
	}
	l := labtest.New(t, lab.Options{})
	newest, err := lab.BackportsQEMU(labtest.Within(t, 5*time.Minute), labtest.Dir(t))
	labtest.Need(t, err)
	for _, q := range []lab.QEMU{{}, newest} {
		for _, k := range kinds(t) {
			t.Run(k.name+" "+q.Version, func(t *testing.T) {
				for _, f := range loadOver(t, l, q, k, 0).heldUp() {
					t.Log("held up by", f)
				}
			})
		}
	}
}
