// Package daemons runs vacated on hosts of a lab as an operator does: with a certificate each, a
// configuration that has the others as its peers, and descriptions of VMs or a libvirt. Beside them
// it runs the brain of a fleet.
package daemons

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"vacate/lab"
	"vacate/lab/libvirtlab"
)

// port is where the daemons listen for each other.
const port = 7601

// Site is what the daemons have on disk, and the daemons. They are called hosta, hostb and so on.
type Site struct {
	lab     *lab.Lab
	hosts   []*lab.Host
	libvirt *libvirtlab.Hosts // nil: VMs are described
	more    string            // of the configuration of all
	dir     string
	vacate  string // the program; vacated is beside it

	mu      sync.Mutex
	daemons map[string]*daemon // that run, by their names; guarded by mu
}

// daemon is one that was started. ended is closed when it has ended.
type daemon struct {
	*exec.Cmd
	ended chan struct{}
}

// New makes the directories and certificates of hosts a and b. With libvirt the daemons know its
// domains. [Site.Start] starts each daemon. Close the site before libvirt and the lab.
func New(ctx context.Context, l *lab.Lab, vacate string, libvirt *libvirtlab.Hosts) (*Site, error) {
	return newSite(ctx, l, vacate, libvirt, []*lab.Host{l.A, l.B})
}

