//! TLS on the gateway's own listener, for where no proxy is in front; and what is told of certificates that end.

use std::{net::SocketAddr, path::Path};

use anyhow::{Context as _, Result};
use http::Method;
use oncegate_e2e::{
    certificates::{Authority, Projected, beginning_of},
    eventually, http_client,
    program::Oncegate,
    signers::PayPal,
    stripe,
};
use oncegate_runtime::tls::{ClientTls, ClientTlsFiles};
use tokio::net::TcpStream;

use crate::{
    access::Guarded,
    setup::{Everything, Ledger, SECRET, STRIPE, word},
};

/// Sends a webhook by TLS: the answer's word, and the certificate that was shown.
async fn deliver(gateway: SocketAddr, ca: &Path) -> Result<(String, Vec<u8>)> {
    let tls = ClientTls::read(&ClientTlsFiles { ca: Some(ca.to_owned()), identity: None }, &[b"http/1.1"])?;
    let stream = tls.connect("localhost".try_into()?, TcpStream::connect(gateway).await?).await?;
    let session = stream.get_ref().1;
    assert_eq!(session.alpn_protocol(), Some(&b"http/1.1"[..]));
    let shown = session.peer_certificates().context("a certificate is shown")?[0].to_vec();
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    let signature = stripe::sign(SECRET, &body);
    let headers = [(stripe::HEADER, signature.as_str())];
    let answer = http_client::send_over(stream, gateway, Method::POST, STRIPE, &headers, body).await?;
    Ok((word(&answer), shown))
}

/// The value of a row of an admin listener's page.
async fn metric(admin: SocketAddr, row: &str) -> Result<Option<i64>> {
    let page = String::from_utf8(http_client::get(admin, "/metrics").await?.body.to_vec())?;
    let value = page.lines().find_map(|line| line.strip_prefix(row)?.strip_prefix(' '));
    value.map(|value| value.parse().with_context(|| value.to_owned())).transpose()
}

