package dmutex_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
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

// do starts a Do whose function waits for the end of its ctx, or of work, and tells
// the cause.
func do(ctx context.Context, m *dmutex.Mutex, work <-chan struct{}) (cause <-chan error, done <-chan error) {
	causes, ends := make(chan error, 1), make(chan error, 1)
	go func() {
		ends <- m.Do(ctx, func(ctx context.Context) error {
			select {
			case <-ctx.Done():
				causes <- context.Cause(ctx)
			case <-work:
				causes <- nil
			}
			return nil
		})
	}()
	return causes, ends
}

func TestDoHoldsForAsLongAsTheWorkTakes(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		work := make(chan struct{})
		requests := count(client)
		cause, done := do(ctx, dmutex.New("k", 3*time.Second, client), work)
		synctest.Wait()
		other := b.Client()
		defer other.Close()
		told, gotten := watch(ctx, dmutex.New("k", long, other)), lock(ctx, dmutex.New("k", long, other))
		synctest.Wait()
		before := requests.n.Load()
		b.Advance(60 * time.Second)
		require.InDelta(t, 60, requests.since(before), 2, "one request per third of the ttl")
		require.Empty(t, gotten)
		require.Empty(t, told)
		require.Len(t, goroutinesOf("(*hold)"), 1)
		close(work)
		require.NoError(t, receive(t, cause))
		require.NoError(t, receive(t, done))
		require.Equal(t, released(), receive(t, told))
		require.NoError(t, receive(t, gotten))
		synctest.Wait()
		require.Empty(t, goroutinesOf("(*hold)"))
	})
}

func TestDoEndsItsCtxWhenTheLockIsLost(t *testing.T) {
	const ttl = 3 * time.Second
	for name, c := range map[string]struct {
		lose   func(b *rig.Bubble)
		within time.Duration
		says   string
	}{
		"deleted":     {func(b *rig.Bubble) { b.Mini.Del("k") }, ttl / 3, "taken"},
		"taken over":  {func(b *rig.Bubble) { b.Mini.Set("k", "somebody's") }, ttl / 3, "taken"},
		"unreachable": {func(b *rig.Bubble) { b.Mini.SetError("LOADING of data") }, ttl, "LOADING of data"},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
				cause, done := do(context.Background(), dmutex.New("k", ttl, client), nil)
				b.Advance(10 * time.Second)
				require.Empty(t, cause)
				c.lose(b)
				b.Advance(c.within)
				synctest.Wait()
				require.Len(t, cause, 1, "ctx goes on")
				why := <-cause
				b.Mini.SetError("")
				require.ErrorIs(t, why, dmutex.ErrLockLost)
				require.ErrorContains(t, why, c.says)
				if err := receive(t, done); name != "unreachable" { // where the key is there for a moment more
					require.ErrorIs(t, err, dmutex.ErrLockLost)
				}
			})
		})
	}
}

func TestDoSurvivesAShortFault(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		work := make(chan struct{})
		cause, done := do(context.Background(), dmutex.New("k", 3*time.Second, client), work)
		for range 5 {
			b.Advance(1500 * time.Millisecond)
			b.Mini.SetError("LOADING of data")
			b.Advance(1200 * time.Millisecond)
			b.Mini.SetError("")
			b.CutAll()
		}
		close(work)
		require.NoError(t, receive(t, cause))
		require.NoError(t, receive(t, done))
	})
}

