// Package rig is what the tests stand on: real servers, miniredis in real and in
// bubble time, and a proxy that makes a network misbehave.
package rig

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-redis/redis/v8"
)

// RealRequired is the environment variable that, set to anything, makes a test
// that needs a redis-server fail where there is none, instead of being skipped.
const RealRequired = "DMUTEX_REAL"

// patience is a generous bound on anything a server has to do.
const patience = 20 * time.Second

// Server is a Redis to test against.
type Server struct {
	Addr string
	Mini *miniredis.Miniredis // nil if it is a real one

	tb   testing.TB
	args []string
	cmd  *exec.Cmd
}

// OnEach runs body as one subtest on miniredis, whose clock moves with the wall
// clock, and as another on a real redis-server.
func OnEach(t *testing.T, body func(t *testing.T, s *Server)) {
	t.Helper()
	t.Run("miniredis", func(t *testing.T) { body(t, Miniredis(t)) })
	t.Run("redis", func(t *testing.T) { body(t, Redis(t)) })
}

// Miniredis starts a miniredis whose keys expire in real time.
func Miniredis(tb testing.TB) *Server {
	tb.Helper()
	m := miniredis.RunT(tb)
	stop := make(chan struct{})
	var moved sync.WaitGroup
	moved.Go(func() {
		tick := time.NewTicker(time.Millisecond) // so much too early a key may expire
		defer tick.Stop()
		for last := time.Now(); ; {
			select {
			case <-stop:
				return
			case <-tick.C:
				now := time.Now()
				m.FastForward(now.Sub(last))
				last = now
			}
		}
	})
	tb.Cleanup(func() { close(stop); moved.Wait() })
	return &Server{Addr: m.Addr(), Mini: m, tb: tb}
}

// Redis starts a redis-server of its own on a free loopback port, which ends with
// the test. Without one on this machine the test is skipped, or fails if
// RealRequired is set.
func Redis(tb testing.TB, args ...string) *Server {
	tb.Helper()
	return start(tb, append([]string{
		"--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0",
	}, args...))
}

// sentinel starts a sentinel, which keeps its state in its configuration.
func sentinel(tb testing.TB, config string) *Server {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "sentinel.conf")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		tb.Fatal(err)
	}
	return start(tb, []string{"--sentinel"}, path)
}

// start starts a redis-server with arguments, after those that have no dashes.
func start(tb testing.TB, args []string, first ...string) *Server {
	tb.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv(RealRequired) != "" {
			tb.Fatalf("%s is set, but there is no redis-server: %v", RealRequired, err)
		}
		tb.Skip("left out: there is no redis-server on this machine")
	}
	dir := tb.TempDir()
	port := freePort(tb)
	s := &Server{
		Addr: net.JoinHostPort("127.0.0.1", port),
		tb:   tb,
		args: slices.Concat(first, []string{
			"--port", port, "--bind", "127.0.0.1", "--dir", dir, "--logfile", filepath.Join(dir, "log"),
		}, args),
	}
	s.Start()
	tb.Cleanup(s.Kill)
	return s
}

func freePort(tb testing.TB) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// Start starts a real server, again after Kill with the same address.
func (s *Server) Start() {
	s.tb.Helper()
	var stderr bytes.Buffer
	s.cmd = exec.Command("redis-server", s.args...)
	s.cmd.Stderr = &stderr
	if err := s.cmd.Start(); err != nil {
		s.tb.Fatal(err)
	}
	client := redis.NewClient(&redis.Options{Addr: s.Addr, MaxRetries: -1})
	defer client.Close()
	Eventually(s.tb, "redis-server answers", func() bool {
		err := client.Ping(context.Background()).Err()
		var answer redis.Error
		return err == nil || errors.As(err, &answer)
	})
}

// Kill ends a real server with SIGKILL; its data are lost.
func (s *Server) Kill() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
	s.cmd = nil
}

// Signal sends a signal to a real server.
func (s *Server) Signal(signal syscall.Signal) {
	s.tb.Helper()
	if err := s.cmd.Process.Signal(signal); err != nil {
		s.tb.Fatal(err)
	}
}

// Follow makes a real server a replica of another, or a master again if that is nil,
// and returns when it is.
func (s *Server) Follow(master *Server) {
	s.tb.Helper()
	host, port, link := "no", "one", "role:master"
	if master != nil {
		host, port, _ = net.SplitHostPort(master.Addr)
		link = "master_link_status:up"
	}
	client := s.Client()
	if err := client.SlaveOf(context.Background(), host, port).Err(); err != nil {
		s.tb.Fatal(err)
	}
	Eventually(s.tb, link, func() bool {
		return strings.Contains(client.Info(context.Background(), "replication").Val(), link)
	})
}

// AwaitReplicated waits until so many replicas have what was written before. In a
// cluster, the server is the master of key, which has no braces.
func (s *Server) AwaitReplicated(key string, replicas int64) {
	s.tb.Helper()
	ctx := context.Background()
	client := s.Client()
	Eventually(s.tb, "the replicas have it all", func() bool {
		pipe := client.Pipeline() // WAIT counts the writes of its own connection
		pipe.Set(ctx, "{"+key+"}:replicated", "", time.Second)
		have := pipe.Do(ctx, "wait", replicas, 1000)
		_, err := pipe.Exec(ctx)
		return err == nil && have.Val() == replicas
	})
}

// Client returns a client of its own for this server, closed with the test.
func (s *Server) Client(change ...func(*redis.Options)) *redis.Client {
	s.tb.Helper()
	opt := &redis.Options{Addr: s.Addr, PoolSize: 20}
	for _, f := range change {
		f(opt)
	}
	client := redis.NewClient(opt)
	s.tb.Cleanup(func() { _ = client.Close() })
	return client
}

// Eventually waits until a condition holds, and fails the test if it takes so
// long that it never will.
func Eventually(tb testing.TB, what string, condition func() bool) {
	tb.Helper()
	for end := time.Now().Add(patience); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("never came: %s", what)
		}
	}
}
