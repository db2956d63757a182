//! The PostgreSQL that is installed on this machine, for tests and measurements that start servers of their own.
//!
//! Apart from both, and with nothing but the standard library: what measures must not be built together with all that the tests
//! need.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What a server is made and run with. pg_config also comes with the client library, so its directory alone does not mean that
/// they are there.
const PROGRAMS: [&str; 2] = ["initdb", "postgres"];

/// The directory of `initdb` and `postgres`, which distributions keep out of the PATH: the one that `pg_config` names, or the
/// newest in the places of Debian, Fedora and Homebrew, or one of the PATH. None: there is no server on this machine.
pub fn postgres_programs() -> Option<PathBuf> {
    let of_pg_config = output(Command::new("pg_config").arg("--bindir")).map(PathBuf::from);
    let places = [
        ("/usr/lib/postgresql", ""),
        ("/usr", "pgsql-"),
        ("/opt/homebrew/opt", "postgresql@"),
        ("/usr/local/opt", "postgresql@"),
    ];
    let versioned = places.into_iter().flat_map(|(directory, prefix)| versions(Path::new(directory), prefix));
    let unversioned =
        ["/opt/homebrew/opt", "/usr/local/opt"].map(|directory| Path::new(directory).join("postgresql/bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    of_pg_config
        .into_iter()
        .chain(versioned)
        .chain(unversioned)
        .chain(env::split_paths(&path))
        .find(|directory| PROGRAMS.iter().all(|program| directory.join(program).is_file()))
}

/// `directory/{prefix}{version}/bin`, the newest first.
fn versions(directory: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut found: Vec<(Vec<u32>, PathBuf)> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            Some((version(name.to_str()?.strip_prefix(prefix)?)?, entry.path().join("bin")))
        })
        .collect();
    found.sort_by(|(one, _), (other, _)| other.cmp(one));
    found.into_iter().map(|(_, path)| path).collect()
}

/// The numbers of a version: as text, 9.6 would be above 15. None: it is none.
fn version(text: &str) -> Option<Vec<u32>> {
    text.split('.').map(|number| number.parse().ok()).collect()
}

/// A user of this machine.
#[derive(Clone, Copy, Debug)]
pub struct User {
    /// Its number.
    pub uid: u32,
    /// The number of its group.
    pub gid: u32,
}

/// Whom to run a server as where root would have to, as which PostgreSQL refuses to run: `postgres`, or `nobody`. None: there is
/// neither.
pub fn postgres_user() -> Option<User> {
    ["postgres", "nobody"].into_iter().find_map(|name| {
        let number = |flag| output(Command::new("id").args([flag, name]))?.parse().ok();
        Some(User { uid: number("-u")?, gid: number("-g")? })
    })
}

/// What a program says, without the end of the line. None: it is not there, or failed.
fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_comes_first_by_number_and_not_as_text() {
        for (older, newer) in [("9.6", "15"), ("9.5", "9.6"), ("16", "17")] {
            assert!(version(older).unwrap() < version(newer).unwrap(), "{older} {newer}");
        }
        for other in ["", "15-beta", "old", "9."] {
            assert_eq!(version(other), None, "{other:?}");
        }
    }

    #[test]
    fn only_directories_of_versions_are_looked_into() {
        let directory = env::temp_dir().join(format!("oncegate-installed-{}", std::process::id()));
        for name in ["pgsql-9.6", "pgsql-17", "pgsql-15", "pgsql-old", "17"] {
            fs::create_dir_all(directory.join(name)).unwrap();
        }
        let found = versions(&directory, "pgsql-");
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(found, ["pgsql-17", "pgsql-15", "pgsql-9.6"].map(|name| directory.join(name).join("bin")));
    }
}
