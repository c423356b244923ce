-- release.lua: end a ticket, whether it holds the lock, waits for it, or was
-- given up with its fate unknown, and serve the queue.
--
-- KEYS  1 lock, 2 queue, 3 the ticket's tombstone
-- ARGV  1 ticket
--       2 channel on which the release is told
--       3 grace in ms for whoever is handed the lock
--       4 expiry of the tombstone in ms
-- Result 'released': the ticket held the lock until this call or an earlier one
--        'gone': it does not hold the lock, and nobody does
--        'taken': it does not hold the lock, and another value is there
--
-- Invariant: a repeat gives the same answer for as long as the tombstone lives,
-- and the ticket can never get the lock again in that time. Writes that memory
-- limits refuse come after one that they do not, so they cannot fail half-way.

local lock, queue, tombstone = KEYS[1], KEYS[2], KEYS[3]
local ticket, channel, grace, tombstone_ttl = unpack(ARGV)

local holder = redis.call('GET', lock)
if holder == ticket then
  redis.call('DEL', lock)
  redis.call('SET', tombstone, 'released', 'PX', tombstone_ttl)
  redis.call('ZREM', queue, ticket)
  redis.pcall('PUBLISH', channel, ticket)
  hand_over(lock, queue, grace, ticket, tombstone)
  return 'released'
end

redis.call('ZREM', queue, ticket)
local ended = redis.call('GET', tombstone) or 'ended'
redis.call('SET', tombstone, ended, 'PX', tombstone_ttl)
if not holder then
  hand_over(lock, queue, grace, ticket, tombstone)
end
if ended == 'released' then
  return 'released'
end
return holder and 'taken' or 'gone'
