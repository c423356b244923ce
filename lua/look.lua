-- look.lua: see who holds the lock.
--
-- KEYS   1 lock, 2 queue, 3 the tombstone of the ticket in question
-- ARGV   1 the ticket in question, or ''
-- Result {value or '', remaining ttl in ms (-2 no key, -1 no expiry), what became of
--         the ticket: 'released', 'ended', or 'unclaimed' if it was handed the lock
--         and did not claim it in time; '' if that is not known}
--
-- Invariant: changes nothing. The ZREM is there for a replica to refuse, which a
-- client may be connected to after a fail-over, or send reads to: what it knows of
-- the lock is of the past.

local lock, queue, tombstone = unpack(KEYS)
local ticket = ARGV[1]

local holder = redis.call('GET', lock)
redis.call('ZREM', queue, '')
local fate = redis.call('GET', tombstone)
local since = redis.call('ZSCORE', queue, ticket)
if not fate and holder ~= ticket and since and tonumber(since) < 0 then
  fate = 'unclaimed'
end
return {holder or '', redis.call('PTTL', lock), fate or ''}
