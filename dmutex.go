// Package dmutex is a distributed mutex on Redis: at most one of the processes
// that use the same key holds it, waiters get it promptly and in the order in
// which they came, and a bystander can wait until it is free and learn whether the
// holder finished or ran out of time.
//
// # What is guaranteed
//
//   - Exclusion: on one Redis that keeps its data, two holds of a key do not
//     overlap, for as long as each holder stops working when its ttl is over. The
//     ttl counts from before the request for the lock was sent, on the holder's
//     own monotonic clock, less 1 % for the drift of clocks; no server's clock is
//     ever compared with it.
//   - Liveness: every hold ends. A holder that dies keeps the lock for its ttl and
//     not longer.
//   - Order: first come, first served, by the server's clock, among waiters that
//     live. A try may not overtake them.
//   - Truth: what is not known is not said. A lost reply never makes a lock that
//     was granted look taken, or a release look lost; a request whose outcome is
//     unknown is followed by one that undoes it.
//   - Cleanliness: no key without expiry, and no goroutine, connection or
//     subscription a few seconds after the last wait. A mutex that nobody has to
//     wait for starts nothing.
//
// # What is not
//
// A lock with a ttl is a lease. A process that is stopped for longer than that (a
// long garbage collection, a suspended machine) does not know it when it wakes, and
// may write after the next holder has begun. If that would corrupt data, and not
// merely do work twice, the storage has to refuse the late writer, by a fencing
// token ([WithFencing]) or a condition on the version that was read; see Martin
// Kleppmann, "How to do distributed locking" (2016).
//
// Redis replicates asynchronously: a failover to a replica can lose a lock that
// was just granted, and grant it again. It counts a ttl on its wall clock: a step
// of that clock makes ttls end early or late.
//
// A mutex is not re-entrant: a second Lock waits for the first one's Unlock.
//
// # How long to hold it
//
// A ttl is a guess of how long the work takes. [Mutex.Do] needs none: it renews the lock
// while a function runs, ends its ctx when the lock is lost, and releases the lock. The
// ttl is then what the others wait if the process dies. [WithKeepAlive] and
// [Mutex.Lost] do the same for Lock and Unlock, [Mutex.Extend] renews by hand, and
// [WithMaxHold] bounds them all.
//
// # How it works
//
// Each attempt has a ticket, "<inbox>.<random>", chosen before anything is sent;
// the lock is held by the ticket that is the value of its key. redsync runs
// acquire and release, on the answers of our two scripts in place of its own:
//
//	Lock    acquire ──▶ lock is free, nobody waits: its value is the ticket now
//	           │
//	           └──────▶ taken: the ticket is in the queue. The waiter sleeps until
//	                    a message for it comes, the holder's ttl is over, or some
//	                    seconds have passed, and runs acquire again
//
//	Unlock  release ──▶ in one step: the key is deleted, the release is published
//	                    on "dmutex-<key>", and the lock is handed over: the first
//	                    ticket in the queue is published in its inbox. If somebody
//	                    listens there, the lock's value is that ticket, for a grace
//	                    of a second in which it has to claim it with acquire; if
//	                    not, its process is gone, and the next one's turn has come
//
// So a release wakes one waiter, however many there are, and nobody can come in
// between, plain redsync included, because the key exists. All waiters of a client
// share one subscription. Messages are hints: the truth is the lock's value, and
// nothing waits for a message alone.
//
// If the first in the queue waits on the client that releases, it needs no message and
// claims nothing: release gives it the lock for its whole ttl, which counts from before
// the request was sent, and the answer says so. If that does not come in a tenth of a
// second, or is lost, the waiter looks.
//
// A client has four requests under way, as long as they are answered; what is asked for
// meanwhile goes together, in one pipeline, when one of them is.
//
// A ticket that was ended leaves a tombstone for 15 seconds, so that a repeat of
// its release, after a lost reply, is told apart from a lock that was lost; so that
// a request for the lock that arrives after its own clean-up finds it ended; and so
// that WaitUntilUnlocked can tell a release from an expiry.
package dmutex

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/go-redis/redis/v8"
)

// DMutex is a distributed mutex. Its methods are documented at [Mutex], which
// implements it. It will have these five for ever, so that it can be mocked.
type DMutex interface {
	Lock(ctx context.Context) error
	TryLock(ctx context.Context) (acquired bool, err error)
	Unlock(ctx context.Context) error
	WaitUntilUnlocked(ctx context.Context) (isTTLExpired bool, err error)
	LockedUntil(ctx context.Context) (time.Duration, error)
}

var _ DMutex = (*Mutex)(nil)

