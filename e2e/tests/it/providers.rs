//! Every provider end to end: signed by its documented rule, accepted, delivered once, and its duplicate answered.

use anyhow::{Context as _, Result};
use oncegate_api::v1::HistoryRequest;
use oncegate_api::v1::idempotency_service_client::IdempotencyServiceClient;
use oncegate_e2e::{
    http_client::{self, Answer},
    program::{Oncegate, Running},
    signers::{self, Headers, PayPal},
    stripe,
    upstream::Upstream,
};
use tempfile::TempDir;

use crate::setup::word;

const STRIPE: &str = "whsec_of_the_provider_tests";
const FLUTTERWAVE: &str = "flutterwave-hash-of-the-tests";
const PAYSTACK: &str = "sk_test_of_the_provider_tests";
const OWN: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const PAYPAL_WEBHOOK: &str = "4JH86294D6297924G";

struct Routes {
    upstream: Upstream,
    gateway: std::net::SocketAddr,
    sidecar: std::net::SocketAddr,
    paypal: PayPal,
    program: Running,
    _directory: TempDir,
}

impl Routes {
    /// The four providers by environment, and a service of one's own by the file.
    async fn start(flutterwave_signature: &str) -> Result<Self> {
        let upstream = Upstream::start().await?;
        let directory = tempfile::tempdir()?;
        let paypal = PayPal::new(PAYPAL_WEBHOOK)?;
        let certificates = directory.path().join("certificates");
        std::fs::create_dir(&certificates)?;
        let root = directory.path().join("root.pem");
        paypal.write(&certificates, &root)?;
        let config = directory.path().join("oncegate.toml");
        std::fs::write(
            &config,
            format!(
                "[[route]]\nname = \"billing\"\nprovider = \"standard_webhooks\"\ntenant = \"own\"\nsecrets = [\"{OWN}\"]\n"
            ),
        )?;
        let mut program = Oncegate::new(directory.path(), ["all"])?
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .env("GATEWAY_LISTEN", "127.0.0.1:0")
            .env("UPSTREAM_URL", upstream.url())
            .env("ONCEGATE_CONFIG", config.to_string_lossy())
            .env("STRIPE_WEBHOOK_SECRET", STRIPE)
            .env("FLUTTERWAVE_WEBHOOK_SECRET", FLUTTERWAVE)
            .env("FLUTTERWAVE_SIGNATURE", flutterwave_signature)
            .env("PAYSTACK_WEBHOOK_SECRET", PAYSTACK)
            .env("PAYPAL_WEBHOOK_ID", PAYPAL_WEBHOOK)
            .env("PAYPAL_CERT_DIR", certificates.to_string_lossy())
            .env("PAYPAL_TRUST_ANCHORS_FILE", root.to_string_lossy())
            .start()?;
        let gateway = program.address("gateway").await?;
        let sidecar = program.address("sidecar").await?;
        Ok(Self { upstream, gateway, sidecar, paypal, program, _directory: directory })
    }

    async fn send(&self, route: &str, headers: &Headers, body: &[u8]) -> Result<Answer> {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        http_client::post(self.gateway, &format!("/webhooks/payments/{route}"), &headers, body.to_vec()).await
    }

    /// The event ids under which the sidecar knows what came in.
    async fn event_ids(&self) -> Result<Vec<(String, String)>> {
        let mut client = IdempotencyServiceClient::connect(format!("http://{}", self.sidecar)).await?;
        let events = client.history(HistoryRequest::default()).await?.into_inner().events;
        let keys = events.into_iter().filter_map(|history| history.event?.key);
        Ok(keys.map(|key| (key.provider, key.event_id)).collect())
    }
}

#[tokio::test]
async fn each_provider_is_verified_delivered_once_and_its_duplicate_answered() -> Result<()> {
    let routes = Routes::start("v4").await?;
    let stripe_body = stripe::event(&stripe::event_id(), "charge.succeeded");
    let paypal_body = br#"{"id":"WH-1AB","event_type":"PAYMENT.CAPTURE.COMPLETED","resource":{"id":"42"}}"#;
    let flutterwave_body = br#"{"webhook_id":"wbk_1","timestamp":1,"type":"charge.completed","data":{"id":"chg_1"}}"#;
    let paystack_body = br#"{"event":"charge.success","data":{"id":302961,"reference":"ref-1","status":"success"}}"#;
    let own_body = br#"{"type":"invoice.paid","data":{}}"#;
    let webhooks: [(&str, Headers, &[u8]); 5] = [
        ("stripe", vec![(stripe::HEADER, stripe::sign(STRIPE, &stripe_body))], &stripe_body),
        ("paypal", routes.paypal.sign("transmission-1", paypal_body)?, paypal_body),
        ("flutterwave", signers::flutterwave_v4(FLUTTERWAVE, flutterwave_body), flutterwave_body),
        ("paystack", signers::paystack(PAYSTACK, paystack_body), paystack_body),
        ("billing", signers::standard_webhooks(OWN, "msg_1", own_body), own_body),
    ];
    for (number, (route, headers, body)) in webhooks.iter().enumerate() {
        assert_eq!(word(&routes.send(route, headers, body).await?), "200 processed", "{route}");
        assert_eq!(word(&routes.send(route, headers, body).await?), "200 already_processed", "{route}");
        let deliveries = routes.upstream.requests();
        assert_eq!(deliveries.len(), number + 1, "{route}");
        let delivery = &deliveries[number];
        assert_eq!(&delivery.body[..], *body, "{route}");
        for (name, value) in headers.iter().filter(|(name, _)| name.contains("sig") || name.contains("hash")) {
            assert_eq!(delivery.header(name), value, "{route}: the application can verify the signature itself");
        }
        // Another body under the same signature.
        let mut forged = body.to_vec();
        let place = forged.len() - 3;
        forged[place] ^= 1;
        let answer = routes.send(route, headers, &forged).await?;
        assert_eq!(answer.status.as_u16(), 401, "{route}: {:?}", answer.body);
    }
    assert_eq!(routes.upstream.requests().len(), webhooks.len());
    assert_eq!(routes.event_ids().await?.len(), webhooks.len(), "nothing forged is remembered");
    Ok(())
}

