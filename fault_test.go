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

// A failed Unlock is nobody's debt: the next hold is unlocked like any other.
func TestMutexIsOfUseAfterAnUnlockThatFailed(t *testing.T) {
	throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
		for _, ttl := range []time.Duration{200 * time.Millisecond, long} {
			m := locked(t, "k", ttl, behind)
			p.Refuse(true)
			p.CutAll()
			require.Error(t, m.Unlock(timeout(t)))
			p.Refuse(false)
			for range 3 { // the first one waits for the ttl, or for the release in the background
				rig.Eventually(t, "Lock", func() bool { return m.Lock(timeout(t)) == nil })
				require.NoError(t, m.Unlock(timeout(t)))
			}
		}
		requireClean(t, beside)
	})
}

// Whoever was granted the lock too late to use it keeps its place, after the one that
// got the lock instead.
func TestPlaceIsKeptAfterALateGrant(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		const ttl, delay = 300 * time.Millisecond, 200 * time.Millisecond // there and back takes longer than the ttl
		ctx := timeout(t)
		p := rig.NewProxy(t, s.Addr)
		behind := s.Client(func(o *redis.Options) { o.Addr = p.Addr })
		beside := s.Client()
		holder := locked(t, "k", long, beside)
		turns := make(chan string, 3)
		var wg sync.WaitGroup
		for i, name := range []string{"first", "second", "third"} {
			m := dmutex.New("k", long, beside)
			if name == "first" {
				m = dmutex.New("k", ttl, behind)
			}
			wg.Go(func() {
				if assert.NoError(t, m.Lock(ctx)) {
					turns <- name
					p.Delay(0)
					if name == "second" {
						time.Sleep(5 * delay) // the first comes back
					}
					assert.NoError(t, m.Unlock(ctx))
				}
			})
			awaitQueue(t, beside, "k", int64(i+1))
		}
		p.Delay(delay)
		require.NoError(t, holder.Unlock(ctx))
		wg.Wait()
		require.Equal(t, "second first third", fmt.Sprint(<-turns, " ", <-turns, " ", <-turns))
	})
}

// A request that arrives when go-redis has repeated it already, and its answer is
// told, must not get a lock that nobody knows of.
func TestCopyOfAFailedTryArrivesLate(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		ctx := timeout(t)
		p := rig.NewProxy(t, s.Addr)
		behind := s.Client(func(o *redis.Options) { o.Addr, o.ReadTimeout = p.Addr, 200*time.Millisecond })
		beside := s.Client()
		for name, fail := range map[string]func(t *testing.T, m *dmutex.Mutex){
			"TryLock": func(t *testing.T, m *dmutex.Mutex) {
				acquired, err := m.TryLock(ctx)
				require.NoError(t, err)
				require.False(t, acquired)
			},
			"Lock": func(t *testing.T, m *dmutex.Mutex) {
				bound, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
				defer cancel()
				require.ErrorIs(t, m.Lock(bound), context.DeadlineExceeded)
			},
		} {
			t.Run(name, func(t *testing.T) {
				const late = time.Second
				holder := locked(t, "k", long, beside)
				require.NoError(t, behind.Ping(ctx).Err())
				p.Late(script, late)
				sent := time.Now()
				fail(t, dmutex.New("k", long, behind))
				awaitEnded(t, beside, "k")
				require.NoError(t, holder.Unlock(ctx))
				time.Sleep(time.Until(sent.Add(late + 200*time.Millisecond))) // it has arrived
				requireClean(t, beside)
			})
		}
	})
}

// What the background has released is not told as lost, however late Unlock is repeated.
func TestUnlockIsRepeatedLate(t *testing.T) {
	throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
		ctx := timeout(t)
		m := locked(t, "k", long, behind)
		p.Refuse(true)
		p.CutAll()
		require.Error(t, m.Unlock(ctx))
		p.Refuse(false)
		rig.Eventually(t, "it is released in the background", func() bool { return beside.Exists(ctx, "k").Val() == 0 })
		awaitEnded(t, beside, "k")
		time.Sleep(100 * time.Millisecond) // for the reply
		for _, tombstone := range beside.Keys(ctx, "*:ended:*").Val() {
			require.NoError(t, beside.Del(ctx, tombstone).Err())
		}
		require.NoError(t, m.Unlock(ctx))
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
						time.Sleep(rand.N(4 * time.Millisecond))
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
				rig.Eventually(t, "the one is in the queue and the other has been refused", func() bool {
					most = max(most, connections())
					return admin.ZCard(ctx, queueOf("k")).Val() == 1 && denied(ctx, admin)
				})
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

// denied tells whether the server has denied somebody a channel.
func denied(ctx context.Context, admin *redis.Client) bool {
	return strings.Contains(fmt.Sprint(admin.Do(ctx, "acl", "log").Val()), "channel")
}

// Whoever may not subscribe gets its turn all the same, even if the lock is never
// free for long enough to be found so.
func TestRefusedWaiterKeepsItsPlace(t *testing.T) {
	s := rig.Redis(t)
	ctx := timeout(t)
	admin := s.Client()
	require.NoError(t, admin.Do(ctx, "acl", "setuser", "limited", "on", ">pw", "~*", "+@all", "resetchannels").Err())
	refused := s.Client(func(o *redis.Options) { o.Username, o.Password = "limited", "pw" })
	defer keepBusy(t, "k", s)()
	for range 3 {
		m := dmutex.New("k", long, refused)
		require.NoError(t, m.Lock(ctx))
		require.NoError(t, m.Unlock(ctx))
	}
}

// keepBusy has others want the lock all the time, until it is told to stop.
func keepBusy(t *testing.T, key string, s *rig.Server) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range 3 {
		m := dmutex.New(key, long, s.Client())
		wg.Go(func() {
			for m.Lock(ctx) == nil {
				time.Sleep(5 * time.Millisecond)
				_ = m.Unlock(ctx)
			}
		})
	}
	awaitQueue(t, s.Client(), key, 2)
	return func() { cancel(); wg.Wait() }
}

