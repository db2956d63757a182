//! A clock that is wrong: libfaketime in front of a program's wall clock. Its monotonic clock stays right, as on a
//! machine whose time was set wrongly.

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::program::Oncegate;

const HOW_TO_INSTALL: &str = "libfaketime was not found. Install it (Debian: apt-get install faketime; Fedora: dnf install \
     libfaketime), or name its library in FAKETIME_LIBRARY, or run scripts/test, which installs it";

/// The command with a wall clock that is this many seconds ahead or behind.
pub fn skewed(command: Oncegate, seconds: i64) -> Result<Oncegate> {
    let library = library()?;
    Ok(command
        .env("LD_PRELOAD", library.to_string_lossy())
        .env("FAKETIME", format!("{seconds:+}s"))
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("DONT_FAKE_MONOTONIC", "1"))
}

fn library() -> Result<PathBuf> {
    if let Some(given) = env::var_os("FAKETIME_LIBRARY") {
        return Ok(given.into());
    }
    let directories = [
        format!("/usr/lib/{}-linux-gnu/faketime", env::consts::ARCH),
        "/usr/lib64/faketime".to_owned(),
        "/usr/lib/faketime".to_owned(),
        "/usr/local/lib/faketime".to_owned(),
    ];
    directories
        .iter()
        // The variant for programs with threads.
        .map(|directory| PathBuf::from(directory).join("libfaketimeMT.so.1"))
        .find(|library| library.is_file())
        .context(HOW_TO_INSTALL)
}
