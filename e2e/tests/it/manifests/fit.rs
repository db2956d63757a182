//! Names, ports, probes and files of the manifests, each against what it stands for.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use oncegate_runtime::config::byte_size;
use serde_json::Value;

use super::{
    RENDERED, SERVING, Workload, containers, end::in_force, is_ours, list, named, network::selects, of_kind, port_of,
    read, settings, text, workloads,
};

fn ports(container: &Value) -> BTreeMap<&str, u64> {
    let ports = list(container, "/ports").iter();
    ports.map(|port| (text(port, "/name"), port["containerPort"].as_u64().unwrap_or_default())).collect()
}

#[test]
fn listeners_and_probes_are_on_the_ports_that_are_declared() -> Result<()> {
    for name in SERVING {
        let documents = read(name)?;
        for workload in workloads(&documents).into_iter().filter(Workload::is_deployment) {
            let owner = &workload.name;
            let container = workload.ours()?;
            let (settings, ports) = (settings(&documents, container)?, ports(container));
            let mut listeners = 0;
            for (variable, port) in [("SIDECAR_LISTEN", "grpc"), ("GATEWAY_LISTEN", "http"), ("ADMIN_LISTEN", "admin")]
            {
                if let Some(address) = settings.get(variable).filter(|address| !address.starts_with("unix:")) {
                    assert_eq!(address, &format!("0.0.0.0:{}", ports[port]), "{name}: {owner}: {variable}");
                    listeners += 1;
                }
            }
            assert_eq!(listeners, ports.len(), "{name}: {owner}: a port without a listener");
            for (probe, path) in
                [("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")]
            {
                assert_eq!(text(&container[probe], "/httpGet/path"), path, "{name}: {owner}");
                assert_eq!(text(&container[probe], "/httpGet/port"), "admin", "{name}: {owner}: {probe}");
            }
        }
    }
    Ok(())
}

/// The Deployments whose pods a selector finds.
fn found<'a>(documents: &'a [Value], selector: &Value) -> Vec<Workload<'a>> {
    let deployments = workloads(documents).into_iter().filter(Workload::is_deployment);
    deployments.filter(|workload| selects(selector, workload.labels)).collect()
}

#[test]
fn services_and_those_who_ask_them_fit_together() -> Result<()> {
    for name in ["single", "production", "example"] {
        let documents: Vec<Value> = [read(name)?, read("ops")?].concat();
        for service in of_kind(&documents, "Service") {
            let selector = serde_json::json!({ "matchLabels": service["spec"]["selector"] });
            let [behind] = &found(&documents, &selector)[..] else {
                anyhow::bail!("{name}: one Deployment has to be behind {service}");
            };
            for port in list(service, "/spec/ports") {
                assert!(
                    ports(behind.ours()?).contains_key(text(port, "/targetPort")),
                    "{name}: {}: {port}",
                    behind.name
                );
            }
        }
        // Clients find the sidecar by the name and port of its Service.
        let sidecar = named(&documents, "Service", "oncegate-sidecar").context("the sidecar has a Service")?;
        assert_eq!(text(sidecar, "/spec/clusterIP"), "None", "{name}: a virtual address would defeat balancing");
        let url = format!("https://oncegate-sidecar:{}", sidecar["spec"]["ports"][0]["port"]);
        let mut clients = BTreeSet::new();
        for workload in workloads(&documents) {
            if let Some(asked) = settings(&documents, workload.ours()?)?.get("SIDECAR_URL") {
                assert_eq!(asked, &url, "{name}: {}", workload.name);
                clients.insert(workload.name);
            }
        }
        let wanted = ["CronJob oncegate-cleanup", "Deployment oncegate-gateway", "Pod oncegate-ops"];
        assert_eq!(clients, wanted.map(str::to_owned).into(), "{name}");
    }
    Ok(())
}

