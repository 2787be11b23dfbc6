package lab

import (
	"bufio"
	"fmt"
	"net"
	"testing"
	"time"
)

// memcached in a guest is reached by the client, says what it is, and keeps what it is given.
func TestMemcached(t *testing.T) {
	l := newTestLab(t, Options{Rate: 1e9})
	vm, err := l.A.Boot(deadline(t, 3*time.Minute), Spec{Devices: Full, Tap: true, MemcachedMiB: 64, Load: Load{HotMiB: 4}})
	if err != nil {
		t.Fatal(err)
	}
	var conn net.Conn
	for ctx := deadline(t, time.Minute); conn == nil; {
		err := l.Client.Do(func() (err error) {
			conn, err = (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp4", vm.Memcached())
			return err
		})
		if ctx.Err() != nil {
			t.Fatal(vm.explain(err))
		}
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	in := bufio.NewReader(conn)
	for _, c := range []struct{ say, want string }{
		{"set k 0 0 5\r\nhello\r\n", "STORED\r\n"},
		{"get k\r\n", "VALUE k 0 5\r\n"},
		{"", "hello\r\n"},
		{"", "END\r\n"},
	} {
		if _, err := fmt.Fprint(conn, c.say); err != nil {
			t.Fatal(err)
		}
		if got, err := in.ReadString('\n'); err != nil || got != c.want {
			t.Fatalf("said %q, got %q, %v; want %q", c.say, got, err, c.want)
		}
	}
}
