package fit

import (
	"encoding/json"
	"errors"
	"flag"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

var qemuBinary = flag.String("qemu", "qemu-system-x86_64", "QEMU to test with")

// start starts a QEMU whose guest does not run.
func start(t *testing.T, args ...string) *qmp.Client {
	t.Helper()
	if _, err := exec.LookPath(*qemuBinary); err != nil {
		if os.Getenv("VACATE_REQUIRE") == "1" {
			t.Fatal(err)
		}
		t.Skip("needs qemu-system-x86_64: install the package qemu-system-x86")
	}
	sock := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.Command(*qemuBinary,
		append([]string{"-nodefaults", "-display", "none", "-S", "-m", "32", "-qmp",
			"unix:" + sock + ",server=on,wait=off"}, args...)...)
	var said strings.Builder
	cmd.Stderr = &said
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill(); <-ended })
	for {
		c, err := qmp.Dial(t.Context(), sock)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			return c
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatal(err)
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("QEMU ended: %v: %s", err, said.String())
		case <-time.After(10 * time.Millisecond): // until QEMU listens
		}
	}
}

func args(s string) []string { return strings.Fields(s) }

// What a guest sees of its CPUs is compared with what it would see of the twin's.
func TestCPUsOfTwins(t *testing.T) {
	for name, c := range map[string]struct {
		source, twin string
		says         []string // of each reason, and of its remedy
	}{
		"equal":           {"-cpu max -smp 2", "-cpu max -smp 2", nil},
		"equal and named": {"-cpu Haswell-v4", "-cpu Haswell-v4", nil},
		"lesser model": {"-cpu max", "-cpu qemu64",
			[]string{"lacks", "avx2", "bmi2", "with the source's -cpu (model max)"}},
		"greater model": {"-cpu qemu64", "-cpu max",
			[]string{"has", "avx2", "which the guest's (qemu64) does not have",
				"-cpu (model qemu64)", "model-id"}},
		"feature off": {"-cpu max", "-cpu max,avx2=off,bmi1=off",
			[]string{"lacks bmi1, avx2", "`-cpu max,…,bmi1=on,avx2=on`"}},
		"feature on": {"-cpu max,erms=off", "-cpu max",
			[]string{"has erms", "`-cpu max,…,erms=off`"}},
		"feature in vain": {"-cpu qemu64,smap=on", "-cpu qemu64,smap=off,pcid=on,xsaves=on",
			[]string{"lacks smap", "smap=on"}},
		"stepping": {"-cpu qemu64", "-cpu qemu64,stepping=7",
			[]string{"stepping is 1 on the source, 7 on the destination", "stepping=1"}},
		"model-id": {"-cpu qemu64", "-cpu qemu64,model-id=Other",
			[]string{"model-id is", "Other"}},
		"phys-bits": {"-cpu max", "-cpu max,phys-bits=38",
			[]string{"phys-bits is 40 on the source, 38"}},
		"level": {"-cpu max", "-cpu max,level=7", []string{"level is", "on the source, 7"}},
		"fewer": {"-smp 2", "-smp 1", []string{"2 vCPUs, the destination 1", "-smp"}},
		"cores": {"-smp 4,sockets=1,cores=4", "-smp 4,sockets=2,cores=2",
			[]string{"topology differs",
				"vCPU 2 is socket 0 core 2 thread 0 on the source, vCPU 2 is socket 1 core 0 " +
					"thread 0"}},
		"threads": {"-smp 2,sockets=1,cores=1,threads=2",
			"-smp 2,sockets=1,cores=2,threads=1", []string{"topology differs"}},
		"room for more": {"-smp 1,maxcpus=4", "-smp 1",
			[]string{"places for 3 vCPUs more, the destination for 0", "maxcpus"}},
		"other room": {"-smp 1,maxcpus=4,cores=4,sockets=1", "-smp 1,maxcpus=4,cores=1,sockets=4",
			[]string{"places for vCPUs that can be plugged differ"}},
		"no PCI": {"-M microvm -smp 2", "-M microvm -smp 2", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, err := CPUsOf(t.Context(), start(t, args(c.source)...))
			if err != nil {
				t.Fatal(err)
			}
			b, err := CPUsOf(t.Context(), start(t, args(c.twin)...))
			if err != nil {
				t.Fatal(err)
			}
			says(t, a.Against(b), c.says)
		})
	}
}

