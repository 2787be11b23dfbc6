package evict

import "vacate/internal/evict/journal"

// ID names one eviction, on both of its hosts and in their journals.
type ID = journal.ID
