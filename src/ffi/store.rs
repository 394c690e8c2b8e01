//! The key-value store by which ranks find each other, libtorch's own.

use super::check;
use anyhow::{Context, Result, bail};
use std::ffi::{CString, c_char, c_int, c_void};
use std::net::{TcpStream, ToSocketAddrs};
use std::ptr::null_mut;
use std::thread;
use std::time::{Duration, Instant};

unsafe extern "C" {
    fn tl_store_new(
        host: *const c_char,
        port: u16,
        serve: c_int,
        timeout_ms: i64,
        store: *mut *mut c_void,
    ) -> c_int;
    fn tl_store_free(store: *mut c_void);
    fn tl_store_port(store: *mut c_void) -> u16;
    fn tl_store_set(store: *mut c_void, key: *const c_char, data: *const u8, size: usize) -> c_int;
    fn tl_store_get(
        store: *mut c_void,
        key: *const c_char,
        data: *mut *const u8,
        size: *mut usize,
    ) -> c_int;
    fn tl_store_add(store: *mut c_void, key: *const c_char, value: i64, sum: *mut i64) -> c_int;
    fn tl_store_check(
        store: *mut c_void,
        n: c_int,
        keys: *const *const c_char,
        present: *mut c_int,
    ) -> c_int;
    fn tl_store_compare_set(
        store: *mut c_void,
        key: *const c_char,
        expected: *const u8,
        expected_size: usize,
        desired: *const u8,
        desired_size: usize,
        data: *mut *const u8,
        size: *mut usize,
    ) -> c_int;
}

pub(super) fn c_text(text: &str) -> Result<CString> {
    CString::new(text).with_context(|| format!("`{text:?}` has a zero byte in it"))
}

/// At least one millisecond: libtorch takes 0 for "for ever".
pub(super) fn milliseconds(timeout: Duration) -> i64 {
    i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX).clamp(1, 1 << 40)
}

/// A store of keys and values that one process serves over TCP (`torch.distributed.TCPStore`).
///
/// Several threads may use it at once: no call but [`Self::get`] and [`Self::wait`] waits for another rank, and those ask
/// again and again, at most 50 ms apart. The server lives as long as this and all groups made over it.
#[derive(Debug)]
pub struct TcpStore {
    store: *mut c_void,
    host: String,
    port: u16,
    timeout: Duration,
}

// SAFETY: libtorch's store locks its connection for each call.
unsafe impl Send for TcpStore {}
unsafe impl Sync for TcpStore {}

impl TcpStore {
    /// Serves a store on all interfaces of this machine at `port`, 0: any free one. `timeout`: for [`Self::get`].
    ///
    /// # Errors
    /// The port is taken.
    pub fn serve(port: u16, timeout: Duration) -> Result<Self> {
        Self::new("127.0.0.1", port, true, timeout)
            .with_context(|| format!("cannot serve the ranks' store at port {port}"))
    }

