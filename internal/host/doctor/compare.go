package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/room"
	"vacate/internal/sys/units"
)

// What is too little, too much, or too soon.
const (
	journalFatal   = 64 << 20  // bytes: less than an eviction writes down (its package, at most)
	journalWarning = 512 << 20 // several evictions
	clockWarning   = time.Second
	certWarning    = 14 * 24 * time.Hour
	waitWarning    = 40.0 // % of time
	slowTrip       = 20 * time.Millisecond
	longEviction   = time.Hour
)

// What the down time is made of, besides the devices' state on its way.
const (
	downTrips  = 4 // package, loaded, commit, and the first page that was not sent ahead
	deviceLoad = 50 * time.Millisecond
	deviceSize = 1 << 20 // bytes, of a usual VM
)

// largest is that of the pages that an eviction can move, in bytes.
const largest = 2 << 20

// report collects findings.
type report struct {
	now      time.Time // by the source's clock
	findings []Finding
}

func (r *report) add(l Level, host, check, text, remedy string) {
	r.findings = append(r.findings, Finding{host, check, l, text, remedy})
}

// Compare says what would block the move of the VM from source to destination, and how long it
// would take. Each check has at least one finding, OK if all is well.
func Compare(source HostFacts, vm VMFacts, destination HostFacts, twin TwinFacts,
	link LinkFacts) []Finding {
	r := report{now: source.Time}
	r.vm(source, vm, or(twin.QEMU.Version, vm.QEMU))
	r.reading(source)
	r.host(source, source.Time)
	r.placing(destination, twin, Fatal)
	r.host(destination, destination.Time)
	r.twin(source, vm, destination, twin)
	r.processor(vm, destination, twin)
	r.room(vm, destination)
	r.disks(source, vm, destination, twin)
	r.way(source, vm, destination, link)
	return r.findings
}

// Inspect says what can be said of one host, and of a VM on it unless vm is nil, without a
// destination.
func Inspect(h HostFacts, vm *VMFacts) []Finding {
	r := report{now: h.Time}
	if vm != nil {
		r.vm(h, *vm, vm.QEMU)
	}
	r.reading(h)
	r.placing(h, TwinFacts{}, Warning)
	r.host(h, h.Time)
	return r.findings
}

// vm checks whether this VM can be moved at all, to a QEMU of some version.
func (r *report) vm(h HostFacts, vm VMFacts, twin string) {
	const check = "vm"
	if reasons := fit.StateOf(vm.State, version(vm.QEMU), version(twin)); reasons != nil {
		r.add(Fatal, h.Name, check, "the VM "+reasons[0].Text, reasons[0].Remedy)
	} else if vm.State == "running" {
		r.add(OK, h.Name, check,
			fmt.Sprintf("runs: QEMU %s, %s, %d vCPUs of %s under %s", vm.QEMU, vm.Machine,
				len(vm.CPUs.VCPUs), vm.CPUs.Model, vm.CPUs.Accel), "")
	} else {
		r.add(OK, h.Name, check,
			fmt.Sprintf("it %s, and moves so: at the destination it stands until it is told "+
				"`cont`: QEMU %s, %s", fit.Stands(vm.State), vm.QEMU, vm.Machine), "")
	}
	if slices.Contains([]string{"", "none", "completed", "failed", "cancelled"}, vm.Migration) {
		r.add(OK, h.Name, "migration", "none is under way", "")
	} else {
		r.add(Fatal, h.Name, "migration", fmt.Sprintf("one is under way: %q", vm.Migration),
			"wait for its end, or `migrate_cancel` in QEMU's monitor if it is not in post-copy")
	}
	switch {
	case !atLeast(vm.QEMU, 4, 2):
		r.add(Fatal, h.Name, "qemu",
			fmt.Sprintf("QEMU %s is too old: post-copy can be relied on from 4.2 on", vm.QEMU),
			"restart the VM with a newer QEMU: `apt-get install qemu-system-x86`")
	case !vm.Postcopy:
		r.add(Fatal, h.Name, "qemu", fmt.Sprintf("QEMU %s was built without post-copy", vm.QEMU),
			"restart the VM with a build for Linux with userfaultfd: `apt-get install "+
				"qemu-system-x86`")
	default:
		r.add(OK, h.Name, "qemu", fmt.Sprintf("%s has post-copy", vm.QEMU), "")
	}
	if len(vm.Settings) > 0 {
		r.add(Note, h.Name, "settings",
			"migration capabilities are on, and an eviction sets them as it needs: "+
				list(vm.Settings), "")
	}
	r.work(h, vm)
	r.devices(h, vm)
	r.backing(h, vm)
}

