//! What the documents say, done.

mod commands;
mod roles;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use oncegate_e2e::{postgres::Database, prometheus::promtool};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use tokio::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn documents() -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for directory in [root(), root().join("docs"), root().join("k8s"), root().join("ops")] {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "md") {
                found.push((path.strip_prefix(root())?.display().to_string(), fs::read_to_string(&path)?));
            }
        }
    }
    assert!(found.len() > 5, "the documents are where this test looks");
    Ok(found)
}

fn code_blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    text.split(fence.as_str()).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}

/// As GitHub makes them of headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    headings
        .map(|heading| {
            let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.collect::<String>().to_lowercase().replace(' ', "-")
        })
        .collect()
}

#[test]
fn every_link_between_documents_leads_somewhere() -> Result<()> {
    let mut broken = Vec::new();
    for (name, text) in documents()? {
        let directory = root().join(&name).parent().context("a document stands in a directory")?.to_owned();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { root().join(&name) } else { directory.join(path) };
            let known =
                anchor.is_empty() || fs::read_to_string(&target).is_ok_and(|text| anchors(&text).contains(anchor));
            if !target.exists() || !known {
                broken.push(format!("{name}: {link}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    Ok(())
}

#[tokio::test]
async fn the_recipes_for_the_applications_transaction_refuse_a_second_effect() -> Result<()> {
    let text = fs::read_to_string(root().join("docs/integration.md"))?;
    let [tables, insert, subscriptions, update] = code_blocks(&text, "sql")[..] else {
        anyhow::bail!("docs/integration.md has other recipes than this test knows");
    };
    let database = Database::create().await?;
    let mut first = PgConnection::connect(database.url()).await?;
    let mut second = PgConnection::connect(database.url()).await?;
    first.execute(AssertSqlSafe(tables.to_owned())).await?;
    first.execute(AssertSqlSafe(subscriptions.to_owned())).await?;

    // By the event id: an attempt that comes while the first is at work waits for it, and then knows.
    let mut transaction = first.begin().await?;
    assert_eq!(transaction.execute(AssertSqlSafe(insert.to_owned())).await?.rows_affected(), 1);
    let again = insert.to_owned();
    let waiting = tokio::spawn(async move {
        let mut transaction = second.begin().await?;
        let inserted = transaction.execute(AssertSqlSafe(again)).await?.rows_affected();
        transaction.rollback().await?;
        anyhow::Ok((inserted, second))
    });
    transaction.commit().await?;
    let (inserted, mut second) = waiting.await??;
    assert_eq!(inserted, 0, "the effect stands already");

    // By the token: the same or a larger one is permitted, a smaller one is late.
    assert_eq!(second.execute(AssertSqlSafe(update.to_owned())).await?.rows_affected(), 1);
    assert_eq!(
        second.execute(AssertSqlSafe(update.to_owned())).await?.rows_affected(),
        1,
        "the same attempt once more"
    );
    let late = update.replace("1764000000000042", "1764000000000041");
    assert_eq!(second.execute(AssertSqlSafe(late)).await?.rows_affected(), 0);
    Ok(())
}

/// What takes minutes to build is not built to say how it is used.
#[test]
fn the_scripts_that_measure_print_their_help_without_building() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let cargo = directory.path().join("cargo");
    fs::write(&cargo, "#!/bin/sh\necho cargo was started >&2\nexit 1\n")?;
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH")?);
    for (script, option) in [("bench", "--cleanup-rows"), ("grow", "--no-check")] {
        for help in ["--help", "-h"] {
            let script = root().join("scripts").join(script);
            let output = std::process::Command::new(&script).arg(help).env("PATH", &path).output()?;
            let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
            assert!(output.status.success() && stderr.is_empty(), "{}: {stderr}", script.display());
            assert!(stdout.contains(option), "{stdout}");
        }
    }
    Ok(())
}

#[test]
fn the_readme_leads_to_every_document_and_names_every_script() -> Result<()> {
    let readme = fs::read_to_string(root().join("README.md"))?;
    for (name, _) in documents()?.iter().filter(|(name, _)| name != "README.md") {
        assert!(readme.contains(&format!("]({name})")), "README.md does not lead to {name}");
    }
    for entry in fs::read_dir(root().join("scripts"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        // The mutations are what one of them reads.
        let known = name.contains('.') || readme.contains(&format!("| `scripts/{name}` |"));
        assert!(known, "README.md does not say what scripts/{name} does");
    }
    // What scripts/test installs, by the names that it says.
    for line in fs::read_to_string(root().join("scripts/test"))?.lines() {
        let Some((_, rest)) = line.split_once("install \"") else { continue };
        let what = rest.split('"').next().unwrap_or_default();
        let known = readme.contains(what) || what == "Python's venv";
        assert!(known, "README.md does not say that {what} is installed");
    }
    Ok(())
}

#[test]
fn the_map_has_every_directory() -> Result<()> {
    let architecture = fs::read_to_string(root().join("ARCHITECTURE.md"))?;
    for entry in fs::read_dir(root())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !entry.file_type()?.is_dir() || name.starts_with('.') || name == "target" {
            continue;
        }
        assert!(architecture.contains(&format!("`{name}/")), "ARCHITECTURE.md does not say what {name}/ is");
    }
    Ok(())
}

/// Whether it is the name of a rule, a case or a figure: S1, PG2, T31.
fn is_rule(name: &str) -> bool {
    let number = name.trim_start_matches(|c: char| c.is_ascii_uppercase());
    let letters = &name[..name.len() - number.len()];
    let known = ["S", "L", "C", "G", "P", "I", "T", "W", "PG"].contains(&letters);
    known && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// The rules that the code beneath a directory cites as "(S1)" or "(S1, PG2)", each with one of the files that do.
fn cited(directory: &Path, rules: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && !name.starts_with('.') && name != "target" {
            cited(&path, rules)?;
        } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "sql") {
            let text = fs::read_to_string(&path)?;
            let citations = text.split('(').skip(1).filter_map(|rest| rest.split(')').next());
            for citation in citations.filter(|citation| citation.split(", ").all(is_rule)) {
                rules.extend(citation.split(", ").map(|rule| (rule.to_owned(), path.clone())));
            }
        }
    }
    Ok(())
}

#[test]
fn every_rule_that_the_code_cites_is_written_down() -> Result<()> {
    let mut written = BTreeSet::new();
    for name in ["docs/rules.md", "docs/faults.md", "docs/performance.md"] {
        for line in fs::read_to_string(root().join(name))?.lines() {
            // A rule begins an item, a case or a figure (P9a, P9b) a row.
            let item = line.strip_prefix("- **").and_then(|rest| rest.split("**").next());
            let row = line.strip_prefix("| ").and_then(|rest| rest.split(' ').next());
            let name = item.or(row).unwrap_or_default().trim_end_matches(|c: char| c.is_ascii_lowercase());
            written.insert(name.to_owned());
        }
    }
    let mut rules = BTreeMap::new();
    cited(&root(), &mut rules)?;
    assert!(rules.len() > 50, "rules are cited where this test looks: {rules:?}");
    rules.retain(|rule, _| !written.contains(rule));
    assert!(rules.is_empty(), "no document says what these are: {rules:#?}");
    Ok(())
}

/// Runbooks by an address, as the document says to make them.
#[tokio::test]
async fn runbooks_get_an_address() -> Result<()> {
    let text = fs::read_to_string(root().join("docs/operations.md"))?;
    let [command] = code_blocks(&text, "sh")[..] else { anyhow::bail!("one command is shown") };
    let (command, file) = command.trim().rsplit_once(" >").context("it writes a file")?;
    let output = Command::new("sh").args(["-c", command]).current_dir(root()).output().await?;
    let rules = String::from_utf8(output.stdout)?;
    let links: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("runbook_url: ")).collect();
    assert!(links.len() > 20, "{}", String::from_utf8_lossy(&output.stderr));
    for link in links {
        assert!(link.starts_with("https://") && link.contains("/docs/runbook.md#oncegate"), "{link}");
    }
    let directory = tempfile::tempdir()?;
    fs::write(directory.path().join(file), rules)?;
    promtool(directory.path(), &["check", "rules", file], "").await
}
