-- look.lua: see who holds the lock. A script and not plain reads, because a
-- cluster client may send those to a replica.
--
-- KEYS   1 lock, 2 the tombstone of the ticket in question, if there is one
-- Result {value or nil, remaining ttl in ms (-2 no key, -1 no expiry),
--         'released' or 'ended' from the tombstone, or nil}
--
-- Invariant: writes nothing.

local holder = redis.call('GET', KEYS[1])
local ended = KEYS[2] and redis.call('GET', KEYS[2])
return {holder, redis.call('PTTL', KEYS[1]), ended}
