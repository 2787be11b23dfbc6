package host

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/host/hypervisor"
	"vacate/internal/link/certs"
	"vacate/internal/sys/sched"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"
)

// TestMain makes this binary a daemon where a test starts it as one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == hypervisor.HoldCommand {
		hypervisor.StayHeld()
	}
	if file := os.Getenv("VACATE_TEST_DAEMON"); file != "" {
		if err := runDaemon(file); err != nil {
			fmt.Fprintln(os.Stderr, "daemon:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runDaemon is a daemon that tells its parent, on standard output, of each state of its engines,
// and waits in those that the parent names (ROLE/STATE, on standard input) until it says "go".
func runDaemon(file string) error {
	sched.Process()
	config, err := ReadConfig(file)
	if err != nil {
		return err
	}
	h, err := Open(config, "test",
		slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		return err
	}
	var mu sync.Mutex
	hold := map[string]chan struct{}{}
	go func() {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			word, at, _ := strings.Cut(in.Text(), " ")
			mu.Lock()
			switch {
			case word == "hold":
				hold[at] = make(chan struct{})
			case word == "go" && hold[at] != nil:
				close(hold[at])
				delete(hold, at)
			}
			mu.Unlock()
			fmt.Println("heard", word)
		}
	}()
	h.onState = func(role journal.Role, _ journal.ID, s evict.State) {
		at := fmt.Sprintf("%s/%s", role, s)
		mu.Lock()
		wait := hold[at]
		mu.Unlock()
		fmt.Println("state", at)
		if wait != nil {
			<-wait
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	go func() {
		<-hangup
		if h.Settle(ctx) == nil {
			stop()
		}
	}()
	fmt.Println("ready")
	return h.Run(ctx)
}

// site is a host of the lab with what its daemon has on disk.
type site struct {
	t    testing.TB
	host *lab.Host
	name string
	dir  string
	vms  string
	api  hostv1.HostClient

	mu     sync.Mutex
	daemon *exec.Cmd // nil: none runs
	input  io.Writer
	ended  chan struct{}
	lines  chan string
	log    *os.File
}

// sites makes the daemons of a lab's hosts, hosta and hostb, which may send VMs to one another.
func sites(t testing.TB, l *lab.Lab) (a, b *site) {
	t.Helper()
	dir, err := os.MkdirTemp("", "vacate") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ca := filepath.Join(dir, "ca")
	if err := certs.Init(ca); err != nil {
		t.Fatal(err)
	}
	list := []*site{{t: t, host: l.A, name: "hosta"}, {t: t, host: l.B, name: "hostb"}}
	for i, s := range list {
		s.dir = filepath.Join(dir, s.name)
		s.vms = filepath.Join(s.dir, "vms")
		if err := os.MkdirAll(s.vms, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := certs.Issue(ca, s.name, filepath.Join(s.dir, "certs"), certs.DefaultDays,
			false); err != nil {
			t.Fatal(err)
		}
		other := list[1-i]
		config :=
			fmt.Sprintf("certs = \"certs\"\nlisten = %q\nsocket = \"sock\"\njournal = "+
				"\"journal\"\nvms = \"vms\"\n[peers.%s]\naddress = %q\nmay_send = true\n",
				net.JoinHostPort(s.host.Addr, "7601"), other.name,
				net.JoinHostPort(other.host.Addr, "7601"))
		if err := os.WriteFile(filepath.Join(s.dir, "vacated.toml"), []byte(config),
			0o600); err != nil {
			t.Fatal(err)
		}
		if s.log, err = os.Create(filepath.Join(s.dir, "log")); err != nil {
			t.Fatal(err)
		}
		socket := filepath.Join(s.dir, "sock")
		transport := &http.Transport{DialContext: func(ctx context.Context,
			_, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}}
		s.api = hostv1.NewHostClient(&http.Client{Transport: transport}, "http://host")
		t.Cleanup(func() {
			transport.CloseIdleConnections()
			s.kill()
			s.endHolders()
			s.log.Close()
			if t.Failed() {
				b, _ := os.ReadFile(s.log.Name())
				t.Logf("log of %s:\n%s", s.name, b[max(0, len(b)-30_000):])
				logs, _ := filepath.Glob(filepath.Join(s.dir, "*.log"))
				for _, file := range logs {
					b, _ := os.ReadFile(file)
					t.Logf("%s:\n%s", file, b[max(0, len(b)-5000):])
				}
			}
		})
	}
	return list[0], list[1]
}

// start starts the daemon, with states to hold it in, and waits until it serves.
func (s *site) start(hold ...string) {
	s.t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "VACATE_TEST_DAEMON="+filepath.Join(s.dir, "vacated.toml"))
	cmd.Stderr = s.log
	input, err := cmd.StdinPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, at := range hold {
		fmt.Fprintln(input, "hold", at) // the pipe has room
	}
	if err := s.host.Start(cmd); err != nil {
		s.t.Fatal(err)
	}
	lines, ended, ready := make(chan string, 1000), make(chan struct{}), make(chan struct{})
	go func() {
		heard := 0
		for out := bufio.NewScanner(output); out.Scan(); {
			switch word, rest, _ := strings.Cut(out.Text(), " "); word {
			case "ready":
				close(ready)
			case "heard":
				heard++
			case "state":
				select {
				case lines <- rest:
				default:
				}
			}
		}
		cmd.Wait()
		close(ended)
	}()
	s.mu.Lock()
	s.daemon, s.input, s.lines, s.ended = cmd, input, lines, ended
	s.mu.Unlock()
	select {
	case <-ready:
	case <-ended:
		s.t.Fatalf("the daemon of %s ended", s.name)
	}
	ctx := labtest.Within(s.t, 10*time.Second)
	for {
		_, err := s.api.Status(ctx, connect.NewRequest(&hostv1.StatusRequest{}))
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			s.t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// runs reports whether the daemon was started and not ended since.
func (s *site) runs() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.daemon != nil
}

// kill ends the daemon with SIGKILL.
func (s *site) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.daemon != nil {
		s.daemon.Process.Kill()
		<-s.ended
		s.daemon = nil
	}
}

// endHolders ends the processes that keep libvirt's connections open for evictions which a failed
// test left behind. No daemon runs.
func (s *site) endHolders() {
	dir := filepath.Join(s.dir, "journal")
	if _, err := os.Stat(dir); err != nil {
		return // no daemon has run
	}
	j, err := journal.Open(dir)
	if err != nil {
		s.t.Logf("journal of %s: %v", s.name, err)
		return
	}
	defer j.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, entry := range j.List() {
		if err := evict.ReleaseDomain(ctx, record{entry}); err != nil {
			s.t.Errorf("%s: %v", s.name, err)
		}
	}
}

// stop has the daemon end by itself.
func (s *site) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.daemon.Process.Signal(syscall.SIGTERM)
	<-s.ended
	s.daemon = nil
}

// release lets the daemon go on in a state that it is held in.
func (s *site) release(at string) { fmt.Fprintln(s.input, "go", at) }

// reach waits until an engine comes to a state, and reports whether it did before the time was up.
func (s *site) reach(at string, limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		select {
		case line := <-s.lines:
			if line == at {
				return true
			}
		case <-s.ended:
			return false
		case <-timer.C:
			return false
		}
	}
}

// came returns the states that engines came to and that nobody has asked for yet.
func (s *site) came() (list []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		select {
		case line := <-s.lines:
			list = append(list, line)
		default:
			return list
		}
	}
}

// patient is how long a described VM's QEMU may take to start: on a busy machine it may get no core
// for half a minute.
const patient = `start_timeout = "3m"`

// describe gives the host a description of a VM.
func (s *site) describe(name, qmp string, args []string) {
	s.t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nqmp = %q\nlog = %q\ncommand = [\n", patient, qmp,
		filepath.Join(s.dir, name+".log"))
	for _, a := range args {
		fmt.Fprintf(&b, "  %q,\n", a)
	}
	b.WriteString("]\n")
	if err := os.WriteFile(filepath.Join(s.vms, name+".toml"), []byte(b.String()),
		0o644); err != nil {
		s.t.Fatal(err)
	}
}

// expect has the host be ready for a VM that its daemon will start.
func (s *site) expect(name string, vm *lab.VM) *lab.Expected {
	s.t.Helper()
	e, err := s.host.Expect(labtest.Within(s.t, time.Minute), vm)
	if err != nil {
		s.t.Fatal(err)
	}
	s.describe(name, e.QMP, e.Args)
	return e
}

// evict begins an eviction.
func (s *site) evict(vm, to string) (*hostv1.Eviction, error) { return s.evictAt(vm, to, 0) }

// evictAt begins an eviction that pushes so many bytes a second at most; 0 is any number.
func (s *site) evictAt(vm, to string, rate uint64) (*hostv1.Eviction, error) {
	return s.evictWith(vm, to, &hostv1.EvictOptions{SkipChecks: true, RateLimit: rate})
}

// evictWith begins an eviction with options.
func (s *site) evictWith(vm, to string, options *hostv1.EvictOptions) (*hostv1.Eviction, error) {
	r, err := s.api.Evict(labtest.Within(s.t, time.Minute),
		connect.NewRequest(&hostv1.EvictRequest{Vm: vm, To: to, Options: options}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

// watch follows an eviction to its end.
func (s *site) watch(id string, limit time.Duration) (*hostv1.Eviction, error) {
	ctx, cancel := context.WithTimeout(s.t.Context(), limit)
	defer cancel()
	stream, err := s.api.WatchEviction(ctx,
		connect.NewRequest(&hostv1.WatchEvictionRequest{Id: id}))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var last *hostv1.Eviction
	for stream.Receive() {
		last = stream.Msg()
	}
	return last, stream.Err()
}

// boot starts a VM that works at an easy pace, so that tests share the machine.
func boot(t testing.TB, h *lab.Host, spec lab.Spec) *lab.VM {
	t.Helper()
	spec.Load.Slow = true
	return bootBusy(t, h, spec)
}

// bootBusy starts a VM that works all the time.
func bootBusy(t testing.TB, h *lab.Host, spec lab.Spec) *lab.VM {
	t.Helper()
	vm, err := h.Boot(labtest.Within(t, 3*time.Minute), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 1000); err != nil {
		t.Fatal(err)
	}
	return vm
}
