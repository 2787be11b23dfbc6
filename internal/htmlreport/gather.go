package htmlreport

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
)

// Gather asks the daemon of an eviction's source for what the page of the eviction shows. e has
// ended and has a report.
func Gather(ctx context.Context, d hostv1.HostClient, e *hostv1.Eviction) (Eviction, error) {
	p := Eviction{ID: e.Id, VM: e.Vm, To: e.Peer, Started: e.StartedAt.AsTime(), Outcome: e.Outcome,
		Reason: e.Reason}
	var err error
	if p.Report, err = e.Report.Engine(); err != nil {
		return p, err
	}
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
