package host

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os/user"
	"path"
	"strconv"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/link/certs"
	"vacate/internal/sys/process"

	"connectrpc.com/connect"
)

// asker is who asks over a connection of the API.
type asker struct{ conn net.Conn }

// withAsker notes who asks, for all that comes over a connection.
func withAsker(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, asker{}, asker{c})
}

// askerOf says who asked: a name in a certificate and an address, or a user of this host.
func askerOf(ctx context.Context) string {
	a, _ := ctx.Value(asker{}).(asker)
	switch c := a.conn.(type) {
	case *tls.Conn:
		state := c.ConnectionState() // its handshake is over
		if len(state.PeerCertificates) == 0 {
			break
		}
		name, err := certs.NameOf(state.PeerCertificates[0])
		if err != nil {
			break
		}
		return fmt.Sprintf("%s from %s", name, c.RemoteAddr())
	case *net.UnixConn:
		cred, err := process.PeerOf(c)
		if err != nil {
			break
		}
		uid := strconv.Itoa(int(cred.Uid))
		name := ""
		if u, err := user.LookupId(uid); err == nil {
			name = u.Username
		}
		return "user " + cmp.Or(name, uid)
	}
	return "unknown"
}

// audited are the calls that change something. Each leaves a line in the log.
var audited = map[string]bool{
	hostv1.HostEvictProcedure: true, hostv1.HostAbortProcedure: true,
	hostv1.HostDecideProcedure: true, hostv1.HostExportProcedure: true,
	hostv1.HostStartProcedure: true, hostv1.HostStopProcedure: true,
}

// audit logs who asked for what, and what came of it.
func (h *Host) audit() connect.UnaryInterceptorFunc {
	return func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			if !audited[req.Spec().Procedure] {
				return next(ctx, req)
			}
			log := h.log.With("operator", askerOf(ctx), "asks", path.Base(req.Spec().Procedure))
			m := req.Any()
			if m, ok := m.(interface{ GetVm() string }); ok {
				log = log.With("vm", m.GetVm())
			}
			if m, ok := m.(interface{ GetTo() string }); ok {
				log = log.With("to", m.GetTo())
			}
			if m, ok := m.(interface{ GetId() string }); ok {
				log = log.With("eviction", m.GetId())
			}
			switch m := m.(type) {
			case *hostv1.DecideRequest:
				log = log.With("decision", m.Decision, "fenced", m.Fenced, "fence", m.Fence)
			case *hostv1.EvictRequest:
				log = log.With("force", m.GetOptions().GetForce())
			case *hostv1.AbortRequest:
				log = log.With("reason", m.Reason)
			case *hostv1.ExportRequest:
				log = log.With("path", m.Path)
			case *hostv1.StartRequest:
				log = log.With("fenced", m.Fenced)
			case *hostv1.StopRequest:
				log = log.With("force", m.Force, "timeout_ms", m.TimeoutMs)
			}
			resp, err := next(ctx, req)
			if err != nil {
				log.Warn("refused what an operator asked", "error", err)
			} else {
				log.Info("did what an operator asked")
			}
			return resp, err
		}
	}
}