// A refusal that passes, like BUSY, must not leave the waiters without messages.
func TestSubscriptionIsRefusedForAWhile(t *testing.T) {
	s := rig.Redis(t, "--busy-reply-threshold", "50")
	ctx := timeout(t)
	beside := s.Client()
	p := rig.NewProxy(t, s.Addr)
	behind := s.Client(func(o *redis.Options) { o.Addr = p.Addr })
	holder, next := locked(t, "k", long, beside), dmutex.New("k", long, behind)
	gotten := lock(ctx, next)
	awaitQueue(t, beside, "k", 1)
	patient := s.Client(func(o *redis.Options) { o.ReadTimeout = hang })
	ended := make(chan error, 1)
	go func() { ended <- patient.Eval(context.Background(), "while true do end", nil).Err() }()
	rig.Eventually(t, "the server is busy", func() bool {
		err := beside.Ping(ctx).Err()
		return err != nil && strings.HasPrefix(err.Error(), "BUSY ")
	})
	p.CutAll()
	time.Sleep(300 * time.Millisecond) // for it to come back, and be refused
	require.NoError(t, beside.ScriptKill(ctx).Err())
	require.Error(t, receive(t, ended))
	awaitSubscribed(t, beside, inboxIn(ctx, beside, "k"))
	require.NoError(t, holder.Unlock(ctx))
	require.NoError(t, receive(t, gotten))
	require.NoError(t, next.Unlock(ctx))
}

// inboxIn returns the inbox of the first in a queue.
func inboxIn(ctx context.Context, client *redis.Client, key string) string {
	inbox, _, _ := strings.Cut(strings.Join(client.ZRange(ctx, queueOf(key), 0, 0).Val(), ""), ".")
	return "dmutex-inbox:" + inbox
}

// A master that became a replica still passes on what is published at the new one,
// where nobody seems to listen then.
func TestSubscriptionStaysOnTheOldMaster(t *testing.T) {
	former, later := rig.Redis(t), rig.Redis(t)
	ctx := timeout(t)
	later.Follow(former)
	p := rig.NewProxy(t, former.Addr)
	client := former.Client(func(o *redis.Options) { o.Addr = p.Addr })
	locked(t, "other", long, former.Client())
	keep, cancel := context.WithCancel(ctx)
	defer cancel()
	kept := lock(keep, dmutex.New("other", long, client)) // so that the subscription stays
	awaitQueue(t, former.Client(), "other", 1)
	former.AwaitReplicated("other", 1)

	p.Retarget(later.Addr)
	later.Follow(nil)
	former.Follow(later)
	defer keepBusy(t, "k", later)()
	for range 3 {
		m := dmutex.New("k", long, client)
		require.NoError(t, m.Lock(ctx))
		require.NoError(t, m.Unlock(ctx))
	}
	cancel()
	require.ErrorIs(t, receive(t, kept), context.Canceled)
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

// workerEnv makes the test binary a process that waits for a lock, holds it and
// releases it: "<address> <ttl> <for how long> <how it writes then>".
const workerEnv = "DMUTEX_TEST_WORKER"

func worker(work string) {
	var addr, ttl, hold, writes string
	_, _ = fmt.Sscan(work, &addr, &ttl, &hold)
	writes = strings.Join(strings.Fields(work)[3:], " ")
	parse := func(s string) time.Duration {
		d, err := time.ParseDuration(s)
		if err != nil {
			panic(err)
		}
		return d
	}
	client := redis.NewClient(&redis.Options{Addr: addr})
	go func() { // ends with the parent, however that ends
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		os.Exit(0)
	}()
	m := dmutex.New("k", parse(ttl), client, dmutex.WithFencing())
	if writes == "in Do" {
		_ = m.Do(context.Background(), func(ctx context.Context) error {
			fmt.Println("held")
			time.Sleep(parse(hold))
			fmt.Println("ctx:", ctx.Err() != nil, errors.Is(context.Cause(ctx), dmutex.ErrLockLost))
			return nil
		})
		os.Exit(0)
	}
	if err := m.Lock(context.Background()); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("held")
	time.Sleep(parse(hold))
	if writes != "" {
		fmt.Println(write(client, writes == "guarded", m.Token(), "first"))
	}
	switch err := m.Unlock(context.Background()); {
	case err == nil:
		fmt.Println("released")
	case errors.Is(err, dmutex.ErrLockLost):
		fmt.Println("lost")
	default:
		fmt.Println(err)
	}
	os.Exit(0)
}
