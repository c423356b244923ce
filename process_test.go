//go:build unix

package dmutex_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// startWorker starts a process that waits for the lock and holds it for a while. What
// it prints comes out of the channel.
func startWorker(t *testing.T, addr string, ttl, hold time.Duration, writes string) (*exec.Cmd, <-chan string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), workerEnv+fmt.Sprintf("=%s %v %v %s", addr, ttl, hold, writes))
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	lines := make(chan string, 10)
	go func() {
		for scanner := bufio.NewScanner(stdout); scanner.Scan(); {
			lines <- scanner.Text()
		}
	}()
	return cmd, lines
}

func TestWaitingProcessDies(t *testing.T) {
	const grace = time.Second
	t.Run("killed", func(t *testing.T) {
		rig.OnEach(t, func(t *testing.T, s *rig.Server) {
			ctx := timeout(t)
			client := s.Client()
			holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
			first, _ := startWorker(t, s.Addr, long, 0, "")
			awaitQueue(t, client, "k", 1)
			gotten := lock(ctx, next)
			awaitQueue(t, client, "k", 2)
			require.NoError(t, first.Process.Kill())
			_ = first.Wait()
			rig.Eventually(t, "the server sees it", func() bool {
				return len(client.PubSubChannels(ctx, "dmutex-inbox:*").Val()) == 1
			})
			start := time.Now()
			require.NoError(t, holder.Unlock(ctx))
			require.NoError(t, receive(t, gotten))
			require.Less(t, time.Since(start), grace)
			require.NoError(t, next.Unlock(ctx))
		})
	})
	t.Run("stopped", func(t *testing.T) {
		rig.OnEach(t, func(t *testing.T, s *rig.Server) {
			ctx := timeout(t)
			client := s.Client()
			holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
			first, said := startWorker(t, s.Addr, long, 0, "")
			awaitQueue(t, client, "k", 1)
			gotten := lock(ctx, next)
			awaitQueue(t, client, "k", 2)
			require.NoError(t, first.Process.Signal(syscall.SIGSTOP))
			start := time.Now()
			require.NoError(t, holder.Unlock(ctx))
			require.NoError(t, receive(t, gotten))
			require.Less(t, time.Since(start), 2*grace)
			require.NoError(t, first.Process.Signal(syscall.SIGCONT))
			require.NoError(t, next.Unlock(ctx))
			require.Equal(t, "held", receive(t, said), "it is alive after all")
		})
	})
}

// A process that was stopped until its ttl was over has lost the lock, and is told so;
// whoever holds it then keeps it.
func TestHoldersProcessIsStoppedForTooLong(t *testing.T) {
	s := rig.Redis(t)
	ctx := timeout(t)
	client := s.Client()
	holder, said := startWorker(t, s.Addr, 2*time.Second, 1500*time.Millisecond, "")
	require.Equal(t, "held", receive(t, said))
	told := watch(ctx, dmutex.New("k", long, client))
	next := dmutex.New("k", long, client)
	gotten := lock(ctx, next)
	require.NoError(t, holder.Process.Signal(syscall.SIGSTOP))
	require.NoError(t, receive(t, gotten))
	require.Equal(t, expired(), receive(t, told))
	require.NoError(t, holder.Process.Signal(syscall.SIGCONT))
	require.Equal(t, "lost", receive(t, said))
	left, err := next.LockedUntil(ctx)
	require.NoError(t, err)
	require.Positive(t, left)
	require.NoError(t, next.Unlock(ctx))
}

// The classic: a holder is stopped past its ttl, the next one writes, and then the first
// one does, which does not know.
func TestStoppedHolderWritesLate(t *testing.T) {
	for how, want := range map[string]struct{ late, value string }{
		"guarded": {"refused", "second"},
		"bare":    {"written", "first"},
	} {
		t.Run(how, func(t *testing.T) {
			s := rig.Redis(t)
			ctx := timeout(t)
			client := s.Client()
			holder, said := startWorker(t, s.Addr, 2*time.Second, 1500*time.Millisecond, how)
			require.Equal(t, "held", receive(t, said))
			require.NoError(t, holder.Process.Signal(syscall.SIGSTOP))
			next := dmutex.New("k", long, client, dmutex.WithFencing())
			require.NoError(t, next.Lock(ctx))
			require.Equal(t, "written", write(client, how == "guarded", next.Token(), "second"))
			require.NoError(t, holder.Process.Signal(syscall.SIGCONT))
			require.Equal(t, want.late, receive(t, said))
			require.Equal(t, "lost", receive(t, said))
			require.Equal(t, want.value, client.HGet(ctx, "data", "value").Val())
			require.NoError(t, next.Unlock(ctx))
		})
	}
}

// Whoever wakes after its hold is over finds its ctx ended, however quickly it looks.
func TestStoppedProcessFindsItsCtxEnded(t *testing.T) {
	s := rig.Redis(t)
	for _, stopped := range []bool{false, true} {
		holder, said := startWorker(t, s.Addr, 2*time.Second, 2500*time.Millisecond, "in Do")
		require.Equal(t, "held", receive(t, said))
		if stopped {
			require.NoError(t, holder.Process.Signal(syscall.SIGSTOP))
			time.Sleep(3 * time.Second)
			require.NoError(t, holder.Process.Signal(syscall.SIGCONT))
		}
		require.Equal(t, fmt.Sprint("ctx: ", stopped, " ", stopped), receive(t, said))
	}
}
