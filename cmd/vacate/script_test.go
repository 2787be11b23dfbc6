package main

import (
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(attentive{m}, map[string]func(){"vacate": main})
}

// attentive runs tests that ignore no signal, and so neither do the processes that they start.
// SIGHUP is ignored under nohup, and SIGINT in the background of a script. A command that runs in
// this process would bring that back at its end, if nobody else waited for these signals.
type attentive struct{ *testing.M }

func (a attentive) Run() int {
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGHUP} {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	return a.M.Run()
}

// haltingBIOS is a BIOS that does nothing: a VM with it runs, and takes no CPU time.
var haltingBIOS = bytes.Repeat([]byte{0xf4}, 64<<10) // hlt

// The scripts that need a QEMU give it no disk and haltingBIOS.
func TestScripts(t *testing.T) {
	golden, err := filepath.Abs("../../internal/qemu/migstream/testdata")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("GOLDEN", golden)
			if err := os.WriteFile(filepath.Join(env.WorkDir, "bios.bin"), haltingBIOS,
				0o644); err != nil {
				return err
			}
			return nil
		},
		Condition: func(cond string) (bool, error) {
			// "qemu": there is one, or there must be.
			_, err := exec.LookPath("qemu-system-x86_64")
			return err == nil || os.Getenv("VACATE_REQUIRE") == "1", nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"waitfor": waitFor,
			"serve":   serve,
			"poke":    poke,
			"port":    port,
		},
	})
}

// waitFor FILE waits until there is such a file.
func waitFor(ts *testscript.TestScript, _ bool, args []string) {
	for range 1000 {
		if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("there is no %s", args[0])
}

// serve VAR TEXT listens on a port of the loopback and sets VAR to its address; serve
// unix:FILE TEXT listens on a unix socket. Each client gets the text, then the end.
func serve(ts *testscript.TestScript, _ bool, args []string) {
	network, addr := "tcp", "127.0.0.1:0"
	if len(args[0]) > 5 && args[0][:5] == "unix:" {
		network, addr = "unix", ts.MkAbs(args[0][5:])
	}
	ln, err := net.Listen(network, addr)
	ts.Check(err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, args[1])
			c.Close()
		}
	}()
	ts.Defer(func() {
		ln.Close()
		<-done
	})
	if network == "tcp" {
		ts.Setenv(args[0], ln.Addr().String())
	}
}

// port VAR FILE sets VAR to the address in the first line of FILE, which is that of vacate receive.
func port(ts *testscript.TestScript, _ bool, args []string) {
	for range 1000 {
		b, _ := os.ReadFile(ts.MkAbs(args[1]))
		if i := len("listening on "); len(b) > i {
			for n := i; n < len(b); n++ {
				if b[n] == '\n' {
					ts.Setenv(args[0], string(b[i:n]))
					return
				}
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("vacate receive does not listen")
}

// poke ADDRESS TEXT sends a text and waits until the other side hangs up.
func poke(ts *testscript.TestScript, _ bool, args []string) {
	c, err := net.Dial("tcp", args[0])
	ts.Check(err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(c, args[1])
	if _, err := io.ReadAll(c); os.IsTimeout(err) {
		ts.Fatalf("the other side does not hang up on %q", args[1])
	}
}
