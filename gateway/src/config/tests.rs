mod document;

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
    assert_eq!(settings.drain, settings.routes[0].application.timeout);
    assert_eq!(settings.routes.len(), 1);
    assert_eq!(&*settings.routes[0].path, "/webhooks/payments/stripe");
}

#[test]
fn without_an_application_or_a_secret_it_does_not_start_and_says_both() {
    assert_eq!(complaints(Options::default()), ["UPSTREAM_URL", "routes"]);
    let blank = Options {
        upstream_url: Some(" ".into()),
        stripe_webhook_secret_file: Some("".into()),
        stripe_webhook_secret: Some(" , ".into()),
        ..Options::default()
    };
    assert_eq!(complaints(blank), ["UPSTREAM_URL", "routes"]);
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
        sidecar_url: "127.0.0.1:1".into(),
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

#[test]
fn g3_a_provider_with_a_secret_has_a_route() {
    let options = Options {
        paypal_webhook_id: Some("5FR00112AB334455C".into()),
        flutterwave_webhook_secret: Some("a secret hash of one's own".into()),
        flutterwave_signature: Some(FlutterwaveVersion::V3),
        paystack_webhook_secret: Some("sk_live_a,sk_live_b".into()),
        ..usable()
    };
    let settings = options.validate().unwrap();
    let routes: Vec<_> = settings.routes.iter().map(|route| (&*route.path, route.provider.is_weak())).collect();
    assert_eq!(
        routes,
        [
            ("/webhooks/payments/stripe", false),
            ("/webhooks/payments/paypal", false),
            ("/webhooks/payments/flutterwave", true),
            ("/webhooks/payments/paystack", false),
        ]
    );
}

#[test]
fn keys_of_paystacks_test_and_live_mode_do_not_stand_in_one_list() {
    let with = |keys: &str| Options { paystack_webhook_secret: Some(keys.into()), ..usable() }.validate();
    for keys in ["sk_live_hunter2,sk_test_hunter2", "sk_test_hunter2,sk_test_b,sk_live_hunter2"] {
        let text = with(keys).unwrap_err().to_string();
        assert!(text.contains("PAYSTACK_WEBHOOK_SECRET") && text.contains("tenant of its own"), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
    for keys in ["sk_live_a,sk_live_b", "sk_test_a,sk_test_b", "sk_a,sk_live_b"] {
        assert!(with(keys).is_ok(), "{keys}");
    }
}

#[test]
fn g3_flutterwave_has_no_default_version_and_the_problem_says_both() {
    let options = Options { flutterwave_webhook_secret: Some("hash".into()), ..usable() };
    let problems = options.validate().unwrap_err();
    let found: Vec<_> = problems.iter().collect();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].setting, "FLUTTERWAVE_SIGNATURE");
    assert!(found[0].message.contains("v3") && found[0].message.contains("v4"), "{}", found[0]);
}

#[test]
fn paypal_settings_that_cannot_work_are_problems() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"no certificate").unwrap();
    let path = Some(file.path().to_owned());
    let broken = Options {
        paypal_webhook_id: Some("not|an|id".into()),
        paypal_cert_dir: Some("/nonexistent/certs".into()),
        paypal_trust_anchors_file: path.clone(),
        ..usable()
    };
    let mut found = complaints(broken);
    found.sort_unstable();
    assert_eq!(found, ["PAYPAL_CERT_DIR", "PAYPAL_TRUST_ANCHORS_FILE"]);
    let id = |id: &str, environment| Options {
        paypal_webhook_id: Some(id.into()),
        paypal_environment: environment,
        paypal_cert_dir: Some("".into()),
        ..usable()
    };
    assert_eq!(complaints(id("not|an|id", Environment::Live)), ["PAYPAL_WEBHOOK_ID"]);
    // Anybody can send what the simulator signs.
    assert_eq!(complaints(id("WEBHOOK_ID", Environment::Live)), ["PAYPAL_WEBHOOK_ID"]);
    assert!(complaints(id("WEBHOOK_ID", Environment::Sandbox)).is_empty());
    assert!(complaints(id("5FR00112AB334455C,96605875FF6516633", Environment::Live)).is_empty());
    let intermediates = Options { paypal_intermediates_file: path, ..id("5FR", Environment::Live) };
    assert_eq!(complaints(intermediates), ["PAYPAL_INTERMEDIATES_FILE"]);
    // Nothing is that young. To have no limit, the setting is left out.
    let tolerance = |seconds| Options {
        paypal_tolerance: Some(Duration::from_secs(seconds)),
        ..id("5FR00112AB334455C", Environment::Live)
    };
    assert_eq!(complaints(tolerance(0)), ["PAYPAL_TOLERANCE"]);
    assert_eq!(complaints(tolerance(31 * 86_400)), ["PAYPAL_TOLERANCE"]);
    assert!(complaints(tolerance(4 * 86_400)).is_empty());
}