#[test]
fn the_ingress_leads_to_the_routes_and_nowhere_else() -> Result<()> {
    for name in ["single", "production", "example"] {
        let documents = read(name)?;
        let ingress = of_kind(&documents, "Ingress").next().context("an Ingress")?;
        let mut paths = BTreeSet::new();
        for rule in list(ingress, "/spec/rules") {
            assert!(list(ingress, "/spec/tls/0/hosts").contains(&rule["host"]), "{name}: {rule}");
            for path in list(rule, "/http/paths") {
                // A prefix would take the health page along, with its statistics.
                assert_eq!(text(path, "/pathType"), "Exact", "{name}");
                paths.insert(text(path, "/path").to_owned());
                let backend = &path["backend"]["service"];
                let service = named(&documents, "Service", text(backend, "/name")).context("its Service")?;
                let known = list(service, "/spec/ports").iter().any(|port| port["name"] == backend["port"]["name"]);
                assert!(known, "{name}: {backend}");
                // Whoever stands before the gateway says who asks: without it strangers share one budget of failures.
                let selector = serde_json::json!({ "matchLabels": service["spec"]["selector"] });
                for gateway in found(&documents, &selector) {
                    assert_eq!(settings(&documents, gateway.ours()?)?["GATEWAY_TRUSTED_HOPS"], "1", "{name}");
                }
            }
        }
        let providers = ["flutterwave", "paypal", "paystack", "stripe"];
        // The route of the file of ONCEGATE_CONFIG that it shows.
        let more = (name == "example").then_some("billing");
        let routes = providers.into_iter().chain(more).map(|route| format!("/webhooks/payments/{route}"));
        assert_eq!(paths, routes.collect(), "{name}");
    }
    Ok(())
}

/// What the proxy refuses by itself, the gateway does not count; and a webhook that it sent twice would wait for itself.
#[tokio::test]
async fn the_ingress_leaves_large_bodies_to_the_gateway_and_repeats_only_what_was_not_sent() -> Result<()> {
    for name in ["single", "production", "example"] {
        let documents = read(name)?;
        let ingress = of_kind(&documents, "Ingress").next().context("an Ingress")?;
        let annotation = |key: &str| {
            let value = &ingress["metadata"]["annotations"][format!("nginx.ingress.kubernetes.io/{key}")];
            value.as_str().with_context(|| format!("{name}: {key}"))
        };
        let workloads = workloads(&documents);
        let gateway = workloads.iter().find(|workload| workload.name == "Deployment oncegate-gateway");
        let settings = settings(&documents, gateway.context("a gateway")?.ours()?)?;
        let in_force = in_force("gateway", &settings).await?;
        let taken = byte_size(in_force.get("GATEWAY_BODY_BYTES_MAX").context("it is printed")?)?;
        // nginx writes MiB as `m`.
        let passed = annotation("proxy-body-size")?.strip_suffix('m').context("a size")?.parse::<u64>()? * 1024 * 1024;
        assert!(passed > taken, "{name}: {passed} and {taken}");
        assert_eq!(annotation("proxy-next-upstream")?, "error timeout", "{name}");
    }
    Ok(())
}

#[test]
fn budgets_and_autoscalers_find_their_deployments() -> Result<()> {
    for overlay in ["production", "example"] {
        find_their_deployments(&read(overlay)?)?;
    }
    Ok(())
}

fn find_their_deployments(documents: &[Value]) -> Result<()> {
    for budget in of_kind(documents, "PodDisruptionBudget") {
        let [protected] = &found(documents, &budget["spec"]["selector"])[..] else {
            anyhow::bail!("one Deployment has to be protected by {budget}");
        };
        assert_eq!(protected.name, format!("Deployment {}", text(budget, "/metadata/name")));
    }
    for scaler in of_kind(documents, "HorizontalPodAutoscaler") {
        let target = &scaler["spec"]["scaleTargetRef"];
        let scaled = named(documents, text(target, "/kind"), text(target, "/name")).context("what is scaled")?;
        assert_eq!(scaled["apiVersion"], target["apiVersion"], "{scaler}");
        assert_eq!(scaled["metadata"]["name"], scaler["metadata"]["name"], "{scaler}");
        // A number of its own would undo the autoscaler's work with each apply.
        assert!(scaled["spec"].get("replicas").is_none(), "{scaled}");
        let (least, most) = (scaler["spec"]["minReplicas"].as_u64(), scaler["spec"]["maxReplicas"].as_u64());
        let budget = named(documents, "PodDisruptionBudget", text(target, "/name")).context("a budget")?;
        assert!(least > budget["spec"]["maxUnavailable"].as_u64() && least < most, "{scaler}");
    }
    Ok(())
}

