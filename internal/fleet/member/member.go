// Package member runs a member of etcd within this process, for a fleet that has no etcd of its
// own. Only vacate-fleet links it.
package member

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Config is how a member is set up.
type Config struct {
	Name string
	Dir  string
	// Members are NAME:PORT of all members, this one included, where they reach one another. The
	// names must be those in their certificates, as etcd looks for nothing else. There are none in
	// a fleet of one, which then listens nowhere.
	Members []string
	// Certs has the certificates, as in package certs.
	Certs string
	// Joins: the others are there already, and have been told of this one.
	Joins bool
}

// quota bounds the store, in bytes. A fleet of 10,000 hosts needs some 10 MiB.
const quota = 512 << 20

// Member is one that runs.
type Member struct {
	etcd   *embed.Etcd
	Client *clientv3.Client
}

// Start starts a member, and returns when it serves; with others that takes as long as a majority
// of them needs to start.
func Start(ctx context.Context, c Config, log *slog.Logger) (*Member, error) {
	e := embed.NewConfig()
	e.Name, e.Dir = c.Name, filepath.Join(c.Dir, "etcd")
	if err := os.MkdirAll(e.Dir, 0o700); err != nil {
		return nil, err
	}
	e.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(&bridge{log: log}))
	// This process asks without a socket, and nobody else may.
	e.ListenClientUrls = nil
	e.AdvertiseClientUrls = []url.URL{{Scheme: "http", Host: "localhost:2379"}}
	e.ListenClientHttpUrls = nil
	e.QuotaBackendBytes = quota
	// Earlier values of what changes are of no use.
	e.AutoCompactionMode, e.AutoCompactionRetention = embed.CompactorModeRevision, "1000"
	if len(c.Members) == 0 {
		e.ListenPeerUrls = nil
		e.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: "localhost:2380"}}
		e.InitialCluster = c.Name + "=http://localhost:2380"
	} else {
		var all, names []string
		for _, address := range c.Members {
			name, _, err := net.SplitHostPort(address)
			if err != nil {
				return nil, fmt.Errorf("member %q is not NAME:PORT", address)
			}
			if name == c.Name {
				at := url.URL{Scheme: "https", Host: address}
				e.ListenPeerUrls, e.AdvertisePeerUrls = []url.URL{at}, []url.URL{at}
			}
			all = append(all, name+"=https://"+address)
			names = append(names, name)
		}
		if !slices.Contains(names, c.Name) {
			return nil, fmt.Errorf("this member, %s, is not among the fleet's: %s", c.Name,
				strings.Join(names, ", "))
		}
		e.InitialCluster = strings.Join(all, ",")
		t := &e.PeerTLSInfo
		t.CertFile = filepath.Join(c.Certs, "host.pem")
		t.KeyFile = filepath.Join(c.Certs, "host.key")
		t.TrustedCAFile = filepath.Join(c.Certs, "ca.pem")
		// Hosts and operators have certificates of the same CA, and are no members.
		t.ClientCertAuth, t.AllowedHostnames = true, names
		t.SkipClientSANVerify = true // members are known by name, not by where they come from
	}
	if c.Joins {
		e.ClusterState = embed.ClusterStateFlagExisting
	}
	m, err := embed.StartEtcd(e)
	if err != nil {
		return nil, fmt.Errorf("start etcd in %s: %w", e.Dir, err)
	}
	for waits := time.Now(); ; {
		select {
		case <-m.Server.ReadyNotify():
			return &Member{m, v3client.New(m.Server)}, nil
		case <-m.Server.StopNotify():
			return nil, errors.New("etcd stopped before it served")
		case err := <-m.Err():
			m.Close()
			return nil, fmt.Errorf("etcd: %w", err)
		case <-ctx.Done():
			m.Server.Stop()
			m.Close()
			return nil, context.Cause(ctx)
		case <-time.After(10 * time.Second):
			log.Warn("waiting for a majority of the fleet's members", "since", waits)
		}
	}
}

// Close ends the member.
func (m *Member) Close() {
	m.Client.Close()
	m.etcd.Close()
}

// bridge is etcd's log as part of this program's. What etcd calls information is for those who
// look after etcd itself.
type bridge struct {
	log    *slog.Logger
	fields []zapcore.Field
}

func level(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		return slog.LevelError
	case l >= zapcore.WarnLevel:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// Enabled implements zapcore.Core.
func (b *bridge) Enabled(l zapcore.Level) bool {
	return b.log.Enabled(context.Background(), level(l))
}

// With implements zapcore.Core.
func (b *bridge) With(f []zapcore.Field) zapcore.Core {
	return &bridge{b.log, slices.Concat(b.fields, f)}
}

// Check implements zapcore.Core.
func (b *bridge) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if b.Enabled(e.Level) {
		return c.AddCore(e, b)
	}
	return c
}

// Write implements zapcore.Core.
func (b *bridge) Write(e zapcore.Entry, f []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, field := range slices.Concat(b.fields, f) {
		field.AddTo(enc)
	}
	args := []any{"part", "etcd"}
	for k, v := range enc.Fields {
		args = append(args, k, v)
	}
	b.log.Log(context.Background(), level(e.Level), e.Message, args...)
	return nil
}

// Sync implements zapcore.Core.
func (b *bridge) Sync() error { return nil }
