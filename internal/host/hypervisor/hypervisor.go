// Package hypervisor knows the VMs of a host: how each one's QEMU is started as a twin, and what
// there is of it at the moment. Which programs may be started is this host's decision alone: a file
// says so, never a peer.
//
// A VM is described by DIR/NAME.toml. NAME has up to 64 letters, digits, dots, underscores and
// dashes, and begins with none of the last three.
//
//	# The command line of its QEMU: not a shell's, one string for each argument.
//	command = [
//	  "/usr/bin/qemu-system-x86_64", "-machine", "pc-q35-7.2,accel=kvm", "-cpu", "host",
//	  "-smp", "2", "-m", "4G", "-name", "{name}", "-display", "none",
//	  "-drive", "file=/shared/{name}.raw,format=raw,if=virtio,cache=none",
//	  "-qmp", "unix:{qmp},server=on,wait=off", "{incoming}",
//	]
//	qmp = "/run/vacate/{name}.qmp"      # its QMP socket, which vacate has for itself
//	user = "qemu"                       # the user that it runs as; default: the daemon's
//	log = "/var/log/vacate/{name}.log"  # takes its output; default: the socket's path, and .log
//	env = { LANG = "C.UTF-8" }          # its environment, and PATH; nothing else is inherited
//	pinned = true                       # relief never chooses it; it can be evicted by name
//	trust_disks = ["data"]              # drives whose images the other host has, on your word
//	priority = 1                        # relief chooses the least first; default: 0
//	labels = { app = "db" }             # what rules of a fleet may name it by
//
// {name} and {qmp} stand for themselves within any argument. {incoming} is an argument of its own;
// it becomes "-S", "-incoming", "defer" for a twin, and nothing else otherwise. Where it is missing
// it comes last.
//
// The directory and the file must belong to root, or to the daemon's user, and nobody else may
// write to them.
//
// A QEMU that was started here lives on when the daemon ends. Where systemd runs it has a scope of
// its own; elsewhere it is in the daemon's control group.
package hypervisor

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"vacate/internal/fleet/view"

	"github.com/BurntSushi/toml"
	"golang.org/x/sys/unix"
)

const (
	suffix      = ".toml"
	maxFile     = 256 << 10 // bytes of a description
	maxArgs     = 2000
	maxTrusted  = 500
	maxVMs      = 10_000
	maxSockPath = 107 // bytes: sockaddr_un.sun_path, unix(7), less its end
)

// ErrUnknown: the host has no description of the VM.
var ErrUnknown = errors.New("no such VM")

// A VM is a description, with all placeholders but {incoming} replaced; or a domain of libvirt's,
// which has no command, socket, user, log and environment here.
type VM struct {
	Name    string
	Command []string
	QMP     string // path of its QMP socket
	User    string // empty: the daemon's
	Log     string // path
	Env     map[string]string
	// StartTimeout is how long its QEMU may take to start until it answers.
	StartTimeout time.Duration
	// Pinned VMs are not chosen to leave a host, others in order of Priority, the least first.
	Pinned   bool
	Priority int
	Labels   view.Labels
	// Unfit is why relief must not choose a domain; nil: it may.
	Unfit error
	// Libvirt is the URI of the libvirt whose domain the VM is; empty: a file describes it.
	Libvirt string
	// TrustDisks names drives whose images are taken for those of the other host on the operator's
	// word.
	TrustDisks []string

	file string
}

// Load reads all descriptions in dir, in order of name. When some are wrong the others are returned
// with the error, which tells of all that are. A directory that does not exist has no VMs.
func Load(dir string) ([]VM, error) {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var list []VM
	var errs []error
	seen := map[string]string{}
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), suffix)
		if !ok || strings.HasPrefix(name, ".") { // such as an editor's copies
			continue
		}
		if len(list) == maxVMs {
			errs = append(errs, fmt.Errorf("%s: more than %d VMs", dir, maxVMs))
			break
		}
		vm, err := Find(dir, name)
		if other, twice := seen[vm.QMP]; err == nil && twice {
			err = fmt.Errorf("%s: qmp = %q is that of %s already: each VM needs its own", vm.file,
				vm.QMP, other)
		}
		if err != nil {
			errs = append(errs, &LoadError{name, err})
			continue
		}
		seen[vm.QMP] = name
		list = append(list, vm)
	}
	return list, errors.Join(errs...)
}

