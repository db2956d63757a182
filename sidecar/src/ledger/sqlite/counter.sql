-- Keeps the last token given out and the clock: once a transaction, before its commit (S2).
--
-- In:  token, time. Never lowers either.
update oncegate_counter set fencing_token = max(fencing_token, ?1), clock_time = max(clock_time, ?2) where id = 1