// Mutex is a user of the lock with a certain key in Redis. All mutexes with one key
// on one Redis, in this process or another, exclude each other.
//
// Its methods may be called by several goroutines at once. Those who share a mutex
// cannot be told apart, so each Lock or TryLock that got the lock must be followed
// by one Unlock, even if the ttl has run out: then an Unlock that comes late is not
// taken for one of a newer hold. If one is left out, each later Unlock of this mutex
// is taken for the one before it: it answers [ErrLockLost] and releases nothing. Where
// that can happen, make a new mutex for each use; that costs nothing.
//
// The zero value is of no use; its methods return an error.
type Mutex struct {
	claimant
	key string
	err error // of New, told by every method

	keepAlive bool
	maxHold   time.Duration // 0: no bound

	holds holds

	// seen is the hold that made the latest TryLock fail, or whose end a
	// WaitUntilUnlocked did not live to see; nil once its end was told.
	seen atomic.Pointer[sighting]
}

// New returns a mutex for the lock with the given key on client's Redis. A hold
// lasts for ttl, in whole milliseconds, unless it is released before; choose it
// longer than the work takes with everything that may delay it, but no longer than
// the others can wait if the holder dies.
//
// client is a *redis.Client, from NewClient or NewFailoverClient, a
// *redis.ClusterClient, or a pointer to a type that embeds one. It is the caller's to
// close; when it is closed, all waits on it end with an error.
//
// New makes no request and starts nothing, so it may be called for every use. It
// never fails: an empty key, a ttl under a millisecond, and a client that is nil or
// a *redis.Ring (whose nodes could each grant the lock) make every method return an
// error and send nothing. So does a key that Redis Cluster cannot serve, with a
// cluster client: one with a closing brace but no hash tag.
func New(key string, ttl time.Duration, client redis.UniversalClient, opts ...Option) *Mutex {
	m := &Mutex{key: key}
	node, err := nodeOf(client, key)
	switch {
	case key == "":
		m.err = errors.New("key is empty")
	case ttl < time.Millisecond:
		m.err = fmt.Errorf("ttl is %v, less than a millisecond", ttl)
	case err != nil:
		m.err = err
	default:
		m.claimant = newClaimant(node, namesOf(key), ttl.Truncate(time.Millisecond))
	}
	for _, opt := range opts {
		if opt != nil {
			opt.apply(m)
		}
	}
	return m
}

// Lock waits until it holds the lock or ctx ends, whatever the number of others and
// however long that takes. It returns as soon as ctx ends, and then does not hold
// the lock: if it was granted at that moment it is passed on.
//
// Any error is an [*ErrFailedToLock]. It matches ctx.Err() if ctx ended;
// [ErrNoExpiry] or the server's answer if the key holds something that is no lock;
// redis.ErrClosed if the client is closed; and the network's error if Redis could
// not be reached at the first try. Once it waits, a fault that may pass does not
// end it.
func (m *Mutex) Lock(ctx context.Context) error {
	c, err := m.lock(ctx)
	if err != nil {
		return err
	}
	m.granted(c)
	return nil
}

// lock returns an *ErrFailedToLock, as tryLock does.
func (m *Mutex) lock(ctx context.Context) (_ *claim, err error) {
	defer m.nameFailure(&err)
	if err := m.checkWith(ctx); err != nil {
		return nil, err
	}
	c, err := m.acquire(ctx)
	if err == nil {
		m.seen.Store(nil)
	}
	return c, err
}

// TryLock takes the lock if it is free and nobody waits for it, in one round trip.
// If somebody else holds it the result is (false, nil).
//
// Any error is an [*ErrFailedToLock], which matches what that of Lock does; the lock
// is not held then. An answer that came when the ttl was over already is an error.
func (m *Mutex) TryLock(ctx context.Context) (acquired bool, err error) {
	c, err := m.tryLock(ctx)
	if c == nil {
		return false, err
	}
	m.granted(c)
	return true, nil
}

// tryLock returns nil if somebody else holds the lock.
func (m *Mutex) tryLock(ctx context.Context) (_ *claim, err error) {
	defer m.nameFailure(&err)
	if err := m.checkWith(ctx); err != nil {
		return nil, err
	}
	c := m.claim("")
	sent := time.Now()
	seen, err := c.try(ctx)
	switch {
	case err != nil:
		c.abandon(ctx)
		return nil, err
	case seen.status == "held":
		m.seen.Store(nil)
		return c, nil
	case seen.ttl < 0:
		return nil, ErrNoExpiry
	}
	if time.Since(sent) > repeatFloor {
		c.abandon(ctx) // an earlier copy of the request may still be on its way
	}
	m.seen.Store(sighted(seen, sent))
	return nil, nil
}

