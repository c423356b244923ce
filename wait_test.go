package dmutex_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2/server"
	"github.com/go-redis/redis/v8"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// In a bubble no time passes by itself, so what takes no time was told, and what
// takes some was found out by a timer.
const atOnce = time.Millisecond

func TestWaiterIsWokenAtOnce(t *testing.T) {
	for _, waited := range []time.Duration{0, 9 * time.Second, time.Hour} {
		t.Run(waited.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
				ctx := context.Background()
				holder, next := locked(t, "k", 2*time.Hour, client), dmutex.New("k", long, client)
				gotten := lock(ctx, next)
				time.Sleep(waited)
				synctest.Wait()
				start := time.Now()
				require.NoError(t, holder.Unlock(ctx))
				require.NoError(t, <-gotten)
				require.Less(t, time.Since(start), atOnce)
				require.NoError(t, next.Unlock(ctx))
			})
		})
	}
}

func TestAllOfManyWaitersAreServedAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		other := b.Client()
		defer other.Close()
		holder := locked(t, "k", long, client)
		var wg sync.WaitGroup
		for i := range 200 {
			m := dmutex.New("k", long, []*redis.Client{client, other}[i%2])
			wg.Go(func() {
				if assert.NoError(t, m.Lock(ctx)) {
					assert.NoError(t, m.Unlock(ctx))
				}
			})
		}
		synctest.Wait()
		start := time.Now()
		require.NoError(t, holder.Unlock(ctx))
		wg.Wait()
		require.Less(t, time.Since(start), atOnce)
	})
}

func TestCostOfHandOverDoesNotGrow(t *testing.T) {
	// cost returns the requests per hand-over while all waiters come back for more.
	cost := func(t *testing.T, s *rig.Server, waiters int) float64 {
		const handOvers = 500
		ctx := timeout(t)
		client := s.Client()
		requests := count(client)
		key := fmt.Sprint(waiters)
		holder := locked(t, key, long, client)
		var (
			wg            sync.WaitGroup
			done          int   // guarded by the lock
			before, after int64 // of requests
		)
		for range waiters {
			m := dmutex.New(key, long, client)
			wg.Go(func() {
				for more := true; more; {
					if !assert.NoError(t, m.Lock(ctx)) {
						return
					}
					if done++; done == handOvers {
						after = requests.n.Load()
					}
					more = done < handOvers
					assert.NoError(t, m.Unlock(ctx))
				}
			})
		}
		awaitQueue(t, client, key, int64(waiters))
		before = requests.n.Load()
		require.NoError(t, holder.Unlock(ctx))
		wg.Wait()
		return float64(after-before) / handOvers
	}
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		few, many := cost(t, s, 10), cost(t, s, 200)
		require.LessOrEqual(t, few, 3.05)
		require.LessOrEqual(t, many, 3.05)
		require.InEpsilon(t, few, many, 0.1)
	})
}

func TestIdleWaitersCostLittle(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		const waiters = 1000
		ctx, cancel := context.WithCancel(context.Background())
		requests := count(client)
		holder := locked(t, "k", time.Hour, client)
		var wg sync.WaitGroup
		for range waiters {
			m := dmutex.New("k", long, client)
			wg.Go(func() { assert.ErrorIs(t, m.Lock(ctx), context.Canceled) })
		}
		synctest.Wait()

		require.Equal(t, map[string]int{inboxes(b)[0]: 1}, b.Mini.PubSubNumSub(inboxes(b)...))
		require.Len(t, goroutinesOf("(*subscriber)"), 2)
		require.EqualValues(t, 1, b.Mini.CurrentConnectionCount()-int(client.PoolStats().TotalConns)+1, "connections beside the pool")

		const seconds = 15
		before := requests.n.Load()
		time.Sleep(seconds * time.Second)
		require.Less(t, requests.since(before), int64(waiters*seconds))
		cancel()
		wg.Wait()
		synctest.Wait()
		time.Sleep(time.Second) // the places are given up in the background
		require.False(t, b.Mini.Exists(queueOf("k")))
		require.NoError(t, holder.Unlock(context.Background()))
	})
}

