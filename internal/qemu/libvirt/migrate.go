package libvirt

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// Flags are virDomainMigrateFlags.
type Flags = golibvirt.DomainMigrateFlags

// The flags that an eviction needs. All phases of one migration have the same, but for
// ChangeProtection, which is for the source alone.
const (
	MigrateLive      = golibvirt.MigrateLive
	Postcopy         = golibvirt.MigratePostcopy
	PersistDest      = golibvirt.MigratePersistDest
	UndefineSource   = golibvirt.MigrateUndefineSource
	ChangeProtection = golibvirt.MigrateChangeProtection
	Unsafe           = golibvirt.MigrateUnsafe // libvirt does not judge the storage
	MigratePaused    = golibvirt.MigratePaused // the domain stands at the destination
)

// maxCookie is more than libvirt lets a cookie have (REMOTE_MIGRATE_COOKIE_MAX).
const maxCookie = 4 << 20

func param(name, value string) golibvirt.TypedParam {
	return golibvirt.TypedParam{Field: name, Value: *golibvirt.NewTypedParamValueString(value)}
}

// Begin is the first phase, at the source. The domain runs on. With ChangeProtection its job is
// held from here until Confirm, or until the connection ends: nobody else changes the domain. It
// returns what the destination needs.
func (c *Conn) Begin(
	ctx context.Context,
	d Domain,
	flags Flags,
) (cookie []byte, xml string, err error) {
	type begun struct {
		cookie []byte
		xml    string
	}
	b, err := call(
		ctx,
		c,
		"begin the migration of the domain "+d.Name,
		func() (b begun, err error) {
			b.cookie, b.xml, err = c.l.DomainMigrateBegin3Params(d.raw(), nil, uint32(flags))
			return b, err
		},
	)
	return b.cookie, b.xml, err
}

// Prepare is the second phase, at the destination: its libvirt starts the domain's QEMU, which
// listens at the URI for a stream.
func (c *Conn) Prepare(
	ctx context.Context,
	name, xml, uri string,
	cookie []byte,
	flags Flags,
) (cookieOut []byte, err error) {
	params := []golibvirt.TypedParam{
		param(
			golibvirt.MigrateParamURI,
			uri,
		),
		param(golibvirt.MigrateParamDestName, name),
		param(golibvirt.MigrateParamDestXML, xml),
	}
	return call(ctx, c, "take in the domain "+name, func() ([]byte, error) {
		cookie, _, err := c.l.DomainMigratePrepare3Params(params, cookie, uint32(flags))
		return cookie, err
	})
}

// Finish is the last phase at the destination. Without canceled it has the domain run, and returns
// when the stream has ended. With canceled it ends the domain's QEMU.
func (c *Conn) Finish(
	ctx context.Context,
	name string,
	cookie []byte,
	flags Flags,
	canceled bool,
) (Domain, error) {
	what := "finish taking in the domain " + name
	if canceled {
		what = "give up taking in the domain " + name
	}
	params := []golibvirt.TypedParam{param(golibvirt.MigrateParamDestName, name)}
	d, err := call(ctx, c, what, func() (golibvirt.Domain, error) {
		d, _, err := c.l.DomainMigrateFinish3Params(
			params,
			cookie,
			uint32(flags),
			cancelled(canceled),
		)
		return d, err
	})
	var refusal *Error
	if canceled && errors.As(err, &refusal) && refusal.Code == int(golibvirt.ErrMigrateFinishOk) {
		err = nil // it says so as an error, as there is no domain to return
	}
	return domainOf(d), err
}

// Confirm is the last phase at the source: the domain has gone, or with canceled it runs on.
//
// With canceled it returns no error even where the domain could not be run: look at its state.
func (c *Conn) Confirm(
	ctx context.Context,
	d Domain,
	cookie []byte,
	flags Flags,
	canceled bool,
) error {
	return do(ctx, c, "confirm the migration of the domain "+d.Name, func() error {
		return c.l.DomainMigrateConfirm3Params(
			d.raw(),
			nil,
			cookie,
			uint32(flags),
			cancelled(canceled),
		)
	})
}

func cancelled(yes bool) int32 {
	if yes {
		return 1
	}
	return 0
}

// unwanted are capabilities of a migration that the stream made for a twin does not use: with them
// the twin waits for what never comes.
var unwanted = []string{"postcopy-preempt", "switchover-ack", "multifd"}

// PlainCookie returns a cookie of Begin without the capabilities of a migration that would have the
// destination wait for more than one stream. The cookie comes from this host's own libvirt.
func PlainCookie(cookie []byte) ([]byte, error) {
	if len(cookie) > maxCookie {
		return nil, fmt.Errorf(
			"libvirt's migration cookie has %d bytes: at most %d are supported",
			len(cookie),
			maxCookie,
		)
	}
	// libvirt ends it with a NUL.
	text, _ := strings.CutSuffix(string(cookie), "\x00")
	dec := xml.NewDecoder(strings.NewReader(text))
	var path []string
	type cut struct{ from, to int64 }
	var cuts []cut
	for {
		from := dec.InputOffset()
		token, err := dec.RawToken()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("libvirt's migration cookie: %w", err)
		}
		switch t := token.(type) {
		case xml.StartElement:
			path = append(path, t.Name.Local)
			if !slices.Equal(path, []string{"qemu-migration", "capabilities", "cap"}) {
				continue
			}
			named := slices.ContainsFunc(
				t.Attr,
				func(a xml.Attr) bool {
					return a.Name.Local == "name" && slices.Contains(unwanted, a.Value)
				},
			)
			if named {
				cuts = append(cuts, cut{from: from, to: -1})
			}
		case xml.EndElement:
			if len(path) == 0 || path[len(path)-1] != t.Name.Local {
				return nil, errors.New("libvirt's migration cookie: its elements do not nest")
			}
			path = path[:len(path)-1]
			if n := len(cuts); n > 0 && cuts[n-1].to < 0 && len(path) == 2 {
				cuts[n-1].to = dec.InputOffset()
			}
		}
	}
	if len(path) > 0 {
		return nil, errors.New("libvirt's migration cookie: it has no end")
	}
	var b strings.Builder
	at := int64(0)
	for _, c := range cuts {
		b.WriteString(text[at:c.from])
		at = c.to
	}
	b.WriteString(text[at:])
	return append([]byte(b.String()), cookie[len(text):]...), nil
}

// startPause is the time between two attempts to take a migration to post-copy.
const startPause = 5 * time.Millisecond

// StartPostcopy makes a migration under way go to post-copy. It tries until libvirt does not
// refuse.
func (c *Conn) StartPostcopy(ctx context.Context, d Domain) error {
	for {
		err := do(ctx, c, "take the migration of the domain "+d.Name+" to post-copy", func() error {
			return c.l.DomainMigrateStartPostCopy(d.raw(), 0)
		})
		var refusal *Error
		if err == nil || !errors.As(err, &refusal) {
			return err
		}
		select {
		case <-time.After(startPause):
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		}
	}
}