// A LoadError is why a description was not read.
type LoadError struct {
	VM  string
	Err error
}

func (e *LoadError) Error() string { return e.Err.Error() }

// Unwrap returns the reason.
func (e *LoadError) Unwrap() error { return e.Err }

// Unread takes an error of Load apart: it returns which VMs have descriptions that were not read,
// and why.
func Unread(err error) (list []*LoadError) {
	all, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return nil
	}
	for _, err := range all.Unwrap() {
		var e *LoadError
		if errors.As(err, &e) && CheckName(e.VM) == nil {
			list = append(list, e)
		}
	}
	return list
}

// File is the path of the description of a VM.
func File(dir, name string) string { return filepath.Join(dir, name+suffix) }

// Check returns an error if this host lacks the program or the user that a description names.
func (vm VM) Check() error {
	if _, err := exec.LookPath(vm.Command[0]); err != nil {
		return fmt.Errorf("%s: command: %w", vm.file, err)
	}
	if vm.User != "" {
		if _, err := credential(vm.User); err != nil {
			return fmt.Errorf("%s: user = %q: %w", vm.file, vm.User, err)
		}
	}
	return nil
}

// Find reads one description. It wraps ErrUnknown when there is none.
func Find(dir, name string) (VM, error) {
	if err := CheckName(name); err != nil {
		return VM{}, err
	}
	path := File(dir, name)
	text, err := readTrusted(dir, path)
	if errors.Is(err, fs.ErrNotExist) {
		return VM{}, fmt.Errorf("%w: %s, which describes it, does not exist", ErrUnknown, path)
	} else if err != nil {
		return VM{}, err
	}
	vm, err := parse(name, text)
	if err != nil {
		return VM{}, fmt.Errorf("%s: %w", path, err)
	}
	vm.file = path
	return vm, nil
}

var goodName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// CheckName says whether a VM may be called so.
func CheckName(name string) error {
	if !goodName.MatchString(name) {
		return fmt.Errorf("%.100q cannot be the name of a VM: it needs 1 to 64 letters, digits, "+
			"dots, underscores and dashes, and a letter or digit first", name)
	}
	return nil
}

// readTrusted reads a description if nobody else than root and we can have written it.
func readTrusted(dir, path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return "", fmt.Errorf("%s is a symbolic link: put the file itself there", path)
	} else if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a file", path)
	}
	if err := trusted(path, info); err != nil {
		return "", err
	}
	if info, err = os.Stat(dir); err != nil {
		return "", err
	}
	if err := trusted(dir, info); err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", path, maxFile)
	}
	return string(b), err
}

func trusted(path string, info fs.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !ok:
		return fmt.Errorf("cannot find out who owns %s", path)
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to user %d, who could have any program started: chown "+
			"root %[1]s", path, st.Uid)
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%s can be written by others, who could have any program started: "+
			"chmod go-w %[1]s", path)
	}
	return nil
}

