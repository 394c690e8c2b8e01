//! The store by which ranks meet and watch each other: libtorch's, with this run's keys apart from others'.

use super::world::{Address, World};
use crate::error::WithHint;
use crate::ffi::TcpStore;
use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

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
        let master = &world.master;
        let tcp = match world.serves() {
            true => TcpStore::serve(master.port, timeout)
                .with_context(|| format!("rank 0 cannot serve the store at port {}", master.port))
                .hint("another program has this port; choose another MASTER_PORT on all ranks")?,
            false => connect(master, timeout)?,
        };
        Ok(Self { tcp, prefix: world.prefix.clone() })
    }

    /// A store in this process at `port` (0: any free one), for the ranks whose keys begin with `prefix`.
    pub fn serve(port: u16, prefix: &str, timeout: Duration) -> Result<Self> {
        Ok(Self { tcp: TcpStore::serve(port, timeout)?, prefix: prefix.to_owned() })
    }

    /// A store that another process serves.
    pub fn connect(master: &Address, prefix: &str, timeout: Duration) -> Result<Self> {
        Ok(Self { tcp: connect(master, timeout)?, prefix: prefix.to_owned() })
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

/// Waits until the master answers. libtorch would wait as well, but says little about why in vain.
fn connect(master: &Address, timeout: Duration) -> Result<TcpStore> {
    let start = Instant::now();
    let mut told = Duration::from_secs(10);
    let why = loop {
        let why = match knock(master, Duration::from_secs(2)) {
            Ok(()) => {
                let left = timeout.saturating_sub(start.elapsed()).max(Duration::from_secs(5));
                return TcpStore::connect(&master.host, master.port, left)
                    .with_context(|| format!("what listens at {master} is no store of ranks"))
                    .hint("check MASTER_ADDR and MASTER_PORT; another program may have the port");
            }
            Err(e) => e,
        };
        if start.elapsed() >= timeout {
            break why;
        }
        if start.elapsed() >= told {
            eprintln!("waiting     for the store at {master}: {why}");
            told *= 3;
        }
        std::thread::sleep(Duration::from_millis(100).min(timeout / 10));
    };
    let waited = start.elapsed().as_secs_f64();
    Err(anyhow!("nobody answers at {master} after {waited:.0} s: {why}")).hint(
        "is rank 0 (or its launcher) running there, and may this node reach it? Check MASTER_ADDR, MASTER_PORT and the \
         firewall; `distributed.rendezvous_timeout` is how long to wait",
    )
}

/// Whether somebody listens.
fn knock(master: &Address, timeout: Duration) -> std::io::Result<()> {
    let mut last = std::io::Error::other("the name has no address");
    for address in (master.host.as_str(), master.port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(_) => return Ok(()),
            Err(e) => last = e,
        }
    }
    Err(last)
}
