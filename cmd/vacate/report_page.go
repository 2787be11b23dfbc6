package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/htmlreport"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
)

func reportCommand() *cobra.Command {
	var file string
	c := askCommand(&cobra.Command{
		Use:   "report VM|ID",
		Short: "Tell what an eviction from this host did",
		Long: `Sums up an eviction from this host: how long each part of it took, and how the
memory went. With --html, writes that as a page to be looked at in a browser,
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
		var report evict.Report
		if e.ReportJson == "" {
			return nil, fmt.Errorf("there is no report of eviction %s on this host: it has not ended, or came here, where there is none", e.Id)
		}
		if err := json.Unmarshal([]byte(e.ReportJson), &report); err != nil {
			return nil, fmt.Errorf("the report: %w", err)
		}
		if file == "" {
			io.WriteString(w, reportText(report))
			return e, nil
		}
		p, err := d.pageOf(ctx, e, report)
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
			err = os.WriteFile(file, b.Bytes(), 0o644) // #nosec G306 -- a page is to be shown
		}
		return e, err
	})
	c.Flags().StringVar(&file, "html", "", "write a page to `FILE`; - is standard output")
	return c
}

// pageOf gathers what the page of an eviction tells.
func (d *daemon) pageOf(ctx context.Context, e *hostv1.Eviction, report evict.Report) (htmlreport.Eviction, error) {
	p := htmlreport.Eviction{ID: e.Id, VM: e.Vm, To: e.Peer, Started: e.StartedAt.AsTime(), Outcome: e.Outcome, Reason: e.Reason, Report: report}
	status, err := d.Status(ctx, connect.NewRequest(&hostv1.StatusRequest{}))
	if err != nil {
		return p, err
	}
	p.From = status.Msg.Host
	r, err := d.GetTrace(ctx, connect.NewRequest(&hostv1.GetTraceRequest{Id: e.Id}))
	if connect.CodeOf(err) == connect.CodeNotFound {
		return p, nil
	} else if err != nil {
		return p, err
	}
	p.Trace, err = decodeTrace(r.Msg.Trace)
	return p, err
}

// maxTrace bounds a trace, in bytes of JSON.
const maxTrace = 64 << 20

func decodeTrace(b []byte) (*evict.Trace, error) {
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("the trace: %w", err)
	}
	var t evict.Trace
	if err := json.NewDecoder(io.LimitReader(z, maxTrace)).Decode(&t); err != nil {
		return nil, fmt.Errorf("the trace: %w", err)
	}
	return &t, nil
}
