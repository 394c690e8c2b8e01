//! Metadata: keys with typed values, in the order of the file.

use super::GgufError;

/// A value of a key.
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of one type; numbers lie as densely as in the file.
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

impl Value {
    /// An integer of any width.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Value::U8(n) => Some(n.into()),
            Value::I8(n) => Some(n.into()),
            Value::U16(n) => Some(n.into()),
            Value::I16(n) => Some(n.into()),
            Value::U32(n) => Some(n.into()),
            Value::I32(n) => Some(n.into()),
            Value::U64(n) => n.try_into().ok(),
            Value::I64(n) => Some(n),
            _ => None,
        }
    }

    /// An integer of any width that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::U64(n) => Some(*n),
            other => other.as_i64()?.try_into().ok(),
        }
    }

    /// A float of either width, or an integer.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(x) => Some(x.into()),
            Value::F64(x) => Some(x),
            ref other => other.as_i64().map(|n| n as f64),
        }
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        if let Value::Bool(value) = self { Some(*value) } else { None }
    }

    /// A text.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::String(text) = self { Some(text) } else { None }
    }

    /// Texts.
    pub fn as_strings(&self) -> Option<&[String]> {
        if let Value::Array(Array::String(texts)) = self { Some(texts) } else { None }
    }

    /// 32-bit floats.
    pub fn as_f32s(&self) -> Option<&[f32]> {
        if let Value::Array(Array::F32(floats)) = self { Some(floats) } else { None }
    }

    /// 32-bit integers, signed or not.
    pub fn as_i32s(&self) -> Option<Vec<i32>> {
        match self {
            Value::Array(Array::I32(n)) => Some(n.clone()),
            Value::Array(Array::U32(n)) => Some(n.iter().map(|&n| n as i32).collect()),
            _ => None,
        }
    }

    /// The value in short, for messages: long texts and arrays are cut.
    pub fn brief(&self) -> String {
        let text = match self {
            Value::Array(array) => return format!("an array of {}", array.len()),
            other => format!("{other:?}"),
        };
        if text.chars().count() <= 60 {
            text
        } else {
            text.chars().take(57).collect::<String>() + "..."
        }
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(v) => v.len(),
            Array::I8(v) => v.len(),
            Array::U16(v) => v.len(),
            Array::I16(v) => v.len(),
            Array::U32(v) => v.len(),
            Array::I32(v) => v.len(),
            Array::F32(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::String(v) => v.len(),
            Array::Array(v) => v.len(),
            Array::U64(v) => v.len(),
            Array::I64(v) => v.len(),
            Array::F64(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

macro_rules! from {
    ($($from:ty => $value:ident, $array:ident;)*) => {$(
        impl From<$from> for Value {
            fn from(value: $from) -> Self { Value::$value(value) }
        }
        impl From<Vec<$from>> for Value {
            fn from(values: Vec<$from>) -> Self { Value::Array(Array::$array(values)) }
        }
    )*};
}
from! {
    u8 => U8, U8; i8 => I8, I8; u16 => U16, U16; i16 => I16, I16; u32 => U32, U32; i32 => I32, I32;
    f32 => F32, F32; bool => Bool, Bool; String => String, String; u64 => U64, U64;
    i64 => I64, I64; f64 => F64, F64;
}
impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::String(text.to_owned())
    }
}

/// All metadata of a file. A missing key and a wrong type are errors that name the key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
}

impl Metadata {
    /// Every key with its value, in the order of the file.
    pub fn entries(&self) -> &[(String, Value)] {
        &self.entries
    }

    /// Adds a key, or replaces its value.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.entries.iter_mut().find(|(k, _)| *k == key) {
            Some(entry) => entry.1 = value,
            None => self.entries.push((key, value)),
        }
    }

    /// Appends a key that is known to be new.
    pub(super) fn push(&mut self, key: String, value: Value) {
        self.entries.push((key, value));
    }

    /// Sets every key of `other`.
    pub fn extend(&mut self, other: Metadata) {
        for (key, value) in other.entries {
            self.set(key, value);
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(k, _)| k == key).map(|(_, value)| value)
    }

    fn read<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || GgufError::key(key, wanted, value.brief());
        read(value).ok_or_else(wrong).map(Some)
    }

    fn need<T>(key: &str, wanted: &str, found: Option<T>) -> Result<T, GgufError> {
        found.ok_or_else(|| GgufError::key(key, wanted, "no such key"))
    }

    /// An integer that is not negative, if the key is there.
    pub fn find_u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.read(key, "an integer of at least 0", Value::as_u64)
    }

    /// An integer that is not negative.
    pub fn u64(&self, key: &str) -> Result<u64, GgufError> {
        Self::need(key, "an integer of at least 0", self.find_u64(key)?)
    }

    /// A finite number, if the key is there.
    pub fn find_f64(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.read(key, "a finite number", |value| value.as_f64().filter(|x| x.is_finite()))
    }

    /// A number.
    pub fn f64(&self, key: &str) -> Result<f64, GgufError> {
        Self::need(key, "a number", self.find_f64(key)?)
    }

    /// A boolean, if the key is there.
    pub fn find_bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// A text, if the key is there.
    pub fn find_str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.read(key, "a text", Value::as_str)
    }

    /// A text.
    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        Self::need(key, "a text", self.find_str(key)?)
    }

    /// Texts.
    pub fn strings(&self, key: &str) -> Result<&[String], GgufError> {
        let wanted = "an array of texts";
        Self::need(key, wanted, self.read(key, wanted, Value::as_strings)?)
    }

    /// 32-bit floats, if the key is there.
    pub fn find_f32s(&self, key: &str) -> Result<Option<&[f32]>, GgufError> {
        self.read(key, "an array of 32-bit floats", Value::as_f32s)
    }

    /// 32-bit integers, if the key is there.
    pub fn find_i32s(&self, key: &str) -> Result<Option<Vec<i32>>, GgufError> {
        self.read(key, "an array of 32-bit integers", Value::as_i32s)
    }
}
