package linux

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// types is the kernel's BTF (Documentation/bpf/btf.rst): what its structures look like. It is safe
// for concurrent use.
//
// Behind a header lie the types, one after another, each three u32 and what depends on its kind,
// and texts, each with a NUL behind it. Types have numbers, in their order, from 1 on; 0 is void.
// Texts have their places for numbers, and the first is empty.
//
// Its reader decodes only what is asked for, in place. On an overloaded host, decoding all of it
// would cost more CPU than anything else in an eviction.
type types struct {
	raw   []byte   // the types
	texts []byte   // ends in NUL
	at    []uint32 // where each type is in raw, by its number; that of 0 means nothing
	named []uint32 // the numbers of composites, enumerations and typedefs with a name
}

// maxBTF bounds the kernel's types, in bytes; Debian's have 4 to 6 MB.
const maxBTF = 64 << 20

// Kinds of types.
const (
	btfInt = iota + 1
	btfPtr
	btfArray
	btfStruct
	btfUnion
	btfEnum
	btfForward
	btfTypedef
	btfVolatile
	btfConst
	btfRestrict
	btfFunc
	btfFuncProto
	btfVar
	btfDatasec
	btfFloat
	btfDeclTag
	btfTypeTag
	btfEnum64
	btfKinds
)

// What follows the head of a type: some bytes, and more for each of its elements.
var btfExtra = [btfKinds]struct{ once, each int }{
	btfInt: {4, 0}, btfArray: {12, 0}, btfStruct: {0, 12}, btfUnion: {0, 12}, btfEnum: {0, 8},
	btfFuncProto: {0, 8}, btfVar: {4, 0},
	btfDatasec: {0, 12}, btfDeclTag: {4, 0}, btfEnum64: {0, 12},
}

const (
	// bytes at the start of each type: its name, its info, and its size or the type it is made of
	btfHead   = 12
	btfHeader = 24      // bytes at least of the header of all
	btfFlag   = 1 << 31 // of the info: bit fields, or signed numbers
)

// parseTypes finds where each type of a BTF begins. It keeps raw.
func parseTypes(raw []byte) (*types, error) {
	if len(raw) < btfHeader || u16(raw) != 0xeb9f || raw[2] != 1 {
		return nil, errors.New("it is no btf of version 1")
	}
	if len(raw) > maxBTF {
		return nil, fmt.Errorf("btf of %d bytes: want at most %d", len(raw), maxBTF)
	}
	section := func(field int) ([]byte, error) {
		from := uint64(u32(raw[4:])) + uint64(u32(raw[field:]))
		size := uint64(u32(raw[field+4:]))
		if from > uint64(len(raw)) || size > uint64(len(raw))-from {
			return nil, errors.New("the btf is cut short")
		}
		return raw[from : from+size], nil
	}
	t := &types{}
	var err1, err2 error
	t.raw, err1 = section(8)
	t.texts, err2 = section(16)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if n := len(t.texts); n == 0 || t.texts[0] != 0 || t.texts[n-1] != 0 {
		return nil, errors.New("the btf's texts do not end")
	}
	t.at = make([]uint32, 1, len(t.raw)/20) // which is about as many as there are
	for at := 0; at < len(t.raw); {
		if len(t.raw)-at < btfHead {
			return nil, errors.New("the btf's last type is cut short")
		}
		d := btfDescription(t.raw[at:])
		kind := d.kind()
		if kind == 0 || kind >= btfKinds {
			return nil, fmt.Errorf("the btf has a type of kind %d, which is not known", kind)
		}
		size := btfHead + btfExtra[kind].once + btfExtra[kind].each*d.elements()
		if size > len(t.raw)-at {
			return nil, errors.New("the btf's last type is cut short")
		}
		switch kind {
		case btfStruct, btfUnion, btfEnum, btfEnum64, btfTypedef:
			if d.name() != 0 {
				t.named = append(t.named, uint32(len(t.at)))
			}
		}
		t.at = append(t.at, uint32(at))
		at += size
	}
	return t, nil
}

// btfDescription is a type, and all that follows.
type btfDescription []byte

func (d btfDescription) name() uint32 { return u32(d) }
func (d btfDescription) kind() uint32 { return u32(d[4:]) >> 24 & 0x1f }
func (d btfDescription) flag() bool   { return u32(d[4:])&btfFlag != 0 }

