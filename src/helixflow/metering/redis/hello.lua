-- A gateway has connected: nothing of its earlier connections may take effect from here on.
--
-- KEYS: hf:epoch. ARGV: run id of the server, id for a new epoch, journal id, generation, an epoch that must not go on
-- (this gateway has left it for another: what it did since is missing here) or ''.
-- Answers {epoch, state, the generation that could admit until now or -1}.
--
-- An epoch belongs to one run of one server: who starts again, or takes over, may have lost the newest writes although
-- it has most of them, which is worse than nothing.
local epoch, run, state = unpack(redis.call('HMGET', KEYS[1], 'id', 'run', 'state'))
if not epoch or run ~= ARGV[1] or epoch == ARGV[5] then
  if epoch then redis.call('SADD', 'hf:garbage', epoch) end
  epoch, state = ARGV[2], 'new'
  redis.call('HSET', KEYS[1], 'id', epoch, 'run', ARGV[1], 'state', state)
end
local journal = 'hf:' .. epoch .. ':calls:' .. ARGV[3]
local before = redis.call('HGET', journal, '=')
redis.call('HSET', journal, '#', ARGV[4])
return cmsgpack.pack({epoch, state, before and tonumber(before) or -1})
