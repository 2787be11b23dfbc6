// Package memclient is a client of memcached that notices what users of a guest would notice
// while it moves: wrong answers, broken connections, silence. It knows what every value
// should be, keeps its connections, and never makes another in place of one that broke.
//
// It speaks memcached's text protocol (doc/protocol.txt of memcached 1.6), one request at a
// time per connection:
//
//	set KEY 0 0 BYTES\r\n DATA \r\n     STORED\r\n
//	get KEY\r\n                         VALUE KEY 0 BYTES\r\n DATA \r\n END\r\n, or END\r\n
//
// An item belongs to one connection, which so knows its version. A value is the item's number
// and version (little-endian, 8 bytes each) and random bytes, which follow from both and the
// seed.
package memclient

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Options say what a client does. All but Addr may be left out.
type Options struct {
	Addr string // of memcached, with port
	// Dial makes a connection; default in this process's own network.
	Dial  func(ctx context.Context, network, addr string) (net.Conn, error)
	Conns int // default 4
	Items int // of all connections together; default 2000
	Bytes int // of a value, 16 to MaxBytes; default 4096
	// Writes is the share of requests that write, up to 1; default 0.1, negative is none.
	Writes float64
	Rate   float64 // requests per second of all connections; default as many as are answered
	Seed   uint64
}

// MaxBytes is the longest value, in bytes; memcached's own limit is some bytes more.
const MaxBytes = 1<<20 - 1024

func (o *Options) fill() error {
	if o.Dial == nil {
		o.Dial = new(net.Dialer).DialContext
	}
	if o.Conns == 0 {
		o.Conns = 4
	}
	if o.Items == 0 {
		o.Items = 2000
	}
	if o.Bytes == 0 {
		o.Bytes = 4096
	}
	if o.Writes == 0 {
		o.Writes = 0.1
	}
	if o.Conns < 1 || o.Items < o.Conns || o.Bytes < 16 || o.Bytes > MaxBytes || o.Rate < 0 {
		return fmt.Errorf("client of memcached: want at least one connection, an item for each, values of 16 to %d bytes, and a rate: %d connections, %d items, %d bytes, %v per second",
			MaxBytes, o.Conns, o.Items, o.Bytes, o.Rate)
	}
	return nil
}

// Client is at work from Start to Stop. Methods may be called from any goroutine.
type Client struct {
	opts  Options
	begun time.Time
	ctx   context.Context // done when told to stop
	stop  context.CancelFunc
	all   sync.WaitGroup

	mu       sync.Mutex // guards all that follows
	stats    Stats      // without what Stats computes
	last     time.Time  // when the last reply came
	ended    time.Time  // when it was told to stop
	requests []request  // the youngest, in order of their replies
}

type request struct{ replied, took time.Duration } // the first since begun

// maxRequests bounds what is kept of requests; when they are too many, the older half goes.
const maxRequests = 4 << 20

// Stats are what a client saw since Start. A client all of whose connections work and
// whose values are all right has Wrong and Broken 0.
type Stats struct {
	Requests uint64 // answered
	Wrong    uint64 // values that were not as last written, or gone
	Broken   int    // connections that did not last, or got an answer that is none
	// Silence is the longest time in which no reply came, the one that lasts still
	// included. Pauses that Options.Rate makes count.
	Silence      time.Duration
	SilenceBegan time.Time
	Errors       []error // the first of wrong values and broken connections, at most 20
}

const maxErrors = 20

