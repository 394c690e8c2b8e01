//! The store by which ranks meet and watch each other: libtorch's, with this run's keys apart from others'.

use super::world::{Address, World};
use crate::error::WithHint;
use crate::ffi::TcpStore;
use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Keys and values that all ranks see. Calls may come from any thread; none waits for another.
pub struct Store {
    tcp: TcpStore,
    prefix: String,
}

impl Store {
    /// The store of a job: served by this process, or the one at `world.master`, waited for up to `timeout`.
    ///
    /// # Errors
    /// The port is taken; nobody answers.
    pub fn open(world: &World, timeout: Duration) -> Result<Self> {
        match world.serves() {
            true => Self::serve(world.master.port, &world.prefix, timeout),
            false => Self::connect(&world.master, &world.prefix, timeout),
        }
    }

    /// A store in this process at `port` (0: any free one), for the ranks whose keys begin with `prefix`.
    ///
    /// # Errors
    /// The port is taken.
    pub fn serve(port: u16, prefix: &str, timeout: Duration) -> Result<Self> {
        let tcp = TcpStore::serve(port, timeout)
            .hint("another program has this port; choose another MASTER_PORT on all nodes")?;
        Ok(Self { tcp, prefix: prefix.to_owned() })
    }

    /// The store that another process serves, waited for up to `timeout`.
    ///
    /// # Errors
    /// Nobody answers in that time.
    pub fn connect(master: &Address, prefix: &str, timeout: Duration) -> Result<Self> {
        let tcp = TcpStore::connect(&master.host, master.port, timeout).hint(
            "is rank 0 (or its launcher) running there, and may this node reach it? Check MASTER_ADDR, MASTER_PORT and \
             the firewall; `distributed.rendezvous_timeout` is how long to wait",
        )?;
        Ok(Self { tcp, prefix: prefix.to_owned() })
    }

    /// libtorch's store, whose keys begin with [`Store::key`]; process groups are made over it.
    pub fn tcp(&self) -> &TcpStore {
        &self.tcp
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.tcp.port()
    }

    /// A key as the store has it.
    pub fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Sets a key.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.tcp.set(&self.key(key), value)
    }

    /// Waits for a key.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        self.tcp.get(&self.key(key))
    }

    /// Whether a key is set.
    pub fn check(&self, key: &str) -> Result<bool> {
        self.tcp.check(&self.key(key))
    }

    /// Adds to a number, 0 where there was none; the sum.
    pub fn add(&self, key: &str, value: i64) -> Result<i64> {
        self.tcp.add(&self.key(key), value)
    }

    /// Sets a key to the JSON of `value`.
    pub fn set_json(&self, key: &str, value: &impl Serialize) -> Result<()> {
        self.set(key, &serde_json::to_vec(value)?)
    }

    /// The JSON of a key, where it is set. Does not wait.
    pub fn json<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        if !self.check(key)? {
            return Ok(None);
        }
        let value = self.get(key)?;
        Ok(Some(serde_json::from_slice(&value).with_context(|| format!("the store's `{key}`"))?))
    }

    /// Sets a key that is not there to the JSON of `value`; what it holds afterwards.
    pub fn set_first<T: Serialize + DeserializeOwned>(&self, key: &str, value: &T) -> Result<T> {
        let json = serde_json::to_vec(value)?;
        let held = self.tcp.compare_set(&self.key(key), &[], &json)?;
        serde_json::from_slice(&held).with_context(|| format!("the store's `{key}`"))
    }
}
