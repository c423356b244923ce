package main

import (
	"bufio"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	goredis "github.com/go-redis/redis/v8"
	"golang.org/x/sync/errgroup"
)

// Each measurement runs in a process of its own, so that no peer suffers from what
// another left behind. It tells that it is ready, does its work for each line that it
// reads, tells what it found, and ends when there are no more lines.

// task is what such a process has to do.
type task struct {
	Scenario string
	Peer     string
	Size     int
	Index    int // of this contender, if each has a process
	Time     time.Duration
	Dir      string // of the etcd server
	Setting  setting
}

// bounded returns a ctx with a deadline that no task reaches. With none, redislock would
// bound each wait by the ttl.
func (t *task) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, t.Time+5*time.Minute)
}

// taskVariable is the environment variable that makes a process of this program do a task.
const taskVariable = "DMUTEX_BENCH_TASK"

// overlapStatus is the exit status of a process that found that it was not alone.
const overlapStatus = 3

// doTask does the task in the environment and ends the process, if there is one.
func doTask() {
	text := os.Getenv(taskVariable)
	if text == "" {
		return
	}
	err := do(text)
	switch {
	case err == nil:
		os.Exit(0)
	case errors.Is(err, errOverlap):
		os.Exit(overlapStatus) // the parent says so
	}
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}

func do(text string) error {
	var t task
	if err := json.Unmarshal([]byte(text), &t); err != nil {
		return err
	}
	p, err := peerNamed(t.Peer)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	w := &worker{task: t, peer: p, page: &page{}, lines: make(chan string), out: gob.NewEncoder(os.Stdout)}
	go func() {
		for scanner := bufio.NewScanner(os.Stdin); scanner.Scan(); {
			w.lines <- scanner.Text()
		}
		cancel() // the parent is done with us, or is no more
		close(w.lines)
	}()
	switch t.Scenario {
	case "uncontended":
		return w.uncontended()
	case "many keys":
		return w.manyKeys(ctx)
	case "one process":
		return w.oneProcess(ctx)
	case "processes":
		return w.oneOfMany(ctx)
	case "idle":
		return w.idle(ctx)
	case "flat":
		return w.flat(ctx)
	case "etcd":
		return w.serveEtcd()
	default:
		return fmt.Errorf("no scenario is named %q", t.Scenario)
	}
}

// worker does one task.
type worker struct {
	task
	peer
	page  *page
	lines chan string
	out   *gob.Encoder
}

// key is the one that all want.
const key = "bench"

// open opens a client that counts its requests as those of one contender.
func (w *worker) open(index int) (client, error) {
	s := w.Setting
	s.requests = &w.page.contenders[index].requests
	return w.peer.open(s)
}

// onGo tells that it is ready, and has work done for each line.
func (w *worker) onGo(work func() (figures, error)) error {
	if err := w.out.Encode(figures{}); err != nil {
		return err
	}
	for range w.lines {
		f, err := work()
		if err != nil {
			return err
		}
		if err := w.out.Encode(f); err != nil {
			return err
		}
	}
	return nil
}

// uncontended is one goroutine that locks and unlocks, and what that costs.
func (w *worker) uncontended() error {
	c, err := w.open(0)
	if err != nil {
		return err
	}
	defer c.close()
	ctx, m, requests := context.Background(), c.mutex(key), &w.page.contenders[0].requests
	pair := func() error {
		if err := m.lock(ctx); err != nil {
			return err
		}
		return m.unlock()
	}
	for range 100 {
		if err := pair(); err != nil {
			return err
		}
	}
	return w.onGo(func() (figures, error) {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		sent, cpu, began := requests.Load(), cpuOf(os.Getpid()), time.Now()
		pairs := 0
		for ; time.Since(began) < w.Time; pairs++ {
			if err := pair(); err != nil {
				return nil, err
			}
		}
		took, cpu, sent := time.Since(began), cpuOf(os.Getpid())-cpu, requests.Load()-sent
		runtime.ReadMemStats(&after)
		return figures{
			"pairs":       float64(pairs),
			"time":        float64(took),
			"allocations": float64(after.Mallocs - before.Mallocs),
			"bytes":       float64(after.TotalAlloc - before.TotalAlloc),
			"requests":    float64(sent),
			"client CPU":  float64(cpu),
		}, nil
	})
}

// manyKeys is so many goroutines that share a client, each with a key of its own.
func (w *worker) manyKeys(ctx context.Context) error {
	c, err := w.open(0)
	if err != nil {
		return err
	}
	defer c.close()
	return w.onGo(func() (figures, error) {
		ctx, cancel := context.WithCancel(ctx)
		var all sync.WaitGroup
		for i := range w.Size {
			m, own := c.mutex(key+strconv.Itoa(i)), &w.page.contenders[i]
			all.Go(func() {
				for ctx.Err() == nil {
					if err := m.lock(context.Background()); err != nil {
						own.gaveUp.Add(1)
						continue
					}
					if err := m.unlock(); err != nil {
						own.lost.Add(1)
					}
					own.turns.Add(1)
				}
			})
		}
		time.Sleep(warmUp(w.Size))
		f, err := w.page.measure(ctx, w.Size, w.Time)
		cancel()
		all.Wait()
		return f, err
	})
}

