// Package journal keeps evictions on disk, so that a daemon that was killed at any moment knows
// afterwards what it promised. One directory holds all evictions of one daemon:
//
//	DIR/lock                 locked (flock) by the daemon that has it open; Open knows it by
//	                         its content, "vacate-journal1\n"
//	DIR/ID/log               an eviction, by its ID in hex: the records
//	DIR/ID/NAME              what is kept with it ([Entry.Keep])
//	DIR/orders               what a daemon that belongs to a fleet has heard: not of this package
//	DIR/standing             the same
//	DIR/.new-ID, *.tmp       not finished when the daemon died: removed by Open
//
// A log starts with 16 bytes, "vacate-journal1\n". Records follow. Each is complete in itself, so
// only the last one counts:
//
//	u32 length of the JSON | u32 its CRC-32C | JSON, a Record
//
// Integers are big-endian. Zeroes follow: a new log is filled with zeroes up to 64 KiB. So a later
// record needs no space on a disk that is full by then, and its fdatasync changes no metadata. A
// record is durable when [Entry.Note] returns without an error. A record that is not whole does not
// count ([Entry.Torn]).
//
// What is kept with an eviction starts with its CRC-32C, u32; the data follows. It is written under
// another name, and renamed.
package journal

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

const (
	header    = "vacate-journal1\n"
	prepared  = 64 << 10  // bytes of a new log
	maxRecord = 256 << 10 // bytes of a record's JSON
	maxLog    = 4 << 20   // bytes of a log
	maxBlob   = 1 << 30   // bytes of what is kept under one name

	// keepFinished is how many finished evictions stay on disk.
	keepFinished = 200
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrLocked: another process has the journal open.
var ErrLocked = errors.New("in use by another process")

// An ID names an eviction, on both hosts. In text it is 32 digits, in hex.
type ID [16]byte

// NewID returns a new, unique ID.
func NewID() (id ID) {
	rand.Read(id[:]) // never fails
	return id
}

// ParseID reads an ID from its 32 digits.
func ParseID(s string) (id ID, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("%.64q is not the ID of an eviction: that has 32 digits in hex", s)
	}
	return ID(b), nil
}

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText returns the digits.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads the digits.
func (id *ID) UnmarshalText(b []byte) (err error) {
	*id, err = ParseID(string(b))
	return err
}

// Role is which side of an eviction this host is.
type Role string

// The roles.
const (
	Source      Role = "source"
	Destination Role = "destination"
)

// A Record is all that is known of an eviction at some moment.
type Record struct {
	ID   ID     `json:"id"`
	Role Role   `json:"role"`
	VM   string `json:"vm"`
	// the other host's name; empty on a link without names
	Peer     string `json:"peer"`
	PeerAddr string `json:"peer_addr,omitempty"` // host:port of the other host
	QMP      string `json:"qmp,omitempty"`       // path of the QMP socket of the QEMU here
	// Libvirt is the URI of this host's libvirt, for a VM that is a domain of it.
	Libvirt string `json:"libvirt,omitempty"`
	// Carried says that libvirt moves the domain by itself, and decides what becomes of it.
	Carried bool `json:"carried,omitempty"`

	// PID and StartTime identify that QEMU: /proc/PID/stat, field 22, in ticks since the host
	// booted.
	PID       int    `json:"pid,omitempty"`
	StartTime uint64 `json:"start_time,omitempty"`
	// Boot is the boot of the host in which that process was found. After another boot, neither its
	// number nor its start time means anything. Create sets it, and so does a Note that changes the
	// process.
	Boot string `json:"boot,omitempty"`

	// the last promise; package evict has the names
	Mark   string    `json:"mark"`
	Reason string    `json:"reason,omitempty"` // in a sentence, for people
	Begun  time.Time `json:"begun"`            // of the first record
	At     time.Time `json:"at"`               // of this one
	Ended  time.Time `json:"ended,omitzero"`   // of the last record; zero until there is one
	// First and Last number the begins and ends of a journal's evictions in their order, which the
	// times may not show: somebody may have set the clock. 0 in journals of old, and until the end.
	First uint64 `json:"first,omitempty"`
	Last  uint64 `json:"last,omitempty"`

	// Untold says that the other host has not yet heard how the eviction ended. Until then the
	// entry is not removed.
	Untold bool `json:"untold,omitempty"`

	Options json.RawMessage `json:"options,omitempty"`
	Report  json.RawMessage `json:"report,omitempty"`
}

