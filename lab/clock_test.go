package lab

import (
	"bufio"
	"os"
	"os/exec"
	"testing"
	"time"
)

// A process of its own tells the time of day on each line that it reads.
func TestJumpClock(t *testing.T) {
	if os.Getenv("VACATE_TEST_CLOCK") != "" {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			now := time.Now()
			os.Stdout.WriteString(now.Format(time.RFC3339Nano) + "\n")
		}
		os.Exit(0)
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	c := exec.Command("/proc/self/exe", "-test.run=^TestJumpClock$")
	c.Env = append(os.Environ(), "VACATE_TEST_CLOCK=1")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait()
	defer in.Close()
	said := bufio.NewScanner(out)
	ask := func() time.Time {
		in.Write([]byte("\n"))
		if !said.Scan() {
			t.Fatal("it has ended")
		}
		at, err := time.Parse(time.RFC3339Nano, said.Text())
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	before := time.Now()
	for _, by := range []time.Duration{0, time.Hour, -2 * time.Hour, 0} {
		if err := JumpClock(c.Process.Pid, by); err != nil {
			t.Fatal(err)
		}
		// What it tells lies between two readings here, but for the jump.
		at := ask().Add(-by)
		if at.Before(before) || at.After(time.Now()) {
			t.Errorf("a jump by %v: it tells %v", by, at)
		}
	}
}
