use std::io::Write as _;

use super::*;

fn usable() -> Options {
    Options {
        upstream_url: Some("http://127.0.0.1:3000/webhooks".into()),
        stripe_webhook_secret: Some("whsec_test".into()),
        ..Options::default()
    }
}

/// The names of the settings that are complained about.
fn complaints(options: Options) -> Vec<String> {
    match options.validate() {
        Ok(_) => Vec::new(),
        Err(problems) => problems.iter().map(|problem| problem.setting.to_string()).collect(),
    }
}

#[test]
fn the_defaults_with_an_application_and_a_secret_are_usable() {
    let settings = usable().validate().unwrap();
    assert_eq!(settings.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(settings.drain, settings.upstream.timeout);
    assert_eq!(settings.routes.len(), 1);
    assert_eq!(&*settings.routes[0].path, "/webhooks/payments/stripe");
}

#[test]
fn without_an_application_or_a_secret_it_does_not_start_and_says_both() {
    assert_eq!(complaints(Options::default()), ["UPSTREAM_URL", "STRIPE_WEBHOOK_SECRET"]);
    let blank = Options {
        upstream_url: Some(" ".into()),
        stripe_webhook_secret_file: Some("".into()),
        stripe_webhook_secret: Some(" , ".into()),
        ..Options::default()
    };
    assert_eq!(complaints(blank), ["UPSTREAM_URL", "STRIPE_WEBHOOK_SECRET"]);
}

#[test]
fn two_live_attempts_are_refused_with_every_value_that_matters() {
    for (upstream, margin, lock, good) in
        [(240, 15, 300, true), (285, 15, 300, false), (284, 15, 300, true), (300, 15, 240, false), (10, 1, 11, false)]
    {
        let options = Options {
            upstream_timeout: Duration::from_secs(upstream),
            gateway_lock_margin: Duration::from_secs(margin),
            gateway_lock_duration: Duration::from_secs(lock),
            ..usable()
        };
        assert_eq!(complaints(options).is_empty(), good, "{upstream} {margin} {lock}");
    }
    let options = Options { upstream_timeout: Duration::from_secs(290), ..usable() };
    let text = options.validate().unwrap_err().to_string();
    for value in ["UPSTREAM_TIMEOUT", "4m 50s", "GATEWAY_LOCK_DURATION", "5m", "GATEWAY_LOCK_MARGIN", "15s"] {
        assert!(text.contains(value), "{value} in {text}");
    }
}

#[test]
fn every_limit_is_checked_and_all_are_reported_together() {
    let options = Options {
        stripe_tolerance: Duration::from_secs(901),
        gateway_wait_duration: Duration::from_secs(31),
        gateway_body_bytes_max: 0,
        gateway_connections_max: 0,
        gateway_deliveries_max: 0,
        gateway_tenant: "a/b".into(),
        gateway_holder: "a\nb".into(),
        sidecar_url: "https://127.0.0.1:1".into(),
        upstream_url: Some("ftp://x".into()),
        upstream_secret: Some("not base64!".into()),
        sidecar_timeout: Duration::from_millis(500),
        gateway_body_timeout: Duration::ZERO,
        ..usable()
    };
    let mut found = complaints(options);
    found.sort_unstable();
    assert_eq!(
        found,
        [
            "GATEWAY_BODY_BYTES_MAX",
            "GATEWAY_BODY_TIMEOUT",
            "GATEWAY_CONNECTIONS_MAX",
            "GATEWAY_DELIVERIES_MAX",
            "GATEWAY_TENANT",
            "GATEWAY_WAIT_DURATION",
            "GATEWAY_WAIT_DURATION",
            "HOSTNAME",
            "SIDECAR_CONNECT_TIMEOUT",
            "SIDECAR_URL",
            "STRIPE_TOLERANCE",
            "UPSTREAM_SECRET",
            "UPSTREAM_URL",
        ]
    );
}

#[test]
fn no_message_and_no_debug_output_holds_a_secret() {
    let options = Options {
        upstream_url: Some("http://user:hunter2@127.0.0.1/".into()),
        stripe_webhook_secret: Some("whsec_hunter2".into()),
        upstream_secret: Some("hunter2!".into()),
        ..Options::default()
    };
    assert!(!format!("{:?}", Options { upstream_url: None, ..options.clone() }).contains("hunter2"));
    let text = options.validate().unwrap_err().to_string();
    assert!(text.contains("UPSTREAM_URL") && text.contains("UPSTREAM_SECRET"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
    let settings = Options { stripe_webhook_secret: Some("whsec_hunter2".into()), ..usable() }.validate().unwrap();
    assert!(!format!("{settings:?}").contains("hunter2"));
}

#[test]
fn secrets_come_from_a_value_or_a_file_but_not_from_both() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"whsec_a,whsec_b\n").unwrap();
    let path = Some(file.path().to_owned());
    let from_file = Options { stripe_webhook_secret: None, stripe_webhook_secret_file: path.clone(), ..usable() };
    assert!(from_file.validate().is_ok());
    let both = Options { stripe_webhook_secret_file: path, ..usable() };
    assert_eq!(complaints(both), ["STRIPE_WEBHOOK_SECRET"]);
    let missing = Options {
        stripe_webhook_secret: None,
        stripe_webhook_secret_file: Some("/nonexistent/secret".into()),
        ..usable()
    };
    let text = missing.validate().unwrap_err().to_string();
    assert!(text.contains("/nonexistent/secret"), "{text}");
}
