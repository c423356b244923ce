package dmutex

import (
	"context"
	"testing"
	"time"

	"github.com/go-redis/redis/v8"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// What the scripts do in situations that the methods cannot be brought into at will.
func TestScripts(t *testing.T) {
	const ttl = time.Minute
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		ctx := context.Background()
		client := s.Client()
		node, err := nodeOf(client, "k")
		require.NoError(t, err)
		names := namesOf("k")

		// try asks for the lock, and for a place in the queue.
		try := func(t *testing.T, c *claim) sight {
			c.inLine(c.place())
			seen, err := c.try(ctx)
			require.NoError(t, err)
			return seen
		}
		// handOver has one claim hold the lock and release it to the first of others
		// that wait, whose process listens but does not react.
		handOver := func(t *testing.T, to ...*claim) {
			require.NoError(t, client.FlushAll(ctx).Err())
			listens := client.Subscribe(ctx, inboxChannel(to[0].inbox()))
			t.Cleanup(func() { _ = listens.Close() })
			_, err := listens.Receive(ctx)
			require.NoError(t, err)
			holder := newClaim(node, names, ttl, newInbox(), signature{})
			require.Equal(t, "held", try(t, holder).status)
			for i, c := range to {
				seen := try(t, c)
				require.Equal(t, "taken", seen.status)
				require.Equal(t, i, seen.rank)
			}
			require.NoError(t, holder.release(ctx))
			require.Equal(t, to[0].ticket, client.Get(ctx, "k").Val())
		}
		placed := func(c *claim) bool { return client.ZScore(ctx, names.queue, c.ticket).Err() != redis.Nil }

		t.Run("whoever was handed the lock and lost it waits like any other", func(t *testing.T) {
			c := newClaim(node, names, ttl, newInbox(), signature{})
			handOver(t, c)
			require.Negative(t, client.ZScore(ctx, names.queue, c.ticket).Val())
			require.NoError(t, client.Set(ctx, "k", "somebody's", ttl).Err())
			require.Equal(t, "taken", try(t, c).status)
			require.Positive(t, client.ZScore(ctx, names.queue, c.ticket).Val())
		})
		t.Run("of a process that asks only the silent ticket goes", func(t *testing.T) {
			inbox := newInbox()
			silent, asks, waits := newClaim(node, names, ttl, inbox, signature{}), newClaim(node, names, ttl, inbox, signature{}), newClaim(node, names, ttl, inbox, signature{})
			handOver(t, silent, asks, waits)
			require.NoError(t, client.Del(ctx, "k").Err()) // the grace is over
			require.Equal(t, "held", try(t, asks).status)
			require.False(t, placed(silent))
			require.True(t, placed(waits))
		})
		t.Run("of a process that does not ask all tickets go", func(t *testing.T) {
			inbox := newInbox()
			silent, other, asks := newClaim(node, names, ttl, inbox, signature{}), newClaim(node, names, ttl, inbox, signature{}), newClaim(node, names, ttl, newInbox(), signature{})
			handOver(t, silent, other, asks)
			require.NoError(t, client.Del(ctx, "k").Err())
			require.Equal(t, "held", try(t, asks).status)
			require.False(t, placed(silent))
			require.False(t, placed(other))
		})
		t.Run("a repeat gives the same answer", func(t *testing.T) {
			c, next := newClaim(node, names, ttl, newInbox(), signature{}), newClaim(node, names, ttl, newInbox(), signature{})
			handOver(t, c, next)
			require.Equal(t, "held", try(t, c).status)
			require.Equal(t, "held", try(t, c).status)
			first, again := try(t, next), try(t, next)
			require.Equal(t, "taken", again.status)
			require.Equal(t, first.rank, again.rank)
			require.NoError(t, c.release(ctx))
			require.NoError(t, c.release(ctx))
			require.Equal(t, "ended", try(t, c).status)
		})
	})
}

// A lock that was given to a ticket is not taken for one that was given to another, and
// is not missed because of a message that only tells a time.
func TestGrantIsForOneTicket(t *testing.T) {
	rig.OnEach(t, func(t *testing.T, s *rig.Server) {
		client := s.Client()
		node, err := nodeOf(client, "k")
		require.NoError(t, err)
		home, err := node.home(context.Background())
		require.NoError(t, err)
		l := subscribers.join(home)
		defer l.leave()
		rig.Eventually(t, "subscription", func() bool { return subscribers.live(home) })
		first := newClaim(node, namesOf("k"), time.Minute, l.inbox(), signature{})
		second := newClaim(node, namesOf("k"), time.Minute, l.inbox(), signature{})

		l.expect(first.ticket)
		l.inherit(&heir{ticket: first.ticket, grant: &grant{ticket: first.ticket}})
		l.expect(second.ticket)
		l.inherit(&heir{ticket: first.ticket, grant: &grant{ticket: first.ticket}})
		select {
		case n := <-l.heard:
			require.Nil(t, n.grant)
		default:
		}

		l.inherit(&heir{ticket: second.ticket, grant: &grant{ticket: second.ticket}})
		l.sub.dispatch(inboxChannel(l.inbox()), second.ticket+" 4000")
		require.NotNil(t, (<-l.heard).grant)
	})
}
