package migstream_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/migstream/streamtest"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// The streams in testdata were recorded from real QEMUs. To record them again, with the
// qemu-system-x86_64 in PATH:
//
//	go test ./internal/qemu/migstream -run TestGolden -record
//
// The guests never run (-S) and have a blank BIOS, which keeps the files small.
var record = flag.Bool("record", false,
	"record the golden streams again from the qemu-system-x86_64 in PATH")

var recordings = []struct {
	name string
	kind string // postcopy, recovered (a post-copy cut and recovered), precopy
	args string
}{
	{"pc-bare", "postcopy", "-M pc-i440fx-7.2 -m 4 -nodefaults"},
	{"pc-old", "postcopy", "-M pc-i440fx-5.2 -m 2 -nodefaults -smp 2"},
	{"q35-virtio", "postcopy",
		"-M pc-q35-7.2 -m 8 -nodefaults -smp 2 -device virtio-net-pci,romfile= -device " +
			"virtio-serial-pci -device virtio-balloon-pci -device VGA,vgamem_mb=1,romfile="},
	{"microvm-memfd", "postcopy",
		"-M microvm,memory-backend=m -m 8 -nodefaults -object " +
			"memory-backend-memfd,id=m,size=8M,share=on"},
	{"pc-recovered", "recovered", "-M pc-i440fx-7.2 -m 8 -nodefaults"},
	{"pc-precopy", "precopy", "-M pc-i440fx-7.2 -m 4 -nodefaults"},
}

func goldenFile(name, direction string) string {
	return filepath.Join("testdata", name+"."+direction+".gz")
}

// Every recorded stream decodes to its end, and encodes to the same bytes again.
func TestGolden(t *testing.T) {
	for _, rec := range recordings {
		t.Run(rec.name, func(t *testing.T) {
			if *record {
				recordGolden(t, rec.name, rec.kind, rec.args)
			}
			stream := streamtest.Recorded(t, goldenFile(rec.name, "forward"))
			seen := map[string]int{}
			if rec.kind == "recovered" {
				cut := streamtest.Recorded(t, goldenFile(rec.name, "cut"))
				r := migstream.NewReader(bytes.NewReader(cut))
				if err := checkStream(t, r, cut, seen); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("a stream cut in its middle ends with %v", err)
				}
				if err := checkStream(t, r.Resume(bytes.NewReader(stream)), stream,
					seen); err != io.EOF {
					t.Error(err)
				}
			} else if err := checkStream(t, migstream.NewReader(bytes.NewReader(stream)), stream,
				seen); err != io.EOF {
				t.Error(err)
			}
			want := []string{"Header", "Configuration", "SectionStart", "MemSize", "EOS", "Footer"}
			if rec.kind != "precopy" {
				want = append(want, "Packaged", "Page", "SectionPart", "Command")
			}
			for _, w := range want {
				if seen[w] == 0 {
					t.Errorf("no %s in the stream: %v", w, seen)
				}
			}
			if rec.kind == "precopy" {
				return
			}
			checkReturnPath(t, rec.name, rec.kind)
		})
	}
}

// checkStream reads r to its end, which it returns, and compares the items' encoding with stream.
func checkStream(t *testing.T, r *migstream.Reader, stream []byte, seen map[string]int) error {
	var again []byte
	for {
		item, err := r.Next()
		if err != nil {
			if err == io.EOF && len(again) != len(stream) || !bytes.HasPrefix(stream, again) {
				t.Errorf("encoding what was decoded gives %d bytes that are not the %d recorded",
					len(again), len(stream))
			}
			return err
		}
		again = item.Append(again)
		if r.Offset() != int64(len(again)) {
			t.Fatalf("offset %d after %d bytes of items", r.Offset(), len(again))
		}
		seen[strings.TrimPrefix(fmt.Sprintf("%T", item), "migstream.")]++
		if p, ok := item.(migstream.Packaged); ok {
			checkPackage(t, p)
		}
	}
}

