//! Entries that a Redis which is well otherwise does not take: it has no room, cannot save, or does not let us write.

use std::time::{Duration, Instant};

use fred::error::{Error, ErrorKind};

/// How long a refusal is not told again: one that is at its limit takes some entries and refuses others.
const QUIET: Duration = Duration::from_secs(60);
/// Codes that are remembered. A server has a handful.
const CODES_MAX: usize = 16;

/// These are of a server that cannot be read from either, or is the wrong one: the connection is given up at them.
const NO_REFUSALS: [&str; 4] = ["READONLY", "LOADING", "CLUSTERDOWN", "MASTERDOWN"];

/// What has been told of refusals.
#[derive(Default)]
pub(super) struct Refusals {
    codes: Vec<String>,
    told: Option<Instant>,
}

impl Refusals {
    /// Whether a write was refused by the server itself. Says so: each code once until entries are taken again.
    pub(super) fn tell(&mut self, error: &Error) -> bool {
        let Some(code) = refusal(error) else {
            return false;
        };
        if self.is_news(code, Instant::now()) {
            tracing::warn!(reason = %error, "redis refuses entries; it is asked for those that it has");
        }
        true
    }

    fn is_news(&mut self, code: &str, now: Instant) -> bool {
        let news = self.codes.len() < CODES_MAX && !self.codes.iter().any(|told| told == code);
        if news {
            self.codes.push(code.to_owned());
            self.told = Some(now);
        }
        news
    }

    /// Entries were taken.
    pub(super) fn taken(&mut self) {
        if self.told.is_some() {
            self.taken_at(Instant::now());
        }
    }

    fn taken_at(&mut self, now: Instant) {
        if self.told.is_some_and(|told| now.duration_since(told) >= QUIET) {
            *self = Refusals::default();
            tracing::info!("redis takes entries again");
        }
    }
}

/// The code of a server's refusal, such as `OOM` or `MISCONF`; None for another error. The library's own errors may be of the
/// same kinds, but are sentences.
fn refusal(error: &Error) -> Option<&str> {
    if !matches!(error.kind(), ErrorKind::Unknown | ErrorKind::InvalidArgument | ErrorKind::InvalidCommand) {
        return None;
    }
    let (code, _) = error.details().split_once(' ')?;
    let is_code = code.len() > 1 && code.bytes().all(|byte| byte.is_ascii_uppercase());
    (is_code && !NO_REFUSALS.contains(&code)).then_some(code)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use fred::error::{Error, ErrorKind};

    use super::{QUIET, Refusals, refusal};

    #[test]
    fn only_what_a_server_says_against_a_write_is_a_refusal() {
        for (kind, text, code) in [
            (ErrorKind::Unknown, "OOM command not allowed when used memory > 'maxmemory'.", Some("OOM")),
            (ErrorKind::Unknown, "MISCONF Redis is configured to save RDB snapshots", Some("MISCONF")),
            (ErrorKind::Unknown, "ERR Error running script: -OOM command not allowed", Some("ERR")),
            (ErrorKind::InvalidArgument, "WRONGTYPE Operation against a key", Some("WRONGTYPE")),
            (ErrorKind::Unknown, "READONLY You can't write against a read only replica.", None),
            (ErrorKind::Unknown, "LOADING Redis is loading the dataset in memory", None),
            (ErrorKind::Auth, "NOAUTH Authentication required.", None),
            (ErrorKind::Cluster, "CLUSTERDOWN The cluster is down", None),
            (ErrorKind::Timeout, "Request timed out.", None),
            (ErrorKind::IO, "Connection closed.", None),
            (ErrorKind::Unknown, "Client is not initialized.", None),
            (ErrorKind::Unknown, "", None),
        ] {
            assert_eq!(refusal(&Error::new(kind, text)), code, "{text}");
        }
    }

    #[test]
    fn each_refusal_is_told_once_until_entries_are_taken_and_some_time_has_passed() {
        let (mut refusals, began) = (Refusals::default(), Instant::now());
        assert!(refusals.is_news("OOM", began) && refusals.is_news("MISCONF", began));
        assert!(!refusals.is_news("OOM", began + 2 * QUIET), "none was taken");
        // At its limit it takes some of them.
        refusals.taken_at(began + QUIET / 2);
        assert!(!refusals.is_news("OOM", began + QUIET / 2));
        refusals.taken_at(began + QUIET);
        assert!(refusals.is_news("OOM", began + QUIET));
    }
}
