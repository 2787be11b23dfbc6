package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"vacate/lab/loadproto"
)

// testDir is one cache for all tests; the repository ignores it.
const testDir = "../.lab"

// needLab skips a test where no lab can be made, or fails it if the
// environment says that all must run.
func needLab(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	if err := Probe(); err != nil {
		if os.Getenv("VACATE_REQUIRE") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

func newTestLab(t testing.TB, opts Options) *Lab {
	t.Helper()
	needLab(t)
	opts.Dir = testDir
	opts.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	l, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(l.RunDir()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the run directory is still there: %v", err)
		}
	})
	return l
}

func deadline(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func mustCheck(t *testing.T, g *Guest, vm *VM, pages uint64) {
	t.Helper()
	check, err := g.Check(deadline(t, time.Minute), vm)
	if err != nil {
		t.Fatal(err)
	}
	if check.Pages != pages || check.Bad != 0 {
		t.Errorf("the guest checked %d pages, %d bad; want %d, 0 bad: %+v", check.Pages, check.Bad,
			pages, check)
	}
}

const pagesPerMiB = 256

func TestBootAndCheck(t *testing.T) {
	l := newTestLab(t, Options{})
	start := time.Now()
	vm, err := l.A.Boot(deadline(t, 2*time.Minute),
		Spec{MemoryMiB: 256, Load: Load{HotMiB: 32, IdleMiB: 32, OtherMiB: 8, FileMiB: 4}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("booted in %v under %s", time.Since(start), vm.Spec.Accel)
	if err := vm.Guest.WaitOps(deadline(t, time.Minute), 20_000); err != nil {
		t.Fatal(err)
	}
	s := vm.Guest.Samples()
	last := s[len(s)-1].At
	t.Logf("rate %v, stalls %+v", vm.Guest.Throughput(s[0].At, last, 100*time.Millisecond),
		vm.Guest.Stalls(s[0].At, last))
	mustCheck(t, vm.Guest, vm, (32+32+8+4)*pagesPerMiB)
	if n := vm.Guest.Torn(); n != 0 {
		t.Errorf("%d torn lines without an eviction", n)
	}
	if err := vm.Guest.Reboot(deadline(t, 2*time.Minute), vm); err != nil {
		t.Fatal(err)
	}
	if err := vm.Guest.WaitOps(deadline(t, time.Minute), 1000); err != nil {
		t.Fatal(err)
	}
	pid := vm.PID()
	vm.Kill()
	if vm.Alive() {
		t.Error("the VM is alive after Kill")
	}
	if _, err := os.Stat(filepath.Join("/proc", fmt.Sprint(pid))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("process %d is still there: %v", pid, err)
	}
}

// The memory of several processes lies mixed, and one works on some pages more
// than on others.
func TestMixedLoad(t *testing.T) {
	l := newTestLab(t, Options{})
	start := time.Now()
	load := Load{HotMiB: 24, OtherMiB: 42, Others: 4, CacheMiB: 16, Zipf: true, Mixed: true,
		Slow: true, Seed: 3}
	vm, err := l.A.Boot(deadline(t, 2*time.Minute),
		Spec{MemoryMiB: 256, VCPUs: 2, Devices: Full, Load: load})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("booted in %v", time.Since(start))
	if err := vm.Guest.WaitOps(deadline(t, time.Minute), 2000); err != nil {
		t.Fatal(err)
	}
	var page loadproto.Page
	page.Fill(loadproto.Base(loadproto.SetSeed(load.Seed, loadproto.SetOther), 40*pagesPerMiB, 0))
	corrupt(t, vm, &page)
	check, err := vm.Guest.Check(deadline(t, time.Minute), vm)
	if err != nil {
		t.Fatal(err)
	}
	if check.Pages != (24+42+16)*pagesPerMiB || check.Bad != 1 || len(check.Sets) != 6 {
		t.Errorf("%d MiB in 6 sets, one page of which was changed: %+v", 24+42+16, check)
	}
	if len(check.Words) != 1 || check.Words[0].Set != loadproto.SetOther ||
		check.Words[0].Page != 40*pagesPerMiB {
		t.Errorf("page %d of the other processes was changed: %+v", 40*pagesPerMiB, check.Words)
	}
}

// A guest of every set and every device moves with QEMU's own post-copy over
// the shaped link, and finds all of its memory as it was.
func TestMigrate(t *testing.T) {
	l := newTestLab(t, Options{Rate: 1e9})
	q, err := StockQEMU(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	testMigrate(t, l, q)
}

func TestMigrateBackports(t *testing.T) {
	l := newTestLab(t, Options{BootOnce: true, Rate: 1e9})
	start := time.Now()
	q, err := BackportsQEMU(deadline(t, 5*time.Minute), testDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v after %v", q, time.Since(start))
	testMigrate(t, l, q)
}

func testMigrate(t *testing.T, l *Lab, q QEMU) {
	load := Load{HotMiB: 32, IdleMiB: 32, OtherMiB: 16, CacheMiB: 8, FileMiB: 4, Slow: true}
	src, err := l.A.Boot(deadline(t, 2*time.Minute),
		Spec{QEMU: q, Machine: "q35", MemoryMiB: 320, Devices: Full, Memfd: true, VCPUs: 2,
			Load: load})
	if err != nil {
		t.Fatal(err)
	}
	guest := src.Guest
	// Its process must be QEMU itself, not a shell that waits for it.
	if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", src.PID())); err != nil ||
		!bytes.Contains(line, []byte("/bin/qemu-system-x86_64\x00")) {
		t.Errorf("the VM's process is %q, %v", line, err)
	}
	dst, err := l.B.Incoming(deadline(t, time.Minute), src, IncomingOptions{Running: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := guest.WaitOps(deadline(t, time.Minute), 2000); err != nil {
		t.Fatal(err)
	}
	before, err := l.LinkBytes()
	if err != nil {
		t.Fatal(err)
	}

	ctx := deadline(t, 2*time.Minute)
	start := time.Now()
	postcopy(ctx, t, l, src, dst)
	took := time.Since(start)
	after, err := l.LinkBytes()
	if err != nil {
		t.Fatal(err)
	}
	// All that the load wrote has to cross, and no more than all memory with
	// what its pages cost in headers.
	least, most := uint64(32+32+16+8+4)<<20, uint64(src.Spec.MemoryMiB+32)<<20*11/10
	if n := after - before; n < least || n > most {
		t.Errorf("%d bytes crossed the link, want %d to %d", n, least, most)
	}
	if s, err := dst.Status(ctx); err != nil || s != "running" {
		t.Errorf("the destination is %q, %v", s, err)
	}
	src.Kill()
	if err := guest.WaitOps(deadline(t, time.Minute), 2000); err != nil {
		t.Fatal(err)
	}
	samples := guest.Samples()
	if vm := samples[len(samples)-1].VM; vm != dst.Name {
		t.Errorf("the last report came from VM %s", vm)
	}
	t.Logf("moved %d MiB in %v; torn lines %d; before %v, after %v", (after-before)>>20, took,
		guest.Torn(),
		guest.Stalls(start.Add(-took), start), guest.Stalls(start, time.Now()))
	mustCheck(t, guest, dst, (32+32+16+8+4)*pagesPerMiB)
}

// Two labs in one directory do not know of each other.
func TestTwoLabs(t *testing.T) {
	one, two := newTestLab(t, Options{Rate: 1e9}), newTestLab(t, Options{Rate: 100e6})
	const n = 4 << 20
	before, err := two.LinkBytes()
	if err != nil {
		t.Fatal(err)
	}
	transfer(t, one.A, one.B, n)
	after, err := two.LinkBytes()
	if err != nil {
		t.Fatal(err)
	}
	if after-before > n/2 {
		t.Errorf("%d bytes crossed the link of another lab", after-before)
	}
	if one.RunDir() == two.RunDir() {
		t.Error("both have the same run directory")
	}
	if err := one.Close(); err != nil {
		t.Fatal(err)
	}
	transfer(t, two.B, two.A, n)
}

// Bytes changed from outside must be found, or no other test proves anything.
func TestCorruptionIsFound(t *testing.T) {
	l := newTestLab(t, Options{BootOnce: true})
	const seed = 7
	vm, err := l.A.Boot(deadline(t, 2*time.Minute),
		Spec{MemoryMiB: 256,
			Load: Load{HotMiB: 16, IdleMiB: 16, OtherMiB: 4, FileMiB: 4, Slow: true, Seed: seed}})
	if err != nil {
		t.Fatal(err)
	}
	victims := []string{loadproto.SetIdle, loadproto.SetOther, loadproto.SetFile}
	check := checkCorrupted(t, vm, victims)
	if check.Bad != uint64(len(victims)) || len(check.Words) != len(victims) {
		t.Fatalf("changed a byte in %d sets: %+v", len(victims), check)
	}
	for i, w := range check.Words {
		if w.Set != victims[i] || w.Page != uint64(10+i) || w.Word != 100 || w.Got != w.Want^1 {
			t.Errorf("changed page %d of set %s: %+v", 10+i, victims[i], w)
		}
	}
}

// The bare guest finds each changed bit, in memory that it works on and in memory that it does not.
func TestBareGuestFindsCorruption(t *testing.T) {
	l := newTestLab(t, Options{})
	const seed = 7
	vm, err := l.A.Boot(deadline(t, 2*time.Minute), Spec{
		BareMetal: true, VCPUs: 2, MemoryMiB: 128,
		Load: Load{HotMiB: 16, IdleMiB: 16, OtherMiB: 4, Seed: seed, Mixed: true, Sleep: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("under", vm.Spec.Accel)
	victims := []string{loadproto.SetHot, loadproto.SetIdle, loadproto.SetOther}
	check := checkCorrupted(t, vm, victims)
	if check.Bad != uint64(len(victims)) || check.Pages != (16+16+4)*pagesPerMiB {
		t.Fatalf("changed a bit in %d sets: %+v", len(victims), check)
	}
	// The words are told with the next report.
	for len(vm.Guest.Bad()) < len(victims) {
		if t.Context().Err() != nil || !vm.Alive() {
			t.Fatal("the VM is gone")
		}
		time.Sleep(10 * time.Millisecond)
	}
	for i, w := range vm.Guest.Bad() {
		if w.Set != victims[i] || w.Page != uint64(10+i) || w.Word != 100 || w.Got != w.Want^1 {
			t.Errorf("changed page %d of set %s: %+v", 10+i, victims[i], w)
		}
	}
}

// checkCorrupted flips a bit in page 10 of the first set, page 11 of the second, and so on. Then it
// has the guest check its memory.
func checkCorrupted(t *testing.T, vm *VM, sets []string) Check {
	t.Helper()
	for i, set := range sets {
		var page loadproto.Page
		page.Fill(loadproto.Base(loadproto.SetSeed(vm.Spec.Load.Seed, set), uint64(10+i), 0))
		corrupt(t, vm, &page)
	}
	check, err := vm.Guest.Check(deadline(t, time.Minute), vm)
	if err != nil {
		t.Fatal(err)
	}
	return check
}

// corrupt flips a bit in word 100 of the page wherever the VM's memory has it.
func corrupt(t *testing.T, vm *VM, page *loadproto.Page) {
	t.Helper()
	want := (*[loadproto.PageSize]byte)(unsafe.Pointer(page))[:]
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", vm.PID()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", vm.PID()))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	buf := make([]byte, 1<<20)
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		fmt.Sscanf(line, "%x-%x", &from, &to)
		if to-from != int64(vm.Spec.MemoryMiB)<<20 {
			continue
		}
		for at := from; at < to; at += int64(len(buf)) {
			if _, err := mem.ReadAt(buf, at); err != nil {
				t.Fatal(err)
			}
			for off := 0; off < len(buf); off += loadproto.PageSize {
				if bytes.Equal(buf[off:off+loadproto.PageSize], want) {
					found++
					if _, err := mem.WriteAt([]byte{want[800] ^ 1}, at+int64(off)+800); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	}
	if found != 1 {
		t.Fatalf("the VM's memory has the page %d times", found)
	}
}

func TestLink(t *testing.T) {
	l := newTestLab(t, Options{})
	send := func(from, to *Host, bytes int64) (time.Duration, uint64) {
		t.Helper()
		before, err := l.LinkBytes()
		if err != nil {
			t.Fatal(err)
		}
		took := transfer(t, from, to, bytes)
		after, err := l.LinkBytes()
		if err != nil {
			t.Fatal(err)
		}
		return took, after - before
	}
	for _, rate := range []uint64{0, 1e9, 100e6} {
		if err := l.SetRate(rate); err != nil {
			t.Fatal(err)
		}
		for _, ends := range [][2]*Host{{l.A, l.B}, {l.B, l.A}} {
			const n = 32 << 20
			took, crossed := send(ends[0], ends[1], n)
			t.Logf("rate %d from %s: %d bytes in %v (%.0f Mbit/s), %d crossed", rate, ends[0].Name,
				n, took, n*8/took.Seconds()/1e6, crossed)
			if crossed < n || crossed > n*11/10 {
				t.Errorf("rate %d: sent %d bytes, %d crossed", rate, n, crossed)
			}
			// That shaping works is no matter of how fast this machine is: a
			// link can be slower than its rate, never faster.
			if rate != 0 && n*8/took.Seconds() > 1.1*float64(rate) {
				t.Errorf("rate %d from %s: %d bytes in %v is faster", rate, ends[0].Name, n, took)
			}
		}
	}
	if err := l.SetLinkUp(false); err != nil {
		t.Fatal(err)
	}
	err := l.A.Do(func() error {
		d := net.Dialer{Timeout: 300 * time.Millisecond}
		conn, err := d.Dial("tcp4", net.JoinHostPort(l.B.Addr, "1"))
		if err == nil {
			conn.Close()
		}
		return err
	})
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("dialed over the cut link: %v; want a time-out", err)
	}
	if err := l.SetLinkUp(true); err != nil {
		t.Fatal(err)
	}
	send(l.A, l.B, 1<<20)
}

// transfer sends bytes from one host to another, both in this process.
func transfer(t *testing.T, from, to *Host, bytes int64) time.Duration {
	t.Helper()
	ln := listenOn(t, to)
	received := make(chan int64)
	go func() {
		var n int64
		if conn, err := ln.Accept(); err == nil {
			n, _ = io.Copy(io.Discard, conn)
			conn.Write([]byte{1})
			conn.Close()
		}
		received <- n
	}()
	var conn net.Conn
	err := from.Do(func() (err error) {
		conn, err = net.Dial("tcp4", ln.Addr().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	start := time.Now()
	buf := make([]byte, 256<<10)
	for left := bytes; left > 0; left -= int64(len(buf)) {
		if _, err := conn.Write(buf[:min(left, int64(len(buf)))]); err != nil {
			t.Fatal(err)
		}
	}
	conn.(*net.TCPConn).CloseWrite()
	conn.Read(buf[:1])
	took := time.Since(start)
	if n := <-received; n != bytes {
		t.Fatalf("%d of %d bytes arrived", n, bytes)
	}
	return took
}

func TestHostStartsProcesses(t *testing.T) {
	l := newTestLab(t, Options{})
	for _, h := range []*Host{l.A, l.B} {
		cmd := exec.Command("sh", "-c",
			"grep Cpus_allowed_list /proc/self/status; cat /proc/net/fib_trie")
		var out bytes.Buffer
		cmd.Stdout = &out
		if err := h.Run(cmd); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), "Cpus_allowed_list:\t"+strconv.Itoa(h.Core)+"\n") ||
			!strings.Contains(out.String(), h.Addr) {
			t.Errorf("a process on host %s, core %d, address %s, sees:\n%s", h.Name, h.Core, h.Addr,
				out.String())
		}
	}
	sleep := exec.Command("sleep", "600")
	if err := l.A.Start(sleep); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := sleep.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Errorf("closing the lab left a process: %v", err)
	}
	if err := l.A.Start(exec.Command("true")); !errors.Is(err, errHostClosed) {
		t.Errorf("start on a closed host: %v", err)
	}
}

// With these in the environment this binary is a supervisor, or runs a command
// on host b of a supervised lab.
const (
	superviseEnv = "VACATE_TEST_SUPERVISE"
	execEnv      = "VACATE_TEST_EXEC"
)

func TestMain(m *testing.M) {
	if dir, ok := os.LookupEnv(execEnv); ok {
		fmt.Fprintln(os.Stderr,
			Exec(dir, "b", []string{"cat", "/proc/self/status", "/proc/net/fib_trie"}))
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if dir, ok := os.LookupEnv(expectEnv); ok {
		fmt.Fprintln(os.Stderr, expectOnly(ctx, dir))
		os.Exit(1)
	}
	dir, ok := os.LookupEnv(superviseEnv)
	if !ok {
		stop() // signals are for the tests as they are
		os.Exit(m.Run())
	}
	err := Supervise(ctx, Options{Dir: dir, BootOnce: true},
		Spec{MemoryMiB: 256, Load: Load{Slow: true}}, func(State) { fmt.Println("ready") })
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// startSelf starts this test's program once more, for what the variable says. read gets what the
// program says.
func startSelf(t *testing.T, variable string, read func(out io.Reader) error) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), variable+"="+testDir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	stop := context.AfterFunc(deadline(t, 2*time.Minute), func() { cmd.Process.Kill() })
	defer stop()
	if err := read(out); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func startSupervisor(t *testing.T) (*exec.Cmd, State) {
	t.Helper()
	cmd := startSelf(t, superviseEnv, func(out io.Reader) error {
		word := make([]byte, 6)
		if _, err := io.ReadFull(out, word); err != nil || string(word) != "ready\n" {
			return fmt.Errorf("the supervisor said %q, %v", word, err)
		}
		return nil
	})
	s, err := Status(deadline(t, time.Minute), testDir)
	if err != nil {
		t.Fatal(err)
	}
	return cmd, s
}

// stateGone fails unless all that a supervisor made is gone soon.
func stateGone(t *testing.T, s State) {
	t.Helper()
	for _, vm := range s.VMs {
		// The processes are the kernel's to reap: they were the supervisor's.
		proc := fmt.Sprintf("/proc/%d/cmdline", vm.PID)
		for i := 0; ; i++ {
			if line, err := os.ReadFile(proc); err != nil || len(line) == 0 {
				break
			}
			if i == 1000 {
				t.Errorf("VM %s, process %d, is still there", vm.Name, vm.PID)
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func TestSupervisor(t *testing.T) {
	needLab(t)
	cmd, s := startSupervisor(t)
	want := []string{"running", "inmigrate"}
	for i, vm := range s.VMs {
		if vm.Status != want[i] {
			t.Errorf("VM %s is %q, want %q", vm.Name, vm.Status, want[i])
		}
	}
	ns := map[string]bool{}
	for _, h := range s.Hosts {
		id, err := os.Readlink(h.NetNS)
		if err != nil {
			t.Error(err)
		}
		ns[id] = true
	}
	if len(s.VMs) != 2 || len(ns) != 2 {
		t.Fatalf("want 2 VMs, and 2 hosts of different namespaces: %+v", s)
	}
	if err := Supervise(t.Context(), Options{Dir: testDir}, Spec{}, nil); err == nil ||
		!strings.Contains(err.Error(), "up already") {
		t.Errorf("a second supervisor: %v", err)
	}
	run := filepath.Dir(s.VMs[0].QMP)
	inside := exec.Command(os.Args[0])
	inside.Env = append(os.Environ(), execEnv+"="+testDir)
	b := s.Hosts[1]
	if out, err := inside.CombinedOutput(); err != nil || !bytes.Contains(out, []byte(b.Addr)) ||
		!bytes.Contains(out, []byte("Cpus_allowed_list:\t"+strconv.Itoa(b.Core)+"\n")) {
		t.Errorf("a command on host b: %v, sees:\n%s", err, out)
	}

	// Killed without a chance to clean up.
	cmd.Process.Kill()
	cmd.Wait()
	stateGone(t, s)
	for id := range ns {
		if holders := namespaceHolders(t, id); holders != nil {
			t.Errorf("processes still in namespace %s: %v", id, holders)
		}
	}
	if _, err := Status(t.Context(), testDir); !errors.Is(err, ErrNoLab) {
		t.Errorf("status after the supervisor's death: %v", err)
	}
	if err := Down(t.Context(), testDir); !errors.Is(err, ErrNoLab) {
		t.Errorf("down after the supervisor's death: %v", err)
	}

	// The next cleans up after it, and goes down in order.
	cmd, s = startSupervisor(t)
	if _, err := os.Stat(run); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the dead lab's run directory is still there: %v", err)
	}
	if err := Down(deadline(t, time.Minute), testDir); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	stateGone(t, s)
	for _, f := range []string{filepath.Dir(s.VMs[0].QMP), filepath.Join(testDir, stateFile)} {
		if _, err := os.Stat(f); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", f, err)
		}
	}
}

// namespaceHolders returns the processes that are in a namespace or have it open.
func namespaceHolders(t *testing.T, id string) (pids []string) {
	var links []string
	for _, pattern := range []string{"/proc/[0-9]*/task/*/ns/net", "/proc/[0-9]*/fd/*"} {
		l, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		links = append(links, l...)
	}
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && to == id {
			pids = append(pids, l)
		}
	}
	return pids
}