// inboxes returns the inbox channels that are subscribed.
func inboxes(b *rig.Bubble) []string { return b.Mini.PubSubChannels("dmutex-inbox:*") }

func TestDeadHoldersLockIsTakenAfterItsTTL(t *testing.T) {
	for _, ttl := range []time.Duration{50 * time.Millisecond, time.Second, 17 * time.Second, 3 * time.Minute} {
		for _, waiters := range []int{1, 20} {
			t.Run(fmt.Sprintf("%v %d waiting", ttl, waiters), func(t *testing.T) {
				inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
					ctx := context.Background()
					start := time.Now()
					locked(t, "k", ttl, client)
					var wg sync.WaitGroup
					first := make(chan time.Duration, waiters)
					for range waiters {
						m := dmutex.New("k", long, client)
						wg.Go(func() {
							if assert.NoError(t, m.Lock(ctx)) {
								first <- time.Since(start)
								assert.NoError(t, m.Unlock(ctx))
							}
						})
					}
					synctest.Wait()
					b.Advance(ttl + 300*time.Millisecond)
					wg.Wait()
					took := <-first
					require.GreaterOrEqual(t, took, ttl)
					require.LessOrEqual(t, took, ttl+300*time.Millisecond)
				})
			})
		}
	}
}

// The holder was handed the lock, so the waiters have not seen its ttl yet.
func TestDeadHoldersLockIsTakenAfterAHandOver(t *testing.T) {
	for _, ttl := range []time.Duration{50 * time.Millisecond, 500 * time.Millisecond, 3 * time.Second} {
		t.Run(ttl.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
				ctx := context.Background()
				holder := locked(t, "k", long, client)
				dies := lock(ctx, dmutex.New("k", ttl, client))
				time.Sleep(time.Millisecond)
				next := dmutex.New("k", long, client)
				gotten := lock(ctx, next)
				synctest.Wait()
				require.NoError(t, holder.Unlock(ctx))
				require.NoError(t, receive(t, dies))
				synctest.Wait()
				start := time.Now()
				b.Advance(ttl + 300*time.Millisecond)
				synctest.Wait()
				require.Len(t, gotten, 1, "not within 300 ms")
				require.NoError(t, <-gotten)
				require.LessOrEqual(t, time.Since(start), ttl+300*time.Millisecond)
				require.NoError(t, next.Unlock(ctx))
			})
		})
	}
}

// Waiters whose process is gone, or does not react, are passed over.
func TestDeadWaitersArePassedOver(t *testing.T) {
	t.Run("gone", func(t *testing.T) {
		inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
			ctx := context.Background()
			holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
			for i := range 3 { // tickets of processes that nobody hears of any more
				_, err := b.Mini.ZAdd(queueOf("k"), float64(i+1), fmt.Sprintf("%x.%x", 0xdead, i))
				require.NoError(t, err)
			}
			gotten := lock(ctx, next)
			synctest.Wait()
			start := time.Now()
			require.NoError(t, holder.Unlock(ctx))
			require.NoError(t, <-gotten)
			require.Less(t, time.Since(start), atOnce)
			require.NoError(t, next.Unlock(ctx))
		})
	})
	t.Run("stopped", func(t *testing.T) {
		inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
			ctx := context.Background()
			other := b.Client()
			defer other.Close()
			holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
			stopped := other.Subscribe(ctx, "dmutex-inbox:dead") // hears, and does nothing
			defer stopped.Close()
			_, err := stopped.Receive(ctx)
			require.NoError(t, err)
			for i := range 3 {
				_, err := b.Mini.ZAdd(queueOf("k"), float64(i+1), fmt.Sprintf("%x.%x", 0xdead, i))
				require.NoError(t, err)
			}
			gotten := lock(ctx, next)
			synctest.Wait()
			start := time.Now()
			require.NoError(t, holder.Unlock(ctx))
			b.Advance(1100 * time.Millisecond)
			require.NoError(t, receive(t, gotten))
			require.Less(t, time.Since(start), 1200*time.Millisecond, "more than one grace for one process")
			require.NoError(t, next.Unlock(ctx))
			var messages []string
			for len(messages) < 3 {
				message, err := stopped.ReceiveMessage(ctx)
				require.NoError(t, err)
				messages = append(messages, message.Payload)
			}
			require.Equal(t, []string{"dead.0", "dead.1 1000", "look"}, messages)
		})
	})
}