// oneProcess is so many goroutines that share a client and want one lock.
func (w *worker) oneProcess(ctx context.Context) error {
	c, err := w.open(0)
	if err != nil {
		return err
	}
	defer c.close()
	return w.onGo(func() (figures, error) {
		return w.contest(ctx, w.Size, func(int) client { return c })
	})
}

// flat is a holder and so many who wait, each with a client of its own.
func (w *worker) flat(ctx context.Context) error {
	clients := make([]client, w.Size+1)
	for i := range clients {
		c, err := w.open(i)
		if err != nil {
			return err
		}
		defer c.close()
		clients[i] = c
	}
	return w.onGo(func() (figures, error) {
		return w.contest(ctx, len(clients), func(i int) client { return clients[i] })
	})
}

// contest has n goroutines contend, and measures it.
func (w *worker) contest(ctx context.Context, n int, clientOf func(int) client) (figures, error) {
	ctx, cancel := w.bounded(ctx)
	defer cancel()
	var all errgroup.Group
	for i := range n {
		m := clientOf(i).mutex(key)
		all.Go(func() error { return w.page.contend(ctx, i, m) })
	}
	f, err := w.page.awaitAndMeasure(ctx, n, w.Time)
	cancel()
	if err := all.Wait(); err != nil {
		return nil, err
	}
	return f, err
}

// oneOfMany is one contender of several, each in a process.
func (w *worker) oneOfMany(ctx context.Context) error {
	p, err := mapPage(os.NewFile(pageFile, "page"))
	if err != nil {
		return err
	}
	w.page = p
	c, err := w.open(w.Index)
	if err != nil {
		return err
	}
	defer c.close()
	m := c.mutex(key)
	return w.onGo(func() (figures, error) {
		ctx, cancel := w.bounded(ctx)
		defer cancel()
		return figures{}, p.contend(ctx, w.Index, m)
	})
}

// idle is a holder that does not let go, and so many goroutines that share a client and
// wait for it all the time.
func (w *worker) idle(ctx context.Context) error {
	monitor := goredis.NewClient(&goredis.Options{Addr: w.Setting.Addr})
	defer monitor.Close()
	server := func(field string) float64 { return infoNumber(ctx, monitor, field) }
	client0, server0, connections0 := ownMemory(), server("used_memory"), server("connected_clients")

	c, err := w.open(0)
	if err != nil {
		return err
	}
	defer c.close()
	holder := c.mutex(key)
	if err := holder.lock(context.Background()); err != nil {
		return err
	}
	defer holder.unlock()
	if err := w.page.enter(-1); err != nil {
		return err
	}
	return w.onGo(func() (figures, error) {
		ctx, cancel := w.bounded(ctx)
		defer cancel()
		var all errgroup.Group
		for i := range w.Size {
			m := c.mutex(key)
			all.Go(func() error { return w.page.contend(ctx, i, m) })
		}
		f, err := w.page.awaitAndMeasure(ctx, w.Size, w.Time)
		if err == nil {
			waiters := float64(w.Size)
			f = figures{
				"rate":        f["rate"],
				"gave up":     f["gave up"],
				"connections": server("connected_clients") - connections0,
				// A few kB that the server's own buffers vary by can make it negative.
				"server memory": max(0, server("used_memory")-server0) / waiters,
				"client memory": (ownMemory() - client0) / waiters,
			}
		}
		cancel()
		if err := all.Wait(); err != nil {
			return nil, err
		}
		return f, err
	})
}

// ownMemory is what this process uses of heap and stacks.
func ownMemory() float64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}

// info is one field of the server's INFO.
func info(ctx context.Context, monitor *goredis.Client, field string) string {
	for line := range strings.Lines(monitor.Info(ctx).Val()) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// infoNumber is one that is a number.
func infoNumber(ctx context.Context, monitor *goredis.Client, field string) float64 {
	n, err := strconv.ParseFloat(info(ctx, monitor, field), 64)
	if err != nil {
		return math.NaN()
	}
	return n
}

// warmUp is how long n contenders are let run before they are measured.
func warmUp(n int) time.Duration {
	return 100*time.Millisecond + time.Duration(n)*time.Millisecond/2
}

// awaitAndMeasure measures n contenders once all of them are at it.
func (p *page) awaitAndMeasure(ctx context.Context, n int, d time.Duration) (figures, error) {
	if err := p.awaitAll(ctx, n); err != nil {
		return nil, err
	}
	if err := p.pause(ctx, warmUp(n)); err != nil {
		return nil, err
	}
	return p.measure(ctx, n, d)
}
