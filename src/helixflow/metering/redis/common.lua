-- What several scripts need; put before each of them.
--
-- A bucket (GCRA, see metering/gcra.py) is the moment when it will be full: whole microseconds and a rest in parts of
-- which `value` are one microsecond, with that `value`; so its state is exact although numbers here are doubles.
--
-- A reservation is {charges, parallels, budgets, restored, whose}, MessagePack, in the hash of its gateway's journal:
--   charge   {key, value, burst, window in µs, amount, 1 if of tokens}
--   parallel {key, value}
--   budget   {key, amount, cap, 1 for money and 2 for tokens, when to forget it in ms or 0}
--   whose    {organisation, project, key, admission in ms}: not for us, but for who asks what a lost journal held
-- Other fields of that hash: '=' is the generation that may admit, '#' the one that may become it, 'lease:<budget key>'
-- {amount, unit} what the gateway holds for the time without us.
--
-- A budget is a hash: `spent` (absent: not known yet), `reserved`, and '@<journal id>' (see `is_counted`).

local floor, ceil = math.floor, math.ceil

local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- How long so many units take to come: microseconds and parts (0 to value - 1). Negative amounts too.
local function refill_time(amount, value, window)
  local whole = floor(window / value)
  local parts = amount * (window - whole * value)
  local carry = floor(parts / value)
  return amount * whole + carry, parts - carry * value
end

local function read_bucket(key, value, now)
  local state = redis.call('GET', key)
  if not state then return now, 0 end
  local us, parts, was = cmsgpack.unpack(state)
  if us < now then return now, 0 end
  if was ~= value then
    -- The limit has changed: what is missing stays missing.
    local missing = (us - now) * was + parts
    local whole = floor(missing / value)
    us, parts = now + whole, missing - whole * value
    if parts < 0 or parts >= value then parts = 0 end
  end
  return us, parts
end

-- Takes so many units, or gives them back; returns the new state.
local function charge_bucket(key, us, parts, amount, value, window, now)
  local whole, rest = refill_time(amount, value, window)
  us, parts = us + whole, parts + rest
  if parts >= value then us, parts = us + 1, parts - value end
  if us < now then
    redis.call('DEL', key)
    return now, 0
  end
  redis.call('SET', key, cmsgpack.pack(us, parts, value), 'PX', floor((us - now) / 1000) + 1000)
  return us, parts
end

local function unpack_reservation(stored)
  return unpack(cmsgpack.unpack(stored))
end

local function forget_at(key, at_ms)
  if at_ms > 0 then redis.call('PEXPIREAT', key, at_ms) end
end

local function leave_parallels(parallels)
  for _, parallel in ipairs(parallels) do
    if redis.call('DECR', parallel[1]) <= 0 then redis.call('DEL', parallel[1]) end
  end
end

-- Whether what a call has used is to be added to what a budget has spent, or is in the ledger's sum that it begins with.
--
-- Only for calls that a gateway restored after all was lost here (others are admitted when the sum is known, so they
-- settle after it was read). '@<journal>' is, once the sum is known, up to where that journal was in it; absent: the
-- journal was closed, so all of it. Before that it is up to where the journal must be in the sum: this call is.
local function is_counted(key, journal_id, position)
  local field = '@' .. journal_id
  local known = redis.call('HMGET', key, 'spent', field)
  if known[1] then return known[2] and position > tonumber(known[2]) end
  if not known[2] or tonumber(known[2]) < position then redis.call('HSET', key, field, position) end
  return false
end

-- Ends a reservation. `tokens` below 0: the call has never been.
--
-- Who finds no reservation does nothing: it was settled before. Or all was lost here in between and the gateway, which
-- did not name this call when it restored its open ones, had settled it in its journal before the position that it
-- gave then; and no budget is known again before the ledger has the journal up to there: the sum has it.
local function settle(journal, journal_id, call, tokens, cost, position, now)
  local stored = redis.call('HGET', journal, call)
  if not stored then return end
  redis.call('HDEL', journal, call)
  local charges, parallels, budgets, restored = unpack_reservation(stored)
  for _, charge in ipairs(charges) do
    local key, value, _, window, amount, of_tokens = unpack(charge)
    local change = 0
    if tokens < 0 then change = -amount elseif of_tokens == 1 then change = tokens - amount end
    if change ~= 0 then
      local us, parts = read_bucket(key, value, now)
      charge_bucket(key, us, parts, change, value, window, now)
    end
  end
  leave_parallels(parallels)
  for _, budget in ipairs(budgets) do
    local key, amount, _, unit = unpack(budget)
    -- Not -amount: the negative of 0 is "-0" to Redis, and no integer.
    redis.call('HINCRBY', key, 'reserved', 0 - amount)
    local used = unit == 1 and cost or tokens
    if tokens >= 0 and used > 0 and (restored == 0 or is_counted(key, journal_id, position)) then
      redis.call('HINCRBY', key, 'spent', used)
    end
  end
end

-- What a journal's leases are counted in, by budget key: 1 for money, 2 for tokens.
local function list_units(journal)
  local units = {}
  local all = redis.call('HGETALL', journal)
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 6) == 'lease:' then units[string.sub(all[i], 7)] = cmsgpack.unpack(all[i + 1])[2] end
  end
  return units
end

-- The calls of a journal: {call id, reservation, ...}, and its leases: {field, key, amount, ...}.
local function list_held(journal)
  local calls, leases = {}, {}
  local all = redis.call('HGETALL', journal)
  for i = 1, #all, 2 do
    local field, value = all[i], all[i + 1]
    if string.sub(field, 1, 6) == 'lease:' then
      leases[#leases + 1] = field
      leases[#leases + 1] = string.sub(field, 7)
      leases[#leases + 1] = cmsgpack.unpack(value)[1]
    elseif field ~= '=' and field ~= '#' then
      calls[#calls + 1] = field
      calls[#calls + 1] = value
    end
  end
  return calls, leases
end
