package hostv1

import (
	"context"
	"net"
	"net/http"
)

// Dial returns a client of the daemon that listens at a Unix socket. It connects with the first
// call.
func Dial(socket string) HostClient {
	transport := &http.Transport{DialContext: func(ctx context.Context,
		_, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	return NewHostClient(&http.Client{Transport: transport}, "http://vacated")
}