#[test]
fn accounts_config_maps_and_their_files_are_there() -> Result<()> {
    for name in RENDERED {
        let documents = read(name)?;
        for Workload { name: owner, pod, .. } in workloads(&documents) {
            let account = text(pod, "/serviceAccountName");
            // The application of the example has its own.
            if containers(pod).all(is_ours) {
                let account = named(&documents, "ServiceAccount", account);
                let account = account.with_context(|| format!("{name}: {owner}: its account"))?;
                assert_eq!(account["automountServiceAccountToken"], false, "{name}: {owner}");
            }
            for volume in list(pod, "/volumes").iter().filter(|volume| volume.get("configMap").is_some()) {
                let map = text(volume, "/configMap/name");
                let map = named(&documents, "ConfigMap", map).with_context(|| format!("{name}: {owner}: {map}"))?;
                for container in containers(pod) {
                    let settings = settings(&documents, container)?;
                    for mount in list(container, "/volumeMounts").iter().filter(|mount| mount["name"] == volume["name"])
                    {
                        let directory = format!("{}/", text(mount, "/mountPath"));
                        let mut files = settings.values().filter_map(|path| path.strip_prefix(&directory)).peekable();
                        assert!(files.peek().is_some(), "{name}: {owner}: nobody reads {directory}");
                        assert!(files.all(|file| map["data"].get(file).is_some()), "{name}: {owner}: {directory}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// The table of Secrets in the document: their names, with the keys.
fn documented() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../k8s/README.md"))?;
    let table = document.split("| Secret | keys |").nth(1).context("a table of Secrets")?;
    let rows = table.lines().map(str::trim).skip(2).take_while(|line| line.starts_with('|'));
    Ok(rows
        .filter_map(|row| {
            let mut cells = row.trim_matches('|').split('|');
            let (name, keys) = (cells.next()?, cells.next()?);
            // What follows the colon is said of them.
            let keys = keys.split(": ").next()?.split('`').skip(1).step_by(2);
            Some((name.trim().trim_matches('`').to_owned(), keys.map(str::to_owned).collect()))
        })
        .collect())
}

#[test]
fn the_document_names_every_secret_with_its_keys() -> Result<()> {
    let documented = documented()?;
    let mut used: BTreeSet<String> = BTreeSet::new();
    for name in RENDERED {
        let documents = read(name)?;
        used.extend(of_kind(&documents, "Ingress").map(|ingress| text(ingress, "/spec/tls/0/secretName").to_owned()));
        for Workload { name: owner, pod, .. } in workloads(&documents) {
            for volume in list(pod, "/volumes").iter().filter(|volume| volume.get("secret").is_some()) {
                let secret = text(volume, "/secret/secretName");
                let keys = documented.get(secret).with_context(|| format!("{name}: {owner}: {secret}"))?;
                used.insert(secret.to_owned());
                for container in containers(pod) {
                    let settings = settings(&documents, container)?;
                    let mounts = list(container, "/volumeMounts").iter();
                    for mount in mounts.filter(|mount| mount["name"] == volume["name"]) {
                        let directory = format!("{}/", text(mount, "/mountPath"));
                        for file in settings.values().filter_map(|path| path.strip_prefix(&directory)) {
                            let items = list(volume, "/secret/items");
                            let item = items.iter().find(|item| item["path"] == file);
                            assert!(items.is_empty() || item.is_some(), "{name}: {owner}: no {file} in {secret}");
                            let key = item.map_or(file, |item| text(item, "/key"));
                            assert!(keys.contains(key), "{name}: {owner}: {secret} has no {key} in the document");
                        }
                    }
                }
            }
        }
    }
    assert_eq!(used, documented.keys().cloned().collect());
    Ok(())
}

#[test]
fn an_address_names_its_port() -> Result<()> {
    assert_eq!(port_of("https://oncegate-sidecar:50051")?, 50_051);
    assert_eq!(port_of("http://application:3000/payments")?, 3_000);
    assert!(port_of("http://application/payments").is_err());
    Ok(())
}
