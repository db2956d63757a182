//! The parts that do no I/O: what each costs a call, on one core. `cargo bench -p oncegate-bench`.

#![allow(missing_docs, reason = "Criterion's macros write functions without")]

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use futures::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue};
use oncegate_api::v1;
use oncegate_e2e::{signers, stripe as stripe_signer};
use oncegate_gateway::{
    providers::{
        Provider,
        flutterwave::{Flutterwave, Version},
        paystack::Paystack,
        standard_webhooks::StandardWebhooks,
        stripe::Stripe,
    },
    verify::{Case, Values},
};
use oncegate_runtime::secret::Secret;
use oncegate_sidecar::{
    cache::entry::{Codec, Entry},
    config::Policy,
    event::{Claim, Event, KeyDigest, Mark, RowId, State, Time, transition},
    grpc::validate,
    ledger::Standing,
};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const TOLERANCE: Duration = Duration::from_secs(300);

/// An event of about 2 KiB that every provider's key can be found in.
fn body() -> Bytes {
    let padding = "a".repeat(1_600);
    serde_json::json!({
        "id": "evt_1PgafyLkdIwHu7ix2XMzWMvK",
        "object": "event",
        "type": "payment_intent.succeeded",
        "event": "charge.success",
        "event_type": "PAYMENT.CAPTURE.COMPLETED",
        "data": { "id": 4_200_000_001_u64, "status": "successful", "reference": "ref_0001", "description": padding },
    })
    .to_string()
    .into()
}

fn headers(of: Vec<(&'static str, String)>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in of {
        let value = HeaderValue::try_from(value).expect("a signature is a header's value");
        headers.insert(HeaderName::from_static(name), value);
    }
    headers
}

fn providers(criterion: &mut Criterion) {
    let body = body();
    let secrets = [Secret::new(SECRET).expect("it is a secret")];
    let standard = StandardWebhooks::new(&secrets, TOLERANCE).expect("the secret is a key");
    let all = [
        (
            "",
            Provider::Stripe(Stripe::new(&secrets, TOLERANCE)),
            vec![(stripe_signer::HEADER, stripe_signer::sign(SECRET, &body))],
        ),
        ("", Provider::Paystack(Paystack::new(&secrets)), signers::paystack(SECRET, &body)),
        ("", Provider::Flutterwave(Flutterwave::new(&secrets, Version::V4)), signers::flutterwave_v4(SECRET, &body)),
        ("-v3", Provider::Flutterwave(Flutterwave::new(&secrets, Version::V3)), signers::flutterwave_v3(SECRET)),
        ("", Provider::StandardWebhooks(standard), signers::standard_webhooks(SECRET, "msg_1", &body)),
    ];
    let now = SystemTime::now();
    for (version, provider, signed) in &all {
        let headers = headers(signed.clone());
        let verify = || {
            let verification = provider.begin(&headers).expect("the headers are whole");
            // Nothing is fetched: the answer is there at once.
            verification.finish(&body, now).now_or_never().expect("no I/O").expect("the signature is genuine")
        };
        let name = format!("{}{version}", provider.name());
        criterion.bench_function(&format!("verify/{name}"), |bench| bench.iter(|| black_box(verify())));
        let signed = verify();
        let identify = || provider.identify(&signed, &body, || [7; 32]).expect("the body names its event");
        criterion.bench_function(&format!("key/{name}"), |bench| bench.iter(|| black_box(identify())));
    }
}

