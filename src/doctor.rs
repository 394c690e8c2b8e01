//! What `tinyllama doctor` finds out about this installation and machine, and what is wrong with it.
//!
//! It is run where something is broken: a fact that cannot be read is `None`, and only what is
//! certainly wrong becomes a problem. A machine without a GPU is fine.

use crate::{device, error, ffi};
use serde::Serialize;
use std::fs;
use std::path::Path;
use std::process::Command;

/// The libtorch that tch 0.24 works with; `scripts/setup.sh` installs it.
const WANTED_LIBTORCH: &str = "2.11.0";
/// The CUDA version that libtorch is built for needs a driver for the same major version or later.
const WANTED_CUDA: i32 = 13_000;
/// What decides how fast matrix products are on the CPU: x86, then ARM, in the kernel's words.
const CPU_FEATURES: [&str; 8] =
    ["avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16", "i8mm"];

/// All facts and problems. Sizes are in bytes.
#[derive(Serialize)]
pub struct Report {
    /// Version of this program.
    pub tinyllama: &'static str,
    /// The compiler that it was built with.
    pub rustc: &'static str,
    /// Version of libtorch.
    pub libtorch: String,
    /// Whether libtorch sees a CUDA card.
    pub libtorch_sees_cuda: bool,
    /// The CUDA runtime that was linked; `None` without CUDA.
    pub cuda_runtime: Option<String>,
    /// Version of cuDNN.
    pub cudnn: Option<String>,
    /// Version of NCCL.
    pub nccl: Option<String>,
    /// Compute capabilities that the kernels of `csrc/` were compiled for, e.g. `90a`.
    pub compiled_archs: Vec<&'static str>,
    /// The NVIDIA driver.
    pub driver: Driver,
    /// The cards that the driver shows.
    pub cards: Vec<Card>,
    /// The processor.
    pub cpu: Cpu,
    /// Threads that libtorch uses for one operation.
    pub torch_threads: i32,
    /// Main memory.
    pub ram: Option<Space>,
    /// The file system of the current folder.
    pub disk: Option<Space>,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// The NVIDIA driver: a kernel module, and the library `libcuda` that programs call.
#[derive(Clone, Default, Serialize)]
pub struct Driver {
    /// Version, e.g. `580.65.06`.
    pub version: Option<String>,
    /// Newest CUDA version that the library runs; `None` where there is no library.
    pub cuda: Option<String>,
    /// The kernel module is loaded.
    pub loaded: bool,
    #[serde(skip)]
    cuda_number: i32,
    #[serde(skip)]
    fault: Option<String>,
}

/// One CUDA card.
#[derive(Clone, Serialize)]
pub struct Card {
    /// `cuda:index`.
    pub index: usize,
    /// Product name.
    pub name: String,
    /// Compute capability, e.g. `[9, 0]`.
    pub capability: (i32, i32),
    /// Size of its memory.
    pub total_bytes: u64,
    /// What no process holds.
    pub free_bytes: Option<u64>,
    /// Whether the compiled kernels run on it.
    pub has_kernels: bool,
}

/// The processor.
#[derive(Serialize)]
pub struct Cpu {
    /// Product name.
    pub model: Option<String>,
    /// Logical cores that this process may use.
    pub cores: Option<usize>,
    /// Instruction sets that matrix products profit from.
    pub features: Vec<&'static str>,
}

/// Free and total bytes.
#[derive(Serialize)]
pub struct Space {
    /// Size.
    pub total_bytes: u64,
    /// What this process could still take.
    pub free_bytes: u64,
}

/// Something wrong, and the next action.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

/// Finds out everything. Takes under a second, plus some tenths of a second a card.
pub fn examine() -> Report {
    let loaded = ffi::cuda::load(); // also without a card, for the versions
    let versions = ffi::versions();
    let known = |version: String| (version != "-").then_some(version);
    let (driver, cards) = driver();
    let mut report = Report {
        tinyllama: env!("CARGO_PKG_VERSION"),
        rustc: env!("TL_RUSTC"),
        libtorch: versions.libtorch,
        libtorch_sees_cuda: tch::Cuda::is_available(),
        cuda_runtime: known(versions.cuda),
        cudnn: known(versions.cudnn),
        nccl: known(versions.nccl),
        compiled_archs: ffi::compiled_archs(),
        driver,
        cards,
        cpu: cpu(),
        torch_threads: tch::get_num_threads(),
        ram: ram(),
        disk: disk(),
        problems: Vec::new(),
    };
    report.problems = problems(&report, ffi::libtorch_has_cuda());
    if let (false, Err(e)) = (report.compiled_archs.is_empty(), loaded) {
        let fix = error::hint(&e).unwrap_or_default().to_owned();
        report.problems.push(Problem { what: e.to_string(), fix });
    }
    report
}

// ---- facts --------------------------------------------------------------------------------------

fn driver() -> (Driver, Vec<Card>) {
    let version = driver_version();
    let loaded = version.is_some() || Path::new("/dev/nvidiactl").exists();
    let Some(library) = ffi::driver::query() else {
        return (Driver { version, loaded, ..Driver::default() }, Vec::new());
    };
    let archs = ffi::compiled_archs();
    let card = |(index, card): (usize, ffi::driver::Card)| Card {
        index,
        has_kernels: device::has_kernels(card.capability, &archs),
        name: card.name,
        capability: card.capability,
        total_bytes: card.total_memory,
        free_bytes: card.free_memory,
    };
    let cards = library.cards.into_iter().enumerate().map(card).collect();
    let cuda = (library.cuda > 0).then(|| cuda_text(library.cuda));
    (Driver { version, cuda, loaded, cuda_number: library.cuda, fault: library.fault }, cards)
}

/// 13020 -> `13.2`.
fn cuda_text(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// Version of the driver, from the kernel module or, where `/proc` does not show it, `nvidia-smi`.
fn driver_version() -> Option<String> {
    let module = fs::read_to_string("/proc/driver/nvidia/version").ok();
    module.as_deref().and_then(version_in).or_else(|| {
        let mut command = Command::new("nvidia-smi");
        let output = command.args(["--query-gpu=driver_version", "--format=csv,noheader"]).output();
        version_in(&String::from_utf8_lossy(&output.ok()?.stdout))
    })
}

/// The first word of the form `580.65.06`.
fn version_in(text: &str) -> Option<String> {
    let is_version =
        |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    text.split_whitespace().find(is_version).map(str::to_owned)
}

fn cpu() -> Cpu {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = field(&info, "flags").or_else(|| field(&info, "Features")).unwrap_or_default();
    let has = |feature: &&str| flags.split(' ').any(|flag| flag == *feature);
    Cpu {
        model: field(&info, "model name").map(str::to_owned),
        cores: std::thread::available_parallelism().ok().map(usize::from),
        features: CPU_FEATURES.into_iter().filter(has).collect(),
    }
}

/// Bytes of memory that the system could give to a process, where it says so: what is free, or less where Slurm or a
/// container grants less.
pub fn available_memory() -> Option<u64> {
    let group = fs::read_to_string("/proc/self/cgroup").ok();
    let group = group.as_deref().and_then(|text| text.lines().find_map(|l| l.strip_prefix("0::/")));
    let granted = group.and_then(|group| granted("/sys/fs/cgroup".as_ref(), group.as_ref()));
    [ram().map(|ram| ram.free_bytes), granted].into_iter().flatten().min()
}

/// Bytes that are left of the limits of a control group (version 2) and of those that it lies in; pages of files that
/// can go do not count as taken.
fn granted(root: &Path, group: &Path) -> Option<u64> {
    let left = |group: &Path| {
        let read = |name: &str| fs::read_to_string(root.join(group).join(name)).ok();
        let number = |text: String| text.trim().parse::<u64>().ok(); // `max`: no limit
        let limit = read("memory.max").and_then(number)?;
        let taken = read("memory.current").and_then(number)?;
        let stat = read("memory.stat").unwrap_or_default();
        let pages = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse().ok());
        Some((limit + pages.unwrap_or(0u64)).saturating_sub(taken))
    };
    group.ancestors().filter_map(left).min()
}

fn ram() -> Option<Space> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |name| {
        let kib: u64 = field(&info, name)?.trim_end_matches("kB").trim().parse().ok()?;
        Some(kib * 1024)
    };
    Some(Space { total_bytes: bytes("MemTotal")?, free_bytes: bytes("MemAvailable")? })
}

