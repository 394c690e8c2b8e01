//! Builds `csrc/` and links it with libtorch.
//!
//! C++ for the CPU (`csrc/torch`, `csrc/cpu`) is always compiled, and linked into the program. CUDA code (`csrc/**/*.cu`
//! and its wrappers, `csrc/torch_cuda`) is compiled when pip's nvcc lies beside libtorch
//! (`<site-packages>/nvidia/cu13/bin/nvcc`); it needs no GPU and no system CUDA. It becomes
//! `target/PROFILE/libtinyllama_cuda.so`, which the program loads where there is a card (`src/ffi/cuda.rs`). What was
//! built is baked in as `TL_CUDA_ARCHS`, which `tinyllama doctor` prints.
//!
//! A new file is found by itself. Only files whose sources, headers or options changed are compiled
//! again. Kernel files include no torch header: one `torch/torch.h` costs nvcc over a minute.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::Mutex;
use std::thread;

/// Compute capabilities compiled in: A100, RTX 30 and RTX 40 series; H100 and H200.
///
/// A program for 8.0 runs on 8.6 and 8.9 too, so that these need no compilation of their own. `TL_CUDA_ARCHS=80`
/// in the environment compiles for fewer.
const CUDA_ARCHS: [&str; 2] = ["80", "90a"];

/// Where pip put libtorch and NVIDIA's packages.
struct Layout {
    torch: PathBuf,
    nvidia: PathBuf,
    nvcc: PathBuf,
    /// This libtorch can use a GPU.
    torch_cuda: bool,
}

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rustc-check-cfg=cfg(cuda_kernels)");
    let layout = find_libtorch();
    let with_cuda = with_cuda(&layout);

    let compiler = cc::Build::new().cpp(true).pic(true).warnings(false).get_compiler();
    let toolchain = [layout.torch.join("version.py"), layout.nvcc.clone()];
    let mut host = vec![];
    for source in sources("csrc/cpu", "cpp").into_iter().chain(sources("csrc/torch", "cpp")) {
        let mut command = host_command(&compiler, &layout);
        if source.starts_with("csrc/cpu") {
            // A product and a sum that are two steps stay two: the same bits on every processor.
            command.arg("-ffp-contract=off");
        }
        host.push(Job::new(&source, command));
    }
    let mut cuda = vec![];
    let mut archs = vec![];
    if with_cuda {
        archs = wanted_archs();
        for source in sources("csrc", "cu") {
            let command = nvcc_command(&layout, compiler.path(), &archs_of(&source, &archs));
            cuda.push(Job::new(&source, command));
        }
        for source in sources("csrc/torch_cuda", "cpp") {
            let mut command = host_command(&compiler, &layout);
            for folder in ["cu13/include", "nccl/include", "cudnn/include"] {
                command.arg("-isystem").arg(layout.nvidia.join(folder));
            }
            cuda.push(Job::new(&source, command));
        }
        println!("cargo:rustc-cfg=cuda_kernels");
    }
    println!("cargo:rustc-env=TL_CUDA_ARCHS={}", archs.join(","));
    println!("cargo:rustc-env=TL_CUDA_WANTED={}", u8::from(cuda_wanted(&layout)));
    println!("cargo:rustc-env=TL_TORCH_CUDA={}", u8::from(layout.torch_cuda));
    println!("cargo:rustc-env=TL_RUSTC={}", rustc_version());
    println!("cargo:rustc-env=TL_SOURCES={}", hash_of_sources());

    compile(host.iter_mut().chain(&mut cuda).collect(), &toolchain);
    cc::Build::new()
        .cpp(true)
        .objects(host.iter().map(|job| &job.object))
        .compile("tinyllama_csrc");
    if with_cuda {
        link_cuda_library(&compiler, &layout, &cuda);
    }
    link(&layout);
}

fn find_libtorch() -> Layout {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let torch = env::var_os("LIBTORCH").map(PathBuf::from).unwrap_or_default();
    let Ok(torch) = torch.canonicalize() else {
        stop(&format!("no libtorch at LIBTORCH=`{}`", torch.display()), "run `./scripts/setup.sh`")
    };
    let nvidia = torch.with_file_name("nvidia");
    let nvcc = nvidia.join("cu13/bin/nvcc");
    let torch_cuda = torch.join("lib/libtorch_cuda.so").exists();
    Layout { torch, nvidia, nvcc, torch_cuda }
}

/// Whether to compile the kernels. Leaving them out is said aloud, unless it was asked for or this
/// libtorch could not use them.
fn with_cuda(layout: &Layout) -> bool {
    println!("cargo:rerun-if-env-changed=TL_NO_CUDA");
    // Written by scripts/setup.sh when it has installed something, perhaps nvcc. (Cargo takes a
    // watched file that does not exist for changed, always.)
    if Path::new(".venv/.setup-done").exists() {
        println!("cargo:rerun-if-changed=.venv/.setup-done");
    }
    if !cuda_wanted(layout) {
        return false;
    }
    if !layout.nvcc.exists() {
        println!(
            "cargo:warning=no GPU kernels in this build: there is no nvcc at {}; \
             `./scripts/setup.sh` installs it, TL_NO_CUDA=1 silences this warning",
            layout.nvcc.display()
        );
    }
    layout.nvcc.exists()
}

