//! What strangers send: signatures in every wrong form, bodies in every wrong shape, and one id from several sides.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::StatusCode;
use oncegate_api::v1::{EventKey, HistoryRequest, State};
use oncegate_e2e::{http_client, program::Oncegate, signers, stripe};
use serde_json::Value;

use super::client;
use crate::setup::{Everything, Ledger, SECRET, on_each_ledger, send_signed, word};

on_each_ledger!(
    signatures_in_every_wrong_form_are_refused_alike,
    bodies_in_every_wrong_shape_get_400_or_a_name_and_a_clean_line,
    one_id_from_two_providers_and_two_tenants_is_four_events,
);

const FLUTTERWAVE: &str = "hash-of-the-signature-tests";
const PAYSTACK: &str = "sk_test_of_the_signature_tests";
const OWN: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(now.expect("the clock stands after 1970").as_secs()).expect("a time of this century")
}

/// All providers but PayPal, whose headers have tests of their own beside its certificates.
async fn everything(ledger: Ledger) -> Result<Everything> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("routes.toml");
    std::fs::write(
        &config,
        format!(
            "[[route]]\nname = \"own\"\nprovider = \"standard_webhooks\"\nsecrets = [\"{OWN}\"]\n\
             [[route]]\nname = \"other\"\nprovider = \"stripe\"\ntenant = \"other\"\nsecrets = [\"{SECRET}\"]\n\
             [[route]]\nname = \"paystack-other\"\nprovider = \"paystack\"\ntenant = \"other\"\nsecrets = [\"{PAYSTACK}\"]\n"
        ),
    )?;
    Everything::start_as(ledger, |command: Oncegate| {
        command
            .env("ONCEGATE_CONFIG", config.to_string_lossy())
            .env("FLUTTERWAVE_WEBHOOK_SECRET", FLUTTERWAVE)
            .env("FLUTTERWAVE_SIGNATURE", "v4")
            .env("PAYSTACK_WEBHOOK_SECRET", PAYSTACK)
    })
    .await
}

