package evict

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// ID names one eviction on both of its hosts. It is random, so that none is ever taken for
// another.
type ID [16]byte

// NewID returns a new one.
func NewID() ID {
	var id ID
	rand.Read(id[:]) // never fails
	return id
}

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID) UnmarshalText(b []byte) error {
	if len(b) != hex.EncodedLen(len(id)) {
		return fmt.Errorf("eviction id of %d digits, want %d", len(b), hex.EncodedLen(len(id)))
	}
	if _, err := hex.Decode(id[:], b); err != nil {
		return fmt.Errorf("eviction id: %w", err)
	}
	return nil
}
