package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"vacate/internal/cli"
	"vacate/internal/evict"
	"vacate/internal/guest/inspect"
	"vacate/internal/guest/linux"
	"vacate/internal/guest/pageclass"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func inspectMemoryCommand() *cobra.Command {
	var o memoryOptions
	c := &cobra.Command{
		Use:   "memory {--qmp SOCKET | CORE}",
		Short: "Show what a Linux guest uses its memory for",
		Long: `Shows what each page of a Linux guest is used for, read from outside: nothing
need be installed in the guest. Of a running VM, it learns about the kernel
while the VM runs, then freezes it (QMP stop) for the moment of the survey.
Then it resumes it (cont), whatever happens: Ctrl-C, errors, time-outs. A VM
that was paused stays paused. CORE is an ELF core file of QEMU's
dump-guest-memory.

The guest must be Linux on x86-64 that tells of itself by VMCOREINFO and BTF,
as distributions' kernels do (5.10 and later were tried).

Pages are of a class, by how soon a VM that was moved needs them, and of a kind,
as finely as the guest's own records tell. Those that are free and skippable
need not be moved when the VM is. A page of several processes counts for one.

--map draws all of the memory, by address, in the colours of the classes.

With --json, standard output is one line {"memory":{...},"type":"memory"};
docs/inspect.md documents it.

Exit codes:
  0  completed
  1  usage or internal error, or a file that cannot be read or written
  2  refused: this guest cannot be read; the VM was not touched
  3  aborted: failed or interrupted; the VM runs on if it did before
  4  lost contact: the VM may stand still; the message says what to do`,
		Example: `  vacate inspect memory --qmp /run/vm7.qmp
  vacate inspect memory --qmp /run/vm7.qmp --map vm7.svg --json >vm7.json
  vacate inspect memory --map vm7.png vm7.core
A core file is made by QEMU's monitor:
  {"execute":"dump-guest-memory",
   "arguments":{"paging":false,"protocol":"file:/tmp/vm7.core"}}`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 1 {
				o.core = args[0]
			}
			if (o.core == "") == (o.qmp == "") {
				return errors.New("name either a VM's monitor, by --qmp SOCKET, or a core file; " +
					"see `vacate inspect memory --help`")
			}
			return o.run(c.Context())
		},
	}
	c.Flags().StringVar(&o.qmp, "qmp", "", "`SOCKET` (QMP) of the VM's QEMU")
	c.Flags().StringVar(&o.picture, "map", "",
		"draw the memory in `FILE`, which ends in .svg or .png")
	c.Flags().BoolVar(&o.json, "json", false, "JSON on standard output")
	c.Flags().BoolVar(&o.all, "all", false, "list all processes, not only the first 20")
	c.Flags().DurationVar(&o.limit, "freeze-limit", 5*time.Second,
		"give up when the VM would stand still for longer")
	return c
}

type memoryOptions struct {
	qmp, core string
	picture   string
	json, all bool
	limit     time.Duration // of standing still
}

// attachLimit is how long it may take to find the way in the guest's memory, while it runs.
const attachLimit = 2 * time.Minute

func (o memoryOptions) run(ctx context.Context) (err error) {
	var picture *pictureFile
	if o.picture != "" {
		if picture, err = reservePicture(o.picture); err != nil {
			return err
		}
		defer picture.discard()
	}
	if o.limit <= 0 {
		return fmt.Errorf("--freeze-limit %v leaves no time: name one such as 5s", o.limit)
	}
	ctx, stop := cli.OnSignal(ctx, func(s syscall.Signal) error {
		fmt.Fprintf(os.Stderr, "%s: giving up.\n", unix.SignalName(s))
		return cli.Interrupted{Signal: s}
	})
	defer stop()
	var found *finding
	if o.core != "" {
		found, err = surveyCore(ctx, o.core)
	} else {
		found, err = surveyVM(ctx, o.qmp, o.limit)
	}
	if err != nil {
		return teach(err)
	}
	m := inspect.NewMemory(found.survey)
	m.Source, m.Kernel, m.Times = found.source, found.kernel, found.times
	m.Notes = append(m.Notes, found.notes...)
	if picture != nil {
		if err := picture.write(inspect.NewMap(found.survey,
			"Memory of a guest with Linux "+m.Kernel)); err != nil {
			return err
		}
	}
	if ctx.Err() != nil { // the VM runs on already
		return fmt.Errorf("%w: %w", evict.ErrAborted, context.Cause(ctx))
	}
	out := bufio.NewWriter(os.Stdout)
	if o.json {
		err = writeValue(out, "memory", &m)
	} else {
		out.WriteString(memoryText(m, found.paused, o.all))
	}
	return errors.Join(err, out.Flush())
}

// A finding is a survey and what goes with it.
type finding struct {
	survey *pageclass.Survey
	source string
	kernel string
	paused bool // the VM stood still before, and still does
	notes  []string
	times  inspect.Times
}

