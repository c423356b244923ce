package rig

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-redis/redis/v8"
)

const (
	masters  = 3
	allSlots = 16384
)

// Cluster is a Redis Cluster of three masters with a replica each.
type Cluster struct {
	Servers []*Server // at first the masters, and then their replicas

	tb      testing.TB
	clients map[string]*redis.Client // of each server, by address
}

// NewCluster starts a cluster, and ends it with the test.
func NewCluster(tb testing.TB) *Cluster {
	tb.Helper()
	c := &Cluster{tb: tb, clients: map[string]*redis.Client{}}
	for range 2 * masters {
		s := Redis(tb, "--cluster-enabled", "yes", "--cluster-node-timeout", "1000",
			"--cluster-port", freePort(tb), "--cluster-config-file", freePort(tb)+".conf")
		c.Servers = append(c.Servers, s)
		c.clients[s.Addr] = s.Client(func(o *redis.Options) { o.MaxRetries, o.ReadTimeout, o.PoolSize = -1, time.Second, 1 })
	}
	for i, s := range c.Servers {
		if i < masters {
			c.do(s, "cluster", "addslotsrange", i*allSlots/masters, (i+1)*allSlots/masters-1)
		}
		host, port, _ := net.SplitHostPort(s.Addr)
		bus := s.args[slices.Index(s.args, "--cluster-port")+1]
		c.do(c.Servers[0], "cluster", "meet", host, port, bus)
	}
	c.AwaitUp()
	for i, s := range c.Servers[masters:] {
		id := fmt.Sprint(c.do(c.Servers[i], "cluster", "myid"))
		Eventually(tb, "the replica has a master", func() bool {
			return c.On(s).Do(context.Background(), "cluster", "replicate", id).Err() == nil
		})
	}
	c.AwaitUp()
	c.AwaitReplicas()
	return c
}

func (c *Cluster) do(s *Server, args ...any) any {
	c.tb.Helper()
	reply, err := c.On(s).Do(context.Background(), args...).Result()
	if err != nil {
		c.tb.Fatal(args, err)
	}
	return reply
}

// AwaitUp waits until all living servers know each other and serve all slots.
func (c *Cluster) AwaitUp() {
	c.tb.Helper()
	for _, s := range c.Servers {
		if s.cmd == nil {
			continue
		}
		Eventually(c.tb, s.Addr+" finds the cluster up", func() bool {
			info := c.On(s).ClusterInfo(context.Background()).Val()
			return strings.Contains(info, "cluster_state:ok") &&
				strings.Contains(info, fmt.Sprintf("cluster_known_nodes:%d", len(c.Servers)))
		})
	}
}

// AwaitReplicas waits until each master has a replica with all its data, as all
// living servers see it.
func (c *Cluster) AwaitReplicas() {
	c.tb.Helper()
	Eventually(c.tb, "all masters have replicas", func() bool {
		for _, s := range c.Servers {
			if s.cmd == nil {
				continue
			}
			ranges, err := slotsOf(context.Background(), c.On(s))
			if err != nil {
				return false
			}
			for _, r := range ranges {
				if len(r.Nodes) < 2 {
					return false
				}
			}
			if info := c.On(s).Info(context.Background(), "replication").Val(); !strings.Contains(info, "role:master") &&
				!strings.Contains(info, "master_link_status:up") {
				return false
			}
		}
		return true
	})
}

// On returns a client of one of the servers, which has only one connection.
func (c *Cluster) On(s *Server) *redis.Client { return c.clients[s.Addr] }

// Client returns a client of its own for the cluster, closed with the test.
func (c *Cluster) Client(change ...func(*redis.ClusterOptions)) *redis.ClusterClient {
	c.tb.Helper()
	opt := &redis.ClusterOptions{ClusterSlots: c.Slots, PoolSize: 20}
	for _, f := range change {
		f(opt)
	}
	client := redis.NewClusterClient(opt)
	c.tb.Cleanup(func() { _ = client.Close() })
	return client
}

// Slots tells who serves what, masters first.
func (c *Cluster) Slots(ctx context.Context) ([]redis.ClusterSlot, error) {
	return slots(ctx, slices.Collect(maps.Values(c.clients)))
}

