package host

import (
	"context"
	"net/http"
	"sync"
	"time"

	"vacate/internal/evict"
	"vacate/internal/sys/pressure"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are what Prometheus is told.
type metrics struct {
	registry      *prometheus.Registry
	vms           *prometheus.Registry // apart, as monitors may have to be asked
	ended         *prometheus.CounterVec
	refused       *prometheus.CounterVec
	offersRefused prometheus.Counter
	guarded       prometheus.Counter
	hugeRestored  prometheus.Counter
	bytes         *prometheus.CounterVec
	// Of evictions from here that completed.
	down, transfer, whole prometheus.Histogram
}

func newMetrics(h *Host) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(), vms: prometheus.NewRegistry(),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vacate_evictions_ended_total",
			Help: "Evictions that ended since the daemon started, by this host's role and the " +
				"outcome.",
		}, []string{"role", "outcome"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vacate_link_turned_away_total",
			Help: "Connections to the link that did not become part of a session, by reason.",
		}, []string{"reason"}),
		offersRefused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "vacate_offers_refused_total",
			Help: "VMs that were offered by peers and not taken.",
		}),
		guarded: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "vacate_guard_evictions_total",
			Help: "Evictions that the daemon began by itself, as its host was overloaded.",
		}),
		hugeRestored: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "vacate_huge_pages_restored_total",
			Help: "Units of 2 MiB that were made huge pages again, of VMs that came here.",
		}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vacate_link_bytes_total",
			Help: "Bytes over the link, both ways, of evictions since the daemon started, by " +
				"this host's role.",
		}, []string{"role"}),
		down: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "vacate_eviction_down_time_seconds", Help: "How long VMs that left stood still.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 11),
		}),
		transfer: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "vacate_eviction_transfer_seconds",
			Help: "How long it took until VMs that left ran on the other host, since they " +
				"were first touched.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 11),
		}),
		whole: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "vacate_eviction_duration_seconds",
			Help: "How long it took until this host held nothing more of VMs that left, " +
				"since they were first touched.",
			Buckets: prometheus.ExponentialBuckets(0.5, 2, 13),
		}),
	}
	m.registry.MustRegister(m.own(h)...)
	m.vms.MustRegister(vmTimes{h})
	m.registry.MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// own are those that this daemon has and others have not.
func (m *metrics) own(h *Host) []prometheus.Collector {
	return []prometheus.Collector{m.ended, m.refused, m.offersRefused, m.guarded, m.bytes, m.down,
		m.transfer, m.whole, m.hugeRestored, open{h}, hugeLeft{h}}
}

// left takes the report of a VM that left into account.
func (m *metrics) left(r evict.Report) {
	for _, o := range []struct {
		histogram prometheus.Histogram
		seconds   *float64
	}{{m.down, r.Down}, {m.transfer, r.Transfer}, {m.whole, r.Total}} {
		if o.seconds != nil {
			o.histogram.Observe(*o.seconds)
		}
	}
}

// scrapeTime is how long the monitors of VMs may take that are asked which process they are.
const scrapeTime = time.Second

// open tells of the evictions that have not ended.
type open struct{ h *Host }

var (
	openState = prometheus.NewDesc("vacate_evictions_open",
		"Evictions that have not ended, by role and state; state is empty where an operator has "+
			"to decide.", []string{"role", "state"}, nil)
	openPages = prometheus.NewDesc("vacate_eviction_pages",
		"Pages of an eviction under way that were dealt with.", []string{"vm", "role"}, nil)
	openTotal = prometheus.NewDesc("vacate_eviction_vm_pages",
		"Pages of the VM of an eviction under way.", []string{"vm", "role"}, nil)
	openFetches = prometheus.NewDesc("vacate_eviction_fetches",
		"Pages that the VM of an eviction under way waited for.", []string{"vm", "role"}, nil)
	openDecision = prometheus.NewDesc("vacate_evictions_undecided",
		"Evictions whose VM stands frozen here and needs an operator, or the other host, to go on.",
		nil, nil)
	certExpires = prometheus.NewDesc("vacate_certificate_expires_seconds",
		"When this host's certificate expires, in seconds since 1970.", nil, nil)
	vmRan = prometheus.NewDesc("vacate_vm_cpu_seconds_total",
		"CPU time that the vCPUs of a VM here had.", []string{"vm"}, nil)
	vmWaited = prometheus.NewDesc("vacate_vm_cpu_waiting_seconds_total",
		"CPU time that the vCPUs of a VM here wanted and did not have: what the guest calls steal.",
		[]string{"vm"}, nil)
)

// Describe implements prometheus.Collector.
func (o open) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{openState, openPages, openTotal, openFetches, openDecision,
		certExpires} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (o open) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	type key struct {
		role  string
		state evict.State
	}
	states := map[key]int{}
	undecided := 0
	for _, v := range o.h.list() {
		if v.ended() {
			continue
		}
		r := v.entry.Record()
		if v.decidable() {
			undecided++
		}
		v.mu.Lock()
		state, p := v.state, v.progress
		v.mu.Unlock()
		states[key{string(r.Role), state}]++
		labels := []string{r.VM, string(r.Role)}
		gauge(openPages, float64(p.Pages), labels...)
		gauge(openTotal, float64(p.Total), labels...)
		gauge(openFetches, float64(p.Fetches), labels...)
	}
	for k, n := range states {
		gauge(openState, float64(n), k.role, string(k.state))
	}
	gauge(openDecision, float64(undecided))
	if o.h.identity != nil {
		gauge(certExpires, float64(o.h.identity.Info().NotAfter.Unix()))
	}
}

// vmTimes tells of the CPU of the VMs here.
type vmTimes struct{ h *Host }

// Describe implements prometheus.Collector.
func (t vmTimes) Describe(ch chan<- *prometheus.Desc) {
	ch <- vmRan
	ch <- vmWaited
}

// Collect implements prometheus.Collector.
func (t vmTimes) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(t.h.life, scrapeTime)
	defer cancel()
	vms, _ := t.h.vms().All(ctx) // vacate ls tells of those that are wrong
	var looks sync.WaitGroup
	for _, vm := range vms {
		looks.Go(func() {
			p := t.h.portray(ctx, vm)
			if p.process.PID <= 0 {
				return
			}
			counted, err := pressure.ReadVM(p.process, p.vcpus)
			if err != nil {
				return // it ended just now
			}
			ch <- prometheus.MustNewConstMetric(vmRan, prometheus.CounterValue,
				counted.Ran.Seconds(), vm.Name)
			ch <- prometheus.MustNewConstMetric(vmWaited, prometheus.CounterValue,
				counted.Waited.Seconds(), vm.Name)
		})
	}
	looks.Wait()
}

// handler serves /metrics.
func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics",
		promhttp.HandlerFor(prometheus.Gatherers{m.registry, m.vms}, promhttp.HandlerOpts{}))
	return mux
}

// counters are the metrics that count, by name and labels.
func (m *metrics) counters() map[string]uint64 {
	all := map[string]uint64{}
	families, err := m.registry.Gather()
	if err != nil {
		return all
	}
	for _, f := range families {
		for _, s := range f.GetMetric() {
			if s.GetCounter() == nil {
				continue
			}
			name := f.GetName()
			for _, l := range s.GetLabel() {
				name += " " + l.GetName() + "=" + l.GetValue()
			}
			all[name] = uint64(s.GetCounter().GetValue())
		}
	}
	return all
}
