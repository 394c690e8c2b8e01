//! Whole runs of several processes through the program, on the CPU over Gloo.

use crate::common::card;
use crate::pretrain::{Setup, text, wait_for, weights};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tinyllama::data::packed::PackedWriter;

/// A small learning rate: sums in another order grow with it.
const ALIKE: &[&str] = &[
    "--set",
    "optimizer.lr=1e-4",
    "--set",
    "train.global_batch_size=12",
    "--set",
    "train.micro_batch_size=1",
    "--set",
    "train.min_lr=1e-5",
    "--set",
    "distributed.heartbeat_timeout=4",
];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    ALIKE.iter().copied().chain(more.iter().copied()).collect()
}

type Steps = Vec<(u64, f64, f64, f64)>;

fn assert_alike(got: &Steps, want: &Steps, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: {got:?}");
    for (got, want) in got.iter().zip(want) {
        let error = |a: f64, b: f64| (a / b - 1.0).abs();
        let (loss, norm) = (error(got.1, want.1), error(got.2, want.2));
        assert!(got.0 == want.0 && loss < 1e-6 && norm < 1e-5, "{what}: {got:?}, {want:?}");
    }
}

#[test]
fn processes_train_as_one_and_what_four_saved_goes_on_in_one_two_or_three() {
    let setup = Setup::new();
    let alone = setup.run("alone", &with(&[]));
    assert!(alone.status.success(), "{}", text(&alone));
    let want = setup.losses("alone");

    let four = setup.run("four", &with(&["--devices", "4"]));
    assert!(four.status.success(), "{}", text(&four));
    assert_alike(&setup.losses("four"), &want, "4 ranks");
    let told = text(&four);
    for line in ["4 ranks x 1 micro x 3", "full_shard", "beside training", "saved", "try next:"] {
        assert!(told.contains(line), "no `{line}` in {told}");
    }
    assert!(setup.path("four/logs/rank-00003.log").is_file());
    let state = setup.path("four/step-00000010/train_state");
    assert!(state.join("optimizer-00004-of-00004.safetensors").is_file());
    assert_eq!(
        fs::read_dir(setup.path("four"))
            .unwrap()
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with('.'))
            .count(),
        0
    );

    let from = setup.path("four/step-00000010").display().to_string();
    let want: Steps = want.into_iter().filter(|step| step.0 > 10).collect();
    for (out, ranks, strategy) in [
        ("one", "1", "full_shard"),
        ("two", "2", "shard_grad_op"),
        ("three", "3", "full_shard"),
        ("ddp", "2", "ddp"),
    ] {
        let strategy = format!("distributed.strategy={strategy}");
        let more = ["--devices", ranks, "--resume", &from, "--set", &strategy];
        let resumed = setup.run(out, &with(&more));
        assert!(resumed.status.success(), "{}", text(&resumed));
        assert_alike(&setup.losses(out), &want, out);
    }
}

#[test]
fn ranks_that_share_a_card_over_gloo_train_as_one_process_there() {
    let name = "ranks_that_share_a_card_over_gloo_train_as_one_process_there";
    let Some(_card) = card(name) else { return };
    let setup = Setup::new();
    let more = with(&["--set", "device=cuda", "--set", "distributed.backend=gloo"]);
    let alone = setup.run("alone", &more);
    assert!(alone.status.success(), "{}", text(&alone));
    for strategy in ["full_shard", "hybrid_shard", "shard_grad_op", "ddp"] {
        let set = format!("distributed.strategy={strategy}");
        let two = setup.run(strategy, &[&more[..], &["--devices", "2", "--set", &set]].concat());
        assert!(two.status.success(), "{}", text(&two));
        assert!(text(&two).contains("2 over Gloo"), "{}", text(&two));
        let (got, want) = (setup.losses(strategy), setup.losses("alone"));
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            assert!((got.1 / want.1 - 1.0).abs() < 1e-5, "{strategy}: {got:?}, {want:?}");
        }
    }
}

/// Process ids of a launcher's workers, by rank.
fn workers(launcher: &Child) -> Vec<(usize, i32)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        if parent != Some(launcher.id().to_string().as_str()) {
            continue;
        }
        let environment = read("environ");
        let rank = environment.split('\0').find_map(|v| v.strip_prefix("RANK="));
        if let Some(rank) = rank.and_then(|rank| rank.parse().ok()) {
            found.push((rank, pid));
        }
    }
    found.sort();
    found
}

