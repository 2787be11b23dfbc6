package libvirtlab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"vacate/lab"
)

// A domain with Spec.Once starts as libvirt restores one that it has saved: a guest of its kind
// booted in a domain of another name. Each gets the time, chance and parameters of its own.

// bootName is the name of the domains that boot for others.
const bootName = "boots"

// booted returns the file to which libvirt saved a domain whose guest waits for its parameters.
func (h *Host) booted(ctx context.Context, spec Spec) (string, error) {
	e, err := h.Host.ExpectWaiting(ctx, spec.VM)
	if err != nil {
		return "", err
	}
	xml := withUUID(domainXML(bootName, spec, e.Spec(), e,
		filepath.Join("/var/log/libvirt/lab", bootName+".console")), uuidOf(bootName))
	kind := strings.ReplaceAll(xml, h.lab.RunDir(), "") + e.Spec().QEMU.Version
	kind = strings.ReplaceAll(kind, e.Name, "")
	return h.lab.BootedOnce(ctx, kind, e.Kernel, func(file string) error {
		link := filepath.Join(h.Dir, "run/lab", bootName)
		if err := os.Symlink(e.Reports, link); err != nil {
			return err
		}
		defer os.Remove(link)
		described := filepath.Join(h.Dir, bootName+".xml")
		if err := os.WriteFile(described, []byte(xml), 0o644); err != nil {
			return err
		}
		if _, err := h.Virsh(ctx, "create", described); err != nil {
			return err
		}
		vm, err := e.Came(ctx)
		if err == nil {
			err = vm.Waits(ctx)
		}
		if err == nil {
			_, err = h.Virsh(ctx, "save", bootName, file, "--running")
		}
		if err != nil {
			h.Virsh(ctx, "destroy", bootName)
			return err
		}
		return rewrite(file, file, func(i *savedImage) (err error) {
			i.stream, err = lab.WithoutZeroes(i.stream)
			return err
		})
	})
}

// restore starts a domain that is defined from a file of booted.
func (h *Host) restore(ctx context.Context, booted, name, described string) error {
	file := filepath.Join(h.Dir, name+".saved")
	defer os.Remove(file)
	if err := rewrite(booted, file, func(i *savedImage) error {
		i.xml = withUUID(strings.Replace(i.xml, "<name>"+bootName+"<", "<name>"+text(name)+"<", 1),
			uuidOf(name))
		return nil
	}); err != nil {
		return err
	}
	_, err := h.Virsh(ctx, "restore", file, "--xml", described, "--running")
	return err
}

// uuidOf is one UUID for each name of a domain.
func uuidOf(name string) string {
	x := fmt.Sprintf("%x", sha256.Sum256([]byte(name)))
	return fmt.Sprintf("%s-%s-4%s-8%s-%s", x[:8], x[8:12], x[12:15], x[15:18], x[18:30])
}

var uuidElement = regexp.MustCompile(`\s*<uuid>[^<]*</uuid>`)

// withUUID returns the XML of a domain with a UUID.
func withUUID(xml, uuid string) string {
	return strings.Replace(uuidElement.ReplaceAllString(xml, ""), "</name>",
		"</name><uuid>"+uuid+"</uuid>", 1)
}

// savedHeader is the beginning of a file of "virsh save" (libvirt's src/qemu/qemu_saveimage.h). XML
// and a cookie follow, and then the stream of QEMU.
type savedHeader struct {
	Magic      [16]byte
	Version    uint32
	Len        uint32 // of all between this and the stream
	WasRunning uint32
	Compressed uint32
	Cookie     uint32 // where it begins, after this
	Unused     [14]uint32
}

type savedImage struct {
	savedHeader
	xml    string
	cookie []byte
	stream []byte
}

// rewrite changes a file of "virsh save" on its way to another place.
func rewrite(from, to string, change func(*savedImage) error) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	var i savedImage
	n, err := binary.Decode(data, binary.LittleEndian, &i.savedHeader)
	if err != nil || string(i.Magic[:]) != "LibvirtQemudSave" || i.Compressed != 0 ||
		int(i.Len) > len(data)-n || i.Cookie > i.Len {
		return errors.Join(fmt.Errorf("%s is no file of virsh save: %.40q", from, data), err)
	}
	between := data[n : n+int(i.Len)]
	i.stream = data[n+int(i.Len):]
	if i.Cookie > 0 {
		i.cookie = between[i.Cookie:]
		between = between[:i.Cookie]
	}
	i.xml = string(bytes.TrimRight(between, "\x00"))
	if err := change(&i); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	text := append([]byte(i.xml), 0)
	if i.Cookie > 0 {
		i.Cookie = uint32(len(text))
	}
	i.Len = uint32(len(text) + len(i.cookie))
	var out bytes.Buffer
	if err := binary.Write(&out, binary.LittleEndian, i.savedHeader); err != nil {
		return err
	}
	for _, b := range [][]byte{text, i.cookie, i.stream} {
		out.Write(b)
	}
	return os.WriteFile(to, out.Bytes(), 0o600)
}