#[test]
fn the_applications_url_means_what_it_says_or_the_gateway_does_not_start() {
    for url in ["http://app:$(APP_PORT)/hook", "http://app:70000/", "http://app:/", "http://app/hook?key=a#b"] {
        assert_eq!(complaints(Options { upstream_url: Some(url.into()), ..usable() }), ["UPSTREAM_URL"], "{url}");
    }
}

#[test]
fn a_file_for_tls_that_cannot_be_read_is_named_by_its_own_setting() {
    let mut certificate = tempfile::NamedTempFile::new().unwrap();
    certificate.write_all(b"no certificate").unwrap();
    let present = Some(certificate.path().to_owned());
    let missing = || Some("/nonexistent/tls.key".into());
    let listener = Options { gateway_tls_cert_file: present.clone(), gateway_tls_key_file: missing(), ..usable() };
    assert_eq!(complaints(listener), ["GATEWAY_TLS_KEY_FILE"]);
    let client = Options {
        sidecar_url: "https://sidecar:50051".into(),
        sidecar_client_cert_file: present,
        sidecar_client_key_file: missing(),
        ..usable()
    };
    assert_eq!(complaints(client), ["SIDECAR_CLIENT_KEY_FILE"]);
}

mod file {
    use super::*;

    /// Options with this file and nothing else.
    fn with(text: &str) -> (tempfile::TempDir, Options) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("oncegate.toml");
        std::fs::write(&path, text).unwrap();
        (directory, Options { config: Some(path), ..Options::default() })
    }

    /// The problems without the directory before the file's name.
    fn problems(text: &str) -> Vec<String> {
        let (directory, options) = with(text);
        let prefix = format!("{}/", directory.path().display());
        match options.validate() {
            Ok(_) => Vec::new(),
            Err(problems) => problems.iter().map(|problem| problem.to_string().replace(&prefix, "")).collect(),
        }
    }

    #[test]
    fn routes_have_everything_of_their_own_and_the_rest_from_the_settings() {
        let (directory, options) = with(
            r#"
            [[route]]
            name = "stripe-eu"
            provider = "stripe"
            tenant = "eu"
            secrets = ["whsec_a", "whsec_b"]
            tolerance = "1m"
            upstream_url = "http://eu:3000/hook"
            upstream_secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
            upstream_timeout = "10s"
            lock_duration = "1m"
            in_progress_status = 200
            held_status = "200"
            upstream_refusal = "terminal"
            upstream_unclear = "unknown"

            [[route]]
            path = "/hooks/flw"
            provider = "flutterwave"
            secrets_file = "flw"
            signature = "v4"

            [[route]]
            name = "own"
            provider = "standard_webhooks"
            secrets = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

            [[route]]
            name = "paypal-test"
            provider = "paypal"
            environment = "sandbox"
            tenant = "test"
            secrets = "96605875FF6516633"
            cert_dir = "."
            "#,
        );
        // Relative to the file.
        std::fs::write(directory.path().join("flw"), "a secret hash, with a comma").unwrap();
        let settings = Options { upstream_url: Some("http://app/".into()), ..options }.validate().unwrap();
        let [stripe, flutterwave, own, paypal] = &settings.routes[..] else { panic!("{settings:?}") };
        assert_eq!((&*stripe.path, &*stripe.tenant), ("/webhooks/payments/stripe-eu", "eu"));
        assert_eq!(stripe.application.url, "http://eu:3000/hook");
        assert!(stripe.application.signer.is_some());
        assert_eq!(stripe.application.timeout, Duration::from_secs(10));
        assert_eq!(stripe.application.lock_duration, Duration::from_secs(60));
        assert_eq!(stripe.policy.in_progress, InProgressStatus::Ok);
        assert_eq!(stripe.policy.held, HeldStatus::Ok);
        assert_eq!(stripe.policy.refusal, OnRefusal::Terminal);
        assert_eq!(stripe.policy.unclear, OnUnclear::Unknown);
        assert_eq!((&*flutterwave.path, &*flutterwave.tenant), ("/hooks/flw", "default"));
        assert_eq!(flutterwave.application.url, "http://app/");
        assert!(!flutterwave.provider.is_weak());
        assert_eq!(flutterwave.policy.held, HeldStatus::Unprocessable);
        assert_eq!(own.provider.name(), "standard_webhooks");
        assert!(format!("{:?}", paypal.provider).contains("Sandbox"));
        // The longest application decides how long shutting down may take.
        assert_eq!(settings.drain, Duration::from_secs(240));
    }

    #[test]
    fn g8_a_route_with_a_lock_alone_has_to_outlast_the_upstream_time_out_of_the_settings() {
        // 240 s, and 15 s of margin.
        for (lock, good) in [("4m 16s", true), ("4m 15s", false), ("1s", false)] {
            let own =
                "[[route]]\nname = \"a\"\nprovider = \"paystack\"\nsecrets = \"sk\"\nupstream_url = \"http://app/\"";
            let text = format!("{own}\nlock_duration = \"{lock}\"");
            let problems = problems(&text);
            assert_eq!(problems.is_empty(), good, "{lock}: {problems:?}");
            let told = format!(
                "lock_duration: {lock} given, has to be more than UPSTREAM_TIMEOUT, which is 4m, and \
                 GATEWAY_LOCK_MARGIN, which is 15s, together"
            );
            assert!(problems.iter().all(|problem| problem.contains(&told)), "{problems:?}");
        }
    }

    #[test]
    fn an_application_need_not_be_named_twice() {
        let route = "[[route]]\nname = \"a\"\nprovider = \"paystack\"\nsecrets = \"sk\"\n";
        assert!(problems(&format!("{route}upstream_url = \"http://app/\"")).is_empty());
        assert!(problems(route)[0].starts_with("UPSTREAM_URL: not set"));
    }

    #[test]
    fn g7_the_secret_of_the_settings_signs_for_applications_that_routes_name_themselves() {
        const OWN: &str =
            "[[route]]\nname = \"a\"\nprovider = \"paystack\"\nsecrets = \"sk\"\nupstream_url = \"http://app/\"\n";
        let (secret, another) = ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD");
        let signed = |signer: &crate::signing::Signer| signer.sign("id", "1", b"{}");
        let by = |secret: &str| {
            signed(&crate::signing::Signer::new(&[oncegate_runtime::secret::Secret::new(secret).unwrap()]).unwrap())
        };
        for (url, text, wanted) in [
            (None, OWN.to_owned(), Some(secret)),
            (Some("http://general/"), OWN.to_owned(), Some(secret)),
            (None, format!("{OWN}upstream_secret = \"{another}\""), Some(another)),
        ] {
            let (_directory, options) = with(&text);
            let options =
                Options { upstream_url: url.map(Into::into), upstream_secret: Some(secret.into()), ..options };
            let settings = options.validate().unwrap();
            let target = &settings.routes[0].application;
            assert_eq!(target.signer.as_ref().map(signed), wanted.map(by), "{url:?} {text}");
            assert!(target.signer_secrets.is_some(), "{url:?} {text}");
        }
        // One that cannot sign is said, for the route or for the settings, and nothing else of the route.
        let (_directory, options) = with(&format!("{OWN}upstream_timeout = \"10s\""));
        assert_eq!(complaints(Options { upstream_secret: Some("not base64!".into()), ..options }), ["UPSTREAM_SECRET"]);
        let found = problems(&format!("{OWN}upstream_secret = \"not base64!\"\nupstream_timeout = \"10s\""));
        assert!(found.len() == 1 && found[0].contains("upstream_secret"), "{found:?}");
    }

    #[test]
    fn every_problem_names_its_line_and_its_key() {
        let found = problems(
            r#"[[route]]
name = "a"
provider = "stripe"
secrets = "hunter2"
secret = "hunter2"
signature = "v3"
upstream_url = "http://user:hunter2@app/"

[[route]]
provider = "paypol"
path = "/webhooks/payments/health"

[[route]]
path = "no slash"
name = "b"
provider = "flutterwave"
upstream_url = "http://app/"
upstream_timeout = "300"
tenant = "a/b"
held_status = 418

[[route]]
name = "c"
provider = "paystack"
upstream_url = "http://app/"
upstream_timeout = "5m"
secrets = ["", " "]

[[route]]
name = "d"
provider = "standard_webhooks"
upstream_url = "http://app/"
secrets = "hunter2!"
tolerance = "1h"

[[route]]
name = "e"
provider = "flutterwave"
upstream_url = "http://app/"
secrets = "hunter2"

[[route]]
name = "f"
provider = "stripe"
upstream_url = "http://app/"
secrets = "whsec_hunter2,whsec_hunter2"

[[route]]
name = "g"
provider = "paypal"
upstream_url = "http://app/"
secrets = "5FR00112AB334455C"
tolerance = "0s"
"#,
        );
        let places: Vec<_> =
            found.iter().map(|problem| problem.split(':').take(2).collect::<Vec<_>>().join(":")).collect();
        let wanted = [
            "UPSTREAM_URL: not set",
            "oncegate.toml:7 upstream_url",
            "oncegate.toml:5 secret",
            "oncegate.toml:6 signature",
            "oncegate.toml:11 path",
            "oncegate.toml:10 provider",
            "oncegate.toml:14 path",
            "oncegate.toml:19 tenant",
            "oncegate.toml:13 secrets",
            "oncegate.toml:18 upstream_timeout",
            "oncegate.toml:20 held_status",
            "oncegate.toml:27 secrets",
            "oncegate.toml:26 upstream_timeout",
            "oncegate.toml:34 tolerance",
            "oncegate.toml:33 secrets",
            "oncegate.toml:36 signature",
            "oncegate.toml:46 secrets",
            "oncegate.toml:53 tolerance",
        ];
        assert_eq!(places, wanted, "{found:#?}");
        assert!(!found.iter().any(|problem| problem.contains("hunter2")), "{found:#?}");
    }

    #[test]
    fn files_that_would_fill_the_memory_are_refused_by_the_names_of_their_settings() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((4 << 20) + 1).unwrap();
        let huge = file.path().to_owned();
        let options = Options {
            config: Some(huge.clone()),
            paypal_webhook_id: Some("5FR00112AB334455C".into()),
            paypal_trust_anchors_file: Some(huge.clone()),
            paypal_intermediates_file: Some(huge.clone()),
            stripe_webhook_secret: None,
            stripe_webhook_secret_file: Some(huge),
            ..usable()
        };
        let problems = options.validate().unwrap_err();
        let mut found: Vec<_> = problems.iter().map(|problem| &*problem.setting).collect();
        found.sort_unstable();
        assert_eq!(
            found,
            ["ONCEGATE_CONFIG", "PAYPAL_INTERMEDIATES_FILE", "PAYPAL_TRUST_ANCHORS_FILE", "STRIPE_WEBHOOK_SECRET"]
        );
        assert!(problems.iter().all(|problem| problem.message.contains("larger than 4 MiB")), "{problems}");
    }

    #[test]
    fn a_blank_path_is_not_set() {
        let (_directory, options) = with(
            r#"
            [[route]]
            name = "paypal"
            provider = "paypal"
            secrets = "5FR00112AB334455C"
            secrets_file = ""
            cert_dir = ""
            trust_anchors_file = " "
            intermediates_file = ""
            upstream_secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
            upstream_secret_file = ""
            upstream_url = "http://app/"
            "#,
        );
        let settings = options.validate().unwrap();
        let store = settings.routes[0].provider.paypal().unwrap().store().unwrap();
        assert!(!store.has_directory(), "the directory of the file is none of certificates");
        let found = problems(
            "[[route]]\nname = \"a\"\nprovider = \"paystack\"\nsecrets_file = \"\"\nupstream_url = \"http://app/\"\n",
        );
        assert!(found.len() == 1 && found[0].contains("secrets: not set"), "{found:?}");
    }

    #[test]
    fn secrets_of_the_file_are_trimmed_and_white_space_does_not_separate_them() {
        let route = |provider: &str, secrets: &str| {
            format!(
                "[[route]]\nname = \"{provider}\"\nprovider = \"{provider}\"\nsecrets = {secrets}\nupstream_url = \
                 \"http://app/\"\n"
            )
        };
        let (_directory, options) = with(&format!(
            "{}{}signature = \"v4\"\n",
            route("stripe", r#"[" whsec_a\n", "whsec_b", " "]"#),
            route("flutterwave", r#"" a secret hash, with blanks ""#),
        ));
        let settings = options.validate().unwrap();
        let [stripe, flutterwave] = &settings.routes[..] else { panic!("{settings:?}") };
        let read = |route: &crate::route::Route| -> Vec<String> {
            route.secrets.read.iter().map(|secret| secret.expose().to_owned()).collect()
        };
        assert_eq!(read(stripe), ["whsec_a", "whsec_b"]);
        assert_eq!(read(flutterwave), ["a secret hash, with blanks"]);
        for provider in ["stripe", "paystack"] {
            let found = problems(&route(provider, r#""hunter2 hunter2""#));
            assert!(found.len() == 1 && found[0].starts_with("oncegate.toml:4 secrets: "), "{found:?}");
            assert!(found[0].contains("comma or white space") && !found[0].contains("hunter2"), "{found:?}");
        }
        let list = Options { stripe_webhook_secret: Some("whsec_a whsec_b".into()), ..usable() };
        assert_eq!(complaints(list), ["STRIPE_WEBHOOK_SECRET"]);
    }

    #[test]
    fn routes_do_not_mix_paystacks_test_and_live_mode() {
        let route = |name: &str, tenant: &str, secrets: &str| {
            format!(
                "[[route]]\nname = \"{name}\"\nprovider = \"paystack\"\ntenant = \"{tenant}\"\nsecrets = {secrets}\n\
                 upstream_url = \"http://app/\"\n"
            )
        };
        let found = problems(&route("a", "t", r#"["sk_live_hunter2", "sk_test_hunter2"]"#));
        assert!(found.len() == 1 && found[0].starts_with("oncegate.toml:5 secrets: "), "{found:?}");
        assert!(!found[0].contains("hunter2"), "{found:?}");
        let live = route("live", "t", r#""sk_live_hunter2""#);
        let found = problems(&format!("{live}{}", route("test", "t", r#""sk_test_hunter2""#)));
        assert!(found.len() == 1 && found[0].contains("give them tenants of their own"), "{found:?}");
        assert!(!found[0].contains("hunter2"), "{found:?}");
        assert!(problems(&format!("{live}{}", route("test", "u", r#""sk_test_hunter2""#))).is_empty());
    }

    #[test]
    fn a_routes_time_out_has_the_limits_and_the_order_of_the_general_one() {
        let with = |timeout: &str| {
            problems(&format!(
                "[[route]]\nname = \"a\"\nprovider = \"paystack\"\nsecrets = \"sk\"\nupstream_url = \"http://app/\"\n\
                 upstream_timeout = \"{timeout}\"\n"
            ))
        };
        let connect = Options::default().upstream_connect_timeout;
        let less = humantime::format_duration(connect).to_string();
        for (timeout, wanted) in [
            ("0s", &["0s given, permitted is 1ms to", "0s given, has to be more than UPSTREAM_CONNECT_TIMEOUT"][..]),
            ("1ms", &["1ms given, has to be more than UPSTREAM_CONNECT_TIMEOUT"]),
            (&less, &["given, has to be more than UPSTREAM_CONNECT_TIMEOUT"]),
            ("25h", &["given, permitted is 1ms to", "with GATEWAY_LOCK_MARGIN"]),
        ] {
            let found = with(timeout);
            assert_eq!(found.len(), wanted.len(), "{timeout}: {found:?}");
            for (found, wanted) in found.iter().zip(wanted) {
                assert!(found.starts_with("oncegate.toml:6 upstream_timeout: "), "{timeout}: {found}");
                assert!(found.contains(wanted), "{timeout}: {found}");
            }
        }
        assert!(with(&format!("{less} 1ms")).is_empty());
    }

    #[test]
    fn what_is_no_list_of_routes_is_a_problem() {
        for (text, wanted) in [
            ("", "oncegate.toml:1: holds no [[route]]"),
            ("\n[route]\nname = \"a\"", "oncegate.toml:2 route"),
            ("route = 1", "oncegate.toml:1 route"),
            ("\n\nroutes = []", "oncegate.toml:3 routes"),
            ("[[route]]\nname = ", "oncegate.toml:2:"),
            ("[[route]]\nname = \"a\"\nname = \"b\"", "oncegate.toml:3:"),
        ] {
            let found = problems(text);
            assert!(found.iter().any(|problem| problem.starts_with(wanted)), "{text}: {found:?}");
        }
        let options = Options { config: Some("/nonexistent/oncegate.toml".into()), ..usable() };
        assert_eq!(complaints(options), ["ONCEGATE_CONFIG"]);
        assert!(complaints(Options { config: Some("".into()), ..usable() }).is_empty());
    }

    #[test]
    fn g3_a_file_that_only_speaks_of_enforcement_makes_no_gateway() {
        for text in ["enforcement = \"observe\"", "enforcement = \"enforce\"\nroute = []"] {
            let found = problems(text);
            let starts: Vec<_> = found.iter().filter_map(|problem| problem.split(": ").next()).collect();
            assert_eq!(starts, ["UPSTREAM_URL", "routes"], "{found:?}");
            assert!(found[1].contains("add a [[route]] to oncegate.toml"), "{found:?}");
            let (_directory, options) = with(text);
            let blank = Options { stripe_webhook_secret: Some(" ".into()), ..options.clone() };
            assert_eq!(complaints(Options { upstream_url: Some("http://app/".into()), ..blank }), ["routes"]);
            assert!(complaints(Options { config: options.config, ..usable() }).is_empty(), "{text}");
        }
    }

    #[test]
    fn of_a_file_that_cannot_be_read_nothing_else_is_guessed() {
        let missing = Options { config: Some("/nonexistent/oncegate.toml".into()), ..Options::default() };
        assert_eq!(complaints(missing.clone()), ["ONCEGATE_CONFIG"]);
        let broken = problems("[[route]]\nname = ");
        assert!(broken.iter().all(|problem| problem.starts_with("oncegate.toml:2:")), "{broken:?}");
        // The routes that the settings make need their application whatever the file says.
        let secret = Options { stripe_webhook_secret: Some("whsec_test".into()), ..missing };
        assert_eq!(complaints(secret), ["ONCEGATE_CONFIG", "UPSTREAM_URL"]);
    }

    #[test]
    fn g10_routes_that_would_starve_each_other_do_not_start() {
        let route = |name: &str, url: &str, tenant: &str| {
            format!(
                "[[route]]\nname = \"{name}\"\nprovider = \"stripe\"\nsecrets = \"whsec\"\ntenant = \"{tenant}\"\n\
                 upstream_url = \"{url}\"\n"
            )
        };
        let two = |first, second| problems(&format!("{}{}", route("a", first, "t"), route("b", second, "t")));
        assert!(two("http://x/", "http://x/").is_empty());
        assert!(two("http://x/", "http://y/")[0].contains("would never get an event"));
        assert!(problems(&format!("{}{}", route("a", "http://x/", "t"), route("b", "http://y/", "u"))).is_empty());
        // Against a route that the settings make as well.
        let (_directory, options) = with(&route("stripe", "http://app/", "default"));
        let both = Options { config: options.config, ..usable() };
        assert_eq!(complaints(both).len(), 2, "the path twice, and another application");
    }
}

#[test]
fn w15_an_address_has_a_quarter_of_the_connections_unless_it_is_that_of_a_proxy_or_told_otherwise() {
    let per_address = |max, hops, told| {
        let options = Options {
            gateway_connections_max: max,
            gateway_trusted_hops: hops,
            gateway_connections_per_address: told,
            ..usable()
        };
        options.validate().unwrap().http.connections_per_address.map(NonZeroUsize::get)
    };
    assert_eq!(
        [per_address(4_096, 0, None), per_address(1, 0, None), per_address(8, 0, None)],
        [Some(1_024), Some(1), Some(2)]
    );
    assert_eq!([per_address(4_096, 1, None), per_address(4_096, 2, None)], [None, None]);
    assert_eq!([per_address(4_096, 0, Some(0)), per_address(4_096, 1, Some(9))], [None, Some(9)]);
}

#[test]
fn w15_a_source_has_a_quarter_of_the_budget_for_bodies_unless_its_address_is_everybodys() {
    let per_source = |body, budget, hops, connections| {
        let options = Options {
            gateway_body_bytes_max: body,
            gateway_body_budget: budget,
            gateway_trusted_hops: hops,
            gateway_connections_per_address: connections,
            ..usable()
        };
        options.validate().unwrap().body.bytes_per_source
    };
    let (body, budget) = (256 << 10, 64 << 20);
    assert_eq!(per_source(body, budget, 0, None), Some(16 << 20));
    assert_eq!(per_source(body, 512 << 10, 0, None), Some(256 << 10), "the largest body fits");
    // Behind our own proxy a source is the address that it saw, whatever holds for its connections.
    assert_eq!([per_source(body, budget, 1, None), per_source(body, budget, 1, Some(0))], [Some(16 << 20); 2]);
    // Something hides the senders' addresses.
    assert_eq!(per_source(body, budget, 0, Some(0)), None);
    assert_eq!(per_source(body, budget, 0, Some(4_096)), Some(16 << 20));
}
