//! Each provider through the whole gateway: signed by its documented rule, named, delivered.

use std::{
    io::Write as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use oncegate_gateway::config::{FlutterwaveVersion, Options};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, RsaKeySize, SigningKey as _};
use sha2::{Sha256, Sha512};
use tokio::{sync::watch, time::timeout};

use crate::{
    client::{PATIENCE, STRIPE, event, request, send, signature},
    harness::Harness,
};

/// How many deliver at once while secrets are rotated.
const SENDERS: usize = 4;

const PAYPAL: &str = "/webhooks/payments/paypal";
pub(crate) const PAYPAL_BODY: &str =
    r#"{"id":"WH-1","event_type":"PAYMENT.CAPTURE.COMPLETED","resource":{"amount":1}}"#;

/// PayPal, with a root and a certificate of its own.
pub(crate) struct PayPal {
    key: KeyPair,
    directory: tempfile::TempDir,
}

impl PayPal {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
        let issue =
            |name: &str| CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &root).unwrap().pem();
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(directory.path().join(name), text).unwrap();
        write("roots.pem", root.pem());
        write("CERT-good", issue("messageverificationcerts.paypal.com"));
        write("CERT-other", issue("www.paypal.com"));
        write("CERT-html", "<html>502 Bad Gateway</html>".to_owned());
        Self { key, directory }
    }

    pub(crate) fn options(&self, options: Options) -> Options {
        Options {
            paypal_webhook_id: Some("5FR00112AB334455C".into()),
            paypal_cert_dir: Some(self.directory.path().to_owned()),
            paypal_trust_anchors_file: Some(self.directory.path().join("roots.pem")),
            ..options
        }
    }

    pub(crate) fn webhook(&self, certificate: &str, body: &str) -> String {
        let (id, time) = ("6f1c2e40-ffe8-11f0-9a2b-2d7c0a51e6b3", "2026-02-02T02:39:41Z");
        let message = format!("{id}|{time}|5FR00112AB334455C|{}", crc32fast::hash(PAYPAL_BODY.as_bytes()));
        let signature = STANDARD.encode(self.key.sign(message.as_bytes()).unwrap());
        let headers = [
            ("PayPal-Transmission-Id", id),
            ("PayPal-Transmission-Time", time),
            ("PayPal-Transmission-Sig", &signature),
            ("PayPal-Cert-Url", &format!("https://api.paypal.com/v1/notifications/certs/{certificate}")),
            ("PayPal-Auth-Algo", "SHA256withRSA"),
        ];
        request("POST", PAYPAL, &headers, body)
    }
}

