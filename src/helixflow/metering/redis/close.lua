-- Ends a journal whose gateway is gone. Again: nothing.
--
-- KEYS: the journal's hash. ARGV: journal id, 1 if the journal is lost, {{call id, tokens, cost, position, generation,
-- {budget key, ...}}, ...}: the calls that were admitted on a lease of that generation.
--
-- Calls that the journal has not were never dispatched: released. Without the journal all calls are charged what they
-- have reserved, and leases are charged in full. Otherwise leases are charged what was used of them: the journal has
-- all calls that were admitted since the gateway joined last.
local journal, journal_id, is_lost = KEYS[1], ARGV[1], ARGV[2] == '1'
local generation = redis.call('HGET', journal, '=')
if not generation then return redis.call('DEL', journal) end

local now = now_us()
local units = list_units(journal)
for _, ended in ipairs(cmsgpack.unpack(ARGV[3])) do
  local call, tokens, cost, position, leased_in, keys = unpack(ended)
  -- It may have asked here before it was granted on the lease, or have been moved here since.
  if redis.call('HEXISTS', journal, call) == 1 then
    settle(journal, journal_id, call, tokens, cost, position, now)
  elseif leased_in == tonumber(generation) then
    for _, key in ipairs(keys) do
      local used = units[key] == 1 and cost or tokens
      if units[key] and used > 0 then redis.call('HINCRBY', key, 'spent', used) end
    end
  end
end
local held, leases = list_held(journal)
for i = 1, #held, 2 do
  if is_lost then
    local _, parallels, budgets = unpack_reservation(held[i + 1])
    leave_parallels(parallels)
    for _, budget in ipairs(budgets) do
      -- Of one that is not known yet it stays reserved, which comes to the same.
      if redis.call('HEXISTS', budget[1], 'spent') == 1 then
        redis.call('HINCRBY', budget[1], 'reserved', 0 - budget[2])
        redis.call('HINCRBY', budget[1], 'spent', budget[2])
      end
    end
  else
    settle(journal, journal_id, held[i], -1, 0, 0, now)
  end
end
for i = 1, #leases, 3 do
  redis.call('HINCRBY', leases[i + 1], 'reserved', 0 - leases[i + 2])
  if is_lost then redis.call('HINCRBY', leases[i + 1], 'spent', leases[i + 2]) end
end
return redis.call('DEL', journal)
