package main

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"vacate/internal/fleet/member"
	"vacate/internal/fleet/store"
	"vacate/internal/link/certs"
	"vacate/internal/sys/settings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// config is how a member of a fleet's brain is set up; `vacate-fleet --help` explains it.
type config struct {
	Certs      string    `toml:"certs"`
	Listen     string    `toml:"listen"`
	Address    string    `toml:"address"`
	Data       string    `toml:"data"`
	Members    []string  `toml:"members"`
	Joins      bool      `toml:"joins"`
	Brains     []string  `toml:"brains"`
	Generation uint64    `toml:"generation"`
	Hosts      []string  `toml:"hosts"`
	Metrics    string    `toml:"metrics"`
	Operators  operators `toml:"operators"`
	Hook       *hook     `toml:"hook"` // nil: nobody is told of drains
	Etcd       *etcd     `toml:"etcd"` // nil: a member of etcd runs in this process
}

type operators struct {
	View  []string `toml:"view"`
	Act   []string `toml:"act"`
	Admin []string `toml:"admin"`
}

// hook says whom the leader tells of drains.
type hook struct {
	URL  string        `toml:"url"`
	Time time.Duration `toml:"time"`
}

// mostHookTime bounds how long a call may take.
const mostHookTime = 5 * time.Minute

func (h *hook) check() error {
	if h == nil {
		return nil
	}
	u, err := url.Parse(h.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return fmt.Errorf("hook.url = %q: want one such as https://example.org/drains", h.URL)
	}
	if h.Time < 0 || h.Time > mostHookTime {
		return fmt.Errorf("hook.time = %v: want %v at most", h.Time, mostHookTime)
	}
	return nil
}

// etcd is an operator's own.
type etcd struct {
	URLs []string `toml:"urls"`
	CA   string   `toml:"ca"`
	Cert string   `toml:"cert"`
	Key  string   `toml:"key"`
}

