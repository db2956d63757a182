//! The API's structures as compact JSON text, written in a single pass: every claim and mark may carry one, duplicates too.

use prost_types::{Struct, Value, value::Kind};
use serde::Serialize;

use crate::event::metadata::decimal_bytes;

/// Why a value of the API is no JSON, or none that the ledgers can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotJson {
    /// NaN or an infinity.
    Number,
    /// A control character in a string or key; NUL among them, which Postgres refuses.
    Control,
    /// A value without a kind.
    Empty,
}

/// What keeps a structure from being a JSON object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Misfit {
    pub(super) why: NotJson,
    /// The innermost key that it stands under, and no more of it than people read.
    pub(super) key: Option<String>,
}

impl Misfit {
    fn under(mut self, key: &str) -> Self {
        const CHARACTERS_MAX: usize = 64;
        self.key.get_or_insert_with(|| key.chars().take(CHARACTERS_MAX).collect());
        self
    }
}

impl From<NotJson> for Misfit {
    fn from(why: NotJson) -> Self {
        Self { why, key: None }
    }
}

/// A JSON object.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) text: String,
    /// Its size with every number in decimals, as limits count it.
    pub(super) bytes: usize,
}

/// The JSON object of an API structure, its keys in their order; None: it has none. Whole numbers are written without a fraction.
pub(super) fn object(structure: &Struct) -> Result<Option<Object>, Misfit> {
    let mut json = Json::default();
    json.object(structure)?;
    Ok((!structure.fields.is_empty()).then(|| json.finish()))
}

/// The same without the keys whose values JSON or the ledgers cannot hold, and how many those are.
pub(super) fn object_of_what_fits(structure: &Struct) -> (Option<Object>, usize) {
    let (mut json, mut left_out) = (Json::default(), 0);
    json.text.push(b'{');
    for (key, value) in &structure.fields {
        let (length, doubles) = (json.text.len(), json.doubles);
        if json.field(key, value).is_err() {
            json.text.truncate(length);
            json.doubles = doubles;
            left_out += 1;
        }
    }
    json.text.push(b'}');
    ((left_out < structure.fields.len()).then(|| json.finish()), left_out)
}

/// JSON that is being written.
#[derive(Default)]
struct Json {
    text: Vec<u8>,
    doubles: Doubles,
}

/// What the numbers take that are written in the notation of doubles.
#[derive(Clone, Copy, Default)]
struct Doubles {
    written: usize,
    in_decimals: usize,
}

impl Json {
    fn finish(self) -> Object {
        let bytes = self.text.len() - self.doubles.written + self.doubles.in_decimals;
        Object { text: String::from_utf8(self.text).expect("JSON is written from strings"), bytes }
    }

    fn object(&mut self, structure: &Struct) -> Result<(), Misfit> {
        self.text.push(b'{');
        for (key, value) in &structure.fields {
            self.field(key, value)?;
        }
        self.text.push(b'}');
        Ok(())
    }

    /// A key with its value, after a comma where others stand before it.
    fn field(&mut self, key: &str, value: &Value) -> Result<(), Misfit> {
        if self.text.last() != Some(&b'{') {
            self.text.push(b',');
        }
        self.string(key).map_err(|why| Misfit::from(why).under(key))?;
        self.text.push(b':');
        self.value(value).map_err(|misfit| misfit.under(key))
    }

    fn value(&mut self, value: &Value) -> Result<(), Misfit> {
        // Beyond 2^53 a double no longer holds every whole number; those stay in the notation of doubles.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        match value.kind.as_ref().ok_or(NotJson::Empty)? {
            Kind::NullValue(_) => self.plain(&()),
            Kind::BoolValue(value) => self.plain(value),
            Kind::NumberValue(value) if value.fract() == 0.0 && value.abs() < EXACT => {
                // Exact: a whole number within the range that doubles hold.
                #[expect(clippy::cast_possible_truncation, reason = "it has no fraction, and is within the range")]
                let whole = *value as i64;
                self.plain(&whole);
            }
            Kind::NumberValue(value) if value.is_finite() => {
                let before = self.text.len();
                self.plain(value);
                self.doubles.written += self.text.len() - before;
                self.doubles.in_decimals += decimal_bytes(*value);
            }
            Kind::NumberValue(_) => return Err(NotJson::Number.into()),
            Kind::StringValue(value) => self.string(value)?,
            Kind::ListValue(list) => {
                self.text.push(b'[');
                for (place, value) in list.values.iter().enumerate() {
                    if place > 0 {
                        self.text.push(b',');
                    }
                    self.value(value)?;
                }
                self.text.push(b']');
            }
            Kind::StructValue(structure) => self.object(structure)?,
        }
        Ok(())
    }

    fn string(&mut self, value: &str) -> Result<(), NotJson> {
        if value.chars().any(char::is_control) {
            return Err(NotJson::Control);
        }
        self.plain(value);
        Ok(())
    }

    fn plain<T: Serialize + ?Sized>(&mut self, value: &T) {
        serde_json::to_writer(&mut self.text, value)
            .expect("strings and finite numbers are JSON, and memory takes them");
    }
}

#[cfg(test)]
mod tests {
    use prost_types::ListValue;
    use serde_json::json;

    use super::*;
    use crate::event::metadata::{METADATA_BYTES_MAX, merged};

    fn text_of_what_fits(structure: &Struct) -> (Option<String>, usize) {
        let (object, left_out) = object_of_what_fits(structure);
        (object.map(|object| object.text), left_out)
    }

