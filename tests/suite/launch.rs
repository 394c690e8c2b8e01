//! Runs of several processes: starting, meeting, failing, stopping. The processes are this very test binary, in which
//! [`process`] plays the program: a launcher, or a worker that adds numbers with the others every few milliseconds.

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};
use tinyllama::config::RunConfig;
use tinyllama::distributed::{self, Job, World, rendezvous};
use tinyllama::error;
use tinyllama::ffi::ReduceOp;
use tinyllama::train::signals::{StopSignal, exit_code};

/// What a worker does but add numbers.
fn plan() -> Value {
    let text = std::env::var("TL_TEST_PLAN").unwrap_or_else(|_| "{}".into());
    serde_json::from_str(&text).unwrap()
}

#[test]
#[ignore = "the processes of the tests below"]
fn process() {
    let Ok(dir) = std::env::var("TL_TEST_DIR") else { return };
    let code = run(Path::new(&dir), &plan()).unwrap_or_else(|e| {
        error::report(&e);
        error::exit_code(&e)
    });
    std::process::exit(code.into());
}

fn run(dir: &Path, plan: &Value) -> anyhow::Result<u8> {
    let mut config = RunConfig { out_dir: dir.into(), ..RunConfig::default() };
    config.device.0 = "cpu".into();
    config.devices = plan["devices"].as_u64().unwrap_or(1);
    config.distributed.heartbeat_timeout = plan["heartbeat"].as_f64().unwrap_or(5.0);
    config.distributed.rendezvous_timeout = plan["patience"].as_f64().unwrap_or(20.0);
    config.distributed.timeout = plan["timeout"].as_f64().unwrap_or(60.0);
    let Some(world) = World::from_env()? else { return distributed::launch(&config) };
    if plan["other_seed"] == json!(world.rank) {
        config.seed = 7;
    }
    if plan["refuses"] == json!(world.rank) {
        return Err(rendezvous::refuse(&world, anyhow::anyhow!("my YAML is broken")));
    }
    distributed::meet(world, &config)?.run(|job| train(job, dir, plan))
}

/// Adds `rank + 1` over all ranks in every step, until told to stop.
fn train(job: &Job, dir: &Path, plan: &Value) -> anyhow::Result<u8> {
    let stop = StopSignal::install(false)?;
    let (rank, size) = (job.rank(), job.size() as f64);
    let mine = |key: &str, step: u64| plan[key] == json!([rank, step]);
    for step in 1..=plan["steps"].as_u64().unwrap_or(5) {
        job.tick(step, "adding");
        let sum = Tensor::full([2], rank as f64 + 1.0, (Kind::Float, job.device()));
        job.group().all_reduce(&sum, ReduceOp::Sum)?.wait()?;
        assert_eq!(sum.double_value(&[1]), size * (size + 1.0) / 2.0);
        job.tick(step, "resting");
        job.say(&format!("step {step} of rank {rank}"));
        fs::write(dir.join(format!("at-{rank}")), format!("{} {step}", std::process::id()))?;
        if mine("fails", step) {
            return Err(anyhow::anyhow!("no space left").context("cannot save"));
        }
        assert!(!mine("panics", step), "a bug");
        if mine("hangs", step) {
            std::thread::sleep(Duration::from_secs(600));
        }
        std::thread::sleep(Duration::from_millis(10));
        if let Some(signal) = job.agree_to_stop(stop.requested(), step) {
            let saved = dir.join(format!("saved-{rank}"));
            assert!(!saved.exists());
            fs::write(saved, step.to_string())?;
            return Ok(exit_code(signal));
        }
    }
    Ok(0)
}

