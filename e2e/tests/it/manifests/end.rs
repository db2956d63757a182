//! How long a pod has to end, against everything that has to happen in that time.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use oncegate_e2e::program::Oncegate;
use oncegate_runtime::{admin, config::duration, shutdown, telemetry};

use super::{SERVING, Workload, arguments, containers, named, read, settings, workloads};

/// For what nobody has thought of, and the ledger's last words.
const IN_HAND: Duration = Duration::from_secs(5);

/// What the program makes of a container's settings, defaults included.
pub(super) async fn in_force(command: &str, settings: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    let directory = tempfile::tempdir()?;
    let mut program = Oncegate::new(directory.path(), [command, "--print-config"])?;
    for (name, value) in settings {
        program = program.env(name, value);
    }
    let printed = program.run().await?;
    ensure!(printed.code == Some(0), "{printed}");
    let rows = printed.stdout.lines().map(|line| line.split_whitespace().filter(|word| *word != "|"));
    Ok(rows.filter_map(|mut row| Some((row.next()?.to_owned(), row.next()?.to_owned()))).collect())
}

#[tokio::test]
async fn the_grace_period_is_longer_than_everything_that_has_to_happen_in_it() -> Result<()> {
    for name in SERVING {
        let documents = read(name)?;
        for workload in workloads(&documents).into_iter().filter(Workload::is_deployment) {
            let owner = &workload.name;
            let container = workload.ours()?;
            let command = *arguments(container).first().context("a command")?;
            let in_force = in_force(command, &settings(&documents, container)?).await?;
            let setting = |name: &str| -> Result<Duration> {
                let value = in_force.get(name).with_context(|| format!("{name} is not printed"))?;
                duration(value).with_context(|| format!("{name}={value}"))
            };
            let seconds = |value: &serde_json::Value| value.as_u64().map(Duration::from_secs);
            let grace = seconds(&workload.pod["terminationGracePeriodSeconds"]).context("a grace period")?;
            // A native sidecar ends after the application, which has the pause.
            let pauses =
                containers(workload.pod).filter_map(|of| seconds(&of["lifecycle"]["preStop"]["sleep"]["seconds"]));
            let pause = pauses.max().context("a pause")?;
            let drain = match command {
                "sidecar" => setting("SIDECAR_DRAIN")?,
                _ => {
                    let drain = setting("GATEWAY_DRAIN")?;
                    assert!(drain >= setting("UPSTREAM_TIMEOUT")?, "{name}: deliveries are cut off");
                    // And two calls for the marks of what is left.
                    drain + 2 * setting("SIDECAR_TIMEOUT")?
                }
            };
            let end = admin::DRAIN + shutdown::RUNTIME_END_MAX + telemetry::FLUSH_MAX;
            let needed = pause + drain + end + IN_HAND;
            assert!(needed <= grace, "{name}: {owner}: {pause:?} + {drain:?} + {end:?} + {IN_HAND:?} into {grace:?}");
        }
    }
    Ok(())
}

/// For how long the DNS of a cluster may give an answer that was right once: the `ttl` of Kubernetes' own configuration.
const DNS_TTL: Duration = Duration::from_secs(30);

/// What a gateway waits for between two look-ups, even if it wants one.
const RESOLVE_PAUSE: Duration = Duration::from_secs(1);

#[tokio::test]
async fn gateways_know_a_new_sidecar_before_the_one_that_it_replaces_ends() -> Result<()> {
    for name in ["single", "production", "example"] {
        let documents = read(name)?;
        let workloads = workloads(&documents);
        let gateway = workloads.iter().find(|workload| workload.name == "Deployment oncegate-gateway");
        let settings = settings(&documents, gateway.context("a gateway")?.ours()?)?;
        let in_force = in_force("gateway", &settings).await?;
        let interval = duration(in_force.get("SIDECAR_RESOLVE_INTERVAL").context("it is printed")?)?;
        let sidecar = &named(&documents, "Deployment", "oncegate-sidecar").context("a sidecar")?["spec"];
        // No pod ends before a new one counts as available.
        assert_eq!(sidecar["strategy"]["rollingUpdate"]["maxUnavailable"], 0, "{name}");
        let ready = Duration::from_secs(sidecar["minReadySeconds"].as_u64().context("minReadySeconds")?);
        assert!(interval + RESOLVE_PAUSE + DNS_TTL < ready, "{name}: {interval:?} in {ready:?}");
    }
    Ok(())
}

/// How long `all` takes to end at most: the gateway, then the sidecar for others' calls, the marks and the counts.
async fn end_of_all() -> Result<Duration> {
    let settings = [("UPSTREAM_URL", "http://app:3000/"), ("STRIPE_WEBHOOK_SECRET", "whsec_x")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let in_force = in_force("all", &settings.into()).await?;
    let setting = |name: &str| -> Result<Duration> {
        let value = in_force.get(name).with_context(|| format!("{name} is not printed"))?;
        duration(value).with_context(|| format!("{name}={value}"))
    };
    let gateway = setting("GATEWAY_DRAIN").or_else(|_| setting("UPSTREAM_TIMEOUT"))? + 2 * setting("SIDECAR_TIMEOUT")?;
    let end = admin::DRAIN + shutdown::RUNTIME_END_MAX + telemetry::FLUSH_MAX;
    Ok(gateway + setting("SIDECAR_DRAIN")? + 2 * IN_HAND + end)
}

#[tokio::test]
async fn the_documents_have_an_engine_wait_for_as_long_as_the_end_takes() -> Result<()> {
    let needed = end_of_all().await?;
    let mut seen = 0;
    for file in ["Dockerfile", "docs/operations.md"] {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file)).context(file)?;
        for before in ["--stop-timeout ", "stop_grace_period: ", "TimeoutStopSec="] {
            for (place, _) in text.match_indices(before) {
                let digits: String = text[place + before.len()..].chars().take_while(char::is_ascii_digit).collect();
                // In the text it is named as well.
                let Ok(seconds) = digits.parse() else { continue };
                seen += 1;
                assert!(needed <= Duration::from_secs(seconds), "{file}: {before}{seconds}: {needed:?}");
            }
        }
    }
    assert_eq!(seen, 4);
    Ok(())
}
