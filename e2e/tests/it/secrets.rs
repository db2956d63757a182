//! Secrets are in no log, error, metric or other output, at the level that tells most (W17). Every program of every test is
//! searched for the secrets that it was given; here is one run through all that could tell one.

use anyhow::Result;
use oncegate_api::v1::{EventKey, HistoryRequest, idempotency_service_client::IdempotencyServiceClient};
use oncegate_e2e::{
    eventually, http_client,
    postgres::Database,
    program::{LOG_EVERYTHING, Oncegate},
    redis::Redis,
    secrets::Secrets,
    signers::{self, Headers, PayPal},
    stripe,
    upstream::Upstream,
};

const STRIPE: &str = "whsec_that_no_log_may_tell_1";
const STRIPE_OLD: &str = "whsec_that_no_log_may_tell_2";
const FLUTTERWAVE: &str = "flutterwave-hash-that-no-log-may-tell";
const PAYSTACK: &str = "sk_live_that_no_log_may_tell";
const OWN: &str = "whsec_bm8gbG9nIG1heSBldmVyIHRlbGwgdGhpcw==";
const HOP: &str = "whsec_bm9yIHRoaXMsIHdoaWNoIHNpZ25zIHRoZSBob3A=";
const REDIS_PASSWORD: &str = "redis-password-that-no-log-may-tell";
const DATABASE_PASSWORD: &str = "database-password-that-no-log-may-tell";

/// The URL with a password, which the tests' server does not ask for.
fn with_password(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").expect("a URL");
    let (user, host) = rest.split_once('@').unwrap_or(("postgres", rest));
    let user = user.split(':').next().unwrap_or(user);
    format!("{scheme}://{user}:{DATABASE_PASSWORD}@{host}")
}

#[tokio::test]
async fn a_whole_run_at_trace_level_tells_no_secret() -> Result<()> {
    let upstream = Upstream::start().await?;
    let database = Database::create().await?;
    let redis = Redis::start().await?;
    redis.command(&format!("CONFIG SET requirepass {REDIS_PASSWORD}")).await?;
    let directory = tempfile::tempdir()?;
    let paypal = PayPal::new("4JH86294D6297924G")?;
    let (certificates, root) = (directory.path().join("certificates"), directory.path().join("root.pem"));
    std::fs::create_dir(&certificates)?;
    paypal.write(&certificates, &root)?;
    let config = directory.path().join("oncegate.toml");
    let route = format!("[[route]]\nname = \"billing\"\nprovider = \"standard_webhooks\"\nsecrets = [\"{OWN}\"]\n");
    std::fs::write(&config, route)?;
    let paystack_file = directory.path().join("paystack");
    std::fs::write(&paystack_file, PAYSTACK)?;
    let cache_key = database.query("select value from oncegate_meta where key = 'cache_key'").await?;
    let redis_url = redis.url().replace("redis://", &format!("redis://:{REDIS_PASSWORD}@"));

    let mut program = Oncegate::new(directory.path(), ["all"])?
        .env("ONCEGATE_LOG", LOG_EVERYTHING)
        .env("DATABASE_URL", with_password(database.url()))
        .env("REDIS_URL", redis_url)
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        .env("GATEWAY_LISTEN", "127.0.0.1:0")
        .env("ADMIN_LISTEN", "127.0.0.1:0")
        .env("UPSTREAM_URL", upstream.url())
        .env("UPSTREAM_SECRET", HOP)
        .env("ONCEGATE_CONFIG", config.to_string_lossy())
        .env("STRIPE_WEBHOOK_SECRET", format!("{STRIPE},{STRIPE_OLD}"))
        .env("FLUTTERWAVE_WEBHOOK_SECRET", FLUTTERWAVE)
        .env("FLUTTERWAVE_SIGNATURE", "v4")
        .env("PAYSTACK_WEBHOOK_SECRET_FILE", paystack_file.to_string_lossy())
        .env("PAYPAL_WEBHOOK_ID", "4JH86294D6297924G")
        .env("PAYPAL_CERT_DIR", certificates.to_string_lossy())
        .env("PAYPAL_TRUST_ANCHORS_FILE", root.to_string_lossy())
        .secret(OWN)
        .secret(PAYSTACK)
        .secret(cache_key.trim())
        .start()?;
    let (gateway, sidecar) = (program.address("gateway").await?, program.address("sidecar").await?);
    let admin = program.address("admin").await?;

    let stripe_body = stripe::event(&stripe::event_id(), "charge.succeeded");
    let paypal_body = br#"{"id":"WH-1AB","event_type":"PAYMENT.CAPTURE.COMPLETED","resource":{"id":"42"}}"#;
    let flutterwave_body = br#"{"webhook_id":"wbk_1","timestamp":1,"type":"charge.completed","data":{"id":"chg_1"}}"#;
    let paystack_body = br#"{"event":"charge.success","data":{"id":302961,"reference":"ref-1","status":"success"}}"#;
    let own_body = br#"{"type":"invoice.paid","data":{}}"#;
    let webhooks: [(&str, Headers, &[u8]); 6] = [
        ("stripe", vec![(stripe::HEADER, stripe::sign(STRIPE, &stripe_body))], &stripe_body),
        ("stripe", vec![(stripe::HEADER, stripe::sign(STRIPE_OLD, &stripe_body))], &stripe_body),
        ("paypal", paypal.sign("transmission-1", paypal_body)?, paypal_body),
        ("flutterwave", signers::flutterwave_v4(FLUTTERWAVE, flutterwave_body), flutterwave_body),
        ("paystack", signers::paystack(PAYSTACK, paystack_body), paystack_body),
        ("billing", signers::standard_webhooks(OWN, "msg_1", own_body), own_body),
    ];
    let mut answers = String::new();
    for (route, headers, body) in &webhooks {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let path = format!("/webhooks/payments/{route}");
        // Well signed, again, with another body, and not at all.
        for (headers, body, wanted) in [
            (headers.as_slice(), body.to_vec(), 200),
            (headers.as_slice(), body.to_vec(), 200),
            (headers.as_slice(), b"{\"id\":\"forged\"}".to_vec(), 401),
            (&[], body.to_vec(), 401),
        ] {
            let answer = http_client::post(gateway, &path, headers, body).await?;
            assert_eq!(answer.status.as_u16(), wanted, "{route}");
            answers.push_str(&format!("{answer:?}"));
        }
    }
    // Redis has taken what it should.
    redis.command(&format!("AUTH {REDIS_PASSWORD}")).await?;
    eventually("metrics tell of the deliveries", async || {
        let metrics = http_client::get(admin, "/metrics").await.ok()?;
        let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
        metrics.contains("oncegate_gateway").then_some(metrics)
    })
    .await
    .lines()
    .for_each(|line| answers.push_str(line));
    let mut client = IdempotencyServiceClient::connect(format!("http://{sidecar}")).await?;
    let unknown = EventKey { provider: "stripe".into(), event_id: "evt_none".into(), ..EventKey::default() };
    answers
        .push_str(&format!("{:?}", client.history(HistoryRequest { key: Some(unknown), ..Default::default() }).await));
    answers.push_str(&format!("{:?}", client.history(HistoryRequest::default()).await?));
    let ended = program.stop().await?;
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.stderr.contains("\"TRACE\""), "it has logged everything");

    let mut secrets = Secrets::default();
    for secret in [STRIPE, STRIPE_OLD, FLUTTERWAVE, PAYSTACK, OWN, HOP, REDIS_PASSWORD, DATABASE_PASSWORD] {
        secrets.add(secret);
    }
    secrets.add(cache_key.trim());
    assert_eq!(secrets.told_in(&answers), None);
    assert_eq!(secrets.told_in(&ended.to_string()), None);
    Ok(())
}

