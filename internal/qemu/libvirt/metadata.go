package libvirt

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// Metadata is what an operator tells vacate of a domain, by an element in its description:
//
//	virsh metadata web1 urn:vacate:domain:1 --key vacate --live --config \
//	    --set '<vm pinned="yes" priority="1" labels="app=db,tier=prod"/>'
//
// A domain that came from another host has what that host wrote.
type Metadata struct {
	Pinned   bool
	Priority int
	Labels   string
}

// Namespace is that of our element in a domain's metadata.
const Namespace = "urn:vacate:domain:1"

// Bounds of the element.
const (
	maxMetadata = 1 << 10 // bytes
	maxPriority = 1000    // either way
)

// ErrMetadata is wrapped by the error for metadata of ours that nobody can understand.
var ErrMetadata = errors.New("its metadata " + Namespace + " cannot be understood")

// Metadata returns that of a domain, as it runs if it does; the zero value where there is none.
func (c *Conn) Metadata(ctx context.Context, d Domain) (Metadata, error) {
	text, err := call(ctx, c, "tell the metadata of the domain "+d.Name, func() (string, error) {
		return c.l.DomainGetMetadata(d.raw(), int32(golibvirt.DomainMetadataElement),
			golibvirt.OptString{Namespace}, 0)
	})
	var refusal *Error
	if errors.As(err, &refusal) && refusal.Code == int(golibvirt.ErrNoDomainMetadata) {
		return Metadata{}, nil
	} else if err != nil {
		return Metadata{}, err
	}
	return parseMetadata(text)
}

// parseMetadata reads one element. What it does not know, it refuses: a slip must not let a domain
// leave that an operator meant to stay.
func parseMetadata(text string) (m Metadata, err error) {
	wrong := func(format string, args ...any) (Metadata, error) {
		return Metadata{}, fmt.Errorf("%w: %s", ErrMetadata, fmt.Sprintf(format, args...))
	}
	if len(text) > maxMetadata {
		return wrong("it has more than %d bytes", maxMetadata)
	}
	var element *xml.StartElement
	for d := xml.NewDecoder(strings.NewReader(text)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return wrong("%.200s", err)
		}
		switch t := token.(type) {
		case xml.StartElement:
			if element != nil || t.Name.Local != "vm" {
				return wrong("it has an element %.20q: want one element vm", t.Name.Local)
			}
			own := t.Copy()
			element = &own
		case xml.CharData:
			if strings.TrimSpace(string(t)) != "" {
				return wrong("it has the text %.20q: want one element vm", t)
			}
		case xml.EndElement, xml.Comment:
		default:
			return wrong("want one element vm")
		}
	}
	if element == nil {
		return wrong("want one element vm")
	}
	seen := map[string]bool{}
	for _, a := range element.Attr {
		if a.Name.Space == "xmlns" || a.Name.Space == "" && a.Name.Local == "xmlns" {
			continue
		}
		if seen[a.Name.Local] {
			return wrong("%s is there twice", a.Name.Local)
		}
		seen[a.Name.Local] = true
		switch {
		case a.Name.Space == "" && a.Name.Local == "pinned":
			if a.Value != "yes" && a.Value != "no" {
				return wrong("pinned=%.20q: want yes or no", a.Value)
			}
			m.Pinned = a.Value == "yes"
		case a.Name.Space == "" && a.Name.Local == "priority":
			m.Priority, err = strconv.Atoi(a.Value)
			if err != nil || m.Priority < -maxPriority || m.Priority > maxPriority {
				return wrong("priority=%.20q: want -%d to %[2]d", a.Value, maxPriority)
			}
		case a.Name.Space == "" && a.Name.Local == "labels":
			m.Labels = a.Value
		default:
			return wrong("there is no %.20q, only pinned, priority and labels", a.Name.Local)
		}
	}
	return m, nil
}
