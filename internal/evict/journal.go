package evict

import "vacate/internal/evict/journal"

// Journal is where an engine notes what must outlive it, for one eviction. Its methods return when
// that is durable. Several goroutines may call them.
type Journal interface {
	// Note sets the eviction's mark, and why it got it.
	Note(m Mark, reason string) error
	// Keep stores bytes under a name that the engine chooses. It replaces those stored before.
	Keep(name string, b []byte) error
	// Kept returns what was stored. If nothing was, it returns an error that wraps fs.ErrNotExist.
	Kept(name string) ([]byte, error)
}

// The names under which engines keep things.
const (
	keptFacts = "facts" // source: hostFacts; JSON
	// both: QEMU's stream from its header to the footer of the RAM section's start
	keptHead = "head"
	keptLoad = "load" // source: the device state
	// source: empty; memory of the frozen VM was given back to the host
	keptGivenBack = "given-back"
	// destination: QEMU's word for the state that the VM stood in; without it the twin must run
	keptStands = "stands"
	// destination: empty; the twin ran. If it is paused since, its operator paused it
	keptRan = "ran"
	// source: empty; the destination said that the twin is dead for good, or never ran
	keptDead = "dead-there"
	// KeptHeard is kept by a destination, and empty: the source knows that the VM is whole there.
	KeptHeard = journal.Lasting + "heard"
	// KeptHuge is a HugePages of an eviction that a destination takes or took: JSON.
	KeptHuge = journal.Lasting + "huge"
	// KeptTrace is a Trace of an eviction that a source ended: JSON, compressed with gzip.
	KeptTrace  = journal.Lasting + "trace"
	keptDomain = journal.Lasting + "domain" // both: domainFacts; JSON
	// destination: JSON of guestmem.Block, where the twin's memory is
	keptMemory = "memory"
)

// StoodThere returns QEMU's word for the state that a VM stood in, as its destination heard it. It
// is empty if the VM ran, or that is not known.
func StoodThere(j Journal) string {
	b, err := j.Kept(keptStands)
	if err != nil {
		return ""
	}
	return string(b)
}

// DeadThere reports whether it is certain, without an operator's assertion, that the twin never
// runs again.
func DeadThere(j Journal) bool {
	_, err := j.Kept(keptDead)
	return err == nil
}

// note is Note for an engine that may have no journal.
func note(j Journal, m Mark, reason string) error {
	if j == nil {
		return nil
	}
	return j.Note(m, reason)
}

// keep is Keep for an engine that may have no journal.
func keep(j Journal, name string, b []byte) error {
	if j == nil {
		return nil
	}
	return j.Keep(name, b)
}
