//! What the containers run, run: the program with the arguments and settings of the manifests, and the tokens of the document.
//! Only addresses are the test's own, and where the files are that a pod has mounted.

use std::{collections::BTreeMap, fs, net::SocketAddr, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use oncegate_e2e::{
    certificates::{Authority, Issued},
    postgres::Database,
    program::{Finished, Oncegate, Running},
    stripe,
    upstream::Upstream,
};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::{arguments, list, named, read, settings, text, workloads};
use crate::setup::{SECRET, send_signed, word};

/// An installation: its manifests, and where its pods' files are.
struct Installation {
    documents: Vec<Value>,
    directory: TempDir,
    database: Database,
    upstream: Upstream,
    authority: Authority,
    server: Issued,
    /// Where the sidecar is, once it is.
    sidecar: Option<SocketAddr>,
}

/// A token, as long as the document's.
fn token(name: &str) -> String {
    hex::encode(Sha256::digest(name))
}

/// The identities of the document, with the digests of the tokens.
fn identities() -> Result<String> {
    let document = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../k8s/README.md"))?;
    let block = document.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next());
    let mut identities = block.context("k8s/README.md shows the identities")?.to_owned();
    for name in ["gateway", "cleanup", "operator"] {
        let (placeholder, digest) = (format!("DIGEST OF {name}"), hex::encode(Sha256::digest(token(name))));
        assert!(identities.contains(&placeholder), "{placeholder}");
        identities = identities.replace(&placeholder, &digest);
    }
    Ok(identities)
}

impl Installation {
    async fn new(documents: Vec<Value>, database: Database) -> Result<Self> {
        let authority = Authority::new()?;
        let server = authority.server()?;
        let (directory, upstream) = (tempfile::tempdir()?, Upstream::start().await?);
        Ok(Self { documents, directory, database, upstream, authority, server, sidecar: None })
    }

    fn container(&self, owner: &str) -> Result<(&Value, &Value)> {
        let workloads = workloads(&self.documents);
        let workload =
            workloads.into_iter().find(|workload| workload.name == owner).with_context(|| owner.to_owned())?;
        Ok((workload.pod, workload.ours()?))
    }

    /// What is in a file that is mounted at this path.
    fn content(&self, path: &str, pod: &Value, container: &Value) -> Result<String> {
        let mounts = list(container, "/volumeMounts").iter();
        let (mount, file) = mounts
            .filter_map(|mount| Some((mount, path.strip_prefix(text(mount, "/mountPath"))?.strip_prefix('/')?)))
            .next()
            .with_context(|| format!("nothing is mounted for {path}"))?;
        let volume = list(pod, "/volumes").iter().find(|volume| volume["name"] == mount["name"]).context("a volume")?;
        if let Some(map) = volume.pointer("/configMap/name").and_then(Value::as_str) {
            let map = named(&self.documents, "ConfigMap", map).context("its config map")?;
            return Ok(map["data"][file].as_str().context("its file")?.to_owned());
        }
        let item = list(volume, "/secret/items").iter().find(|item| item["path"] == file);
        let key = item.map_or(file, |item| text(item, "/key"));
        Ok(match (text(volume, "/secret/secretName"), key) {
            ("oncegate-database" | "oncegate-migrate-database", "url") => self.database.url().to_owned(),
            // It is done without.
            ("oncegate-redis", "url") => "redis://127.0.0.1:1".to_owned(),
            ("oncegate-sidecar-tls", "tls.crt") => self.server.certificate.clone(),
            ("oncegate-sidecar-tls", "tls.key") => self.server.key.clone(),
            ("oncegate-sidecar-tls", "ca.crt") => self.authority.pem().to_owned(),
            ("oncegate-tokens", "tokens.toml") => identities()?,
            ("oncegate-client-tokens", name) => token(name),
            ("oncegate-providers", "stripe") => SECRET.to_owned(),
            (secret, key) => bail!("{key} of {secret} is not known to this test"),
        })
    }

    /// The same file in the test's directory.
    fn local(&self, path: &str) -> PathBuf {
        self.directory.path().join(path.trim_start_matches('/'))
    }

    /// What an address, or a path, is here.
    fn here(&self, variable: &str, value: &str, pod: &Value, container: &Value) -> Result<String> {
        Ok(match variable {
            "SIDECAR_LISTEN" | "GATEWAY_LISTEN" | "ADMIN_LISTEN" if value.starts_with("0.0.0.0:") => "0.0.0.0:0".into(),
            "SIDECAR_URL" => format!("https://localhost:{}", self.sidecar.context("the sidecar runs")?.port()),
            "UPSTREAM_URL" => self.upstream.url(),
            "OTEL_EXPORTER_OTLP_ENDPOINT" => "http://127.0.0.1:1".into(),
            "SIDECAR_LISTEN" => {
                let socket = self.local(value.strip_prefix("unix:").context("a socket")?);
                fs::create_dir_all(socket.parent().context("its directory")?)?;
                format!("unix:{}", socket.display())
            }
            _ if value.starts_with('/') => {
                let file = self.local(value);
                fs::create_dir_all(file.parent().context("its directory")?)?;
                fs::write(&file, self.content(value, pod, container)?)?;
                file.display().to_string()
            }
            _ => value.to_owned(),
        })
    }