// stuck are kinds of devices, by how their type begins, that cannot be moved as they are. Those
// that cannot be moved at all, package fit knows.
var stuck = []struct {
	prefix string
	level  Level
	why    string
}{
	{"virtio-9p", Warning,
		"shares a directory of this host, and cannot be moved while the guest has it mounted"},
	{"vhost-user-fs", Warning,
		"shares a directory of this host through a process of its own, whose state QEMU may not " +
			"be able to move"},
	{"usb-host", Warning,
		"is a USB device of this host, and is gone for the guest at the destination"},
	{"scsi-generic", Warning, "is a SCSI device of this host, whose state is not moved"},
	{"vhost-vsock", Note, "moves, but its connections with this host break"},
	{"vhost-user", Warning,
		"is served by another process, which must be set up at the destination and allow " +
			"post-copy; this was not tried"},
}

func (r *report) devices(h HostFacts, vm VMFacts) {
	before := len(r.findings)
	for _, held := range vm.Held {
		r.add(Fatal, h.Name, "devices", held.Text, held.Remedy)
	}
	for _, d := range vm.Devices {
		i := slices.IndexFunc(stuck, func(s struct {
			prefix string
			level  Level
			why    string
		}) bool {
			return strings.HasPrefix(d.Type, s.prefix)
		})
		if i < 0 {
			continue
		}
		name, remedy := d.Type, "shut the VM down and start it without this device"
		if d.ID != "" {
			name, remedy = fmt.Sprintf("%s %q", d.Type,
				d.ID), fmt.Sprintf("unplug it: `device_del %s` in QEMU's monitor", d.ID)
		}
		if strings.HasPrefix(d.Type, "virtio-9p") || strings.HasPrefix(d.Type, "vhost-user-fs") {
			remedy = "unmount it in the guest: `umount /MOUNTPOINT`; then " + remedy
		}
		if stuck[i].level < Warning {
			remedy = ""
		}
		r.add(stuck[i].level, h.Name, "devices", name+" "+stuck[i].why, remedy)
	}
	for _, kind := range vm.Networks {
		switch kind {
		case "vhost-user":
			r.add(Warning, h.Name, "devices",
				"a network card is served by another process (vhost-user), which must be set up "+
					"at the destination and allow post-copy; this was not tried",
				"start the same process at the destination first, or unplug the card: "+
					"`device_del ID` in QEMU's monitor, with its ID of `info network`")
		case "user", "slirp", "passt":
			r.add(Warning, h.Name, "devices",
				fmt.Sprintf("a network card uses QEMU's own network (%s): its connections break "+
					"when the VM moves", kind),
				"give the VM a card on a bridge that both hosts have: `-netdev tap,…`")
		}
	}
	if len(r.findings) == before {
		r.add(OK, h.Name, "devices",
			fmt.Sprintf("no device is known to keep the VM on its host (%d devices)",
				len(vm.Devices)), "")
	}
}

func (r *report) backing(h HostFacts, vm VMFacts) {
	const check = "memory"
	before := len(r.findings)
	if vm.MemoryErr != "" {
		r.add(Fatal, h.Name, check, "the VM's memory cannot be read from outside: "+vm.MemoryErr,
			"run vacated as root, or with `AmbientCapabilities=CAP_SYS_PTRACE` in its unit, in "+
				"the PID namespace of QEMU")
	}
	for _, b := range vm.Memory {
		if b.PageSize > largest {
			r.add(Fatal, h.Name, check,
				fmt.Sprintf("memory %q has pages of %s, which are too large to fetch one by one",
					b.Name, units.Size(b.PageSize)),
				"restart the VM with pages of 2 MiB: `-object "+
					"memory-backend-memfd,hugetlb=on,hugetlbsize=2M,…`")
		}
	}
	if len(r.findings) == before {
		r.add(OK, h.Name, check,
			fmt.Sprintf("%s in %d blocks; at most %s must move",
				units.Size(total(vm, 0)), len(vm.Memory), units.Size(used(vm))), "")
	}
}

