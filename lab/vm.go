package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"vacate/lab/loadproto"

	"golang.org/x/sys/unix"
)

// Devices is what a VM has besides memory, CPUs and two serial ports.
type Devices string

const (
	// Bare is nothing else.
	Bare Devices = "bare"
	// Full is disk, network card, console port and balloon (all virtio), and VGA.
	Full Devices = "full"
)

// Spec describes a VM. The zero value is good.
type Spec struct {
	QEMU      QEMU    // default StockQEMU
	Machine   string  // QEMU's machine type; default "pc"
	MemoryMiB int     // default 512
	VCPUs     int     // default 1
	Memfd     bool    // RAM in a shared memfd, else anonymous
	Devices   Devices // default Bare
	Kernel    Kernel  // default this machine's release's
	Load      Load
	Disk      string // raw image of a Full VM; default one made for it
	Accel     string // "kvm" or "tcg"; default whichever works
	CPU       string // QEMU's CPU model; default all that Accel has
	Cmdline   string // more of the kernel's command line
	// BareMetal has package bareguest's guest in place of Linux, with its own load. It runs
	// under KVM also where Linux does not. Its CPUs each have a worker; other sets than hot, idle
	// and other memory are not for it. With Agent it answers like vacate-guest by itself.
	BareMetal bool
	// program of this module, by its name in cmd, to be the guest's whole user space; default
	// guestload
	Init string
	// programs that guestload starts beside its load; what they write is on the console
	Run []string
	// Agent has guestload start the program vacate-guest, and gives the VM a
	// virtio-serial port for it, AgentPort; see VM.AgentSocket.
	Agent bool
	// Tap has a Full VM's network card on its host's bridge, and not by itself. The guest
	// has Addr wherever it runs.
	Tap  bool
	Addr string // IPv4 address of a guest with a Tap; default one of its own
	// Server runs in a guest with a Tap, beside its load, and serves so much memory (PostgreSQL: a
	// table of that size); see VM.ServerAddr.
	Server    Server
	ServerMiB int
	Extra     []string // more arguments for QEMU

	server server // its disk is the VM's own
	waits  bool   // the guest waits for its load's parameters
}

// AgentPort is the name of the agent's virtio-serial port.
const AgentPort = "org.vacate.agent"

const (
	guestLoad  = "guestload"
	guestAgent = "vacate-guest"
)

// programs are those in the guest's image, init first, and those of them that
// guestload is to start.
func (s *Spec) programs() (all, run []string) {
	run = s.Run
	if s.Agent && s.Init == guestLoad && !s.BareMetal {
		run = append(slices.Clone(run), guestAgent)
	}
	return append([]string{s.Init}, run...), run
}

// Load is what the guest keeps in memory, and does with it.
type Load struct {
	HotMiB   int  // worked on all the time
	IdleMiB  int  // written once, by the process that works
	OtherMiB int  // written once, by other processes
	Others   int  // how many those are; default 1
	CacheMiB int  // page cache of the disk; needs Full
	FileMiB  int  // file in the guest's root file system, which is memory
	Workers  int  // threads working on the hot set; default one per VCPU
	Zipf     bool // hot pages are picked by Zipf's law (exponent 1); else uniformly
	Stale    bool // free memory was used before, and holds what was there; else zeroes mostly
	Mixed    bool // free memory was used before and is in pieces, which all sets take in turns
	Sleep    bool
	Slow     bool   // workers rest most of the time, and leave the core to others
	Seed     uint64 // of page contents, and of all that is random
}

// guestNeeds is what the kernel and an empty load need, in MiB, and bareNeeds the same of the bare
// guest.
const (
	guestNeeds = 128
	bareNeeds  = 16
)

// kvmBootTime is how long a guest may take to boot under KVM, which is much
// more than it needs.
const kvmBootTime = 10 * time.Second