func checkPackage(t *testing.T, p migstream.Packaged) {
	sections, err := p.Sections()
	if err != nil {
		t.Error(err)
	}
	names := map[string]bool{}
	for _, s := range sections {
		names[s.Name] = true
	}
	if len(sections) < 3 || !names["cpu"] {
		t.Errorf("the package holds %d sections, want several, with a cpu: %v", len(sections),
			names)
	}
}

func checkReturnPath(t *testing.T, name, kind string) {
	stream := streamtest.Recorded(t, goldenFile(name, "return"))
	r := migstream.NewReturnReader(bytes.NewReader(stream), 1<<20)
	var again []byte
	seen := map[migstream.MessageType]int{}
	for {
		m, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		again = m.Append(again)
		seen[m.Type]++
	}
	if !bytes.Equal(again, stream) {
		t.Errorf("encoding what was decoded gives %d bytes, not the %d recorded", len(again),
			len(stream))
	}
	want := []migstream.MessageType{migstream.MsgPong, migstream.MsgShut}
	if kind == "recovered" {
		want = []migstream.MessageType{migstream.MsgShut, migstream.MsgRecvBitmap,
			migstream.MsgResumeAck}
	}
	for _, w := range want {
		if seen[w] == 0 {
			t.Errorf("no message of type %d on the return path: %v", w, seen)
		}
	}
}

