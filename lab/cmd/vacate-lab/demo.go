package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/htmlreport"
	"vacate/lab"
	"vacate/lab/bench"
	"vacate/lab/daemons"
	"vacate/lab/libvirtlab"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
)

func demoCommand() *cobra.Command {
	var dir, file string
	var domains, fleet bool
	c := &cobra.Command{
		Use:   "demo",
		Short: "show VMs that starve each other, and relief; then measure it",
		Long: `Boots two VMs with a memcached each on one host of a lab, where they starve each
other, and starts a daemon on each host. Relieves the host by evicting one VM,
while clients use both; the VM then checks all of its memory. Writes an HTML
page that shows it all. Then moves one more VM by this engine and one by QEMU's
own post-copy, and compares them. Takes about three minutes. vacate and vacated
must be in the same directory as this program.

With --libvirt each host has a libvirt of its own, the VMs are its domains, and
what virsh says at both ends is shown in place of the comparison.

With --fleet there are five hosts, whose brain relieves one by itself, and empties
another by a deadline while no VM is stopped. Takes about four minutes.`,
		Args: cobra.NoArgs,
	}
	dirFlag(c, &dir)
	c.Flags().StringVar(&file, "html", "",
		"`FILE` for the page (default demo.html in the lab's directory)")
	c.Flags().BoolVar(&domains, "libvirt", false, "VMs are domains of libvirt's, one on each host")
	c.Flags().BoolVar(&fleet, "fleet", false, "a fleet of five hosts")
	c.MarkFlagsMutuallyExclusive("fleet", "libvirt")
	c.RunE = func(c *cobra.Command, _ []string) error {
		plain := &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == "error" {
				return slog.Attr{}
			}
			return a
		}}
		d := demo{
			out:     os.Stdout,
			domains: domains,
			page:    cmp.Or(file, filepath.Join(dir, "demo.html")),
			opts: lab.Options{Dir: dir, Rate: 1e9,
				Log: slog.New(slog.NewTextHandler(os.Stderr, plain))},
		}
		if fleet {
			return d.showFleet(c.Context())
		}
		if err := d.show(c.Context()); err != nil || domains {
			return err
		}
		return d.compare(c.Context())
	}
	return c
}

type demo struct {
	out  io.Writer
	opts lab.Options
	page string // file
	step int
	// The VMs are domains of libvirt's.
	domains bool
}

// demoVM is a VM of the demo, with its client.
type demoVM struct {
	name   string
	spec   lab.Spec
	vm     *lab.VM
	client bench.Loader
	// came returns the VM on host b, once it is there.
	came func(context.Context) (*lab.VM, error)
}

// demoVMs are alike but for their size.
func demoVMs() []*demoVM {
	spec := lab.Spec{MemoryMiB: 768, Devices: lab.Full, Tap: true, Server: lab.Memcached}
	web1, web2 := spec, spec
	web1.ServerMiB, web1.Load = 80, lab.Load{IdleMiB: 100, Sleep: true, Seed: 1}
	web2.ServerMiB, web2.Load = 160, lab.Load{IdleMiB: 250, Sleep: true, Seed: 2}
	return []*demoVM{{name: "web1", spec: web1}, {name: "web2", spec: web2}}
}

// say begins a step.
func (d *demo) say(format string, args ...any) {
	d.step++
	fmt.Fprintf(d.out, "\n%d. %s\n", d.step,
		strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "\n   "))
}

// show relieves a host as an operator would.
func (d *demo) show(ctx context.Context) (err error) {
	d.say(`Two hosts, a and b, on this machine: each is a network namespace of its own,
pinned to one core. A veth pair between them is shaped to 1 Gbit/s each way; a bridge
on each makes one Ethernet of both, in which clients are, too.`)
	l, err := lab.New(ctx, d.opts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	var libvirt *libvirtlab.Hosts
	if d.domains {
		if libvirt, err = d.startLibvirt(ctx, l); err != nil {
			return err
		}
		defer libvirt.Close()
	}
	site, err := newDemoSite(ctx, l, libvirt)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, site.Close()) }()
	vms := demoVMs()
	defer func() {
		for _, v := range vms {
			if v.client != nil {
				v.client.Stop()
			}
		}
	}()
	if err := d.contend(ctx, l, site, vms); err != nil {
		return err
	}
	if err := d.starve(ctx, l, site); err != nil {
		return err
	}
	watched := func() {}
	if d.domains {
		if watched, err = d.watch(ctx, site, vms); err != nil {
			return err
		}
	}
	began, err := d.relieve(ctx, l, site)
	if err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	watched()
	moved, stayed := vms[0], vms[1]
	e, err := site.last(ctx, l.A)
	if err != nil {
		return err
	}
	if e.Vm == stayed.name {
		moved, stayed = stayed, moved
	}
	d.compareRates(moved, stayed, began)
	if err := d.write(ctx, site, l, e, moved, stayed); err != nil {
		return err
	}
	return d.verify(ctx, moved, stayed)
}

