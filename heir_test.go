package dmutex_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-redis/redis/v8"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// If the next waiter is of the client that releases, the release's own reply tells it.
func TestNextOfTheSameClientIsToldByTheRelease(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		requests := count(client)
		ctx := context.Background()
		require.NoError(t, locked(t, "k", long, client).Unlock(ctx)) // the server knows the scripts now
		holder, next := locked(t, "k", long, client), dmutex.New("k", 10*time.Second, client)
		gotten := lock(ctx, next)
		synctest.Wait()

		before, start := requests.n.Load(), time.Now()
		require.NoError(t, holder.Unlock(ctx))
		require.NoError(t, receive(t, gotten))
		require.EqualValues(t, 1, requests.since(before))
		require.Zero(t, time.Since(start))
		require.Equal(t, 10*time.Second, b.Mini.TTL("k"))
		require.Equal(t, start.Add(9900*time.Millisecond), dmutex.Until(next))
		require.NoError(t, next.Unlock(ctx))
		require.Empty(t, leftovers(client))
	})
}

// Who comes from elsewhere keeps its turn.
func TestNextOfTheSameClientDoesNotOvertake(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		ctx := timeout(t)
		client := s.Client()
		holder := locked(t, "k", long, client)
		first, second := dmutex.New("k", long, s.Client()), dmutex.New("k", long, client)
		firstGot := lock(ctx, first)
		awaitQueue(t, client, "k", 1)
		secondGot := lock(ctx, second)
		awaitQueue(t, client, "k", 2)
		require.NoError(t, holder.Unlock(ctx))
		require.NoError(t, receive(t, firstGot))
		require.Empty(t, secondGot)
		require.NoError(t, first.Unlock(ctx))
		require.NoError(t, receive(t, secondGot))
		require.NoError(t, second.Unlock(ctx))
		requireClean(t, client)
	})
}

// The hold counts from before the release was sent.
func TestInheritedHoldCountsFromTheRelease(t *testing.T) {
	const (
		ttl  = 20 * time.Second
		slow = 100 * time.Millisecond
	)
	s := rig.Redis(t)
	p := rig.NewProxy(t, s.Addr)
	client := s.Client(func(o *redis.Options) { o.Addr = p.Addr })
	ctx := timeout(t)
	holder, next := locked(t, "k", long, client), dmutex.New("k", ttl, client)
	gotten := lock(ctx, next)
	awaitQueue(t, s.Client(), "k", 1)
	time.Sleep(slow) // it knows its place, or is told by a message: then it counts from later on
	p.Delay(slow)
	released := time.Now()
	require.NoError(t, holder.Unlock(ctx))
	sent := time.Since(released) // and answered
	require.NoError(t, receive(t, gotten))
	until := dmutex.Until(next)
	require.LessOrEqual(t, until, released.Add(ttl-ttl/100+time.Millisecond))
	require.Greater(t, until, released.Add(ttl-ttl/100-sent))
	p.Delay(0)
	require.NoError(t, next.Unlock(ctx))
}

// A release whose reply is lost may have given the lock away.
func TestInheritanceIsFoundAfterALostReply(t *testing.T) {
	for name, how := range map[string]rig.Loss{"cut": rig.Cut, "swallowed": rig.Swallow} {
		t.Run(name, func(t *testing.T) {
			s := rig.Redis(t)
			p := rig.NewProxy(t, s.Addr)
			client := s.Client(func(o *redis.Options) { o.Addr, o.ReadTimeout = p.Addr, 200*time.Millisecond })
			ctx := timeout(t)
			for range 10 {
				holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
				gotten := lock(ctx, next)
				awaitQueue(t, s.Client(), "k", 1)
				time.Sleep(5 * time.Millisecond) // most often it knows its place then
				p.LoseReply(script, how)
				start := time.Now()
				require.NoError(t, holder.Unlock(ctx))
				require.NoError(t, receive(t, gotten))
				require.Less(t, time.Since(start), 3*time.Second, "less than a waiter sleeps")
				require.NoError(t, next.Unlock(ctx))
			}
			requireClean(t, s.Client())
		})
	}
}

