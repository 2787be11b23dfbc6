package orders

import (
	"errors"
	"io/fs"
)

// Standing is what a leader has told a host of its place in the fleet: F6 in docs/protocol.md. The
// host goes by it, also while it hears no leader.
type Standing struct {
	Epoch uint64 `json:"epoch"` // of the leader that told it
	// Phase is that of the host's maintenance; empty: it is in service.
	Phase  string `json:"phase,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Rules are those that the host can hold by itself.
	Rules []string `json:"rules,omitempty"`
}

// ReadStanding reads a file; there need be none.
func ReadStanding(path string) (s Standing, err error) {
	b, err := read(path, maxStanding)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	} else if err != nil {
		return s, err
	}
	return parse[Standing](standingHeader, b)
}

// WriteStanding makes one durable.
func WriteStanding(path string, s Standing) error {
	b, err := format(standingHeader, s)
	if err != nil {
		return err
	}
	if len(b) > maxStanding {
		return errors.New("it is too long")
	}
	return replace(path, b)
}
