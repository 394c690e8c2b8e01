//! numpy's scalars, which get into hyper-parameters unnoticed; arrays stay uninterpreted.

use super::error::{Result, shown, unsupported};
use super::heap::Heap;
use super::value::{Id, Node, Opaque};

/// Longest name of a dtype, as `f8`, `U100`, `V16`: each scalar of it is read against the name.
const MAX_CODE: usize = 32;

impl Heap {
    /// `numpy.dtype("f4", ..)`.
    pub fn numpy_dtype(&mut self, code: Id) -> Result<Node> {
        let code = self.text(code)?;
        if code.len() > MAX_CODE {
            return Err(unsupported(format!("the numpy dtype `{}`", shown(code))));
        }
        let code: Box<str> = code.into();
        self.charge(code.len())?;
        let big_endian = code.starts_with('>');
        Ok(Node::NumpyDtype { code, big_endian })
    }

    /// The state of a dtype: `(3, "<", ..)`, whose second part is the order of bytes.
    pub fn numpy_dtype_state(&mut self, dtype: Id, state: Id) -> Result<()> {
        let state = self.ids(state)?;
        let Some(&order) = state.get(1) else {
            return Err(self.damaged("a numpy dtype without an order of bytes"));
        };
        let big = self.text(order)? == ">";
        if let Node::NumpyDtype { big_endian, .. } = &mut self.nodes[dtype as usize] {
            *big_endian |= big;
        }
        Ok(())
    }

    /// `numpy.core.multiarray.scalar(dtype, bytes)` as a number, bool or text; other dtypes stay
    /// uninterpreted.
    pub fn numpy_scalar(&mut self, dtype: Id, bytes: Id, args: Id) -> Result<Node> {
        let (Node::NumpyDtype { code, big_endian }, Node::Bytes(bytes)) =
            (self.node(dtype), self.node(bytes))
        else {
            return Err(self.damaged("a numpy scalar without dtype or bytes"));
        };
        if *big_endian {
            return Err(unsupported("a big-endian numpy scalar"));
        }
        let length = bytes.len();
        let node = match scalar(code.trim_start_matches(['<', '|', '=']), bytes) {
            Some(node) => node,
            None => Node::Opaque(Box::new(Opaque { class: "numpy.generic", args, state: None })),
        };
        self.charge(length)?;
        Ok(node)
    }
}

/// The value of a little-endian scalar; `None`: another dtype, or a wrong number of bytes.
fn scalar(code: &str, bytes: &[u8]) -> Option<Node> {
    let wide = || {
        let mut wide = [0; 8];
        wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(u64::from_le_bytes(wide))
    };
    let width: usize = code.get(1..)?.parse().ok()?;
    if code.starts_with('U') {
        if width.checked_mul(4) != Some(bytes.len()) {
            return None;
        }
        let letter = |four: &[u8]| char::from_u32(u32::from_le_bytes(four.try_into().ok()?));
        let text: Option<String> = bytes.chunks_exact(4).map(letter).collect();
        return Some(Node::Text(text?.trim_end_matches('\0').into()));
    }
    if width != bytes.len() {
        return None;
    }
    Some(match code {
        "b1" => Node::Bool(bytes[0] != 0),
        "i1" => Node::Int(i64::from(wide()? as u8 as i8)),
        "i2" => Node::Int(i64::from(wide()? as u16 as i16)),
        "i4" => Node::Int(i64::from(wide()? as u32 as i32)),
        "i8" => Node::Int(wide()? as i64),
        "u1" | "u2" | "u4" | "u8" => match i64::try_from(wide()?) {
            Ok(small) => Node::Int(small),
            Err(_) => Node::BigInt([bytes, &[0]].concat().into()),
        },
        "f2" => Node::Float(half(wide()? as u16)),
        "f4" => Node::Float(f64::from(f32::from_bits(wide()? as u32))),
        "f8" => Node::Float(f64::from_bits(wide()?)),
        _ => return None,
    })
}

/// A 16-bit float (IEEE 754) as a 64-bit one, exactly.
fn half(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023) / 1024.0);
    let size = match exponent {
        0 => fraction * 2f64.powi(-14),
        31 if fraction > 0.0 => f64::NAN,
        31 => f64::INFINITY,
        _ => (1.0 + fraction) * 2f64.powi(exponent - 15),
    };
    if bits >> 15 == 1 { -size } else { size }
}
