-- Takes what one call asks for, or nothing.
--
-- KEYS: the journal's hash. ARGV: generation, call id, reservation. Answers one of
--   {0, ...} taken: for each charge what is left and microseconds until all of it is, then for each budget what this
--            gateway's lease has left (-1: not touched)
--   {1, ...} refused: for each charge what is left, microseconds until all of it is, microseconds until this call
--            would fit; for each parallel limit how many are held; for each budget 1 if it refuses, and what is spent
--   {2, ...} budgets are not known: their indices, from 0
--   {3}      this gateway must join again
local journal, generation, call = KEYS[1], ARGV[1], ARGV[2]
if redis.call('HGET', journal, '=') ~= generation then return cmsgpack.pack({3}) end

local charges, parallels, budgets = unpack_reservation(ARGV[3])
local now = now_us()
local refused = false
local answer, unknown = {1}, {2}
local states, missing = {}, {}

local function describe(value, burst, window, us, parts)
  local owed = (us - now) * value + parts
  local left = floor((burst * window - owed) / window)
  answer[#answer + 1] = left > 0 and left or 0
  answer[#answer + 1] = ceil(owed / value)
end

for i, charge in ipairs(charges) do
  local key, value, burst, window, amount = unpack(charge)
  local us, parts = read_bucket(key, value, now)
  local whole, rest = refill_time(amount - burst, value, window)
  local excess = (us - now + whole) * value + parts + rest
  if excess > 0 then refused = true end
  states[i] = {us, parts, excess > 0 and ceil(excess / value) or 0}
end

local held = {}
for i, parallel in ipairs(parallels) do
  held[i] = tonumber(redis.call('GET', parallel[1]) or 0)
  if held[i] + 1 > parallel[2] then refused = true end
end

local spent_before, refuses = {}, {}
for i, budget in ipairs(budgets) do
  local key, amount, cap = unpack(budget)
  local known = redis.call('HMGET', key, 'spent', 'reserved')
  spent_before[i], refuses[i], missing[i] = 0, 0, 0
  if not known[1] then
    unknown[#unknown + 1] = i - 1
  else
    local spent = tonumber(known[1])
    spent_before[i] = spent
    local short = spent + tonumber(known[2] or 0) + amount - cap
    if spent >= cap then
      refuses[i] = 1
    elseif short > 0 then
      -- What this gateway holds for the time without us is its own to use.
      local lease = redis.call('HGET', journal, 'lease:' .. key)
      if lease and cmsgpack.unpack(lease)[1] >= short then missing[i] = short else refuses[i] = 1 end
    end
    if refuses[i] == 1 then refused = true end
  end
end

if refused then
  for i, charge in ipairs(charges) do
    describe(charge[2], charge[3], charge[4], states[i][1], states[i][2])
    answer[#answer + 1] = states[i][3]
  end
  for i = 1, #parallels do answer[#answer + 1] = held[i] end
  for i = 1, #budgets do
    answer[#answer + 1] = refuses[i]
    answer[#answer + 1] = spent_before[i]
  end
  return cmsgpack.pack(answer)
end
if #unknown > 1 then return cmsgpack.pack(unknown) end

answer[1] = 0
for i, charge in ipairs(charges) do
  local key, value, burst, window, amount = unpack(charge)
  local us, parts = charge_bucket(key, states[i][1], states[i][2], amount, value, window, now)
  describe(value, burst, window, us, parts)
end
for _, parallel in ipairs(parallels) do redis.call('INCR', parallel[1]) end
for i, budget in ipairs(budgets) do
  local key, amount = budget[1], budget[2]
  local left = -1
  if missing[i] > 0 then
    local field = 'lease:' .. key
    local lease = cmsgpack.unpack(redis.call('HGET', journal, field))
    left = lease[1] - missing[i]
    redis.call('HSET', journal, field, cmsgpack.pack({left, lease[2]}))
  end
  redis.call('HINCRBY', key, 'reserved', amount - missing[i])
  answer[#answer + 1] = left
end
redis.call('HSET', journal, call, ARGV[3])
return cmsgpack.pack(answer)
