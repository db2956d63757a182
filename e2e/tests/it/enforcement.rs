//! The switch between enforcing and observing: the way back that loses nothing.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use oncegate_api::v1::State;
use oncegate_e2e::{
    eventually, http_client,
    program::{Oncegate, Running},
    stripe,
    upstream::{self, Answer, Upstream},
};
use tempfile::TempDir;

use crate::setup::{Everything, Ledger, SECRET, on_each_ledger, send_signed, word};

on_each_ledger!(
    a_route_that_observes_delivers_what_it_would_refuse_and_loses_nothing_of_the_record,
    a_held_event_is_delivered_while_observing_and_held_again_afterwards,
);

async fn command(admin: SocketAddr, arguments: &[&str]) -> Result<oncegate_e2e::program::Finished> {
    let directory = tempfile::tempdir()?;
    let admin = format!("http://{admin}");
    let arguments = ["enforcement"].iter().chain(arguments).copied().chain(["--admin", admin.as_str()]);
    Oncegate::new(directory.path(), arguments)?.run().await
}

async fn switch(admin: SocketAddr, to: &str) -> Result<()> {
    let finished = command(admin, &[to]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(finished.stdout.contains(to), "{finished}");
    Ok(())
}

/// What an alert asks for.
const OBSERVING: &str = "oncegate_gateway_observing{route=\"/webhooks/payments/stripe\"} ";

async fn metric(admin: SocketAddr, line: &str) -> Result<u64> {
    let page = http_client::get(admin, "/metrics").await?;
    let text = String::from_utf8(page.body.to_vec())?;
    let value = text.lines().find_map(|found| found.strip_prefix(line)).with_context(|| format!("{line} in {text}"))?;
    Ok(value.trim().parse()?)
}

async fn a_route_that_observes_delivers_what_it_would_refuse_and_loses_nothing_of_the_record(
    ledger: Ledger,
) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let admin = everything.admin;
    let (old, new) = (stripe::event_id(), stripe::event_id());
    let old_body = stripe::event(&old, "charge.succeeded");
    assert_eq!(word(&everything.send(&old_body).await?), "200 processed");

    assert_eq!(metric(admin, OBSERVING).await?, 0);
    switch(admin, "observe").await?;
    assert_eq!(metric(admin, OBSERVING).await?, 1);
    // A duplicate is delivered, without a token that would look like a lock's, and answered as the application does.
    assert_eq!(word(&everything.send(&old_body).await?), "200 processed");
    everything.upstream.answer_next([Answer::status(500)]);
    assert_eq!(word(&everything.send(&old_body).await?), "500 failed");
    let deliveries = everything.upstream.requests();
    assert_eq!(deliveries.len(), 3);
    for delivery in &deliveries[1..] {
        assert_eq!(delivery.header("oncegate-enforcement"), "observe");
        assert_eq!(delivery.header("oncegate-fencing-token"), "");
        assert_eq!(delivery.header("idempotency-key"), format!("default/stripe/{old}"));
    }
    assert_eq!(metric(admin, "oncegate_gateway_observed_total{answer=\"already_processed\"} ").await?, 2);
    // A new event is claimed, delivered and marked as ever.
    let new_body = stripe::event(&new, "charge.succeeded");
    assert_eq!(word(&everything.send(&new_body).await?), "200 processed");
    let delivery = everything.upstream.requests().pop().context("it was delivered")?;
    assert_ne!(delivery.header("oncegate-fencing-token"), "");
    eventually("the completion is recorded, though the answer did not wait for it", async || {
        let event = everything.history(&new).await.ok()??.event?;
        (event.state() == State::Completed).then_some(())
    })
    .await;

    switch(admin, "enforce").await?;
    assert_eq!(metric(admin, OBSERVING).await?, 0);
    assert_eq!(word(&everything.send(&old_body).await?), "200 already_processed");
    assert_eq!(word(&everything.send(&new_body).await?), "200 already_processed");
    assert_eq!(everything.upstream.requests().len(), 4);
    Ok(())
}

async fn a_held_event_is_delivered_while_observing_and_held_again_afterwards(ledger: Ledger) -> Result<()> {
    let everything = Everything::start_with(ledger, &[("UPSTREAM_REFUSAL", "terminal")]).await?;
    everything.upstream.answer_next([Answer::status(400)]);
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    everything.send(&body).await?;
    assert_eq!(word(&everything.send(&body).await?), "422 held");
    switch(everything.admin, "observe").await?;
    assert_eq!(word(&everything.send(&body).await?), "200 processed");
    assert_eq!(metric(everything.admin, "oncegate_gateway_observed_total{answer=\"held\"} ").await?, 1);
    // What is not signed is delivered to nobody, whatever the switch says.
    let forged = send_signed(everything.gateway, &stripe::sign("whsec_other", &body), &body).await?;
    assert_eq!(word(&forged), "401 unauthorized");
    switch(everything.admin, "enforce").await?;
    assert_eq!(word(&everything.send(&body).await?), "422 held");
    assert_eq!(everything.upstream.requests().len(), 2);
    Ok(())
}

