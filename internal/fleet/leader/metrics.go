package leader

import (
	"net/http"
	"slices"
	"time"

	"vacate/internal/fleet/store"
	"vacate/internal/fleet/view"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are what Prometheus is told. Only the member that leads has something to tell of hosts.
type metrics struct {
	registry  *prometheus.Registry
	decisions *prometheus.CounterVec
	ratio     prometheus.Histogram
	predicted prometheus.Counter
	took      prometheus.Counter
	refused   *prometheus.CounterVec
	hooks     *prometheus.CounterVec
	writes    *prometheus.HistogramVec
}

func newMetrics(b *Brain) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vacate_fleet_decisions_total",
			Help: "Decisions that have ended since this member started, by what they were for " +
				"and what came of them.",
		}, []string{"cause", "outcome"}),
		ratio: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "vacate_fleet_took_to_predicted_ratio",
			Help: "How long evictions took that the fleet ordered and that completed, as a " +
				"multiple of what was predicted.",
			Buckets: []float64{.25, .5, .67, .8, .9, 1, 1.1, 1.25, 1.5, 2, 4, 8},
		}),
		predicted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "vacate_fleet_predicted_seconds_total",
			Help: "Predicted durations of evictions that the fleet ordered and that completed.",
		}),
		took: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "vacate_fleet_took_seconds_total",
			Help: "Durations of evictions that the fleet ordered and that completed.",
		}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vacate_fleet_refused_total",
			Help: "Requests of operators, joins and reports of hosts, and orders, that were " +
				"refused.",
		}, []string{"what"}),
		hooks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vacate_fleet_hooks_total",
			Help: "Calls of the hook, by event and what came of them.",
		}, []string{"event", "outcome"}),
		writes: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "vacate_fleet_store_write_seconds",
			Help:    "How long writes to the fleet's store took, by whether they were done.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}, []string{"done"}),
	}
	m.registry.MustRegister(m.own(b)...)
	m.registry.MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// own are those that other programs do not have.
func (m *metrics) own(b *Brain) []prometheus.Collector {
	return []prometheus.Collector{m.decisions, m.ratio, m.predicted, m.took, m.refused, m.hooks,
		m.writes, state{b}}
}

// outcomes are those that a decision may have; a host's word may be anything.
var outcomes = []string{"completed", "shut down", "aborted", "refused", "lost contact",
	"never began", "watched", "rejected", "forgotten", "resumed here", "discarded"}

// closed takes a decision that has ended into account.
func (m *metrics) closed(d store.Decision) {
	outcome := d.Outcome
	if !slices.Contains(outcomes, outcome) {
		outcome = "other"
	}
	p := d.Plan.Decision
	m.decisions.WithLabelValues(string(p.Cause), outcome).Inc()
	if d.Outcome == "completed" && d.TotalS != nil && p.Predicted.Total > 0 {
		m.ratio.Observe(*d.TotalS / p.Predicted.Total.Seconds())
		m.predicted.Add(p.Predicted.Total.Seconds())
		m.took.Add(*d.TotalS)
	}
}

// state tells how the fleet is, if this member leads.
type state struct{ b *Brain }

var (
	leadsDesc = prometheus.NewDesc("vacate_fleet_leads", "1 if this member leads, else 0.", nil,
		nil)
	epochDesc = prometheus.NewDesc("vacate_fleet_epoch", "Epoch of this member's term.", nil, nil)
	hostsDesc = prometheus.NewDesc("vacate_fleet_hosts",
		"Hosts of the fleet: reporting, late, or new (not heard by this leader).",
		[]string{"state"}, nil)
	vmsDesc         = prometheus.NewDesc("vacate_fleet_vms", "VMs that hosts tell of.", nil, nil)
	starvingDesc    = prometheus.NewDesc("vacate_fleet_vms_starving", "VMs that starve.", nil, nil)
	maintenanceDesc = prometheus.NewDesc("vacate_fleet_maintenance",
		"Hosts in maintenance, by its phase.", []string{"phase"}, nil)
	stayingDesc = prometheus.NewDesc("vacate_fleet_drain_staying",
		"VMs that cannot leave hosts that are being drained.", nil, nil)
	plansDesc = prometheus.NewDesc("vacate_fleet_plans", "Evictions that were ordered and have "+
		"not ended.", nil, nil)
	waitingDesc = prometheus.NewDesc("vacate_fleet_waiting",
		"Decisions that wait for an operator.", nil, nil)
	modeDesc = prometheus.NewDesc("vacate_fleet_mode", "1 for the mode of the fleet.",
		[]string{"mode"}, nil)
)

// Describe implements prometheus.Collector.
func (s state) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{leadsDesc, epochDesc, hostsDesc, vmsDesc, starvingDesc,
		maintenanceDesc, stayingDesc, plansDesc, waitingDesc, modeDesc} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (s state) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	t := s.b.leads()
	if t == nil {
		gauge(leadsDesc, 0)
		return
	}
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	states, vms, starving := t.count(now)
	phases := map[view.Phase]int{view.Planned: 0, view.Draining: 0, view.Drained: 0,
		view.Restoring: 0}
	staying := 0
	for name, m := range t.maintenance {
		phases[m.Phase]++
		if m.Phase == view.Draining {
			_, stay := t.planner.Remaining(now, name)
			staying += len(stay)
		}
	}
	gauge(leadsDesc, 1)
	gauge(epochDesc, float64(t.Epoch))
	for state, n := range states {
		gauge(hostsDesc, float64(n), state)
	}
	gauge(vmsDesc, float64(vms))
	gauge(starvingDesc, float64(starving))
	for phase, n := range phases {
		gauge(maintenanceDesc, float64(n), string(phase))
	}
	gauge(stayingDesc, float64(staying))
	gauge(plansDesc, float64(len(t.plans)))
	gauge(waitingDesc, float64(len(t.waiting)))
	gauge(modeDesc, 1, string(t.policy.Mode))
}

// Metrics serves /metrics for Prometheus.
func (b *Brain) Metrics() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(b.metrics.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: 2}))
	return mux
}
