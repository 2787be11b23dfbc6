package evict_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/link"
	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/labtest"

	"golang.org/x/sys/unix"
)

// greeting is what hellos and answers begin with.
var greeting = "vacate\r\n" + string([]byte{link.Version >> 8, link.Version & 0xff})

// The engines find whatever is wrong with the input of an eviction before they touch the VM, and
// the message says what to do. One guest goes through all of it and works on. In the end it moves
// to the destination that has refused everybody else.
func TestRefusals(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	r := &refusals{T: t, lab: l}
	r.vm = boot(t, l, lab.Spec{MemoryMiB: 256,
		Load:  lab.Load{HotMiB: 20, IdleMiB: 30, OtherMiB: 10},
		Extra: []string{"-device", "virtio-rng-pci"}})
	r.monitors()
	r.twins()
	r.peers()
	r.states()
	r.strangers()
}

type refusals struct {
	*testing.T
	lab *lab.Lab
	vm  *lab.VM
}

// run does one thing wrong and makes sure that the VM does not notice.
func (r *refusals) run(name string, f func(t *testing.T)) {
	r.Helper()
	if r.Failed() {
		return
	}
	r.Run(name, func(t *testing.T) {
		before := settingsOf(t, r.vm)
		f(t)
		if status, err := r.vm.Status(labtest.Within(t, 10*time.Second)); err != nil ||
			status != "running" {
			t.Errorf("the VM is %q: %v", status, err)
		}
		if after := settingsOf(t, r.vm); after != before {
			t.Errorf("migration settings before %s, after %s", before, after)
		}
		if err := r.vm.Guest.WaitOps(labtest.Within(t, 20*time.Second), 100); err != nil {
			t.Errorf("the guest does not work on: %v", err)
		}
	})
}

// refused makes sure that an eviction was refused, and that its error has all of the words.
func refused(t *testing.T, err error, says ...string) {
	t.Helper()
	t.Log(err)
	var e *evict.Error
	if !errors.As(err, &e) || !errors.Is(err, evict.ErrRefused) || e.Outcome != evict.ErrRefused {
		t.Fatalf("%v; want a refusal", err)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("the error %q does not say %q", err, s)
		}
	}
}

// evict evicts a VM to an address of host b.
func (r *refusals) evict(t *testing.T, monitor, to string) error {
	report, err := evict.Source{QMP: monitor,
		Connect: connectTo(r.lab.A, to)}.Evict(labtest.Within(t, time.Minute))
	if err != nil && report.Reason != err.Error() {
		t.Errorf("the report says %q, the error %q", report.Reason, err)
	}
	return err
}

// receive waits for a VM at a monitor that is unfit for it.
func (r *refusals) receive(t *testing.T, monitor string) error {
	return receiveOn(labtest.Within(t, time.Minute), evict.Destination{QMP: monitor},
		listen(t, r.lab.B))
}

const nowhere = "10.77.0.2:9" // on host b, where nothing listens

func (r *refusals) monitors() {
	dir := r.TempDir()
	both := func(t *testing.T, monitor string, says ...string) {
		refused(t, r.evict(t, monitor, nowhere), says...)
		refused(t, r.receive(t, monitor), says...)
	}
	r.run("no monitor", func(t *testing.T) {
		both(t, filepath.Join(dir, "none.sock"), "no such socket", "check the path",
			"-qmp unix:PATH")
	})
	r.run("abandoned monitor", func(t *testing.T) {
		path := filepath.Join(dir, "abandoned.sock")
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		ln.SetUnlinkOnClose(false)
		ln.Close()
		both(t, path, "nothing listens there", "QEMU has exited")
	})
	r.run("not a monitor", func(t *testing.T) {
		both(t, speak(t, filepath.Join(dir, "ssh.sock"), "SSH-2.0-OpenSSH_9.2\r\n", nil),
			"not a QMP monitor", "SSH-2.0")
	})
	r.run("human monitor", func(t *testing.T) {
		both(t, speak(t, filepath.Join(dir, "hmp.sock"),
			"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ", nil),
			"human monitor", "-qmp unix:PATH")
	})
	r.run("monitor of another client", func(t *testing.T) {
		q, err := qmp.Dial(labtest.Within(t, 10*time.Second), r.vm.QMP)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		refused(t, r.evict(t, r.vm.QMP, nowhere), "another client probably holds it",
			"one more monitor")
	})
	r.run("old QEMU", func(t *testing.T) {
		both(t, speak(t, filepath.Join(dir, "old.sock"), qmpGreeting(2, 9), map[string]string{}),
			"QEMU 2.9.0 is too old", "from 4.2 on")
	})
	r.run("QEMU that cannot save devices", func(t *testing.T) {
		monitor := speak(t, filepath.Join(dir, "bare.sock"), qmpGreeting(7, 2), map[string]string{
			"query-status":  `{"status": "running", "running": true, "singlestep": false}`,
			"query-migrate": `{}`,
		})
		refused(t, r.evict(t, monitor, nowhere), "cannot save a VM's devices without Xen",
			"use a build with the command xen-save-devices-state")
	})
}

