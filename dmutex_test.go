package dmutex_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-redis/redis/v8"
	"github.com/go-redsync/redsync/v4"
	"github.com/go-redsync/redsync/v4/redis/goredis/v8"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// requireExclusion has goroutines contend for a lock, and checks that never two are in.
func requireExclusion(t *testing.T, goroutines, rounds int, mutex func(goroutine int) *dmutex.Mutex) {
	t.Helper()
	ctx := timeout(t)
	var (
		inside  atomic.Int32
		entries int // guarded by the lock, and by nothing else
		wg      sync.WaitGroup
	)
	for g := range goroutines {
		m := mutex(g)
		wg.Go(func() {
			for range rounds {
				if !assert.NoError(t, m.Lock(ctx)) {
					return
				}
				assert.Equal(t, int32(1), inside.Add(1))
				entries++
				inside.Add(-1)
				assert.NoError(t, m.Unlock(ctx))
			}
		})
	}
	wg.Wait()
	require.Equal(t, goroutines*rounds, entries)
}

func TestExclusion(t *testing.T) {
	const goroutines, rounds = 50, 20
	t.Run("on ten clients", func(t *testing.T) {
		rig.OnEach(t, func(t *testing.T, s *rig.Server) {
			var clients []*redis.Client
			for range 10 {
				clients = append(clients, s.Client())
			}
			requireExclusion(t, goroutines, rounds, func(g int) *dmutex.Mutex { return dmutex.New("k", long, clients[g%10]) })
			requireClean(t, clients[0])
		})
	})
	t.Run("on one shared mutex", func(t *testing.T) {
		rig.OnEach(t, func(t *testing.T, s *rig.Server) {
			client := s.Client()
			shared := dmutex.New("k", long, client)
			requireExclusion(t, goroutines, rounds, func(int) *dmutex.Mutex { return shared })
			requireClean(t, client)
		})
	})
}

func TestFirstComeFirstServed(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		const waiters, handful = 200, 5
		ctx := timeout(t)
		var clients []*redis.Client
		for range 10 {
			clients = append(clients, s.Client())
		}
		holder := locked(t, "k", long, clients[0])
		var (
			order []int // guarded by the lock
			wg    sync.WaitGroup
		)
		for i := range waiters {
			m := dmutex.New("k", long, clients[i%10])
			wg.Go(func() {
				if assert.NoError(t, m.Lock(ctx)) {
					order = append(order, i)
					assert.NoError(t, m.Unlock(ctx))
				}
			})
			time.Sleep(5 * time.Millisecond)
		}
		awaitQueue(t, clients[0], "k", waiters)
		require.NoError(t, holder.Unlock(ctx))
		wg.Wait()

		require.Len(t, order, waiters)
		overtaken := 0
		for i := 1; i < waiters; i++ {
			if order[i] < order[i-1] {
				overtaken++
			}
		}
		require.LessOrEqual(t, overtaken, handful, "%v", order)
	})
}

func TestUncontendedCost(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		ctx := context.Background()
		client, other := s.Client(), s.Client()
		m := locked(t, "k", long, client) // loads the scripts
		require.NoError(t, m.Unlock(ctx))

		t.Run("Lock and Unlock are two requests and start nothing", func(t *testing.T) {
			requests := count(client)
			require.NoError(t, m.Lock(ctx))
			require.NoError(t, m.Unlock(ctx))
			require.EqualValues(t, 2, requests.n.Load())
			require.Empty(t, other.PubSubChannels(ctx, "*").Val())
			require.Empty(t, goroutinesOf("(*subscriber)"))
		})
		t.Run("TryLock fails in one request and starts nothing", func(t *testing.T) {
			locked(t, "k", long, other)
			requests := count(client)
			acquired, err := m.TryLock(ctx)
			require.NoError(t, err)
			require.False(t, acquired)
			require.EqualValues(t, 1, requests.n.Load())
			require.Empty(t, other.PubSubChannels(ctx, "*").Val())
		})
	})
}

