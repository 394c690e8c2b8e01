//! Where things that can be made again are kept from run to run.

use std::path::PathBuf;

/// `$XDG_CACHE_HOME/tinyllama`, or `~/.cache/tinyllama`, made if it is not there; `None` where the system names no
/// place.
pub fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    let folder = folder.join("tinyllama");
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder)
}
