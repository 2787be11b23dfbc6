package doctor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
	"vacate/internal/sys/units"
	"vacate/lab"
	"vacate/lab/labtest"
)

var (
	record     = flag.Bool("record", false, "record testdata")
	qemuBinary = flag.String("qemu", "",
		"QEMU to test with and to record from; default the one in PATH")
)

// program returns the QEMU to test with, or to record from.
func program(t *testing.T) string {
	t.Helper()
	if *qemuBinary != "" {
		return *qemuBinary
	}
	q, err := lab.StockQEMU(t.Context())
	labtest.Need(t, err)
	return q.Path
}

// start runs a QEMU in a directory and connects to it.
func start(t *testing.T, dir string, args ...string) *qmp.Client {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.Command(program(t),
		append([]string{"-nodefaults", "-display", "none", "-accel", "tcg", "-qmp",
			"unix:" + sock + ",server=on,wait=off"}, args...)...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return dial(t, sock)
}

func dial(t *testing.T, sock string) *qmp.Client {
	t.Helper()
	c, err := qmp.Dial(t.Context(), sock)
	for i := 0; i < 500 && (errors.Is(err, fs.ErrNotExist) ||
		errors.Is(err, syscall.ECONNREFUSED)); i++ {
		time.Sleep(20 * time.Millisecond) // until QEMU listens
		c, err = qmp.Dial(t.Context(), sock)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func facts(t *testing.T, q *qmp.Client) VMFacts {
	t.Helper()
	v, err := VM(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if back, err := Decode[VMFacts](b); err != nil || !reflect.DeepEqual(back, v) {
		t.Fatalf("%+v became %+v: %v", v, back, err)
	}
	return v
}

// files makes a directory with what the tests' VMs use.
func files(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	put(t, filepath.Join(dir, "disk.raw"), strings.Repeat("x", 1<<20))
	put(t, filepath.Join(dir, "cd.iso"), strings.Repeat("y", 1<<20))
	for _, d := range []string{"share", "mem"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// odd are a QEMU's arguments for everything that cannot move.
var odd = []string{
	"-S", "-smp", "2", "-m", "256,maxmem=1G,slots=2", "-cpu", "max", "-mem-path", "mem",
	"-device", "nvme,serial=a,drive=d", "-drive",
	"if=none,id=d,file=disk.raw,format=raw,snapshot=on",
	"-device", "ivshmem-plain,memdev=iv", "-object", "memory-backend-ram,id=iv,size=1M,share=on",
	"-object", "memory-backend-ram,id=vm,size=256M", "-device", "virtio-mem-pci,id=vmem,memdev=vm",
	"-virtfs", "local,path=share,mount_tag=t,security_model=none",
	"-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,netdev=n",
	"-device", "virtio-scsi-pci", "-drive",
	"if=none,id=cd,media=cdrom,file=cd.iso,format=raw,cache=none", "-device", "scsi-cd,drive=cd",
	"-drive", "if=none,id=empty,media=cdrom", "-device", "scsi-cd,drive=empty",
	"-drive", "if=none,id=nothing,driver=null-co", "-device", "virtio-blk-pci,drive=nothing",
}

// A plain VM is found fit, and its disk to be the twin's.
func TestPlainVM(t *testing.T) {
	dir := files(t)
	args := []string{"-m", "128", "-drive", "if=none,id=d,file=disk.raw,format=raw", "-device",
		"virtio-blk-pci,drive=d"}
	q := start(t, dir, args...)
	v := facts(t, q)
	if v.State != "running" || v.CPUs.Accel != "tcg" || len(v.CPUs.VCPUs) != 1 ||
		v.Main != 128<<20 || v.CPUs.Model != "qemu64" || !v.Postcopy || v.MemoryErr != "" ||
		len(v.Held) != 0 ||
		!strings.HasPrefix(v.Machine, "pc-i440fx-") || v.QEMU != q.Version().String() ||
		len(v.Settings) != 0 {
		t.Errorf("%+v", v)
	}
	if n := total(v, units.PageSize); n < 128<<20 || n > 256<<20 || v.Used == 0 {
		t.Errorf("%d bytes of memory, %d used: %+v", n, v.Used, v.Memory)
	}
	disk := filepath.Join(dir, "disk.raw")
	if len(v.Disks) != 1 || v.Disks[0].Drive != "d" || v.Disks[0].Driver != "raw" ||
		v.Disks[0].ReadOnly || v.Disks[0].Direct ||
		v.Disks[0].File.Path != disk || v.Disks[0].File.Size != 1<<20 || !v.Disks[0].File.Locked {
		t.Errorf("%+v", v.Disks)
	}
	twin := Twin(t.Context(), TwinOptions{Name: "plain", Dir: dir,
		Args: append([]string{program(t)}, args...)})
	h := Host(t.Context(), HostOptions{Name: "here", Journal: dir})
	here, there := h, h
	there.Name = "there"
	if twin.CPUError != "" || !reflect.DeepEqual(twin.CPUs, v.CPUs) {
		t.Errorf("the twin's CPUs %+v, %s; the VM's %+v", twin.CPUs, twin.CPUError, v.CPUs)
	}
	all := Compare(here, v, there, twin, LinkFacts{RoundTrip: time.Millisecond, Rate: 1e8})
	for _, f := range all {
		if f.Level == Fatal && f.Check != "process memory" { // not every tester is root
			t.Errorf("%v", f)
		}
	}
	if f := find(all, "disk"); f.Level != OK {
		t.Errorf("%v", f)
	}
	// A description there that names another CPU is told of.
	other := Twin(t.Context(),
		TwinOptions{Name: "plain", Dir: dir,
			Args: append([]string{program(t), "-cpu", "qemu64,aes=on", "-M",
				"pc,memory-backend=none"}, args...)})
	if f := find(Compare(here, v, there, other, LinkFacts{}), "cpu"); f.Level != Fatal ||
		!strings.Contains(f.Text, "has aes, which the guest's (qemu64) does not have") {
		t.Errorf("%v", f)
	}
	// On two machines it would be two files.
	there.BootID = "another"
	if f := find(Compare(here, v, there, twin, LinkFacts{}), "disk"); f.Level != Fatal {
		t.Errorf("%v", f)
	}
	// Nothing was changed, and asking again gives the same answer.
	again := facts(t, q)
	v.Used, again.Used = 0, 0
	if !reflect.DeepEqual(v, again) {
		t.Errorf("first %+v\nthen %+v", v, again)
	}
}

// Whatever keeps a VM where it is is found in a real one.
func TestOddVM(t *testing.T) {
	dir := files(t)
	v := facts(t, start(t, dir, odd...))
	checkOdd(t, v)
	var disks []string
	for _, d := range v.Disks {
		disks = append(disks, fmt.Sprintf("%s %s %s ro=%v direct=%v gone=%v", d.Drive, d.Driver,
			filepath.Base(d.File.Path), d.ReadOnly, d.Direct, d.File.Error != ""))
	}
	if len(disks) != 3 || !strings.HasPrefix(disks[0], "d qcow2 vl.") ||
		!strings.HasSuffix(disks[0], "ro=false direct=false gone=true") ||
		disks[1] != "d raw disk.raw ro=true direct=false gone=false" ||
		disks[2] != "cd raw cd.iso ro=true direct=true gone=false" {
		t.Errorf("disks %q", disks)
	}
	got := Inspect(goodHost("here"), &v)
	for _, want := range []Finding{
		{"here", "vm", OK, "has not been started yet (prelaunch)", ""},
		{"here", "devices", Fatal, "ivshmem", "device_del"},
		{"here", "devices", Warning, "virtio-9p-pci", "umount"},
		{"here", "devices", Warning, "(user)", "tap"},
	} {
		if !slices.ContainsFunc(got, func(f Finding) bool {
			return f.Host == want.Host && f.Check == want.Check && f.Level == want.Level &&
				strings.Contains(f.Text, want.Text) && strings.Contains(f.Remedy, want.Remedy)
		}) {
			t.Errorf("no %v", want)
		}
	}
	twin := Twin(t.Context(), TwinOptions{Name: "odd", Dir: dir,
		Args: append([]string{"/no/such"}, odd...)})
	if len(twin.Backends) != 1 || twin.Backends[0].Path != filepath.Join(dir, "mem") ||
		twin.Backends[0].FS == "" {
		t.Errorf("back ends %+v", twin.Backends)
	}
	if f := find(Compare(goodHost("here"), v, goodHost("there"), twin, LinkFacts{}),
		"disk"); f.Level != Fatal || !strings.Contains(f.Text, "snapshot=on") {
		t.Errorf("%v", f)
	}
}

// checkOdd checks what a recording tells as well as a live QEMU does.
func checkOdd(t *testing.T, v VMFacts) {
	t.Helper()
	if v.State != "prelaunch" || v.Migration != "" || len(v.CPUs.VCPUs) != 2 ||
		v.Main != 256<<20 && v.Main != 0 || v.CPUs.Model != "max" || !v.Postcopy ||
		!slices.Equal(v.Networks, []string{"user"}) {
		t.Errorf("%+v", v)
	}
	reasons := []string{"ivshmem"}
	if !atLeast(v.QEMU, 11, 0) { // 11.1 moves NVMe drives
		reasons = append(reasons, "nvme")
	}
	for _, want := range reasons {
		if !slices.ContainsFunc(v.Held,
			func(r fit.Reason) bool { return strings.Contains(r.Text, want) }) {
			t.Errorf("QEMU's reasons %q do not tell of %s", v.Held, want)
		}
	}
	for _, want := range []DeviceFacts{{"vmem", "virtio-mem-pci"}, {"", "nvme"},
		{"", "ivshmem-plain"}, {"", "virtio-9p-pci"}, {"", "virtio-net-pci"}} {
		if !slices.Contains(v.Devices, want) {
			t.Errorf("no %v among %v", want, v.Devices)
		}
	}
}

// An exchange is a command with its arguments, and the reply to it.
type exchange struct {
	Execute   string          `json:"execute"`
	Arguments json.RawMessage `json:"arguments,omitempty"`
	Return    json.RawMessage `json:"return,omitempty"`
	Error     json.RawMessage `json:"error,omitempty"`
}

var threadID = regexp.MustCompile(`"thread-id":\d+`)

// TestRecord writes testdata/VERSION.jsonl: the greeting, then each command that VM gives to
// the VM of odd, and QEMU's reply. Run it with
//
//	go test ./internal/host/doctor -run TestRecord -record -qemu PATH
func TestRecord(t *testing.T) {
	if !*record {
		t.Skip("records only with -record")
	}
	q := start(t, files(t), odd...)
	version := q.Version()
	var lines []string
	add := func(v any) {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, string(b))
	}
	add(
		json.RawMessage(fmt.Sprintf(
			`{"QMP":{"version":{"qemu":{"major":%d,"minor":%d,"micro":%d},"package":""},"capabilities":["oob"]}}`, version.Major, version.Minor, version.Micro)))
	_, err := relay(t, func(ctx context.Context, x exchange) exchange {
		var refused *qmp.Error
		var args any
		if x.Arguments != nil {
			args = x.Arguments
		}
		err := q.Run(ctx, x.Execute, args, &x.Return)
		if errors.As(err, &refused) {
			x.Return, x.Error = nil, json.RawMessage(fmt.Sprintf(`{"class":%q,"desc":%q}`,
				refused.Class, refused.Desc))
		} else if err != nil {
			t.Error(err)
		}
		// A replay has no process to look at, and asks no more of memory.
		said := x
		said.Return = threadID.ReplaceAll(x.Return, []byte(`"thread-id":2147483647`))
		if x.Execute != "human-monitor-command" ||
			strings.Contains(string(x.Arguments), "info network") ||
			strings.Contains(string(x.Arguments), "info qtree") {
			add(said)
		}
		return x
	}, lines[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join("testdata", version.String()+".jsonl"),
		[]byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

// relay has VM talk with a monitor that answers as told.
func relay(t *testing.T, answer func(context.Context, exchange) exchange,
	greeting string) (VMFacts, error) {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "qmp")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	defer all.Wait()
	defer ln.Close()
	all.Go(func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprintln(c, greeting)
		lines := bufio.NewScanner(c)
		for lines.Scan() {
			var m struct {
				exchange
				ID uint64 `json:"id"`
			}
			if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
				t.Error(err)
				return
			}
			reply := exchange{Return: json.RawMessage("{}")}
			if m.Execute != "qmp_capabilities" {
				reply = answer(t.Context(), m.exchange)
			}
			if reply.Error != nil {
				fmt.Fprintf(c, `{"error":%s,"id":%d}`+"\n", reply.Error, m.ID)
			} else {
				fmt.Fprintf(c, `{"return":%s,"id":%d}`+"\n", reply.Return, m.ID)
			}
		}
	})
	q, err := qmp.Dial(t.Context(), sock)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	return VM(t.Context(), q)
}

// What QEMUs of several versions have said is understood, without their processes to look at.
// None of it was a command that changes anything.
func TestReplies(t *testing.T) {
	recordings, err := filepath.Glob("testdata/*.jsonl")
	if err != nil || len(recordings) == 0 {
		t.Fatal("no recordings", err)
	}
	for _, file := range recordings {
		t.Run(filepath.Base(file), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			var said []exchange
			for _, line := range lines[1:] {
				var x exchange
				if err := json.Unmarshal([]byte(line), &x); err != nil {
					t.Fatal(err)
				}
				said = append(said, x)
			}
			v, err := relay(t, func(_ context.Context, x exchange) exchange {
				if !slices.Contains([]string{"qom-get", "qom-list", "human-monitor-command",
					"x-debug-query-block-graph"},
					x.Execute) && !strings.HasPrefix(x.Execute, "query-") {
					t.Errorf("VM gave the command %s", x.Execute)
				}
				i := slices.IndexFunc(said,
					func(s exchange) bool {
						return s.Execute == x.Execute && string(s.Arguments) == string(x.Arguments)
					})
				if i < 0 {
					return exchange{
						Error: json.RawMessage(`{"class":"CommandNotFound","desc":"not recorded"}`)}
				}
				return said[i]
			}, lines[0])
			if err != nil {
				t.Fatal(err)
			}
			checkOdd(t, v)
			if v.QEMU+".jsonl" != filepath.Base(file) || v.MemoryErr == "" || v.Used != 0 ||
				len(v.Memory) != 0 {
				t.Errorf("%+v", v)
			}
			if len(v.Disks) != 3 || filepath.Base(v.Disks[1].File.Path) != "disk.raw" ||
				!strings.Contains(v.Disks[1].File.Error, "no file of this name open") {
				t.Errorf("%+v", v.Disks)
			}
		})
	}
}

// A monitor that answers nonsense gives an error or facts within bounds.
func TestNonsense(t *testing.T) {
	greeting :=
		`{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":0},"package":""},"capabilities":[]}}`
	long := strings.Repeat("x", 10*maxString)
	for _, reply := range []string{`{}`, `[]`, `"x"`, `7`, `[{}]`, `[{"inserted":{}}]`,
		`{"status":"` + long + `","running":true}`, `[{"name":"a","type":"child<` + long + `>"}]`} {
		v, err := relay(t, func(context.Context, exchange) exchange {
			return exchange{Return: json.RawMessage(reply)}
		}, greeting)
		if err == nil && beyond(reflect.ValueOf(&v).Elem(), false) != "" {
			t.Errorf("%.40s: %+v", reply, v)
		}
	}
}
