package dmutex

import (
	"context"
	"time"
)

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

func newTicket(inbox, owner string) string { return string(appendTicket(nil, inbox, owner)) }

func newClaim(n node, names names, ttl time.Duration, inbox string, signed signature) *claim {
	ct := newClaimant(n, names, ttl)
	ct.signature = signed
	return ct.claim(inbox)
}

func (c *claim) release(ctx context.Context) error { return c.releaseTo(ctx, nil) }

// UnderWay is how many clients have requests under way.
func UnderWay() int {
	flights.mu.Lock()
	defer flights.mu.Unlock()
	return len(flights.byClient)
}
