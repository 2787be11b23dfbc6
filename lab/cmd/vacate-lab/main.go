// Command vacate-lab makes real VMs on this machine, to try evictions and to measure them. It is
// not installed with vacate.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"time"

	"vacate/internal/cli"
	"vacate/lab"
	"vacate/lab/bench"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func main() {
	if err := rootCommand().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "vacate-lab:", err)
		os.Exit(1)
	}
}

// rootCommand has all commands of this program.
func rootCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "vacate-lab",
		Short: "try and measure evictions on this machine, with real VMs",
		Long: `A lab is two hosts, a and b, on this machine: network namespaces, each pinned to
a core, with a shaped link between them. Its VMs run Debian's stock kernel and a
load that knows what every byte of its memory should be. It needs root, and
qemu-system-x86 from Debian; the guest's kernel is downloaded once.`,
		Example: `  # A VM on host a, and its twin on host b that waits for it. Prints what to do next.
  vacate-lab up
  vacate-lab status
  vacate-lab down

  # The engine against QEMU's own post-copy, three times.
  vacate-lab bench --strategies vacate,qemu-postcopy --repeat 3`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	c.AddCommand(untilSignal(upCommand()), untilSignal(superviseCommand()),
		untilSignal(statusCommand()),
		execCommand(), untilSignal(downCommand()), untilSignal(benchCommand()),
		untilSignal(demoCommand()), untilSignal(paperCommand()),
		untilSignal(fleetsimCommand()), untilSignal(fleetfaultsCommand()),
		untilSignal(fleetdrainCommand()),
		untilSignal(fleetCommand()), untilSignal(fetchesCommand()))
	return c
}

// untilSignal has a signal end a command's context, so that it can clean up.
func untilSignal(c *cobra.Command) *cobra.Command {
	run := c.RunE
	c.RunE = func(c *cobra.Command, args []string) error {
		ctx, stop := cli.OnSignal(c.Context(),
			func(s syscall.Signal) error { return cli.Interrupted{Signal: s} })
		defer stop()
		c.SetContext(ctx)
		return run(c, args)
	}
	return c
}

// vmFlags are those that describe a VM.
type vmFlags struct {
	dir                    string
	memory, hot, idle      cli.MiB
	vcpus                  int
	load, kernel           string
	qemu, machine, devices string
	memfd, agent           bool
	link                   cli.Rate
	set                    *pflag.FlagSet
}

func (f *vmFlags) add(c *cobra.Command, linkFlag string) {
	f.link = 1e9
	fl := c.Flags()
	f.set = fl
	fl.StringVar(&f.dir, "dir", ".lab", "directory of the lab's cache and state")
	fl.StringVar(&f.load, "load", "hot",
		"what the guest does, and the VM for it: "+strings.Join(bench.Loads(), ", "))
	fl.Var(&f.memory, "memory", "the VM's memory (default: the load's)")
	fl.IntVar(&f.vcpus, "vcpus", 1, "the VM's CPUs")
	fl.Var(&f.hot, "hot", "memory that the guest works on all the time (default: the load's)")
	fl.Var(&f.idle, "idle", "memory that the guest has written once (default: the load's)")
	for _, name := range []string{"memory", "hot", "idle"} {
		fl.Lookup(name).DefValue = ""
	}
	var kernels []string
	for _, k := range lab.Kernels {
		kernels = append(kernels, k.Name)
	}
	fl.StringVar(&f.kernel, "kernel", "",
		"the guest's kernel, of Debian: "+strings.Join(kernels, ", ")+
			" (default: that of this machine's release)")
	fl.StringVar(&f.qemu, "qemu", "stock",
		"stock (in PATH), backports (newest of Debian 13) or backports12 (of Debian 12)")
	fl.StringVar(&f.machine, "machine", "pc", "QEMU's machine type, pc or q35")
	fl.StringVar(&f.devices, "devices", "",
		"bare, or full: disk, network, console port, balloon, VGA (default: the load's, else bare)")
	fl.BoolVar(&f.memfd, "memfd", false, "keep the VM's memory in a shared memfd")
	fl.BoolVar(&f.agent, "agent", false, "run vacate-guest in the guest")
	fl.Var(&f.link, linkFlag, "the link's rate each way, or none")
}