// reading checks that the daemon can take a VM's memory off this host.
func (r *report) reading(h HostFacts) {
	remedy := "run vacated as root, or with `AmbientCapabilities=CAP_SYS_PTRACE` in its unit"
	switch {
	case h.ProcessRead != "":
		r.add(Fatal, h.Name, "process memory", "this kernel or a filter refuses "+h.ProcessRead,
			"let vacated call process_vm_readv(2): `SystemCallFilter=@system-service @debug` in "+
				"its unit")
	case !h.mayTrace():
		r.add(Fatal, h.Name, "process memory",
			"vacated lacks CAP_SYS_PTRACE and cannot read the memory of QEMUs of others", remedy)
	case h.PtraceScope >= 3:
		r.add(Fatal, h.Name, "process memory",
			"nobody may look into another process: kernel.yama.ptrace_scope is 3",
			"reboot with `sysctl kernel.yama.ptrace_scope=1` in /etc/sysctl.d")
	default:
		r.add(OK, h.Name, "process memory", "vacated may read that of QEMUs", "")
	}
}

// placing checks that a VM's memory can arrive on this host; without that, level it is.
func (r *report) placing(h HostFacts, twin TwinFacts, level Level) {
	const check = "userfaultfd"
	u := h.Userfaultfd
	asRoot := twin.User == "" || twin.User == "root" || twin.User == "0"
	device := atLeast(twin.QEMU.Version, 8, 0) && u.Device == ""
	switch {
	case u.Error != "" && u.Device != "" && u.Unprivileged < 0:
		r.add(level, h.Name, check, "this kernel has none, which post-copy needs: "+u.Error,
			"boot a kernel with CONFIG_USERFAULTFD=y: `apt-get install linux-image-amd64`")
	case !asRoot && twin.Userfaultfd != "":
		r.add(level, h.Name, check,
			fmt.Sprintf("the twin may not use it as user %s: %s", twin.User, twin.Userfaultfd),
			userfaultRemedy(twin.User))
	case asRoot && u.Error != "" && !device:
		r.add(level, h.Name, check, "may not be used: "+u.Error,
			"`sysctl -w vm.unprivileged_userfaultfd=1`, or run vacated with CAP_SYS_PTRACE and "+
				"without a filter that refuses userfaultfd(2)")
	case u.Features != 0 && (u.Features&uffdMissingHugetlb == 0 ||
		u.Features&uffdMissingShmem == 0):
		r.add(Warning, h.Name, check,
			"this kernel catches no faults in shared memory or huge pages",
			"boot Linux 4.11 or later: `apt-get install linux-image-amd64`")
	default:
		r.add(OK, h.Name, check, "tried, and works", "")
	}
	if h.PidfdGetfd != "" || !h.mayTrace() {
		r.add(Warning, h.Name, "direct placing",
			"vacated may not take the twin's userfaultfd, so pages go through QEMU, which takes "+
				"longer: "+or(h.PidfdGetfd, "it lacks CAP_SYS_PTRACE"),
			"Linux 5.6 or later, and vacated as root or with "+
				"`AmbientCapabilities=CAP_SYS_PTRACE` in its unit")
	} else {
		r.add(OK, h.Name, "direct placing", "vacated may take the twin's userfaultfd", "")
	}
}

