//! Network policies: nothing is permitted but what is named, and what is named is what the settings need.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{SERVING, Workload, containers, list, named, of_kind, port_of, read, settings, text, workloads};

/// Whether a selector finds what bears these labels.
pub(super) fn selects(selector: &Value, labels: &Value) -> bool {
    let is = |key: &str, value: &Value| labels.get(key) == Some(value);
    let by_labels =
        selector["matchLabels"].as_object().is_none_or(|wanted| wanted.iter().all(|(key, value)| is(key, value)));
    let by_expressions = list(selector, "/matchExpressions").iter().all(|expression| {
        assert_eq!(expression["operator"], "In", "this test knows no other");
        list(expression, "/values").iter().any(|value| is(text(expression, "/key"), value))
    });
    by_labels && by_expressions
}

/// With the operators' pod beside what it asks.
fn all(name: &str) -> Result<Vec<Value>> {
    let mut documents = read(name)?;
    if named(&documents, "Service", "oncegate-sidecar").is_some() {
        documents.extend(read("ops")?);
    }
    Ok(documents)
}

/// The rules that hold for a pod: `ingress` or `egress`.
fn rules<'a>(documents: &'a [Value], labels: &Value, direction: &str) -> Vec<&'a Value> {
    let policies = of_kind(documents, "NetworkPolicy").filter(|policy| selects(&policy["spec"]["podSelector"], labels));
    policies.flat_map(|policy| list(policy, &format!("/spec/{direction}"))).collect()
}

fn ports<'a>(rules: &[&'a Value]) -> impl Iterator<Item = (&'a str, u64)> {
    let ports: Vec<_> = rules.iter().flat_map(|rule| list(rule, "/ports")).collect();
    ports.into_iter().map(|port| (text(port, "/protocol"), port["port"].as_u64().unwrap_or_default()))
}

fn declared(pod: &Value) -> BTreeSet<u64> {
    let ports = containers(pod).flat_map(|container| list(container, "/ports"));
    ports.filter_map(|port| port["containerPort"].as_u64()).collect()
}

#[test]
fn everything_is_denied_that_no_policy_names() -> Result<()> {
    for name in SERVING {
        let documents = all(name)?;
        for workload in workloads(&documents) {
            let denied = of_kind(&documents, "NetworkPolicy").any(|policy| {
                let spec = &policy["spec"];
                selects(&spec["podSelector"], workload.labels)
                    && spec["policyTypes"] == serde_json::json!(["Ingress", "Egress"])
                    && spec.get("ingress").is_none()
                    && spec.get("egress").is_none()
            });
            assert!(denied, "{name}: {}: a pod that nothing is denied to", workload.name);
        }
        // No rule without its other end, and none without a port.
        for policy in of_kind(&documents, "NetworkPolicy") {
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
fn what_comes_in_comes_to_a_port_that_is_there() -> Result<()> {
    for name in SERVING {
        let documents = all(name)?;
        for Workload { name: owner, labels, pod } in workloads(&documents) {
            let permitted: BTreeSet<u64> = ports(&rules(&documents, labels, "ingress"))
                .map(|(protocol, port)| {
                    assert_eq!(protocol, "TCP", "{name}: {owner}");
                    port
                })
                .collect();
            assert_eq!(permitted, declared(pod), "{name}: {owner}");
        }
    }
    Ok(())
}

#[test]
fn what_goes_out_goes_to_what_the_settings_name() -> Result<()> {
    for name in SERVING {
        let documents = all(name)?;
        for Workload { name: owner, labels, pod } in workloads(&documents) {
            let mut wanted = BTreeSet::from([("UDP", 53), ("TCP", 53)]);
            for container in containers(pod) {
                for (variable, value) in settings(&documents, container)? {
                    let port = match variable.as_str() {
                        // What a secret names: the usual ports.
                        "DATABASE_URL_FILE" => 5_432,
                        "REDIS_URL_FILE" => 6_379,
                        // PayPal's certificates.
                        "GATEWAY_LISTEN" => 443,
                        "SIDECAR_URL" if value.starts_with("unix:") => continue,
                        "SIDECAR_URL" | "UPSTREAM_URL" | "OTEL_EXPORTER_OTLP_ENDPOINT" => port_of(&value)?,
                        _ => continue,
                    };
                    wanted.insert(("TCP", port));
                }
            }
            let rules = rules(&documents, labels, "egress");
            assert_eq!(ports(&rules).collect::<BTreeSet<_>>(), wanted, "{name}: {owner}");
            // The other end is open to this pod, where it is one of ours.
            for rule in rules {
                let peers = list(rule, "/to").iter().filter(|peer| peer.get("namespaceSelector").is_none());
                for selector in peers.filter_map(|peer| peer.get("podSelector")) {
                    for other in workloads(&documents).iter().filter(|other| selects(selector, other.labels)) {
                        for (_, port) in ports(&[rule]) {
                            let open = self::rules(&documents, other.labels, "ingress").into_iter().any(|rule| {
                                ports(&[rule]).any(|(_, open)| open == port)
                                    && list(rule, "/from").iter().any(|peer| {
                                        peer.get("podSelector").is_some_and(|selector| selects(selector, labels))
                                    })
                            });
                            assert!(open, "{name}: {owner} may not reach port {port} of {}", other.name);
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// The only pod that asks with the operator's token reaches the sidecars, and nobody reaches it.
#[test]
fn the_operators_pod_is_a_client_and_nothing_else() -> Result<()> {
    for overlay in ["production", "example"] {
        is_a_client_and_nothing_else(&all(overlay)?)?;
    }
    Ok(())
}

fn is_a_client_and_nothing_else(documents: &[Value]) -> Result<()> {
    let ops = workloads(documents).into_iter().find(|workload| workload.name == "Pod oncegate-ops");
    let ops = ops.context("the operators' pod")?;
    assert_eq!(text(ops.labels, "/oncegate.dev~1client"), "true");
    assert!(ops.pod["activeDeadlineSeconds"].is_u64(), "it ends by itself");
    assert!(rules(documents, ops.labels, "ingress").is_empty());
    for workload in workloads(documents).iter().filter(|workload| workload.name != ops.name) {
        let items = list(workload.pod, "/volumes").iter().flat_map(|volume| list(volume, "/secret/items"));
        assert!(items.clone().all(|item| item["key"] != "operator"), "{}", workload.name);
        // A Secret with several tokens is never mounted whole.
        let whole = list(workload.pod, "/volumes").iter().any(|volume| {
            text(volume, "/secret/secretName") == "oncegate-client-tokens" && list(volume, "/secret/items").len() != 1
        });
        assert!(!whole, "{}", workload.name);
    }
    Ok(())
}
