use http::Uri;
use oncegate_runtime::secret::{Secret, SecretSource};

use super::*;
use crate::{
    config::{HeldStatus, InProgressStatus},
    enforcement::{Enforcement, Switch},
    providers::{
        Provider,
        standard_webhooks::StandardWebhooks,
        stripe::{Stripe, TOLERANCE},
    },
    route::{Application, Secrets},
    signing::Signer,
};

const POLICY: Policy = Policy {
    in_progress: InProgressStatus::Conflict,
    held: HeldStatus::Unprocessable,
    refusal: OnRefusal::Retryable,
    unclear: OnUnclear::Retryable,
};

fn route(signer: Option<Signer>) -> Route {
    Route {
        path: "/p".into(),
        tenant: "shop".into(),
        provider: Provider::Stripe(Stripe::new(&[], TOLERANCE)),
        secrets: Secrets { source: SecretSource::Value("x".into()), read: Vec::new() },
        application: Application {
            url: Uri::from_static("http://app:3000/hook?x=1"),
            signer,
            signer_secrets: None,
            timeout: Duration::from_secs(240),
            lock_duration: Duration::from_secs(300),
        },
        policy: POLICY,
        enforcement: Switch::new(Enforcement::Enforce),
    }
}

fn kind(reply: Reply, policy: Policy) -> Option<(FailureKind, bool)> {
    match Outcome::of(reply, policy, Duration::from_secs(240)) {
        Outcome::Completed { .. } => None,
        Outcome::Failed { kind, pause, .. } => Some((kind, pause)),
    }
}

#[test]
fn g5_the_status_line_decides() {
    let terminal = Policy { refusal: OnRefusal::Terminal, ..POLICY };
    for (codes, by_default, by_policy) in [
        (&[200, 201, 202, 204, 299][..], None, None),
        (
            &[408, 425, 429, 500, 502, 503, 504, 599],
            Some((FailureKind::Retryable, false)),
            Some((FailureKind::Retryable, false)),
        ),
        (
            &[300, 301, 302, 304, 307, 400, 401, 404, 409, 410, 422, 499],
            Some((FailureKind::Retryable, false)),
            Some((FailureKind::Terminal, false)),
        ),
        (&[101, 600, 999], Some((FailureKind::Retryable, false)), Some((FailureKind::Retryable, false))),
    ] {
        for code in codes {
            let reply = || Reply::Status(StatusCode::from_u16(*code).unwrap(), None);
            assert_eq!(kind(reply(), POLICY), by_default, "{code}");
            assert_eq!(kind(reply(), terminal), by_policy, "{code}");
        }
    }
}

#[test]
fn g5_without_a_status_line_it_depends_on_whether_the_application_may_be_at_work() {
    let unknown = Policy { unclear: OnUnclear::Unknown, ..POLICY };
    for (reply, by_default, by_policy) in [
        (Reply::NotSent, (FailureKind::Retryable, false), (FailureKind::Retryable, false)),
        (Reply::Lost, (FailureKind::Retryable, false), (FailureKind::Unknown, false)),
        (Reply::TimedOut, (FailureKind::Retryable, true), (FailureKind::Unknown, false)),
        (Reply::Stopped, (FailureKind::Retryable, true), (FailureKind::Unknown, false)),
    ] {
        assert_eq!(kind(reply.clone(), POLICY), Some(by_default), "{reply:?}");
        assert_eq!(kind(reply.clone(), unknown), Some(by_policy), "{reply:?}");
    }
}