// A process that lost its places, because it did not react in time, asks for them
// again, in the old order, as soon as it is told.
func TestPlacesAreAskedForAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		other := b.Client()
		defer other.Close()
		holder := locked(t, "k", time.Hour, client)
		turns := make(chan int, 10)
		var wg sync.WaitGroup
		defer wg.Wait()
		for i := range 5 {
			m := dmutex.New("k", long, client)
			wg.Go(func() {
				if assert.NoError(t, m.Lock(ctx)) {
					turns <- i
					assert.NoError(t, m.Unlock(ctx))
				}
			})
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait()
		b.Mini.Del(queueOf("k"))
		late := dmutex.New("k", long, other)
		gotten := lock(ctx, late)
		synctest.Wait()

		require.NoError(t, other.Publish(ctx, inboxes(b)[0], "look").Err())
		require.NoError(t, other.Publish(ctx, inboxes(b)[1], "look").Err())
		synctest.Wait()
		start := time.Now()
		require.NoError(t, holder.Unlock(ctx))
		for i := range 5 {
			require.Equal(t, i, receive(t, turns))
		}
		require.NoError(t, receive(t, gotten))
		require.Less(t, time.Since(start), atOnce)
		require.NoError(t, late.Unlock(ctx))
	})
}

// Whoever was handed the lock holds it for its whole ttl, and waits no longer.
func TestHandedLockIsHeldLikeAnyOther(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		ctx := timeout(t)
		client := s.Client()
		holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
		gotten := lock(ctx, next)
		awaitQueue(t, client, "k", 1)
		require.Positive(t, client.PTTL(ctx, queueOf("k")).Val())
		require.NoError(t, holder.Unlock(ctx))
		require.NoError(t, receive(t, gotten))
		left, err := next.LockedUntil(ctx)
		require.NoError(t, err)
		require.Greater(t, left, long/2)
		require.Zero(t, client.ZCard(ctx, queueOf("k")).Val())
		require.NoError(t, next.Unlock(ctx))
	})
}

func TestCancelledWaiterPassesOnWhatItWasHanded(t *testing.T) {
	for range 50 {
		inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
			ctx, cancel := context.WithCancel(context.Background())
			slow(b)
			holder := locked(t, "k", long, client)
			first, second := dmutex.New("k", long, client), dmutex.New("k", long, client)
			given := lock(ctx, first)
			time.Sleep(time.Second)
			gotten := lock(context.Background(), second)
			time.Sleep(time.Second)

			go holder.Unlock(context.Background())
			time.Sleep(rand.N(2 * slowness)) // somewhere between the release and the claim's reply
			cancel()
			start := time.Now()
			err := <-given
			require.Less(t, time.Since(start), 100*time.Millisecond)
			if err == nil {
				require.NoError(t, first.Unlock(context.Background()))
			} else {
				require.ErrorIs(t, err, context.Canceled)
			}
			require.NoError(t, <-gotten)
			require.Less(t, time.Since(start), 10*slowness, "passed on by a timer")
			require.NoError(t, second.Unlock(context.Background()))
			time.Sleep(time.Second)
			require.False(t, b.Mini.Exists("k"))
			require.False(t, b.Mini.Exists(queueOf("k")))
		})
	}
}

// slow makes each script of the server take a while.
const slowness = 20 * time.Millisecond

func slow(b *rig.Bubble) {
	b.Mini.Server().SetPreHook(func(_ *server.Peer, cmd string, _ ...string) bool {
		if cmd == "EVALSHA" {
			time.Sleep(slowness)
		}
		return false
	})
}

func TestWaitSurvivesLostConnections(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		for range 20 {
			holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
			gotten, told := lock(ctx, next), watch(ctx, dmutex.New("k", long, client))
			synctest.Wait()
			b.CutAll()
			start := time.Now()
			require.NoError(t, holder.Unlock(ctx))
			require.NoError(t, <-gotten)
			require.Equal(t, released(), <-told)
			require.Less(t, time.Since(start), 2*time.Second)
			require.NoError(t, next.Unlock(ctx))
		}
	})
}

