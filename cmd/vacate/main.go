// Command vacate evicts a running VM from this host to another. `vacate --help` tells how.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"unicode"

	"vacate/internal/evict"

	"github.com/spf13/cobra"
)

func main() { os.Exit(run()) }

func run() (code int) {
	stop, err := profile(os.Getenv("VACATE_CPUPROFILE"))
	if err == nil {
		c, failed := rootCommand().ExecuteContextC(context.Background())
		err = errors.Join(plainly(c, failed), stop())
		if asJSON, _ := c.Flags().GetBool("json"); asJSON && err != nil {
			writeError(os.Stdout, err)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, explain(err))
	}
	return exitCode(err)
}

// Exit codes. exitHelp tells users of them.
const (
	exitCompleted = 0
	exitUsage     = 1
	exitRefused   = 2
	exitAborted   = 3
	exitLost      = 4
	exitDetached  = 5
)

const exitHelp = `Exit codes:
  0  completed; or shut down: the guest ended itself on the destination
  1  usage or internal error
  2  refused: nothing was touched, the VM runs on the source
  3  aborted: the VM runs on the source, after a moment's pause at worst
  4  lost contact: the message says where the VM is and what to do
  5  the eviction goes on without this command`

// exitCode is that of an error; of those of several VMs, the worst one's.
func exitCode(err error) int {
	switch {
	case err == nil:
		return exitCompleted
	case errors.Is(err, evict.ErrLost):
		return exitLost
	case errors.Is(err, errDetached), errors.Is(err, evict.ErrLeft):
		return exitDetached
	case errors.Is(err, evict.ErrAborted):
		return exitAborted
	case errors.Is(err, evict.ErrRefused):
		return exitRefused
	}
	return exitUsage
}

// refused is an error from before an eviction was begun.
func refused(err error) error {
	return &evict.Error{Outcome: evict.ErrRefused, State: evict.Preparing, Err: err,
		Remedy: "Nothing was touched"}
}

// explain puts an error in one or two lines: what happened; where the VM is and what to do.
func explain(err error) string {
	var some *notMoved
	if errors.As(err, &some) {
		return "vacate: " + some.Error()
	}
	var of *ended
	if errors.As(err, &of) {
		return "vacate: " + cleanLines(of.Error())
	}
	var e *evict.Error
	if !errors.As(err, &e) {
		return "vacate: " + clean(err.Error())
	}
	s := fmt.Sprintf("vacate: %v while %s: %s", e.Outcome, e.State, clean(e.Err.Error()))
	if e.Remedy != "" {
		s += "\n" + clean(e.Remedy) + "."
	}
	return s
}

// clean makes a text that may quote a peer, a file or a guest fit for one line of a terminal.
func clean(s string) string {
	s = strings.NewReplacer(".\n", ". ", "\n", "; ").Replace(strings.TrimSpace(s))
	return strings.Map(func(r rune) rune {
		if unicode.IsGraphic(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

func rootCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "vacate",
		Short: "Evict a running VM to another host",
		Long: `vacate moves a running QEMU VM off this host. The VM runs on the other host at
once; its memory follows, each page once, and pages that the VM waits for first.
QEMU (7.2 to 11.1 were tried) and the guest are unmodified. Until the VM runs on
the destination, an eviction can be aborted, and any failure aborts it: the VM
then runs on here.

With a daemon, vacated, on each host (see vacated --help):
  vacate ls                        the VMs of this host
  vacate doctor web1 --to hostb    what would block the eviction of web1
  vacate evict web1 --to hostb     evict it
  vacate status                    evictions under way, and the latest
  vacate relieve                   evict VMs until no VM here starves
Evictions then survive the death of either daemon and of the link.

Without a daemon:
  1. On the destination, start a QEMU with the source's command line, and
     -S -incoming defer in addition.
  2. On the destination:  vacate receive --qmp SOCKET --listen HOST:PORT
  3. On the source:       vacate evict --qmp SOCKET --to HOST:PORT
Both end when the destination has all memory; the source's QEMU is killed.
vacate receive --help says how to start the QEMUs.

` + exitHelp + `

Environment:
  VACATE_SOCKET=SOCKET    the socket of this host's daemon
  VACATE_CPUPROFILE=FILE  write a CPU profile of this process there (pprof)`,
		Version:           version(),
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	c.SetVersionTemplate("vacate {{.Version}}\n")
	c.SetUsageTemplate(strings.ReplaceAll(c.UsageTemplate(), ".FlagUsages ",
		".FlagUsagesWrapped 80 "))
	c.SetFlagErrorFunc(badFlag)
	c.AddCommand(evictCommand(), receiveCommand(), certsCommand(), inspectCommand(), manCommand())
	c.AddCommand(fleetCommand())
	c.AddCommand(hostCommands()...)
	addCompletions(c)
	speakPlainly(c)
	return c
}

// version is what the binary knows of its build.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "of unknown build"
	}
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	v := info.Main.Version
	if v == "" {
		v = "(devel)"
	}
	if rev := settings["vcs.revision"]; len(rev) >= 12 && !strings.Contains(v, rev[:12]) {
		v += " " + rev[:12]
		if settings["vcs.modified"] == "true" {
			v += " with changes"
		}
	}
	return fmt.Sprintf("%s, %s %s/%s", v, info.GoVersion, settings["GOOS"], settings["GOARCH"])
}

// profile writes a CPU profile to file until stop is called; an empty name means none.
func profile(file string) (stop func() error, err error) {
	if file == "" {
		return func() error { return nil }, nil
	}
	f, err := os.Create(file) // #nosec G703 -- who sets the variable also starts the program
	if err != nil {
		return nil, fmt.Errorf("VACATE_CPUPROFILE: %w", err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(fmt.Errorf("VACATE_CPUPROFILE: %w", err), f.Close())
	}
	return func() error {
		pprof.StopCPUProfile()
		if err := f.Close(); err != nil {
			return fmt.Errorf("VACATE_CPUPROFILE: %w", err)
		}
		return nil
	}, nil
}