#[tokio::test]
async fn paypals_webhooks_go_end_to_end_with_certificates_from_a_directory() {
    let paypal = PayPal::new();
    let harness = Harness::with(|options| paypal.options(options)).await;
    let answer = harness.send(paypal.webhook("CERT-good", PAYPAL_BODY)).await;
    assert_eq!(answer.said(), (200, r#"{"status":"processed"}"#));
    let claim = harness.sidecar.claims().remove(0);
    assert_eq!(claim.key.unwrap().event_id, "WH-1");
    assert_eq!(claim.event_type, "PAYMENT.CAPTURE.COMPLETED");
    assert_eq!(claim.delivery_id, "6f1c2e40-ffe8-11f0-9a2b-2d7c0a51e6b3");
    let headers = &harness.application.deliveries()[0].headers;
    assert!(headers.contains_key("paypal-transmission-sig"), "G7: the application can verify again");

    // G6: what waiting mends is answered with 503, anything else with the one 401.
    for certificate in ["CERT-unknown", "CERT-html"] {
        let answer = harness.send(paypal.webhook(certificate, PAYPAL_BODY)).await;
        assert_eq!(answer.said(), (503, r#"{"status":"unavailable"}"#), "{certificate}");
        assert_eq!(answer.header("retry-after"), Some("5"));
    }
    for (certificate, body) in [("CERT-other", PAYPAL_BODY), ("../roots.pem", PAYPAL_BODY), ("CERT-good", "{}")] {
        let answer = harness.send(paypal.webhook(certificate, body)).await;
        assert_eq!(answer.said(), (401, r#"{"status":"unauthorized"}"#), "{certificate}");
    }
    assert_eq!(harness.sidecar.claims().len(), 1);
    for (verdict, count) in
        [("cert_unavailable", 2), ("untrusted_certificate", 1), ("untrusted_cert_url", 1), ("bad_signature", 1)]
    {
        let name = format!("oncegate_gateway_refusals_total{{verdict=\"{verdict}\"}}");
        assert_eq!(harness.metric(&name), count, "{verdict}");
    }
}

#[tokio::test]
async fn w14_made_up_names_of_certificates_are_failures_of_their_sender_and_trouble_with_one_is_not() {
    let paypal = PayPal::new();
    let harness = Harness::with(|options| Options { gateway_failures_per_minute: 3, ..paypal.options(options) }).await;
    let status = async |certificate: &str| harness.send(paypal.webhook(certificate, PAYPAL_BODY)).await.status;
    for _ in 0..10 {
        assert_eq!(status("CERT-html").await, 503);
    }
    // Each of the first may come from a genuine sender, which is told to try again.
    for number in 0..3 {
        assert_eq!(status(&format!("CERT-made-up-{number}")).await, 503);
    }
    for number in 3..6 {
        assert_eq!(status(&format!("CERT-made-up-{number}")).await, 429);
    }
    assert_eq!(status("CERT-html").await, 503);
    assert_eq!(status("CERT-good").await, 200);
}

fn hmac256(key: &[u8], parts: &[&str]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
    parts.iter().for_each(|part| mac.update(part.as_bytes()));
    mac.finalize().into_bytes().to_vec()
}

#[tokio::test]
async fn every_provider_is_verified_and_named_by_its_own_rule() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("oncegate.toml");
    let routes = r#"
        [[route]]
        path = "/own/services"
        provider = "standard_webhooks"
        tenant = "own"
        secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]

        [[route]]
        name = "flutterwave-v4"
        provider = "flutterwave"
        signature = "v4"
        tenant = "v4"
        secrets = ["a secret hash"]
    "#;
    std::fs::write(&file, routes).unwrap();
    let harness = Harness::with(|options| Options {
        config: Some(file),
        flutterwave_webhook_secret: Some("the hash of v3".into()),
        flutterwave_signature: Some(FlutterwaveVersion::V3),
        paystack_webhook_secret: Some("sk_test_1".into()),
        ..options
    })
    .await;
    let body = r#"{"event":"charge.success","data":{"reference":"re4lyvq3s3","status":"success"}}"#;
    let mut mac = Hmac::<Sha512>::new_from_slice(b"sk_test_1").unwrap();
    mac.update(body.as_bytes());
    let paystack = hex::encode(mac.finalize().into_bytes());
    let paystack = request("POST", "/webhooks/payments/paystack", &[("x-paystack-signature", &paystack)], body);

    let body = r#"{"event":"charge.completed","data":{"id":912448301,"status":"successful"}}"#;
    let v3 = request("POST", "/webhooks/payments/flutterwave", &[("verif-hash", "the hash of v3")], body);

    let body = r#"{"webhook_id":"wbk_1","type":"charge.completed","data":{"id":"chg_1"}}"#;
    let v4 = STANDARD.encode(hmac256(b"a secret hash", &[body]));
    let v4 = request("POST", "/webhooks/payments/flutterwave-v4", &[("flutterwave-signature", &v4)], body);

    let body = r#"{"type":"invoice.paid","data":{}}"#;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs().to_string();
    let key = STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
    let own = format!("v1,{}", STANDARD.encode(hmac256(&key, &["msg_1", ".", &now, ".", body])));
    let own = [("webhook-id", "msg_1"), ("webhook-timestamp", &now), ("webhook-signature", &own)];
    let own = request("POST", "/own/services", &own, body);

    for (bytes, tenant, provider, id, event_type) in [
        (paystack, "default", "paystack", "charge.success:re4lyvq3s3:success", "charge.success"),
        (v3, "default", "flutterwave", "charge.completed:912448301:successful", "charge.completed"),
        (v4, "v4", "flutterwave", "wbk_1", "charge.completed"),
        (own, "own", "standard_webhooks", "msg_1", "invoice.paid"),
    ] {
        let answer = harness.send(bytes).await;
        assert_eq!(answer.said(), (200, r#"{"status":"processed"}"#), "{provider}");
        let claim = harness.sidecar.claims().pop().unwrap();
        let key = claim.key.unwrap();
        assert_eq!((&*key.tenant, &*key.provider, &*key.event_id), (tenant, provider, id));
        assert_eq!(claim.event_type, event_type);
        assert_eq!(claim.delivery_id, "", "only PayPal signs one");
    }
    // G11: counted, because nothing in it was proved.
    assert_eq!(harness.metric("oncegate_gateway_weak_events_total"), 1);
}

/// A Paystack event is named after its type, which contains a full stop.
#[tokio::test]
async fn g7_what_is_delivered_is_verified_by_a_second_gateway_whatever_its_id() {
    const KEY: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let first = Harness::with(|options| Options {
        paystack_webhook_secret: Some("sk_test_1".into()),
        upstream_secret: Some(KEY.into()),
        ..options
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("routes.toml");
    let route = format!("[[route]]\nname = \"hop\"\nprovider = \"standard_webhooks\"\nsecrets = [\"{KEY}\"]\n");
    std::fs::write(&file, route).unwrap();
    let second = Harness::with(|options| Options { config: Some(file), ..options }).await;

    let body = r#"{"event":"charge.success","data":{"reference":"re4lyvq3s3","status":"success"}}"#;
    let mut mac = Hmac::<Sha512>::new_from_slice(b"sk_test_1").unwrap();
    mac.update(body.as_bytes());
    let signature = hex::encode(mac.finalize().into_bytes());
    let webhook = request("POST", "/webhooks/payments/paystack", &[("x-paystack-signature", &signature)], body);
    assert_eq!(first.send(webhook).await.status, 200);

    let delivery = first.application.deliveries().pop().unwrap();
    assert_eq!(delivery.headers["idempotency-key"], "default/paystack/charge.success:re4lyvq3s3:success");
    let names = ["webhook-id", "webhook-timestamp", "webhook-signature"];
    let hop = names.map(|name| (name, delivery.headers[name].to_str().unwrap()));
    let answer = second.send(request("POST", "/webhooks/payments/hop", &hop, body)).await;
    assert_eq!(answer.said(), (200, r#"{"status":"processed"}"#));
    let key = second.sidecar.claims().pop().unwrap().key.unwrap();
    assert_eq!(key.event_id, "default/paystack/charge%2Esuccess:re4lyvq3s3:success");
}

/// Swaps a file's content as Kubernetes does: another file takes over the name.
fn swap(path: &Path, text: &str) {
    let mut next = tempfile::NamedTempFile::new_in(path.parent().unwrap()).unwrap();
    next.write_all(text.as_bytes()).unwrap();
    next.persist(path).unwrap();
}

// T39
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w5_rotation_under_load_refuses_no_valid_event() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stripe");
    swap(&path, "whsec_old");
    let harness = Harness::with(|options| Options {
        stripe_webhook_secret: None,
        stripe_webhook_secret_file: Some(path.clone()),
        gateway_secret_reload: Duration::from_millis(5),
        ..options
    })
    .await;
    let address = harness.address;
    let deliver = move |secret: &str, id: &str| {
        let body = event(id);
        send(address, request("POST", STRIPE, &[("stripe-signature", &signature(secret, &body))], &body))
    };
    // The secret that the provider signs with. It changes only while both secrets are configured.
    let (secret, signs_with) = watch::channel("whsec_old");
    let stop = Arc::new(AtomicBool::new(false));
    let changed = Arc::new(AtomicUsize::new(0));
    let load: Vec<_> = (0..SENDERS)
        .map(|sender| {
            let (stop, signs_with, changed) = (stop.clone(), signs_with.clone(), changed.clone());
            tokio::spawn(async move {
                let (mut sent, mut last) = (0, "whsec_old");
                while !stop.load(Relaxed) {
                    let secret = *signs_with.borrow();
                    let answer = deliver(secret, &format!("evt_{sender}_{sent}")).await;
                    assert_eq!(answer.said(), (200, r#"{"status":"processed"}"#), "{secret}");
                    sent += 1;
                    if std::mem::replace(&mut last, secret) != secret {
                        changed.fetch_add(1, Relaxed);
                    }
                }
                sent
            })
        })
        .collect();
    let becomes = async |secret: &'static str, status: u16| {
        timeout(PATIENCE, async { while deliver(secret, "probe").await.status != status {} }).await.unwrap();
    };
    swap(&path, "whsec_old,whsec_new");
    becomes("whsec_new", 200).await;
    secret.send_replace("whsec_new");
    // Until then, requests signed with the old one are still under way.
    timeout(PATIENCE, async {
        while changed.load(Relaxed) < SENDERS {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    swap(&path, "whsec_new");
    becomes("whsec_old", 401).await;
    stop.store(true, Relaxed);
    for sender in load {
        assert!(sender.await.unwrap() > 0);
    }
    assert_eq!(harness.metric("oncegate_gateway_secret_reloads_total{result=\"replaced\"}"), 2);
    assert_eq!(harness.metric("oncegate_gateway_secret_reloads_total{result=\"failed\"}"), 0);
}

// T39
#[tokio::test]
async fn w5_a_bad_reload_keeps_the_old_secrets_and_is_counted() {
    let directory = tempfile::tempdir().unwrap();
    let id = directory.path().join("webhook-id");
    swap(&id, "5FR00112AB334455C");
    let paypal = PayPal::new();
    let harness = Harness::with(|options| Options {
        paypal_webhook_id: None,
        paypal_webhook_id_file: Some(id.clone()),
        gateway_secret_reload: Duration::from_millis(5),
        ..paypal.options(options)
    })
    .await;
    let failed = "oncegate_gateway_secret_reloads_total{result=\"failed\"}";
    let failing = "oncegate_gateway_secret_reload_failing";
    for (count, bad) in ["not|an|id", " ", "WEBHOOK_ID"].into_iter().enumerate() {
        swap(&id, bad);
        let wanted = u64::try_from(count).unwrap() + 1;
        timeout(PATIENCE, async {
            while harness.metric(failed) < wanted {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .unwrap();
        assert_eq!(harness.send(paypal.webhook("CERT-good", PAYPAL_BODY)).await.status, 200, "{bad}");
        assert_eq!(harness.metric(failing), 1, "{bad}");
        // Mended, so that the next failure is a new one.
        let replaced = "oncegate_gateway_secret_reloads_total{result=\"replaced\"}";
        swap(&id, &format!("5FR00112AB334455C,X{count}"));
        timeout(PATIENCE, async {
            while harness.metric(replaced) < wanted {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .unwrap();
        assert_eq!(harness.metric(failing), 0, "{bad}");
    }
}

/// A file whose reads hang until somebody writes to it.
#[cfg(unix)]
fn pipe(path: &Path) {
    std::fs::remove_file(path).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w5_a_file_that_hangs_is_told_and_keeps_no_other_secret_from_being_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let [hanging, paystack] = ["hanging", "paystack"].map(|name| directory.path().join(name));
    swap(&hanging, "whsec_1");
    swap(&paystack, "sk_test_0");
    let harness = Harness::with(|options| Options {
        // The first of the routes.
        stripe_webhook_secret: None,
        stripe_webhook_secret_file: Some(hanging.clone()),
        paystack_webhook_secret_file: Some(paystack.clone()),
        gateway_secret_reload: Duration::from_millis(5),
        ..options
    })
    .await;
    let until = async |name: &str, is: u64| {
        let met = async {
            while harness.metric(name) != is {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, met).await.unwrap_or_else(|_| panic!("{name} {}", harness.metric(name)));
    };
    let [replaced, failed] =
        ["replaced", "failed"].map(|result| format!("oncegate_gateway_secret_reloads_total{{result=\"{result}\"}}"));
    let failing = "oncegate_gateway_secret_reload_failing";
    pipe(&hanging);
    until(failing, 1).await;
    for count in 1..4 {
        swap(&paystack, &format!("sk_test_{count}"));
        until(&replaced, count).await;
    }
    assert_eq!((harness.metric(&failed), harness.metric(failing)), (1, 1), "once");
    // The read that hung ends, and the next one finds a file again.
    let pipe = directory.path().join("pipe");
    std::fs::rename(&hanging, &pipe).unwrap();
    swap(&hanging, "whsec_again");
    std::fs::write(&pipe, "whsec_again").unwrap();
    until(failing, 0).await;
    let body = event("evt_again");
    let answer =
        harness.send(request("POST", STRIPE, &[("stripe-signature", &signature("whsec_again", &body))], &body));
    assert_eq!(answer.await.status, 200);
}

#[tokio::test]
async fn w5_a_reload_mixes_no_modes_of_paystack_between_routes_of_a_tenant() {
    let directory = tempfile::tempdir().unwrap();
    let [first, second, config] = ["first", "second", "routes.toml"].map(|name| directory.path().join(name));
    swap(&first, "sk_test_1");
    swap(&second, "sk_test_2");
    swap(&config, "[[route]]\nname = \"second\"\nprovider = \"paystack\"\nsecrets_file = \"second\"\n");
    let harness = Harness::with(|options| Options {
        config: Some(config),
        paystack_webhook_secret_file: Some(first.clone()),
        gateway_secret_reload: Duration::from_millis(5),
        ..options
    })
    .await;
    let status = async |secret: &str| {
        let body = r#"{"event":"charge.success","data":{"reference":"order-1","status":"success"}}"#;
        let mut mac = Hmac::<Sha512>::new_from_slice(secret.as_bytes()).unwrap();
        mac.update(body.as_bytes());
        let signature = hex::encode(mac.finalize().into_bytes());
        let headers = [("x-paystack-signature", signature.as_str())];
        harness.send(request("POST", "/webhooks/payments/paystack", &headers, body)).await.status
    };
    let until = async |result: &str, count: u64| {
        let name = format!("oncegate_gateway_secret_reloads_total{{result=\"{result}\"}}");
        let met = async {
            while harness.metric(&name) < count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, met).await.unwrap();
    };
    swap(&first, "sk_live_1");
    until("failed", 1).await;
    assert_eq!(
        [status("sk_test_1").await, status("sk_live_1").await],
        [200, 401],
        "test mode is still in the second one"
    );
    // The change-over is complete: both are taken.
    swap(&second, "sk_live_2");
    until("replaced", 2).await;
    assert_eq!([status("sk_test_1").await, status("sk_live_1").await], [401, 200]);
    // A spoiled file keeps no other key from being replaced.
    swap(&first, "sk_test_3");
    until("failed", 2).await;
    swap(&second, "sk_live_3");
    until("replaced", 3).await;
    assert_eq!([status("sk_test_3").await, status("sk_live_1").await], [401, 200]);
}

#[tokio::test]
async fn w5_what_signs_the_hop_to_the_application_is_read_again_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("upstream");
    swap(&path, "whsec_b2xkIG9sZCBvbGQgb2xkIG9sZCBvbGQ=");
    let harness = Harness::with(|options| Options {
        upstream_secret_file: Some(path.clone()),
        gateway_secret_reload: Duration::from_millis(5),
        ..options
    })
    .await;
    assert_eq!(harness.deliver("evt_1").await.status, 200);
    swap(&path, "whsec_bmV3IG5ldyBuZXcgbmV3IG5ldyBuZXc=");
    timeout(PATIENCE, async {
        while harness.metric("oncegate_gateway_secret_reloads_total{result=\"replaced\"}") < 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(harness.deliver("evt_2").await.status, 200);
    for (delivery, key) in
        harness.application.deliveries().iter().zip([&b"old old old old old old"[..], b"new new new new new new"])
    {
        let header = |name: &str| delivery.headers[name].to_str().unwrap();
        let body = std::str::from_utf8(&delivery.body).unwrap();
        let wanted = hmac256(key, &[header("webhook-id"), ".", header("webhook-timestamp"), ".", body]);
        assert_eq!(header("webhook-signature"), format!("v1,{}", STANDARD.encode(wanted)));
    }
}