// SlotsFrom returns what a cluster client needs to know of the slots: go-redis v8
// cannot read what Redis 7 says of them.
func SlotsFrom(addrs []string) func(context.Context) ([]redis.ClusterSlot, error) {
	var clients []*redis.Client
	for _, addr := range addrs {
		clients = append(clients, redis.NewClient(&redis.Options{Addr: addr, MaxRetries: -1, ReadTimeout: time.Second, PoolSize: 1}))
	}
	return func(ctx context.Context) ([]redis.ClusterSlot, error) { return slots(ctx, clients) }
}

func slots(ctx context.Context, clients []*redis.Client) ([]redis.ClusterSlot, error) {
	var lastErr error
	for _, client := range clients {
		found, err := slotsOf(ctx, client)
		if len(found) > 0 {
			return found, nil
		}
		lastErr = err
	}
	return nil, errors.Join(errors.New("no server knows the slots"), lastErr)
}

func slotsOf(ctx context.Context, client *redis.Client) (found []redis.ClusterSlot, err error) {
	ranges, err := client.Do(ctx, "cluster", "slots").Slice()
	if err != nil {
		return nil, err
	}
	for _, r := range ranges {
		fields := r.([]any)
		slot := redis.ClusterSlot{Start: int(fields[0].(int64)), End: int(fields[1].(int64))}
		for _, n := range fields[2:] {
			node := n.([]any)
			slot.Nodes = append(slot.Nodes, redis.ClusterNode{Addr: fmt.Sprintf("%v:%v", node[0], node[1])})
		}
		found = append(found, slot)
	}
	return found, nil
}

// Master returns the server that serves a key, and a replica of it, as its servers
// see it.
func (c *Cluster) Master(key string) (master, replica *Server) {
	c.tb.Helper()
	slot := int(c.On(c.living()).ClusterKeySlot(context.Background(), key).Val())
	ranges, err := c.Slots(context.Background())
	if err != nil {
		c.tb.Fatal(err)
	}
	for _, r := range ranges {
		if r.Start <= slot && slot <= r.End {
			master = c.at(r.Nodes[0].Addr)
			for _, n := range r.Nodes[1:] {
				replica = c.at(n.Addr)
			}
		}
	}
	return master, replica
}

func (c *Cluster) at(addr string) *Server {
	return c.Servers[slices.IndexFunc(c.Servers, func(s *Server) bool { return s.Addr == addr })]
}

func (c *Cluster) living() *Server {
	return c.Servers[slices.IndexFunc(c.Servers, func(s *Server) bool { return s.cmd != nil })]
}

// FailOver makes a replica the master, by agreement.
func (c *Cluster) FailOver(replica *Server) {
	c.tb.Helper()
	c.do(replica, "cluster", "failover")
	Eventually(c.tb, "the replica is the master", func() bool {
		return strings.Contains(c.On(replica).Info(context.Background(), "replication").Val(), "role:master")
	})
}