// recordGolden migrates a VM between two QEMUs through a relay that keeps what passes.
func recordGolden(t *testing.T, name, kind, args string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	bios := filepath.Join(dir, "bios")
	if err := os.WriteFile(bios, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	argv := append(strings.Fields(args), "-accel", "tcg", "-display", "none", "-S", "-bios", bios)
	src := startQEMU(ctx, t, filepath.Join(dir, "src"), argv)
	dst := startQEMU(ctx, t, filepath.Join(dir, "dst"), append(argv, "-incoming", "defer"))
	if kind != "precopy" {
		for _, q := range []*qmp.Client{src, dst} {
			must(t, q.SetMigrationCapabilities(ctx, map[string]bool{"postcopy-ram": true}))
		}
		// So slow that nothing is sent before the switch to post-copy, but its package is.
		must(t, src.SetMigrationParameters(ctx, map[string]any{"max-bandwidth": 10}))
	}
	if kind == "recovered" {
		must(t, src.SetMigrationParameters(ctx,
			map[string]any{"max-postcopy-bandwidth": 100 << 10}))
	}
	var forward, back bytes.Buffer
	relay := newRelay(ctx, t, src, dst, "first", &forward, &back)
	must(t, dst.MigrateIncoming(ctx, "fd:first"))
	must(t, src.Migrate(ctx, "fd:first", false))
	if kind != "precopy" {
		must(t, src.MigrateStartPostcopy(ctx))
	}
	if kind == "recovered" {
		waitMigration(ctx, t, dst, "postcopy-active")
		relay.cut()
		waitMigration(ctx, t, src, "postcopy-paused")
		waitMigration(ctx, t, dst, "postcopy-paused")
		writeGolden(t, goldenFile(name, "cut"), forward.Bytes())
		must(t, src.SetMigrationParameters(ctx, map[string]any{"max-postcopy-bandwidth": 0}))
		back.Reset()
		forward.Reset()
		relay = newRelay(ctx, t, src, dst, "second", &forward, &back)
		must(t, dst.MigrateRecover(ctx, "fd:second"))
		must(t, src.Migrate(ctx, "fd:second", true))
	}
	waitMigration(ctx, t, src, "completed")
	relay.wait()
	writeGolden(t, goldenFile(name, "forward"), forward.Bytes())
	if kind != "precopy" {
		writeGolden(t, goldenFile(name, "return"), back.Bytes())
	}
}

func startQEMU(ctx context.Context, t *testing.T, socket string, argv []string) *qmp.Client {
	t.Helper()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		append(argv, "-qmp", "unix:"+socket+",server=on,wait=off")...)
	cmd.Stderr = os.Stderr
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for {
		q, err := qmp.Dial(ctx, socket)
		if err == nil {
			t.Cleanup(func() { q.Close() })
			return q
		}
		if ctx.Err() != nil || cmd.ProcessState != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func waitMigration(ctx context.Context, t *testing.T, q *qmp.Client, status string) {
	t.Helper()
	for {
		m, err := q.QueryMigrate(ctx)
		must(t, err)
		if m.Status == status {
			return
		}
		if m.Status == "failed" {
			t.Fatalf("migration failed while waiting for %s: %s", status, m.ErrorDesc)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

type relay struct {
	ends []net.Conn
	wg   sync.WaitGroup
}

func newRelay(ctx context.Context, t *testing.T, src, dst *qmp.Client, name string,
	forward, back io.Writer) *relay {
	r := &relay{}
	for _, q := range []*qmp.Client{src, dst} {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		must(t, q.GetFD(ctx, name, pair[1]))
		unix.Close(pair[1])
		f := os.NewFile(uintptr(pair[0]), name)
		c, err := net.FileConn(f)
		must(t, err)
		f.Close()
		r.ends = append(r.ends, c)
	}
	copyOne := func(to, from net.Conn, keep io.Writer) {
		defer r.wg.Done()
		io.Copy(to, io.TeeReader(from, keep))
		to.(*net.UnixConn).CloseWrite()
	}
	r.wg.Add(2)
	go copyOne(r.ends[1], r.ends[0], forward)
	go copyOne(r.ends[0], r.ends[1], back)
	return r
}

func (r *relay) cut() {
	for _, c := range r.ends {
		c.Close()
	}
	r.wg.Wait()
}

func (r *relay) wait() { r.wg.Wait() }

func writeGolden(t *testing.T, file string, b []byte) {
	var buf bytes.Buffer
	z, _ := gzip.NewWriterLevel(&buf, gzip.BestCompression)
	z.Write(b)
	must(t, z.Close())
	must(t, os.MkdirAll("testdata", 0o755))
	must(t, os.WriteFile(file, buf.Bytes(), 0o644))
	t.Logf("%s: %d bytes, %d packed", file, len(b), buf.Len())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// What QEMU saves makes a package, and nothing else does.
func TestPackage(t *testing.T) {
	r := migstream.NewReader(bytes.NewReader(streamtest.Recorded(t,
		goldenFile("q35-virtio", "forward"))))
	var want migstream.Packaged
	for want.Data == nil {
		item, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		want, _ = item.(migstream.Packaged)
	}
	body, listens := bytes.CutPrefix(want.Data,
		migstream.Command{ID: migstream.CmdPostcopyListen}.Append(nil))
	body, runs := bytes.CutSuffix(body,
		migstream.Command{ID: migstream.CmdPostcopyRun}.Append(
			migstream.PingCommand(3).Append(nil)))
	if !listens || !runs {
		t.Fatal("the recorded package is not what it was")
	}
	saved := migstream.EOF{}.Append(append(migstream.Header{}.Append(nil), body...))
	p, err := migstream.Package(saved, 3)
	if err != nil || !bytes.Equal(p.Data, want.Data) {
		t.Errorf("a package of %d bytes, QEMU's has %d: %v", len(p.Data), len(want.Data), err)
	}
	for name, bad := range map[string][]byte{
		"nothing": nil, "cut": saved[:len(saved)-1], "no header": saved[8:],
		"no sections": append(saved[:8:8], 0), "a command": append(append(saved[:8:8], 8), body...),
		"too long": migstream.EOF{}.Append(append(append(saved[:8:8], 4),
			make([]byte, migstream.MaxPackage)...)),
	} {
		if _, err := migstream.Package(bad, 3); !errors.Is(err, migstream.ErrMalformed) &&
			!errors.Is(err, migstream.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
