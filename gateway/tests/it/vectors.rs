//! The signature vectors of the providers that there are.

use std::time::{Duration, UNIX_EPOCH};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue};
use oncegate_gateway::providers::{Provider, stripe};
use oncegate_runtime::secret::Secret;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

#[derive(Deserialize)]
struct Case {
    id: String,
    provider: String,
    tier: u8,
    headers: serde_json::Map<String, Value>,
    body_base64: String,
    secrets: Vec<String>,
    tolerance_secs: Option<u64>,
    now_unix: u64,
    expect: String,
    also_ok: Option<Vec<String>>,
    event_id: Option<String>,
    event_type: Option<String>,
}

fn headers(case: &Case) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in &case.headers {
        let values = match value {
            Value::String(text) => vec![text.as_str()],
            Value::Array(texts) => texts.iter().map(|text| text.as_str().unwrap()).collect(),
            other => panic!("{other}"),
        };
        for value in values {
            headers.append(HeaderName::try_from(name).unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
    }
    headers
}

#[tokio::test]
async fn every_stripe_case_gets_its_verdict() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("../vectors/webhook_signatures.json")).unwrap();
    let mut seen = 0;
    for case in cases {
        if case["provider"] != "stripe" {
            continue;
        }
        let case: Case = serde_json::from_value(case).unwrap();
        assert_eq!((case.provider.as_str(), case.tier), ("stripe", 1));
        seen += 1;
        // Blank secrets never get as far as a provider: they are dropped where configuration is read.
        let secrets: Vec<Secret> = case.secrets.iter().filter_map(|text| Secret::new(text.as_str()).ok()).collect();
        let tolerance = case.tolerance_secs.map_or(stripe::TOLERANCE, Duration::from_secs);
        let provider = Provider::Stripe(stripe::Stripe::new(&secrets, tolerance));
        let body = STANDARD.decode(&case.body_base64).unwrap();
        let now = UNIX_EPOCH + Duration::from_secs(case.now_unix);
        let verdict = match provider.begin(&headers(&case)) {
            Ok(verification) => verification.finish(&body, now).await,
            Err(refusal) => Err(refusal),
        };
        let name = verdict.map_or_else(|refusal| refusal.name(), |()| "valid");
        let also = case.also_ok.unwrap_or_default();
        assert!(
            name == case.expect || also.iter().any(|other| other == name),
            "{}: {name}, wanted {}",
            case.id,
            case.expect
        );
        if verdict.is_ok() {
            let identity = provider.identify(&body, &Sha256::digest(&body).into()).unwrap();
            assert_eq!(Some(identity.event_id), case.event_id, "{}", case.id);
            assert_eq!(Some(identity.event_type), case.event_type, "{}", case.id);
        }
    }
    assert!(seen >= 19, "only {seen} cases");
}
