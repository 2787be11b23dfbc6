package link

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// pair makes a session and returns both ends, the dialling one first.
func pair(t testing.TB) (*Session, *Session) {
	t.Helper()
	ln := listen(t)
	return meet(t, ln, ln.Addr().String())
}

func meet(t testing.TB, ln net.Listener, addr string) (*Session, *Session) {
	t.Helper()
	type end struct {
		s   *Session
		err error
	}
	accepted := make(chan end, 1)
	go func() {
		s, err := Accept(context.Background(), ln, func(err error) { t.Error(err) })
		accepted <- end{s, err}
	}()
	a, err := Dial(context.Background(), nil, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	b := <-accepted
	if b.err != nil {
		t.Fatal(b.err)
	}
	t.Cleanup(b.s.Close)
	return a, b.s
}

// content is what frame i of a lane and direction holds: of any size, empty ones included.
func content(lane Lane, side, i int) []byte {
	r := rand.New(rand.NewPCG(uint64(lane)<<8|uint64(side), uint64(i)))
	b := make([]byte, r.IntN(5)*r.IntN(9000))
	for j := range b {
		b[j] = byte(r.Uint32())
	}
	return b
}

// Frames arrive whole and in order on every lane, in both directions at once.
func TestSession(t *testing.T) {
	a, b := pair(t)
	if a.ID != b.ID || a.ID == [16]byte{} {
		t.Errorf("the sessions are %x and %x", a.ID, b.ID)
	}
	if a.Err() != nil || b.Err() != nil {
		t.Errorf("errors before the end: %v, %v", a.Err(), b.Err())
	}
	const frames = 300
	var tasks sync.WaitGroup
	for l := range lanes {
		for side, s := range []*Session{a, b} {
			tasks.Go(func() {
				for i := range frames {
					c := content(l, side, i)
					cut := len(c) / 3
					if err := s.Lane(l).Write(uint8(i), c[:cut], nil, c[cut:]); err != nil {
						t.Errorf("%v: %v", l, err)
						return
					}
				}
			})
			tasks.Go(func() {
				var buf []byte
				for i := range frames {
					kind, payload, err := s.Lane(l).Read(buf, 64<<10)
					if err != nil {
						t.Errorf("%v: %v", l, err)
						return
					}
					if kind != uint8(i) || !bytes.Equal(payload, content(l, 1-side, i)) {
						t.Errorf("%v: frame %d came as type %d with %d bytes", l, i, kind, len(payload))
						return
					}
					buf = payload
				}
			})
		}
	}
	tasks.Wait()
	sent, received := a.Bytes()
	if s, r := b.Bytes(); sent != r || received != s || sent == 0 {
		t.Errorf("one side counts %d bytes sent and %d received, the other %d and %d", sent, received, s, r)
	}
}

// Several goroutines may write to a lane: frames do not mix.
func TestConcurrentWriters(t *testing.T) {
	a, b := pair(t)
	const writers, frames = 4, 200
	var tasks sync.WaitGroup
	for w := range writers {
		tasks.Go(func() {
			for i := range frames {
				if err := a.Lane(Control).Write(uint8(w), content(Control, w, i)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var seen [writers]int
	for range writers * frames {
		kind, payload, err := b.Lane(Control).Read(nil, 64<<10)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(payload, content(Control, int(kind), seen[kind])) {
			t.Fatalf("frame %d of writer %d is not what was sent", seen[kind], kind)
		}
		seen[kind]++
	}
	tasks.Wait()
}

// wire is a net.Conn made of bytes.
type wire struct {
	net.Conn
	in  io.Reader
	out bytes.Buffer
}

func (w *wire) Read(b []byte) (int, error)  { return w.in.Read(b) }
func (w *wire) Write(b []byte) (int, error) { return w.out.Write(b) }
func (w *wire) SetDeadline(time.Time) error { return nil }
func (w *wire) over() bool                  { return false }
func (w *wire) writev(parts [][]byte) (int, error) {
	return w.out.Write(bytes.Join(parts, nil))
}
func (w *wire) received(b []byte) *Conn { w.in = bytes.NewReader(b); return &Conn{s: w} }
func frame(kind uint8, payload ...[]byte) []byte {
	w := &wire{}
	(&Conn{s: w}).Write(kind, payload...)
	return w.out.Bytes()
}
func readFrame(b []byte, limit int) (uint8, []byte, error) {
	return new(wire).received(b).Read(nil, limit)
}

func TestReadLimit(t *testing.T) {
	f := frame(7, make([]byte, 100))
	if _, p, err := readFrame(f, 100); err != nil || len(p) != 100 {
		t.Errorf("frame as long as the limit: %v", err)
	}
	if _, _, err := readFrame(f, 99); !errors.Is(err, ErrPeer) {
		t.Errorf("frame over the limit: %v", err)
	}
	// The length alone must not make the reader allocate: there is no more than the head.
	binary.BigEndian.PutUint32(f[4:], 0xffffffff)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, _, err := readFrame(f[:frameHead], 1<<20); !errors.Is(err, ErrPeer) {
		t.Error(err)
	}
	runtime.ReadMemStats(&after)
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 64<<10 {
		t.Errorf("a frame that is refused costs %d bytes", allocated)
	}
}

// No bit of a frame can change unnoticed, and a cut frame is no end between two.
func TestDamage(t *testing.T) {
	f := frame(7, []byte("the state of a device"))
	for i := range len(f) * 8 {
		bad := bytes.Clone(f)
		bad[i/8] ^= 1 << (i % 8)
		if _, _, err := readFrame(bad, 1<<10); err == nil {
			t.Errorf("bit %d changed unnoticed", i)
		}
	}
	for n := range f {
		_, _, err := readFrame(f[:n], 1<<10)
		if clean := errors.Is(err, io.EOF); err == nil || clean != (n == 0) {
			t.Errorf("cut behind %d bytes: %v", n, err)
		}
	}
}

func TestCloseUnblocks(t *testing.T) {
	a, b := pair(t)
	cause := errors.New("enough")
	var ends sync.WaitGroup
	begun := make(chan struct{}, 2*lanes)
	for l := range lanes {
		ends.Go(func() {
			begun <- struct{}{}
			if _, _, err := a.Lane(l).Read(nil, 10); err == nil {
				t.Error("a frame that nobody sent")
			}
		})
		ends.Go(func() {
			begun <- struct{}{}
			for big := make([]byte, 1<<20); ; { // until nothing goes out any more, as nobody reads
				if err := a.Lane(l).Write(1, big); err != nil {
					return
				}
			}
		})
	}
	for range 2 * lanes {
		<-begun
	}
	a.Fail(cause)
	a.Fail(errors.New("a later one"))
	ends.Wait()
	<-a.Done()
	if a.Err() != cause {
		t.Errorf("the session ended for %v", a.Err())
	}
	for l := range lanes { // the other side has it too, behind what was sent
		var err error
		for err == nil {
			_, _, err = b.Lane(l).Read(nil, 1<<20)
		}
	}
}

// The peer's reason, which comes on another lane, counts more than that a lane ended.
func TestFailSoon(t *testing.T) {
	a, _ := pair(t)
	reason := errors.New("the peer said why")
	a.FailSoon(errors.New("the push lane ended"))
	if a.Err() != nil {
		t.Error("it failed at once")
	}
	a.Fail(reason)
	if a.Err() != reason {
		t.Error(a.Err())
	}
	b, _ := pair(t)
	b.FailSoon(reason)
	<-b.Done()
	if b.Err() != reason || a.Err() != reason {
		t.Errorf("%v, %v", b.Err(), a.Err())
	}
}

// greeting encodes a hello.
func greeting(version uint16, lane uint8, id byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte(mark), version)
	return append(append(b, lane, 0), bytes.Repeat([]byte{id}, 16)...)
}

// Whoever else comes is turned away, is told why where it speaks the protocol, and does
// not keep the source that comes next from its session.
func TestAcceptTurnsAway(t *testing.T) {
	ln := listen(t)
	reasons := make(chan error, 100)
	accepted := make(chan *Session, 1)
	go func() {
		s, err := Accept(context.Background(), ln, func(err error) { reasons <- err })
		if err != nil {
			t.Error(err)
		}
		accepted <- s
	}()
	connect := func(say []byte) net.Conn {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := c.Write(say); err != nil {
			t.Fatal(err)
		}
		return c
	}
	turnedAway := func(name, want string) {
		t.Helper()
		if err := <-reasons; !strings.Contains(err.Error(), want) {
			t.Errorf("%s was turned away with %q; want %q", name, err, want)
		}
	}
	// refused reads the answer and wants a reason in it.
	refused := func(c net.Conn, name, want string) {
		t.Helper()
		b, err := io.ReadAll(c)
		if err != nil || len(b) < answerSize || b[len(mark)+2] != 1 || !strings.Contains(string(b[answerSize:]), want) {
			t.Errorf("%s was answered %q, %v; want %q", name, b, err, want)
		}
		turnedAway(name, want)
	}
	taken := func(c net.Conn) {
		t.Helper()
		b := make([]byte, answerSize)
		if _, err := io.ReadFull(c, b); err != nil || b[len(mark)+2] != 0 {
			t.Fatalf("answered %q, %v", b, err)
		}
	}

	connect(nil).Close()
	turnedAway("a port scan", "no hello")
	connect(greeting(Version, 0, 1)[:20]).Close()
	turnedAway("half a hello", "no hello")
	connect([]byte("GET /index.html HTTP/1.1\r\nHost: b\r\n\r\n"))
	turnedAway("a browser", "does not speak vacate's protocol")
	refused(connect(greeting(Version+1, 0, 1)), "another version", "use the same release of vacate on both hosts")
	refused(connect(greeting(Version, 9, 1)), "lane 9", "there is no lane 9")
	refused(connect(greeting(Version, uint8(Push), 1)), "a push lane", "belongs to no session")

	half := connect(greeting(Version, uint8(Control), 1))
	taken(half)
	refused(connect(greeting(Version, uint8(Control), 2)), "a second session", "taken by another eviction")
	refused(connect(greeting(Version, uint8(Push), 2)), "another session's lane", "belongs to no session")
	refused(connect(greeting(Version, uint8(Fetch), 1)), "a lane too early", "belongs to no session")
	taken(connect(greeting(Version, uint8(Push), 1)))
	refused(connect(greeting(Version, uint8(Push), 1)), "a lane twice", "belongs to no session")
	half.Close() // its other lanes will never come

	s, err := Dial(context.Background(), nil, ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	other := <-accepted
	defer other.Close()
	if s.ID != other.ID {
		t.Error("another session was accepted")
	}
	if err := s.Lane(Fetch).Write(3, []byte("page")); err != nil {
		t.Fatal(err)
	}
	if kind, p, err := other.Lane(Fetch).Read(nil, 10); err != nil || kind != 3 || string(p) != "page" {
		t.Error(kind, p, err)
	}
}

// Who connects and says nothing holds a source up, but not for as long as that is patient.
func TestSilentStranger(t *testing.T) {
	if testing.Short() {
		t.Skip("short: waits for seconds")
	}
	ln := listen(t)
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	accepted := make(chan error, 1)
	go func() {
		s, err := Accept(context.Background(), ln, nil)
		if err == nil {
			s.Close()
		}
		accepted <- err
	}()
	s, err := Dial(context.Background(), nil, ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := <-accepted; err != nil {
		t.Error(err)
	}
}

// serve answers every connection with bytes, and closes it unless told to hold it.
func serve(t testing.TB, ln net.Listener, answer []byte, hold bool) {
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Write(answer)
			if hold {
				t.Cleanup(func() { c.Close() })
				continue
			}
			io.ReadFull(c, make([]byte, helloSize)) // or its end would be a reset
			c.Close()
		}
	}()
}

func TestDialRefused(t *testing.T) {
	for name, c := range map[string]struct {
		answer []byte
		is     error
		says   string
	}{
		"closes":        {nil, ErrPeer, "is it `vacate receive` that listens there?"},
		"half answer":   {[]byte(mark), ErrPeer, "is it `vacate receive` that listens there?"},
		"HTTP":          {[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), ErrPeer, "it answered \"HTTP/1.1 400"},
		"other version": {append([]byte(mark), 0, 9, 0, 0, 0, 0), ErrRefused, fmt.Sprintf("it speaks version 9, we speak %d: use the same release", Version)},
		"refusal":       {append([]byte(mark), 0, Version, 1, 0, 0, 4, 'b', 'u', 's', 'y'), ErrRefused, `"busy"`},
		"cut refusal":   {append([]byte(mark), 0, Version, 1, 0, 0, 9, 'b'), ErrRefused, "cut off"},
	} {
		ln := listen(t)
		serve(t, ln, c.answer, false)
		_, err := Dial(context.Background(), nil, ln.Addr().String())
		if !errors.Is(err, c.is) || !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ln := listen(t)
	ln.Close()
	if _, err := Dial(context.Background(), nil, ln.Addr().String()); !strings.Contains(fmt.Sprint(err), "start `vacate receive` there first") {
		t.Error(err)
	}
	ln = listen(t)
	go Refuse(ln, "it has a VM already")
	if _, err := Dial(context.Background(), nil, ln.Addr().String()); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "it has a VM already") {
		t.Error(err)
	}
}

// A peer that accepts and stays silent is given up.
func TestDialSilent(t *testing.T) {
	if testing.Short() {
		t.Skip("short: waits for seconds")
	}
	ln := listen(t)
	serve(t, ln, nil, true)
	if _, err := Dial(context.Background(), nil, ln.Addr().String()); !errors.Is(err, ErrPeer) || !strings.Contains(err.Error(), "no answer") {
		t.Error(err)
	}
}

func TestCancel(t *testing.T) {
	ln := listen(t)
	serve(t, ln, nil, true)
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(context.Background())
	time.AfterFunc(20*time.Millisecond, func() { cancel(enough) })
	if s, err := Dial(ctx, nil, ln.Addr().String()); err != enough || s != nil {
		t.Errorf("dial: %v", err)
	}

	for name, say := range map[string][]byte{"nobody comes": nil, "half a hello": []byte(mark), "half a session": greeting(Version, 0, 1)} {
		ln := listen(t)
		ctx, cancel := context.WithCancel(context.Background())
		if say != nil {
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write(say)
		}
		time.AfterFunc(20*time.Millisecond, cancel)
		if s, err := Accept(ctx, ln, nil); !errors.Is(err, context.Canceled) || s != nil {
			t.Errorf("accept, %s: %v", name, err)
		}
	}
}

// tap relays connections and keeps what passes: per connection what was dialled in with,
// and what was answered.
func tap(t testing.TB, to string) (addr string, up, down func() [][]byte) {
	ln := listen(t)
	var mu sync.Mutex
	var kept [2][]*bytes.Buffer
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			d, err := net.Dial("tcp", to)
			if err != nil {
				c.Close()
				return
			}
			for i, ends := range [2][2]net.Conn{{c, d}, {d, c}} {
				b := new(bytes.Buffer)
				mu.Lock()
				kept[i] = append(kept[i], b)
				mu.Unlock()
				go func() {
					p := make([]byte, 4096)
					for {
						n, err := ends[0].Read(p)
						mu.Lock()
						b.Write(p[:n])
						mu.Unlock()
						ends[1].Write(p[:n])
						if err != nil {
							ends[1].Close()
							return
						}
					}
				}()
			}
		}
	}()
	get := func(i int) func() [][]byte {
		return func() (all [][]byte) {
			mu.Lock()
			defer mu.Unlock()
			for _, b := range kept[i] {
				all = append(all, bytes.Clone(b.Bytes()))
			}
			return all
		}
	}
	return ln.Addr().String(), get(0), get(1)
}

// recorded holds the bytes of a real session.
func recorded(t testing.TB) (up, down [][]byte) {
	ln := listen(t)
	addr, ups, downs := tap(t, ln.Addr().String())
	a, b := meet(t, ln, addr)
	for l := range lanes {
		for i, s := range []*Session{a, b} {
			if err := errors.Join(s.Lane(l).Write(64, []byte("some"), []byte("pages")), s.Lane(l).Write(1)); err != nil {
				t.Fatal(err)
			}
			other := []*Session{b, a}[i]
			for range 2 {
				if _, _, err := other.Lane(l).Read(nil, 100); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	return ups(), downs()
}

// Whatever comes, frames read are frames as they would be written, no longer than allowed.
func FuzzRead(f *testing.F) {
	up, down := recorded(f)
	for _, b := range up {
		f.Add(b[helloSize:])
	}
	for _, b := range down {
		f.Add(b[answerSize:])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 1 << 10
		c := new(wire).received(b)
		var again, buf []byte
		for {
			kind, payload, err := c.Read(buf, limit)
			if err != nil {
				if !errors.Is(err, ErrPeer) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("unclassified error %v", err)
				}
				if errors.Is(err, io.EOF) != (len(again) == len(b)) {
					t.Fatalf("%v behind %d of %d bytes", err, len(again), len(b))
				}
				break
			}
			if len(payload) > limit {
				t.Fatalf("%d bytes", len(payload))
			}
			again = append(again, frame(kind, payload)...)
			buf = payload
		}
		if !bytes.HasPrefix(b, again) {
			t.Fatalf("frames encode to %x, read from %x", again, b)
		}
		if _, received := (&Session{lane: [lanes]*Conn{c, {}, {}}}).Bytes(); received != uint64(len(again)) {
			t.Fatalf("%d bytes counted, %d read", received, len(again))
		}
	})
}

// Whatever is said in place of a hello, it is turned away, and if it is answered then with
// something that a source understands.
func FuzzJoin(f *testing.F) {
	up, _ := recorded(f)
	for _, b := range up {
		f.Add(b, uint8(0))
		f.Add(b, uint8(1))
		f.Add(b, uint8(2))
	}
	f.Add(greeting(Version+1, 0, 1), uint8(0))
	f.Add(greeting(Version, 3, 1), uint8(0))
	f.Fuzz(func(t *testing.T, b []byte, there uint8) {
		s := &Session{done: make(chan struct{}), ID: [16]byte(bytes.Repeat([]byte{1}, 16))}
		for l := range Lane(min(there, uint8(lanes)-1)) {
			s.lane[l] = &Conn{s: &wire{}}
		}
		lanesBefore, idBefore := s.lane, s.ID
		w := &wire{in: bytes.NewReader(b)}
		err := s.join(context.Background(), w)
		if err == nil { // what is no TCP connection is never taken
			t.Fatal("taken")
		}
		if s.lane != lanesBefore || s.ID != idBefore {
			t.Fatal("a connection that was turned away changed the session")
		}
		if w.out.Len() == 0 {
			return
		}
		said := hello(context.Background(), &wire{in: &w.out}, Control, s.ID)
		if !errors.Is(said, ErrRefused) || !strings.Contains(said.Error(), fmt.Sprintf("%q", err.Error())) {
			t.Fatalf("turned away for %q, and the source understands %q", err, said)
		}
	})
}

// Whatever is answered to a hello, it is taken, or turned into a short message.
func FuzzAnswer(f *testing.F) {
	_, down := recorded(f)
	for _, b := range down {
		f.Add(b)
	}
	w := &wire{}
	answer(w, 1, "the destination is taken by another eviction")
	f.Add(w.out.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		w := &wire{in: bytes.NewReader(b)}
		err := hello(context.Background(), w, Push, [16]byte{7})
		if !bytes.Equal(w.out.Bytes(), append(greeting(Version, uint8(Push), 0)[:len(mark)+4:len(mark)+4], append([]byte{7}, make([]byte, 15)...)...)) {
			t.Fatalf("said %x", w.out.Bytes())
		}
		if err == nil {
			if want := append([]byte(mark), 0, Version, 0); !bytes.HasPrefix(b, want) {
				t.Fatalf("took %x for an answer", b)
			}
			return
		}
		if !errors.Is(err, ErrPeer) && !errors.Is(err, ErrRefused) || len(err.Error()) > 6000 {
			t.Fatalf("error of %d bytes: %v", len(err.Error()), err)
		}
	})
}