fn kill(pid: i32, signal: &str) {
    let done = Command::new("kill").args([signal, &pid.to_string()]).status();
    assert!(done.unwrap().success());
}

#[test]
fn a_rank_that_is_killed_ends_the_job_and_the_next_start_goes_on_bit_for_bit() {
    let setup = Setup::new();
    let more = with(&["--devices", "2", "--resume", "auto", "--set", "train.max_steps=400"]);
    let straight = setup.run("straight", &more);
    assert!(straight.status.success(), "{}", text(&straight));

    let mut launcher = setup.start("killed", &more);
    wait_for("a checkpoint", || setup.path("killed/step-00000005/config.json").is_file());
    let ranks = workers(&launcher);
    assert_eq!(ranks.len(), 2, "{ranks:?}");
    kill(ranks[1].1, "-9");
    let killed = Instant::now();
    let status = launcher.wait().unwrap();
    assert!(killed.elapsed() < Duration::from_secs(30));
    let mut told = String::new();
    std::io::Read::read_to_string(launcher.stderr.as_mut().unwrap(), &mut told).unwrap();
    assert_eq!(status.code(), Some(1), "{told}");
    assert!(told.contains("rank 1") && told.contains("signal 9"), "{told}");

    let resumed = setup.run("killed", &more);
    assert!(resumed.status.success(), "{}", text(&resumed));
    assert!(text(&resumed).contains("resume"), "{}", text(&resumed));
    assert_eq!(setup.losses("killed"), setup.losses("straight"));
    let last = |out: &str| weights(&setup.path(out).join("final"));
    assert!(last("killed") == last("straight"));
}

#[test]
fn a_signal_to_the_launcher_saves_once_on_all_ranks() {
    let setup = Setup::new();
    let more = with(&[
        "--devices",
        "2",
        "--resume",
        "auto",
        "--set",
        "train.max_steps=100000",
        "--set",
        "train.save_interval=null",
    ]);
    let mut launcher = setup.start("out", &more);
    wait_for("steps", || setup.losses("out").len() > 3);
    kill(launcher.id() as i32, "-TERM");
    let status = launcher.wait().unwrap();
    let mut told = String::new();
    std::io::Read::read_to_string(launcher.stderr.as_mut().unwrap(), &mut told).unwrap();
    assert_eq!(status.code(), Some(143), "{told}");
    assert_eq!(told.matches("stopped by signal 15; saved").count(), 1, "{told}");
    let saved = fs::read_dir(setup.path("out")).unwrap().flatten();
    let steps = saved.filter(|e| e.file_name().to_string_lossy().starts_with("step-")).count();
    assert_eq!(steps, 1);
}

#[test]
fn what_ranks_cannot_do_is_told_before_training() {
    let setup = Setup::new();
    let refused = setup.run("a", &with(&["--devices", "5"]));
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused).contains("12 is not divisible by 5 rank(s)"), "{}", text(&refused));
    let refused = setup.run("b", &["--set", "distributed.strategy=zero"]);
    assert_eq!(refused.status.code(), Some(2));
    let told = text(&refused);
    assert!(told.contains("distributed.strategy") && told.contains("hybrid_shard"), "{told}");
    // One task of Slurm on each of two nodes, which have three cards each.
    let mut task = Command::new(env!("CARGO_BIN_EXE_tinyllama"));
    task.args(setup.args("c", &with(&["--devices", "3", "--set", "num_nodes=2"])));
    task.env("SLURM_PROCID", "0").env("SLURM_LOCALID", "0").env("SLURM_NTASKS", "2");
    let refused = task.env("SLURM_JOB_NODELIST", "localhost").env("SLURM_JOB_ID", "7").output();
    let refused = refused.unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let told = text(&refused);
    assert!(told.contains("one task on each of 2 nodes") && told.contains("NODE_RANK"), "{told}");
}

