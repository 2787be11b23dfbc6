package leader

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"vacate/internal/link/certs"

	"golang.org/x/net/netutil"
)

// Bounds of what others may do.
const (
	maxConnections = 25_000
	maxScrapes     = 64 // connections for metrics
	maxHeader      = 64 << 10
	// requestTime is how long one may take for the handshake of TLS, for the head of a request, and
	// for all of what an operator asks or a host's hello.
	requestTime = 10 * time.Second
	idleTime    = time.Minute
	pingTime    = 15 * time.Second
)

// Serve serves hosts and operators until ctx is done. It answers nobody without a certificate of
// the CA, and knows all others by their names.
func (b *Brain) Serve(ctx context.Context, ln net.Listener, identity *certs.Identity) error {
	server := &http.Server{Handler: b.Handler(), ReadHeaderTimeout: requestTime,
		IdleTimeout: idleTime, MaxHeaderBytes: maxHeader, ConnContext: WithConn,
		ErrorLog:  slog.NewLogLogger(b.log.Handler(), slog.LevelWarn),
		TLSConfig: identity.Web(func(string) error { return nil }), // each call looks at the name
		HTTP2:     &http.HTTP2Config{SendPingTimeout: pingTime, PingTimeout: pingTime}}
	return serve(ctx, server, func() error {
		return server.ServeTLS(netutil.LimitListener(ln, maxConnections), "", "")
	})
}

// serve runs a server until ctx is done.
func serve(ctx context.Context, server *http.Server, run func() error) error {
	ctx, stop := context.WithCancel(ctx)
	var closing sync.WaitGroup
	defer closing.Wait()
	defer stop()
	closing.Go(func() {
		<-ctx.Done()
		server.Close()
	})
	if err := run(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// patient bounds how long a request may take to come. It is not for streams.
func patient(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// It fails for protocols without deadlines, which this server does not speak.
		http.NewResponseController(w).SetReadDeadline(time.Now().Add(requestTime))
		next.ServeHTTP(w, r)
	})
}

// ServeMetrics serves /metrics until ctx is done.
func (b *Brain) ServeMetrics(ctx context.Context, ln net.Listener) error {
	server := &http.Server{Handler: b.Metrics(), ReadHeaderTimeout: requestTime,
		IdleTimeout: idleTime, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(b.log.Handler(), slog.LevelDebug)}
	return serve(ctx, server, func() error {
		return server.Serve(netutil.LimitListener(ln, maxScrapes))
	})
}
