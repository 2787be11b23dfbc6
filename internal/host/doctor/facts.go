package doctor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"time"
	"unicode/utf8"

	"vacate/internal/qemu/fit"
	"vacate/internal/sys/room"
)

// HostFacts is what matters of one host, seen by its daemon. Sizes are in bytes. Where a fact is
// an error's text, "" means that what was tried works.
type HostFacts struct {
	Name string `json:"name"`
	// of this boot of the kernel: equal on both hosts if they are one machine
	BootID    string `json:"boot_id"`
	Kernel    string `json:"kernel"` // release, such as "6.1.0-18-amd64"
	PageSize  uint64 `json:"page_size"`
	User      uint32 `json:"user"`         // the daemon's
	Effective uint64 `json:"capabilities"` // the daemon's effective ones, bit by number

	Userfaultfd UserfaultFacts `json:"userfaultfd"`
	PidfdGetfd  string         `json:"pidfd_getfd"`  // tried on the daemon itself
	ProcessRead string         `json:"process_read"` // process_vm_readv, likewise
	PtraceScope int            `json:"ptrace_scope"` // of Yama; 0 where there is no Yama
	CPU         CPUFacts       `json:"cpu"`
	KVM         string         `json:"kvm"`
	Limits      []room.Limit   `json:"limits"` // on the memory of a VM that the daemon starts
	SwapTotal   uint64         `json:"swap_total"`
	SwapFree    uint64         `json:"swap_free"`
	Load        float64        `json:"load"` // runnable tasks, mean of a minute
	// % of ten seconds in which some task waited for a CPU (PSI)
	CPUWait      float64     `json:"cpu_wait"`
	MemoryWait   float64     `json:"memory_wait"`  // likewise for memory
	Synchronised bool        `json:"synchronised"` // the kernel's clock is held by NTP or the like
	Time         time.Time   `json:"time"`         // CLOCK_REALTIME when all else was known
	Journal      SpaceFacts  `json:"journal"`      // where the daemon keeps its journal
	QEMUs        []QEMUFacts `json:"qemus"`        // that the daemon was told to look at
	Certificate  CertFacts   `json:"certificate"`  // zero where the link is plain
}

// UserfaultFacts reports whether the daemon may have userfaultfds that also catch faults in the
// kernel, as QEMU needs: a virtual CPU under KVM, and a device's DMA, touch memory there.
type UserfaultFacts struct {
	Error string `json:"error"` // of userfaultfd(2), UFFDIO_API and UFFDIO_REGISTER
	// of the same through /dev/userfaultfd (Linux 6.1, QEMU 8.0)
	Device       string `json:"device"`
	Features     uint64 `json:"features"`     // UFFD_FEATURE_… of linux/userfaultfd.h
	Unprivileged int    `json:"unprivileged"` // vm.unprivileged_userfaultfd; -1 if there is none
}

// CPUFacts describes the processors.
type CPUFacts struct {
	Count int    `json:"count"` // that the daemon may use
	Model string `json:"model"` // of the first one in /proc/cpuinfo, for humans
}

// SpaceFacts is the room in a directory's file system.
type SpaceFacts struct {
	Path  string `json:"path"`
	Free  uint64 `json:"free"` // that the daemon may use
	Error string `json:"error"`
}

// QEMUFacts is what a QEMU says of itself.
type QEMUFacts struct {
	Path     string   `json:"path"`
	Version  string   `json:"version"`  // "10.0.2"
	Machines []string `json:"machines"` // types that it knows
	Error    string   `json:"error"`
}

// CertFacts is what a daemon knows of its own certificate.
type CertFacts struct {
	Name    string    `json:"name"`
	Expires time.Time `json:"expires"`
	CA      string    `json:"ca"` // fingerprint of the authority that it trusts
}

// VMFacts is what its QEMU says of a running VM.
type VMFacts struct {
	QEMU      string      `json:"qemu"`      // version
	Machine   string      `json:"machine"`   // type with version
	CPUs      fit.CPUs    `json:"cpus"`      // zero where QEMU's architecture is not supported
	State     string      `json:"state"`     // "running"…
	Migration string      `json:"migration"` // state of the last or present one; "" if none
	Held      fit.Reasons `json:"held"`      // why it cannot be evicted, wherever to
	Settings  []string    `json:"settings"`  // migration capabilities that are on
	Postcopy  bool        `json:"postcopy"`  // this build has it
	// bytes of main memory that it started with (-m); 0 if unknown
	Main      uint64        `json:"main"`
	Memory    []MemoryFacts `json:"memory"`
	MemoryErr string        `json:"memory_error"` // why the memory cannot be read from outside
	// bytes of memory that QEMU holds: no more than that has to move. 0 if unknown
	Used    uint64        `json:"used"`
	Devices []DeviceFacts `json:"devices"`
	// kinds of network back ends: "tap", "user", "vhost-user"…
	Networks []string    `json:"networks"`
	Disks    []DiskFacts `json:"disks"`
	// drives whose images are taken for the same on an operator's word
	Trusted []string    `json:"trusted"`
	Bitmaps []string    `json:"bitmaps"` // dirty bitmaps that do not move
	Work    fit.Reasons `json:"work"`    // what the VM's QEMU is in the middle of
}

