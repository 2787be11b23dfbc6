package evict

import (
	"context"
	"fmt"
	"strings"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/qmp"
)

// atRest makes sure that a QEMU does nothing that an eviction would break or lose. who begins each
// sentence of its error: "the VM", say.
func atRest(ctx context.Context, q *qmp.Client, who string) error {
	work, err := fit.WorkOf(ctx, q)
	if err != nil {
		return err
	}
	for i := range work {
		work[i].Text = who + " has " + work[i].Text
	}
	return work.Err()
}

// warnOfBitmaps warns of dirty bitmaps that the VM leaves behind. Without one the next backup is a
// full one.
func (e *source) warnOfBitmaps(d fit.Disks) {
	const most = 20
	if len(d.Volatile) == 0 {
		return
	}
	names := strings.Join(d.Volatile[:min(len(d.Volatile), most)], ", ")
	if more := len(d.Volatile) - most; more > 0 {
		names += fmt.Sprintf(" and %d more", more)
	}
	text :=
		"dirty bitmaps in QEMU's memory do not move, so the next backups of these disks must be " +
			"full ones: " + names
	e.proposal.warned = append(e.proposal.warned, text)
	e.Log.Warn(text)
}