#[test]
fn ranks_whose_time_was_up_are_through_when_they_are_started_again() {
    let setup = Setup::new();
    let more = ["--resume", "auto", "--devices", "2", "--set", "train.max_steps=1000000"];
    let more =
        [&more[..], &["--set", "train.max_time=1.5", "--set", "eval.interval=null"]].concat();
    let first = setup.run("out", &more);
    assert!(first.status.success(), "{}", text(&first));
    let end = setup.path("out").join("final");
    let (steps, before) = (setup.losses("out").len(), weights(&end));
    let again = setup.run("out", &more);
    assert!(again.status.success(), "{}", text(&again));
    assert!(
        text(&again).contains(&format!("finished    step {steps} was the last")),
        "{}",
        text(&again)
    );
    assert_eq!(setup.losses("out").len(), steps);
    assert!(weights(&end) == before);
}

/// Two network namespaces with a cable between them: two nodes on one machine.
struct Nodes {
    names: [String; 2],
}

impl Nodes {
    const ADDRESSES: [&str; 2] = ["10.213.7.1", "10.213.7.2"];

    /// `None` after saying why, where this process may not make them.
    fn new(test: &str) -> Option<Self> {
        let names = [0, 1].map(|i| format!("tinyllama-{}-{i}", std::process::id()));
        let nodes = Self { names };
        let [a, b] = &nodes.names;
        let ip = |args: &str| {
            let run =
                Command::new("ip").args(args.split(' ')).output().map_err(|e| e.to_string())?;
            let told = String::from_utf8_lossy(&run.stderr).into_owned();
            if run.status.success() { Ok(()) } else { Err(format!("`ip {args}`: {told}")) }
        };
        let cable = format!("link add v0 netns {a} type veth peer name v1 netns {b}");
        let made = ip(&format!("netns add {a}"))
            .and_then(|()| ip(&format!("netns add {b}")))
            .and_then(|()| ip(&cable));
        let plugged = made.and_then(|()| {
            for (i, name) in nodes.names.iter().enumerate() {
                ip(&format!("-n {name} addr add {}/24 dev v{i}", Self::ADDRESSES[i]))?;
                ip(&format!("-n {name} link set v{i} up"))?;
                ip(&format!("-n {name} link set lo up"))?;
            }
            Ok(())
        });
        match plugged {
            Ok(()) => Some(nodes),
            Err(reason) => {
                eprintln!("skipped {test}: no network namespaces: {reason}");
                None
            }
        }
    }

    /// The same command on both nodes, two ranks each; what they said, if both ended well.
    fn run(&self, setup: &Setup, port: u16, out: &str, more: &[&str]) -> [String; 2] {
        let args = setup.args(out, &with(more));
        let start = |i: usize| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &self.names[i], env!("CARGO_BIN_EXE_tinyllama")]);
            command.args(&args).args(["--devices", "2", "--set", "num_nodes=2"]);
            command.env("NODE_RANK", i.to_string()).env("MASTER_ADDR", Self::ADDRESSES[0]);
            command.env("MASTER_PORT", port.to_string());
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let both = [start(0), start(1)].map(|child| child.wait_with_output().unwrap());
        for output in &both {
            assert!(output.status.success(), "{}", both.each_ref().map(text).join("\n---\n"));
        }
        both.each_ref().map(text)
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

#[test]
fn two_nodes_of_two_ranks_train_as_one_process_and_resume() {
    let Some(nodes) = Nodes::new("two_nodes_of_two_ranks_train_as_one_process_and_resume") else {
        return;
    };
    let setup = Setup::new();
    let alone = setup.run("alone", &with(&[]));
    assert!(alone.status.success(), "{}", text(&alone));
    let want = setup.losses("alone");

    let hybrid = "distributed.strategy=hybrid_shard";
    let told = nodes.run(&setup, 29_610, "nodes", &["--set", hybrid]);
    assert!(told[0].contains("4 ranks x 1 micro x 3"), "{}", told[0]);
    assert_alike(&setup.losses("nodes"), &want, "two nodes");

    let from = setup.path("nodes/step-00000010").display().to_string();
    nodes.run(&setup, 29_611, "resumed", &["--resume", &from]);
    let rest: Steps = want.into_iter().filter(|step| step.0 > 10).collect();
    assert_alike(&setup.losses("resumed"), &rest, "two nodes, resumed with full_shard");
}

#[test]
fn ranks_agree_on_where_their_data_end() {
    let setup = Setup::new(); // 235 blocks, 19 steps of 12
    let set = ["--set", "data.epochs=1", "--set", "train.max_steps=100", "--devices", "2"];
    let two = setup.run("two", &with(&set));
    let told = text(&two);
    assert!(two.status.success(), "{told}");
    assert_eq!(setup.losses("two").len(), 19);
    assert_eq!(
        told.matches("at an end after step 19: `train` is through 1 epoch").count(),
        1,
        "{told}"
    );
}

