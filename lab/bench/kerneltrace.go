package bench

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// kernelTrace has Linux record events for a while (tracefs). It has an instance of its own, so
// nobody else's tracing is disturbed.
type kernelTrace struct {
	mount    string // of tracefs
	instance string
}

// traceBuffer is how much is recorded for each core, in KiB. When it is full, the oldest events
// go.
const traceBuffer = 64 << 10

// traced are the events that are recorded, each with a filter.
var traced = []struct{ event, filter string }{
	{"sched/sched_switch", ""},
	{"sched/sched_wakeup", ""},
	{"sched/sched_process_fork", ""},
	{"kvm/kvm_try_async_get_page", ""},
	{"kvmmmu/kvm_mmu_set_spte", ""},
	{"syscalls/sys_enter_sendmsg", ""},
	{"syscalls/sys_exit_sendmsg", ""},
	{"syscalls/sys_enter_recvfrom", ""},
	{"syscalls/sys_exit_recvfrom", ""},
	{"syscalls/sys_enter_process_vm_readv", ""},
	{"syscalls/sys_exit_process_vm_readv", ""},
	{"syscalls/sys_enter_ioctl", fmt.Sprintf("cmd == %d", uffdioCopy)},
	{"syscalls/sys_exit_ioctl", ""},
}

const uffdioCopy = 0xc028aa03 // linux/userfaultfd.h

// startTrace begins to record.
func startTrace() (k *kernelTrace, err error) {
	k = &kernelTrace{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("record events of the kernel: %w", err), k.close())
		}
	}()
	if k.mount, err = os.MkdirTemp("", "vacate-lab-tracefs-"); err != nil {
		return k, err
	}
	if err := unix.Mount("tracefs", k.mount, "tracefs", 0, ""); err != nil {
		return k, fmt.Errorf("mount tracefs: %w", err)
	}
	k.instance = filepath.Join(k.mount, "instances", filepath.Base(k.mount))
	if err := os.Mkdir(k.instance, 0o700); err != nil {
		k.instance = ""
		return k, err
	}
	settings := [][2]string{{"tracing_on", "0"}, {"trace_clock", "mono"},
		{"buffer_size_kb", strconv.Itoa(traceBuffer)}}
	for _, e := range traced {
		dir := "events/" + e.event
		if e.filter != "" {
			settings = append(settings, [2]string{dir + "/filter", e.filter})
		}
		settings = append(settings, [2]string{dir + "/enable", "1"})
	}
	for _, s := range append(settings, [2]string{"tracing_on", "1"}) {
		// no O_CREAT: tracefs refuses it
		f, err := os.OpenFile(filepath.Join(k.instance, s[0]), os.O_WRONLY, 0)
		if err != nil {
			return k, err
		}
		_, err = f.WriteString(s[1])
		if err = errors.Join(err, f.Close()); err != nil {
			return k, err
		}
	}
	return k, nil
}

// stop ends the recording and returns it.
func (k *kernelTrace) stop() (events []traceEvent, err error) {
	defer func() { err = errors.Join(err, k.close()) }()
	f, err := os.OpenFile(filepath.Join(k.instance, "tracing_on"), os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	_, err = f.WriteString("0")
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if f, err = os.Open(filepath.Join(k.instance, "trace")); err != nil {
		return nil, err
	}
	defer f.Close()
	return parseTrace(f)
}

// close removes what was made.
func (k *kernelTrace) close() error {
	var errs []error
	if k.instance != "" {
		errs = append(errs, unix.Rmdir(k.instance))
	}
	if k.mount != "" {
		if err := unix.Unmount(k.mount, 0); err != nil && err != unix.EINVAL {
			errs = append(errs, err)
		}
		errs = append(errs, os.Remove(k.mount))
	}
	*k = kernelTrace{}
	return errors.Join(errs...)
}

// traceEvent is what the kernel recorded.
type traceEvent struct {
	at   time.Duration // on the monotonic clock
	cpu  int
	tid  int    // the thread that ran
	name string // such as sched_switch; of system calls sys_NAME, and "sys_NAME ->" at their end
	rest string
	call string // at the end of a system call, its arguments
}

var traceLine = regexp.MustCompile(`^\s*.{1,16}-(\d+) +(?:\([ 0-9-]+\) )?\[(\d+)\] +\S+ +` +
	`(\d+)\.(\d{6}): (.*)$`)

// parseTrace reads the text of tracefs.
func parseTrace(r io.Reader) ([]traceEvent, error) {
	var events []traceEvent
	calls := map[int]string{} // by thread
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		m := traceLine.FindSubmatch(lines.Bytes())
		if m == nil {
			continue // a comment, or lost events
		}
		number := func(i int) int { n, _ := strconv.Atoi(string(m[i])); return n }
		e := traceEvent{tid: number(1), cpu: number(2),
			at: time.Duration(number(3))*time.Second + time.Duration(number(4))*time.Microsecond}
		text := string(m[5])
		if i := strings.IndexAny(text, ":(>"); i >= 0 && text[i] == ':' {
			e.name, e.rest = text[:i], strings.TrimSpace(text[i+1:])
		} else if i >= 0 {
			e.name, e.rest = strings.TrimSuffix(text[:i+1], "("), strings.TrimSpace(text[i+1:])
			if text[i] == '(' {
				calls[e.tid] = e.rest
			} else {
				e.call = calls[e.tid]
			}
		}
		events = append(events, e)
	}
	return events, lines.Err()
}

// field returns what follows a name in an event's text, up to the next space.
func (e *traceEvent) field(name string) string { return fieldOf(e.rest, name) }

func fieldOf(text, name string) string {
	_, after, ok := strings.Cut(" "+text, " "+name)
	if !ok {
		return ""
	}
	value, _, _ := strings.Cut(strings.TrimLeft(after, " "), " ")
	return strings.Trim(value, ",)")
}

func (e *traceEvent) number(name string, base int) int {
	n, err := strconv.ParseInt(strings.TrimPrefix(e.field(name), "0x"), base, 64)
	if err != nil {
		return -1
	}
	return int(n)
}

// result is what a system call returned, -1 for what is none.
func (e *traceEvent) result() int { return hexadecimal(e.rest) }

// hexadecimal reads a number of a system call, -1 for what is none. Some kernels write 0x before
// it.
func hexadecimal(text string) int {
	n, err := strconv.ParseInt(strings.TrimPrefix(text, "0x"), 16, 64)
	if err != nil {
		return -1
	}
	return int(n)
}
