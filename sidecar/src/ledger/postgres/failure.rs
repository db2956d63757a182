//! What an error of the database means for the items of a statement. SQLSTATE and error kind decide, never text (L6).

use crate::ledger::metrics::LedgerFailure;

/// What to do about a statement that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The connection died, with the server or without it, or the statement was given up with the answer outstanding: it may
    /// have taken effect. Connect anew and run it again if it may be repeated; otherwise nobody knows.
    Broken,
    /// The server refuses to write, or to serve: wrong node after a failover, out of resources. The
    /// statement did not take effect. Discard the connection and tell the caller to come back.
    Refusing,
    /// The server cancelled the statement for taking too long. It did not take effect; the connection is good.
    TooSlow,
    /// Another session holds a row. It did not take effect; halve and retry.
    Contended,
    /// One of the items is bad. It did not take effect; find the item by halving.
    BadItem,
    /// The answer has a value that this version does not know: a row of a newer one, which runs beside it during a roll-out
    /// or ran before it. It may have taken effect; find the row by halving. The answer was taken in whole, so the connection
    /// is good.
    Unreadable,
    /// The database cannot read what it keeps: a damaged page, or one that its disk does not give. It did not take effect, and
    /// the connection is good; find the item by halving, unless nothing else can be read either.
    Damaged,
    /// A defect of ours.
    Defect,
}

impl Failure {
    /// Whether the connection is of no use any more. After a defect a pooler may have lost our prepared statements: then nothing
    /// else would ever work again on it.
    pub(super) fn ends_connection(self) -> bool {
        matches!(self, Failure::Broken | Failure::Refusing | Failure::Defect)
    }

    /// Whether the statement may have taken effect all the same.
    pub(super) fn may_have_happened(self) -> bool {
        matches!(self, Failure::Broken | Failure::Unreadable)
    }
}

impl From<Failure> for LedgerFailure {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Broken => Self::Broken,
            Failure::Refusing => Self::Refusing,
            Failure::TooSlow => Self::TooSlow,
            Failure::Contended => Self::Contended,
            Failure::BadItem => Self::BadItem,
            Failure::Unreadable => Self::Unreadable,
            Failure::Damaged => Self::Damaged,
            Failure::Defect => Self::Defect,
        }
    }
}

/// The error of a statement that was given up on because its answer did not come in time.
pub(super) fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())
}

/// Classifies an error.
pub(super) fn classify(error: &sqlx::Error) -> Failure {
    match error {
        sqlx::Error::Database(error) => match error.code() {
            Some(code) => sqlstate(&code),
            None => Failure::Defect,
        },
        sqlx::Error::Io(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::PoolClosed
        | sqlx::Error::PoolTimedOut => Failure::Broken,
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => Failure::Unreadable,
        _ => Failure::Defect,
    }
}

fn sqlstate(code: &str) -> Failure {
    match code {
        // lock_not_available, deadlock_detected, serialization_failure
        "55P03" | "40P01" | "40001" => Failure::Contended,
        // query_canceled: statement_timeout, which the server no longer applies once the commit has begun
        "57014" => Failure::TooSlow,
        // admin_shutdown, crash_shutdown, cannot_connect_now, database_dropped: it can strike while a commit waits for its
        // standby, and that commit has then happened here (PG5)
        _ if code.starts_with("57P") => Failure::Broken,
        // read_only_sql_transaction: a standby, or a server that was told to refuse
        "25006" => Failure::Refusing,
        // A statement planned before a migration: the plan dies with the connection.
        "0A000" => Failure::Refusing,
        // io_error, data_corrupted, index_corrupted: the page or the large value that one item came to, or all of them
        "58030" | "XX001" | "XX002" => Failure::Damaged,
        _ => match code.get(..2) {
            // data exception, integrity constraint violation
            Some("22" | "23") => Failure::BadItem,
            // connection exception
            Some("08") => Failure::Broken,
            // insufficient resources; system error; internal error: whatever it is, this connection is no good
            Some("53" | "57" | "58" | "XX") => Failure::Refusing,
            // invalid transaction state: somebody left a transaction open on the session
            Some("25") => Failure::Refusing,
            // invalid authorization, or a privilege that was taken away
            Some("28" | "42") if code == "42501" || code.starts_with("28") => Failure::Refusing,
            Some(_) | None => Failure::Defect,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlstate_decides_what_an_error_means() {
        for (code, meaning) in [
            ("55P03", Failure::Contended),
            ("40P01", Failure::Contended),
            ("57014", Failure::TooSlow),
            ("57P01", Failure::Broken),
            ("25006", Failure::Refusing),
            ("53300", Failure::Refusing),
            ("08006", Failure::Broken),
            ("42501", Failure::Refusing),
            ("28P01", Failure::Refusing),
            ("22P05", Failure::BadItem),
            ("23514", Failure::BadItem),
            ("58030", Failure::Damaged),
            ("XX001", Failure::Damaged),
            ("XX002", Failure::Damaged),
            ("58P01", Failure::Refusing),
            ("XX000", Failure::Refusing),
            ("42703", Failure::Defect),
        ] {
            assert_eq!(sqlstate(code), meaning, "{code}");
        }
    }

    #[test]
    fn a_value_that_is_not_known_is_no_defect_and_a_column_that_is_not_there_is_one() {
        let unknown = || Box::new(std::io::Error::from(std::io::ErrorKind::InvalidData));
        let column = || "state".to_owned();
        for (error, meaning) in [
            (sqlx::Error::Decode(unknown()), Failure::Unreadable),
            (sqlx::Error::ColumnDecode { index: column(), source: unknown() }, Failure::Unreadable),
            (sqlx::Error::ColumnNotFound(column()), Failure::Defect),
        ] {
            assert_eq!(classify(&error), meaning, "{error:?}");
        }
        // The answer came: what it was to say had been done, and the next one comes over the same connection.
        assert!(Failure::Unreadable.may_have_happened() && !Failure::Unreadable.ends_connection());
    }
}
