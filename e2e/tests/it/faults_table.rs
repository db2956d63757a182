//! `docs/faults.md` is true: every case has its line, and every test that a line names is there.

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

/// The names of what is run as a test: functions, and those that a macro makes tests of.
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
    let mut names = BTreeSet::new();
    for line in text.lines().map(str::trim) {
        let line = line.strip_prefix("async ").unwrap_or(line);
        if let Some((name, _)) = line.strip_prefix("fn ").and_then(|rest| rest.split_once('(')) {
            names.insert(name.to_owned());
        } else if let Some((name, _)) = line.split_once(": ")
            && (line.ends_with(';') || line.ends_with(','))
        {
            // `name: what it is made of`, in a macro's call.
            names.insert(name.to_owned());
        }
    }
    names
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
