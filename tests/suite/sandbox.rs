//! Programs that attack the sandbox, and programs that solve their task.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tinyllama::eval::sandbox::{Limits, Sandbox, Verdict};

/// No attack may hold a worker for longer: its time, a second more if it ignores the alarm, and the start of a busy machine.
const LONGEST: Duration = Duration::from_secs(20);

/// The sandbox with three seconds a program.
fn sandbox() -> Sandbox {
    static SANDBOX: OnceLock<Sandbox> = OnceLock::new();
    let make =
        || Sandbox::new(env!("CARGO_BIN_EXE_tinyllama").into(), "python3", Limits::default());
    SANDBOX.get_or_init(|| make().unwrap()).clone()
}

/// The sandbox of a kernel without Landlock.
fn without_landlock() -> Sandbox {
    Sandbox { landlock: false, ..sandbox() }
}

fn run(sandbox: &Sandbox, program: &str) -> Verdict {
    let start = Instant::now();
    let verdict = sandbox.run(program).unwrap();
    assert!(start.elapsed() < LONGEST, "{:?}: {program}", start.elapsed());
    verdict
}

fn assert_fails_with(program: &str, reason: &str) {
    let verdict = run(&sandbox(), program);
    assert!(matches!(&verdict, Verdict::Failed(r) if r.contains(reason)), "{verdict}: {program}");
}

fn assert_stops(program: &str) {
    let verdict = run(&sandbox(), program);
    assert!(matches!(verdict, Verdict::Stopped(_)), "{verdict}: {program}");
}

fn assert_times_out(program: &str) {
    let mut sandbox = sandbox();
    sandbox.limits.time = Duration::from_millis(300);
    assert_eq!(run(&sandbox, program), Verdict::TimedOut, "{program}");
}

fn assert_passes(program: &str) {
    assert_eq!(run(&sandbox(), program), Verdict::Passed, "{program}");
    assert_eq!(run(&without_landlock(), program), Verdict::Passed, "{program}");
}

/// Processes, of all users, whose command line holds `mark`.
fn processes_with(mark: &str) -> usize {
    let holds = |path: PathBuf| {
        let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(mark)
    };
    std::fs::read_dir("/proc").unwrap().flatten().filter(|entry| holds(entry.path())).count()
}

#[test]
fn solutions_pass() {
    assert_passes("def f(x):\n    return x + 1\n\ndef check(c):\n    assert c(1) == 2\n\ncheck(f)");
    assert_passes("assert __name__ == 'builtins' and 'main' not in globals()"); // as `exec(program, {})` has it
    assert_passes("print('caf\u{e9}', input)\nassert '\u{e9}'.upper() == '\u{c9}'\r\n");
    assert_passes(
        "import re, math, heapq, random, hashlib, datetime, collections, typing, decimal, itertools, json",
    );
    assert_passes("import hashlib\nassert hashlib.md5(b'Hello').hexdigest()[:4] == '8b1a'");
    assert_passes(
        "import threading\nseen = []\nt = threading.Thread(target=lambda: seen.append(1))\n\
         t.start(); t.join()\nassert seen",
    );
    assert_passes("import time\nt = time.time(); time.sleep(0.05); assert time.time() > t");
    assert_passes(
        "import os, signal\nsignal.signal(signal.SIGUSR1, lambda *a: None)\nos.kill(os.getpid(), signal.SIGUSR1)",
    );
    assert_passes("import sys\nassert sys.argv == ['solution'] and sys.flags.isolated");
    assert_passes(
        "import os\nassert 'HOME' not in os.environ and 'PATH' not in os.environ and not os.listdir()",
    );
}

