-- Ends a journal whose gateway is gone. Again: nothing.
--
-- KEYS: the journal's hash. ARGV: journal id, 1 if the journal is lost, {{call id, tokens, cost, position, generation of
-- the lease that it was admitted on or -1}, ...}.
--
-- Calls that the journal has not were never dispatched: released. Without the journal all calls are charged what they
-- have reserved. So is the lease as soon as one call was admitted on it since the gateway joined last: others may have
-- been whose records are cut already.
local journal, journal_id, is_lost = KEYS[1], ARGV[1], ARGV[2] == '1'
local generation = redis.call('HGET', journal, '=')
if not generation then return redis.call('DEL', journal) end

local now = now_us()
local lease_used = is_lost
for _, ended in ipairs(cmsgpack.unpack(ARGV[3])) do
  settle(journal, journal_id, ended[1], ended[2], ended[3], ended[4], now)
  if ended[5] == tonumber(generation) then lease_used = true end
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
  if lease_used then redis.call('HINCRBY', leases[i + 1], 'spent', leases[i + 2]) end
end
return redis.call('DEL', journal)
