"""The whole life of an event, by a client that protoc made from the contract: the argument is the sidecar's address."""

import hashlib
import sys
import time
import uuid

import grpc
from google.protobuf import duration_pb2, struct_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from oncegate.v1 import idempotency_pb2 as pb
from oncegate.v1 import idempotency_pb2_grpc as rpc

TIMEOUT = 10


def seconds(value):
    return duration_pb2.Duration(seconds=value)


def new_key():
    return pb.EventKey(provider="python", event_id=f"evt_{uuid.uuid4().hex}")


def lock(stub, key, **fields):
    fields.setdefault("event_type", "payment.succeeded")
    return stub.CheckAndLock(pb.CheckAndLockRequest(key=key, **fields), timeout=TIMEOUT)


def refused(call, code, reason):
    """Calls, expects an error with this code and reason, and returns its details by type name."""
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()}: {error.details()}"
        details = {}
        for packed in rpc_status.from_call(error).details:
            for message in (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            ):
                if packed.Unpack(message):
                    details.setdefault(message.DESCRIPTOR.name, []).append(message)
        (info,) = details["ErrorInfo"]
        assert (info.domain, info.reason) == ("oncegate.dev", reason), info
        return details
    raise AssertionError(f"not refused with {reason}")


def completed(stub):
    key = new_key()
    digest = hashlib.sha256(b"the payload").digest()
    metadata = struct_pb2.Struct()
    metadata.update({"order": "4711"})
    claim_id = str(uuid.uuid4())
    granted = lock(
        stub,
        key,
        claim_id=claim_id,
        holder="python",
        lock_duration=seconds(30),
        payload_digest=digest,
        metadata=metadata,
    )
    assert granted.decision == pb.DECISION_ACQUIRED, granted
    assert granted.lock.attempt == 1 and granted.lock.claim_id == claim_id, granted
    assert 25 < granted.lock.remaining_duration.seconds <= 30, granted
    assert granted.event.state == pb.STATE_PROCESSING and granted.event.key.tenant == "default", granted
    token = granted.lock.fencing_token

    again = lock(stub, key, claim_id=claim_id)
    assert again.decision == pb.DECISION_ACQUIRED, "the same claim_id gets the same lock"
    assert again.lock.fencing_token == token and again.lock.attempt == 1, again

    other = lock(stub, key, claim_id=str(uuid.uuid4()))
    assert other.decision == pb.DECISION_IN_PROGRESS, other
    assert other.retry_after.ToMilliseconds() > 0, other

    extended = stub.ExtendLock(
        pb.ExtendLockRequest(key=key, fencing_token=token, lock_duration=seconds(120), claim_id=claim_id),
        timeout=TIMEOUT,
    )
    assert 100 < extended.lock.remaining_duration.seconds <= 120, extended
    assert extended.lock.fencing_token == token, extended

    details = refused(
        lambda: stub.MarkCompleted(pb.MarkCompletedRequest(key=key, fencing_token=token - 1), timeout=TIMEOUT),
        grpc.StatusCode.ABORTED,
        "LOCK_LOST",
    )
    assert details["ErrorInfo"][0].metadata["fencing_token"] == str(token), details
    assert details["ErrorInfo"][0].metadata["state"], details

    done = pb.MarkCompletedRequest(
        key=key, fencing_token=token, result=pb.Result(code=200, body=b"booked", content_type="text/plain")
    )
    first = stub.MarkCompleted(done, timeout=TIMEOUT)
    assert first.event.state == pb.STATE_COMPLETED and not first.repeated, first
    assert stub.MarkCompleted(done, timeout=TIMEOUT).repeated, "a lost reply costs nothing"

    duplicate = lock(stub, key)
    assert duplicate.decision == pb.DECISION_ALREADY_COMPLETED, duplicate
    assert (duplicate.result.code, duplicate.result.body) == (200, b"booked"), duplicate

    refused(
        lambda: stub.MarkFailed(pb.MarkFailedRequest(key=key, fencing_token=token), timeout=TIMEOUT),
        grpc.StatusCode.FAILED_PRECONDITION,
        "OUTCOME_CONFLICT",
    )
    refused(lambda: lock(stub, key, claim_id=claim_id), grpc.StatusCode.FAILED_PRECONDITION, "CLAIM_ENDED")

    (history,) = stub.History(pb.HistoryRequest(key=key), timeout=TIMEOUT).events
    assert history.event.state == pb.STATE_COMPLETED and history.event.attempt_count == 1, history
    assert history.event.metadata["order"] == "4711", history
    (attempt,) = history.attempts
    assert attempt.outcome == pb.OUTCOME_COMPLETED and attempt.payload_digest == digest, attempt
    assert attempt.holder == "python" and attempt.fencing_token == token, attempt
    return token


