package dmutex_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-redis/redis/v8"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// throughProxy runs body with a client behind a proxy and one beside it.
func throughProxy(t *testing.T, body func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client)) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		p := rig.NewProxy(t, s.Addr)
		behind, beside := s.Client(func(o *redis.Options) {
			o.Addr = p.Addr
			o.ReadTimeout = 200 * time.Millisecond
		}), s.Client()
		require.NoError(t, locked(t, "k", long, beside).Unlock(timeout(t))) // loads the scripts
		require.NoError(t, beside.FlushAll(timeout(t)).Err())
		body(t, p, behind, beside)
	})
}

// script is how a request that runs a script begins.
const script = "evalsha"

func TestCtxEndsWhileTheReplyIsInFlight(t *testing.T) {
	for name, take := range map[string]func(context.Context, *dmutex.Mutex) error{
		"Lock":    func(ctx context.Context, m *dmutex.Mutex) error { return m.Lock(ctx) },
		"TryLock": func(ctx context.Context, m *dmutex.Mutex) error { _, err := m.TryLock(ctx); return err },
	} {
		t.Run(name+" in time", func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
				require.NoError(t, locked(t, "k", long, client).Unlock(context.Background()))
				slow(b)
				ctx, cancel := context.WithTimeout(context.Background(), slowness/2)
				defer cancel()
				start := time.Now()
				err := take(ctx, dmutex.New("k", long, client))
				require.ErrorIs(t, err, context.DeadlineExceeded)
				require.Less(t, time.Since(start), 100*time.Millisecond)
				time.Sleep(time.Second)
				require.False(t, b.Mini.Exists("k"), "the lock was granted and nobody has it")
			})
		})
		t.Run(name, func(t *testing.T) {
			throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
				m := dmutex.New("k", long, behind)
				ctx, cancel := context.WithCancel(timeout(t))
				defer cancel()
				sent := p.LoseReply(script, rig.Swallow)
				failed := make(chan error, 1)
				go func() { failed <- take(ctx, m) }()
				receive(t, sent)
				cancel()
				err := receive(t, failed)
				var lockErr *dmutex.ErrFailedToLock
				require.ErrorAs(t, err, &lockErr)
				require.ErrorIs(t, err, context.Canceled)
				awaitEnded(t, beside, "k")
				requireClean(t, beside)
				require.ErrorIs(t, m.Unlock(timeout(t)), dmutex.ErrNotHeld)
			})
		})
	}
}

func TestCauseOfCtxIsTold(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		locked(t, "k", long, client)
		why := errors.New("shutting down")
		ctx, cancel := context.WithCancelCause(context.Background())
		given := lock(ctx, dmutex.New("k", long, client))
		synctest.Wait()
		cancel(why)
		err := <-given
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, err, why)
	})
}

func TestReplyOfAcquireIsLost(t *testing.T) {
	for name, how := range map[string]rig.Loss{"cut": rig.Cut, "swallowed": rig.Swallow} {
		t.Run(name, func(t *testing.T) {
			throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
				for range 5 {
					m := dmutex.New("k", long, behind)
					p.LoseReply(script, how)
					acquired, err := m.TryLock(timeout(t))
					require.NoError(t, err, "go-redis sends it again")
					require.True(t, acquired, "it holds the lock")
					require.NoError(t, m.Unlock(timeout(t)))
				}
				requireClean(t, beside)
			})
		})
		t.Run(name+" for good", func(t *testing.T) {
			throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
				for range 4 { // as often as go-redis tries
					p.LoseReply(script, how)
				}
				acquired, err := dmutex.New("k", long, behind).TryLock(timeout(t))
				require.Error(t, err)
				require.NotErrorIs(t, err, context.DeadlineExceeded, "no ctx of ours ended")
				require.False(t, acquired)
				awaitEnded(t, beside, "k")
				requireClean(t, beside)
			})
		})
	}
}

func TestReplyOfReleaseIsLost(t *testing.T) {
	for name, how := range map[string]rig.Loss{"cut": rig.Cut, "swallowed": rig.Swallow} {
		t.Run(name, func(t *testing.T) {
			throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
				for _, times := range []int{1, 3, 5} { // the last is more than go-redis tries
					m := locked(t, "k", long, behind)
					for range times {
						p.LoseReply(script, how)
					}
					require.NoError(t, m.Unlock(timeout(t)), "it was released")
				}
				requireClean(t, beside)
			})
		})
	}
}

