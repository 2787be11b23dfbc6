package ui

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A request is what somebody sends to the page's server.
type request struct {
	method, path, body string
	header             map[string]string
	host               string
}

// send sends a request, and returns the answer. Redirects are not followed.
func send(t *testing.T, address string, q request) (status int, body string, h http.Header) {
	t.Helper()
	r, err := http.NewRequest(q.method, address+q.path, strings.NewReader(q.body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range q.header {
		r.Header.Set(k, v)
	}
	if q.host != "" {
		r.Host = q.host
	}
	a, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Body.Close()
	if a.Header.Get("Content-Type") == "text/event-stream" {
		line, err := bufio.NewReader(a.Body).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		return a.StatusCode, line, a.Header
	}
	b, err := io.ReadAll(a.Body)
	if err != nil {
		t.Fatal(err)
	}
	return a.StatusCode, string(b), a.Header
}

// enter logs in, and returns the headers that the page sends from then on.
func enter(t *testing.T, address, token string) map[string]string {
	t.Helper()
	status, body, h := send(t, address, request{method: "POST", path: "/api/login",
		body: `{"token": "` + token + `"}`, header: map[string]string{"Origin": address}})
	if status != http.StatusOK {
		t.Fatalf("%d: %s", status, body)
	}
	var got struct{ Key string }
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	set := h.Get("Set-Cookie")
	if !strings.Contains(set, "HttpOnly") || !strings.Contains(set, "SameSite=Strict") ||
		strings.Contains(set, got.Key) {
		t.Errorf("the cookie is %q", set)
	}
	return map[string]string{"Cookie": strings.Split(set, ";")[0], keyHeader: got.Key,
		"Origin": address, "Sec-Fetch-Site": "same-origin"}
}

// with is headers with some others.
func with(h map[string]string, more ...string) map[string]string {
	out := map[string]string{}
	for k, v := range h {
		out[k] = v
	}
	for i := 0; i < len(more); i += 2 {
		out[more[i]] = more[i+1]
	}
	return out
}

// Only the page itself, opened by who has the token, is served. Another user of the machine has no
// token, or at most the cookie, which browsers send to all ports of 127.0.0.1. Another site in the
// operator's browser has the cookie sent, or not, but neither the key nor the origin.
func TestSecrets(t *testing.T) {
	address, token := serve(t, NewHub())
	refusals(t, address, token, `{"kind": "nothing", "host": "a"}`, http.StatusConflict)
}

// refusals sends an order with and without secrets. The page itself gets a status for it.
func refusals(t *testing.T, address string, token func() string, order string, status int) {
	t.Helper()
	first := token()
	own := enter(t, address, first)
	other := enter(t, address, token())
	post := func(path string, h map[string]string) request {
		return request{method: "POST", path: path, body: order, header: h}
	}
	drop := func(h map[string]string, name string) map[string]string {
		out := with(h)
		delete(out, name)
		return out
	}
	for name, c := range map[string]struct {
		request
		want int
	}{
		"the page asks":  {post("/api/do", own), status},
		"the page looks": {request{method: "GET", path: "/api/stream", header: own}, http.StatusOK},
		"no secret": {post("/api/do", map[string]string{"Origin": address}),
			http.StatusUnauthorized},
		"the stream, no secret": {request{method: "GET", path: "/api/stream"},
			http.StatusUnauthorized},
		"the cookie alone": {post("/api/do", drop(own, keyHeader)), http.StatusUnauthorized},
		"the stream, the cookie alone": {request{method: "GET", path: "/api/stream",
			header: drop(own, keyHeader)}, http.StatusUnauthorized},
		"the key alone": {post("/api/do", drop(own, "Cookie")), http.StatusUnauthorized},
		"a cookie, and the key of another one": {post("/api/do", with(own, keyHeader,
			other[keyHeader])), http.StatusUnauthorized},
		"an empty key": {post("/api/ask", with(own, keyHeader, "")), http.StatusUnauthorized},
		"another site": {post("/api/do", with(own, "Origin", "https://evil.example",
			"Sec-Fetch-Site", "cross-site")), http.StatusForbidden},
		"another port": {post("/api/do", with(own, "Origin", "http://127.0.0.1:1",
			"Sec-Fetch-Site", "same-site")), http.StatusForbidden},
		"a sandboxed frame": {post("/api/do", with(own, "Origin", "null")), http.StatusForbidden},
		"no origin":         {post("/api/do", drop(own, "Origin")), http.StatusForbidden},
		"another port, by its word alone": {post("/api/do", with(own, "Sec-Fetch-Site",
			"same-site")), http.StatusForbidden},
		"a name that leads here": {request{method: "GET", path: "/", host: "evil.example",
			header: own}, http.StatusForbidden},
		"localhost": {request{method: "POST", path: "/api/do", body: order, host: "localhost",
			header: own}, http.StatusForbidden},
		"a script tag of another site": {request{method: "GET", path: "/app.js",
			header: map[string]string{"Sec-Fetch-Site": "cross-site",
				"Sec-Fetch-Dest": "script"}}, http.StatusForbidden},
		"a frame of another site": {request{method: "GET", path: "/",
			header: map[string]string{"Sec-Fetch-Site": "cross-site",
				"Sec-Fetch-Dest": "iframe"}}, http.StatusForbidden},
		"a person follows a link": {request{method: "GET", path: "/",
			header: map[string]string{"Sec-Fetch-Site": "cross-site",
				"Sec-Fetch-Dest": "document"}}, http.StatusOK},
		"a token that was used": {request{method: "POST", path: "/api/login",
			body:   `{"token": "` + first + `"}`,
			header: map[string]string{"Origin": address}}, http.StatusUnauthorized},
		"no token": {request{method: "POST", path: "/api/login", body: `{"token": ""}`,
			header: map[string]string{"Origin": address}}, http.StatusUnauthorized},
		"a long body": {request{method: "POST", path: "/api/do",
			body: `{"vm": "` + strings.Repeat("x", maxBody) + `"}`, header: own},
			http.StatusBadRequest},
		"a field that there is not": {request{method: "POST", path: "/api/do",
			body: `{"kinds": "evict"}`, header: own}, http.StatusBadRequest},
		"a report without a ticket": {request{method: "GET", path: "/report/x", header: own},
			http.StatusNotFound},
	} {
		got, body, h := send(t, address, c.request)
		if got != c.want {
			t.Errorf("%s: %d, not %d: %s", name, got, c.want, body)
		}
		if h.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s: another site may read the answer", name)
		}
	}
}

// A report is shown once, to who has the cookie, and has no origin.
func TestReportTicket(t *testing.T) {
	s := &Server{reports: map[string]ticketed{}, sessions: map[string]string{"c": "k"}}
	show := func(cookieValue string) (int, http.Header, string) {
		r, _ := http.NewRequest("GET", "/report/t", nil)
		r.SetPathValue("ticket", "t")
		r.AddCookie(&http.Cookie{Name: s.cookie(), Value: cookieValue})
		w := &recorder{header: http.Header{}, status: http.StatusOK}
		s.showReport(w, r)
		return w.status, w.header, w.body.String()
	}
	s.reports["t"] = ticketed{[]byte("report"), time.Now().Add(time.Minute)}
	status, h, body := show("c")
	if status != http.StatusOK || body != "report" {
		t.Errorf("%d: %s", status, body)
	}
	if p := h.Get("Content-Security-Policy"); !strings.HasPrefix(p, "sandbox allow-scripts;") {
		t.Errorf("the policy is %q", p)
	}
	if status, _, _ := show("c"); status != http.StatusNotFound {
		t.Errorf("shown again: %d", status)
	}
	s.reports["t"] = ticketed{[]byte("report"), time.Now().Add(time.Minute)}
	if status, _, body := show("d"); status != http.StatusNotFound || body == "report" {
		t.Errorf("shown to another: %d", status)
	}
	s.reports["t"] = ticketed{[]byte("report"), time.Now().Add(-time.Minute)}
	if status, _, _ := show("c"); status != http.StatusNotFound {
		t.Errorf("shown late: %d", status)
	}
}

type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }

