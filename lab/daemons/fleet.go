package daemons

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/link/certs"
	"vacate/lab"

	"connectrpc.com/connect"
)

// Ports of a fleet: where a brain is asked, where etcd's members find each other, and where a
// host's daemon is asked from elsewhere.
const (
	brainPort = 7610
	etcdPort  = 7611
	apiPort   = 7602
)

// askTime is how long a member may take to answer the operator.
const askTime = 20 * time.Second

// Operator is the name in the certificate of who may do all.
const Operator = "admin"

// FleetOptions say how a fleet is set up.
type FleetOptions struct {
	Lab      lab.Options   // More is the fleet's. Hosts tell its Rate of their links
	Hosts    int           // from 2 to MostHosts
	Vacate   string        // the program; vacated and vacate-fleet are beside it
	Interval time.Duration // of reports; default vacated's
	// DiskBytes is the size of a disk that each brain's etcd has for itself. 0: it has none.
	DiskBytes uint64
}

// Fleet is a lab with a fleet of its hosts: a daemon on each, and three members of its brain, each
// on a host of its own.
type Fleet struct {
	*Site
	Lab    *lab.Lab
	Hosts  []*lab.Host
	Brains []*Brain

	identity *certs.Identity // the operator's
	opts     FleetOptions
}

// Brain is one member.
type Brain struct {
	Name string
	Host *lab.Host
	Disk *lab.SmallDisk // nil: none of its own

	fleet  *Fleet
	client fleetv1.FleetClient
}

// hostNames are those of hosts beyond a and b, and of these.
const hostNames = "abcdefghij"

// MostHosts is how many hosts a fleet may have.
const MostHosts = len(hostNames)

