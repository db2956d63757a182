//! What Prometheus makes of Kubernetes' pods, and the autoscalers of that.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use oncegate_e2e::{eventually, prometheus::Prometheus};
use oncegate_runtime::metrics::Kind;
use serde_json::{Value, json};

use super::{Services, all_families, repository};
use crate::manifests::{Workload, containers, list, read, text, workloads};

fn yaml(path: &str) -> Result<Value> {
    let text = std::fs::read_to_string(repository(path)).with_context(|| path.to_owned())?;
    serde_saphyr::from_str(&text).with_context(|| path.to_owned())
}

/// What Kubernetes would tell of a pod: a target for each port of each container, and one for a container without any.
fn targets(workload: &Workload<'_>, address: SocketAddr) -> Vec<Value> {
    let (_, name) = workload.name.split_once(' ').unwrap_or_default();
    let target = |container: &Value, port: &Value| {
        let mut labels = json!({
            "__meta_kubernetes_namespace": "payments",
            "__meta_kubernetes_pod_name": format!("{name}-abcde"),
            "__meta_kubernetes_pod_phase": if workload.is_deployment() { "Running" } else { "Succeeded" },
            "__meta_kubernetes_pod_container_name": container["name"],
        });
        if let Some(port) = port.get("name") {
            labels["__meta_kubernetes_pod_container_port_name"] = port.clone();
        }
        for (label, value) in workload.labels.as_object().into_iter().flatten() {
            let label: String = label.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
            labels[format!("__meta_kubernetes_pod_label_{label}")] = value.clone();
        }
        json!({ "targets": [address.to_string()], "labels": labels })
    };
    let of = |container: &Value| match list(container, "/ports") {
        [] => vec![target(container, &Value::Null)],
        ports => ports.iter().map(|port| target(container, port)).collect(),
    };
    containers(workload.pod).flat_map(of).collect()
}

/// Kubernetes' pods as Prometheus scrapes them, with the services of a test for what runs in them.
async fn scraped(services: &Services) -> Result<Prometheus> {
    let mut config = yaml("ops/prometheus/kubernetes.yaml")?;
    let job = config["scrape_configs"][0].as_object_mut().context("a job")?;
    assert_eq!(job.remove("kubernetes_sd_configs"), Some(json!([{ "role": "pod" }])));
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    let mut found = Vec::new();
    for name in ["production", "in-pod", "ops"] {
        let documents = read(name)?;
        for workload in workloads(&documents) {
            found.extend(targets(
                &workload,
                match workload.name.as_str() {
                    "Deployment oncegate-sidecar" => services.sidecar_admin,
                    "Deployment oncegate-gateway" => services.gateway_admin,
                    _ => nobody,
                },
            ));
        }
    }
    job.insert("static_configs".to_owned(), found.into());
    Prometheus::start_with(&config["scrape_configs"], &repository("ops/prometheus/rules.yaml").canonicalize()?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_are_scraped_under_the_jobs_of_the_alerts_and_autoscalers_find_their_metrics() -> Result<()> {
    let services = Services::start(&[]).await?;
    let prometheus = scraped(&services).await?;
    let of = |job, pod| [job, pod, "payments", pod].map(str::to_owned);
    let wanted = [
        of("oncegate-gateway", "oncegate-gateway-abcde"),
        // The sidecar in the application's pod.
        of("oncegate-sidecar", "application-abcde"),
        of("oncegate-sidecar", "oncegate-sidecar-abcde"),
    ];
    // It looks for them a moment after its start, and for all at once.
    let known = eventually("pods are found", async || {
        let known = prometheus.get("/api/v1/targets?state=active").await.ok()?;
        let labels = ["/job", "/instance", "/namespace", "/pod"];
        let known = list(&known, "/activeTargets").iter();
        let mut known: Vec<_> =
            known.map(|target| labels.map(|label| text(&target["labels"], label).to_owned())).collect();
        known.sort_unstable();
        (!known.is_empty()).then_some(known)
    })
    .await;
    assert_eq!(known, wanted);

    // The autoscalers' metrics, as the adapter asks for them.
    let adapter = yaml("ops/prometheus/adapter.yaml")?;
    let production = read("production")?;
    let scalers = production.iter().filter(|document| text(document, "/kind") == "HorizontalPodAutoscaler");
    let mut asked = Vec::new();
    for scaler in scalers {
        for metric in list(scaler, "/spec/metrics") {
            let name = text(metric, "/pods/metric/name");
            let family =
                all_families().find(|family| family.name == name).with_context(|| format!("no metric {name}"))?;
            assert_eq!(family.kind, Kind::Gauge, "{name}");
            let prefix = format!("{name}{{");
            let rule = list(&adapter, "/rules").iter().find(|rule| text(rule, "/seriesQuery").starts_with(&prefix));
            let rule = rule.with_context(|| format!("the adapter has no rule for {name}"))?;
            assert_eq!(rule["resources"]["overrides"]["pod"]["resource"], "pod");
            assert_eq!(rule["resources"]["overrides"]["namespace"]["resource"], "namespace");
            let pod = format!("{}-abcde", text(scaler, "/spec/scaleTargetRef/name"));
            let query = text(rule, "/metricsQuery")
                .replace("<<.GroupBy>>", "pod")
                .replace("<<.Series>>", name)
                .replace("<<.LabelMatchers>>", &format!("namespace=\"payments\",pod=~\"{pod}\""));
            assert!(!query.contains("<<"), "{query}");
            for query in [text(rule, "/seriesQuery"), query.as_str()] {
                eventually(query, async || {
                    let result = prometheus.query(query).await.ok()?;
                    let series = result.as_array()?;
                    (series.len() == 1 && series[0]["metric"]["pod"] == pod.as_str()).then_some(())
                })
                .await;
            }
            asked.push(name);
        }
    }
    assert_eq!(asked.len(), list(&adapter, "/rules").len(), "a rule that nobody asks: {asked:?}");

    eventually("both are up", async || {
        (prometheus.value("count(up{job=~\"oncegate-.*\"} == 1)").await.ok()? == Some(2.0)).then_some(())
    })
    .await;
    Ok(())
}
