package process

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

// A process is found by a connection that it has, and by a socket on which it listens.
func TestConnected(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	self, err := Find(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if is, err := self.Connected(path); is || err != nil {
		t.Errorf("before: %t, %v", is, err)
	}
	if is, err := self.Listens("a"); !is || err != nil {
		t.Errorf("listens: %t, %v", is, err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if is, err := self.Connected(path); !is || err != nil {
		t.Errorf("connected: %t, %v", is, err)
	}
	if is, err := self.Connected(path + "b"); is || err != nil {
		t.Errorf("connected elsewhere: %t, %v", is, err)
	}
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	ln.Close()
	if is, err := self.Listens("a"); is || err != nil {
		t.Errorf("listens with a connection alone: %t, %v", is, err)
	}
	conn.Close()
	if is, err := self.Connected(path); is || err != nil {
		t.Errorf("after: %t, %v", is, err)
	}
}