// elements is how many members or values there are.
func (d btfDescription) elements() int { return int(u32(d[4:]) & 0xffff) }

// size is that of all but pointers and arrays, in bytes; of those that have none it is made.
func (d btfDescription) size() uint32 { return u32(d[8:]) }
func (d btfDescription) made() uint32 { return u32(d[8:]) }

// array is what an array is made of, and of how many.
func (d btfDescription) array() (elem, count uint32) { return u32(d[btfHead:]), u32(d[btfHead+8:]) }

// element is member or value i, each bytes long.
func (d btfDescription) element(i, each int) []byte { return d[btfHead+i*each:][:each] }

// get returns a type by its number, nil for void.
func (t *types) get(id uint32) btfDescription {
	if id == 0 || uint64(id) >= uint64(len(t.at)) {
		return nil
	}
	return t.raw[t.at[id]:]
}

// nesting bounds types made of types, which a broken BTF may nest for ever.
const nesting = 16

// underlying is a type without its qualifiers and other names, nil for void or if there are too
// many.
func (t *types) underlying(id uint32) btfDescription {
	for range nesting {
		d := t.get(id)
		if d == nil {
			return nil
		}
		switch d.kind() {
		case btfTypedef, btfVolatile, btfConst, btfRestrict, btfTypeTag:
			id = d.made()
		default:
			return d
		}
	}
	return nil
}

// called reports whether the text at a place is name.
func (t *types) called(at uint32, name string) bool {
	if uint64(at) >= uint64(len(t.texts)) {
		return false
	}
	b := t.texts[at:]
	return len(b) > len(name) && b[len(name)] == 0 && string(b[:len(name)]) == name
}

// A field is where a member of a structure lies.
type field struct {
	offset uint64 // in bytes; of a bit field, of the first byte that holds a bit of it
	size   uint64 // in bytes, of all of an array
	bit    uint8  // of a bit field: its first bit's number in that byte
	bits   uint8  // of a bit field: how many; else 0
	count  uint64 // of an array: elements; else 1
}

// elem is the size of one element.
func (f field) elem() uint64 { return f.size / max(1, f.count) }

var errNoField = errors.New("no such field")

// member is one of a structure: its type, and where it begins, in bits from the start of that
// structure.
type member struct {
	id   uint32
	at   uint64
	bits uint8
}

// field finds a member by a path such as "lru.next" or "free_area.nr_free" in the struct
// or union name. Members of anonymous structs count as the outer one's, and behind an
// array its first element is meant.
func (t *types) field(name, path string) (f field, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("field %s of %s: %w", path, name, err)
		}
	}()
	d, err := t.composite(name)
	if err != nil {
		return field{}, err
	}
	var m member
	at := uint64(0)
	for part := range strings.SplitSeq(path, ".") {
		budget := 1 << 16
		var ok bool
		if m, ok = t.member(d, part, nesting, &budget); !ok {
			return field{}, errNoField
		}
		at += m.at
		d = t.underlying(m.id)
		for range nesting {
			if d == nil || d.kind() != btfArray {
				break
			}
			elem, _ := d.array()
			d = t.underlying(elem)
		}
	}
	f = field{offset: at / 8, bit: uint8(at % 8), count: 1}
	if m.bits > 0 {
		if m.bits > 64 {
			return field{}, errors.New("bit field too large")
		}
		f.bits, f.size = m.bits, (uint64(f.bit)+uint64(m.bits)+7)/8
		return f, nil
	}
	if f.size, f.count, err = t.extent(m.id); err != nil {
		return field{}, err
	}
	if f.bit != 0 {
		return field{}, errors.New("it does not start at a byte")
	}
	if f.offset > 1<<24 || f.size > 1<<24 {
		return field{}, errors.New("it is too large")
	}
	return f, nil
}

// anyField is field for what kernels call by different names: the first path that exists.
func (t *types) anyField(name string, paths ...string) (f field, err error) {
	for _, p := range paths {
		if f, err = t.field(name, p); err == nil || !errors.Is(err, errNoField) {
			return f, err
		}
	}
	return f, err
}

