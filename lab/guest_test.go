package lab

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vacate/lab/loadproto"
)

// An eviction tears a line: its first half comes from one VM, its second from
// the other. The slow touches in it must not be lost.
func TestGuestSurvivesTornLine(t *testing.T) {
	g := newGuest()
	now := time.Now()
	at := func(i int) time.Time { return now.Add(time.Duration(i) * 100 * time.Millisecond) }
	line := func(m loadproto.Message) []byte { return loadproto.Append(nil, m) }
	touches := func(ns ...uint64) (t loadproto.Touches) {
		for _, n := range ns {
			t.Add(n)
		}
		return t
	}
	g.take("a-1", at(0), line(loadproto.Hello{Version: loadproto.Version, Pages: 10, Workers: 1}))
	one, two := touches(1e6), touches(5e9, 2e6)
	g.take("a-1", at(1), line(loadproto.Report{Seq: 1, Ops: 100, Touches: one}))
	torn := line(loadproto.Report{Seq: 2, Ops: 200, Touches: two, Before: one})
	g.take("a-1", at(2), torn[:9])
	g.take("b-2", at(2), torn[9:])
	g.take("b-2", at(3), line(loadproto.Report{Seq: 3, Ops: 300, Before: two}))
	g.take("b-2", at(4), line(loadproto.Report{Seq: 4, Ops: 500}))
	if g.Torn() != 2 {
		t.Errorf("%d torn pieces, want 2", g.Torn())
	}
	s := g.Stalls(at(0), at(4))
	if s.Count != 3 || s.Max != 5*time.Second || s.Sum != 5*time.Second+3*time.Millisecond ||
		s.P50 < 2*time.Millisecond || s.P50 > 2300*time.Microsecond {
		t.Errorf("stalls %+v", s)
	}
	if s := g.Stalls(at(1), at(2)); s.Count != 0 {
		t.Errorf("stalls in a window without reports: %+v", s)
	}
	// 100 at 0.1 s, 300 at 0.3 s, 500 at 0.4 s.
	rates := g.Throughput(at(1), at(4), 100*time.Millisecond)
	for i, want := range []float64{1000, 1000, 2000} {
		if len(rates) != 3 || rates[i].PerSecond < want-1e-3 || rates[i].PerSecond > want+1e-3 ||
			!rates[i].From.Equal(at(1+i)) {
			t.Fatalf("rates %+v", rates)
		}
	}
	if g.Throughput(at(4), at(1), time.Second) != nil || g.Throughput(at(1), at(4), 0) != nil {
		t.Error("rates of no time")
	}
	// A reboot starts the numbers anew.
	g.take("b-2", at(5), line(loadproto.Hello{Version: loadproto.Version}))
	g.take("b-2", at(6), line(loadproto.Report{Seq: 1, Ops: 7, Before: one}))
	if s := g.Stalls(at(4), at(6)); s.Count != 0 || g.Starts() != 2 {
		t.Errorf("after a reboot: %+v, %d starts", s, g.Starts())
	}
}

func TestGuestFailures(t *testing.T) {
	g := newGuest()
	g.take("a-1", time.Now(), loadproto.Append(nil, loadproto.Fail{Text: "no memory"}))
	if err := g.WaitOps(t.Context(), 1); err == nil || !strings.Contains(err.Error(), "no memory") {
		t.Errorf("the load has failed, WaitOps said %v", err)
	}
	g = newGuest()
	g.take("a-1", time.Now(), loadproto.Append(nil,
		loadproto.Hello{Version: loadproto.Version + 1}))
	if g.Err() == nil {
		t.Error("a load of another version was accepted")
	}
	g = newGuest()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.WaitOps(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestGuestFollowsAnything(t *testing.T) {
	g := newGuest()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		g.follow("a-1", ours)
		close(done)
	}()
	theirs.Write([]byte("\n\r\n" + strings.Repeat("x", 3*loadproto.MaxLine) + "\n"))
	theirs.Write(loadproto.Append(nil, loadproto.Hello{Version: loadproto.Version}))
	theirs.Write([]byte("half a li"))
	theirs.Close()
	<-done
	if g.Starts() != 1 || g.Torn() < 4 {
		t.Errorf("%d starts, %d torn", g.Starts(), g.Torn())
	}
}

func TestDefaultCPU(t *testing.T) {
	for _, c := range [][3]string{
		{"kvm", "6.1.0-56-cloud-amd64", "host,arch-capabilities=off"},
		{"tcg", "6.1.0-56-cloud-amd64", "max,-erms,-fsrm"},
		{"tcg", "6.12.48+deb13-cloud-amd64", "max,-erms,-fsrm,-cx16"},
		{"tcg", "7.3.1-cloud-amd64", "max,-erms,-fsrm,-cx16"},
	} {
		if got := DefaultCPU(c[0], c[1]); got != c[2] {
			t.Errorf("%s, Linux %s: %q, want %q", c[0], c[1], got, c[2])
		}
	}
}

func TestSpecsThatCannotWork(t *testing.T) {
	needLab(t)
	for _, s := range []Spec{
		{Devices: "some"},
		{Accel: "xen"},
		{VCPUs: -1},
		{Load: Load{HotMiB: -1}},
		{MemoryMiB: 256, Load: Load{HotMiB: 200}},
		{Load: Load{CacheMiB: 1}},
		{Init: "../vacate"},
		{Run: []string{"a b"}},
		{Init: guestAgent, Run: []string{"vacate"}},
	} {
		if err := s.fill(t.Context()); err == nil {
			t.Errorf("%+v was accepted", s)
		}
	}
}

func TestMakeDirOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	fail := errors.New("no luck")
	if err := makeDir(t.Context(), dir, func(string) error { return fail }); err != fail {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed maker left the directory: %v", err)
	}
	var made atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			err := makeDir(t.Context(), dir, func(tmp string) error {
				made.Add(1)
				time.Sleep(10 * time.Millisecond)
				return os.WriteFile(filepath.Join(tmp, "x"), nil, 0o600)
			})
			if err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(filepath.Join(dir, "x")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if made.Load() != 1 {
		t.Errorf("made %d times", made.Load())
	}
}
