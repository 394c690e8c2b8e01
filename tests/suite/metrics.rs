//! A run's log on disk: what a fresh start, a resumed run, a torn file and a divergence leave
//! behind.

use std::fs;
use std::path::Path;
use tinyllama::train::metrics::{RunLog, StepRecord, Totals, ValRecord};
use tinyllama::train::plot::loss_curve;

fn step(step: u64, loss: f64) -> StepRecord {
    StepRecord {
        step,
        iter: 2 * step,
        tokens: 8192 * step,
        loss,
        lr: 4e-4,
        grad_norm: 0.5,
        tokens_per_sec: 1000.0,
        tokens_per_sec_per_gpu: 1000.0,
        mfu: None,
        mfu_causal: None,
        peak_memory_gib: None,
        iter_time_ms: 12.5,
        time: 1.5e9 + step as f64,
        fp8: None,
        reward_margin: None,
        reward_accuracy: None,
    }
}

fn open(dir: &Path, resume_step: Option<u64>) -> RunLog {
    let totals = Totals { steps: Some(10), tokens: Some(81920) };
    RunLog::open(dir, resume_step, totals, true).unwrap()
}

fn lines(dir: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    assert!(text.ends_with('\n'));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn steps(dir: &Path) -> Vec<u64> {
    lines(dir).iter().map(|line| line["step"].as_u64().unwrap()).collect()
}

/// Width and height that a PNG states.
fn png_size(path: &Path) -> (u32, u32) {
    let bytes = fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x89PNG\r\n\x1a\n");
    let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    (number(16), number(20))
}

#[test]
fn each_line_has_the_documented_fields_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), None);
    log.validation(&ValRecord::new(0, 0, 2.0)).unwrap();
    log.step(&step(1, 3.25)).unwrap();
    let text = fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    assert_eq!(
        text,
        "{\"step\":0,\"tokens\":0,\"val_loss\":2.0,\"val_ppl\":7.38905609893065}\n\
         {\"step\":1,\"iter\":2,\"tokens\":8192,\"loss\":3.25,\"lr\":0.0004,\"grad_norm\":0.5,\
         \"tokens_per_sec\":1000.0,\"tokens_per_sec_per_gpu\":1000.0,\"mfu\":null,\
         \"mfu_causal\":null,\"peak_memory_gib\":null,\"iter_time_ms\":12.5,\
         \"time\":1500000001.0}\n"
    );
}

#[test]
fn a_loss_survives_the_file_bit_for_bit_and_a_lost_one_is_null() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), None);
    let loss = f64::from(3.2_f32) / 3.0;
    log.step(&step(1, loss)).unwrap();
    log.step(&step(2, f64::NAN)).unwrap();
    log.step(&StepRecord { grad_norm: f64::INFINITY, ..step(3, 3.0) }).unwrap();
    let lines = lines(dir.path());
    assert_eq!(lines[0]["loss"].as_f64().unwrap().to_bits(), loss.to_bits());
    assert!(lines[1]["loss"].is_null() && lines[2]["grad_norm"].is_null());
}

#[test]
fn a_resumed_run_drops_the_lines_behind_its_checkpoint_and_has_no_duplicates() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), None);
    for s in 1..=7 {
        log.step(&step(s, 3.0)).unwrap();
    }
    log.validation(&ValRecord::new(6, 0, 2.5)).unwrap();
    log.validation(&ValRecord::new(5, 0, 2.5)).unwrap();
    drop(log);
    let mut log = open(dir.path(), Some(5));
    for s in 6..=10 {
        log.step(&step(s, 2.0)).unwrap();
    }
    assert_eq!(steps(dir.path()), [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]);
    assert!(!dir.path().join("metrics.jsonl.tmp").exists());
}

#[test]
fn a_torn_last_line_is_dropped_on_resume() {
    let dir = tempfile::tempdir().unwrap();
    let whole = "{\"step\":1,\"tokens\":1,\"loss\":3.0,\"lr\":1.0}\n";
    fs::write(dir.path().join("metrics.jsonl"), format!("{whole}{{\"step\":2,\"to")).unwrap();
    let mut log = open(dir.path(), Some(4));
    log.step(&step(5, 3.0)).unwrap();
    assert_eq!(steps(dir.path()), [1, 5]);
}

#[test]
fn a_fresh_run_keeps_the_earlier_file_under_another_name() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path(), None).step(&step(9, 3.0)).unwrap();
    open(dir.path(), None).step(&step(1, 3.0)).unwrap();
    assert_eq!(steps(dir.path()), [1]);
    let old = fs::read_to_string(dir.path().join("metrics.old.jsonl")).unwrap();
    assert!(old.starts_with("{\"step\":9,"));
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let Err(error) = RunLog::open(&file.join("run"), None, Totals::default(), true) else {
        panic!("opened a folder below a file")
    };
    assert!(format!("{error:#}").contains("file/run"), "{error:#}");
}

#[test]
fn a_finished_run_has_a_picture_and_so_has_one_that_was_killed_after_a_validation() {
    let dir = tempfile::tempdir().unwrap();
    let png = dir.path().join("loss.png");
    let mut log = open(dir.path(), None);
    log.step(&step(1, 3.0)).unwrap();
    log.validation(&ValRecord::new(1, 8192, 3.1)).unwrap();
    assert_eq!(png_size(&png), (1600, 1000));
    fs::remove_file(&png).unwrap();
    assert_eq!(log.finish().unwrap(), png);
    assert_eq!(png_size(&png), (1600, 1000));
}

#[test]
fn a_curve_of_nothing_or_of_no_finite_value_is_still_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let (jsonl, png) = (dir.path().join("metrics.jsonl"), dir.path().join("loss.png"));
    for text in ["", "{\"step\":1,\"tokens\":8,\"loss\":null,\"lr\":1.0}\n", "not json\n"] {
        fs::write(&jsonl, text).unwrap();
        loss_curve(&jsonl, &png).unwrap();
        assert_eq!(png_size(&png), (1600, 1000));
        fs::remove_file(&png).unwrap();
    }
    let error = loss_curve(&dir.path().join("absent.jsonl"), &png).unwrap_err();
    assert!(format!("{error:#}").contains("absent.jsonl"));
}

#[test]
fn events_grow_with_the_run_and_a_resumed_run_starts_a_file_that_sorts_later() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path(), None).step(&step(1, 3.0)).unwrap();
    open(dir.path(), Some(1)).step(&step(2, 3.0)).unwrap();
    let mut files: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("tfevents"))
        .collect();
    files.sort();
    let [first, second] = &files[..] else { panic!("{files:?}") };
    let holds = |path: &Path, tag: &[u8]| {
        fs::read(path).unwrap().windows(tag.len()).any(|window| window == tag)
    };
    for file in [first, second] {
        assert!(holds(file, b"brain.Event:2") && holds(file, b"train/loss"));
        assert!(!holds(file, b"throughput/mfu"), "no MFU without a known peak");
    }
}
