-- Tells a new epoch which journals were open, by the ledger, after it had begun.
--
-- KEYS: hf:epoch. ARGV: epoch, {journal id, ...}. Answers the epoch's state, '' when it is another one.
local epoch, state = unpack(redis.call('HMGET', KEYS[1], 'id', 'state'))
if epoch ~= ARGV[1] then return '' end

local expected, positions = 'hf:' .. epoch .. ':expected', 'hf:' .. epoch .. ':positions'
local is_open = {}
for _, journal_id in ipairs(cmsgpack.unpack(ARGV[2])) do
  is_open[journal_id] = true
  if state == 'new' and redis.call('HEXISTS', positions, journal_id) == 0 then
    redis.call('SADD', expected, journal_id)
  end
end
for _, journal_id in ipairs(redis.call('SMEMBERS', expected)) do
  if not is_open[journal_id] then redis.call('SREM', expected, journal_id) end
end
if state ~= 'ready' then
  state = redis.call('SCARD', expected) == 0 and 'ready' or 'rebuilding'
  redis.call('HSET', KEYS[1], 'state', state)
end
redis.call('DEL', 'hf:' .. epoch .. ':reader')
return state
