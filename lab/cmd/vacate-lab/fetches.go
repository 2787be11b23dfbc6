package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"

	"vacate/internal/cli"
	"vacate/lab"
	"vacate/lab/bench"

	"github.com/spf13/cobra"
)

func fetchesCommand() *cobra.Command {
	var f vmFlags
	repeat := 3
	var links []string
	var out, place string
	c := &cobra.Command{
		Use:   "fetches",
		Short: "draw where the time of a fetched page goes",
		Long: `Evicts the bare guest under KVM, over links of several rates, while Linux records
what runs on both hosts' cores (tracefs). Of each touch of a missing page it finds
the steps: from the touch, by QEMU's fault thread, both engines and the link, to
the guest's next step. Prints a page with the median and the 99th percentile of
each. What others take of a core is told apart.

The hosts need a core each. It works for one vCPU.`,
		Example: `  vacate-lab fetches --out docs/results/fetch.md`,
		Args:    cobra.NoArgs,
	}
	f.add(c, "link")
	fl := c.Flags()
	if err := fl.MarkHidden("link"); err != nil {
		panic(err)
	}
	fl.StringSliceVar(&links, "links", []string{"1Gbit", "10Gbit", "none"}, "rates of the link")
	fl.IntVar(&repeat, "repeat", repeat, "evictions over each")
	fl.StringVar(&place, "place", "scattered", "where hot memory is, together or scattered")
	fl.StringVar(&out, "out", "", "file for the page; default standard output")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := writable(out); err != nil {
			return err
		}
		if !oneOf(place, "together", "scattered") {
			return fmt.Errorf("place %q: want together or scattered", place)
		}
		if f.vcpus != 1 {
			return errors.New("it finds the fetches of one vCPU only")
		}
		spec, err := f.spec(c.Context())
		if err != nil {
			return err
		}
		spec.BareMetal, spec.Load.Mixed = true, place == "scattered"
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		var page bytes.Buffer
		fmt.Fprintf(&page, fetchesHead, repeat, place)
		for _, link := range links {
			var rate cli.Rate
			if err := rate.Set(link); err != nil {
				return err
			}
			opts := bench.Options{Strategies: []string{"vacate"}, Load: f.load, Spec: spec,
				Accel: "kvm", Chain: true, Repeat: 1, PrecopyBound: 1, Trace: true, Log: log,
				Lab: lab.Options{Dir: f.dir, Rate: uint64(rate), Log: log}}
			opts.Strategies = slices.Repeat(opts.Strategies, repeat)
			result, err := bench.Measure(c.Context(), opts)
			if err != nil {
				return err
			}
			var all []bench.Fetch
			for _, r := range result.Runs {
				all = append(all, r.Fetches...)
			}
			bench.FetchReport(&page, "Link "+link, all)
		}
		if out == "" {
			_, err := io.Copy(os.Stdout, &page)
			return err
		}
		return os.WriteFile(out, page.Bytes(), 0o644) // #nosec G306 -- results are for all to read
	}
	return c
}

const fetchesHead = `# Where the time of a fetched page goes

` + "`vacate-lab fetches` wrote this page" + `. A guest at native speed under KVM touches a page that has not
come yet. The steps from there to its next instruction are told by events of the kernel: switches
and wake-ups of threads, system calls, and KVM's. There were %d evictions over each link, hot memory
%s, and each host had one core. "Host" is whose core a step needs.

"Of us" is the 99th percentile without the time in which the core ran somebody else: other work on
the machine, or the lab that measures. Bars show the median (█) and the 99th percentile (░); their
length goes with the square root.
`
