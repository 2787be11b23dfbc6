package evict_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/link"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
	"vacate/lab"
	"vacate/lab/labtest"
)

// reader is a boot sector. It reads the disk's second sector again and again, and writes the first
// 8 bytes to the first serial port.
var reader = []byte{
	// xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax
	0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0,
	0xbc, 0x00, 0x7c, 0xfb, // mov sp, 0x7c00; sti
	0x52,                   // push dx: the disk's number
	0x5a, 0x52, 0xb6, 0x00, // again: pop dx; push dx; mov dh, 0
	0xb8, 0x01, 0x02, 0xb9, 0x02, 0x00, // mov ax, 0x201; mov cx, 2
	0xbb, 0x00, 0x7e, 0xcd, 0x13, // mov bx, 0x7e00; int 0x13
	// mov si, 0x7e00; mov cx, 8; mov dx, 0x3f8
	0xbe, 0x00, 0x7e, 0xb9, 0x08, 0x00, 0xba, 0xf8, 0x03,
	0xac, 0xee, 0xe2, 0xfc, // next: lodsb; out dx, al; loop next
	0xf4, 0xeb, 0xe1, // hlt; jmp again
}

const sector = 512

// bareVM is a QEMU without a lab's guest.
type bareVM struct {
	qmp    string // for the engine
	serial string // what the guest wrote
	t      testing.TB
	q      *qmp.Client
	cmd    *exec.Cmd
	errors string // file with QEMU's messages
}

