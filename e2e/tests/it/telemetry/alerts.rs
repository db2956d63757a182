//! Alerts fire when they should and have a page each in the runbook; the dashboard asks for what there is.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result};
use oncegate_e2e::prometheus::promtool;
use oncegate_runtime::metrics::{Family, Kind};

use super::{Services, all_families, page, repository};

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
    let alerts = values(&read("ops/prometheus/rules.yaml")?, "alert:");
    let mut cases = BTreeSet::new();
    for file in ["tests.yaml", "tests-indicators.yaml", "tests-quiet.yaml"] {
        promtool(&repository("ops/prometheus"), &["test", "rules", file], "").await?;
        cases.append(&mut values(&read(&format!("ops/prometheus/{file}"))?, "name:"));
    }
    let mut known = 0;
    for alert in &alerts {
        for case in ["fires", "is silent"] {
            // What follows says when.
            let name = format!("{alert} {case}");
            let of_alert = cases.iter().filter(|case| **case == name || case.starts_with(&format!("{name} ")));
            known += of_alert.clone().count();
            assert!(of_alert.count() > 0, "no case {name}");
        }
    }
    assert_eq!(known, cases.len(), "a case of no alert: {cases:?}");
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

/// What an expression says of a label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Matcher {
    label: String,
    /// Those that a value may be, or may not be; none where they are no plain list.
    values: Vec<String>,
}

/// The metrics that an expression names, with what it says of their labels in braces.
fn names(expression: &str) -> Vec<(String, Vec<Matcher>)> {
    let mut found: Vec<(String, Vec<Matcher>)> = Vec::new();
    let word = |character: char| character.is_ascii_alphanumeric() || character == '_' || character == ':';
    let mut rest = expression;
    while let Some(begin) = rest.find(|character: char| character.is_ascii_alphabetic()) {
        rest = &rest[begin..];
        let end = rest.find(|character| !word(character)).unwrap_or(rest.len());
        let name = &rest[..end];
        rest = &rest[end..];
        let mut matchers = Vec::new();
        if let Some(selector) = rest.strip_prefix('{') {
            let (inside, after) = selector.split_once('}').unwrap_or((selector, ""));
            matchers = inside.split(',').filter_map(matcher).collect();
            rest = after;
        }
        if name.starts_with("oncegate") || name.starts_with("process_") {
            found.push((name.to_owned(), matchers));
        }
    }
    found
}

fn matcher(text: &str) -> Option<Matcher> {
    let operator = text.find(['=', '!'])?;
    let (label, rest) = text.split_at(operator);
    let value = rest.trim_start_matches(['=', '!', '~']).trim().trim_matches('"');
    let plain = value.chars().all(|c| c.is_ascii_alphanumeric() || "_|".contains(c));
    let values = if plain { value.split('|').map(str::to_owned).collect() } else { Vec::new() };
    Some(Matcher { label: label.trim().to_owned(), values })
}

/// The labels that each `by` keeps, with the metrics that it keeps them of.
fn groupings(expression: &str) -> Vec<(Vec<String>, Vec<String>)> {
    let mut found = Vec::new();
    for (at, _) in expression.match_indices("by (") {
        let labels = expression[at + 4..].split(')').next().unwrap_or_default();
        let after = expression[at + 4 + labels.len() + 1..].trim_start();
        // Before what it is of, or behind it.
        let of = match after.strip_prefix('(') {
            Some(inside) => &inside[..closing(inside.char_indices(), '(', ')').unwrap_or(inside.len())],
            None => {
                let before = expression[..at].trim_end().strip_suffix(')').unwrap_or_default();
                &before[closing(before.char_indices().rev(), ')', '(').map_or(0, |open| open + 1)..]
            }
        };
        let labels = labels.split(',').map(|label| label.trim().to_owned()).collect();
        found.push((labels, names(of).into_iter().map(|(name, _)| name).collect()));
    }
    found
}

/// Where the bracket ends that one stands in.
fn closing(characters: impl Iterator<Item = (usize, char)>, open: char, close: char) -> Option<usize> {
    let mut depth = 0;
    for (at, character) in characters {
        if character == close && depth == 0 {
            return Some(at);
        }
        depth += i32::from(character == open) - i32::from(character == close);
    }
    None
}

