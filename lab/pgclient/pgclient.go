// Package pgclient is a client of the lab's PostgreSQL that notices what users of a guest would
// notice while it moves: wrong answers, broken connections, silence. It knows what every row should
// be, keeps its connections, and never makes another in place of one that broke.
//
// It works on a table items of rows id (from 1 on), version (0 at first) and value, which follows
// from both (see Value). Each transaction reads one row, and some write it with its next version.
// Rows are picked by Zipf's law, those with small numbers the most often, as the youngest of what
// people write are read the most.
package pgclient

import (
	"cmp"
	"context"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"

	"vacate/lab/latency"

	"github.com/jackc/pgx/v5"
)

// Options say what a client does. All but Addr and Rows may be left out.
type Options struct {
	Addr string // of PostgreSQL, with port; database vacate, user postgres
	// Dial makes a connection; default in this process's own network.
	Dial  func(ctx context.Context, network, addr string) (net.Conn, error)
	Conns int // default 4
	Rows  int // of the table
	// Writes is the share of transactions that write, up to 1; default 0.1, negative is none.
	Writes float64
	Skew   float64 // of Zipf's law, more than 1; default 1.1
	Seed   uint64
}

// Client is at work from Start to Stop. Methods may be called from any goroutine.
type Client struct {
	*latency.Log
	latency.Pace
	opts Options
	ctx  context.Context
	stop context.CancelFunc
	all  sync.WaitGroup
}

// Start connects and reads the whole table once, so that it is in the guest's memory; then it
// begins its transactions. It tries until ctx ends to connect. A context that ends later changes
// nothing.
func Start(ctx context.Context, o Options) (*Client, error) {
	if o.Dial == nil {
		o.Dial = new(net.Dialer).DialContext
	}
	o.Conns = cmp.Or(o.Conns, 4)
	o.Writes = cmp.Or(o.Writes, 0.1)
	o.Skew = cmp.Or(o.Skew, 1.1)
	if o.Conns < 1 || o.Rows < o.Conns || !(o.Skew > 1) {
		return nil,
			fmt.Errorf("client of PostgreSQL: want at least one connection, a row for each, and "+
				"a skew of more than 1: %d connections, %d rows, skew %v", o.Conns, o.Rows, o.Skew)
	}
	c := &Client{opts: o}
	conns := make([]*pgx.Conn, 0, o.Conns)
	fail := func(err error) (*Client, error) {
		for _, k := range conns {
			k.Close(context.WithoutCancel(ctx))
		}
		return nil, fmt.Errorf("PostgreSQL at %s: %w", o.Addr, err)
	}
	for len(conns) < o.Conns {
		k, err := c.connect(ctx)
		if err != nil {
			return fail(err)
		}
		conns = append(conns, k)
	}
	var rows, bytes int
	if err := conns[0].QueryRow(ctx, "select count(*), sum(length(value)) from items").Scan(&rows,
		&bytes); err != nil {
		return fail(err)
	}
	if rows != o.Rows {
		return fail(fmt.Errorf("the table has %d rows, not %d", rows, o.Rows))
	}
	c.ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	c.Log = latency.New()
	for i, k := range conns {
		c.all.Go(func() { c.work(i, k) })
	}
	return c, nil
}

// connect makes a connection. A guest may have its address before its server.
func (c *Client) connect(ctx context.Context) (*pgx.Conn, error) {
	config, err := pgx.ParseConfig(fmt.Sprintf("postgres://postgres@%s/vacate?sslmode=disable",
		c.opts.Addr))
	if err != nil {
		return nil, err
	}
	config.DialFunc = c.opts.Dial
	for {
		short, cancel := context.WithTimeout(ctx, 3*time.Second)
		k, err := pgx.ConnectConfig(short, config)
		cancel()
		if err == nil {
			return k, nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// Value is a row's value in a version.
func Value(id int, version int64) string {
	sum := md5.Sum(fmt.Appendf(nil, "%d-%d", id, version)) // #nosec G401 -- to tell values apart
	return strings.Repeat(hex.EncodeToString(sum[:]), 8)
}

// work makes transactions until told to stop, or until the connection breaks. Of every Conns rows
// one is this connection's.
func (c *Client) work(number int, k *pgx.Conn) {
	defer func() {
		k.Close(context.Background())
		<-k.PgConn().CleanupDone() // it asks the server to give up what is under way
	}()
	random := rand.New(rand.NewPCG(c.opts.Seed, uint64(number)))
	zipf := rand.NewZipf(random, c.opts.Skew, 1, uint64(c.opts.Rows/c.opts.Conns-1))
	versions := map[int]int64{}
	next := time.Now()
	for c.Pace.Wait(c.ctx, c.opts.Conns, &next) {
		id := 1 + number + c.opts.Conns*int(zipf.Uint64())
		asked := time.Now()
		var wrong, err error
		if random.Float64() < c.opts.Writes {
			versions[id]++
			_, err = k.Exec(c.ctx, "update items set version = $2, value = $3 where id = $1", id,
				versions[id], Value(id, versions[id]))
		} else {
			var version int64
			var value string
			err = k.QueryRow(c.ctx, "select version, value from items where id = $1",
				id).Scan(&version, &value)
			if err == nil && (version != versions[id] || value != Value(id, version)) {
				wrong = fmt.Errorf("row %d is version %d, not %d, with value %.20q", id, version,
					versions[id], value)
			}
		}
		if c.ctx.Err() != nil {
			return
		}
		if err != nil {
			c.Broke(fmt.Errorf("connection %d: %w", number, err))
			return
		}
		c.Note(asked, wrong)
	}
}

// Stop ends the work and closes the connections. It returns what Stats does from then on.
func (c *Client) Stop() latency.Stats {
	c.End()
	c.stop()
	c.all.Wait()
	return c.Stats()
}