func TestLostMessageIsHealedByTheTimer(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		locked(t, "k", long, client)
		next := dmutex.New("k", long, client)
		gotten, told := lock(ctx, next), watch(ctx, dmutex.New("k", long, client))
		synctest.Wait()
		b.Mini.Del("k") // and nobody says so
		start := time.Now()
		require.NoError(t, <-gotten)
		require.Equal(t, released(), <-told)
		require.Less(t, time.Since(start), 6*time.Second)
		require.NoError(t, next.Unlock(ctx))
	})
}

func TestVerdictComesWhenTheTTLIsOver(t *testing.T) {
	t.Run("ran out", func(t *testing.T) {
		inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
			start := time.Now()
			locked(t, "k", 12*time.Second, client)
			told := watch(context.Background(), dmutex.New("k", time.Hour, client))
			synctest.Wait()
			b.Advance(12*time.Second + 300*time.Millisecond)
			require.Equal(t, expired(), <-told)
			require.GreaterOrEqual(t, time.Since(start), 12*time.Second)
		})
	})
	t.Run("extended by hand", func(t *testing.T) {
		inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
			ctx := context.Background()
			holder := locked(t, "k", time.Second, client)
			told := watch(ctx, dmutex.New("k", long, client))
			synctest.Wait()
			require.NoError(t, client.PExpire(ctx, "k", long).Err())
			b.Advance(10 * time.Second)
			require.Empty(t, told, "told early")
			require.NoError(t, holder.Unlock(ctx))
			require.Equal(t, released(), <-told)
		})
	})
	t.Run("long after a failed TryLock nothing is made up", func(t *testing.T) {
		for _, after := range []time.Duration{30 * time.Second, 2 * time.Minute} {
			inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
				ctx := context.Background()
				holder, m := locked(t, "k", time.Minute, client), dmutex.New("k", long, client)
				acquired, err := m.TryLock(ctx)
				require.NoError(t, err)
				require.False(t, acquired)
				require.NoError(t, holder.Unlock(ctx))
				b.Advance(after) // the tombstone is gone as well
				told := receive(t, watch(ctx, m))
				if after < time.Minute { // it cannot have run out
					require.Equal(t, released(), told)
					return
				}
				require.ErrorIs(t, told.err, dmutex.ErrFateUnknown)
				require.Equal(t, released(), receive(t, watch(ctx, m)), "told once; now the lock is free")
			})
		}
	})
	t.Run("a release that is heard during a fault", func(t *testing.T) {
		inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
			ctx := context.Background()
			other := b.Client()
			defer other.Close()
			locked(t, "k", long, client)
			ticket := client.Get(ctx, "k").Val()
			told := watch(ctx, dmutex.New("k", long, client))
			synctest.Wait()
			b.Mini.SetError("LOADING of data")
			b.Mini.Publish("dmutex-k", "CHAN_CLOSE")
			synctest.Wait() // it has looked, in vain
			b.Mini.Publish("dmutex-k", ticket)
			require.Equal(t, released(), receive(t, told))
		})
	})
}

// What was handed over and never claimed was no hold, so its end is none.
func TestVerdictIsNotOfAHandOver(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		holder := locked(t, "k", long, client)
		stopped := client.Subscribe(ctx, "dmutex-inbox:dead")
		defer stopped.Close()
		_, err := stopped.Receive(ctx)
		require.NoError(t, err)
		_, err = b.Mini.ZAdd(queueOf("k"), 1, "dead.0")
		require.NoError(t, err)
		require.NoError(t, holder.Unlock(ctx))
		require.True(t, b.Mini.Exists("k"))

		m, late := dmutex.New("k", long, client), dmutex.New("k", long, client)
		for _, m := range []*dmutex.Mutex{m, late} {
			acquired, err := m.TryLock(ctx)
			require.NoError(t, err)
			require.False(t, acquired)
		}
		told := watch(ctx, m)
		synctest.Wait()
		b.Advance(2 * time.Second)
		require.Equal(t, released(), receive(t, told), "the lock is free")
		require.NoError(t, locked(t, "k", long, client).Unlock(ctx)) // nobody is asked for the mark any more
		require.Equal(t, released(), receive(t, watch(ctx, late)))
	})
}