// host checks what either role needs. now is by its own clock.
func (r *report) host(h HostFacts, now time.Time) {
	switch j := h.Journal; {
	case j.Path == "":
		r.add(Warning, h.Name, "journal", "has no directory",
			"start vacated with `--state-dir /var/lib/vacate`")
	case j.Error != "":
		r.add(Fatal, h.Name, "journal", "cannot be kept: "+j.Error,
			fmt.Sprintf("make it writable: `mount -o remount,rw $(findmnt -nT %[1]s -o "+
				"TARGET)`, or give vacated another directory than %[1]s", j.Path))
	case j.Free < journalFatal:
		r.add(Fatal, h.Name, "journal",
			fmt.Sprintf("%s are free in %s, and an eviction may write %s", units.Size(j.Free),
				j.Path, units.Size(journalFatal)),
			fmt.Sprintf("make room: `du -xh %s | sort -h | tail` says where", j.Path))
	case j.Free < journalWarning:
		r.add(Warning, h.Name, "journal",
			fmt.Sprintf("only %s are free in %s", units.Size(j.Free), j.Path),
			fmt.Sprintf("make room: `du -xh %s | sort -h | tail` says where", j.Path))
	default:
		r.add(OK, h.Name, "journal", units.Size(j.Free)+" are free", "")
	}
	switch c := h.Certificate; {
	case c.Name == "":
	case !now.Before(c.Expires):
		r.add(Fatal, h.Name, "certificate",
			fmt.Sprintf("of %s expired on %s", c.Name, c.Expires.Format(time.DateOnly)), issue(c))
	case c.Expires.Sub(now) < certWarning:
		r.add(Warning, h.Name, "certificate",
			fmt.Sprintf("of %s expires on %s, in %d days", c.Name, c.Expires.Format(time.DateOnly),
				int(c.Expires.Sub(now).Hours()/24)), issue(c))
	default:
		r.add(OK, h.Name, "certificate",
			fmt.Sprintf("of %s is good until %s", c.Name, c.Expires.Format(time.DateOnly)), "")
	}
	if h.Synchronised {
		r.add(OK, h.Name, "clock", "is synchronised", "")
	} else {
		r.add(Warning, h.Name, "clock", "nobody keeps it right",
			"`timedatectl set-ntp true`, or `apt-get install chrony`")
	}
	for _, w := range []struct {
		of      string
		percent float64
	}{{"a CPU", h.CPUWait}, {"memory", h.MemoryWait}} {
		if w.percent >= waitWarning {
			r.add(Warning, h.Name, "load",
				fmt.Sprintf("tasks wait for %s %.0f %% of the time; pages are served late then",
					w.of, w.percent),
				"find out who is so busy, and stop or move it: `ps -eo pcpu,rss,args "+
					"--sort=-pcpu | head`")
		}
	}
}

func issue(c CertFacts) string {
	return fmt.Sprintf("issue a new one, and copy it to the host: `vacate certs issue --dir CA "+
		"--name %s --out DIR`", c.Name)
}