// says makes sure that reasons have all words, or that there is none.
func says(t *testing.T, r Reasons, words []string) {
	t.Helper()
	err := r.Err()
	if err != nil {
		t.Log(err)
	}
	if (err == nil) != (words == nil) {
		t.Fatalf("reasons %v; want %q", err, words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
}

// What was plugged while the VM ran counts as what it was started with.
func TestPluggedCPU(t *testing.T) {
	q := start(t, args("-smp 1,maxcpus=3,sockets=3")...)
	plug := map[string]any{"driver": "qemu64-x86_64-cpu", "id": "c1", "socket-id": 1, "core-id": 0,
		"thread-id": 0}
	if err := q.Run(t.Context(), "device_add", plug, nil); err != nil {
		t.Fatal(err)
	}
	a, err := CPUsOf(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	b, err := CPUsOf(t.Context(), start(t, args("-smp 2,maxcpus=3,sockets=3")...))
	if err != nil {
		t.Fatal(err)
	}
	says(t, a.Against(b), nil)
}

// The names of features are QEMU's.
func TestNames(t *testing.T) {
	q := start(t, "-cpu", "max")
	c, err := CPUsOf(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	var cpus []struct {
		Path string `json:"qom-path"`
	}
	if err := q.Run(t.Context(), "query-cpus-fast", nil, &cpus); err != nil {
		t.Fatal(err)
	}
	has := without(c.Features[0], nil)
	if len(has) < 50 {
		t.Fatalf("only %v", has)
	}
	known, err := propertiesOf(t.Context(), q, cpus[0].Path)
	if err != nil {
		t.Fatal(err)
	}
	for name := range isFeature {
		if !slices.Contains(known, name) {
			continue // a later QEMU's
		}
		var on bool
		if err := q.Run(t.Context(), "qom-get",
			map[string]any{"path": cpus[0].Path, "property": name}, &on); err != nil {
			t.Fatal(err)
		}
		if is := slices.Contains(has, name); on != is {
			t.Errorf("QEMU says that %s is %v, its feature words %v", name, on, is)
		}
	}
}

// The devices of both ends are compared, whatever they hang on.
func TestDevicesOfTwins(t *testing.T) {
	const q35 = "-M q35 -device pcie-root-port,id=rp1,chassis=1 -device " +
		"pcie-root-port,id=rp2,chassis=2 "
	for name, c := range map[string]struct {
		source, twin string
		says         []string
	}{
		"equal": {
			"-M pc -device virtio-rng-pci,id=r -device virtio-serial-pci -device " +
				"virtserialport,nr=3",
			"-M pc -device virtio-serial-pci,addr=3 -device virtio-rng-pci,addr=2 -device " +
				"virtserialport,nr=3", nil},
		"one more": {"-M pc", "-M pc -device e1000,id=net7",
			[]string{"only the source has []",
				`only the destination [e1000 "net7" (8086:100e) at i440FX-pcihost/addr 02.0]`,
				"-device"}},
		"one less": {"-M pc -device virtio-rng-pci", "-M pc",
			[]string{"only the source has [virtio-rng-pci (1af4:1005) at",
				"02.0], only the destination []"}},
		"elsewhere": {"-M pc -device virtio-rng-pci,addr=4",
			"-M pc -device virtio-rng-pci,addr=9", []string{"addr 04.0]", "addr 09.0]"}},
		"behind a port": {q35 + "-device virtio-rng-pci,bus=rp1",
			q35 + "-device virtio-rng-pci,bus=rp2",
			[]string{"pcie-root-port/addr 00.0", "only the destination [virtio-rng-pci"}},
		"ports of other name": {q35 + "-device virtio-rng-pci,bus=rp1",
			"-M q35 -device pcie-root-port,id=a,chassis=1 -device pcie-root-port,id=b,chassis=2 " +
				"-device virtio-rng-pci,bus=a", nil},
		"on USB": {"-M pc -usb -device usb-tablet", "-M pc -usb -device usb-kbd",
			[]string{"only the source has [usb-tablet", "only the destination [usb-kbd"}},
		"port of USB": {"-M pc -usb -device usb-tablet,port=1",
			"-M pc -usb -device usb-tablet,port=2", []string{"port 1]", "port 2]"}},
		"serial": {"-M pc -serial null -serial null", "-M pc -serial null",
			[]string{"isa-serial"}},
		"of a SCSI bus": {"-M pc -device virtio-scsi-pci -device scsi-cd,scsi-id=3",
			"-M pc -device virtio-scsi-pci -device scsi-cd,scsi-id=4",
			[]string{"scsi-id 3/lun 0]", "scsi-id 4/lun 0]"}},
		"no clock": {"-M pc", "-M pc,hpet=off", []string{"only the source has [hpet]"}},
		"on no bus": {"-M pc -device vmgenid", "-M pc",
			[]string{"only the source has [vmgenid]"}},
		"feature": {"-M pc -device virtio-net-pci,id=n",
			"-M pc -device virtio-net-pci,id=n,event_idx=off",
			[]string{
				"virtio-net-device at i440FX-pcihost/addr 02.0 virtio-net-pci: event_idx is " +
					"true on the source, false"}},
		"queues": {"-M pc -smp 2 -device virtio-scsi-pci,num_queues=2",
			"-M pc -smp 2 -device virtio-scsi-pci,num_queues=4",
			[]string{"vectors is 5 on the source, 7", "num_queues is 2 on the source, 4"}},
		"address of a card": {"-M pc -device e1000,mac=52:54:00:00:00:01",
			"-M pc -device e1000,mac=52:54:00:00:00:02",
			[]string{"mac is 52:54:00:00:00:01 on the source"}},
		"legacy": {"-M pc -device virtio-rng-pci",
			"-M pc -device virtio-rng-pci,disable-legacy=on,disable-modern=off",
			[]string{"(1af4:1005)", "(1af4:1044)"}},
		"memory to plug": {"-M pc -m 32,slots=2,maxmem=256M", "-M pc -m 32",
			[]string{"-m maxmem is 268435456 on the source, 0 on the destination"}},
		"plugged memory": {
			"-M pc -m 32,slots=2,maxmem=512M -object memory-backend-ram,id=m,size=128M -device " +
				"pc-dimm,memdev=m,slot=0",
			"-M pc -m 32,slots=2,maxmem=512M -object memory-backend-ram,id=m,size=128M -device " +
				"pc-dimm,memdev=m,slot=1", []string{"slot is 0 on the source, 1"}},
		"layout of memory": {"-M q35", "-M q35,max-ram-below-4g=16M", []string{"max-ram-below-4g"}},
		"means of the host": {
			"-M pc -device virtio-blk-pci,drive=a -drive " +
				"if=none,id=a,file=null-co://,format=raw -netdev user,id=u -device " +
				"virtio-net-pci,netdev=u,bootindex=2",
			"-M pc -device virtio-blk-pci,drive=b -drive " +
				"if=none,id=b,file=null-co://,format=raw -netdev user,id=v -device " +
				"virtio-net-pci,netdev=v,bootindex=1", nil},
		"no PCI": {"-M microvm", "-M microvm -device virtio-rng-device",
			[]string{"only the destination [virtio-rng-device"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, err := DevicesOf(t.Context(), start(t, args(c.source)...))
			if err != nil {
				t.Fatal(err)
			}
			b, err := DevicesOf(t.Context(), start(t, args(c.twin)...))
			if err != nil {
				t.Fatal(err)
			}
			says(t, a.Against(b), c.says)
			for _, d := range []Devices{a, b} {
				if j, err := json.Marshal(d); err != nil || len(j) > 100<<10 {
					t.Errorf("%d bytes of JSON, %v", len(j), err)
				}
			}
		})
	}
}

// QEMU says itself what it cannot migrate.
func TestHeld(t *testing.T) {
	disk := "-drive if=none,id=a,file=null-co://,format=raw "
	for name, c := range map[string]struct {
		args string
		says []string
	}{
		"nothing": {"-M pc -device virtio-rng-pci", nil},
		"NVMe": {"-M pc -device nvme,serial=1,drive=a " + disk,
			[]string{"QEMU refuses to migrate", "nvme", "device_del"}},
		"virtio-crypto": {
			"-M pc -object cryptodev-backend-builtin,id=c -device virtio-crypto-pci,cryptodev=c",
			[]string{"QEMU refuses to migrate", "virtio-crypto"}},
		"AMD's IOMMU": {"-M q35 -device amd-iommu", []string{"QEMU refuses to migrate", "iommu"}},
		"migratable":  {"-M pc -cpu qemu64,invtsc=on", nil}, // blocks under KVM only
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, err := Held(t.Context(), start(t, args(c.args)...))
			if err != nil {
				t.Fatal(err)
			}
			says(t, r, c.says)
		})
	}
}
