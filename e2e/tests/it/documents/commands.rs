//! Every command that a document shows is one that the program takes, with its options, values and operands.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result};
use oncegate_e2e::program::Oncegate;

use super::{documents, root};

/// Nobody listens there: a command that is well-formed finds out, and one that is not never asks.
const NOWHERE: &str = "127.0.0.1:1";

/// What a shell makes of a line, up to where the command ends.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for character in line.chars() {
        match (character, quote) {
            (end, Some(open)) if end == open => quote = None,
            ('\'' | '"', None) => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (blank, None) if blank.is_whitespace() => words.extend(word.take()),
            ('|' | '>' | ';' | '&', None) => break,
            _ => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    words
}

/// The arguments of each `oncegate` in a text: in blocks of code, wherever it stands in a line, and in the text itself.
fn commands(text: &str) -> BTreeSet<Vec<String>> {
    let mut found = BTreeSet::new();
    let mut fenced = None;
    for line in text.lines() {
        if let Some(language) = line.trim_start().strip_prefix("```") {
            fenced = if fenced.is_none() { Some(language) } else { None };
            continue;
        }
        // What is fenced as another language is no command.
        if fenced.map_or(line.starts_with("    "), |language| ["", "sh"].contains(&language)) {
            for before in ["oncegate ", "target/release/oncegate ", "cargo run --release -- "] {
                found.extend(line.trim().strip_prefix(before).map(words));
            }
            found.extend(line.split_once(" -- oncegate ").map(|(_, rest)| words(rest)));
        }
        if fenced.is_none() {
            let inline = line.split('`').skip(1).step_by(2);
            found.extend(inline.filter_map(|code| code.strip_prefix("oncegate ")).map(words));
        }
    }
    found
}