    /// The program as a container runs it, or with other arguments in its place.
    fn program(&self, owner: &str, instead: Option<&[&str]>) -> Result<Oncegate> {
        let (pod, container) = self.container(owner)?;
        let own = arguments(container);
        let mut program = Oncegate::new(self.directory.path(), instead.unwrap_or(&own).iter().copied())?;
        let settings: BTreeMap<String, String> = settings(&self.documents, container)?;
        for (variable, value) in settings {
            program = program.env(&variable, self.here(&variable, &value, pod, container)?);
        }
        Ok(program)
    }

    async fn run(&self, owner: &str, instead: Option<&[&str]>) -> Result<Finished> {
        self.program(owner, instead)?.run().await
    }
}

async fn ends(mut program: Running) -> Result<()> {
    let finished = program.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    Ok(())
}

async fn works(name: &str) -> Result<()> {
    let documents = [read(name)?, read("ops")?].concat();
    let mut all = Installation::new(documents, Database::create_empty().await?).await?;

    let refused = all.run("Deployment oncegate-sidecar", None).await?;
    assert!(refused.code == Some(1) && refused.stderr.contains("oncegate migrate"), "until the Job has run: {refused}");
    let migrated = all.run("Job oncegate-migrate", None).await?;
    assert_eq!(migrated.code, Some(0), "{migrated}");

    let mut sidecar = all.program("Deployment oncegate-sidecar", None)?.start()?;
    all.sidecar = Some(sidecar.address("sidecar").await?);
    let mut gateway = all.program("Deployment oncegate-gateway", None)?.start()?;
    let address = SocketAddr::from(([127, 0, 0, 1], gateway.address("gateway").await?.port()));
    let event_id = stripe::event_id();
    let body = stripe::event(&event_id, "charge.succeeded");
    let answer = send_signed(address, &stripe::sign(SECRET, &body), &body).await?;
    assert_eq!(word(&answer), "200 processed", "{}", gateway.output());

    let cleaned = all.run("CronJob oncegate-cleanup", None).await?;
    assert_eq!(cleaned.code, Some(0), "{cleaned}");

    // What an operator does is permitted in the pod that is for it, and in no other.
    let ops = "Pod oncegate-ops";
    let mut lasting = all.program(ops, None)?.start()?;
    lasting.line_where("it shows what there is", |line| line.contains("\"completed\"")).await?;
    let replay =
        ["resolve", "stripe", &event_id, "--to", "pending", "--force", "--yes", "--reason", "a test of the manifests"];
    for (owner, permitted) in [("Deployment oncegate-gateway", false), ("CronJob oncegate-cleanup", false), (ops, true)]
    {
        let resolved = all.run(owner, Some(&replay)).await?;
        assert_eq!(resolved.code == Some(0), permitted, "{owner}: {resolved}");
        assert_eq!(resolved.stderr.contains("PERMISSION_DENIED"), !permitted, "{owner}: {resolved}");
    }
    for command in [&["history", "--state", "pending"][..], &["health"], &["cleanup", "--days", "30", "--dry-run"]] {
        let finished = all.run(ops, Some(command)).await?;
        assert_eq!(finished.code, Some(0), "{finished}");
    }
    for program in [lasting, gateway, sidecar] {
        ends(program).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_on_one_machine_works_together() -> Result<()> {
    works("single").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_in_production_works_together() -> Result<()> {
    works("production").await
}

#[tokio::test]
async fn the_sidecar_in_an_applications_pod_serves_on_its_socket() -> Result<()> {
    let all = Installation::new(read("in-pod")?, Database::create().await?).await?;
    let owner = "Deployment application";
    let mut sidecar = all.program(owner, None)?.start()?;
    sidecar.line_where("the sidecar listens", |line| line.contains("sidecar listening")).await?;
    // As the application finds it.
    let (pod, _) = all.container(owner)?;
    let application = &pod["containers"][0];
    let url = settings(&all.documents, application)?.remove("SIDECAR_URL").context("its address")?;
    let url = format!("unix:{}", all.local(url.strip_prefix("unix:").context("a socket")?).display());
    let stats = Oncegate::new(all.directory.path(), ["stats", "--sidecar", &url])?.run().await?;
    assert_eq!(stats.code, Some(0), "{stats}");
    ends(sidecar).await
}