// bare starts a QEMU with as little as a VM needs.
func bare(t testing.TB, args ...string) *bareVM {
	t.Helper()
	stock, err := lab.StockQEMU(labtest.Within(t, time.Minute))
	labtest.Need(t, err)
	dir := t.TempDir()
	v := &bareVM{t: t, qmp: filepath.Join(dir, "qmp"), serial: filepath.Join(dir, "serial"),
		errors: filepath.Join(dir, "stderr")}
	stderr, err := os.Create(v.errors)
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	own := filepath.Join(dir, "test.qmp")
	v.cmd = exec.Command(stock.Path, append([]string{
		"-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc,accel=tcg", "-m",
		"256", "-serial", "file:" + v.serial,
		"-qmp", "unix:" + v.qmp + ",server=on,wait=off", "-qmp",
		"unix:" + own + ",server=on,wait=off",
	}, args...)...)
	v.cmd.Stderr = stderr
	if err := process.StartBound(v.cmd, v.cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.kill)
	for ctx := labtest.Within(t, time.Minute); v.q == nil; {
		if v.q, err = qmp.Dial(ctx, own); err != nil && ctx.Err() != nil {
			b, _ := os.ReadFile(v.errors)
			t.Fatalf("%v; QEMU says: %s", err, b)
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Cleanup(func() { v.q.Close() })
	return v
}

func (v *bareVM) kill() {
	v.cmd.Process.Kill()
	v.cmd.Wait()
}

// do runs a command of QMP.
func (v *bareVM) do(command string, args any) {
	v.t.Helper()
	if err := v.q.Run(labtest.Within(v.t, time.Minute), command, args, nil); err != nil {
		v.t.Fatal(err)
	}
}

type arguments = map[string]any

// reads waits until the guest reads the text from its disk.
func (v *bareVM) reads(what string) {
	v.t.Helper()
	start := -1
	for ctx := labtest.Within(v.t, time.Minute); ; time.Sleep(20 * time.Millisecond) {
		b, err := os.ReadFile(v.serial)
		if err != nil {
			v.t.Fatal(err)
		}
		if start < 0 {
			start = len(b)
		}
		if bytes.Contains(b[start:], []byte(what)) {
			return
		}
		if ctx.Err() != nil {
			v.t.Fatalf("the guest does not read %q; it read %.100q before", what, b)
		}
	}
}

// evictTo evicts a VM to a twin, and returns what both sides report.
func (v *bareVM) evictTo(t testing.TB, twin *bareVM, s evict.Source) (evict.Report, error, error) {
	t.Helper()
	ctx, stop := context.WithCancel(labtest.Within(t, 2*time.Minute))
	defer stop()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	received := make(chan error, 1)
	go func() { received <- receiveOn(ctx, evict.Destination{QMP: twin.qmp}, ln) }()
	s.QMP, s.Connect = v.qmp, link.Dialer{Addr: ln.Addr().String()}.Session
	report, err := s.Evict(ctx)
	if err != nil {
		stop()
	}
	return report, err, <-received
}

// The engines compare a VM's disks at both ends before they touch the VM. A VM whose QEMU is busy
// with a job stays. One VM goes through all cases, and moves in the end: it reads there what it
// wrote here.
func TestDisks(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	image := make([]byte, 4<<20)
	copy(image, reader)
	copy(image[sector-2:], "\x55\xaa")
	copy(image[sector:], "BEFORE..")
	for _, name := range []string{"boot.raw", "data.raw", "other.raw", "small.raw", "vars-a.fd",
		"vars-b.fd"} {
		b := image
		switch {
		case name == "vars-a.fd":
			b = image[:64<<10]
		case name == "vars-b.fd":
			b = make([]byte, 64<<10) // a twin may have it so: QEMU writes the source's there
		case name == "small.raw":
			b = image[:1<<20]
		}
		if err := os.WriteFile(file(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const bios = "/usr/share/seabios/bios-256k.bin"
	firmware, err := os.ReadFile(bios)
	labtest.Need(t, err)
	for _, name := range []string{"code-a.fd", "code-b.fd"} {
		if err := os.WriteFile(file(name), firmware, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// boot is the VM's first disk, data the second, cd the medium in the drive.
	args := func(host, boot, data, cd string) []string {
		return []string{
			"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + file("code-"+host+".fd"),
			"-drive", "if=pflash,unit=1,format=raw,file=" + file("vars-"+host+".fd"),
			"-blockdev", boot, "-device", "virtio-blk-pci,drive=boot,id=vd0,bootindex=1",
			"-drive", "if=none,id=data,format=raw,file=" + data, "-device",
			"virtio-blk-pci,drive=data",
			"-drive", "if=none,id=cd,media=cdrom" + cd, "-device", "ide-cd,drive=cd",
		}
	}
	raw := "driver=raw,node-name=boot,file.driver=file,file.filename=" + file("boot.raw")
	data := file("data.raw")
	incoming := []string{"-S", "-incoming", "defer"}
	vm := bare(t, args("a", raw, data, "")...)
	vm.reads("BEFORE..")

	// refuse tries an eviction that must not begin.
	refuse := func(t *testing.T, twin *bareVM, s evict.Source, says ...string) {
		t.Helper()
		_, err, _ := vm.evictTo(t, twin, s)
		refused(t, err, append(says, "The VM runs on, untouched")...)
		if status, err := vm.q.QueryStatus(labtest.Within(t, time.Minute)); err != nil ||
			!status.Running {
			t.Errorf("the VM is %q: %v", status.Status, err)
		}
		if status, err := twin.q.QueryStatus(labtest.Within(t, time.Minute)); err != nil ||
			status.Status != "inmigrate" {
			t.Errorf("the twin is %q: %v", status.Status, err)
		}
	}
	for name, c := range map[string]struct {
		args  []string
		trust []string
		says  []string
	}{
		"another file": {args: args("b", raw, file("other.raw"), ""),
			says: []string{`disk "data" is ` + data + " on the source, and " + file("other.raw") +
				" on the destination is another", "--trust-disk data", "trust_disks"}},
		"smaller file": {args: args("b", raw, file("small.raw"), ""), trust: []string{"data"},
			says: []string{`disk "data" has 4 MiB on the source, 1 MiB on the destination`}},
		"read-only": {args: args("b", raw, data+",readonly=on", ""), trust: []string{"data"},
			says: []string{
				`disk "data" is writable on the source and read-only on the destination`}},
		"a medium": {args: args("b", raw, data, ",file="+file("other.raw")),
			says: []string{`disk "cd" is empty on the source, and the destination has raw ` +
				file("other.raw") + " in it", "`eject`"}},
		"part of the file": {args: args("b",
			strings.Replace(raw, "driver=raw", "driver=raw,offset=0,size=4194304", 1), data, ""),
			says: []string{`disk "vd0" is raw `, "on the source, raw (offset=0,size=4194304) "}},
		"unknown to trust": {args: args("b", raw, data, ""), trust: []string{"hda"},
			says: []string{`no disk "hda" to trust`, `"vd0"`, `"data"`, `"cd"`}},
	} {
		if t.Failed() {
			return // the VM may have left
		}
		t.Run(name, func(t *testing.T) {
			refuse(t, bare(t, append(c.args, incoming...)...), evict.Source{TrustDisks: c.trust},
				c.says...)
		})
	}

	if t.Failed() {
		return
	}
	same := bare(t, append(args("b", raw, data, ""), incoming...)...)
	t.Run("a job", func(t *testing.T) {
		if err := os.Truncate(file("small.raw"), 4<<20); err != nil {
			t.Fatal(err)
		}
		vm.do("blockdev-add", arguments{"driver": "raw", "node-name": "target",
			"file": arguments{"driver": "file", "filename": file("small.raw")}})
		vm.do("blockdev-backup",
			arguments{"job-id": "backup0", "device": "data", "target": "target", "sync": "full",
				"speed": 1})
		refuse(t, same, evict.Source{VM: "web1"},
			`web1 has an unfinished job "backup0" (backup, running, `, "`job-cancel`")
		vm.do("job-cancel", arguments{"id": "backup0"})
		vm.gone(t, "query-jobs")
		vm.do("blockdev-mirror",
			arguments{"job-id": "mirror0", "device": "data", "target": "target", "sync": "full",
				"filter-node-name": "mirror"})
		refuse(t, same, evict.Source{}, `the VM has an unfinished job "mirror0" (mirror, `,
			"`job-cancel`")
		vm.do("job-cancel", arguments{"id": "mirror0"})
		vm.gone(t, "query-jobs")
		vm.do("blockdev-del", arguments{"node-name": "target"})
	})
	t.Run("an export", func(t *testing.T) {
		vm.do("nbd-server-start",
			arguments{"addr": arguments{"type": "unix",
				"data": arguments{"path": file("nbd.sock")}}})
		vm.do("block-export-add", arguments{"type": "nbd", "id": "export0", "node-name": "boot"})
		refuse(t, same, evict.Source{}, `the VM has an export "export0" of its disk "boot" (nbd)`,
			"`block-export-del`")
		vm.do("nbd-server-stop", nil)
		vm.gone(t, "query-block-exports")
	})
	t.Run("an export of the twin", func(t *testing.T) {
		twin := bare(t, append(args("b", raw, data, ""), incoming...)...)
		twin.do("nbd-server-start",
			arguments{"addr": arguments{"type": "unix",
				"data": arguments{"path": file("nbd.sock")}}})
		twin.do("block-export-add", arguments{"type": "nbd", "id": "export1", "node-name": "boot"})
		refuse(t, twin, evict.Source{}, "the QEMU that waits at the destination has an export",
			"export1")
	})

	// A twin that started before a disk grew has the old size.
	vm.do("block_resize", arguments{"device": "data", "size": 5 << 20})
	t.Run("a disk that grew", func(t *testing.T) {
		refuse(t, same, evict.Source{},
			`disk "data" has 5 MiB on the source, 4 MiB on the destination`,
			"start the destination's QEMU anew")
	})

	// From here on the VM writes to an overlay. A twin with the old command line does not have
	// that.
	vm.do("blockdev-snapshot-sync",
		arguments{"node-name": "boot", "snapshot-file": file("overlay.qcow2"),
			"snapshot-node-name": "overlay", "format": "qcow2"})
	vm.do("human-monitor-command",
		arguments{
			"command-line": `qemu-io -d /machine/peripheral/vd0/virtio-backend "write -P 0x41 512 512"`})
	vm.reads("AAAAAAAA")
	vm.do("block-dirty-bitmap-add",
		arguments{"node": "overlay", "name": "daily", "persistent": true})
	vm.do("block-dirty-bitmap-add", arguments{"node": "overlay", "name": "hourly"})
	t.Run("a snapshot", func(t *testing.T) {
		refuse(t, same, evict.Source{},
			`disk "vd0" is qcow2 `+file("overlay.qcow2")+", backed by raw "+file("boot.raw")+
				" on the source, raw "+file("boot.raw")+" on the destination",
			"start the destination's QEMU with the image that the source has now",
			"--trust-disk vd0")
	})
	if t.Failed() {
		return
	}
	twin := bare(t,
		append(args("b", "driver=qcow2,node-name=boot,file.driver=file,file.filename="+
			file("overlay.qcow2"), data, ""), incoming...)...)
	report, err, there := vm.evictTo(t, twin, evict.Source{})
	if err != nil || there != nil {
		b, _ := os.ReadFile(twin.errors)
		t.Fatalf("%v; %v; the twin says: %s", err, there, b)
	}
	twin.reads("AAAAAAAA")
	if w := strings.Join(report.Warnings, "\n"); !strings.Contains(w,
		`"hourly" of node "overlay"`) || strings.Contains(w, "daily") {
		t.Errorf("the report warns of %q", w)
	}
	a, errA := os.ReadFile(file("vars-a.fd"))
	b, errB := os.ReadFile(file("vars-b.fd"))
	if err := errors.Join(errA, errB); err != nil || !bytes.Equal(a, b) {
		t.Errorf("the firmware's variables did not come: %v", err)
	}
	var nodes []struct {
		Name    string `json:"node-name"`
		Bitmaps []struct {
			Name string `json:"name"`
		} `json:"dirty-bitmaps"`
	}
	if err := twin.q.Run(labtest.Within(t, time.Minute), "query-named-block-nodes", nil,
		&nodes); err != nil {
		t.Fatal(err)
	}
	var bitmaps []string
	for _, n := range nodes {
		for _, b := range n.Bitmaps {
			bitmaps = append(bitmaps, n.Name+"/"+b.Name)
		}
	}
	if fmt.Sprint(bitmaps) != "[boot/daily]" {
		t.Errorf("the twin has the bitmaps %v", bitmaps)
	}
}

// A background snapshot of a VM's memory is a migration to QEMU. The engine names it as a snapshot.
func TestBackgroundSnapshot(t *testing.T) {
	vm := bare(t)
	twin := bare(t, "-S", "-incoming", "defer")
	vm.do("migrate-set-capabilities",
		arguments{"capabilities": []arguments{{"capability": "background-snapshot",
			"state": true}}})
	// A slow reader keeps it going for seconds. QEMU ignores its own rate limit where memory is
	// empty, and blocks its main loop if nobody reads.
	socket := filepath.Join(t.TempDir(), "snapshot")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var reader sync.WaitGroup
	var over atomic.Bool
	defer reader.Wait()
	defer over.Store(true)
	defer ln.Close()
	reader.Go(func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for b := make([]byte, 1<<10); !over.Load(); time.Sleep(5 * time.Millisecond) {
			if _, err := c.Read(b); err != nil {
				return
			}
		}
	})
	vm.do("migrate", arguments{"uri": "unix:" + socket})
	_, err, _ = vm.evictTo(t, twin, evict.Source{})
	// The VM runs, or stands for the moment in which QEMU saves its devices.
	refused(t, err, "the VM has an unfinished snapshot of its memory", "wait for its end")
}

// gone waits until a list that QEMU returns is empty.
func (v *bareVM) gone(t testing.TB, command string) {
	t.Helper()
	for ctx := labtest.Within(t, time.Minute); ; time.Sleep(10 * time.Millisecond) {
		var list []any
		if err := errors.Join(v.q.Run(ctx, command, nil, &list), ctx.Err()); err != nil {
			t.Fatal(err)
		}
		if len(list) == 0 {
			return
		}
	}
}
