-- What one would write by hand: one row an event, its status in no index, so that updates can stay heap-only.
create table events (
    id           bigint generated always as identity primary key,
    provider     text        not null,
    event_id     text        not null,
    event_type   text        not null,
    status       text        not null,
    locked_at    timestamptz not null,
    completed_at timestamptz,
    metadata     jsonb,
    unique (provider, event_id)
) with (fillfactor = 45);
