package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"

	"vacate/lab"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const labPort = 7601

func dirFlag(c *cobra.Command, dir *string) {
	c.Flags().StringVar(dir, "dir", ".lab", "directory of the lab's cache and state")
}

func upCommand() *cobra.Command {
	var f vmFlags
	c := &cobra.Command{
		Use:   "up",
		Short: "make a lab with a VM to evict",
		Long: `Makes two hosts and a link, boots a VM on host a, starts a twin on host b that
waits for it, and prints the commands that evict the VM. The lab lives in the
background until "vacate-lab down"; its log is lab.log in the lab's directory.`,
		Example: `  vacate-lab up
  vacate-lab up --memory 4G --hot 1G --idle 2G --devices full --rate 10Gbit`,
		Args: cobra.NoArgs,
	}
	f.add(c, "rate")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if _, err := f.spec(c.Context()); err != nil { // here, where it is seen
			return err
		}
		if err := startSupervisor(c, f.dir); err != nil {
			return err
		}
		s, err := lab.Status(c.Context(), f.dir)
		if err != nil {
			return err
		}
		return explainUp(os.Stdout, s, f.dir)
	}
	return c
}

// startSupervisor starts "vacate-lab supervise" with the same flags, in a
// session of its own, and waits until its lab is ready.
func startSupervisor(c *cobra.Command, dir string) error {
	if _, err := lab.Status(c.Context(), dir); err == nil {
		return fmt.Errorf("a lab is up already in %s: take it down first, with vacate-lab down",
			dir)
	} else if !errors.Is(err, lab.ErrNoLab) {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := []string{"supervise", "--ready-fd=3"}
	c.Flags().Visit(func(fl *pflag.Flag) {
		args = append(args, "--"+fl.Name+"="+fl.Value.String())
	})
	log, err := os.Create(filepath.Join(dir, "lab.log"))
	if err != nil {
		return fmt.Errorf("lab's log: %w", err)
	}
	defer log.Close()
	ready, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	cmd := exec.Command(self, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{write} // 3 there
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	write.Close()
	if err != nil {
		return fmt.Errorf("start the lab's supervisor: %w", err)
	}
	stop := context.AfterFunc(c.Context(), func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	// It says so when it is ready; if it ends first, it says nothing.
	said := make([]byte, len(readyWord))
	if _, err := io.ReadFull(ready, said); err == nil && string(said) == readyWord {
		return cmd.Process.Release()
	}
	err = cmd.Wait()
	if c.Context().Err() != nil {
		return context.Cause(c.Context())
	}
	text, _ := os.ReadFile(log.Name())
	return fmt.Errorf("the lab did not come up: %w: %s", err,
		strings.TrimSpace(string(text[max(0, len(text)-8192):])))
}

const readyWord = "ready\n"

// superviseCommand is what "vacate-lab up" leaves running.
func superviseCommand() *cobra.Command {
	var f vmFlags
	var fd int
	c := &cobra.Command{Use: "supervise", Short: "keep a lab up, in the foreground",
		Args: cobra.NoArgs, Hidden: true}
	f.add(c, "rate")
	c.Flags().IntVar(&fd, "ready-fd", -1, "descriptor to say on that the lab is ready")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if fd >= 0 {
			syscall.CloseOnExec(fd) // not for the VMs
		}
		spec, err := f.spec(c.Context())
		if err != nil {
			return err
		}
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		opts := lab.Options{Dir: f.dir, Rate: uint64(f.link), Log: log}
		return lab.Supervise(c.Context(), opts, spec, func(lab.State) {
			log.Info("ready")
			if fd >= 0 {
				pipe := os.NewFile(uintptr(fd), "ready")
				io.WriteString(pipe, readyWord)
				pipe.Close()
			}
		})
	}
	return c
}

// explainUp says what a new lab is for.
func explainUp(w io.Writer, s lab.State, dir string) error {
	if len(s.VMs) != 2 || len(s.Hosts) != 2 {
		return fmt.Errorf("the lab has %d hosts and %d VMs, not 2 and 2", len(s.Hosts), len(s.VMs))
	}
	self := os.Args[0]
	program := "vacate"
	if strings.Contains(self, "/") {
		program = filepath.Join(filepath.Dir(self), program)
	}
	at := ""
	if dir != ".lab" {
		at = " --dir " + dir
	}
	to := fmt.Sprintf("%s:%d", s.Hosts[1].Addr, labPort)
	_, err := fmt.Fprintf(w, `The lab is up: a VM runs on host a, and its twin waits on host b. Evict it:

  %[1]s exec b%[2]s -- %[6]s receive --qmp %[4]s --listen %[5]s &
  %[1]s exec a%[2]s -- %[6]s evict --qmp %[3]s --to %[5]s

Look at it, and end it:

  %[1]s status%[2]s
  %[1]s down%[2]s
`, self, at, s.VMs[0].QMP, s.VMs[1].QMP, to, program)
	return err
}

func statusCommand() *cobra.Command {
	var (
		dir    string
		asJSON bool
	)
	c := &cobra.Command{
		Use:   "status",
		Short: "show the lab that is up: hosts, VMs, the guest's work",
		Args:  cobra.NoArgs,
	}
	dirFlag(c, &dir)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.RunE = func(c *cobra.Command, _ []string) error {
		s, err := lab.Status(c.Context(), dir)
		if err != nil {
			return err
		}
		if asJSON {
			enc := json.NewEncoder(os.Stdout)
			enc.SetIndent("", "  ")
			return enc.Encode(s)
		}
		return showStatus(os.Stdout, s)
	}
	return c
}

func showStatus(out io.Writer, s lab.State) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "HOST\tADDRESS\tCORE\tVM\tSTATUS\tPID\tQMP")
	for _, h := range s.Hosts {
		core := "any"
		if h.Core >= 0 {
			core = fmt.Sprint(h.Core)
		}
		any := false
		for _, vm := range s.VMs {
			if vm.Host == h.Name {
				any = true
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\n", h.Name, h.Addr, core, vm.Name,
					vm.Status, vm.PID, vm.QMP)
			}
		}
		if !any {
			fmt.Fprintf(w, "%s\t%s\t%s\t-\t-\t-\t-\n", h.Name, h.Addr, core)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	g := &s.Guest
	if _, err := fmt.Fprintf(out,
		"\nThe guest works on %.0f pages per second, %d so far; %d bad.\n", g.PagesPerSecond,
		g.Pages, g.Bad); err != nil {
		return err
	}
	if g.Error != "" {
		return fmt.Errorf("the guest's load: %s", g.Error)
	}
	return nil
}

func downCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{Use: "down", Short: "end the lab that is up, with all of its VMs",
		Args: cobra.NoArgs}
	dirFlag(c, &dir)
	c.RunE = func(c *cobra.Command, _ []string) error { return lab.Down(c.Context(), dir) }
	return c
}

func execCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "exec HOST -- COMMAND [ARGUMENT...]",
		Short: "run a command on a host of the lab",
		Long:  `Becomes the command, in the network namespace and on the core of host a or b.`,
		Example: `  vacate-lab exec a -- ping -c 3 10.77.0.2
  vacate-lab exec b -- ip address`,
		Args: func(c *cobra.Command, args []string) error {
			if c.ArgsLenAtDash() != 1 || len(args) < 2 {
				return errors.New("want a host, --, and a command: vacate-lab exec a -- ip address")
			}
			return nil
		},
	}
	dirFlag(c, &dir)
	c.RunE = func(c *cobra.Command, args []string) error { return lab.Exec(dir, args[0], args[1:]) }
	return c
}
