// Command jobworkers shows dmutex at its main job: several processes want to change
// one thing that only one may change at a time, and one of them dies in the middle.
//
// It starts itself several times more. The workers read, change and write one ledger
// file, which has no locking of its own; only dmutex stands between them. One is
// killed while it holds the lock. A bystander waits for whoever holds it, and says
// how that ended. What happens is shown as it happens: each worker is a column,
// blank while it rests, "·" while it waits, "█" while it holds and "✗" when it is
// dead. The end is a verdict, and an exit status other than 0 if it is a bad one.
//
// With -nolock everything is the same but for the lock.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-redis/redis/v8"
)

const (
	workers = 5
	ttl     = 2 * time.Second

	// The victim is killed so long after it has begun to do nothing but hold.
	killAfter = 300 * time.Millisecond

	// Workers that do not stop by themselves are killed so long after they should.
	patience = 10 * time.Second
)

func main() {
	if encoded := os.Getenv(roleVariable); encoded != "" {
		play(encoded)
		return
	}
	address := flag.String("redis", "", "`host:port` of a Redis server; by default one inside this program")
	noLock := flag.Bool("nolock", false, "leave the lock out, to see what it is for")
	length := flag.Duration("for", 8*time.Second, "how long the workers start new jobs")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := demo(ctx, *address, *noLock, *length)
	if err != nil {
		fmt.Fprintln(os.Stderr, "jobworkers:", err)
		stop()
		os.Exit(1)
	}
}

// demo runs the show. The error is why it could not, or a bad verdict.
func demo(ctx context.Context, address string, noLock bool, length time.Duration) (err error) {
	if address == "" {
		server, err := miniredis.Run()
		if err != nil {
			return err
		}
		defer server.Close()
		defer runClock(server)()
		address = server.Addr()
	}
	client := redis.NewClient(&redis.Options{Addr: address})
	err = client.Ping(ctx).Err()
	_ = client.Close()
	if err != nil {
		return fmt.Errorf("no Redis at %s: %w", address, err)
	}

	folder, err := os.MkdirTemp("", "jobworkers-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	cast := role{
		Redis:  address,
		Key:    filepath.Base(folder),
		Ledger: filepath.Join(folder, "ledger"),
		NoLock: noLock,
	}
	if err := os.WriteFile(cast.Ledger, nil, 0o600); err != nil {
		return err
	}

	h := newHistory(os.Stdout, noLock)
	if err := perform(ctx, cast, length, h); err != nil {
		return err
	}
	ledger, err := os.ReadFile(cast.Ledger)
	if err != nil {
		return err
	}
	return h.verdict(string(ledger))
}

// perform starts the processes, has one killed, stops the others when their time is
// over, and returns when all are gone.
func perform(ctx context.Context, cast role, length time.Duration, h *history) error {
	ctx, cancel := context.WithTimeoutCause(ctx, length+patience, errors.New("the workers did not stop"))
	defer cancel()

	// All processes write to one pipe, a line at a time and the end of a hold before
	// the release, so its order is the order in which things happened.
	news, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = news.Close() }()

	var processes []*process
	for who := 1; who <= workers+1; who++ {
		part := cast
		part.Who = who
		part.Bystander = who > workers
		if who == workers/2+1 {
			part.HangAfter = length / 3
		}
		if part.Bystander && cast.NoLock {
			break // nothing to wait for
		}
		p, err := start(ctx, part, out)
		if err != nil {
			cancel()
			for _, p := range processes {
				_ = p.Wait()
			}
			_ = out.Close()
			return err
		}
		processes = append(processes, p)
	}

	go func() {
		select {
		case <-time.After(length):
		case <-ctx.Done(): // all were killed
		}
		for _, p := range processes {
			_, _ = io.WriteString(p.orders, stopOrder)
		}
		for _, p := range processes {
			_ = p.Wait()
		}
		_ = out.Close()
	}()
	for lines := json.NewDecoder(news); ; {
		var e event
		if err := lines.Decode(&e); err == io.EOF {
			return context.Cause(ctx)
		} else if err != nil {
			return err
		}
		if e.What == hanging {
			time.AfterFunc(killAfter, func() {
				_ = processes[e.Who-1].Process.Kill() // SIGKILL: no chance to clean up
				tell(out, event{Who: e.Who, What: killed})
			})
		}
		h.add(e)
	}
}

// process is a worker or the bystander.
type process struct {
	*exec.Cmd
	orders io.WriteCloser // its end without an order tells that we are gone
}

func start(ctx context.Context, part role, out *os.File) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	encoded, err := json.Marshal(part)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), roleVariable+"="+string(encoded))
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	orders, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	return &process{cmd, orders}, cmd.Start()
}

// runClock moves the server's clock with the wall clock: miniredis lets no ttl pass
// by itself. It returns what stops it.
func runClock(server *miniredis.Miniredis) (stop func()) {
	tick := time.NewTicker(5 * time.Millisecond)
	done, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		defer tick.Stop()
		for last := time.Now(); ; {
			select {
			case <-done:
				return
			case <-tick.C:
				now := time.Now()
				server.FastForward(now.Sub(last))
				last = now
			}
		}
	}()
	return func() { close(done); <-stopped }
}