fn disk() -> Option<Space> {
    let s = rustix::fs::statvfs(".").ok()?;
    Some(Space { total_bytes: s.f_blocks * s.f_frsize, free_bytes: s.f_bavail * s.f_frsize })
}

/// Value of the first `name : value` line of a `/proc` file.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

// ---- problems -----------------------------------------------------------------------------------

/// What is wrong. One cause is named once: where the driver is at fault, nothing that follows from
/// it is.
fn problems(r: &Report, libtorch_has_cuda: bool) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut add = |what: String, fix: &str| found.push(Problem { what, fix: fix.into() });

    if r.libtorch.split('+').next() != Some(WANTED_LIBTORCH) {
        add(
            format!("libtorch is {}, not {WANTED_LIBTORCH}", r.libtorch),
            "run `./scripts/setup.sh`: it installs the right one and builds again",
        );
    }
    if let Some(problem) = driver_problem(r) {
        found.push(problem);
        return found;
    }
    if r.cards.is_empty() {
        return found;
    }
    if !libtorch_has_cuda {
        add(
            "a card is there, but this libtorch is a build without CUDA".into(),
            "unset LIBTORCH, remove .venv and run `./scripts/setup.sh`",
        );
    } else if r.compiled_archs.is_empty() {
        add(
            "a card is there, but no nvcc was when this program was built: it has no GPU kernels"
                .into(),
            "unset TL_NO_CUDA and run `./scripts/setup.sh`: it installs nvcc and builds again",
        );
    } else if !r.libtorch_sees_cuda {
        add(
            "the driver shows a card, but libtorch does not see it".into(),
            "see whether `nvidia-smi` reports an error; restart after a driver update",
        );
    }
    for card in r.cards.iter().filter(|card| !card.has_kernels && !r.compiled_archs.is_empty()) {
        let (major, minor) = card.capability;
        add(
            format!(
                "no kernels for card {}, {} (compute capability {major}.{minor}): compiled are {}",
                card.index,
                card.name,
                r.compiled_archs.join(", ")
            ),
            &format!("add \"{major}{minor}\" to CUDA_ARCHS in build.rs and build again"),
        );
    }
    found
}

