package dmutex

import (
	"context"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-redis/redis/v8"
	"github.com/stretchr/testify/require"
)

// Two goroutines that share a mutex may come with their grants in the wrong order.
func TestOlderGrantIsNotTakenForTheNewer(t *testing.T) {
	server := miniredis.RunT(t)
	client := redis.NewClient(&redis.Options{Addr: server.Addr()})
	defer client.Close()
	node, err := nodeOf(client, "k")
	require.NoError(t, err)
	grant := func() *hold {
		c := newClaim(node, namesOf("k"), time.Minute, newInbox(), signature{})
		seen, err := c.try(context.Background())
		require.NoError(t, err)
		require.Equal(t, "held", seen.status)
		return newHold(c, 0)
	}
	older := grant()
	server.FastForward(time.Minute)
	newer := grant()

	var h holds
	h.add(newer)
	h.add(older)
	_, err = h.take()
	require.ErrorIs(t, err, ErrLockLost)
	c, err := h.take()
	require.NoError(t, err)
	require.Same(t, newer, c)
	_, err = h.take()
	require.ErrorIs(t, err, ErrNotHeld)

	older.end = time.Now().Add(time.Hour) // it was renewed until it was lost
	h = holds{}
	h.add(older)
	h.add(newer)
	_, err = h.take()
	require.ErrorIs(t, err, ErrLockLost)
	c, err = h.take()
	require.NoError(t, err)
	require.Same(t, newer, c)
}