func newSite(ctx context.Context, l *lab.Lab, vacate string, libvirt *libvirtlab.Hosts,
	hosts []*lab.Host) (*Site, error) {
	dir, err := os.MkdirTemp("", "vacate") // short, as paths of sockets have to be
	if err != nil {
		return nil, err
	}
	s := &Site{lab: l, hosts: hosts, libvirt: libvirt, dir: dir, vacate: vacate,
		daemons: map[string]*daemon{}}
	err = s.certs(ctx, "init", "--dir", s.ca())
	for _, h := range hosts {
		if err == nil {
			err = s.issue(ctx, Name(h))
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Site) ca() string { return filepath.Join(s.dir, "ca") }

// issue makes a certificate in a directory of the same name.
func (s *Site) issue(ctx context.Context, name string) error {
	return s.certs(ctx, "issue", "--dir", s.ca(), "--name", name, "--out",
		filepath.Join(s.dir, name, "certs"))
}

func (s *Site) certs(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, s.vacate, append([]string{"certs"}, args...)...).
		CombinedOutput()
	if err != nil {
		return fmt.Errorf("vacate certs %s: %w: %s", args[0], err, out)
	}
	return nil
}

// Name is what a host's daemon is called.
func Name(h *lab.Host) string { return "host" + h.Name }

func (s *Site) home(h *lab.Host) string { return filepath.Join(s.dir, Name(h)) }

// Config is the file with the configuration of a host's daemon.
func (s *Site) Config(h *lab.Host) string { return filepath.Join(s.home(h), "vacated.toml") }

// Socket is where a host's daemon can be asked.
func (s *Site) Socket(h *lab.Host) string { return filepath.Join(s.home(h), "vacated.sock") }

// Describe gives a host the description of a VM, with more lines in it, such as pinned = true.
func (s *Site) Describe(h *lab.Host, name, qmp string, args []string, more ...string) error {
	dir := filepath.Join(s.home(h), "vms")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var vm strings.Builder
	for _, line := range more {
		vm.WriteString(line + "\n")
	}
	fmt.Fprintf(&vm, "qmp = %q\nlog = %q\ncommand = [", qmp, filepath.Join(s.home(h), name+".log"))
	for _, a := range args {
		fmt.Fprintf(&vm, "\n  %q,", a)
	}
	vm.WriteString("\n]\n")
	return os.WriteFile(filepath.Join(dir, name+".toml"), []byte(vm.String()), 0o644)
}

// section is what a host's daemon is told of libvirt.
func (s *Site) section(ctx context.Context, h *lab.Host) (string, error) {
	paths, err := json.Marshal(s.libvirt.Paths()) // a list of strings is the same in TOML
	if err != nil {
		return "", err
	}
	emulator, err := lab.StockQEMU(ctx)
	if err != nil {
		return "", err
	}
	of := s.libvirt.A
	if h == s.lab.B {
		of = s.libvirt.B
	}
	// The images are the same files for both hosts, which libvirt cannot know.
	return fmt.Sprintf(`
[libvirt]
uri         = %q
paths       = %s
networks    = ["user", %q]
emulators   = [%q]
migrations  = %q
trust_disks = true
`, of.Socket, strings.ReplaceAll(string(paths), ",", ", "), lab.Bridge, emulator.Path,
		filepath.Join(of.Dir, "run/to")), nil
}

// Start starts a host's daemon, and waits until it serves.
func (s *Site) Start(ctx context.Context, h *lab.Host) error {
	config := fmt.Sprintf(`certs   = "certs"
vms     = "vms"
journal = "journal"
socket  = "vacated.sock"
listen  = "%s:%d"
%s`, h.Addr, port, s.more)
	for _, peer := range s.hosts {
		if peer != h {
			config += fmt.Sprintf(`
[peers.%s]
address  = "%s:%d"
may_send = true
`, Name(peer), peer.Addr, port)
		}
	}
	if s.libvirt != nil {
		more, err := s.section(ctx, h)
		if err != nil {
			return err
		}
		config += more
	}
	if err := os.WriteFile(s.Config(h), []byte(config), 0o644); err != nil {
		return err
	}
	d, err := s.run(h, Name(h), exec.Command(filepath.Join(filepath.Dir(s.vacate), "vacated"),
		"--config", s.Config(h)))
	if err != nil {
		return err
	}
	for {
		c, err := net.Dial("unix", s.Socket(h))
		if err == nil {
			return c.Close()
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-d.ended:
			return fmt.Errorf("vacated on host %s ended: %s", h.Name, s.Said(h))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// run starts a program on a host, whose log goes to the file of a name.
func (s *Site) run(h *lab.Host, name string, cmd *exec.Cmd) (*daemon, error) {
	log, err := os.OpenFile(s.log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := h.Start(cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	d := &daemon{cmd, make(chan struct{})}
	go func() {
		defer close(d.ended)
		cmd.Wait()
	}()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.daemons[name] = d
	return d, nil
}

// Kill kills a host's daemon, if it runs.
func (s *Site) Kill(h *lab.Host) { s.kill(Name(h)) }

func (s *Site) kill(name string) {
	s.mu.Lock()
	d := s.daemons[name]
	delete(s.daemons, name)
	s.mu.Unlock()
	if d != nil {
		d.Process.Kill()
		<-d.ended
	}
}

// PID returns the process of a host's daemon; 0 if it does not run.
func (s *Site) PID(h *lab.Host) int { return s.pid(Name(h)) }

func (s *Site) pid(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.daemons[name]
	if d == nil {
		return 0
	}
	select {
	case <-d.ended:
		return 0
	default:
		return d.Process.Pid
	}
}

// Said is the end of what a host's daemon wrote to its log.
func (s *Site) Said(h *lab.Host) string { return s.said(Name(h)) }

func (s *Site) said(name string) string {
	b, _ := os.ReadFile(s.log(name))
	return string(b[max(0, len(b)-5000):])
}

// KeepLogs copies what all daemons wrote to a directory; empty: nowhere. Names of files begin with
// a prefix.
func (s *Site) KeepLogs(dir, prefix string) error {
	if dir == "" {
		return nil
	}
	all, err := filepath.Glob(s.log("*"))
	err = errors.Join(err, os.MkdirAll(dir, 0o755))
	for _, log := range all {
		b, e := os.ReadFile(log)
		name := prefix + filepath.Base(filepath.Dir(log))
		err = errors.Join(err, e, os.WriteFile(filepath.Join(dir, name), b, 0o644))
	}
	return err
}

// log is the file with what a daemon wrote.
func (s *Site) log(name string) string { return filepath.Join(s.dir, name, "log") }

// Command is vacate, as an operator on a host runs it.
func (s *Site) Command(ctx context.Context, h *lab.Host, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, s.vacate, args...)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 10 * time.Second
	c.Env = append(os.Environ(), "VACATE_SOCKET="+s.Socket(h))
	return c
}

// Close stops the daemons, and removes what they had.
func (s *Site) Close() error {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.daemons))
	s.daemons = map[string]*daemon{}
	s.mu.Unlock()
	for _, d := range all {
		d.Process.Signal(syscall.SIGCONT) // one that a test stopped
		d.Process.Signal(syscall.SIGTERM)
	}
	for _, d := range all {
		kill := time.AfterFunc(20*time.Second, func() { d.Process.Kill() })
		<-d.ended
		kill.Stop()
	}
	return os.RemoveAll(s.dir)
}
