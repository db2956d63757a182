//! The gateway and the commands reach a guarded sidecar, by TLS and by a Unix socket.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    certificates::Authority,
    http_client,
    program::{Oncegate, Running},
    stripe,
    upstream::Upstream,
};

use super::{Guarded, identities};
use crate::setup::{SECRET, STRIPE, word};

#[tokio::test]
async fn commands_need_the_role_and_say_what_was_refused() -> Result<()> {
    let guarded = Guarded::start().await?;
    let ca = guarded.ca().to_string_lossy().into_owned();
    let run = async |arguments: &[&str], token: Option<&str>| -> Result<_> {
        let mut command = Oncegate::new(guarded.directory.path(), arguments.iter().copied())?
            .env("SIDECAR_URL", &guarded.url)
            .env("SIDECAR_CA_FILE", &ca);
        if let Some(name) = token {
            command = command.env("SIDECAR_TOKEN_FILE", guarded.token_file(name)?);
        }
        command.run().await
    };
    for (arguments, token, code) in [
        (&["health"][..], None, 0),
        (&["stats"], Some("operator"), 0),
        (&["cleanup", "--days", "30", "--dry-run"], Some("cleanup"), 0),
        (&["stats"], Some("cleanup"), 1),
        (&["stats"], None, 1),
        (&["history", "stripe", "evt_1"], Some("expired"), 1),
    ] {
        let finished = run(arguments, token).await?;
        assert_eq!(finished.code, Some(code), "{arguments:?} {token:?}: {finished}");
        if code == 1 {
            let said = finished.stderr.contains("PERMISSION_DENIED") || finished.stderr.contains("UNAUTHENTICATED");
            assert!(said, "{finished}");
        }
    }
    // In the clear to another machine: nothing is sent.
    let settings = ["--sidecar", "http://sidecar.example:50051"];
    let refused = run(&[&["stats"][..], &settings].concat(), Some("operator")).await?;
    assert_eq!(refused.code, Some(2), "{refused}");
    assert!(refused.stderr.contains("SIDECAR_INSECURE"), "{refused}");
    // By a certificate, given as options.
    let client = guarded.authority.client("spiffe://test/operator", false)?.write(guarded.directory.path(), "ops")?;
    let (certificate, key) = (client.certificate.to_string_lossy(), client.key.to_string_lossy());
    let arguments = ["stats", "--cert-file", &certificate, "--key-file", &key];
    let finished = run(&arguments, None).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    // To the wrong name, or without trust, there is no connection: 3, as for a sidecar that is away.
    let address = guarded.url.replace("https://", "http://");
    let plain = Oncegate::new(guarded.directory.path(), ["health", "--sidecar", &address])?.run().await?;
    assert_eq!(plain.code, Some(3), "{plain}");
    Ok(())
}

#[tokio::test]
async fn bench_measures_a_guarded_sidecar() -> Result<()> {
    let guarded = Guarded::start().await?;
    let ca = guarded.ca().to_string_lossy().into_owned();
    let run = async |url: &str, more: &[&str]| -> Result<_> {
        let short =
            ["bench", "--json", "--duration", "300ms", "--warm-up", "100ms", "--concurrency", "8", "--url", url];
        let arguments = [&short[..], more].concat();
        Oncegate::new(guarded.directory.path(), arguments)?.run().await
    };
    let token = guarded.token_file("bench")?;
    let client = guarded.authority.client("spiffe://test/bench", false)?.write(guarded.directory.path(), "bench")?;
    let (certificate, key) = (client.certificate.to_string_lossy(), client.key.to_string_lossy());
    let by_token = ["--ca-file", &ca, "--token-file", &token];
    for known in [&by_token[..], &["--ca-file", &ca, "--cert-file", &certificate, "--key-file", &key]] {
        let finished = run(&guarded.url, known).await?;
        assert_eq!(finished.code, Some(0), "{known:?}: {finished}");
        let report: serde_json::Value = serde_json::from_str(&finished.stdout)?;
        assert_eq!((&report["correctness"]["ok"], &report["errors"]), (&true.into(), &serde_json::json!({})));
        assert!(report["correctness"]["completions_checked"].as_u64() > Some(0), "{finished}");
    }
    // Whoever is not known is told so by the first call.
    let stranger = run(&guarded.url, &["--ca-file", &ca]).await?;
    assert_eq!(stranger.code, Some(1), "{stranger}");
    assert!(stranger.stderr.contains("Unauthenticated UNAUTHENTICATED"), "{stranger}");
    // Without trust there is no connection.
    let other = guarded.directory.path().join("other-ca.pem");
    std::fs::write(&other, Authority::new()?.pem())?;
    let distrusted = run(&guarded.url, &["--ca-file", &other.to_string_lossy(), "--token-file", &token]).await?;
    assert_eq!(distrusted.code, Some(3), "{distrusted}");
    let clear = run("http://sidecar.example:50051", &["--token-file", &token]).await?;
    assert!(clear.code == Some(2) && clear.stderr.contains("SIDECAR_INSECURE"), "{clear}");
    Ok(())
}

