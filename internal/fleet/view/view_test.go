package view

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"
)

func TestRules(t *testing.T) {
	for _, text := range []string{
		"db: vms app=db must run apart by rack",
		"vms name=web1|web2 should run together",
		"vms gpu must run on hosts gpu=a100",
		"vms tier=test never run on hosts rack=r1,!old",
		"vms app=legacy must stay",
		"vms name=*-db-* should run apart",
	} {
		r, err := ParseRule(text)
		if err != nil || r.String() != text {
			t.Errorf("%q becomes %q: %v", text, r, err)
			continue
		}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var again Rule
		if err := json.Unmarshal(b, &again); err != nil || again.String() != text {
			t.Errorf("%q becomes %s, then %q: %v", text, b, again, err)
		}
	}
	for text, want := range map[string]string{
		"":                                    "want",
		"vms":                                 "want",
		"vms app=db must run":                 "want",
		"vms app=db must fly apart":           "want",
		"vms app=db could run apart":          "want must, should or never",
		"vms app=db never run apart":          "never is for hosts",
		"vms app=db never run together":       "must run apart",
		"vms app=db must run on hosts":        "want",
		"vms app=db must run on rack=r1":      "want",
		"vms app=db must stay here":           "want",
		"vms app=db must run stay":            "want",
		"vms app=db must run apart by":        "want",
		"vms app=db must run apart by a=b":    "label",
		"vms app= must run apart":             "value",
		"vms =db must run apart":              "want a label",
		"vms app=db, must run apart":          "want a label",
		"a=b: vms app must run apart":         "name",
		"vms app=<b> must run apart":          "value",
		"vms app=db must run apart by rack x": "want",
		strings.Repeat("x", 5000):             "more than",
	} {
		if r, err := ParseRule(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %+v, %v; want %q", text, r, err, want)
		}
	}
}

func TestSelector(t *testing.T) {
	labels := Labels{"app": "db", "tier": "prod", "empty": ""}
	for text, want := range map[string]bool{
		"app=db": true, "app=cache": false, "app=cache|db": true, "app!=db": false,
		"app!=cache": true, "other!=x": true, "other=x": false, "app": true, "!app": false,
		"!other": true, "other": false, "empty": true, "app=db,tier=prod": true,
		"app=db,tier=test": false, "name=vm7": true, "name=vm*": true, "name=*7": true,
		"name=*m*": true, "name=v*m*8": false, "name=vm7*7": false, "name!=vm*": false,
		"app=d": false, "app=*": true, "tier=p*d": true, "tier=p*x*d": false, "name": true,
	} {
		s, err := ParseSelector(text)
		if err != nil || s.Picks("vm7", labels) != want {
			t.Errorf("%q: %v, want %v: %v", text, !want, want, err)
		}
	}
	if !(Selector{}).Picks("any", nil) {
		t.Error("no condition picks all")
	}
}

func FuzzParseRule(f *testing.F) {
	f.Add("db: vms app=db must run apart by rack")
	f.Add("vms name=a*|b,!c never run on hosts rack!=r1")
	f.Add("vms a=b should stay")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRule(s)
		if err != nil {
			return
		}
		again, err := ParseRule(r.String())
		if err != nil || again.String() != r.String() {
			t.Errorf("%q becomes %q, then %q: %v", s, r, again, err)
		}
		r.VMs.Picks("abc", Labels{"a": "b"})
	})
}

func FuzzHours(f *testing.F) {
	f.Add("mon-fri 22:00-06:00")
	f.Add("sat,sun 00:00-24:00")
	f.Fuzz(func(t *testing.T, s string) {
		h, err := ParseHours(s)
		if err != nil {
			return
		}
		if again, err := ParseHours(h.String()); err != nil || again != h {
			t.Errorf("%q becomes %q: %+v, %v", s, h, again, err)
		}
	})
}