func qmpGreeting(major, minor int) string {
	return fmt.Sprintf(
		`{"QMP": {"version": {"qemu": {"micro": 0, "minor": %d, "major": %d}, "package": ""}, "capabilities": ["oob"]}}`+"\r\n", minor, major)
}

// speak serves a unix socket that greets, and then answers QMP commands from replies; other
// commands are unknown to it. It returns the path.
func speak(t *testing.T, path, greeting string, replies map[string]string) string {
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	labtest.Serve(t, ln, func(c net.Conn) {
		io.WriteString(c, greeting)
		for lines := bufio.NewScanner(c); lines.Scan(); {
			var command struct {
				Execute string
				ID      int
			}
			json.Unmarshal(lines.Bytes(), &command)
			reply, known := replies[command.Execute]
			switch {
			case command.Execute == "qmp_capabilities":
				fmt.Fprintf(c, `{"return": {}, "id": %d}`+"\r\n", command.ID)
			case known && reply == "":
				fmt.Fprintf(c,
					`{"error": {"class": "GenericError", "desc": "Parameters are missing"}, "id": %d}`+"\r\n", command.ID)
			case known:
				fmt.Fprintf(c, `{"return": %s, "id": %d}`+"\r\n", reply, command.ID)
			default:
				fmt.Fprintf(c,
					`{"error": {"class": "CommandNotFound", "desc": "The command %s has not been found"}, "id": %d}`+"\r\n", command.Execute, command.ID)
			}
		}
	})
	return path
}