func TestDoTellsAllErrors(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client := s.Client()
		ctx := timeout(t)
		m := dmutex.New("k", long, client)
		broken := errors.New("work failed")

		t.Run("of the function", func(t *testing.T) {
			require.ErrorIs(t, m.Do(ctx, func(context.Context) error { return broken }), broken)
			requireClean(t, client)
		})
		t.Run("of the function and of the release", func(t *testing.T) {
			err := m.Do(ctx, func(context.Context) error { client.Del(ctx, "k"); return broken })
			require.ErrorIs(t, err, broken)
			require.ErrorIs(t, err, dmutex.ErrLockLost)
		})
		t.Run("of the lock", func(t *testing.T) {
			holder := locked(t, "k", long, client)
			bound, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			defer cancel()
			err := m.Do(bound, func(context.Context) error { panic("not to be run") })
			var failed *dmutex.ErrFailedToLock
			require.ErrorAs(t, err, &failed)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			ran, err := m.TryDo(ctx, func(context.Context) error { panic("not to be run") })
			require.NoError(t, err)
			require.False(t, ran)
			require.NoError(t, holder.Unlock(ctx))
			requireClean(t, client) // what was given up has given up its place
		})
		t.Run("none", func(t *testing.T) {
			ran, err := m.TryDo(ctx, func(context.Context) error {
				require.ErrorIs(t, m.Unlock(ctx), dmutex.ErrNotHeld, "the hold is Do's own")
				return nil
			})
			require.NoError(t, err)
			require.True(t, ran)
			requireClean(t, client)
		})
		t.Run("panic", func(t *testing.T) {
			require.PanicsWithValue(t, "oops", func() { _ = m.Do(ctx, func(context.Context) error { panic("oops") }) })
			requireClean(t, client)
		})
		t.Run("ctx ends", func(t *testing.T) {
			bound, cancel := context.WithCancel(ctx)
			err := m.Do(bound, func(ctx context.Context) error {
				cancel()
				<-ctx.Done()
				require.NotErrorIs(t, context.Cause(ctx), dmutex.ErrLockLost)
				return ctx.Err()
			})
			require.ErrorIs(t, err, context.Canceled)
			requireClean(t, client)
		})
	})
}

func TestKeepAlive(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		m := dmutex.New("k", time.Second, client, dmutex.WithKeepAlive())
		require.NoError(t, m.Lock(ctx))
		lost := m.Lost()
		b.Advance(time.Minute)
		require.True(t, b.Mini.Exists("k"))
		select {
		case <-lost:
			require.Fail(t, "told of a loss that there was not")
		default:
		}
		require.NoError(t, m.Unlock(ctx))
		require.Empty(t, goroutinesOf("(*hold)"))
		synctest.Wait()
		select {
		case <-lost:
			require.Fail(t, "Unlock is no loss")
		default:
		}

		require.NoError(t, m.Lock(ctx))
		b.Mini.Del("k")
		start := time.Now()
		<-m.Lost()
		require.LessOrEqual(t, time.Since(start), time.Second/3+10*time.Millisecond)
		require.ErrorIs(t, m.Unlock(ctx), dmutex.ErrLockLost)
		<-m.Lost() // nothing is held
	})
}

func TestMaxHold(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		start := time.Now()
		const longest = 10 * time.Second
		cause, done := do(ctx, dmutex.New("k", 3*time.Second, client, dmutex.WithMaxHold(longest)), nil)
		told := watch(ctx, dmutex.New("k", long, client))
		go b.Advance(longest + time.Second)
		why := <-cause
		require.ErrorIs(t, why, dmutex.ErrLockLost)
		require.ErrorIs(t, why, dmutex.ErrMaxHold)
		require.LessOrEqual(t, time.Since(start), longest)
		require.Greater(t, time.Since(start), longest/2)
		<-done
		require.NoError(t, (<-told).err)
		time.Sleep(longest)

		m := dmutex.New("k", 3*time.Second, client, dmutex.WithMaxHold(2*time.Second))
		require.ErrorContains(t, m.Lock(ctx), "less than its ttl")

		m = dmutex.New("k2", 3*time.Second, client, dmutex.WithMaxHold(5*time.Second))
		require.NoError(t, m.Lock(ctx))
		b.Advance(time.Second)
		require.NoError(t, m.Extend(ctx))
		b.Advance(2 * time.Second)
		require.ErrorIs(t, m.Extend(ctx), dmutex.ErrMaxHold)
		require.NotErrorIs(t, m.Extend(ctx), dmutex.ErrLockLost)
		b.Advance(2 * time.Second)
		require.ErrorIs(t, m.Extend(ctx), dmutex.ErrLockLost)
	})
}