// A Journal is a directory of evictions that belongs to this process from Open to Close. Several
// goroutines may call its methods, and those of its entries.
type Journal struct {
	dir  string
	lock *os.File
	boot string
	seq  atomic.Uint64 // the last number in use, of Record.First and Last

	mu      sync.Mutex // guards what follows
	entries map[ID]*Entry
}

// Open opens the journal in dir, makes it if there is none, and reads all evictions. It wraps
// ErrLocked if another process has it open.
func Open(dir string) (*Journal, error) {
	j := &Journal{dir: dir, boot: process.BootID(), entries: map[ID]*Entry{}}
	if err := j.open(); err != nil {
		j.Close()
		return nil, fmt.Errorf("open journal %s: %w", dir, explain(dir, err))
	}
	return j, nil
}

func (j *Journal) open() error {
	if err := os.MkdirAll(j.dir, 0o700); err != nil {
		return err
	}
	if err := ours(j.dir); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(j.dir)); err != nil {
		return err
	}
	// It holds the state of devices, which others must not read.
	if err := os.Chmod(j.dir, 0o700); err != nil { // #nosec G302 -- a directory
		return err
	}
	var err error
	if j.lock, err = os.OpenFile(lockFile(j.dir), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW,
		0o600); err != nil {
		return err
	}
	switch err := unix.Flock(int(j.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case err == unix.EWOULDBLOCK:
		return fmt.Errorf("%w: end the vacated that runs already, or give this one "+
			"another directory", ErrLocked)
	case err != nil:
		return os.NewSyscallError("flock", err)
	}
	// On a full disk it stays empty until the next time. The directory's content identifies it,
	// too.
	_, _ = j.lock.WriteAt([]byte(header), 0)
	files, err := os.ReadDir(j.dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(j.dir, f.Name())
		if rest, ok := strings.CutPrefix(f.Name(), newPrefix); ok && isEntry(rest) {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
			continue
		}
		if !f.IsDir() || !isEntry(f.Name()) {
			continue // not of ours
		}
		id, err := ParseID(f.Name())
		if err != nil {
			return err
		}
		e := j.load(id, path)
		j.entries[id] = e
		j.seq.Store(max(j.seq.Load(), e.last.First, e.last.Last))
	}
	return j.prune()
}

const newPrefix = ".new-"

// Names of files that a journal's directory may have besides.
const (
	OrdersFile   = "orders"
	StandingFile = "standing"
)

func lockFile(dir string) string { return filepath.Join(dir, "lock") }

// ErrForeign: the directory holds something other than a journal, so it was not touched.
var ErrForeign = errors.New("the directory is not empty, and is no journal of vacated. It was " +
	"not touched. Give the journal a directory of its own")

// Check reports why Open could not use dir as a journal, and touches nothing. It wraps ErrForeign
// for a directory that is not a journal. A missing directory is fine.
func Check(dir string) error {
	err := ours(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("journal %s: %w", dir, err)
	}
	return nil
}

// ours returns an error if a directory is neither a journal nor empty. An old journal has a lock
// without content: then everything in it must be an eviction.
func ours(dir string) error {
	files, err := os.ReadDir(dir)
	files = slices.DeleteFunc(files, func(f fs.DirEntry) bool { return f.Name() == "lost+found" })
	if err != nil || len(files) == 0 {
		return err
	}
	lock := lockFile(dir)
	info, err := os.Lstat(lock)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return ErrForeign
	} else if err != nil {
		return err
	}
	if info.Size() > 0 {
		b, err := readFile(lock, int64(len(header)))
		if err != nil || string(b) != header {
			return ErrForeign
		}
		return nil
	}
	for _, f := range files {
		if f.Name() != filepath.Base(lock) && f.Name() != OrdersFile &&
			f.Name() != StandingFile &&
			(!f.IsDir() || !isEntry(strings.TrimPrefix(f.Name(), newPrefix))) {
			return ErrForeign
		}
	}
	return nil
}

// isEntry reports whether name is that of an eviction's directory.
func isEntry(name string) bool {
	id, err := ParseID(name)
	return err == nil && id.String() == name
}

