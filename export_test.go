package dmutex

import "time"

// Until returns when the hold of a mutex ends on our own clock, which is what its
// user may rely on.
func Until(m *Mutex) time.Time {
	m.holds.mu.Lock()
	defer m.holds.mu.Unlock()
	if m.holds.current == nil {
		return time.Time{}
	}
	return m.holds.current.until()
}
