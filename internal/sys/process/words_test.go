package process

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// start runs a shell script whose messages go to a file.
// It is told to go on by in, and reaped when the test ends or end is called.
func start(t *testing.T, file, script string) (p Process, in io.WriteCloser, reap func()) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("sh", "-c", script)
	if in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = f
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reap = sync.OnceFunc(func() { cmd.Wait() })
	t.Cleanup(func() {
		cmd.Process.Kill()
		reap()
	})
	if p, err = Find(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	return p, in, reap
}

func TestMessages(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(file, []byte("of another process\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, in, reap := start(t, file,
		`read line; printf 'first\n\033[31mred\033[0m \377\n' >&2; exit 3`)
	m := MessagesOf(p.PID)
	defer m.Close()
	if got := m.Last(); got != "it left no message in "+file {
		t.Errorf("before: %q", got)
	}
	if _, err := io.WriteString(in, "go\n"); err != nil {
		t.Fatal(err)
	}
	go reap()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	how, err := p.End(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("ended %q", how)
	if how != "" && how != "with exit status 3" {
		t.Errorf("ended %q", how)
	}
	const want = "its last messages: first; ?[31mred?[0m ?"
	if got := m.Last(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	// Another one, which comes later, finds the same file, and no other of its name.
	again := m
	again.file = nil
	again = again.Reopen()
	defer again.Close()
	if got := again.Last(); got != want {
		t.Errorf("reopened: %q", got)
	}
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("a secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	other := m
	other.file = nil
	if got := other.Reopen().Last(); got != "its messages went to "+file {
		t.Errorf("another file of its name: %q", got)
	}
	if got := m.Last(); got != want {
		t.Errorf("renamed: %q", got)
	}
}

func TestLastWords(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	long := strings.Repeat("x", 5000) + "\n" + strings.Repeat("y", 900) + "\nend\n"
	for _, c := range []struct {
		text string
		from int64
		want string
	}{
		{"", 0, ""},
		{"one\n\ntwo\n", 0, "one; two"},
		{"one\ntwo\n", 4, "two"},
		{"cut\n", 4000, "cut"},
		{long, 0, strings.Repeat("y", 900) + "; end"},
		{strings.Repeat("é", 2000), 0, strings.Repeat("é", 500)},
	} {
		if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		if got := LastWords(f, c.from); got != c.want {
			t.Errorf("%.20q from %d: %q", c.text, c.from, got)
		}
		f.Close()
	}
}

// A process that is killed leaves no message. How it ended is told all the same where the kernel
// does.
func TestEndKilled(t *testing.T) {
	p, _, reap := start(t, filepath.Join(t.TempDir(), "log"), "exec sleep 100")
	done := make(chan string)
	go func() {
		how, err := p.End(t.Context())
		if err != nil {
			how = err.Error()
		}
		done <- how
	}()
	go reap()
	if err := p.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if how := <-done; how != "" && !strings.HasPrefix(how, "killed by signal 9") {
		t.Errorf("ended %q", how)
	}
}

func TestMessagesElsewhere(t *testing.T) {
	cmd := exec.Command("sleep", "100")
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		out.Close()
		cmd.Wait()
	}()
	if got := MessagesOf(cmd.Process.Pid).Last(); !strings.HasPrefix(got,
		"its messages went to pipe:[") {
		t.Errorf("%q", got)
	}
	if got := MessagesOf(1 << 30).Last(); got != "it is not known where its messages went" {
		t.Errorf("%q", got)
	}
}
