//! Metadata: free JSON that is kept with an event.
//!
//! What the creating call gave and what completions added are stored apart and merged when they are read, so that a
//! completion is one plain write and the rule about the limit is the same code for every ledger.

use std::fmt::{self, Write as _};

use serde::Serialize;
use serde_json::{Map, Serializer, Value, ser::Formatter};

/// The most that an event's metadata may have, in bytes as compact JSON with every number in decimals.
pub const METADATA_BYTES_MAX: usize = 8 * 1024;

/// A merge.
#[derive(Debug, PartialEq)]
pub struct Merged {
    /// The merged object.
    pub metadata: Map<String, Value>,
    /// Keys of the addition that would have passed the limit, and were left out.
    pub left_out: usize,
}

/// Merges `addition` into `base` by top-level key, in the order of the keys; what would pass
/// [`METADATA_BYTES_MAX`] is left out and counted. Text that is no JSON object counts as empty: the ledger holds only
/// what [`serde_json`] wrote.
pub fn merged(base: Option<&str>, addition: Option<&str>) -> Merged {
    let mut metadata = parsed(base);
    let Some(addition) = addition else { return Merged { metadata, left_out: 0 } };
    let mut left_out = 0;
    // Each member is measured once: a message has room for a hundred thousand.
    let mut bytes = encoded_bytes(&metadata);
    for (key, value) in parsed(Some(addition)) {
        let with = member_bytes(&key, &value);
        let grown = match metadata.get(&key) {
            Some(before) => bytes - member_bytes(&key, before) + with,
            None => bytes + with + usize::from(!metadata.is_empty()),
        };
        if grown <= METADATA_BYTES_MAX || grown <= bytes {
            bytes = grown;
            metadata.insert(key, value);
        } else {
            left_out += 1;
        }
    }
    Merged { metadata, left_out }
}

/// The size of a member as compact JSON, with every number in decimals and without a comma.
fn member_bytes(key: &str, value: &Value) -> usize {
    encoded_bytes(key).saturating_add(1).saturating_add(encoded_bytes(value))
}

/// The size of a number in decimals. Postgres keeps JSON's numbers as decimals, and writes all 301 digits of `1e300` for every
/// read: counted as they were given, 8 KiB of such numbers would be 350 KB of each duplicate's event.
pub fn decimal_bytes(number: f64) -> usize {
    let mut count = Count(0);
    match write!(count, "{number}") {
        Ok(()) => count.0,
        Err(fmt::Error) => BYTES_OF_WHAT_FAILS,
    }
}

/// Counting cannot fail and JSON serialises; were it otherwise, what is too large is the safe answer.
const BYTES_OF_WHAT_FAILS: usize = usize::MAX / 4;

/// Counts what is written.
struct Count(usize);

impl fmt::Write for Count {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        self.0 += part.len();
        Ok(())
    }
}