// load reads an entry. If it is damaged, its Err says so.
func (j *Journal) load(id ID, dir string) *Entry {
	e := &Entry{journal: j, dir: dir, last: Record{ID: id}}
	e.err = func() error {
		tmp, err := filepath.Glob(filepath.Join(dir, "*.tmp"))
		for _, f := range tmp {
			err = errors.Join(err, os.Remove(f))
		}
		if err != nil {
			return err
		}
		b, err := readFile(filepath.Join(dir, "log"), maxLog)
		if err != nil {
			return err
		}
		r, end, used, err := parse(b)
		if err != nil {
			return err
		}
		if r.ID != id {
			return fmt.Errorf("its log is that of eviction %v", r.ID)
		}
		e.last, e.end, e.used = r, end, used
		e.torn = used > end
		if !r.Ended.IsZero() {
			return e.drop() // Finish may not have come to this
		}
		return nil
	}()
	if e.err != nil {
		e.err = fmt.Errorf("eviction %v in journal %s is damaged: %w. Find out with "+
			"vacate status, on both hosts, where the VM is. Then remove the directory",
			id, j.dir, e.err)
		if info, err := os.Stat(dir); err == nil {
			e.last.Begun, e.last.At = info.ModTime(), info.ModTime()
		}
	}
	return e
}

// Close releases the journal for another process. Its entries must not be used any more.
func (j *Journal) Close() error {
	if j.lock == nil {
		return nil
	}
	return j.lock.Close()
}

// List returns all evictions, the earliest first. It includes damaged ones ([Entry.Err]).
func (j *Journal) List() []*Entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	list := make([]*Entry, 0, len(j.entries))
	for _, e := range j.entries {
		list = append(list, e)
	}
	sortBy(list, func(r Record) (uint64, time.Time) { return r.First, r.Begun })
	return list
}

// sortBy sorts evictions by their numbers, and those of one number by time.
func sortBy(list []*Entry, key func(Record) (uint64, time.Time)) {
	slices.SortFunc(list, func(a, b *Entry) int {
		ra, rb := a.Record(), b.Record()
		m, s := key(ra)
		n, t := key(rb)
		return cmp.Or(cmp.Compare(m, n), s.Compare(t), bytes.Compare(ra.ID[:], rb.ID[:]))
	})
}

// Find returns an eviction, or nil.
func (j *Journal) Find(id ID) *Entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.entries[id]
}

// Create begins an eviction and makes that durable. It fails if there is one with this ID: a source
// that offers it again must not start a second one.
func (j *Journal) Create(r Record) (*Entry, error) {
	e := &Entry{journal: j, dir: filepath.Join(j.dir, r.ID.String())}
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.create(e, r); err != nil {
		return nil, fmt.Errorf("begin eviction %v in journal %s: %w", r.ID, j.dir,
			explain(j.dir, err))
	}
	j.entries[r.ID] = e
	return e, nil
}

func (j *Journal) create(e *Entry, r Record) error {
	if j.entries[r.ID] != nil {
		return fs.ErrExist
	}
	r.Begun = time.Now()
	r.At, r.Boot, r.Ended = r.Begun, j.boot, time.Time{}
	r.First, r.Last = j.seq.Add(1), 0
	b, err := appendRecord([]byte(header), r)
	if err != nil {
		return err
	}
	e.last, e.end, e.used = r, len(b), len(b)
	if len(b) < prepared {
		b = append(b, make([]byte, prepared-len(b))...)
	}
	tmp := filepath.Join(j.dir, newPrefix+r.ID.String())
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	err = writeAt(filepath.Join(tmp, "log"), 0, b, os.O_CREATE|os.O_EXCL)
	if err == nil {
		err = syncDir(tmp)
	}
	if err == nil {
		err = os.Rename(tmp, e.dir)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	if err := syncDir(j.dir); err != nil {
		// it did not begin, so nobody may find it later
		return errors.Join(err, os.RemoveAll(e.dir))
	}
	return nil
}

// prune removes the oldest finished entries beyond the limit. The caller holds mu, or is alone.
func (j *Journal) prune() error {
	var finished []*Entry
	for _, e := range j.entries {
		if r := e.Record(); e.Err() == nil && !r.Ended.IsZero() && !r.Untold {
			finished = append(finished, e)
		}
	}
	sortBy(finished, func(r Record) (uint64, time.Time) { return r.Last, r.Ended })
	for len(finished) > keepFinished {
		if err := finished[0].remove(); err != nil {
			return err
		}
		delete(j.entries, finished[0].ID())
		finished = finished[1:]
	}
	return nil
}

// An Entry is an eviction in a journal.
type Entry struct {
	journal *Journal
	dir     string
	err     error // how it is damaged; never changes

	mu   sync.Mutex // guards what follows, and the log
	last Record
	end  int // of the last whole record in the log, in bytes
	used int // what follows in the log is zero
	torn bool
}

// ID returns the eviction's ID.
func (e *Entry) ID() ID {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.last.ID
}

// Err is nil, or says how the entry is damaged. Its Record then has only the ID and the times of
// its directory, and nothing can be noted. Nobody knows what such an eviction has promised.
func (e *Entry) Err() error { return e.err }

// Record returns the last record.
func (e *Entry) Record() Record {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.last
}

// Torn reports whether the last record was followed by an incomplete one when the journal was
// opened. Then the daemon died or the host lost power before a Note returned, or the disk damaged a
// record that was whole. Where the two would lead to different ends, the caller must choose the
// safer one.
func (e *Entry) Torn() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.torn
}

