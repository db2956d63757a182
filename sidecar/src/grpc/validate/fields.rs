//! Checks of single fields, collecting violations.

use std::{ops::RangeInclusive, time::Duration};

use bytes::Bytes;
use oncegate_runtime::config::ShownDuration;
use tonic::Status;
use tonic_types::FieldViolation;

use super::{digest_of, people};
use crate::{
    event::{
        Digest, Time,
        metadata::{self, METADATA_BYTES_MAX},
    },
    grpc::{
        json::{self, Misfit, NotJson, Object},
        status::invalid,
    },
};

/// What a text may be made of.
#[derive(Clone, Copy)]
pub(super) enum Charset {
    /// `[A-Za-z0-9._-]`
    Name,
    /// `[a-z0-9._-]`
    LowerName,
    /// 0x21 to 0x7E.
    Visible,
    /// Anything but control characters.
    Printable,
}

impl Charset {
    fn admits(self, character: char) -> bool {
        match self {
            Charset::Name => character.is_ascii_alphanumeric() || matches!(character, '.' | '_' | '-'),
            Charset::LowerName => {
                character.is_ascii_lowercase() || character.is_ascii_digit() || matches!(character, '.' | '_' | '-')
            }
            Charset::Visible => character.is_ascii_graphic(),
            Charset::Printable => !character.is_control(),
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Charset::Name => "letters, digits, '.', '_' and '-'",
            Charset::LowerName => "lower-case letters, digits, '.', '_' and '-'",
            Charset::Visible => "visible ASCII characters (0x21 to 0x7E)",
            Charset::Printable => "anything but control characters",
        }
    }
}

/// The most violations that one answer lists. A request can contain hundreds of thousands of them (a byte each, in a list
/// of states), and reporting one takes a hundred times the space of the bad value itself.
const VIOLATIONS_MAX: usize = 32;

/// The nanoseconds of a second, which protobuf's durations and times stay below.
const NANOS: u32 = 1_000_000_000;

/// The violations found so far.
#[derive(Default)]
pub(super) struct Fields {
    violations: Vec<FieldViolation>,
}

impl Fields {
    pub(super) fn violation(&mut self, field: impl Into<String>, description: impl Into<String>) {
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations.push(FieldViolation::new(field, description));
        }
    }

    /// Whether no further violation would be listed, so that the rest need not be checked.
    pub(super) fn is_full(&self) -> bool {
        self.violations.len() >= VIOLATIONS_MAX
    }

    pub(super) fn finish(self) -> Result<(), Status> {
        if self.violations.is_empty() { Ok(()) } else { Err(invalid(self.violations)) }
    }

    /// A text whose length in bytes is within the range, made of these characters.
    pub(super) fn text(&mut self, field: &str, given: &str, bytes: RangeInclusive<usize>, charset: Charset) {
        let length = given.len();
        if length < *bytes.start() {
            self.violation(field, "is required");
        } else if length > *bytes.end() {
            self.violation(field, format!("may have at most {} bytes, and has {length}", bytes.end()));
        } else if let Some((place, character)) = given.char_indices().find(|(_, c)| !charset.admits(*c)) {
            // The code point, not the character: it may be invisible, or turn the text around.
            self.violation(
                field,
                format!("may hold {}, and has U+{:04X} at byte {place}", charset.describe(), u32::from(character)),
            );
        }
    }

    pub(super) fn bytes_max(&mut self, field: &str, given: usize, max: usize) {
        if given > max {
            self.violation(field, format!("may have at most {max} bytes, and has {given}"));
        }
    }

    /// Empty, or a SHA-256.
    pub(super) fn digest(&mut self, field: &str, given: &Bytes) -> Option<Digest> {
        if given.is_empty() {
            return None;
        }
        let digest = digest_of(given);
        if digest.is_none() {
            self.violation(field, format!("must have 32 bytes (a SHA-256), and has {}", given.len()));
        }
        digest
    }

    /// A duration within a range, both ends included.
    pub(super) fn duration(
        &mut self,
        field: &str,
        given: Option<prost_types::Duration>,
        range: RangeInclusive<Duration>,
    ) -> Option<Duration> {
        let given = given?;
        let prost_types::Duration { seconds, nanos } = given;
        let (positive, negative) = (seconds > 0 || nanos > 0, seconds < 0 || nanos < 0);
        if nanos.unsigned_abs() >= NANOS || (positive && negative) {
            self.violation(
                field,
                format!(
                    "is no valid duration: seconds and nanos must have the same sign, and nanos stay below 1,000,000,000, \
                     not {seconds} and {nanos}"
                ),
            );
            return None;
        }
        let span = Duration::new(seconds.unsigned_abs(), nanos.unsigned_abs());
        if negative {
            self.violation(field, format!("must not be negative, not -{}", ShownDuration(span)));
            return None;
        }
        if range.contains(&span) {
            return Some(span);
        }
        self.violation(
            field,
            format!(
                "must be between {} and {}, not {}",
                people(*range.start()),
                people(*range.end()),
                ShownDuration(span)
            ),
        );
        None
    }

    /// A time between the years 1970 and 9999.
    pub(super) fn time(&mut self, field: &str, given: Option<prost_types::Timestamp>) -> Option<Time> {
        const SECONDS_MAX: i64 = 253_402_300_799;
        let given = given?;
        if !u32::try_from(given.nanos).is_ok_and(|nanos| nanos < NANOS) {
            self.violation(
                field,
                format!("is no valid time: nanos must be from 0 to 999,999,999, not {}", given.nanos),
            );
            return None;
        }
        if !(0..=SECONDS_MAX).contains(&given.seconds) {
            self.violation(field, "is no valid time: it must lie between the years 1970 and 9999");
            return None;
        }
        Some(Time(given.seconds * 1_000_000 + i64::from(given.nanos / 1_000)))
    }

    /// A JSON object within the limit.
    pub(super) fn metadata(&mut self, field: &str, given: Option<prost_types::Struct>) -> Option<String> {
        let Object { text, bytes } = match json::object(&given?) {
            Ok(object) => object?,
            Err(Misfit { why, key }) => {
                let key = key.as_deref().unwrap_or_default();
                self.violation(
                    field,
                    match why {
                        NotJson::Number => format!("holds NaN or an infinity as {key:?}, which JSON does not have"),
                        NotJson::Control => format!("holds a control character in the string or key {key:?}"),
                        NotJson::Empty => format!("holds a value without a kind as {key:?}"),
                    },
                );
                return None;
            }
        };
        if bytes > METADATA_BYTES_MAX {
            self.violation(
                field,
                format!(
                    "may have at most {METADATA_BYTES_MAX} bytes as JSON with every number in decimals, and has {bytes}"
                ),
            );
            return None;
        }
        Some(text)
    }
}

/// The part of a completion's metadata that can be kept, and the number of keys that cannot. It never makes the
/// completion fail: the effect has happened, and refusing a Mark because of a line break in a note would get the event
/// processed again.
pub(super) fn metadata_of_completion(given: Option<prost_types::Struct>) -> (Option<String>, usize) {
    let Some(given) = given else { return (None, 0) };
    let (object, unfit) = json::object_of_what_fits(&given);
    let Some(Object { text, bytes }) = object else { return (None, unfit) };
    if bytes <= METADATA_BYTES_MAX {
        return (Some(text), unfit);
    }
    let fitting = metadata::merged(None, Some(&text));
    let kept = (!fitting.metadata.is_empty()).then(|| serde_json::Value::Object(fitting.metadata).to_string());
    (kept, unfit + fitting.left_out)
}
