//! Folders of checkpoints: which is the newest, what a save that fails or is killed leaves, disks that are full.

use super::*;

fn save_step(out_dir: &Path, name: &str, model: &GPT, step: u64) -> PathBuf {
    checkpoint::save_atomically(out_dir, name, |dir| write_checkpoint(dir, model, step)).unwrap()
}

/// Names of everything in a folder.
fn names(dir: &Path) -> Vec<String> {
    let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

#[test]
fn the_newest_checkpoint_is_chosen_by_integer_step() {
    let out = tempfile::tempdir().unwrap();
    let model = random_model(&tiny_llama());
    for step in [999_999, 1_000_000, 5] {
        save_step(out.path(), &format!("step-{step:06}"), &model, step);
    }
    let steps: Vec<u64> =
        checkpoint::list(out.path()).unwrap().into_iter().map(|(s, _)| s).collect();
    assert_eq!(steps, [5, 999_999, 1_000_000]);
    let newest = out.path().join("step-1000000");
    assert_eq!(checkpoint::latest(out.path()).unwrap(), Some(newest));
    // `final` is as new as its own counter says.
    let last = save_step(out.path(), "final", &model, 1_000_000);
    assert_eq!(checkpoint::latest(out.path()).unwrap(), Some(last.clone()));
    save_step(out.path(), "step-1000001", &model, 1_000_001);
    assert_ne!(checkpoint::latest(out.path()).unwrap(), Some(last));
    assert_eq!(checkpoint::latest(&out.path().join("nothing")).unwrap(), None);
}

#[test]
fn unfinished_folders_are_no_checkpoints() {
    let out = tempfile::tempdir().unwrap();
    let model = random_model(&tiny_llama());
    save_step(out.path(), "step-00000001", &model, 1);
    let sound = checkpoint::list(out.path()).unwrap();
    for (name, missing) in
        [("step-00000002", "model.safetensors"), ("step-00000003", "config.json")]
    {
        save_step(out.path(), name, &model, 9);
        fs::remove_file(out.path().join(name).join(missing)).unwrap();
    }
    for name in ["step-", "step-12x", "other", ".tmp-step-00000009-1"] {
        fs::create_dir(out.path().join(name)).unwrap();
        write_checkpoint(&out.path().join(name), &model, 9).unwrap();
    }
    fs::write(out.path().join("step-00000010"), "a file").unwrap();
    assert_eq!(checkpoint::list(out.path()).unwrap(), sound);
}

#[test]
fn a_failed_save_leaves_the_previous_checkpoint_and_no_rubbish() {
    let out = tempfile::tempdir().unwrap();
    let model = random_model(&tiny_llama());
    save_step(out.path(), "final", &model, 1);
    let failed = checkpoint::save_atomically(out.path(), "final", |dir| {
        checkpoint::save_model(dir, &model.config, &model.named_parameters(), None)?;
        // Half way through a save the old one is what a reader gets.
        let seen = checkpoint::latest(out.path())?.unwrap();
        assert_eq!(checkpoint::load_counters(&seen)?.step, 1);
        anyhow::bail!("the power went")
    });
    assert!(message(failed).contains("the power went"));
    assert_eq!(names(out.path()), ["final"]);
    assert_eq!(checkpoint::load_counters(&out.path().join("final")).unwrap().step, 1);
}

#[test]
fn a_folder_of_the_same_name_is_replaced() {
    let out = tempfile::tempdir().unwrap();
    let model = random_model(&tiny_llama());
    save_step(out.path(), "final", &model, 1);
    fs::write(out.path().join("final/left_over"), "").unwrap();
    let path = save_step(out.path(), "final", &model, 2);
    assert_eq!(checkpoint::load_counters(&path).unwrap().step, 2);
    assert_eq!(names(out.path()), ["final"]);
    let inside = ["config.json", "generation_config.json", "model.safetensors", "train_state"];
    assert_eq!(names(&path), inside);
}

#[test]
fn what_a_dead_process_left_is_swept_and_what_stepped_aside_comes_back() {
    let out = tempfile::tempdir().unwrap();
    let model = random_model(&tiny_llama());
    save_step(out.path(), "final", &model, 4);
    // Died while writing, and between the two renames of a replacement.
    fs::create_dir_all(out.path().join(".tmp-step-00000005-4242/train_state")).unwrap();
    fs::rename(out.path().join("final"), out.path().join(".old-final")).unwrap();
    let found = checkpoint::latest(out.path()).unwrap().unwrap();
    assert_eq!(checkpoint::load_counters(&found).unwrap().step, 4);
    checkpoint::load_model(&found, Kind::Float, Device::Cpu).unwrap();
    // Another run's folder in the making is left alone.
    let alive = out.path().join(".tmp-step-00000006-4243");
    fs::create_dir_all(&alive).unwrap();
    let lock = fs::File::open(&alive).unwrap();
    lock.try_lock().unwrap();
    checkpoint::sweep(out.path()).unwrap();
    assert_eq!(names(out.path()), [".tmp-step-00000006-4243", "final"]);
    drop(lock);
    // Died after both renames: the replaced one is still there.
    fs::create_dir(out.path().join(".old-final")).unwrap();
    checkpoint::sweep(out.path()).unwrap();
    assert_eq!(names(out.path()), ["final"]);
    assert_eq!(checkpoint::load_counters(&out.path().join("final")).unwrap().step, 4);
}

/// The process that `a_process_killed_at_any_moment_leaves_a_sound_checkpoint` kills.
#[test]
#[ignore = "saves without end"]
fn saves_until_killed() {
    let out = PathBuf::from(std::env::var("TINYLLAMA_KILL_DIR").expect("TINYLLAMA_KILL_DIR"));
    let model = random_model(&tiny_llama());
    let newest = checkpoint::latest(&out).unwrap();
    let before = newest.map_or(0, |dir| checkpoint::load_counters(&dir).unwrap().step);
    for step in before + 1.. {
        save_step(&out, "final", &model, step);
        fs::write(out.join("saved"), "").unwrap();
    }
}

#[test]
fn a_process_killed_at_any_moment_leaves_a_sound_checkpoint() {
    const KILLS: u64 = 8;
    let out = tempfile::tempdir().unwrap();
    let (mut newest, mut unfinished) = (0, 0);
    for round in 0..KILLS {
        let signal = out.path().join("saved");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "checkpoint::folders::saves_until_killed",
                "--ignored",
                "--test-threads=1",
            ])
            .env("TINYLLAMA_KILL_DIR", out.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while !signal.exists() && started.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        // A save takes some 10 to 100 ms: steps of 13 ms come down on all parts of it.
        std::thread::sleep(Duration::from_millis(13 * round));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        fs::remove_file(signal).unwrap();

        unfinished += usize::from(names(out.path()) != ["final"]);
        let found = checkpoint::latest(out.path()).unwrap().expect("a checkpoint");
        checkpoint::load_model(&found, Kind::Float, Device::Cpu).unwrap();
        let (state, ..) = checkpoint::load_train_state(&found).unwrap();
        assert!(state.step > newest, "step {} after step {newest}", state.step);
        newest = state.step;
    }
    println!("step {newest} after {KILLS} kills, {unfinished} of them in the middle of a save");
    checkpoint::sweep(out.path()).unwrap();
    assert_eq!(names(out.path()), ["final"]);
}