func (s *Spec) fill(ctx context.Context) (err error) {
	if s.QEMU.Path == "" {
		if s.QEMU, err = StockQEMU(ctx); err != nil {
			return err
		}
	}
	if s.Machine == "" {
		s.Machine = "pc"
	}
	if s.MemoryMiB == 0 {
		s.MemoryMiB = 512
	}
	if s.VCPUs == 0 {
		s.VCPUs = 1
	}
	if s.Devices == "" {
		s.Devices = Bare
	}
	if s.Init == "" {
		s.Init = guestLoad
	}
	l := &s.Load
	if l.Workers == 0 {
		l.Workers = s.VCPUs
	}
	if l.Others == 0 {
		l.Others = 1
	}
	if s.Devices != Bare && s.Devices != Full {
		return fmt.Errorf("devices %q: want %q or %q", s.Devices, Bare, Full)
	}
	if s.Accel != "" && s.Accel != "kvm" && s.Accel != "tcg" {
		return fmt.Errorf("accelerator %q: want kvm or tcg", s.Accel)
	}
	if s.VCPUs < 1 || l.Workers < 1 || l.Others < 1 {
		return errors.New("CPUs, workers and other processes must be at least 1")
	}
	for _, p := range append([]string{s.Init}, s.Run...) {
		if !programName.MatchString(p) {
			return fmt.Errorf("program %.40q: want a name in cmd, such as %q", p, guestLoad)
		}
	}
	if s.Init != guestLoad && len(s.Run) > 0 {
		return fmt.Errorf("only %s starts other programs, and init is %s", guestLoad, s.Init)
	}
	var all int
	for _, mib := range []int{l.HotMiB, l.IdleMiB, l.OtherMiB, l.CacheMiB, l.FileMiB} {
		if mib < 0 {
			return errors.New("a load's size cannot be negative")
		}
		all += mib
	}
	if s.Server != NoServer {
		r, ok := recipes[s.Server]
		if !ok || !s.Tap || s.ServerMiB < 1 {
			return fmt.Errorf("server %q: want one of %v, which needs a tap, and memory to serve",
				s.Server, Servers())
		}
		all += s.ServerMiB + r.needs
	}
	needs := guestNeeds
	if s.BareMetal {
		needs = bareNeeds
		if l.Workers != s.VCPUs || s.VCPUs > 4 || l.CacheMiB+l.FileMiB > 0 || s.Tap ||
			len(s.Run) > 0 || s.Init != guestLoad {
			return errors.New("the bare guest has 1 to 4 CPUs with a worker each, and nothing " +
				"of Linux")
		}
	}
	if all+needs > s.MemoryMiB {
		return fmt.Errorf("a load of %d MiB needs a guest of %d MiB or more, not %d", all,
			all+needs, s.MemoryMiB)
	}
	if s.Tap && (s.Devices != Full || s.Init != guestLoad) {
		return fmt.Errorf("a tap needs a network card and %s: devices %q", guestLoad, Full)
	}
	if s.Addr != "" {
		if a, err := netip.ParseAddr(s.Addr); err != nil || !a.Is4() || !s.Tap {
			return fmt.Errorf("guest's address %.40q: want an IPv4 address of a guest with a tap",
				s.Addr)
		}
	}
	if l.CacheMiB > 0 && s.Devices != Full {
		return fmt.Errorf("a load with page cache needs a disk: devices %q", Full)
	}
	return nil
}

var programName = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)

func (s *Spec) cmdline() string {
	// The tests of its own cryptography are a tenth of a boot under emulation.
	line := "console=ttyS0 oops=panic cryptomgr.notests"
	if s.waits {
		line += " vacate.wait"
	} else if s.Init == guestLoad {
		line += s.loadParameters()
	}
	if s.Cmdline != "" {
		line += " " + s.Cmdline
	}
	return line
}

func (s *Spec) loadParameters() string {
	l := s.Load
	line :=
		fmt.Sprintf(" vacate.hot=%dM vacate.idle=%dM vacate.other=%dM vacate.cache=%dM "+
			"vacate.file=%dM vacate.workers=%d vacate.others=%d vacate.seed=%d",
			l.HotMiB, l.IdleMiB, l.OtherMiB, l.CacheMiB, l.FileMiB, l.Workers, l.Others, l.Seed)
	if l.Sleep {
		line += " vacate.mode=idle"
	}
	if l.Slow {
		line += " vacate.pace=slow"
	}
	if l.Zipf {
		line += " vacate.access=zipf"
	}
	if l.Stale {
		line += " vacate.free=stale"
	}
	if l.Mixed {
		line += " vacate.place=mixed"
	}
	if s.Agent {
		line += " vacate.port=" + AgentPort
	}
	if s.Tap {
		ones, _ := network.Size()
		line += fmt.Sprintf(" vacate.addr=%s/%d", s.Addr, ones)
	}
	_, run := s.programs()
	for _, p := range run {
		line += " vacate.run=/" + p
	}
	if s.Server != NoServer {
		line += s.serve(s.server.program)
	}
	return line
}

