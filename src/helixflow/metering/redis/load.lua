-- Budgets begin with what the ledger says that they have spent.
--
-- KEYS: hf:epoch. ARGV: epoch, {{budget key, spent, when to forget it in ms or 0}, ...}, {journal id: position}: all
-- open journals in the same view. Answers the indices, from 0, of those that are still not known: the ledger
-- is behind, ask it again.
local epoch, state = unpack(redis.call('HMGET', KEYS[1], 'id', 'state'))
local budgets, open = cmsgpack.unpack(ARGV[2]), cmsgpack.unpack(ARGV[3])
local unknown = {}
for i = 1, #budgets do unknown[i] = i - 1 end
if epoch ~= ARGV[1] or state ~= 'ready' then return cmsgpack.pack(unknown) end

local positions = redis.call('HGETALL', 'hf:' .. epoch .. ':positions')
for i = 1, #positions, 2 do
  local reached = open[positions[i]]
  if reached and reached < tonumber(positions[i + 1]) then return cmsgpack.pack(unknown) end
end

unknown = {}
for index, budget in ipairs(budgets) do
  local key = budget[1]
  if redis.call('HEXISTS', key, 'spent') == 0 then
    local behind = false
    local fields = redis.call('HGETALL', key)
    for i = 1, #fields, 2 do
      if string.sub(fields[i], 1, 1) == '@' then
        local reached = open[string.sub(fields[i], 2)]
        if reached and reached < tonumber(fields[i + 1]) then behind = true end
      end
    end
    if behind then
      unknown[#unknown + 1] = index - 1
    else
      for i = 1, #fields, 2 do
        if string.sub(fields[i], 1, 1) == '@' then redis.call('HDEL', key, fields[i]) end
      end
      for i = 1, #positions, 2 do
        local reached = open[positions[i]]
        if reached then redis.call('HSET', key, '@' .. positions[i], reached) end
      end
      redis.call('HSET', key, 'spent', budget[2])
      forget_at(key, budget[3])
    end
  end
end
return cmsgpack.pack(unknown)
