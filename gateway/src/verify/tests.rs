use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};

use super::*;

const NOW: u64 = 1_770_000_000;
const BODY: &str = "{\"id\":\"evt_1\",\n \"type\":\"a\"}\n";

fn stripe(signed: &str, received: &str) -> Case {
    let mut mac = Hmac::<Sha256>::new_from_slice(b"whsec_right").unwrap();
    mac.update(format!("{NOW}.{signed}").as_bytes());
    let header = format!("t={NOW},v1={}", hex::encode(mac.finalize().into_bytes()));
    Case {
        id: "x".into(),
        provider: "stripe".into(),
        headers: [("Stripe-Signature".to_owned(), Values::One(header))].into(),
        body_base64: STANDARD.encode(received),
        secrets: vec!["whsec_right".into()],
        now_unix: NOW,
        ..Case::default()
    }
}

#[tokio::test]
async fn explanations_say_what_to_look_at() {
    let good = || stripe(BODY, BODY);
    let with = |change: &dyn Fn(&mut Case)| {
        let mut case = good();
        change(&mut case);
        case
    };
    let header = |name: &str, value: Values| BTreeMap::from([(name.to_owned(), value)]);
    let repeated = Values::Many(vec!["a".into(), "b".into()]);
    for (case, verdict, words) in [
        (good(), "valid", "signature is right"),
        (stripe("[]", "[]"), "valid", "answers 400"),
        (with(&|case| case.secrets = vec!["whsec_other".into()]), "bad_signature", "another endpoint"),
        (with(&|case| case.secrets = vec![" ".into()]), "missing_secret", "No secret"),
        (with(&|case| case.headers.clear()), "missing_header", "stripe-signature"),
        (with(&|case| case.headers = header("stripe-signature", repeated.clone())), "malformed_header", "2 times"),
        (
            with(&|case| case.headers = header("stripe-signature", "x\n".into())),
            "malformed_header",
            "control character",
        ),
        (with(&|case| case.now_unix += 1_000), "timestamp_out_of_tolerance", "1000 s old"),
        (with(&|case| case.now_unix -= 301), "timestamp_out_of_tolerance", "301 s in the future"),
        (with(&|case| case.body_base64 = "?".into()), "malformed_body", "base64"),
        (with(&|case| case.provider = "square".into()), "unsupported_provider", "\"square\""),
        (stripe(BODY, BODY.trim_end()), "bad_signature", "one more line break"),
        (stripe(BODY.trim_end(), BODY), "bad_signature", "without the line break at its end"),
        (stripe(BODY, &BODY.replace('\n', "\r\n")), "bad_signature", "plain line breaks"),
        (stripe(&BODY.replace('\n', "\r\n"), BODY), "bad_signature", "CR LF"),
        (stripe(BODY, &format!("\u{feff}{BODY}")), "bad_signature", "byte order mark"),
        (stripe("{\"id\":\"evt_1\",\"type\":\"a\"}", BODY), "bad_signature", "white space"),
        (
            with(&|case| {
                case.provider = "flutterwave_v4".into();
                case.headers = header("verif-hash", "whsec_right".into());
            }),
            "missing_header",
            "signs v3 here",
        ),
        (
            with(&|case| {
                case.provider = "flutterwave_v3".into();
                case.headers = header("verif-hash", "whsec_right".into());
            }),
            "valid",
            "proves nothing",
        ),
    ] {
        let report = case.verify().await;
        assert_eq!(report.verdict, verdict, "{words}");
        assert!(report.explanation.contains(words), "{words}: {}", report.explanation);
        assert!(!report.explanation.contains("whsec_right"), "{}", report.explanation);
        assert!(!format!("{case:?}").contains("whsec"), "{case:?}");
    }
}

#[tokio::test]
async fn a_report_is_one_line_of_json() {
    let line = serde_json::to_string(&stripe(BODY, BODY).verify().await).unwrap();
    assert_eq!(line, r#"{"id":"x","verdict":"valid","event_id":"evt_1","event_type":"a","key":"evt_1"}"#);
    let line = serde_json::to_string(&Case::default().verify().await).unwrap();
    assert_eq!(line, r#"{"id":"","verdict":"unsupported_provider","event_id":null,"event_type":null,"key":null}"#);
}

#[test]
fn cases_may_hold_more_than_is_known_and_less() {
    let case: Case = serde_json::from_str(r#"{"id":"a","query":{"x":1},"secrets":[],"headers":{"A":["b"]}}"#).unwrap();
    assert_eq!(case.id, "a");
    let nulls =
        r#"{"id":"b","headers":null,"secrets":null,"now_unix":null,"webhook_id":null,"cert_responses":{"u":null}}"#;
    assert!(serde_json::from_str::<Case>(nulls).is_ok());
}

/// Vectors with bytes changed, cut and doubled at random get some verdict, and never cause a panic.
#[tokio::test]
async fn no_case_panics() {
    let text = include_str!("../../tests/vectors/webhook_signatures.json");
    let cases: Vec<Case> = serde_json::from_str(text).unwrap();
    let mut random = StdRng::seed_from_u64(7);
    for round in 0..40 {
        for case in &cases {
            let mut case = case.clone();
            for values in case.headers.values_mut() {
                let text = values.iter().next().unwrap_or_default().to_owned();
                *values = match random.random_range(0..4) {
                    0 => Values::One(mangled(&text, &mut random)),
                    1 => Values::Many(vec![text.clone(), mangled(&text, &mut random)]),
                    2 => Values::Many(Vec::new()),
                    _ => Values::One(text),
                };
            }
            if random.random() {
                let body = STANDARD.decode(&case.body_base64).unwrap();
                let body = mangled(&String::from_utf8_lossy(&body), &mut random);
                case.body_base64 = STANDARD.encode(body);
            }
            for secret in &mut case.secrets {
                if random.random_range(0..4) == 0 {
                    *secret = mangled(secret, &mut random);
                }
            }
            for answer in case.cert_responses.iter_mut().flat_map(HashMap::values_mut) {
                if random.random_range(0..3) == 0 {
                    *answer = mangled(answer.as_str().unwrap_or_default(), &mut random).into();
                }
            }
            case.now_unix = [case.now_unix, 0, u64::MAX][round % 3];
            case.tolerance_secs = [None, Some(0), Some(u64::MAX)][random.random_range(0..3)];
            let report = case.verify().await;
            assert!(!report.explanation.is_empty());
        }
    }
}

fn mangled(text: &str, random: &mut StdRng) -> String {
    let mut bytes = text.as_bytes().to_vec();
    match random.random_range(0..5) {
        0 => bytes.truncate(random.random_range(0..=bytes.len())),
        1 => bytes = bytes.repeat(2),
        2 => bytes.clear(),
        3 => bytes.extend([0xF0, 0x9F, 0x8D, 0x8B]),
        _ => {
            if !bytes.is_empty() {
                let at = random.random_range(0..bytes.len());
                bytes[at] = (random.next_u32() % 256) as u8;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
