//! The pickle machine: opcodes of protocols 2 to 5 that build values.
//!
//! Pickle is a program for a stack machine. This one has the same stack and memo as Python's, and
//! no way to call anything: what `REDUCE`, `NEWOBJ` and `BUILD` mean is decided by the short list in
//! `globals.rs`, and names outside of it are only written down. Parsing goes on after such a name,
//! so that one error can tell all of them.
//!
//! Memory: a node is 32 bytes and needs at least one byte of pickle; the stack and the memo grow by
//! 4 to 8 bytes for each byte of pickle at most; whoever copies a value pays with [`Heap::charge`].
//! A pickle has at most [`MAX_PICKLE`] bytes and 4 million values.

use super::error::{Result, TorchFileError, damaged, unsupported};
use super::heap::{EMPTY_TUPLE, FALSE, Heap, NONE, Storage, TRUE};
use super::value::{Id, Node, Tree};

/// Longest pickle. That of a model of 10,000 tensors has 2 MB.
pub(super) const MAX_PICKLE: usize = 256 << 20;

/// Longest name of a module or class.
const MAX_NAME: usize = 512;

/// What a pickle holds.
pub(super) struct Parsed {
    pub tree: Tree,
    pub storages: Vec<Storage>,
}

/// Parses one pickle at the beginning of `bytes`, which are at `base` in the file.
///
/// # Errors
/// [`TorchFileError::Refused`] before any other finding.
pub(super) fn parse(bytes: &[u8], base: u64) -> Result<Parsed> {
    let bytes = &bytes[..bytes.len().min(MAX_PICKLE)];
    let mut machine = Machine {
        bytes,
        at: 0,
        base,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
        heap: Heap::new(),
    };
    let root = machine.run();
    machine.heap.refusals()?;
    let tree = Tree { nodes: machine.heap.nodes, root: root?, pickle_bytes: machine.at };
    Ok(Parsed { tree, storages: machine.heap.storages })
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where `bytes` begin in the file.
    base: u64,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<u32>,
    memo: Vec<Option<Id>>,
    heap: Heap,
}

/// Opcodes of protocols 0 and 1, whose arguments are text, and extensions that PyTorch never writes.
const REFUSED: [(u8, &str); 14] = [
    (b'I', "INT (protocol 0)"),
    (b'L', "LONG (protocol 0)"),
    (b'F', "FLOAT (protocol 0)"),
    (b'S', "STRING (protocol 0)"),
    (b'V', "UNICODE (protocol 0)"),
    (b'P', "PERSID (protocol 0)"),
    (b'p', "PUT (protocol 0)"),
    (b'g', "GET (protocol 0)"),
    (b'o', "OBJ (protocol 1)"),
    (0x82, "EXT1"),
    (0x83, "EXT2"),
    (0x84, "EXT4"),
    (0x97, "NEXT_BUFFER"),
    (0x98, "READONLY_BUFFER"),
];

impl<'a> Machine<'a> {
    /// Runs to the end; the one value that is left.
    fn run(&mut self) -> Result<Id> {
        loop {
            self.heap.begin(self.base + self.at as u64, self.at);
            let op = self.byte()?;
            if op == b'.' {
                return self.pop();
            }
            let known = self.scalar(op)? || self.container(op)? || self.memory(op)?;
            if !known && !self.object(op)? {
                let name = REFUSED.iter().find(|(code, _)| *code == op).map(|(_, name)| *name);
                return Err(match name {
                    Some(name) => unsupported(format!("the pickle opcode {name}")),
                    None => self.damaged(format!("0x{op:02x} is no pickle opcode")),
                });
            }
        }
    }

    fn damaged(&self, reason: impl Into<String>) -> TorchFileError {
        self.heap.damaged(reason)
    }