#[test]
fn wrong_programs_fail_with_their_reason() {
    assert_fails_with(
        "def f(x):\n\ndef check(c):\n    assert c(1) == 2\n\ncheck(f)",
        "IndentationError: ",
    );
    assert_fails_with("assert False, 'first\\nsecond'", "AssertionError: first");
    assert_fails_with("raise SystemExit", "SystemExit");
    assert_fails_with("exit(0)", "SystemExit");
    assert_fails_with("raise KeyboardInterrupt", "KeyboardInterrupt");
    assert_fails_with("raise BaseException('\\x1b[31mred')", "BaseException: [31mred");
    assert_fails_with(
        "class E(Exception):\n    def __str__(self): raise self\nraise E",
        "cannot be shown",
    );
    assert_fails_with("f = lambda x: f(x)\nf(1)", "RecursionError");
    assert_fails_with("input()", "OSError"); // as in `code_eval`
    assert_fails_with("x = '\0'", "null byte");
    let long = run(&sandbox(), "raise ValueError('\\udc80' + 'x' * 10**7)");
    assert!(long.to_string().len() < 300, "{long}");
}

#[test]
fn an_early_exit_is_no_success() {
    assert_stops("import os\nos._exit(0)");
    assert_stops("import os\nos.write(1, b'passed 0')\nos.write(3, b'passed 0')\nos._exit(0)");
    assert_stops("import os\nos.closerange(0, 64)"); // the verdict cannot be told
    assert_stops("import os\nos.execv('/bin/true', ['true'])");
    assert_stops("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)");
    assert_stops("import ctypes\nctypes.string_at(0)");
}

#[test]
fn it_starts_no_process() {
    let bomb =
        "import os\nwhile True:\n    try: os.fork()\n    except OSError as e:\n        raise";
    assert_fails_with(bomb, "PermissionError: ");
    assert_times_out("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass");
    assert_fails_with("import subprocess\nsubprocess.run(['/bin/true'])", "PermissionError");
    assert_fails_with("import os\nassert os.system('true') == 0", "");
    assert_fails_with(
        "import os\nos.posix_spawn('/bin/sleep', ['sleep', '77777'], {})",
        "PermissionError",
    );
    assert_fails_with("import multiprocessing as m\np = m.Process(target=print)\np.start()", "");
    assert_fails_with("import os\nos.setsid()", "PermissionError");
    assert_fails_with(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n\
         for call in ('fork', 'vfork', 'daemon'):\n\
         \x20   assert getattr(libc, call)(0, 0) == -1, call\n\
         assert libc.syscall(435, 0, 0) == -1 and ctypes.get_errno() == 38\n\
         raise ValueError('held')",
        "held",
    );
    // Whatever was tried: nothing is left.
    assert_times_out(
        "import os\nwhile True:\n    try: os.posix_spawn('/bin/sleep', ['sleep', '77777.5'], {})\n    except OSError: pass",
    );
    assert_eq!(processes_with("77777.5"), 0);
}

