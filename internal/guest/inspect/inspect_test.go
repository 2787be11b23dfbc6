package inspect_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vacate/internal/guest/inspect"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/migstream/streamtest"
)

const golden = "../../qemu/migstream/testdata"

func open(t testing.TB, name string) *os.File {
	t.Helper()
	f, err := os.Open(filepath.Join(golden, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func uncompressed(t testing.TB, name string) []byte {
	t.Helper()
	return streamtest.Recorded(t, filepath.Join(golden, name))
}

// Every recorded stream is understood to its last byte, compressed or not, and its records
// tile it.
func TestGolden(t *testing.T) {
	names, err := filepath.Glob(filepath.Join(golden, "*.gz"))
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, path := range names {
		name := filepath.Base(path)
		t.Run(name, func(t *testing.T) {
			parts := []string{name}
			if name == "pc-recovered.forward.gz" {
				parts = []string{"pc-recovered.cut.gz", name}
			}
			var files, plain []io.Reader
			total := 0
			for _, p := range parts {
				files = append(files, open(t, p))
				b := uncompressed(t, p)
				plain = append(plain, bytes.NewReader(b))
				total += len(b)
			}
			last, records := int64(-1), 0
			s, err := inspect.Read(func(r inspect.Record) error {
				if r.Offset <= last && len(parts) == 1 {
					t.Errorf("%q at %d, behind one at %d", r.Item, r.Offset, last)
				}
				last = r.Offset
				records++
				return nil
			}, files...)
			if name == "pc-recovered.cut.gz" {
				if !errors.Is(err, io.ErrUnexpectedEOF) || s.Error == "" || s.Machine == "" ||
					len(s.Blocks) == 0 {
					t.Errorf("a cut stream: %v, %+v", err, s)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			// The bytes of a record that was cut off are of no use to anyone.
			if s.Bytes != int64(total) && s.Cuts == 0 || s.Bytes > int64(total) {
				t.Errorf("understood %d bytes of %d", s.Bytes, total)
			}
			if s.Cuts != len(parts)-1 || records == 0 {
				t.Errorf("%d cuts, %d records", s.Cuts, records)
			}
			again, err := inspect.Read(nil, plain...)
			if err != nil || again.Bytes != s.Bytes {
				t.Errorf("uncompressed: %+v, %v", again, err)
			}
			if s.Direction == "return" {
				if !strings.Contains(name, ".return.") || !s.Ended || s.Status != 0 {
					t.Errorf("%+v", s)
				}
				return
			}
			pages := 0
			for _, b := range s.Blocks {
				pages += b.Data + b.Zero
			}
			if s.Machine == "" || len(s.Blocks) == 0 || pages == 0 && s.DeviceState == 0 {
				t.Errorf("%+v", s)
			}
			if strings.HasPrefix(name, "pc-precopy") {
				if s.DeviceState == 0 {
					t.Error("no device state behind a pre-copy")
				}
			} else if len(s.Packages) != 1 || len(s.Packages[0].Devices) == 0 ||
				s.Packages[0].Error != "" || !s.Ended {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	stream := uncompressed(t, "pc-bare.forward.gz")
	for _, c := range []struct {
		name  string
		parts [][]byte
		want  string
	}{
		{"nothing", nil, "no recording"},
		{"empty", [][]byte{{}}, "empty"},
		{"text", [][]byte{[]byte("hello, world")},
			"at byte 8: malformed migration stream: it starts with"},
		{"cut", [][]byte{stream[:1000]}, "ends in its middle"},
		{"two streams", [][]byte{stream, stream}, "a stream of its own"},
		{"both paths", [][]byte{stream, uncompressed(t, "pc-bare.return.gz")},
			"recording 2 is of the return path"},
		{"continuation alone", [][]byte{uncompressed(t, "pc-recovered.forward.gz")},
			"name the one it goes on from first"},
		{"cut return path", [][]byte{uncompressed(t, "pc-bare.return.gz")[:11]},
			"at byte 8: return path"},
		{"bad gzip", [][]byte{{0x1f, 0x8b, 0, 0}}, "uncompress"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var parts []io.Reader
			for _, p := range c.parts {
				parts = append(parts, bytes.NewReader(p))
			}
			s, err := inspect.Read(nil, parts...)
			if err == nil || !strings.Contains(err.Error(), c.want) || s.Error != err.Error() {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	stop := errors.New("stop")
	if _, err := inspect.Read(func(inspect.Record) error { return stop },
		bytes.NewReader(stream)); !errors.Is(err, stop) {
		t.Errorf("the error of record is %v", err)
	}
}

// No recording makes it panic, or understand more than there is.
func FuzzRead(f *testing.F) {
	for _, name := range []string{"pc-old.forward.gz", "pc-old.return.gz",
		"pc-recovered.forward.gz", "pc-recovered.return.gz"} {
		b := uncompressed(f, name)
		f.Add(b[:min(len(b), 64<<10)])
	}
	f.Add([]byte{0x1f, 0x8b, 8, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		records := 0
		s, err := inspect.Read(func(inspect.Record) error { records++; return nil },
			bytes.NewReader(b))
		if err != nil && s.Error == "" || err == nil && records == 0 {
			t.Errorf("%d records, %v, %+v", records, err, s)
		}
		compressed := len(b) > 1 && b[0] == 0x1f && b[1] == 0x8b
		if s.Bytes > int64(len(b)) && !compressed {
			t.Errorf("understood %d bytes of %d", s.Bytes, len(b))
		}
		if err != nil && !compressed && len(b) > 0 &&
			!errors.Is(err, migstream.ErrMalformed) && !errors.Is(err, migstream.ErrUnsupported) &&
			!errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("an error of no known kind: %v", err)
		}
	})
}