// contend boots VMs on host a, and lets their clients want more than its core.
func (d *demo) contend(ctx context.Context, l *lab.Lab, site *demoSite, vms []*demoVM) error {
	for _, v := range vms {
		if err := d.boot(ctx, l, site, v); err != nil {
			return err
		}
	}
	// So that the other host does not starve with one, on a machine where clients and engines have
	// the same two cores.
	if _, err := bench.SetPace(ctx, []bench.Loader{vms[0].client, vms[1].client}, 0.6); err != nil {
		return err
	}
	time.Sleep(2 * time.Second) // of throughput, to tell it
	now := time.Now()
	d.say(`On host a two VMs have booted, web1 and web2: QEMU %s (%s), 768 MiB each, Debian's
own kernel, Debian's memcached. A client of each reads and writes values, as many as six
tenths of a core can answer, checks each that it reads, and keeps its %d connections. There
is one core for both: web1 answers %.0f requests a second, web2 %.0f.`, vms[0].vm.Spec.QEMU.Version, vms[0].vm.Spec.Accel, bench.UsualClients.Connections, perSecond(vms[0].client, now.Add(-time.Second), now), perSecond(vms[1].client, now.Add(-time.Second), now))
	return nil
}

// starve starts the daemons, and shows how the VMs starve.
func (d *demo) starve(ctx context.Context, l *lab.Lab, site *demoSite) error {
	described := "descriptions\nof the VMs, "
	if d.domains {
		described = "no\ndescription of a VM, "
	}
	d.say("Each host has a certificate (vacate certs init, vacate certs issue), %sand a daemon, "+
		"vacated, which has the other as its peer:", described)
	for _, h := range []*lab.Host{l.A, l.B} {
		if err := site.Start(ctx, h); err != nil {
			return err
		}
	}
	config, err := os.ReadFile(site.Config(l.A))
	if err != nil {
		return err
	}
	d.quote(string(config))
	d.say("vacate pressure, on host a, tells how the VMs starve (STEAL):")
	said, err := site.ask(ctx, l.A, "pressure")
	if err != nil {
		return err
	}
	d.quote(said)
	return nil
}

// relieve relieves host a, and returns when the eviction began.
func (d *demo) relieve(ctx context.Context, l *lab.Lab, site *demoSite) (began time.Time,
	err error) {
	d.say(`The operator runs

     vacate relieve

which predicts what comes of evicting each VM, and evicts the best:`)
	fmt.Fprintln(d.out)
	args := []string{"relieve"}
	for tries := 3; ; tries-- {
		began = time.Now()
		relieve := site.Command(ctx, l.A, args...)
		relieve.Stdout, relieve.Stderr = d.out, os.Stderr
		err := l.A.Run(relieve)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || tries == 1 { // 2: refused
			return began, err
		}
		if tries > 2 {
			d.say("Something else kept host b busy just then: the clients, say, which have no " +
				"core of their\nown here. The operator tries again:")
		} else {
			args = []string{"evict", "web2", "--to", "hostb"}
			d.say(
				"Host b stays busy with the clients, and relieve does not make a host starve. The " +
					"operator\nknows better, and says which VM leaves:\n\n     vacate evict " +
					"web2 --to hostb")
		}
		fmt.Fprintln(d.out)
	}
}