// Unlock releases the lock and hands it to the first who waits, in one round trip.
// It takes no notice of the end of ctx, as a release must not be left out; it is
// tried for about a second if Redis cannot be reached, and bounded by ten seconds, and
// by what the client takes at the most to dial, if that is more.
//
// Any error is an [*ErrFailedToUnlock]. If it matches [ErrNotHeld], this mutex holds
// nothing: it never did, or was unlocked already. If it matches [ErrLockLost], the
// hold had ended before, by expiry or by a third party, and somebody else may hold
// the lock; nothing was changed. With any other error it is not known whether the
// lock was released; that is tried on in the background for ten seconds, and it ends
// with the ttl anyway. Unlock may then be called again, as long as nobody has locked
// this mutex anew: goroutines that share it had better not.
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
	c, err := m.holds.take()
	if err != nil {
		return err
	}
	err = m.giveBack(ctx, c)
	if err != nil && !errors.Is(err, ErrLockLost) {
		m.holds.putBack(c)
	}
	return err
}

// giveBack ends a hold, in the background if Redis does not answer.
func (m *Mutex) giveBack(ctx context.Context, h *hold) error {
	h.leave()
	err := m.release(ctx, h)
	if err != nil && !errors.Is(err, ErrLockLost) {
		h.abandon(ctx)
	}
	return err
}

// release releases a hold, and tells the first of this process who waits for the lock
// if it is the next.
func (m *Mutex) release(ctx context.Context, h *hold) error {
	next, heir := subscribers.heir(m.line())
	if next == nil {
		return h.releaseTo(ctx, nil)
	}
	// If the answer takes long it may be lost, and the lock be given away all the same.
	late := time.AfterFunc(repeatFloor, func() { next.tell(heir.ticket, news{}) })
	defer late.Stop()
	err := h.releaseTo(ctx, heir)
	next.inherit(heir)
	runtime.Gosched() // it has waited for longer, and holds the lock
	return err
}

// Do runs f while it holds the lock: it waits for the lock as [Mutex.Lock] does, keeps
// it for as long as f takes, and releases it, also if f panics.
//
// The lock is renewed every third of its ttl, so the ttl need not cover the work; it is
// what the others wait if this process dies. The ctx of f is derived from ctx, and ends
// at the moment when the lock can no longer be relied on: when Redis could not be
// reached until the ttl was over, when the key was deleted or taken over, or when
// [WithMaxHold] is reached. [context.Cause] tells which, and matches [ErrLockLost]. f
// should return then; what it writes after that moment may meet the next holder's
// writes. In a process that was stopped, Err of this very ctx tells the end at once;
// Done, and a ctx derived from this one, a moment later.
//
// The error is a [*ErrFailedToLock] if f was not run. Else it is what f returned,
// joined with a [*ErrFailedToUnlock] if the release failed; errors.Is and errors.As see
// both. The hold is Do's own: Unlock, Extend and Lost know nothing of it.
func (m *Mutex) Do(ctx context.Context, f func(ctx context.Context) error) error {
	c, err := m.lock(ctx)
	if err != nil {
		return err
	}
	return m.do(ctx, c, f)
}

// TryDo is [Mutex.Do] if the lock is free and nobody waits for it. If somebody else
// holds it the result is (false, nil), and f was not run.
func (m *Mutex) TryDo(ctx context.Context, f func(ctx context.Context) error) (ran bool, err error) {
	c, err := m.tryLock(ctx)
	if c == nil {
		return false, err
	}
	return true, m.do(ctx, c, f)
}

func (m *Mutex) do(ctx context.Context, c *claim, f func(ctx context.Context) error) (err error) {
	h := newHold(c, m.maxHold)
	var token int64 // 0 also hides that of a Do around this one
	if m.signature.fencing {
		token = c.token()
	}
	inner, end := context.WithCancelCause(context.WithValue(ctx, tokenKey{}, token))
	h.keep(true, end)
	inner = promptCtx{inner, h, end}
	defer func() {
		end(nil)
		if failed := m.giveBack(ctx, h); failed != nil {
			err = errors.Join(err, &ErrFailedToUnlock{Key: m.key, Err: failed})
		}
	}()
	return f(inner)
}

// Extend lets the lock that this mutex holds last for its ttl from now on, in one round
// trip. It is for holders who know how far they are; [WithKeepAlive] and [Mutex.Do] do
// it by themselves.
//
// Any error is an [*ErrFailedToExtend]. It matches [ErrNotHeld] if this mutex holds
// nothing, [ErrLockLost] if the hold has ended, and [ErrMaxHold] if it would last for
// longer than it may. With any other, ctx.Err() among them, it is not known whether the
// hold was extended, and its former end counts.
func (m *Mutex) Extend(ctx context.Context) error {
	if err := m.extend(ctx); err != nil {
		return &ErrFailedToExtend{Key: m.key, Err: err}
	}
	return nil
}

func (m *Mutex) extend(ctx context.Context) error {
	if err := m.checkWith(ctx); err != nil {
		return err
	}
	h := m.holds.newest()
	if h == nil {
		return ErrNotHeld
	}
	return h.extend(ctx)
}

