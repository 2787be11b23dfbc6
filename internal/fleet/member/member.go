// Package member runs a member of etcd within this process, for a fleet that has no etcd of its
// own. Only vacate-fleet links it.
package member

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
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

// Members share machines with VMs, and are late when those are busy, or their disks are. One that
// hears nothing from the others for electionTime asks them to elect anew, and elections that come
// too often keep a fleet from having a leader at all. etcd's own times, 100 ms and 1 s, are for
// machines that do nothing else.
const (
	heartbeatTime = 500 * time.Millisecond
	electionTime  = 5 * time.Second
)

// Member is one that runs.
type Member struct {
	etcd   *embed.Etcd
	Client *clientv3.Client
}

// data is where etcd's files are.
func (c Config) data() string { return filepath.Join(c.Dir, "etcd") }

// Names are those of all members.
func (c Config) Names() (names []string) {
	for _, address := range c.Members {
		name, _, _ := net.SplitHostPort(address)
		names = append(names, name)
	}
	return names
}

// cluster is where this member is reached by the others, and the same of all as etcd takes it.
func (c Config) cluster() (own url.URL, all string, err error) {
	if len(c.Members) == 0 { // it listens nowhere
		own = url.URL{Scheme: "http", Host: "localhost:2380"}
		return own, c.Name + "=" + own.String(), nil
	}
	var list []string
	for _, address := range c.Members {
		name, _, err := net.SplitHostPort(address)
		if err != nil {
			return own, "", fmt.Errorf("member %q is not NAME:PORT", address)
		}
		at := url.URL{Scheme: "https", Host: address}
		if name == c.Name {
			own = at
		}
		list = append(list, name+"="+at.String())
	}
	if own.Host == "" {
		return own, "", fmt.Errorf("this member, %s, is not among the fleet's: %s", c.Name,
			strings.Join(c.Names(), ", "))
	}
	return own, strings.Join(list, ","), nil
}

// Restore makes the files of a member of a snapshot. There must be none yet. All members have to be
// made of the same snapshot.
func Restore(c Config, file string) error {
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return err
	}
	if _, err := os.Stat(c.data()); err == nil {
		return fmt.Errorf("%s is there already: move it away first. Nothing was touched", c.data())
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	own, all, err := c.cluster()
	if err != nil {
		return err
	}
	err = snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{SnapshotPath: file,
		Name: c.Name, OutputDataDir: c.data(), PeerURLs: []string{own.String()},
		InitialCluster: all, InitialClusterToken: embed.NewConfig().InitialClusterToken})
	if err != nil {
		return errors.Join(fmt.Errorf("make a store of %s: %w", file, err),
			os.RemoveAll(c.data()))
	}
	return nil
}

// Start starts a member, and returns when it serves; with others that takes as long as a majority
// of them needs to start.
func Start(ctx context.Context, c Config, log *slog.Logger) (*Member, error) {
	e := embed.NewConfig()
	e.Name, e.Dir = c.Name, c.data()
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
	own, all, err := c.cluster()
	if err != nil {
		return nil, err
	}
	e.InitialCluster = all
	e.AdvertisePeerUrls = []url.URL{own}
	e.ListenPeerUrls = nil
	if len(c.Members) > 1 {
		e.TickMs = uint(heartbeatTime.Milliseconds())
		e.ElectionMs = uint(electionTime.Milliseconds())
	}
	if len(c.Members) > 0 {
		e.ListenPeerUrls = []url.URL{{Scheme: "https",
			Host: net.JoinHostPort(listenAt(own.Hostname()), own.Port())}}
		t := &e.PeerTLSInfo
		t.CertFile = filepath.Join(c.Certs, "host.pem")
		t.KeyFile = filepath.Join(c.Certs, "host.key")
		t.TrustedCAFile = filepath.Join(c.Certs, "ca.pem")
		// Hosts and operators have certificates of the same CA, and are no members.
		t.ClientCertAuth, t.AllowedHostnames = true, c.Names()
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

// listenAt is the address on which a member of a name listens. etcd takes no names there, and the
// machine's own idea of its name may be a loopback address: so all addresses.
func listenAt(name string) string {
	if net.ParseIP(name) != nil {
		return name
	}
	ln, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		return "0.0.0.0" // there is no IPv6
	}
	ln.Close()
	return "::"
}

// Close ends the member.
func (m *Member) Close() {
	m.Client.Close()
	m.etcd.Close()
}

// bridge is etcd's log as part of this program's. What etcd calls information is for those who
// look after etcd itself, but for whom the members elect.
type bridge struct {
	log    *slog.Logger
	fields []zapcore.Field
}

func level(e zapcore.Entry) slog.Level {
	switch {
	case e.Level >= zapcore.ErrorLevel:
		return slog.LevelError
	case e.Level >= zapcore.WarnLevel:
		return slog.LevelWarn
	case strings.HasPrefix(e.Message, "raft.node: "): // elected, changed or lost a leader
		return slog.LevelInfo
	}
	return slog.LevelDebug
}

// Enabled implements zapcore.Core. Check knows what an entry says.
func (b *bridge) Enabled(l zapcore.Level) bool { return l >= zapcore.InfoLevel }

// With implements zapcore.Core.
func (b *bridge) With(f []zapcore.Field) zapcore.Core {
	return &bridge{b.log, slices.Concat(b.fields, f)}
}

// Check implements zapcore.Core.
func (b *bridge) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if b.log.Enabled(context.Background(), level(e)) {
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
	b.log.Log(context.Background(), level(e), e.Message, args...)
	return nil
}

// Sync implements zapcore.Core.
func (b *bridge) Sync() error { return nil }
