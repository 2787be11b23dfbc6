package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/htmlreport"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
)

func reportCommand() *cobra.Command {
	var file string
	c := askCommand(&cobra.Command{
		Use:   "report VM|ID",
		Short: "Show what an eviction from this host did",
		Long: `Sums up an eviction from this host: how long each part of it took, and how the
memory went. With --html, writes that as a page for a browser,
in one file that needs no network: a time line, what was sent and fetched over
time, and the guest's memory as a map that shows when each page came, and why.`,
		Example: `  vacate report web1
  vacate report web1 --html web1.html`,
		Args: cobra.ExactArgs(1),
	}, func(ctx context.Context, d *daemon, args []string, w io.Writer) (proto.Message, error) {
		e, err := d.find(ctx, args[0])
		if err != nil {
			return nil, err
		}
		if e.Report == nil {
			return nil, noReport(e)
		}
		report, err := e.Report.Engine()
		if err != nil {
			return nil, err
		}
		if file == "" {
			io.WriteString(w, reportText(report))
			return e, nil
		}
		p, err := htmlreport.Gather(ctx, d, e)
		if err != nil {
			return nil, err
		}
		var b bytes.Buffer
		if err := htmlreport.Write(&b, p); err != nil {
			return nil, err
		}
		if file == "-" {
			_, err = b.WriteTo(w)
		} else {
			err = os.WriteFile(file, b.Bytes(), 0o644) // #nosec G306 -- pages are for others to read
		}
		return e, err
	})
	c.Flags().StringVar(&file, "html", "", "write a page to `FILE`; - is standard output")
	return c
}

// noReport says why this host has no report of an eviction, and what to type.
func noReport(e *hostv1.Eviction) error {
	id, vm := fmt.Sprintf("%.8s", clean(e.Id)), clean(e.Vm)
	if e.Role == "destination" {
		return fmt.Errorf(
			"eviction %s brought VM %s to this host: its report is on host %s (vacate "+
				"report %[1]s there). Those of evictions out of this host: vacate report ID, "+
				"with an ID "+
				"of vacate status", id, vm, clean(e.Peer))
	}
	if e.EndedAt == nil {
		return fmt.Errorf("eviction %s of VM %s has not ended: vacate watch %[1]s follows it", id,
			vm)
	}
	return fmt.Errorf("eviction %s of VM %s ended without a report: vacate status %[1]s says how",
		id, vm)
}
