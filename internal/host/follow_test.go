package host

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
)

// `vacate evict` follows an eviction through the death of the daemon that it asked, up to the end.
func TestFollowThroughDeath(t *testing.T) {
	vacate := filepath.Join(t.TempDir(), "vacate")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", vacate, "vacate/cmd/vacate")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	l := labtest.New(t, lab.Options{Rate: 4e7})
	r := newRun(t, l,
		lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 24, IdleMiB: 48}})
	r.a.start("source/pushing")
	r.b.start()

	var out, errs bytes.Buffer
	cmd := exec.CommandContext(labtest.Within(t, 2*time.Minute), vacate, "evict", "web1", "--to",
		"hostb", "--skip-checks", "--socket", filepath.Join(r.a.dir, "sock"))
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if !r.a.reach("source/pushing", time.Minute) {
		t.Fatal("the VM does not get to the push")
	}
	r.a.kill()
	time.Sleep(time.Second) // the command asks a daemon that is not there
	if err := l.SetRate(4e8); err != nil {
		t.Fatal(err)
	}
	r.a.start()
	err := <-ended
	t.Logf("%v\n%s%s", err, &out, &errs)
	said := out.String() + errs.String()
	if err != nil || !strings.Contains(said, "vacated does not answer") ||
		strings.Contains(said, "EOF") || strings.Contains(said, "protocol error") {
		t.Error("the command did not follow on")
	}
	if strings.Contains(said, "stays on this host") {
		t.Error("the command says that the VM is where it is not")
	}
	vms := r.expected.VMs()
	labtest.MustCheck(t, vms[len(vms)-1])
}
