package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-redis/redis/v8"

	"github.com/omniful/go_commons/dmutex"
)

const (
	roleVariable = "JOBWORKERS_ROLE"
	stopOrder    = "stop\n"
)

// role is what one of the processes has to do.
type role struct {
	Who        int
	Bystander  bool
	HangAfter  time.Duration // from when on a job never ends, 0 for never
	Redis, Key string
	Ledger     string
	NoLock     bool
}

// event is something that a process tells.
type event struct {
	Who  int
	What string
	At   time.Time
	Job  int    `json:",omitempty"`
	Text string `json:",omitempty"` // of failed: why
}

// What happens.
const (
	waiting  = "waiting"  // for the lock
	holding  = "holding"  // the lock
	hanging  = "hanging"  // while it holds, so that it can be killed
	leaving  = "leaving"  // has written the entry of its job and releases next
	killed   = "killed"   // by the parent
	released = "released" // the bystander was told so of the holder it saw
	expired  = "expired"  // or so
	failed   = "failed"
)

// tell writes e in one piece.
func tell(out io.Writer, e event) {
	e.At = time.Now()
	_ = json.NewEncoder(out).Encode(e)
}

// play is the main function of the processes that the first one starts.
func play(encoded string) {
	signal.Ignore(os.Interrupt) // the parent's to deal with
	var r role
	if err := json.Unmarshal([]byte(encoded), &r); err != nil {
		fmt.Fprintln(os.Stderr, "jobworkers:", err)
		os.Exit(2)
	}
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		if order, _ := bufio.NewReader(os.Stdin).ReadString('\n'); order != stopOrder {
			_ = os.RemoveAll(filepath.Dir(r.Ledger)) // the parent died and cannot
			os.Exit(1)
		}
		stop()
	}()

	client := redis.NewClient(&redis.Options{Addr: r.Redis})
	m := dmutex.New(r.Key, ttl, client)
	act := r.work
	if r.Bystander {
		act = r.watch
	}
	if err := act(ctx, m); err != nil && ctx.Err() == nil {
		tell(os.Stdout, event{Who: r.Who, What: failed, Text: err.Error()})
		os.Exit(1)
	}
}

// work does jobs, one at a time and only while it holds the lock, until ctx ends.
func (r *role) work(ctx context.Context, m *dmutex.Mutex) error {
	begun := time.Now()
	for job := 1; ctx.Err() == nil; job++ {
		tell(os.Stdout, event{Who: r.Who, What: waiting})
		if !r.NoLock {
			if err := m.Lock(ctx); err != nil {
				return err
			}
		}
		tell(os.Stdout, event{Who: r.Who, What: holding})
		if r.HangAfter > 0 && time.Since(begun) > r.HangAfter {
			tell(os.Stdout, event{Who: r.Who, What: hanging})
			time.Sleep(time.Hour)
		}
		if err := r.write(job); err != nil {
			return err
		}
		tell(os.Stdout, event{Who: r.Who, What: leaving, Job: job})
		if !r.NoLock {
			if err := m.Unlock(ctx); err != nil {
				return err
			}
		}
		time.Sleep(time.Duration(rand.N(150)) * time.Millisecond)
	}
	return nil
}

// write adds a job to the ledger: it reads the file, does something that takes time,
// and writes the file anew. Two at once, and the work of one is lost.
func (r *role) write(job int) error {
	ledger, err := os.ReadFile(r.Ledger)
	if err != nil {
		return err
	}
	time.Sleep(time.Duration(150+rand.N(150)) * time.Millisecond)
	next := strings.Count(string(ledger), "\n") + 1
	ledger = fmt.Appendf(ledger, "%d %s\n", next, jobName(r.Who, job))
	return os.WriteFile(r.Ledger, ledger, 0o600)
}

func jobName(who, job int) string { return fmt.Sprintf("worker-%d-job-%d", who, job) }

// watch tells how holds end, now and then, until ctx ends.
func (r *role) watch(ctx context.Context, m *dmutex.Mutex) error {
	for ctx.Err() == nil {
		left, err := m.LockedUntil(ctx)
		if err != nil {
			return err
		}
		if left > 0 {
			isExpired, err := m.WaitUntilUnlocked(ctx)
			if err != nil {
				return err
			}
			verdict := released
			if isExpired {
				verdict = expired
			}
			tell(os.Stdout, event{Who: r.Who, What: verdict})
		}
		time.Sleep(500 * time.Millisecond)
	}
	return nil
}
