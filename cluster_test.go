package dmutex_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-redis/redis/v8"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// soon is how long after the end of a fault a wait may last.
const soon = 5 * time.Second

func TestCluster(t *testing.T) {
	c := rig.NewCluster(t)
	ctx := timeout(t)

	for name, change := range map[string]func(*redis.ClusterOptions){
		"plain":         func(*redis.ClusterOptions) {},
		"ReadOnly":      func(o *redis.ClusterOptions) { o.ReadOnly = true },
		"RouteRandomly": func(o *redis.ClusterOptions) { o.RouteRandomly = true },
	} {
		t.Run(name, func(t *testing.T) {
			client := c.Client(change)
			for _, key := range []string{"k", "a{tag}b", "{only", "a b\n\x00ü", "{tag}"} {
				requireClusterWorks(t, client, key)
			}
		})
	}

	// Waits on keys of all masters need one subscription on each of them, and are
	// ended by a message: no timer of theirs is that quick.
	t.Run("many keys", func(t *testing.T) {
		const keys = 60
		client, other := c.Client(), c.Client()
		inboxes := func() (each []int) {
			for _, s := range c.Servers {
				each = append(each, len(c.On(s).PubSubChannels(ctx, "dmutex-inbox:*").Val()))
			}
			slices.Sort(each)
			return each
		}
		rig.Eventually(t, "the subscriptions of others have ended", func() bool { return slices.Max(inboxes()) == 0 })
		var (
			wg      sync.WaitGroup
			holders []*dmutex.Mutex
		)
		for i := range keys {
			key := fmt.Sprintf("many-%d", i)
			holders = append(holders, locked(t, key, long, client))
			m := dmutex.New(key, long, other)
			wg.Go(func() {
				if assert.NoError(t, m.Lock(ctx)) {
					assert.NoError(t, m.Unlock(ctx))
				}
			})
		}
		for i := range keys {
			awaitPlaces(t, c, fmt.Sprintf("many-%d", i), 1)
		}
		require.Equal(t, []int{0, 0, 0, 1, 1, 1}, inboxes())
		start := time.Now()
		for _, m := range holders {
			require.NoError(t, m.Unlock(ctx))
		}
		wg.Wait()
		require.Less(t, time.Since(start), 2*time.Second)
	})

	t.Run("exclusion", func(t *testing.T) {
		clients := []*redis.ClusterClient{c.Client(), c.Client(), c.Client(), c.Client()}
		requireExclusion(t, 20, 20, func(goroutine int) *dmutex.Mutex {
			return dmutex.New("contended", long, clients[goroutine%len(clients)])
		})
	})

	t.Run("renewal, token and owner", func(t *testing.T) {
		m := dmutex.New("renewed", 500*time.Millisecond, c.Client(), dmutex.WithFencing(), dmutex.WithOwner("me"))
		require.NoError(t, m.Do(ctx, func(ctx context.Context) error {
			time.Sleep(time.Second)
			require.NoError(t, ctx.Err())
			require.Positive(t, dmutex.TokenFrom(ctx))
			info, err := m.Inspect(ctx)
			require.NoError(t, err)
			require.Equal(t, "me", info.Owner)
			return nil
		}))
		require.NoError(t, m.Lock(ctx))
		require.NoError(t, m.Extend(ctx))
		require.NoError(t, m.Unlock(ctx))
	})

	t.Run("closed client ends the waits", func(t *testing.T) {
		client := c.Client()
		holder := locked(t, "k", long, c.Client())
		gotten, told := lock(ctx, dmutex.New("k", long, client)), watch(ctx, dmutex.New("k", long, client))
		awaitPlaces(t, c, "k", 1)
		require.NoError(t, client.Close())
		start := time.Now()
		require.ErrorIs(t, receive(t, gotten), redis.ErrClosed)
		require.ErrorIs(t, receive(t, told).err, redis.ErrClosed)
		require.Less(t, time.Since(start), 2*time.Second)
		require.NoError(t, holder.Unlock(ctx))
	})

	t.Run("slot moves", func(t *testing.T) {
		client := c.Client()
		key := "{moves}"
		holder := locked(t, key, long, client)
		told := watch(ctx, dmutex.New(key, long, client))
		var wg sync.WaitGroup
		turn := func(client redis.UniversalClient) {
			m := dmutex.New(key, long, client)
			wg.Go(func() {
				if assert.NoError(t, m.Lock(ctx)) {
					assert.NoError(t, m.Unlock(ctx))
				}
			})
		}
		turn(client)
		awaitPlaces(t, c, key, 1)
		c.Migrate(key, func() {
			turn(c.Client()) // meets ASK or TRYAGAIN
			time.Sleep(200 * time.Millisecond)
		})
		awaitPlaces(t, c, key, 2)
		start := time.Now()
		require.NoError(t, holder.Unlock(ctx))
		require.Equal(t, released(), receive(t, told))
		wg.Wait()
		require.Less(t, time.Since(start), soon)
	})

	t.Run("frozen", func(t *testing.T) {
		client := c.Client()
		require.NoError(t, locked(t, "k", long, client).Unlock(ctx))
		for _, s := range c.Servers {
			s.Signal(syscall.SIGSTOP)
		}
		defer func() {
			for _, s := range c.Servers {
				s.Signal(syscall.SIGCONT)
			}
			c.AwaitUp()
		}()
		bound, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		defer cancel()
		for _, client := range []*redis.ClusterClient{client, c.Client()} { // the one knows the slots, the other does not
			start := time.Now()
			require.ErrorIs(t, dmutex.New("k", long, client).Lock(bound), context.DeadlineExceeded)
			require.Less(t, time.Since(start), 2*time.Second)
		}
	})
}