/// A folder, and processes in it.
struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn command(&self, plan: &Value) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "launch::process", "--ignored", "--nocapture"]);
        command.args(["--quiet", "--test-threads=1"]).env("TL_TEST_DIR", self.dir.path());
        command.env("TL_TEST_PLAN", plan.to_string()).env("OMP_NUM_THREADS", "1");
        for name in ["RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "TL_LAUNCHER"] {
            command.env_remove(name);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn launch(&self, plan: &Value) -> Child {
        self.command(plan).spawn().unwrap()
    }

    /// One rank, as a shell loop starts it.
    fn rank(&self, rank: usize, size: usize, port: u16, plan: &Value) -> Child {
        self.rank_command(rank, size, port, plan).spawn().unwrap()
    }

    fn rank_command(&self, rank: usize, size: usize, port: u16, plan: &Value) -> Command {
        let mut command = self.command(plan);
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", size.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        command
    }

    fn ranks(&self, size: usize, plan: &Value) -> Vec<Child> {
        let port = free_port();
        (0..size).map(|rank| self.rank(rank, size, port, plan)).collect()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self, rank: usize) -> String {
        fs::read_to_string(self.path(&format!("logs/rank-{rank:05}.log"))).unwrap_or_default()
    }

    /// Waits until a rank has come to a step; its process number.
    fn wait_for_step(&self, rank: usize, step: u64) -> i32 {
        let start = Instant::now();
        loop {
            let text = fs::read_to_string(self.path(&format!("at-{rank}"))).unwrap_or_default();
            let mut words = text.split(' ').map(str::parse::<i32>);
            if let (Some(Ok(process)), Some(Ok(at))) = (words.next(), words.next())
                && at as u64 >= step
            {
                return process;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "rank {rank} never got to {step}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Exit code and stderr. A process that does not end in half a minute fails the test.
fn end(mut child: Child) -> (Option<i32>, String) {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
            panic!("still running after 30 s: {}", text(&child.wait_with_output().unwrap()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    (output.status.code(), text(&output))
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn signal(name: &str, process: i32) {
    assert!(Command::new("kill").args([name, &process.to_string()]).status().unwrap().success());
}

fn is_running(process: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    !matches!(status.rsplit(") ").next().and_then(|rest| rest.chars().next()), None | Some('Z'))
}

/// All words are there, and there is one error alone.
fn assert_told_once(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` is not in\n{text}");
    }
    assert_eq!(text.matches("error: ").count(), 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn a_launch_of_one_two_and_four_ends_well_with_rank_0_on_the_terminal_and_the_others_in_files() {
    for devices in [1, 2, 4] {
        let scene = Scene::new();
        let (code, stderr) = end(scene.launch(&json!({ "devices": devices })));
        assert_eq!(code, Some(0), "{stderr}");
        let lines: Vec<&str> = stderr.lines().collect();
        let workers = if devices == 1 { "worker" } else { "workers" };
        assert!(lines[0].starts_with(&format!("launch      {devices} {workers} on ")), "{stderr}");
        let steps: Vec<String> = (1..=5).map(|step| format!("step {step} of rank 0")).collect();
        assert_eq!(lines[1..], steps, "{stderr}");
        for rank in 1..devices {
            let log = scene.log(rank);
            assert!(log.contains(&format!("---- rank {rank} of {devices} on ")), "{log}");
            assert!(log.contains(&format!("step 5 of rank {rank}\n")), "{log}");
        }
    }
}

#[test]
fn the_standard_variables_are_obeyed_and_rank_0_alone_is_on_the_terminal() {
    let scene = Scene::new();
    for (rank, child) in scene.ranks(3, &json!({})).into_iter().enumerate() {
        let (code, stderr) = end(child);
        assert_eq!(code, Some(0), "{stderr}");
        assert_eq!(stderr.lines().count(), if rank == 0 { 5 } else { 0 }, "{stderr}");
        assert!(rank == 0 || scene.log(rank).contains("step 5"));
    }
    // Slurm's own, in a run that is alone on its node.
    let scene = Scene::new();
    let port = free_port().to_string();
    let slurm = |rank: &str| {
        let mut command = scene.command(&json!({}));
        command.env("SLURM_PROCID", rank).env("SLURM_LOCALID", rank).env("SLURM_NTASKS", "2");
        command.env("SLURM_JOB_NODELIST", "localhost").env("MASTER_PORT", &port);
        command.spawn().unwrap()
    };
    for child in [slurm("0"), slurm("1")] {
        let (code, stderr) = end(child);
        assert_eq!(code, Some(0), "{stderr}");
    }
}

#[test]
fn two_processes_with_one_rank_end_with_one_message_and_spare_a_run_that_is_under_way() {
    for twice in [0, 1] {
        let scene = Scene::new();
        let port = free_port();
        let first = scene.rank(twice, 2 + twice, port, &json!({}));
        let mut all = vec![first];
        if twice == 1 {
            all.push(scene.rank(0, 3, port, &json!({})));
        }
        std::thread::sleep(Duration::from_millis(1000));
        all.push(scene.rank(twice, 2 + twice, port, &json!({})));
        let ends: Vec<(Option<i32>, String)> = all.into_iter().map(end).collect();
        assert!(ends.iter().all(|(code, _)| *code == Some(2)), "{ends:?}");
        let said: String = ends.iter().map(|(_, text)| text.as_str()).collect();
        let what = format!("two processes have RANK={twice}: process ");
        assert_told_once(&said, &[&what, " on ", "hint: give each process its own RANK"]);
    }
    let scene = Scene::new();
    let port = free_port();
    let ranks: Vec<Child> =
        (0..2).map(|rank| scene.rank(rank, 2, port, &json!({ "steps": 200 }))).collect();
    scene.wait_for_step(0, 1);
    let (code, stderr) = end(scene.rank(0, 2, port, &json!({})));
    assert_eq!(code, Some(2));
    assert_told_once(&stderr, &["two processes have RANK=0", "another MASTER_PORT"]);
    assert!(ranks.into_iter().all(|child| end(child).0 == Some(0)));
}

#[test]
fn ranks_with_another_configuration_are_refused_by_key_rank_and_host() {
    let scene = Scene::new();
    let ends: Vec<_> = scene.ranks(3, &json!({ "other_seed": 2 })).into_iter().map(end).collect();
    assert!(ends.iter().all(|(code, _)| *code == Some(2)), "{ends:?}");
    let words = ["rank 2 on ", "has another configuration than rank 0 on ", "seed: 42 -> 7"];
    assert_told_once(&ends[0].1, &words);
    assert_eq!(ends[1].1.clone() + &ends[2].1, "");
    assert!(scene.log(1).contains("rank 1 ends, because rank 2 on "), "{}", scene.log(1));

    let scene = Scene::new();
    let ends: Vec<_> = scene.ranks(2, &json!({ "refuses": 1 })).into_iter().map(end).collect();
    assert_told_once(&ends[0].1, &["rank 1 on ", "failed", "caused by: my YAML is broken"]);
    assert_eq!((ends[0].0, ends[1].0), (Some(1), Some(1)));
}

#[test]
fn a_rank_that_finds_no_interface_ends_the_others_who_wait_for_it() {
    let (scene, port, plan) = (Scene::new(), free_port(), json!({ "timeout": 600 }));
    let first = scene.rank(0, 2, port, &plan);
    let mut second = scene.rank_command(1, 2, port, &plan);
    let second = second.env("GLOO_SOCKET_IFNAME", "ib7").spawn().unwrap();
    let ends = [end(first), end(second)];
    assert_eq!(ends.each_ref().map(|(code, _)| *code), [Some(2), Some(2)], "{ends:?}");
    assert_told_once(&ends[0].1, &["rank 1 on ", "GLOO_SOCKET_IFNAME=`ib7`: no such interface"]);
}

#[test]
fn a_master_that_does_not_answer_and_ranks_that_do_not_come_are_told_after_the_wait() {
    let scene = Scene::new();
    let port = free_port();
    let (code, stderr) = end(scene.rank(1, 2, port, &json!({ "patience": 1 })));
    assert_eq!(code, Some(1), "{stderr}");
    // Its local rank is 1: the rank with local rank 0 tells on the terminal, this one in its log.
    assert_eq!(stderr, "");
    let words = [
        &format!("no store of ranks answers at 127.0.0.1:{port} within 1s")[..],
        "hint: is rank 0",
    ];
    assert_told_once(&scene.log(1), &words);

    let alone = scene.rank(0, 4, port, &json!({ "patience": 1 }));
    let (code, stderr) = end(alone);
    assert_eq!(code, Some(1), "{stderr}");
    assert_told_once(&stderr, &["3 of 4 ranks (1, 2, 3) did not come to 127.0.0.1", "RANK"]);
}

#[test]
fn a_rank_that_is_killed_ends_all_with_its_name_host_and_last_line() {
    let long = json!({ "devices": 2, "steps": 100_000 });
    for killed in [0, 1] {
        let scene = Scene::new();
        let launcher = scene.launch(&long);
        let process = scene.wait_for_step(killed, 60);
        let other = scene.wait_for_step(1 - killed, 60);
        signal("-KILL", process);
        let start = Instant::now();
        let (code, stderr) = end(launcher);
        assert_eq!(code, Some(1), "{stderr}");
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        let (who, whose) = (format!("error: rank {killed} on "), format!(" of rank {killed}\n"));
        let what = "was killed by signal 9 (SIGKILL)";
        assert_told_once(&stderr, &[&who, what, "last line: step ", &whose]);
        assert!(!is_running(other));
    }
    // Without a launcher: rank 0 tells of the others, and rank 1 of rank 0.
    for (killed, words) in
        [(2, ["error: rank 2 on ", "no sign of life"]), (0, ["error: rank 0, ", "is gone"])]
    {
        let scene = Scene::new();
        let mut ranks = scene.ranks(3, &long);
        signal("-KILL", scene.wait_for_step(killed, 60));
        end(ranks.remove(killed));
        let ends: Vec<_> = ranks.into_iter().map(end).collect();
        assert!(ends.iter().all(|(code, _)| *code == Some(1)), "{ends:?}");
        let said: String = ends.iter().map(|(_, text)| text.as_str()).collect();
        let whose = format!(" of rank {killed}\n");
        assert_told_once(&said, &[&words[..], &["last line: step ", &whose, "hint: "]].concat());
    }
}

#[test]
fn a_stopped_rank_is_found_by_its_silence_and_leaves_no_process() {
    let plan = json!({ "devices": 2, "steps": 100_000, "heartbeat": 3 });
    let start = |stopped: usize| {
        let scene = Scene::new();
        let launcher = scene.launch(&plan);
        let process = scene.wait_for_step(stopped, 60);
        signal("-STOP", process);
        (scene, launcher, process, stopped)
    };
    for (_scene, launcher, process, stopped) in [start(0), start(1)] {
        let (code, stderr) = end(launcher);
        assert_eq!(code, Some(1), "{stderr}");
        let who = format!("error: rank {stopped} on ");
        assert_told_once(&stderr, &[&who, "gave no sign of life for 3 s", "last line: step "]);
        assert!(!is_running(process));
    }
}

#[test]
fn a_rank_that_hangs_is_named_though_the_others_wait_in_a_collective() {
    let scene = Scene::new();
    let plan = json!({ "devices": 3, "steps": 100_000, "hangs": [1, 4], "timeout": 1.5 });
    let (code, stderr) = end(scene.launch(&plan));
    assert_eq!(code, Some(1), "{stderr}");
    let words = ["error: rank 1 on ", "made no progress for ", "in step 4: resting"];
    assert_told_once(&stderr, &words);
}

#[test]
fn an_error_or_a_panic_of_one_rank_ends_all_with_its_causes() {
    for (launched, key, rank, cause) in [
        (true, "fails", 1, "caused by: cannot save\n  caused by: no space left\n"),
        (false, "fails", 1, "caused by: cannot save\n  caused by: no space left\n"),
        (false, "fails", 0, "caused by: no space left\n"),
        (true, "panics", 1, "internal error at tests/suite/launch.rs"),
        (true, "panics", 0, "internal error at tests/suite/launch.rs"),
    ] {
        let scene = Scene::new();
        let plan = json!({ "devices": 2, "steps": 100_000, key: [rank, 4] });
        let ends: Vec<_> = match launched {
            true => vec![end(scene.launch(&plan))],
            false => scene.ranks(2, &plan).into_iter().map(end).collect(),
        };
        assert!(ends.iter().all(|(code, _)| *code == Some(1)), "{ends:?}");
        let (who, whose) = (format!("error: rank {rank} on "), format!("of rank {rank}\n"));
        assert_told_once(&ends[0].1, &[&who, " failed\n", cause, &whose]);
        assert!(rank == 0 || ends[0].1.contains("its log: "), "{ends:?}");
        assert!(ends.get(1).is_none_or(|(_, said)| said.is_empty()), "{ends:?}");
    }
}

#[test]
fn a_signal_stops_all_ranks_at_one_step_once_whoever_gets_it() {
    for (to_worker, name, expected) in
        [(false, "-TERM", 143), (false, "-INT", 130), (true, "-TERM", 143)]
    {
        let scene = Scene::new();
        let launcher = scene.launch(&json!({ "devices": 2, "steps": 100_000 }));
        let worker = scene.wait_for_step(1, 3);
        scene.wait_for_step(0, 3);
        signal(name, if to_worker { worker } else { launcher.id() as i32 });
        let (code, stderr) = end(launcher);
        assert_eq!(code, Some(expected), "{stderr}");
        assert!(!stderr.contains("error"), "{stderr}");
        let saved = |rank: usize| fs::read_to_string(scene.path(&format!("saved-{rank}"))).unwrap();
        assert_eq!(saved(1), saved(0));
    }
}

#[test]
fn workers_do_not_outlive_a_launcher_that_is_killed() {
    let scene = Scene::new();
    let mut launcher = scene.launch(&json!({ "devices": 2, "steps": 100_000 }));
    let workers = [scene.wait_for_step(0, 2), scene.wait_for_step(1, 2)];
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    let start = Instant::now();
    while workers.iter().any(|process| is_running(*process)) {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
}
