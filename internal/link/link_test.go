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

	"vacate/internal/link/certs"
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

// server makes a listener. Unless told otherwise, nobody may be turned away from it.
func server(t testing.TB, o ListenOptions) (l *Listener, addr string) {
	t.Helper()
	if o.TurnedAway == nil {
		o.TurnedAway = func(from string, err error) { t.Errorf("turned %s away: %v", from, err) }
	}
	ln := listen(t)
	l = NewListener(ln, o)
	t.Cleanup(func() { l.Close() })
	return l, ln.Addr().String()
}

// meet makes a session and returns both ends, the dialling one first.
func meet(t testing.TB, l *Listener, d Dialer) (*Session, *Session) {
	t.Helper()
	a, err := d.Session(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	b, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return a, b
}

// pair makes a session over a plain link.
func pair(t testing.TB) (*Session, *Session) {
	t.Helper()
	l, addr := server(t, ListenOptions{})
	return meet(t, l, Dialer{Addr: addr})
}

// authority makes certificates of hosts, all of one CA.
type authority struct {
	t   testing.TB
	dir string
}

func newAuthority(t testing.TB) authority {
	t.Helper()
	dir := t.TempDir()
	if err := certs.Init(dir); err != nil {
		t.Fatal(err)
	}
	return authority{t, dir}
}

func (a authority) identity(name string) *certs.Identity {
	a.t.Helper()
	out := a.t.TempDir()
	if err := certs.Issue(a.dir, name, out, 1, false); err != nil {
		a.t.Fatal(err)
	}
	i, err := certs.Load(out, func(err error) { a.t.Error(err) })
	if err != nil {
		a.t.Fatal(err)
	}
	return i
}

// securePair makes a session over TLS, from hosta to hostb.
func securePair(t testing.TB) (*Session, *Session) {
	t.Helper()
	ca := newAuthority(t)
	l, addr := server(t, ListenOptions{TLS: ca.identity("hostb").Server()})
	return meet(t, l, Dialer{Addr: addr, TLS: ca.identity("hosta").Client("hostb")})
}

// bothWays runs a test with sessions over a plain link and over TLS.
func bothWays(t *testing.T, test func(t *testing.T, pair func(testing.TB) (*Session, *Session))) {
	t.Run("plain", func(t *testing.T) { test(t, pair) })
	t.Run("TLS", func(t *testing.T) { test(t, securePair) })
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
	bothWays(t, func(t *testing.T, pair func(testing.TB) (*Session, *Session)) {
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
							t.Errorf("%v: frame %d came as type %d with %d bytes", l, i, kind,
								len(payload))
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
			t.Errorf("one side counts %d bytes sent and %d received, the other %d and %d", sent,
				received, s, r)
		}
	})
}