// Lost returns a channel that is closed when the lock that this mutex holds can no
// longer be relied on: its ttl is over, or a renewal of [WithKeepAlive] found that it was
// deleted or taken over. It is not closed by Unlock. If the mutex holds nothing, or an
// Unlock got no answer, it is closed already.
//
// For as long as the hold lasts, the first call starts a goroutine that looks at the
// clock, if [WithKeepAlive] has not started one.
func (m *Mutex) Lost() <-chan struct{} {
	h := m.holds.newest()
	if h == nil {
		closed := make(chan struct{})
		close(closed)
		return closed
	}
	return h.keep(false, func(error) {})
}

// WaitUntilUnlocked waits until the hold that is there when it is called ends, or
// ctx does. The result is false if it was released, or if the lock is free; true if
// its ttl ran out, which means that the holder died, hangs or took too long. It
// says nothing of who holds the lock now: it may have been handed on at once.
//
// After a failed TryLock of this mutex it is the hold that made it fail which is
// waited for, even if it has ended since, so nothing is missed in between. That is
// remembered until it has been told once, or this mutex gets the lock; goroutines
// that share a mutex share this memory too.
//
// A hold whose key was deleted by a third party has not run out, and counts as
// released, unless it was renewed since it was seen last. Of one that speaks another
// protocol (plain redsync, which tells nobody that it releases), the end is noticed
// within 250 ms and taken for a release if its ttl was not over by then.
//
// The error matches ctx.Err() if ctx ended, [ErrFateUnknown] if the hold has ended
// and was seen last so long ago that Redis has forgotten how, and else what that of
// Lock does. The ttl of this mutex does not matter.
func (m *Mutex) WaitUntilUnlocked(ctx context.Context) (isTTLExpired bool, err error) {
	if err := m.checkWith(ctx); err != nil {
		return false, m.failed("wait for", err)
	}
	isTTLExpired, err = m.watch(ctx)
	return isTTLExpired, m.failed("wait for", err)
}

// LockedUntil returns the remaining ttl of whoever holds the lock, in whole
// milliseconds, in one round trip; 0 if it is free. The error matches [ErrNoExpiry]
// if the key never expires, and else ctx.Err() or what went wrong.
func (m *Mutex) LockedUntil(ctx context.Context) (time.Duration, error) {
	if err := m.checkWith(ctx); err != nil {
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

// Token returns the fencing token of the lock that this mutex holds: a positive number
// that is greater than that of each earlier hold. It is 0 if the mutex holds nothing,
// or was made without [WithFencing].
func (m *Mutex) Token() int64 {
	h := m.holds.newest()
	if h == nil || !m.signature.fencing {
		return 0
	}
	return h.token()
}

// TokenFrom returns the fencing token of the hold under which [Mutex.Do] runs a
// function with this ctx; 0 if there is none, see [Mutex.Token].
func TokenFrom(ctx context.Context) int64 {
	token, _ := ctx.Value(tokenKey{}).(int64)
	return token
}

type tokenKey struct{}

// Inspect tells who holds the lock, since when and for how long, and how many wait, in
// one round trip. It is meant for people: what it says may be over when it is read. The
// error matches ctx.Err(), or what went wrong.
func (m *Mutex) Inspect(ctx context.Context) (Info, error) {
	if err := m.checkWith(ctx); err != nil {
		return Info{}, m.failed("inspect", err)
	}
	info, err := inspect(ctx, m.node, m.names)
	return info, m.failed("inspect", err)
}

// nameFailure makes the error of an attempt to lock an *ErrFailedToLock.
func (m *Mutex) nameFailure(err *error) {
	if *err != nil {
		*err = &ErrFailedToLock{Key: m.key, Err: *err}
	}
}

// failed returns err as an error of a call that has no error type of its own.
func (m *Mutex) failed(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("dmutex: failed to %s %q: %w", what, m.key, err)
}

// line is where this process's waiters for the lock stand.
func (m *Mutex) line() lineID { return lineID{m.node.shared(), m.key} }

// check returns the error of bad arguments, to this call or to New.
func (m *Mutex) check(ctx context.Context) error {
	switch {
	case ctx == nil:
		return errors.New("ctx is nil")
	case m.node == nil && m.err == nil:
		return errors.New("mutex was not made by New")
	}
	return m.err
}

// checkWith is check for a call that does nothing once ctx has ended.
func (m *Mutex) checkWith(ctx context.Context) error {
	if err := m.check(ctx); err != nil {
		return err
	}
	return ctxErr(ctx)
}

// granted records a hold that Unlock will end.
func (m *Mutex) granted(c *claim) {
	h := newHold(c, m.maxHold)
	if m.keepAlive {
		h.keep(true, func(error) {})
	}
	m.holds.add(h)
}