// twin starts a QEMU on host b for the guest, which may differ from the VM's own.
func (r *refusals) twin(t *testing.T, opts lab.IncomingOptions, change func(*lab.Spec)) *lab.VM {
	t.Helper()
	spec := r.vm.Spec
	if change != nil {
		change(&spec)
	}
	twin, err := r.lab.B.Incoming(labtest.Within(t, time.Minute),
		&lab.VM{Spec: spec, Guest: r.vm.Guest}, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(twin.Kill)
	return twin
}

// twins tries QEMUs that cannot take the VM.
func (r *refusals) twins() {
	// The memory has the name of its back end; QEMU's own is called pc.ram.
	named := func(s *lab.Spec, id, object string) {
		s.Machine += ",memory-backend=" + id
		s.Extra = append([]string{"-object", object + ",id=" + id}, s.Extra...)
	}
	backEnd := func(s *lab.Spec, object string) { named(s, "pc.ram", object) }
	for name, c := range map[string]struct {
		change func(*lab.Spec)
		extra  []string
		says   []string
	}{
		"other memory": {change: func(s *lab.Spec) { s.MemoryMiB = 384 },
			says: []string{`memory "pc.ram" has 256 MiB on the source, 384 MiB on the destination`,
				"-m "}},
		"other machine": {change: func(s *lab.Spec) { s.Machine = "pc-i440fx-7.1" },
			says: []string{"machine is pc-i440fx-7.2", "the destination's pc-i440fx-7.1",
				"-machine pc-i440fx-7.2"}},
		"other kind of machine": {change: func(s *lab.Spec) { s.Machine = "q35" },
			says: []string{"the destination's pc-q35-7.2", "-machine pc-i440fx-7.2"}},
		"other vCPUs": {change: func(s *lab.Spec) { s.VCPUs = 2 },
			says: []string{"1 vCPUs", "the destination 2", "-smp"}},
		"device too many": {extra: []string{"-device", "e1000"},
			says: []string{"only the source has []", "e1000 (8086:100e) at i440FX-pcihost/addr 0",
				"-device"}},
		"device missing": {change: func(s *lab.Spec) { s.Extra = nil },
			says: []string{
				"only the source has [virtio-rng-pci (1af4:1005) at i440FX-pcihost/addr 0",
				"only the destination []", "-device"}},
		"device elsewhere": {change: func(s *lab.Spec) {
			s.Extra = []string{"-device", "virtio-rng-pci,addr=9"}
		}, says: []string{"(1af4:1005) at i440FX-pcihost/addr 09.0]", "-device"}},
		"lesser CPU": {change: func(s *lab.Spec) { s.CPU = "qemu64" },
			says: []string{"the destination's CPU (qemu64) lacks", "avx2",
				"which the guest uses or may use (max)", "with the source's -cpu (model max)"}},
		"other CPU": {change: func(s *lab.Spec) {
			s.CPU = "max,erms=off,fsrm=off,vendor=GenuineIntel"
		},
			says: []string{
				`vendor is "AuthenticAMD" on the source, "GenuineIntel" on the destination`,
				"-cpu max"}},
		"device that is made otherwise": {change: func(s *lab.Spec) {
			s.Extra = []string{"-device", "virtio-rng-pci,event_idx=off"}
		},
			says: []string{"event_idx is true on the source, false on the destination", "-device"}},
		"room for memory": {change: func(s *lab.Spec) {
			s.Extra = append(s.Extra, "-m", "slots=2,maxmem=1G")
		},
			says: []string{"-m maxmem is 0 on the source, 1073741824 on the destination",
				"-m options"}},
		"huge pages": {change: func(s *lab.Spec) {
			backEnd(s, "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,size=256M")
		},
			says: []string{"pages of 4 KiB on the source, 2048 KiB on the destination",
				"memory back end"}},
		"memory of another name": {change: func(s *lab.Spec) {
			named(s, "ram", "memory-backend-ram,size=256M")
		},
			says: []string{
				`memory "pc.ram" of 262144 KiB and the destination has none of that name`,
				"-object"}},
	} {
		r.run(name, func(t *testing.T) {
			if name == "huge pages" {
				reserveHugePages(t, 128)
			}
			twin := r.twin(t, lab.IncomingOptions{Extra: c.extra}, c.change)
			ln := listen(t, r.lab.B)
			log := make(refusalLog, 10)
			ctx, stop := context.WithCancel(labtest.Within(t, time.Minute))
			defer stop()
			received := make(chan error, 1)
			go func() {
				received <- receiveOn(ctx, evict.Destination{QMP: twin.QMP, Log: slog.New(log)}, ln)
			}()
			refused(t, r.evict(t, r.vm.QMP, ln.Addr().String()),
				append(c.says, "The VM runs on, untouched")...)
			log.expect(t, c.says[0])
			stop()
			refused(t, <-received, "not touched")
			if status, err := twin.Status(labtest.Within(t, 10*time.Second)); status !=
				"inmigrate" {
				t.Errorf("the destination's QEMU is %q: %v", status, err)
			}
		})
	}

	for name, c := range map[string]struct {
		change func(*lab.Spec)
		opts   lab.IncomingOptions
		prep   func(t *testing.T) func(*lab.Spec)
		then   func(t *testing.T, twin *lab.VM)
		says   []string
	}{
		"started without -S": {opts: lab.IncomingOptions{Running: true},
			says: []string{"started without -S", "-S -incoming defer"}},
		"tmpfs too small": {prep: func(t *testing.T) func(*lab.Spec) {
			dir := mount(t, "tmpfs", "size=64m")
			return func(s *lab.Spec) {
				backEnd(s, "memory-backend-file,size=256M,share=on,mem-path="+dir)
			}
		}, says: []string{"the VM needs 256 MiB more, and the file system at /",
			"room for 64 MiB only", "Make room there first", "mount -o remount,size="}},
		"file that cannot be faulted in": {prep: func(t *testing.T) func(*lab.Spec) {
			dir := mount(t, "ramfs", "")
			return func(s *lab.Spec) {
				backEnd(s, "memory-backend-file,size=256M,share=on,mem-path="+dir)
			}
		}, says: []string{`memory "pc.ram" is the file`, "on ramfs", "memory-backend-memfd",
			"/dev/shm"}},
		"private file that cannot be faulted in": {prep: func(t *testing.T) func(*lab.Spec) {
			dir := mount(t, "ramfs", "")
			return func(s *lab.Spec) {
				backEnd(s, "memory-backend-file,size=256M,share=off,mem-path="+dir+"/ram")
			}
		}, says: []string{`memory "pc.ram" is the file`, "/ram on ramfs", "memory-backend-memfd"}},
		"control group too small": {prep: func(t *testing.T) func(*lab.Spec) {
			group, _ := memoryGroup(t, 300<<20)
			return func(s *lab.Spec) { s.QEMU = within(t, s.QEMU, group) }
		}, says: []string{"the control group /sys/fs/cgroup/", "/vacate-test-", "its memory.",
			" is 300 MiB", "the VM needs 3", "Raise it with `echo ", " >/sys/fs/cgroup/"}},
		"too few huge pages": {prep: func(t *testing.T) func(*lab.Spec) {
			reserveHugePages(t, 60)
			return func(s *lab.Spec) {
				backEnd(s, "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,size=256M,reserve=off")
			}
		},
			says: []string{
				"the VM needs 256 MiB more, and this host's pool of huge pages has room for ",
				" MiB only: its nr_hugepages is worth ", "Have more with `echo ",
				"/hugepages-2048kB/nr_hugepages`"}},
		"host too small": {change: func(s *lab.Spec) {
			s.MemoryMiB = 2 * memTotalMiB(r.T)
			backEnd(s, fmt.Sprintf("memory-backend-ram,size=%dM,reserve=off", s.MemoryMiB))
		}, says: []string{"and this host has room for ", "Make room there first: move a VM away"}},
		"no right to userfaultfd": {prep: func(t *testing.T) func(*lab.Spec) {
			set(t, "/proc/sys/vm/unprivileged_userfaultfd", "0")
			return func(s *lab.Spec) { s.Extra = append(s.Extra, "-runas", "nobody") }
		}, says: []string{"userfaultfd", "sysctl vm.unprivileged_userfaultfd=1", "CAP_SYS_PTRACE"}},
		"waits for somebody else": {then: func(t *testing.T, twin *lab.VM) {
			uri := map[string]any{"uri": "unix:" + filepath.Join(t.TempDir(), "in.sock")}
			if err := twin.Execute(labtest.Within(t, 10*time.Second), "migrate-incoming", uri,
				nil); err != nil {
				t.Fatal(err)
			}
		}, says: []string{"does not wait for a VM", "listening for another source",
			"-S -incoming defer"}},
		"used up": {then: func(t *testing.T, twin *lab.VM) { twin.Kill() },
			says: []string{"nothing listens there", "QEMU has exited"}},
	} {
		r.run(name, func(t *testing.T) {
			change := c.change
			if c.prep != nil {
				change = c.prep(t)
			}
			twin := r.twin(t, c.opts, change)
			if c.then != nil {
				c.then(t, twin)
			}
			refused(t, r.receive(t, twin.QMP), c.says...)
		})
	}
	r.run("relayed monitors", func(t *testing.T) {
		says := []string{"passes no descriptors on", "name QEMU's own socket"}
		twin := r.twin(t, lab.IncomingOptions{}, nil)
		relayed := labtest.RelayMonitor(t, twin.QMP)
		refused(t, r.receive(t, relayed), append(says, relayed)...)
		ln := listen(t, r.lab.B)
		ctx, stop := context.WithCancel(labtest.Within(t, time.Minute))
		defer stop()
		received := make(chan error, 1)
		go func() { received <- receiveOn(ctx, evict.Destination{QMP: twin.QMP}, ln) }()
		relayed = labtest.RelayMonitor(t, r.vm.QMP)
		refused(t, r.evict(t, relayed, ln.Addr().String()),
			append(says, relayed, "The VM runs on, untouched")...)
		stop()
		refused(t, <-received)
		if status, err := twin.Status(labtest.Within(t, 10*time.Second)); status != "inmigrate" {
			t.Errorf("the destination's QEMU is %q: %v", status, err)
		}
	})
	r.run("runs a VM", func(t *testing.T) {
		refused(t, r.receive(t, r.vm.LabQMP), "does not wait for a VM", `"running"`,
			"-S -incoming defer")
	})
}

// set writes a setting of the kernel for the duration of a test.
func set(t *testing.T, file, value string) {
	t.Helper()
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(before)) == value {
		return
	}
	if err := os.WriteFile(file, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, before, 0); err != nil {
			t.Error(err)
		}
	})
}

