//! `oncegate migrate`.

use oncegate_sidecar::Migrated;

use crate::{failure::Failure, output};

/// Bring a database's schema up to this version
///
/// Applies what is missing to the Postgres database that DATABASE_URL names, or to ./oncegate.db where none is named, and
/// says what it did. Safe to run again, and by several at once. Nothing else changes a Postgres schema: a sidecar that cannot
/// work on the one that it finds refuses to start.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  DATABASE_URL=postgres://oncegate@db.example.com/payments oncegate migrate")]
pub(crate) struct Migrate {
    #[command(flatten)]
    store: oncegate_sidecar::config::StoreOptions,
}

impl Migrate {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let store = self.store.validate()?;
        let Migrated { store, from, to } = oncegate_sidecar::migrate(&store).await?;
        output::line(match from {
            _ if from == to => format!("{store}: the schema is at version {to}, nothing to do"),
            0 => format!("{store}: made the schema, version {to}"),
            _ => format!("{store}: brought the schema from version {from} to {to}"),
        });
        Ok(())
    }
}