// Migrate moves the slot of a key to another master, key by key; meanwhile is called
// when the half of them is there.
func (c *Cluster) Migrate(key string, meanwhile func()) {
	c.tb.Helper()
	from, _ := c.Master(key)
	slot := c.do(from, "cluster", "keyslot", key)
	var to *Server
	for _, other := range []string{"a", "b", "c", "d", "e", "f", "g"} {
		if m, _ := c.Master(other); m != from {
			to = m
		}
	}
	fromID, toID := c.do(from, "cluster", "myid"), c.do(to, "cluster", "myid")
	c.do(to, "cluster", "setslot", slot, "importing", fromID)
	c.do(from, "cluster", "setslot", slot, "migrating", toID)
	host, port, _ := net.SplitHostPort(to.Addr)
	for moved := 0; ; moved++ {
		keys := c.do(from, "cluster", "getkeysinslot", slot, 1).([]any)
		if len(keys) == 0 {
			break
		}
		client := from.Client()
		var err error
		for range 5 { // a pooled connection of the server's may be dead
			if err = client.Do(context.Background(), "migrate", host, port, keys[0], 0, 5000, "replace").Err(); err == nil {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		_ = client.Close()
		if err != nil {
			c.tb.Fatal(err)
		}
		if moved == 0 {
			meanwhile()
		}
	}
	for _, s := range []*Server{to, from} {
		c.do(s, "cluster", "setslot", slot, "node", toID)
	}
	Eventually(c.tb, "all know that the slot has moved", func() bool {
		for _, client := range c.clients {
			if nodes := client.ClusterNodes(context.Background()).Val(); strings.Contains(nodes, "->-") {
				return false
			}
		}
		m, _ := c.Master(key)
		return m == to
	})
}

// Sentinel is a master with two replicas, and three sentinels that watch them.
type Sentinel struct {
	Servers   []*Server // the first one is the master to begin with
	Sentinels []*Server

	tb testing.TB
}

// MasterName is by which the sentinels know the master.
const MasterName = "locks"

// NewSentinel starts them, and ends them with the test. A master that does not answer
// for downAfter is replaced.
func NewSentinel(tb testing.TB, downAfter time.Duration) *Sentinel {
	tb.Helper()
	s := &Sentinel{tb: tb}
	for range 3 {
		s.Servers = append(s.Servers, Redis(tb))
	}
	for _, replica := range s.Servers[1:] {
		replica.Follow(s.Servers[0])
	}
	host, port, _ := net.SplitHostPort(s.Servers[0].Addr)
	for range 3 {
		s.Sentinels = append(s.Sentinels, sentinel(tb, fmt.Sprintf(
			"sentinel monitor %[1]s %[2]s %[3]s 2\n"+
				"sentinel down-after-milliseconds %[1]s %[4]d\n"+
				"sentinel failover-timeout %[1]s 5000\n", MasterName, host, port, downAfter.Milliseconds())))
	}
	for _, s := range s.Sentinels {
		client := s.Client()
		Eventually(tb, "the sentinels know everybody", func() bool {
			info := client.Info(context.Background()).Val()
			return strings.Contains(info, "slaves=2,sentinels=3")
		})
	}
	return s
}

// Addrs returns the addresses of the sentinels.
func (s *Sentinel) Addrs() (addrs []string) {
	for _, sentinel := range s.Sentinels {
		addrs = append(addrs, sentinel.Addr)
	}
	return addrs
}

// Client returns a client of its own, closed with the test.
func (s *Sentinel) Client() *redis.Client {
	s.tb.Helper()
	client := redis.NewFailoverClient(&redis.FailoverOptions{MasterName: MasterName, SentinelAddrs: s.Addrs(), PoolSize: 20})
	s.tb.Cleanup(func() { _ = client.Close() })
	return client
}

// FailOvers tells how many there were.
func (s *Sentinel) FailOvers() (n int) {
	s.tb.Helper()
	client := s.Sentinels[0].Client()
	fields, err := client.Do(context.Background(), "sentinel", "master", MasterName).Slice()
	if err != nil {
		s.tb.Fatal(err)
	}
	for i, field := range fields {
		if field == "config-epoch" {
			_, _ = fmt.Sscan(fields[i+1].(string), &n)
		}
	}
	return n
}

// FailOver has the sentinels choose another master, and waits until they have.
func (s *Sentinel) FailOver() {
	s.tb.Helper()
	client := redis.NewSentinelClient(&redis.Options{Addr: s.Sentinels[0].Addr})
	defer client.Close()
	before := s.Master()
	Eventually(s.tb, "the failover begins", func() bool {
		return client.Failover(context.Background(), MasterName).Err() == nil
	})
	Eventually(s.tb, "the failover ends", func() bool { return s.Master() != before })
}

// Master returns the master that all sentinels agree on.
func (s *Sentinel) Master() (master *Server) {
	s.tb.Helper()
	Eventually(s.tb, "the sentinels agree", func() bool {
		master = nil
		for _, sentinel := range s.Sentinels {
			client := redis.NewSentinelClient(&redis.Options{Addr: sentinel.Addr})
			at, err := client.GetMasterAddrByName(context.Background(), MasterName).Result()
			_ = client.Close()
			if err != nil {
				return false
			}
			i := slices.IndexFunc(s.Servers, func(s *Server) bool { return s.Addr == net.JoinHostPort(at[0], at[1]) })
			if i < 0 || master != nil && master != s.Servers[i] {
				return false
			}
			master = s.Servers[i]
		}
		return true
	})
	return master
}
