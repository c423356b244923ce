//go:build unix

package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// In the processes that the tests start, this binary is the command.
const asCommand = "JOBWORKERS_TEST"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// A show is the command on its way, in a folder for temporary files of its own.
type show struct {
	*exec.Cmd
	folder string

	mu  sync.Mutex // guards out
	out bytes.Buffer
}

func (s *show) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.Write(p)
}

func (s *show) said() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.String()
}

func begin(t *testing.T, args ...string) *show {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	s := &show{Cmd: exec.CommandContext(ctx, self, args...), folder: t.TempDir()}
	s.Env = append(os.Environ(), asCommand+"=1", "TMPDIR="+s.folder)
	s.Stdout, s.Stderr = s, s
	s.WaitDelay = 10 * time.Second // for output, which its workers hold open
	require.NoError(t, s.Start())
	return s
}

// requireNothingLeft waits until all processes of the show are gone, as far as there
// is a /proc to tell, and its files.
func (s *show) requireNothingLeft(t *testing.T) {
	t.Helper()
	rig.Eventually(t, "all files are gone", func() bool {
		files, _ := filepath.Glob(filepath.Join(s.folder, "*"))
		return len(files) == 0
	})
	rig.Eventually(t, "all processes are gone", func() bool {
		environments, _ := filepath.Glob("/proc/[0-9]*/environ")
		return !slices.ContainsFunc(environments, func(path string) bool {
			environment, _ := os.ReadFile(path)
			return bytes.Contains(environment, []byte("TMPDIR="+s.folder+"\x00"))
		})
	})
}

func TestGoodVerdict(t *testing.T) {
	t.Parallel()
	args := map[string]func(t *testing.T) []string{
		"inside":     func(*testing.T) []string { return nil },
		"RealServer": func(t *testing.T) []string { return []string{"-redis", rig.Redis(t).Addr} },
	}
	for name, args := range args {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := begin(t, append(args(t), "-for", "6s")...)
			require.NoError(t, s.Wait(), s.said())
			for _, want := range []string{
				`ledger +\d+ entries written, 0 lost, 0 out of order\n`,
				`exclusion +\d+ holds, 0 overlaps\n`,
				`hand-over +\d+ times`,
				`the dead +3 was killed while it held; the next got the lock 1\.[67]\d*s later`,
				`bystander +saw holds end: \d+ by release, 1 by expiry\n`,
				`verdict +good\n$`,
			} {
				require.Regexp(t, regexp.MustCompile(want), s.said())
			}
			s.requireNothingLeft(t)
		})
	}
}

func TestBadVerdictWithoutTheLock(t *testing.T) {
	t.Parallel()
	s := begin(t, "-nolock", "-for", "2s")
	require.Error(t, s.Wait())
	require.Equal(t, 1, s.ProcessState.ExitCode())
	require.Regexp(t, `verdict +BAD: entries were lost;.* holds overlapped\n`, s.said())
	s.requireNothingLeft(t)
}

func TestInterruptedOrKilled(t *testing.T) {
	t.Parallel()
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			s := begin(t)
			rig.Eventually(t, "the workers work", func() bool { return strings.Contains(s.said(), "let go") })
			require.NoError(t, s.Process.Signal(signal))
			require.Error(t, s.Wait())
			require.NotContains(t, s.said(), "verdict")
			s.requireNothingLeft(t)
		})
	}
}

func TestNoServer(t *testing.T) {
	t.Parallel()
	s := begin(t, "-redis", "127.0.0.1:1")
	require.Error(t, s.Wait())
	require.Contains(t, s.said(), "no Redis at 127.0.0.1:1: ")
	s.requireNothingLeft(t)
}

func TestJudgement(t *testing.T) {
	at := time.Now()
	next := func(after time.Duration) time.Time { at = at.Add(after); return at }
	good := []event{
		{Who: 1, What: waiting, At: next(0)},
		{Who: 1, What: holding, At: next(0)},
		{Who: 2, What: waiting, At: next(0)},
		{Who: 1, What: leaving, Job: 1, At: next(time.Millisecond)},
		{Who: 2, What: holding, At: next(time.Millisecond)},
		{Who: 2, What: hanging, At: next(0)},
		{Who: 2, What: killed, At: next(killAfter)},
		{Who: 6, What: expired, At: next(ttl - killAfter)},
		{Who: 1, What: holding, At: next(time.Millisecond)},
		{Who: 1, What: leaving, Job: 2, At: next(time.Millisecond)},
	}
	ledger := "1 worker-1-job-1\n2 worker-1-job-2\n"
	judge := func(ledger string, events ...event) (string, error) {
		var out bytes.Buffer
		h := newHistory(&out, false)
		for _, e := range events {
			h.add(e)
		}
		err := h.verdict(ledger)
		return out.String(), err
	}
	without := func(what string, from int) []event {
		events := append([]event(nil), good[:from]...)
		for _, e := range good[from:] {
			if e.What != what {
				events = append(events, e)
			}
		}
		return events
	}

	said, err := judge(ledger, good...)
	require.NoError(t, err, said)

	early := append([]event(nil), good...)
	early[8].At = early[8].At.Add(-time.Second)
	for want, bad := range map[string]struct {
		ledger string
		events []event
	}{
		"entries were lost":                      {"1 worker-1-job-2\n", good},
		"the ledger is out of order":             {"1 worker-1-job-1\n1 worker-1-job-2\n", good},
		"holds overlapped":                       {ledger, without(leaving, 0)},
		"nothing was written":                    {"", without(leaving, 0)},
		"was not taken over":                     {ledger, good[:8]},
		"taken before its ttl was over":          {ledger, early},
		"was not told just once of an expiry":    {ledger, without(expired, 0)},
		"told of an expiry before there was one": {ledger, append([]event{{Who: 6, What: expired}}, good...)},
		"process 4: no luck":                     {ledger, append(good, event{Who: 4, What: failed, Text: "no luck"})},
		"nothing was handed over":                {ledger, good[:1]},
	} {
		said, err := judge(bad.ledger, bad.events...)
		require.Error(t, err, want)
		require.Contains(t, said, want)
	}
}