// Nor does the waiter wait until it is known that the reply is lost.
func TestInheritanceIsFoundWhileTheReplyIsAwaited(t *testing.T) {
	s := rig.Redis(t)
	p := rig.NewProxy(t, s.Addr)
	client := s.Client(func(o *redis.Options) { o.Addr, o.ReadTimeout = p.Addr, hang })
	ctx := timeout(t)
	require.NoError(t, locked(t, "k", long, client).Unlock(ctx)) // the server knows the scripts now
	holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
	gotten := lock(ctx, next)
	awaitQueue(t, s.Client(), "k", 1)
	time.Sleep(50 * time.Millisecond) // most often it knows its place then
	p.LoseReply(script, rig.Swallow)
	start := time.Now()
	unlocked := make(chan error, 1)
	go func() { unlocked <- holder.Unlock(ctx) }()
	require.NoError(t, receive(t, gotten))
	require.Less(t, time.Since(start), 3*time.Second, "less than a waiter sleeps")
	p.CutAll()
	require.NoError(t, receive(t, unlocked))
	require.NoError(t, next.Unlock(ctx))
	requireClean(t, s.Client())
}

// A waiter that gives up when it is given the lock passes it on.
func TestInheritanceIsPassedOn(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client := s.Client()
		for i := range 300 {
			ctx, cancel := context.WithCancel(context.Background())
			holder, next := dmutex.New("k", long, client), dmutex.New("k", long, client)
			require.NoError(t, holder.Lock(timeout(t))) // a request of the turn before may hold it for a moment
			gotten := lock(ctx, next)
			if i%2 == 0 {
				awaitQueue(t, client, "k", 1)
			}
			go cancel()
			require.NoError(t, holder.Unlock(context.Background()))
			if receive(t, gotten) == nil {
				require.NoError(t, next.Unlock(context.Background()))
			}
			after := dmutex.New("k", long, client)
			require.NoError(t, after.Lock(timeout(t)))
			require.NoError(t, after.Unlock(context.Background()))
		}
		requireClean(t, client)
	})
}

// Its time is over before others would look again, wherever they are.
func TestHeirThatDiesIsNoticed(t *testing.T) {
	const ttl = time.Second
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		other := b.Client()
		defer other.Close()
		holder := locked(t, "k", long, client)
		dies := lock(ctx, dmutex.New("k", ttl, client))
		time.Sleep(time.Millisecond)
		last := dmutex.New("k", long, other)
		gotten := lock(ctx, last)
		synctest.Wait()
		require.NoError(t, holder.Unlock(ctx))
		require.NoError(t, receive(t, dies))
		synctest.Wait()
		b.Advance(ttl + 300*time.Millisecond)
		synctest.Wait()
		require.Len(t, gotten, 1, "not within 300 ms")
		require.NoError(t, <-gotten)
		require.NoError(t, last.Unlock(ctx))
	})
}

func TestTokensOfHeirsRise(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		ctx := timeout(t)
		client := s.Client()
		const turns = 20
		tokens := make(chan int64, turns) // in the order of the holds
		holder := dmutex.New("k", long, client, dmutex.WithFencing())
		require.NoError(t, holder.Lock(ctx))
		latest := holder.Token()
		var all sync.WaitGroup
		for range turns {
			all.Go(func() {
				m := dmutex.New("k", long, client, dmutex.WithFencing())
				if assert.NoError(t, m.Lock(ctx)) {
					tokens <- m.Token()
					assert.NoError(t, m.Unlock(ctx))
				}
			})
		}
		awaitQueue(t, s.Client(), "k", turns)
		require.NoError(t, holder.Unlock(ctx))
		for range turns {
			token := receive(t, tokens)
			require.Greater(t, token, latest)
			latest = token
		}
		all.Wait()
	})
}
