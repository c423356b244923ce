-- release.lua: end a ticket, whether it holds the lock, waits for it, or was
-- given up with its fate unknown, and serve the queue.
--
-- KEYS  1 lock, 2 queue, 3 the ticket's tombstone, 4 the latest fencing token and its
--       ticket, if the heir is to have one
-- ARGV  1 ticket
--       2 grace in ms for whoever is handed the lock
--       3 the heir, if there is one: a ticket that waits in the asker's own process
--       4 ttl of the lock in ms if the heir gets it
--       5 '' if all who wait look again before that is over; else they are told to
-- Result 1: the ticket held the lock until this call
--        3, or {fencing token} if the heir asked for one: the same, and the heir, which
--         was next, holds it now for its whole ttl
--        2: it held the lock until an earlier call
--        -1: it does not hold the lock, and nobody does
--        0: it does not hold the lock, and another value is there
--
-- Invariant: a repeat gives the same answer for as long as the tombstone lives, but that
-- it does not know of the heir; and the ticket can never get the lock again in that
-- time. Writes that memory limits refuse come after one that they do not, so they
-- cannot fail half-way.

local lock, queue, tombstone, fence = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ticket, grace, heir, heir_ttl, untold = unpack(ARGV)

local holder = redis.call('GET', lock)
local inherited = holder == ticket and heir and redis.call('ZRANK', queue, heir) == 0
if holder == ticket then
  if inherited then
    redis.call('ZREM', queue, heir)
    redis.call('SET', lock, heir, 'PX', heir_ttl)
  else
    redis.call('DEL', lock)
  end
  redis.call('SET', tombstone, 'released', 'PX', tombstone_ttl)
  redis.pcall('PUBLISH', 'dmutex-' .. lock, ticket)
  if inherited and untold == '' and not fence then
    return 3
  elseif not inherited and redis.call('EXISTS', queue) == 0 then
    return 1
  end
end

--> handover.lua

if inherited then
  if untold ~= '' then
    tell_witnesses(queue, '0', heir, heir_ttl)
  end
  return fence and {mint(fence, heir)} or 3
end

redis.call('ZREM', queue, ticket)
if holder == ticket then
  hand_over(lock, queue, grace, ticket, tombstone)
  return 1
end

local ended = redis.call('GET', tombstone) or 'ended'
redis.call('SET', tombstone, ended, 'PX', tombstone_ttl)
if not holder then
  hand_over(lock, queue, grace, ticket, tombstone)
end
if ended == 'released' then
  return 2
end
return holder and 0 or -1
