// Command vacate-guest is the agent in a Linux guest for x86-64. When the host evicts the VM, it
// asks over the virtio-serial port org.vacate.agent. The agent answers what each page of the guest
// is used for, which processes are active, and which pages were used lately. Between evictions it
// sleeps, unless told to clear accessed bits now and then.
//
// Package agent has the protocol, docs/agent.md how to install it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

const usage = `vacate-guest tells the host what the pages of this guest are used for, when the host
evicts the VM. It serves the virtio-serial port org.vacate.agent until it is ended, and
sleeps until it is asked. It must run as root.

usage: vacate-guest [flags]

flags:
`

func main() {
	err := run(os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "vacate-guest:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("vacate-guest", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		if _, ok := stderr.(*os.File); ok {
			flags.SetOutput(stdout)
		}
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	port := flags.String("port", "",
		"the port's device `file`; default: found by the port's name, waited for if not there")
	clear := flags.Duration("clear", 0,
		"clear the processes' accessed bits this often (at least 10s; 0: only when the host "+
			"says so); stretched to stay below 0.05 % of a CPU")
	show := flags.Bool("print", false, "print what the host would be told, and end")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q: see --help", flags.Arg(0))
	}
	if *clear != 0 && *clear < 10*time.Second {
		return errors.New("clear: at least 10s, or 0")
	}
	g := newGuest("/proc", "/sys")
	if err := g.check(); err != nil {
		return err
	}
	if *show {
		return g.print(stdout)
	}
	// An answer that is late is worth nothing, and this sleeps until it is asked. Linux has a
	// priority for each thread; new ones inherit it. Where it may not be raised, so be it.
	threads, _ := pids("/proc/self/task")
	for _, tid := range threads {
		unix.Setpriority(unix.PRIO_PROCESS, tid, -10)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	return serve(ctx, g, *port, *clear, stderr)
}