// Start connects, writes all items, and begins to read and write them at random. It tries
// until ctx ends to connect, for a guest may have its address before its memcached. A context
// that ends later changes nothing.
func Start(ctx context.Context, o Options) (*Client, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	c := &Client{opts: o}
	conns := make([]*conn, o.Conns)
	errs := make([]error, o.Conns)
	var all sync.WaitGroup
	for i := range conns {
		all.Go(func() { conns[i], errs[i] = c.connect(ctx, i) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		for _, k := range conns {
			if k != nil {
				k.Close()
			}
		}
		return nil, fmt.Errorf("memcached at %s: %w", o.Addr, err)
	}
	c.ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	c.begun = time.Now()
	c.last = c.begun
	for _, k := range conns {
		c.all.Go(func() { c.work(k) })
	}
	return c, nil
}

// Stop ends the work and closes the connections. It returns what Stats does from then on.
func (c *Client) Stop() Stats {
	c.mu.Lock()
	if c.ended.IsZero() {
		c.ended = time.Now()
	}
	c.mu.Unlock()
	c.stop()
	c.all.Wait()
	return c.Stats()
}

// Stats returns what was seen so far.
func (c *Client) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.ended
	if now.IsZero() {
		now = time.Now()
	}
	s := c.stats
	s.Errors = slices.Clone(s.Errors)
	s.silent(c.last, now)
	return s
}

func (s *Stats) silent(from, to time.Time) {
	if d := to.Sub(from); d > s.Silence {
		s.Silence, s.SilenceBegan = d, from
	}
}

// Latencies returns how long the requests took that were answered after one time, up to
// another, in no order. Of a client that has worked for long the oldest may be forgotten.
func (c *Client) Latencies(from, to time.Time) []time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	var took []time.Duration
	for _, r := range c.requests {
		if r.replied > from.Sub(c.begun) && r.replied <= to.Sub(c.begun) {
			took = append(took, r.took)
		}
	}
	return took
}

// replied takes note of an answered request; wrong tells what was wrong with its value.
func (c *Client) replied(asked time.Time, wrong error) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended.IsZero() {
		return
	}
	c.stats.silent(c.last, now)
	c.last = now
	c.stats.Requests++
	if len(c.requests) == maxRequests {
		c.requests = slices.Delete(c.requests, 0, maxRequests/2)
	}
	c.requests = append(c.requests, request{now.Sub(c.begun), now.Sub(asked)})
	if wrong != nil {
		c.stats.Wrong++
		c.stats.note(wrong)
	}
}

func (c *Client) broke(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended.IsZero() {
		c.stats.Broken++
		c.stats.note(err)
	}
}

func (s *Stats) note(err error) {
	if len(s.Errors) < maxErrors {
		s.Errors = append(s.Errors, fmt.Errorf("%s: %w", time.Now().Format("15:04:05.000"), err))
	}
}

// conn is a connection with its items: number, number+step and so on.
type conn struct {
	net.Conn
	in       *bufio.Reader
	number   int
	step     int
	seed     uint64
	versions []uint64 // of the items as last written
	out      []byte
	want     []byte
	got      []byte
}

// connect returns a connection whose items are all written.
func (c *Client) connect(ctx context.Context, number int) (*conn, error) {
	var raw net.Conn
	for raw == nil {
		short, cancel := context.WithTimeout(ctx, 3*time.Second) // a guest may come up late
		r, err := c.opts.Dial(short, "tcp", c.opts.Addr)
		cancel()
		if err == nil {
			raw = r
			break
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
	k := &conn{
		Conn: raw, in: bufio.NewReader(raw), number: number, step: c.opts.Conns, seed: c.opts.Seed,
		versions: make([]uint64, (c.opts.Items-number+c.opts.Conns-1)/c.opts.Conns),
		want:     make([]byte, c.opts.Bytes), got: make([]byte, MaxBytes),
	}
	defer context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })()
	for i := range k.versions {
		if err := k.set(i); err != nil {
			raw.Close()
			return nil, errors.Join(err, ctx.Err())
		}
	}
	return k, nil
}

// work makes requests until told to stop, or until the connection breaks.
func (c *Client) work(k *conn) {
	defer k.Close()
	defer context.AfterFunc(c.ctx, func() { k.Close() })()
	random := rand.New(rand.NewPCG(c.opts.Seed, uint64(k.number)))
	var pause time.Duration
	if c.opts.Rate > 0 {
		pause = time.Duration(float64(c.opts.Conns) / c.opts.Rate * float64(time.Second))
	}
	// Not all at once.
	next := time.Now().Add(pause * time.Duration(k.number) / time.Duration(c.opts.Conns))
	for {
		if pause > 0 {
			select {
			case <-time.After(time.Until(next)):
			case <-c.ctx.Done():
				return
			}
			next = next.Add(pause)
			if now := time.Now(); next.Before(now) { // what silence cost is not made up for
				next = now
			}
		}
		i := random.IntN(len(k.versions))
		asked := time.Now()
		var wrong, err error
		if random.Float64() < c.opts.Writes {
			k.versions[i]++
			err = k.set(i)
		} else {
			wrong, err = k.get(i)
		}
		if err != nil {
			c.broke(fmt.Errorf("connection %d, %s: %w", k.number, k.LocalAddr(), err))
			return
		}
		c.replied(asked, wrong)
	}
}