/// A gateway with two routes and a file, whose sidecar is not there.
struct Alone {
    upstream: Upstream,
    gateway: SocketAddr,
    admin: SocketAddr,
    config: std::path::PathBuf,
    program: Running,
    _directory: TempDir,
}

impl Alone {
    async fn start() -> Result<Self> {
        let upstream = Upstream::start().await?;
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("oncegate.toml");
        std::fs::write(&config, Self::file(""))?;
        let mut program = Oncegate::new(directory.path(), ["gateway"])?
            .env("GATEWAY_LISTEN", "127.0.0.1:0")
            .env("ADMIN_LISTEN", "127.0.0.1:0")
            .env("SIDECAR_URL", upstream::refused_url()?.trim_end_matches("/payments"))
            .env("UPSTREAM_URL", upstream.url())
            .env("STRIPE_WEBHOOK_SECRET", SECRET)
            .env("GATEWAY_SECRET_RELOAD", "50ms")
            .env("ONCEGATE_CONFIG", config.to_string_lossy())
            .start()?;
        let gateway = program.address("gateway").await?;
        let admin = program.address("admin").await?;
        Ok(Self { upstream, gateway, admin, config, program, _directory: directory })
    }

    fn file(enforcement: &str) -> String {
        format!(
            "[[route]]\nname = \"second\"\nprovider = \"stripe\"\ntenant = \"second\"\nsecrets = \"{SECRET}\"\n{enforcement}"
        )
    }

    async fn modes(&self) -> Result<Vec<String>> {
        let page = http_client::get(self.admin, "/enforcement").await?.json();
        let routes = page["routes"].as_array().context("routes")?;
        Ok(routes.iter().map(|route| route["enforcement"].as_str().unwrap_or_default().to_owned()).collect())
    }

    async fn until(&self, modes: [&str; 2]) {
        eventually(&format!("the routes stand on {modes:?}"), async || {
            (self.modes().await.ok()? == modes).then_some(())
        })
        .await;
    }

    async fn send(&self, route: &str) -> Result<String> {
        let body = stripe::event(&stripe::event_id(), "charge.succeeded");
        let signature = stripe::sign(SECRET, &body);
        let path = format!("/webhooks/payments/{route}");
        Ok(word(&http_client::post(self.gateway, &path, &[(stripe::HEADER, &signature)], body).await?))
    }
}

#[tokio::test]
async fn a_route_that_observes_delivers_without_any_sidecar() -> Result<()> {
    let alone = Alone::start().await?;
    alone.until(["enforce", "enforce"]).await;
    assert_eq!(alone.send("stripe").await?, "503 unavailable");
    assert!(alone.upstream.requests().is_empty());
    let finished = command(alone.admin, &["observe", "--path", "/webhooks/payments/stripe"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    alone.until(["observe", "enforce"]).await;
    assert_eq!(alone.send("stripe").await?, "200 processed");
    assert_eq!(alone.send("second").await?, "503 unavailable");
    assert_eq!(alone.upstream.requests().len(), 1);
    for arguments in [&["observe", "--path", "/nowhere"][..], &["nonsense"]] {
        let finished = command(alone.admin, arguments).await?;
        assert!(matches!(finished.code, Some(1 | 2)), "{finished}");
    }
    assert_eq!(alone.modes().await?, ["observe", "enforce"]);
    Ok(())
}

#[tokio::test]
async fn what_a_running_gateway_does_not_take_over_from_its_file_is_said() -> Result<()> {
    const SAID: &str = "restart to take it over";
    let alone = Alone::start().await?;
    // Neither enforcement nor a comment is worth a word.
    std::fs::write(&alone.config, Alone::file("# a comment\nenforcement = \"observe\"\n"))?;
    alone.until(["enforce", "observe"]).await;
    assert!(!alone.program.output().contains(SAID), "{}", alone.program.output());
    std::fs::write(&alone.config, Alone::file("enforcement = \"observe\"\nupstream_timeout = \"9s\"\n"))?;
    eventually("the gateway says what it does not take over", async || {
        alone.program.output().contains(SAID).then_some(())
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn the_file_switches_routes_while_the_gateway_runs() -> Result<()> {
    let alone = Alone::start().await?;
    std::fs::write(&alone.config, Alone::file("enforcement = \"observe\"\n"))?;
    alone.until(["enforce", "observe"]).await;
    assert_eq!(alone.send("second").await?, "200 processed");
    // For all routes; a route's own word goes before.
    let all = format!("enforcement = \"observe\"\n{}", Alone::file("enforcement = \"enforce\"\n"));
    std::fs::write(&alone.config, all)?;
    alone.until(["observe", "enforce"]).await;
    // A file that cannot be used changes nothing and is counted.
    std::fs::write(&alone.config, "enforcement = \"perhaps\"\n")?;
    eventually("the failed reload is counted", async || {
        let failed = metric(alone.admin, "oncegate_gateway_secret_reloads_total{result=\"failed\"} ").await.ok()?;
        (failed > 0).then_some(())
    })
    .await;
    assert_eq!(alone.modes().await?, ["observe", "enforce"]);
    std::fs::write(&alone.config, Alone::file(""))?;
    alone.until(["enforce", "enforce"]).await;
    Ok(())
}