// Note makes durable that the eviction has come to a mark, and why. change may alter other fields
// of the record; it may be nil. If Note fails, this process must act as if the mark was not
// reached. After a crash it may turn out to be there all the same.
func (e *Entry) Note(mark, reason string, change func(*Record)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.note(mark, reason, false, change)
}

// Finish is Note for the last time: the eviction needs no more attention. It removes what was kept,
// unless its name begins with Lasting. A finished eviction stays until two hundred more have
// finished, and as long as it is untold.
func (e *Entry) Finish(mark, reason string, change func(*Record)) error {
	e.mu.Lock()
	err := e.note(mark, reason, true, change)
	if err == nil {
		err = e.drop()
	}
	e.mu.Unlock()
	if err != nil {
		return err
	}
	e.journal.mu.Lock()
	defer e.journal.mu.Unlock()
	return e.journal.prune()
}

func (e *Entry) note(mark, reason string, ended bool, change func(*Record)) error {
	if e.err != nil {
		return e.err
	}
	r := e.last
	if change != nil {
		change(&r)
	}
	r.ID, r.Begun, r.First, r.Last = e.last.ID, e.last.Begun, e.last.First, e.last.Last
	r.Mark, r.Reason, r.At = mark, reason, time.Now()
	if r.PID != e.last.PID || r.StartTime != e.last.StartTime {
		r.Boot = e.journal.boot
	}
	if ended {
		r.Ended, r.Last = r.At, e.journal.seq.Add(1)
	}
	err := e.append(r)
	if err != nil {
		return fmt.Errorf("note %q of eviction %v in journal %s: %w", mark, r.ID, e.journal.dir,
			explain(e.dir, err))
	}
	e.last, e.torn = r, false
	return nil
}

func (e *Entry) append(r Record) error {
	b, err := appendRecord(nil, r)
	if err != nil {
		return err
	}
	end := e.end + len(b)
	if end > maxLog {
		return fmt.Errorf("its log would have more than %d bytes", maxLog)
	}
	// Overwrite the rest of a failed record with zeroes.
	if end < e.used {
		b = append(b, make([]byte, e.used-end)...)
	}
	path := filepath.Join(e.dir, "log")
	if err := writeAt(path, int64(e.end), b, 0); err != nil {
		if info, statErr := os.Stat(path); statErr == nil { // part of it may be there
			e.used = max(e.used, min(e.end+len(b), int(info.Size())))
		}
		return err
	}
	e.end, e.used = end, end
	return nil
}

var blobName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)

// Keep makes data durable with the eviction, under a name of lower-case letters, digits and dashes.
// It replaces what was kept under that name. At every moment one of the two is there.
func (e *Entry) Keep(name string, data []byte) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	path, err := e.path(name)
	if err != nil {
		return err
	}
	if len(data) > maxBlob {
		return fmt.Errorf("keep %s: %d bytes are more than %d", name, len(data), maxBlob)
	}
	tmp := path + ".tmp"
	sum := binary.BigEndian.AppendUint32(nil, crc32.Checksum(data, castagnoli))
	err = writeAt(tmp, 0, sum, os.O_CREATE|os.O_TRUNC)
	if err == nil {
		err = writeAt(tmp, int64(len(sum)), data, 0)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err == nil {
		err = syncDir(e.dir)
	}
	if err != nil {
		os.Remove(tmp)
		return fmt.Errorf("keep %s of eviction %v in journal %s: %w", name, e.last.ID,
			e.journal.dir, explain(e.dir, err))
	}
	return nil
}

// Blob returns what was kept under a name. If there is nothing, it wraps fs.ErrNotExist.
func (e *Entry) Blob(name string) ([]byte, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	path, err := e.path(name)
	if err != nil {
		return nil, err
	}
	b, err := readFile(path, maxBlob+4)
	if err != nil {
		return nil, err
	}
	if len(b) < 4 || binary.BigEndian.Uint32(b) != crc32.Checksum(b[4:], castagnoli) {
		return nil, fmt.Errorf("%s is damaged: its checksum does not match", path)
	}
	return b[4:], nil
}