    fn value(kind: Kind) -> Value {
        Value { kind: Some(kind) }
    }

    fn text(text: &str) -> Value {
        value(Kind::StringValue(text.into()))
    }

    fn number(number: f64) -> Value {
        value(Kind::NumberValue(number))
    }

    fn structure(fields: impl IntoIterator<Item = (&'static str, Value)>) -> Struct {
        Struct { fields: fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() }
    }

    #[test]
    fn a_structure_is_written_as_the_json_it_stands_for() {
        let list = |values| value(Kind::ListValue(ListValue { values }));
        let inner = structure([("x\"\\", text("a \"quote\" \\ and ü 😀")), ("y", value(Kind::NullValue(0)))]);
        let given = structure([
            ("b", value(Kind::BoolValue(true))),
            ("a", list(vec![number(1.0), number(-0.5), list(vec![]), text("")])),
            ("c", value(Kind::StructValue(inner))),
            ("d", value(Kind::StructValue(Struct::default()))),
            ("", number(1e300)),
        ]);
        let written = object(&given).unwrap().unwrap().text;
        let expected = json!({
            "": 1e300, "a": [1, -0.5, [], ""], "b": true,
            "c": {"x\"\\": "a \"quote\" \\ and ü 😀", "y": null}, "d": {},
        });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&written).unwrap(), expected);
        // Compact, in the order of the keys.
        assert_eq!(written, expected.to_string());
        assert_eq!(text_of_what_fits(&given), (Some(written), 0));
        assert_eq!(object(&Struct::default()), Ok(None));
        assert_eq!(object_of_what_fits(&Struct::default()), (None, 0));
    }

    #[test]
    fn whole_numbers_have_no_fraction_as_long_as_they_are_exact() {
        for (given, written) in [
            (0.0, "0"),
            (-0.0, "0"),
            (4200.0, "4200"),
            (-9_007_199_254_740_991.0, "-9007199254740991"),
            (9_007_199_254_740_992.0, "9007199254740992.0"),
            (0.1, "0.1"),
            (5e-324, "5e-324"),
        ] {
            let object = object(&structure([("n", number(given))])).unwrap().unwrap();
            assert_eq!(object.text, format!("{{\"n\":{written}}}"));
        }
    }

    #[test]
    fn a_number_counts_for_its_length_in_decimals() {
        for (given, bytes) in [
            (0.0, 1),
            (-0.5, 4),
            (-4200.0, 5),
            (9_007_199_254_740_992.0, 16),
            (1e300, 301),
            (-f64::MAX, 310),
            (1e-300, 302),
            (5e-324, 326),
        ] {
            let given = structure([("n", number(given)), ("s", text("1e300"))]);
            let around = r#"{"n":,"s":"1e300"}"#.len();
            assert_eq!(object(&given).unwrap().unwrap().bytes, around + bytes, "{given:?}");
            // As the same text is counted where it is read.
            let text = object(&given).unwrap().unwrap().text;
            let room = "x".repeat(METADATA_BYTES_MAX - around - bytes - r#","r":"""#.len());
            for (room, left_out) in [(room.clone(), 0), (room + "x", 1)] {
                let merged = merged(Some(&text), Some(&format!(r#"{{"r":"{room}"}}"#)));
                assert_eq!(merged.left_out, left_out, "{text}");
            }
        }
        // What was left out counts for nothing.
        let list = value(Kind::ListValue(ListValue { values: vec![number(1e300), number(f64::NAN)] }));
        let (object, left_out) = object_of_what_fits(&structure([("a", list), ("b", number(1e300))]));
        assert_eq!((object.unwrap().bytes, left_out), (r#"{"b":}"#.len() + 301, 1));
    }

    #[test]
    fn what_json_or_a_ledger_cannot_hold_is_named_or_left_out_whole() {
        let within = |bad: Value| value(Kind::StructValue(structure([("good", number(1.0)), ("bad", bad)])));
        for (bad, why) in [
            (number(f64::NAN), NotJson::Number),
            (number(f64::INFINITY), NotJson::Number),
            (text("a\nb"), NotJson::Control),
            (text("\0"), NotJson::Control),
            (text("\u{85}"), NotJson::Control),
            (Value { kind: None }, NotJson::Empty),
        ] {
            let list = value(Kind::ListValue(ListValue { values: vec![number(1.0), bad.clone()] }));
            for (bad, key) in [(bad.clone(), "b"), (within(bad), "bad"), (list, "b")] {
                let given = structure([("a", text("kept")), ("b", bad.clone()), ("c", number(2.0))]);
                assert_eq!(object(&given), Err(Misfit::from(why).under(key)), "{bad:?}");
                let kept = r#"{"a":"kept","c":2}"#.to_owned();
                assert_eq!(text_of_what_fits(&given), (Some(kept), 1), "{bad:?}");
                assert_eq!(
                    text_of_what_fits(&structure([("first", bad.clone()), ("second", number(2.0))])),
                    (Some(r#"{"second":2}"#.to_owned()), 1)
                );
                assert_eq!(object_of_what_fits(&structure([("only", bad)])), (None, 1));
            }
        }
        assert_eq!(object(&structure([("a\tb", number(1.0))])), Err(Misfit::from(NotJson::Control).under("a\tb")));
        assert_eq!(object_of_what_fits(&structure([("a\tb", number(1.0))])), (None, 1));
    }
}
