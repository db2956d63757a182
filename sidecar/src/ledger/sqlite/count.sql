-- Adds to the counts of one tenant, provider and hour: what a whole transaction changed there, written once (L5).
--
-- In:  the three, then what to add (or take away). Index: the primary key.
insert into payment_webhook_counts (
    tenant, provider, hour, pending, processing, completed, failed, unknown, dead, duplicates, retries
) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
on conflict (tenant, provider, hour) do update set
    pending = pending + excluded.pending,
    processing = processing + excluded.processing,
    completed = completed + excluded.completed,
    failed = failed + excluded.failed,
    unknown = unknown + excluded.unknown,
    dead = dead + excluded.dead,
    duplicates = duplicates + excluded.duplicates,
    retries = retries + excluded.retries
