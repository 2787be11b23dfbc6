package hostv1

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// JSON returns a message as docs/json.md says: all fields, with the names and in the order of the
// proto file, and numbers as numbers. protojson reads that, and writes something else: it has
// numbers of 64 bits as strings, and varies its spaces on purpose.
func JSON(m proto.Message) []byte { return appendMessage(nil, m.ProtoReflect()) }

func appendMessage(b []byte, m protoreflect.Message) []byte {
	if t, ok := m.Interface().(*timestamppb.Timestamp); ok {
		return appendJSON(b, t.AsTime().Format(time.RFC3339Nano))
	}
	fields := m.Descriptor().Fields()
	b = append(b, '{')
	for i := range fields.Len() {
		f := fields.Get(i)
		if i > 0 {
			b = append(b, ',')
		}
		b = append(appendJSON(b, string(f.Name())), ':')
		if f.HasPresence() && !m.Has(f) {
			b = append(b, "null"...)
		} else {
			b = appendField(b, f, m.Get(f))
		}
	}
	return append(b, '}')
}

func appendField(b []byte, f protoreflect.FieldDescriptor, v protoreflect.Value) []byte {
	switch {
	case f.IsList():
		b = append(b, '[')
		for i := range v.List().Len() {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendValue(b, f, v.List().Get(i))
		}
		return append(b, ']')
	case f.IsMap():
		values := map[string]protoreflect.Value{}
		v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			values[k.String()] = v
			return true
		})
		b = append(b, '{')
		for i, key := range slices.Sorted(maps.Keys(values)) {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendValue(append(appendJSON(b, key), ':'), f.MapValue(), values[key])
		}
		return append(b, '}')
	}
	return appendValue(b, f, v)
}

func appendValue(b []byte, f protoreflect.FieldDescriptor, v protoreflect.Value) []byte {
	switch f.Kind() {
	case protoreflect.MessageKind:
		return appendMessage(b, v.Message())
	case protoreflect.EnumKind:
		return appendJSON(b, string(f.Enum().Values().ByNumber(v.Enum()).Name()))
	case protoreflect.DoubleKind:
		if n := v.Float(); math.IsNaN(n) || math.IsInf(n, 0) {
			return append(b, "null"...)
		}
	}
	return appendJSON(b, v.Interface())
}

// appendJSON appends a string, number, bool or bytes (in base64).
func appendJSON(b []byte, v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // none of these kinds fails
	}
	return append(b, text...)
}

// Strict makes a handler write JSON as the function JSON does, and refuse requests with fields that
// it does not know, in JSON or not. It could not do what such a field asks for.
func Strict() connect.HandlerOption {
	return connect.WithHandlerOptions(connect.WithCodec(codec{"json"}),
		connect.WithCodec(codec{"json; charset=utf-8"}), connect.WithCodec(codec{"proto"}))
}

type codec struct{ name string }

func (c codec) Name() string { return c.name }

func (c codec) Marshal(v any) ([]byte, error) {
	m, ok := v.(proto.Message)
	switch {
	case !ok:
		return nil, fmt.Errorf("%T is no message", v)
	case c.name == "proto":
		return proto.Marshal(m)
	}
	return JSON(m), nil
}

func (c codec) Unmarshal(b []byte, v any) error {
	m, ok := v.(proto.Message)
	switch {
	case !ok:
		return fmt.Errorf("%T is no message", v)
	case c.name == "proto":
		if err := proto.Unmarshal(b, m); err != nil {
			return err
		}
		return unknown(m.ProtoReflect())
	case len(b) == 0:
		return errors.New("there is no JSON object")
	}
	return protojson.Unmarshal(b, m)
}

// unknown refuses a request that has a field, at any depth, that this program does not know.
func unknown(m protoreflect.Message) (err error) {
	if len(m.GetUnknown()) > 0 {
		return fmt.Errorf("unknown field in %s: this daemon is older than the program that asks",
			m.Descriptor().Name())
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Message() != nil && f.Cardinality() != protoreflect.Repeated {
			err = unknown(v.Message())
		}
		return err == nil
	})
	return err
}
