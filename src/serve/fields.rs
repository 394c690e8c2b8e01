//! The fields of a request's JSON object, each with its expectation.

use super::error::{ApiError, shortened};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

/// Fields that have not been read, and the names of those that may be there.
pub struct Fields {
    rest: Map<String, Value>,
    known: BTreeSet<&'static str>,
    /// Where the object is in the request: empty, or such as `messages[0].`.
    within: String,
}

/// `expected .., got ..`.
pub fn expected(what: impl std::fmt::Display, got: &Value) -> String {
    let kind = match got {
        Value::Null => "null",
        Value::Bool(_) => "the boolean",
        Value::Number(_) => "the number",
        Value::String(_) => "the string",
        Value::Array(_) => "the list",
        Value::Object(_) => "the object",
    };
    match got {
        Value::Null => format!("expected {what}, got null"),
        // A list or object may be large: what it is says enough.
        Value::Array(items) => format!("expected {what}, got a list of {} items", items.len()),
        Value::Object(map) => {
            let keys: Vec<&str> = map.keys().map(String::as_str).take(4).collect();
            let keys = shortened(&keys.join(", "));
            format!("expected {what}, got an object with the keys [{keys}]")
        }
        _ => format!("expected {what}, got {kind} {}", shortened(&got.to_string())),
    }
}

impl Fields {
    /// The fields of a request.
    pub fn new(object: Map<String, Value>) -> Self {
        Self { rest: object, known: BTreeSet::new(), within: String::new() }
    }

    /// The fields of an object at `path` in a request.
    ///
    /// # Errors
    /// Anything but an object.
    pub fn within(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(rest) => {
                Ok(Self { rest, known: BTreeSet::new(), within: format!("{path}.") })
            }
            other => Err(ApiError::field(path, expected("an object", &other))),
        }
    }

    /// The name of a field in errors.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.within)
    }

    /// A field's value; `None` where it is missing or null.
    pub fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.insert(name);
        self.rest.remove(name).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &mut self,
        name: &'static str,
        what: impl std::fmt::Display,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let wrong = || ApiError::field(&self.path(name), expected(what, &value));
        read(&value).map(Some).ok_or_else(wrong)
    }

    /// A string.
    pub fn string(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::field(&self.path(name), expected("a string", &other))),
        }
    }

    /// `true` or `false`; `false` where it is missing.
    pub fn flag(&mut self, name: &'static str) -> Result<bool, ApiError> {
        Ok(self.typed(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A number in a range.
    pub fn number(
        &mut self,
        name: &'static str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, ApiError> {
        let what = format!("a number from {} to {}", range.start(), range.end());
        self.typed(name, what, |value| value.as_f64().filter(|x| range.contains(x)))
    }

    /// A whole number in a range; `why` says where its limit is from, such as ` (--max-new-tokens)`.
    pub fn integer(
        &mut self,
        name: &'static str,
        range: RangeInclusive<usize>,
        why: &str,
    ) -> Result<Option<usize>, ApiError> {
        let what = format!("a whole number from {} to {}{why}", range.start(), range.end());
        self.typed(name, what, |value| {
            let number = usize::try_from(value.as_u64()?).ok()?;
            range.contains(&number).then_some(number)
        })
    }

    /// Any whole number of 64 bits; a negative one counts by its bits.
    pub fn seed(&mut self, name: &'static str) -> Result<Option<u64>, ApiError> {
        self.typed(name, "a whole number of 64 bits", |value| {
            value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64))
        })
    }

    /// Fields that say nothing here about the answer.
    pub fn ignore(&mut self, names: &[&'static str]) {
        for name in names {
            self.take(name);
        }
    }

    /// A field that must be missing or, if `allows` it, say what is done anyway.
    pub fn refuse(
        &mut self,
        name: &'static str,
        what: &str,
        allows: impl Fn(&Value) -> bool,
    ) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !allows(&value) => Err(ApiError::unsupported(&self.path(name), what)),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// A field that nobody asked for: a mistyped name must not be passed over.
    pub fn finish(self) -> Result<(), ApiError> {
        let Some(name) = self.rest.keys().next() else { return Ok(()) };
        let distance = |known: &&str| strsim::damerau_levenshtein(known, name);
        // Of a name as long as a body may be, no distance is taken.
        let known = self.known.iter().filter(|_| name.len() < 64);
        let near = known.min_by_key(|known| distance(known)).filter(|known| distance(known) <= 3);
        let hint = near.map_or(String::new(), |known| format!("; did you mean `{known}`?"));
        let path = shortened(&self.path(name));
        let error = ApiError::field(&path, format_args!("there is no such field{hint}"));
        Err(error.with_code("unknown_parameter"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::within("x", value).unwrap()
    }

    fn message<T>(result: Result<T, ApiError>) -> String {
        result.err().unwrap().message
    }

    #[test]
    fn wrong_types_say_what_was_expected_and_what_came() {
        let mut f =
            fields(json!({"a": "1", "b": 1, "c": [1, 2], "d": {"k": 1}, "e": -1, "f": 1.5}));
        assert_eq!(
            message(f.number("a", 0.0..=2.0)),
            "`x.a`: expected a number from 0 to 2, got the string \"1\""
        );
        assert_eq!(message(f.string("b")), "`x.b`: expected a string, got the number 1");
        assert_eq!(message(f.flag("c")), "`x.c`: expected true or false, got a list of 2 items");
        assert_eq!(
            message(f.string("d")),
            "`x.d`: expected a string, got an object with the keys [k]"
        );
        let want = "`x.e`: expected a whole number from 1 to 9 (why), got the number -1";
        assert_eq!(message(f.integer("e", 1..=9, " (why)")), want);
        assert!(message(f.integer("f", 1..=9, "")).ends_with("got the number 1.5"));
    }

    #[test]
    fn missing_and_null_are_the_same() {
        let mut f = fields(json!({"a": null}));
        assert_eq!(f.string("a").unwrap(), None);
        assert_eq!(f.number("b", 0.0..=1.0).unwrap(), None);
        assert!(!f.flag("c").unwrap());
        assert!(f.finish().is_ok());
    }

    #[test]
    fn numbers_out_of_range_and_huge_ones_are_refused() {
        let mut f = fields(json!({"a": 1e300, "b": 18446744073709551615u64, "c": -1, "d": 2.5}));
        assert!(f.number("a", 0.0..=2.0).is_err());
        assert!(f.integer("b", 0..=1000, "").is_err());
        assert_eq!(f.seed("c").unwrap(), Some(u64::MAX));
        assert!(f.seed("d").is_err());
    }

    #[test]
    fn an_unknown_field_is_told_with_its_neighbour() {
        let mut f = fields(json!({"max_token": 1}));
        f.integer("max_tokens", 1..=2, "").unwrap();
        assert_eq!(
            message(f.finish()),
            "`x.max_token`: there is no such field; did you mean `max_tokens`?"
        );
        assert_eq!(
            message(fields(json!({"zzzzzz": 1})).finish()),
            "`x.zzzzzz`: there is no such field"
        );
    }

    #[test]
    fn a_field_that_asks_for_the_usual_is_no_reason_to_refuse() {
        let mut f = fields(json!({"a": [], "b": [1]}));
        let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
        assert!(f.refuse("a", "no", empty).is_ok());
        assert_eq!(
            message(f.refuse("b", "no tools", empty)),
            "`x.b`: not supported here; no tools"
        );
    }
}
