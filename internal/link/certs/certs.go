// Package certs is a host's identity on the link: a certificate with its name, its key, and the CA
// that it trusts. It has a small CA for sites without one.
//
// A host's directory has three files of PEM:
//
//	ca.pem    certificates of the CAs that are believed; of two while one takes over from another
//	host.pem  the host's certificate, then those between it and the CA, if any
//	host.key  its private key (PKCS #8, or as OpenSSL writes them), readable by its owner only
//
// The name is the certificate's first DNS name or, where there is none, IP address
// (RFC 5280, section 4.2.1.6); the common name counts for nothing. It must be good for both ends
// of TLS (serverAuth and clientAuth). The files may be replaced at any time: each handshake looks
// whether they changed.
package certs

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

// Names of the files.
const (
	caFile     = "ca.pem"
	caKeyFile  = "ca.key" // of the CA's own directory
	certFile   = "host.pem"
	keyFile    = "host.key"
	maxFile    = 1 << 20 // bytes of each
	maxNameLen = 253     // of DNS
)

var label = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$`)

// checkName reports whether a name can be a host's: a DNS name in lower case without wildcards,
// or an IP address as it is usually written.
func checkName(name string) error {
	if ip, err := netip.ParseAddr(name); err == nil && ip.Zone() == "" && ip.String() == name {
		return nil
	}
	ok := len(name) <= maxNameLen
	for l := range strings.SplitSeq(name, ".") {
		ok = ok && label.MatchString(l)
	}
	if !ok {
		return fmt.Errorf("%q is no name for a host: use a DNS name in lower case, such as "+
			"hostb or hostb.example.org, or an IP address", name)
	}
	return nil
}

// NameOf is the name of the host that has the certificate.
func NameOf(c *x509.Certificate) (string, error) {
	name := ""
	switch {
	case len(c.DNSNames) > 0:
		name = strings.ToLower(c.DNSNames[0])
	case len(c.IPAddresses) > 0:
		name = c.IPAddresses[0].String()
	default:
		return "", errors.New("the certificate has no DNS name or IP address (subjectAltName)")
	}
	if err := checkName(name); err != nil {
		return "", fmt.Errorf("certificate: %w", err)
	}
	return name, nil
}

// Identity is a host's directory as it was read last. Its methods may be called by several
// goroutines.
type Identity struct {
	dir     string
	problem func(error)

	mu    sync.Mutex // guards what follows
	now   files      // what is in use
	stamp [3]stamp   // of the files when they were last looked into
}

// stamp reports whether a file changed.
type stamp struct {
	inode os.FileInfo
	size  int64
	time  time.Time
}

func (s stamp) same(t stamp) bool {
	return s.inode != nil && t.inode != nil && os.SameFile(s.inode, t.inode) && s.size == t.size &&
		s.time.Equal(t.time)
}

// files is the content of a directory.
type files struct {
	name  string
	cert  *tls.Certificate // with its leaf parsed
	roots *x509.CertPool
	cas   []*x509.Certificate
}

// Load reads a host's directory, which must be in order. When invalid files replace them later, the
// old ones stay in use. Load then calls problem, which may be nil, once for each change; handshakes
// wait for it.
func Load(dir string, problem func(error)) (*Identity, error) {
	if problem == nil {
		problem = func(error) {}
	}
	i := &Identity{dir: dir, problem: problem, stamp: stamps(dir)}
	var err error
	if i.now, err = read(dir); err != nil {
		return nil, err
	}
	if err := i.now.valid(dir); err != nil {
		return nil, err
	}
	return i, nil
}

func stamps(dir string) (s [3]stamp) {
	for i, name := range []string{caFile, certFile, keyFile} {
		if fi, err := os.Stat(filepath.Join(dir, name)); err == nil {
			s[i] = stamp{fi, fi.Size(), fi.ModTime()}
		}
	}
	return s
}

// current is what is in use, after a look at the files.
func (i *Identity) current() (files, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	s := stamps(i.dir)
	for k := range s {
		if s[k].same(i.stamp[k]) {
			continue
		}
		i.stamp = s
		now, err := read(i.dir)
		if err == nil {
			err = now.valid(i.dir)
		}
		if err != nil {
			i.problem(fmt.Errorf("the certificates from before stay in use: %w", err))
		} else {
			i.now = now
		}
		break
	}
	return i.now, i.now.valid(i.dir)
}

// read reads a directory.
func read(dir string) (f files, err error) {
	if f.cas, err = readCerts(filepath.Join(dir, caFile)); err != nil {
		return f, err
	}
	f.roots = x509.NewCertPool()
	for _, c := range f.cas {
		if !c.IsCA {
			return f, fmt.Errorf("%s: the certificate of %q is not a CA's",
				filepath.Join(dir, caFile), c.Subject.String())
		}
		f.roots.AddCert(c)
	}
	chain, err := readCerts(filepath.Join(dir, certFile))
	if err != nil {
		return f, err
	}
	key, err := readFile(filepath.Join(dir, keyFile), true)
	if err != nil {
		return f, err
	}
	var ders [][]byte
	for _, c := range chain {
		ders = append(ders, c.Raw)
	}
	cert, err := tls.X509KeyPair(encode(ders...), key)
	if err != nil {
		return f, fmt.Errorf("%s and %s: %w", filepath.Join(dir, certFile), keyFile, err)
	}
	f.cert = &cert
	if f.name, err = NameOf(chain[0]); err != nil {
		return f, fmt.Errorf("%s: %w", filepath.Join(dir, certFile), err)
	}
	return f, nil
}

func encode(der ...[]byte) (b []byte) {
	for _, d := range der {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: d})...)
	}
	return b
}

// valid makes sure that peers would believe the certificate now.
func (f files) valid(dir string) error {
	leaf := f.cert.Leaf
	file := filepath.Join(dir, certFile)
	if now := time.Now(); now.After(leaf.NotAfter) {
		return fmt.Errorf("%s has expired at %s: renew it with `vacate certs issue --renew "+
			"--name %s --dir CA --out %s`", file, leaf.NotAfter.UTC().Format(time.DateTime+" MST"),
			f.name, dir)
	} else if now.Before(leaf.NotBefore) {
		return fmt.Errorf("%s is not valid before %s: set this host's clock, or issue it anew",
			file, leaf.NotBefore.UTC().Format(time.DateTime+" MST"))
	}
	between := x509.NewCertPool()
	for _, der := range f.cert.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			between.AddCert(c)
		}
	}
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: f.roots, Intermediates: between,
			KeyUsages: []x509.ExtKeyUsage{use}}); err != nil {
			return fmt.Errorf("the CA beside %s did not issue it: %w: issue it with `vacate "+
				"certs issue`, or copy the CA's ca.pem there", file, err)
		}
	}
	return nil
}