// reserveHugePages makes sure that n more huge pages are free.
func reserveHugePages(t *testing.T, n int) {
	t.Helper()
	const file = "/proc/sys/vm/nr_hugepages"
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	have, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	set(t, file, strconv.Itoa(have+n))
	if free := meminfo(t, "HugePages_Free"); free < n {
		labtest.Need(t, fmt.Errorf("%d huge pages could be had, %d are needed: free memory", free,
			n))
	}
}

func memTotalMiB(t *testing.T) int { return meminfo(t, "MemTotal") >> 10 }

func meminfo(t *testing.T, name string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var n int
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			if _, err := fmt.Sscan(rest, &n); err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s in /proc/meminfo", name)
	return 0
}

// mount mounts a new file system.
func mount(t *testing.T, kind, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount(kind, dir, kind, 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil { // twins may have files there
			t.Error(err)
		}
	})
	return dir
}

// peers tries other listeners where the source expects a destination.
func (r *refusals) peers() {
	const ask = "is it `vacate receive` that listens there"
	serve := func(t *testing.T, say string) string {
		ln := listen(t, r.lab.B)
		labtest.Serve(t, ln, func(c net.Conn) { io.WriteString(c, say) })
		return ln.Addr().String()
	}
	r.run("nothing listens", func(t *testing.T) {
		refused(t, r.evict(t, r.vm.QMP, nowhere), "nothing listens at "+nowhere,
			"start `vacate receive` there first")
	})
	r.run("no address", func(t *testing.T) {
		refused(t, r.evict(t, r.vm.QMP, "host-without-port"), "missing port in address")
	})
	for name, c := range map[string]struct{ answer, says string }{
		"web server": {"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", ask},
		"noise":      {strings.Repeat("\x00\xff\x17", 40), ask},
		"another version": {"vacate\r\n\x00\x63\x00\x00\x00\x00",
			fmt.Sprintf("speaks version 99, we speak %d: use the same release of vacate on both "+
				"hosts", link.Version)},
		"taken": {greeting + "\x01\x00\x00\x05taken",
			`refused by the destination: "taken"`},
		"silent destination": {"", ask},
		"mirror": {strings.Repeat(greeting+"\x00\x00\x00\x00", 2),
			"does not speak vacate's protocol"},
	} {
		r.run(name, func(t *testing.T) {
			refused(t, r.evict(t, r.vm.QMP, serve(t, c.answer)), c.says)
		})
	}
}