// parse reads a description. What it does not know, it refuses.
func parse(name, text string) (VM, error) {
	if err := CheckName(name); err != nil {
		return VM{}, err
	}
	var d struct {
		Command []string          `toml:"command"`
		QMP     string            `toml:"qmp"`
		User    string            `toml:"user"`
		Log     string            `toml:"log"`
		Env     map[string]string `toml:"env"`

		StartTimeout time.Duration `toml:"start_timeout"`

		Pinned   bool `toml:"pinned"`
		Priority int  `toml:"priority"`

		Labels view.Labels `toml:"labels"`

		TrustDisks []string `toml:"trust_disks"`
	}
	if !utf8.ValidString(text) {
		return VM{}, errors.New("not UTF-8")
	}
	meta, err := toml.Decode(text, &d)
	if err != nil {
		return VM{}, err
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return VM{},
			fmt.Errorf("unknown key %q: there are command, qmp, user, log, env, start_timeout, "+
				"pinned, priority, labels and trust_disks", unknown[0].String())
	}
	all := append(slices.Collect(maps.Keys(d.Env)), slices.Collect(maps.Values(d.Env))...)
	for _, s := range append(append(all, d.QMP, d.User, d.Log), d.Command...) {
		if strings.ContainsRune(s, 0) {
			return VM{}, fmt.Errorf("%.100q has a NUL in it", s)
		}
	}
	for key := range d.Env {
		if key == "" || strings.Contains(key, "=") {
			return VM{}, fmt.Errorf("env: %.100q cannot be the name of a variable", key)
		}
	}

	named := strings.NewReplacer("{name}", name)
	vm := VM{Name: name, QMP: named.Replace(d.QMP), User: d.User, Log: named.Replace(d.Log),
		Env: d.Env, StartTimeout: d.StartTimeout, Pinned: d.Pinned, Priority: d.Priority,
		Labels: d.Labels, TrustDisks: d.TrustDisks}
	if err := d.Labels.Check(); err != nil {
		return VM{}, fmt.Errorf("labels: %w", err)
	}
	if !meta.IsDefined("start_timeout") {
		vm.StartTimeout = usualStart
	}
	switch {
	case vm.StartTimeout < leastStart || vm.StartTimeout > MaxStart:
		return VM{}, fmt.Errorf("start_timeout = %q: want %v to %v", d.StartTimeout, leastStart,
			MaxStart)
	case len(d.TrustDisks) > maxTrusted:
		return VM{}, fmt.Errorf("trust_disks has more than %d names", maxTrusted)
	case d.QMP == "":
		return VM{}, errors.New(`qmp is missing, such as qmp = "/run/vacate/{name}.qmp"`)
	case !clean(vm.QMP) || len(vm.QMP) > maxSockPath:
		return VM{}, fmt.Errorf("qmp = %.200q: an absolute path of at most %d bytes is needed",
			vm.QMP, maxSockPath)
	case strings.ContainsAny(vm.QMP, ","):
		return VM{}, fmt.Errorf("qmp = %q: QEMU takes a comma for the end of the path", vm.QMP)
	case d.Log == "":
		vm.Log = vm.QMP + ".log"
	case !clean(vm.Log):
		return VM{}, fmt.Errorf("log = %.200q: an absolute path is needed", vm.Log)
	}
	return vm, vm.setCommand(d.Command)
}

func clean(path string) bool { return filepath.IsAbs(path) && filepath.Clean(path) == path }

const incoming = "{incoming}"

// JSON that QEMU takes as an argument has a quotation mark after each brace, or the end.
var placeholder = regexp.MustCompile(`\{[A-Za-z_]+\}`)

func (vm *VM) setCommand(command []string) error {
	switch {
	case len(command) == 0:
		return errors.New(
			`command is missing, such as command = ["/usr/bin/qemu-system-x86_64", …]`)
	case len(command) > maxArgs:
		return fmt.Errorf("command has more than %d arguments", maxArgs)
	case !clean(command[0]):
		return fmt.Errorf("command begins with %.200q: the absolute path of a QEMU is needed",
			command[0])
	}
	for _, arg := range command {
		for _, p := range placeholder.FindAllString(arg, -1) {
			if p != "{name}" && p != "{qmp}" && p != incoming {
				return fmt.Errorf("command has %.200q: there is no %s, only {name}, {qmp} and %s",
					arg, p, incoming)
			}
		}
	}
	placeholders := strings.NewReplacer("{name}", vm.Name, "{qmp}", vm.QMP)
	monitor, place := false, false
	for i, arg := range command {
		switch {
		case i > 0 && (arg == "-incoming" || arg == "--incoming"):
			return fmt.Errorf("command has %s: leave that to %q", arg, incoming)
		case i > 0 && (arg == "-daemonize" || arg == "--daemonize"):
			return fmt.Errorf("command has %s: leave it out, the QEMU lives on without it", arg)
		case arg == incoming && place:
			return fmt.Errorf("command has %q twice", incoming)
		case arg == incoming && i > 0:
			place = true
		case strings.Contains(arg, incoming):
			return fmt.Errorf("command has %.200q: %q is an argument of its own", arg, incoming)
		}
		arg = placeholders.Replace(arg)
		monitor = monitor || i > 0 && strings.Contains(arg, vm.QMP)
		vm.Command = append(vm.Command, arg)
	}
	if !monitor {
		return errors.New(
			`command does not have the QMP socket: add "-qmp", "unix:{qmp},server=on,wait=off"`)
	}
	if !place {
		vm.Command = append(vm.Command, incoming)
	}
	return nil
}

// Args is the command line of a twin, or of a VM that starts by itself.
func (vm VM) Args(twin bool) []string {
	var args []string
	for _, arg := range vm.Command {
		switch {
		case arg != incoming:
			args = append(args, arg)
		case twin:
			args = append(args, "-S", "-incoming", "defer")
		}
	}
	return args
}