// twin checks what the destination has for the VM.
func (r *report) twin(source HostFacts, vm VMFacts, h HostFacts, twin TwinFacts) {
	switch {
	case twin.Error != "":
		r.add(Fatal, h.Name, "twin",
			fmt.Sprintf("cannot be started for %s: %s", twin.Name, twin.Error),
			fmt.Sprintf("copy the VM's description to %s from %s", h.Name,
				source.Name))
		return
	case twin.Running:
		r.add(Fatal, h.Name, "twin",
			fmt.Sprintf("a QEMU of the name %s runs there already", twin.Name),
			"find out what it is, and end it if it is a leftover: `vacate ls` there")
	default:
		r.add(OK, h.Name, "twin", "is described there", "")
	}
	q := twin.QEMU
	if q.Error != "" {
		r.add(Fatal, h.Name, "qemu", "cannot be asked: "+q.Error,
			fmt.Sprintf("install it: `apt-get install qemu-system-x86`; or mend the VM's "+
				"description, which names %s", q.Path))
		return
	}
	switch order := compareVersions(q.Version, vm.QEMU); {
	case !atLeast(q.Version, 4, 2):
		r.add(Fatal, h.Name, "qemu",
			fmt.Sprintf("QEMU %s is too old: post-copy can be relied on from 4.2 on", q.Version),
			"`apt-get install qemu-system-x86`")
	case order < 0:
		r.add(Warning, h.Name, "qemu",
			fmt.Sprintf("QEMU %s is older than the source's %s: nobody promises that it "+
				"understands all devices", q.Version, vm.QEMU),
			fmt.Sprintf("install %s or later there: `apt-get install qemu-system-x86`", vm.QEMU))
	case order > 0:
		r.add(Note, h.Name, "qemu",
			fmt.Sprintf("QEMU %s is newer than the source's %s", q.Version, vm.QEMU), "")
	default:
		r.add(OK, h.Name, "qemu", q.Version+", as at the source", "")
	}
	if vm.Main != 0 && twin.Main != 0 && vm.Main != twin.Main {
		r.add(Fatal, h.Name, "size",
			fmt.Sprintf("the VM has %s of memory, and its description there %s",
				units.Size(vm.Main), units.Size(twin.Main)),
			fmt.Sprintf("give the description on %s the -m of the one on %s", h.Name, source.Name))
	}
	for _, b := range twin.Backends {
		if b.FS != "tmpfs" && b.FS != "hugetlbfs" {
			r.add(Fatal, h.Name, "memory file",
				fmt.Sprintf("memory %q is a file on a disk (%s, %s), whose pages cannot come by "+
					"post-copy", b.ID, b.Path, or(b.FS, "unknown")),
				"describe memory of another kind there: `-object memory-backend-memfd,…`, or a "+
					"file in /dev/shm or on hugetlbfs")
		}
	}
	if slices.Contains(q.Machines, vm.Machine) {
		r.add(OK, h.Name, "machine", fmt.Sprintf("%s is known to its QEMU", vm.Machine), "")
	} else {
		r.add(Fatal, h.Name, "machine",
			fmt.Sprintf("QEMU %s there does not know %s", q.Version, vm.Machine),
			fmt.Sprintf("install QEMU %s or later there: `apt-get install qemu-system-x86`; or "+
				"restart the VM as a type that both know (`%s -machine help`)", vm.QEMU, q.Path))
	}
}

// processor compares what a guest sees of the CPUs, with what it would see there.
func (r *report) processor(vm VMFacts, h HostFacts, twin TwinFacts) {
	const check = "cpu"
	cpus := len(vm.CPUs.VCPUs)
	if cpus > h.CPU.Count {
		r.add(Warning, h.Name, "vcpus",
			fmt.Sprintf("the VM has %d vCPUs, and the host %d CPUs", cpus, h.CPU.Count),
			"choose a host with more CPUs, or restart the VM with fewer: `-smp`")
	} else if h.Load+float64(cpus) > 1.5*float64(h.CPU.Count) {
		r.add(Warning, h.Name, "vcpus",
			fmt.Sprintf("%.1f tasks want its %d CPUs already, before the VM's %d vCPUs come",
				h.Load, h.CPU.Count, cpus),
			"choose a host with less load, or move VMs away from it first: `vacate evict NAME "+
				"--to HOST` there")
	} else {
		r.add(OK, h.Name, "vcpus",
			fmt.Sprintf("%d find room on %d CPUs with a load of %.1f", cpus, h.CPU.Count, h.Load),
			"")
	}
	if vm.CPUs.Accel == "kvm" && h.KVM != "" {
		r.add(Fatal, h.Name, "kvm", "the VM runs under KVM, which cannot be used there: "+h.KVM,
			"`modprobe kvm_intel` or `modprobe kvm_amd`; and switch virtualisation on in the "+
				"host's firmware")
		return
	}
	if vm.CPUs.Accel == "kvm" {
		r.add(OK, h.Name, "kvm", "answers", "")
	}
	err := twin.CPUs.Check()
	switch {
	case vm.CPUs.Arch == "" || twin.Error != "" || twin.QEMU.Error != "":
		return // which is told elsewhere
	case twin.CPUError != "" || err != nil || twin.CPUs.Arch == "":
		r.add(Warning, h.Name, check,
			"cannot find out which CPUs the VM's description makes there: "+
				or(twin.CPUError, fmt.Sprint(err)),
			"see whether QEMU starts there as described; an eviction compares the CPUs itself, "+
				"before it touches the VM")
		return
	}
	reasons := vm.CPUs.Against(twin.CPUs)
	for _, reason := range reasons {
		r.add(Fatal, h.Name, check, reason.Text, reason.Remedy)
	}
	if reasons == nil {
		r.add(OK, h.Name, check,
			fmt.Sprintf("the guest's (%s) is made there as it is here", vm.CPUs.Model), "")
	}
}

