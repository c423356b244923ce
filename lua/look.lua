-- look.lua: see who holds the lock.
--
-- KEYS   1 lock, 2 queue, 3 the tombstone of the ticket in question
-- Result {value or '', remaining ttl in ms (-2 no key, -1 no expiry), 1 if it was
--         handed the lock and has not claimed it yet, 'released' or 'ended' from the
--         tombstone or ''}
--
-- Invariant: changes nothing. The ZREM is there for a replica to refuse, which a
-- client may be connected to after a fail-over, or send reads to: what it knows of
-- the lock is of the past.

local holder = redis.call('GET', KEYS[1])
redis.call('ZREM', KEYS[2], '')
local since = holder and redis.call('ZSCORE', KEYS[2], holder)
local unclaimed = since and tonumber(since) < 0
return {
  holder or '', redis.call('PTTL', KEYS[1]), unclaimed and 1 or 0,
  redis.call('GET', KEYS[3]) or '',
}