// spec returns the VM; it may download a QEMU.
func (f *vmFlags) spec(ctx context.Context) (lab.Spec, error) {
	s, err := bench.Spec(f.load)
	if err != nil {
		return s, err
	}
	if s.Kernel, err = lab.FindKernel(f.kernel); err != nil {
		return s, err
	}
	s.Machine, s.VCPUs, s.Memfd, s.Agent = f.machine, f.vcpus, f.memfd, f.agent
	if f.set.Changed("memory") {
		s.MemoryMiB = int(f.memory)
	}
	if f.set.Changed("hot") {
		s.Load.HotMiB = int(f.hot)
	}
	if f.set.Changed("idle") {
		s.Load.IdleMiB = int(f.idle)
	}
	if f.devices != "" {
		s.Devices = lab.Devices(f.devices)
	}
	if s.MemoryMiB == 0 || f.vcpus < 1 {
		return s, fmt.Errorf("a VM needs memory and at least 1 CPU")
	}
	if !oneOf(f.machine, "pc", "q35") {
		return s, fmt.Errorf("machine %q: want pc or q35", f.machine)
	}
	if !oneOf(f.devices, "", "bare", "full") {
		return s, fmt.Errorf("devices %q: want bare or full", f.devices)
	}
	switch f.qemu {
	case "stock":
		s.QEMU, err = lab.StockQEMU(ctx)
	case "backports":
		s.QEMU, err = lab.BackportsQEMU(ctx, f.dir)
	case "backports12":
		s.QEMU, err = lab.Backports12QEMU(ctx, f.dir)
	default:
		err = fmt.Errorf("qemu %q: want stock, backports or backports12", f.qemu)
	}
	return s, err
}

func oneOf(s string, values ...string) bool {
	for _, v := range values {
		if s == v {
			return true
		}
	}
	return false
}

