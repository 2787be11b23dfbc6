package doctor

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"vacate/internal/qemu/fit"
	"vacate/internal/sys/room"
)

var noon = time.Date(2030, 5, 1, 12, 0, 0, 0, time.UTC)

// situation is all that Compare takes.
type situation struct {
	Source      HostFacts
	VM          VMFacts
	Destination HostFacts
	Twin        TwinFacts
	Link        LinkFacts
}

func (s *situation) compare() []Finding {
	return Compare(s.Source, s.VM, s.Destination, s.Twin, s.Link)
}

func goodHost(name string) HostFacts {
	return HostFacts{
		Name: name, BootID: "boot of " + name, Kernel: "6.1.0", PageSize: 4096,
		Effective:   1<<41 - 1,
		Userfaultfd: UserfaultFacts{Features: 1<<14 - 1},
		CPU:         CPUFacts{Count: 16, Model: "Xeon 1"},
		SwapTotal:   1 << 30, SwapFree: 1 << 30,
		Limits: []room.Limit{
			{Page: 4 << 10, Name: "this host", Max: 64 << 30, Used: 32 << 30},
			{Page: 2 << 20, Name: "this host's pool of huge pages",
				File: "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", Spare: true,
				Max: 200 << 21, Used: 100 << 21},
		},
		Load: 1, CPUWait: 1, Synchronised: true, Time: noon,
		Journal:     SpaceFacts{Path: "/var/lib/vacate", Free: 10 << 30},
		Certificate: CertFacts{Name: name, Expires: noon.AddDate(1, 0, 0), CA: "aa:bb"},
	}
}

func goodCPUs() fit.CPUs {
	return fit.CPUs{Arch: "x86_64", Accel: "kvm", Model: "host",
		VCPUs:    []fit.VCPU{{}, {Index: 1, Place: fit.Place{Core: 1}}},
		Features: [][]fit.Word{{{Leaf: "7.0 EBX", Bits: 1 << 5}}}, Filtered: []fit.Word{},
		Properties: []fit.Property{{Name: "family", Value: "6"}}}
}

func nfsFile() fit.File {
	return fit.File{Path: "/vms/web1.raw", Size: 8 << 30, FS: "nfs4", Export: "filer:/vms/",
		Device: 40, Inode: 77, Head: "0123", Locked: true}
}

// good is a situation against which nothing stands.
func good() *situation {
	return &situation{
		Source: goodHost("alpha"),
		VM: VMFacts{QEMU: "7.2.22", Machine: "pc-i440fx-7.2", CPUs: goodCPUs(), State: "running",
			Postcopy: true, Main: 4 << 30,
			Memory:   []MemoryFacts{{"pc.ram", 4 << 30, 4096}, {"vga.vram", 16 << 20, 4096}},
			Used:     2 << 30,
			Devices:  []DeviceFacts{{"", "virtio-net-pci"}},
			Networks: []string{"tap"},
			Disks:    []DiskFacts{{Drive: "disk", Driver: "raw", Direct: true, File: nfsFile()}}},
		Destination: goodHost("beta"),
		Twin: TwinFacts{Name: "web1",
			QEMU: QEMUFacts{Path: "/usr/bin/qemu-system-x86_64", Version: "7.2.22",
				Machines: []string{"pc-i440fx-7.2", "none"}}, Main: 4 << 30, CPUs: goodCPUs(),
			Disks: []fit.File{nfsFile()}},
		Link: LinkFacts{RoundTrip: 200 * time.Microsecond, Rate: 117e6},
	}
}

func TestGood(t *testing.T) {
	for _, f := range good().compare() {
		if f.Level > Note {
			t.Errorf("%v", f)
		}
	}
	s := good()
	for _, f := range Inspect(s.Source, &s.VM) {
		if f.Level > Note {
			t.Errorf("%v", f)
		}
	}
}

