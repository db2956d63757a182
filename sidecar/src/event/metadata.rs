//! Metadata: free JSON that is kept with an event.
//!
//! What the creating call gave and what completions added are stored apart and merged when they are read, so that a
//! completion is one plain write and the rule about the limit is the same code for every ledger.

use serde_json::{Map, Value};

/// The most that an event's metadata may have, in bytes as compact JSON.
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
    let mut bytes = encoded_bytes(&metadata);
    for (key, value) in parsed(Some(addition)) {
        let before = metadata.insert(key.clone(), value);
        // Exact rather than incremental arithmetic: at most a few hundred small keys, on a path that few events take.
        let grown = encoded_bytes(&metadata);
        if grown <= METADATA_BYTES_MAX || grown <= bytes {
            bytes = grown;
            continue;
        }
        left_out += 1;
        match before {
            Some(before) => metadata.insert(key, before),
            None => metadata.remove(&key),
        };
    }
    Merged { metadata, left_out }
}

/// The size of an object as compact JSON.
pub fn encoded_bytes(object: &Map<String, Value>) -> usize {
    struct Count(usize);
    impl std::io::Write for Count {
        fn write(&mut self, part: &[u8]) -> std::io::Result<usize> {
            self.0 += part.len();
            Ok(part.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    match serde_json::to_writer(&mut count, object) {
        Ok(()) => count.0,
        // Counting cannot fail and a map of strings serialises; were it otherwise, the largest size is the safe answer.
        Err(_) => usize::MAX,
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
    fn a_replacement_that_would_pass_the_limit_leaves_the_old_value() {
        let addition = format!(r#"{{"a":"{}"}}"#, "y".repeat(9_000));
        let merged = merged(Some(r#"{"a":"old"}"#), Some(&addition));
        assert_eq!(merged.left_out, 1);
        assert_eq!(Value::Object(merged.metadata), serde_json::json!({"a": "old"}));
    }
}
