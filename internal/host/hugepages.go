package host

import (
	"context"
	"encoding/json"
	"errors"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	hostv1 "vacate/internal/host/api/v1"

	"github.com/prometheus/client_golang/prometheus"
)

// A VM that came by post-copy has no huge pages in its memory, as QEMU forbids them meanwhile. The
// daemon gives it those back that it had at the source. That begins when the eviction has ended,
// and another daemon goes on with it. It holds nobody up: a VM that leaves again just leaves.

// errLeaves is why the task of a VM that leaves ends.
var errLeaves = errors.New("the VM leaves this host")

// restoring is how far the task of one eviction is. The eviction's mu guards it.
type restoring struct {
	task   *evict.HugePages // nil: the journal has it, or there is none
	done   evict.Restored
	cancel context.CancelCauseFunc // nil while nobody works on it
}

// noteHuge takes the task of an engine whose VM is whole here.
func (v *eviction) noteHuge(task *evict.HugePages) { v.change(func() { v.huge.task = task }) }

// restoreHuge begins the task of an eviction that ended here, if there is one that is not done.
func (v *eviction) restoreHuge() {
	r := v.entry.Record()
	if r.Role != journal.Destination || v.mark() != evict.MarkCompleted {
		return
	}
	log := v.host.log.With("eviction", r.ID, "vm", r.VM)
	v.mu.Lock()
	task := v.huge.task
	v.mu.Unlock()
	if task == nil {
		var err error
		if task, err = evict.LoadHugePages(record{v.entry}); err != nil {
			log.Warn("it is not known which of the VM's memory was in huge pages", "error", err)
			return
		}
	}
	switch {
	case task == nil:
		return
	case task.Done != nil:
		v.change(func() { v.huge.done = *task.Done })
		return
	case !v.host.config.HugePages:
		return
	}
	ctx, cancel := context.WithCancelCause(v.host.life)
	v.change(func() { v.huge.cancel = cancel })
	v.host.tasks.Go(func() {
		defer cancel(nil)
		before := 0
		show := func(done evict.Restored) {
			v.host.metrics.hugeRestored.Add(float64(done.Restored - before))
			before = done.Restored
			v.change(func() { v.huge.done = done })
		}
		done, err := task.Restore(ctx, log, show)
		if errors.Is(err, errLeaves) {
			done.Reason, err = err.Error(), nil
		}
		show(done)
		v.change(func() { v.huge.cancel = nil })
		if err != nil {
			return // the next daemon goes on
		}
		b, err := json.Marshal(evict.HugePages{Done: &done})
		if err == nil {
			err = v.entry.Keep(evict.KeptHuge, b)
		}
		if err != nil {
			log.Warn("cannot record in the journal that the VM has its huge pages", "error", err)
		}
	})
}

// leaveHuge ends the tasks of a VM that is about to leave.
func (h *Host) leaveHuge(vm string) {
	for _, v := range h.list() {
		if v.entry.Record().VM != vm {
			continue
		}
		v.mu.Lock()
		cancel := v.huge.cancel
		v.mu.Unlock()
		if cancel != nil {
			cancel(errLeaves)
		}
	}
}

// message is the state of the task as the API tells it; nil if there is none. It is called with
// the eviction's mu held.
func (r *restoring) message() *hostv1.HugePages {
	if r.done.Huge == 0 {
		return nil
	}
	return &hostv1.HugePages{
		Huge: uint64(r.done.Huge), Restored: uint64(r.done.Restored),
		Sparse: uint64(r.done.Sparse), UnderWay: r.cancel != nil, Reason: r.done.Reason,
		LongestS: r.done.Longest, ElapsedS: r.done.Elapsed,
	}
}

// hugeLeft tells of the tasks under way.
type hugeLeft struct{ h *Host }

var hugeMissing = prometheus.NewDesc("vacate_huge_pages_missing",
	"Units of 2 MiB that were huge pages of a VM at its source, and are not yet here. "+
		"Only of VMs that are being given them back.",
	[]string{"vm"}, nil)

// Describe implements prometheus.Collector.
func (l hugeLeft) Describe(ch chan<- *prometheus.Desc) { ch <- hugeMissing }

// Collect implements prometheus.Collector.
func (l hugeLeft) Collect(ch chan<- prometheus.Metric) {
	missing := map[string]int{} // one VM may have several evictions
	for _, v := range l.h.list() {
		v.mu.Lock()
		if v.huge.cancel != nil {
			d := v.huge.done
			missing[v.entry.Record().VM] = d.Huge - d.Restored - d.Sparse
		}
		v.mu.Unlock()
	}
	for vm, n := range missing {
		ch <- prometheus.MustNewConstMetric(hugeMissing, prometheus.GaugeValue, float64(n), vm)
	}
}