// Each finding is reached by what it is about, and by that alone.
func TestFindings(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*situation)
		level  Level
		host   string
		check  string
		text   string // part of it
		remedy string // part of it
	}{
		{"paused", func(s *situation) { s.VM.State = "paused" }, OK, "alpha", "vm",
			"it is paused, and moves so", ""},
		{"its disk failed", func(s *situation) { s.VM.State = "io-error" }, OK, "alpha", "vm",
			"as a disk failed (io-error), and moves so", ""},
		{"suspended", func(s *situation) {
			s.VM.State, s.VM.QEMU, s.Twin.QEMU.Version = "suspended", "10.0.2", "10.0.2"
		}, OK, "alpha", "vm", "is suspended, and moves so", ""},
		{"suspended, old twin",
			func(s *situation) {
				s.VM.State, s.VM.QEMU, s.Twin.QEMU.Version = "suspended", "10.0.2", "7.2.22"
			}, Fatal, "alpha", "vm", "QEMU 7.2 forgets that", "system_wakeup"},
		{"moved away", func(s *situation) { s.VM.State = "postmigrate" }, Fatal, "alpha", "vm",
			"was moved away by QEMU itself", "cont"},
		{"shut down", func(s *situation) { s.VM.State = "shutdown" }, Fatal, "alpha", "vm",
			"has shut down, and only its QEMU is left", "quit"},
		{"migrating", func(s *situation) { s.VM.Migration = "postcopy-paused" }, Fatal, "alpha",
			"migration", "postcopy-paused", "migrate_cancel"},
		{"ancient", func(s *situation) { s.VM.QEMU = "3.1.0" }, Fatal, "alpha", "qemu", "too old",
			"apt-get"},
		{"no post-copy", func(s *situation) { s.VM.Postcopy = false }, Fatal, "alpha", "qemu",
			"without post-copy", "apt-get"},
		{"settings", func(s *situation) { s.VM.Settings = []string{"xbzrle"} }, Note, "alpha",
			"settings", "xbzrle", ""},
		{"held", func(s *situation) {
			s.VM.Held = fit.Reasons{{Text: "no way", Remedy: "`device_del x`"}}
		}, Fatal, "alpha", "devices", "no way", "device_del"},
		{"9p", func(s *situation) { s.VM.Devices = []DeviceFacts{{"", "virtio-9p-pci"}} }, Warning,
			"alpha", "devices", "directory", "umount"},
		{"vhost-user disk", func(s *situation) {
			s.VM.Devices = []DeviceFacts{{"", "vhost-user-blk-pci"}}
		}, Warning, "alpha", "devices", "another process", "shut"},
		{"vsock", func(s *situation) { s.VM.Devices = []DeviceFacts{{"", "vhost-vsock-pci"}} },
			Note, "alpha", "devices", "connections", ""},
		{"network vhost-user", func(s *situation) { s.VM.Networks = []string{"vhost-user"} },
			Warning, "alpha", "devices", "vhost-user", "device_del"},
		{"network user", func(s *situation) { s.VM.Networks = []string{"user"} }, Warning, "alpha",
			"devices", "connections break", "tap"},
		{"memory unreadable", func(s *situation) { s.VM.MemoryErr = "EPERM" }, Fatal, "alpha",
			"memory", "EPERM", "CAP_SYS_PTRACE"},
		{"gigantic pages", func(s *situation) {
			s.VM.Memory[0].PageSize = 1 << 30
			s.Destination.Limits[1] = room.Limit{Page: 1 << 30, Name: "pool", Max: 4 << 30}
		}, Fatal, "alpha", "memory", "1 GiB", "hugetlbsize=2M"},
		{"memory on disk", func(s *situation) {
			s.Twin.Backends = []BackendFacts{{"ram", "/mem", "ext4"}}
		}, Fatal, "beta", "memory file", "/mem", "memfd"},
		{"no reading", func(s *situation) { s.Source.ProcessRead = "ENOSYS" }, Fatal, "alpha",
			"process memory", "ENOSYS", "SystemCallFilter"},
		{"no tracing", func(s *situation) { s.Source.Effective = 0 }, Fatal, "alpha",
			"process memory", "CAP_SYS_PTRACE", "AmbientCapabilities"},
		{"yama", func(s *situation) { s.Source.PtraceScope = 3 }, Fatal, "alpha", "process memory",
			"ptrace_scope", "sysctl"},
		{"no userfaultfd", func(s *situation) {
			s.Destination.Userfaultfd = UserfaultFacts{"ENOSYS", "ENOENT", 0, -1}
		}, Fatal, "beta", "userfaultfd", "ENOSYS", "CONFIG_USERFAULTFD"},
		{"userfaultfd forbidden",
			func(s *situation) {
				s.Destination.Userfaultfd = UserfaultFacts{"EPERM", "EACCES", 0, 0}
			}, Fatal, "beta", "userfaultfd", "EPERM", "sysctl -w vm.unprivileged_userfaultfd=1"},
		{"userfaultfd by device, QEMU too old for it",
			func(s *situation) { s.Destination.Userfaultfd.Error = "EPERM" }, Fatal, "beta",
			"userfaultfd", "EPERM", "sysctl"},
		{"userfaultfd forbidden to the twin",
			func(s *situation) { s.Twin.User, s.Twin.Userfaultfd = "kvm", "sysctl is 0" }, Fatal,
			"beta", "userfaultfd", "user kvm: sysctl is 0", "setfacl -m u:kvm"},
		{"userfaultfd of old", func(s *situation) { s.Destination.Userfaultfd.Features = 1 },
			Warning, "beta", "userfaultfd", "huge", "4.11"},
		{"no pidfd_getfd", func(s *situation) { s.Destination.PidfdGetfd = "ENOSYS" }, Warning,
			"beta", "direct placing", "ENOSYS", "5.6"},
		{"no tracing there", func(s *situation) { s.Destination.Effective = 0 }, Warning, "beta",
			"direct placing", "CAP_SYS_PTRACE", "AmbientCapabilities"},
		{"no journal", func(s *situation) { s.Destination.Journal = SpaceFacts{} }, Warning, "beta",
			"journal", "no directory", "--state-dir"},
		{"journal unwritable", func(s *situation) { s.Source.Journal.Error = "read-only" }, Fatal,
			"alpha", "journal", "read-only", "remount,rw"},
		{"journal full", func(s *situation) { s.Destination.Journal.Free = 1 << 20 }, Fatal, "beta",
			"journal", "1 MiB", "du -xh"},
		{"journal filling", func(s *situation) { s.Destination.Journal.Free = 100 << 20 }, Warning,
			"beta", "journal", "100 MiB", "du -xh"},
		{"certificate expired", func(s *situation) { s.Destination.Certificate.Expires = noon },
			Fatal, "beta", "certificate", "2030-05-01", "vacate certs issue --dir CA --name beta"},
		{"certificate expiring",
			func(s *situation) { s.Source.Certificate.Expires = noon.AddDate(0, 0, 13) }, Warning,
			"alpha", "certificate", "13 days", "vacate certs issue"},
		{"clock adrift", func(s *situation) { s.Source.Synchronised = false }, Warning, "alpha",
			"clock", "nobody", "timedatectl"},
		{"CPU busy", func(s *situation) { s.Destination.CPUWait = 80 }, Warning, "beta", "load",
			"80 %", "ps "},
		{"memory busy", func(s *situation) { s.Source.MemoryWait = 50 }, Warning, "alpha", "load",
			"memory", "ps "},
		{"no twin", func(s *situation) {
			s.Twin = TwinFacts{Name: "web1", Error: "no description"}
		}, Fatal, "beta", "twin", "no description", "copy"},
		{"twin runs", func(s *situation) { s.Twin.Running = true }, Fatal, "beta", "twin",
			"already", "vacate ls"},
		{"another -m", func(s *situation) { s.Twin.Main = 8 << 30 }, Fatal, "beta", "size",
			"4 GiB of memory, and its description there 8 GiB", "-m"},
		{"QEMU missing", func(s *situation) {
			s.Twin.QEMU = QEMUFacts{Path: "/q", Error: "ENOENT"}
		}, Fatal, "beta", "qemu", "ENOENT", "apt-get"},
		{"QEMU ancient", func(s *situation) { s.Twin.QEMU.Version = "2.8.1" }, Fatal, "beta",
			"qemu", "too old", "apt-get"},
		{"QEMU older", func(s *situation) { s.Twin.QEMU.Version = "7.0.0" }, Warning, "beta",
			"qemu", "older", "7.2.22"},
		{"QEMU newer", func(s *situation) { s.Twin.QEMU.Version = "10.0.2" }, Note, "beta", "qemu",
			"newer", ""},
		{"machine unknown", func(s *situation) { s.VM.Machine = "pc-i440fx-11.0" }, Fatal, "beta",
			"machine", "pc-i440fx-11.0", "-machine help"},
		{"many vCPUs", func(s *situation) {
			s.VM.CPUs.VCPUs = make([]fit.VCPU, 17)
			s.Twin.CPUs = s.VM.CPUs
		}, Warning, "beta", "vcpus", "17 vCPUs", "-smp"},
		{"loaded", func(s *situation) { s.Destination.Load = 23 }, Warning, "beta", "vcpus",
			"23.0 tasks", "vacate evict"},
		{"no KVM", func(s *situation) { s.Destination.KVM = "ENOENT" }, Fatal, "beta", "kvm",
			"ENOENT", "modprobe"},
		{"other CPU", func(s *situation) { s.Twin.CPUs.Features = [][]fit.Word{{}} }, Fatal, "beta",
			"cpu", "lacks avx2", "avx2=on"},
		{"CPUs unknown", func(s *situation) {
			s.Twin.CPUs, s.Twin.CPUError = fit.CPUs{}, "it crashed"
		}, Warning, "beta", "cpu", "it crashed", "an eviction compares"},
		{"CPUs of a liar", func(s *situation) { s.Twin.CPUs.VCPUs[1].Features = 7 }, Warning,
			"beta", "cpu", "out of bounds", "an eviction compares"},
		{"large pages", func(s *situation) { s.Destination.PageSize = 65536 }, Fatal, "beta",
			"page size", "64 KiB", "kernel"},
		{"no memory", func(s *situation) { s.Destination.Limits[0].Used = 60 << 30 }, Fatal, "beta",
			"memory", "this host has room for 4096 MiB only", "vacate evict"},
		{"control group too small", func(s *situation) {
			s.Destination.Limits = append(s.Destination.Limits,
				room.Limit{Page: 4 << 10, Name: "the control group /sys/fs/cgroup/vms.slice",
					File: "/sys/fs/cgroup/vms.slice/memory.max", Max: 3 << 30, Used: 1 << 30})
		}, Fatal, "beta", "memory",
			"the control group /sys/fs/cgroup/vms.slice has room for 2048 MiB only: its " +
				"memory.max is 3072 MiB, and 1024 MiB of it are in use",
			"systemctl set-property --runtime vms.slice MemoryMax=5"},
		{"little memory", func(s *situation) { s.Destination.Limits[0].Used = 64<<30 - 4400<<20 },
			Warning, "beta", "memory", "a tenth", "vacate evict"},
		{"swapping", func(s *situation) { s.Destination.SwapFree = 100 << 20 }, Warning, "beta",
			"swap", "half", "ps "},
		{"no huge pages", func(s *situation) { s.VM.Memory[0].PageSize = 2 << 20 }, Fatal, "beta",
			"huge pages",
			"needs 4096 MiB more, and this host's pool of huge pages has room for 200 MiB only",
			"echo 2148 >/sys/kernel/mm/hugepages/hugepages-2048kB/"},
		{"huge pages of another size", func(s *situation) {
			s.VM.Memory[0].PageSize = 2 << 20
			s.Destination.Limits = s.Destination.Limits[:1]
		}, Fatal, "beta", "huge pages", "none of that size", "memfd"},
		{"plain link", func(s *situation) { s.Link.Plain = true }, Warning, "", "link", "neither",
			"vacate certs init"},
		{"other CA", func(s *situation) { s.Destination.Certificate.CA = "cc" }, Warning, "",
			"link", "authorities", "ca.pem"},
		{"clocks apart", func(s *situation) { s.Link.ClockOffset = -1500 * time.Millisecond },
			Warning, "", "clock", "1.5 s", "chronyc"},
		{"far away", func(s *situation) { s.Link.RoundTrip = 80 * time.Millisecond }, Warning, "",
			"round trip", "80 ms", "mtr"},
		{"slow", func(s *situation) { s.Link.Rate = 1e5 }, Warning, "", "estimate",
			"5h57m55s for 2 GiB", "faster link"},
		{"rate unknown", func(s *situation) { s.Link.Rate = 0 }, Note, "", "estimate", "none", ""},
		{"disk missing", func(s *situation) {
			s.Twin.Disks[0] = fit.File{Path: "/vms/web1.raw", Error: "ENOENT"}
		}, Fatal, "beta", "disk", "ENOENT", "NFS"},
		{"disk not described", func(s *situation) { s.Twin.Disks = nil }, Fatal, "beta", "disk",
			"names neither", "description on beta"},
		{"disk gone at the source",
			func(s *situation) {
				s.VM.Disks[0].File = fit.File{Path: "/var/tmp/vl.x", Error: "ENOENT"}
			}, Fatal, "alpha", "disk", "snapshot=on", "restart"},
		{"disk local", func(s *situation) {
			s.VM.Disks[0].File.FS, s.Twin.Disks[0].FS = "ext4", "ext4"
		}, Fatal, "beta", "disk", "its own file, on ext4", "NFS"},
		{"disk of another export", func(s *situation) { s.Twin.Disks[0].Export = "filer2:/vms/" },
			OK, "beta", "disk", "locked", ""},
		{"disk unproven", func(s *situation) {
			s.Twin.Disks[0].Export, s.Twin.Disks[0].Locked = "filer2:/vms/", false
		}, Fatal, "beta", "disk", "cannot be proven", `trust_disks = ["disk"]`},
		{"disk trusted", func(s *situation) {
			s.Twin.Disks[0].Export, s.Twin.Disks[0].Locked, s.VM.Disks[0].Direct, s.VM.Trusted =
				"filer2:/vms/", false, false, []string{"disk"}
		}, Note, "beta", "disk", "trust_disks", ""},
		{"disk of the same server", func(s *situation) { s.Twin.Disks[0].Inode = 3 }, Fatal, "beta",
			"disk", "two files of filer:/vms/", "NFS"},
		{"flash", func(s *situation) { s.Twin.Disks[0].Inode, s.VM.Disks[0].Carried = 3, true }, OK,
			"beta", "disk", "moves with the VM's memory", ""},
		{"job", func(s *situation) {
			s.VM.Work = fit.Reasons{{Text: `an unfinished job "j" (backup, running, 3 %)`,
				Remedy: "`job-cancel`"}}
		}, Fatal, "alpha", "work", `the VM has an unfinished job "j"`, "job-cancel"},
		{"bitmap", func(s *situation) { s.VM.Bitmaps = []string{`"b" of node "n"`} }, Warning,
			"alpha", "dirty bitmap", `"b" of node "n"`, "persistent=true"},
		{"disk cached", func(s *situation) { s.VM.Disks[0].Direct = false }, Fatal, "alpha",
			"disk cache", "old data", "cache=none"},
		{"disk not flushed", func(s *situation) { s.VM.Disks[0].NoFlush = true }, Fatal, "alpha",
			"disk cache", "cache=unsafe", "cache=none"},
		{"ISO copied", func(s *situation) {
			s.VM.Disks[0].ReadOnly, s.VM.Disks[0].File.FS, s.Twin.Disks[0].FS = true, "xfs", "ext4"
			s.VM.Disks[0].File.Digest, s.Twin.Disks[0].Digest = "89ab", "89ab"
		}, Note, "beta", "disk", "only reads", ""},
		{"disk by another path", func(s *situation) { s.Twin.Disks[0].Path = "/mnt/web1.raw" }, OK,
			"beta", "disk", "one file of filer:/vms/", ""},
		{"other device", func(s *situation) {
			s.VM.Disks[0].File = fit.File{Path: "/dev/sdb", Block: true, Size: 1 << 30,
				WWN: "naa.1"}
			s.Twin.Disks[0] = fit.File{Path: "/dev/sdb", Block: true, Size: 1 << 30, WWN: "naa.2"}
		}, Fatal, "beta", "disk", "naa.1 and naa.2", "iSCSI"},
		{"same device", func(s *situation) {
			s.VM.Disks[0].File = fit.File{Path: "/dev/sdb", Block: true, Size: 1 << 30,
				WWN: "naa.1"}
			s.Twin.Disks[0] = fit.File{Path: "/dev/sdc", Block: true, Size: 1 << 30, WWN: "naa.1"}
		}, OK, "beta", "disk", "one device: naa.1", ""},
		{"nameless device", func(s *situation) {
			s.VM.Disks[0].File = fit.File{Path: "/dev/drbd0", Block: true, Size: 1 << 30}
			s.Twin.Disks[0] = fit.File{Path: "/dev/drbd0", Block: true, Size: 1 << 30}
		}, Fatal, "beta", "disk", "no names", "trust_disks"},
		{"device of another size", func(s *situation) {
			s.VM.Disks[0].File = fit.File{Path: "/dev/drbd0", Block: true, Size: 1 << 30}
			s.Twin.Disks[0] = fit.File{Path: "/dev/drbd0", Block: true, Size: 2 << 30}
		}, Fatal, "beta", "disk", "1 GiB and 2 GiB", "iSCSI"},
		{"file and device", func(s *situation) { s.Twin.Disks[0].Block = true }, Fatal, "beta",
			"disk", "block device", "NFS"},
		{"one machine", func(s *situation) {
			s.Destination.BootID = s.Source.BootID
			s.VM.Disks[0].Direct, s.VM.Disks[0].File.FS, s.Twin.Disks[0].FS = false, "ext4", "ext4"
		}, OK, "beta", "disk", "one machine", ""},
		{"two files of one machine", func(s *situation) {
			s.Destination.BootID, s.Twin.Disks[0].Inode = s.Source.BootID, 5
		}, Fatal, "beta", "disk", "two files", "NFS"},
		{"URL", func(s *situation) {
			s.VM.Disks[0].URL, s.Twin.URLs = "nbd://x", []string{"nbd://x"}
		}, Note, "beta", "disk", "nbd://x", ""},
		{"URL not described", func(s *situation) { s.VM.Disks[0].URL = "nbd://x" }, Warning, "beta",
			"disk", "does not name", "description"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := good()
			tt.change(s)
			all := s.compare()
			want := func(f Finding) bool {
				return f.Level == tt.level && f.Host == tt.host && f.Check == tt.check &&
					strings.Contains(f.Text, tt.text) && strings.Contains(f.Remedy, tt.remedy)
			}
			if !slices.ContainsFunc(all, want) {
				t.Error("not found")
				for _, f := range all {
					t.Log(f)
				}
			}
			for _, f := range all {
				if f.Level >= Warning && (f.Remedy == "" || f.Text == "") {
					t.Errorf("without a remedy: %v", f)
				}
				if f.Level == OK && f.Check == tt.check && f.Host == tt.host && tt.level > Note {
					t.Errorf("and yet OK: %v", f)
				}
				if f.Level > max(tt.level, Note) {
					t.Errorf("worse than what it is about: %v", f)
				}
			}
		})
	}
}