#[tokio::test]
async fn a_paypal_transmission_that_comes_back_with_another_body_is_refused() -> Result<()> {
    let routes = Routes::start("v4").await?;
    let body = br#"{"id":"WH-2","event_type":"PAYMENT.CAPTURE.COMPLETED"}"#;
    assert_eq!(word(&routes.send("paypal", &routes.paypal.sign("t-1", body)?, body).await?), "200 processed");
    // Validly signed, as whoever can make a body of the same CRC could have it: the transmission is known.
    let other = br#"{"id":"WH-3","event_type":"PAYMENT.CAPTURE.COMPLETED"}"#;
    let answer = routes.send("paypal", &routes.paypal.sign("t-1", other)?, other).await?;
    assert_eq!(answer.status.as_u16(), 422, "{:?}", answer.body);
    assert_eq!(routes.upstream.requests().len(), 1);
    // Also where the body is of an event that this process knows to be completed.
    assert_eq!(word(&routes.send("paypal", &routes.paypal.sign("t-3", other)?, other).await?), "200 processed");
    let answer = routes.send("paypal", &routes.paypal.sign("t-3", body)?, body).await?;
    assert_eq!(answer.status.as_u16(), 422, "{:?}", answer.body);
    assert_eq!(routes.upstream.requests().len(), 2);
    // A certificate that is not there is a matter of time, not of the signature.
    let mut headers = routes.paypal.sign("t-2", other)?;
    headers.retain(|(name, _)| *name != "paypal-cert-url");
    headers.push(("paypal-cert-url", "https://api.paypal.com/v1/notifications/certs/CERT-unknown".into()));
    let answer = routes.send("paypal", &headers, other).await?;
    assert_eq!(answer.status.as_u16(), 503);
    assert!(!answer.header("retry-after").is_empty());
    Ok(())
}

#[tokio::test]
async fn flutterwave_v3_and_v4_do_not_stand_in_for_each_other() -> Result<()> {
    let body = br#"{"event":"charge.completed","data":{"id":285959875,"status":"successful"}}"#;
    let v3 = Routes::start("v3").await?;
    assert_eq!(word(&v3.send("flutterwave", &signers::flutterwave_v3(FLUTTERWAVE), body).await?), "200 processed");
    let answer = v3.send("flutterwave", &signers::flutterwave_v4(FLUTTERWAVE, body), body).await?;
    assert_eq!(answer.status.as_u16(), 401);
    let ids = v3.event_ids().await?;
    assert_eq!(ids, [("flutterwave".to_owned(), "charge.completed:285959875:successful".to_owned())]);
    let log = v3.program.output();
    assert!(log.to_lowercase().contains("weak"), "v3 is labelled weak: {log}");
    let v4 = Routes::start("v4").await?;
    let answer = v4.send("flutterwave", &signers::flutterwave_v3(FLUTTERWAVE), body).await?;
    assert_eq!(answer.status.as_u16(), 401);
    assert_eq!(v4.upstream.requests().len(), 0);
    Ok(())
}

#[tokio::test]
async fn paystack_refunds_without_an_id_are_told_apart() -> Result<()> {
    let routes = Routes::start("v4").await?;
    let refund = |reference: &str| {
        format!(
            r#"{{"event":"refund.processed","data":{{"refund_reference":"{reference}","transaction_reference":"t1","amount":"100","status":"processed"}}}}"#
        )
    };
    for reference in ["r1", "r2"] {
        let body = refund(reference);
        let headers = signers::paystack(PAYSTACK, body.as_bytes());
        assert_eq!(word(&routes.send("paystack", &headers, body.as_bytes()).await?), "200 processed");
    }
    let mut ids: Vec<String> = routes.event_ids().await?.into_iter().map(|(_, id)| id).collect();
    ids.sort();
    assert_eq!(ids, ["refund.processed:r1:processed", "refund.processed:r2:processed"]);
    routes.program.output().lines().next().context("a log")?;
    Ok(())
}
