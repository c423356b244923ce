package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// page is what those who want one lock share besides the lock: memory of one process, or
// mapped by several. It finds out whether two of them were in at once, without a clock,
// and keeps what they measure.
type page struct {
	inside  atomic.Int64 // who is between Lock and Unlock; 0 if nobody is
	overlap atomic.Int64 // who was not alone there; 0 if everybody was

	// Written by the holder only.
	last     atomic.Int64 // who held it last
	released atomic.Int64 // when that one called Unlock for the first time since it got it from another

	handedOver atomic.Int64          // how many hand-overs to another contender there were
	handOver   [1 << 18]atomic.Int64 // how long the latest took, in nanoseconds, as a ring
	contenders [maxContenders]contender
}

const maxContenders = 1024

// contender is what one of them counts. All only grow, but for the last two.
type contender struct {
	requests atomic.Int64 // sent to the server
	turns    atomic.Int64 // how often it got the lock
	gaveUp   atomic.Int64 // how often the library gave up waiting
	lost     atomic.Int64 // how often Unlock failed
	since    atomic.Int64 // when it began to wait; 0 if it does not
	longest  atomic.Int64 // wait, in nanoseconds
	_        [2]int64     // to fill a cache line
}

// newPage makes a page in memory that other processes can map, by the file.
func newPage() (*page, *os.File, error) {
	fd, err := unix.MemfdCreate("page", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, fmt.Errorf("making a shared page: %w", err)
	}
	file := os.NewFile(uintptr(fd), "page")
	if err := file.Truncate(int64(unsafe.Sizeof(page{}))); err != nil {
		_ = file.Close()
		return nil, nil, fmt.Errorf("making a shared page: %w", err)
	}
	p, err := mapPage(file)
	if err != nil {
		_ = file.Close()
		return nil, nil, err
	}
	return p, file, nil
}

func mapPage(file *os.File) (*page, error) {
	b, err := unix.Mmap(int(file.Fd()), 0, int(unsafe.Sizeof(page{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping the shared page: %w", err)
	}
	return (*page)(unsafe.Pointer(unsafe.SliceData(b))), nil
}

func (p *page) unmap() {
	_ = unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p)))
}

// now is the monotonic clock, which all processes of a machine share.
func now() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err)
	}
	return t.Nano()
}

var errOverlap = errors.New("two held the lock at once")

// enter is called when the lock was gotten, and leave before it is given back.
func (p *page) enter(who int64) error {
	if !p.inside.CompareAndSwap(0, who) {
		p.overlap.Store(who)
		return errOverlap
	}
	return nil
}

func (p *page) leave(who int64) error {
	if !p.inside.CompareAndSwap(who, 0) {
		p.overlap.Store(who)
		return errOverlap
	}
	return nil
}

// contend takes the lock and gives it back, again and again, until ctx ends or it finds
// that it is not alone.
func (p *page) contend(ctx context.Context, index int, m mutex) error {
	c, me := &p.contenders[index], int64(index+1)
	c.since.Store(now())
	for ctx.Err() == nil {
		if err := m.lock(ctx); err != nil {
			if ctx.Err() == nil {
				c.gaveUp.Add(1)
				time.Sleep(poll)
			}
			continue
		}
		gotten := now()
		if err := p.enter(me); err != nil {
			return err
		}
		last := p.last.Swap(me)
		if last != me && last != 0 {
			n := p.handedOver.Add(1)
			p.handOver[(n-1)%int64(len(p.handOver))].Store(gotten - p.released.Load())
		}
		c.turns.Add(1)
		c.longest.Store(max(c.longest.Load(), gotten-c.since.Swap(0)))
		if last != me {
			p.released.Store(now())
		}
		if err := p.leave(me); err != nil {
			return err
		}
		if err := m.unlock(); err != nil {
			c.lost.Add(1)
		}
		c.since.Store(now())
	}
	return nil
}

// awaitAll returns when the first n have asked for the lock once.
func (p *page) awaitAll(ctx context.Context, n int) error {
	for i := range p.contenders[:n] {
		for c := &p.contenders[i]; c.since.Load() == 0 && c.turns.Load() == 0; {
			if err := p.pause(ctx, time.Millisecond); err != nil {
				return err
			}
		}
	}
	return nil
}

// pause waits for d, unless ctx ends or two have been inside at once.
func (p *page) pause(ctx context.Context, d time.Duration) error {
	for end := time.Now().Add(d); ; {
		left := time.Until(end)
		switch {
		case p.overlap.Load() != 0:
			return errOverlap
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case left <= 0:
			return nil
		}
		time.Sleep(min(left, 10*time.Millisecond))
	}
}

// measure lets some time pass, and returns what the first n did meanwhile.
func (p *page) measure(ctx context.Context, n int, d time.Duration) (figures, error) {
	var before counts
	for i := range p.contenders[:n] {
		p.contenders[i].longest.Store(0)
	}
	began, first := time.Now(), p.handedOver.Load()
	before.read(p, n)
	if err := p.pause(ctx, d); err != nil {
		return nil, err
	}
	var after counts
	after.read(p, n)
	last, seconds, at := p.handedOver.Load(), time.Since(began).Seconds(), now()

	longest := int64(0)
	for i := range p.contenders[:n] {
		c := &p.contenders[i]
		longest = max(longest, c.longest.Load())
		if since := c.since.Load(); since != 0 {
			longest = max(longest, at-since)
		}
	}
	var took []float64
	for i := max(first, last-int64(len(p.handOver))); i < last; i++ {
		took = append(took, float64(p.handOver[i%int64(len(p.handOver))].Load()))
	}
	slices.Sort(took)

	turns, fewest, most := 0.0, after.turns[0]-before.turns[0], int64(0)
	for i := range n {
		own := after.turns[i] - before.turns[i]
		turns += float64(own)
		fewest, most = min(fewest, own), max(most, own)
	}
	handOvers := float64(last - first)
	requests := float64(after.requests - before.requests)
	f := figures{
		"turns":              turns / seconds,
		"rate":               requests / seconds,
		"hand-overs":         handOvers / seconds,
		"hand-overs counted": handOvers,
		"share":              handOvers / turns,
		"per hand-over":      requests / handOvers, // infinite if there was none
		"longest":            float64(longest),
		"fairness":           float64(most) / float64(fewest), // infinite if one had no turn
		"gave up":            float64(after.gaveUp - before.gaveUp),
		"lost":               float64(after.lost - before.lost),
	}
	if len(took) > 0 {
		f["p50"], f["p99"] = percentile(took, 50), percentile(took, 99)
	}
	return f, nil
}

// counts are sums over all contenders at one moment, and the turns of each.
type counts struct {
	requests, gaveUp, lost int64
	turns                  []int64
}

func (s *counts) read(p *page, n int) {
	s.turns = make([]int64, n)
	for i := range n {
		c := &p.contenders[i]
		s.turns[i] = c.turns.Load()
		s.requests += c.requests.Load()
		s.gaveUp += c.gaveUp.Load()
		s.lost += c.lost.Load()
	}
}
