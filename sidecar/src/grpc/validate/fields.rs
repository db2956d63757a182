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
        json::{self, NotJson, Object},
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
        // protobuf: seconds and nanoseconds have the same sign, and nanoseconds stay below a second.
        let seconds = u64::try_from(given.seconds);
        let nanos = u32::try_from(given.nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
        let span = match (seconds, nanos) {
            (Ok(seconds), Some(nanos)) => Duration::new(seconds, nanos),
            _ if given.seconds < 0 || given.nanos < 0 => {
                self.violation(field, "must not be negative");
                return None;
            }
            _ => {
                self.violation(field, "is no valid duration: nanos must be below 1,000,000,000");
                return None;
            }
        };
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
        if !(0..=SECONDS_MAX).contains(&given.seconds) || !(0..1_000_000_000).contains(&given.nanos) {
            self.violation(field, "is no valid time: it must lie between the years 1970 and 9999");
            return None;
        }
        Some(Time(given.seconds * 1_000_000 + i64::from(given.nanos / 1_000)))
    }

    /// A JSON object within the limit.
    pub(super) fn metadata(&mut self, field: &str, given: Option<prost_types::Struct>) -> Option<String> {
        let Object { text, bytes } = match json::object(&given?) {
            Ok(object) => object?,
            Err(error) => {
                self.violation(
                    field,
                    match error {
                        NotJson::Number => "holds NaN or an infinity, which JSON does not have",
                        NotJson::Control => "holds a control character in a string or key",
                        NotJson::Empty => "holds a value without a kind",
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
