package lab

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"
)

// startEcho says back what it hears, to its end.
func startEcho(t *testing.T) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	return ln.Addr().String()
}

func startRelay(t *testing.T, delay time.Duration) *Relay {
	t.Helper()
	to := startEcho(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := NewRelay(ln, func() (net.Conn, error) { return net.Dial("tcp", to) }, delay)
	t.Cleanup(r.Close)
	return r
}

func dialRelay(t *testing.T, r *Relay) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", r.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Bytes come whole and in order, the end behind them, and no byte before its time.
func TestRelayDelays(t *testing.T) {
	const each = 30 * time.Millisecond
	r := startRelay(t, each)
	c := dialRelay(t, r)
	begun := time.Now()
	sent := make([]byte, 8<<20)
	rand.Read(sent)
	go func() {
		c.Write(sent)
		c.(*net.TCPConn).CloseWrite()
	}()
	var got bytes.Buffer
	first := make([]byte, 1)
	if _, err := io.ReadFull(c, first); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took < 2*each {
		t.Errorf("the first byte was back after %v", took)
	}
	got.Write(first)
	if _, err := io.Copy(&got, c); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), sent) {
		t.Errorf("%d bytes came back of %d, or others", got.Len(), len(sent))
	}
}

// Messages do not wait for the answers to those before them.
func TestRelayPipelines(t *testing.T) {
	const each, messages = 50 * time.Millisecond, 400
	r := startRelay(t, each)
	c := dialRelay(t, r)
	begun := time.Now()
	go func() {
		for range messages {
			c.Write([]byte("x"))
		}
	}()
	if _, err := io.ReadFull(c, make([]byte, messages)); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > messages*2*each/4 {
		t.Errorf("%d messages took %v: one waits for another", messages, took)
	}
}

func TestRelayCut(t *testing.T) {
	r := startRelay(t, 0)
	c := dialRelay(t, r)
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	r.Cut()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection that was cut goes on")
	}
	if _, err := dialRelay(t, r).Read(make([]byte, 1)); !errors.Is(err, io.EOF) &&
		!errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a new one is let in: %v", err)
	}
	r.Mend()
	c = dialRelay(t, r)
	if _, err := c.Write([]byte("y")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Error(err)
	}
}