// lines counts what is logged.
type lines struct{ n atomic.Int32 }

func (l *lines) Write(b []byte) (int, error) {
	l.n.Add(1)
	return len(b), nil
}

// Others on the machine can have many requests refused, and do not flood the operator's terminal.
func TestRefusalsAreFew(t *testing.T) {
	var said lines
	address, _ := serveFor(t, &Server{Hub: NewHub(),
		Log: slog.New(slog.NewTextHandler(&said, nil))})
	for range 100 {
		send(t, address, request{method: "GET", path: "/", host: "evil.example"})
		send(t, address, request{method: "POST", path: "/api/login", body: `{"token": "x"}`,
			header: map[string]string{"Origin": address}})
	}
	if n := said.n.Load(); n != mostRefusals+1 {
		t.Errorf("%d lines are logged", n)
	}
}

// A page is told that the server ends, and so does not look for it again: another one may listen
// there then.
func TestBye(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	tokens := make(chan string, 2)
	s := &Server{Hub: NewHub(), Token: func(token string) { tokens <- token },
		Log: slog.New(slog.DiscardHandler)}
	var serving sync.WaitGroup
	serving.Go(func() { s.Serve(ctx, ln) })
	defer serving.Wait()
	address := "http://" + ln.Addr().String()
	r, err := http.NewRequest("GET", address+"/api/stream", nil)
	must(t, err)
	for k, v := range enter(t, address, <-tokens) {
		r.Header.Set(k, v)
	}
	a, err := http.DefaultTransport.RoundTrip(r)
	must(t, err)
	defer a.Body.Close()
	in := bufio.NewScanner(a.Body)
	said := ""
	for in.Scan() {
		if event, ok := strings.CutPrefix(in.Text(), "event: "); ok {
			if said = event; event == "hello" {
				stop()
			}
		}
	}
	if said != "bye" {
		t.Errorf("the last event is %q", said)
	}
}

