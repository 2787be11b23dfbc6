// Package memclient is a client of memcached, or Redis, that notices what users of a guest would
// notice while it moves: wrong answers, broken connections, silence. It knows what every value
// should be, keeps its connections, and never makes another in place of one that broke.
//
// It speaks memcached's text protocol (doc/protocol.txt of memcached 1.6), one request at a
// time per connection:
//
//	set KEY 0 0 BYTES\r\n DATA \r\n     STORED\r\n
//	get KEY\r\n                         VALUE KEY 0 BYTES\r\n DATA \r\n END\r\n, or END\r\n
//
// or Redis's, RESP (https://redis.io/docs/latest/develop/reference/protocol-spec):
//
//	SET KEY BYTES, as an array of 3 bulk strings     +OK\r\n
//	GET KEY\r\n                                      $BYTES\r\n DATA \r\n, or $-1\r\n
//
// An item belongs to one connection, which so knows its version. A value is the item's number
// and version (little-endian, 8 bytes each) and random bytes, which follow from both and the
// seed.
package memclient

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"vacate/lab/latency"
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
	Redis  bool // the server is Redis
}

// MaxBytes is the longest value, in bytes; memcached's own limit is some bytes more.
const MaxBytes = 1<<20 - 1024

func (o *Options) fill() error {
	if o.Dial == nil {
		o.Dial = new(net.Dialer).DialContext
	}
	o.Conns = cmp.Or(o.Conns, 4)
	o.Items = cmp.Or(o.Items, 2000)
	o.Bytes = cmp.Or(o.Bytes, 4096)
	o.Writes = cmp.Or(o.Writes, 0.1)
	if o.Conns < 1 || o.Items < o.Conns || o.Bytes < 16 || o.Bytes > MaxBytes || o.Rate < 0 {
		return fmt.Errorf("client of memcached: want at least one connection, an item for each, "+
			"values of 16 to %d bytes, and a rate: %d connections, %d items, %d bytes, %v per "+
			"second",
			MaxBytes, o.Conns, o.Items, o.Bytes, o.Rate)
	}
	return nil
}

// Client is at work from Start to Stop. Methods may be called from any goroutine.
type Client struct {
	opts Options
	ctx  context.Context // done when told to stop
	stop context.CancelFunc
	all  sync.WaitGroup

	*latency.Log
	latency.Pace
}

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
		return nil, fmt.Errorf("server at %s: %w", o.Addr, err)
	}
	c.ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	c.Log = latency.New()
	c.Pace.Set(c.opts.Rate)
	for _, k := range conns {
		c.all.Go(func() { c.work(k) })
	}
	return c, nil
}

// Stop ends the work and closes the connections. It returns what Stats does from then on.
func (c *Client) Stop() latency.Stats {
	c.End()
	c.stop()
	c.all.Wait()
	return c.Stats()
}

// conn is a connection with its items: number, number+step and so on.
type conn struct {
	net.Conn
	in       *bufio.Reader
	number   int
	step     int
	redis    bool
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
		Conn: raw, in: bufio.NewReader(raw), number: number, step: c.opts.Conns,
		redis: c.opts.Redis, seed: c.opts.Seed,
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
	next := time.Now()
	if c.opts.Rate > 0 { // not all at once
		next = next.Add(time.Duration(float64(k.number) / c.opts.Rate * float64(time.Second)))
	}
	for c.Pace.Wait(c.ctx, c.opts.Conns, &next) {
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
			c.Broke(fmt.Errorf("connection %d, %s: %w", k.number, k.LocalAddr(), err))
			return
		}
		c.Note(asked, wrong)
	}
}

func (k *conn) item(i int) int { return k.number + i*k.step }

func key(item int) string { return "item-" + strconv.Itoa(item) }

// set writes an item in its version.
func (k *conn) set(i int) error {
	item := k.item(i)
	value(k.want, k.seed, uint64(item), k.versions[i])
	ok := "STORED"
	k.out = fmt.Appendf(k.out[:0], "set %s 0 0 %d\r\n", key(item), len(k.want))
	if k.redis {
		ok = "+OK"
		k.out = fmt.Appendf(k.out[:0], "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n", len(key(item)),
			key(item), len(k.want))
	}
	k.out = append(append(k.out, k.want...), "\r\n"...)
	if _, err := k.Write(k.out); err != nil {
		return err
	}
	line, err := readLine(k.in)
	if err == nil && line != ok {
		err = fmt.Errorf("set %s: the server said %.100q", key(item), line)
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
	read := readValue
	if k.redis {
		read = readBulk
	}
	got, err := read(k.in, key(item), k.got)
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
		return fmt.Errorf("item %d, version %d: %d bytes, not %d", item, k.versions[i], len(got),
			len(k.want)), nil
	}
	at := 0
	for got[at] == k.want[at] {
		at++
	}
	return fmt.Errorf("item %d, version %d: wrong from byte %d of %d on; it says item %d, "+
		"version %d", item, k.versions[i], at, len(got),
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
		return "", fmt.Errorf("read the server's answer: %w", err)
	}
	text, ok := strings.CutSuffix(string(line), "\r\n")
	if !ok {
		return "", fmt.Errorf("the server said %.100q: no line of its protocol", line)
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
		return nil, fmt.Errorf("get %s: the server said %.100q", key, line)
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
			return nil, fmt.Errorf("get %s: the server said %.100q after the value", key, line)
		}
	}
	return buf[:n], nil
}

// readBulk is readValue for Redis.
func readBulk(in *bufio.Reader, key string, buf []byte) ([]byte, error) {
	line, err := readLine(in)
	if err != nil {
		return nil, err
	}
	if line == "$-1" {
		return nil, nil
	}
	length, ok := strings.CutPrefix(line, "$")
	n, err := strconv.ParseUint(length, 10, 31)
	if !ok || err != nil || n > uint64(len(buf)) {
		return nil, fmt.Errorf("get %s: the server said %.100q", key, line)
	}
	if _, err := io.ReadFull(in, buf[:n]); err != nil {
		return nil, fmt.Errorf("read value of %s: %w", key, err)
	}
	if line, err = readLine(in); err == nil && line != "" {
		err = fmt.Errorf("get %s: the server said %.100q after the value", key, line)
	}
	return buf[:n], err
}