// take surveys a guest that stands still.
func (f *finding) take(ctx context.Context, g *linux.Guest) error {
	r, err := g.Survey(ctx)
	if err != nil {
		return err
	}
	f.survey, f.kernel, f.notes = &r.Survey, r.Release, r.Notes
	t := r.Timings
	f.times.Stages = []inspect.Stage{
		{Name: "validation", Seconds: t.Validate.Seconds()},
		{Name: "page descriptors", Seconds: t.Scan.Seconds()},
		{Name: "free lists", Seconds: t.FreeLists.Seconds()},
		{Name: "processes and page tables", Seconds: t.Census.Seconds()},
	}
	return nil
}

// surveyVM surveys the guest of a QEMU, which stands still meanwhile.
func surveyVM(ctx context.Context, path string, limit time.Duration) (*finding, error) {
	f := &finding{source: "vm"}
	start := time.Now()
	attaching, cancel := context.WithTimeoutCause(ctx, attachLimit,
		fmt.Errorf("it took longer than %v", attachLimit))
	defer cancel()
	refuse := func(err error) error {
		outcome := evict.ErrRefused
		if ctx.Err() != nil { // interrupted
			outcome = evict.ErrAborted
		}
		return fmt.Errorf("%w: %w; the VM was not touched", outcome, cause(attaching, err))
	}
	c, err := qmp.Dial(attaching, path)
	if err != nil {
		return nil, refuse(err)
	}
	defer c.Close()
	mem, err := guestmem.Attach(attaching, c)
	if err != nil {
		return nil, refuse(err)
	}
	defer mem.Close()
	live, err := linux.NewLive(mem, c)
	if err != nil {
		return nil, refuse(err)
	}
	guest, err := linux.Attach(attaching, live)
	if err == nil {
		err = guest.Rehearse(attaching)
	}
	if err != nil {
		return nil, refuse(err)
	}
	f.times.Attach = time.Since(start).Seconds()
	stood, paused, err := still(ctx, path, c, limit,
		func(ctx context.Context) error { return f.take(ctx, guest) })
	if err != nil {
		return nil, err
	}
	f.paused, f.times.Frozen = paused, stood.Seconds()
	return f, nil
}

// surveyCore surveys the guest in a core file.
func surveyCore(ctx context.Context, name string) (*finding, error) {
	f := &finding{source: "core"}
	start := time.Now()
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil,
			fmt.Errorf("%s is no regular file: name a core file, or a VM's monitor by --qmp", name)
	}
	if what := sniff(file); what != "" {
		return nil,
			fmt.Errorf("%s is %s: name an ELF core file, which QEMU's dump-guest-memory makes "+
				"without a format or paging", name, what)
	}
	core, err := linux.OpenCore(file, info.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	guest, err := linux.Attach(ctx, core)
	if err == nil {
		f.times.Attach = time.Since(start).Seconds()
		err = f.take(ctx, guest)
	}
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%w: %w", evict.ErrAborted, context.Cause(ctx))
	case err != nil:
		return nil, fmt.Errorf("%w: %s: %w", evict.ErrRefused, name, err)
	}
	return f, nil
}

// sniff names a file of a kind that is easily taken for a core file; others are "".
func sniff(r io.ReaderAt) string {
	var head [16]byte
	n, _ := r.ReadAt(head[:], 0)
	for magic, what := range map[string]string{
		"KDUMP   ":         "a compressed dump in the format of kdump",
		"makedumpfile":     "a compressed dump in the format of kdump, flattened",
		"PAGEDU64":         "a dump in the format of Windows",
		"\x1f\x8b":         "compressed by gzip",
		"\x28\xb5\x2f\xfd": "compressed by zstd",
		"\xfd7zXZ":         "compressed by xz",
		"QEVM":             "a migration stream of QEMU (see `vacate inspect stream`)",
		"LibvirtQemudSave": "a VM saved by libvirt",
		"QFI\xfb":          "a disk image",
		"\x7fELF\x01":      "an ELF file of 32 bits",
	} {
		if strings.HasPrefix(string(head[:n]), magic) {
			return what
		}
	}
	return ""
}

