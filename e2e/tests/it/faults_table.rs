//! `docs/faults.md` is true: every case has its line, and every test that a line names is there. So is what
//! `docs/security.md` names as evidence, against threats and to auditors, and `docs/states.md` for what a crash does.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::{collections::BTreeSet, fs, path::Path};

/// The cases, as they are numbered.
const CASES: [&str; 36] = [
    "T01",
    "T02",
    "T03",
    "T04",
    "T07",
    "T09",
    "T11",
    "T13",
    "T15",
    "T16",
    "T17",
    "T19",
    "T21",
    "T23",
    "T27",
    "T29",
    "T30",
    "T31",
    "T33",
    "T35",
    "T36",
    "T38",
    "T39",
    "T42",
    "T43",
    "T44",
    "T45",
    "T46",
    "T52",
    "C3",
    "C7",
    "Limits",
    "Slow peers",
    "Floods",
    "Shutdown",
    "Durability",
];

/// A case that the table says has no test yet. Whoever gives it one takes it out of here.
const WITHOUT_A_TEST: [&str; 0] = [];

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn sources(directory: &Path, text: &mut String) {
    let mut entries: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("faults_table.rs") {
            text.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

/// The names of what is run as a test: functions that are marked as such, and those that a macro makes tests of.
fn tests() -> BTreeSet<String> {
    let mut text = String::new();
    for package in ["e2e", "gateway", "runtime", "sidecar", "cli"] {
        for directory in ["src", "tests"] {
            let directory = root().join(package).join(directory);
            if directory.is_dir() {
                sources(&directory, &mut text);
            }
        }
    }
    tests_in(&text)
}

fn tests_in(text: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut marked = false;
    for line in text.lines().map(str::trim) {
        let function = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            marked = true;
        } else if let Some((name, _)) = function.and_then(|rest| rest.split_once('(')) {
            if marked {
                names.insert(name.to_owned());
            }
            marked = false;
        } else if !line.starts_with("#[") && !line.starts_with("//") {
            marked = false;
        }
    }
    // Macros that make tests, also by another one, and what they are called with: names alone, or each with what it is made of.
    let definitions: Vec<(&str, &str)> = text
        .split("macro_rules! ")
        .skip(1)
        .filter_map(|definition| definition.split("\n}\n").next()?.split_once(' '))
        .collect();
    let mut makers: BTreeSet<&str> = BTreeSet::new();
    for _ in &definitions {
        for (name, body) in &definitions {
            if body.contains("#[test]")
                || body.contains("#[tokio::test")
                || makers.iter().any(|maker| body.contains(&format!("{maker}!(")))
            {
                makers.insert(name);
            }
        }
    }
    for name in makers {
        for (open, close) in [("!(", ");"), ("! {", "\n}")] {
            for call in text.split(&format!("\n{name}{open}")).skip(1) {
                let call = call.split(close).next().unwrap_or_default();
                for part in call.split(['\n', ',', ';']).map(str::trim).filter(|part| !part.starts_with("//")) {
                    let word = part.split_once(':').map_or(part, |(word, _)| word);
                    if word.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_') {
                        names.insert(word.to_owned());
                    }
                }
            }
        }
    }
    names
}

#[test]
fn only_what_is_run_counts_as_a_test() {
    let text = "macro_rules! each {\n    ($($test:ident),+) => {\n        #[tokio::test]\n    };\n}\n\
        macro_rules! other {\n    () => { fn made() {} };\n}\n\
        macro_rules! twice {\n    ($($test:ident;)+) => {\n        each!($($test),+);\n    };\n}\n\
        twice! {\n    eighth;\n}\neach!(first, second);\neach! {\n    // T01\n    third: \"x, y\",\n}\nother!(fourth);\n\
        /// Says so.\n#[tokio::test(flavor = \"x\")]\n#[ignore = \"no\"]\nasync fn fifth() {\n}\n\
        fn helper() {\n    field: 1,\n}\nstruct S {\n    sixth: u8,\n}\n#[test]\nfn seventh() {\n}\n";
    let found = tests_in(text);
    for test in ["first", "second", "third", "fifth", "seventh", "eighth"] {
        assert!(found.contains(test), "{test}: {found:?}");
    }
    for other in ["fourth", "made", "helper", "field", "sixth"] {
        assert!(!found.contains(other), "{other}: {found:?}");
    }
}

