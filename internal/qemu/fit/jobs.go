package fit

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"vacate/internal/qemu/qmp"
)

// WorkOf asks a QEMU what it is in the middle of, which an eviction would break or lose: jobs,
// exports of disks, a dump or a snapshot of its memory. The texts go on from "it has". The replies
// are those of qapi/*.json of QEMU 7.2 and 11.1.
func WorkOf(ctx context.Context, q *qmp.Client) (Reasons, error) {
	var r replies
	var m struct {
		Status string `json:"status"`
	}
	for _, c := range []struct {
		command string
		into    any
	}{
		{"query-jobs", &r.Jobs}, {"query-block-jobs", &r.BlockJobs},
		{"query-block-exports", &r.Exports},
		{"query-dump", &r.Dump}, {"query-migrate", &m},
	} {
		// query-block-exports came with QEMU 5.2.
		if err := q.Run(ctx, c.command, nil, c.into); err != nil &&
			!errors.Is(err, qmp.ErrCommandNotFound) {
			return nil, err
		}
	}
	switch m.Status {
	case "", "none", "completed", "failed", "cancelled":
	default:
		capabilities, err := q.QueryMigrationCapabilities(ctx)
		if err != nil {
			return nil, err
		}
		r.Snapshot = capabilities["background-snapshot"]
	}
	return r.work(), nil
}

// replies are parts of what QEMU says of its work.
type replies struct {
	Jobs []struct { // JobInfo
		ID      string `json:"id"`
		Type    string `json:"type"`
		Status  string `json:"status"`
		Current int64  `json:"current-progress"`
		Total   int64  `json:"total-progress"`
	}
	BlockJobs []struct { // BlockJobInfo
		ID      string `json:"device"`
		Type    string `json:"type"`
		Status  string `json:"status"`
		Current int64  `json:"offset"`
		Total   int64  `json:"len"`
	}
	Exports []struct { // BlockExportInfo
		ID   string `json:"id"`
		Type string `json:"type"`
		Node string `json:"node-name"`
	}
	Dump struct { // DumpQueryResult
		Status  string `json:"status"`
		Current int64  `json:"completed"`
		Total   int64  `json:"total"`
	}
	Snapshot bool // of the memory, in the background
}

const (
	maxWork = 64  // things that are named
	maxName = 256 // bytes of each name
)

func (r replies) work() (all Reasons) {
	seen := map[string]bool{}
	job := func(id, kind, status string, current, total int64) {
		// What is concluded waits to be dismissed, and touches no disk any more.
		if status == "concluded" || status == "null" || seen[id] {
			return
		}
		seen[id] = true
		remedy :=
			fmt.Sprintf("wait for its end, or end it: `job-cancel` with id %s in QEMU's monitor",
				quoted(id))
		if status == "ready" {
			remedy =
				fmt.Sprintf("end it: `job-complete` or `job-cancel` with id %s in QEMU's monitor",
					quoted(id))
		}
		all.add(remedy, "an unfinished job %s (%s, %s, %s)", quoted(id), cut(kind), cut(status),
			percent(current, total))
	}
	for _, j := range r.Jobs {
		job(j.ID, j.Type, j.Status, j.Current, j.Total)
	}
	for _, j := range r.BlockJobs {
		job(j.ID, j.Type, j.Status, j.Current, j.Total)
	}
	for _, e := range r.Exports {
		all.add(fmt.Sprintf("end it: `block-export-del` with id %s in QEMU's monitor",
			quoted(e.ID)),
			"an export %s of its disk %s (%s)", quoted(e.ID), quoted(e.Node), cut(e.Type))
	}
	if r.Dump.Status == "active" {
		all.add("wait for its end", "an unfinished dump of its memory (%s)",
			percent(r.Dump.Current, r.Dump.Total))
	}
	if r.Snapshot {
		all.add("wait for its end, or `migrate_cancel` in QEMU's monitor",
			"an unfinished snapshot of its memory (background-snapshot)")
	}
	return all[:min(len(all), maxWork)]
}

func quoted(name string) string { return strconv.Quote(cut(name)) }

func cut(s string) string {
	if len(s) > maxName {
		return s[:maxName] + "…"
	}
	return s
}

// percent says how far work is. Totals may still grow, and be 0.
func percent(current, total int64) string {
	if current < 0 || total <= 0 || current > total {
		return "0 %"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(current)/float64(total))
}