#[test]
fn the_script_that_checks_a_machines_ranks_passes_here_and_tells_ranks_that_train_otherwise() {
    let setup = Setup::new();
    let check = |program: &Path| {
        let mut command = Command::new("python3");
        command.args(["scripts/check_ranks.py", &setup.path("run.yaml").display().to_string()]);
        command.args(["2", "4"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        let output = command.env("TINYLLAMA", program).output().unwrap();
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), format!("{out}{}", text(&output)))
    };
    let program = env!("CARGO_BIN_EXE_tinyllama");
    let (code, told) = check(program.as_ref());
    assert_eq!(code, Some(0), "{told}");
    for line in [
        "1 rank, micro-batches of 2",
        "2 ranks, full_shard",
        "2 ranks, ddp",
        "saved by 2, resumed by 1",
        "(SIGKILL)",
    ] {
        assert!(told.contains(line), "no `{line}` in {told}");
    }
    // Ranks that train at another rate than one does.
    let other = setup.path("other");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *'--devices 2'*) set -- \"$@\" --set optimizer.lr=2e-5;; esac\nexec {program} \"$@\"\n"
    );
    fs::write(&other, script).unwrap();
    fs::set_permissions(&other, fs::Permissions::from_mode(0o755)).unwrap();
    let (code, told) = check(&other);
    assert!(code == Some(1) && told.contains("(SIGKILL)"), "{told}");
}

/// A validation set that takes minutes.
fn long_validation(setup: &Setup) -> String {
    let long = setup.path("long");
    fs::create_dir(&long).unwrap();
    let mut writer = PackedWriter::new(&long, "long", 1_000_000, 90);
    writer.add(&(0..8_000_000).map(|i| i % 90).collect::<Vec<u32>>()).unwrap();
    writer.finish().unwrap();
    format!("data.val={}", long.display())
}

#[test]
fn a_checkpoint_is_written_before_the_validation_of_its_step() {
    let setup = Setup::new();
    let long = long_validation(&setup);
    let more = ["--set", &long, "--set", "eval.interval=5", "--set", "eval.max_iters=null"];
    let mut run = setup.start("out", &more);
    let saved = setup.path("out").join("step-00000005");
    wait_for("a checkpoint", || saved.join("config.json").is_file());
    run.kill().unwrap();
    run.wait().unwrap();
    assert_eq!(setup.losses("out").len(), 5);
    let text = fs::read_to_string(setup.path("out").join("metrics.jsonl")).unwrap();
    assert!(!text.contains("val_loss"), "{text}");
}

#[test]
fn a_signal_in_the_last_validation_loses_nothing_and_it_is_made_up_for() {
    let setup = Setup::new();
    let long = long_validation(&setup);
    for devices in ["1", "2"] {
        let all = ["--devices", devices, "--resume", "auto", "--set", "eval.interval=null"];
        let mut job = setup.start(devices, &[&all[..], &["--set", &long]].concat());
        let end = setup.path(devices).join("final");
        wait_for("the last checkpoint", || end.join("config.json").is_file());
        kill(job.id() as i32, "-TERM");
        let mut told = String::new();
        std::io::Read::read_to_string(job.stderr.as_mut().unwrap(), &mut told).unwrap();
        assert_eq!(job.wait().unwrap().code(), Some(143), "{told}");
        assert_eq!(
            told.matches("stopped by signal 15 in the last validation").count(),
            1,
            "{told}"
        );
        assert!(told.contains("validation  over the whole set: "), "{told}");
        assert_eq!(setup.losses(devices).len(), 20);
        let weights_then = weights(&end);

        let validations = || {
            let text = fs::read_to_string(setup.path(devices).join("metrics.jsonl")).unwrap();
            text.lines().filter(|line| line.contains("val_loss")).count()
        };
        assert_eq!(validations(), 0);
        for _ in 0..2 {
            let done = setup.run(devices, &all);
            assert!(done.status.success(), "{}", text(&done));
            assert!(text(&done).contains("finished    step 20 was the last"), "{}", text(&done));
            assert_eq!(validations(), 1, "validated once");
        }
        assert!(weights(&end) == weights_then);
    }
}