func TestUnlock(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client := s.Client()
		ctx := timeout(t)
		requireUnlockError := func(t *testing.T, err, want error) {
			t.Helper()
			var failed *dmutex.ErrFailedToUnlock
			require.ErrorAs(t, err, &failed)
			require.Equal(t, t.Name(), failed.Key)
			require.ErrorIs(t, err, want)
		}

		t.Run("before Lock", func(t *testing.T) {
			other := locked(t, t.Name(), long, client)
			requireUnlockError(t, dmutex.New(t.Name(), long, client).Unlock(ctx), dmutex.ErrNotHeld)
			require.NoError(t, other.Unlock(ctx))
		})
		t.Run("twice", func(t *testing.T) {
			m := locked(t, t.Name(), long, client)
			require.NoError(t, m.Unlock(ctx))
			other := locked(t, t.Name(), long, client)
			requireUnlockError(t, m.Unlock(ctx), dmutex.ErrNotHeld)
			require.NoError(t, other.Unlock(ctx))
		})
		t.Run("with a ctx that is done", func(t *testing.T) {
			m := locked(t, t.Name(), long, client)
			done, cancel := context.WithCancel(ctx)
			cancel()
			require.NoError(t, m.Unlock(done))
			require.Zero(t, client.Exists(ctx, t.Name()).Val())
		})
		t.Run("after expiry", func(t *testing.T) {
			m := locked(t, t.Name(), 20*time.Millisecond, client)
			rig.Eventually(t, "expiry", func() bool { return client.Exists(ctx, t.Name()).Val() == 0 })
			err := m.Unlock(ctx)
			requireUnlockError(t, err, dmutex.ErrLockLost)
			require.ErrorIs(t, err, redsync.ErrLockAlreadyExpired)
			requireUnlockError(t, m.Unlock(ctx), dmutex.ErrNotHeld)
		})
		t.Run("of a lock that somebody else holds now", func(t *testing.T) {
			m := locked(t, t.Name(), 20*time.Millisecond, client)
			other := dmutex.New(t.Name(), long, client)
			require.NoError(t, other.Lock(ctx))
			err := m.Unlock(ctx)
			requireUnlockError(t, err, dmutex.ErrLockLost)
			var taken *redsync.ErrTaken
			require.ErrorAs(t, err, &taken)
			require.NoError(t, other.Unlock(ctx))
		})
		t.Run("of a deleted key", func(t *testing.T) {
			m := locked(t, t.Name(), long, client)
			require.NoError(t, client.Del(ctx, t.Name()).Err())
			requireUnlockError(t, m.Unlock(ctx), dmutex.ErrLockLost)
		})
		t.Run("of an emptied server", func(t *testing.T) {
			m := locked(t, t.Name(), long, client)
			require.NoError(t, client.FlushAll(ctx).Err())
			requireUnlockError(t, m.Unlock(ctx), dmutex.ErrLockLost)
		})
		t.Run("late, on a shared mutex, leaves the next hold alone", func(t *testing.T) {
			shared := locked(t, t.Name(), 20*time.Millisecond, client)
			require.NoError(t, client.PExpire(ctx, t.Name(), time.Millisecond).Err())
			require.NoError(t, shared.Lock(ctx)) // somebody else's, through the same mutex
			require.NoError(t, client.PExpire(ctx, t.Name(), long).Err())

			requireUnlockError(t, shared.Unlock(ctx), dmutex.ErrLockLost)
			require.EqualValues(t, 1, client.Exists(ctx, t.Name()).Val(), "the late Unlock released the next hold")
			require.NoError(t, shared.Unlock(ctx))
			require.Zero(t, client.Exists(ctx, t.Name()).Val())
			requireUnlockError(t, shared.Unlock(ctx), dmutex.ErrNotHeld)
		})
	})
}

func TestLockedUntil(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client := s.Client()
		ctx := timeout(t)
		m := dmutex.New("k", 1500*time.Millisecond, client)

		left, err := m.LockedUntil(ctx)
		require.NoError(t, err)
		require.Zero(t, left)

		holder := locked(t, "k", 1500*time.Millisecond, client)
		left, err = m.LockedUntil(ctx)
		require.NoError(t, err)
		require.Positive(t, left)
		require.LessOrEqual(t, left, 1500*time.Millisecond)
		rig.Eventually(t, "a remainder that is no whole second", func() bool {
			left, err := m.LockedUntil(ctx)
			require.NoError(t, err)
			return left%time.Second != 0
		})
		require.NoError(t, holder.Unlock(ctx))

		require.NoError(t, client.Set(ctx, "k", "somebody's", 0).Err())
		_, err = m.LockedUntil(ctx)
		require.ErrorIs(t, err, dmutex.ErrNoExpiry)
	})
}

