package main

import (
	"bytes"
	_ "embed" // the page's script
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"vacate/internal/cli"
	"vacate/internal/htmlreport"
	"vacate/lab"
	"vacate/lab/bench"

	"github.com/spf13/cobra"
)

func paperCommand() *cobra.Command {
	opts := bench.ContentionOptions{Repeat: 1, PrecopyBound: 3, Wanted: 0.6,
		Clients: bench.UsualClients}
	memory, serve := cli.MiB(640), cli.MiB(192)
	servers, rates := []string{"memcached", "redis", "postgresql", "idle"}, []string{"400Mbit",
		"200Mbit", "100Mbit"}
	var out string
	c := &cobra.Command{
		Use:   "paper",
		Short: "repeat the evaluation of the paper on enlightened post-copy",
		Long: `Two VMs with a server each contend for the core of host a: their clients want
more than it has. Evicts one VM to host b by each strategy, over links of
several rates, and measures when each VM, and both together, are back at 90 % of
their final level. docs/paper.md says what is scaled, and how.

Writes contention.json, contention.csv, contention.svg and paper.html into a
directory.`,
		Args: cobra.NoArgs,
	}
	fl := c.Flags()
	fl.StringSliceVar(&opts.Strategies, "strategies",
		[]string{"vacate", "qemu-postcopy", "qemu-precopy", "qemu-precopy-autoconverge",
			"stop-and-copy", "vacate:demand-only"},
		"of "+strings.Join(bench.Strategies(), ", ")+", vacate:ORDER")
	fl.StringSliceVar(&servers, "servers", servers, "what the VMs serve; idle for nothing")
	fl.StringSliceVar(&rates, "rates", rates, "of the link")
	fl.Var(&memory, "memory", "of each VM")
	fl.Var(&serve, "serve", "how much of it the servers hold")
	fl.Float64Var(&opts.Wanted, "wanted", opts.Wanted, "how much of a core each VM wants")
	fl.Float64Var(&opts.Clients.Writes, "writes", opts.Clients.Writes,
		"the share of requests that write")
	fl.IntVar(&opts.Clients.Connections, "connections", opts.Clients.Connections,
		"of the clients of each VM, with a request at a time each")
	fl.IntVar(&opts.Clients.Bytes, "value", opts.Clients.Bytes,
		"bytes of a value of memcached or Redis")
	fl.IntVar(&opts.Repeat, "repeat", opts.Repeat, "how often all is measured")
	fl.Float64Var(&opts.PrecopyBound, "precopy-bound", opts.PrecopyBound,
		"pre-copy is given up after so many times as long as all memory takes")
	fl.StringVar(&out, "out", ".lab/paper", "`DIR`ectory for the results")
	dirFlag(c, &opts.Lab.Dir)
	c.RunE = func(c *cobra.Command, _ []string) error {
		for _, s := range servers {
			opts.Servers = append(opts.Servers, lab.Server(s))
		}
		for _, text := range rates {
			var r cli.Rate
			if err := r.Set(text); err != nil {
				return err
			}
			if r == 0 {
				return errors.New("--rates: a link without a limit is none of the paper's")
			}
			opts.Rates = append(opts.Rates, uint64(r))
		}
		if !(opts.Wanted > 0 && opts.Wanted <= 1) ||
			!(opts.Clients.Writes > 0 && opts.Clients.Writes <= 1) {
			return errors.New("--wanted and --writes: more than 0, and 1 at most")
		}
		if opts.Clients.Connections < 1 {
			return errors.New("--connections: at least one")
		}
		opts.MemoryMiB, opts.ServerMiB = int(memory), int(serve)
		opts.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
		opts.Lab.Log = opts.Log
		if err := os.MkdirAll(out, 0o755); err != nil { // #nosec G301 -- results are for others to read
			return err
		}
		opts.Done = func(r bench.ContentionRun) { fmt.Println(r) }
		result, err := bench.Contend(c.Context(), opts)
		return errors.Join(err, writePaper(out, result))
	}
	return c
}

// writePaper writes the results into a directory.
func writePaper(dir string, result bench.Contention) error {
	write := func(name string, f func(io.Writer) error) error {
		file, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		return errors.Join(f(file), file.Close())
	}
	return errors.Join(
		write("contention.json",
			func(w io.Writer) error { return json.NewEncoder(w).Encode(result) }),
		write("contention.csv", result.CSV),
		write("contention.svg", result.SVG),
		write("paper.html", func(w io.Writer) error { return writePaperPage(w, result) }))
}

//go:embed paper.js
var paperScript string

// paperPage is what the page's script gets: what was measured, and its drawing.
type paperPage struct {
	Contention bench.Contention `json:"contention"`
	SVG        []byte           `json:"svg"`
}

func writePaperPage(w io.Writer, result bench.Contention) error {
	var svg bytes.Buffer
	if err := result.SVG(&svg); err != nil {
		return err
	}
	return htmlreport.WritePage(w, "Eviction under contention", paperScript,
		paperPage{result, svg.Bytes()})
}
