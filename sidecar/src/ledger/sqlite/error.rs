//! What an error of SQLite means: by its code, never by its text.

use rusqlite::ErrorCode;

use crate::ledger::{Error, metrics::LedgerFailure};

/// Why a transaction was given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// The file cannot be read or written now. No item is to blame, and nothing happened.
    #[error("the database cannot be used")]
    Environment(#[source] rusqlite::Error),
    /// A statement was refused for what was in it: the other items of the batch are not to blame.
    #[error("a statement was refused")]
    Item(#[source] rusqlite::Error),
    /// A row has a value that this version does not know: a newer one ran before it. The other items of the batch are not to
    /// blame.
    #[error("a row has a value that this version cannot read")]
    Unreadable(#[source] rusqlite::Error),
    /// What was read does not fit what was written: a defect.
    #[error("{0}")]
    Defect(&'static str),
    /// COMMIT failed. What it would have made durable may be in the log of the file and come back after a crash.
    #[error("the commit failed")]
    Commit(#[source] rusqlite::Error),
    /// A transaction that was begun for reading has come to an item that writes. Nothing happened.
    #[error("a transaction for reading has to write")]
    NeedsWrite,
}

impl Fault {
    /// What a caller is told whose item was in the transaction.
    pub(super) fn answer(&self) -> Error {
        match self {
            // Disks fill and are emptied again, a backup lets go of its lock: worth another try, but not at once.
            Fault::Environment(_) => Error::unavailable(),
            Fault::Commit(_) => Error::OutcomeUnknown,
            // Only its code: the library's text may hold what was in the statement.
            Fault::Item(error) => {
                let code = error.sqlite_error().map_or(0, |error| error.extended_code);
                Error::Internal(format!("the embedded database refused a statement, with code {code}"))
            }
            Fault::Unreadable(_) => Error::unreadable(),
            Fault::Defect(_) | Fault::NeedsWrite => Error::Internal(self.to_string()),
        }
    }
}

impl From<&Fault> for LedgerFailure {
    fn from(fault: &Fault) -> Self {
        match fault {
            Fault::Environment(_) => Self::Refusing,
            Fault::Item(_) => Self::BadItem,
            Fault::Unreadable(_) => Self::Unreadable,
            // A full disk shows when a batch is written, which is at its commit. The callers' outcome is open all the same.
            Fault::Commit(error) if is_environment(error) => Self::Refusing,
            Fault::Commit(_) => Self::Broken,
            Fault::Defect(_) | Fault::NeedsWrite => Self::Defect,
        }
    }
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        if is_environment(&error) {
            Fault::Environment(error)
        } else if is_unreadable(&error) {
            Fault::Unreadable(error)
        } else {
            Fault::Item(error)
        }
    }
}

/// Whether it is about a value that was read, and not about a statement.
fn is_unreadable(error: &rusqlite::Error) -> bool {
    matches!(
        error,
        rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::Utf8Error(..)
    )
}

/// Whether it is about the file, and not about what was in a statement.
fn is_environment(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code().is_some_and(|code| {
        matches!(
            code,
            ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked
                | ErrorCode::PermissionDenied
                | ErrorCode::OutOfMemory
                | ErrorCode::ReadOnly
                | ErrorCode::OperationInterrupted
                | ErrorCode::SystemIoFailure
                | ErrorCode::DatabaseCorrupt
                | ErrorCode::DiskFull
                | ErrorCode::CannotOpen
                | ErrorCode::FileLockingProtocolFailed
                | ErrorCode::NoLargeFileSupport
                | ErrorCode::NotADatabase
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_commit_that_failed_may_have_happened() {
        let full = || rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL), None);
        assert!(matches!(Fault::Commit(full()).answer(), Error::OutcomeUnknown));
        // For who is on call it is the disk.
        assert!(matches!(LedgerFailure::from(&Fault::Commit(full())), LedgerFailure::Refusing));
        assert!(matches!(Fault::from(full()).answer(), Error::Unavailable { .. }));
        let text = Some("near \"4242 4242\": syntax error".to_owned());
        let item = rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_ERROR), text);
        let Error::Internal(told) = Fault::Item(item).answer() else { panic!("it is a defect") };
        assert_eq!(told, "the embedded database refused a statement, with code 1");
        assert!(matches!(Fault::NeedsWrite.answer(), Error::Internal(_)));
    }
}
