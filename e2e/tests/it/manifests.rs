//! The rendered manifests against the program and the rules of the house: what a cluster would only show at three in the
//! morning. That they are what the kustomizations say, and fit the API, is `scripts/render-k8s --check`.

mod end;
mod fit;
mod image;
mod network;
mod run;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use oncegate_e2e::program::Oncegate;
use serde_json::Value;

const RENDERED: [&str; 5] = ["single", "production", "example", "in-pod", "ops"];

/// Those with something that serves.
const SERVING: [&str; 4] = ["single", "production", "example", "in-pod"];

pub(crate) fn read(name: &str) -> Result<Vec<Value>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../k8s/rendered").join(format!("{name}.yaml"));
    let text = fs::read_to_string(&path).with_context(|| format!("{}: run scripts/render-k8s", path.display()))?;
    text.split("\n---\n").map(|document| serde_saphyr::from_str(document).context(name.to_owned())).collect()
}

pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

pub(crate) fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> impl Iterator<Item = &'a Value> {
    documents.iter().filter(move |document| text(document, "/kind") == kind)
}

fn named<'a>(documents: &'a [Value], kind: &str, name: &str) -> Option<&'a Value> {
    of_kind(documents, kind).find(|document| text(document, "/metadata/name") == name)
}

/// What runs pods.
pub(crate) struct Workload<'a> {
    /// Kind and name.
    pub(crate) name: String,
    pub(crate) labels: &'a Value,
    pub(crate) pod: &'a Value,
}

impl<'a> Workload<'a> {
    /// The container that the program is in.
    fn ours(&self) -> Result<&'a Value> {
        containers(self.pod).find(|container| is_ours(container)).with_context(|| self.name.clone())
    }

    /// Whether it is there for good, and more than once.
    pub(crate) fn is_deployment(&self) -> bool {
        self.name.starts_with("Deployment ")
    }
}

pub(crate) fn workloads(documents: &[Value]) -> Vec<Workload<'_>> {
    let template = |document: &'_ Value| -> Option<&'static str> {
        match text(document, "/kind") {
            "Pod" => Some(""),
            "Deployment" | "Job" => Some("/spec/template"),
            "CronJob" => Some("/spec/jobTemplate/spec/template"),
            _ => None,
        }
    };
    documents
        .iter()
        .filter_map(|document| {
            let template = document.pointer(template(document)?)?;
            let name = format!("{} {}", text(document, "/kind"), text(document, "/metadata/name"));
            Some(Workload { name, labels: template.pointer("/metadata/labels")?, pod: template.get("spec")? })
        })
        .collect()
}

pub(crate) fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    list(pod, "/initContainers").iter().chain(list(pod, "/containers"))
}

fn is_ours(container: &Value) -> bool {
    let image = text(container, "/image");
    // By tag, or by digest.
    image.contains("/oncegate:") || image.contains("/oncegate@sha256:")
}

fn arguments(container: &Value) -> Vec<&str> {
    list(container, "/args").iter().filter_map(Value::as_str).collect()
}

/// A container's settings, those of its config maps included.
fn settings(documents: &[Value], container: &Value) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for from in list(container, "/envFrom") {
        let name = text(from, "/configMapRef/name");
        let map = named(documents, "ConfigMap", name).with_context(|| format!("config map {name} is not there"))?;
        for (key, value) in map["data"].as_object().context("a config map has data")? {
            all.insert(key.clone(), value.as_str().unwrap_or_default().to_owned());
        }
    }
    for variable in list(container, "/env") {
        all.insert(text(variable, "/name").to_owned(), text(variable, "/value").to_owned());
    }
    Ok(all)
}

/// The port of an address in a setting.
fn port_of(address: &str) -> Result<u64> {
    let authority = address.split_once("://").map_or(address, |(_, rest)| rest).split('/').next().unwrap_or_default();
    let port = authority.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    port.with_context(|| format!("{address} names no port"))
}

/// The variables that a command of the program reads, by its own manual.
async fn known_to_the_program(command: &str) -> Result<BTreeSet<String>> {
    let directory = tempfile::tempdir()?;
    let manual = Oncegate::new(directory.path(), [command, "--help"])?.run().await?;
    ensure!(manual.code == Some(0), "{manual}");
    let names = manual.stdout.split("[env: ").skip(1);
    Ok(names.filter_map(|rest| rest.split(['=', ']']).next()).map(|name| name.trim().to_owned()).collect())
}

/// The directories below `directory` that have a kustomization.
fn kustomizations(directory: &Path, names: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            kustomizations(&path, names)?;
        } else if path.ends_with("kustomization.yaml") {
            names.extend(directory.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    Ok(())
}

#[test]
fn every_kustomization_is_rendered_and_looked_at() -> Result<()> {
    let k8s = Path::new(env!("CARGO_MANIFEST_DIR")).join("../k8s");
    let mut names = BTreeSet::new();
    kustomizations(&k8s, &mut names)?;
    assert!(names.remove("base"), "which nobody applies as it is");
    assert_eq!(names, RENDERED.iter().map(|name| (*name).to_owned()).collect());
    let rendered = fs::read_dir(k8s.join("rendered"))?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let rendered = rendered.iter().filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()));
    assert_eq!(names, rendered.collect());
    Ok(())
}

