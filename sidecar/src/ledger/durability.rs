//! What an acknowledged completion survives (I5), told by how the store is set. Read when a connection is made; told in the
//! log and by `/readyz`. It never makes the service unready: whoever runs a store without `fsync` has decided so.

use std::fmt;

/// How the store is set, and what follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Durability {
    /// The settings by name, as people know them.
    pub settings: Vec<(&'static str, String)>,
    /// Whether a crash of the store's machine, or a power cut, loses nothing that was acknowledged. That a killed process
    /// loses nothing goes without saying.
    pub survives_machine_crash: bool,
    /// Whether the loss of the store's node, with its disk, loses nothing that was acknowledged.
    pub survives_loss_of_node: bool,
    /// What somebody should know, a sentence each.
    pub warnings: Vec<String>,
}

/// What Postgres says of itself, in its own words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PostgresSays {
    /// As the database has it; `off` and `local` are raised to `on` for the ledger's own connection (L4).
    pub(crate) synchronous_commit: String,
    pub(crate) fsync: String,
    pub(crate) full_page_writes: String,
    pub(crate) synchronous_standby_names: String,
    /// A standby each: name, state, and how it takes part in commits. None: we may not see them.
    pub(crate) standbys: Option<Vec<String>>,
    /// Whether commits wait for one of them.
    pub(crate) synchronous_standby: bool,
}

impl PostgresSays {
    /// Whether the ledger's connection has to set `synchronous_commit` itself.
    pub(crate) fn is_raised(&self) -> bool {
        matches!(self.synchronous_commit.as_str(), "off" | "local")
    }
}

impl Durability {
    /// Of a Postgres database.
    pub(crate) fn of_postgres(says: &PostgresSays) -> Durability {
        let or_none = |text: &str| if text.is_empty() { "none".to_owned() } else { text.to_owned() };
        let standbys = match &says.standbys {
            None => "unknown (the role may not see them: grant pg_read_all_stats)".to_owned(),
            Some(standbys) => or_none(&standbys.join(", ")),
        };
        let commit = match says.is_raised() {
            true => format!("on (raised from {} for the ledger's connection)", says.synchronous_commit),
            false => says.synchronous_commit.clone(),
        };
        let mut warnings = Vec::new();
        if says.is_raised() {
            warnings.push(format!(
                "synchronous_commit is {} in the database; the ledger's own connection has it on",
                says.synchronous_commit
            ));
        }
        if says.fsync != "on" {
            warnings.push(
                "fsync is off: a crash of the database's machine loses acknowledged completions, and may leave a \
                 database that cannot be used"
                    .to_owned(),
            );
        }
        if says.full_page_writes != "on" {
            warnings.push(
                "full_page_writes is off: a crash of the database's machine may damage the database, unless its file \
                 system never writes half a page"
                    .to_owned(),
            );
        }
        let waits = !says.synchronous_standby_names.is_empty();
        if waits && says.standbys.is_some() && !says.synchronous_standby {
            warnings.push(
                "synchronous_standby_names names standbys and none of them is connected: commits wait for one"
                    .to_owned(),
            );
        }
        Durability {
            settings: vec![
                ("synchronous_commit", commit),
                ("fsync", says.fsync.clone()),
                ("full_page_writes", says.full_page_writes.clone()),
                ("synchronous_standby_names", or_none(&says.synchronous_standby_names)),
                ("standbys", standbys),
            ],
            survives_machine_crash: says.fsync == "on" && says.full_page_writes == "on",
            // An acknowledged commit has waited for one of those that are named.
            survives_loss_of_node: waits,
            warnings,
        }
    }

    /// Of the embedded store, which syncs its log at every commit (L7).
    pub(crate) fn of_embedded(journal_mode: &str, synchronous: i64) -> Durability {
        // `PRAGMA synchronous` answers with a number; 2 is full, and anything above is stricter.
        let full = synchronous >= 2;
        let name = match synchronous {
            0 => "off",
            1 => "normal",
            2 => "full",
            _ => "extra",
        };
        Durability {
            settings: vec![("journal_mode", journal_mode.to_owned()), ("synchronous", name.to_owned())],
            survives_machine_crash: full,
            survives_loss_of_node: false,
            warnings: if full {
                Vec::new()
            } else {
                vec![format!("synchronous is {name}: a power cut loses acknowledged completions")]
            },
        }
    }