#[test]
fn g7_only_what_is_named_goes_on_and_ours_replaces_theirs() {
    let identity = Identity { event_id: "evt_1".into(), event_type: "charge.succeeded".into() };
    let mut inbound = HeaderMap::new();
    for (name, value) in [
        ("content-type", "application/json; charset=utf-8"),
        ("stripe-signature", "t=1,v1=00"),
        ("idempotency-key", "forged"),
        ("oncegate-fencing-token", "9"),
        ("oncegate-anything", "forged"),
        ("traceparent", "00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-01"),
        ("webhook-signature", "v1,forged"),
        ("connection", "keep-alive, x-hop"),
        ("x-hop", "1"),
        ("transfer-encoding", "chunked"),
        ("cookie", "a=b"),
        ("authorization", "Bearer x"),
        ("x-forwarded-for", "1.2.3.4"),
        ("host", "public.example"),
    ] {
        inbound.append(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    let body = Bytes::from_static(b"{\"id\":\"evt_1\"}");
    let route = route(None);
    let parcel = Parcel {
        route: &route,
        identity: &identity,
        headers: &inbound,
        body: &body,
        timeout: route.application.timeout,
        hold: Some(Hold { attempt: 2, fencing_token: 77, remaining: Duration::from_millis(299_123) }),
    };
    let request = request(&parcel, SystemTime::now());
    assert_eq!(request.method(), Method::POST);
    assert_eq!(request.uri(), "http://app:3000/hook?x=1");
    let mut names: Vec<&str> = request.headers().keys().map(HeaderName::as_str).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "content-type",
            "idempotency-key",
            "oncegate-attempt",
            "oncegate-event-id",
            "oncegate-event-type",
            "oncegate-fencing-token",
            "oncegate-lock-remaining-ms",
            "oncegate-provider",
            "oncegate-tenant",
            "stripe-signature",
            "traceparent",
            "user-agent",
        ]
    );
    for (name, value) in [
        ("content-type", "application/json; charset=utf-8"),
        ("stripe-signature", "t=1,v1=00"),
        ("idempotency-key", "shop/stripe/evt_1"),
        ("oncegate-tenant", "shop"),
        ("oncegate-provider", "stripe"),
        ("oncegate-event-id", "evt_1"),
        ("oncegate-event-type", "charge.succeeded"),
        ("oncegate-attempt", "2"),
        ("oncegate-fencing-token", "77"),
        ("oncegate-lock-remaining-ms", "299123"),
    ] {
        let values: Vec<_> = request.headers().get_all(name).iter().collect();
        assert_eq!(values, [value], "{name}");
    }
    let trace = request.headers()["traceparent"].to_str().unwrap();
    assert_eq!(trace.len(), 55);
    assert!(trace.starts_with("00-") && !trace.contains("aaaaaaaaaaaaaaaa"), "{trace}");
}

#[test]
fn g7_a_configured_secret_signs_the_hop() {
    let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
    let signer = Signer::new(&[secret]).unwrap();
    let identity = Identity { event_id: "evt_1".into(), event_type: "t".into() };
    let body = Bytes::from_static(b"{}");
    let headers = HeaderMap::new();
    let route = route(Some(signer.clone()));
    let timeout = route.application.timeout;
    let parcel = Parcel { route: &route, identity: &identity, headers: &headers, body: &body, timeout, hold: None };
    let request = request(&parcel, UNIX_EPOCH + Duration::from_secs(1_770_000_000));
    assert_eq!(request.headers()["webhook-id"], "shop/stripe/evt_1");
    assert_eq!(request.headers()["webhook-timestamp"], "1770000000");
    // Without a lock the application is told so, and gets no token.
    assert_eq!(request.headers()["oncegate-enforcement"], "observe");
    assert!(!request.headers().contains_key("oncegate-fencing-token"));
    let wanted = signer.sign("shop/stripe/evt_1", "1770000000", b"{}");
    assert_eq!(request.headers()["webhook-signature"], wanted);
}