func TestWaitUntilUnlocked(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client := s.Client()
		ctx := timeout(t)
		// The waiter's own ttl must not matter.
		waiter := func(t *testing.T) *dmutex.Mutex { return dmutex.New(t.Name(), time.Millisecond, client) }

		t.Run("free", func(t *testing.T) {
			require.Equal(t, released(), receive(t, watch(ctx, waiter(t))))
		})
		t.Run("released", func(t *testing.T) {
			holder := locked(t, t.Name(), long, client)
			told := watch(ctx, waiter(t))
			awaitSubscribed(t, client, "dmutex-"+t.Name())
			require.NoError(t, holder.Unlock(ctx))
			require.Equal(t, released(), receive(t, told))
		})
		t.Run("released before the subscription is there", func(t *testing.T) {
			for range 20 {
				holder := locked(t, t.Name(), long, client)
				told := watch(ctx, waiter(t))
				require.NoError(t, holder.Unlock(ctx))
				require.Equal(t, released(), receive(t, told))
			}
		})
		t.Run("released between the look and the wait, when others watch already", func(t *testing.T) {
			for range 200 {
				holder := locked(t, t.Name(), long, client)
				told := []<-chan verdict{watch(ctx, waiter(t))}
				awaitSubscribed(t, client, "dmutex-"+t.Name())
				start := make(chan struct{})
				for range 3 {
					c := make(chan verdict, 1)
					told = append(told, c)
					go func() {
						<-start
						c <- receive(t, watch(ctx, waiter(t)))
					}()
				}
				close(start)
				before := time.Now()
				require.NoError(t, holder.Unlock(ctx))
				for _, c := range told {
					require.Equal(t, released(), receive(t, c))
				}
				require.Less(t, time.Since(before), 2*time.Second, "a message was missed")
			}
		})
		t.Run("ran out", func(t *testing.T) {
			locked(t, t.Name(), 100*time.Millisecond, client)
			require.Equal(t, expired(), receive(t, watch(ctx, waiter(t))))
			require.Zero(t, client.Exists(ctx, t.Name()).Val(), "told early")
		})
		t.Run("deleted", func(t *testing.T) {
			locked(t, t.Name(), long, client)
			told := watch(ctx, waiter(t))
			awaitSubscribed(t, client, "dmutex-"+t.Name())
			require.NoError(t, client.Del(ctx, t.Name()).Err())
			require.NoError(t, client.Publish(ctx, "dmutex-"+t.Name(), "CHAN_CLOSE").Err())
			require.Equal(t, released(), receive(t, told))
		})
		t.Run("twenty are told of one release", func(t *testing.T) {
			holder := locked(t, t.Name(), long, client)
			var told []<-chan verdict
			for range 20 {
				told = append(told, watch(ctx, waiter(t)))
			}
			awaitSubscribed(t, client, "dmutex-"+t.Name())
			require.NoError(t, holder.Unlock(ctx))
			for _, c := range told {
				require.Equal(t, released(), receive(t, c))
			}
		})
		t.Run("handed on at once", func(t *testing.T) {
			holder, next := locked(t, t.Name(), long, client), dmutex.New(t.Name(), long, client)
			told, gotten := watch(ctx, waiter(t)), lock(ctx, next)
			awaitSubscribed(t, client, "dmutex-"+t.Name())
			awaitQueue(t, client, t.Name(), 1)
			require.NoError(t, holder.Unlock(ctx))
			require.Equal(t, released(), receive(t, told))
			require.NoError(t, receive(t, gotten))
			require.NoError(t, next.Unlock(ctx))
		})
		t.Run("ctx ends", func(t *testing.T) {
			holder := locked(t, t.Name(), long, client)
			ctx, cancel := context.WithCancel(ctx)
			told := watch(ctx, waiter(t))
			awaitSubscribed(t, client, "dmutex-"+t.Name())
			cancel()
			require.ErrorIs(t, receive(t, told).err, context.Canceled)
			require.NoError(t, holder.Unlock(timeout(t)))
		})
		t.Run("after a failed TryLock, released since", func(t *testing.T) {
			holder, m := locked(t, t.Name(), long, client), waiter(t)
			acquired, err := m.TryLock(ctx)
			require.NoError(t, err)
			require.False(t, acquired)
			require.NoError(t, holder.Unlock(ctx))
			locked(t, t.Name(), long, client)
			require.Equal(t, released(), receive(t, watch(ctx, m)))
		})
		t.Run("after a failed TryLock, ran out since", func(t *testing.T) {
			holder, m := locked(t, t.Name(), 50*time.Millisecond, client), waiter(t)
			acquired, err := m.TryLock(ctx)
			require.NoError(t, err)
			require.False(t, acquired)
			rig.Eventually(t, "expiry", func() bool { return client.Exists(ctx, t.Name()).Val() == 0 })
			require.ErrorIs(t, holder.Unlock(ctx), dmutex.ErrLockLost) // too late to make it a release
			require.Equal(t, expired(), receive(t, watch(ctx, m)))
			require.Equal(t, released(), receive(t, watch(ctx, m)), "told once; now the lock is free")
		})
	})
}

