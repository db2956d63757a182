-- Which versions of the program may work on this schema: those that know this migration or a later one. A version that is
-- older than the schema reads it at start, so that during a roll-out, and on the way back from one, both are at work. Every
-- migration from here on says it anew: as it was, where the version before can live with the change; its own number, where
-- it cannot (what that version reads or writes is gone, or has to be written in another way).
insert into oncegate_meta (key, value) values ('schema_compatible_from', '2');