// room checks that the VM fits into the destination's memory.
func (r *report) room(vm VMFacts, h HostFacts) {
	const check = "memory"
	if source := h.PageSize; source != units.PageSize {
		r.add(Fatal, h.Name, "page size",
			fmt.Sprintf("pages of %s: only 4 KiB are supported", units.Size(source)),
			"boot a kernel with pages of 4 KiB")
	} else {
		r.add(OK, h.Name, "page size", "4 KiB", "")
	}
	var memory []room.Memory
	sizes := []uint64{units.PageSize}
	for _, b := range vm.Memory {
		page := max(b.PageSize, units.PageSize)
		memory = append(memory, room.Memory{Page: page, Size: b.Size})
		if !slices.Contains(sizes, page) {
			sizes = append(sizes, page)
		}
	}
	for _, page := range sizes {
		check := check
		if page != units.PageSize {
			check = "huge pages"
		}
		limits := slices.DeleteFunc(slices.Clone(h.Limits),
			func(l room.Limit) bool { return l.Page != page })
		var short *room.ShortError
		if errors.As(room.Check(limits, memory, nil), &short) {
			r.add(Fatal, h.Name, check, short.Problem(), short.Remedy())
			continue
		}
		if len(limits) == 0 {
			r.add(Fatal, h.Name, check,
				fmt.Sprintf("the VM has pages of %s, and the host has none of that size",
					units.Size(page)),
				"give the VM memory of another kind on both hosts: `-object "+
					"memory-backend-memfd,…`")
			continue
		}
		least := slices.MinFunc(limits,
			func(a, b room.Limit) int { return cmp.Compare(a.Free(), b.Free()) })
		need, free := least.Needs(memory), least.Free()
		if page == units.PageSize && need > free/10*9 {
			r.add(Warning, h.Name, check,
				fmt.Sprintf("the VM may use %s, which leaves less than a tenth of the %s that "+
					"%s has room for", units.Size(need), units.Size(free), least.Name),
				"make room: move a VM away from there, `vacate evict NAME --to HOST`, or choose "+
					"another host")
		} else if need > 0 {
			r.add(OK, h.Name, check,
				fmt.Sprintf("%s has room for %s, and the VM needs %s", least.Name, units.Size(free),
					units.Size(need)), "")
		}
	}
	if h.SwapTotal > 0 && h.SwapFree < h.SwapTotal/2 {
		r.add(Warning, h.Name, "swap",
			fmt.Sprintf("more than half of its %s are in use: a VM may be slowed down there",
				units.Size(h.SwapTotal)),
			"find out who needs so much memory: `ps -eo rss,args --sort=-rss | head`")
	}
}

