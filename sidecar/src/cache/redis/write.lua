-- Writes entries, each only over an entry with a smaller token (C2): a slow writer cannot undo a tombstone.
--
-- KEYS: names. ARGV: for each name its value and its time to live in milliseconds. Returns how many were written.
-- A value has one byte of version and eight of token, big-endian. What is no such value is written over: it would only ever
-- be a miss.

-- A token's two halves: numbers here have 53 bits. Not as text: Lua compares that by the locale that the server was started in.
local function halves(value)
  local a, b, c, d, e, f, g, h = string.byte(value, 2, 9)
  return ((a * 256 + b) * 256 + c) * 256 + d, ((e * 256 + f) * 256 + g) * 256 + h
end

local function is_later(held, value)
  local high, low = halves(held)
  local new_high, new_low = halves(value)
  return high > new_high or (high == new_high and low > new_low)
end

local written = 0
for place, name in ipairs(KEYS) do
  local value, life = ARGV[place * 2 - 1], ARGV[place * 2]
  -- Mostly there is none yet: one command instead of two.
  if redis.call('SET', name, value, 'PX', life, 'NX') then
    written = written + 1
  else
    -- pcall: the name may hold something that is no string.
    local held = redis.pcall('GET', name)
    local stale = type(held) == 'string' and #held >= 9 and string.sub(held, 1, 1) == string.sub(value, 1, 1)
      and is_later(held, value)
    if not stale then
      redis.call('SET', name, value, 'PX', life)
      written = written + 1
    end
  end
end
return written
