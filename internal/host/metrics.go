package host

import (
	"net/http"

	"vacate/internal/evict"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are what Prometheus is told.
type metrics struct {
	registry      *prometheus.Registry
	ended         *prometheus.CounterVec
	refused       *prometheus.CounterVec
	offersRefused prometheus.Counter
	guarded       prometheus.Counter
}

func newMetrics(h *Host) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vacate_evictions_ended_total", Help: "Evictions that ended since the daemon started, by this host's role and the outcome.",
		}, []string{"role", "outcome"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vacate_link_turned_away_total", Help: "Connections to the link that did not become part of a session, by reason.",
		}, []string{"reason"}),
		offersRefused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "vacate_offers_refused_total", Help: "VMs that were offered by peers and not taken.",
		}),
		guarded: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "vacate_guard_evictions_total", Help: "Evictions that the daemon began by itself, as its host was overloaded.",
		}),
	}
	m.registry.MustRegister(m.ended, m.refused, m.offersRefused, m.guarded, open{h}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// open tells of the evictions that have not ended.
type open struct{ h *Host }

var (
	openState    = prometheus.NewDesc("vacate_evictions_open", "Evictions that have not ended, by role and state; state is empty where an operator has to decide.", []string{"role", "state"}, nil)
	openPages    = prometheus.NewDesc("vacate_eviction_pages", "Pages of an eviction under way that were dealt with.", []string{"eviction", "vm", "role"}, nil)
	openTotal    = prometheus.NewDesc("vacate_eviction_pages_total", "Pages of the VM of an eviction under way.", []string{"eviction", "vm", "role"}, nil)
	openFetches  = prometheus.NewDesc("vacate_eviction_fetches", "Pages that the VM of an eviction under way waited for.", []string{"eviction", "vm", "role"}, nil)
	openDecision = prometheus.NewDesc("vacate_evictions_undecided", "Evictions whose VM stands frozen here and needs an operator, or the other host, to go on.", nil, nil)
	certExpires  = prometheus.NewDesc("vacate_certificate_expires_seconds", "When this host's certificate expires, in seconds since 1970.", nil, nil)
)

// Describe implements prometheus.Collector.
func (o open) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{openState, openPages, openTotal, openFetches, openDecision, certExpires} {
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
		labels := []string{r.ID.String(), r.VM, string(r.Role)}
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

// handler serves /metrics.
func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
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