    // ------------------------------------------------------------------ input

    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let end = usize::try_from(n).ok().and_then(|n| self.at.checked_add(n));
        match end.and_then(|end| self.bytes.get(self.at..end)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None if self.bytes.len() == MAX_PICKLE => {
                Err(TorchFileError::Limit { what: "bytes of pickle", limit: MAX_PICKLE as u64 })
            }
            None => {
                let left = self.bytes.len() - self.at;
                Err(self.damaged(format!("expected {n} more bytes of pickle, got {left}")))
            }
        }
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    /// A little-endian number of n bytes.
    fn number(&mut self, n: u64) -> Result<u64> {
        let bytes = self.take(n)?;
        Ok(bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
    }

    /// Bytes whose length stands in front of them, as a number of `width` bytes.
    fn counted(&mut self, width: u64) -> Result<&'a [u8]> {
        let n = self.number(width)?;
        self.take(n)
    }

    fn text(&mut self, width: u64) -> Result<Node> {
        let bytes = self.counted(width)?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.damaged("a text is no UTF-8"))?;
        Ok(Node::Text(text.into()))
    }

    /// A text of Python 2: bytes, which nearly always are ASCII.
    fn old_text(&mut self, width: u64) -> Result<Node> {
        let bytes = self.counted(width)?;
        Ok(match std::str::from_utf8(bytes) {
            Ok(text) => Node::Text(text.into()),
            Err(_) => Node::Bytes(bytes.into()),
        })
    }

    /// Up to the end of the line, which is left out.
    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().take(MAX_NAME).position(|&byte| byte == b'\n');
        let end = end.ok_or_else(|| self.damaged("a name of a class has no end"))?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| self.damaged("a name is no UTF-8"))
    }

    // ------------------------------------------------------------------ stack

    fn push(&mut self, node: Node) -> Result<()> {
        let id = self.heap.add(node)?;
        self.stack.push(id);
        Ok(())
    }

    /// Height below which nothing may be taken: the last mark.
    fn floor(&self) -> usize {
        self.marks.last().map_or(0, |&mark| mark as usize)
    }

    fn pop(&mut self) -> Result<Id> {
        let empty = self.stack.len() <= self.floor();
        let id = if empty { None } else { self.stack.pop() };
        id.ok_or_else(|| self.damaged("the stack is empty"))
    }

    fn top(&self) -> Result<Id> {
        let id = self.stack[self.floor()..].last();
        id.copied().ok_or_else(|| self.damaged("the stack is empty"))
    }

    /// Everything above the last mark, which is taken too.
    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(|| self.damaged("there is no mark"))?;
        Ok(self.stack.split_off(mark as usize))
    }

    fn tuple(&mut self, n: usize) -> Result<()> {
        let start = self.stack.len().checked_sub(n).filter(|&start| start >= self.floor());
        let start = start.ok_or_else(|| self.damaged("the stack is empty"))?;
        let items = self.stack.split_off(start).into();
        self.push(Node::Tuple(items))
    }

    // ---------------------------------------------------------------- opcodes

    /// Numbers and texts.
    fn scalar(&mut self, op: u8) -> Result<bool> {
        let node = match op {
            b'N' => return self.known(NONE),
            0x88 => return self.known(TRUE),
            0x89 => return self.known(FALSE),
            b'J' => Node::Int(i64::from(self.number(4)? as u32 as i32)),
            b'K' => Node::Int(self.number(1)? as i64),
            b'M' => Node::Int(self.number(2)? as i64),
            0x8a => long(self.counted(1)?),
            0x8b => long(self.counted(4)?),
            b'G' => Node::Float(f64::from_bits(self.number(8)?.swap_bytes())),
            b'X' => self.text(4)?,
            0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            b'T' => self.old_text(4)?,
            b'U' => self.old_text(1)?,
            b'B' => Node::Bytes(self.counted(4)?.into()),
            b'C' => Node::Bytes(self.counted(1)?.into()),
            0x8e | 0x96 => Node::Bytes(self.counted(8)?.into()),
            _ => return Ok(false),
        };
        self.push(node).map(|()| true)
    }

    fn known(&mut self, id: Id) -> Result<bool> {
        self.stack.push(id);
        Ok(true)
    }

    /// Lists, tuples, dicts and sets.
    fn container(&mut self, op: u8) -> Result<bool> {
        match op {
            b')' => return self.known(EMPTY_TUPLE),
            b']' => self.push(Node::List(Vec::new()))?,
            b'}' => self.push(Node::Dict(Vec::new()))?,
            0x8f => self.push(Node::Set(Vec::new()))?,
            0x85..=0x87 => self.tuple(op as usize - 0x84)?,
            b't' | b'l' | 0x91 => {
                let items = self.pop_mark()?;
                self.push(match op {
                    b't' => Node::Tuple(items.into()),
                    b'l' => Node::List(items),
                    _ => Node::Set(items),
                })?;
            }
            b'd' => {
                let items = self.pop_mark()?;
                let dict = self.heap.add(Node::Dict(Vec::new()))?;
                self.heap.set_items(dict, &items)?;
                self.stack.push(dict);
            }
            b'a' => {
                let item = self.pop()?;
                self.heap.append(self.top()?, &[item])?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.heap.set_items(self.top()?, &[key, value])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_mark()?;
                self.heap.append(self.top()?, &items)?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.heap.set_items(self.top()?, &items)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The stack, the memo and the frame.
    fn memory(&mut self, op: u8) -> Result<bool> {
        match op {
            0x80 => match self.number(1)? {
                2..=5 => {}
                got => return Err(unsupported(format!("pickle protocol {got}"))),
            },
            0x95 => {
                let (n, left) = (self.number(8)?, self.bytes.len() - self.at);
                if n > left as u64 {
                    let told = format!("expected a frame of {n} bytes of pickle, got {left}");
                    return Err(self.damaged(told));
                }
            }
            b'(' => self.marks.push(self.stack.len() as u32),
            b'0' if self.stack.len() == self.floor() => {
                self.pop_mark()?;
            }
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.pop_mark()?;
            }
            b'2' => self.stack.push(self.top()?),
            b'q' | b'r' => {
                let index = self.number(if op == b'q' { 1 } else { 4 })? as usize;
                self.put(index)?;
            }
            0x94 => self.put(self.memo.len())?,
            b'h' | b'j' => {
                let index = self.number(if op == b'h' { 1 } else { 4 })? as usize;
                let id = self.memo.get(index).copied().flatten();
                let id = id.ok_or_else(|| self.damaged(format!("nothing is memo {index}")))?;
                self.stack.push(id);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Remembers the top of the stack. Python counts up, so an index is below the bytes read.
    fn put(&mut self, index: usize) -> Result<()> {
        if index > self.at {
            return Err(self.damaged(format!("memo {index} comes too early")));
        }
        if index >= self.memo.len() {
            self.memo.resize(index + 1, None);
        }
        self.memo[index] = Some(self.top()?);
        Ok(())
    }

    /// Functions, classes, and what Python would call.
    fn object(&mut self, op: u8) -> Result<bool> {
        let id = match op {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.heap.global(module, name)?
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                self.heap.stack_global(module, name)?
            }
            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                let args = Node::Tuple(self.pop_mark()?.into());
                let (class, args) = (self.heap.global(module, name)?, self.heap.add(args)?);
                self.heap.reduce(class, args)?
            }
            b'R' | 0x81 => {
                let (args, function) = (self.pop()?, self.pop()?);
                self.heap.reduce(function, args)?
            }
            0x92 => {
                let (named, args, class) = (self.pop()?, self.pop()?, self.pop()?);
                self.heap.expect_no_arguments(named)?;
                self.heap.reduce(class, args)?
            }
            b'b' => {
                let state = self.pop()?;
                self.heap.build(self.top()?, state)?;
                return Ok(true);
            }
            b'Q' => {
                let id = self.pop()?;
                self.heap.persistent(id)?
            }
            _ => return Ok(false),
        };
        self.stack.push(id);
        Ok(true)
    }
}

/// A little-endian integer in two's complement of any length.
fn long(bytes: &[u8]) -> Node {
    if bytes.len() > 8 {
        return Node::BigInt(bytes.into());
    }
    let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
    let mut wide = if negative { [0xff; 8] } else { [0; 8] };
    wide[..bytes.len()].copy_from_slice(bytes);
    Node::Int(i64::from_le_bytes(wide))
}

/// A pickle that is only a number, a list or a dict: the small ones of the old format.
pub(super) fn parse_plain(bytes: &[u8], base: u64) -> Result<Tree> {
    let Parsed { tree, storages } = parse(bytes, base)?;
    if storages.is_empty() { Ok(tree) } else { Err(damaged(base, "a storage where none belongs")) }
}
