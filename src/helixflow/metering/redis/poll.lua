-- What a gateway asks now and then: is all as it was, and its leases.
--
-- KEYS: the journal's hash, hf:epoch. ARGV: epoch, journal id, generation, milliseconds that a reader may take,
-- {{budget key, cap, amount wanted, unit}, ...}. Answers {state, 1 if this gateway is to read the ledger, and for each
-- lease what it is now and what the budget has spent...}, or {} when it must join again.
local journal = KEYS[1]
local epoch, state = unpack(redis.call('HMGET', KEYS[2], 'id', 'state'))
if epoch ~= ARGV[1] or redis.call('HGET', journal, '=') ~= ARGV[3] then return cmsgpack.pack({}) end

local reads = 0
if state ~= 'ready' and redis.call('SET', 'hf:' .. epoch .. ':reader', ARGV[2], 'NX', 'PX', ARGV[4]) then reads = 1 end
local answer = {state, reads}
for _, wanted in ipairs(cmsgpack.unpack(ARGV[5])) do
  local key, cap, target, unit = unpack(wanted)
  local field = 'lease:' .. key
  local lease = redis.call('HGET', journal, field)
  local has = lease and cmsgpack.unpack(lease)[1] or 0
  local known = redis.call('HMGET', key, 'spent', 'reserved')
  local change = 0
  if known[1] then
    local room = cap - tonumber(known[1]) - tonumber(known[2] or 0)
    change = math.min(target - has, room > 0 and room or 0)
  end
  if change ~= 0 then
    redis.call('HINCRBY', key, 'reserved', change)
    has = has + change
    if has > 0 then redis.call('HSET', journal, field, cmsgpack.pack({has, unit})) else redis.call('HDEL', journal, field) end
  end
  answer[#answer + 1] = has
  answer[#answer + 1] = tonumber(known[1] or 0)
end
return cmsgpack.pack(answer)