// Without a destination, what it alone needs is no reason against anything.
func TestInspect(t *testing.T) {
	h := goodHost("alpha")
	h.Userfaultfd = UserfaultFacts{Error: "EPERM", Device: "EACCES"}
	if all := Inspect(h, nil); Worst(all) != Warning {
		t.Errorf("worst is %v: %v", Worst(all), all)
	}
}

// FuzzDecode: no facts from a peer break a comparison, nor do they grow what is shown beyond
// bounds.
func FuzzDecode(f *testing.F) {
	s := good()
	for _, v := range []any{s.Source, s.VM, s.Twin, s.Link} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add(
		[]byte(
			`{"memory":[{"name":"a","size":18446744073709551615,"page_size":1},{"name":"b","size":18446744073709551615,"page_size":8192}],"cpus":-1}`))
	f.Add(
		[]byte(
			`{"round_trip":-9223372036854775808,"rate":1e-300,"clock_offset":-9223372036854775808}`))
	f.Add(
		[]byte(
			`{"name":"\u001b[2J\n\u0000","certificate":{"expires":"0001-01-01T00:00:00Z","name":"x"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := good()
		if v, err := Decode[HostFacts](b); err == nil {
			s.Source, s.Destination = v, v
		}
		if v, err := Decode[VMFacts](b); err == nil {
			s.VM = v
		}
		if v, err := Decode[TwinFacts](b); err == nil {
			s.Twin = v
		}
		if v, err := Decode[LinkFacts](b); err == nil {
			s.Link = v
		}
		var text strings.Builder
		all := s.compare()
		if err := Text(&text, append(all, Inspect(s.Destination, &s.VM)...)); err != nil {
			t.Fatal(err)
		}
		for line := range strings.SplitSeq(text.String(), "\n") {
			if n := utf8.RuneCountInString(line); n > textWidth {
				t.Fatalf("a line of %d columns: %q", n, line)
			}
		}
		for _, f := range all {
			if f.Level >= Warning && f.Remedy == "" {
				t.Fatalf("without a remedy: %v", f)
			}
		}
	})
}

func TestDecode(t *testing.T) {
	want := goodHost("alpha")
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode[HostFacts](b)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := json.Marshal(got); string(again) != string(b) {
		t.Errorf("became %s", again)
	}
	long := strings.Repeat("x", maxString+1)
	many := `["` + strings.Repeat(`x","`, maxList) + `x"]`
	for _, bad := range []string{
		``, `{}{}`, `[]`, `{"nmae":"x"}`, `{"name":"` + long + `"}`,
		`{"qemus":[{"machines":` + many + `}]}`, `{"cpu":{"count":-2}}`,
		`{"load":-1}`, `{"page_size":-1}`, `{"time":"yesterday"}`,
		`{"name":"x"}` + strings.Repeat(" ", MaxFacts),
	} {
		if v, err := Decode[HostFacts]([]byte(bad)); err == nil {
			t.Errorf("%.60s was read as %+v", bad, v)
		}
	}
	v := TwinFacts{Name: "é" + long, URLs: make([]string, maxList+1), User: "\xff"}
	clip(&v)
	b, err = json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Decode[TwinFacts](b); err != nil || len(got.Name) > maxString ||
		!strings.HasSuffix(got.Name, "…") || len(got.URLs) != maxList || got.User != "?" {
		t.Errorf("clipped to %d bytes, %d entries, user %q: %v", len(got.Name), len(got.URLs),
			got.User, err)
	}
}

func TestLevel(t *testing.T) {
	b, err := json.Marshal([]Level{OK, Note, Warning, Fatal})
	if err != nil || string(b) != `["ok","note","warning","fatal"]` {
		t.Errorf("%s, %v", b, err)
	}
	var back []Level
	if err := json.Unmarshal(b, &back); err != nil ||
		!slices.Equal(back, []Level{OK, Note, Warning, Fatal}) {
		t.Errorf("%v, %v", back, err)
	}
	if err := json.Unmarshal([]byte(`"dire"`), new(Level)); err == nil {
		t.Error("a level that does not exist was read")
	}
	if _, err := json.Marshal(Level(9)); err == nil {
		t.Error("a level that does not exist was written")
	}
}
