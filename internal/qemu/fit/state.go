package fit

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"vacate/internal/qemu/qmp"
)

// standing has the run states in which a VM stands and can be moved, with words for each. They are
// of RunState in qapi/run-state.json of QEMU 7.2 to 11.1.
var standing = map[string]string{
	"paused":         "is paused",
	"prelaunch":      "has not been started yet",
	"io-error":       "stands, as a disk failed",
	"guest-panicked": "stands, as its guest panicked",
	"watchdog":       "stands, as its watchdog ran out",
	"suspended":      "is suspended",
}

// Stands says of a VM that stands in a run state what is so, with QEMU's word for it: "is
// suspended", "stands, as a disk failed (io-error)".
func Stands(status string) string {
	words, ok := standing[status]
	switch {
	case !ok:
		return fmt.Sprintf("is in the state %q", status)
	case strings.Contains(words, status):
		return words
	}
	return fmt.Sprintf("%s (%s)", words, status)
}

// Standing reports whether a VM in a run state stands, and can be moved all the same.
func Standing(status string) bool { return standing[status] != "" }

// stuck has the run states in which a VM cannot be moved, and what to do.
var stuck = map[string]Reason{
	"inmigrate": {"waits to arrive, or arrives",
		"wait until it is here: `vacate status` says whose eviction that is; or end its QEMU " +
			"(`quit`)"},
	"finish-migrate": {"is being moved by QEMU itself",
		"wait for its end, or `migrate_cancel` in QEMU's monitor"},
	"postmigrate": {"was moved away by QEMU itself, and this is what is left of it",
		"look for it where it went; if it is not there, `cont` in QEMU's monitor resumes it here"},
	"restore-vm": {"is being restored from a snapshot", "wait for its end"},
	"save-vm":    {"is being saved to a snapshot", "wait for its end"},
	"colo": {"is replicated by QEMU (COLO)",
		"end that: `x-colo-lost-heartbeat` in QEMU's monitor"},
	"debug": {"is held by a debugger", "tell it to let the VM go on"},
	"shutdown": {"has shut down, and only its QEMU is left",
		"end that (`quit` in its monitor), and start the VM on the other host; or " +
			"`system_reset` and `cont` start it here"},
	"internal-error": {"was given up by QEMU, and has to be reset",
		"`system_reset` in QEMU's monitor; or end that (`quit`), and start the VM on the other " +
			"host"},
}

// StateOf says what blocks the move of a VM in a run state from a QEMU of some version to
// another. The texts go on from the VM's name.
func StateOf(status string, source, destination qmp.Version) (r Reasons) {
	switch old := destination; {
	case status == "running":
	case status == "suspended":
		if !source.AtLeast(8, 2) {
			old = source
		}
		if !old.AtLeast(8, 2) {
			r.add("wake it up (`system_wakeup` in QEMU's monitor), or move it once both ends "+
				"have QEMU 8.2 or later",
				"is suspended, and QEMU %d.%d forgets that of a VM which moves, so that nothing "+
					"could wake it up", old.Major, old.Minor)
		}
	case !Standing(status):
		why, ok := stuck[status]
		if !ok {
			why = Reason{"is in a state that vacate does not know",
				"resume it: `cont` in QEMU's monitor"}
		}
		r.add(why.Remedy, "%s (%s)", why.Text, status)
	}
	return r
}

// ErrInactive is wrapped by the error of disks that QEMU does not take hold of again.
var ErrInactive = errors.New("QEMU cannot activate the VM's disks again")

// Activate makes a QEMU whose VM stands take its disks back, if it gave them up, as it does when it
// saves its devices. `cont` does that, too, but also runs the guest. Where another QEMU has their
// locks, the error wraps ErrInactive.
func Activate(ctx context.Context, q *qmp.Client) error {
	var blocks []blockInfo
	if err := q.Run(ctx, "query-block", nil, &blocks); err != nil {
		return err
	}
	blocks = slices.DeleteFunc(blocks,
		func(b blockInfo) bool { return b.QDev == "" || b.Inserted == nil })
	if len(blocks) == 0 {
		return nil
	}
	if blocks[0].Inserted.Active == nil {
		return activate(ctx, q, blocks)
	}
	if !slices.ContainsFunc(blocks, func(b blockInfo) bool { return !*b.Inserted.Active }) {
		return nil
	}
	err := q.Run(ctx, "blockdev-set-active", map[string]any{"active": true}, nil)
	var refusal *qmp.Error
	if errors.As(err, &refusal) {
		err = fmt.Errorf("%w: %w", ErrInactive, err)
	}
	return err
}

// activate is Activate with QEMU before 10.0, which has neither the answer nor a command. Before
// such a QEMU exports a node, it activates the node (blk_exp_add in its block/export/export.c).
// Without an NBD server nothing more comes of that.
func activate(ctx context.Context, q *qmp.Client, blocks []blockInfo) error {
	var g edges
	if err := q.Run(ctx, "x-debug-query-block-graph", nil, &g); err != nil {
		return err
	}
	// Where a device uses a node, and does not let others write to it, it is active.
	active := map[string]bool{}
	for _, e := range g.Edges {
		if len(e.Needs) > 0 && !slices.Contains(e.Allows, "write") {
			active[g.name(e.Child)] = true
		}
	}
	for _, b := range blocks {
		const id = "vacate-activate"
		if active[b.Inserted.Node] {
			continue
		}
		err := q.Run(ctx, "block-export-add",
			map[string]any{"type": "nbd", "id": id, "node-name": b.Inserted.Node}, nil)
		if err == nil {
			err = q.Run(ctx, "block-export-del", map[string]any{"id": id, "mode": "hard"}, nil)
		}
		var refusal *qmp.Error
		switch {
		case err == nil:
		case !errors.As(err, &refusal):
			return err
		case strings.Contains(refusal.Desc, "read-only"): // as an inactive node is
			return fmt.Errorf("%w: another has the lock of disk %q", ErrInactive, b.Device)
		}
	}
	return nil
}

func (g *edges) name(id uint64) string {
	for _, n := range g.Nodes {
		if n.ID == id {
			return n.Name
		}
	}
	return ""
}