func (k *conn) item(i int) int { return k.number + i*k.step }

func key(item int) string { return "item-" + strconv.Itoa(item) }

// set writes an item in its version.
func (k *conn) set(i int) error {
	item := k.item(i)
	value(k.want, k.seed, uint64(item), k.versions[i])
	k.out = fmt.Appendf(k.out[:0], "set %s 0 0 %d\r\n", key(item), len(k.want))
	k.out = append(append(k.out, k.want...), "\r\n"...)
	if _, err := k.Write(k.out); err != nil {
		return err
	}
	line, err := readLine(k.in)
	if err == nil && line != "STORED" {
		err = fmt.Errorf("set %s: memcached said %.100q", key(item), line)
	}
	return err
}

// get reads an item; wrong tells what is wrong with its value.
func (k *conn) get(i int) (wrong, err error) {
	item := k.item(i)
	k.out = fmt.Appendf(k.out[:0], "get %s\r\n", key(item))
	if _, err := k.Write(k.out); err != nil {
		return nil, err
	}
	got, err := readValue(k.in, key(item), k.got)
	if err != nil {
		return nil, err
	}
	value(k.want, k.seed, uint64(item), k.versions[i])
	if got == nil {
		return fmt.Errorf("item %d, version %d: gone", item, k.versions[i]), nil
	}
	if bytes.Equal(got, k.want) {
		return nil, nil
	}
	if len(got) != len(k.want) {
		return fmt.Errorf("item %d, version %d: %d bytes, not %d", item, k.versions[i], len(got), len(k.want)), nil
	}
	at := 0
	for got[at] == k.want[at] {
		at++
	}
	return fmt.Errorf("item %d, version %d: wrong from byte %d of %d on; it says item %d, version %d", item, k.versions[i], at, len(got),
		binary.LittleEndian.Uint64(got), binary.LittleEndian.Uint64(got[8:])), nil
}

// value makes the value of an item in a version.
func value(b []byte, seed, item, version uint64) {
	binary.LittleEndian.PutUint64(b, item)
	binary.LittleEndian.PutUint64(b[8:], version)
	random := rand.NewPCG(seed^item<<32, version)
	for b = b[16:]; len(b) >= 8; b = b[8:] {
		binary.LittleEndian.PutUint64(b, random.Uint64())
	}
	for i := range b {
		b[i] = byte(random.Uint64())
	}
}

// readLine reads a line of the protocol, of at most the reader's size.
func readLine(in *bufio.Reader) (string, error) {
	line, err := in.ReadSlice('\n')
	if err != nil {
		if err == io.EOF && len(line) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return "", fmt.Errorf("read memcached's answer: %w", err)
	}
	text, ok := strings.CutSuffix(string(line), "\r\n")
	if !ok {
		return "", fmt.Errorf("memcached said %.100q: no line of its protocol", line)
	}
	return text, nil
}

// readValue reads the answer to "get" of one key into buf, whose length bounds what it takes.
// It returns nil if there is no such item.
func readValue(in *bufio.Reader, key string, buf []byte) ([]byte, error) {
	line, err := readLine(in)
	if err != nil {
		return nil, err
	}
	if line == "END" {
		return nil, nil
	}
	length, ok := strings.CutPrefix(line, "VALUE "+key+" 0 ")
	n, err := strconv.ParseUint(length, 10, 31)
	if !ok || err != nil || n > uint64(len(buf)) {
		return nil, fmt.Errorf("get %s: memcached said %.100q", key, line)
	}
	if _, err := io.ReadFull(in, buf[:n]); err != nil {
		return nil, fmt.Errorf("read value of %s: %w", key, err)
	}
	for _, want := range []string{"", "END"} {
		line, err := readLine(in)
		if err != nil {
			return nil, err
		}
		if line != want {
			return nil, fmt.Errorf("get %s: memcached said %.100q after the value", key, line)
		}
	}
	return buf[:n], nil
}
