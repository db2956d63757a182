"""Processes a payment event once, however often it is delivered."""

import socket
import sys
import uuid

import grpc
from oncegate.v1 import idempotency_pb2 as pb
from oncegate.v1 import idempotency_pb2_grpc as rpc


def process_once(oncegate, key, event_type, work):
    """Calls work(fencing_token) unless that has been done; returns its result, from now or from then."""
    answer = oncegate.CheckAndLock(
        pb.CheckAndLockRequest(
            key=key,
            event_type=event_type,
            # One for each attempt. Repeated with it, after a lost reply, the call gets the same lock.
            claim_id=str(uuid.uuid4()),
            holder=socket.gethostname(),
        ),
        timeout=5,
    )
    if answer.decision == pb.DECISION_ALREADY_COMPLETED:
        return answer.result.body
    if answer.decision != pb.DECISION_ACQUIRED:
        # Somebody else is at it, or an operator has to decide. Answer with an error: the provider will try again.
        raise RuntimeError(f"not now: {pb.Decision.Name(answer.decision)}")

    lock = {"key": key, "fencing_token": answer.lock.fencing_token, "claim_id": answer.lock.claim_id}
    try:
        body = work(answer.lock.fencing_token)
    except Exception as error:
        oncegate.MarkFailed(pb.MarkFailedRequest(error=type(error).__name__, **lock), timeout=5)
        raise
    oncegate.MarkCompleted(pb.MarkCompletedRequest(result=pb.Result(code=200, body=body), **lock), timeout=5)
    return body


def book_the_payment(fencing_token):
    # In your database, make the event id a unique key of the booking, or refuse a token smaller than the row's:
    # then the effect happens once, even if this process hangs here until its lock has expired.
    print(f"booking the payment, fencing token {fencing_token}")
    return b"booked"


def main(address, event_id):
    with grpc.insecure_channel(address) as channel:
        oncegate = rpc.IdempotencyServiceStub(channel)
        key = pb.EventKey(provider="stripe", event_id=event_id)
        for _ in range(2):
            body = process_once(oncegate, key, "payment_intent.succeeded", book_the_payment)
            print(f"result: {body.decode()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
