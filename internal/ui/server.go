// Package ui serves the page of `vacate ui`: hosts, their VMs, evictions, and buttons for what the
// command line can do. It listens on 127.0.0.1 alone and acts with the operator's certificate.
//
//	daemons ── API ──► Poll ──────► Hub ──► Server ── stream ──► page
//	a fleet ── API ──► PollFleet ──► │        │
//	both    ◄── API ──────────────────────────┘ ◄──── POST ───── page
//
// Other users of the machine can connect to it, and other sites in the operator's browser can make
// that send requests. So:
//
//   - Nothing but the page's own files is served without two secrets: a cookie that no script can
//     read and no other site can have sent, and a key that only this origin's scripts hold. The
//     cookie alone would not do: browsers send it to all ports of 127.0.0.1, so to servers of other
//     users, too. The key is in no cookie, no address and no file.
//   - Both are handed out for a token, once. It is in the part of the address that browsers send to
//     nobody (after #), and is printed on the operator's terminal.
//   - The Host header must name this server, so no other name that leads to 127.0.0.1 works.
//   - A request by another site, or by a page that is not this one, is refused by Origin and
//     Sec-Fetch-Site.
//   - The page's policy allows no script in the page, and nothing from elsewhere. All texts are put
//     in as texts. Reports are shown in a frame that has no origin.
package ui

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
)

//go:embed assets/*
var assets embed.FS

// Server serves the page.
type Server struct {
	Hub     *Hub
	Remotes []Remote
	// Brain is that of a fleet; nil for none.
	Brain *Brain
	// Who is the operator, as the page names them.
	Who string
	// Token is told of each new token, for the operator alone.
	Token func(token string)
	Log   *slog.Logger

	host string // as the Host header must have it
	life context.Context

	mu       sync.Mutex
	token    string              // good for one login; guarded by mu, as all below
	sessions map[string]string   // keys, by cookie
	reports  map[string]ticketed // by ticket
	minute   time.Time           // since when refusals are counted
	refusals int
	jobs     sync.WaitGroup
}

// Question is what an operator is asked, and must answer by typing a word.
type Question struct {
	Field string `json:"field"` // confirm, fenced or lose
	Text  string `json:"text"`
	Want  string `json:"want"`
}

// ticketed is a report that may be fetched once.
type ticketed struct {
	page  []byte
	until time.Time
}

// Limits of the server.
const (
	maxBody     = 64 << 10
	streamPause = 250 * time.Millisecond
	keepAlive   = 15 * time.Second
	ticketTime  = time.Minute
	keyHeader   = "X-Vacate-Key"
	bodyTime    = 10 * time.Second
	// mostRefusals are logged in a minute.
	mostRefusals = 20
)

// cookie is the name of this server's: browsers keep those of all ports together.
func (s *Server) cookie() string {
	_, port, _ := net.SplitHostPort(s.host)
	return "vacate_ui_" + port
}

func secret() string {
	b := make([]byte, 32)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func same(a, b string) bool {
	return a != "" && subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1
}

// Serve serves on a listener of 127.0.0.1 until ctx is done.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	s.host, s.life = ln.Addr().String(), ctx
	s.sessions, s.reports = map[string]string{}, map[string]ticketed{}
	s.renew()
	server := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 32 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug)}
	defer s.jobs.Wait()
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		// Pages are told that it ends, so that none looks for it where another one may listen then.
		soon, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		server.Shutdown(soon)
		server.Close()
	})
	defer func() {
		if !stop() {
			<-ended
		}
	}()
	if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// renew makes a new token.
func (s *Server) renew() {
	s.mu.Lock()
	s.token = secret()
	token := s.token
	s.mu.Unlock()
	s.Token(token)
}

const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
	"img-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; " +
	"frame-ancestors 'none'; require-trusted-types-for 'script'"

// reportPolicy gives a report no origin: its script reaches nothing of this page. What it may load
// says the report itself.
const reportPolicy = "sandbox allow-scripts; frame-ancestors 'self'"

