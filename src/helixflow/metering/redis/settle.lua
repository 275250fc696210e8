-- Ends calls. KEYS: the journal's hash. ARGV: journal id, {{call id, tokens or -1, cost, position}, ...}.
local now = now_us()
for _, ended in ipairs(cmsgpack.unpack(ARGV[2])) do
  settle(KEYS[1], ARGV[1], ended[1], ended[2], ended[3], ended[4], now)
end
return 0
