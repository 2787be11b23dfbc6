package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"vacate/internal/host"
	"vacate/internal/host/hypervisor"
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

// The help names every setting.
func TestHelpNamesSettings(t *testing.T) {
	help := command().Long
	var look func(of reflect.Type)
	look = func(of reflect.Type) {
		for of.Kind() == reflect.Pointer || of.Kind() == reflect.Map {
			of = of.Elem()
		}
		if of.Kind() != reflect.Struct {
			return
		}
		for f := range of.Fields() {
			name, tagged := f.Tag.Lookup("toml")
			if !tagged {
				continue
			}
			if !regexp.MustCompile(`(?m)^  ?\[?` + name + `(\.\w+)?\]? `).MatchString(help) {
				t.Errorf("nothing says what %s is", name)
			}
			look(f.Type)
		}
	}
	look(reflect.TypeFor[host.Config]())
	dir := t.TempDir()
	write(t, filepath.Join(dir, "web1.toml"), "no-key = 1\n")
	_, err := hypervisor.Find(dir, "web1")
	_, keys, found := strings.Cut(fmt.Sprint(err), "there are ")
	if !found {
		t.Fatal(err)
	}
	for key := range strings.FieldsSeq(strings.NewReplacer(",", "", " and ", " ").Replace(keys)) {
		if !regexp.MustCompile(`(?m)^  ` + key + ` +=`).MatchString(help) {
			t.Errorf("nothing says what %s of a VM is", key)
		}
	}
}
