package migstream

import (
	"bytes"
	"fmt"
)

// Package makes the package of a post-copy migration from a file that QEMU's command
// xen-save-devices-state wrote: a header, the sections of all devices, and an EOF
// (qemu_save_device_state in migration/savevm.c). The destination answers the ping when it has
// loaded the devices.
func Package(saved []byte, ping uint32) (Packaged, error) {
	body, begins := bytes.CutPrefix(saved, Header{}.Append(nil))
	body, ends := bytes.CutSuffix(body, EOF{}.Append(nil))
	if !begins || !ends || len(body) == 0 || body[0] != typeSectionFull {
		return Packaged{}, fmt.Errorf("%w: %d bytes that are no header, sections and end",
			ErrMalformed, len(saved))
	}
	data := append(Command{ID: CmdPostcopyListen}.Append(nil), body...)
	data = Command{ID: CmdPostcopyRun}.Append(PingCommand(ping).Append(data))
	if len(data) > MaxPackage {
		return Packaged{}, fmt.Errorf("%w: the devices have %d bytes, and QEMU takes %d",
			ErrUnsupported, len(data), MaxPackage)
	}
	return Packaged{data}, nil
}

// DeviceSection is the state of one device in a package.
type DeviceSection struct {
	Name     string
	Instance uint32
	Version  uint32
	Size     int // in bytes, with its framing
}

// Sections lists the devices whose state is in the package. The stream does not have their lengths.
// So a section is taken to end where its footer and then another section or command follow. That is
// good for showing, not for deciding.
func (p Packaged) Sections() ([]DeviceSection, error) {
	var list []DeviceSection
	b := p.Data
	for len(b) > 0 {
		if b[0] == typeCommand {
			cur := cursor{b: b[1:]}
			cur.take(2)
			n := cur.take(2)
			if cur.failed || cur.take(int(be.Uint16(n))) == nil && be.Uint16(n) > 0 {
				return list, fmt.Errorf("%w: the package ends in a command", ErrMalformed)
			}
			b = cur.b
			continue
		}
		cur := cursor{b: b}
		kind, id := cur.u8(), cur.u32()
		s := DeviceSection{Name: cur.name(), Instance: cur.u32(), Version: cur.u32()}
		if cur.failed || kind != typeSectionFull {
			return list, fmt.Errorf("%w: the package has byte %#02x where a device should start",
				ErrMalformed, b[0])
		}
		end := sectionEnd(b, id)
		if end < 0 {
			return list, fmt.Errorf("%w: the package has no end of device %q", ErrMalformed, s.Name)
		}
		s.Size = end
		list = append(list, s)
		b = b[end:]
	}
	return list, nil
}

// sectionEnd returns where the section with id that starts b ends, or -1.
func sectionEnd(b []byte, id uint32) int {
	footer := Footer{id}.Append(nil)
	for at := 0; ; {
		i := bytes.Index(b[at:], footer)
		if i < 0 {
			return -1
		}
		at += i + len(footer)
		if at == len(b) || b[at] == typeSectionFull || b[at] == typeCommand {
			return at
		}
	}
}