#[test]
fn an_expression_is_read_as_it_is_meant() {
    let expression = "sum by (kind) (rate(oncegate_a_total{job=~\"x.*\",kind=~\"p|q\"}[5m])) / \
                      max(oncegate_b{state!=\"r\"}) by (state, le) > 0";
    let matcher = |label: &str, values: &[&str]| Matcher {
        label: label.to_owned(),
        values: values.iter().map(|value| (*value).to_owned()).collect(),
    };
    assert_eq!(
        names(expression),
        [
            ("oncegate_a_total".to_owned(), vec![matcher("job", &[]), matcher("kind", &["p", "q"])]),
            ("oncegate_b".to_owned(), vec![matcher("state", &["r"])]),
        ]
    );
    let of = |labels: &[&str], name: &str| {
        (labels.iter().map(|label| (*label).to_owned()).collect::<Vec<_>>(), vec![name.to_owned()])
    };
    assert_eq!(groupings(expression), [of(&["kind"], "oncegate_a_total"), of(&["state", "le"], "oncegate_b")]);
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

/// The dashboard's queries, and the expressions of the rules.
fn asked() -> Result<(Vec<String>, Vec<String>)> {
    let dashboard: serde_json::Value = serde_json::from_str(&read("ops/grafana/oncegate.json")?)?;
    let mut shown = Vec::new();
    queries(&dashboard, &mut shown);
    assert!(shown.len() > 30, "{}", shown.len());
    let rules: serde_json::Value = serde_saphyr::from_str(&read("ops/prometheus/rules.yaml")?)?;
    let groups = rules["groups"].as_array().context("groups")?.iter();
    let rules = groups.flat_map(|group| group["rules"].as_array()).flatten();
    let ruled: Vec<String> = rules.filter_map(|rule| Some(rule["expr"].as_str()?.to_owned())).collect();
    assert!(ruled.len() > 20, "{}", ruled.len());
    Ok((shown, ruled))
}

#[tokio::test]
async fn the_dashboard_and_the_rules_ask_for_metrics_that_exist_and_leave_none_out() -> Result<()> {
    let (shown, ruled) = asked()?;
    let dashboard: serde_json::Value = serde_json::from_str(&read("ops/grafana/oncegate.json")?)?;
    let job = dashboard["templating"]["list"].as_array().and_then(|list| list.iter().find(|of| of["name"] == "job"));
    // As in the rules: of everything else that Prometheus scrapes the dashboard shows nothing.
    assert_eq!(job.context("the jobs")?["allValue"], "oncegate.*");
    // As Prometheus reads them, with Grafana's variables filled in.
    let directory = tempfile::tempdir()?;
    let mut rules = String::from("groups:\n  - name: dashboard\n    rules:\n");
    for (number, query) in shown.iter().enumerate() {
        let query = query.replace("$__rate_interval", "1m").replace("$job", "oncegate.*");
        rules.push_str(&format!("      - {{record: query_{number}, expr: {}}}\n", serde_json::to_string(&query)?));
    }
    fs::write(directory.path().join("dashboard.yaml"), rules)?;
    promtool(directory.path(), &["check", "rules", "dashboard.yaml"], "").await?;

    let recorded = values(&read("ops/prometheus/rules.yaml")?, "record:");
    let mut used: BTreeSet<&str> = BTreeSet::new();
    for query in shown.iter().chain(&ruled) {
        let known = |name: &str, label: &str| -> Result<()> {
            let family = family(name).with_context(|| format!("no metric {name}, in {query}"))?;
            // Prometheus' own; and a histogram's buckets have their bound.
            let known = family.labels.contains(&label)
                || ["job", "instance"].contains(&label)
                || (label == "le" && name.ends_with("_bucket"));
            assert!(known, "{name} has no label {label}, in {query}");
            Ok(())
        };
        for (name, matchers) in names(query).iter().filter(|(name, _)| !recorded.contains(name)) {
            used.insert(family(name).with_context(|| format!("no metric {name}, in {query}"))?.name);
            for Matcher { label, .. } in matchers {
                known(name, label)?;
            }
        }
        for (labels, names) in groupings(query) {
            assert!(!names.is_empty(), "what is grouped, in {query}?");
            for (name, label) in names.iter().flat_map(|name| labels.iter().map(move |label| (name, label))) {
                known(name, label)?;
            }
        }
    }
    let unseen: Vec<&str> = all_families().map(|family| family.name).filter(|name| !used.contains(name)).collect();
    assert_eq!(unseen, ["process_open_fds"; 0], "metrics that nobody looks at");
    Ok(())
}

/// The values of labels on a page, by metric and label.
fn on_the_page(page: &str) -> BTreeMap<(String, String), BTreeSet<String>> {
    let mut found: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, rest)) = line.split_once('{') else { continue };
        let (labels, _) = rest.rsplit_once('}').unwrap_or((rest, ""));
        for pair in labels.split("\",") {
            let Some((label, value)) = pair.split_once("=\"") else { continue };
            let values = found.entry((name.to_owned(), label.to_owned())).or_default();
            values.insert(value.trim_end_matches('"').to_owned());
        }
    }
    found
}

/// Every value has its row from the start: one that an expression names and no page shows would never be met.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboard_and_the_rules_ask_for_values_that_exist() -> Result<()> {
    // With everything that has metrics of its own: identities are a file that is read again.
    let directory = tempfile::tempdir()?;
    let tokens = directory.path().join("tokens.toml");
    fs::write(&tokens, "[[identity]]\nname = \"a\"\nrole = \"operator\"\ntoken = \"a-token-of-the-tests\"\n")?;
    let token = directory.path().join("token");
    fs::write(&token, "a-token-of-the-tests")?;
    let files = [("SIDECAR_TOKENS_FILE", tokens.to_string_lossy()), ("SIDECAR_TOKEN_FILE", token.to_string_lossy())];
    let services = Services::start(&files.each_ref().map(|(name, file)| (*name, &**file))).await?;
    let pages = page(services.gateway_admin).await? + &page(services.sidecar_admin).await?;
    let known = on_the_page(&pages);
    let (shown, ruled) = asked()?;
    let mut compared = 0;
    for query in shown.iter().chain(&ruled) {
        for (name, matchers) in names(query) {
            for Matcher { label, values } in matchers.iter().filter(|matcher| matcher.label != "job") {
                let on_page = known.get(&(name.clone(), label.clone()));
                let on_page = on_page.with_context(|| format!("no page has {label} of {name}, in {query}"))?;
                assert!(!values.is_empty(), "{label} is no list of values, in {query}");
                for value in values {
                    assert!(on_page.contains(value), "{name} has no {label} {value:?} but {on_page:?}, in {query}");
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 20, "{compared}");
    Ok(())
}
