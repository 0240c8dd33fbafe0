"""What happens on the server in one step. Each script gets all the keys of one call; scripts are atomic.

Every number that comes back is an integer, every failure a text that `errors.refusal` knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha1


@dataclass(frozen=True, slots=True)
class Script:
    source: str = field(repr=False)
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # Redis names a script by this digest; nothing is protected by it.
        object.__setattr__(self, "sha", sha1(self.source.encode(), usedforsecurity=False).hexdigest())


_LIB = """
local function now() local t = redis.call('TIME'); return t[1] * 1000 + math.floor(t[2] / 1000) end
local function map(flat) local m = {}; for i = 1, #flat, 2 do m[flat[i]] = flat[i + 1] end; return m end
local function less(a, b)   -- of entry ids
  local am, as = string.match(a, '(%d+)-(%d+)'); local bm, bs = string.match(b, '(%d+)-(%d+)')
  if am ~= bm then return tonumber(am) < tonumber(bm) end
  return tonumber(as) < tonumber(bs)
end
local function group_of(key, name)
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local group = map(flat)
    if group.name == name then return group end
  end
end
"""

# A destination is three KEYS in a row: its stream, and of its channel the delayed set (member -> when due) and the messages
# in it. ARGV: a letter a destination says of what kind it is.
_PUT = (
    _LIB
    + """
local known = {}
local function why_not(to, kind)   -- nil where a message can be put there
  if known[to] == nil then
    local found = redis.call('TYPE', KEYS[to]).ok
    if found == 'none' then known[to] = 'NOTFOUND'
    elseif found ~= 'stream' then known[to] = 'WRONGTYPE ' .. KEYS[to]
    elseif kind == 't' and #redis.call('XINFO', 'GROUPS', KEYS[to]) == 0 then known[to] = 'UNROUTABLE'
    else known[to] = false end
  end
  return known[to] or nil
end
local function put(to, delay, first, last)
  if delay == '' then redis.call('XADD', KEYS[to], unpack(ARGV, first, last)); return end
  local member = string.format('%016d', redis.call('HINCRBY', KEYS[to + 2], 'n', 1))
  redis.call('HSET', KEYS[to + 2], member, cmsgpack.pack({KEYS[to], unpack(ARGV, first, last)}))
  redis.call('ZADD', KEYS[to + 1], string.format('%.0f', now() + delay), member)
end
"""
)

_MINE = """
local function mine(id)   -- how often it was delivered, if it is still the caller's
  local p = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if #p > 0 and p[1][2] == ARGV[2] then return p[1][4] end
end
"""

# Settles (or, without a group, settles nothing) and sends in one step. KEYS: source (or any), then destinations. ARGV: group or '',
# consumer, '1' to delete what is settled, kinds, then for each move: id and number of messages (not without a group), and for each
# message: destination (its first key), delay in ms or '', number of words, and these words of an XADD behind its key.
# A move is done or not: what could fail is looked at before. A topic without groups is no reason to keep what is moved, nor to
# refuse what is due later. -> what failed: index, why, index, why ...
PUT = Script(
    _PUT
    + _MINE
    + """
