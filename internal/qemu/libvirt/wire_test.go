package libvirt

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseURI(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	system := []string{"/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"}
	session := []string{"/run/user/7/libvirt/virtqemud-sock", "/run/user/7/libvirt/libvirt-sock"}
	for uri, want := range map[string]Address{
		"":                                 {system, "qemu:///system"},
		"qemu:///system":                   {system, "qemu:///system"},
		"qemu:///session":                  {session, "qemu:///session"},
		"/run/x":                           {[]string{"/run/x"}, "qemu:///system"},
		"qemu+unix:///session?socket=/r/x": {[]string{"/r/x"}, "qemu:///session"},
	} {
		a, err := ParseURI(uri)
		if err != nil || a.Driver != want.Driver || !slices.Equal(a.Sockets, want.Sockets) {
			t.Errorf("%q: %+v, %v", uri, a, err)
		}
	}
	for _, uri := range []string{
		"qemu+ssh://b/system", "qemu://b/system", "xen:///system", "x", "qemu:///",
	} {
		if a, err := ParseURI(uri); err == nil {
			t.Errorf("%q: %+v", uri, a)
		}
	}
}

func TestNoDaemon(t *testing.T) {
	if _, err := Dial(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, ErrNone) {
		t.Error(err)
	}
}

// A daemon that sends nonsense ends the connection and nothing else, and one that sends nothing
// does not hold up a call beyond its context.
func TestHostileDaemon(t *testing.T) {
	for name, bytes := range map[string]string{
		"nothing":     "",
		"short":       "\x00\x00\x00\x04",
		"long":        "\xff\xff\xff\xff",
		"not a reply": strings.Repeat("\x00\x00\x00\x1c", 7),
		"cut":         "\x00\x00\x01\x00abc",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "sock")
			ln, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				c.Read(make([]byte, 1))
				c.Write([]byte(bytes))
				if name == "cut" {
					c.Close()
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			if c, err := Dial(ctx, path); err == nil {
				t.Errorf("%+v", c)
			}
		})
	}
}

func monitorPayload(details string) []byte {
	b := []byte(
		"\x00\x00\x00\x01\x00\x00\x00\x04web1" + strings.Repeat("u", 16) + "\x00\x00\x00\x03" +
			"\x00\x00\x00\x06RESUME\x00\x00" +
			"\x00\x00\x00\x00\x00\x00\x00\x05" + "\x00\x00\x00\x07",
	)
	if details == "" {
		return append(b, 0, 0, 0, 0)
	}
	b = append(b, 0, 0, 0, 1)
	b = be.AppendUint32(b, uint32(len(details)))
	b = append(b, details...)
	return append(b, make([]byte, -len(details)&3)...)
}

func TestEvents(t *testing.T) {
	for _, details := range []string{"", `{"a": 1}`} {
		ev, err := parseMonitorEvent(monitorPayload(details))
		if err != nil || ev.QEMU != "RESUME" || ev.Name != "web1" || string(ev.Data) != details ||
			!ev.Time.Equal(time.Unix(5, 7000)) {
			t.Errorf("%+v, %v", ev, err)
		}
	}
	whole := monitorPayload(`{"a": 1}`)
	for n := range whole {
		if ev, err := parseMonitorEvent(whole[:n]); err == nil {
			t.Errorf("%d of %d bytes: %+v", n, len(whole), ev)
		}
	}
	if ev, err := parseMonitorEvent(monitorPayload("no JSON!")); err == nil {
		t.Errorf("%+v", ev)
	}
}

func FuzzEvents(f *testing.F) {
	f.Add(monitorPayload(""))
	f.Add(monitorPayload(`{"a": 1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		parseLifecycle(b)
		if ev, err := parseMonitorEvent(b); err == nil && ev.QEMU == "" {
			t.Errorf("%+v", ev)
		}
	})
}

func TestPlainCookie(t *testing.T) {
	const before = "<qemu-migration>\n  <name>a&amp;b</name>\n  <capabilities>\n" +
		"    <cap name='xbzrle' auto='no'/>\n"
	const after = "\n  </capabilities>\n</qemu-migration>\n\x00"
	cookie := before + "    <cap name='multifd' auto='no'/>" +
		"<cap name='postcopy-preempt' auto='yes'></cap>" +
		"<cap auto='yes' name='switchover-ack'/>" + after
	got, err := PlainCookie([]byte(cookie))
	if want := before + "    " + after; err != nil || string(got) != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	if again, err := PlainCookie(got); err != nil || !bytes.Equal(again, got) {
		t.Errorf("%q, %v", again, err)
	}
	for _, bad := range []string{"<a>", "<a></b>", "a<", strings.Repeat("x", maxCookie+1)} {
		if got, err := PlainCookie([]byte(bad)); err == nil {
			t.Errorf("%.50q became %.50q", bad, got)
		}
	}
}