/// Why the driver shows no usable card, where one should be.
fn driver_problem(r: &Report) -> Option<Problem> {
    let d = &r.driver;
    let version = d.version.as_deref().unwrap_or("of unknown version");
    let runs = d.cuda.as_deref().unwrap_or("none");
    let (what, fix) = if d.loaded && d.cuda.is_none() && d.fault.is_none() {
        (
            format!("driver {version} is loaded, but its library libcuda is not to be found"),
            "install the driver's libraries; a container needs `--gpus all` and \
             NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )
    } else if d.cuda_number > 0 && d.cuda_number < WANTED_CUDA {
        (
            format!("driver {version} runs CUDA {runs}, libtorch needs {}", cuda_text(WANTED_CUDA)),
            "install NVIDIA driver 580 or later and restart",
        )
    } else if let Some(fault) = &d.fault {
        (
            format!("driver {version} does not start: {fault}"),
            "see whether `nvidia-smi` reports the same; restart after a driver update; a container \
             needs `--gpus all`",
        )
    } else if d.loaded && r.cards.is_empty() {
        let fix = match std::env::var_os("CUDA_VISIBLE_DEVICES") {
            Some(_) => "unset CUDA_VISIBLE_DEVICES, which hides cards",
            None => "see whether `nvidia-smi` lists a card; a container needs `--gpus all`",
        };
        (format!("driver {version} is loaded, but shows no card"), fix)
    } else {
        return None;
    };
    Some(Problem { what, fix: fix.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_narrowest_control_group_grants() {
        let root = tempfile::tempdir().unwrap();
        let group = |path: &str, limit: &str, taken: &str, stat: &str| {
            let dir = root.path().join(path);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("memory.max"), limit).unwrap();
            fs::write(dir.join("memory.current"), taken).unwrap();
            fs::write(dir.join("memory.stat"), stat).unwrap();
        };
        let left = |path: &str| granted(root.path(), path.as_ref());
        assert_eq!(left("job_7/step_0"), None, "no such group");
        group("job_7/step_0", "max\n", "100\n", "");
        assert_eq!(left("job_7/step_0"), None, "no limit");
        group("job_7", "5000\n", "3000\n", "anon 1200\ninactive_file 1700\n");
        assert_eq!(left("job_7/step_0"), Some(3700));
        group("job_7/step_0", "900\n", "1000\n", "");
        assert_eq!(left("job_7/step_0"), Some(0));
    }

    fn card(major: i32, minor: i32) -> Card {
        Card {
            index: 0,
            name: "a card".into(),
            capability: (major, minor),
            total_bytes: 1,
            free_bytes: None,
            has_kernels: device::has_kernels((major, minor), &["80", "86", "89", "90a"]),
        }
    }

    fn healthy() -> Report {
        Report {
            tinyllama: "0",
            rustc: "1",
            libtorch: "2.11.0".into(),
            libtorch_sees_cuda: true,
            cuda_runtime: Some("13.0".into()),
            cudnn: None,
            nccl: None,
            compiled_archs: vec!["80", "86", "89", "90a"],
            driver: Driver {
                version: Some("580.65.06".into()),
                cuda: Some("13.0".into()),
                loaded: true,
                cuda_number: 13_000,
                fault: None,
            },
            cards: vec![card(9, 0)],
            cpu: Cpu { model: None, cores: None, features: vec![] },
            torch_threads: 1,
            ram: None,
            disk: None,
            problems: vec![],
        }
    }

    fn set_driver_cuda(r: &mut Report, number: i32) {
        (r.driver.cuda_number, r.driver.cuda) = (number, Some(cuda_text(number)));
    }

    #[test]
    fn each_fault_is_named_once_with_its_fix() {
        type Break = fn(&mut Report);
        let faults: [(&str, Break); 8] = [
            ("not 2.11.0", |r| r.libtorch = "2.10.0".into()),
            ("runs CUDA 12.8, libtorch needs 13.0", |r| {
                set_driver_cuda(r, 12_080);
                r.libtorch_sees_cuda = false;
            }),
            ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", |r| {
                r.driver.fault = Some("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH".into());
                r.cards.clear();
                r.libtorch_sees_cuda = false;
            }),
            ("libcuda is not to be found", |r| {
                (r.driver.cuda, r.driver.cuda_number) = (None, 0);
                r.cards.clear();
                r.libtorch_sees_cuda = false;
            }),
            ("shows no card", |r| r.cards.clear()),
            ("no nvcc", |r| {
                r.compiled_archs.clear();
                r.cards[0].has_kernels = false;
            }),
            ("libtorch does not see it", |r| r.libtorch_sees_cuda = false),
            ("(compute capability 12.0): compiled are 80, 86, 89, 90a", |r| {
                r.cards = vec![card(12, 0)];
            }),
        ];
        assert!(problems(&healthy(), true).is_empty());
        for (expected, fault) in faults {
            let mut report = healthy();
            fault(&mut report);
            let found = problems(&report, true);
            assert!(found.len() == 1 && found[0].what.contains(expected), "{expected}: {found:?}");
            assert!(!found[0].fix.is_empty());
        }
        let found = problems(&healthy(), false);
        assert!(found.len() == 1 && found[0].what.contains("without CUDA"), "{found:?}");
    }

    #[test]
    fn no_gpu_is_no_problem_even_with_the_drivers_library_installed() {
        let mut report = healthy();
        report.driver = Driver::default();
        report.cards.clear();
        report.libtorch_sees_cuda = false;
        assert!(problems(&report, true).is_empty());
        set_driver_cuda(&mut report, 13_000);
        assert!(problems(&report, true).is_empty());
    }

    #[test]
    fn the_driver_version_is_read_from_both_kinds_of_kernel_module() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release";
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19";
        assert_eq!(version_in(open).as_deref(), Some("580.95.05"));
        assert_eq!(version_in(closed).as_deref(), Some("535.104.05"));
        assert_eq!(version_in("No devices were found"), None);
    }
}
