// Bench compares dmutex with other mutexes on Redis, one task at a time, each peer in
// turn, round by round, on a redis-server of its own. It needs Linux and redis-server.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	doTask()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// ttl of all locks. None is meant to run out.
const ttl = 10 * time.Second

// slice is how long one peer is measured without contention before it is another's turn:
// a machine that others use has good and bad moments.
const slice = 300 * time.Millisecond

// bench is one run of this program.
type bench struct {
	rounds   int
	time     time.Duration
	peers    []peer
	cases    []measured
	progress io.Writer

	server           *server
	pinned           *server     // on one core
	etcd, pinnedEtcd *etcdServer // nil if not needed
	version          string      // of redis-server
}

// measured is one case of a scenario, and what each peer's rounds found.
type measured struct {
	scenario scenario
	size     int
	found    map[string][]figures // by peer
}

// scenario is a way in which the lock is used, by so many, for a share of the time.
type scenario struct {
	name  string
	sizes []int
	quick []int
	share float64
}

var scenarios = []scenario{
	{"uncontended", []int{1}, []int{1}, 0.9},
	{"many keys", []int{64}, []int{64}, 0.7},
	{"one process", []int{16}, []int{16}, 1},
	{"processes", []int{2, 8, 32, 128}, []int{2, 4}, 1},
	{"idle", []int{1000}, []int{100}, 4.5}, // a waiter of dmutex looks at Redis every four to five seconds
	{"flat", []int{1, 2, 10, 32, 100, 320, 1000}, []int{1, 10}, 0.5},
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	b := bench{progress: stderr}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&b.rounds, "rounds", 5, "how often each peer is measured")
	flags.DurationVar(&b.time, "time", time.Second, "how long one measurement takes; shorter or longer in some scenarios")
	names := flags.String("peers", "", "which peers, separated by commas; all but none if not given")
	which := flags.String("scenarios", "", "which scenarios, separated by commas; all if not given")
	quick := flags.Bool("quick", false, "a short run, to see that it works; its figures are worth nothing")
	out := flags.String("out", "", "directory for results.md, summary.md and the plots")
	page := flags.String("page", "", "page that has the summary between two marks, to be replaced")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q for?", flags.Args())
	}
	if *quick {
		b.rounds, b.time = 1, 200*time.Millisecond
	}
	if b.rounds < 1 || b.time <= 0 {
		return errors.New("-rounds and -time must be positive")
	}
	if err := b.choose(*names, *which, *quick); err != nil {
		return err
	}

	began := time.Now()
	err := b.measure(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(stderr, "done in %v\n", time.Since(began).Round(time.Second))
	b.writeReport(stdout)
	if *out != "" {
		err = b.writeFiles(*out, args, began)
	}
	if *page != "" {
		err = errors.Join(err, b.writeInto(*page))
	}
	return err
}

// choose sets the peers and the cases by their names.
func (b *bench) choose(names, which string, quick bool) error {
	b.peers = slices.DeleteFunc(slices.Clone(peers), func(p peer) bool { return p.name == "none" })
	if names != "" {
		b.peers = nil
		for name := range strings.SplitSeq(names, ",") {
			p, err := peerNamed(name)
			if err != nil {
				return err
			}
			b.peers = append(b.peers, p)
		}
	}
	chosen := scenarios
	if which != "" {
		chosen = nil
		for name := range strings.SplitSeq(which, ",") {
			i := slices.IndexFunc(scenarios, func(s scenario) bool { return s.name == name })
			if i < 0 {
				return fmt.Errorf("no scenario is named %q", name)
			}
			chosen = append(chosen, scenarios[i])
		}
	}
	for _, s := range chosen {
		sizes := s.sizes
		if quick {
			sizes = s.quick
		}
		for _, size := range sizes {
			b.cases = append(b.cases, measured{s, size, map[string][]figures{}})
		}
	}
	return nil
}

// measure does it all, round by round. The servers end with it.
func (b *bench) measure(ctx context.Context) (err error) {
	if b.server, err = startServer(ctx, (*exec.Cmd).Start); err != nil {
		return err
	}
	defer b.server.stop()
	b.version = info(ctx, b.server.monitor, "redis_version")
	if b.pinned, err = startServer(ctx, onOneCore); err != nil {
		return err
	}
	defer b.pinned.stop()
	if slices.ContainsFunc(b.peers, func(p peer) bool { return p.name == "etcd" }) {
		if b.etcd, err = startEtcd(ctx, (*exec.Cmd).Start); err != nil {
			return err
		}
		defer b.etcd.stop()
		if b.pinnedEtcd, err = startEtcd(ctx, onOneCore); err != nil {
			return err
		}
		defer b.pinnedEtcd.stop()
	}
	for round := range b.rounds {
		for _, c := range b.cases {
			began := time.Now()
			order := rotated(b.in(c.scenario), round)
			err := b.round(ctx, c, order)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(b.progress, "round %d of %d: %s %d: %.1f s\n", round+1, b.rounds, c.scenario.name, c.size, time.Since(began).Seconds())
		}
	}
	return nil
}

// in returns the peers that take part in a scenario.
func (b *bench) in(s scenario) []peer {
	return slices.DeleteFunc(slices.Clone(b.peers), func(p peer) bool {
		return p.only != nil && !slices.Contains(p.only, s.name)
	})
}