local moves, at, i, bad = ARGV[1] ~= '', 5, 0, {}
while at <= #ARGV do
  local id, sends, why = nil, 1, nil
  if moves then
    id, sends, at = ARGV[at], tonumber(ARGV[at + 1]), at + 2
    if not mine(id) then why = 'LEASELOST' end
  end
  local first = at
  for _ = 1, sends do
    local to = tonumber(ARGV[at])
    local no = why_not(to, string.sub(ARGV[4], (to + 1) / 3, (to + 1) / 3))
    if no and not (no == 'UNROUTABLE' and (moves or ARGV[at + 1] ~= '')) then why = why or no end
    at = at + 3 + ARGV[at + 2]
  end
  if why then bad[#bad + 1] = i; bad[#bad + 1] = why
  else
    at = first
    for _ = 1, sends do
      local to, n = tonumber(ARGV[at]), ARGV[at + 2]
      if not known[to] or ARGV[at + 1] ~= '' then put(to, ARGV[at + 1], at + 3, at + 2 + n) end
      at = at + 3 + n
    end
    if moves then
      redis.call('XACK', KEYS[1], ARGV[1], id)
      if ARGV[3] == '1' then redis.call('XDEL', KEYS[1], id) end
    end
  end
  i = i + 1
end
return bad
"""
)

# KEYS: stream. ARGV: group, consumer, '1' to delete, '1' to look at the owner, ids. -> indices of those that are not the caller's
SETTLE = Script(
    _MINE
    + """
local lost, done = {}, {}
for i = 5, #ARGV do
  if (ARGV[4] == '1' and not mine(ARGV[i])) or redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 0 then lost[#lost + 1] = i - 5
  else done[#done + 1] = ARGV[i] end
end
if ARGV[3] == '1' and #done > 0 then redis.call('XDEL', KEYS[1], unpack(done)) end
return lost
"""
)

# KEYS: stream. ARGV: group, consumer, how many deliveries to take back, -, ids. The idle time starts anew. -> as SETTLE
HOLD = Script(
    _MINE
    + """
local lost = {}
for i = 5, #ARGV do
  local count = mine(ARGV[i])
  if not count then lost[#lost + 1] = i - 5
  else redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'RETRYCOUNT', math.max(0, count - ARGV[3]), 'JUSTID') end
end
return lost
"""
)

# KEYS: streams, first come first served. ARGV: group, consumer, limit. -> stream's index, entry, index, entry ...
READ = Script(
    """
local found, left = {}, tonumber(ARGV[3])
for k, key in ipairs(KEYS) do
  if left > 0 then
    local got = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', left, 'STREAMS', key, '>')
    if got then
      for _, entry in ipairs(got[1][2]) do found[#found + 1] = k - 1; found[#found + 1] = entry end
      left = left - #got[1][2]
    end
  end
end
return found
"""
)

# Takes over what was held for too long. KEYS: streams. ARGV: group, consumer, idle ms, limit.
# -> {stream's index, entry, deliveries, index ...}, number of entries that were deleted while they were held
CLAIM = Script(
    """
local found, gone, left = {}, 0, tonumber(ARGV[4])
for k, key in ipairs(KEYS) do
  local cursor = '0-0'
  while left > 0 and cursor do
    local got = redis.call('XAUTOCLAIM', key, ARGV[1], ARGV[2], ARGV[3], cursor, 'COUNT', left)
    for _, entry in ipairs(got[2]) do
      local p = redis.call('XPENDING', key, ARGV[1], entry[1], entry[1], 1)
      found[#found + 1] = k - 1; found[#found + 1] = entry; found[#found + 1] = p[1][4]
    end
    left = left - #got[2]
    gone = gone + #got[3]
    cursor = got[1] ~= '0-0' and got[1]
  end
end
return {found, gone}
"""
)

# Lets the caller take over at once what lost connections of its process held and, of an ordered place, have the work: whoever
# holds the key has it, and all that others hold. KEYS: the key, streams. ARGV: group, consumer, lease ms, '1' of an ordered place,
# the consumers of those connections. -> 0 another has the work, 1 the caller still has it, 2 has it from now on
TAKE = Script(
    """
local over, got, owner = {}, 0, redis.call('GET', KEYS[1])
for n = 5, #ARGV do over[ARGV[n]] = true end
if ARGV[4] == '1' and (not owner or owner == ARGV[2] or over[owner]) then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  got = owner == ARGV[2] and 1 or 2
end
for k = 2, (got == 2 or #ARGV > 4) and #KEYS or 1 do
  for _, p in ipairs(redis.call('XPENDING', KEYS[k], ARGV[1], '-', '+', 10000)) do
    if got == 2 or over[p[2]] then
      redis.call('XCLAIM', KEYS[k], ARGV[1], p[2], 0, p[1], 'IDLE', ARGV[3], 'RETRYCOUNT', p[4], 'JUSTID')
    end
  end
end
return got
"""
)

# Housekeeping, by any consumer. KEYS: delayed set, its messages, streams of the topic (none: a queue).
# ARGV: retention ms, prefix of private groups, ms after which a private group is dead. -> ms until the next is due, -1: none waits
KEEP = Script(
    _LIB
    + """
local time = now()
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', time, 'LIMIT', 0, 1000)) do
  local packed = redis.call('HGET', KEYS[2], member)
  if packed then
    local message = cmsgpack.unpack(packed)
    redis.call('XADD', message[1], unpack(message, 2))
    redis.call('HDEL', KEYS[2], member)
  end
  redis.call('ZREM', KEYS[1], member)
end
for k = 3, #KEYS do
  local floor
  if redis.call('TYPE', KEYS[k]).ok == 'stream' then
    for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[k])) do
      local group = map(flat)
      local dead = string.sub(group.name, 1, #ARGV[2]) == ARGV[2]
      if dead then
        for _, one in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[k], group.name)) do
          dead = dead and map(one).idle > tonumber(ARGV[3])
        end
      end
      if dead then redis.call('XGROUP', 'DESTROY', KEYS[k], group.name)
      else
        local id = group['last-delivered-id']
        if group.pending > 0 then id = redis.call('XPENDING', KEYS[k], group.name)[2] end
        if not floor or less(id, floor) then floor = id end
      end
    end
  end
  if floor then
    local kept = string.format('%.0f-0', time - ARGV[1])
    redis.call('XTRIM', KEYS[k], 'MINID', (ARGV[1] ~= '0' and less(kept, floor)) and kept or floor)
  end
end
local due = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return due[2] and math.max(0, due[2] - time) or -1
"""
)

# Takes away the consumers that hold nothing and were not seen for so long, or the caller, who also gives up the work.
# KEYS: the key of TAKE, streams. ARGV: group, consumer, ms (0: the caller).
TIDY = Script(
    _LIB
    + """
local leaves = ARGV[3] == '0'
if leaves and redis.call('GET', KEYS[1]) == ARGV[2] then redis.call('DEL', KEYS[1]) end
for k = 2, #KEYS do
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[k], ARGV[1])) do
    local one = map(flat)
    if one.pending == 0 and (leaves and one.name == ARGV[2] or not leaves and one.idle > tonumber(ARGV[3])) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[k], ARGV[1], one.name)
    end
  end