func TestUnlockMayBeCalledAgain(t *testing.T) {
	throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
		m := locked(t, "k", long, behind)
		p.Refuse(true)
		p.CutAll()
		err := m.Unlock(timeout(t))
		var failed *dmutex.ErrFailedToUnlock
		require.ErrorAs(t, err, &failed)
		require.NotErrorIs(t, err, dmutex.ErrLockLost, "nobody knows")
		p.Refuse(false)
		rig.Eventually(t, "the client is connected again", func() bool { return behind.Ping(timeout(t)).Err() == nil })
		require.NoError(t, m.Unlock(timeout(t)))
		requireClean(t, beside)
		require.ErrorIs(t, m.Unlock(timeout(t)), dmutex.ErrNotHeld)
	})
}

// An Unlock that failed is owed no longer than its hold could have lived.
func TestMutexIsOfUseAfterAnUnlockThatFailed(t *testing.T) {
	throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
		m := locked(t, "k", 200*time.Millisecond, behind)
		p.Refuse(true)
		p.CutAll()
		require.Error(t, m.Unlock(timeout(t)))
		p.Refuse(false)
		rig.Eventually(t, "the client is connected again", func() bool { return behind.Ping(timeout(t)).Err() == nil })
		rig.Eventually(t, "the end of the hold", func() bool { return beside.Exists(timeout(t), "k").Val() == 0 })
		for range 3 {
			require.NoError(t, m.Lock(timeout(t)))
			require.NoError(t, m.Unlock(timeout(t)))
		}
	})
}

func TestShortTTLOnASlowNetwork(t *testing.T) {
	throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
		p.Delay(5 * time.Millisecond)
		ctx := timeout(t)
		var wg sync.WaitGroup
		for range 3 {
			m := dmutex.New("k", 100*time.Millisecond, behind)
			wg.Go(func() {
				for range 5 {
					if assert.NoError(t, m.Lock(ctx)) {
						_ = m.Unlock(ctx) // a busy machine may take longer than the ttl
					}
				}
			})
		}
		wg.Wait()
		requireClean(t, beside)
	})
}

func TestExclusionOnABadNetwork(t *testing.T) {
	throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
		ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
		defer cancel()
		var (
			inside, grants atomic.Int32
			wg             sync.WaitGroup
		)
		wg.Go(func() {
			for sleepFor(ctx, rand.N(20*time.Millisecond)) {
				switch rand.N(10) {
				case 0:
					p.CutAll()
				case 1, 2:
					p.LoseReply(script, rig.Swallow)
				default:
					p.LoseReply(script, rig.Cut)
				}
			}
		})
		for range 10 {
			m := dmutex.New("k", 2*time.Second, behind)
			wg.Go(func() {
				for ctx.Err() == nil {
					bound, cancel := context.WithTimeout(ctx, rand.N(time.Second))
					if m.Lock(bound) == nil {
						assert.Equal(t, int32(1), inside.Add(1))
						grants.Add(1)
						inside.Add(-1)
						_ = m.Unlock(ctx)
					}
					cancel()
				}
			})
		}
		wg.Wait()
		require.Positive(t, grants.Load())
		requireClean(t, beside)
	})
}

func sleepFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// A subscription of which nothing arrives any more, while nobody says that it is
// broken, is replaced.
func TestHalfOpenSubscription(t *testing.T) {
	throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
		ctx := timeout(t)
		holder, next := locked(t, "k", long, beside), dmutex.New("k", long, behind)
		gotten := lock(ctx, next)
		awaitQueue(t, beside, "k", 1)
		p.BlackHoleOn("dmutex-probe")
		rig.Eventually(t, "a half-open connection", func() bool { return p.BlackHoles() == 1 })
		p.BlackHoleOn("")
		rig.Eventually(t, "another one in its place", func() bool {
			return p.BlackHoles() == 0 && len(beside.PubSubChannels(ctx, "dmutex-inbox:*").Val()) == 1
		})
		require.NoError(t, holder.Unlock(ctx))
		require.NoError(t, receive(t, gotten))
		require.NoError(t, next.Unlock(ctx))
	})
}

