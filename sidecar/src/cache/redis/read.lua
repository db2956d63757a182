-- Reads entries, no more of each than the largest has: whatever else somebody has put under their names, of whatever size, must not
-- be carried to all who ask.
--
-- KEYS: names. ARGV: the last byte to read. Returns for each name what is there of its value, or nil where there is none, or
-- none that is a string. An error that is about all of them (a right that is missing) is the answer to all.
local found = {}
for place, name in ipairs(KEYS) do
  local value = redis.pcall('GETRANGE', name, 0, ARGV[1])
  if type(value) == 'table' and not string.find(value.err, 'WRONGTYPE', 1, true) then
    return value
  end
  found[place] = type(value) == 'string' and value ~= '' and value
end
return found
