//! The values that a pickle has made so far, within bounds.

use super::error::{Result, TorchFileError, damaged, shown};
use super::globals::find;
use super::value::{Id, Node};
use std::collections::HashMap;

/// Nodes that every heap begins with.
pub(super) const NONE: Id = 0;
pub(super) const TRUE: Id = 1;
pub(super) const FALSE: Id = 2;
pub(super) const EMPTY_TUPLE: Id = 3;
pub(super) const REFUSED: Id = 4;

/// Most values of a file: 128 MB of nodes.
const MAX_NODES: usize = 4 << 20;

/// Refused names that are told.
const TOLD: usize = 8;

/// A storage that the pickle names.
pub(super) struct Storage {
    /// Its name in the file.
    pub key: Box<str>,
    /// Its bytes.
    pub bytes: u64,
    /// Bytes of an element, for the old layout's counts.
    pub element_bytes: u64,
}

/// The values made so far, and what may still be made.
pub(super) struct Heap {
    pub nodes: Vec<Node>,
    pub storages: Vec<Storage>,
    pub by_key: HashMap<Box<str>, u32>,
    refused: Vec<String>,
    refused_more: u64,
    /// Where the present opcode is, in the file.
    at: u64,
    /// Bytes of pickle read so far.
    read: usize,
    /// Bytes and items copied from existing values.
    copied: u64,
}

impl Heap {
    pub fn new() -> Self {
        let empty = Node::Tuple(Box::default());
        let nodes = vec![Node::None, Node::Bool(true), Node::Bool(false), empty, Node::Refused];
        Self {
            nodes,
            storages: Vec::new(),
            by_key: HashMap::new(),
            refused: Vec::new(),
            refused_more: 0,
            at: 0,
            read: 0,
            copied: 0,
        }
    }

    /// An opcode begins here.
    pub fn begin(&mut self, at: u64, read: usize) {
        (self.at, self.read) = (at, read);
    }

    pub fn damaged(&self, reason: impl Into<String>) -> TorchFileError {
        damaged(self.at, reason)
    }

    /// The error about refused names, if there are any.
    pub fn refusals(&mut self) -> Result<()> {
        let (names, more) = (std::mem::take(&mut self.refused), self.refused_more);
        if names.is_empty() { Ok(()) } else { Err(TorchFileError::Refused { names, more }) }
    }

    pub fn add(&mut self, node: Node) -> Result<Id> {
        if self.nodes.len() >= MAX_NODES {
            return Err(TorchFileError::Limit { what: "values", limit: MAX_NODES as u64 });
        }
        self.nodes.push(node);
        Ok((self.nodes.len() - 1) as Id)
    }

    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id as usize]
    }

    /// Pays for n bytes or items that are copied from a value, which could be done again and again
    /// with few bytes of pickle. Honest files copy each value about once.
    pub fn charge(&mut self, n: usize) -> Result<()> {
        let limit = 4 * self.read as u64 + 4096;
        self.copied += n as u64;
        if self.copied <= limit {
            return Ok(());
        }
        Err(TorchFileError::Limit { what: "bytes of copies of shared values", limit })
    }

    // ------------------------------------------------------------- containers

    /// Appends to a list or adds to a set.
    pub fn append(&mut self, list: Id, items: &[Id]) -> Result<()> {
        match &mut self.nodes[list as usize] {
            Node::List(all) | Node::Set(all) => all.extend_from_slice(items),
            Node::Refused => {}
            _ => return Err(self.damaged("items for something that is no list or set")),
        }
        Ok(())
    }

    /// Adds keys and values, which alternate, to a dict.
    pub fn set_items(&mut self, dict: Id, items: &[Id]) -> Result<()> {
        if !items.len().is_multiple_of(2) {
            return Err(self.damaged("a key without a value"));
        }
        match &mut self.nodes[dict as usize] {
            Node::Dict(all) => all.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            Node::Refused => {}
            _ => return Err(self.damaged("entries for something that is no dict")),
        }
        Ok(())
    }

    /// A copy of the ids in a list, tuple or set.
    pub fn ids(&mut self, id: Id) -> Result<Vec<Id>> {
        let ids = match self.node(id) {
            Node::List(ids) | Node::Set(ids) => ids.clone(),
            Node::Tuple(ids) => ids.to_vec(),
            _ => return Err(self.damaged("expected a list or tuple")),
        };
        self.charge(ids.len())?;
        Ok(ids)
    }

    pub fn int(&self, id: Id) -> Result<u64> {
        match self.node(id) {
            Node::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
        .ok_or_else(|| self.damaged("expected a number from 0 to 2^63"))
    }

    pub fn text(&self, id: Id) -> Result<&str> {
        match self.node(id) {
            Node::Text(text) => Ok(text),
            _ => Err(self.damaged("expected a text")),
        }
    }

    /// A function or class by its full name.
    pub fn global(&mut self, module: &str, name: &str) -> Result<Id> {
        match find(module, name) {
            Some(global) => self.add(Node::Global(global)),
            None => Ok(self.refuse(format!("{}.{}", shown(module), shown(name)))),
        }
    }

    /// The same, of two texts on the stack.
    pub fn stack_global(&mut self, module: Id, name: Id) -> Result<Id> {
        let (module, name) = (self.text(module)?, self.text(name)?);
        match find(module, name) {
            Some(global) => self.add(Node::Global(global)),
            None => Ok(self.refuse(format!("{}.{}", shown(module), shown(name)))),
        }
    }

    fn refuse(&mut self, name: String) -> Id {
        let known = self.refused.contains(&name);
        match self.refused.len() {
            _ if known => {}
            TOLD.. => self.refused_more += 1, // some of them perhaps more than once
            _ => self.refused.push(name),
        }
        REFUSED
    }
}
