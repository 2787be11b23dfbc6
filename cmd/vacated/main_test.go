package main

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"

	"vacate/internal/host"
)

// A daemon that systemd starts says that it serves, and then others can connect.
func TestReady(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "vacated.toml")
	socket := filepath.Join(dir, "sock")
	write(t, file, `plain = true
name = "hosta"
socket = "`+socket+`"
journal = "`+filepath.Join(dir, "journal")+`"
vms = "`+dir+`"
`)
	config, err := host.ReadConfig(file)
	if err != nil {
		t.Fatal(err)
	}
	notify := filepath.Join(dir, "notify")
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	t.Setenv("NOTIFY_SOCKET", notify)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		err := run(ctx, config, "text")
		systemd.Close()
		ended <- err
	}()
	b := make([]byte, 100)
	n, err := systemd.Read(b)
	if err != nil {
		t.Fatalf("the daemon ended without a word to systemd: %v", errors.Join(err, <-ended))
	}
	if got := string(b[:n]); got != "READY=1" {
		t.Errorf("systemd heard %q", got)
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Errorf("a daemon that is ready: %v", err)
	} else {
		conn.Close()
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