// awaitPlaces waits until n tickets are in the queue of key.
func awaitPlaces(t *testing.T, c *rig.Cluster, key string, n int64) {
	t.Helper()
	rig.Eventually(t, fmt.Sprintf("%d in the queue of %q", n, key), func() bool {
		master, _ := c.Master(key)
		return c.On(master).ZCard(context.Background(), queueOf(key)).Val() == n
	})
}

func requireClusterWorks(t *testing.T, client redis.UniversalClient, key string) {
	t.Helper()
	ctx := timeout(t)
	for range 5 {
		holder, m := locked(t, key, long, client), dmutex.New(key, long, client)
		left, err := m.LockedUntil(ctx)
		require.NoError(t, err)
		require.Greater(t, left, long/2, "a replica that knows nothing yet has answered")
		acquired, err := m.TryLock(ctx)
		require.NoError(t, err)
		require.False(t, acquired)
		told, gotten := watch(ctx, m), lock(ctx, dmutex.New(key, 100*time.Millisecond, client))
		require.NoError(t, holder.Unlock(ctx))
		require.Equal(t, released(), receive(t, told))
		require.NoError(t, receive(t, gotten)) // and never unlocked
		require.NoError(t, m.Lock(ctx))
		require.NoError(t, m.Unlock(ctx))
		left, err = m.LockedUntil(ctx)
		require.NoError(t, err)
		require.Zero(t, left, "a replica that knows nothing yet has answered")
	}
}