end
return 0
"""
)

# KEYS: stream. ARGV: group ('' for none), where it starts, its first consumer ('' for none), ms until the stream expires (0: never).
# -> 1 if something was made
MAKE = Script(
    _LIB
    + """
local group, made = ARGV[1], 0
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('XGROUP', 'CREATE', KEYS[1], 'unibus', '0', 'MKSTREAM')
  redis.call('XGROUP', 'DESTROY', KEYS[1], 'unibus')
  redis.pcall('XCFGSET', KEYS[1], 'IDMP-MAXSIZE', 2048)   -- all that one process has on its way; before 8.6 unknown, and not needed
  made = 1
end
if group ~= '' and not group_of(KEYS[1], group) then
  local read = -1   -- unknown; said where it is known, since the server counts the lag from it
  if ARGV[2] == '$' then read = map(redis.call('XINFO', 'STREAM', KEYS[1]))['entries-added'] end
  redis.call('XGROUP', 'CREATE', KEYS[1], group, ARGV[2], 'ENTRIESREAD', read)
  made = 1
end
if ARGV[3] ~= '' then redis.call('XGROUP', 'CREATECONSUMER', KEYS[1], group, ARGV[3]) end
if ARGV[4] ~= '0' then redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
return made
"""
)

# KEYS: streams. ARGV: group, lease ms, '1' for each stream that loses what is settled. A lease that is over counts as waiting.
# -> {ready, held, ms since the oldest that waits was sent or -1, 1 if ready is exact}
BACKLOG = Script(
    _LIB
    + """
local ready, held, oldest, exact = 0, 0, nil, 1
for k, key in ipairs(KEYS) do
  local group = group_of(key, ARGV[1])
  if not group then return redis.error_reply('NOGROUP ' .. key .. ' has no group ' .. ARGV[1]) end
  local waiting = group.lag
  if string.sub(ARGV[3], k, k) == '1' then waiting = redis.call('XLEN', key) - group.pending
  elseif not waiting then waiting = redis.call('XLEN', key); exact = 0 end
  local first = redis.call('XRANGE', key, '(' .. group['last-delivered-id'], '+', 'COUNT', 1)[1]
  local over = redis.call('XPENDING', key, ARGV[1], 'IDLE', ARGV[2], '-', '+', 10000)
  ready = ready + waiting + #over
  held = held + group.pending - #over
  for _, id in ipairs({first and first[1] or '', over[1] and over[1][1] or ''}) do
    local ms = tonumber(string.match(id, '^%d+'))
    if ms and (not oldest or ms < oldest) then oldest = ms end
  end
end
return {ready, held, oldest and math.max(0, now() - oldest) or -1, exact}
"""
)

# What waits, untouched. KEYS: stream. ARGV: group, lease ms, after which id, how many to look at.
# -> {id to go on after ('' at the end), entries}
LOOK = Script(
    _LIB
    + """
local group = group_of(KEYS[1], ARGV[1])
if not group then return redis.error_reply('NOGROUP ' .. KEYS[1] .. ' has no group ' .. ARGV[1]) end
local found, at = {}, ''
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. ARGV[3], '+', 'COUNT', ARGV[4])) do
  at = entry[1]
  local held = redis.call('XPENDING', KEYS[1], ARGV[1], at, at, 1)[1]
  if held and held[3] >= tonumber(ARGV[2]) or not held and less(group['last-delivered-id'], at) then
    found[#found + 1] = entry
  end
end
return {at, found}
"""
)

# What waits for its time, by name. KEYS: delayed set, its messages. ARGV: '1' to hold them, '0' to take them away; lease ms; members.
# Held, they do not fall due before the lease ends. -> of those that are still there: member, words of the message, member ...
EARLY = Script(
    _LIB
    + """
local found, floor = {}, string.format('%.0f', now() + ARGV[2])
for i = 3, #ARGV do
  local packed = redis.call('HGET', KEYS[2], ARGV[i])
  if packed then
    found[#found + 1] = ARGV[i]; found[#found + 1] = cmsgpack.unpack(packed)
    if ARGV[1] == '1' then redis.call('ZADD', KEYS[1], 'XX', 'GT', floor, ARGV[i])
    else redis.call('HDEL', KEYS[2], ARGV[i]); redis.call('ZREM', KEYS[1], ARGV[i]) end
  end
end
return found
"""
)

ALL = (PUT, SETTLE, HOLD, READ, CLAIM, TAKE, KEEP, TIDY, MAKE, BACKLOG, LOOK, EARLY)