// A watcher that was cut off for longer than Redis remembers says that it does not
// know.
func TestVerdictIsNotGuessed(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		locked(t, "k", 5*time.Second, client)
		told := watch(ctx, dmutex.New("k", long, client))
		synctest.Wait()
		b.Mini.SetError("LOADING of data")
		b.Advance(20 * time.Second)
		b.Mini.SetError("")
		b.Advance(time.Second)
		got := receive(t, told)
		require.ErrorIs(t, got.err, dmutex.ErrFateUnknown)
		require.False(t, got.expired)
	})
}

func TestSilentPeerIsWatchedClosely(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		require.NoError(t, client.Set(ctx, "k", "cGxhaW4gcmVkc3luYw==", time.Hour).Err())
		next := dmutex.New("k", long, client)
		gotten, told := lock(ctx, next), watch(ctx, dmutex.New("k", long, client))
		b.Advance(time.Minute)
		b.Mini.Del("k")
		start := time.Now()
		require.NoError(t, <-gotten)
		require.Equal(t, released(), <-told)
		require.Less(t, time.Since(start), 500*time.Millisecond)
		require.NoError(t, next.Unlock(ctx))
	})
}

func TestGrantThatComesTooLateIsNotTaken(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		m := locked(t, "k", 10*time.Millisecond, client)
		require.NoError(t, m.Unlock(ctx))
		slow(b) // for longer than the ttl
		acquired, err := m.TryLock(ctx)
		require.False(t, acquired)
		var failed *dmutex.ErrFailedToLock
		require.ErrorAs(t, err, &failed)
		require.ErrorIs(t, m.Unlock(ctx), dmutex.ErrNotHeld)

		bound, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		require.ErrorIs(t, m.Lock(bound), context.DeadlineExceeded)
		time.Sleep(time.Second)
		require.False(t, b.Mini.Exists("k"))
		require.False(t, b.Mini.Exists(queueOf("k")))
	})
}

func TestNothingIsLeftBehind(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		holder := locked(t, "k", long, client)
		bound, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		given, told := lock(bound, dmutex.New("k", long, client)), watch(bound, dmutex.New("k", long, client))
		require.ErrorIs(t, <-given, context.DeadlineExceeded)
		require.ErrorIs(t, (<-told).err, context.DeadlineExceeded)
		require.NoError(t, holder.Unlock(ctx))

		b.Advance(5 * time.Second)
		synctest.Wait()
		require.Empty(t, b.Mini.PubSubChannels("*"))
		require.Empty(t, goroutinesOf("(*subscriber)"))
		require.EqualValues(t, client.PoolStats().IdleConns, b.Mini.CurrentConnectionCount())
		b.Advance(15 * time.Second)
		require.Empty(t, b.Mini.Keys())
	})
}

func TestClosedClientEndsTheWaits(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		other := b.Client()
		defer other.Close()
		locked(t, "k", long, other)
		given, told := lock(ctx, dmutex.New("k", long, client)), watch(ctx, dmutex.New("k", long, client))
		synctest.Wait()
		start := time.Now()
		require.NoError(t, client.Close())
		require.ErrorIs(t, <-given, redis.ErrClosed)
		require.ErrorIs(t, (<-told).err, redis.ErrClosed)
		require.Less(t, time.Since(start), atOnce)
	})
}

func TestCopiesOfAClientShareOneSubscription(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx, cancel := context.WithCancel(context.Background())
		locked(t, "k", long, client)
		var given []<-chan error
		for range 10 {
			given = append(given, lock(ctx, dmutex.New("k", long, client.WithContext(ctx))))
		}
		synctest.Wait()
		require.Len(t, inboxes(b), 1)
		cancel()
		for _, c := range given {
			require.ErrorIs(t, <-c, context.Canceled)
		}
	})
}
