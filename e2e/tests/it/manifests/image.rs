//! What an engine would build the image from. There is none where the tests run: that what is let in is enough is shown by
//! copying it, and reading that as cargo does.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use oncegate_e2e::program;
use tokio::process::Command;

fn root() -> Result<PathBuf> {
    Ok(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?)
}

/// `.dockerignore`: the last pattern that matches a path, or a directory that it is in, decides.
struct Ignored {
    patterns: Vec<(bool, Vec<String>)>,
}

impl Ignored {
    fn read() -> Result<Self> {
        let text = fs::read_to_string(root()?.join(".dockerignore"))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let patterns = lines.map(|line| {
            let pattern = line.strip_prefix('!');
            (pattern.is_none(), pattern.unwrap_or(line).split('/').map(str::to_owned).collect())
        });
        Ok(Self { patterns: patterns.collect() })
    }

    fn lets_in(&self, path: &str) -> bool {
        let path: Vec<&str> = path.split('/').collect();
        let last = self.patterns.iter().rev().find(|(_, pattern)| covers(pattern, &path));
        last.is_none_or(|(ignored, _)| !ignored)
    }
}

fn covers(pattern: &[String], path: &[&str]) -> bool {
    match pattern.split_first() {
        None => true,
        Some((any, rest)) if any == "**" => (0..=path.len()).any(|skipped| covers(rest, &path[skipped..])),
        Some((first, rest)) => path.split_first().is_some_and(|(name, below)| fits(first, name) && covers(rest, below)),
    }
}

fn fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
            (0..=rest.len()).filter(|end| rest.is_char_boundary(*end)).any(|end| fits(after, &rest[end..]))
        }),
    }
}

#[test]
fn what_the_program_is_made_of_is_let_in_and_nothing_private_is() -> Result<()> {
    let (ignored, root) = (Ignored::read()?, root()?);
    // Some as seen from another directory.
    let sources = program::sources()?.iter().map(|source| source.canonicalize()).collect::<Result<Vec<_>, _>>()?;
    let ours = sources.iter().filter_map(|source| source.strip_prefix(&root).ok());
    let ours: Vec<&str> = ours.filter_map(Path::to_str).filter(|path| !path.starts_with("target/")).collect();
    for part in ["proto/", "migrations/postgres/", "migrations/sqlite/", "sidecar/src/", "cli/src/"] {
        assert!(ours.iter().any(|path| path.starts_with(part)), "{part} is in {ours:?}");
    }
    let dockerfile = fs::read_to_string(root.join("Dockerfile"))?;
    let scripts: Vec<&str> = dockerfile.split_whitespace().filter(|word| word.starts_with("scripts/")).collect();
    assert!(scripts.iter().any(|script| root.join(script).is_file()), "the Dockerfile builds with a script of ours");
    let profile = ["profile/compiler", "profile/dist.profdata.gz"];
    for path in ours.into_iter().chain(scripts).chain(profile) {
        assert!(ignored.lets_in(path), ".dockerignore leaves {path} out");
    }
    for path in [
        "target/debug/oncegate",
        "e2e/target/x",
        "oncegate.db",
        "cli/oncegate.db-wal",
        ".oncegate-dev.json",
        ".git/HEAD",
        ".env",
    ] {
        assert!(!ignored.lets_in(path), ".dockerignore lets {path} in");
    }
    Ok(())
}

/// What another compiler had counted would be left out, and the image would be slower than what is measured.
#[test]
fn the_profile_is_of_the_compiler_that_builds_the_image() -> Result<()> {
    let root = root()?;
    let dockerfile = fs::read_to_string(root.join("Dockerfile"))?;
    let image = dockerfile.lines().find_map(|line| line.strip_prefix("ARG RUST=rust:")).context("its compiler")?;
    let builds = image.split('-').next().context("a version")?;
    let counted = fs::read_to_string(root.join("profile/compiler"))?;
    let release = counted.split_whitespace().next().context("a release")?;
    // The image's tag has no patch level.
    assert!(
        release == builds || release.starts_with(&format!("{builds}.")),
        "{release} in profile/, {builds} in the image"
    );
    Ok(())
}