type Headers = Vec<(&'static str, String)>;

async fn post(everything: &Everything, route: &str, headers: &Headers, body: &[u8]) -> Result<http_client::Answer> {
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    http_client::post(everything.gateway, &format!("/webhooks/payments/{route}"), &headers, body.to_vec()).await
}

/// What of a signature's header value can be wrong, whatever the provider.
fn wrong(name: &'static str, good: &str) -> Vec<(String, Headers)> {
    let one = |value: String| vec![(name, value)];
    let mut wrong = vec![
        ("missing".to_owned(), Vec::new()),
        ("empty".to_owned(), one(String::new())),
        ("blank".to_owned(), one("   ".to_owned())),
        ("short".to_owned(), one(good[..good.len() - 2].to_owned())),
        ("long".to_owned(), one(format!("{good}00"))),
        ("not of the alphabet".to_owned(), one("!".repeat(good.len()))),
        ("of 8 KiB".to_owned(), one("0".repeat(8 * 1024))),
        ("twice".to_owned(), vec![(name, good.to_owned()), (name, good.to_owned())]),
        ("quoted".to_owned(), one(format!("\"{good}\""))),
    ];
    let zeros: String = good.chars().map(|letter| if letter.is_ascii_alphanumeric() { '0' } else { letter }).collect();
    wrong.push(("of zeros".to_owned(), one(zeros)));
    wrong
}

/// T38
async fn signatures_in_every_wrong_form_are_refused_alike(ledger: Ledger) -> Result<()> {
    let everything = everything(ledger).await?;
    let body = stripe::event("evt_1", "charge.succeeded");
    // The same JSON, written anew.
    let rewritten = serde_json::to_vec(&serde_json::from_slice::<Value>(&body)?)?;
    assert_ne!(body, rewritten);
    let mut cases: Vec<(&str, String, Headers)> = Vec::new();

    let good = stripe::sign(SECRET, &body);
    let mac = good.split_once("v1=").context("a signature")?.1.to_owned();
    let time = now();
    let header = |value: String| vec![(stripe::HEADER, value)];
    cases.extend(wrong(stripe::HEADER, &good).into_iter().map(|(what, headers)| ("stripe", what, headers)));
    for (what, value) in [
        ("in capitals", format!("t={time},v1={}", mac.to_ascii_uppercase())),
        ("not hex", format!("t={time},v1={}", "g".repeat(64))),
        ("of 62 digits", format!("t={time},v1={}", &mac[..62])),
        ("of 66 digits", format!("t={time},v1={mac}00")),
        ("with another scheme only", format!("t={time},v0={mac}")),
        ("without a time", format!("v1={mac}")),
        ("over the JSON written anew", stripe::sign(SECRET, &rewritten)),
        ("with another's secret", stripe::sign("whsec_other", &body)),
        ("an hour old", stripe::sign_at(SECRET, &body, u64::try_from(time - 3_600)?)),
        ("an hour ahead", stripe::sign_at(SECRET, &body, u64::try_from(time + 3_600)?)),
        ("at the end of time", stripe::sign_at(SECRET, &body, u64::MAX)),
        ("beyond the end of time", format!("t=99999999999999999999,v1={mac}")),
        ("before the beginning", format!("t=-{time},v1={mac}")),
        ("at no time", format!("t=NaN,v1={mac}")),
        ("at a time in parts", format!("t={time}.5,v1={mac}")),
        ("at a time with a sign", format!("t=+{time},v1={mac}")),
        ("at two times", format!("t={time},t={time},v1={mac}")),
        ("17 candidates, the last one right", {
            let wrong = format!("v1={},", "0".repeat(64)).repeat(16);
            good.replace("v1=", &format!("{wrong}v1="))
        }),
    ] {
        cases.push(("stripe", what.to_owned(), header(value)));
    }

    let flutterwave = signers::flutterwave_v4(FLUTTERWAVE, &body);
    let (name, good) = &flutterwave[0];
    cases.extend(wrong(name, good).into_iter().map(|(what, headers)| ("flutterwave", what, headers)));
    let hex_form = hex::encode(STANDARD.decode(good)?);
    for (what, headers) in [
        ("in hex", vec![(*name, hex_form)]),
        ("in the alphabet of URLs", vec![(*name, good.replace('+', "-").replace('/', "_").replace('=', ""))]),
        ("over the JSON written anew", signers::flutterwave_v4(FLUTTERWAVE, &rewritten)),
        ("of version 3", signers::flutterwave_v3(FLUTTERWAVE)),
        ("with another's secret", signers::flutterwave_v4("other", &body)),
    ] {
        cases.push(("flutterwave", what.to_owned(), headers));
    }

    let paystack = signers::paystack(PAYSTACK, &body);
    let (name, good) = &paystack[0];
    cases.extend(wrong(name, good).into_iter().map(|(what, headers)| ("paystack", what, headers)));
    for (what, headers) in [
        ("in capitals", vec![(*name, good.to_ascii_uppercase())]),
        ("over the JSON written anew", signers::paystack(PAYSTACK, &rewritten)),
        ("with another's secret", signers::paystack("sk_other", &body)),
    ] {
        cases.push(("paystack", what.to_owned(), headers));
    }

    let own = signers::standard_webhooks(OWN, "msg_1", &body);
    for place in 0..own.len() {
        let (name, good) = &own[place];
        for (what, headers) in wrong(name, good) {
            let mut others: Headers = own.iter().filter(|(other, _)| other != name).cloned().collect();
            // An id that is another than the one that was signed is as wrong as any.
            others.extend(headers);
            cases.push(("own", format!("{name} {what}"), others));
        }
    }

    let mut answers = BTreeSet::new();
    for (route, what, headers) in &cases {
        let answer = post(&everything, route, headers, &body).await?;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{route}: {what}: {headers:?}");
        let challenge = answer.headers.get(http::header::WWW_AUTHENTICATE);
        let challenge = challenge.with_context(|| format!("{route}: {what}: how to authenticate"))?;
        answers.insert((challenge.as_bytes().to_vec(), answer.body.to_vec()));
    }
    assert_eq!(answers.len(), 1, "nobody is told why");
    assert_eq!(everything.events().await?, 0, "no row");
    assert!(everything.upstream.requests().is_empty());
    assert!(!everything.program.output().contains("panicked"), "{}", everything.program.output());

    // And what the provider permits is taken: 16 candidates, the last one right.
    let wrong = format!("v1={},", "0".repeat(64)).repeat(15);
    let many = stripe::sign(SECRET, &body).replace("v1=", &format!("{wrong}v1="));
    assert_eq!(word(&send_signed(everything.gateway, &many, &body).await?), "200 processed");
    Ok(())
}

/// T42
async fn bodies_in_every_wrong_shape_get_400_or_a_name_and_a_clean_line(ledger: Ledger) -> Result<()> {
    let everything = Everything::start_as(ledger, |command: Oncegate| command.env("ONCEGATE_LOG", "debug")).await?;
    let with_id = |id: &str| format!("{{\"id\":{id},\"type\":\"charge.succeeded\"}}").into_bytes();
    let large = format!("\"{}\"", "x".repeat(10 * 1024));
    let deep = [b"{\"x\":".as_slice(), &b"[".repeat(10_000), &b"]".repeat(10_000), b",\"id\":\"evt_1\"}"].concat();
    for (what, body) in [
        ("a depth of 10,000", deep),
        ("two ids", br#"{"id":"evt_1","id":"evt_2"}"#.to_vec()),
        ("two ids, one in disguise", br#"{"id":"evt_1","\u0069d":"evt_2"}"#.to_vec()),
        ("what is not UTF-8", b"{\"id\":\"evt_\xff\"}".to_vec()),
        ("what is not UTF-8 beside it", b"{\"id\":\"evt_1\",\"x\":\"\xc3\x28\"}".to_vec()),
        ("rubbish behind", br#"{"id":"evt_1"}{"#.to_vec()),
        ("a NUL behind", b"{\"id\":\"evt_1\"}\0".to_vec()),
        ("a byte order mark", b"\xef\xbb\xbf{\"id\":\"evt_1\"}".to_vec()),
        ("a control character", b"{\"id\":\"evt\x1b[2J\"}".to_vec()),
        ("an array", br#"[{"id":"evt_1"}]"#.to_vec()),
        ("nothing", b"".to_vec()),
    ] {
        let answer = everything.send(&body).await?;
        assert_eq!(answer.status, 400, "{what}");
    }
    assert_eq!(everything.events().await?, 0, "no row");
    let named = [
        ("a number", with_id("42"), "42"),
        ("a large number, as it was written", with_id("12345678901234567890123"), "12345678901234567890123"),
        ("null", with_id("null"), "sha256:"),
        ("an array", with_id(r#"["evt_1"]"#), "sha256:"),
        ("an object", with_id(r#"{"id":"evt_1"}"#), "sha256:"),
        ("10 KiB", with_id(&large), "sha256:"),
        ("control characters", with_id(r#""evt\u001b[2J\r\nINFO forged""#), "sha256:"),
        ("letters that run backwards", with_id("\"evt_\u{202e}1\""), "sha256:"),
        ("a NUL", with_id(r#""evt_\u0000""#), "sha256:"),
        ("half a surrogate", with_id(r#""evt_\ud800""#), "sha256:"),
        ("nothing", with_id("\"\""), "sha256:"),
    ];
    let mut client = client(everything.sidecar).await?;
    for (number, (what, body, expected)) in named.iter().enumerate() {
        assert_eq!(word(&everything.send(body).await?), "200 processed", "{what}");
        assert_eq!(word(&everything.send(body).await?), "200 already_processed", "{what}");
        let events = client.history(HistoryRequest::default()).await?.into_inner().events;
        assert_eq!(events.len(), number + 1, "{what}");
        let key = events[0].event.as_ref().context("the event")?.key.clone().context("its key")?;
        assert!(key.event_id.starts_with(expected), "{what}: {}", key.event_id);
        assert!(key.event_id.bytes().all(|byte| (0x21..=0x7e).contains(&byte)), "{what}: {}", key.event_id);
    }
    let output = everything.program.output();
    assert!(!output.contains("panicked"), "{output}");
    for character in output.chars().filter(|character| *character != '\n') {
        assert!(!character.is_control() && !('\u{202a}'..='\u{202e}').contains(&character), "{character:?} in the log");
    }
    assert!(!output.contains("INFO forged"), "an id from outside is in the log as it was sent");
    Ok(())
}

/// T43
async fn one_id_from_two_providers_and_two_tenants_is_four_events(ledger: Ledger) -> Result<()> {
    let everything = everything(ledger).await?;
    let body = br#"{"id":"same","type":"charge.succeeded","event":"same","data":{"id":"same","status":"ok"}}"#;
    let (stripes, paystacks) = (vec![(stripe::HEADER, stripe::sign(SECRET, body))], signers::paystack(PAYSTACK, body));
    for (number, (route, headers)) in
        [("stripe", &stripes), ("other", &stripes), ("paystack", &paystacks), ("paystack-other", &paystacks)]
            .into_iter()
            .enumerate()
    {
        assert_eq!(word(&post(&everything, route, headers, body).await?), "200 processed", "{route}");
        assert_eq!(word(&post(&everything, route, headers, body).await?), "200 already_processed", "{route}");
        assert_eq!(everything.upstream.requests().len(), number + 1, "{route}");
    }
    let mut client = client(everything.sidecar).await?;
    for tenant in ["default", "other"] {
        let key = EventKey { tenant: tenant.into(), provider: "stripe".into(), event_id: "same".into() };
        let request = HistoryRequest { key: Some(key), ..Default::default() };
        let event = client.history(request).await?.into_inner().events.remove(0).event.context("the event")?;
        assert_eq!((event.state(), event.attempt_count), (State::Completed, 1), "{tenant}");
    }
    Ok(())
}
