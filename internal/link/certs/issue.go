package certs

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	caDays = 3653 // ten years
	// DefaultDays is for how long a host's certificate is valid unless told otherwise.
	DefaultDays = 365
	// clockSkew is by how much a host's clock may be behind that of the CA.
	clockSkew = time.Hour
)

// Init makes a CA in dir, which it creates if need be: its certificate, ca.pem, and its key,
// ca.key, which should stay where it is. It never overwrites either.
func Init(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, name := range []string{caFile, caKeyFile} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return fmt.Errorf("%s is there already, and hosts of another CA would not trust "+
				"each other: use it, or another directory", filepath.Join(dir, name))
		}
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	now := time.Now()
	c := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "vacate CA " + rand.Text()[:8]},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.AddDate(0, 0, caDays),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return fmt.Errorf("make the CA's certificate: %w", err)
	}
	if err := writeKey(filepath.Join(dir, caKeyFile), key, false); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, caFile), encode(der), 0o644, false)
}

// Issue makes a certificate and a key for the host of that name, signed by the CA in dir. It writes
// them into the directory out, with a copy of the CA's certificate, and creates out if necessary.
// It overwrites files of before only if renew is set; then a running daemon takes the new ones by
// itself.
func Issue(dir, name, out string, days int, renew bool) error {
	if err := checkName(name); err != nil {
		return err
	}
	if days < 1 || days > caDays {
		return fmt.Errorf("%d days: a certificate may be valid for 1 to %d", days, caDays)
	}
	ca, err := openCA(dir)
	if err != nil {
		return err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	der, err := ca.sign(name, days, key.Public())
	if err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o700); err != nil {
		return err
	}
	for _, f := range []string{keyFile, certFile} {
		if _, err := os.Lstat(filepath.Join(out, f)); err == nil && !renew {
			return fmt.Errorf("%s is there already: say --renew to replace it",
				filepath.Join(out, f))
		}
	}
	switch there, err := readCerts(filepath.Join(out, caFile)); {
	case err == nil && !slices.ContainsFunc(there, ca.Leaf.Equal):
		return fmt.Errorf("%s is of another CA, and hosts of both would not trust each other: "+
			"take it away, or put the certificates of both CAs into it first",
			filepath.Join(out, caFile))
	case errors.Is(err, fs.ErrNotExist):
		if err := writeFile(filepath.Join(out, caFile), ca.pem, 0o644, false); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	if err := writeKey(filepath.Join(out, keyFile), key, renew); err != nil {
		return err
	}
	return writeFile(filepath.Join(out, certFile), encode(der), 0o644, renew)
}

// A ca is a CA's certificate and key.
type ca struct {
	tls.Certificate
	pem []byte // the certificate as its file has it
}

func openCA(dir string) (c ca, err error) {
	if c.pem, err = readFile(filepath.Join(dir, caFile), false); err != nil {
		return c, err
	}
	key, err := readFile(filepath.Join(dir, caKeyFile), true)
	if err != nil {
		return c, err
	}
	if c.Certificate, err = tls.X509KeyPair(c.pem, key); err != nil {
		return c, fmt.Errorf("%s and %s: %w", filepath.Join(dir, caFile), caKeyFile, err)
	}
	if !c.Leaf.IsCA || time.Now().After(c.Leaf.NotAfter) {
		return c, fmt.Errorf("%s is no CA's, or has expired at %s: make another CA with `vacate "+
			"certs init`", filepath.Join(dir, caFile), c.Leaf.NotAfter.UTC().Format(time.DateOnly))
	}
	return c, nil
}

// sign makes the certificate of a host's key. It expires with the CA's at the latest.
func (c ca) sign(name string, days int, key crypto.PublicKey) (der []byte, err error) {
	now := time.Now()
	host := &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		NotBefore:   now.Add(-clockSkew),
		NotAfter:    now.AddDate(0, 0, days),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if host.NotAfter.After(c.Leaf.NotAfter) {
		host.NotAfter = c.Leaf.NotAfter
	}
	if ip := net.ParseIP(name); ip != nil {
		host.IPAddresses = []net.IP{ip}
	} else {
		host.DNSNames = []string{name}
	}
	if der, err = x509.CreateCertificate(rand.Reader, host, c.Leaf, key, c.PrivateKey); err != nil {
		return nil, fmt.Errorf("make the certificate: %w", err)
	}
	return der, nil
}

func writeKey(file string, key ed25519.PrivateKey, replace bool) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writeFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600,
		replace)
}

// writeFile puts a file in place as a whole. If there is one already, it fails unless it is
// to replace it.
func writeFile(file string, b []byte, mode os.FileMode, replace bool) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), ".new-*") // of mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err := errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	if replace {
		return os.Rename(f.Name(), file)
	}
	return os.Link(f.Name(), file)
}
