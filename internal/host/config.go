package host

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"vacate/internal/host/hypervisor"
	"vacate/internal/host/relief"
	"vacate/internal/sys/settings"
)

// Config is how a host's daemon is set up. It is read from a file of TOML:
//
//	certs   = "/etc/vacate/certs"         # who this host is: see vacate certs
//	listen  = ":7601"                     # other hosts send VMs there; without it, none may come
//	socket  = "/run/vacate/vacated.sock"  # operators of this host ask there; /metrics, too
//	socket_group = "vacate"               # its members may ask there; they are as good as root;
//	                                      # default: nobody
//	journal = "/var/lib/vacate"           # evictions, on a disk that keeps them
//	vms     = "/etc/vacate/vms"           # descriptions of VMs: see package hypervisor
//	metrics = "127.0.0.1:9601"            # /metrics over plain HTTP; default: only on the socket
//	give_back = "30s"                     # a VM has run elsewhere for so long: its memory here is
//	                                      # freed as it arrives there. The VM can then not be
//	                                      # resumed here; default: only when all has arrived
//	huge_pages = false                    # VMs that came stay in small pages; default: their huge
//	                                      # pages come back once the eviction is complete
//
//	[api]                                 # the same as on the socket, over TLS
//	listen    = ":7600"
//	operators = ["admin"]                 # by the names in their certificates
//
//	[peers.hostb]                         # another host, by the name in its certificate
//	address  = "hostb.example:7601"       # where it listens; without it, no VM goes there
//	may_send = true                       # it may send VMs here
//	rate     = 500                        # Mbit/s at most to it; default: any
//	fence    = ["/usr/local/sbin/ipmi-off", "{host}"]
//	                                      # cuts it off for good, for vacate decide --fence; ends
//	                                      # with code 0 if it did; default: none
//	fence_time = "2m"                     # how long that may take
//
//	[libvirt]                             # know this host's libvirt, too; default: no
//	uri       = "qemu:///system"          # or "qemu:///session", or the path of its socket
//	paths     = ["/srv/vms"]              # domains of other hosts may name files below these;
//	                                      # "rbd:vms" is the images of a pool; default: none
//	networks  = ["default", "br0"]        # they may be on these networks and bridges; "user" is
//	                                      # QEMU's own; default: none
//	trust_disks = true                    # on your word the disks of domains are the same on the
//	                                      # other hosts; default: libvirt judges by the storage
//	migrations = "/run/vacate/migrations" # libvirt's own migrations to hostb pass through
//	                                      # unix:///run/vacate/migrations/hostb.sock; default: none
//	emulators = ["/usr/bin/qemu-system-x86_64"]
//	                                      # they may be run by these; default: those of Debian
//	                                      # and Red Hat
//
//	[fleet]                               # belong to a fleet; default: to none
//	brains   = ["brain1", "brain2@10.0.0.2:7610"]
//	                                      # members of its brain, NAME[@HOST:PORT]: those with
//	                                      # these names in their certificates order evictions
//	labels   = { rack = "r1" }            # what rules may name this host by; default: none
//	rate     = 10000                      # Mbit/s that its link takes; default: 1000
//	link     = "rack-r1"                  # the link that it shares with others; default: none
//	interval = "3s"                       # how often it reports
//
//	[guard]                               # evict by itself when overloaded; default: never
//	goal       = "cpu<111%"               # what this host shall reach: see relief.ParseGoal
//	max_load   = 0.8                      # most CPU wanted for each core there
//	reserve    = 0.1                      # share of its memory that stays free there
//	sustain    = "30s"                    # how long the goal is missed before
//	settle     = "1m"                     # how long it rests after an eviction
//	cool_down  = "30m"                    # how long a VM then stays
//	concurrent = 1                        # how many evictions there may be at once
//	interval   = "5s"                     # how long each measurement takes
//
// All but peers has the default shown, except for listen, metrics, api, libvirt, fleet and guard,
// which are off.
// With
//
//	plain = true                          # no TLS: others can read and forge memory
//
// the link is neither encrypted nor authenticated, and a peer is known by its IP address alone.
type Config struct {
	// of this host on a plain link; else its certificate has it
	Name     string        `toml:"name"`
	Certs    string        `toml:"certs"`
	Plain    bool          `toml:"plain"`
	Listen   string        `toml:"listen"`
	Socket   string        `toml:"socket"`
	Group    string        `toml:"socket_group"` // empty: the daemon's user alone
	Journal  string        `toml:"journal"`
	VMs      string        `toml:"vms"`
	Metrics  string        `toml:"metrics"`
	GiveBack time.Duration `toml:"give_back"` // 0: at the end
	// HugePages has VMs that came get the transparent huge pages back that they had at the source.
	HugePages bool            `toml:"huge_pages"`
	API       API             `toml:"api"`
	Peers     map[string]Peer `toml:"peers"`
	Guard     *Guard          `toml:"guard"`   // nil: off
	Fleet     *Fleet          `toml:"fleet"`   // nil: it belongs to none
	Libvirt   *Libvirt        `toml:"libvirt"` // nil: it is not asked
}