// Name is this host's name.
func (i *Identity) Name() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.now.name
}

// Client is the configuration with which to dial the host of that name.
func (i *Identity) Client(peer string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: peer,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			f, err := i.current()
			return f.cert, err
		},
		// RootCAs would be those of now. What crypto/tls would do, VerifyConnection does with those
		// of then.
		InsecureSkipVerify: true, // #nosec G402
		VerifyConnection: func(cs tls.ConnectionState) error {
			f, err := i.current()
			if err != nil {
				return err
			}
			between := x509.NewCertPool()
			for _, c := range cs.PeerCertificates[1:] {
				between.AddCert(c)
			}
			_, err = cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: f.roots,
				Intermediates: between, DNSName: peer})
			return err
		},
	}
}

// Server is the configuration with which to listen.
func (i *Identity) Server() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ClientAuth: tls.RequireAndVerifyClientCert,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			f, err := i.current()
			if err != nil {
				return nil, err
			}
			return &tls.Config{
				MinVersion:   tls.VersionTLS13,
				Certificates: []tls.Certificate{*f.cert},
				ClientAuth:   tls.RequireAndVerifyClientCert,
				ClientCAs:    f.roots,
			}, nil
		},
	}
}

// Web is the configuration with which to serve HTTP to those that allow lets in by the names in
// their certificates.
func (i *Identity) Web(allow func(name string) error) *tls.Config {
	server := i.Server()
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2", "http/1.1"},
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			c, err := server.GetConfigForClient(hello)
			if err != nil {
				return nil, err
			}
			c.SessionTicketsDisabled = true // a resumed session would not look at certificates
			c.NextProtos = []string{"h2", "http/1.1"}
			c.VerifyPeerCertificate = func(_ [][]byte, chains [][]*x509.Certificate) error {
				name, err := NameOf(chains[0][0])
				if err != nil {
					return err
				}
				return allow(name)
			}
			return c, nil
		},
	}
}

// Info describes a host's directory.
type Info struct {
	Name     string    `json:"name"`
	CA       string    `json:"ca"`        // SHA-256 of the first CA's certificate, in hex
	NotAfter time.Time `json:"not_after"` // of the host's certificate
}

// Inspect describes a host's directory. If its certificate cannot be used, now or at all, the
// error says so; an Info with a name is right all the same.
func Inspect(dir string) (Info, error) {
	f, err := read(dir)
	if err != nil {
		return Info{}, err
	}
	sum := sha256.Sum256(f.cas[0].Raw)
	return Info{f.name, hex.EncodeToString(sum[:]), f.cert.Leaf.NotAfter}, f.valid(dir)
}

// Info describes what is in use.
func (i *Identity) Info() Info {
	f, _ := i.current()
	sum := sha256.Sum256(f.cas[0].Raw)
	return Info{f.name, hex.EncodeToString(sum[:]), f.cert.Leaf.NotAfter}
}

// readCerts reads a file of certificates; there is at least one.
func readCerts(file string) (all []*x509.Certificate, err error) {
	b, err := readFile(file, false)
	if err != nil {
		return nil, err
	}
	all, err = parseCerts(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return all, nil
}

func parseCerts(b []byte) (all []*x509.Certificate, err error) {
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("it holds a %q, where only certificates belong", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("there is no certificate in it, in the form of PEM")
	}
	return all, nil
}

// readFile reads a file, which if it is private only its owner may be able to read.
func readFile(file string, private bool) ([]byte, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: `vacate certs --help` says how to make it", err)
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if mode := fi.Mode().Perm(); private && mode&0o077 != 0 {
		return nil,
			fmt.Errorf("%s is open to others than its owner (mode %04o): run `chmod 600 %s`; if "+
				"others were on this host, issue a new one", file, mode, file)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s has more than %d bytes: it holds no certificates or keys", file,
			maxFile)
	}
	return b, nil
}
