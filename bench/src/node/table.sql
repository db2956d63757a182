create table payment_webhook_events (
    id           bigserial primary key,
    event_id     varchar(255) not null,
    provider     varchar(50)  not null,
    event_type   varchar(100) not null,
    status       varchar(20)  not null,
    created_at   timestamptz  not null default now(),
    updated_at   timestamptz  not null default now(),
    processed_at timestamptz,
    unique (provider, event_id)
);
create index on payment_webhook_events (status);
create index on payment_webhook_events (created_at);
create index on payment_webhook_events (provider, status);
