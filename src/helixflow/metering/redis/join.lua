-- Makes what is held here for a gateway what the gateway itself knows, and lets it admit.
--
-- KEYS: the journal's hash, hf:epoch. ARGV: epoch, journal id, generation, position, {calls, ended, spent}:
--   calls {{call id, reservation}, ...} all that are open; ended {{call id, tokens, cost, position}, ...} whose end we
--   may not know; spent {{budget key, amount}, ...} from leases. Answers {state}, or {} when it must say hello again.
local journal, journal_id = KEYS[1], ARGV[2]
local epoch, state = unpack(redis.call('HMGET', KEYS[2], 'id', 'state'))
if epoch ~= ARGV[1] or redis.call('HGET', journal, '#') ~= ARGV[3] then return cmsgpack.pack({}) end

local calls, ended, spent = unpack(cmsgpack.unpack(ARGV[5]))
if redis.call('HGET', journal, '=') then
  local now = now_us()
  for _, call in ipairs(ended) do settle(journal, journal_id, call[1], call[2], call[3], call[4], now) end
  local is_open = {}
  for _, call in ipairs(calls) do is_open[call[1]] = true end
  local held, leases = list_held(journal)
  -- Admissions of which the gateway never heard.
  for i = 1, #held, 2 do
    if not is_open[held[i]] then settle(journal, journal_id, held[i], -1, 0, 0, now) end
  end
  for i = 1, #leases, 3 do
    redis.call('HINCRBY', leases[i + 1], 'reserved', 0 - leases[i + 2])
    redis.call('HDEL', journal, leases[i])
  end
  for _, budget in ipairs(spent) do redis.call('HINCRBY', budget[1], 'spent', budget[2]) end
else
  -- First time in this epoch: what has ended is in the journal before this position, and no budget is known before the
  -- ledger has it up to there.
  redis.call('HSET', 'hf:' .. epoch .. ':positions', journal_id, ARGV[4])
end

for _, call in ipairs(calls) do
  if redis.call('HSETNX', journal, call[1], cmsgpack.pack(call[2])) == 1 then
    local _, parallels, budgets = unpack(call[2])
    for _, parallel in ipairs(parallels) do redis.call('INCR', parallel[1]) end
    for _, budget in ipairs(budgets) do
      redis.call('HINCRBY', budget[1], 'reserved', budget[2])
      forget_at(budget[1], budget[5])
    end
  end
end

redis.call('HSET', journal, '=', ARGV[3])
local expected = 'hf:' .. epoch .. ':expected'
redis.call('SREM', expected, journal_id)
if state == 'rebuilding' and redis.call('SCARD', expected) == 0 then
  state = 'ready'
  redis.call('HSET', KEYS[2], 'state', state)
end
return cmsgpack.pack({state})