fn cuda_wanted(layout: &Layout) -> bool {
    env::var_os("TL_NO_CUDA").is_none() && layout.torch_cuda
}

/// The compiler of C++ over libtorch, for cargo's target, with `CXX` and `CXXFLAGS`.
fn host_command(compiler: &cc::Tool, layout: &Layout) -> Command {
    let mut command = compiler.to_command();
    command.args(["-std=c++17", "-MMD", "-Icsrc"]);
    for folder in ["include", "include/torch/csrc/api/include"] {
        command.arg("-isystem").arg(layout.torch.join(folder));
    }
    command
}

/// nvcc compiles a file's host half with the same C++ compiler; `NVCC_CCBIN` names another.
fn nvcc_command(layout: &Layout, host_compiler: &Path, archs: &[&str]) -> Command {
    println!("cargo:rerun-if-env-changed=NVCC_CCBIN");
    let mut command = Command::new(&layout.nvcc);
    command.args(["-std=c++17", "-O3", "-lineinfo", "-MMD", "-Icsrc"]);
    command.args(["-Xcompiler", "-fPIC"]);
    if env::var_os("NVCC_CCBIN").is_none() {
        command.arg("-ccbin").arg(host_compiler);
    }
    for arch in archs {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    command
}

/// Those of [`CUDA_ARCHS`] that `TL_CUDA_ARCHS` names, separated by commas; all where it is not set.
fn wanted_archs() -> Vec<&'static str> {
    println!("cargo:rerun-if-env-changed=TL_CUDA_ARCHS");
    let Ok(names) = env::var("TL_CUDA_ARCHS") else { return CUDA_ARCHS.to_vec() };
    let known = |name: &str| CUDA_ARCHS.into_iter().find(|arch| *arch == name.trim());
    let archs: Option<Vec<_>> = names.split(',').map(known).collect();
    archs.unwrap_or_else(|| {
        let problem = format!("TL_CUDA_ARCHS: expected some of {CUDA_ARCHS:?}, got `{names}`");
        stop(&problem, "set it as `80,90a`, or leave it out")
    })
}

