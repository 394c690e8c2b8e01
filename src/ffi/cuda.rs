//! The library of CUDA code, `libtinyllama_cuda.so`: the kernels, their wrappers, NCCL (`csrc/torch_cuda`).
//!
//! It is loaded where there is a card and only there, because it brings libtorch's CUDA half, which costs every
//! process 240 MB and most of a second. Elsewhere its functions say what is missing.

use super::driver;
use crate::error::WithHint;
use anyhow::{Result, anyhow};
use libloading::Library;
use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

const NAME: &str = "libtinyllama_cuda.so";

/// Set where something asked for the library; why not, where it cannot be loaded.
static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();

unsafe extern "C" {
    fn tl_set_last_error(text: *const c_char, length: usize);
}

/// Before `main`, as the loader does with libraries that a program is linked with: libtorch looks for its CUDA half
/// once, when a random generator is seeded or memory is pinned, and keeps the answer.
#[cfg(all(cuda_kernels, target_os = "linux"))]
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = {
    extern "C" fn before_main() {
        if driver::is_present() {
            let _ = load(); // whoever calls its functions gets the error
        }
    }
    before_main
};

/// Loads the library also where there is no card, to ask for its versions.
pub fn load() -> Result<()> {
    let loaded = LIBRARY.get_or_init(|| match cfg!(cuda_kernels) {
        true => open().map_err(|e| format!("cannot load {NAME}: {:#}", anyhow!(e))),
        false => Err("this program was built without CUDA kernels".into()),
    });
    loaded.as_ref().map(drop).map_err(|text| anyhow!("{text}")).hint(hint())
}

fn hint() -> &'static str {
    match cfg!(cuda_kernels) {
        true => {
            "keep it beside the program; LD_LIBRARY_PATH may name its folder and those of libtorch and CUDA"
        }
        false => "run `./scripts/setup.sh` without TL_NO_CUDA and build again",
    }
}

fn open() -> Result<Library, libloading::Error> {
    // SAFETY: what runs now are libtorch's registrations of its operators; it is never unloaded. `csrc/api.h` declares
    // the function so.
    unsafe {
        let library = Library::new(NAME)?;
        type Open = unsafe extern "C" fn(unsafe extern "C" fn(*const c_char, usize));
        library.get::<Open>("tl_cuda_library_open")?(tl_set_last_error);
        Ok(library)
    }
}

/// Cards that libtorch can use.
///
/// # Errors
/// There is a card, but not its code: the library cannot be loaded, or no nvcc was there when this program was built.
/// A program built with TL_NO_CUDA=1 sees no card.
pub fn device_count() -> Result<usize> {
    let wanted = env!("TL_CUDA_WANTED") == "1";
    if wanted && driver::card_count() > 0 {
        load()?;
    }
    Ok(tch::Cuda::device_count().max(0) as usize)
}

/// The address of one of the library's functions. Where there is none, leaves the reason as the last error.
pub(super) fn address(name: &str) -> Option<*const c_void> {
    let found = match LIBRARY.get() {
        // SAFETY: the address is only called by `cuda_functions`, as what `csrc/api.h` declares.
        Some(Ok(library)) => unsafe { library.get::<*const c_void>(name) }
            .map(|symbol| *symbol)
            .map_err(|e| format!("{NAME} is not of this program: {e}")),
        Some(Err(text)) => Err(text.clone()),
        None if cfg!(cuda_kernels) => Err("no GPU is visible: there is no NVIDIA driver".into()),
        None => Err("this program was built without CUDA kernels".into()),
    };
    // SAFETY: the text outlives the call, which copies it.
    found.map_err(|text| unsafe { tl_set_last_error(text.as_ptr().cast(), text.len()) }).ok()
}

/// What a call returns where there is no library.
pub(super) trait Absent {
    fn absent() -> Self;
}

impl Absent for c_int {
    fn absent() -> Self {
        1 // `check` tells the last error
    }
}

impl Absent for () {
    fn absent() {} // frees what was never made
}

/// Declares functions of the library, like `unsafe extern "C"` those of the program.
macro_rules! cuda_functions {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $code:ty)?;)*) => {$(
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name($($argument: $type),*) $(-> $code)? {
            static ADDRESS: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
            let known = ADDRESS.get().copied().or_else(|| {
                let found = $crate::ffi::cuda::address(stringify!($name))? as usize;
                Some(*ADDRESS.get_or_init(|| found))
            });
            let Some(address) = known else { return $crate::ffi::cuda::Absent::absent() };
            // SAFETY: `csrc/api.h` declares the function so.
            let function: unsafe extern "C" fn($($type),*) $(-> $code)? = unsafe { std::mem::transmute(address) };
            unsafe { function($($argument),*) }
        }
    )*};
}
pub(super) use cuda_functions;