// The peers that share a lock with us: plain redsync, which says nothing when it
// releases, and the package that this one replaces, which publishes CHAN_CLOSE.
func TestPeers(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client, theirs := s.Client(), s.Client()
		requests := count(client)
		ctx := timeout(t)
		peer := func(t *testing.T) *redsync.Mutex {
			return redsync.New(goredis.NewPool(theirs)).NewMutex(t.Name(), redsync.WithExpiry(long))
		}

		t.Run("plain redsync excludes us, and its silent release is noticed", func(t *testing.T) {
			theirs, ours := peer(t), dmutex.New(t.Name(), long, client)
			require.NoError(t, theirs.LockContext(ctx))
			acquired, err := ours.TryLock(ctx)
			require.NoError(t, err)
			require.False(t, acquired)

			gotten, told := lock(ctx, ours), watch(ctx, dmutex.New(t.Name(), long, client))
			awaitQueue(t, client, t.Name(), 1)
			awaitSubscribed(t, client, "dmutex-"+t.Name())
			_, err = theirs.UnlockContext(ctx)
			require.NoError(t, err)
			require.NoError(t, receive(t, gotten))
			require.Equal(t, released(), receive(t, told))

			var taken *redsync.ErrTaken
			require.ErrorAs(t, theirs.TryLockContext(ctx), &taken)
			require.NoError(t, ours.Unlock(ctx))
			require.NoError(t, theirs.TryLockContext(ctx))
		})
		t.Run("an original peer's release wakes us, ours wakes it", func(t *testing.T) {
			original, ours := peer(t), dmutex.New(t.Name(), long, client)
			require.NoError(t, original.LockContext(ctx))
			gotten := lock(ctx, ours)
			awaitQueue(t, client, t.Name(), 1)
			awaitSubscribed(t, client, "dmutex-"+t.Name())
			_, err := original.UnlockContext(ctx)
			require.NoError(t, err)
			require.NoError(t, theirs.Publish(ctx, "dmutex-"+t.Name(), "CHAN_CLOSE").Err())
			require.NoError(t, receive(t, gotten))

			subscription := theirs.Subscribe(ctx, "dmutex-"+t.Name())
			defer subscription.Close()
			_, err = subscription.Receive(ctx)
			require.NoError(t, err)
			require.NoError(t, ours.Unlock(ctx))
			receive(t, subscription.Channel())
			require.NoError(t, original.TryLockContext(ctx))
		})
		t.Run("CHAN_CLOSE without a release ends no wait", func(t *testing.T) {
			holder, ours := locked(t, t.Name(), long, client), dmutex.New(t.Name(), long, client)
			ctx, cancel := context.WithCancel(ctx)
			told, gotten := watch(ctx, ours), lock(ctx, ours)
			awaitQueue(t, client, t.Name(), 1)
			awaitSubscribed(t, client, "dmutex-"+t.Name())
			before := requests.n.Load()
			require.NoError(t, theirs.Publish(ctx, "dmutex-"+t.Name(), "CHAN_CLOSE").Err())
			rig.Eventually(t, "a look", func() bool { return requests.since(before) > 0 })
			cancel()
			require.ErrorIs(t, receive(t, told).err, context.Canceled)
			require.ErrorIs(t, receive(t, gotten), context.Canceled)
			require.NoError(t, holder.Unlock(timeout(t)))
		})
	})
}