// VM is a QEMU process on a host. Methods may be called from any goroutine.
type VM struct {
	Name    string
	Host    *Host
	Spec    Spec // with defaults filled in
	Guest   *Guest
	QMP     string // monitor socket, for the engine or operator
	LabQMP  string // a second one, for the lab
	Console string // file with the guest's console
	// AgentSocket is where QEMU listens for who talks to the guest's agent,
	// one at a time; empty without Spec.Agent.
	AgentSocket string
	// Release is the release of the guest's kernel that it booted, or "bareguest-" and a hash.
	Release string
	// Args are QEMU and its arguments, but for those that have it wait for a guest to come.
	Args []string

	stderr  string
	process *os.Process
	done    chan struct{} // closed when the process has ended
	ended   error         // how; valid once done is closed
	all     sync.WaitGroup
	port    net.Conn // the report port
	write   sync.Mutex
}

// How long a boot may take on a busy machine under emulation, and how long the
// load may take to use a MiB of memory.
const (
	bootTime   = 90 * time.Second
	timePerMiB = 50 * time.Millisecond
)

// Boot starts a VM and waits until its load has begun, for at most 3 minutes and
// 0.1 s for each MiB of memory.
// With another init than the load it waits until QMP answers.
func (h *Host) Boot(ctx context.Context, spec Spec) (*VM, error) {
	vm, err := h.boot(ctx, spec)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		// Seen once in some hundred boots under emulation: the kernel starts init, and
		// nothing more comes.
		h.lab.log.Warn("the guest hung while it booted; once more", "error", err)
		vm, err = h.boot(ctx, spec)
	}
	return vm, err
}