// Whoever polls its ctx is told the same cause as whoever waits for it.
func TestCauseIsTheSameForAll(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		m := dmutex.New("k", 3*time.Second, client)
		err := m.Do(ctx, func(ctx context.Context) error {
			b.Mini.SetError("LOADING of data")
			for ctx.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			require.ErrorContains(t, context.Cause(ctx), "LOADING of data")
			b.Mini.SetError("")
			return nil
		})
		_ = err // the key may be there for a moment more
	})
}

// A grant whose answer took long is renewed in time, and its end is not told late.
func TestGrantThatTookLong(t *testing.T) {
	throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
		ctx := timeout(t)
		const ttl, took = 3 * time.Second, 2500 * time.Millisecond
		require.NoError(t, behind.Ping(ctx).Err())
		p.Late(script, took)
		require.NoError(t, dmutex.New("k", ttl, behind).Do(ctx, func(ctx context.Context) error {
			time.Sleep(ttl)
			return ctx.Err()
		}))
	})
}

func TestLostIsToldInTime(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		start := time.Now()
		const ttl = 30 * time.Second
		m := locked(t, "k", ttl, client)
		time.Sleep(25 * time.Second)
		<-m.Lost()
		require.Less(t, time.Since(start), ttl)
		time.Sleep(time.Minute)
		<-m.Lost()
		require.Less(t, time.Since(start), ttl+time.Minute+time.Second)
	})
}

func TestTokensOfNestedDos(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		outer, inner := dmutex.New("a", long, client, dmutex.WithFencing()), dmutex.New("b", long, client)
		require.NoError(t, outer.Do(context.Background(), func(ctx context.Context) error {
			require.Positive(t, dmutex.TokenFrom(ctx))
			return inner.Do(ctx, func(ctx context.Context) error {
				require.Zero(t, dmutex.TokenFrom(ctx), "it is the other lock's")
				return nil
			})
		}))
	})
}

func TestExtend(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client := s.Client()
		ctx := timeout(t)
		const ttl = 10 * time.Second
		m := dmutex.New("k", ttl, client)
		var failed *dmutex.ErrFailedToExtend
		require.ErrorAs(t, m.Extend(ctx), &failed)
		require.ErrorIs(t, failed, dmutex.ErrNotHeld)

		require.NoError(t, m.Lock(ctx))
		require.NoError(t, client.PExpire(ctx, "k", ttl/2).Err())
		require.NoError(t, m.Extend(ctx))
		left, err := m.LockedUntil(ctx)
		require.NoError(t, err)
		require.Greater(t, left, ttl*3/4)

		ended, cancel := context.WithCancel(ctx)
		cancel()
		require.ErrorIs(t, m.Extend(ended), context.Canceled)
		require.NoError(t, client.Set(ctx, "k", "somebody's", long).Err())
		require.ErrorIs(t, m.Extend(ctx), dmutex.ErrLockLost)
		require.Equal(t, "somebody's", client.Get(ctx, "k").Val())
		require.NoError(t, client.Del(ctx, "k").Err())
		require.ErrorIs(t, m.Extend(ctx), dmutex.ErrLockLost)
		require.Zero(t, client.Exists(ctx, "k").Val(), "a lost lock is not taken again")
		require.ErrorIs(t, m.Unlock(ctx), dmutex.ErrLockLost)
	})
}

func TestLostWithoutRenewal(t *testing.T) {
	inBubble(t, func(t *testing.T, b *rig.Bubble, client *redis.Client) {
		ctx := context.Background()
		start := time.Now()
		m := locked(t, "k", 3*time.Second, client)
		lost := m.Lost()
		time.Sleep(2 * time.Second)
		require.NoError(t, m.Extend(ctx))
		<-lost
		require.Less(t, time.Since(start), 5*time.Second)
		require.Greater(t, time.Since(start), 4900*time.Millisecond)
	})
}