// MemoryFacts is one RAM block.
type MemoryFacts struct {
	Name     string `json:"name"`
	Size     uint64 `json:"size"`
	PageSize uint64 `json:"page_size"`
}

// BackendFacts is a memory back end that is a file.
type BackendFacts struct {
	ID   string `json:"id"`
	Path string `json:"path"`
	FS   string `json:"fs"` // type of file system; "" if unknown
}

// DeviceFacts is a device that was asked for, as opposed to one that the machine has anyway.
type DeviceFacts struct {
	ID   string `json:"id"` // "" if it has none
	Type string `json:"type"`
}

// DiskFacts is one image that a drive uses: its top, or one that it is backed by.
type DiskFacts struct {
	Drive    string `json:"drive"`  // for humans
	Driver   string `json:"driver"` // format: "raw", "qcow2"…
	ReadOnly bool   `json:"read_only"`
	Direct   bool   `json:"direct"` // past the host's page cache
	NoFlush  bool   `json:"no_flush"`
	Carried  bool   `json:"carried"` // its content moves with the VM's memory
	// in place of a file: what QEMU reaches by itself, over a network or so
	URL  string   `json:"url"`
	File fit.File `json:"file"`
}

// TwinFacts is what the destination has for a VM of that name.
type TwinFacts struct {
	Name    string    `json:"name"`
	Error   string    `json:"error"`   // why no twin can be started; "" if one can
	Running bool      `json:"running"` // a QEMU of that name runs there already
	QEMU    QEMUFacts `json:"qemu"`
	// bytes of main memory that it will have (-m); 0 if unknown
	Main        uint64 `json:"main"`
	User        string `json:"user"`        // that the twin will run as; "" is the daemon's
	Userfaultfd string `json:"userfaultfd"` // why that user may not have one
	// as its QEMU makes them here; zero if that is not known
	CPUs     fit.CPUs       `json:"cpus"`
	CPUError string         `json:"cpu_error"` // why it is not
	Backends []BackendFacts `json:"backends"`  // memory of the description that is files
	// files of the description, and what they are backed by
	Disks []fit.File `json:"disks"`
	URLs  []string   `json:"urls"` // images that are no files
}

// LinkFacts is what the session between the daemons has measured.
type LinkFacts struct {
	RoundTrip   time.Duration `json:"round_trip"`   // least; 0 if unknown
	Rate        float64       `json:"rate"`         // bytes per second; 0 if unknown
	ClockOffset time.Duration `json:"clock_offset"` // destination's clock less the source's
	Plain       bool          `json:"plain"`        // neither encrypted nor authenticated
}

// Limits of facts. Ours are cut to them, and a peer's refused beyond.
const (
	MaxFacts  = 1 << 20 // bytes of JSON
	maxString = 1024    // bytes
	maxList   = 1024    // entries
)

// ErrFacts is wrapped by the errors of Decode.
var ErrFacts = errors.New("bad facts")

// Decode reads the facts that a peer sent as JSON. It refuses more than MaxFacts bytes, members
// that the type does not name, long strings or lists, and negative counts.
func Decode[T HostFacts | VMFacts | TwinFacts | LinkFacts](b []byte) (T, error) {
	var v, none T
	if len(b) > MaxFacts {
		return none, fmt.Errorf("%w: %d bytes", ErrFacts, len(b))
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil {
		return none, fmt.Errorf("%w: %w", ErrFacts, err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return none, fmt.Errorf("%w: more than one value", ErrFacts)
	}
	if path := beyond(reflect.ValueOf(&v).Elem(), false); path != "" {
		return none, fmt.Errorf("%w: %s is out of bounds", ErrFacts, path)
	}
	return v, nil
}

// clip cuts facts to what Decode lets through.
func clip[T any](v *T) { beyond(reflect.ValueOf(v).Elem(), true) }

// beyond returns where a value is out of bounds, or "". With mend, it cuts it to size instead.
func beyond(v reflect.Value, mend bool) string {
	switch v.Kind() {
	case reflect.String:
		if s := v.String(); len(s) > maxString || !utf8.ValidString(s) {
			if !mend {
				return "string"
			}
			if s = strings.ToValidUTF8(s, "?"); len(s) > maxString {
				s = strings.ToValidUTF8(s[:maxString-len("…")], "") + "…"
			}
			v.SetString(s)
		}
	case reflect.Slice:
		if v.Len() > maxList {
			if !mend {
				return "list"
			}
			v.SetLen(maxList)
		}
		for i := range v.Len() {
			if path := beyond(v.Index(i), mend); path != "" {
				return path
			}
		}
	case reflect.Int:
		if n := v.Int(); n < -1 || n > 1<<31 {
			return "number"
		}
	case reflect.Float64:
		if f := v.Float(); f < 0 || f > 1e18 {
			return "number"
		}
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return ""
		}
		for i := range v.NumField() {
			if path := beyond(v.Field(i), mend); path != "" {
				return v.Type().Field(i).Name + " " + path
			}
		}
	}
	return ""
}
