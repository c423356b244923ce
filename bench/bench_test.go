package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The processes that do the tasks are this one, run again.
func TestMain(m *testing.M) {
	doTask()
	os.Exit(m.Run())
}

// needRedis skips a test where there is no redis-server, or fails it if DMUTEX_REAL is
// set, as in the tests of dmutex itself.
func needRedis(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("DMUTEX_REAL") != "" {
			t.Fatal(err)
		}
		t.Skip("left out: there is no redis-server on this machine")
	}
}

// noneLeft fails the test if a process that this one started is still there.
func noneLeft(t *testing.T) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has just ended
		}
		// "pid (name) state parent …", and the name may have anything in it
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if fields[1] == strconv.Itoa(os.Getpid()) {
			t.Errorf("left behind: %s", stat)
		}
	}
}

func TestLockThatExcludesNobodyIsFoundOut(t *testing.T) {
	needRedis(t)
	for _, s := range scenarios {
		switch s.name {
		case "uncontended", "many keys":
			continue // nobody to exclude
		}
		t.Run(s.name, func(t *testing.T) {
			err := run(context.Background(), []string{"-quick", "-peers", "none", "-scenarios", s.name},
				t.Output(), t.Output())
			if !errors.Is(err, errOverlap) {
				t.Errorf("the error is: %v", err)
			}
			noneLeft(t)
		})
	}
}

func TestQuickRunMakesAllFiles(t *testing.T) {
	needRedis(t)
	dir := filepath.Join(t.TempDir(), "made")
	page := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(page, []byte("before\n<!-- summary -->\nold\n<!-- end of summary -->\nafter\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(context.Background(), []string{"-quick", "-out", dir, "-page", page}, t.Output(), t.Output()); err != nil {
		t.Fatal(err)
	}
	summary, _ := os.ReadFile(filepath.Join(dir, "summary.md"))
	shown, _ := os.ReadFile(page)
	if want := "before\n<!-- summary -->\n\n" + string(summary) + "\n<!-- end of summary -->\nafter\n"; string(shown) != want {
		t.Errorf("the page is: %s", shown)
	}
	for file, want := range map[string]string{
		"results.md":   "## Processes",
		"summary.md":   "| dmutex |",
		"handover.svg": "dmutex",
		"waits.svg":    "dmutex",
		"requests.svg": "dmutex",
	} {
		content, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Error(err)
		} else if !bytes.Contains(content, []byte(want)) {
			t.Errorf("%s does not have %q in it", file, want)
		}
	}
	noneLeft(t)
}

func TestInterruptedRunLeavesNothingBehind(t *testing.T) {
	needRedis(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	err := run(ctx, []string{"-time", "1h", "-peers", "dmutex,redislock", "-scenarios", "processes"}, t.Output(), t.Output())
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the error is: %v", err)
	}
	noneLeft(t)
}

func TestWhatIsNotKnownIsRefused(t *testing.T) {
	for _, args := range [][]string{
		{"-peers", "nobody"},
		{"-scenarios", "nothing"},
		{"-rounds", "0"},
		{"-time", "-1s"},
		{"more"},
	} {
		if err := run(context.Background(), args, t.Output(), t.Output()); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
}
