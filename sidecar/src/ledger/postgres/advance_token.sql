-- Moves the token to at least now, if the database has another identity than the one it was last checked against: a restore or
-- a promotion may have lost tokens that were issued (S2).
--
-- In:  the identity.
-- Out: a row if the token was moved; none: the identity is the one that is known.
-- Why it is safe: one statement. The row's lock lets one session move it: whoever waited for that finds the identity that it
--      brings already there. Always forward, by a million at least, so that neither a clock that stands behind nor what other
--      sessions draw meanwhile can make it issue a token twice.
-- Index: the primary key of oncegate_meta.
with changed as (
    update oncegate_meta set value = $1 where key = 'database_identity' and value <> $1
    returning nextval('oncegate_fencing_token') as token,
        (extract(epoch from clock_timestamp()) * 1000000)::bigint + 1000000 as floor
)
select setval('oncegate_fencing_token', greatest(floor, token + 1000000)) from changed