impl std::io::Write for Count {
    fn write(&mut self, part: &[u8]) -> std::io::Result<usize> {
        self.0 += part.len();
        Ok(part.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Compact, with every number in decimals.
struct Decimals;

impl Formatter for Decimals {
    fn write_f64<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, value: f64) -> std::io::Result<()> {
        write!(writer, "{value}")
    }
}

/// The size of something as compact JSON, with every number in decimals.
fn encoded_bytes<T: Serialize + ?Sized>(json: &T) -> usize {
    let mut count = Count(0);
    match json.serialize(&mut Serializer::with_formatter(&mut count, Decimals)) {
        Ok(()) => count.0,
        Err(_) => BYTES_OF_WHAT_FAILS,
    }
}

fn parsed(text: Option<&str>) -> Map<String, Value> {
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_by_top_level_key_and_keeps_null() {
        let merged = merged(Some(r#"{"a":{"x":1},"b":2}"#), Some(r#"{"a":{"y":2},"c":null}"#));
        assert_eq!(Value::Object(merged.metadata), serde_json::json!({"a": {"y": 2}, "b": 2, "c": null}));
        assert_eq!(merged.left_out, 0);
    }

    #[test]
    fn leaves_out_and_counts_what_would_pass_the_limit() {
        let base = format!(r#"{{"a":"{}"}}"#, "x".repeat(8_000));
        let addition = format!(r#"{{"a":1,"b":"{}","c":"small"}}"#, "y".repeat(8_200));
        let merged = merged(Some(&base), Some(&addition));
        assert_eq!(merged.left_out, 1);
        assert_eq!(Value::Object(merged.metadata), serde_json::json!({"a": 1, "c": "small"}));
    }

    #[test]
    fn what_is_counted_is_what_would_be_written() {
        let base = r#"{"a":"x","b":{"c":[1,2,3]},"\u00e9\n":null}"#;
        for base in [None, Some("{}"), Some(base)] {
            let mut metadata = parsed(base);
            let mut bytes = encoded_bytes(&metadata);
            for (key, value) in [("b", "\"\\".into()), ("d", Value::Null), ("a", 1.into()), ("", "\u{1}é".into())] {
                let with = member_bytes(key, &value);
                let before = metadata.insert(key.to_owned(), value);
                let comma = usize::from(before.is_none() && metadata.len() > 1);
                bytes = bytes - before.map_or(0, |before| member_bytes(key, &before)) + with + comma;
                assert_eq!(bytes, Value::Object(metadata.clone()).to_string().len(), "{metadata:?}");
            }
        }
    }

    #[test]
    fn of_a_hundred_thousand_keys_as_many_are_kept_as_fit() {
        let addition: Map<String, Value> = (0..100_000).map(|key| (format!("{key:06}"), Value::Null)).collect();
        let merged = merged(None, Some(&Value::Object(addition).to_string()));
        // Each is `"000000":null` and a comma; the braces take one byte more than the comma that the last one lacks.
        assert_eq!(merged.metadata.len(), (METADATA_BYTES_MAX - 1) / 14);
        assert_eq!(merged.left_out, 100_000 - merged.metadata.len());
        assert!(Value::Object(merged.metadata).to_string().len() <= METADATA_BYTES_MAX);
    }

    #[test]
    fn doubles_come_back_as_they_were_given() {
        // The steps of a generator that reaches every exponent and all kinds of last bits.
        let mut bits = 0x9E37_79B9_7F4A_7C15_u64;
        let mut doubles = vec![f64::MAX, f64::MIN, f64::MIN_POSITIVE, 5e-324, 0.1, 1e23, 9_007_199_254_740_993.0];
        for _ in 0..20_000 {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            doubles.extend(Some(f64::from_bits(bits)).filter(|double| double.is_finite()));
        }
        for double in doubles {
            // In the notation of doubles, and in the decimals that Postgres makes of it.
            for text in [Value::from(double).to_string(), format!("{double}")] {
                let read = merged(Some(&format!(r#"{{"n":{text}}}"#)), None).metadata["n"].as_f64();
                assert_eq!(read.map(f64::to_bits), Some(double.to_bits()), "{text}");
            }
        }
    }

    #[test]
    fn numbers_of_a_merge_count_for_their_decimals() {
        let list = |key: &str, count| format!(r#"{{"{key}":[{}]}}"#, vec!["1e300"; count].join(","));
        for (added, left_out) in [(13, 0), (14, 1)] {
            assert_eq!(merged(Some(&list("a", 14)), Some(&list("b", added))).left_out, left_out, "{added} numbers");
        }
    }

    #[test]
    fn a_replacement_makes_room_of_what_it_replaces() {
        let text = |length| "x".repeat(length);
        let base = format!(r#"{{"a":"{}"}}"#, text(4_000));
        let merged = merged(Some(&base), Some(&format!(r#"{{"a":"{}","b":"{}"}}"#, text(4_001), text(4_000))));
        assert_eq!((merged.left_out, merged.metadata.len()), (0, 2));
    }

    #[test]
    fn a_replacement_that_would_pass_the_limit_leaves_the_old_value() {
        let addition = format!(r#"{{"a":"{}"}}"#, "y".repeat(9_000));
        let merged = merged(Some(r#"{"a":"old"}"#), Some(&addition));
        assert_eq!(merged.left_out, 1);
        assert_eq!(Value::Object(merged.metadata), serde_json::json!({"a": "old"}));
    }
}
