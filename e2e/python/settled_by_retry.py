"""A client with the shipped service config: grpc itself repeats what is worth it.

Arguments: the target, what to do (`unavailable`, `restart` or `balance`), and for TLS a file with the authority and one with
a token. With `restart`, a line on standard input says that the sidecar was started again. With `balance` the target has
several addresses, and a hundred events are processed.
"""

import pathlib
import sys
import uuid

import grpc
from oncegate.v1 import idempotency_pb2 as pb
from oncegate.v1 import idempotency_pb2_grpc as rpc

CONFIG = pathlib.Path(__file__).parents[2] / "proto/oncegate/v1/service_config.json"


def open_channel(target, ca, token):
    options = [("grpc.service_config", CONFIG.read_text()), ("grpc.enable_retries", 1)]
    if "," in target:
        # A list is no name that could be sent as one.
        options.append(("grpc.default_authority", "sidecar"))
    if ca is None:
        return grpc.insecure_channel(target, options)
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(pathlib.Path(ca).read_bytes()),
        grpc.access_token_call_credentials(pathlib.Path(token).read_text().strip()),
    )
    return grpc.secure_channel(target, credentials, options)


def process(stub):
    key = pb.EventKey(provider="python", event_id=f"evt_{uuid.uuid4().hex}")
    # No time-outs here: they come from the service config. The claim id makes a repeated call the same call.
    claim = pb.CheckAndLockRequest(key=key, event_type="payment.succeeded", claim_id=str(uuid.uuid4()))
    granted = stub.CheckAndLock(claim)
    assert granted.decision == pb.DECISION_ACQUIRED and granted.lock.attempt == 1, granted
    mark = pb.MarkCompletedRequest(key=key, fencing_token=granted.lock.fencing_token, claim_id=claim.claim_id)
    assert stub.MarkCompleted(mark).event.state == pb.STATE_COMPLETED


def main(target, mode, ca=None, token=None):
    with open_channel(target, ca, token) as channel:
        stub = rpc.IdempotencyServiceStub(channel)
        for _ in range(100 if mode == "balance" else 1):
            process(stub)
        if mode == "restart":
            print("ready", flush=True)
            # The sidecar goes away and comes back meanwhile.
            sys.stdin.readline()
            process(stub)
    print("settled")


if __name__ == "__main__":
    main(*sys.argv[1:])