/// A file named `.._sm90.cu` uses instructions that only Hopper has, and is compiled for it alone, always.
fn archs_of(source: &Path, wanted: &[&'static str]) -> Vec<&'static str> {
    let hopper_only = source.to_string_lossy().ends_with("_sm90.cu");
    if hopper_only { vec!["90a"] } else { wanted.to_vec() }
}

/// All files below `folder` with this extension, in order of name.
fn sources(folder: impl AsRef<Path>, extension: &str) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(sources(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// One source file to compile. Beside its object lie the files that it was made from, as the
/// compiler wrote them down (`.d`), and the command that made it (`.cmd`).
struct Job {
    source: PathBuf,
    object: PathBuf,
    command: Command,
}

impl Job {
    fn new(source: &Path, mut command: Command) -> Self {
        let name = source.to_string_lossy().replace(['/', '\\'], "_");
        let object = objects_dir().join(name + ".o");
        command.arg("-c").arg(source).arg("-o").arg(&object);
        command.arg("-MF").arg(object.with_extension("d"));
        Self { source: source.to_owned(), object, command }
    }

    /// Whether the object was made by the same command from files that are all older than it, as is
    /// the toolchain, whose headers the compiler does not write down.
    fn is_fresh(&self, toolchain: &[PathBuf]) -> bool {
        let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
        let same_command = fs::read_to_string(self.object.with_extension("cmd"))
            .is_ok_and(|text| text == self.command_line());
        let (Some(made), Ok(rule)) =
            (modified(&self.object), fs::read_to_string(self.object.with_extension("d")))
        else {
            return false;
        };
        // A rule of make: `object: file file \` over many lines. No path of ours has a space; one
        // that has is not found, and its file compiled again.
        let files = rule.split_once(": ").map_or("", |(_, files)| files).split_whitespace();
        same_command
            && files
                .filter(|word| *word != "\\")
                .all(|file| modified(Path::new(file)).is_some_and(|time| time < made))
            && toolchain.iter().all(|file| modified(file).is_none_or(|time| time < made))
    }

    fn run(&mut self) {
        let _ = fs::remove_file(self.object.with_extension("cmd"));
        let status = self.command.status().unwrap_or_else(|e| {
            let program = self.command.get_program().to_string_lossy();
            stop(&format!("cannot start `{program}`: {e}"), "run `./scripts/setup.sh`")
        });
        if !status.success() {
            let hint = if self.source.extension().is_some_and(|e| e == "cu") {
                "see nvcc's messages above. Where it refuses the C++ compiler, set NVCC_CCBIN to an \
                 older one (GCC 15 and Clang 20 are the newest it takes); TL_NO_CUDA=1 builds \
                 without GPU kernels"
            } else {
                "see the compiler's messages above; it needs C++17, and CXX picks another compiler"
            };
            stop(&format!("cannot compile {}", self.source.display()), hint);
        }
        // Written last: without it the object is not taken for finished.
        let _ = fs::write(self.object.with_extension("cmd"), self.command_line());
    }

    fn command_line(&self) -> String {
        command_line(&self.command)
    }
}

/// The program and its arguments, one a line. Not the environment, which differs with every
/// shell and changes nothing.
fn command_line(command: &Command) -> String {
    let words = iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join("\n")
}

/// Compiles what is not fresh, as many files at a time as cargo allows.
fn compile(jobs: Vec<&mut Job>, toolchain: &[PathBuf]) {
    let at_once: usize = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let stale = Mutex::new(jobs.into_iter().filter(|job| !job.is_fresh(toolchain)));
    let next = || stale.lock().ok().and_then(|mut jobs| jobs.next());
    thread::scope(|scope| {
        for _ in 0..at_once.max(1) {
            scope.spawn(|| iter::from_fn(next).for_each(Job::run));
        }
    });
}

/// `target/PROFILE/libtinyllama_cuda.so`, beside the program. Made anew where an object is newer.
fn link_cuda_library(compiler: &cc::Tool, layout: &Layout, jobs: &[Job]) {
    let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
    let library = profile_dir().join("libtinyllama_cuda.so");
    let made = modified(&library);
    let mut command = compiler.to_command();
    // Nothing is left for another library to define, and all of it is looked up when the library is loaded.
    command.args(["-shared", "-Wl,--no-undefined", "-Wl,-z,now", "-s", "-o"]).arg(&library);
    command.args(jobs.iter().map(|job| &job.object));
    for folder in [layout.torch.join("lib"), layout.nvidia.join("cu13/lib")] {
        command.arg("-L").arg(&folder).arg(format!("-Wl,-rpath,{}", folder.display()));
    }
    command.args(["-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10"]);
    // pip's wheel has no `libcudart.so` without a version.
    command.args(["-l:libcudart.so.13", "-l:libcublasLt.so.13", "-ldl"]);
    // The command is kept with those of the objects: a file more or less, or another folder, links anew as well.
    let (kept, line) = (objects_dir().join("library.cmd"), command_line(&command));
    let same = fs::read_to_string(&kept).is_ok_and(|text| text == line);
    if same && made.is_some() && jobs.iter().all(|job| modified(&job.object) <= made) {
        return;
    }
    if !command.status().is_ok_and(|status| status.success()) {
        stop("cannot link libtinyllama_cuda.so", "see the linker's messages above");
    }
    let _ = fs::write(kept, line);
}

/// The program with libtorch's CPU half. `-ltorch` would load libtorch_cuda: 240 MB for one that may need none of it.
fn link(layout: &Layout) {
    let target = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let folder = layout.torch.join("lib");
    println!("cargo:rustc-link-search=native={}", folder.display());
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    if target == "linux" {
        // The CUDA library lies beside the program; test programs are in a folder below.
        println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN:$ORIGIN/..");
    }
    println!("cargo:rustc-link-arg=-ltorch_cpu");
    println!("cargo:rustc-link-arg=-lc10");
}

/// A hash of what the program is made from, by which the ranks of a run know that they run the same one. Not of the
/// binary: two nodes that build the same sources in different folders get different ones.
fn hash_of_sources() -> String {
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed=Cargo.lock");
    let mut files = sources("src", "rs");
    for extension in ["cpp", "cu", "cuh", "h"] {
        files.extend(sources("csrc", extension));
    }
    files.push(PathBuf::from("Cargo.lock"));
    // FNV-1a, of names and contents.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for file in files {
        let name = file.to_string_lossy().into_owned().into_bytes();
        for byte in name.into_iter().chain(fs::read(&file).unwrap_or_default()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

fn rustc_version() -> String {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    let output = Command::new(rustc).arg("--version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.trim().trim_start_matches("rustc ").to_owned()
}

fn profile_dir() -> PathBuf {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()); // target/PROFILE/build/NAME/out
    out.ancestors().nth(3).unwrap_or(&out).to_owned()
}

/// `target/PROFILE/csrc`. Cargo gives `check` and `clippy` build folders of their own, and minutes of C++ are not to be
/// compiled for each of them.
fn objects_dir() -> PathBuf {
    let folder = profile_dir().join("csrc");
    if let Err(e) = fs::create_dir_all(&folder) {
        stop(
            &format!("cannot make the folder {}: {e}", folder.display()),
            "make `target/` writable",
        );
    }
    folder
}

fn stop(problem: &str, hint: &str) -> ! {
    eprintln!("\nerror: {problem}\n\nhint: {hint}\n");
    exit(1);
}
