package evict_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/link"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
	"vacate/lab/labtest"

	"golang.org/x/sys/unix"
)

var (
	allConfigurations = flag.Bool("configurations", false,
		"try all configurations of VMs, not only the first of each kind")
	configurationQEMU = flag.String("qemu", stockQEMU, "QEMU to try configurations with")
)

const stockQEMU = "qemu-system-x86_64"

// A configuration is a kind of VM, as arguments of QEMU. {dir} is a directory of its own, {shm} one
// in memory.
type configuration struct {
	name string
	args string
	twin string   // if it differs
	says []string // parts of the refusal; none: it moves
	// moves says that newer versions of QEMU let it move.
	moves bool
}

const (
	disk  = " -drive if=none,id=d,file={dir}/disk.raw,format=raw"
	plain = "-M pc"
	pcie  = "-M q35"
)

var configurations = []struct {
	kind string
	of   []configuration
}{
	{"machines", []configuration{
		{name: "q35 with a device behind a root port",
			args: "-M q35 -device pcie-root-port,id=rp,chassis=1 -device virtio-rng-pci,bus=rp"},
		{name: "pc", args: "-M pc"},
		{name: "pc without ACPI", args: "-M pc,acpi=off"},
		{name: "no HPET", args: "-M pc,hpet=off"},
		{name: "q35 without USB, SATA and SMBus", args: "-M q35,sata=off,smbus=off,usb=off"},
		{name: "PCI bridge", args: plain +
			" -device pci-bridge,id=b,chassis_nr=1 -device virtio-rng-pci,bus=b,addr=1"},
		{name: "PCIe expander",
			args: pcie +
				" -device pxb-pcie,id=x,bus_nr=64,bus=pcie.0 -device " +
				"pcie-root-port,id=rp,bus=x,chassis=1 -device virtio-rng-pci,bus=rp"},
		{name: "PCIe switch", args: pcie +
			" -device pcie-root-port,id=rp,chassis=1 -device x3130-upstream,id=up,bus=rp " +
			"-device xio3130-downstream,id=down,bus=up,chassis=2 -device virtio-rng-pci,bus=down"},
		{name: "isapc", args: "-M isapc"},
		{name: "microvm", args: "-M microvm -bios {bios}"},
		{name: "microvm with devices", args: "-M microvm -bios {bios} -device virtio-rng-device"},
		{name: "microvm with another device",
			args: "-M microvm -bios {bios} -device virtio-rng-device",
			twin: "-M microvm -bios {bios} -device virtio-balloon-device",
			says: []string{"only the source has [virtio-rng-device"}},
	}},
	{"CPUs", []configuration{
		{name: "2 sockets of 2 cores", args: plain + " -smp 4,sockets=2,cores=2"},
		{name: "2 threads", args: plain + " -smp 2,threads=2,cores=1,sockets=1"},
		{name: "dies", args: plain + " -smp 4,sockets=1,dies=2,cores=2"},
		{name: "room for more", args: plain + " -smp 1,maxcpus=8"},
		{name: "named model", args: plain + " -cpu Haswell-v4"},
		{name: "all features", args: plain + " -cpu max"},
		{name: "NUMA", args: plain +
			" -smp 2 -object memory-backend-ram,id=n0,size=128M -object " +
			"memory-backend-ram,id=n1,size=128M -numa node,memdev=n0,cpus=0 -numa " +
			"node,memdev=n1,cpus=1"},
		{name: "KVM", args: plain + " -accel kvm -cpu qemu64"},
		{name: "KVM, another interrupt controller",
			args: plain + " -machine kernel_irqchip=split -accel kvm -cpu qemu64",
			twin: plain + " -accel kvm -cpu qemu64",
			says: []string{"the devices differ", "only the destination [kvm-"}},
		{name: "KVM to emulation", args: plain + " -accel kvm -cpu qemu64",
			twin: plain + " -accel tcg -cpu qemu64",
			says: []string{"runs under KVM on the source, and would under emulation"}},
		{name: "lesser model", args: plain + " -cpu max", twin: plain + " -cpu qemu64",
			says: []string{"lacks", "avx2"}},
		{name: "other topology", args: plain + " -smp 2,cores=2,sockets=1",
			twin: plain + " -smp 2,cores=1,sockets=2", says: []string{"topology differs"}},
	}},
	{"memory", []configuration{
		{name: "memfd", args: plain +
			" -object memory-backend-memfd,id=ram,size=256M,share=on -machine memory-backend=ram"},
		{name: "memfd, private", args: plain +
			" -object memory-backend-memfd,id=ram,size=256M,share=off -machine memory-backend=ram"},
		{name: "preallocated", args: plain +
			" -object memory-backend-ram,id=ram,size=256M,prealloc=on -machine memory-backend=ram"},
		{name: "file on tmpfs",
			args: plain +
				" -object memory-backend-file,id=ram,size=256M,share=on,mem-path={shm}/ram " +
				"-machine memory-backend=ram"},
		{name: "file on tmpfs, private",
			args: plain +
				" -object memory-backend-file,id=ram,size=256M,share=off,mem-path={shm}/ram " +
				"-machine memory-backend=ram"},
		{name: "file on a disk",
			args: plain +
				" -object memory-backend-file,id=ram,size=256M,share=on,mem-path={dir}/ram " +
				"-machine memory-backend=ram",
			says: []string{"the kernel has no userfaultfd for"}},
		{name: "file on a disk, private",
			args: plain +
				" -object memory-backend-file,id=ram,size=256M,share=off,mem-path={dir}/ram " +
				"-machine memory-backend=ram",
			says: []string{"the kernel has no userfaultfd for"}},
		{name: "file on a disk to memfd",
			args: plain +
				" -object memory-backend-file,id=ram,size=256M,share=on,mem-path={dir}/ram " +
				"-machine memory-backend=ram", twin: plain +
				" -object memory-backend-memfd,id=ram,size=256M -machine memory-backend=ram"},
		{name: "private file on a disk to memory",
			args: plain +
				" -object memory-backend-file,id=ram,size=256M,share=off,mem-path={dir}/ram " +
				"-machine memory-backend=ram", twin: plain +
				" -object memory-backend-ram,id=ram,size=256M -machine memory-backend=ram"},
		{name: "memory to plug", args: plain + " -m slots=2,maxmem=1G"},
		{name: "pc-dimm", args: plain +
			" -m slots=2,maxmem=1G -object memory-backend-ram,id=m,size=128M -device " +
			"pc-dimm,memdev=m,id=dimm"},
		{name: "NVDIMM on tmpfs",
			args: "-M pc,nvdimm=on -m slots=2,maxmem=1G -object " +
				"memory-backend-file,id=m,size=128M,share=on,mem-path={shm}/nv -device " +
				"nvdimm,memdev=m"},
		{name: "NVDIMM on a disk",
			args: "-M pc,nvdimm=on -m slots=2,maxmem=1G -object " +
				"memory-backend-file,id=m,size=128M,share=on,mem-path={dir}/nv -device " +
				"nvdimm,memdev=m", says: []string{"the kernel has no userfaultfd for"}},
		{name: "virtio-mem, machine of 7.2",
			args: "-M pc-i440fx-7.2 -m slots=1,maxmem=1G -object " +
				"memory-backend-ram,id=m,size=128M -device " +
				"virtio-mem-pci,id=vm,memdev=m,requested-size=64M"},
		{name: "virtio-pmem on tmpfs",
			args: plain +
				" -m slots=1,maxmem=1G -object " +
				"memory-backend-file,id=m,size=64M,share=on,mem-path={shm}/pm -device " +
				"virtio-pmem-pci,memdev=m"},
	}},
	{"disks", []configuration{
		{name: "virtio-blk", args: plain + disk + " -device virtio-blk-pci,drive=d"},
		{name: "virtio-scsi", args: plain + disk +
			" -device virtio-scsi-pci -device scsi-hd,drive=d"},
		{name: "IDE disk and CD", args: plain + disk + " -device ide-hd,drive=d -device ide-cd"},
		{name: "SATA", args: pcie + disk + " -device ide-hd,drive=d,bus=ide.0"},
		{name: "floppy", args: plain + " -drive if=floppy,file={dir}/floppy.raw,format=raw"},
		{name: "USB disk", args: plain + disk +
			" -device usb-ehci,id=e -device usb-storage,drive=d,bus=e.0"},
		{name: "LSI SCSI", args: plain + disk + " -device lsi53c895a -device scsi-hd,drive=d"},
		{name: "MegaRAID", args: plain + disk + " -device megasas -device scsi-hd,drive=d"},
		{name: "mptsas1068", args: plain + disk + " -device mptsas1068 -device scsi-hd,drive=d"},
		{name: "pvscsi", args: plain + disk + " -device pvscsi -device scsi-hd,drive=d"},
		{name: "SD card", args: plain + disk + " -device sdhci-pci -device sd-card,drive=d"},
		{name: "NVMe", args: plain + disk + " -device nvme,serial=1,drive=d",
			says: []string{"QEMU refuses to migrate", "nvme"}, moves: true},
	}},
	{"network", []configuration{
		{name: "virtio-net", args: plain + " -netdev user,id=n -device virtio-net-pci,netdev=n"},
		{name: "e1000", args: plain + " -netdev user,id=n -device e1000,netdev=n"},
		{name: "e1000e", args: pcie + " -netdev user,id=n -device e1000e,netdev=n"},
		{name: "rtl8139", args: plain + " -netdev user,id=n -device rtl8139,netdev=n"},
		{name: "vmxnet3", args: plain + " -netdev user,id=n -device vmxnet3,netdev=n"},
		{name: "pcnet", args: plain + " -netdev user,id=n -device pcnet,netdev=n"},
		{name: "USB network card", args: plain + " -usb -netdev user,id=n -device usb-net,netdev=n",
			says: []string{"QEMU refuses to migrate", "usb-net"}},
		{name: "other MAC address", args: plain + " -device virtio-net-pci,mac=52:54:00:00:00:01",
			twin: plain + " -device virtio-net-pci,mac=52:54:00:00:00:02",
			says: []string{"mac is"}},
	}},
	{"display and sound", []configuration{
		{name: "standard VGA", args: plain + " -vga std"},
		{name: "Cirrus", args: plain + " -vga cirrus"},
		{name: "QXL", args: plain + " -vga qxl"},
		{name: "VMware", args: plain + " -vga vmware"},
		{name: "virtio-vga", args: plain + " -vga virtio"},
		{name: "virtio-gpu", args: plain + " -device virtio-gpu-pci"},
		{name: "bochs-display", args: plain + " -device bochs-display"},
		{name: "HD audio", args: plain +
			" -audiodev none,id=a -device intel-hda -device hda-duplex,audiodev=a"},
		{name: "AC97", args: plain + " -audiodev none,id=a -device AC97,audiodev=a"},
	}},
	{"USB and input", []configuration{
		{name: "xHCI with keyboard and tablet",
			args: plain + " -device qemu-xhci -device usb-kbd -device usb-tablet"},
		{name: "UHCI with tablet", args: plain + " -usb -device usb-tablet"},
		{name: "USB hub", args: plain + " -usb -device usb-hub,port=1 -device usb-mouse,port=1.2"},
		{name: "USB serial", args: plain + " -usb -chardev null,id=c -device usb-serial,chardev=c",
			says: []string{"QEMU refuses to migrate", "usb-serial"}},
		{name: "virtio keyboard", args: plain + " -device virtio-keyboard-pci"},
	}},
	{"other devices", []configuration{
		{name: "9p, not mounted",
			args: plain + " -virtfs local,path={dir},mount_tag=t,security_model=none"},
		{name: "virtio-rng", args: plain + " -device virtio-rng-pci"},
		{name: "balloon", args: plain + " -device virtio-balloon-pci"},
		{name: "virtio-serial with ports",
			args: plain +
				" -device virtio-serial-pci -chardev null,id=c -device " +
				"virtserialport,chardev=c,name=x -chardev null,id=e -device virtconsole,chardev=e"},
		{name: "vhost-vsock", args: plain + " -device vhost-vsock-pci,guest-cid={cid}"},
		{name: "virtio-iommu", args: pcie + " -device virtio-iommu-pci"},
		{name: "Intel's IOMMU", args: pcie + " -device intel-iommu"},
		{name: "AMD's IOMMU", args: pcie + " -device amd-iommu",
			says: []string{"QEMU refuses to migrate", "iommu"}},
		{name: "virtio-crypto",
			args: plain +
				" -object cryptodev-backend-builtin,id=c -device virtio-crypto-pci,cryptodev=c",
			says: []string{"QEMU refuses to migrate", "virtio-crypto"}},
		{name: "ivshmem, shared memory",
			args: plain +
				" -object memory-backend-file,id=m,size=1M,share=on,mem-path={shm}/iv -device " +
				"ivshmem-plain,memdev=m", says: []string{"QEMU refuses to migrate", "ivshmem"}},
		{name: "ivshmem, master",
			args: plain +
				" -object memory-backend-file,id=m,size=1M,share=on,mem-path={shm}/iv -device " +
				"ivshmem-plain,memdev=m,master=on"},
		{name: "watchdog i6300esb", args: plain + " -device i6300esb"},
		{name: "watchdog ib700", args: plain + " -device ib700"},
		{name: "pvpanic", args: plain + " -device pvpanic"},
		{name: "VM generation ID", args: plain + " -device vmgenid"},
		{name: "vmcoreinfo", args: plain + " -device vmcoreinfo"},
		{name: "IPMI", args: plain + " -device ipmi-bmc-sim,id=b -device isa-ipmi-kcs,bmc=b"},
		{name: "more serial and parallel ports",
			args: plain + " -serial null -serial null -parallel null"},
		{name: "PC speaker", args: "-M pc,pcspk-audiodev=a -audiodev none,id=a"},
		{name: "edu", args: plain + " -device edu"},
		{name: "SMC", args: plain + " -device isa-applesmc,osk=x"},
		{name: "device that only the source has", args: plain + " -device virtio-rng-pci,id=r",
			twin: plain, says: []string{`only the source has [virtio-rng-pci "r"`}},
		{name: "device that is made otherwise", args: plain + " -device virtio-balloon-pci",
			twin: plain + " -device virtio-balloon-pci,page-poison=off",
			says: []string{"page-poison is true"}},
	}},
}