func TestSubscriptionsAreKilled(t *testing.T) {
	s := rig.Redis(t)
	ctx := timeout(t)
	client, admin := s.Client(), s.Client()
	for range 5 {
		holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
		gotten, told := lock(ctx, next), watch(ctx, dmutex.New("k", long, client))
		awaitQueue(t, admin, "k", 1)
		awaitSubscribed(t, admin, "dmutex-k")
		require.NoError(t, admin.Do(ctx, "client", "kill", "type", "pubsub").Err())
		start := time.Now()
		require.NoError(t, holder.Unlock(ctx))
		require.NoError(t, receive(t, gotten))
		require.Equal(t, released(), receive(t, told))
		require.Less(t, time.Since(start), 2*time.Second)
		require.NoError(t, next.Unlock(ctx))
	}
}

func TestSubscribeIsRefused(t *testing.T) {
	for name, channels := range map[string][]any{
		"all":         nil,
		"the inbox's": {"&dmutex-k"},
		"the lock's":  {"&dmutex-inbox:*"},
	} {
		t.Run(name, func(t *testing.T) {
			s := rig.Redis(t)
			ctx := timeout(t)
			admin := s.Client()
			rule := append([]any{"acl", "setuser", "limited", "on", ">pw", "~*", "+@all", "resetchannels"}, channels...)
			require.NoError(t, admin.Do(ctx, rule...).Err())
			client := s.Client(func(o *redis.Options) { o.Username, o.Password = "limited", "pw" })
			connections := func() int {
				return strings.Count(admin.Do(ctx, "client", "list").String(), "user=limited")
			}
			most := 0
			for range 3 {
				holder, next := locked(t, "k", long, admin), dmutex.New("k", long, client)
				gotten, told := lock(ctx, next), watch(ctx, dmutex.New("k", long, client))
				rig.Eventually(t, "both wait", func() bool {
					most = max(most, connections())
					return client.PoolStats().Hits > 0 && len(gotten)+len(told) == 0
				})
				time.Sleep(100 * time.Millisecond) // time to ask, and to be refused
				start := time.Now()
				require.NoError(t, holder.Unlock(ctx))
				require.NoError(t, receive(t, gotten))
				require.Equal(t, released(), receive(t, told))
				require.Less(t, time.Since(start), 2*time.Second)
				require.NoError(t, next.Unlock(ctx))
			}
			require.LessOrEqual(t, max(most, connections()), 6)
		})
	}
}

// The smallest set of rights, which the README names.
func TestSmallestACL(t *testing.T) {
	s := rig.Redis(t)
	ctx := timeout(t)
	rights := "on >pw resetkeys ~jobs:* resetchannels &dmutex-* -@all +evalsha +eval " +
		"+get +set +del +exists +pttl +pexpire +time +zadd +zrem +zrange +zrank +zscore " +
		"+publish +subscribe +unsubscribe"
	rule := []any{"acl", "setuser", "limited"}
	for _, right := range strings.Fields(rights) {
		rule = append(rule, right)
	}
	require.NoError(t, s.Client().Do(ctx, rule...).Err())
	client := s.Client(func(o *redis.Options) { o.Username, o.Password = "limited", "pw" })
	requireWorks(t, client, "jobs:1")
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	require.Contains(t, strings.Join(strings.Fields(string(readme)), " "), strings.TrimPrefix(rights, "on >pw resetkeys "))
}

func TestServerRestartsEmptyWhileTwentyWait(t *testing.T) {
	s := rig.Redis(t)
	ctx := timeout(t)
	client := s.Client()
	holder := locked(t, "k", long, client)
	var (
		inside atomic.Int32
		wg     sync.WaitGroup
	)
	for range 20 {
		m := dmutex.New("k", long, client)
		wg.Go(func() {
			if assert.NoError(t, m.Lock(ctx)) {
				assert.Equal(t, int32(1), inside.Add(1))
				time.Sleep(time.Millisecond)
				inside.Add(-1)
				assert.NoError(t, m.Unlock(ctx))
			}
		})
	}
	awaitQueue(t, client, "k", 20)
	s.Kill()
	s.Start()
	wg.Wait()
	require.ErrorIs(t, holder.Unlock(ctx), dmutex.ErrLockLost)
	requireClean(t, s.Client())
}

// workerEnv makes the test binary a process that waits for a lock, and holds it
// until its standard input ends. Its value is the server's address.
const workerEnv = "DMUTEX_TEST_WORKER"

func worker(addr string) {
	client := redis.NewClient(&redis.Options{Addr: addr})
	go func() { // ends with the parent, however that ends
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		os.Exit(0)
	}()
	m := dmutex.New("k", time.Minute, client)
	if err := m.Lock(context.Background()); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("held")
	if err := m.Unlock(context.Background()); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}
