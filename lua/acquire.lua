-- acquire.lua: take the lock, claim it after a hand-over, or take a place in the
-- queue.
--
-- KEYS  1 lock, 2 queue, 3 the ticket's tombstone, 4 the latest fencing token and
--       its ticket, if one is asked for
-- ARGV  1 ticket
--       2 ttl of the lock in ms
--       3 grace in ms for whoever is handed the lock instead, no more than the ttl
--       4 place in the queue: none or '' asks for none, '0' for one from now on, and
--         a time that an earlier answer gave for the one it had from then on
-- Result 1, or {fencing token} if one was asked for: the lock's value is the ticket and
--         its expiry the whole ttl
--        0: the ticket was ended before; it can never hold the lock again
--        {holder, its remaining ttl in ms, rank or -1, place in the queue}: it is taken
--
-- Invariant: a repeat with the same ticket gives the same answer, so a client may
-- send it again after a lost reply. It fails on a key that is no string before anything
-- is written.

local lock, queue, tombstone, fence = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ticket, ttl, grace, since = unpack(ARGV)

local holder = redis.call('GET', lock)
if redis.call('EXISTS', tombstone) == 1 then
  return 0
end
if not (holder or fence or redis.call('ZRANGE', queue, '0', '0')[1]) then
  redis.call('SET', lock, ticket, 'PX', ttl) -- free, and nobody waits: mostly that is all
  return 1
end

-- A place already taken is kept, and a mark on it taken off: the ticket asks, so
-- its process lives. A free lock that nobody waits for needs no place.
local waits = holder ~= ticket and (since or '') ~= ''
  and (holder or redis.call('EXISTS', queue) == 1)
if waits then
  if since == '0' then
    local now = redis.call('TIME')
    since = string.format('%.0f', now[1] * 1000000 + now[2])
  end
  if redis.call('ZADD', queue, 'NX', since, ticket) == 0 then
    since = string.format('%.0f', math.abs(redis.call('ZSCORE', queue, ticket)))
    redis.call('ZADD', queue, since, ticket)
  end
  redis.call('PEXPIRE', queue, queue_ttl)
end

local function taken()
  local rank = waits and redis.call('ZRANK', queue, ticket) or -1
  return {holder, redis.call('PTTL', lock), rank, since or ''}
end

if holder and holder ~= ticket then
  if not waits then
    redis.call('ZREM', queue, '') -- changes nothing: for a replica to refuse, see look.lua
  end
  return taken()
end

--> handover.lua

if holder == ticket then
  redis.call('PEXPIRE', lock, ttl)
  if redis.call('ZREM', queue, ticket) == 1 and ttl == grace then
    -- It was handed over, and may end before the witness would look.
    local witness = redis.call('ZRANGE', queue, '0', '0')[1]
    if witness then
      tell(witness, witness .. ' ' .. ttl)
    end
  end
else
  holder = hand_over(lock, queue, grace, ticket, tombstone)
  if holder then
    return taken()
  end
  redis.call('SET', lock, ticket, 'PX', ttl)
  if waits then
    redis.call('ZREM', queue, ticket)
  end
end
return fence and {mint(fence, ticket)} or 1