// A renewal that is under way when the lock is released must not bring it back.
func TestRenewalDoesNotOutliveUnlock(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		const goroutines, ttl = 50, 60 * time.Millisecond
		rounds := 200
		if s.Mini != nil {
			rounds = 10 // it is slow
		}
		ctx, cancel := context.WithTimeout(context.Background(), 4*hang)
		defer cancel()
		client := s.Client()
		var wg sync.WaitGroup
		for g := range goroutines {
			key := string(rune('a'+g%26)) + string(rune('a'+g/26))
			m := dmutex.New(key, ttl, client, dmutex.WithKeepAlive())
			wg.Go(func() {
				for range rounds {
					if !assert.NoError(t, m.Lock(ctx)) {
						return
					}
					time.Sleep(ttl/3 + rand.N(2*time.Millisecond) - time.Millisecond)
					if err := m.Unlock(ctx); err != nil {
						assert.ErrorIs(t, err, dmutex.ErrLockLost) // a slow machine
					}
					assert.Zero(t, client.Exists(ctx, key).Val(), "alive after Unlock")
				}
			})
		}
		wg.Wait()
	})
}

// The ctx of Do ends before the key does, whatever becomes of the renewals.
func TestDoEndsItsCtxBeforeTheKeyExpires(t *testing.T) {
	for name, fault := range map[string]func(p *rig.Proxy){
		"black hole": func(p *rig.Proxy) { p.BlackHole(true) },
		"refused":    func(p *rig.Proxy) { p.Refuse(true); p.CutAll() },
		"slow":       func(p *rig.Proxy) { p.Delay(2 * time.Second) },
		"no replies": func(p *rig.Proxy) { p.BlackHoleOn(script) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
				const ttl = 8 * time.Second // one hundredth of it is what a timer may be late here
				ctx := timeout(t)
				left := make(chan time.Duration, 1)
				done := make(chan error, 1)
				go func() {
					done <- dmutex.New("k", ttl, behind).Do(ctx, func(inner context.Context) error {
						fault(p)
						<-inner.Done()
						left <- beside.PTTL(ctx, "k").Val()
						assert.ErrorIs(t, context.Cause(inner), dmutex.ErrLockLost)
						assert.NotErrorIs(t, context.Cause(inner), context.DeadlineExceeded)
						p.BlackHole(false)
						p.BlackHoleOn("")
						p.Refuse(false)
						p.Delay(0)
						p.CutAll()
						return nil
					})
				}()
				require.Positive(t, receive(t, left))
				<-done
			})
		})
	}
}

// guard refuses what comes with a token smaller than one that it has seen.
var guard = redis.NewScript(`
	if tonumber(redis.call('HGET', KEYS[1], 'token') or 0) > tonumber(ARGV[1]) then
		return 'refused'
	end
	redis.call('HSET', KEYS[1], 'token', ARGV[1], 'value', ARGV[2])
	return 'written'`)

// write writes to "data", guarded or not, and returns what came of it.
func write(client *redis.Client, guarded bool, token int64, value string) string {
	ctx := context.Background()
	if !guarded {
		client.HSet(ctx, "data", "value", value)
		return "written"
	}
	said, err := guard.Run(ctx, client, []string{"data"}, token, value).Text()
	if err != nil {
		return err.Error()
	}
	return said
}

