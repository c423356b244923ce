-- acquire.lua: take the lock, claim it after a hand-over, or take a place in the
-- queue.
--
-- KEYS  1 lock, 2 queue, 3 the ticket's tombstone, 4 the latest fencing token and
--       its ticket, if one is asked for
-- ARGV  1 ticket
--       2 ttl of the lock in ms
--       3 grace in ms for whoever is handed the lock instead, no more than the ttl
--       4 place in the queue: '' asks for none, '0' for one from now on, and a
--         time that an earlier answer gave for the one it had from then on
--       5 expiry of the queue in ms
--       6 expiry of the latest fencing token in ms
-- Result {'held', fencing token or ''}: the lock's value is the ticket and its
--         expiry the whole ttl
--        {'ended'}: the ticket was ended before; it can never hold the lock again
--        {'taken', holder, its remaining ttl in ms, rank or -1, place in the queue}
--
-- Invariant: a repeat with the same ticket gives the same answer, so a client may
-- send it again after a lost reply. The first line fails on a key that is no
-- string before anything is written.

local lock, queue, tombstone, fence = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ticket, ttl, grace, since, queue_ttl, fence_ttl = unpack(ARGV)

local function micros()
  local now = redis.call('TIME')
  return now[1] .. string.format('%06d', tonumber(now[2]))
end

-- held is the answer to whoever holds the lock now. A token is the time, or one more
-- than the latest if a clock was set back: so it rises even if all data were lost.
local function held()
  if not fence then
    return {'held', ''}
  end
  local latest, owner = string.match(redis.call('GET', fence) or '', '^(%d+) (.+)$')
  local token = latest
  if owner ~= ticket then
    local least = latest and tonumber(latest) + 1 or 0
    token = string.format('%.0f', math.max(tonumber(micros()), least))
  end
  redis.call('SET', fence, token .. ' ' .. ticket, 'PX', fence_ttl)
  return {'held', token}
end

local holder = redis.call('GET', lock)
if redis.call('EXISTS', tombstone) == 1 then
  return {'ended'}
end
if holder == ticket then
  redis.call('PEXPIRE', lock, ttl)
  if redis.call('ZREM', queue, ticket) == 1 and ttl == grace then
    -- It was handed over, and may end before the witness would look.
    local witness = redis.call('ZRANGE', queue, 0, 0)[1]
    if witness then
      tell(witness, witness .. ' ' .. ttl)
    end
  end
  return held()
end

-- A place already taken is kept, and a mark on it taken off: the ticket asks, so
-- its process lives. A free lock that nobody waits for needs no place.
local waits = since ~= '' and (holder or redis.call('EXISTS', queue) == 1)
if waits then
  local placed = redis.call('ZSCORE', queue, ticket)
  if placed then
    since = string.format('%.0f', math.abs(tonumber(placed)))
  elseif since == '0' then
    since = micros()
  end
  redis.call('ZADD', queue, since, ticket)
  redis.call('PEXPIRE', queue, queue_ttl)
elseif holder then
  redis.call('ZREM', queue, '') -- changes nothing: for a replica to refuse, see look.lua
end

if not holder then
  holder = hand_over(lock, queue, grace, ticket, tombstone)
  if not holder then
    redis.call('SET', lock, ticket, 'PX', ttl)
    if waits then
      redis.call('ZREM', queue, ticket)
    end
    return held()
  end
end

local rank = waits and redis.call('ZRANK', queue, ticket) or -1
return {'taken', holder, redis.call('PTTL', lock), rank, since}
