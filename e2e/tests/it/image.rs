//! What the image says about itself, as far as it can be tried without an engine: its health command, whatever it runs.

use std::{fs, net::SocketAddr, path::Path};

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    eventually,
    program::{Finished, Oncegate},
    stripe,
    upstream::{Answer, Upstream, refused_url},
};

use crate::{
    access::Guarded,
    setup::{Everything, Ledger, SECRET, send_signed},
};

fn dockerfile() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Dockerfile");
    let text = fs::read_to_string(path).context("Dockerfile")?;
    // As the engine reads it: a backslash continues a line.
    Ok(text.replace("\\\n", " "))
}

/// Runs the image's health command beside a service whose admin listener is there, as an engine does: with the variables
/// of the container.
async fn health(admin: SocketAddr) -> Result<Finished> {
    let text = dockerfile()?;
    let check = text.lines().find(|line| line.starts_with("HEALTHCHECK")).context("a health command")?;
    let (_, command) = check.split_once(" CMD ").context("its command")?;
    let command: Vec<String> = serde_json::from_str(command)?;
    assert_eq!(command[0], "/usr/bin/oncegate");
    let directory = tempfile::tempdir()?;
    let arguments = command[1..].iter().map(String::as_str);
    Oncegate::new(directory.path(), arguments)?.env("ADMIN_LISTEN", admin.to_string()).run().await
}

#[test]
fn the_image_has_an_admin_listener_for_its_health_command_and_for_nobody_else() -> Result<()> {
    let text = dockerfile()?;
    let variables = text.lines().filter_map(|line| line.strip_prefix("ENV ")).flat_map(str::split_whitespace);
    let admin = variables.filter_map(|variable| variable.strip_prefix("ADMIN_LISTEN=")).next_back();
    let admin: SocketAddr = admin.context("ADMIN_LISTEN is set")?.parse()?;
    assert!(admin.ip().is_loopback() && admin.port() != 0, "{admin}");
    Ok(())
}

#[tokio::test]
async fn the_health_command_tells_of_a_sidecar_with_tls_a_gateway_and_both() -> Result<()> {
    let mut guarded = Guarded::start().await?;
    let healthy = health(guarded.program.address("admin").await?).await?;
    assert_eq!(healthy.code, Some(0), "a sidecar with TLS: {healthy}");

    let (upstream, directory) = (Upstream::start().await?, tempfile::tempdir()?);
    let mut gateway = Oncegate::new(directory.path(), ["gateway"])?
        .env("GATEWAY_LISTEN", "127.0.0.1:0")
        .env("ADMIN_LISTEN", "127.0.0.1:0")
        // Whatever its sidecar does, the gateway answers.
        .env("SIDECAR_URL", refused_url()?.trim_end_matches("/payments"))
        .env("UPSTREAM_URL", upstream.url())
        .env("STRIPE_WEBHOOK_SECRET", SECRET)
        .start()?;
    let admin = gateway.address("admin").await?;
    gateway.address("gateway").await?;
    let mut said = None;
    eventually("the gateway is ready", async || {
        let finished = health(admin).await.ok()?;
        let code = finished.code;
        said = Some(finished);
        (code == Some(0)).then_some(())
    })
    .await;
    assert!(said.context("an answer")?.stdout.contains("ready"));
    assert_eq!(gateway.stop().await?.code, Some(0));
    let gone = health(admin).await?;
    assert_eq!(gone.code, Some(3), "nobody is there: {gone}");
    Ok(())
}

#[tokio::test]
async fn the_health_command_says_so_while_the_process_ends() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let healthy = health(everything.admin).await?;
    assert_eq!(healthy.code, Some(0), "{healthy}");
    // A delivery that never ends holds up the end.
    everything.upstream.answer_next([Answer::hang()]);
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    let (gateway, signature) = (everything.gateway, stripe::sign(SECRET, &body));
    let sending = tokio::spawn(async move { send_signed(gateway, &signature, &body).await });
    everything.upstream.wait_for(1).await;
    everything.program.signal("TERM")?;
    eventually("it is not healthy", async || {
        let finished = health(everything.admin).await.ok()?;
        (finished.code == Some(1) && finished.stdout.contains("503 draining")).then_some(())
    })
    .await;
    sending.abort();
    Ok(())
}