func TestBadArguments(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client := s.Client()
		ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": s.Addr}, HeartbeatFrequency: time.Hour})
		defer ring.Close()
		cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{s.Addr}})
		defer cluster.Close()
		type wrapper struct{ redis.UniversalClient }
		type uncomparable struct {
			redis.UniversalClient
			_ []int
		}

		for name, m := range map[string]*dmutex.Mutex{
			"empty key":                  dmutex.New("", long, client),
			"no ttl":                     dmutex.New("k", 0, client),
			"negative ttl":               dmutex.New("k", -time.Second, client),
			"ttl under 1 ms":             dmutex.New("k", time.Millisecond-1, client),
			"nil client":                 dmutex.New("k", long, nil),
			"typed nil client":           dmutex.New("k", long, (*redis.Client)(nil)),
			"typed nil cluster":          dmutex.New("k", long, (*redis.ClusterClient)(nil)),
			"client never made":          dmutex.New("k", long, new(redis.Client)),
			"wrapper around nothing":     dmutex.New("k", long, &wrapper{}),
			"uncomparable wrapper":       dmutex.New("k", long, uncomparable{UniversalClient: client}),
			"ring":                       dmutex.New("k", long, ring),
			"wrapper around a ring":      dmutex.New("k", long, &struct{ *redis.Ring }{ring}),
			"cluster, key in many slots": dmutex.New("k}", long, cluster),
			"zero value":                 new(dmutex.Mutex),
		} {
			t.Run(name, func(t *testing.T) {
				requireAllFail(t, timeout(t), m)
				require.Empty(t, client.Keys(timeout(t), "*").Val())
			})
		}
		t.Run("nil ctx", func(t *testing.T) {
			requireAllFail(t, nil, dmutex.New("k", long, client))
			require.Empty(t, client.Keys(timeout(t), "*").Val())
		})
		t.Run("ctx that has ended", func(t *testing.T) {
			ended, cancel := context.WithCancel(context.Background())
			cancel()
			requireNoWay(t, ended, dmutex.New("k", long, client))
			require.Empty(t, client.Keys(timeout(t), "*").Val())
		})
		t.Run("a wrapped client works", func(t *testing.T) {
			m := dmutex.New("k", long, &wrapper{client}, nil)
			require.NoError(t, m.Lock(timeout(t)))
			require.NoError(t, m.Unlock(timeout(t)))
		})
	})
}

// requireAllFail checks that every method returns an error of its type.
func requireAllFail(t *testing.T, ctx context.Context, m *dmutex.Mutex) {
	t.Helper()
	requireNoWay(t, ctx, m)
	var failedToUnlock *dmutex.ErrFailedToUnlock
	require.ErrorAs(t, m.Unlock(ctx), &failedToUnlock)
	require.NotErrorIs(t, failedToUnlock, dmutex.ErrNotHeld)
}

// requireNoWay checks that neither the lock nor news of it can be had.
func requireNoWay(t *testing.T, ctx context.Context, m *dmutex.Mutex) {
	t.Helper()
	var failedToLock *dmutex.ErrFailedToLock
	require.ErrorAs(t, m.Lock(ctx), &failedToLock)
	acquired, err := m.TryLock(ctx)
	require.False(t, acquired)
	require.ErrorAs(t, err, &failedToLock)
	_, err = m.WaitUntilUnlocked(ctx)
	require.Error(t, err)
	_, err = m.LockedUntil(ctx)
	require.Error(t, err)
}

func TestStrangeKeys(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client := s.Client()
		for _, key := range []string{
			" ", "a b", "a\x00b", "a\nb", "{", "}", "{}", "}{", "{a", "a}", "a{}b", "{a}b", "a{b}c{d}",
			"{{a}}", "a}b{c}", "ключ 🔑", "inbox:0123", "%s", "[a-z]*?", strings.Repeat("x", 5000), "\xff\xfe",
		} {
			t.Run(fmt.Sprintf("%.20q", key), func(t *testing.T) { requireWorks(t, client, key) })
		}
	})
}

func FuzzKey(f *testing.F) {
	client := rig.Miniredis(f).Client()
	f.Add("k")
	f.Add("a{b}c}{")
	f.Fuzz(func(t *testing.T, key string) {
		if key != "" {
			requireWorks(t, client, key)
		}
	})
}