#[test]
fn prune_keeps_the_newest_and_final() {
    let out = tempfile::tempdir().unwrap();
    let model = random_model(&tiny_llama());
    for step in [9, 10, 100, 1000] {
        save_step(out.path(), &format!("step-{step}"), &model, step);
    }
    save_step(out.path(), "final", &model, 1000);
    checkpoint::prune(out.path(), 2).unwrap();
    assert_eq!(names(out.path()), ["final", "step-100", "step-1000"]);
    checkpoint::prune(out.path(), 0).unwrap();
    assert_eq!(names(out.path()), ["final", "step-1000"]);
}

#[test]
fn a_checkpoint_is_found_by_its_folder_its_run_or_a_file_in_it() {
    let out = tempfile::tempdir().unwrap();
    let model = random_model(&tiny_llama());
    let one = save_step(out.path(), "step-00000001", &model, 1);
    let two = save_step(out.path(), "step-00000002", &model, 2);
    assert_eq!(checkpoint::resolve(&one).unwrap(), one);
    assert_eq!(checkpoint::resolve(out.path()).unwrap(), two);
    assert_eq!(checkpoint::resolve(&one.join("model.safetensors")).unwrap(), one);
    assert_eq!(checkpoint::resolve(&one.join("train_state/optimizer.safetensors")).unwrap(), one);
    // A `final` whose train state was thrown away to save room.
    let last = save_step(out.path(), "final", &model, 3);
    assert_eq!(checkpoint::resolve(out.path()).unwrap(), last);
    for dir in [&one, &two, &last.join("train_state")] {
        fs::remove_dir_all(dir).unwrap();
    }
    assert_eq!(checkpoint::resolve(out.path()).unwrap(), last);

    // A file beside a model is not the model.
    for name in ["model-00002.safetensors", "tokenizer.json"] {
        fs::write(last.join(name), "{}").unwrap();
        let told = message(checkpoint::resolve(&last.join(name)));
        assert!(told.contains("no part of the weights"), "{told}");
        assert!(told.contains("they are in `model.safetensors`"), "{told}");
    }
    assert_eq!(checkpoint::resolve(&last.join("config.json")).unwrap(), last);

    let empty = tempfile::tempdir().unwrap();
    let told = message(checkpoint::resolve(empty.path()));
    for looked_for in ["config.json", "final/", "step-*/", "model.safetensors"] {
        assert!(told.contains(looked_for), "{told}");
    }
    let told = message(checkpoint::resolve(&empty.path().join("nowhere")));
    assert!(told.contains("does not exist"), "{told}");
    fs::write(empty.path().join("weights.pth"), "").unwrap();
    let told = message(checkpoint::resolve(&empty.path().join("weights.pth")));
    assert!(told.contains("no checkpoint of a format that is known here"), "{told}");
    fs::write(empty.path().join("model.safetensors"), "").unwrap();
    let told = message(checkpoint::resolve(&empty.path().join("model.safetensors")));
    assert!(told.contains("no `config.json` beside"), "{told}");
}

