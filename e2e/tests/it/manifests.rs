//! The rendered manifests against the program and the rules of the house: what a cluster would only show at three in the
//! morning. That they are what the kustomizations say, and fit the API, is `scripts/render-k8s --check`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use oncegate_e2e::program::Oncegate;
use serde_json::Value;

const RENDERED: [&str; 3] = ["single", "production", "in-pod"];

fn read(name: &str) -> Result<Vec<Value>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../k8s/rendered").join(format!("{name}.yaml"));
    let text = fs::read_to_string(&path).with_context(|| format!("{}: run scripts/render-k8s", path.display()))?;
    text.split("\n---\n").map(|document| serde_saphyr::from_str(document).context(name.to_owned())).collect()
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// What runs pods, with the pod.
fn pods(documents: &[Value]) -> Vec<(String, &Value)> {
    let pod = |document: &'_ Value| -> Option<&'static str> {
        match text(document, "/kind") {
            "Deployment" | "Job" => Some("/spec/template/spec"),
            "CronJob" => Some("/spec/jobTemplate/spec/template/spec"),
            _ => None,
        }
    };
    documents
        .iter()
        .filter_map(|document| {
            let name = format!("{} {}", text(document, "/kind"), text(document, "/metadata/name"));
            Some((name, document.pointer(pod(document)?)?))
        })
        .collect()
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    list(pod, "/initContainers").iter().chain(list(pod, "/containers"))
}

fn is_ours(container: &Value) -> bool {
    text(container, "/image").contains("/oncegate:")
}

/// A container's settings, those of its config maps included.
fn settings(documents: &[Value], container: &Value) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for from in list(container, "/envFrom") {
        let name = text(from, "/configMapRef/name");
        let map = documents
            .iter()
            .find(|document| text(document, "/kind") == "ConfigMap" && text(document, "/metadata/name") == name)
            .with_context(|| format!("config map {name} is not there"))?;
        for (key, value) in map["data"].as_object().context("a config map has data")? {
            all.insert(key.clone(), value.as_str().unwrap_or_default().to_owned());
        }
    }
    for variable in list(container, "/env") {
        all.insert(text(variable, "/name").to_owned(), text(variable, "/value").to_owned());
    }
    Ok(all)
}

/// The variables that a command of the program reads, by its own manual.
async fn known_to_the_program(command: &str) -> Result<BTreeSet<String>> {
    let directory = tempfile::tempdir()?;
    let manual = Oncegate::new(directory.path(), [command, "--help"])?.run().await?;
    ensure!(manual.code == Some(0), "{manual}");
    let names = manual.stdout.split("[env: ").skip(1);
    Ok(names.filter_map(|rest| rest.split(['=', ']']).next()).map(|name| name.trim().to_owned()).collect())
}