// readConfig reads a file, and fills in the defaults.
func readConfig(file string) (config, error) {
	c := config{Certs: "/etc/vacate/certs", Listen: ":7610", Data: "/var/lib/vacate-fleet"}
	dir, err := settings.Read(file, "vacate-fleet --help", &c)
	if err != nil {
		return c, err
	}
	for _, p := range []*string{&c.Certs, &c.Data} {
		if !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

func (c config) check() error {
	if _, err := settings.SplitAddress(c.Listen, 1); err != nil {
		return fmt.Errorf("listen = %q %w", c.Listen, err)
	}
	if c.Address != "" {
		if host, err := settings.SplitAddress(c.Address, 1); err != nil {
			return fmt.Errorf("address = %q %w", c.Address, err)
		} else if host == "" {
			return fmt.Errorf("address = %q has no host: others reach this member there",
				c.Address)
		}
	}
	if c.Metrics != "" {
		if _, err := settings.SplitAddress(c.Metrics, 1); err != nil {
			return fmt.Errorf("metrics = %q %w", c.Metrics, err)
		}
	}
	if err := c.Hook.check(); err != nil {
		return err
	}
	for i, m := range c.Members {
		name, err := settings.SplitAddress(m, 1)
		if err != nil {
			return fmt.Errorf("members: %q %w", m, err)
		}
		if err := store.CheckName(name); err != nil {
			return fmt.Errorf("members: %q: %w", m, err)
		}
		if slices.Contains(c.member("").Names()[:i], name) {
			return fmt.Errorf("members: %s is there twice", name)
		}
	}
	for what, names := range map[string][]string{"brains": c.Brains,
		"operators.view": c.Operators.View, "operators.act": c.Operators.Act,
		"operators.admin": c.Operators.Admin} {
		for _, name := range names {
			if err := store.CheckName(name); err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
		}
	}
	if n := len(c.Members); n != 0 && n != 1 && n != 3 && n != 5 {
		return fmt.Errorf("there are %d members: want 1, 3 or 5", n)
	}
	if c.Etcd != nil && len(c.Members) > 0 {
		return errors.New("members is for the etcd in this process, and [etcd] names another one")
	}
	if c.Etcd != nil && len(c.Etcd.URLs) == 0 {
		return errors.New("etcd.urls is empty")
	}
	if c.Generation > store.MaxGeneration {
		return fmt.Errorf("generation = %d: want %d at most", c.Generation, store.MaxGeneration)
	}
	for _, p := range c.Hosts {
		if _, err := path.Match(p, ""); err != nil {
			return fmt.Errorf("hosts: %q is no pattern: %w", p, err)
		}
	}
	if len(c.Operators.View)+len(c.Operators.Act)+len(c.Operators.Admin) == 0 {
		return errors.New("operators names nobody: at least one should be among operators.admin")
	}
	return nil
}

// names are all members of the brain.
func (c config) names(own string) []string {
	list := slices.Concat(c.Brains, []string{own}, c.member(own).Names())
	slices.Sort(list)
	return slices.Compact(list)
}

// me is what others are told of this member.
func (c config) me(name string) string {
	_, port, _ := net.SplitHostPort(c.Listen)
	return name + "@" + cmp.Or(c.Address, net.JoinHostPort(name, port))
}

// look says what is wrong with what the configuration names on this host.
func (c config) look() (string, error) {
	info, err := certs.Inspect(c.Certs)
	if err != nil {
		return "", fmt.Errorf("certs = %q: %w", c.Certs, err)
	}
	if _, err := os.Stat(filepath.Dir(c.Data)); c.Etcd == nil && err != nil {
		return "", fmt.Errorf("data: %w: make the directory, or name another", err)
	}
	if len(c.Members) > 0 && !slices.Contains(c.member(info.Name).Names(), info.Name) {
		return "", fmt.Errorf("this host's certificate is %s's, which is not among members",
			info.Name)
	}
	if c.Etcd != nil {
		if _, err := c.Etcd.tls(); err != nil {
			return "", err
		}
		return fmt.Sprintf("member %s, with the etcd at %v", c.me(info.Name), c.Etcd.URLs), nil
	}
	return fmt.Sprintf("member %s, one of %d", c.me(info.Name), max(1, len(c.Members))), nil
}

// member is this one of the etcd that runs within the members.
func (c config) member(name string) member.Config {
	return member.Config{Name: name, Dir: c.Data, Members: c.Members, Certs: c.Certs,
		Joins: c.Joins}
}

// restore makes the store of a backup.
func (c config) restore(file string) error {
	if c.Etcd != nil {
		return errors.New("--restore is for the etcd in this process, and [etcd] names another " +
			"one: see `etcdutl snapshot restore`")
	}
	info, err := certs.Inspect(c.Certs)
	if err != nil {
		return fmt.Errorf("certs = %q: %w", c.Certs, err)
	}
	if c.Generation == 0 {
		return errors.New("generation is 0: hosts remember leaders that a backup does not know, " +
			"so raise it in the configuration of all members first. Nothing was touched")
	}
	return member.Restore(c.member(info.Name), file)
}

func (e *etcd) tls() (*tls.Config, error) {
	if e.CA == "" && e.Cert == "" && e.Key == "" {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	pem, err := os.ReadFile(e.CA)
	if err != nil {
		return nil, fmt.Errorf("etcd.ca: %w", err)
	}
	c.RootCAs = x509.NewCertPool()
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("etcd.ca: %s has no certificate", e.CA)
	}
	pair, err := tls.LoadX509KeyPair(e.Cert, e.Key)
	if err != nil {
		return nil, fmt.Errorf("etcd.cert, etcd.key: %w", err)
	}
	c.Certificates = []tls.Certificate{pair}
	return c, nil
}

// dial makes a client of an operator's own etcd.
func (e *etcd) dial() (*clientv3.Client, error) {
	t, err := e.tls()
	if err != nil {
		return nil, err
	}
	return clientv3.New(clientv3.Config{Endpoints: e.URLs, TLS: t})
}