/// Runs a command as a reader would, but for where it leads.
async fn is_taken(arguments: &[String], directory: &Path) -> Result<()> {
    let [command, rest @ ..] = arguments else { anyhow::bail!("oncegate alone") };
    // Whichever is meant.
    let command = if command == "COMMAND" { "health" } else { command };
    let elsewhere = |word: &String| match word.split_once("://") {
        Some((scheme, _)) => format!("{scheme}://{NOWHERE}"),
        None if word == "URL" => format!("http://{NOWHERE}"),
        None => word.clone(),
    };
    let mut arguments: Vec<String> = [command.to_owned()].into_iter().chain(rest.iter().map(elsewhere)).collect();
    let said = |arguments: &[String], option: &str| arguments.iter().any(|word| word == option);
    let mut ends_well = said(&arguments, "--help") || said(&arguments, "--print-config");
    match command {
        _ if ends_well => {}
        // Named, and no more.
        _ if rest.is_empty() => {
            arguments.push("--help".to_owned());
            ends_well = true;
        }
        "all" | "sidecar" | "gateway" => {
            arguments.push("--print-config".to_owned());
            ends_well = true;
        }
        // The reader has a terminal, to be asked on.
        "resolve" if !said(&arguments, "--yes") => arguments.push("--yes".to_owned()),
        "simulate" if !said(&arguments, "--url") => arguments.extend(["--url".to_owned(), format!("http://{NOWHERE}")]),
        _ => {}
    }
    let run = Oncegate::new(directory, arguments.iter().map(String::as_str))?
        .env("SIDECAR_URL", format!("http://{NOWHERE}"))
        .env("ADMIN_URL", format!("http://{NOWHERE}"))
        .env("STRIPE_WEBHOOK_SECRET", "whsec_of_the_documents");
    let finished = run.run().await?;
    let shown = arguments.join(" ");
    assert!(finished.code.is_some_and(|code| code != 2), "oncegate {shown}\n{finished}");
    assert!(!ends_well || finished.code == Some(0), "oncegate {shown}\n{finished}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_of_the_documents_is_taken_by_the_program() -> Result<()> {
    let directory = tempfile::tempdir()?;
    // What `verify` is shown with.
    fs::write(directory.path().join("whsec"), "whsec_of_the_documents")?;
    fs::write(directory.path().join("event.json"), "{}")?;
    let mut all = BTreeSet::new();
    for (name, text) in documents()? {
        let found = commands(&text);
        if ["README.md", "docs/operations.md", "docs/runbook.md", "k8s/README.md"].contains(&name.as_str()) {
            assert!(found.len() > 4, "{name}: {found:?}");
        }
        all.extend(found);
    }
    for arguments in &all {
        // `dev` goes on until it is stopped.
        if arguments.first().is_some_and(|command| command == "dev") {
            let manual = Oncegate::new(directory.path(), ["dev", "--help"])?.run().await?;
            let options = arguments.iter().filter(|word| word.starts_with("--"));
            assert!(options.clone().all(|option| manual.stdout.contains(option.as_str())), "{arguments:?}");
            continue;
        }
        is_taken(arguments, directory.path()).await?;
    }
    Ok(())
}

#[test]
fn a_command_is_found_wherever_it_stands() {
    let text = "    oncegate stats --since 1h | less\n    kubectl -n x exec ops -- oncegate health\n\
                | `oncegate resolve stripe evt --reason 'as it is'` | `oncegates` `oncegate` |\n\
                ```sh\ntarget/release/oncegate simulate stripe > /dev/null\n```\nand oncegate history";
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let wanted = [
        words(&["stats", "--since", "1h"]),
        words(&["health"]),
        words(&["resolve", "stripe", "evt", "--reason", "as it is"]),
        words(&["simulate", "stripe"]),
    ];
    assert_eq!(commands(text), wanted.into());
}

/// In Kubernetes a command without its namespace does something else, or nothing.
#[test]
fn every_kubectl_says_where_and_what_is_there() -> Result<()> {
    let mut seen = 0;
    for (name, text) in documents()? {
        let mut namespace_made = false;
        for line in text.lines().filter_map(|line| line.strip_prefix("    ")).map(str::trim) {
            let Some(command) = line.strip_prefix("kubectl ") else { continue };
            seen += 1;
            let words = words(command);
            if let Some(place) = words.iter().position(|word| word == "-k" || word == "-f") {
                let path = words.get(place + 1).context("a path")?;
                // The reader's own, a copy of the example.
                let there = root().join(path.replace("overlays/ours", "overlays/example"));
                assert!(there.exists(), "{name}: {line}");
                namespace_made |= path.ends_with("namespace.yaml");
                continue;
            }
            assert!(command.starts_with("-n payments "), "{name}: {line}: in which namespace?");
            // It asks, and needs a terminal for that.
            assert!(!line.contains(" resolve ") || line.contains(" exec -it "), "{name}: {line}");
            if words.iter().any(|word| word == "create") {
                assert!(namespace_made, "{name}: {line}: the namespace is not there yet");
            }
            for (kind, what) in words.iter().filter_map(|word| word.split_once('/')) {
                let known = kind != "deploy" || rendered(&format!("name: {what}\n"))?;
                assert!(known, "{name}: {line}: nothing is called {what}");
            }
        }
    }
    assert!(seen > 8, "{seen}");
    // And those in the comments of the manifests.
    for path in manifests(&root().join("k8s"))? {
        for line in fs::read_to_string(&path)?.lines().filter(|line| line.contains("kubectl ")) {
            assert!(line.contains("kubectl -n payments ") || line.contains(" -k "), "{}: {line}", path.display());
        }
    }
    Ok(())
}

fn rendered(text: &str) -> Result<bool> {
    let files = manifests(&root().join("k8s/rendered"))?;
    Ok(files.iter().any(|file| fs::read_to_string(file).is_ok_and(|content| content.contains(text))))
}

fn manifests(directory: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(manifests(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "yaml") {
            found.push(path);
        }
    }
    Ok(found)
}