// A master of the cluster fails while one of its locks is held and waited for. Its
// replica had heard of the hold, so nothing is lost.
func TestClusterMasterFails(t *testing.T) {
	c := rig.NewCluster(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*hang)
	defer cancel()
	client := c.Client()
	fails, replica := c.Master("k")
	holder := locked(t, "k", long, client)
	next := dmutex.New("k", long, client)
	gotten, told := lock(ctx, next), watch(ctx, dmutex.New("k", long, client))
	awaitPlaces(t, c, "k", 1)
	// One that holds and never releases, and those who wait for that.
	dead := dmutex.New("{k}dead", 4*time.Second, client)
	require.NoError(t, dead.Lock(ctx))
	toldOfDead, afterDead := watch(ctx, dmutex.New("{k}dead", long, client)), lock(ctx, dmutex.New("{k}dead", long, client))
	awaitPlaces(t, c, "{k}dead", 1)
	fails.AwaitReplicated("k", 1)

	fails.Kill()
	rig.Eventually(t, "the replica takes over", func() bool {
		master, _ := c.Master("k")
		return master == replica
	})
	up := time.Now()
	var err error
	rig.Eventually(t, "Unlock", func() bool { err = holder.Unlock(ctx); return err == nil })
	require.NoError(t, receive(t, gotten))
	require.Equal(t, released(), receive(t, told))
	require.Less(t, time.Since(up), soon)
	require.NoError(t, next.Unlock(ctx))
	require.Equal(t, expired(), receive(t, toldOfDead))
	require.NoError(t, receive(t, afterDead))
	require.Less(t, time.Since(up), soon+4*time.Second)
}

// A failover that the servers agree on fails no call.
func TestClusterFailsOverByAgreement(t *testing.T) {
	c := rig.NewCluster(t)
	client := c.Client()
	ctx, stop := context.WithCancel(timeout(t))
	var (
		wg     sync.WaitGroup
		cycles atomic.Int64
		inside atomic.Int32
	)
	for range 4 {
		m := dmutex.New("k", long, client)
		wg.Go(func() {
			for {
				if err := m.Lock(ctx); err != nil {
					assert.ErrorIs(t, err, context.Canceled)
					return
				}
				assert.Equal(t, int32(1), inside.Add(1))
				inside.Add(-1)
				assert.NoError(t, m.Unlock(context.Background()))
				cycles.Add(1)
			}
		})
	}
	for range 2 {
		before := cycles.Load()
		_, replica := c.Master("k")
		c.FailOver(replica)
		rig.Eventually(t, "it goes on", func() bool { return cycles.Load() > before+100 })
		c.AwaitReplicas()
	}
	stop()
	wg.Wait()
}

// A replica must not say what it has heard of a lock: that may be long ago.
func TestReplicaDoesNotAnswer(t *testing.T) {
	master, replica := rig.Redis(t), rig.Redis(t)
	replica.Follow(master)
	holder := locked(t, "k", long, master.Client())
	m := dmutex.New("k", long, replica.Client())
	ctx := timeout(t)
	_, err := m.LockedUntil(ctx)
	require.ErrorContains(t, err, "READONLY")
	_, err = m.WaitUntilUnlocked(ctx)
	require.ErrorContains(t, err, "READONLY")
	_, err = m.TryLock(ctx)
	require.ErrorContains(t, err, "READONLY")
	require.NoError(t, holder.Unlock(ctx))
}

func TestSentinel(t *testing.T) {
	for name, fail := range map[string]func(s *rig.Sentinel){
		"by agreement": func(s *rig.Sentinel) { s.FailOver() },
		"master dies": func(s *rig.Sentinel) {
			before := s.Master()
			before.Kill()
			rig.Eventually(t, "another master", func() bool { return s.Master() != before })
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := rig.NewSentinel(t, time.Second)
			ctx, cancel := context.WithTimeout(context.Background(), 2*hang)
			defer cancel()
			client := s.Client()
			holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
			gotten, told := lock(ctx, next), watch(ctx, dmutex.New("k", long, client))
			awaitQueue(t, client, "k", 1)
			s.Master().AwaitReplicated("k", 2)
			fail(s)
			up := time.Now()
			rig.Eventually(t, "Unlock", func() bool {
				err := holder.Unlock(ctx)
				assert.NotErrorIs(t, err, dmutex.ErrLockLost)
				return err == nil || errors.Is(err, dmutex.ErrNotHeld)
			})
			require.NoError(t, receive(t, gotten))
			require.Equal(t, released(), receive(t, told))
			require.Less(t, time.Since(up), 2*soon)
			require.NoError(t, next.Unlock(ctx))
		})
	}
}