func benchCommand() *cobra.Command {
	var (
		f          vmFlags
		opts       bench.Options
		json_, svg string
		verbose    bool
		pin        bool
		guest      string
		access     string
		place      string
	)
	c := &cobra.Command{
		Use:   "bench",
		Short: "compare ways to move a VM",
		Long: `Moves identically prepared VMs over the same link in every way asked for, in
turn, and prints what each cost: medians over the repetitions and their ranges,
then ratios to QEMU's own post-copy, or with --libvirt to that of virsh migrate.
The guest checks all of its memory after every move; a bad page is an error.
docs/bench.md explains the figures and the JSON.

Each run takes about 15 seconds, with a large load or pre-copy more. Nothing
else should run on the machine meanwhile.`,
		Example: `  vacate-lab bench --json result.json --svg throughput.svg
  vacate-lab bench --strategies vacate,qemu-postcopy --link none --repeat 5
  vacate-lab bench --load hot-process --kernel 6.12
  vacate-lab bench --accel kvm --agent --place scattered --link 10Gbit
  vacate-lab bench --memory 4G --hot 1G --idle 2G --link 10Gbit --devices full
  vacate-lab bench --libvirt --devices full --repeat 5
  vacate-lab bench --strategies vacate --profile profiles && go tool pprof profiles/evict-1.pprof`,
		Args: cobra.NoArgs,
	}
	f.add(c, "link")
	fl := c.Flags()
	fl.StringSliceVar(&opts.Strategies, "strategies",
		[]string{"vacate", "qemu-postcopy", "qemu-precopy", "stop-and-copy"},
		"of "+strings.Join(bench.Strategies(), ", ")+"; with --libvirt of "+
			strings.Join(bench.DomainStrategies(), ", ")+" (default: all of these)")
	fl.BoolVar(&opts.Libvirt, "libvirt", false,
		"the VM is a domain of libvirt's, which vacate evict and virsh migrate move")
	fl.StringVar(&opts.Release, "release", "",
		"with --libvirt: Debian's release whose libvirt and QEMU both hosts have, such as trixie "+
			"(default: the machine's)")
	fl.StringVar(&opts.Accel, "accel", "auto",
		"what the VMs run under, of "+strings.Join(bench.Accels(), ", ")+
			"; kvm takes the bare guest where Linux does not run under it")
	fl.StringVar(&guest, "guest", "linux",
		"linux, or bare: a guest without an operating system, for the loads hot, idle, zipf, "+
			"uniform and fresh-boot")
	fl.StringVar(&access, "access", "",
		"how hot pages are picked, uniform or zipf (default: the load's)")
	fl.StringVar(&place, "place", "",
		"where hot memory is, together or scattered (default: the load's)")
	fl.IntVar(&opts.Repeat, "repeat", 1, "repetitions")
	fl.BoolVar(&opts.Chain, "chain", false,
		"one guest for all strategies of a repetition, evicted to and fro (default: if all are "+
			"vacate's)")
	fl.DurationVar(&opts.PrecopyBound, "precopy-bound", 30*time.Second, "when to give pre-copy up")
	fl.BoolVar(&pin, "pin", true, "give each host a core of its own; else both share all")
	fl.StringVar(&opts.Profile, "profile", "",
		"directory for CPU profiles of vacate's two processes")
	fl.StringVar(&json_, "json", "", "file for the result as JSON (docs/bench.md)")
	fl.StringVar(&svg, "svg", "", "file for a plot of the guest's throughput")
	fl.BoolVarP(&verbose, "verbose", "v", false, "log every event of the QEMUs")
	c.RunE = func(c *cobra.Command, _ []string) error {
		var err error
		for _, name := range []string{json_, svg} {
			if err := writable(name); err != nil {
				return err
			}
		}
		if opts.Profile != "" {
			if err := os.MkdirAll(opts.Profile, 0o755); err != nil { // #nosec G301 -- results are for all to read
				return fmt.Errorf("directory for profiles: %w", err)
			}
		}
		if opts.Spec, err = f.spec(c.Context()); err != nil {
			return err
		}
		if !oneOf(guest, "linux", "bare") {
			return fmt.Errorf("guest %q: want linux or bare", guest)
		}
		if !oneOf(access, "", "uniform", "zipf") {
			return fmt.Errorf("access %q: want uniform or zipf", access)
		}
		if !oneOf(place, "", "together", "scattered") {
			return fmt.Errorf("place %q: want together or scattered", place)
		}
		opts.Spec.BareMetal = guest == "bare"
		if access != "" {
			opts.Spec.Load.Zipf = access == "zipf"
		}
		if place != "" {
			opts.Spec.Load.Mixed = place == "scattered"
		}
		opts.Load = f.load
		if opts.Libvirt && !fl.Changed("strategies") {
			opts.Strategies = bench.DomainStrategies()
		}
		if !opts.Libvirt && opts.Release != "" {
			return errors.New("--release is of a libvirt: it needs --libvirt")
		}
		if !fl.Changed("chain") && !opts.Libvirt {
			opts.Chain = bench.Alike(opts.Strategies)
		}
		level := slog.LevelInfo
		if verbose {
			level = slog.LevelDebug
		}
		opts.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
		opts.Lab = lab.Options{Dir: f.dir, Rate: uint64(f.link), NoPin: !pin, Log: opts.Log}
		opts.Done = func(r bench.Run) {
			opts.Log.Info("done", "strategy", r.Strategy, "rep", r.Rep, "outcome", r.Outcome)
		}
		result, err := bench.Measure(c.Context(), opts)
		if len(result.Runs) == 0 {
			return err
		}
		if e := result.Table(os.Stdout); e != nil {
			return e
		}
		if json_ != "" {
			var b bytes.Buffer
			if e := json.NewEncoder(&b).Encode(result); e != nil {
				return errors.Join(err, e)
			}
			if e := os.WriteFile(json_, b.Bytes(), 0o644); e != nil { // #nosec G306 -- results are for all to read
				return errors.Join(err, e)
			}
		}
		if svg != "" {
			var b bytes.Buffer
			if e := result.SVG(&b); e != nil {
				return errors.Join(err, e)
			}
			if e := os.WriteFile(svg, b.Bytes(), 0o644); e != nil { // #nosec G306 -- results are for all to read
				return errors.Join(err, e)
			}
		}
		return err
	}
	return c
}

// writable fails if a file cannot be written later on; "" is no file.
func writable(name string) error {
	if name == "" {
		return nil
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o644) // #nosec G302 -- results are for all to read
	if err != nil {
		return fmt.Errorf("result file: %w", err)
	}
	return f.Close()
}
