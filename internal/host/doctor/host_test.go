package doctor

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"

	"golang.org/x/sys/unix"
)

// The test's program gathers facts instead of testing when it is told to; see asChild.
func TestMain(m *testing.M) {
	if os.Getenv("VACATE_DOCTOR_FACTS") == "1" {
		if err := json.NewEncoder(os.Stdout).Encode(Host(context.Background(),
			HostOptions{Name: "child", Journal: "/"})); err != nil {
			panic(err)
		}
		return
	}
	os.Exit(m.Run())
}

// asChild gathers this host's facts in another process.
func asChild(t *testing.T, attr *syscall.SysProcAttr) HostFacts {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Through a descriptor, as the program may lie where another user may not look.
	f, err := os.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Env = []string{"VACATE_DOCTOR_FACTS=1"}
	cmd.Dir = "/"
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	h, err := Decode[HostFacts](out)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestHost(t *testing.T) {
	q, err := lab.StockQEMU(t.Context())
	labtest.Need(t, err)
	dir := t.TempDir()
	before := time.Now()
	h := Host(t.Context(), HostOptions{
		Name: "here", Journal: filepath.Join(dir, "not", "yet"),
		QEMUs:       []string{q.Path, "/no/such", "relative", "/bin/true"},
		Certificate: CertFacts{Name: "here"},
	})
	if h.Name != "here" || len(h.BootID) != 36 || h.Kernel == "" ||
		h.PageSize != uint64(os.Getpagesize()) || h.CPU.Count < 1 ||
		len(h.Limits) == 0 || h.Limits[0].Free() == 0 || h.Journal.Free == 0 ||
		h.Journal.Error != "" || h.Certificate.Name != "here" ||
		h.Time.Before(before) || h.Time.After(time.Now()) || int(h.User) != os.Geteuid() {
		t.Errorf("%+v", h)
	}
	if len(h.QEMUs) != 4 || h.QEMUs[0].Version != q.Version ||
		!slices.Contains(h.QEMUs[0].Machines, "pc") ||
		slices.Contains(h.QEMUs[0].Machines, "Supported") {
		t.Fatalf("%+v", h.QEMUs)
	}
	for _, bad := range h.QEMUs[1:] {
		if bad.Error == "" || bad.Version != "" {
			t.Errorf("%+v", bad)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "not")); err == nil {
		t.Error("the journal's directory was made")
	}
	b, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Decode[HostFacts](b); err != nil {
		t.Error(err)
	}
}

// What a daemon may not do is found out, and what follows from that said.
func TestDropped(t *testing.T) {
	if os.Geteuid() != 0 {
		labtest.Need(t, os.ErrPermission)
	}
	whole := asChild(t, nil)
	if !whole.mayTrace() || whole.ProcessRead != "" || whole.PidfdGetfd != "" {
		t.Fatalf("as root: %+v", whole)
	}
	if whole.Userfaultfd.Error != "" {
		t.Errorf("root has no userfaultfd: %+v", whole.Userfaultfd)
	}

	// A child is a fork of the thread, whose bounding set is its own.
	got := make(chan HostFacts)
	go func() {
		defer close(got)
		runtime.LockOSThread() // and never unlock: the thread ends with this goroutine
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_PTRACE, 0, 0, 0); err != nil {
			t.Error(err)
			return
		}
		got <- asChild(t, nil)
	}()
	dropped, ok := <-got
	if !ok {
		t.FailNow()
	}
	if dropped.mayTrace() || dropped.Effective|1<<capSysPtrace != whole.Effective {
		t.Errorf("capabilities %x of %x", dropped.Effective, whole.Effective)
	}
	if f := find(Inspect(dropped, nil), "process memory"); f.Level != Fatal ||
		!strings.Contains(f.Remedy, "CAP_SYS_PTRACE") {
		t.Errorf("%+v", f)
	}
	nobody := asChild(t,
		&syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
	for _, h := range []HostFacts{dropped, nobody} {
		if h.Userfaultfd.Unprivileged == 0 &&
			!strings.Contains(h.Userfaultfd.Error, "not permitted") {
			t.Errorf("userfaultfd without a right to it: %+v", h.Userfaultfd)
		}
	}
	if nobody.Userfaultfd.Unprivileged == 0 && nobody.Userfaultfd.Device != "" {
		if f := find(Inspect(nobody, nil), "userfaultfd"); f.Level != Warning ||
			!strings.Contains(f.Remedy, "sysctl") {
			t.Errorf("%+v", f)
		}
	}
}

// find returns the finding of a check.
func find(all []Finding, check string) Finding {
	i := slices.IndexFunc(all, func(f Finding) bool { return f.Check == check })
	if i < 0 {
		return Finding{}
	}
	return all[i]
}

// A program that is no QEMU, says too much or never ends is left alone.
func TestAsk(t *testing.T) {
	dir := t.TempDir()
	script := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, text := range map[string]string{
		"other":   "echo Python 3.11",
		"endless": "yes",
		"fails":   "echo QEMU emulator version 7.2.22; exit 1",
	} {
		if q := askQEMU(t.Context(), script(name, text)); q.Error == "" {
			t.Errorf("%s: %+v", name, q)
		}
	}
	q := askQEMU(t.Context(), script("good", `if [ "$1" = --version ]; then echo QEMU emulator version 10.0.2 '(Debian)'; else
		echo Supported machines are:; echo 'pc      Standard PC (alias of pc-i440fx-10.0)'; echo; echo '../x  no'; echo 'none    empty machine'; fi`))
	if q.Error != "" || q.Version != "10.0.2" || !slices.Equal(q.Machines, []string{"pc", "none"}) {
		t.Errorf("%+v", q)
	}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestParse(t *testing.T) {
	if p := parsePressure(
		[]byte("some avg10=12.50 avg60=2.20 avg300=3.30 total=20029589\nfull avg10=99\n")); p !=
		12.5 {
		t.Errorf("pressure %v", p)
	}
	if p := parsePressure([]byte("some avg10=NaN")); !(p >= 0) && p == p {
		t.Errorf("pressure %v", p)
	}
	c := parseCPU(
		[]byte("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Xeon: 1\nflags\t\t: " +
			"fpu sse2\n\nprocessor\t: 1\nflags\t: other\n"))
	if c.Model != "Xeon: 1" {
		t.Errorf("%+v", c)
	}
	if v := compareVersions("10.0.2", "9.11.30"); v <= 0 {
		t.Errorf("versions as words: %d", v)
	}
}
