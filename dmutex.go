package dmutex

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/go-redis/redis/v8"
)

// DMutex is a distributed mutex. Its methods are documented at [Mutex], which
// implements it; it will have these five for ever, so it is safe to mock.
type DMutex interface {
	Lock(ctx context.Context) error
	TryLock(ctx context.Context) (acquired bool, err error)
	Unlock(ctx context.Context) error
	WaitUntilUnlocked(ctx context.Context) (isTTLExpired bool, err error)
	LockedUntil(ctx context.Context) (time.Duration, error)
}

var _ DMutex = (*Mutex)(nil)

// Mutex is one user's view of the lock with a certain key in Redis.
type Mutex struct {
	key   string
	names names
	ttl   time.Duration
	node  node
	err   error // of New, told by every method

	holds holds

	// seen is the hold that made the latest TryLock fail, or whose end a
	// WaitUntilUnlocked did not live to see; nil once its end was told.
	seen atomic.Pointer[sighting]
}

// Option changes how a Mutex works. There are none yet.
type Option interface{ apply(*Mutex) }

func New(key string, ttl time.Duration, client redis.UniversalClient, opts ...Option) *Mutex {
	m := &Mutex{key: key, ttl: ttl}
	m.node, m.err = nodeOf(client)
	switch {
	case key == "":
		m.err = errors.New("key is empty")
	case ttl < time.Millisecond:
		m.err = fmt.Errorf("ttl is %v, less than a millisecond", ttl)
	default:
		m.names = namesOf(key)
	}
	for _, opt := range opts {
		if opt != nil {
			opt.apply(m)
		}
	}
	return m
}

func (m *Mutex) Lock(ctx context.Context) error {
	c, err := m.lock(ctx)
	if err != nil {
		return &ErrFailedToLock{Key: m.key, Err: err}
	}
	m.granted(c)
	return nil
}

func (m *Mutex) lock(ctx context.Context) (*claim, error) {
	if err := m.check(ctx); err != nil {
		return nil, err
	}
	return m.acquire(ctx)
}

func (m *Mutex) TryLock(ctx context.Context) (acquired bool, err error) {
	if acquired, err = m.tryLock(ctx); err != nil {
		return false, &ErrFailedToLock{Key: m.key, Err: err}
	}
	return acquired, nil
}

func (m *Mutex) tryLock(ctx context.Context) (bool, error) {
	if err := m.check(ctx); err != nil {
		return false, err
	}
	c := newClaim(m.node, m.names, m.ttl, newInbox())
	sent := time.Now()
	seen, err := c.try(ctx)
	switch {
	case err != nil:
		c.abandon(ctx)
		return false, err
	case seen.status == "held":
		m.granted(c)
		return true, nil
	case seen.ttl < 0:
		return false, ErrNoExpiry
	}
	m.seen.Store(sighted(seen, sent))
	return false, nil
}

func (m *Mutex) Unlock(ctx context.Context) error {
	if err := m.unlock(ctx); err != nil {
		return &ErrFailedToUnlock{Key: m.key, Err: err}
	}
	return nil
}

func (m *Mutex) unlock(ctx context.Context) error {
	if err := m.check(ctx); err != nil {
		return err
	}
	g, err := m.holds.take()
	if err != nil {
		return err
	}
	err = g.release(ctx)
	if err != nil && !errors.Is(err, ErrLockLost) {
		m.holds.putBack(g)
	}
	return err
}

func (m *Mutex) WaitUntilUnlocked(ctx context.Context) (isTTLExpired bool, err error) {
	if err := m.check(ctx); err != nil {
		return false, m.failed("wait for", err)
	}
	isTTLExpired, err = m.watch(ctx)
	return isTTLExpired, m.failed("wait for", err)
}

func (m *Mutex) LockedUntil(ctx context.Context) (time.Duration, error) {
	if err := m.check(ctx); err != nil {
		return 0, m.failed("look at", err)
	}
	seen, err := look(ctx, m.node, m.names, "")
	switch {
	case err != nil:
		return 0, m.failed("look at", err)
	case seen.free:
		return 0, nil
	case seen.ttl < 0:
		return 0, m.failed("look at", ErrNoExpiry)
	}
	return seen.ttl, nil
}

func (m *Mutex) failed(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("dmutex: failed to %s %q: %w", what, m.key, err)
}

func (m *Mutex) check(ctx context.Context) error {
	switch {
	case ctx == nil:
		return errors.New("ctx is nil")
	case m.node == nil && m.err == nil:
		return errors.New("mutex was not made by New")
	}
	return m.err
}

// granted records that c got the lock.
func (m *Mutex) granted(c *claim) {
	m.holds.add(c)
	m.seen.Store(nil)
}