#[test]
fn it_reaches_no_network_and_no_other_process() {
    assert_fails_with("import socket\nsocket.socket()", "PermissionError");
    assert_fails_with("import socket\nsocket.socketpair()", "PermissionError");
    assert_fails_with(
        "import urllib.request as u\nu.urlopen('http://127.0.0.1:1')",
        "not permitted",
    );
    assert_fails_with("import os\nos.kill(os.getppid(), 0)", "PermissionError");
    assert_fails_with("import os\nos.kill(-1, 0)", "PermissionError");
    assert_fails_with("import os\nos.killpg(0, 0)", "PermissionError");
    assert_fails_with("import fcntl\nfcntl.fcntl(0, 8, 1)", "PermissionError"); // F_SETOWN
    assert_fails_with(
        "import resource as r\nr.setrlimit(r.RLIMIT_NOFILE, (32, 32))",
        "not allowed",
    );
    assert_fails_with("import os\nos.setuid(0)", "PermissionError");
    assert_fails_with("import os\nos.memfd_create('x')", "PermissionError");
    // ptrace, mount, unshare, setns, pidfd_send_signal .. by their numbers.
    #[cfg(target_arch = "x86_64")]
    assert_fails_with(
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n\
         for call in (101, 165, 272, 308, 298, 321, 425, 310, 250, 169, 175):\n\
         \x20   assert libc.syscall(call, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, call\n\
         raise ValueError('held')",
        "held",
    );
}

#[test]
fn it_ends_in_time() {
    assert_times_out("while True: pass");
    assert_times_out("import time\ntime.sleep(1000)");
    assert_times_out("10 ** 10 ** 9"); // one long C function
    assert_times_out(
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    );
    assert_times_out(
        "import signal\nsignal.signal(signal.SIGALRM, lambda *a: None)\nwhile True: pass",
    );
    assert_times_out(
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    );
    assert_times_out("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)");
    assert_times_out("while True: print('x' * 10**6)");
    assert_times_out("import sys\nwhile True: sys.stderr.write('x' * 10**6)");
    // Non-daemon threads do not keep it.
    assert_passes(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
    );
}

#[test]
fn a_bomb_of_threads_ends_and_leaves_nothing() {
    let bomb = "import threading, time\nthreading.stack_size(65536)\n\
                while True:\n    try: threading.Thread(target=time.sleep, args=(1000,)).start()\n    except RuntimeError: pass";
    assert_times_out(bomb);
    assert_times_out(&bomb.replace("threading.stack_size(65536)", ""));
}

#[test]
fn it_takes_no_more_memory_than_allowed() {
    assert_fails_with("x = bytearray(5 << 30)", "MemoryError");
    assert_passes("x = bytearray(64 << 20)");
    let mut sandbox = sandbox();
    sandbox.limits.memory = 256 << 20;
    let verdict = run(&sandbox, "x = []\nwhile True: x.append(bytearray(16 << 20))");
    assert!(
        matches!(&verdict, Verdict::Failed(reason) if reason.contains("MemoryError")),
        "{verdict}"
    );
}

#[test]
fn it_writes_nowhere_but_in_its_folder() {
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&secret, "kept").unwrap();
    let path = secret.path().display();
    for attack in [
        format!("open('{path}', 'w')"),
        format!("open('{path}', 'a')"),
        format!("open('{path}', 'r+')"),
        format!("import os\nos.open('{path}', os.O_RDONLY | os.O_TRUNC)"),
        format!("import os\nos.truncate('{path}', 0)"),
        format!("import os\nos.remove('{path}')"),
        format!("import os\nos.rename('{path}', 'x')"),
        format!("import os\nos.link('{path}', 'x')"),
        format!("import os\nos.symlink('{path}', 'x')"),
        format!("import os\nos.chmod('{path}', 0)"),
        format!("import os\nos.utime('{path}')"),
        format!("import os\nos.setxattr('{path}', 'user.x', b'1')"),
        "import os\nopen('/tmp/from-the-sandbox', 'w')".into(),
        "import os\nopen('/dev/shm/from-the-sandbox', 'w')".into(),
        "import os\nos.mkdir('/tmp/from-the-sandbox')".into(),
        "import os\nos.mkfifo('x')".into(),
        "import os\nos.mkdir('x')".into(),
        "import os\nos.rmdir(os.getcwd())".into(),
        "import shutil, os\nshutil.rmtree(os.getcwd())".into(),
    ] {
        for sandbox in [sandbox(), without_landlock()] {
            let verdict = run(&sandbox, &attack);
            let refused = matches!(&verdict, Verdict::Failed(r) if r.contains("Error: [Errno"));
            assert!(refused, "{verdict}: {attack}");
        }
    }
    assert_eq!(std::fs::read_to_string(&secret).unwrap(), "kept");
    assert!(!Path::new("/tmp/from-the-sandbox").exists());
    assert!(!Path::new("/dev/shm/from-the-sandbox").exists());

    let own = "import os\nopen('x', 'w').write('y')\nassert open('x').read() == 'y'\n\
               os.rename('x', 'z'); os.remove('z')";
    assert!(matches!(run(&without_landlock(), own), Verdict::Failed(_)));
    if !sandbox().landlock {
        return eprintln!("this kernel has no Landlock");
    }
    assert_eq!(run(&sandbox(), own), Verdict::Passed);
    assert_stops("for i in range(10**6): open(str(i), 'wb').write(b'x' * 2**22)");
    let mut small = sandbox();
    small.limits.file_size = 1 << 20;
    let verdict = run(&small, "for i in range(10**6): open(str(i), 'wb')");
    assert_eq!(verdict.to_string(), "stopped: it wrote too many files");
    let big = "f = open('x', 'wb')\nfor i in range(100): f.write(b'x' * 2**20)";
    assert_fails_with(big, "Error: [Errno");
    let open = "x = [open('/dev/zero') for i in range(100)]";
    assert_fails_with(open, "Too many open files");
}