// Several goroutines may write to a lane: frames do not mix.
func TestConcurrentWriters(t *testing.T) {
	bothWays(t, func(t *testing.T, pair func(testing.TB) (*Session, *Session)) {
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
	})
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
	bothWays(t, func(t *testing.T, pair func(testing.TB) (*Session, *Session)) {
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
				for big := make([]byte, 1<<20); ; {
					// until nothing goes out any more, as nobody reads
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
	})
}

// The peer's reason, which comes on another lane, counts more than that a lane ended.
func TestFailSoon(t *testing.T) {
	bothWays(t, func(t *testing.T, pair func(testing.TB) (*Session, *Session)) {
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
	})
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
		"closes":      {nil, ErrPeer, "is it `vacate receive` that listens there"},
		"half answer": {[]byte(mark), ErrPeer, "is it `vacate receive` that listens there"},
		"HTTP": {[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), ErrPeer,
			"it answered \"HTTP/1.1 400"},
		"other version": {append([]byte(mark), 0, 9, 0, 0, 0, 0), ErrRefused,
			fmt.Sprintf("it speaks version 9, we speak %d: use the same release", Version)},
		"refusal": {append([]byte(mark), 0, Version, 1, 0, 0, 4, 'b', 'u', 's', 'y'),
			ErrRefused, `"busy"`},
		"cut refusal": {append([]byte(mark), 0, Version, 1, 0, 0, 9, 'b'), ErrRefused, "cut off"},
	} {
		ln := listen(t)
		serve(t, ln, c.answer, false)
		_, err := Dialer{Addr: ln.Addr().String()}.Session(t.Context())
		if !errors.Is(err, c.is) || !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ln := listen(t)
	ln.Close()
	if _, err := (Dialer{Addr: ln.Addr().String()}).Session(t.Context()); !strings.Contains(
		fmt.Sprint(err), "start `vacate receive` there first") {
		t.Error(err)
	}
	// Who has daemons is told of them alone.
	_, err := Dialer{Addr: ln.Addr().String(), Host: "hostb"}.Session(t.Context())
	if said := fmt.Sprint(err); !strings.Contains(said,
		"start vacated of host hostb (systemctl start vacated) there first") ||
		strings.Contains(said, "receive") {
		t.Error(err)
	}
	ln = listen(t)
	serve(t, ln, []byte("HTTP/1.1 400 Bad Request\r\n\r\n"), false)
	_, err = Dialer{Addr: ln.Addr().String(), Host: "hostb"}.Session(t.Context())
	if said := fmt.Sprint(err); !strings.Contains(said, "is it vacated of host hostb") ||
		strings.Contains(said, "receive") {
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
	if _, err := (Dialer{Addr: ln.Addr().String()}).Session(t.Context()); !errors.Is(err,
		ErrPeer) || !strings.Contains(err.Error(), "no answer") {
		t.Error(err)
	}
}

func TestCancel(t *testing.T) {
	ln := listen(t)
	serve(t, ln, nil, true)
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(context.Background())
	time.AfterFunc(20*time.Millisecond, func() { cancel(enough) })
	if s, err := (Dialer{Addr: ln.Addr().String()}).Session(ctx); err != enough || s != nil {
		t.Errorf("dial: %v", err)
	}

	l, addr := server(t, ListenOptions{})
	for name, say := range map[string][]byte{"nobody comes": nil, "half a hello": []byte(mark),
		"half a session": appendHello(nil, Control, [16]byte{1})} {
		ctx, cancel := context.WithCancelCause(context.Background())
		if say != nil {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write(say)
		}
		time.AfterFunc(20*time.Millisecond, func() { cancel(enough) })
		if s, err := l.Accept(ctx); err != enough || s != nil {
			t.Errorf("accept, %s: %v", name, err)
		}
	}
	l.Close() // does not wait for those
	if s, err := l.Accept(t.Context()); !errors.Is(err, net.ErrClosed) || s != nil {
		t.Errorf("accept, after the end: %v", err)
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
	l, to := server(t, ListenOptions{})
	addr, ups, downs := tap(t, to)
	a, b := meet(t, l, Dialer{Addr: addr})
	for l := range lanes {
		for i, s := range []*Session{a, b} {
			if err := errors.Join(s.Lane(l).Write(64, []byte("some"), []byte("pages")),
				s.Lane(l).Write(1)); err != nil {
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
		f.Add(b[answerHead+8:])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 1 << 10
		c := new(wire).received(b)
		var again, buf []byte
		for {
			kind, payload, err := c.Read(buf, limit)
			if err != nil {
				if !errors.Is(err, ErrPeer) && !errors.Is(err, io.EOF) &&
					!errors.Is(err, io.ErrUnexpectedEOF) {
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
		if _, received := (&Session{lane: [lanes]*Conn{c, {}, {}}}).Bytes(); received !=
			uint64(len(again)) {
			t.Fatalf("%d bytes counted, %d read", received, len(again))
		}
	})
}

// Whatever is said in place of a hello, it is turned away or understood; and if it is answered then
// with something that a source understands.
func FuzzJoin(f *testing.F) {
	up, _ := recorded(f)
	for _, b := range up {
		f.Add(b, uint8(0), false)
		f.Add(b, uint8(1), false)
		f.Add(b, uint8(7), true)
	}
	other := appendHello(nil, Control, [16]byte{1})
	other[len(mark)+1]++
	f.Add(other[:helloStart], uint8(0), false)
	f.Add(appendHello(nil, lanes, [16]byte{1}), uint8(0), false)
	f.Fuzz(func(t *testing.T, b []byte, there uint8, crowded bool) {
		h, err := readHello(&wire{in: bytes.NewReader(b)})
		if err != nil {
			if !errors.Is(err, ErrPeer) {
				t.Fatal(err)
			}
			return
		}
		if h.version == Version {
			again := binary.BigEndian.AppendUint64(appendHello(nil, h.lane, h.id)[:helloStart],
				h.features)
			again[helloStart-17] = b[helloStart-17] // means nothing
			if !bytes.HasPrefix(b, again) {
				t.Fatalf("%+v was read from %x", h, b)
			}
		}
		l := &Listener{o: ListenOptions{Waiting: 2, WaitingPerPeer: 2},
			sessions: map[ticket]*place{}}
		for lane := range lanes {
			if there>>lane&1 != 0 {
				if _, _, err := l.reserve(ticket{"a", h.id}, "a",
					greeting{Version, lane, h.id, 0}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if crowded {
			for i := range byte(2) {
				l.reserve(ticket{"a", [16]byte{i, 99}}, "a",
					greeting{Version, Control, [16]byte{i, 99}, 0})
			}
		}
		if err = h.unfit(); err == nil {
			var p *place
			var first bool
			if p, first, err = l.reserve(ticket{"a", h.id}, "a", h); err == nil {
				if there>>h.lane&1 != 0 || first != (there&7 == 0) || p.s.ID != h.id ||
					p.s.features&^features != 0 {
					t.Fatalf("%+v took place %+v beside lanes %b", h, p, there)
				}
			}
		}
		if n := len(l.sessions); n > 2 {
			t.Fatalf("%d sessions", n)
		}
		if err == nil {
			return
		}
		w := &wire{}
		answer(w, 0, err)
		_, said := (Dialer{}).hello(&wire{in: &w.out}, Control, h.id)
		if !errors.Is(said, ErrRefused) ||
			!strings.Contains(said.Error(), fmt.Sprintf("%q", err.Error())) {
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
	answer(w, 0, errors.New("there is no room"))
	f.Add(w.out.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		w := &wire{in: bytes.NewReader(b)}
		common, err := (Dialer{}).hello(w, Push, [16]byte{7})
		if !bytes.Equal(w.out.Bytes(), appendHello(nil, Push, [16]byte{7})) {
			t.Fatalf("said %x", w.out.Bytes())
		}
		if err == nil {
			if want := append([]byte(mark), 0, Version, 0); !bytes.HasPrefix(b, want) ||
				common&^features != 0 {
				t.Fatalf("took %x for an answer", b)
			}
			return
		}
		if !errors.Is(err, ErrPeer) && !errors.Is(err, ErrRefused) || len(err.Error()) > 6000 {
			t.Fatalf("error of %d bytes: %v", len(err.Error()), err)
		}
	})
}
