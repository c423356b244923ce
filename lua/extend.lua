-- extend.lua: let a hold last for its whole ttl from now on.
--
-- KEYS  1 lock
-- ARGV  1 ticket
--       2 ttl of the lock in ms
-- Result 1 if the lock's value is the ticket, and its expiry now the whole ttl; 0 if
--        it is not, and nothing was changed
--
-- Invariant: it does nothing for a ticket that was released, however late it comes.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
