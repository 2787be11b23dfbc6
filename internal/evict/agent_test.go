package evict

import "time"

// SetAgentTime sets how long the agent of a guest may take to answer, until what it returns is
// called.
func SetAgentTime(t time.Duration) (undo func()) {
	before := agentTime
	agentTime = t
	return func() { agentTime = before }
}
