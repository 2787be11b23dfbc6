package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/sys/process"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func open(t testing.TB, dir string) *Journal {
	t.Helper()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

// reopen does what a daemon does that was killed and started again.
func reopen(t testing.TB, j *Journal) *Journal {
	t.Helper()
	j.Close()
	return open(t, j.dir)
}

func create(t testing.TB, j *Journal, vm string) *Entry {
	t.Helper()
	e, err := j.Create(Record{
		ID: NewID(), Role: Source, VM: vm, Peer: "hostB", PeerAddr: "10.0.0.2:7601",
		QMP: "/run/" + vm + ".qmp",
		PID: 4711, StartTime: 123456, Mark: "begun", Options: json.RawMessage(`{"order":"tier"}`),
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestJournal(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	j := open(t, dir)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	a, b := create(t, j, "a"), create(t, j, "b")
	must(t, b.Note("may-run", "", func(r *Record) { r.PID = 4712 }))
	must(t, a.Note("may-run", "the link is down", nil))
	must(t, a.Keep("package", []byte("devices")))
	must(t, a.Keep("package", []byte("other devices")))
	must(t, a.Keep("head", nil))
	want := []Record{a.Record(), b.Record()}
	if r := want[0]; r.Mark != "may-run" || r.Reason != "the link is down" || r.PID != 4711 ||
		r.VM != "a" || r.Boot != process.BootID() ||
		r.Begun.IsZero() || r.At.Before(r.Begun) || want[1].PID != 4712 {
		t.Errorf("%+v", want)
	}
	if _, err := j.Create(want[0]); !errors.Is(err, fs.ErrExist) {
		t.Errorf("the same ID twice: %v", err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}

	j = reopen(t, j)
	var got []Record
	for _, e := range j.List() {
		must(t, e.Err())
		if e.Torn() {
			t.Error("torn")
		}
		got = append(got, e.Record())
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	a = j.Find(want[0].ID)
	if b, err := a.Blob("package"); string(b) != "other devices" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if b, err := a.Blob("head"); len(b) != 0 || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := a.Blob("none"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for _, name := range []string{"", "log", "../x", "x.tmp", "X", strings.Repeat("x", 33)} {
		if a.Keep(name, nil) == nil {
			t.Errorf("something was kept under %q", name)
		}
	}

	must(t, a.Keep(Lasting+"x", []byte("y")))
	must(t, a.Finish("completed", "",
		func(r *Record) { r.Report = json.RawMessage(`{"outcome":"completed"}`) }))
	must(t, j.Find(want[1].ID).Remove())
	j = reopen(t, j)
	list := j.List()
	if len(list) != 1 || list[0].ID() != a.ID() {
		t.Fatalf("%v", list)
	}
	if r := list[0].Record(); r.Mark != "completed" || r.Ended.IsZero() ||
		string(r.Report) != `{"outcome":"completed"}` {
		t.Errorf("%+v", r)
	}
	if files, err := os.ReadDir(list[0].dir); len(files) != 2 || err != nil {
		t.Errorf("left with a finished eviction: %v, %v", files, err)
	}
	if b, err := list[0].Blob(Lasting + "x"); string(b) != "y" || err != nil {
		t.Errorf("what was to last: %q, %v", b, err)
	}
}

// After a reboot, a note about an eviction does not make its process one of this boot.
func TestBoot(t *testing.T) {
	j := open(t, filepath.Join(t.TempDir(), "journal"))
	j.boot = "before"
	e := create(t, j, "a")
	j = reopen(t, j)
	e = j.Find(e.ID())
	must(t, e.Note("lost", "the host booted anew", nil))
	if r := e.Record(); r.Boot != "before" {
		t.Errorf("process %d is of the boot %q", r.PID, r.Boot)
	}
	must(t, e.Note("lost", "", func(r *Record) { r.StartTime++ }))
	if r := e.Record(); r.Boot != process.BootID() || r.Boot == "" {
		t.Errorf("a process that was found now is of the boot %q", r.Boot)
	}
}

func TestPrune(t *testing.T) {
	j := open(t, t.TempDir())
	live, untold := create(t, j, "live"), create(t, j, "untold")
	must(t, untold.Finish("resumed here", "", func(r *Record) { r.Untold = true }))
	var first, last *Entry
	for i := range keepFinished + 1 {
		e := create(t, j, "vm")
		must(t, e.Finish("completed", "", nil))
		if i == 0 {
			first = e
		}
		last = e
	}
	for range 2 {
		if n := len(j.List()); n != keepFinished+2 {
			t.Errorf("%d evictions", n)
		}
		if j.Find(live.ID()) == nil || j.Find(untold.ID()) == nil || j.Find(first.ID()) != nil ||
			j.Find(last.ID()) == nil {
			t.Error("the wrong ones were removed")
		}
		j = reopen(t, j)
	}
}

// Somebody sets the clock back, after it was a year ahead. The evictions since then are still the
// latest, and the last that are forgotten.
func TestClockSetBack(t *testing.T) {
	const ahead = 365 * 24 * time.Hour
	j := open(t, t.TempDir())
	for range keepFinished {
		e := create(t, j, "vm")
		e.last.Begun = e.last.Begun.Add(ahead)
		must(t, e.Finish("completed", "", nil))
		e.last.At, e.last.Ended = e.last.At.Add(ahead), e.last.Ended.Add(ahead)
		must(t, e.append(e.last))
	}
	j = reopen(t, j)
	latest := create(t, j, "vm")
	must(t, latest.Finish("completed", "", nil))
	for range 2 {
		list := j.List()
		if last := list[len(list)-1]; len(list) != keepFinished || last.ID() != latest.ID() {
			t.Errorf("of %d evictions the last is that of %v", len(list), last.Record().Begun)
		}
		j = reopen(t, j)
	}
}

// TestCrash damages the log at each byte in four ways. It cuts the log there, as if the file's end
// never reached the disk. It fills the rest with zeroes, or with garbage, as a torn append does.
// And it changes that one byte.
func TestCrash(t *testing.T) {
	j := open(t, t.TempDir())
	e := create(t, j, "vm")
	ends := []int{e.end}
	records := []Record{e.Record()}
	for _, mark := range []string{"may-run", "completed"} {
		must(t, e.Note(mark, "", nil))
		ends, records = append(ends, e.end), append(records, e.Record())
	}
	path := filepath.Join(e.dir, "log")
	whole, err := os.ReadFile(path)
	must(t, err)
	if len(whole) != prepared || e.end >= prepared {
		t.Fatalf("a log of %d bytes, %d of them used", len(whole), e.end)
	}
	for at := range e.end {
		garbage := append(whole[:at:at], bytes.Repeat([]byte{0xa5}, 100)...)
		flipped := bytes.Clone(whole)
		flipped[at] ^= 0x10
		for name, log := range map[string][]byte{
			"cut": whole[:at], "zero": append(whole[:at:at], make([]byte, 1000)...),
			"garbage": garbage, "flipped": flipped,
		} {
			must(t, os.WriteFile(path, log, 0o600))
			got := j.load(e.ID(), e.dir)
			survived := -1
			for survived+1 < len(ends) && ends[survived+1] <= at {
				survived++
			}
			if survived < 0 {
				if got.Err() == nil || got.ID() != e.ID() || got.Note("may-run", "", nil) == nil {
					t.Fatalf("%s at %d: %+v, %v", name, at, got.Record(), got.Err())
				}
				continue
			}
			if got.Err() != nil {
				t.Fatalf("%s at %d: %v", name, at, got.Err())
			}
			if d := cmp.Diff(records[survived], got.Record()); d != "" {
				t.Fatalf("%s at %d: %s", name, at, d)
			}
			if len(bytes.Trim(log[ends[survived]:], "\x00")) > 0 != got.Torn() {
				t.Fatalf("%s at %d: torn %v", name, at, got.Torn())
			}
			// The next record is whole, and the damage is gone.
			if at%16 == 0 {
				must(t, got.Note("next", "", nil))
				again := j.load(e.ID(), e.dir)
				if again.Err() != nil || again.Torn() || again.Record().Mark != "next" {
					t.Fatalf("%s at %d: %+v, %v", name, at, again.Record(), again.Err())
				}
			}
		}
	}
}

func TestDamaged(t *testing.T) {
	j := open(t, t.TempDir())
	a, b, c, d := create(t, j, "a"), create(t, j, "b"), create(t, j, "c"), create(t, j, "d")
	must(t, os.Remove(filepath.Join(a.dir, "log")))
	log, err := os.ReadFile(filepath.Join(c.dir, "log"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(b.dir, "log"), log, 0o600))
	must(t, os.Truncate(filepath.Join(c.dir, "log"), maxLog+1))
	must(t, d.Keep("package", []byte("devices")))
	must(t, os.WriteFile(filepath.Join(d.dir, "package"), []byte("\x00\x00\x00\x00devices"), 0o600))
	// What a crash in Create or Keep leaves behind, and what others do.
	must(t, os.Mkdir(filepath.Join(j.dir, newPrefix+NewID().String()), 0o700))
	must(t, os.WriteFile(filepath.Join(d.dir, "head.tmp"), nil, 0o600))
	must(t, os.WriteFile(filepath.Join(j.dir, "lost+found"), nil, 0o600))
	j = reopen(t, j)
	if n := len(j.List()); n != 4 {
		t.Errorf("%d evictions", n)
	}
	for e, want := range map[*Entry]string{a: "no such file",
		b: "its log is that of eviction " + c.ID().String(), c: "more than 4194304 bytes"} {
		e := j.Find(e.ID())
		if e.Err() == nil || !strings.Contains(e.Err().Error(), want) || e.Record().Begun.IsZero() {
			t.Errorf("%v: want %q", e.Err(), want)
		}
	}
	if b, err := j.Find(d.ID()).Blob("package"); err == nil {
		t.Errorf("%q", b)
	}
	for _, gone := range []string{newPrefix + "*", "*/*.tmp"} {
		if left, _ := filepath.Glob(filepath.Join(j.dir, gone)); left != nil {
			t.Errorf("left: %v", left)
		}
	}
	must(t, j.Find(a.ID()).Remove())
	if n := len(reopen(t, j).List()); n != 3 {
		t.Errorf("%d evictions", n)
	}
}

// TestDiskFull uses a file system without space: an eviction that has begun can still be noted.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("VACATE_REQUIRE") == "1" {
			t.Fatal("needs root, to mount a small file system")
		}
		t.Skip("needs root, to mount a small file system")
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	j := open(t, filepath.Join(dir, "journal"))
	e := create(t, j, "vm")
	full := func(err error) {
		t.Helper()
		if !errors.Is(err, unix.ENOSPC) ||
			!strings.Contains(err.Error(), "free some space on the file system at "+dir) {
			t.Errorf("%v", err)
		}
	}
	full(e.Keep("package", make([]byte, 1<<20)))
	if left, _ := filepath.Glob(filepath.Join(e.dir, "*.tmp")); left != nil {
		t.Errorf("left: %v", left)
	}
	if err := os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 1<<20), 0o600); !errors.Is(err,
		unix.ENOSPC) {
		t.Fatal(err)
	}
	_, err := j.Create(Record{ID: NewID(), VM: "other"})
	full(err)
	for range 20 {
		must(t, e.Note("may-run", "", nil))
	}
	// A record for which there is no room leaves no trace.
	big, err := json.Marshal(strings.Repeat("x", 100<<10))
	must(t, err)
	full(e.Note("completed", "", func(r *Record) { r.Report = big }))
	must(t, e.Note("lost", "", nil))
	j = reopen(t, j)
	if list := j.List(); len(list) != 1 || list[0].Err() != nil || list[0].Torn() ||
		list[0].Record().Mark != "lost" {
		t.Errorf("%+v", list[0])
	}
	must(t, j.Find(e.ID()).Finish("resumed", "", nil))
}

func TestLimits(t *testing.T) {
	j := open(t, t.TempDir())
	e := create(t, j, "vm")
	big, err := json.Marshal(strings.Repeat("x", maxRecord))
	must(t, err)
	if err := e.Note("completed", "", func(r *Record) { r.Report = big }); err == nil {
		t.Error("a record that is too long was written")
	}
	for {
		err = e.Note("may-run", "",
			func(r *Record) {
				r.Report = big[: maxRecord/2 : maxRecord/2]
				r.Report[len(r.Report)-1] = '"'
			})
		if err != nil {
			break
		}
	}
	if !strings.Contains(err.Error(), "more than 4194304 bytes") {
		t.Error(err)
	}
	j = reopen(t, j)
	if e := j.List()[0]; e.Err() != nil || e.Record().Mark != "may-run" {
		t.Errorf("%v", e.Err())
	}
}

// TestKilled kills a process that notes all the time: what it reported as noted is there.
func TestKilled(t *testing.T) {
	if dir := os.Getenv("JOURNAL_TO_KILL"); dir != "" {
		e := create(t, open(t, dir), "vm")
		for i := range 10_000 {
			must(t, e.Keep("package", []byte(fmt.Sprint(i))))
			must(t, e.Note(fmt.Sprint(i), "", func(r *Record) { r.PID = i }))
			if i%50 == 0 {
				fmt.Println("noted", i)
			}
		}
	}
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run", "^TestKilled$")
	cmd.Env = append(os.Environ(), "JOURNAL_TO_KILL="+dir)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	var noted int
	for noted < 100 {
		if _, err := fmt.Fscanf(out, "noted %d\n", &noted); err != nil {
			t.Fatal(err)
		}
	}
	cmd.Process.Kill()
	cmd.Wait()
	e := open(t, dir).List()[0]
	must(t, e.Err())
	if e.Record().PID < noted {
		t.Errorf("%d is the last that is there, after %d", e.Record().PID, noted)
	}
	var kept int
	b, err := e.Blob("package")
	must(t, err)
	if fmt.Sscan(string(b), &kept); kept < noted {
		t.Errorf("%d is kept, after %d", kept, noted)
	}
}

func FuzzParse(f *testing.F) {
	r := Record{ID: NewID(), Role: Destination, VM: "vm", Mark: "accepted", Begun: time.Unix(1, 0),
		At: time.Unix(2, 0)}
	one, err := appendRecord([]byte(header), r)
	must(f, err)
	two, err := appendRecord(one, r)
	must(f, err)
	for _, log := range [][]byte{nil, []byte(header), one, two,
		append(two[:len(two):len(two)], 0, 0), two[:len(two)-1],
		append(one[:len(one):len(one)], 0xff, 0xff, 0xff, 0xff)} {
		f.Add(log)
	}
	f.Fuzz(func(t *testing.T, log []byte) {
		_, end, used, err := parse(log)
		if err != nil {
			return
		}
		if end <= len(header) || end > len(log) || used > len(log) || used < end {
			t.Fatalf("end %d, used %d of %d", end, used, len(log))
		}
		r.Mark = "next"
		next, err := appendRecord(log[:end:end], r)
		if err != nil {
			t.Fatal(err)
		}
		got, end, used, err := parse(next)
		if err != nil || got.Mark != "next" || end != len(next) || used != end {
			t.Fatalf("%+v, %d, %d, %v", got, end, used, err)
		}
	})
}

// BenchmarkNote measures what a mark costs.
func BenchmarkNote(b *testing.B) {
	e := create(b, open(b, b.TempDir()), "vm")
	end := e.end
	for b.Loop() {
		must(b, e.Note("may-run", "", nil))
		e.end, e.used = end, prepared // the log must stay small
	}
}

// A directory that is not a journal keeps its mode and its files.
func TestForeignDirectory(t *testing.T) {
	entry := NewID().String()
	for name, files := range map[string]map[string]string{
		"files":                 {"passwd": "root:x:0:0"},
		"a lock of another":     {"lock": "", "status": "Package: vacate"},
		"a lock that says more": {"lock": "vacate-journal1\nand more"},
		"what looks unfinished": {newPrefix + entry + "/log": "precious"},
		"a .new- of another":    {"lock": "", newPrefix + "mail/1": "precious"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for f, text := range files {
				path := filepath.Join(dir, f)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := Check(dir); !errors.Is(err, ErrForeign) {
				t.Errorf("Check says %v", err)
			}
			j, err := Open(dir)
			if !errors.Is(err, ErrForeign) {
				t.Errorf("Open says %v", err)
			}
			if err == nil {
				j.Close()
			}
			if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o755 {
				t.Errorf("the directory's mode became %v (%v)", info.Mode(), err)
			}
			for f, text := range files {
				if b, err := os.ReadFile(filepath.Join(dir, f)); err != nil || string(b) != text {
					t.Errorf("%s has %q (%v), was %q", f, b, err, text)
				}
			}
		})
	}
}

// An earlier version's directory is a journal, and so is an empty directory or file system.
func TestKnownDirectories(t *testing.T) {
	for name, files := range map[string][]string{
		"empty": nil, "a file system": {"lost+found/"},
		"of before the lock told": {"lock", NewID().String() + "/",
			newPrefix + NewID().String() + "/"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, f := range files {
				path := filepath.Join(dir, f)
				if strings.HasSuffix(f, "/") {
					if err := os.Mkdir(path, 0o755); err != nil {
						t.Fatal(err)
					}
				} else if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				if err := Check(dir); err != nil {
					t.Error(err)
				}
				j, err := Open(dir)
				if err != nil {
					t.Fatal(err)
				}
				j.Close()
			}
			if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("the journal's mode is %v (%v)", info.Mode(), err)
			}
		})
	}
}