/// What cannot be used is complained about, and shown by `--print-config`, without being told.
#[tokio::test]
async fn complaints_about_secrets_tell_none() -> Result<()> {
    let redis = Redis::start().await?;
    let database = Database::create().await?;
    let directory = tempfile::tempdir()?;
    let wrong_database = format!("{}_of_nobody", with_password(database.url()));
    let no_database = format!("postgres://me:{DATABASE_PASSWORD}@127.0.0.1:1/none");
    let unparsable = format!("postgres://me:{DATABASE_PASSWORD}@[::1/none");
    // sqlx knows neither.
    let unknown = format!("{}?sslpassword={DATABASE_PASSWORD}", database.url());
    let mistyped = format!("{}?pasword={DATABASE_PASSWORD}", database.url());
    let commands: [&[&str]; 5] = [&["all"], &["sidecar"], &["all", "--print-config"], &["migrate"], &["check"]];
    for url in [&wrong_database, &no_database, &unparsable, &unknown, &mistyped] {
        for arguments in commands {
            let ended = Oncegate::new(directory.path(), arguments.iter().copied())?
                .env("ONCEGATE_LOG", LOG_EVERYTHING)
                .env("DATABASE_URL", url)
                .env("REDIS_URL", redis.url().replace("redis://", &format!("redis://:{REDIS_PASSWORD}@")))
                .env("SIDECAR_LISTEN", "127.0.0.1:0")
                .env("GATEWAY_LISTEN", "127.0.0.1:0")
                .env("UPSTREAM_URL", "http://127.0.0.1:1")
                // No base64: it cannot sign.
                .env("UPSTREAM_SECRET", "whsec_no*base64*at*all")
                .env("STRIPE_WEBHOOK_SECRET", STRIPE)
                // Too long for an id of PayPal's.
                .env("PAYPAL_WEBHOOK_ID", "x".repeat(200))
                .env("STANDARD_WEBHOOKS_SECRET", "whsec_not*base64*either")
                .secret(DATABASE_PASSWORD)
                .run()
                .await?;
            assert!(arguments.contains(&"--print-config") || ended.code != Some(0), "{ended}");
        }
    }
    // Redis refuses a password where it has none, and tells which in some versions.
    let mut program = Oncegate::new(directory.path(), ["sidecar"])?
        .env("ONCEGATE_LOG", LOG_EVERYTHING)
        .env("DATABASE_URL", with_password(database.url()))
        .env("REDIS_HOST", "127.0.0.1")
        .env("REDIS_PORT", redis.url().rsplit(':').next().expect("a port").trim_end_matches('/'))
        .env("REDIS_PASSWORD", REDIS_PASSWORD)
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        .start()?;
    let sidecar = program.address("sidecar").await?;
    program.line_where("Redis refuses the password", |line| line.to_lowercase().contains("auth")).await?;
    let mut client = IdempotencyServiceClient::connect(format!("http://{sidecar}")).await?;
    client.history(HistoryRequest::default()).await?;
    program.stop().await?;
    Ok(())
}
