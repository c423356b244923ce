-- inspect.lua: see all that there is to know of a lock, for people.
--
-- KEYS   1 lock, 2 queue, 3 the latest fencing token and its ticket
-- Result {value or '', remaining ttl in ms (-2 no key, -1 no expiry), how many wait,
--         1 if the holder was handed the lock and has not claimed it yet, the latest
--         token and its ticket or ''}
--
-- Invariant: as of look.lua.

local lock, queue, fence = unpack(KEYS)

local holder = redis.call('GET', lock) or ''
redis.call('ZREM', queue, '')
local since = redis.call('ZSCORE', queue, holder)
local unclaimed = since and tonumber(since) < 0
local waiting = redis.call('ZCARD', queue) - (unclaimed and 1 or 0)
return {
  holder, redis.call('PTTL', lock), waiting, unclaimed and 1 or 0,
  redis.call('GET', fence) or '',
}
