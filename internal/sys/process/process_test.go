package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"
)

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func kill(t *testing.T, p Process) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := p.Kill(ctx); err != nil {
		t.Error(err)
	}
	if p.Alive() {
		t.Errorf("process %d lives", p.PID)
	}
}

func TestProcess(t *testing.T) {
	own, err := Find(os.Getpid())
	if err != nil || !own.Alive() {
		t.Fatalf("%+v, %v", own, err)
	}
	// Another process had our number: it is dead, and killing it kills nobody.
	other := Process{own.PID, own.StartTime - 1}
	if other.Alive() {
		t.Error("another process with our number lives")
	}
	kill(t, other)
	if err := other.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if err := own.Wait(within(t, 10*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	for _, none := range []Process{{}, {PID: -1}, {PID: 1 << 30}} {
		if none.Alive() {
			t.Errorf("%+v lives", none)
		}
		kill(t, none)
	}
	// A child that has ended and was not waited for.
	cmd := exec.Command("/bin/cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	child, err := Find(cmd.Process.Pid)
	if err != nil || !child.Alive() {
		t.Fatalf("%+v, %v", child, err)
	}
	in.Close()
	if err := child.Wait(within(t, 10*time.Second)); err != nil {
		t.Error(err)
	}
	if child.Alive() {
		t.Error("a zombie lives")
	}
	kill(t, child)
}

// A process that was written down is the same when it is read, unless the host booted in between.
func TestWritten(t *testing.T) {
	own, err := Find(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(own)
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]Process{
		string(b): own,
		// Without a boot, as it was written before.
		fmt.Sprintf(`{"PID":%d,"StartTime":%d}`, own.PID, own.StartTime):                  own,
		fmt.Sprintf(`{"PID":%d,"StartTime":%d,"Boot":"another"}`, own.PID, own.StartTime): Gone,
	} {
		var p Process
		if err := json.Unmarshal([]byte(text), &p); err != nil || p != want ||
			p.Alive() != (want == own) {
			t.Errorf("%s was read as %+v, %v; alive: %v", text, p, err, p.Alive())
		}
	}
}

// A stopped process does nothing until it is told to go on, and can be killed.
func TestStop(t *testing.T) {
	cmd := exec.Command("/bin/cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	child, err := Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	is := func(want bool) {
		t.Helper()
		if got, err := child.Stopped(); err != nil || got != want {
			t.Fatalf("stopped %v, %v; want %v", got, err, want)
		}
	}
	heard := make(chan byte)
	go func() {
		defer close(heard)
		var b [1]byte
		for {
			if _, err := out.Read(b[:]); err != nil {
				return
			}
			heard <- b[0]
		}
	}()
	is(false)
	if err := child.MayStop(); err != nil {
		t.Error(err)
	}
	for range 2 { // as often as one likes
		if err := child.Stop(within(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
		is(true)
	}
	if !child.Alive() {
		t.Error("a stopped process counts as ended")
	}
	in.Write([]byte("a"))
	select {
	case <-heard:
		t.Fatal("a stopped process answers")
	case <-time.After(50 * time.Millisecond):
	}
	if err := child.Continue(); err != nil {
		t.Fatal(err)
	}
	if b := <-heard; b != 'a' {
		t.Fatalf("heard %q", b)
	}
	is(false)
	if err := child.Stop(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	kill(t, child)
	if _, err := child.Stopped(); !errors.Is(err, ErrGone) {
		t.Errorf("a killed process: %v", err)
	}
	// The number of another process.
	own, err := Find(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	other := Process{own.PID, own.StartTime - 1}
	if err := errors.Join(other.Stop(t.Context()), other.Continue(),
		other.MayStop()); !errors.Is(err, ErrGone) {
		t.Errorf("another process: %v", err)
	}
}

func FuzzParseStat(f *testing.F) {
	own, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(own)
	f.Add([]byte("1 (a) b) (c) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 17 1 1"))
	f.Fuzz(func(t *testing.T, b []byte) { parseStat(b); parseState(b) })
}