func (h *Host) boot(ctx context.Context, spec Spec) (*VM, error) {
	if err := spec.fill(ctx); err != nil {
		return nil, fmt.Errorf("boot VM: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, bootTime+time.Duration(spec.MemoryMiB)*timePerMiB)
	defer cancel()
	vm, err := h.begin(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("boot VM on host %s: %w", h.Name, err)
	}
	if spec.Init != guestLoad {
		err = vm.answer(ctx)
	} else {
		err = vm.Guest.wait(ctx, "the guest's load to begin", vm.done,
			func() bool { return vm.Guest.hellos > 0 })
	}
	if err != nil {
		err = vm.explain(fmt.Errorf("boot VM on host %s: %w", h.Name, err))
		vm.Kill()
		return nil, err
	}
	return vm, nil
}

// begin starts a VM whose guest boots, or has booted.
func (h *Host) begin(ctx context.Context, spec Spec) (*VM, error) {
	if h.lab.once {
		img, err := h.lab.image.get(ctx, &spec)
		if err == nil && spec.Accel == "" {
			spec.Accel, err = h.lab.accelerator(ctx, spec, img)
		}
		if err != nil {
			return nil, err
		}
		if spec.startsBooted() {
			return h.launchBooted(ctx, spec)
		}
	}
	return h.launch(ctx, spec, newGuest())
}

// IncomingOptions differ from the VM whose guest is to come.
type IncomingOptions struct {
	QEMU QEMU // default the same
	// From is where QEMU is to take the guest from, as "-incoming" has it; default "defer",
	// which leaves that to QMP.
	From string
	// Running leaves out -S: the guest runs as soon as it has come.
	Running bool
	Extra   []string // more arguments for QEMU
}

// Incoming starts a VM to take the guest of twin, with "-incoming defer" and "-S",
// unless told otherwise; it returns when QMP answers.
func (h *Host) Incoming(ctx context.Context, twin *VM, opts IncomingOptions) (*VM, error) {
	spec := twin.Spec
	if opts.QEMU.Path != "" {
		spec.QEMU = opts.QEMU
	}
	if opts.From == "" {
		opts.From = "defer"
	}
	extra := append([]string{"-incoming", opts.From}, opts.Extra...)
	if !opts.Running {
		extra = append(extra, "-S")
	}
	vm, err := h.launch(ctx, spec, twin.Guest, extra...)
	if err != nil {
		return nil, fmt.Errorf("start incoming VM on host %s: %w", h.Name, err)
	}
	if err := vm.answer(ctx); err != nil {
		err = vm.explain(fmt.Errorf("start incoming VM on host %s: %w", h.Name, err))
		vm.Kill()
		return nil, err
	}
	return vm, nil
}

// answer waits until QMP does.
func (vm *VM) answer(ctx context.Context) error {
	for {
		_, err := vm.Status(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-vm.done:
			return errors.New("qemu has exited")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (h *Host) launch(ctx context.Context, spec Spec, guest *Guest, extra ...string) (*VM, error) {
	l := h.lab
	p, err := h.prepare(ctx, spec, guest)
	if err != nil {
		return nil, err
	}
	defer p.reports.Close()
	vm := p.vm()
	stderr, err := os.Create(vm.stderr)
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	cmd := exec.Command(vm.Args[0], append(slices.Clone(vm.Args[1:]), extra...)...)
	cmd.Stdout, cmd.Stderr = stderr, stderr
	if err := h.Start(cmd); err != nil {
		return nil, err
	}
	vm.process = cmd.Process
	vm.all.Go(func() {
		vm.ended = cmd.Wait()
		s := cmd.ProcessState
		l.log.Debug("QEMU ended", "vm", vm.Name, "cpu", s.UserTime()+s.SystemTime())
		close(vm.done)
	})
	l.mu.Lock()
	l.vms = append(l.vms, vm)
	l.mu.Unlock()
	// QEMU connects before it does anything else, or fails.
	accepted := make(chan struct{})
	vm.all.Go(func() {
		select {
		case <-accepted:
		case <-vm.done:
			p.reports.Close()
		case <-ctx.Done():
			p.reports.Close()
		}
	})
	conn, err := p.reports.Accept()
	close(accepted)
	if err != nil {
		err = vm.explain(errors.Join(errors.New("qemu did not start"), ctx.Err()))
		vm.Kill()
		return nil, err
	}
	vm.follow(conn)
	l.log.Info("QEMU started", "vm", vm.Name, "qemu", vm.Spec.QEMU.Version, "accelerator",
		vm.Spec.Accel)
	return vm, nil
}

// follow takes the guest's reports from the process's connection.
func (vm *VM) follow(conn net.Conn) {
	vm.port = conn
	if vm.Spec.Init == guestLoad {
		vm.all.Go(func() {
			vm.Guest.follow(vm.Name, conn)
			conn.Close()
		})
	}
}

// prepared is all that a QEMU needs to be started on a host.
type prepared struct {
	host    *Host
	name    string
	spec    Spec
	guest   *Guest
	args    []string
	release string // of the guest's kernel
	reports *net.UnixListener
}

func (h *Host) prepare(ctx context.Context, spec Spec, guest *Guest) (_ *prepared, err error) {
	l := h.lab
	img, err := l.image.get(ctx, &spec)
	if err != nil {
		return nil, err
	}
	if spec.Accel == "" {
		if spec.Accel, err = l.accelerator(ctx, spec, img); err != nil {
			return nil, err
		}
	}
	if spec.CPU == "" {
		spec.CPU = DefaultCPU(spec.Accel, img.release)
	}
	l.mu.Lock()
	l.seq++
	p := &prepared{host: h, name: h.Name + "-" + strconv.Itoa(l.seq), guest: guest,
		release: img.release}
	l.mu.Unlock()
	if spec.Devices == Full && spec.Disk == "" {
		spec.Disk = p.file("disk.raw")
		if err := writeDisk(spec.Disk, spec.Load); err != nil {
			return nil, fmt.Errorf("write disk: %w", err)
		}
	}
	if spec.Server != NoServer && spec.server.disk == "" {
		if spec.server, err = fetchServer(ctx, l.dir, spec.Server, spec.ServerMiB,
			l.log); err != nil {
			return nil, err
		}
		own := p.file("server.raw")
		if _, err := output(exec.CommandContext(ctx, "cp", "--sparse=always", "--reflink=auto",
			spec.server.disk, own)); err != nil {
			return nil, fmt.Errorf("copy the disk of server %s: %w", spec.Server, err)
		}
		spec.server.disk = own
	}
	if spec.Tap {
		if err := h.addTap(tapName(p.name)); err != nil {
			return nil, err
		}
		if spec.Addr == "" {
			if spec.Addr, err = l.newGuestAddr(); err != nil {
				return nil, err
			}
		}
	}
	p.spec = spec
	p.args = append([]string{spec.QEMU.Path}, p.vm().args(img, p.file("load.sock"))...)
	p.reports, err = net.ListenUnix("unix", &net.UnixAddr{Name: p.file("load.sock"), Net: "unix"})
	return p, err
}

func (p *prepared) file(kind string) string {
	return filepath.Join(p.host.lab.run, p.name+"-"+kind)
}

// vm returns the VM of a process that is not there yet.
func (p *prepared) vm() *VM {
	vm := &VM{
		Name: p.name, Host: p.host, Spec: p.spec, Guest: p.guest, Args: p.args, Release: p.release,
		QMP: p.file("qmp.sock"), LabQMP: p.file("labqmp.sock"), Console: p.file("console.log"),
		stderr: p.file("stderr.log"), done: make(chan struct{}),
	}
	if p.spec.Agent {
		vm.AgentSocket = p.file("agent.sock")
	}
	return vm
}

func tapName(vm string) string { return "tap-" + vm }

// newGuestAddr returns an address that no guest of the lab has yet.
func (l *Lab) newGuestAddr() (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.guests == 254 {
		return "", errors.New("the lab has no more addresses for guests: make a new one")
	}
	l.guests++
	return guestAddr(l.guests).String(), nil
}

// DefaultCPU is the CPU model for an accelerator ("kvm" or "tcg") and a guest kernel of some
// release: all features but those that hurt. Under emulation, clearing memory with "rep stosb"
// takes a turn per byte (erms; Linux 6.1 hangs if it then still has fsrm), and QEMU 7.2's
// cmpxchg16b fails in Linux 6.12 and later (cx16). A KVM that itself runs in a VM on an AMD CPU may
// offer Intel's arch-capabilities and then refuse them, which makes QEMU abort.
func DefaultCPU(accel, release string) string {
	if accel == "kvm" {
		return "host,arch-capabilities=off"
	}
	cpu := "max,-erms,-fsrm"
	var major, minor int
	fmt.Sscanf(release, "%d.%d", &major, &minor)
	if major > 6 || major == 6 && minor >= 12 {
		cpu += ",-cx16"
	}
	return cpu
}

// escape makes a value fit for QEMU's comma-separated options.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func (vm *VM) args(img *image, reports string) []string {
	s := &vm.Spec
	machine := s.Machine
	accel := "kvm"
	if s.Accel == "tcg" {
		accel = "tcg,thread=multi"
	}
	var args []string
	add := func(a ...string) { args = append(args, a...) }
	if s.Memfd {
		machine += ",memory-backend=ram"
		add("-object", fmt.Sprintf("memory-backend-memfd,id=ram,size=%dM,share=on", s.MemoryMiB))
	}
	add("-name", "vacate-lab-"+vm.Name+",debug-threads=on",
		"-nodefaults", "-no-user-config", "-display", "none",
		"-machine", machine, "-accel", accel, "-cpu", s.CPU,
		"-smp", strconv.Itoa(s.VCPUs), "-m", strconv.Itoa(s.MemoryMiB)+"M",
		"-kernel", img.kernel, "-append", s.cmdline(),
		"-chardev", "file,id=console,path="+escape(vm.Console), "-serial", "chardev:console",
		"-chardev", "socket,id=reports,server=off,path="+escape(reports), "-serial",
		"chardev:reports")
	if s.BareMetal {
		add("-bios", "qboot.rom")
	} else {
		add("-initrd", img.initrd)
	}
	for _, socket := range []string{vm.QMP, vm.LabQMP} {
		add("-qmp", "unix:"+escape(socket)+",server=on,wait=off")
	}
	if s.Devices == Full {
		netdev := "user,id=net,restrict=on"
		if s.Tap {
			netdev = "tap,id=net,script=no,downscript=no,ifname=" + tapName(vm.Name)
		}
		add("-vga", "std",
			"-drive", "if=none,id=disk,format=raw,cache="+diskCache(s.Disk)+",file="+escape(s.Disk),
			"-device", "virtio-blk-pci,drive=disk",
			"-netdev", netdev, "-device", "virtio-net-pci,netdev=net,mac="+s.MAC(),
			"-device", "virtio-serial-pci", "-chardev", "null,id=port", "-device",
			"virtserialport,chardev=port,name=lab.port",
			"-device", "virtio-balloon-pci")
		if s.Server != NoServer {
			add("-drive", "if=none,id=server,format=raw,cache="+diskCache(s.server.disk)+",file="+
				escape(s.server.disk), "-device", "virtio-blk-pci,drive=server")
		}
	} else {
		add("-vga", "none")
	}
	if s.Agent {
		if s.Devices == Bare {
			add("-device", "virtio-serial-pci")
		}
		add("-chardev", "socket,id=agent,server=on,wait=off,path="+escape(vm.AgentSocket),
			"-device", "virtserialport,chardev=agent,name="+AgentPort)
	}
	return append(args, s.Extra...)
}

// MAC is the address of a Full VM's network card.
func (s *Spec) MAC() string {
	if !s.Tap {
		return "52:54:00:77:00:01"
	}
	ip := netip.MustParseAddr(s.Addr).As4() // see fill
	return net.HardwareAddr{0x52, 0x54, 0, 0x77, ip[2], ip[3]}.String()
}

// Disks are the raw images of a Full VM, in the order in which its guest finds them.
func (s *Spec) Disks() []string {
	if s.Server == NoServer {
		return []string{s.Disk}
	}
	return []string{s.Disk, s.server.disk}
}

// diskCache returns how QEMU is to cache a disk: as is right for one that two hosts share, not
// at all. With QEMU's default a VM stands still while the destination drops what the host
// has cached of its disk. Some file systems cannot do without.
func diskCache(name string) string {
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return "writeback"
	}
	f.Close()
	return "none"
}

// writeDisk makes a raw image with the pages that the guest load expects.
func writeDisk(name string, load Load) error {
	seed := loadproto.SetSeed(load.Seed, loadproto.SetCache)
	const perMiB = 1 << 20 / loadproto.PageSize
	var chunk [perMiB]loadproto.Page
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for mib := range max(1, load.CacheMiB) {
		for i := range chunk {
			chunk[i].Fill(loadproto.Base(seed, uint64(mib*perMiB+i), 0))
		}
		if _, err := f.Write((*[1 << 20]byte)(unsafe.Pointer(&chunk))[:]); err != nil {
			return err
		}
	}
	return f.Close()
}

// PID returns the process id of the VM's QEMU.
func (vm *VM) PID() int { return vm.process.Pid }

// Port is the guest's second serial port, for a Spec.Init that is not
// guestload; guestload's is the lab's. Kill closes it.
func (vm *VM) Port() net.Conn { return vm.port }

// Done is closed when the VM's process has ended.
func (vm *VM) Done() <-chan struct{} { return vm.done }

// Alive reports whether the VM's process runs.
func (vm *VM) Alive() bool {
	select {
	case <-vm.done:
		return false
	default:
		return true
	}
}

// Wait waits for the VM's process to end. Its error is nil if QEMU said all
// was well, as after "quit", and always nil for a QEMU that another process started.
func (vm *VM) Wait(ctx context.Context) error {
	select {
	case <-vm.done:
		return vm.ended
	case <-ctx.Done():
		return fmt.Errorf("wait for VM %s to end: %w", vm.Name, ctx.Err())
	}
}

// Ended waits for the VM's process to end, however it does: the QEMU at the source is killed once
// its VM is whole elsewhere.
func (vm *VM) Ended(ctx context.Context) error {
	select {
	case <-vm.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for VM %s to end: %w", vm.Name, ctx.Err())
	}
}

// Kill ends the VM's process at once and waits for it.
func (vm *VM) Kill() {
	vm.process.Kill()
	vm.all.Wait()
	if vm.port != nil {
		vm.port.Close()
	}
}

// Status returns what QMP's query-status says, such as "running" or
// "inmigrate".
func (vm *VM) Status(ctx context.Context) (string, error) {
	var s struct{ Status string }
	err := execute(ctx, vm.LabQMP, "query-status", nil, &s)
	return s.Status, err
}

// Execute runs a QMP command on the lab's own monitor. args and result are
// JSON values, and may be nil.
func (vm *VM) Execute(ctx context.Context, command string, args, result any) error {
	return execute(ctx, vm.LabQMP, command, args, result)
}

// command writes a command to the guest load. The newline before it ends what
// an earlier eviction may have torn.
func (vm *VM) command(c string) error {
	vm.write.Lock()
	defer vm.write.Unlock()
	vm.port.SetWriteDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(vm.port, "\n"+c+"\n"); err != nil {
		return vm.explain(fmt.Errorf("write to the guest on VM %s: %w", vm.Name, err))
	}
	return nil
}

// explain adds the ends of the VM's logs to an error.
func (vm *VM) explain(err error) error {
	return fmt.Errorf("%w%s%s", err, tail("qemu said", vm.stderr),
		tail("the guest's console", vm.Console))
}

func tail(what, file string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 4096
	if fi, err := f.Stat(); err == nil && fi.Size() > most {
		f.Seek(-most, io.SeekEnd)
	}
	text, _ := io.ReadAll(io.LimitReader(f, most))
	return lastLines(what, string(text))
}