#[tokio::test]
async fn every_variable_is_one_that_the_program_knows() -> Result<()> {
    for name in RENDERED {
        let documents = read(name)?;
        let mut seen = 0;
        for Workload { name: owner, pod, .. } in workloads(&documents) {
            for container in containers(pod).filter(|container| is_ours(container)) {
                let command = *arguments(container).first().context("a command")?;
                let known = known_to_the_program(command).await?;
                for (variable, value) in settings(&documents, container)? {
                    assert!(known.contains(&variable), "{name}: {owner}: oncegate {command} does not read {variable}");
                    assert!(!value.is_empty(), "{name}: {owner}: {variable} is empty");
                    seen += 1;
                }
            }
        }
        assert!(seen > 3, "{name}: variables are where this test looks");
    }
    Ok(())
}

#[test]
fn every_file_that_a_setting_names_is_mounted() -> Result<()> {
    for name in RENDERED {
        let documents = read(name)?;
        for Workload { name: owner, pod, .. } in workloads(&documents) {
            for container in containers(pod).filter(|container| is_ours(container)) {
                let mounts: Vec<_> =
                    list(container, "/volumeMounts").iter().map(|mount| text(mount, "/mountPath")).collect();
                for (variable, path) in settings(&documents, container)? {
                    let file = path.strip_prefix("unix:").unwrap_or(&path);
                    if file.starts_with('/') {
                        let mounted = mounts.iter().any(|mount| file.starts_with(&format!("{mount}/")));
                        assert!(mounted, "{name}: {owner}: nothing is mounted for {variable}={path}");
                    }
                }
                for mount in list(container, "/volumeMounts") {
                    let volumes = list(pod, "/volumes");
                    let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]);
                    let volume = volume.with_context(|| format!("{name}: {owner}: no volume {}", mount["name"]))?;
                    if volume.get("secret").is_some() {
                        assert_eq!(mount["readOnly"], true, "{name}: {owner}: {}", mount["name"]);
                        assert_eq!(volume["secret"]["defaultMode"], 0o440, "{name}: {owner}: {}", mount["name"]);
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_pod_is_restricted_and_bounded() -> Result<()> {
    for name in RENDERED {
        let documents = read(name)?;
        for Workload { name: owner, pod, .. } in workloads(&documents) {
            let at = format!("{name}: {owner}");
            assert_eq!(pod["automountServiceAccountToken"], false, "{at}");
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{at}");
            assert_eq!(text(pod, "/securityContext/seccompProfile/type"), "RuntimeDefault", "{at}");
            for container in containers(pod) {
                let security = &container["securityContext"];
                assert_eq!(security["allowPrivilegeEscalation"], false, "{at}");
                assert_eq!(security["readOnlyRootFilesystem"], true, "{at}");
                assert_eq!(security["capabilities"]["drop"], serde_json::json!(["ALL"]), "{at}");
                for bound in ["/resources/requests/cpu", "/resources/requests/memory", "/resources/limits/memory"] {
                    assert_ne!(text(container, bound), "", "{at}: {bound}");
                }
                assert!(!text(container, "/image").ends_with(":latest"), "{at}");
            }
        }
        for namespace in of_kind(&documents, "Namespace") {
            let level = &namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"];
            assert_eq!(level, "restricted", "{name}");
        }
    }
    Ok(())
}

#[test]
fn cleanup_runs_alone_with_a_role_of_its_own() -> Result<()> {
    for name in ["single", "production", "example"] {
        let documents = read(name)?;
        let cron = of_kind(&documents, "CronJob").next().context("a CronJob that cleans up")?;
        assert_eq!(text(cron, "/spec/concurrencyPolicy"), "Forbid", "{name}");
        assert!(cron["spec"]["successfulJobsHistoryLimit"].is_u64() && cron["spec"]["failedJobsHistoryLimit"].is_u64());
        let pod = &cron["spec"]["jobTemplate"]["spec"]["template"]["spec"];
        assert_eq!(pod["containers"][0]["args"][0], "cleanup", "{name}");
        assert_eq!(text(pod, "/serviceAccountName"), "oncegate-cleanup", "{name}");
        let token = settings(&documents, &pod["containers"][0])?;
        assert!(token["SIDECAR_TOKEN_FILE"].ends_with("/cleanup"), "{name}: not the gateway's token");
    }
    Ok(())
}

#[test]
fn production_is_spread_protected_and_scaled() -> Result<()> {
    for overlay in ["production", "example"] {
        let documents = read(overlay)?;
        for workload in workloads(&documents).into_iter().filter(Workload::is_deployment) {
            let owner = format!("{overlay}: {}", workload.name);
            let spread = list(workload.pod, "/topologySpreadConstraints");
            let keys: Vec<_> = spread.iter().map(|spread| text(spread, "/topologyKey")).collect();
            assert_eq!(keys, ["kubernetes.io/hostname", "topology.kubernetes.io/zone"], "{owner}");
            for constraint in spread {
                assert!(network::selects(&constraint["labelSelector"], workload.labels), "{owner}: {constraint}");
            }
            let name = workload.name.trim_start_matches("Deployment ");
            for kind in ["PodDisruptionBudget", "HorizontalPodAutoscaler"] {
                assert!(named(&documents, kind, name).is_some(), "{owner} has no {kind}");
            }
        }
    }
    Ok(())
}