pub(super) async fn gateway(guarded: &Guarded, upstream: &Upstream, settings: &[(&str, &str)]) -> Result<Running> {
    let mut command = Oncegate::new(guarded.directory.path(), ["gateway"])?
        .env("GATEWAY_LISTEN", "127.0.0.1:0")
        .env("UPSTREAM_URL", upstream.url())
        .env("STRIPE_WEBHOOK_SECRET", SECRET);
    for (name, value) in settings {
        command = command.env(name, *value);
    }
    command.start()
}

pub(super) async fn deliver(gateway: &mut Running) -> Result<String> {
    send(gateway.address("gateway").await?).await
}

pub(super) async fn send(address: SocketAddr) -> Result<String> {
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    let signature = stripe::sign(SECRET, &body);
    Ok(word(&http_client::post(address, STRIPE, &[(stripe::HEADER, &signature)], body).await?))
}

#[tokio::test]
async fn a_gateway_delivers_by_mutual_tls_and_a_new_token_needs_no_restart() -> Result<()> {
    let guarded = Guarded::start().await?;
    let upstream = Upstream::start().await?;
    let token = guarded.token_file("nobody")?;
    let ca = guarded.ca().to_string_lossy().into_owned();
    let settings = [
        ("SIDECAR_URL", guarded.url.as_str()),
        ("SIDECAR_CA_FILE", &ca),
        ("SIDECAR_TOKEN_FILE", &token),
        ("GATEWAY_SECRET_RELOAD", "20ms"),
    ];
    let mut running = gateway(&guarded, &upstream, &settings).await?;
    assert_eq!(deliver(&mut running).await?, "503 unavailable", "an identity that is not known delivers nothing");
    assert!(upstream.requests().is_empty());
    std::fs::write(&token, super::token("caller"))?;
    running.line_where("the token is read again", |line| line.contains("were read again")).await?;
    assert_eq!(deliver(&mut running).await?, "200 processed");
    // The page asks for the gateway's own tenant, which a caller may see.
    let page = http_client::get(running.address("gateway").await?, "/webhooks/payments/health").await?;
    assert_eq!(page.json()["statistics"]["completed"], 1, "{page:?}");
    assert_eq!(running.stop().await?.code, Some(0));

    let client = guarded.authority.client("spiffe://test/caller", false)?.write(guarded.directory.path(), "gateway")?;
    let (certificate, key) = (client.certificate.to_string_lossy(), client.key.to_string_lossy());
    let settings = [
        ("SIDECAR_URL", guarded.url.as_str()),
        ("SIDECAR_CA_FILE", &ca),
        ("SIDECAR_CLIENT_CERT_FILE", &certificate),
        ("SIDECAR_CLIENT_KEY_FILE", &key),
    ];
    let mut running = gateway(&guarded, &upstream, &settings).await?;
    assert_eq!(deliver(&mut running).await?, "200 processed");
    Ok(())
}

#[tokio::test]
async fn a_gateway_and_commands_reach_a_sidecar_by_its_unix_socket() -> Result<()> {
    let guarded = Guarded::start().await?;
    let upstream = Upstream::start().await?;
    let directory = tempfile::tempdir()?;
    let url = format!("unix:{}", directory.path().join("grpc.sock").display());
    let tokens = directory.path().join("tokens.toml");
    // No TLS, and nobody is known by a certificate.
    let without: String =
        identities(false).lines().filter(|line| !line.contains("certificates")).collect::<Vec<_>>().join("\n");
    std::fs::write(&tokens, without)?;
    let start = || {
        let command = Oncegate::new(directory.path(), ["sidecar"])?.env("SIDECAR_LISTEN", &url);
        command.env("SIDECAR_TOKENS_FILE", tokens.to_string_lossy()).start()
    };
    let mut sidecar = start()?;
    sidecar.line_where("the sidecar listens", |line| line.contains("sidecar listening")).await?;
    let token = guarded.token_file("caller")?;
    let settings = [("SIDECAR_URL", url.as_str()), ("SIDECAR_TOKEN_FILE", &token)];
    let mut running = gateway(&guarded, &upstream, &settings).await?;
    assert_eq!(deliver(&mut running).await?, "200 processed");
    let health = Oncegate::new(directory.path(), ["health", "--sidecar", &url])?.run().await?;
    assert_eq!(health.code, Some(0), "{health}");
    // Its socket is left behind by a crash, and taken over.
    sidecar.kill().await?;
    drop(sidecar);
    assert_eq!(deliver(&mut running).await?, "503 unavailable");
    let mut sidecar = start()?;
    sidecar.line_where("the sidecar listens", |line| line.contains("sidecar listening")).await?;
    oncegate_e2e::eventually("the gateway finds it again", async || {
        (deliver(&mut running).await.ok()? == "200 processed").then_some(())
    })
    .await;
    let finished = sidecar.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(!directory.path().join("grpc.sock").exists());
    upstream.requests().first().context("something was delivered")?;
    Ok(())
}