func TestTokensRise(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		ctx := timeout(t)
		client := s.Client()
		var (
			latest int64 // guarded by the lock
			wg     sync.WaitGroup
		)
		for range 10 {
			m := dmutex.New("k", long, client, dmutex.WithFencing())
			wg.Go(func() {
				for range 20 {
					if !assert.NoError(t, m.Lock(ctx)) {
						return
					}
					assert.Greater(t, m.Token(), latest)
					latest = m.Token()
					assert.NoError(t, m.Unlock(ctx))
					assert.Zero(t, m.Token())
				}
			})
		}
		wg.Wait()
		for _, key := range client.Keys(ctx, "*").Val() {
			require.Positive(t, client.PTTL(ctx, key).Val(), "%q never expires", key)
		}

		m := dmutex.New("k", long, client, dmutex.WithFencing())
		next := func() int64 {
			var token int64
			ran, err := m.TryDo(ctx, func(ctx context.Context) error {
				token = dmutex.TokenFrom(ctx)
				return nil
			})
			require.NoError(t, err)
			require.True(t, ran)
			return token
		}
		require.NoError(t, client.FlushAll(ctx).Err())
		require.Greater(t, next(), latest, "after all data were lost")

		const future = int64(1) << 52
		require.NoError(t, client.Set(ctx, "k{k}:dmutex:fence", fmt.Sprint(future, " somebody"), long).Err())
		require.Equal(t, future+1, next(), "after the clock was set back")
		require.Equal(t, future+2, next())

		plain := dmutex.New("k", long, client)
		require.NoError(t, plain.Do(ctx, func(ctx context.Context) error {
			require.Zero(t, dmutex.TokenFrom(ctx))
			return nil
		}))
	})
}

// A repeat of the request, after a lost reply, is answered with the same token.
func TestTokenOfALostReply(t *testing.T) {
	throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
		require.NoError(t, behind.Ping(timeout(t)).Err())
		p.LoseReply(script, rig.Cut)
		m := dmutex.New("k", long, behind, dmutex.WithFencing())
		require.NoError(t, m.Lock(timeout(t)))
		stored := beside.Get(timeout(t), "k{k}:dmutex:fence").Val()
		require.True(t, strings.HasPrefix(stored, fmt.Sprint(m.Token(), " ")), stored)
		require.NoError(t, m.Unlock(timeout(t)))
	})
}

func TestInspect(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		ctx := timeout(t)
		client := s.Client()
		look := dmutex.New("k", long, client)
		inspect := func() dmutex.Info {
			info, err := look.Inspect(ctx)
			require.NoError(t, err)
			return info
		}
		require.Equal(t, dmutex.Info{}, inspect())

		const label = "host-7 job.12 Ü%"
		before := client.Time(ctx).Val().Add(-time.Millisecond)
		holder := dmutex.New("k", long, client, dmutex.WithOwner(label))
		require.NoError(t, holder.Lock(ctx))
		require.Zero(t, holder.Token(), "not asked for")
		next := dmutex.New("k", long, client, dmutex.WithOwner("the next"))
		gotten := lock(ctx, next)
		awaitQueue(t, client, "k", 1)
		info := inspect()
		require.True(t, info.Held)
		require.False(t, info.Foreign)
		require.False(t, info.HandedTo)
		require.Equal(t, label, info.Owner)
		require.Equal(t, 1, info.Waiting)
		require.True(t, before.Before(info.Since) && info.Since.Before(client.Time(ctx).Val().Add(time.Millisecond)), info.Since)
		require.InDelta(t, long.Seconds(), info.TTL.Seconds(), 10)
		ticket := client.Get(ctx, "k").Val()
		require.True(t, strings.HasPrefix(ticket, info.Holder))
		require.Less(t, len(info.Holder), len(ticket)-20)

		require.NoError(t, holder.Unlock(ctx))
		require.NoError(t, receive(t, gotten))
		info = inspect()
		require.Equal(t, "the next", info.Owner)
		require.Zero(t, info.Waiting)
		require.NoError(t, next.Unlock(ctx))
		requireClean(t, client)

		plain := locked(t, "k", long, client)
		info = inspect()
		require.Empty(t, info.Owner)
		require.True(t, info.Held)
		require.Zero(t, info.Since)
		require.NoError(t, plain.Unlock(ctx))

		require.NoError(t, client.Set(ctx, "k", "cGxhaW4gcmVkc3luYw==", long).Err())
		require.True(t, inspect().Foreign)
		require.NoError(t, client.Del(ctx, "k").Err())

		_, err := dmutex.New("k", long, client, dmutex.WithOwner(strings.Repeat("x", 65))).Inspect(ctx)
		require.ErrorContains(t, err, "65 bytes")
	})
}
