//! Builds `csrc/` and links it with libtorch.
//!
//! Host C++ is always compiled. CUDA is compiled when pip's `nvcc` lies beside libtorch
//! (`<site-packages>/nvidia/cu13/bin/nvcc`); it needs no GPU and no system CUDA. What was built is
//! baked in as `TL_CUDA_ARCHS`, which `tinyllama doctor` prints.
//!
//! Kernel files (`*.cu`) include no torch header: one `torch/torch.h` costs nvcc over a minute.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// Compute capabilities compiled in: A100; RTX 30 series; RTX 40 series; H100/H200.
const CUDA_ARCHS: [&str; 4] = ["80", "86", "89", "90a"];

const TORCH_WRAPPERS: [&str; 2] = ["csrc/torch/runtime.cpp", "csrc/torch/optim.cpp"];
const KERNELS: [&str; 1] = ["csrc/optim/adamw.cu"];

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=TL_NO_CUDA");
    println!("cargo:rustc-check-cfg=cfg(cuda_kernels)");

    let torch = std::env::var("LIBTORCH").map(|p| {
        let p = PathBuf::from(p);
        p.canonicalize().unwrap_or(p)
    });
    let Ok(torch) = torch else { stop("LIBTORCH is not set", "run `./scripts/setup.sh`") };
    let torch_lib = torch.join("lib");
    let nvidia = torch.join("../nvidia");
    let cuda = nvidia.join("cu13");
    let nvcc = cuda.join("bin/nvcc");
    let has_torch_cuda = torch_lib.join("libtorch_cuda.so").exists();
    let with_cuda = has_torch_cuda && nvcc.exists() && std::env::var_os("TL_NO_CUDA").is_none();
    if has_torch_cuda && !with_cuda {
        println!(
            "cargo:warning=no nvcc at {}: GPU kernels are left out; `./scripts/setup.sh` installs it",
            nvcc.display()
        );
    }

    let includes = [
        torch.join("include"),
        torch.join("include/torch/csrc/api/include"),
        cuda.join("include"),
        nvidia.join("nccl/include"),
        nvidia.join("cudnn/include"),
        PathBuf::from("csrc"),
    ];
    if with_cuda {
        compile_kernels(&nvcc, &includes[5]);
        println!("cargo:rustc-cfg=cuda_kernels");
    }
    compile_wrappers(&includes, with_cuda);

    println!(
        "cargo:rustc-env=TL_CUDA_ARCHS={}",
        if with_cuda { CUDA_ARCHS.join(",") } else { String::new() }
    );
    link(&torch_lib, &cuda.join("lib"), with_cuda);
}

/// nvcc each kernel file into one static library, `libtlkernels.a`.
fn compile_kernels(nvcc: &Path, include: &Path) {
    let out = PathBuf::from(std::env::var("OUT_DIR").unwrap_or_default());
    let mut jobs = Vec::new();
    for file in KERNELS {
        let object = out.join(file.replace('/', "_")).with_extension("o");
        let mut command = Command::new(nvcc);
        command.args(["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", "-c", file, "-o"]);
        command.arg(&object).arg("-I").arg(include);
        for arch in CUDA_ARCHS {
            command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        }
        match command.spawn() {
            Ok(child) => jobs.push((file, object, child)),
            Err(e) => {
                stop(&format!("cannot start {}: {e}", nvcc.display()), "run `./scripts/setup.sh`")
            }
        }
    }
    let mut archive = cc::Build::new();
    for (file, object, mut child) in jobs {
        if !child.wait().is_ok_and(|status| status.success()) {
            stop(
                &format!("nvcc failed on {file}"),
                "see its messages above; `TL_NO_CUDA=1` builds without GPU kernels",
            );
        }
        archive.object(object);
    }
    archive.compile("tlkernels");
}

/// Host C++ over libtorch: everything in `csrc/torch`, one static library, `libtlwrappers.a`.
fn compile_wrappers(includes: &[PathBuf], with_cuda: bool) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").warnings(false).includes(includes).files(TORCH_WRAPPERS);
    if with_cuda {
        build.define("TL_WITH_CUDA", None);
    }
    if let Err(e) = build.try_compile("tlwrappers") {
        stop(
            &format!("the C++ compiler failed on csrc/torch: {e}"),
            "a C++17 compiler is needed, for example `apt-get install g++`",
        );
    }
}

fn link(torch_lib: &Path, cuda_lib: &Path, with_cuda: bool) {
    let linux = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux");
    println!("cargo:rustc-link-search=native={}", torch_lib.display());
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", torch_lib.display());
    let mut libraries = vec!["torch", "torch_cpu", "c10"];
    if with_cuda {
        println!("cargo:rustc-link-search=native={}", cuda_lib.display());
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", cuda_lib.display());
        libraries.extend(["torch_cuda", "c10_cuda"]);
    }
    // The linker would drop libtorch_cuda, which nothing names directly: it registers itself at load.
    if linux {
        println!("cargo:rustc-link-arg=-Wl,--no-as-needed");
    }
    for library in libraries {
        println!("cargo:rustc-link-arg=-l{library}");
    }
    if with_cuda {
        println!("cargo:rustc-link-arg=-l:libcudart.so.13");
    }
}

fn stop(problem: &str, hint: &str) -> ! {
    eprintln!("\nerror: {problem}\n\nhint: {hint}\n");
    exit(1);
}