def failed_then_completed(stub, earlier_token):
    key = new_key()
    first = lock(stub, key)
    assert first.lock.fencing_token > earlier_token, "tokens grow"
    failed = stub.MarkFailed(
        pb.MarkFailedRequest(
            key=key,
            fencing_token=first.lock.fencing_token,
            kind=pb.FAILURE_KIND_RETRYABLE,
            error="the bank did not answer",
            retry_after=duration_pb2.Duration(nanos=300_000_000),
        ),
        timeout=TIMEOUT,
    )
    assert failed.event.state == pb.STATE_FAILED and failed.event.last_error == "the bank did not answer", failed
    paused = lock(stub, key)
    assert paused.decision == pb.DECISION_IN_PROGRESS, paused
    waited = lock(stub, key, wait_duration=seconds(5))
    assert waited.decision == pb.DECISION_ACQUIRED and waited.lock.attempt == 2, waited
    assert waited.lock.fencing_token > first.lock.fencing_token, waited
    stub.MarkCompleted(
        pb.MarkCompletedRequest(key=key, fencing_token=waited.lock.fencing_token), timeout=TIMEOUT
    )
    (history,) = stub.History(pb.HistoryRequest(key=key), timeout=TIMEOUT).events
    outcomes = [attempt.outcome for attempt in history.attempts]
    assert outcomes == [pb.OUTCOME_FAILED_RETRYABLE, pb.OUTCOME_COMPLETED], history


def held_then_resolved(stub):
    key = new_key()
    token = lock(stub, key).lock.fencing_token
    unknown = stub.MarkFailed(
        pb.MarkFailedRequest(key=key, fencing_token=token, kind=pb.FAILURE_KIND_UNKNOWN), timeout=TIMEOUT
    )
    assert unknown.event.state == pb.STATE_UNKNOWN, unknown
    assert lock(stub, key).decision == pb.DECISION_REFUSED
    resolved = stub.Resolve(
        pb.ResolveRequest(
            key=key, fencing_token=token, to=pb.STATE_PENDING, reason="the bank has no such payment", actor="python"
        ),
        timeout=TIMEOUT,
    )
    assert resolved.event.state == pb.STATE_PENDING and resolved.event.fencing_token > token, resolved
    again = lock(stub, key)
    assert again.decision == pb.DECISION_ACQUIRED and again.lock.attempt == 2, again
    stub.MarkCompleted(pb.MarkCompletedRequest(key=key, fencing_token=again.lock.fencing_token), timeout=TIMEOUT)


def misuse(stub):
    details = refused(
        lambda: lock(stub, pb.EventKey(), event_type=""), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"
    )
    fields = {violation.field for violation in details["BadRequest"][0].field_violations}
    assert {"key.provider", "key.event_id", "event_type"} <= fields, "all violations at once: " + repr(fields)
    refused(
        lambda: stub.ExtendLock(pb.ExtendLockRequest(key=new_key(), fencing_token=1), timeout=TIMEOUT),
        grpc.StatusCode.NOT_FOUND,
        "EVENT_NOT_FOUND",
    )


def operators(stub):
    page = stub.History(pb.HistoryRequest(provider="python", page_size=2), timeout=TIMEOUT)
    assert len(page.events) == 2 and page.next_page_token, page
    rest = stub.History(
        pb.HistoryRequest(provider="python", page_size=2, page_token=page.next_page_token), timeout=TIMEOUT
    )
    seen = [entry.event.key.event_id for entry in [*page.events, *rest.events]]
    assert len(seen) == len(set(seen)) == 3, seen

    # Counts are kept in memory for up to a second.
    deadline = time.monotonic() + 20
    while True:
        stats = stub.Stats(pb.StatsRequest(provider="python"), timeout=TIMEOUT)
        states = {count.state: count.count for count in stats.total.states if count.count}
        if stats.total.duplicates >= 4:
            break
        assert time.monotonic() < deadline, stats
        time.sleep(0.1)
    assert stats.total.total == 3 and states == {pb.STATE_COMPLETED: 3}, stats
    assert stats.total.retries == 2, stats
    assert [counts.provider for counts in stats.providers] == ["python"], stats

    progress = list(
        stub.Cleanup(
            pb.CleanupRequest(provider="python", older_than=seconds(30 * 86400), dry_run=True), timeout=TIMEOUT
        )
    )
    assert progress[-1].done and not any(message.done for message in progress[:-1]), progress
    assert (progress[-1].matched_count, progress[-1].deleted_count) == (0, 0), progress


def main(address):
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=TIMEOUT)
        stub = rpc.IdempotencyServiceStub(channel)
        token = completed(stub)
        failed_then_completed(stub, token)
        held_then_resolved(stub)
        misuse(stub)
        operators(stub)
    print("the whole life of an event: ok")


if __name__ == "__main__":
    main(sys.argv[1])