#[test]
fn tokenizer_files_are_copied_and_never_onto_themselves() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = from.path().join("tokenizer.json");
    fs::write(&file, "{}").unwrap();
    checkpoint::copy_files(std::slice::from_ref(&file), to.path()).unwrap();
    checkpoint::copy_files(std::slice::from_ref(&file), from.path()).unwrap();
    for dir in [&from, &to] {
        assert_eq!(fs::read_to_string(dir.path().join("tokenizer.json")).unwrap(), "{}");
    }
    let told = message(checkpoint::copy_files(&[from.path().join("gone.model")], to.path()));
    assert!(told.contains("gone.model"), "{told}");
}

// Full disk

/// A small file system of its own, unmounted at the end.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(dir.path())
            .output();
        match mount {
            Ok(output) if output.status.success() => Some(Self(dir)),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr);
                eprintln!("skipped: a small file system cannot be mounted: {}", why.trim());
                None
            }
            Err(why) => {
                eprintln!("skipped: `mount` cannot be run: {why}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_disk_that_fills_up_while_writing_is_told_and_the_previous_checkpoint_survives() {
    let model = random_model(&tiny_llama());
    let one = tempfile::tempdir().unwrap();
    write_checkpoint(one.path(), &model, 1).unwrap();
    let size = fs::metadata(one.path().join("model.safetensors")).unwrap().len();
    // Room for a first checkpoint and a part of the second: the disk is full at each kind of file.
    let mut at = Vec::new();
    for room in [0, 8 << 10, size / 2, size + (12 << 10), size + (24 << 10)] {
        let Some(disk) = SmallDisk::new(6 * size) else {
            return;
        };
        let out = disk.0.path();
        save_step(out, "step-00000001", &model, 1);
        let filler = checkpoint::free_bytes(out).unwrap() - room;
        fs::write(out.join("filler"), vec![0; filler as usize]).unwrap();
        let failed = checkpoint::save_atomically(out, "step-00000002", |dir| {
            write_checkpoint(dir, &model, 2)
        });
        let error = failed.expect_err("the disk is full");
        let told = format!("{error:#}");
        assert!(told.contains("out of disk: a checkpoint needs more than the"), "{told}");
        assert!(told.contains(out.to_str().unwrap()) && told.contains("free"), "{told}");
        assert_eq!(error::exit_code(&error), error::exit::FAILED);
        println!("{told}");
        at.push(told);

        assert_eq!(names(out), ["filler", "step-00000001"]);
        let found = checkpoint::latest(out).unwrap().unwrap();
        let back = checkpoint::load_model(&found, Kind::Float, Device::Cpu).unwrap();
        assert!(same_bits(&model, &back));
        // With room again, the same save works.
        fs::remove_file(out.join("filler")).unwrap();
        save_step(out, "step-00000002", &model, 2);
    }
    for file in ["config.json", "model.safetensors", "optimizer.safetensors"] {
        assert!(at.iter().any(|told| told.contains(file)), "never full at {file}");
    }
}

#[test]
fn too_little_space_is_told_before_anything_is_written() {
    let out = tempfile::tempdir().unwrap();
    let model = random_model(&tiny_llama());
    let named = model.named_parameters();
    let needed = checkpoint::required_bytes(named.iter().map(|(_, t)| t));
    assert!(needed > 4 * model.n_params());
    checkpoint::check_space(&out.path().join("not/there/yet"), needed).unwrap();
    let told = message(checkpoint::check_space(out.path(), 1 << 60));
    assert!(told.contains("out of disk: a checkpoint needs 1073741824.0 GiB"), "{told}");
    assert!(told.contains(out.path().to_str().unwrap()) && told.contains("GiB free"), "{told}");

    // What a dead process left is given up for a new checkpoint.
    let Some(disk) = SmallDisk::new(1 << 20) else {
        return;
    };
    let left = disk.0.path().join(".tmp-step-00000001-1");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("model.safetensors"), vec![0; 900 << 10]).unwrap();
    checkpoint::check_space(disk.0.path(), 512 << 10).unwrap();
    assert!(!left.exists());
}