// requireWorks takes a lock through all that it can do.
func requireWorks(t *testing.T, client *redis.Client, key string) {
	t.Helper()
	ctx := timeout(t)
	holder, next := locked(t, key, long, client), dmutex.New(key, long, client)
	require.NotEmpty(t, client.Get(ctx, key).Val())
	acquired, err := next.TryLock(ctx)
	require.NoError(t, err)
	require.False(t, acquired)

	gotten, told := lock(ctx, next), watch(ctx, dmutex.New(key, long, client))
	require.NoError(t, holder.Unlock(ctx))
	require.NoError(t, receive(t, gotten))
	// The watcher may have come after the hand-over.
	require.NoError(t, next.Unlock(ctx))
	require.Equal(t, released(), receive(t, told))
	require.Zero(t, client.Exists(ctx, key).Val())
}

func TestKeyOfSomebodyElse(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client := s.Client()
		ctx := timeout(t)
		for name, put := range map[string]func(key string) error{
			"string": func(key string) error { return client.Set(ctx, key, "theirs", 0).Err() },
			"empty":  func(key string) error { return client.Set(ctx, key, "", 0).Err() },
			"list":   func(key string) error { return client.RPush(ctx, key, "theirs").Err() },
			"hash":   func(key string) error { return client.HSet(ctx, key, "theirs", 1).Err() },
		} {
			t.Run(name, func(t *testing.T) {
				require.NoError(t, client.FlushAll(ctx).Err())
				holder := locked(t, "k", long, client)
				require.NoError(t, client.Del(ctx, "k").Err())
				require.NoError(t, put("k"))
				before := client.Dump(ctx, "k").Val()

				requireNoWay(t, ctx, dmutex.New("k", long, client))
				require.ErrorIs(t, holder.Unlock(ctx), dmutex.ErrLockLost)
				require.Equal(t, before, client.Dump(ctx, "k").Val())
				require.Equal(t, []string{"k"}, leftovers(client))
			})
		}
		t.Run("a string that expires is a lock", func(t *testing.T) {
			require.NoError(t, client.FlushAll(ctx).Err())
			require.NoError(t, client.Set(ctx, "k", "", 50*time.Millisecond).Err())
			m := dmutex.New("k", long, client)
			acquired, err := m.TryLock(ctx)
			require.NoError(t, err)
			require.False(t, acquired)
			require.NoError(t, m.Lock(ctx))
		})
	})
}

func TestErrorsAreMatched(t *testing.T) {
	cause := errors.New("cause")
	for _, err := range []error{&dmutex.ErrFailedToLock{Key: "k", Err: cause}, &dmutex.ErrFailedToUnlock{Key: "k", Err: cause}} {
		wrapped := fmt.Errorf("wrapped: %w", err)
		require.ErrorIs(t, wrapped, cause)
		require.Contains(t, wrapped.Error(), `"k"`)
		require.Contains(t, wrapped.Error(), "cause")
	}
}

// What the README shows is what runs as an Example.
func TestReadmeSnippetsAreExamples(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	examples, err := os.ReadFile("example_test.go")
	require.NoError(t, err)
	snippets := strings.Split(string(readme), "```go\n")[1:]
	require.NotEmpty(t, snippets)
	for _, snippet := range snippets {
		snippet, _, _ = strings.Cut(snippet, "```")
		if imports, found := strings.CutPrefix(snippet, "import (\n"); found {
			require.Contains(t, string(examples), strings.TrimSuffix(imports, ")\n"))
			continue
		}
		var indented strings.Builder
		for line := range strings.Lines(snippet) {
			indented.WriteString("\t" + line)
		}
		require.Contains(t, string(examples), indented.String())
	}
}

// The figures in the README are those of the latest run of `make compare`.
func TestReadmeShowsWhatWasMeasured(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	summary, err := os.ReadFile("docs/bench/summary.md")
	require.NoError(t, err)
	require.Contains(t, string(readme), "<!-- summary -->\n\n"+string(summary)+"\n<!-- end of summary -->\n")
	for _, plot := range []string{"docs/bench/handover.svg", "docs/bench/requests.svg"} {
		require.Contains(t, string(readme), "("+plot+")")
		require.FileExists(t, plot)
	}
}