// NewFleet makes a lab with a fleet. [Fleet.Begin] starts the fleet.
func NewFleet(ctx context.Context, opts FleetOptions) (_ *Fleet, err error) {
	opts.Lab.More = append(strings.Split(hostNames[2:opts.Hosts], ""), "brain1", "brain2",
		"brain3")
	l, err := lab.New(ctx, opts.Lab)
	if err != nil {
		return nil, err
	}
	more := l.More[:opts.Hosts-2]
	f := &Fleet{Lab: l, Hosts: slices.Concat([]*lab.Host{l.A, l.B}, more), opts: opts}
	for _, h := range l.More[len(more):] {
		f.Brains = append(f.Brains, &Brain{Name: h.Name, Host: h, fleet: f})
	}
	if f.Site, err = newSite(ctx, l, opts.Vacate, nil, f.Hosts); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := f.issue(ctx, Operator); err != nil {
		return nil, err
	}
	if f.identity, err = certs.Load(f.OperatorCerts(), nil); err != nil {
		return nil, err
	}
	var names, hosts, members []string
	for _, b := range f.Brains {
		names = append(names, b.Member())
		members = append(members, fmt.Sprintf("%s:%d", b.Name, etcdPort))
		hosts = append(hosts, b.Host.Addr+" "+b.Name+"\n")
		b.client = fleetv1.NewFleetClient(f.transport(b.Name), "https://"+b.Address())
	}
	f.more = fmt.Sprintf(`
[api]
listen    = ":%d"
operators = [%q]

[fleet]
brains = %s
rate   = %d
`, apiPort, Operator, list(names), opts.Lab.Rate/1e6)
	if opts.Interval > 0 {
		f.more += fmt.Sprintf("interval = %q\n", opts.Interval)
	}
	// Where members find one another by name, as etcd has it.
	if err := os.WriteFile(f.hostsFile(), []byte("127.0.0.1 localhost\n"+strings.Join(hosts, "")),
		0o644); err != nil {
		return nil, err
	}
	for _, b := range f.Brains {
		if err := b.setUp(ctx, members); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// list is a list of strings in TOML.
func list(all []string) string {
	var quoted []string
	for _, s := range all {
		quoted = append(quoted, fmt.Sprintf("%q", s))
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// Dir has a directory for each daemon.
func (f *Fleet) Dir() string { return f.dir }

func (f *Fleet) hostsFile() string { return filepath.Join(f.dir, "hosts") }

// OperatorCerts is the directory with the operator's certificate.
func (f *Fleet) OperatorCerts() string { return filepath.Join(f.dir, Operator, "certs") }

// Members are the brain's, as `vacate fleet --fleet` has them.
func (f *Fleet) Members() string {
	var all []string
	for _, b := range f.Brains {
		all = append(all, b.Member())
	}
	return strings.Join(all, ",")
}

// APIs are the hosts' daemons, as `vacate ui --host` has them.
func (f *Fleet) APIs() (all []string) {
	for _, h := range f.Hosts {
		all = append(all, fmt.Sprintf("%s@%s:%d", Name(h), h.Addr, apiPort))
	}
	return all
}

// transport is a client over which the operator asks a member, from the client's host.
func (f *Fleet) transport(who string) *http.Client {
	return &http.Client{Timeout: askTime,
		Transport: &http.Transport{TLSClientConfig: f.identity.Client(who),
			DialContext: f.Lab.Client.Dial, TLSHandshakeTimeout: 5 * time.Second}}
}

// Host is a client of a host's daemon.
func (f *Fleet) Host(h *lab.Host) hostv1.HostClient { return hostv1.Dial(f.Socket(h)) }

// Address is where the member is asked, HOST:PORT.
func (b *Brain) Address() string { return fmt.Sprintf("%s:%d", b.Host.Addr, brainPort) }

// Member is NAME@HOST:PORT.
func (b *Brain) Member() string { return b.Name + "@" + b.Address() }

func (b *Brain) dir() string { return filepath.Join(b.fleet.dir, b.Name) }

// Data is the directory with etcd's files.
func (b *Brain) Data() string {
	if b.Disk != nil {
		return b.Disk.Dir
	}
	return filepath.Join(b.dir(), "data")
}

// Certs is the directory with the member's certificate.
func (b *Brain) Certs() string { return filepath.Join(b.dir(), "certs") }

func (b *Brain) setUp(ctx context.Context, members []string) (err error) {
	if err := b.fleet.issue(ctx, b.Name); err != nil {
		return err
	}
	if n := b.fleet.opts.DiskBytes; n > 0 {
		if b.Disk, err = b.fleet.Lab.SmallDisk(n); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(b.dir(), "vacate-fleet.toml"), fmt.Appendf(nil,
		`certs   = "certs"
listen  = "%[1]s"
address = "%[1]s"
data    = %[2]q
members = %[3]s
hosts   = ["host*"]

[operators]
admin = [%[4]q]
`, b.Address(), b.Data(), list(members), Operator), 0o644)
}

// Start starts the member. It does not wait until it serves, as that takes a majority.
func (b *Brain) Start() error {
	program := filepath.Join(filepath.Dir(b.fleet.vacate), "vacate-fleet")
	// Members look for each other by name, and this machine has no such names.
	cmd := exec.Command("sh", "-c", `mount --bind "$1" /etc/hosts && shift && exec "$@"`, "sh",
		b.fleet.hostsFile(), program, "--config", filepath.Join(b.dir(), "vacate-fleet.toml"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	_, err := b.fleet.run(b.Host, b.Name, cmd)
	return err
}

// Kill kills the member, if it runs.
func (b *Brain) Kill() { b.fleet.kill(b.Name) }

// PID returns the member's process; 0 if it does not run.
func (b *Brain) PID() int { return b.fleet.pid(b.Name) }

// Said is the end of what the member wrote to its log.
func (b *Brain) Said() string { return b.fleet.said(b.Name) }

// Status asks the member how the fleet is.
func (b *Brain) Status(ctx context.Context) (*fleetv1.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	r, err := b.client.Status(ctx, connect.NewRequest(&fleetv1.StatusRequest{}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

// Begin starts all, and waits until a member leads whom all hosts have told of themselves.
func (f *Fleet) Begin(ctx context.Context) error {
	for _, b := range f.Brains {
		if err := b.Start(); err != nil {
			return err
		}
	}
	for _, h := range f.Hosts {
		if err := f.Start(ctx, h); err != nil {
			return err
		}
	}
	_, err := f.Leader(ctx, true)
	return err
}

// Leader waits until a member leads, and returns it; with reports, one whom all hosts have told of
// themselves. It looks at those that say they lead for the one with the highest epoch.
func (f *Fleet) Leader(ctx context.Context, reports bool) (*Brain, error) {
	for {
		if b, s := f.Leads(ctx); b != nil && (!reports || int(s.Hosts) == len(f.Hosts) &&
			s.Late == 0) {
			return b, nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			said := ""
			for _, b := range f.Brains {
				said += fmt.Sprintf("\n%s said: %s", b.Name, b.Said())
			}
			return nil, fmt.Errorf("nobody leads the fleet: %w%s", context.Cause(ctx), said)
		}
	}
}

// Leads returns the member that says it leads, the last elected of several; nil if none does. It
// asks all at a time: one that does not answer must not keep it from another.
func (f *Fleet) Leads(ctx context.Context) (leader *Brain, status *fleetv1.StatusResponse) {
	said := make([]*fleetv1.StatusResponse, len(f.Brains))
	var asking sync.WaitGroup
	for i, b := range f.Brains {
		if b.PID() != 0 {
			asking.Go(func() { said[i], _ = b.Status(ctx) })
		}
	}
	asking.Wait()
	for i, s := range said {
		if s.GetLeads() && s.Epoch > status.GetEpoch() {
			leader, status = f.Brains[i], s
		}
	}
	return leader, status
}

// Ask calls a method of [fleetv1.FleetClient] at the leader, and again for as long as another
// member comes to lead, or none does.
func Ask[Q, R any](ctx context.Context, f *Fleet, call func(fleetv1.FleetClient, context.Context,
	*connect.Request[Q]) (*connect.Response[R], error), q *Q) (*R, error) {
	for {
		b, err := f.Leader(ctx, false)
		if err != nil {
			return nil, err
		}
		r, err := call(b.client, ctx, connect.NewRequest(q))
		if err == nil {
			return r.Msg, nil
		}
		switch connect.CodeOf(err) {
		case connect.CodeUnavailable, connect.CodeFailedPrecondition,
			connect.CodeDeadlineExceeded, connect.CodeUnknown:
		default:
			return nil, err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// Told is what the leader says of a host.
func (f *Fleet) Told(ctx context.Context, host string) (*fleetv1.Host, error) {
	list, err := Ask(ctx, f, fleetv1.FleetClient.ListHosts, &fleetv1.ListHostsRequest{})
	if err != nil {
		return nil, err
	}
	for _, h := range list.Hosts {
		if h.Name == host {
			return h, nil
		}
	}
	return nil, fmt.Errorf("the fleet has no host %s", host)
}

// Vacate is vacate fleet, as the operator runs it on the client's host.
func (f *Fleet) Vacate(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, f.vacate, append([]string{"fleet"}, args...)...)
	c.Env = append(os.Environ(), "VACATE_FLEET="+f.Members())
	c.Args = append(c.Args, "--operator-certs", f.OperatorCerts())
	return c
}

// Close stops the fleet, and closes its lab.
func (f *Fleet) Close() error { return errors.Join(f.Site.Close(), f.Lab.Close()) }