// Every configuration of a VM moves and runs on, or is refused before it is touched. The test
// always tries the first of each kind. With -configurations it tries all, and prints a table.
func TestConfigurations(t *testing.T) {
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	rom := filepath.Join(t.TempDir(), "counter.rom")
	if err := os.WriteFile(rom, counterROM(), 0o600); err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	for _, k := range configurations {
		fmt.Fprintf(&table, "| **%s** | | |\n", k.kind)
		t.Run(k.kind, func(t *testing.T) {
			for i, c := range k.of {
				if i > 0 && !*allConfigurations {
					break
				}
				t.Run(c.name, func(t *testing.T) {
					outcome := tryConfiguration(t, c, rom)
					if outcome == "moves" {
						outcome = "**moves**"
					}
					args := c.args
					if c.twin != "" {
						args += "`, twin `" + c.twin
					}
					fmt.Fprintf(&table, "| %s | `%s` | %s |\n", c.name, args,
						strings.ReplaceAll(outcome, "|", `\|`))
				})
			}
		})
	}
	if *allConfigurations {
		fmt.Print(table.String())
	}
}

// tryConfiguration evicts a VM between two QEMUs of this host, and returns the outcome.
func tryConfiguration(t *testing.T, c configuration, rom string) string {
	shm, err := os.MkdirTemp("/dev/shm", "vacate-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	// It is not t.TempDir: names of tests hold commas, which mean something to QEMU.
	shared, err := os.MkdirTemp("", "vacate-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(shared) })
	for name, size := range map[string]int64{"disk.raw": 1 << 20, "floppy.raw": 1440 << 10} {
		if err := errors.Join(os.WriteFile(filepath.Join(shared, name), nil, 0o600),
			os.Truncate(filepath.Join(shared, name), size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(shared, "counter.bin"), counterBIOS(), 0o600); err != nil {
		t.Fatal(err)
	}
	cid := 1000
	start := func(args, console string, more ...string) (*qmp.Client, string, error) {
		own := filepath.Join(shm, console) // memory in files belongs to one QEMU alone
		dir := filepath.Join(shared, console)
		if err := errors.Join(os.Mkdir(own, 0o700), os.Mkdir(dir, 0o700)); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"disk.raw", "floppy.raw"} {
			if err := os.Symlink(filepath.Join(shared, name),
				filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		cid++
		args = strings.NewReplacer("{dir}", dir, "{shm}", own, "{cid}", fmt.Sprint(cid), "{bios}",
			filepath.Join(shared, "counter.bin")).Replace(args)
		monitor := filepath.Join(dir, "qmp")
		q, err := startQEMU(t, monitor,
			append(append([]string{"-m", "256", "-serial",
				"file:" + filepath.Join(shared, console+".out"), "-option-rom", rom},
				strings.Fields(args)...), more...)...)
		return q, monitor, err
	}
	source, from, err := start(c.args, "source")
	if err != nil {
		return "QEMU does not start it: " + lastLine(err.Error())
	}
	if c.twin == "" {
		c.twin = c.args
	}
	twin, to, err := start(c.twin, "twin", "-S", "-incoming", "defer")
	if err != nil {
		return "QEMU does not start it as a twin: " + lastLine(err.Error())
	}
	count := func(console string) int {
		b, err := os.ReadFile(filepath.Join(shared, console+".out"))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.ContainsRune(b, '!') {
			t.Fatalf("the guest's memory and CPU disagree: %s", b)
		}
		return bytes.Count(b, []byte("."))
	}
	more := func(console string) bool {
		before := count(console)
		for range 600 {
			if count(console) >= before+3 {
				return true
			}
			time.Sleep(50 * time.Millisecond)
		}
		return false
	}
	if !more("source") {
		t.Fatal("the guest does not run at the source")
	}
	source.Close()
	twin.Close()

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx := labtest.Within(t, time.Minute)
	receiving, stop := context.WithCancelCause(ctx)
	received := make(chan error, 1)
	go func() { received <- receiveOn(receiving, evict.Destination{QMP: to}, ln) }()
	_, err = evict.Source{QMP: from,
		Connect: link.Dialer{Addr: ln.Addr().String()}.Session}.Evict(ctx)
	if err != nil {
		stop(errors.New("the source gave up"))
	}
	destErr := <-received
	stop(nil)
	if err == nil && destErr == nil {
		if len(c.says) > 0 && !(c.moves && *configurationQEMU != stockQEMU) {
			t.Fatal("it moved")
		}
		if !more("twin") {
			t.Fatal("the guest does not run at the destination")
		}
		return "moves"
	}
	if !errors.Is(err, evict.ErrRefused) {
		t.Fatalf("source: %v; destination: %v", err, destErr)
	}
	if !more("source") {
		t.Fatal("the guest does not run on at the source")
	}
	said := strings.TrimSuffix(strings.TrimPrefix(err.Error(), "refused while preparing: "),
		". The VM runs on, untouched")
	said = strings.TrimPrefix(said, "the other side gave up: ")
	if destErr != nil && strings.Contains(said, "EOF") {
		// its last words came too late for the source
		said = destErr.Error()
	}
	for _, s := range c.says {
		if !strings.Contains(said, s) {
			t.Errorf("%q does not say %q", said, s)
		}
	}
	if len(c.says) == 0 {
		t.Errorf("refused: %s", said)
	}
	return "refused: " + said
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// startQEMU starts a QEMU, and returns when its monitor answers.
func startQEMU(t *testing.T, monitor string, args ...string) (*qmp.Client, error) {
	t.Helper()
	return startProgram(t, *configurationQEMU, monitor, args...)
}

// startProgram is startQEMU with a QEMU of its own.
func startProgram(t *testing.T, path, monitor string, args ...string) (*qmp.Client, error) {
	t.Helper()
	_, err := exec.LookPath(path)
	labtest.Need(t, err)
	cmd := exec.Command(path,
		append([]string{"-nodefaults", "-display", "none", "-qmp",
			"unix:" + monitor + ",server=on,wait=off"}, args...)...)
	var said bytes.Buffer
	cmd.Stderr = io.MultiWriter(&said, t.Output())
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill(); <-ended })
	for {
		q, err := qmp.Dial(t.Context(), monitor)
		if err == nil || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) {
			return q, err
		}
		select {
		case err := <-ended:
			ended <- err
			return nil, fmt.Errorf("%w: %s", err, said.String())
		case <-time.After(10 * time.Millisecond): // until QEMU listens
		}
	}
}

// counterROM is an option ROM that never returns to the firmware. At each tick of the timer it
// counts, in a register and in memory. It then writes a full stop to the first serial port, or "!"
// if the two differ.
func counterROM() []byte {
	rom := make([]byte, 512)
	copy(rom, []byte{
		0x55, 0xaa, 1, // an option ROM of 512 bytes
		0xfa,       // cli
		0x31, 0xc0, // xor ax, ax
		0x8e, 0xd8, // mov ds, ax
		0x66, 0x31, 0xc9, // xor ecx, ecx
		0x66, 0x89, 0x0e, 0x00, 0x70, // mov [0x7000], ecx
		0xfb,       // 0x10: sti
		0xf4,       // hlt
		0xfa,       // cli
		0x31, 0xc0, // xor ax, ax
		0x8e, 0xd8, // mov ds, ax
		0x66, 0x41, // inc ecx
		0x66, 0xff, 0x06, 0x00, 0x70, // inc dword [0x7000]
		0x66, 0x39, 0x0e, 0x00, 0x70, // cmp [0x7000], ecx
		0x75, 0x08, // jne 0x2d
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xb0, '.', // mov al, '.'
		0xee,       // out dx, al
		0xeb, 0xe3, // jmp 0x10
		0xba, 0xf8, 0x03, // 0x2d: mov dx, 0x3f8
		0xb0, '!', // mov al, '!'
		0xee,       // out dx, al
		0xf4,       // hlt
		0xeb, 0xfd, // jmp to that
	})
	for _, b := range rom[:511] {
		rom[511] -= b // all bytes add up to 0
	}
	return rom
}

// counterBIOS is counterROM as a firmware, for a machine whose own firmware runs no option ROMs. It
// counts in a loop that takes some time.
func counterBIOS() []byte {
	bios := make([]byte, 64<<10)
	copy(bios[0xff00:], []byte{
		0xfa,       // cli
		0x31, 0xc0, // xor ax, ax
		0x8e, 0xd8, // mov ds, ax
		0x66, 0x31, 0xc9, // xor ecx, ecx
		0x66, 0x89, 0x0e, 0x00, 0x70, // mov [0x7000], ecx
		0x66, 0xbb, 0x40, 0x4b, 0x4c, 0x00, // 0x0d: mov ebx, 5000000
		0x66, 0x4b, // 0x13: dec ebx
		0x75, 0xfc, // jnz 0x13
		0x66, 0x41, // inc ecx
		0x66, 0xff, 0x06, 0x00, 0x70, // inc dword [0x7000]
		0x66, 0x39, 0x0e, 0x00, 0x70, // cmp [0x7000], ecx
		0x75, 0x08, // jne 0x2d
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xb0, '.', // mov al, '.'
		0xee,       // out dx, al
		0xeb, 0xe0, // jmp 0x0d
		0xba, 0xf8, 0x03, // 0x2d: mov dx, 0x3f8
		0xb0, '!', // mov al, '!'
		0xee,       // out dx, al
		0xf4,       // hlt
		0xeb, 0xfd, // jmp to that
	})
	copy(bios[0xfff0:], []byte{0xe9, 0x0d, 0xff}) // where a CPU starts: jmp to the above
	return bios
}
