-- The one statement by which an event changes: grant, burial, mark, extension, resolution (S1).
--
-- In:  row, state and token as they were read, and every column that a transition may change as it is to be.
-- Out: one changed row. None means that somebody else wrote between reading and writing, which an immediate transaction
--      rules out: the caller treats it as a defect and rolls back.
-- Index: the primary key; moves the entry in _processing. What duplicates counted is not touched.
update payment_webhook_events set
    state = ?4,
    attempt_count = ?5,
    attempts_forgiven = ?6,
    fencing_token = ?7,
    update_time = ?8,
    end_time = ?9,
    retry_time = ?10,
    claim_id = ?11,
    holder = ?12,
    start_time = ?13,
    lock_expire_time = ?14,
    outcome = ?15,
    payload_digest = ?16,
    fingerprint = ?17,
    last_error = ?18,
    result_code = ?19,
    result_content_type = ?20,
    result_body = ?21,
    completion_metadata = ?22
where id = ?1 and state = ?2 and fencing_token = ?3
