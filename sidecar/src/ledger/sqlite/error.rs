//! What an error of SQLite means: by its code, never by its text.

use rusqlite::{ErrorCode, ffi::SQLITE_IOERR_READ};

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
    /// The database cannot read what it keeps: a damaged page, or one that its disk does not give. The other items of the
    /// batch are not to blame, unless nothing else can be read either.
    #[error("the database cannot read what it keeps")]
    Damaged(#[source] rusqlite::Error),
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
            // What is damaged may be all: one transaction does not tell.
            Fault::Damaged(_) => Error::unavailable(),
            Fault::Commit(_) => Error::OutcomeUnknown,
            Fault::Item(error) => internal("refused a statement", error),
            Fault::Unreadable(_) => Error::unreadable(),
            Fault::Defect(_) | Fault::NeedsWrite => Error::Internal(self.to_string()),
        }
    }

    /// What the caller of the only item in the transaction is told, where others can be read.
    pub(super) fn answer_alone(&self) -> Error {
        match self {
            Fault::Damaged(error) => internal("cannot read what it keeps of the event", error),
            fault => fault.answer(),
        }
    }

    /// Whether one item of a batch may have caused it, and the others can be done without that one.
    pub(super) fn is_of_an_item(&self) -> bool {
        match self {
            // A defect may show only in the company of others.
            Fault::Item(_) | Fault::Unreadable(_) | Fault::Damaged(_) | Fault::Defect(_) => true,
            Fault::Environment(_) | Fault::Commit(_) | Fault::NeedsWrite => false,
        }
    }
}

/// With its code alone: the library's text may hold what was in the statement.
fn internal(what: &str, error: &rusqlite::Error) -> Error {
    let code = error.sqlite_error().map_or(0, |error| error.extended_code);
    Error::Internal(format!("the embedded database {what}, with code {code}"))
}

impl From<&Fault> for LedgerFailure {
    fn from(fault: &Fault) -> Self {
        match fault {
            Fault::Environment(_) => Self::Refusing,
            Fault::Item(_) => Self::BadItem,
            Fault::Unreadable(_) => Self::Unreadable,
            Fault::Damaged(_) => Self::Damaged,
            // A full disk shows when a batch is written, which is at its commit. The callers' outcome is open all the same.
            Fault::Commit(error) if is_environment(error) => Self::Refusing,
            Fault::Commit(_) => Self::Broken,
            Fault::Defect(_) | Fault::NeedsWrite => Self::Defect,
        }
    }
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        if is_damage(&error) {
            Fault::Damaged(error)
        } else if is_environment(&error) {
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

/// Whether something of the file could not be read, and the rest perhaps can. The disk's other errors come while it is written
/// to, or locked.
fn is_damage(error: &rusqlite::Error) -> bool {
    error
        .sqlite_error()
        .is_some_and(|error| error.code == ErrorCode::DatabaseCorrupt || error.extended_code == SQLITE_IOERR_READ)
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

    #[test]
    fn what_cannot_be_read_is_damage_and_what_cannot_be_written_is_not() {
        use rusqlite::ffi;
        let of = |code| rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
        for code in [ffi::SQLITE_CORRUPT, ffi::SQLITE_CORRUPT_INDEX, ffi::SQLITE_IOERR_READ] {
            let fault = Fault::from(of(code));
            assert!(matches!(LedgerFailure::from(&fault), LedgerFailure::Damaged), "{code}");
            assert!(fault.is_of_an_item(), "{code}");
            // A listing or a step of Cleanup may have met anything.
            assert!(matches!(fault.answer(), Error::Unavailable { .. }), "{code}");
            let Error::Internal(told) = fault.answer_alone() else { panic!("{code}") };
            assert!(told.ends_with(&format!("code {code}")), "{told}");
            // Of a commit it is unknown whether it happened.
            assert!(matches!(Fault::Commit(of(code)).answer_alone(), Error::OutcomeUnknown));
            assert!(!Fault::Commit(of(code)).is_of_an_item(), "{code}");
        }
        for code in [ffi::SQLITE_IOERR_WRITE, ffi::SQLITE_IOERR_FSYNC, ffi::SQLITE_IOERR_LOCK, ffi::SQLITE_NOTADB] {
            let fault = Fault::from(of(code));
            assert!(matches!(LedgerFailure::from(&fault), LedgerFailure::Refusing), "{code}");
            assert!(!fault.is_of_an_item(), "{code}");
            assert!(matches!(fault.answer_alone(), Error::Unavailable { .. }), "{code}");
        }
    }
}