#[test]
fn g7_a_signed_hop_carries_no_other_set_of_the_same_names() {
    let secret = || Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
    let identity = Identity { event_id: "msg_1".into(), event_type: "t".into() };
    let body = Bytes::from_static(b"{}");
    let mut headers = HeaderMap::new();
    for name in ["svix-id", "svix-timestamp", "svix-signature"] {
        headers.insert(name, HeaderValue::from_static("1"));
    }
    for signer in [Some(Signer::new(&[secret()]).unwrap()), None] {
        let provider = StandardWebhooks::new(&[secret()], TOLERANCE).unwrap();
        let route = Route { provider: Provider::StandardWebhooks(provider), ..route(signer) };
        let timeout = route.application.timeout;
        let parcel = Parcel { route: &route, identity: &identity, headers: &headers, body: &body, timeout, hold: None };
        let request = request(&parcel, UNIX_EPOCH);
        let is_signed = route.application.signer.is_some();
        assert_eq!(request.headers().contains_key("webhook-id"), is_signed);
        assert_eq!(request.headers().contains_key("svix-id"), !is_signed, "verifiers refuse both, or take either");
    }
}

#[test]
fn g7_the_signed_id_holds_no_full_stop_and_names_one_event_only() {
    for (id, signed) in [
        ("shop/stripe/evt_1", "shop/stripe/evt_1"),
        ("shop.eu/paystack/charge.success:1:success", "shop%2Eeu/paystack/charge%2Esuccess:1:success"),
        ("shop/stripe/a.b", "shop/stripe/a%2Eb"),
        ("shop/stripe/a%2Eb", "shop/stripe/a%252Eb"),
        ("shop/stripe/a%25b", "shop/stripe/a%2525b"),
        ("shop/stripe/100%", "shop/stripe/100%25"),
    ] {
        assert_eq!(webhook_id(id), signed);
    }
}

#[test]
fn g7_a_signed_id_is_never_longer_than_our_own_verifier_takes() {
    use oncegate_api::limits::TENANT_BYTES_MAX;

    let longest = format!("{}/standard_webhooks/{}", "t".repeat(TENANT_BYTES_MAX), "i".repeat(EVENT_ID_BYTES_MAX));
    let dotted = format!("shop/paystack/{}", "a.".repeat(100));
    for (id, is_digest) in [("i".repeat(EVENT_ID_BYTES_MAX), false), (longest, true), (dotted, true)] {
        let signed = webhook_id(&id);
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&id)));
        assert_eq!(*signed == *digest, is_digest, "{signed}");
        let secrets = [Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap()];
        let now = UNIX_EPOCH + Duration::from_secs(1_770_000_000);
        let mut headers = HeaderMap::new();
        let signature = Signer::new(&secrets).unwrap().sign(&signed, "1770000000", b"{}");
        for (name, value) in
            [(WEBHOOK_ID, &*signed), (WEBHOOK_TIMESTAMP, "1770000000"), (WEBHOOK_SIGNATURE, &*signature)]
        {
            headers.insert(name, value.parse().unwrap());
        }
        let verifier = Provider::StandardWebhooks(StandardWebhooks::new(&secrets, TOLERANCE).unwrap());
        let verifying = verifier.begin(&headers).unwrap().finish(b"{}", now);
        let verified = tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(verifying).unwrap();
        assert_eq!(verified.event_id.as_deref(), Some(&*signed));
    }
}

#[test]
fn only_a_usable_retry_after_is_passed_on() {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(946_684_000);
    for (value, pause) in [
        ("120", Some(120)),
        ("0", Some(0)),
        ("999999999", Some(999_999_999)),
        ("99999999999999999999999", Some(Duration::MAX.as_secs())),
        // In 799 seconds, and in the past.
        ("Fri, 31 Dec 1999 23:59:59 GMT", Some(799)),
        ("Thu, 30 Dec 1999 23:59:59 GMT", Some(0)),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("aaaaaaaaaaaaaaaaaaaaaaaaa GMT", None),
        ("Fri, 31 Foo 1999 23:59:59 GMT", None),
        ("120; x", None),
    ] {
        let mut headers = HeaderMap::new();
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static(value));
        assert_eq!(retry_after(&headers, now).map(|pause| pause.as_secs()), pause, "{value}");
    }
}
