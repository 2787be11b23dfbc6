package orders

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMark(t *testing.T) {
	m := Mark{Epoch: 5, Plan: 7}
	for _, c := range []struct {
		epoch, plan uint64
		err         error
	}{{4, 9, ErrDeposed}, {5, 7, ErrSpent}, {5, 6, ErrSpent}, {5, 8, nil}, {9, 10, nil},
		{9, 7, ErrSpent}} {
		got, err := m.Spend(c.epoch, c.plan)
		if !errors.Is(err, c.err) || err == nil && got != (Mark{Epoch: c.epoch, Plan: c.plan}) {
			t.Errorf("epoch %d, plan %d: %+v, %v", c.epoch, c.plan, got, err)
		}
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "orders")
	f, err := Open(path)
	if err != nil || f.Mark() != (Mark{}) {
		t.Fatalf("%+v, %v", f, err)
	}
	want := Mark{Epoch: 1 << 60, Plan: 3}
	if err := f.Write(want); err != nil {
		t.Fatal(err)
	}
	again, err := Open(path)
	if err != nil || again.Mark() != want {
		t.Fatalf("%+v, %v", again, err)
	}
	// It cannot be written: what was there counts.
	if err := os.Mkdir(path+".tmp", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".tmp/x", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.Write(Mark{Epoch: 1 << 61}); err == nil || f.Mark() != want {
		t.Errorf("%+v, %v", f.Mark(), err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range b { // one bit of each byte
		bad := strings.Clone(string(b))
		bad = bad[:i] + string([]byte{b[i] ^ 1}) + bad[i+1:]
		if m, err := parse[Mark](header, []byte(bad)); err == nil {
			t.Errorf("%q reads as %+v", bad, m)
		}
	}
	for i := range b {
		if m, err := parse[Mark](header, b[:i]); err == nil {
			t.Errorf("%q reads as %+v", b[:i], m)
		}
	}
}

// Nothing that is no such file is read, waited for, or written over.
func TestHostileFile(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	good, err := format(header, Mark{Epoch: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(path("good"), good, 0o600),
		os.Symlink(path("good"), path("link")), os.Mkdir(path("dir"), 0o700),
		unix.Mkfifo(path("fifo"), 0o600), os.WriteFile(path("empty"), nil, 0o600),
		os.WriteFile(path("long"), append(good, make([]byte, maxFile)...), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link", "dir", "fifo", "empty", "long"} {
		if f, err := Open(path(name)); err == nil {
			t.Errorf("%s reads as %+v", name, f.Mark())
		}
	}
}

// What a leader told of the host is there after a restart, and nothing else is read as that.
func TestStanding(t *testing.T) {
	path := filepath.Join(t.TempDir(), "standing")
	if s, err := ReadStanding(path); err != nil || !reflect.DeepEqual(s, Standing{}) {
		t.Fatalf("%+v, %v", s, err)
	}
	want := Standing{Epoch: 5, Phase: "draining", Reason: "new memory",
		Rules: []string{"vms db must run apart"}}
	if err := WriteStanding(path, want); err != nil {
		t.Fatal(err)
	}
	if s, err := ReadStanding(path); err != nil || !reflect.DeepEqual(s, want) {
		t.Errorf("%+v, %v", s, err)
	}
	if err := WriteStanding(path, Standing{Reason: strings.Repeat("x", maxStanding)}); err == nil {
		t.Error("one that cannot be read is written")
	}
	mark, err := format(header, Mark{Epoch: 1})
	if err == nil {
		err = os.WriteFile(path, mark, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if s, err := ReadStanding(path); err == nil {
		t.Errorf("a mark reads as %+v", s)
	}
}

func FuzzParse(f *testing.F) {
	b, err := format(header, Mark{Epoch: 1, Plan: 2})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(header))
	if b, err = format(standingHeader, Standing{Epoch: 1, Phase: "draining"}); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		again[Mark](t, header, b)
		again[Standing](t, standingHeader, b)
	})
}

func again[T any](t *testing.T, header string, b []byte) {
	v, err := parse[T](header, b)
	if err != nil {
		return
	}
	text, err := format(header, v)
	if err != nil {
		t.Fatal(err)
	}
	if w, err := parse[T](header, text); err != nil {
		t.Errorf("%+v became %+v, %v", v, w, err)
	} else if second, err := format(header, w); err != nil || !bytes.Equal(second, text) {
		t.Errorf("%s became %s, %v", text, second, err)
	}
}