// composite returns a struct or union by its name, or by a typedef's. Several may have it; the
// kernel proper's comes first.
func (t *types) composite(name string) (btfDescription, error) {
	var other btfDescription
	for _, id := range t.named {
		if !t.called(t.get(id).name(), name) {
			continue
		}
		d := t.underlying(id)
		switch {
		case d == nil:
		case t.get(id).kind() == btfStruct:
			return d, nil
		case other == nil && (d.kind() == btfStruct || d.kind() == btfUnion):
			other = d
		}
	}
	if other == nil {
		return nil, errors.New("there is no struct or union of that name")
	}
	return other, nil
}

// member finds one of a struct or union, those of anonymous ones in it last.
func (t *types) member(d btfDescription, name string, depth int, budget *int) (member, bool) {
	if d == nil || d.kind() != btfStruct && d.kind() != btfUnion {
		return member{}, false
	}
	n := d.elements()
	if *budget -= n; *budget < 0 {
		return member{}, false
	}
	get := func(i int) (name uint32, m member) {
		b := d.element(i, 12)
		m = member{id: u32(b[4:]), at: uint64(u32(b[8:]))}
		if d.flag() {
			m.at, m.bits = m.at&0xffffff, uint8(m.at>>24)
		}
		return u32(b), m
	}
	for i := range n {
		if at, m := get(i); t.called(at, name) {
			return m, true
		}
	}
	for i := range n {
		at, m := get(i)
		if depth == 0 || !t.called(at, "") {
			continue
		}
		if found, ok := t.member(t.underlying(m.id), name, depth-1, budget); ok {
			found.at += m.at
			return found, true
		}
	}
	return member{}, false
}

// extent returns the size of a type in bytes and, of an array, how many elements there are in all;
// else 1.
func (t *types) extent(id uint32) (size, count uint64, err error) {
	count = 1
	for range nesting {
		d := t.underlying(id)
		if d == nil {
			break
		}
		switch d.kind() {
		case btfArray:
			elem, n := d.array()
			if id = elem; uint64(n) > 1<<32/max(1, count) {
				return 0, 0, errors.New("an array is too large")
			}
			count *= uint64(n)
		case btfPtr:
			return 8 * count, count, nil
		case btfInt, btfStruct, btfUnion, btfEnum, btfEnum64, btfFloat:
			return uint64(d.size()) * count, count, nil
		default:
			return 0, 0, errors.New("it has no size")
		}
	}
	return 0, 0, errors.New("it has no size")
}

// size returns the size in bytes of a struct or union.
func (t *types) size(name string) (uint64, error) {
	d, err := t.composite(name)
	if err == nil && (d.size() == 0 || d.size() > 1<<24) {
		err = errors.New("it makes no sense")
	}
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", name, err)
	}
	return uint64(d.size()), nil
}

// enum returns the value of one of the names of an enumeration.
func (t *types) enum(name, value string) (int64, error) {
	for _, id := range t.named {
		if !t.called(t.get(id).name(), name) {
			continue
		}
		d := t.underlying(id)
		if d == nil || d.kind() != btfEnum && d.kind() != btfEnum64 {
			continue
		}
		each := btfExtra[d.kind()].each
		for i := range d.elements() {
			b := d.element(i, each)
			switch {
			case !t.called(u32(b), value):
			case d.kind() == btfEnum64:
				return int64(u64(b[4:])), nil
			case d.flag():
				return int64(int32(u32(b[4:]))), nil
			default:
				return int64(u32(b[4:])), nil
			}
		}
	}
	return 0, fmt.Errorf("enum %s has no value %s: %w", name, value, errNoField)
}

// btfMagic begins a BTF as kernels have it: magic, version 1, flags 0, and a header of 24 bytes.
var btfMagic = []byte{0x9f, 0xeb, 1, 0, btfHeader, 0, 0, 0}

// findTypes looks for the kernel's own BTF in its image.
func findTypes(image []byte) *types {
	for at, tries := 0, 0; tries < 64; tries++ {
		i := bytes.Index(image[at:], btfMagic)
		if i < 0 || len(image)-at-i < btfHeader {
			break
		}
		at += i
		h := image[at:]
		size := btfHeader + uint64(u32(h[16:])) + uint64(u32(h[20:]))
		// It is far larger than the magic in some code that reads such.
		if size > 1<<20 && size <= min(uint64(len(h)), maxBTF) {
			if t, err := parseTypes(bytes.Clone(h[:size])); err == nil {
				return t
			}
		}
		at += 4
	}
	return nil
}
