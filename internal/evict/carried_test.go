package evict

import (
	"bytes"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"testing"

	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/migstream/streamtest"
)

// Of QEMU's own streams the engine takes the machine, the blocks, and the state of the devices.
func TestCarriedStream(t *testing.T) {
	for _, name := range recordings {
		stream := golden(t, name)
		var pings []uint32
		s := carriedStream{r: migstream.NewReader(bytes.NewReader(stream)),
			answer: func(v uint32) error {
				pings = append(pings, v)
				return nil
			}}
		if err := s.head(); err != nil || len(pings) != 1 || pings[0] != 1 {
			t.Fatalf("%s: %v, answered %v", name, err, pings)
		}
		_, load, blocks := split(t, stream)
		got, err := s.load()
		if err != nil || !bytes.Equal(got, load) {
			t.Errorf("%s: %d bytes of the devices, %v, want %d", name, len(got), err, len(load))
		}
		if s.machine == "" || len(s.blocks) != len(blocks) {
			t.Errorf("%s: machine %q, %d blocks of %d", name, s.machine, len(s.blocks), len(blocks))
		}
		if err := s.rest(func() {}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := carriedStream{r: migstream.NewReader(bytes.NewReader(golden(t, "pc-precopy.forward.gz"))),
		answer: func(uint32) error { return nil }}
	if err := s.head(); !errors.Is(err, errNoPostcopy) {
		t.Errorf("without post-copy: %v", err)
	}
}

// Whatever a QEMU sends, what is passed on of it is one package that the destination takes.
func FuzzCarriedStream(f *testing.F) {
	files, err := filepath.Glob("../qemu/migstream/testdata/*.forward.gz")
	if err != nil || len(files) == 0 {
		f.Fatalf("no recorded streams: %v", err)
	}
	for _, file := range files {
		if b := streamtest.Recorded(f, file); len(b) < 40<<10 { // larger ones only slow it down
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s := carriedStream{r: migstream.NewReader(bytes.NewReader(b)),
			answer: func(uint32) error { return nil }}
		if s.head() != nil {
			return
		}
		if len(s.blocks) == 0 || len(s.blocks) > migstream.MaxBlocks {
			t.Fatalf("%d blocks", len(s.blocks))
		}
		load, err := s.load()
		if err != nil {
			return
		}
		if again, err := checkLoad(s.r.Resume(bytes.NewReader(load))); err != nil ||
			!bytes.Equal(again, load) {
			t.Fatalf("the destination takes %d bytes of %d: %v", len(again), len(load), err)
		}
		s.rest(func() {})
	})
}

// A relayed stream carries bytes both ways, and its end.
func TestRelay(t *testing.T) {
	near, far := sessionPair(t)
	source, ours := net.Pipe()
	twin, theirs := net.Pipe()
	ended := make(chan error, 2)
	taken := make(chan struct{})
	go func() {
		ended <- Relay(t.Context(), near, "web1", ours, func() { close(taken) })
	}()
	go func() {
		r, err := ReadRequest(t.Context(), far)
		if err == nil && (r.Purpose != ToRelay || r.VM != "web1") {
			err = errors.New("another request came")
		}
		if err == nil {
			err = r.Relay(t.Context(), theirs)
		}
		ended <- err
	}()
	<-taken
	data := bytes.Repeat([]byte("0123456789"), 1<<16)
	go source.Write(data)
	got := make([]byte, len(data))
	if _, err := io.ReadFull(twin, got); err != nil || !bytes.Equal(got, data) {
		t.Fatal("not all came", err)
	}
	go twin.Write([]byte("ack"))
	if _, err := io.ReadFull(source, got[:3]); err != nil || string(got[:3]) != "ack" {
		t.Fatal(string(got[:3]), err)
	}
	twin.Close()
	if n, err := source.Read(got); err == nil {
		t.Errorf("%d bytes came after the end", n)
	}
	<-ended
	<-ended
}

// A twin whose stream ends while its migration is being resumed gets whole commands alone, and is
// told to go on.
func TestResuming(t *testing.T) {
	ask := migstream.RecvBitmapCommand("pc.ram").Append(nil)
	all := slices.Concat(ask, ask, goOn, []byte("what follows, in any pieces"))
	for _, c := range []struct {
		name   string
		comes  []byte
		pieces int
		want   []byte
	}{
		{"nothing", nil, 1, goOn},
		{"half a command", ask[:len(ask)-1], 3, goOn},
		{"a command and a half", slices.Concat(ask, ask[:7]), 2, slices.Concat(ask, goOn)},
		{"all", all, 1, all},
		{"all, in bytes", all, len(all), all},
	} {
		near, far := net.Pipe()
		got := make(chan []byte, 1)
		go func() {
			b, _ := io.ReadAll(far)
			got <- b
		}()
		conn := Resuming(near)
		for _, piece := range slices.Collect(slices.Chunk(c.comes, max(1,
			len(c.comes)/c.pieces))) {
			if n, err := conn.Write(piece); err != nil || n != len(piece) {
				t.Errorf("%s: %d bytes of %d, %v", c.name, n, len(piece), err)
			}
		}
		conn.Close()
		conn.Close()
		if b := <-got; !bytes.Equal(b, c.want) {
			t.Errorf("%s: the twin gets %x, want %x", c.name, b, c.want)
		}
	}
}
