\set n random(1, 9000000000000000000)
insert into events (provider, event_id, event_type, status, locked_at, metadata) values ('stripe', 'evt_' || :n, 'payment_intent.succeeded', 'processing', now(), '{"amount": "4200", "currency": "eur"}') on conflict do nothing;
update events set status = 'completed', completed_at = now() where provider = 'stripe' and event_id = 'evt_' || :n;
