-- Records what an operator decided, in the transaction that does it. Index: adds to the primary key.
insert into payment_webhook_resolutions (
    event_row, fencing_token, from_fencing_token, from_state, to_state, reason, actor, time
) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