func (s *Server) handler() http.Handler {
	files, err := fs.Sub(assets, "assets")
	if err != nil {
		panic(err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /", http.FileServerFS(files))
	mux.HandleFunc("POST /api/login", s.login)
	mux.HandleFunc("GET /api/stream", s.known(s.stream))
	mux.HandleFunc("POST /api/ask", s.known(answer(s.ask)))
	mux.HandleFunc("POST /api/do", s.known(answer(s.do)))
	mux.HandleFunc("POST /api/report", s.known(answer(s.report)))
	mux.HandleFunc("GET /report/{ticket}", s.showReport)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		if why := s.foreign(r); why != "" {
			s.refused("refused a request to the page", "why", why, "path", r.URL.Path,
				"from", r.RemoteAddr)
			http.Error(w, why, http.StatusForbidden)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		mux.ServeHTTP(w, r)
	})
}

// refused logs a refusal. Anybody on the machine can cause many: the operator's terminal has better
// things to show.
func (s *Server) refused(what string, args ...any) {
	s.mu.Lock()
	if now := time.Now(); now.Sub(s.minute) >= time.Minute {
		s.minute, s.refusals = now, 0
	}
	s.refusals++
	n := s.refusals
	s.mu.Unlock()
	switch {
	case n <= mostRefusals:
		s.Log.Warn(what, args...)
	case n == mostRefusals+1:
		s.Log.Warn("refused many requests to the page: more are not logged for a minute")
	}
}

// foreign says why a request is not the page's own, nor an operator's who opens it; empty if it may
// be.
func (s *Server) foreign(r *http.Request) string {
	if r.Host != s.host {
		return fmt.Sprintf("this server is http://%s: it answers to no other name", s.host)
	}
	origin, site := r.Header.Get("Origin"), r.Header.Get("Sec-Fetch-Site")
	if r.Method == http.MethodPost && origin == "" || origin != "" && origin != "http://"+s.host {
		return "this is no request of the page"
	}
	// A person who opens the address, or follows a link, asks for the page itself and no more.
	opens := r.Method == http.MethodGet && r.URL.Path == "/" &&
		r.Header.Get("Sec-Fetch-Dest") == "document"
	if site != "" && site != "same-origin" && !opens {
		return "this is no request of the page"
	}
	return ""
}

// known has a handler serve who has both secrets.
func (s *Server) known(serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !s.holds(r, true) {
			http.Error(w, "open the page by the address that `vacate ui` prints",
				http.StatusUnauthorized)
			return
		}
		serve(w, r)
	}
}

// holds reports whether a request has a session's cookie, and its key, too, if that is wanted.
func (s *Server) holds(r *http.Request, key bool) bool {
	c, err := r.Cookie(s.cookie())
	if err != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	found := false
	for of, k := range s.sessions {
		if same(of, c.Value) && (!key || same(k, r.Header.Get(keyHeader))) {
			found = true
		}
	}
	return found
}

// login hands out both secrets for the token.
func (s *Server) login(w http.ResponseWriter, r *http.Request) {
	var q struct{ Token string }
	if err := read(w, r, &q); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	session, key := secret(), secret()
	s.mu.Lock()
	good := same(s.token, q.Token)
	if good {
		s.token, s.sessions[session] = "", key
	}
	s.mu.Unlock()
	if !good {
		s.refused("refused a login to the page", "from", r.RemoteAddr)
		http.Error(w, "this address was used already, or is of another run: see the last one "+
			"that `vacate ui` printed", http.StatusUnauthorized)
		return
	}
	http.SetCookie(w, &http.Cookie{Name: s.cookie(), Value: session, Path: "/", HttpOnly: true,
		SameSite: http.SameSiteStrictMode}) // #nosec G124 -- not Secure: 127.0.0.1 has no TLS
	s.Log.Info("the page was opened", "from", r.RemoteAddr)
	s.renew()
	writeJSON(w, map[string]string{"key": key})
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// read reads what is asked. It does not wait for it for long.
func read(w http.ResponseWriter, r *http.Request, q any) error {
	c := http.NewResponseController(w)
	c.SetReadDeadline(time.Now().Add(bodyTime))
	defer c.SetReadDeadline(time.Time{})
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	return d.Decode(q)
}

// A failure is an answer that people read.
type failure struct {
	Error string `json:"error"`
}

// answer serves a function from a request in JSON to an answer in JSON.
func answer[Q any](f func(context.Context, Q) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var q Q
		if err := read(w, r, &q); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		a, err := f(r.Context(), q)
		if err != nil {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusConflict)
			json.NewEncoder(w).Encode(failure{brief(err.Error())})
			return
		}
		writeJSON(w, a)
	}
}

// stream tells of changes, as server-sent events. The page reads them by fetch, as an EventSource
// cannot send the key.
func (s *Server) stream(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	v := s.Hub.look()
	defer s.Hub.leave(v)
	out := http.NewResponseController(w)
	send := func(event string, data any) error {
		b, err := json.Marshal(data)
		if err == nil {
			_, err = fmt.Fprintf(w, "event: %s\ndata: %s\n\n", event, b)
		}
		return errors.Join(err, out.Flush())
	}
	if send("hello", map[string]any{"who": s.Who}) != nil {
		return
	}
	defer func() {
		if s.life.Err() != nil {
			send("bye", struct{}{})
		}
	}()
	for {
		select {
		case <-v.wake:
			if send("change", s.Hub.take(v)) != nil {
				return
			}
		case <-time.After(keepAlive):
			if _, err := io.WriteString(w, ": alive\n\n"); err != nil || out.Flush() != nil {
				return
			}
		case <-r.Context().Done():
			return
		}
		select {
		case <-time.After(streamPause):
		case <-r.Context().Done():
			return
		}
	}
}

// remote finds the daemon of a host.
func (s *Server) remote(key string) (Remote, error) {
	for _, d := range s.Remotes {
		if d.Key == key {
			return d, nil
		}
	}
	if s.Brain != nil && s.Hub.Host(key) != nil {
		return s.Brain.daemon(key)
	}
	return Remote{}, fmt.Errorf("no host %q is known here", key)
}

// eviction asks a daemon for an eviction.
func eviction(ctx context.Context, d Remote, id string) (*hostv1.Eviction, error) {
	r, err := d.GetEviction(ctx, connect.NewRequest(&hostv1.GetEvictionRequest{Id: id}))
	if err != nil {
		return nil, d.Explain(err)
	}
	return r.Msg, nil
}