#[test]
fn every_case_has_a_line_and_every_line_a_test_that_exists() {
    let table = fs::read_to_string(root().join("docs/faults.md")).unwrap();
    let tests = tests();
    let mut seen = BTreeSet::new();
    for line in table
        .lines()
        .filter(|line| line.starts_with("| ") && !["| case", "| ---"].iter().any(|head| line.starts_with(head)))
    {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [case, expected, named] = cells[..] else { panic!("not three cells: {line}") };
        assert!(seen.insert(case.to_owned()), "{case} stands twice");
        assert!(expected.len() > 20, "{case}: what must happen?");
        let names: Vec<&str> = named.split('`').skip(1).step_by(2).collect();
        assert_eq!(names.is_empty(), WITHOUT_A_TEST.contains(&case), "{case} names no test, or should not: {named}");
        for name in names {
            assert!(tests.contains(name), "{case} names `{name}`, and there is no such test");
        }
    }
    let wanted: BTreeSet<String> = CASES.iter().map(|case| (*case).to_owned()).collect();
    assert_eq!(seen, wanted);
}

/// What a cell of evidence names in code font outside of links. Links are followed by another test.
fn named(evidence: &str) -> Vec<&str> {
    let parts: Vec<&str> = evidence.split('`').collect();
    parts.chunks(2).filter_map(|pair| pair.get(1).filter(|_| !pair[0].ends_with('[')).copied()).collect()
}

/// Whether there is such a command with such options, by its source.
fn is_command(line: &str) -> bool {
    let mut words = line.split_whitespace().skip(1);
    let name = words.next().unwrap_or_default();
    let Ok(source) = fs::read_to_string(root().join(format!("cli/src/{name}.rs"))) else { return false };
    words.filter_map(|word| word.strip_prefix("--")).all(|option| {
        let field = format!("    {}: ", option.replace('-', "_"));
        source.contains(&field) || source.contains(&format!("long = \"{option}\""))
    })
}

/// The rows of a document's tables under `head`, each of as many cells as that has; how many tables there are.
fn rows<'a, const CELLS: usize>(document: &'a str, head: &str) -> (usize, Vec<[&'a str; CELLS]>) {
    let tables: Vec<&str> = document.split(head).skip(1).collect();
    let rows = tables.iter().flat_map(|table| {
        // The rest of the heading's line, and the line below it.
        table.lines().skip(2).take_while(|line| line.starts_with("| "))
    });
    let cells = rows.map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        cells.try_into().unwrap_or_else(|cells| panic!("not {CELLS} cells: {cells:?}"))
    });
    (tables.len(), cells.collect())
}

/// What an item names as evidence is there: tests, commands, or at least a link.
fn assert_shown(item: &str, evidence: &str, tests: &BTreeSet<String>) {
    let names = named(evidence);
    assert!(!names.is_empty() || evidence.contains("]("), "{item} has no evidence: {evidence}");
    for name in names {
        let exists = if name.starts_with("oncegate ") { is_command(name) } else { tests.contains(name) };
        assert!(exists, "{item} names `{name}`, and there is no such test or command");
    }
}

#[test]
fn every_item_for_auditors_has_evidence_that_exists() {
    let document = fs::read_to_string(root().join("docs/security.md")).unwrap();
    let (tests, mut seen) = (tests(), BTreeSet::new());
    let (tables, items) = rows(&document, "| item | what Oncegate does | evidence | what remains yours |");
    for [item, does, evidence, yours] in items {
        assert!(seen.insert(item.to_owned()), "{item} stands twice");
        assert!(does.len() > 20 && yours.len() > 2, "{item}: what is done, and what is left?");
        assert_shown(item, evidence, &tests);
    }
    assert_eq!(tables, 3);
    assert!(seen.len() > 20, "the items are where this test looks: {seen:?}");
}

#[test]
fn every_threat_has_an_answer_and_a_test_of_it_that_exists() {
    let document = fs::read_to_string(root().join("docs/security.md")).unwrap();
    let (tests, mut seen) = (tests(), BTreeSet::new());
    let (tables, threats) = rows(&document, "| threat | what answers it | shown by |");
    for [threat, answer, evidence] in threats {
        assert!(seen.insert(threat.to_owned()), "{threat} stands twice");
        assert!(answer.len() > 20, "{threat}: what answers it?");
        assert!(!named(evidence).is_empty(), "{threat}: no test shows the answer: {evidence}");
        assert_shown(threat, evidence, &tests);
    }
    assert_eq!(tables, 1);
    assert!(seen.len() > 15, "the threats are where this test looks: {seen:?}");
}

#[test]
fn what_a_crash_does_to_each_state_is_shown_by_tests_that_exist() {
    let document = fs::read_to_string(root().join("docs/states.md")).unwrap();
    let tests = tests();
    let (tables, crashes) = rows(&document, "| what crashes | tests |");
    for [what, evidence] in &crashes {
        assert!(!named(evidence).is_empty(), "no test shows what becomes of an event when {what} crashes");
        assert_shown(what, evidence, &tests);
    }
    assert_eq!(
        (tables, crashes.iter().map(|[what, _]| *what).collect::<Vec<_>>()),
        (1, vec!["the holder", "the sidecar", "the database"])
    );
}