// Guard is when, and how, the daemon evicts by itself. What is not set has its default.
type Guard struct {
	Goal       string        `toml:"goal"`
	MaxLoad    float64       `toml:"max_load"`
	Reserve    *float64      `toml:"reserve"`
	Sustain    time.Duration `toml:"sustain"`
	Settle     time.Duration `toml:"settle"`
	CoolDown   time.Duration `toml:"cool_down"`
	Concurrent int           `toml:"concurrent"`
	Interval   time.Duration `toml:"interval"`
}

// policy is the guard's, with what is not set filled in.
func (g Guard) policy() (relief.Policy, error) {
	p := relief.DefaultPolicy
	if g.Goal != "" {
		var err error
		if p.Goal, err = relief.ParseGoal(g.Goal); err != nil {
			return p, err
		}
	}
	set(&p.Limits.MaxLoad, g.MaxLoad)
	set(&p.Sustain, g.Sustain)
	set(&p.Settle, g.Settle)
	set(&p.CoolDown, g.CoolDown)
	set(&p.Concurrent, g.Concurrent)
	if g.Reserve != nil {
		p.Limits.Reserve = *g.Reserve
	}
	switch {
	case !(p.Limits.MaxLoad > 0 && p.Limits.MaxLoad <= 10):
		return p, fmt.Errorf("max_load = %v: want more than 0, and 10 at most", p.Limits.MaxLoad)
	case !(p.Limits.Reserve >= 0 && p.Limits.Reserve < 1):
		return p, fmt.Errorf("reserve = %v: want a share from 0 to 1", p.Limits.Reserve)
	case min(p.Sustain, p.Settle, p.CoolDown) < 0 || p.Concurrent < 0:
		return p, errors.New("no time, and no number of evictions, can be less than 0")
	case g.Interval != 0 && (g.Interval < leastOver || g.Interval > time.Minute):
		return p, fmt.Errorf("interval = %v: want %v to a minute", g.Interval, leastOver)
	}
	return p, nil
}

// interval is over what time each look is.
func (g Guard) interval() time.Duration { return cmp.Or(g.Interval, 5*time.Second) }

// set sets a value unless it is none.
func set[T comparable](to *T, value T) { *to = cmp.Or(value, *to) }

// API is who may ask over TCP.
type API struct {
	Listen    string   `toml:"listen"`
	Operators []string `toml:"operators"`
}

// Peer is another host.
type Peer struct {
	Address string `toml:"address"`
	MaySend bool   `toml:"may_send"`
	Rate    uint64 `toml:"rate"` // Mbit/s
	// Fence is a command, without a shell, that has the host run no VM any more when it exits with
	// 0; "{host}" in it stands for the name.
	Fence     []string      `toml:"fence"`
	FenceTime time.Duration `toml:"fence_time"` // 0: usualFence
}

// maxRate bounds a peer's rate, in Mbit/s.
const maxRate = 10_000_000

// maxGiveBack bounds the time after which memory is given back: beyond, it is never.
const maxGiveBack = 24 * time.Hour

