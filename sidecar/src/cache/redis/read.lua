-- Reads entries. What else somebody has put under their names, of whatever size, must not be carried to all who ask: of what is
-- larger than any entry only a byte is told, which is none. One command for all of them: one for each, with a bound, took twice
-- what this takes.
--
-- KEYS: names, each once. ARGV: the most bytes that an entry has. Returns for each name its value, or nil where there is none,
-- or none that is a string.
local found, most = redis.call('MGET', unpack(KEYS)), tonumber(ARGV[1])
for place = 1, #KEYS do
  local value = found[place]
  if value and #value > most then
    found[place] = string.sub(value, 1, 1)
  end
end
return found
