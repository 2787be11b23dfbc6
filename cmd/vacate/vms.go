package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
)

func startCommand() *cobra.Command {
	var fenced []string
	c := askCommand(&cobra.Command{
		Use:   "start VM",
		Short: "Start a VM on this host, from its disks",
		Long: `Starts the QEMU that the VM's description has, and returns when that answers.
Two copies of a VM spoil its disks. So it is refused where this host's journal
has an eviction of the VM that goes on, where a QEMU of it is here, or where
any other host has it, or does not say that it has not.

  --fenced HOST  You assert that HOST is powered off, or cut off from the VM's
                 disks and from the network, or that it has no QEMU of the VM.
                 That counts only if it does not answer. If you are wrong, two
                 copies run.`,
		Example: `  vacate start web1
  vacate start web1 --fenced hostb`,
		Args: cobra.ExactArgs(1),
	}, func(ctx context.Context, d *daemon, args []string, w io.Writer) (proto.Message, error) {
		r, err := d.Start(ctx,
			connect.NewRequest(&hostv1.StartRequest{Vm: args[0], Fenced: fenced}))
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(w, "%s: %s (process %d)\n", clean(r.Msg.Name), clean(r.Msg.State), r.Msg.Pid)
		return r.Msg, nil
	})
	c.Flags().StringArrayVar(&fenced, "fenced", nil,
		"assert that `HOST` does not run the VM; may be given several times")
	return c
}

func stopCommand() *cobra.Command {
	var timeout time.Duration
	var force bool
	c := askCommand(&cobra.Command{
		Use:   "stop VM",
		Short: "Shut down a VM of this host by its power button",
		Long: `Presses the VM's power button (ACPI), and returns when its guest has powered
itself off and its QEMU has ended. A guest that takes longer than --timeout, or
does not heed the button, runs on; with --force, its QEMU is ended then, as by
a loss of power. A VM that is being evicted is not touched.`,
		Example: `  vacate stop web1
  vacate stop web1 --timeout 0 --force`,
		Args: cobra.ExactArgs(1),
	}, func(ctx context.Context, d *daemon, args []string, w io.Writer) (proto.Message, error) {
		if timeout < 0 || timeout == 0 && !force {
			return nil,
				fmt.Errorf("--timeout %v: the guest needs some time to power itself off, unless "+
					"--force ends it", timeout)
		}
		r, err := d.Stop(ctx,
			connect.NewRequest(&hostv1.StopRequest{Vm: args[0],
				TimeoutMs: uint32(min(timeout, 24*time.Hour).Milliseconds()), Force: force}))
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(w, "%s: %s\n", clean(r.Msg.Name), clean(r.Msg.State))
		return r.Msg, nil
	})
	c.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "how long the guest may take")
	c.Flags().BoolVar(&force, "force", false, "end its QEMU if it takes longer")
	return c
}

func showCommand() *cobra.Command {
	var command, incoming bool
	c := askCommand(&cobra.Command{
		Use:   "show VM",
		Short: "Show this host's description of a VM, filled in",
		Long: `Shows the description that this host has of a VM, with all that stands for
something else replaced. With --command, only the command line that vacate
start starts, for a shell; with --incoming, that of the QEMU that waits for the
VM to come here.`,
		Args: cobra.ExactArgs(1),
	}, func(ctx context.Context, d *daemon, args []string, w io.Writer) (proto.Message, error) {
		r, err := d.ShowVM(ctx, connect.NewRequest(&hostv1.ShowVMRequest{Vm: args[0]}))
		if err != nil {
			return nil, err
		}
		m := r.Msg
		switch {
		case incoming:
			fmt.Fprintln(w, shellWords(m.IncomingCommand))
			return m, nil
		case command:
			fmt.Fprintln(w, shellWords(m.Command))
			return m, nil
		}
		for _, line := range [][2]string{{"description", m.File}, {"qmp", m.Qmp}, {"user", m.User},
			{"log", m.Log}} {
			if line[1] != "" {
				fmt.Fprintf(w, "%-12s %s\n", line[0], clean(line[1]))
			}
		}
		for _, key := range slices.Sorted(maps.Keys(m.Env)) {
			fmt.Fprintf(w, "%-12s %s=%s\n", "env", clean(key), clean(m.Env[key]))
		}
		fmt.Fprintf(w, "%-12s %s\n", "command", shellWords(m.Command))
		return m, nil
	})
	c.Flags().BoolVar(&command, "command", false, "only the command line")
	c.Flags().BoolVar(&incoming, "incoming", false, "only that of the QEMU that waits for the VM")
	return c
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// shellWords are arguments as a shell takes them.
func shellWords(args []string) string {
	var words []string
	for _, a := range args {
		if !plainWord.MatchString(a) {
			a = "'" + strings.ReplaceAll(clean(a), "'", `'\''`) + "'"
		}
		words = append(words, a)
	}
	return strings.Join(words, " ")
}
