package host

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A daemon that cannot take a connection for a moment, as it is out of descriptors, say, takes the
// next one. It closes that one here, as there is no libvirt to ask.
func TestCarryAcceptsAgain(t *testing.T) {
	h, _ := measured(t)
	var log words
	h.log = slog.New(slog.NewTextHandler(&log, nil))
	h.config.Libvirt = &Libvirt{URI: filepath.Join(t.TempDir(), "none"), Migrations: t.TempDir()}
	h.config.Peers = map[string]Peer{"hostb": {Address: "127.0.0.1:1"}}
	h.lines = map[int]*line{}
	if err := h.listenCarry(); err != nil {
		t.Fatal(err)
	}
	ln := h.carries[0].UnixListener
	if err := ln.SetDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	defer h.serveCarries()()
	until(t, "it cannot take a connection", func() bool {
		return strings.Contains(log.String(), "cannot take a connection")
	})
	if err := ln.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nobody takes the connection: %v", err)
	}
}

// What a stream begins with says whether it can be carried, and if not, what to leave out.
func TestKnownStream(t *testing.T) {
	for _, c := range []struct {
		first [4]byte
		want  string
	}{
		{[4]byte{'Q', 'E', 'V', 'M'}, ""},
		{[4]byte{0x16, 3, 1, 2}, "leave --tls out"},
		{several, "begins with"}, // it is dropped, as the first one is refused
		{resumes, "begins with"}, // it is relayed
		{[4]byte{'G', 'E', 'T', ' '}, "begins with 47 45 54 20"},
	} {
		err := known(c.first)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("% x: %v, want %q", c.first, err, c.want)
		}
	}
}
