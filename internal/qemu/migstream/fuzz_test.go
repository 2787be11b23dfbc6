package migstream_test

import (
	"bytes"
	"errors"
	"io"
	"path/filepath"
	"testing"

	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/migstream/streamtest"
)

func addGolden(f *testing.F, pattern string) {
	files, err := filepath.Glob(filepath.Join("testdata", pattern))
	if err != nil || len(files) == 0 {
		f.Fatalf("no golden streams: %v", err)
	}
	for _, file := range files {
		if b := streamtest.Recorded(f, file); len(b) < 40<<10 {
			// larger ones only slow the fuzzer down
			f.Add(b)
		}
	}
}

// Whatever the bytes, the reader returns items whose encoding is what it read, then one error.
func FuzzReader(f *testing.F) {
	addGolden(f, "*.forward.gz")
	addGolden(f, "*.cut.gz")
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := migstream.NewReader(bytes.NewReader(stream))
		var again []byte
		for {
			item, err := r.Next()
			if err != nil {
				if _, second := r.Next(); second != err {
					t.Fatalf("the error changed from %v to %v", err, second)
				}
				if err != io.EOF && !errors.Is(err, migstream.ErrMalformed) &&
					!errors.Is(err, migstream.ErrUnsupported) &&
					!errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("unclassified error %v", err)
				}
				break
			}
			again = item.Append(again)
			if p, ok := item.(migstream.Packaged); ok {
				p.Sections()
			}
		}
		if !bytes.HasPrefix(stream, again) {
			t.Fatalf("items encode to %x, the stream was %x", again, stream)
		}
	})
}

func FuzzReturnReader(f *testing.F) {
	addGolden(f, "*.return.gz")
	f.Add(migstream.Message{Type: migstream.MsgReqPagesID, Block: "pc.ram", Start: 4096,
		Length: 4096}.Append(nil))
	f.Add(migstream.Message{Type: migstream.MsgRecvBitmap, Block: "pc.ram",
		Bitmap: make([]byte, 16)}.Append(nil))
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := migstream.NewReturnReader(bytes.NewReader(stream), 1<<20)
		var again []byte
		for {
			m, err := r.Next()
			if err != nil {
				if err != io.EOF && !errors.Is(err, migstream.ErrMalformed) &&
					!errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("unclassified error %v", err)
				}
				break
			}
			again = m.Append(again)
		}
		if !bytes.HasPrefix(stream, again) {
			t.Fatalf("messages encode to %x, the stream was %x", again, stream)
		}
	})
}

// Every prefix of a stream ends in an error that says so; none is taken for a whole one.
func TestCutStreamIsNoWholeStream(t *testing.T) {
	stream := streamtest.Recorded(t, goldenFile("pc-bare", "forward"))
	for n := 0; n < len(stream); n += 1 + n/50 {
		r := migstream.NewReader(bytes.NewReader(stream[:n]))
		for {
			_, err := r.Next()
			if errors.Is(err, io.ErrUnexpectedEOF) {
				break
			}
			if err != nil {
				t.Fatalf("cut at %d: %v", n, err)
			}
		}
	}
}

func TestReaderRefuses(t *testing.T) {
	head := migstream.Configuration{Machine: "m"}.Append(migstream.Header{}.Append(nil))
	start := migstream.SectionStart{ID: 2, Name: "ram", Version: 4}.Append(head)
	sized := migstream.MemSize{
		Blocks: []migstream.Block{{Name: "r", Length: 8192, PageSize: 4096}}}.Append(start)
	for name, c := range map[string]struct {
		stream []byte
		want   error
	}{
		"other magic":     {[]byte("HTTP/1.1"), migstream.ErrMalformed},
		"unknown element": {append(head[:len(head):len(head)], 0x55), migstream.ErrMalformed},
		"unknown command": {migstream.Command{ID: 99}.Append(head[:len(head):len(head)]),
			migstream.ErrUnsupported},
		"huge package": {append(head[:len(head):len(head)], 8, 0, 7, 0, 4, 0xff, 0xff,
			0xff, 0xff), migstream.ErrMalformed},
		"second section": {migstream.SectionStart{ID: 3, Name: "dirty-bitmap",
			Version: 1}.Append(head[:len(head):len(head)]), migstream.ErrUnsupported},
		"part without start": {migstream.SectionPart{ID: 2}.Append(head[:len(head):len(head)]),
			migstream.ErrMalformed},
		"no blocks": {migstream.MemSize{}.Append(start[:len(start):len(start)]),
			migstream.ErrMalformed},
		"block twice": {
			migstream.MemSize{Blocks: []migstream.Block{{"r", 4096, 4096},
				{"r", 4096, 4096}}}.Append(start[:len(start):len(start)]), migstream.ErrMalformed},
		"page outside block": {migstream.Page{Block: "r",
			Offset: 8192}.Append(sized[:len(sized):len(sized)]), migstream.ErrMalformed},
		"page of unknown block": {migstream.Page{Block: "q"}.Append(sized[:len(sized):len(sized)]),
			migstream.ErrMalformed},
		"continue of nothing": {
			migstream.Page{Continue: true}.Append(sized[:len(sized):len(sized)]),
			migstream.ErrMalformed},
		"xbzrle page": {append(migstream.EOS{}.Append(sized[:len(sized):len(sized)]),
			append(append(migstream.Footer{ID: 2}.Append(nil),
				migstream.SectionPart{ID: 2}.Append(nil)...), 0, 0, 0, 0, 0, 0, 0,
				0x40)...), migstream.ErrUnsupported},
		"other guest page size": {
			migstream.Command{ID: migstream.CmdPostcopyAdvise,
				Payload: make([]byte, 16)}.Append(head[:len(head):len(head)]),
			migstream.ErrUnsupported},
		"bytes behind the end": {append(migstream.EOF{}.Append(head[:len(head):len(head)]), 0),
			migstream.ErrMalformed},
		"early device state": {append(head[:len(head):len(head)], 4, 0, 0, 0, 1),
			migstream.ErrUnsupported},
	} {
		r := migstream.NewReader(bytes.NewReader(c.stream))
		var err error
		for err == nil {
			_, err = r.Next()
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}