/// What another compiler would say of itself, and whether the flags then speak of the profile.
#[tokio::test]
async fn only_the_compiler_that_it_was_made_by_builds_with_the_profile() -> Result<()> {
    let (root, directory) = (root()?, tempfile::tempdir()?);
    for part in ["profile", "scripts"] {
        fs::create_dir(directory.path().join(part))?;
    }
    for part in ["profile/compiler", "profile/dist.profdata.gz", "profile/order.gz", "scripts/dist-flags"] {
        fs::copy(root.join(part), directory.path().join(part))?;
    }
    let made_by = fs::read_to_string(root.join("profile/compiler"))?;
    let words: Vec<&str> = made_by.split_whitespace().collect();
    let [release, hash, host] = words[..] else { panic!("release, commit and host: {made_by}") };
    for (release, uses) in [(release, true), ("1.0.0", false)] {
        let rustc = directory.path().join("rustc");
        // In the order in which rustc says it.
        let says = format!("#!/bin/sh\nprintf 'commit-hash: {hash}\\nhost: {host}\\nrelease: {release}\\n'\n");
        fs::write(&rustc, says)?;
        fs::set_permissions(&rustc, fs::Permissions::from_mode(0o755))?;
        let path = format!("{}:{}", directory.path().display(), std::env::var("PATH")?);
        let told = async |options: &[&str]| -> Result<(String, String)> {
            let script = directory.path().join("scripts/dist-flags");
            let output = Command::new(script).args(options).env("PATH", &path).output().await?;
            let (flags, said) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
            assert!(output.status.success(), "{said}");
            Ok((flags, said))
        };
        let (flags, said) = told(&[]).await?;
        assert_eq!(flags.contains("-Cprofile-use="), uses, "{release}: {flags}{said}");
        assert_eq!(said.contains("without a profile"), !uses, "{release}: {said}");
        if let Some(file) = flags.split_whitespace().find_map(|flag| flag.strip_prefix("-Cprofile-use=")) {
            // What every profile of LLVM begins with.
            assert_eq!(fs::read(file)?.get(..8), Some(&b"\xfflprofi\x81"[..]), "{file}");
        }
        let (flags, _) = told(&["--link"]).await?;
        let order =
            flags.split_whitespace().find_map(|flag| flag.strip_prefix("-Clink-arg=-Wl,--symbol-ordering-file="));
        assert_eq!(order.is_some(), uses, "{release}: {flags}");
        if let Some(file) = order {
            let names = fs::read_to_string(file)?;
            // Where every start begins.
            assert!(names.lines().any(|name| name == "main"), "{file}");
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path, below: &str, ignored: &Ignored) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name().into_string().ok().context("a name of letters")?;
        let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
        if entry.file_type()?.is_dir() {
            // Large, and never let in, as another test says.
            if !matches!(name.as_str(), "target" | ".git") {
                copy(&entry.path(), &to.join(&name), &path, ignored)?;
            }
        } else if ignored.lets_in(&path) {
            fs::create_dir_all(to)?;
            fs::copy(entry.path(), to.join(&name))?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn cargo_reads_the_workspace_from_what_is_let_in() -> Result<()> {
    let directory = tempfile::tempdir()?;
    copy(&root()?, directory.path(), "", &Ignored::read()?)?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // Every member with its files, as `cargo chef prepare` reads them; and that the lock file fits.
    for arguments in [&["metadata", "--no-deps", "--format-version", "1"][..], &["tree", "--workspace", "--depth", "0"]]
    {
        let mut command = Command::new(&cargo);
        command.args(arguments).args(["--locked", "--offline"]).current_dir(directory.path());
        let read = command.output().await?;
        ensure!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    }
    Ok(())
}