// way checks what lies between the hosts, and estimates.
func (r *report) way(source HostFacts, vm VMFacts, h HostFacts, link LinkFacts) {
	switch a, b := source.Certificate, h.Certificate; {
	case link.Plain:
		r.add(Warning, "", "link",
			"is neither encrypted nor authenticated: anyone who can listen sees the guest's "+
				"memory, and anyone who can connect may hand over a VM",
			"`vacate certs init --dir CA`, then `vacate certs issue --dir CA --name HOST --out "+
				"DIR` for each host")
	case a.CA != b.CA:
		r.add(Warning, "", "link",
			"the hosts trust other authorities, which works only while both are known to both",
			"give both the same ca.pem, then issue their certificates anew: `vacate certs issue "+
				"--dir CA --name HOST --out DIR`")
	default:
		r.add(OK, "", "link", "is encrypted, and both ends are authenticated", "")
	}
	if off := link.ClockOffset.Abs(); off > clockWarning {
		r.add(Warning, "", "clock",
			fmt.Sprintf("the hosts' clocks differ by %s: the guest's may jump, and certificates "+
				"and logs are misread", seconds(off)),
			"`chronyc makestep` or `systemctl restart systemd-timesyncd` on the host that is wrong")
	} else {
		r.add(OK, "", "clock", fmt.Sprintf("the hosts' clocks agree to %s", seconds(off)), "")
	}
	if link.RoundTrip > slowTrip {
		r.add(Warning, "", "round trip",
			fmt.Sprintf("%s: the guest waits as long for each page that it touches before it came",
				seconds(link.RoundTrip)),
			"move the VM to a host that is nearer, or at a time when little of it is in use; "+
				"where it ought to be less, look for the slow hop: `mtr HOST`")
	}
	if link.Rate <= 0 || link.RoundTrip < 0 {
		r.add(Note, "", "estimate", "none: the link's rate is not known", "")
		return
	}
	took := duration(float64(used(vm)) / link.Rate)
	text := fmt.Sprintf("%s for %s at %s/s", seconds(took), units.Size(used(vm)),
		units.Size(uint64(min(link.Rate, 1e18))))
	if took > longEviction {
		r.add(Warning, "", "estimate", text,
			"use a faster link: have vacated listen on the address of one, and name that with --to")
	} else {
		r.add(Note, "", "estimate", text, "")
	}
	down := duration(float64(deviceSize)/link.Rate) + deviceLoad +
		min(downTrips*min(link.RoundTrip, time.Hour), time.Hour)
	r.add(Note, "", "down time",
		fmt.Sprintf("about %s: %d round trips of %s, the devices' state (some %s), %s to load that",
			seconds(down), downTrips, seconds(link.RoundTrip), units.Size(deviceSize),
			seconds(deviceLoad)), "")
}

// total sums up the VM's memory in pages of one size; of any, for 0. Facts may lie: it sticks at
// the largest number.
func total(vm VMFacts, page uint64) (sum uint64) {
	for _, b := range vm.Memory {
		if page == 0 || b.PageSize == page ||
			page == units.PageSize && b.PageSize < units.PageSize {
			sum = plus(sum, b.Size)
		}
	}
	return sum
}

func plus(a, b uint64) uint64 {
	if a+b < a {
		return ^uint64(0)
	}
	return a + b
}

// used is how much of the memory has to move at most.
func used(vm VMFacts) uint64 {
	all := total(vm, 0)
	if vm.Used == 0 {
		return all
	}
	return min(vm.Used, all)
}

// atLeast reports whether a version is major.minor or later; none is not.
func atLeast(version string, major, minor int) bool {
	return compareVersions(version, fmt.Sprintf("%d.%d", major, minor)) >= 0
}

// version reads a version such as "10.0.2"; zero if it is none.
func version(s string) (v qmp.Version) {
	fmt.Sscanf(s, "%d.%d.%d", &v.Major, &v.Minor, &v.Micro)
	return v
}

// compareVersions orders versions such as "10.0.2" by their first three numbers. What is no number
// is 0.
func compareVersions(a, b string) int {
	parse := func(s string) (v [3]int) {
		for i, part := range strings.SplitN(s, ".", 3) {
			v[i], _ = strconv.Atoi(part)
		}
		return v
	}
	x, y := parse(a), parse(b)
	return slices.Compare(x[:], y[:])
}

func or(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// list names a dozen at most.
func list(names []string) string {
	const most = 12
	if len(names) > most {
		return strings.Join(names[:most], ", ") + fmt.Sprintf(" and %d more", len(names)-most)
	}
	return strings.Join(names, ", ")
}

// duration is that of a number of seconds, or the longest there is.
func duration(s float64) time.Duration {
	if !(s < 1e9) {
		return 1e9 * time.Second
	}
	return time.Duration(s * float64(time.Second))
}

// seconds writes a time with two digits that matter, or whole seconds.
func seconds(d time.Duration) string {
	switch {
	case d >= 2*time.Minute:
		return d.Round(time.Second).String()
	case d >= 10*time.Second:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d >= time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d >= 10*time.Millisecond:
		return fmt.Sprintf("%.0f ms", d.Seconds()*1e3)
	}
	return fmt.Sprintf("%.2g ms", d.Seconds()*1e3)
}
