package certs

import (
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// authority makes a CA and a host's directory by it.
func authority(t testing.TB, name string) (ca, host string) {
	t.Helper()
	ca, host = t.TempDir(), t.TempDir()
	if err := Init(ca); err != nil {
		t.Fatal(err)
	}
	if err := Issue(ca, name, host, 30, false); err != nil {
		t.Fatal(err)
	}
	return ca, host
}

func load(t testing.TB, dir string) *Identity {
	t.Helper()
	i, err := Load(dir, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// meet has two hosts shake hands; it returns what each side thinks of it.
func meet(t testing.TB, client, server *tls.Config) (clientName string,
	clientErr, serverErr error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	s := tls.Server(b, server)
	done := make(chan error, 1)
	go func() {
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte{1})
		}
		b.(*net.TCPConn).CloseWrite()
		done <- err
	}()
	c := tls.Client(a, client)
	if clientErr = c.Handshake(); clientErr == nil {
		_, clientErr = c.Read(make([]byte, 1))
	}
	a.Close()
	if serverErr = <-done; serverErr == nil {
		clientName, serverErr = NameOf(s.ConnectionState().PeerCertificates[0])
	}
	return clientName, clientErr, serverErr
}

func TestIssue(t *testing.T) {
	ca, a := authority(t, "hosta")
	for _, name := range []string{"hostb", "b.example.org", "10.0.0.2", "fd00::2"} {
		b := t.TempDir()
		if err := Issue(ca, name, b, 30, false); err != nil {
			t.Fatal(err)
		}
		info, err := Inspect(b)
		days := time.Until(info.NotAfter).Hours() / 24
		if err != nil || info.Name != name || days < 29 || days > 31 || len(info.CA) != 64 {
			t.Errorf("%s: %+v, %v", name, info, err)
		}
		if fi, err := os.Stat(filepath.Join(b, keyFile)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: the key's mode: %v, %v", name, fi.Mode(), err)
		}
		who, clientErr, serverErr := meet(t, load(t, a).Client(name), load(t, b).Server())
		if clientErr != nil || serverErr != nil || who != "hosta" {
			t.Errorf("hosta and %s: %v, %v, %q", name, clientErr, serverErr, who)
		}
		if _, clientErr, _ = meet(t, load(t, a).Client("other"),
			load(t, b).Server()); clientErr == nil {
			t.Errorf("%s passes for another host", name)
		}
	}
}

func TestStrangers(t *testing.T) {
	_, a := authority(t, "hosta")
	_, b := authority(t, "hostb")
	_, clientErr, serverErr := meet(t, load(t, a).Client("hostb"), load(t, b).Server())
	if clientErr == nil || serverErr == nil {
		t.Errorf("hosts of two CAs: %v, %v", clientErr, serverErr)
	}
	trusting := load(t, a).Client("hostb")
	trusting.VerifyConnection = nil
	if _, clientErr, serverErr = meet(t, trusting, load(t, b).Server()); clientErr == nil ||
		serverErr == nil {
		t.Errorf("a client of another CA: %v, %v", clientErr, serverErr)
	}
	trusting.GetClientCertificate = nil
	if _, clientErr, serverErr = meet(t, trusting, load(t, b).Server()); clientErr == nil ||
		serverErr == nil {
		t.Errorf("a client without a certificate: %v, %v", clientErr, serverErr)
	}
}

// Each handshake takes the files as they are; bad ones are told of, once, and not taken.
func TestReload(t *testing.T) {
	ca, a := authority(t, "hosta")
	b := t.TempDir()
	if err := Issue(ca, "hostb", b, 30, false); err != nil {
		t.Fatal(err)
	}
	var problems []error
	server, err := Load(b, func(err error) { problems = append(problems, err) })
	if err != nil {
		t.Fatal(err)
	}
	client, serverConfig := load(t, a).Client("hostb"), server.Server()
	works := func(what string) {
		t.Helper()
		if _, clientErr, serverErr := meet(t, client, serverConfig); clientErr != nil ||
			serverErr != nil {
			t.Fatalf("%s: %v, %v", what, clientErr, serverErr)
		}
	}
	works("at first")
	before := server.Info().NotAfter
	if err := Issue(ca, "hostb", b, 60, true); err != nil {
		t.Fatal(err)
	}
	works("renewed")
	if after := server.Info().NotAfter; !after.After(before) {
		t.Errorf("it still has the certificate that ends at %v", after)
	}

	key, err := os.ReadFile(filepath.Join(b, keyFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b, keyFile), []byte("half a ke"), 0o600); err != nil {
		t.Fatal(err)
	}
	works("with a bad key")
	works("with a bad key, again")
	if len(problems) != 1 || !strings.Contains(problems[0].Error(), "stay in use") {
		t.Errorf("problems: %v", problems)
	}
	if err := os.WriteFile(filepath.Join(b, keyFile), key, 0o600); err != nil {
		t.Fatal(err)
	}

	// From one CA to the next: first both are believed, then the certificates change.
	next := t.TempDir()
	if err := Init(next); err != nil {
		t.Fatal(err)
	}
	both := slices.Concat(contents(t, ca), contents(t, next))
	for _, dir := range []string{a, b} {
		if err := os.WriteFile(filepath.Join(dir, caFile), both, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	works("with two CAs")
	if err := Issue(next, "hostb", b, 30, true); err != nil {
		t.Fatal(err)
	}
	works("hostb by the next CA")
	if err := Issue(next, "hosta", a, 30, true); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{a, b} {
		if err := os.WriteFile(filepath.Join(dir, caFile), contents(t, next), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	works("all by the next CA")
	if len(problems) != 1 {
		t.Errorf("problems: %v", problems)
	}
	old := t.TempDir()
	if err := Issue(ca, "hostc", old, 30, false); err != nil {
		t.Fatal(err)
	}
	trusting := load(t, old).Client("hostb")
	trusting.VerifyConnection = nil
	if _, _, serverErr := meet(t, trusting, serverConfig); serverErr == nil {
		t.Error("the CA of before is still believed")
	}
}

func contents(t testing.TB, ca string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(ca, caFile))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// special makes a host's directory with a certificate such as Issue never makes one.
func special(t testing.TB, change func(*x509.Certificate)) string {
	t.Helper()
	ca, dir := authority(t, "hosta")
	pair, err := tls.LoadX509KeyPair(filepath.Join(ca, caFile), filepath.Join(ca, caKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "hosta"},
		DNSNames:  []string{"hosta"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	change(c)
	der, err := x509.CreateCertificate(nil, c, pair.Leaf, key.Public(), pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeKey(filepath.Join(dir, keyFile), key, true); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(filepath.Join(dir, certFile), encode(der), 0o644, true); err != nil {
		t.Fatal(err)
	}
	return dir
}

// What cannot be used is refused, saying what to do.
func TestLoadRefuses(t *testing.T) {
	with := func(file, text string) string {
		_, dir := authority(t, "hosta")
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	_, open := authority(t, "hosta")
	if err := os.Chmod(filepath.Join(open, keyFile), 0o640); err != nil {
		t.Fatal(err)
	}
	_, mixed := authority(t, "hosta")
	other, _ := authority(t, "hosta")
	if err := os.WriteFile(filepath.Join(mixed, caFile), contents(t, other), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ dir, says string }{
		"nothing":  {t.TempDir(), "ca.pem: no such file or directory: `vacate certs --help`"},
		"open key": {open, "(mode 0640): run `chmod 600 "},
		"no PEM":   {with(certFile, "garbage"), "there is no certificate in it"},
		"key for cert": {with(caFile, string(must(os.ReadFile(filepath.Join(open, keyFile))))),
			"where only certificates belong"},
		"cut cert": {with(certFile,
			"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), "host.pem: x509"},
		"bad key": {with(keyFile, "garbage"), "host.key: tls: failed to find any PEM data"},
		"other key": {with(keyFile, string(must(os.ReadFile(filepath.Join(open, keyFile))))),
			"private key does not match"},
		"no CA": {with(caFile, string(must(os.ReadFile(filepath.Join(open, certFile))))),
			"is not a CA's"},
		"huge": {with(certFile, strings.Repeat("x", maxFile+1)),
			"more than 1048576 bytes"},
		"other CA": {mixed, "did not issue it"},
		"expired": {special(t,
			func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
			"renew it with `vacate certs issue --renew --name hosta --dir CA --out "},
		"not yet valid": {special(t,
			func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
			"is not valid before "},
		"no name": {special(t, func(c *x509.Certificate) { c.DNSNames = nil }),
			"no DNS name or IP address"},
		"wildcard": {special(t,
			func(c *x509.Certificate) { c.DNSNames = []string{"*.example.org"} }),
			"is no name for a host"},
		"clients only": {special(t,
			func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }),
			"incompatible key usage"},
		"servers only": {special(t,
			func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }),
			"incompatible key usage"},
	} {
		if _, err := Load(c.dir, nil); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v; want %q", name, err, c.says)
		}
		if _, err := Inspect(c.dir); err == nil {
			t.Errorf("%s: Inspect finds nothing wrong", name)
		}
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestNames(t *testing.T) {
	for _, name := range []string{"", ".", "a.", ".a", "a..b", "A", "a b", "a\n", "*", "-a", "a-",
		"ü", "fe80::1%eth0", "::ffff:0:1/3", strings.Repeat("a", 64), strings.Repeat("a.", 127)} {
		if checkName(name) == nil {
			t.Errorf("%q is a name", name)
		}
	}
	for _, name := range []string{"a", "host-1", "a_b.example.org", "10.0.0.1", "::1",
		strings.Repeat("a", 63)} {
		if err := checkName(name); err != nil {
			t.Error(err)
		}
	}
}

// Whatever is in a file of certificates, what is read from it are certificates with a fit name, or
// it is refused.
func FuzzCerts(f *testing.F) {
	_, dir := authority(f, "hosta")
	for _, name := range []string{caFile, certFile, keyFile} {
		f.Add(must(os.ReadFile(filepath.Join(dir, name))))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseCerts(b)
		if (err == nil) != (len(all) > 0) {
			t.Fatalf("%d certificates, %v", len(all), err)
		}
		for _, c := range all {
			if name, err := NameOf(c); err == nil && checkName(name) != nil {
				t.Fatalf("name %q", name)
			}
		}
	})
}