    /// A client of the store that `host` serves. It tries for `timeout`, which is also that of [`Self::get`].
    ///
    /// # Errors
    /// Nobody answers in that time.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        reach(host, port, timeout)
            .and_then(|()| Self::new(host, port, false, timeout))
            .with_context(|| {
                format!("no store of ranks answers at {host}:{port} within {timeout:?}")
            })
    }

    fn new(host: &str, port: u16, serve: bool, timeout: Duration) -> Result<Self> {
        let c_host = c_text(host)?;
        let mut store = null_mut();
        // SAFETY: the text outlives the call; on success `store` is ours.
        check(unsafe {
            tl_store_new(c_host.as_ptr(), port, serve.into(), milliseconds(timeout), &mut store)
        })?;
        // SAFETY: just made.
        let port = unsafe { tl_store_port(store) };
        Ok(Self { store, host: host.to_owned(), port, timeout })
    }

    /// For C++.
    pub(super) fn as_ptr(&self) -> *mut c_void {
        self.store
    }

    /// The port it is served at.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `host:port` as this process reaches it.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// Sets a key; when this returns, everybody sees it.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let c_key = c_text(key)?;
        // SAFETY: both outlive the call.
        check(unsafe { tl_store_set(self.store, c_key.as_ptr(), value.as_ptr(), value.len()) })
            .with_context(|| self.failed("set", key))
    }

    /// The value of a key. Waits for it up to the store's timeout.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        self.wait(&[key], self.timeout)?;
        let c_key = c_text(key)?;
        let (mut data, mut size) = (std::ptr::null(), 0);
        // SAFETY: on success `data` has `size` bytes until this thread's next call.
        check(unsafe { tl_store_get(self.store, c_key.as_ptr(), &mut data, &mut size) })
            .with_context(|| self.failed("get", key))?;
        Ok(unsafe { copied(data, size) })
    }

    /// Waits until all keys are there.
    pub fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        let mut pause = Duration::from_millis(1);
        while !self.check_all(keys)? {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "waited {timeout:?} in vain for `{}` in the store at {}",
                    keys.join("`, `"),
                    self.address()
                );
            }
            thread::sleep(pause.min(left));
            pause = (2 * pause).min(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Adds to the number that a key holds (0 where there is no key) and returns the sum.
    pub fn add(&self, key: &str, value: i64) -> Result<i64> {
        let c_key = c_text(key)?;
        let mut sum = 0;
        // SAFETY: both pointers outlive the call.
        check(unsafe { tl_store_add(self.store, c_key.as_ptr(), value, &mut sum) })
            .with_context(|| self.failed("add to", key))?;
        Ok(sum)
    }

    /// Whether a key is there. Does not wait.
    pub fn check(&self, key: &str) -> Result<bool> {
        self.check_all(&[key])
    }

    fn check_all(&self, keys: &[&str]) -> Result<bool> {
        let texts: Vec<CString> = keys.iter().map(|key| c_text(key)).collect::<Result<_>>()?;
        let pointers: Vec<*const c_char> = texts.iter().map(|key| key.as_ptr()).collect();
        let mut present = 0;
        // SAFETY: `pointers` has as many texts as said, and all outlive the call.
        check(unsafe {
            tl_store_check(self.store, pointers.len() as c_int, pointers.as_ptr(), &mut present)
        })
        .with_context(|| self.failed("look for", &keys.join("`, `")))?;
        Ok(present != 0)
    }

    /// Sets a key that holds `expected`, or that is not there where `expected` is empty. Returns what it holds then; of
    /// a key that is not there, `expected`.
    pub fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        let c_key = c_text(key)?;
        let (mut data, mut size) = (std::ptr::null(), 0);
        // SAFETY: all outlive the call; on success `data` has `size` bytes until this thread's next call.
        check(unsafe {
            tl_store_compare_set(
                self.store,
                c_key.as_ptr(),
                expected.as_ptr(),
                expected.len(),
                desired.as_ptr(),
                desired.len(),
                &mut data,
                &mut size,
            )
        })
        .with_context(|| self.failed("set", key))?;
        Ok(unsafe { copied(data, size) })
    }

    fn failed(&self, what: &str, key: &str) -> String {
        format!("cannot {what} `{key}` in the store at {}", self.address())
    }
}

impl Drop for TcpStore {
    fn drop(&mut self) {
        // SAFETY: made by `tl_store_new`, freed once.
        unsafe { tl_store_free(self.store) }
    }
}

/// Returns when somebody listens at `host:port`. libtorch's own client waits a second and more between two attempts,
/// and prints a backtrace after each.
fn reach(host: &str, port: u16, timeout: Duration) -> Result<()> {
    let end = Instant::now() + timeout;
    loop {
        let error = match attempt(host, port, end) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(error.into());
        }
        thread::sleep(left.min(Duration::from_millis(100)));
    }
}

fn attempt(host: &str, port: u16, end: Instant) -> std::io::Result<()> {
    let mut failed = std::io::Error::other("the name has no address");
    for address in (host, port).to_socket_addrs()? {
        let left = end.saturating_duration_since(Instant::now());
        let wait = left.clamp(Duration::from_millis(1), Duration::from_secs(5));
        match TcpStream::connect_timeout(&address, wait) {
            Ok(_) => return Ok(()),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// # Safety
/// `data` has `size` readable bytes, or `size` is 0.
unsafe fn copied(data: *const u8, size: usize) -> Vec<u8> {
    if size == 0 {
        return vec![];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data, size) }.to_vec()
}