// states tries VMs in a state in which they cannot move, and VMs with an unusual set-up.
func (r *refusals) states() {
	do := func(t *testing.T, command string, args any) {
		t.Helper()
		if err := r.vm.Execute(labtest.Within(t, 10*time.Second), command, args, nil); err != nil {
			t.Fatal(err)
		}
	}
	r.run("paused VM", func(t *testing.T) {
		do(t, "stop", nil)
		refused(t, r.evict(t, r.vm.QMP, nowhere), "nothing listens",
			"The VM was not touched: it is paused")
		do(t, "cont", nil)
	})
	r.run("VM on its way already", func(t *testing.T) {
		do(t, "migrate-set-parameters", map[string]any{"max-bandwidth": 100_000})
		defer do(t, "migrate-set-parameters", map[string]any{"max-bandwidth": 128 << 20})
		do(t, "migrate", map[string]any{"uri": "exec:cat > /dev/null"})
		refused(t, r.evict(t, r.vm.QMP, nowhere), "being migrated already",
			"wait for its end or cancel it")
		do(t, "migrate_cancel", nil)
		for ctx := labtest.Within(t, 30*time.Second); ; {
			var m struct{ Status string }
			if err := r.vm.Execute(ctx, "query-migrate", nil, &m); err != nil {
				t.Fatal(err)
			}
			if m.Status == "cancelled" {
				break
			}
		}
	})
	// This holds to the end of the last eviction, which must work all the same.
	do(r.T, "migrate-set-capabilities", map[string]any{"capabilities": []map[string]any{
		{"capability": "xbzrle", "state": true}, {"capability": "auto-converge", "state": true},
		{"capability": "postcopy-ram", "state": false}, {"capability": "events", "state": false},
		{"capability": "release-ram", "state": true},
		{"capability": "pause-before-switchover", "state": true},
	}})
	do(r.T, "migrate-set-parameters",
		map[string]any{"max-bandwidth": 54321, "max-postcopy-bandwidth": 9876,
			"tls-creds": "none-such", "downtime-limit": 7})
	for _, a := range []attempt{
		{name: "settings, cut at the offer", kind: offer, do: cut, want: evict.ErrRefused},
		{name: "settings, cut at the package", kind: load, do: cut, want: evict.ErrAborted},
	} {
		r.run(a.name, func(t *testing.T) { a.run(t, r.lab, r.vm) })
	}
}