// still has look called while the VM stands still, which it does for limit at most. A VM
// that ran runs on when still returns, or as soon as ctx or the limit ends if that is
// before look returns. It tells how long the VM stood for this, or that it was paused
// anyway; then it stays so.
func still(ctx context.Context, path string, c *qmp.Client, limit time.Duration,
	look func(context.Context) error) (stood time.Duration, paused bool, err error) {
	status, err := c.QueryStatus(ctx)
	if err != nil {
		return 0, false, fmt.Errorf("%w: %w", evict.ErrRefused, cause(ctx, err))
	}
	switch status.Status {
	case "inmigrate", "finish-migrate", "postmigrate":
		return 0, false,
			fmt.Errorf("%w: the VM is being moved or was (%s): survey it where it runs",
				evict.ErrRefused, status.Status)
	}
	events := c.Subscribe(64)
	defer events.Close()
	if ctx.Err() != nil {
		return 0, false, fmt.Errorf("%w: %w; the VM was not touched", evict.ErrAborted,
			context.Cause(ctx))
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit,
		fmt.Errorf("the survey took longer than %v: --freeze-limit allows for more", limit))
	defer cancel()
	if !status.Running {
		if err := look(ctx); err != nil {
			return 0, true, fmt.Errorf("%w: %w; the VM stands still, as before", evict.ErrAborted,
				cause(ctx, err))
		}
		if happened(events, "RESUME") {
			return 0, true, fmt.Errorf("%w: %w", evict.ErrAborted, errRan)
		}
		return 0, true, nil
	}
	start := time.Now()
	var took time.Duration
	// Even if stop fails: QEMU may carry it out all the same.
	run := sync.OnceValue(func() error {
		err := runOn(path, c)
		took = time.Since(start)
		return err
	})
	defer func() {
		lost := run()
		stood = took
		if lost != nil {
			err = fmt.Errorf("%w: the VM may stand still: %w; say \"cont\" to its monitor",
				evict.ErrLost, lost)
		} else if err != nil {
			err = fmt.Errorf("%w: %w; the VM runs on, after it stood still for %v at most",
				evict.ErrAborted, cause(ctx, err), stood.Round(100*time.Microsecond))
		}
	}()
	if err := c.Stop(ctx); err != nil {
		return 0, false, err
	}
	// From here on, as a stop that comes behind the cont would not do.
	defer context.AfterFunc(ctx, func() { run() })()
	if err := look(ctx); err != nil {
		return 0, false, err
	}
	if ctx.Err() != nil { // it may have run already
		return 0, false, context.Cause(ctx)
	}
	if happened(events, "RESUME") {
		return 0, false, errRan
	}
	return 0, false, run()
}

var errRan = errors.New("someone else resumed the VM during the survey: try again")

// happened reports whether an event has come.
func happened(events *qmp.Subscription, name string) bool {
	for {
		select {
		case e, ok := <-events.C:
			if !ok {
				return false
			}
			if e.Name == name {
				return true
			}
		default:
			return false
		}
	}
}

// runOn has the VM run. It tries for a while, over a new connection if the old one is gone.
func runOn(path string, c *qmp.Client) error {
	ctx, cancel := context.WithTimeout(context.Background(), runLimit)
	defer cancel()
	for {
		err := c.Cont(ctx)
		if err == nil {
			return nil
		}
		if errors.Is(err, qmp.ErrClosed) {
			if again, dialErr := qmp.Dial(ctx, path); dialErr == nil {
				defer again.Close()
				c = again
			} else if errors.Is(dialErr, syscall.ECONNREFUSED) {
				return err // QEMU has exited
			}
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// runLimit is how long it is tried to have a VM run on.
const runLimit = 20 * time.Second

// cause says why ctx has ended instead of an error that comes of it.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// teach adds to an error what it means.
func teach(err error) error {
	switch {
	case errors.Is(err, linux.ErrNoLinux):
		return fmt.Errorf("%w: either the guest is not Linux, or its kernel has not booted yet, "+
			"or it was built without CONFIG_CRASH_CORE (CONFIG_VMCORE_INFO since Linux 6.9), or "+
			"its memory is encrypted; it can be evicted all the same, with all of its pages in "+
			"plain order", err)
	case errors.Is(err, linux.ErrUnsupported):
		return fmt.Errorf("%w: kernels of 5.10 to 7.3 as Debian builds them were tried, and BTF "+
			"(CONFIG_DEBUG_INFO_BTF) is needed; it can be evicted all the same, with all of its "+
			"pages in plain order", err)
	}
	return err
}

// A pictureFile is the file that a map will be in. Until then what is to become it lies beside it.
type pictureFile struct {
	name string
	draw func(*inspect.Map, io.Writer) error
	temp *os.File
}

// reservePicture makes sure that a map can be drawn, before a VM is touched for it.
func reservePicture(name string) (*pictureFile, error) {
	p := &pictureFile{name: name}
	switch strings.ToLower(filepath.Ext(name)) {
	case ".svg":
		p.draw = (*inspect.Map).SVG
	case ".png":
		p.draw = (*inspect.Map).PNG
	default:
		return nil, fmt.Errorf("--map %q ends neither in .svg nor in .png", name)
	}
	if fi, err := os.Stat(name); err == nil && !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("--map: %s is no regular file: name one, or a new one", name)
	}
	var err error
	if p.temp, err = beside(name); err != nil {
		return nil, fmt.Errorf("--map: %w", err)
	}
	return p, nil
}

// write puts the map in place, whole or not at all.
func (p *pictureFile) write(m *inspect.Map) error {
	err := p.draw(m, p.temp)
	if err == nil {
		err = os.Rename(p.temp.Name(), p.name)
	}
	if err != nil {
		return fmt.Errorf("--map: %w", err)
	}
	return nil
}

// discard leaves nothing behind but what write has put in place.
func (p *pictureFile) discard() {
	p.temp.Close()
	os.Remove(p.temp.Name())
}
