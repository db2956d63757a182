//! Alerts fire when they should and have a page each in the runbook; the dashboard asks for what there is.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result};
use oncegate_e2e::{program::Oncegate, prometheus::promtool};
use oncegate_runtime::metrics::{Family, Kind};

use super::{all_families, repository};

fn read(path: &str) -> Result<String> {
    fs::read_to_string(repository(path)).with_context(|| path.to_owned())
}

/// The values of a key in a YAML file, wherever it stands at the beginning of an entry.
fn values(text: &str, key: &str) -> BTreeSet<String> {
    let entries = text.lines().filter_map(|line| line.trim_start().trim_start_matches("- ").strip_prefix(key));
    entries.map(|value| value.trim().to_owned()).collect()
}

#[tokio::test]
async fn each_alert_fires_when_it_should_and_not_otherwise() -> Result<()> {
    promtool(&repository("ops/prometheus"), &["check", "rules", "rules.yaml"], "").await?;
    promtool(&repository("ops/prometheus"), &["test", "rules", "tests.yaml"], "").await?;
    let alerts = values(&read("ops/prometheus/rules.yaml")?, "alert:");
    let cases = values(&read("ops/prometheus/tests.yaml")?, "name:");
    let wanted: BTreeSet<String> =
        alerts.iter().flat_map(|alert| [format!("{alert} fires"), format!("{alert} is silent")]).collect();
    assert_eq!(cases, wanted);
    Ok(())
}

#[test]
fn each_alert_has_its_page_in_the_runbook() -> Result<()> {
    let rules = read("ops/prometheus/rules.yaml")?;
    let alerts = values(&rules, "alert:");
    let runbook = read("docs/runbook.md")?;
    let pages: BTreeSet<String> =
        runbook.lines().filter_map(|line| line.strip_prefix("## ")).map(str::to_owned).collect();
    let pages: BTreeSet<String> = pages.into_iter().filter(|page| page.starts_with("Oncegate")).collect();
    assert_eq!(pages, alerts);
    let links = values(&rules, "runbook_url:");
    assert_eq!(links, alerts.iter().map(|alert| format!("docs/runbook.md#{}", alert.to_lowercase())).collect());
    Ok(())
}

#[tokio::test]
async fn every_command_of_the_runbook_exists() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut manuals: BTreeMap<String, String> = BTreeMap::new();
    let mut commands = 0;
    let runbook = read("docs/runbook.md")?;
    for line in runbook.lines().filter_map(|line| line.strip_prefix("    oncegate ")) {
        let words: Vec<&str> = line.split_whitespace().take_while(|word| *word != "|").collect();
        let command = words.first().context("a command")?;
        if !manuals.contains_key(*command) {
            let manual = Oncegate::new(directory.path(), [command, "--help"])?.run().await?;
            assert_eq!(manual.code, Some(0), "oncegate {line}\n{manual}");
            manuals.insert((*command).to_owned(), manual.stdout);
        }
        for option in words.iter().filter(|word| word.starts_with("--")) {
            assert!(manuals[*command].contains(option), "oncegate {command} has no {option}");
        }
        commands += 1;
    }
    assert!(commands > 10, "{commands}");
    Ok(())
}

/// The metrics that an expression names, with the labels that it asks for, and names in `by`.
fn names(expression: &str) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    let word = |character: char| character.is_ascii_alphanumeric() || character == '_' || character == ':';
    let mut rest = expression;
    while let Some(begin) = rest.find(|character: char| character.is_ascii_alphabetic()) {
        rest = &rest[begin..];
        let end = rest.find(|character| !word(character)).unwrap_or(rest.len());
        let name = &rest[..end];
        rest = &rest[end..];
        let mut labels = Vec::new();
        if let Some(selector) = rest.strip_prefix('{') {
            let (inside, after) = selector.split_once('}').unwrap_or((selector, ""));
            labels =
                inside.split(',').filter_map(|matcher| matcher.split(['=', '!']).next()).map(str::to_owned).collect();
            rest = after;
        }
        if name.starts_with("oncegate") || name.starts_with("process_") {
            found.push((name.to_owned(), labels));
        }
    }
    found
}

fn family(name: &str) -> Option<&'static Family> {
    all_families().find(|family| {
        let parts = ["_bucket", "_sum", "_count"].map(|part| format!("{}{part}", family.name));
        match family.kind {
            Kind::Histogram => parts.iter().any(|part| part == name),
            Kind::Counter | Kind::Gauge => family.name == name,
        }
    })
}

fn queries(value: &serde_json::Value, found: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                match value.as_str() {
                    Some(query) if name == "expr" => found.push(query.to_owned()),
                    _ => queries(value, found),
                }
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| queries(value, found)),
        _ => {}
    }
}

#[tokio::test]
async fn the_dashboard_and_the_rules_ask_for_metrics_that_exist_and_leave_none_out() -> Result<()> {
    let dashboard: serde_json::Value = serde_json::from_str(&read("ops/grafana/oncegate.json")?)?;
    let mut asked = Vec::new();
    queries(&dashboard, &mut asked);
    assert!(asked.len() > 30, "{}", asked.len());

    // As Prometheus reads them, with Grafana's variables filled in.
    let directory = tempfile::tempdir()?;
    let mut rules = String::from("groups:\n  - name: dashboard\n    rules:\n");
    for (number, query) in asked.iter().enumerate() {
        let query = query.replace("$__rate_interval", "1m").replace("$job", ".*");
        rules.push_str(&format!("      - {{record: query_{number}, expr: {}}}\n", serde_json::to_string(&query)?));
    }
    fs::write(directory.path().join("dashboard.yaml"), rules)?;
    promtool(directory.path(), &["check", "rules", "dashboard.yaml"], "").await?;

    let rules = read("ops/prometheus/rules.yaml")?;
    let recorded = values(&rules, "record:");
    let text: String =
        rules.lines().filter(|line| !line.trim_start().starts_with(['#'])).map(|line| format!("{line}\n")).collect();
    // Names in annotations and of groups are no queries.
    let text: String = text
        .lines()
        .filter(|line| !["runbook_url:", "summary:", "name:"].iter().any(|key| line.contains(key)))
        .map(|line| format!("{line}\n"))
        .collect();
    let mut used: BTreeSet<&str> = BTreeSet::new();
    for query in asked.iter().map(String::as_str).chain([text.as_str()]) {
        for (name, labels) in names(query) {
            if recorded.contains(&name) {
                continue;
            }
            let family = family(&name).with_context(|| format!("no metric {name}, in {query}"))?;
            used.insert(family.name);
            for label in labels {
                let known = family.labels.contains(&label.as_str()) || ["job", "instance"].contains(&label.as_str());
                assert!(known, "{name} has no label {label}");
            }
        }
    }
    let unseen: Vec<&str> = all_families().map(|family| family.name).filter(|name| !used.contains(name)).collect();
    assert_eq!(unseen, ["process_open_fds"; 0], "metrics that nobody looks at");
    Ok(())
}