// rotated returns the list with its first n moved to the end.
func rotated[T any](list []T, n int) []T {
	n %= max(1, len(list))
	return append(slices.Clone(list[n:]), list[:n]...)
}

// round measures each peer once in a case.
func (b *bench) round(ctx context.Context, c measured, order []peer) error {
	if c.scenario.name == "uncontended" {
		return b.roundInSlices(ctx, c, order)
	}
	for _, p := range order {
		if err := b.server.monitor.FlushAll(ctx).Err(); err != nil {
			return err
		}
		t := b.task(c, p, b.server.addr)
		if p.name == "etcd" {
			t.Setting.Addr = b.etcd.addr
		}
		measure := b.once
		if c.scenario.name == "processes" {
			measure = b.together
		}
		f, err := measure(ctx, t)
		if err != nil {
			return fmt.Errorf("%s, %s, %d: %w", p.name, c.scenario.name, c.size, err)
		}
		c.found[p.name] = append(c.found[p.name], f)
	}
	return nil
}

func (b *bench) task(c measured, p peer, addr string) task {
	t := task{
		Scenario: c.scenario.name,
		Peer:     p.name,
		Size:     c.size,
		Time:     time.Duration(float64(b.time) * c.scenario.share),
		Setting:  setting{Addr: addr, TTL: ttl, Patience: time.Second},
	}
	switch t.Scenario {
	case "uncontended":
		t.Setting.Patience = 0 // which would cost something itself
	case "idle":
		t.Setting.Patience = 0 // there is nothing to be woken by
		t.Setting.TTL = time.Minute + 2*t.Time
	}
	return t
}

// once is one process that does a task.
func (b *bench) once(ctx context.Context, t task) (figures, error) {
	c, err := startChild(ctx, t, nil, (*exec.Cmd).Start)
	if err != nil {
		return nil, err
	}
	f, err := c.answer(0)
	if err == nil {
		err = c.begin()
	}
	if err == nil {
		f, err = c.answer(t.Time)
	}
	if failed := c.end(); failed != nil && !errors.Is(err, errSilent) {
		return nil, failed
	}
	return f, err
}

// together is several processes that want one lock.
func (b *bench) together(ctx context.Context, t task) (_ figures, err error) {
	page, file, err := newPage()
	if err != nil {
		return nil, err
	}
	defer page.unmap()
	defer file.Close()

	var children []*child
	defer func() {
		for _, c := range children {
			_ = c.stdin.Close() // all at once
		}
		for _, c := range children {
			err = cmp.Or(err, c.end())
		}
	}()
	for t.Index = range t.Size {
		c, err := startChild(ctx, t, file, (*exec.Cmd).Start)
		if err != nil {
			return nil, err
		}
		children = append(children, c)
	}
	for _, c := range children {
		if _, err := c.answer(0); err != nil {
			return nil, err
		}
	}
	for _, c := range children {
		if err := c.begin(); err != nil {
			return nil, err
		}
	}
	ctx, cancel := t.bounded(ctx)
	defer cancel()
	return page.awaitAndMeasure(ctx, t.Size, t.Time)
}

// roundInSlices measures each peer for short times in turn, client and server on one
// core: with two, it depends on chance whether both are on the same.
func (b *bench) roundInSlices(ctx context.Context, c measured, order []peer) (err error) {
	children, servers, sums := map[string]*child{}, map[string]int{}, map[string]figures{}
	defer func() {
		for _, c := range children {
			err = cmp.Or(err, c.end())
		}
	}()
	start := func(p peer) error {
		t, server := b.task(c, p, b.pinned.addr), b.pinned.cmd
		if p.name == "etcd" {
			t.Setting.Addr, server = b.pinnedEtcd.addr, b.pinnedEtcd.cmd
		}
		t.Time = min(t.Time, slice)
		c, err := startChild(ctx, t, nil, onOneCore)
		if err != nil {
			return err
		}
		children[p.name], servers[p.name] = c, server.Process.Pid
		_, err = c.answer(0)
		return err
	}
	for _, p := range order {
		if err := start(p); err != nil {
			return err
		}
		sums[p.name] = figures{}
	}
	for n := range max(1, int(b.time/slice)) {
		for _, p := range rotated(order, n) {
			// What one leaves to expire, like dmutex, is not to cost another.
			if err := b.pinned.monitor.FlushAll(ctx).Err(); err != nil {
				return err
			}
			before := cpuOf(servers[p.name])
			if err := children[p.name].begin(); err != nil {
				return err
			}
			f, err := children[p.name].answer(slice)
			if errors.Is(err, errSilent) && ctx.Err() == nil {
				// rueidislock can wait for ever for a lock that is free, and without a
				// ctx that ends there is no help. The slice is lost.
				_ = children[p.name].end()
				delete(children, p.name)
				if err := start(p); err != nil {
					return err
				}
				sums[p.name]["gave up"]++
				continue
			}
			if err != nil {
				return err
			}
			f["server CPU"] = float64(cpuOf(servers[p.name]) - before)
			for name, value := range f {
				sums[p.name][name] += value
			}
		}
	}
	for _, p := range order {
		f := figures{"gave up": sums[p.name]["gave up"]}
		for _, name := range []string{"time", "allocations", "bytes", "requests", "client CPU", "server CPU"} {
			f[name] = sums[p.name][name] / sums[p.name]["pairs"]
		}
		c.found[p.name] = append(c.found[p.name], f)
	}
	return nil
}