func (e *Entry) path(name string) (string, error) {
	if !blobName.MatchString(name) || name == "log" {
		return "", fmt.Errorf("cannot keep anything under the name %.64q", name)
	}
	return filepath.Join(e.dir, name), nil
}

// Lasting is the prefix of the names of what stays when an eviction finishes.
const Lasting = "lasting-"

// drop removes what is kept, except what lasts.
func (e *Entry) drop() error {
	files, err := os.ReadDir(e.dir)
	for _, f := range files {
		if f.Name() != "log" && !strings.HasPrefix(f.Name(), Lasting) {
			err = errors.Join(err, os.Remove(filepath.Join(e.dir, f.Name())))
		}
	}
	return err
}

// Remove removes the eviction and all that is kept with it.
func (e *Entry) Remove() error {
	e.journal.mu.Lock()
	defer e.journal.mu.Unlock()
	if err := e.remove(); err != nil {
		return err
	}
	delete(e.journal.entries, e.ID())
	return nil
}

// remove renames the directory first, so that nobody ever reads half of it.
func (e *Entry) remove() error {
	tmp := filepath.Join(e.journal.dir, newPrefix+filepath.Base(e.dir))
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Rename(e.dir, tmp); err != nil {
		return err
	}
	if err := syncDir(e.journal.dir); err != nil {
		return err
	}
	return os.RemoveAll(tmp)
}

// appendRecord appends a record to a log.
func appendRecord(b []byte, r Record) ([]byte, error) {
	text, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	if len(text) > maxRecord {
		return nil, fmt.Errorf("record of %d bytes: at most %d fit", len(text), maxRecord)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(text)))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(text, castagnoli))
	return append(b, text...), nil
}

// parse returns the last whole record of a log, where it ends, and where only zeroes follow. It
// fails if there is no record.
func parse(log []byte) (last Record, end, used int, err error) {
	if !bytes.HasPrefix(log, []byte(header)) {
		return last, 0, 0, errors.New("its log does not begin like the log of an eviction")
	}
	for next := len(header); ; {
		r, n, ok := parseRecord(log[next:])
		if !ok {
			break
		}
		next += n
		last, end = r, next
	}
	if end == 0 {
		return last, 0, 0, errors.New("its log has no whole record")
	}
	return last, end, len(bytes.TrimRight(log, "\x00")), nil
}

func parseRecord(b []byte) (r Record, n int, ok bool) {
	if len(b) < 8 {
		return r, 0, false
	}
	length, sum := binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
	b = b[8:]
	if length == 0 || length > maxRecord || int(length) > len(b) {
		return r, 0, false
	}
	b = b[:length]
	if crc32.Checksum(b, castagnoli) != sum || json.Unmarshal(b, &r) != nil {
		return r, 0, false
	}
	return r, 8 + len(b), true
}

// writeAt writes to a file and waits until that is on disk.
func writeAt(path string, offset int64, b []byte, flag int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|flag, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, offset)
	if err == nil {
		err = os.NewSyscallError("fdatasync", unix.Fdatasync(int(f.Fd())))
	}
	return errors.Join(err, f.Close())
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// readFile is os.ReadFile for a file of bounded size.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return b, nil
}

// explain adds a remedy to an error of writing.
func explain(dir string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w: free some space on the file system at %s", err, mountPoint(dir))
	case errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: raise the quota on the file system at %s", err, mountPoint(dir))
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: the kernel log says whether errors made the file system at %s "+
			"read-only; repair it and remount it", err, mountPoint(dir))
	case errors.Is(err, unix.EIO):
		return fmt.Errorf("%w: the kernel log says what is wrong with the disk that holds %s", err,
			mountPoint(dir))
	}
	return err
}

// mountPoint returns where dir's file system is mounted: the topmost directory on the same device.
func mountPoint(dir string) string {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return dir
	}
	var st unix.Stat_t
	for unix.Stat(dir, &st) != nil && dir != "/" {
		dir = filepath.Dir(dir)
	}
	for dir != "/" {
		var up unix.Stat_t
		if unix.Stat(filepath.Dir(dir), &up) != nil || up.Dev != st.Dev {
			break
		}
		dir = filepath.Dir(dir)
	}
	return dir
}
