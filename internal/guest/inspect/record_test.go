package inspect_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"testing"
	"time"

	"vacate/internal/guest/linux"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
)

var record = flag.String("record", "", "QMP `socket` of a guest to record a survey of")

// TestRecord records the survey that the other tests use: of a guest of 128 MiB with the
// lab's load, by
//
//	go test ./internal/guest/inspect -run TestRecord -record SOCKET
//	go test ./internal/guest/inspect ./cmd/vacate -update
func TestRecord(t *testing.T) {
	if *record == "" {
		t.Skip("records only when asked to by -record")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := qmp.Dial(ctx, *record)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	mem, err := guestmem.Attach(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	live, err := linux.NewLive(mem, c)
	if err != nil {
		t.Fatal(err)
	}
	g, err := linux.Attach(ctx, live)
	if err != nil {
		t.Fatal(err)
	}
	err = c.Stop(ctx)
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.Survey(ctx)
	if err = errors.Join(err, c.Cont(context.WithoutCancel(ctx))); err != nil {
		t.Fatal(err)
	}
	out := recording{Kernel: g.Release(), Processes: r.Processes, Fresh: r.Fresh}
	for i, p := range r.Pages {
		if i > 0 && p == r.Pages[i-1] {
			out.Runs[len(out.Runs)-1][0]++
			continue
		}
		out.Runs = append(out.Runs,
			[5]uint64{1, uint64(p.Kind), uint64(p.Class), uint64(p.Flags), uint64(p.Owner)})
	}
	var b bytes.Buffer
	z, _ := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err := errors.Join(json.NewEncoder(z).Encode(out), z.Close(),
		os.WriteFile("testdata/survey.gz", b.Bytes(), 0o644)); err != nil {
		t.Fatal(err)
	}
}