#[test]
fn it_reads_no_file_of_the_user() {
    let sandbox = sandbox();
    if !sandbox.landlock {
        return eprintln!("this kernel has no Landlock");
    }
    let secret = tempfile::NamedTempFile::new().unwrap();
    for path in [
        secret.path(),
        Path::new("/etc/passwd"),
        Path::new("/proc/self/environ"),
        Path::new("/proc/1/cmdline"),
    ] {
        let verdict = sandbox.run(&format!("open({path:?})")).unwrap();
        assert!(verdict.to_string().contains("Permission denied"), "{verdict}");
    }
    for folder in ["/", "/root", "/work", "/home", "/tmp"] {
        let verdict = sandbox.run(&format!("import os\nos.listdir({folder:?})")).unwrap();
        assert!(verdict.to_string().starts_with("failed: "), "{folder}: {verdict}");
    }
    let verdict =
        sandbox.run(&format!("import os\nos.execv({:?}, ['x'])", sandbox.program)).unwrap();
    assert!(verdict.to_string().contains("Permission denied"), "{verdict}");
}

#[test]
fn several_run_at_a_time_and_leave_no_folder_and_no_process() {
    let mut sandbox = sandbox();
    sandbox.limits.time = Duration::from_micros(3_017_100); // in the command lines of these processes alone, as seconds and in nanoseconds
    let folder = |i: usize, j: usize| {
        let program = format!("import os\nif {i} % 2 == {j} % 2: raise ValueError(os.getcwd())");
        match sandbox.run(&program).unwrap() {
            Verdict::Failed(reason) => Some(PathBuf::from(reason.split_once(": ").unwrap().1)),
            other => {
                assert_eq!(other, Verdict::Passed);
                assert_ne!(i % 2, j % 2);
                None
            }
        }
    };
    let folders: Vec<PathBuf> = std::thread::scope(|scope| {
        let folder = &folder;
        let each = |i| scope.spawn(move || (0..4).filter_map(|j| folder(i, j)).collect::<Vec<_>>());
        let threads: Vec<_> = (0..8).map(each).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(folders.len(), 16);
    assert!(folders.iter().all(|folder| folder.is_absolute() && !folder.exists()), "{folders:?}");
    assert_eq!(processes_with("3.0171") + processes_with("17100000"), 0);
}

#[test]
fn what_is_not_the_programs_fault_is_an_error() {
    let good = sandbox();
    let error =
        Sandbox::new(good.program.clone(), "no-such-python", Limits::default()).unwrap_err();
    assert!(format!("{error:#}").contains("no-such-python"), "{error:#}");
    let error = Sandbox::new(good.program.clone(), "/bin/ls", Limits::default()).unwrap_err();
    assert!(format!("{error:#}").contains("no Python 3"), "{error:#}");
    let gone = Sandbox { python: "/usr/bin/gone".into(), ..good.clone() };
    let error = gone.run("").unwrap_err();
    assert!(format!("{error:#}").contains("/usr/bin/gone"), "{error:#}");
    let small = Sandbox { limits: Limits { memory: 1 << 20, ..Limits::default() }, ..good.clone() };
    assert!(small.run("").is_err());
}
