//! The table of keys in `docs/providers.md` against what reads the file with routes.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

const DOCUMENT: &str = include_str!("../../../../docs/providers.md");
const READER: &str = include_str!("../file.rs");

/// A route of each provider, to which a case adds something.
const ROUTES: [&str; 5] = [
    "provider = \"stripe\"",
    "provider = \"paypal\"\nenvironment = \"sandbox\"",
    "provider = \"flutterwave\"\nsignature = \"v4\"",
    "provider = \"paystack\"",
    "provider = \"standard_webhooks\"",
];

/// The keys, with the values that are listed for them.
fn documented() -> BTreeMap<&'static str, Vec<&'static str>> {
    let rows = DOCUMENT.lines().skip_while(|line| *line != "| key | meaning |").skip(2);
    let mut keys = BTreeMap::new();
    for row in rows.take_while(|line| line.starts_with('|')) {
        let mut rest = row.trim_start_matches('|').split('|').next().unwrap();
        while let Some((_, after)) = rest.split_once('`') {
            let (key, after) = after.split_once('`').unwrap();
            let (values, after) = match after.strip_prefix(" (") {
                Some(listed) => listed.split_once(')').unwrap(),
                None => ("", after),
            };
            let values = values.split(", ").map(|value| value.trim_matches('`')).filter(|value| !value.is_empty());
            keys.insert(key, values.collect());
            rest = after;
        }
    }
    keys
}

/// The keys that the reader asks for.
fn read() -> BTreeSet<&'static str> {
    let asks =
        ["self.text(", "self.choice(", "self.choice::<ProviderKind>(", "self.duration(", "self.file(", "self.secrets("];
    let calls = asks.iter().flat_map(|ask| READER.split(ask).skip(1));
    let arguments = calls.filter_map(|rest| rest.split(')').next());
    let keys = arguments.flat_map(|arguments| arguments.split('"').skip(1).step_by(2));
    keys.chain(["enforcement"]).collect()
}

/// What is said of a key with this value, by each provider's route.
fn said(key: &str, value: &str) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("oncegate.toml");
    let own = format!("{key} = ");
    let common = ["name = \"a\"", "secrets = \"96605875FF6516633\""];
    ROUTES
        .iter()
        .map(|route| {
            let lines = common.into_iter().chain(route.lines()).filter(|line| !line.starts_with(&own));
            let text = format!("[[route]]\n{}\n{own}{value:?}\n", lines.collect::<Vec<_>>().join("\n"));
            std::fs::write(&path, text).unwrap();
            let upstream_url = Some("http://app/".into());
            let options = Options { config: Some(path.clone()), upstream_url, ..Options::default() };
            options.validate().err().map(|problems| problems.to_string()).unwrap_or_default()
        })
        .collect()
}

#[test]
fn the_document_has_every_key_of_a_route_and_no_other() {
    assert_eq!(documented().into_keys().collect::<BTreeSet<_>>(), read());
    let unknown = |text: &String| text.contains("no such setting") || text.contains("not a setting of");
    for key in documented().into_keys().filter(|key| *key != "provider") {
        let said = said(key, "nonsense");
        assert!(!said.iter().all(unknown), "{key}: {said:?}");
    }
    assert!(said("nonsense", "nonsense").iter().all(unknown));
}

#[test]
fn the_document_lists_the_values_that_are_permitted() {
    let listed: Vec<_> = documented().into_iter().filter(|(_, values)| !values.is_empty()).collect();
    assert!(listed.len() > 4, "{listed:?}");
    for (key, values) in listed {
        let permitted = format!("permitted are {}", values.join(", "));
        let said = said(key, "nonsense");
        assert!(said.iter().all(|text| text.contains(&permitted)), "{key}: {permitted}, and not {said:?}");
    }
}