// compareRates says how many requests the VMs answer now, and did before.
func (d *demo) compareRates(moved, stayed *demoVM, began time.Time) {
	end := time.Now()
	d.say(`%s runs on host b now, and %s has the core of host a for itself. %s answers
%.0f requests a second now, %.0f before; %s %.0f, %.0f before. The longest silence that a
client of %[1]s saw was %[9]d ms.`, moved.name, stayed.name, moved.name, perSecond(moved.client, end.Add(-2*time.Second), end), perSecond(moved.client, began.Add(-2*time.Second), began),
		stayed.name, perSecond(stayed.client, end.Add(-2*time.Second), end),
		perSecond(stayed.client, began.Add(-2*time.Second), began),
		moved.client.Stats().Silence.Milliseconds())
}

// verify says whether a client or the guest noticed anything.
func (d *demo) verify(ctx context.Context, moved, stayed *demoVM) error {
	for _, v := range []*demoVM{moved, stayed} {
		s := v.client.Stop()
		if s.Wrong != 0 || s.Broken != 0 {
			return errors.Join(
				append([]error{
					fmt.Errorf("a client of %s noticed: %d wrong answers, %d broken connections",
						v.name, s.Wrong, s.Broken)}, s.Errors...)...)
		}
	}
	if err := moved.vm.Ended(ctx); err != nil {
		return fmt.Errorf("the source's QEMU: %w", err)
	}
	arrived, err := moved.came(ctx)
	if err != nil {
		return err
	}
	check, err := moved.vm.Guest.Check(ctx, arrived)
	if err != nil {
		return err
	}
	d.say(`No client had a wrong answer, and none of their connections broke. The QEMU of
%s on host a has ended; the VM has now checked each of the %d pages whose content it
knows: %d bad pages.`, moved.name, check.Pages, check.Bad)
	if check.Bad != 0 || check.Pages == 0 {
		return bench.ErrBadPages
	}
	return nil
}

// boot boots a VM on host a, gets host b ready for it, and has its client begin.
func (d *demo) boot(ctx context.Context, l *lab.Lab, site *demoSite, v *demoVM) (err error) {
	if site.libvirt != nil {
		domain, err := site.libvirt.Start(ctx, v.name, libvirtlab.Spec{VM: v.spec})
		if err != nil {
			return err
		}
		v.vm, v.came = domain.VM, domain.Came
	} else {
		if v.vm, err = l.A.Boot(ctx, v.spec); err != nil {
			return err
		}
		twin, err := l.B.Expect(ctx, v.vm)
		if err != nil {
			return err
		}
		if err := errors.Join(site.Describe(l.A, v.name, v.vm.QMP, v.vm.Args),
			site.Describe(l.B, v.name, twin.QMP, twin.Args)); err != nil {
			return err
		}
		v.came = twin.Started
	}
	v.client, err = bench.Load(ctx, l, v.vm, bench.UsualClients)
	return err
}

// perSecond is how many answers came in a time.
func perSecond(c bench.Loader, from, to time.Time) float64 {
	return c.Rates(from, to, to.Sub(from))[0].PerSecond
}

// write writes the page.
func (d *demo) write(ctx context.Context, site *demoSite, l *lab.Lab, e *hostv1.Eviction,
	moved, stayed *demoVM) error {
	p, err := htmlreport.Gather(ctx, hostv1.Dial(site.Socket(l.A)), e)
	if err != nil {
		return err
	}
	begun := p.Report.Begun
	if begun == nil {
		return errors.New("the report does not tell when the VM was first touched")
	}
	p.Notes = []string{
		fmt.Sprintf(
			"Two VMs, %s and %s, with a memcached each and clients that ask for as much as six "+
				"tenths of a core can answer, starved each other on the one core of host a. "+
				"The operator ran vacate relieve, which chose %[1]s to leave for host b. Both "+
				"then have a core of their own.", moved.name, stayed.name),
		"The first chart shows it: the answers of both per second. The VM that stays has the " +
			"core as soon as the other has left. The one that moves has to fetch what it " +
			"touches first, and is back as its hot memory has come.",
	}
	rates := htmlreport.Chart{Title: "Answers of the two memcached", Unit: "answers per second"}
	latencies := htmlreport.Chart{Title: "What the clients waited", Unit: "ms, 90th percentile"}
	for _, v := range []*demoVM{moved, stayed} {
		rate, latency := htmlreport.Line{Name: v.name}, htmlreport.Line{Name: v.name}
		if v == moved {
			rate.Name, latency.Name = v.name+", which moves", v.name+", which moves"
		}
		for _, r := range v.client.Rates(begun.Add(-4*time.Second), time.Now(),
			100*time.Millisecond) {
			at := math.Round(r.From.Sub(*begun).Seconds()*100) / 100
			rate.Points = append(rate.Points, [2]float64{at, r.PerSecond})
			if r.P90 > 0 {
				latency.Points = append(latency.Points,
					[2]float64{at, float64(r.P90.Microseconds()) / 1000})
			}
		}
		rates.Lines, latencies.Lines = append(rates.Lines, rate), append(latencies.Lines, latency)
	}
	p.Charts = []htmlreport.Chart{rates, latencies}
	var b bytes.Buffer
	if err := htmlreport.Write(&b, p); err != nil {
		return err
	}
	if err := os.WriteFile(d.page, b.Bytes(), 0o644); err != nil { // #nosec G306 -- pages are for others to read
		return err
	}
	d.say(`%s shows it: open it in a browser. It needs no network. Of any other
eviction, vacate report VM --html FILE writes such a page.`, d.page)
	return nil
}