    /// Writes the warnings to the log.
    pub(crate) fn warn(&self) {
        for warning in &self.warnings {
            tracing::warn!(durability = %self.survives(), "{warning}");
        }
    }

    /// What an acknowledged completion survives, in words.
    #[must_use]
    pub fn survives(&self) -> Survives<'_> {
        Survives(self)
    }
}

/// See [`Durability::survives`].
#[derive(Clone, Copy, Debug)]
pub struct Survives<'a>(&'a Durability);

impl fmt::Display for Survives<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a crash of a process")?;
        if self.0.survives_machine_crash {
            f.write_str(", a crash of the store's machine")?;
        }
        if self.0.survives_loss_of_node {
            f.write_str(", the loss of the store's node")?;
        }
        Ok(())
    }
}

/// One `name: value` a line, for `/readyz`.
impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.settings {
            writeln!(f, "{name}: {value}")?;
        }
        writeln!(f, "an acknowledged completion survives: {}", self.survives())?;
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says() -> PostgresSays {
        PostgresSays {
            synchronous_commit: "on".into(),
            fsync: "on".into(),
            full_page_writes: "on".into(),
            synchronous_standby_names: String::new(),
            standbys: Some(Vec::new()),
            synchronous_standby: false,
        }
    }

    #[test]
    fn what_is_survived_follows_from_the_settings() {
        let named = || "FIRST 1 (a)".to_owned();
        for (what, says, machine, node, warnings) in [
            ("the defaults", says(), true, false, 0),
            ("raised", PostgresSays { synchronous_commit: "off".into(), ..says() }, true, false, 1),
            ("raised", PostgresSays { synchronous_commit: "local".into(), ..says() }, true, false, 1),
            ("stricter", PostgresSays { synchronous_commit: "remote_apply".into(), ..says() }, true, false, 0),
            ("no fsync", PostgresSays { fsync: "off".into(), ..says() }, false, false, 1),
            ("torn pages", PostgresSays { full_page_writes: "off".into(), ..says() }, false, false, 1),
            (
                "a standby",
                PostgresSays { synchronous_standby_names: named(), synchronous_standby: true, ..says() },
                true,
                true,
                0,
            ),
            ("a standby that is away", PostgresSays { synchronous_standby_names: named(), ..says() }, true, true, 1),
            (
                "a standby that nobody may see",
                PostgresSays { synchronous_standby_names: named(), standbys: None, ..says() },
                true,
                true,
                0,
            ),
        ] {
            let durability = Durability::of_postgres(&says);
            assert_eq!(durability.survives_machine_crash, machine, "{what}");
            assert_eq!(durability.survives_loss_of_node, node, "{what}");
            assert_eq!(durability.warnings.len(), warnings, "{what}: {durability}");
        }
        assert!(Durability::of_embedded("wal", 2).survives_machine_crash);
        assert!(!Durability::of_embedded("wal", 1).survives_machine_crash);
        assert_eq!(Durability::of_embedded("wal", 1).warnings.len(), 1);
    }

    /// As the role has it that the operations manual makes, on a database without standbys.
    #[test]
    fn the_document_shows_what_the_documented_role_gets() {
        let shown = Durability::of_postgres(&PostgresSays { standbys: None, ..says() }).to_string();
        let document = include_str!("../../../docs/durability.md");
        let shown: String = shown.lines().map(|line| format!("    {line}\n")).collect();
        assert!(document.contains(&format!("    ready\n{shown}")), "{shown}");
        assert!(
            shown.contains("pg_read_all_stats")
                && include_str!("../../../docs/operations.md").contains("pg_read_all_stats")
        );
    }

    #[test]
    fn people_see_every_setting_and_what_it_comes_to() {
        let raised = PostgresSays { synchronous_commit: "off".into(), fsync: "off".into(), ..says() };
        assert_eq!(
            Durability::of_postgres(&raised).to_string(),
            "synchronous_commit: on (raised from off for the ledger's connection)\nfsync: off\nfull_page_writes: on\n\
             synchronous_standby_names: none\nstandbys: none\nan acknowledged completion survives: a crash of a process\n\
             warning: synchronous_commit is off in the database; the ledger's own connection has it on\n\
             warning: fsync is off: a crash of the database's machine loses acknowledged completions, and may leave a \
             database that cannot be used\n"
        );
    }
}