func TestHours(t *testing.T) {
	at := func(s string) time.Time {
		at, err := time.Parse("2006-01-02 15:04", s)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	for _, c := range []struct {
		hours, at string
		want      bool
	}{
		{"22:00-06:00", "2026-11-30 21:59", false},
		{"22:00-06:00", "2026-11-30 22:00", true},
		{"22:00-06:00", "2026-11-30 05:59", true},
		{"22:00-06:00", "2026-11-30 06:00", false},
		{"mon 22:00-06:00", "2026-11-30 23:00", true}, // a Monday
		{"mon 22:00-06:00", "2026-11-30 05:00", false},
		{"mon 22:00-06:00", "2026-12-01 05:00", true},
		{"fri-mon 08:00-18:00", "2026-11-29 08:00", true},
		{"fri-mon 08:00-18:00", "2026-12-01 08:00", false},
		{"sat,sun 00:00-24:00", "2026-11-29 23:59", true},
	} {
		h, err := ParseHours(c.hours)
		if err != nil {
			t.Fatal(err)
		}
		if got := (Policy{Quiet: []Hours{h}}).QuietAt(at(c.at)); got != c.want {
			t.Errorf("%s has %s: %v", c.hours, c.at, got)
		}
	}
	for _, bad := range []string{"", "8-9", "08:00", "08:00-08:00", "mo 08:00-09:00",
		"25:00-01:00", "08:60-09:00", "24:00-01:00", "a b c", "08:00-24:01", "-08:00"} {
		if h, err := ParseHours(bad); err == nil {
			t.Errorf("%q: %v", bad, h)
		}
	}
}

func TestReportCheck(t *testing.T) {
	good := func() Report {
		return Report{Host: Host{Name: "a", CPUs: 4, Used: 1, Total: 8 << 30, Available: 4 << 30,
			Rate: 1e9, Labels: Labels{"rack": "r1"}},
			VMs: []VM{{Name: "vm 1", CPU: 1, Memory: 1 << 30}}}
	}
	if err := good().Check(); err != nil {
		t.Fatal(err)
	}
	for want, spoil := range map[string]func(r *Report){
		"name":       func(r *Report) { r.Host.Name = "" },
		"control":    func(r *Report) { r.Host.Name = "a\x1b[2J" },
		"0 cores":    func(r *Report) { r.Host.CPUs = 0 },
		"NaN":        func(r *Report) { r.Host.Used = math.NaN() },
		"-1":         func(r *Report) { r.Host.Waiting = -1 },
		"available":  func(r *Report) { r.Host.Available = r.Host.Total + 1 },
		"link":       func(r *Report) { r.Host.Rate = math.Inf(1) },
		"twice":      func(r *Report) { r.VMs = append(r.VMs, r.VMs[0]) },
		"memory":     func(r *Report) { r.VMs[0].InUse = 1 << 60 },
		"vCPUs":      func(r *Report) { r.VMs[0].VCPUs = -1 },
		"waits":      func(r *Report) { r.VMs[0].Waiting = math.Inf(1) },
		"label":      func(r *Report) { r.VMs[0].Labels = Labels{"name": "b"} },
		"value":      func(r *Report) { r.Host.Labels = Labels{"rack": "a b"} },
		"tells more": func(r *Report) { r.Host.Closed = strings.Repeat("x", 2000) },
	} {
		r := good()
		spoil(&r)
		if err := r.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}

func TestPolicyCheck(t *testing.T) {
	if err := DefaultPolicy().Check(); err != nil {
		t.Fatal(err)
	}
	for want, spoil := range map[string]func(p *Policy){
		"mode":       func(p *Policy) { p.Mode = "manual" },
		"starving":   func(p *Policy) { p.Starving = 90 },
		"reserve":    func(p *Policy) { p.Reserve = -0.1 },
		"max_load":   func(p *Policy) { p.MaxLoad = 0 },
		"overcommit": func(p *Policy) { p.Overcommit = math.NaN() },
		"min_gain":   func(p *Policy) { p.MinGain = -1 },
		"per_host":   func(p *Policy) { p.PerLink = -1 },
		"sustain":    func(p *Policy) { p.Settle = -1 },
		"late":       func(p *Policy) { p.Late = 0 },
		"no day":     func(p *Policy) { p.Quiet = []Hours{{From: 1, To: 2}} },
	} {
		p := DefaultPolicy()
		spoil(&p)
		if err := p.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}

func TestParseLabels(t *testing.T) {
	for text, want := range map[string]int{"": 0, "app=db": 1, "app=db,tier=prod": 2, "gpu=": 1,
		"app": -1, "app=db,app=web": -1, "name=x": -1, "a b=c": -1, "app=d b": -1, ",": -1} {
		l, err := ParseLabels(text)
		if want < 0 && err == nil || want >= 0 && (err != nil || len(l) != want) {
			t.Errorf("%q: %v, %v", text, l, err)
		}
	}
}
