package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"vacate/lab"
	"vacate/lab/daemons"

	"github.com/spf13/cobra"
)

// usualUIPort is where the page of a lab's fleet is, unless another port is asked for.
const usualUIPort = 7680

func fleetCommand() *cobra.Command {
	var dir string
	var n, vms int
	var page uint16
	c := &cobra.Command{
		Use:   "fleet",
		Short: "make a fleet with real daemons and VMs, to try it",
		Long: `Makes a fleet on this machine: hosts, each with a vacated; three members of the
brain, vacate-fleet; and some small VMs. Prints how to ask it, and the address of
its page. It is there until Ctrl-C, or "vacate-lab down". vacate, vacated and
vacate-fleet must be in the same directory as this program.`,
		Example: `  vacate-lab fleet
  vacate-lab fleet --hosts 8 --vms 12`,
		Args: cobra.NoArgs,
	}
	dirFlag(c, &dir)
	c.Flags().IntVar(&n, "hosts", 5, "how many hosts")
	c.Flags().IntVar(&vms, "vms", 6, "how many VMs")
	c.Flags().Uint16Var(&page, "ui-port", usualUIPort, "`PORT` on 127.0.0.1 for the page")
	c.RunE = func(c *cobra.Command, _ []string) (err error) {
		if n < 2 || n > daemons.MostHosts || vms < 0 || vms > 4*n {
			return fmt.Errorf("--hosts: from 2 to %d; --vms: 4 for each host at most",
				daemons.MostHosts)
		}
		ctx := c.Context()
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		f, err := newFleet(ctx, lab.Options{Dir: dir, Rate: 1e9, NoPin: true, Log: log}, n)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		unpublish, err := f.Lab.Publish(ctx)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, unpublish()) }()
		for i := range vms {
			name := fmt.Sprint("web", i+1)
			if _, err := f.Boot(ctx, f.Hosts[i%n], name, restingVM(i)); err != nil {
				return err
			}
			log.Info("a VM runs", "vm", name, "host", daemons.Name(f.Hosts[i%n]))
		}
		stop, err := servePage(ctx, f, page)
		if err != nil {
			return err
		}
		defer stop()
		explainFleet(os.Stdout, f, dir)
		<-ctx.Done()
		return nil
	}
	return c
}

// newFleet makes a lab with a fleet of so many hosts, and starts it.
func newFleet(ctx context.Context, opts lab.Options, n int) (*daemons.Fleet, error) {
	program, err := lab.Program("vacate")
	if err != nil {
		return nil, err
	}
	f, err := daemons.NewFleet(ctx, daemons.FleetOptions{Lab: opts, Hosts: n, Vacate: program,
		Interval: time.Second})
	if err != nil {
		return nil, err
	}
	if err := f.Begin(ctx); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// restingVM is a small VM that rests most of the time, of one of some sizes.
func restingVM(i int) lab.Spec {
	return lab.Spec{BareMetal: true, MemoryMiB: 128 + 64*(i%3),
		Load: lab.Load{HotMiB: 8, IdleMiB: 64 + 48*(i%3), Slow: true, Seed: uint64(i + 1)}}
}

// servePage has the page of all hosts served in the lab's network, and here.
func servePage(ctx context.Context, f *daemons.Fleet, port uint16) (stop func(),
	err error) {
	program, err := lab.Program("vacate")
	if err != nil {
		return nil, err
	}
	address := fmt.Sprintf("127.0.0.1:%d", port)
	ln, err := net.Listen("tcp4", address)
	if err != nil {
		return nil, err
	}
	relay := lab.NewRelay(ln, func() (net.Conn, error) {
		return f.Lab.Client.Dial(ctx, "tcp4", address)
	}, 0)
	args := []string{"ui", "--port", fmt.Sprint(port), "--operator-certs", f.OperatorCerts()}
	for _, h := range f.APIs() {
		args = append(args, "--host", h)
	}
	fmt.Print("The page is at ")
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := f.Lab.Client.Start(cmd); err != nil {
		relay.Close()
		return nil, err
	}
	return func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		relay.Close()
	}, nil
}

// explainFleet says how a fleet is asked.
func explainFleet(w io.Writer, f *daemons.Fleet, dir string) {
	self := os.Args[0]
	program := "vacate"
	if strings.Contains(self, "/") {
		program = filepath.Join(filepath.Dir(self), program)
	}
	at := ""
	if dir != ".lab" {
		at = " --dir " + dir
	}
	fmt.Fprintf(w, `
The fleet is up. Ask it:

  ask="%[1]s exec client%[2]s -- env VACATE_FLEET=%[3]s %[4]s fleet"
  key="--operator-certs %[5]s"
  $ask status $key
  $ask hosts --vms $key
  $ask drain hosta $key
  $ask decisions $key

Logs are in %[6]s/*/log. Ctrl-C ends it.

`, self, at, f.Members(), program, f.OperatorCerts(), f.Dir())
}