/// PayPal's, as `oncegate verify` does it: the certificate is read from a directory and its chain is verified each time.
fn paypal(criterion: &mut Criterion) {
    const WEBHOOK_ID: &str = "8PT597110X687430LKGECATA";
    let body = body();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let root = directory.path().join("root.pem");
    let signer = signers::PayPal::new(WEBHOOK_ID).expect("a certificate");
    signer.write(directory.path(), &root).expect("a file");
    let case = Case {
        provider: "paypal".to_owned(),
        headers: signer
            .sign("b2384410-f8d2-11e4-8bf3-77339302725b", &body)
            .expect("a signature")
            .into_iter()
            .map(|(name, value)| (name.to_owned(), Values::One(value)))
            .collect(),
        body_base64: STANDARD.encode(&body),
        now_unix: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        webhook_id: Some(WEBHOOK_ID.into()),
        cert_dir: Some(directory.path().to_owned()),
        trust_anchors_pem: Some(std::fs::read_to_string(&root).expect("the root")),
        ..Case::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let verdict = runtime.block_on(case.verify()).verdict;
    assert_eq!(verdict, "valid");
    criterion.bench_function("verify/paypal, with its certificate", |bench| {
        bench.iter(|| runtime.block_on(case.verify()));
    });
}

fn check_and_lock() -> v1::CheckAndLockRequest {
    v1::CheckAndLockRequest {
        key: Some(v1::EventKey {
            tenant: "default".into(),
            provider: "stripe".into(),
            event_id: "evt_1PgafyLkdIwHu7ix2XMzWMvK".into(),
        }),
        event_type: "payment_intent.succeeded".into(),
        claim_id: "0198c1de-35bb-7e9c-9d3c-3f7a8f0f4d1b".into(),
        holder: "gateway-7d9c5b7f5-x2x2x".into(),
        lock_duration: Some(prost_types::Duration { seconds: 300, nanos: 0 }),
        payload_digest: Bytes::from_static(&[7; 32]),
        ..v1::CheckAndLockRequest::default()
    }
}

fn mark_completed() -> v1::MarkCompletedRequest {
    v1::MarkCompletedRequest {
        key: check_and_lock().key,
        fencing_token: 1_764_000_000_000_001,
        result: Some(v1::Result { code: 200, body: Bytes::from_static(b"booked"), content_type: "text/plain".into() }),
        claim_id: check_and_lock().claim_id,
        metadata: None,
    }
}

fn claim() -> Claim {
    validate::check_and_lock(check_and_lock(), &Policy::default()).expect("the request is valid").0
}

fn mark() -> Mark {
    validate::mark_completed(mark_completed(), &Policy::default()).expect("the request is valid").0
}

fn requests(criterion: &mut Criterion) {
    let policy = Policy::default();
    criterion.bench_function("validate/check_and_lock", |bench| {
        bench.iter_batched(check_and_lock, |request| validate::check_and_lock(request, &policy), BatchSize::SmallInput);
    });
    criterion.bench_function("validate/mark_completed", |bench| {
        bench.iter_batched(mark_completed, |request| validate::mark_completed(request, &policy), BatchSize::SmallInput);
    });
}

/// An event that was granted and completed.
fn completed() -> Event {
    let mut event = Event::inserted(&claim(), RowId(1), mark().fencing_token, Time(1_764_000_000_000_000));
    event.state = State::Completed;
    event.end_time = Some(event.update_time);
    event.result = mark().result;
    event
}

fn cache(criterion: &mut Criterion) {
    let standing =
        Standing { identity: Arc::from("7300000000000000000-1-16384"), generation: 1, cache_key: Arc::from([7; 32]) };
    let codec = Codec::new(&standing);
    let event = completed();
    let digest = KeyDigest::of(&event.key);
    let entry = Entry::completed(&event).expect("its result is small");
    let value = codec.encode(digest, &entry);
    assert_eq!(codec.decode(digest, &value).as_ref(), Ok(&entry));
    criterion.bench_function("cache/key digest", |bench| bench.iter(|| KeyDigest::of(black_box(&event.key))));
    criterion.bench_function("cache/name", |bench| bench.iter(|| codec.name(black_box(digest))));
    criterion.bench_function("cache/encode", |bench| bench.iter(|| codec.encode(digest, black_box(&entry))));
    criterion.bench_function("cache/decode", |bench| bench.iter(|| codec.decode(digest, black_box(&value))));
}

fn transitions(criterion: &mut Criterion) {
    let (claim, mark) = (claim(), mark());
    let running = Event::inserted(&claim, RowId(1), mark.fencing_token, Time(1_764_000_000_000_000));
    let other = Claim { claim_id: "another".into(), ..claim.clone() };
    let done = completed();
    let now = Time(1_764_000_000_000_001);
    for (name, event, claim) in
        [("new", None, &claim), ("in progress", Some(&running), &other), ("completed", Some(&done), &other)]
    {
        criterion.bench_function(&format!("transition/claim, {name}"), |bench| {
            bench.iter(|| transition::claim(black_box(event), false, black_box(claim), now));
        });
    }
    criterion.bench_function("transition/mark", |bench| {
        bench.iter(|| transition::mark(black_box(Some(&running)), None, black_box(&mark)));
    });
}

criterion_group!(pure, providers, paypal, requests, cache, transitions);
criterion_main!(pure);
