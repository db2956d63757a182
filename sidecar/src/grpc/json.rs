//! The API's structures as compact JSON text, written while they are walked: every claim and mark may bring one, duplicates too.

use prost_types::{Struct, Value, value::Kind};
use serde::Serialize;

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

/// The JSON object of an API structure, its keys in their order; None: it has none. Whole numbers are written without a fraction.
pub(super) fn object(structure: &Struct) -> Result<Option<String>, NotJson> {
    let mut json = Json::default();
    json.object(structure)?;
    Ok((!structure.fields.is_empty()).then(|| json.text()))
}

/// The same without the keys whose values JSON or the ledgers cannot hold, and how many those are.
pub(super) fn object_of_what_fits(structure: &Struct) -> (Option<String>, usize) {
    let (mut json, mut left_out) = (Json::default(), 0);
    json.0.push(b'{');
    for (key, value) in &structure.fields {
        let before = json.0.len();
        if json.field(key, value).is_err() {
            json.0.truncate(before);
            left_out += 1;
        }
    }
    json.0.push(b'}');
    ((left_out < structure.fields.len()).then(|| json.text()), left_out)
}

/// JSON that is being written.
#[derive(Default)]
struct Json(Vec<u8>);

impl Json {
    fn text(self) -> String {
        String::from_utf8(self.0).expect("JSON is written from strings")
    }

    fn object(&mut self, structure: &Struct) -> Result<(), NotJson> {
        self.0.push(b'{');
        for (key, value) in &structure.fields {
            self.field(key, value)?;
        }
        self.0.push(b'}');
        Ok(())
    }

    /// A key with its value, after a comma where others stand before it.
    fn field(&mut self, key: &str, value: &Value) -> Result<(), NotJson> {
        if self.0.last() != Some(&b'{') {
            self.0.push(b',');
        }
        self.string(key)?;
        self.0.push(b':');
        self.value(value)
    }

    fn value(&mut self, value: &Value) -> Result<(), NotJson> {
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
            Kind::NumberValue(value) if value.is_finite() => self.plain(value),
            Kind::NumberValue(_) => return Err(NotJson::Number),
            Kind::StringValue(value) => self.string(value)?,
            Kind::ListValue(list) => {
                self.0.push(b'[');
                for (place, value) in list.values.iter().enumerate() {
                    if place > 0 {
                        self.0.push(b',');
                    }
                    self.value(value)?;
                }
                self.0.push(b']');
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
        serde_json::to_writer(&mut self.0, value).expect("strings and finite numbers are JSON, and memory takes them");
    }
}

#[cfg(test)]
mod tests {
    use prost_types::ListValue;
    use serde_json::json;

    use super::*;

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
        let written = object(&given).unwrap().unwrap();
        let expected = json!({
            "": 1e300, "a": [1, -0.5, [], ""], "b": true,
            "c": {"x\"\\": "a \"quote\" \\ and ü 😀", "y": null}, "d": {},
        });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&written).unwrap(), expected);
        // Compact, in the order of the keys.
        assert_eq!(written, expected.to_string());
        assert_eq!(object_of_what_fits(&given), (Some(written), 0));
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
            assert_eq!(object(&structure([("n", number(given))])).unwrap().unwrap(), format!("{{\"n\":{written}}}"));
        }
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
            for bad in [bad.clone(), within(bad), list] {
                let given = structure([("a", text("kept")), ("b", bad.clone()), ("c", number(2.0))]);
                assert_eq!(object(&given), Err(why), "{bad:?}");
                let kept = r#"{"a":"kept","c":2}"#.to_owned();
                assert_eq!(object_of_what_fits(&given), (Some(kept), 1), "{bad:?}");
                assert_eq!(
                    object_of_what_fits(&structure([("first", bad.clone()), ("second", number(2.0))])),
                    (Some(r#"{"second":2}"#.to_owned()), 1)
                );
                assert_eq!(object_of_what_fits(&structure([("only", bad)])), (None, 1));
            }
        }
        assert_eq!(object(&structure([("a\tb", number(1.0))])), Err(NotJson::Control));
        assert_eq!(object_of_what_fits(&structure([("a\tb", number(1.0))])), (None, 1));
    }
}
