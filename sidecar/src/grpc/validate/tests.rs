use prost_types::{ListValue, Struct, Value, value::Kind};
use tonic::Code;
use tonic_types::StatusExt as _;

use super::*;

fn policy() -> Policy {
    Policy::default()
}

fn good_key() -> Option<v1::EventKey> {
    Some(v1::EventKey { tenant: String::new(), provider: "stripe".into(), event_id: "evt_1".into() })
}

fn good_claim() -> v1::CheckAndLockRequest {
    v1::CheckAndLockRequest { key: good_key(), event_type: "charge.succeeded".into(), ..Default::default() }
}

/// The fields that a status complains about.
fn complaints<T>(result: Result<T, Status>) -> Vec<String> {
    let status = match result {
        Ok(_) => return Vec::new(),
        Err(status) => status,
    };
    assert_eq!(status.code(), Code::InvalidArgument);
    let details = status.get_error_details();
    let info = details.error_info().expect("every error has an ErrorInfo");
    assert_eq!((info.reason.as_str(), info.domain.as_str()), ("INVALID_FIELD", "oncegate.dev"));
    details.bad_request().expect("violations").field_violations.iter().map(|v| v.field.clone()).collect()
}

/// What a status says of the one field that it complains about.
fn described<T>(result: Result<T, Status>) -> String {
    let details = result.err().expect("refused").get_error_details();
    let violations = &details.bad_request().expect("violations").field_violations;
    assert_eq!(violations.len(), 1, "{violations:?}");
    violations[0].description.clone()
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn number(value: f64) -> Option<Struct> {
    Some(Struct { fields: [("n".to_owned(), Value { kind: Some(Kind::NumberValue(value)) })].into() })
}

fn string(value: &str) -> Option<Struct> {
    Some(Struct { fields: [("s".to_owned(), Value { kind: Some(Kind::StringValue(value.into())) })].into() })
}

/// A list of the same number over and over.
fn numbers(key: &str, value: f64, count: usize) -> Struct {
    let values = vec![Value { kind: Some(Kind::NumberValue(value)) }; count];
    Struct { fields: [(key.to_owned(), Value { kind: Some(Kind::ListValue(ListValue { values })) })].into() }
}

#[test]
fn an_empty_tenant_is_the_default_one_and_a_missing_claim_id_is_chosen() {
    let (claim, wait) = check_and_lock(good_claim(), &policy()).expect("valid");
    assert_eq!(claim.key.tenant, "default");
    assert_eq!(claim.claim_id.len(), 36);
    assert_eq!(claim.lock_duration, Micros(300_000_000));
    assert_eq!(wait, Duration::ZERO);
}

#[test]
fn every_limit_of_a_claim_is_checked_at_its_edge() {
    type Change = fn(&mut v1::CheckAndLockRequest);
    let key: fn(&mut v1::CheckAndLockRequest) -> &mut v1::EventKey = |r| r.key.as_mut().expect("a key");
    let _ = key;
    let cases: &[(&str, Change, Change)] = &[
        (
            "key.tenant",
            |r| r.key.as_mut().unwrap().tenant = "t".repeat(64),
            |r| r.key.as_mut().unwrap().tenant = "t".repeat(65),
        ),
        (
            "key.tenant",
            |r| r.key.as_mut().unwrap().tenant = "A.b_c-9".into(),
            |r| r.key.as_mut().unwrap().tenant = "a b".into(),
        ),
        (
            "key.provider",
            |r| r.key.as_mut().unwrap().provider = "p".repeat(64),
            |r| r.key.as_mut().unwrap().provider = "p".repeat(65),
        ),
        (
            "key.provider",
            |r| r.key.as_mut().unwrap().provider = "my.own-provider_1".into(),
            |r| r.key.as_mut().unwrap().provider = "Stripe".into(),
        ),
        ("key.provider", |_| (), |r| r.key.as_mut().unwrap().provider.clear()),
        (
            "key.event_id",
            |r| r.key.as_mut().unwrap().event_id = "!~".repeat(127) + "x",
            |r| r.key.as_mut().unwrap().event_id = "x".repeat(256),
        ),
        ("key.event_id", |_| (), |r| r.key.as_mut().unwrap().event_id.clear()),
        ("key.event_id", |_| (), |r| r.key.as_mut().unwrap().event_id = "a b".into()),
        ("key.event_id", |_| (), |r| r.key.as_mut().unwrap().event_id = "\u{202e}".into()),
        ("key.event_id", |_| (), |r| r.key.as_mut().unwrap().event_id = "a\0".into()),
        ("key", |_| (), |r| r.key = None),
        ("event_type", |r| r.event_type = "t".repeat(128), |r| r.event_type = "t".repeat(129)),
        ("event_type", |_| (), |r| r.event_type.clear()),
        ("claim_id", |r| r.claim_id = "c".repeat(64), |r| r.claim_id = "c".repeat(65)),
        ("claim_id", |r| r.claim_id.clear(), |r| r.claim_id = "\u{e9}".into()),
        ("holder", |r| r.holder = "h".repeat(128), |r| r.holder = "h".repeat(129)),
        ("holder", |r| r.holder = "pod 1 \u{e9}".into(), |r| r.holder = "a\nb".into()),
        ("lock_duration", |r| r.lock_duration = seconds(1), |r| r.lock_duration = seconds(0)),
        ("lock_duration", |r| r.lock_duration = seconds(86_400), |r| r.lock_duration = seconds(86_401)),
        ("lock_duration", |_| (), |r| r.lock_duration = seconds(-1)),
        (
            "lock_duration",
            |_| (),
            |r| {
                r.lock_duration = Some(prost_types::Duration { seconds: 5, nanos: 2_000_000_000 });
            },
        ),
        ("fingerprint", |r| r.fingerprint = vec![1; 32].into(), |r| r.fingerprint = vec![1; 31].into()),
        ("payload_digest", |r| r.payload_digest = vec![1; 32].into(), |r| r.payload_digest = vec![1; 33].into()),
        ("metadata", |r| r.metadata = number(1.5), |r| r.metadata = number(f64::NAN)),
        ("metadata", |_| (), |r| r.metadata = number(f64::INFINITY)),
        ("metadata", |r| r.metadata = string("\u{e9}"), |r| r.metadata = string("a\0")),
        // {"s":"..."} has 8 bytes around the text.
        ("metadata", |r| r.metadata = string(&"x".repeat(8_184)), |r| r.metadata = string(&"x".repeat(8_185))),
        // Each has 301 digits, and a comma but for the last.
        ("metadata", |r| r.metadata = Some(numbers("n", 1e300, 27)), |r| r.metadata = Some(numbers("n", 1e300, 28))),
        ("wait_duration", |r| r.wait_duration = seconds(30), |r| r.wait_duration = seconds(31)),
        ("delivery_id", |r| r.delivery_id = "d".repeat(128), |r| r.delivery_id = "d".repeat(129)),
    ];
    for (place, (field, within, beyond)) in cases.iter().enumerate() {
        let mut request = good_claim();
        within(&mut request);
        assert_eq!(complaints(check_and_lock(request, &policy())), Vec::<String>::new(), "case {place}: {field}");
        let mut request = good_claim();
        beyond(&mut request);
        assert_eq!(complaints(check_and_lock(request, &policy())), [*field], "case {place}");
    }
}

#[test]
fn what_was_given_is_told() {
    let told = |change: &dyn Fn(&mut v1::CheckAndLockRequest)| {
        let mut request = good_claim();
        change(&mut request);
        described(check_and_lock(request, &policy()))
    };
    let lasting = |seconds, nanos| {
        move |r: &mut v1::CheckAndLockRequest| r.lock_duration = Some(prost_types::Duration { seconds, nanos })
    };
    assert_eq!(told(&lasting(-90, 0)), "must not be negative, not -1m 30s");
    assert_eq!(told(&lasting(0, -500_000_000)), "must not be negative, not -500ms");
    for (seconds, nanos) in [(5, 1_000_000_000), (5, -1), (-5, 1), (0, i32::MIN)] {
        let told = told(&lasting(seconds, nanos));
        assert!(
            told.starts_with("is no valid duration: ") && told.ends_with(&format!("{seconds} and {nanos}")),
            "{told}"
        );
    }
    assert!(told(&lasting(i64::MIN, -999_999_999)).starts_with("must not be negative, not -"));
    let inner = Value { kind: Some(Kind::StructValue(numbers("rate", f64::NAN, 2))) };
    let metadata = Struct { fields: [("outer".to_owned(), inner)].into() };
    let told_of_metadata = told(&|r| r.metadata = Some(metadata.clone()));
    assert_eq!(told_of_metadata, r#"holds NaN or an infinity as "rate", which JSON does not have"#);
    assert_eq!(told(&|r| r.metadata = string("a\0")), r#"holds a control character in the string or key "s""#);
    // No more of a key than people read.
    let metadata = numbers(&"k".repeat(1_000), f64::INFINITY, 1);
    assert!(told(&|r| r.metadata = Some(metadata.clone())).len() < 150);

    let told = |seconds, nanos| {
        let start_time = Some(prost_types::Timestamp { seconds, nanos });
        described(stats(v1::StatsRequest { start_time, ..Default::default() }))
    };
    assert_eq!(told(5, 1_000_000_000), "is no valid time: nanos must be from 0 to 999,999,999, not 1000000000");
    assert_eq!(told(5, -1), "is no valid time: nanos must be from 0 to 999,999,999, not -1");
    assert_eq!(told(-5, 1), "is no valid time: it must lie between the years 1970 and 9999");
}

#[test]
fn all_violations_are_reported_at_once() {
    let request = v1::CheckAndLockRequest { fingerprint: vec![0; 3].into(), ..Default::default() };
    assert_eq!(complaints(check_and_lock(request, &policy())), ["key", "event_type", "fingerprint"]);
}

#[test]
fn a_violation_names_the_limit_and_what_was_given_but_not_the_value() {
    let mut request = good_claim();
    request.holder = format!("secret{}", "x".repeat(200));
    let status = check_and_lock(request, &policy()).expect_err("too long");
    assert!(status.message().contains("128") && status.message().contains("206"), "{}", status.message());
    assert!(!status.message().contains("secret"));

    let request = v1::CheckAndLockRequest { metadata: Some(numbers("n", 1e300, 28)), ..good_claim() };
    let status = check_and_lock(request, &policy()).expect_err("too many digits");
    let said = "metadata: may have at most 8192 bytes as JSON with every number in decimals, and has 8463";
    assert!(status.message().contains(said), "{}", status.message());
}

#[test]
fn every_limit_of_marks_is_checked() {
    let completed = |change: fn(&mut v1::MarkCompletedRequest)| {
        let mut request = v1::MarkCompletedRequest { key: good_key(), fencing_token: 1, ..Default::default() };
        change(&mut request);
        complaints(mark_completed(request, &policy()))
    };
    assert_eq!(completed(|_| ()), Vec::<String>::new());
    assert_eq!(completed(|r| r.fencing_token = 0), ["fencing_token"]);
    assert_eq!(completed(|r| r.fencing_token = -5), ["fencing_token"]);
    let body = |bytes| Some(v1::Result { body: vec![0; bytes].into(), ..Default::default() });
    assert_eq!(completed(|r| r.result = None), Vec::<String>::new());
    let mut request = v1::MarkCompletedRequest { key: good_key(), fencing_token: 1, ..Default::default() };
    request.result = body(64 * 1_024);
    assert_eq!(complaints(mark_completed(request.clone(), &policy())), Vec::<String>::new());
    request.result = body(64 * 1_024 + 1);
    assert_eq!(complaints(mark_completed(request, &policy())), ["result.body"]);
    assert_eq!(
        completed(|r| r.result = Some(v1::Result { content_type: "c".repeat(129), ..Default::default() })),
        ["result.content_type"]
    );
    // Too much metadata never refuses a completion.
    assert_eq!(completed(|r| r.metadata = string(&"x".repeat(20_000))), Vec::<String>::new());
    // Nor do values that JSON or the ledgers cannot hold: they are left out.
    let request = v1::MarkCompletedRequest {
        key: good_key(),
        fencing_token: 1,
        metadata: Some(Struct {
            fields: [
                number(f64::NAN),
                string("two\nlines"),
                Some(Struct { fields: [("kept".to_owned(), Value { kind: Some(Kind::BoolValue(true)) })].into() }),
            ]
            .into_iter()
            .flatten()
            .flat_map(|part| part.fields)
            .collect(),
        }),
        ..Default::default()
    };
    let (mark, left_out) = mark_completed(request, &policy()).unwrap();
    assert_eq!(left_out, 2);
    assert_eq!(mark.ending, Ending::Completed { metadata: Some(r#"{"kept":true}"#.into()) });

    // Numbers count for their decimals here as well; what fits of the rest is kept.
    let metadata = Struct {
        fields: [numbers("a", 1e300, 28), numbers("b", 1e300, 13), numbers("c", 1e300, 15), numbers("d", 1.0, 1)]
            .into_iter()
            .flat_map(|part| part.fields)
            .collect(),
    };
    let request =
        v1::MarkCompletedRequest { key: good_key(), fencing_token: 1, metadata: Some(metadata), ..Default::default() };
    let (mark, left_out) = mark_completed(request, &policy()).unwrap();
    let Ending::Completed { metadata: Some(kept) } = mark.ending else { panic!("{:?}", mark.ending) };
    let kept: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&kept).unwrap();
    assert_eq!((left_out, kept.keys().map(String::as_str).collect::<Vec<_>>()), (2, vec!["b", "d"]));

    let failed = |change: fn(&mut v1::MarkFailedRequest)| {
        let mut request = v1::MarkFailedRequest { key: good_key(), fencing_token: 1, ..Default::default() };
        change(&mut request);
        complaints(mark_failed(request, &policy()))
    };
    assert_eq!(failed(|r| r.error = "e".repeat(2_048)), Vec::<String>::new());
    assert_eq!(failed(|r| r.error = "e".repeat(2_049)), ["error"]);
    assert_eq!(failed(|r| r.kind = 9), ["kind"]);
    assert_eq!(failed(|r| r.retry_after = seconds(7 * 86_400)), Vec::<String>::new());
    assert_eq!(failed(|r| r.retry_after = seconds(7 * 86_400 + 1)), ["retry_after"]);
    assert_eq!(failed(|r| r.retry_after = seconds(-1)), ["retry_after"]);
}

#[test]
fn every_limit_of_resolve_is_checked() {
    let resolved = |change: fn(&mut v1::ResolveRequest)| {
        let mut request = v1::ResolveRequest {
            key: good_key(),
            to: v1::State::Pending.into(),
            reason: "why".into(),
            actor: "who".into(),
            ..Default::default()
        };
        change(&mut request);
        complaints(resolve(request))
    };
    assert_eq!(resolved(|_| ()), Vec::<String>::new());
    assert_eq!(resolved(|r| r.to = 0), ["to"]);
    assert_eq!(resolved(|r| r.to = v1::State::Processing.into()), ["to"]);
    assert_eq!(resolved(|r| r.to = 77), ["to"]);
    assert_eq!(resolved(|r| r.reason.clear()), ["reason"]);
    assert_eq!(resolved(|r| r.reason = "r".repeat(513)), ["reason"]);
    assert_eq!(resolved(|r| r.actor.clear()), ["actor"]);
    assert_eq!(resolved(|r| r.actor = "a".repeat(129)), ["actor"]);
    assert_eq!(resolved(|r| r.fencing_token = -1), ["fencing_token"]);
}

#[test]
fn every_limit_of_listings_and_counts_is_checked() {
    let listed = |change: fn(&mut v1::HistoryRequest)| {
        let mut request = v1::HistoryRequest::default();
        change(&mut request);
        history(request)
    };
    let page = |change| match listed(change) {
        Ok(History::Page(filter)) => filter,
        Ok(History::Event(_)) => panic!("a listing was asked for"),
        Err(status) => panic!("{status}"),
    };
    assert_eq!(page(|_| ()).page_size, 50);
    assert_eq!(page(|r| r.page_size = 10_000).page_size, 500);
    assert_eq!(complaints(listed(|r| r.page_size = -1)), ["page_size"]);
    assert_eq!(complaints(listed(|r| r.page_token = "nonsense".into())), ["page_token"]);
    assert_eq!(complaints(listed(|r| r.states = vec![1, 42, 0])), ["states[1]", "states[2]"]);
    let time = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    let mut request = v1::HistoryRequest { start_time: time(10), end_time: time(5), ..Default::default() };
    assert_eq!(complaints(history(request.clone())), ["end_time"]);
    request = v1::HistoryRequest { key: good_key(), provider: "stripe".into(), ..Default::default() };
    assert_eq!(complaints(history(request)), ["provider"]);
    // The size of a page means nothing for one event; a negative one is refused all the same.
    for (page_size, refused) in [(-1, &["page_size"][..]), (i32::MIN, &["page_size"]), (0, &[]), (500, &[])] {
        let request = v1::HistoryRequest { key: good_key(), page_size, ..Default::default() };
        assert_eq!(complaints(history(request)), refused, "{page_size}");
    }
    assert_eq!(complaints(listed(|r| r.tenant = "\u{e9}".into())), ["tenant"]);

    let counted = |change: fn(&mut v1::StatsRequest)| {
        let mut request = v1::StatsRequest::default();
        change(&mut request);
        complaints(stats(request))
    };
    assert_eq!(counted(|r| r.bucket_duration = seconds(3_600)), Vec::<String>::new());
    assert_eq!(counted(|r| r.bucket_duration = seconds(3_601)), ["bucket_duration"]);
    assert_eq!(counted(|r| r.bucket_duration = seconds(1_800)), ["bucket_duration"]);
    let mut request = v1::StatsRequest {
        start_time: time(0),
        end_time: time(1_000 * 3_600),
        bucket_duration: seconds(3_600),
        ..Default::default()
    };
    assert_eq!(complaints(stats(request.clone())), Vec::<String>::new());
    request.end_time = time(1_001 * 3_600);
    assert_eq!(complaints(stats(request)), ["bucket_duration"]);
}

#[test]
fn percentiles_are_found_unless_they_are_not_wanted() {
    for without_percentiles in [false, true] {
        let request = v1::StatsRequest { without_percentiles, ..Default::default() };
        let filter = stats(request).unwrap_or_else(|status| panic!("{status}"));
        assert_eq!(filter.timings, !without_percentiles);
    }
}

// T30
#[test]
fn cleanup_keeps_the_minimum_retention_and_what_is_open() {
    let cleaned = |change: fn(&mut v1::CleanupRequest)| {
        let mut request = v1::CleanupRequest::default();
        change(&mut request);
        cleanup(request, &policy())
    };
    let default = cleaned(|_| ()).unwrap_or_else(|status| panic!("{status}"));
    assert_eq!(default.older_than, Micros(30 * 86_400 * 1_000_000));
    assert_eq!(default.states, [State::Completed]);
    assert_eq!(default.batch_size, 1_000);
    for days in [0, -1, 5] {
        let request = v1::CleanupRequest { older_than: seconds(days * 86_400), ..Default::default() };
        assert_eq!(complaints(cleanup(request, &policy())), ["older_than"], "{days} days");
    }
    assert_eq!(complaints(cleaned(|r| r.older_than = seconds(i64::MAX))), ["older_than"]);
    assert_eq!(complaints(cleaned(|r| r.older_than = seconds(6 * 86_400))), Vec::<String>::new());
    assert_eq!(complaints(cleaned(|r| r.states = vec![v1::State::Processing.into()])), ["states"]);
    assert_eq!(complaints(cleaned(|r| r.states = vec![v1::State::Pending.into()])), ["states"]);
    assert_eq!(complaints(cleaned(|r| r.batch_size = 10_001)), ["batch_size"]);
    assert_eq!(complaints(cleaned(|r| r.batch_size = -1)), ["batch_size"]);
}