#[tokio::test]
async fn every_variable_is_one_that_the_program_knows() -> Result<()> {
    for name in RENDERED {
        let documents = read(name)?;
        let mut seen = 0;
        for (owner, pod) in pods(&documents) {
            for container in containers(pod).filter(|container| is_ours(container)) {
                let command = container["args"][0].as_str().context("a command")?;
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
        for (owner, pod) in pods(&documents) {
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
        for (owner, pod) in pods(&documents) {
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
        let namespaces = documents.iter().filter(|document| text(document, "/kind") == "Namespace");
        for namespace in namespaces {
            let level = &namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"];
            assert_eq!(level, "restricted", "{name}");
        }
    }
    Ok(())
}

#[test]
fn services_probes_and_ports_fit_together() -> Result<()> {
    for name in ["single", "production"] {
        let documents = read(name)?;
        for (owner, pod) in pods(&documents).into_iter().filter(|(owner, _)| owner.starts_with("Deployment")) {
            let container = &pod["containers"][0];
            let settings = settings(&documents, container)?;
            let ports: BTreeMap<_, _> = list(container, "/ports")
                .iter()
                .map(|port| (text(port, "/name"), port["containerPort"].as_u64().unwrap_or_default()))
                .collect();
            // What the settings listen on is what the pod declares.
            for (variable, port) in [("SIDECAR_LISTEN", "grpc"), ("GATEWAY_LISTEN", "http"), ("ADMIN_LISTEN", "admin")]
            {
                if let Some(address) = settings.get(variable) {
                    assert_eq!(address, &format!("0.0.0.0:{}", ports[port]), "{name}: {owner}: {variable}");
                }
            }
            for (probe, path) in
                [("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")]
            {
                assert_eq!(text(&container[probe], "/httpGet/path"), path, "{name}: {owner}");
                assert!(ports.contains_key(text(&container[probe], "/httpGet/port")), "{name}: {owner}: {probe}");
            }
        }
        // Each Service, and each autoscaler and budget, finds its pods; each port its listener.
        for service in documents.iter().filter(|document| text(document, "/kind") == "Service") {
            let selector = text(service, "/spec/selector/app.kubernetes.io~1name");
            let deployment = documents
                .iter()
                .find(|document| {
                    text(document, "/kind") == "Deployment"
                        && text(document, "/spec/template/metadata/labels/app.kubernetes.io~1name") == selector
                })
                .with_context(|| format!("{name}: nobody is behind {selector}"))?;
            let container = &deployment["spec"]["template"]["spec"]["containers"][0];
            for port in list(service, "/spec/ports") {
                let known = list(container, "/ports").iter().any(|own| own["name"] == port["targetPort"]);
                assert!(known, "{name}: {selector}: {port}");
            }
        }
        // Clients find the sidecar by the name and port of its Service.
        let sidecar = documents
            .iter()
            .find(|document| {
                text(document, "/kind") == "Service" && text(document, "/metadata/name") == "oncegate-sidecar"
            })
            .context("the sidecar has a Service")?;
        assert_eq!(text(sidecar, "/spec/clusterIP"), "None", "{name}: a virtual address would defeat balancing");
        let url = format!("https://oncegate-sidecar:{}", sidecar["spec"]["ports"][0]["port"]);
        let mut clients = 0;
        for (owner, pod) in pods(&documents) {
            if let Some(found) = settings(&documents, &pod["containers"][0])?.get("SIDECAR_URL") {
                assert_eq!(found, &url, "{name}: {owner}");
                clients += 1;
            }
        }
        assert_eq!(clients, 2, "{name}: gateway and clean-up");
    }
    Ok(())
}

fn seconds(settings: &BTreeMap<String, String>, name: &str) -> Result<u64> {
    let value = settings.get(name).with_context(|| format!("{name} is not set"))?;
    value.strip_suffix('s').and_then(|number| number.parse().ok()).with_context(|| format!("{name}={value}"))
}

#[test]
fn the_grace_period_is_longer_than_everything_that_has_to_happen_in_it() -> Result<()> {
    for name in ["single", "production"] {
        let documents = read(name)?;
        for (owner, pod) in pods(&documents).into_iter().filter(|(owner, _)| owner.starts_with("Deployment")) {
            let container = &pod["containers"][0];
            let settings = settings(&documents, container)?;
            let grace = pod["terminationGracePeriodSeconds"].as_u64().context("a grace period")?;
            let pause = container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().context("a pause")?;
            let drain = match owner.as_str() {
                "Deployment oncegate-sidecar" => seconds(&settings, "SIDECAR_DRAIN")?,
                // And two calls of SIDECAR_TIMEOUT, 2.5 s by default, for what is left.
                _ => {
                    assert!(seconds(&settings, "GATEWAY_DRAIN")? >= seconds(&settings, "UPSTREAM_TIMEOUT")?, "{name}");
                    seconds(&settings, "GATEWAY_DRAIN")? + 5
                }
            };
            assert!(pause + drain < grace, "{name}: {owner}: {pause} + {drain} s have to fit into {grace} s");
        }
    }
    Ok(())
}

#[test]
fn nothing_is_permitted_on_the_network_but_what_is_named() -> Result<()> {
    for name in ["single", "production"] {
        let documents = read(name)?;
        let policies: Vec<_> = documents.iter().filter(|document| text(document, "/kind") == "NetworkPolicy").collect();
        let deny = policies
            .iter()
            .find(|policy| text(policy, "/metadata/name") == "oncegate-deny")
            .context("a policy that denies everything")?;
        assert_eq!(deny["spec"]["policyTypes"], serde_json::json!(["Ingress", "Egress"]), "{name}");
        assert!(deny["spec"].get("ingress").is_none() && deny["spec"].get("egress").is_none(), "{name}");
        let everywhere = text(deny, "/spec/podSelector/matchLabels/app.kubernetes.io~1part-of");
        for document in &documents {
            let labels = match text(document, "/kind") {
                "Deployment" | "Job" => document.pointer("/spec/template/metadata/labels"),
                "CronJob" => document.pointer("/spec/jobTemplate/spec/template/metadata/labels"),
                _ => continue,
            };
            let labels = labels.context("pods have labels")?;
            assert_eq!(
                text(labels, "/app.kubernetes.io~1part-of"),
                everywhere,
                "{name}: a pod that nothing is denied to"
            );
        }
        // No rule without its other end, and none without a port.
        for policy in policies {
            let (ingress, egress) = (list(policy, "/spec/ingress"), list(policy, "/spec/egress"));
            for (rule, end) in ingress.iter().map(|rule| (rule, "/from")).chain(egress.iter().map(|rule| (rule, "/to")))
            {
                assert!(!list(rule, end).is_empty() && !list(rule, "/ports").is_empty(), "{name}: {policy:#}");
            }
        }
    }
    Ok(())
}

#[test]
fn cleanup_runs_alone_with_a_role_of_its_own() -> Result<()> {
    for name in ["single", "production"] {
        let documents = read(name)?;
        let cron = documents
            .iter()
            .find(|document| text(document, "/kind") == "CronJob")
            .context("a CronJob that cleans up")?;
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
    let documents = read("production")?;
    for (owner, pod) in pods(&documents).into_iter().filter(|(owner, _)| owner.starts_with("Deployment")) {
        let keys: Vec<_> =
            list(pod, "/topologySpreadConstraints").iter().map(|spread| text(spread, "/topologyKey")).collect();
        assert_eq!(keys, ["kubernetes.io/hostname", "topology.kubernetes.io/zone"], "{owner}");
        let name = owner.trim_start_matches("Deployment ");
        for kind in ["PodDisruptionBudget", "HorizontalPodAutoscaler"] {
            let found = documents
                .iter()
                .any(|document| text(document, "/kind") == kind && text(document, "/metadata/name") == name);
            assert!(found, "{owner} has no {kind}");
        }
    }
    Ok(())
}
