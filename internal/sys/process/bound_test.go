package process

import (
	"bufio"
	"io"
	"os/exec"
	"runtime"
	"strings"
	"testing"
)

// A command goes on although threads of this process end, and so may the one that started it.
func TestStartBound(t *testing.T) {
	var in []io.WriteCloser
	var out []*bufio.Reader
	for range 8 {
		cmd := exec.Command("cat")
		w, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		r, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := StartBound(cmd, cmd.Start); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		in, out = append(in, w), append(out, bufio.NewReader(r))
	}
	for range 200 {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			runtime.LockOSThread() // and never unlocked: the thread ends
		}()
		<-ended
	}
	for i := range in {
		if _, err := io.WriteString(in[i], "still here\n"); err != nil {
			t.Fatal(err)
		}
		if line, err := out[i].ReadString('\n'); err != nil || line != "still here\n" {
			t.Fatalf("command %d: %q, %v", i, line, err)
		}
	}
}

// A command that cannot be started is an error as usual.
func TestStartBoundFails(t *testing.T) {
	cmd := exec.Command("/nowhere/none")
	if err := StartBound(cmd, cmd.Start); err == nil || !strings.Contains(err.Error(), "no such") {
		t.Error(err)
	}
}
