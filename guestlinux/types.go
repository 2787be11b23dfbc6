package guestlinux

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/cilium/ebpf/btf"
)

// types is the kernel's BTF: what its structures look like. It is safe for concurrent use.
type types struct {
	mu   sync.Mutex // guards spec, which decodes types as they are asked for
	spec *btf.Spec
}

// maxBTF bounds the kernel's types, in bytes; Debian's have 4 to 6 MB.
const maxBTF = 64 << 20

func parseTypes(raw []byte) (t *types, err error) {
	defer recovered(&err)
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("read the kernel's btf: %w", err)
	}
	return &types{spec: spec}, nil
}

// recovered turns a panic over the guest's BTF into an error.
func recovered(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("the kernel's btf is broken: %v", p)
	}
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

// anonymousDepth bounds structs within structs, which a broken BTF may nest for ever.
const anonymousDepth = 16

var errNoField = errors.New("no such field")

// field finds a member by a path such as "lru.next" or "free_area.nr_free" in the struct
// or union name. Members of anonymous structs count as the outer one's, and behind an
// array its first element is meant.
func (t *types) field(name, path string) (f field, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("field %s of %s: %w", path, name, err)
		}
	}()
	defer recovered(&err)
	t.mu.Lock()
	defer t.mu.Unlock()
	typ, err := t.composite(name)
	if err != nil {
		return field{}, err
	}
	var offset btf.Bits
	var m btf.Member
	for part := range strings.SplitSeq(path, ".") {
		budget := 1 << 16
		var at btf.Bits
		var ok bool
		if m, at, ok = member(typ, part, anonymousDepth, &budget); !ok {
			return field{}, errNoField
		}
		offset += at
		typ = btf.UnderlyingType(m.Type)
		for range anonymousDepth {
			a, ok := typ.(*btf.Array)
			if !ok {
				break
			}
			typ = btf.UnderlyingType(a.Type)
		}
	}
	f = field{offset: uint64(offset / 8), bit: uint8(offset % 8), count: 1}
	if m.BitfieldSize > 0 {
		if m.BitfieldSize > 64 {
			return field{}, errors.New("bit field too large")
		}
		f.bits, f.size = uint8(m.BitfieldSize), (uint64(f.bit)+uint64(m.BitfieldSize)+7)/8
		return f, nil
	}
	size, err := btf.Sizeof(m.Type)
	if err != nil {
		return field{}, err
	}
	f.size = uint64(size)
	for inner, depth := btf.UnderlyingType(m.Type), 0; depth < anonymousDepth; depth++ {
		a, ok := inner.(*btf.Array)
		if !ok {
			break
		}
		f.count *= uint64(a.Nelems)
		inner = btf.UnderlyingType(a.Type)
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

func (t *types) composite(name string) (btf.Type, error) {
	var s *btf.Struct
	err := t.spec.TypeByName(name, &s)
	if err == nil {
		return s, nil
	}
	// Several structs may have a name; the kernel proper's comes first.
	all, anyErr := t.spec.AnyTypesByName(name)
	if anyErr != nil {
		return nil, anyErr
	}
	for _, typ := range all {
		switch u := btf.UnderlyingType(typ).(type) {
		case *btf.Struct, *btf.Union:
			return u, nil
		}
	}
	return nil, fmt.Errorf("not a struct or union: %w", err)
}

func member(typ btf.Type, name string, depth int, budget *int) (btf.Member, btf.Bits, bool) {
	var members []btf.Member
	switch s := typ.(type) {
	case *btf.Struct:
		members = s.Members
	case *btf.Union:
		members = s.Members
	}
	if *budget -= len(members); *budget < 0 {
		return btf.Member{}, 0, false
	}
	for _, m := range members {
		if m.Name == name {
			return m, m.Offset, true
		}
	}
	for _, m := range members {
		if m.Name != "" || depth == 0 {
			continue
		}
		if found, at, ok := member(btf.UnderlyingType(m.Type), name, depth-1, budget); ok {
			return found, m.Offset + at, true
		}
	}
	return btf.Member{}, 0, false
}

// size returns the size in bytes of a struct or union.
func (t *types) size(name string) (n uint64, err error) {
	defer recovered(&err)
	t.mu.Lock()
	defer t.mu.Unlock()
	typ, err := t.composite(name)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", name, err)
	}
	size, err := btf.Sizeof(typ)
	if err == nil && (size <= 0 || size > 1<<24) {
		err = errors.New("it makes no sense")
	}
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", name, err)
	}
	return uint64(size), nil
}

// enum returns the value of one of the names of an enumeration.
func (t *types) enum(name, value string) (n int64, err error) {
	defer recovered(&err)
	t.mu.Lock()
	defer t.mu.Unlock()
	all, err := t.spec.AnyTypesByName(name)
	if err != nil {
		return 0, fmt.Errorf("enum %s: %w", name, err)
	}
	for _, typ := range all {
		e, ok := btf.UnderlyingType(typ).(*btf.Enum)
		if !ok {
			continue
		}
		for _, v := range e.Values {
			if v.Name == value {
				return int64(v.Value), nil
			}
		}
	}
	return 0, fmt.Errorf("enum %s has no value %s: %w", name, value, errNoField)
}
