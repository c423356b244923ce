package dmutex

import (
	"fmt"
	"time"
)

// Option changes how a Mutex works.
type Option interface{ apply(*Mutex) }

type option func(*Mutex)

func (o option) apply(m *Mutex) { o(m) }

// WithKeepAlive has a lock that Lock or TryLock got be renewed until Unlock: every
// third of the ttl, in one round trip, by a goroutine that lives as long as the hold.
// The ttl is then only what the others wait if the holder dies, so it may be short.
// Whether the hold was lost all the same is told by [Mutex.Lost].
//
// A holder that hangs and is not dead holds for ever, and so does one that leaves Unlock
// out; see [WithMaxHold].
func WithKeepAlive() Option { return option(func(m *Mutex) { m.keepAlive = true }) }

// WithMaxHold bounds how long a lock may be held with renewals, by [WithKeepAlive],
// [Mutex.Do] and [Mutex.Extend] alike: none is made that would let the hold last for
// longer than d. d is at least the ttl, or every method returns an error.
func WithMaxHold(d time.Duration) Option {
	return option(func(m *Mutex) {
		if m.maxHold = d; d < m.ttl && m.err == nil {
			m.err = fmt.Errorf("hold is bounded by %v, less than its ttl of %v", d, m.ttl)
		}
	})
}

// WithFencing has each hold come with a fencing token, see [Mutex.Token]: a number that
// rises from hold to hold of a key, minted in the same step in which the lock is taken.
// The storage keeps the greatest that it has seen with what it guards, and refuses a
// write with a smaller one. Then a holder that was stopped past its ttl, and does not
// know it, cannot overwrite what the next one wrote; nothing else makes sure of that.
//
// A token is the time of the Redis server in microseconds, or one more than the latest
// if that is greater, so tokens rise even after Redis lost all its data. The latest is
// kept for a day after it was given; a clock that is set back by more than that, or set
// back when the data are lost, lets a smaller one be given. All mutexes that are to be
// compared must use this option.
func WithFencing() Option { return option(func(m *Mutex) { m.signature.fencing = true }) }

// WithOwner has each hold say whose it is, to whoever asks with [Mutex.Inspect]: a host,
// a job, a version. It can be read by all who can read the key in Redis, so it must be no
// secret. label has 64 bytes at the most, or every method returns an error.
func WithOwner(label string) Option {
	return option(func(m *Mutex) {
		if m.signature.owner = label; len(label) > maxOwner && m.err == nil {
			m.err = fmt.Errorf("label of the owner has %d bytes, more than %d", len(label), maxOwner)
		}
	})
}

const maxOwner = 64