// strangers makes a destination refuse everybody and then take the VM.
func (r *refusals) strangers() {
	if r.Failed() {
		return
	}
	t := r.T
	// If its memory counted twice, as it is there already, it would not fit.
	group, _ := memoryGroup(t, 512<<20)
	twin := r.twin(t, lab.IncomingOptions{}, func(s *lab.Spec) {
		s.QEMU = within(t, s.QEMU, group)
		s.Machine += ",memory-backend=pc.ram"
		s.Extra = append([]string{"-object", "memory-backend-ram,size=256M,prealloc=on,id=pc.ram"},
			s.Extra...)
	})
	if err := twin.Execute(labtest.Within(t, 10*time.Second), "migrate-set-parameters",
		map[string]any{"tls-creds": "none-such"}, nil); err != nil {
		t.Fatal(err)
	}
	ln := listen(t, r.lab.B)
	log := make(refusalLog, 10)
	received := make(chan error, 1)
	go func() {
		received <- receiveOn(labtest.Within(t, 3*time.Minute),
			evict.Destination{QMP: twin.QMP, Log: slog.New(log)}, ln)
	}()

	connect := func(t *testing.T, say []byte) net.Conn {
		t.Helper()
		c, err := dialFrom(r.lab.A)(labtest.Within(t, 10*time.Second), "tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := c.Write(say); err != nil {
			t.Fatal(err)
		}
		return c
	}
	// session opens all lanes, as package link's comment says, and sends something on the first.
	session := func(t *testing.T, say []byte) net.Conn {
		t.Helper()
		var control net.Conn
		for lane := range byte(3) {
			c := connect(t, hello(link.Version, lane))
			answer := make([]byte, 22)
			if _, err := io.ReadFull(c, answer); err != nil ||
				string(answer) != greeting+"\x00\x00\x00\x08"+strings.Repeat("\x00", 8) {
				t.Fatalf("answered %q, %v", answer, err)
			}
			if lane == 0 {
				control = c
			}
		}
		if _, err := control.Write(say); err != nil {
			t.Fatal(err)
		}
		return control
	}
	fits :=
		`{"qemu":"7.2.22","machine":"pc-i440fx-7.2","cpus":{},"blocks":[],"devices":{},"load_timeout_ms":20000}`
	for name, c := range map[string]struct {
		hello bool // only
		say   []byte
		says  string
	}{
		"web client": {true, []byte("GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"),
			"does not speak vacate's protocol"},
		"half a hello": {true, hello(link.Version, 0)[:11], "no hello"},
		"another version": {true, hello(link.Version+1, 0),
			"use the same release of vacate on both hosts"},
		"fetch lane only": {true, hello(link.Version, 2),
			"the other lanes of its session did not come"},
		"garbage": {say: []byte(strings.Repeat("garbage ", 100)),
			says: "does not speak vacate's protocol"},
		"huge frame": {say: []byte{1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0},
			says: "4294967295 bytes, more than"},
		"wrong checksum": {say: append(frame(offer, nil)[:8], 1, 2, 3, 4),
			says: "wrong checksum"},
		"commit first":  {say: frame(commit, nil), says: "unexpected message 4"},
		"package first": {say: frame(load, make([]byte, 1000)), says: "unexpected message 3"},
		"farewell first": {say: frame(32, []byte(`{"reason":"changed my mind"}`)),
			says: "changed my mind"},
		"no JSON": {say: frame(offer, []byte("an offer")), says: "bad frame: message"},
		"JSON of other type": {say: frame(offer, []byte(`{"cpus":"one"}`)),
			says: "bad frame: message"},
		"unknown field": {say: frame(offer, []byte(`{"speed":"fast"}`)),
			says: `unknown field "speed"`},
		"two offers": {say: frame(offer, []byte(fits+fits)), says: "bytes behind it"},
		"no time to load": {say: frame(offer, []byte(strings.Replace(fits, "20000", "0", 1))),
			says: "ms for loading the devices"},
		"endless time": {say: frame(offer,
			[]byte(strings.Replace(fits, "20000", "9223372036854775807", 1))),
			says: "ms for loading the devices"},
		"other VM": {say: frame(offer, []byte(fits)),
			says: "the source's QEMU is for , the destination's for x86_64"},
	} {
		r.run("stranger: "+name, func(t *testing.T) {
			if c.hello {
				conn := connect(t, c.say)
				if name == "half a hello" {
					conn.Close()
				}
			} else {
				session(t, c.say)
			}
			log.expect(t, c.says)
			if status, err := twin.Status(labtest.Within(t, 10*time.Second)); status !=
				"inmigrate" {
				t.Errorf("the destination's QEMU is %q: %v", status, err)
			}
		})
	}
	if r.Failed() {
		return
	}
	report, err := evict.Source{QMP: r.vm.QMP,
		Connect: connectTo(r.lab.A, ln.Addr().String())}.Evict(labtest.Within(t, time.Minute))
	result{report: report, source: err, destErr: <-received}.mustComplete(t)
	labtest.MustCheck(t, twin)
}

func hello(version uint16, lane byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte("vacate\r\n"), version)
	return append(append(b, lane, 0), "sixteen bytes id"+strings.Repeat("\x00", 8)...)
}

func frame(kind byte, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{kind, 0, 0, 0}, uint32(len(payload)))
	table := crc32.MakeTable(crc32.Castagnoli)
	b = binary.BigEndian.AppendUint32(b, crc32.Update(crc32.Update(0, table, b), table, payload))
	return append(b, payload...)
}

// refusalLog is a slog.Handler that keeps the reasons of warnings.
type refusalLog chan string

func (l refusalLog) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn
}
func (l refusalLog) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l refusalLog) WithGroup(string) slog.Handler      { return l }
func (l refusalLog) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "error" {
			l <- a.Value.String()
		}
		return true
	})
	return nil
}

// expect waits for the next reason.
func (l refusalLog) expect(t *testing.T, says string) {
	t.Helper()
	select {
	case reason := <-l:
		if !strings.Contains(reason, says) {
			t.Errorf("the destination refused for %q; want %q", reason, says)
		}
	case <-time.After(20 * time.Second):
		t.Errorf("the destination refused nothing; want %q", says)
	}
}