// ReadConfig reads a file, and fills in the defaults. Relative paths in it count from its
// directory.
func ReadConfig(file string) (Config, error) {
	c := Config{
		Certs: "/etc/vacate/certs", Socket: "/run/vacate/vacated.sock", Journal: "/var/lib/vacate",
		VMs: "/etc/vacate/vms", HugePages: true,
	}
	dir, err := settings.Read(file, "vacated --help", &c)
	if err != nil {
		return c, err
	}
	for _, path := range []*string{&c.Certs, &c.Socket, &c.Journal, &c.VMs} {
		if *path != "" && !filepath.IsAbs(*path) {
			*path = filepath.Join(dir, *path)
		}
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

// check says what is wrong with a configuration.
func (c Config) check() error {
	for name, path := range map[string]string{"socket": c.Socket, "journal": c.Journal,
		"vms": c.VMs} {
		if path == "" {
			return fmt.Errorf("%s is empty", name)
		}
	}
	for _, a := range []struct{ name, addr string }{{"listen", c.Listen}, {"metrics", c.Metrics},
		{"api.listen", c.API.Listen}} {
		if a.addr == "" {
			continue
		}
		if _, err := settings.SplitAddress(a.addr, 0); err != nil {
			return fmt.Errorf("%s = %q %w", a.name, a.addr, err)
		}
	}
	if c.Plain && c.Name == "" {
		return errors.New("plain = true needs name, this host's")
	}
	if !c.Plain && c.Name != "" {
		return errors.New("name is for plain = true only: this host's certificate has its name")
	}
	if err := c.checkAPI(); err != nil {
		return err
	}
	if c.GiveBack < 0 || c.GiveBack > maxGiveBack {
		return fmt.Errorf("give_back = %v: want 0, which is off, to %v", c.GiveBack, maxGiveBack)
	}
	if c.Libvirt != nil {
		if err := c.Libvirt.check(); err != nil {
			return fmt.Errorf("libvirt: %w", err)
		}
	}
	if c.Guard != nil {
		if _, err := c.Guard.policy(); err != nil {
			return fmt.Errorf("guard: %w", err)
		}
	}
	if c.Fleet != nil {
		if err := c.Fleet.check(c.Plain); err != nil {
			return fmt.Errorf("fleet: %w", err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Peers)) {
		if err := c.checkPeer(name, c.Peers[name]); err != nil {
			return err
		}
	}
	return nil
}

func (c Config) checkAPI() error {
	if c.API.Listen != "" && (c.Plain || len(c.API.Operators) == 0) {
		return errors.New("api.listen needs certificates (no plain = true), and api.operators, " +
			"the names of those who may ask")
	}
	if c.API.Listen == "" && len(c.API.Operators) > 0 {
		return errors.New("api.operators may ask nothing without api.listen: add it, such as " +
			"listen = \":7600\"")
	}
	for _, name := range c.API.Operators {
		if err := certified(name); err != nil {
			return fmt.Errorf("api.operators: %w", err)
		}
	}
	return nil
}

func (c Config) checkPeer(name string, p Peer) error {
	if err := hypervisor.CheckName(name); err != nil {
		return fmt.Errorf("peers.%s: %w", name, err)
	}
	if !c.Plain {
		if err := certified(name); err != nil {
			return fmt.Errorf("peers.%s: %w", name, err)
		}
	}
	if name == c.Name {
		return selfPeer(name)
	}
	if p.Rate > maxRate {
		return fmt.Errorf("peers.%s: rate = %d is more than %d Mbit/s", name, p.Rate, maxRate)
	}
	if err := p.checkFence(); err != nil {
		return fmt.Errorf("peers.%s: %w", name, err)
	}
	if p.Address == "" {
		if c.Plain && p.MaySend {
			return fmt.Errorf("peers.%s: on a plain link it is known by its address, which is "+
				"missing", name)
		}
		return nil
	}
	host, err := settings.SplitAddress(p.Address, 1)
	if err != nil {
		return fmt.Errorf("peers.%s: address = %q %w", name, p.Address, err)
	}
	if _, err := netip.ParseAddr(host); c.Plain && err != nil {
		return fmt.Errorf("peers.%s: address = %q: a plain link needs an IP address, by which the "+
			"peer is known", name, p.Address)
	}
	return nil
}

// certified says why no certificate that we take can have a name: of those, names are lower case.
func certified(name string) error {
	if lower := strings.ToLower(name); name != lower {
		return fmt.Errorf("%q can be in no certificate, as capital letters count as small ones "+
			"there: write %q", name, lower)
	}
	return nil
}

// selfPeer is the error of a host that is its own peer.
func selfPeer(name string) error {
	return fmt.Errorf("peers.%s: that is this host itself: name only others", name)
}

// peerAt is the name of the peer on a plain link that has the IP address of addr, a host:port.
func (c Config) peerAt(addr string) (string, error) {
	from, err := netip.ParseAddrPort(addr)
	if err != nil {
		return "", err
	}
	for _, name := range slices.Sorted(maps.Keys(c.Peers)) {
		at, err := netip.ParseAddrPort(c.Peers[name].Address)
		if err == nil && at.Addr().Unmap() == from.Addr().Unmap() {
			return name, nil
		}
	}
	return "", fmt.Errorf("no peer has the address %s", from.Addr())
}

// mayCome says whether a peer may bring VMs to this host, whose name is here.
func (c Config) mayCome(name, here string) error {
	p, ok := c.Peers[name]
	switch {
	case !ok:
		return fmt.Errorf("host %q is no peer of this one: the configuration of vacated on host "+
			"%s wants [peers.%s]", name, here, name)
	case !p.MaySend:
		return fmt.Errorf("host %q may not bring VMs to this one: the configuration of vacated "+
			"on host %s wants may_send = true under [peers.%s]", name, here, name)
	}
	return nil
}

// peerNames are those of all peers, for messages.
func (c Config) peerNames() string {
	if len(c.Peers) == 0 {
		return "none is configured"
	}
	return "there are " + strings.Join(slices.Sorted(maps.Keys(c.Peers)), ", ")
}