// quote shows what a program or a file says.
func (d *demo) quote(s string) {
	fmt.Fprint(d.out, "\n     "+strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n     ")+"\n")
}

// demoSite is the two daemons of a demo, and maybe a libvirt for each.
type demoSite struct {
	*daemons.Site
	libvirt *libvirtlab.Hosts // nil: VMs are described
}

func newDemoSite(ctx context.Context, l *lab.Lab,
	libvirt *libvirtlab.Hosts) (*demoSite, error) {
	program, err := lab.Program("vacate")
	if err != nil {
		return nil, err
	}
	s, err := daemons.New(ctx, l, program, libvirt)
	return &demoSite{s, libvirt}, err
}

// ask runs vacate on a host, and returns what it says.
func (s *demoSite) ask(ctx context.Context, h *lab.Host, args ...string) (string, error) {
	c := s.Command(ctx, h, args...)
	var said strings.Builder
	c.Stdout, c.Stderr = &said, os.Stderr
	err := h.Run(c)
	return said.String(), err
}

// last is the latest eviction from a host.
func (s *demoSite) last(ctx context.Context, h *lab.Host) (*hostv1.Eviction, error) {
	r, err := hostv1.Dial(s.Socket(h)).ListEvictions(ctx,
		connect.NewRequest(&hostv1.ListEvictionsRequest{}))
	if err != nil {
		return nil, err
	}
	if len(r.Msg.Evictions) == 0 {
		return nil, errors.New("no VM was evicted: the machine may be busy with something else")
	}
	return r.Msg.Evictions[len(r.Msg.Evictions)-1], nil
}

// compare measures the engine against QEMU's post-copy.
func (d *demo) compare(ctx context.Context) error {
	d.say(`The same with a new VM, measured; then QEMU's own post-copy with another one:`)
	result, err := bench.Measure(ctx, bench.Options{
		Strategies: []string{"vacate", "qemu-postcopy"}, Load: "hot", Repeat: 1,
		PrecopyBound: time.Second,
		Spec:         lab.Spec{MemoryMiB: 1024, Load: lab.Load{HotMiB: 200, IdleMiB: 200, Seed: 1}},
		Lab:          d.opts, Log: slog.New(slog.DiscardHandler),
		Done: func(r bench.Run) { fmt.Fprintf(d.out, "   %s: %s\n", r.Strategy, r.Outcome) },
	})
	if err != nil {
		return err
	}
	fmt.Fprintln(d.out)
	if err := result.Table(d.out); err != nil {
		return err
	}
	fmt.Fprintln(d.out, `
transfer: from QEMU's order to migrate until the VM runs on host b; down: in which it runs
nowhere; total: until host a holds nothing of it; work lost: in seconds of its full speed.
One run each proves little: "vacate-lab bench --repeat 5" tells more, docs/bench.md what
the figures mean.`)
	for _, r := range result.Runs {
		if r.Bad == nil || *r.Bad != 0 {
			return bench.ErrBadPages
		}
	}
	_, err = fmt.Fprintln(d.out,
		"\nEach VM has checked all of its memory after its move: 0 bad pages.")
	return err
}
