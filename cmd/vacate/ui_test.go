package main

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
)

// quiet is a daemon of a host on which nothing happens.
type quiet struct {
	hostv1.UnimplementedHostHandler
}

func (quiet) Status(context.Context,
	*connect.Request[hostv1.StatusRequest]) (*connect.Response[hostv1.StatusResponse], error) {
	return connect.NewResponse(&hostv1.StatusResponse{Host: "hosta",
		Peers: []*hostv1.Peer{{Name: "hostb", Address: "hostb:7601"}}}), nil
}

func (quiet) ListVMs(context.Context,
	*connect.Request[hostv1.ListVMsRequest]) (*connect.Response[hostv1.ListVMsResponse], error) {
	return connect.NewResponse(&hostv1.ListVMsResponse{
		Vms: []*hostv1.VM{{Name: "web1", State: "running"}}}), nil
}

func (quiet) Pressure(context.Context,
	*connect.Request[hostv1.PressureRequest]) (*connect.Response[hostv1.PressureResponse], error) {
	return connect.NewResponse(&hostv1.PressureResponse{Cpus: 2,
		Vms: []*hostv1.VMPressure{{Name: "web1", CpuCores: 0.5, Steal: 0.25}}}), nil
}

func (quiet) ListEvictions(context.Context,
	*connect.Request[hostv1.ListEvictionsRequest]) (
	*connect.Response[hostv1.ListEvictionsResponse], error) {
	return connect.NewResponse(&hostv1.ListEvictionsResponse{}), nil
}

// quietSocket serves a quiet daemon, and returns its socket.
func quietSocket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vacate") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(hostv1.NewHostHandler(quiet{}))
	server := &http.Server{Handler: mux}
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(ln) })
	t.Cleanup(func() {
		server.Close()
		serving.Wait()
		os.RemoveAll(dir)
	})
	return socket
}

// `vacate ui` prints an address that opens a page, whose stream tells what the daemon says.
func TestUI(t *testing.T) {
	r, w := io.Pipe()
	ctx, stop := context.WithCancel(t.Context())
	c := rootCommand()
	c.SetArgs([]string{"ui", "--socket", quietSocket(t), "--operator-certs", t.TempDir()})
	c.SetOut(w)
	ended := make(chan error, 1)
	go func() { ended <- c.ExecuteContext(ctx) }()
	lines := bufio.NewScanner(r)
	if !lines.Scan() {
		t.Fatal("it prints nothing")
	}
	address, token, ok := strings.Cut(lines.Text(), "/#token=")
	if !ok || !strings.HasPrefix(address, "http://127.0.0.1:") {
		t.Fatalf("it prints %q", lines.Text())
	}
	go io.Copy(io.Discard, r)
	ask := func(method, path, body string, h http.Header) *http.Response {
		q, err := http.NewRequestWithContext(ctx, method, address+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		q.Header = h
		a, err := http.DefaultClient.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		if a.StatusCode != http.StatusOK {
			b, _ := io.ReadAll(a.Body)
			t.Fatalf("%s: %s %s", path, a.Status, b)
		}
		return a
	}
	login := ask("POST", "/api/login", `{"token": "`+token+`"}`,
		http.Header{"Origin": {address}})
	var got struct{ Key string }
	if err := json.NewDecoder(login.Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	login.Body.Close()
	stream := ask("GET", "/api/stream", "", http.Header{"X-Vacate-Key": {got.Key},
		"Cookie": {strings.Split(login.Header.Get("Set-Cookie"), ";")[0]}})
	defer stream.Body.Close()
	said := bufio.NewReader(stream.Body)
	for {
		line, err := said.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line, `"steal":0.25`) && strings.Contains(line, `"name":"web1"`) &&
			strings.Contains(line, `"peers":["hostb"]`) {
			break
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// Without a daemon, and without a certificate for others, it says what is missing.
func TestUIRefused(t *testing.T) {
	for want, args := range map[string][]string{
		"no daemon answers":               {"--socket", filepath.Join(t.TempDir(), "none")},
		"needs an operator's certificate": {"--host", "hosta", "--operator-certs", t.TempDir()},
	} {
		c := rootCommand()
		c.SetArgs(append([]string{"ui"}, args...))
		err := c.ExecuteContext(t.Context())
		if exitCode(err) != exitRefused || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: exit code %d", err, exitCode(err))
		}
	}
}
