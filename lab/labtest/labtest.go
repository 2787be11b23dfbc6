// Package labtest has what tests with a lab's VMs have in common.
package labtest

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"vacate/lab"
)

// Need skips the test when err tells what this machine lacks for it, or fails it if the
// environment says that all must run (VACATE_REQUIRE=1).
func Need(t testing.TB, err error) {
	t.Helper()
	if err == nil {
		return
	}
	if os.Getenv("VACATE_REQUIRE") == "1" {
		t.Fatal(err)
	}
	t.Skip(err)
}

// Dir is one cache for the labs of all tests, in the module's directory, whose repository
// ignores it.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd() // a test's is that of its package
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".lab")
		}
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatal("there is no go.mod above this test's directory")
		}
		dir = up
	}
}

// Seed returns what a test's chance begins with: VACATE_SEED if that is set, else another number
// each time. When the test fails, it says which.
func Seed(t testing.TB) uint64 {
	t.Helper()
	seed, err := strconv.ParseUint(os.Getenv("VACATE_SEED"), 10, 64)
	if err != nil {
		seed = uint64(time.Now().UnixNano())
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("VACATE_SEED=%d lets chance take the same turns again", seed)
		}
	})
	return seed
}

// New makes a lab, or skips the test where none can be made, as Need has it.
func New(t testing.TB, opts lab.Options) *lab.Lab {
	t.Helper()
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	Need(t, lab.Probe())
	opts.Dir, opts.BootOnce = Dir(t), true
	opts.Log = slog.New(slog.NewTextHandler(t.Output(),
		&slog.HandlerOptions{Level: slog.LevelDebug}))
	l, err := lab.New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// Within returns a context of the test that ends after a time.
func Within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// MustCheck has the guest check all of its memory. It does no work after that.
func MustCheck(t testing.TB, vm *lab.VM) {
	t.Helper()
	check, err := vm.Guest.Check(Within(t, 2*time.Minute), vm)
	if err != nil {
		t.Fatal(err)
	}
	if check.Bad != 0 || check.Pages == 0 {
		t.Fatalf("%d bad pages of %d", check.Bad, check.Pages)
	}
}

// RelayMonitor serves a unix socket whose clients reach that of a QEMU through it, but for the
// descriptors that they pass. It returns the path.
func RelayMonitor(t testing.TB, monitor string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "relay.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	Serve(t, ln, func(c net.Conn) {
		q, err := net.Dial("unix", monitor)
		if err != nil {
			c.Close()
			return
		}
		// Either ends with the other.
		go func() { io.Copy(struct{ io.Writer }{q}, c); q.Close() }()
		io.Copy(struct{ io.Writer }{c}, q)
		c.Close()
	})
	return path
}

// Serve has each client of a listener served at once, to the end of the test, which closes all.
func Serve(t testing.TB, ln net.Listener, serve func(net.Conn)) {
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			go serve(c)
		}
	}()
}
