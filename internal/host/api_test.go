package host

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
)

// words collects what a daemon logs.
type words struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (w *words) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.Write(b)
}

func (w *words) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}

// serve runs a daemon in this process until the test ends. It logs to the test, and to others.
func serve(t *testing.T, c Config, logs ...io.Writer) *Host {
	t.Helper()
	log := io.MultiWriter(append(logs, t.Output())...)
	h, err := Open(c, "test", slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- h.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
	return h
}

func newTransport(c *tls.Config) *http.Transport {
	return &http.Transport{TLSClientConfig: c, ForceAttemptHTTP2: true}
}

func clientOf(t *http.Transport) *http.Client {
	return &http.Client{Transport: t, Timeout: 10 * time.Second}
}

// plainHost is a daemon without certificates and without a link.
func plainHost(t *testing.T, logs ...io.Writer) (h *Host, client hostv1.HostClient,
	web *http.Client) {
	t.Helper()
	dir, err := os.MkdirTemp("", "vacate")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Mkdir(filepath.Join(dir, "vms"), 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "vacated.toml")
	text := "plain = true\nname = \"hosta\"\nsocket = \"sock\"\njournal = \"journal\"\nvms = " +
		"\"vms\"\n[peers.hostb]\naddress = \"127.0.0.1:1\"\nmay_send = true\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := ReadConfig(file)
	if err != nil {
		t.Fatal(err)
	}
	h = serve(t, c, logs...)
	transport := &http.Transport{DialContext: func(ctx context.Context,
		_, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", c.Socket)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	web = clientOf(transport)
	return h, hostv1.NewHostClient(web, "http://host"), web
}

// What the API answers to who asks wrongly.
func TestAPI(t *testing.T) {
	var log words
	h, api, web := plainHost(t, &log)
	ctx := t.Context()
	code := func(err error, want connect.Code, says string) {
		t.Helper()
		if connect.CodeOf(err) != want || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %v that says %q", err, want, says)
		}
	}
	id := strings.Repeat("ab", 16)
	_, err := api.GetEviction(ctx, connect.NewRequest(&hostv1.GetEvictionRequest{Id: "x"}))
	code(err, connect.CodeInvalidArgument, "32 digits")
	_, err = api.GetEviction(ctx, connect.NewRequest(&hostv1.GetEvictionRequest{Id: id}))
	code(err, connect.CodeNotFound, id)
	_, err = api.Evict(ctx, connect.NewRequest(&hostv1.EvictRequest{Vm: "web1", To: "hostb"}))
	code(err, connect.CodeNotFound, "web1")
	_, err = api.Evict(ctx, connect.NewRequest(&hostv1.EvictRequest{Vm: "../web1", To: "hostb"}))
	code(err, connect.CodeInvalidArgument, "..")
	_, err = api.Abort(ctx, connect.NewRequest(&hostv1.AbortRequest{Id: id}))
	code(err, connect.CodeNotFound, id)
	_, err = api.Decide(ctx,
		connect.NewRequest(&hostv1.DecideRequest{Id: id,
			Decision: hostv1.Decision_DECISION_DISCARD}))
	code(err, connect.CodeNotFound, id)
	entry, err := h.journal.Create(journal.Record{ID: journal.NewID(), Role: journal.Source,
		VM: "gone", Peer: "hostb", Mark: string(evict.MarkBegun)})
	if err == nil {
		err = entry.Finish(string(evict.MarkCompleted), "", nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	h.add(h.newEviction(entry))
	// Whatever else a word lacks, first comes that there is nothing to decide.
	_, err = api.Decide(ctx, connect.NewRequest(&hostv1.DecideRequest{Id: entry.ID().String(),
		Decision: hostv1.Decision_DECISION_RESUME_HERE}))
	code(err, connect.CodeFailedPrecondition, "the eviction of VM gone has ended: completed")
	_, err = api.Export(ctx, connect.NewRequest(&hostv1.ExportRequest{Id: id, Path: "/x"}))
	code(err, connect.CodeNotFound, id)
	_, err = api.Doctor(ctx, connect.NewRequest(&hostv1.DoctorRequest{To: "hostc"}))
	code(err, connect.CodeNotFound, "hostc")
	if r, err := api.Doctor(ctx, connect.NewRequest(&hostv1.DoctorRequest{})); err != nil ||
		len(r.Msg.Findings) == 0 {
		t.Errorf("%v, %v", r, err)
	}
	if r, err := api.Status(ctx, connect.NewRequest(&hostv1.StatusRequest{})); err != nil ||
		r.Msg.Host != "hosta" || len(r.Msg.Peers) != 1 {
		t.Errorf("%v, %v", r, err)
	}

	get := func(path, body string) string {
		t.Helper()
		method := http.MethodGet
		if body != "" {
			method = http.MethodPost
		}
		req, err := http.NewRequestWithContext(ctx, method, "http://host"+path,
			strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		r, err := web.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	// As curl would.
	if s := get("/vacate.host.v1.Host/ListVMs", "{}"); s != `{"vms":[],"problems":[]}` {
		t.Errorf("there are VMs: %s", s)
	}
	if s := get("/vacate.host.v1.Host/Evict", `{"vm":"web1","to":"hostb"}`); !strings.Contains(s,
		"not_found") {
		t.Errorf("evicted a VM that is not there: %s", s)
	}
	if s := get("/metrics", ""); !strings.Contains(s, "vacate_evictions_undecided 0") {
		t.Errorf("metrics: %.500s", s)
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	for _, call := range []string{"Evict vm=web1 to=hostb", "Abort eviction=" + id,
		"Decide eviction=" + id, "Export eviction=" + id} {
		want := fmt.Sprintf("operator=\"user %s\" asks=%s", me.Username, call)
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q", want)
		}
	}
}

func TestConfig(t *testing.T) {
	for text, says := range map[string]string{
		"listen = \"x\"":                 "HOST:PORT",
		"plain = true":                   "needs name",
		"name = \"a\"":                   "plain = true only",
		"nonsense = 1":                   "no setting",
		"journal = \"\"":                 "journal is empty",
		"[api]\nlisten = \":1\"":         "operators",
		"[api]\noperators = [\"admin\"]": "api.listen",
		"[api]\nlisten = \":1\"\noperators = [\"Admin\"]":                  "\"admin\"",
		"listen = \":99999\"":                                              "65535",
		"listen = \":-1\"":                                                 "65535",
		"metrics = \"127.0.0.1:nosuchport\"":                               "65535",
		"[peers.b]\naddress = \"b:0\"":                                     "65535",
		"[peers.b]\naddress = \"b:65536\"":                                 "65535",
		"[peers.HostB]\naddress = \"b:1\"":                                 "\"hostb\"",
		"plain = true\nname = \"a\"\n[peers.a]\naddress = \"127.0.0.1:1\"": "this host itself",
		"plain = true\nname = \"a\"\n[peers.B]\naddress = \"127.0.0.1:1\"": "",
		"[peers.b]\naddress = \"b\"":                                       "HOST:PORT",
		"[peers.\"../b\"]\naddress = \"b:1\"":                              "peers",
		"plain = true\nname = \"a\"\n[peers.b]\naddress = \"b:1\"":         "IP address",
		"plain = true\nname = \"a\"\n[peers.b]\nmay_send = true":           "address",
		"[peers.b]\nrate = 99999999999":                                    "rate",
		"listen = 5":                                                       "listen",
		"give_back = \"-1s\"":                                              "give_back",
		"give_back = \"30h\"":                                              "give_back",
		"give_back = \"30s\"":                                              "",
		"[peers.b]\naddress = \"b:1\"\nmay_send = true\nrate = 500":        "",
		"plain = true\nname = \"a\"\n[peers.b]\naddress = \"[::1]:1\"":     "",
	} {
		file := filepath.Join(t.TempDir(), "vacated.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := ReadConfig(file)
		if says == "" {
			if err != nil || !filepath.IsAbs(c.Journal) {
				t.Errorf("%q: %v", text, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v; want something about %q", text, err, says)
		}
	}
}

// A configuration may be anything.
func FuzzConfig(f *testing.F) {
	b, err := os.ReadFile("../../packaging/vacated.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(
		[]byte("plain = true\nname = \"a\"\n[peers.b]\naddress = \"[::1]:1\"\nmay_send = " +
			"true\n[api]\nlisten = \":1\"\noperators = [\"x\"]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		file := filepath.Join(t.TempDir(), "vacated.toml")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := ReadConfig(file)
		if err == nil && c.check() != nil {
			t.Error("a configuration was taken that is wrong")
		}
	})
}

// A peer may ask anything.
func FuzzQuestion(f *testing.F) {
	f.Add([]byte(`{"facts":{"vm":"web1"}}`))
	f.Add([]byte(`{"ping":true}`))
	f.Add([]byte(`{"load":{"over_ms":1000}}`))
	f.Add([]byte(`{}`))
	// it has no peers, so that nobody gets facts
	h := &Host{config: Config{Name: "hosta", VMs: f.TempDir()}}
	f.Fuzz(func(t *testing.T, b []byte) {
		answer, err := h.asked(&evict.Request{Question: b}, "hostb")
		if err == nil {
			if answer != true {
				t.Errorf("%q was answered with %T", b, answer)
			}
		}
	})
}
