-- handover.lua: the part that acquire.lua and release.lua share; it is put where they
-- name it, behind what they can do without it.
--
-- The queue is a sorted set of waiting tickets. A score is the server time in
-- microseconds at which the ticket first asked; a negative score marks the one
-- ticket that was handed the lock and has not claimed it yet, which keeps it in
-- front. A ticket is "<inbox>.<random>", both hexadecimal, and perhaps ".<owner>",
-- without blanks; "-" before it says that its process may not subscribe, and asks
-- again by itself within the grace.

local function inbox(ticket)
  return string.match(ticket, '^[^.]*')
end

-- mint returns the fencing token of the ticket, which holds the lock now. It is the
-- time, or one more than the latest if a clock was set back: so tokens rise even if all
-- data were lost.
local function mint(fence, ticket)
  local latest, owner = string.match(redis.call('GET', fence) or '', '^(%d+) (.+)$')
  local token = latest
  if owner ~= ticket then
    local now = redis.call('TIME')
    local least = latest and latest + 1 or 0
    token = string.format('%.0f', math.max(now[1] * 1000000 + now[2], least))
  end
  redis.call('SET', fence, token .. ' ' .. ticket, 'PX', fence_ttl)
  return token
end

-- tell publishes to the process that owns the ticket; false if nobody listens, so
-- that it must be dead. A refused PUBLISH (ACL, renamed command) must not end the
-- script half-way.
local function tell(ticket, message)
  if string.sub(ticket, 1, 1) == '-' then
    return true
  end
  local heard = redis.pcall('PUBLISH', 'dmutex-inbox:' .. inbox(ticket), message)
  return type(heard) == 'number' and heard > 0
end

-- drop_silent removes a marked ticket whose grace is over, and with it all of
-- its process's, which is stopped or cut off: one grace per process, not one per
-- waiter. Should it come back, a message lets its waiters look, and ask for their
-- places again. If it is the asker's own it lives, and only that ticket goes. The
-- tombstone of the marked one says that it never held the lock.
local function drop_silent(queue, marked, asker, ended)
  redis.call('ZREM', queue, marked)
  redis.call('SET', ended .. marked, 'unclaimed', 'PX', tombstone_ttl)
  local process = inbox(marked)
  if process == inbox(asker) then
    return
  end
  for _, ticket in ipairs(redis.call('ZRANGE', queue, '0', '-1')) do
    if inbox(ticket) == process then
      redis.call('ZREM', queue, ticket)
    end
  end
  tell(marked, 'look')
end

-- tell_witnesses lets the next in the queue, at the rank given, look when the time of
-- the one who was handed the lock is over; if it lives in the same process as that,
-- which may be stopped, the last in the queue as well.
local function tell_witnesses(queue, rank, handed, time)
  local witness
  repeat
    witness = redis.call('ZRANGE', queue, rank, rank)[1]
    local heard = not witness or tell(witness, witness .. ' ' .. time)
    if not heard then
      redis.call('ZREM', queue, witness)
    end
  until heard
  if witness and inbox(witness) == inbox(handed) then
    local last = redis.call('ZRANGE', queue, '-1', '-1')[1]
    if inbox(last) ~= inbox(handed) then
      tell(last, last .. ' ' .. time)
    end
  end
end

-- hand_over gives the lock, which must be free, to the first in the queue who
-- listens, for the grace in which it has to claim it; returns its ticket. Returns
-- nil, and the lock is still free, if the asker itself is first or nobody waits.
-- tombstone is the asker's.
local function hand_over(lock, queue, grace, asker, tombstone)
  local ended = string.sub(tombstone, 1, #tombstone - #asker)
  while true do
    local front = redis.call('ZRANGE', queue, '0', '0', 'WITHSCORES')
    local first = front[1]
    if not first or first == asker then
      return nil
    end
    local since = tonumber(front[2])
    if since < 0 then
      drop_silent(queue, first, asker, ended)
    elseif tell(first, first) then
      redis.call('SET', lock, first, 'PX', grace)
      redis.call('ZADD', queue, string.format('%.0f', -since), first)
      tell_witnesses(queue, '1', first, grace)
      return first
    else
      redis.call('ZREM', queue, first)
    end
  end
end
