package host

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
)

// measured is a host with an eviction under way, and metrics of it.
func measured(t *testing.T) (*Host, *eviction) {
	t.Helper()
	j, err := journal.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	h := &Host{journal: j, evictions: map[journal.ID]*eviction{}, life: t.Context()}
	h.metrics = newMetrics(h)
	entry, err := j.Create(journal.Record{ID: journal.NewID(), Role: journal.Source, VM: "web1",
		Mark: string(evict.MarkBegun)})
	if err != nil {
		t.Fatal(err)
	}
	v := h.newEviction(entry)
	h.add(v)
	return h, v
}

// Names and labels are as Prometheus wants them, and nothing that is new with each eviction is a
// label.
func TestMetricNames(t *testing.T) {
	h, v := measured(t)
	h.metrics.refused.WithLabelValues("peer").Inc()
	h.metrics.ended.WithLabelValues("source", "completed").Inc()
	v.show(evict.Progress{State: evict.Pushing, Bytes: 10})
	families, err := prometheus.Gatherers{h.metrics.registry, h.metrics.vms}.Gather()
	if err != nil {
		t.Fatal(err)
	}
	families = slices.DeleteFunc(families,
		func(f *dto.MetricFamily) bool { return !strings.HasPrefix(f.GetName(), "vacate_") })
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if strings.Contains(l.GetValue(), v.entry.ID().String()) {
					t.Errorf("%s: label %s is an eviction's ID", f.GetName(), l.GetName())
				}
			}
		}
	}
}

// Bytes are counted as they come, also where an engine that took the eviction up counts from 0.
func TestMetricBytes(t *testing.T) {
	h, v := measured(t)
	for _, n := range []uint64{10, 10, 25, 4, 9} {
		v.show(evict.Progress{State: evict.Pushing, Bytes: n})
	}
	if n := h.metrics.counters()["vacate_link_bytes_total role=source"]; n != 34 {
		t.Errorf("%d bytes, want 34", n)
	}
}

// The alerts and the dashboard of the package name metrics that there are.
func TestPackagedMetrics(t *testing.T) {
	h, _ := measured(t)
	there := map[string]bool{}
	name := regexp.MustCompile(`fqName: "(\w+)"`)
	for _, c := range append(h.metrics.own(h), vmTimes{h}) {
		descs := make(chan *prometheus.Desc)
		go func() {
			c.Describe(descs)
			close(descs)
		}()
		for d := range descs {
			there[name.FindStringSubmatch(d.String())[1]] = true
		}
	}
	used := map[string]bool{}
	for _, file := range []string{"../../packaging/alerts.yml", "../../packaging/dashboard.json"} {
		for _, word := range regexp.MustCompile(`\bvacate_\w+`).FindAllString(string(must(t,
			os.ReadFile, file)), -1) {
			word = strings.TrimSuffix(word, "_bucket")
			used[word] = true
			if !there[word] {
				t.Errorf("%s names %s, which is no metric", file, word)
			}
		}
	}
	for word := range there {
		if !used[word] {
			t.Errorf("neither the alerts nor the dashboard use %s", word)
		}
	}
}
