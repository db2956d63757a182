"""Processes a payment event once, however often it is delivered."""

import pathlib
import socket
import sys
import uuid

import grpc
from oncegate.v1 import idempotency_pb2 as pb
from oncegate.v1 import idempotency_pb2_grpc as rpc

# Has grpc wait for a connection, repeat UNAVAILABLE, and share the calls among several sidecars.
SERVICE_CONFIG = pathlib.Path(__file__).parents[2] / "proto/oncegate/v1/service_config.json"
# Seconds: more than wait_duration, where one is asked for. Twice as many are fewer than your own caller waits.
TIMEOUT = 5


def settled(call, request):
    """The answer to a call. Whether one whose deadline passed has happened, nobody knows: it is repeated as it is."""
    try:
        return call(request, timeout=TIMEOUT)
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        return call(request, timeout=TIMEOUT)


def process_once(oncegate, key, event_type, work):
    """Calls work(fencing_token) unless that has been done; returns its result, from now or from then."""
    # One for each attempt, made before the call: whoever repeats it with the same one gets the same lock.
    claim_id = str(uuid.uuid4())
    claim = pb.CheckAndLockRequest(key=key, event_type=event_type, claim_id=claim_id, holder=socket.gethostname())
    answer = settled(oncegate.CheckAndLock, claim)
    if answer.decision == pb.DECISION_ALREADY_COMPLETED:
        return answer.result.body
    if answer.decision != pb.DECISION_ACQUIRED:
        # Somebody else is at it, or an operator has to decide. Answer with an error: the provider will try again.
        raise RuntimeError(f"not now: {pb.Decision.Name(answer.decision)}")

    lock = {"key": key, "fencing_token": answer.lock.fencing_token, "claim_id": claim_id}
    try:
        body = work(answer.lock.fencing_token)
    except Exception as error:
        # RETRYABLE, where work that fails leaves nothing behind, or guards its effect as below. Where neither is so,
        # and it may have had its effect: UNKNOWN, and an operator decides. Where no attempt can succeed: TERMINAL.
        kind = pb.FAILURE_KIND_RETRYABLE
        settled(oncegate.MarkFailed, pb.MarkFailedRequest(kind=kind, error=type(error).__name__, **lock))
        raise
    settled(oncegate.MarkCompleted, pb.MarkCompletedRequest(result=pb.Result(code=200, body=body), **lock))
    return body


def book_the_payment(fencing_token):
    # In your database, make the event id a unique key of the booking, or refuse a token smaller than the row's:
    # then the effect happens once, even if this process hangs here until its lock has expired.
    print(f"booking the payment, fencing token {fencing_token}")
    return b"booked"


def main(address, event_id):
    options = [("grpc.service_config", SERVICE_CONFIG.read_text())]
    with grpc.insecure_channel(address, options) as channel:
        oncegate = rpc.IdempotencyServiceStub(channel)
        key = pb.EventKey(provider="stripe", event_id=event_id)
        for _ in range(2):
            body = process_once(oncegate, key, "payment_intent.succeeded", book_the_payment)
            print(f"result: {body.decode()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