/// When what a setting names ends, as the metrics have it.
pub(crate) async fn end(admin: SocketAddr, setting: &str) -> Result<Option<i64>> {
    metric(admin, &format!("oncegate_certificate_expiry_timestamp_seconds{{setting=\"{setting}\"}}")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn webhooks_arrive_by_tls_and_a_new_certificate_needs_no_restart() -> Result<()> {
    let (authority, directory) = (Authority::new()?, tempfile::tempdir()?);
    let ca = directory.path().join("ca.pem");
    std::fs::write(&ca, authority.pem())?;
    let first = authority.server_until(2045)?;
    let mut files =
        Projected::new(&directory.path().join("tls"), &[("tls.crt", &first.certificate), ("tls.key", &first.key)])?;
    let (certificates, root) = (directory.path().join("certificates"), directory.path().join("root.pem"));
    std::fs::create_dir(&certificates)?;
    PayPal::new("1JE4291016473214C")?.write(&certificates, &root)?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let everything = Everything::start_as(Ledger::Sqlite, |command| {
        command
            .env("GATEWAY_TLS_CERT_FILE", text(&files.path("tls.crt")))
            .env("GATEWAY_TLS_KEY_FILE", text(&files.path("tls.key")))
            .env("GATEWAY_SECRET_RELOAD", "20ms")
            // Which has certificates of its own.
            .env("PAYPAL_WEBHOOK_ID", "1JE4291016473214C")
            .env("PAYPAL_CERT_DIR", text(&certificates))
            .env("PAYPAL_TRUST_ANCHORS_FILE", text(&ca))
            .env("PAYPAL_INTERMEDIATES_FILE", text(&ca))
    })
    .await?;
    let (gateway, admin) = (everything.gateway, everything.admin);
    let (answer, shown) = deliver(gateway, &ca).await?;
    assert_eq!(answer, "200 processed");
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert!(everything.send(&body).await.is_err(), "nothing is spoken but TLS");
    assert_eq!(everything.upstream.requests().len(), 1);
    assert_eq!(end(admin, "GATEWAY_TLS_CERT_FILE").await?, Some(beginning_of(2045)));
    // Whose end nobody chose.
    for setting in ["PAYPAL_TRUST_ANCHORS_FILE", "PAYPAL_INTERMEDIATES_FILE", "PAYPAL_CERT_DIR"] {
        assert!(end(admin, setting).await? > Some(beginning_of(2045)), "{setting}");
    }
    assert_eq!(end(admin, "SIDECAR_TLS_CERT_FILE").await?, None, "which was not given");

    let second = authority.server_until(2046)?;
    files.replace(&[("tls.crt", &second.certificate), ("tls.key", &second.key)])?;
    let after = eventually("the new certificate is shown", async || {
        let (answer, now) = deliver(gateway, &ca).await.ok()?;
        assert_eq!(answer, "200 processed");
        (now != shown).then_some(now)
    })
    .await;
    assert_eq!(end(admin, "GATEWAY_TLS_CERT_FILE").await?, Some(beginning_of(2046)));

    // One that does not go with its key changes nothing, and is counted.
    let failed = "oncegate_gateway_secret_reloads_total{result=\"failed\"}";
    let before = metric(admin, failed).await?;
    let third = authority.server_until(2047)?;
    files.replace(&[("tls.crt", &third.certificate), ("tls.key", &second.key)])?;
    eventually("the failure is counted", async || (metric(admin, failed).await.ok()? > before).then_some(())).await;
    assert_eq!(deliver(gateway, &ca).await?, ("200 processed".to_owned(), after));
    assert_eq!(end(admin, "GATEWAY_TLS_CERT_FILE").await?, Some(beginning_of(2046)), "what is in use is told");

    // The load that an operator makes comes by TLS as well.
    let (url, ca) = (format!("https://localhost:{}", gateway.port()), text(&ca));
    let short = ["bench", "--json", "--duration", "300ms", "--warm-up", "100ms", "--concurrency", "4"];
    let arguments = [&short[..], &["--target", "http", "--url", &url, "--ca-file", &ca]].concat();
    let bench = Oncegate::new(directory.path(), arguments)?.env("STRIPE_WEBHOOK_SECRET", SECRET).run().await?;
    assert_eq!(bench.code, Some(0), "{bench}");
    let report: serde_json::Value = serde_json::from_str(&bench.stdout)?;
    assert!(report["correctness"]["completions_checked"].as_u64() > Some(0), "{bench}");
    Ok(())
}

#[tokio::test]
async fn a_sidecar_tells_when_its_certificates_end() -> Result<()> {
    let mut guarded = Guarded::start().await?;
    let admin = guarded.program.address("admin").await?;
    for setting in ["SIDECAR_TLS_CERT_FILE", "SIDECAR_TLS_CLIENT_CA_FILE"] {
        assert!(end(admin, setting).await? > Some(beginning_of(2045)), "{setting}");
    }
    Ok(())
}

#[tokio::test]
async fn half_of_a_certificate_is_a_problem() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let issued = Authority::new()?.server()?.write(directory.path(), "server")?;
    let (certificate, key) = (issued.certificate.to_string_lossy(), issued.key.to_string_lossy());
    for (settings, wanted) in [
        (vec![("GATEWAY_TLS_CERT_FILE", &*certificate)], "GATEWAY_TLS_KEY_FILE: missing"),
        (vec![("GATEWAY_TLS_KEY_FILE", &*key)], "GATEWAY_TLS_CERT_FILE: missing"),
        (
            vec![("GATEWAY_TLS_CERT_FILE", &*certificate), ("GATEWAY_TLS_KEY_FILE", &*certificate)],
            "there is no private key in the file",
        ),
        (vec![("GATEWAY_TLS_CERT_FILE", ""), ("GATEWAY_TLS_KEY_FILE", &*key)], "GATEWAY_TLS_CERT_FILE: missing"),
    ] {
        let mut command = Oncegate::new(directory.path(), ["gateway"])?
            .env("UPSTREAM_URL", "http://127.0.0.1:1/")
            .env("STRIPE_WEBHOOK_SECRET", SECRET);
        for (name, value) in settings {
            command = command.env(name, value);
        }
        let finished = command.run().await?;
        assert_eq!(finished.code, Some(2), "{finished}");
        assert!(finished.stderr.contains(wanted), "{wanted}: {finished}");
    }
    Ok(())
}