// Nothing in the page's files needs what its policy forbids, nor anything from elsewhere.
func TestAssets(t *testing.T) {
	forbidden := regexp.MustCompile(
		`(?i)innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|` +
			`<script>|\son[a-z]+="|\sstyle="|https?://[^w]`)
	entries, err := assets.ReadDir("assets")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := assets.ReadFile("assets/" + e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if m := forbidden.FindAllString(string(b), -1); m != nil {
			t.Errorf("%s has %q", e.Name(), m)
		}
	}
	for _, want := range []string{"default-src 'none'", "script-src 'self'",
		"frame-ancestors 'none'", "require-trusted-types-for 'script'"} {
		if !strings.Contains(policy, want) {
			t.Errorf("the policy lacks %s", want)
		}
	}
	if strings.Contains(policy, "unsafe") {
		t.Errorf("the policy is %s", policy)
	}
}

// A viewer is told of all that there is, then of what has changed, once.
func TestHub(t *testing.T) {
	hub := NewHub()
	hub.PutHost(madeUp(0, 0))
	hub.PutHost(madeUp(1, 0))
	select {
	case <-hub.Watched():
		t.Error("watched by nobody")
	default:
	}
	v := hub.look()
	<-hub.Watched()
	<-v.wake
	if c := hub.take(v); len(c.Hosts) != 2 || c.Hosts[0].Key != "h0" {
		t.Errorf("%+v", c)
	}
	hub.PutHost(madeUp(1, 1))
	hub.PutHost(madeUp(1, 2))
	e := madeUpEviction("h1", strings.Repeat("1", 32), "vm", "h0", time.Minute, time.Second, "")
	hub.PutEviction(e)
	<-v.wake
	if c := hub.take(v); len(c.Hosts) != 1 || c.Hosts[0].Key != "h1" || len(c.Evictions) != 1 {
		t.Errorf("%+v", c)
	}
	hub.PutEviction(e) // says nothing new
	select {
	case <-v.wake:
		t.Errorf("woken by nothing: %+v", hub.take(v))
	default:
	}
	hub.leave(v)
	select {
	case <-hub.Watched():
		t.Error("watched by nobody any more")
	default:
	}
}
