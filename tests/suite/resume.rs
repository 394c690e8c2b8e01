//! Runs that go on otherwise than they began.

use crate::pretrain::{Setup, text, weights};

#[test]
fn a_run_that_goes_on_in_other_batches_reads_its_epochs_to_their_end() {
    let s = Setup::new(); // 235 blocks
    let one = |batch: &str, steps: &str, more: &[&str]| {
        let batch = format!("train.global_batch_size={batch}");
        let steps = format!("train.max_steps={steps}");
        let mut set = vec!["--set", &batch, "--set", &steps, "--set", "data.epochs=1"];
        set.extend(["--set", "eval.final_validation=false"]);
        set.extend(more);
        text(&s.run("out", &set))
    };
    let told = one("4", "10", &[]); // 40 of them
    assert!(told.contains("length      10 steps"), "{told}");
    let told = one("8", "500", &["--resume", "auto"]); // 195 are left: 24 steps
    assert!(told.contains("at an end after step 34: `train` is through 1 epoch"), "{told}");
    assert!(told.contains("changed     train.global_batch_size"), "{told}");
    assert!(!told.contains("begins epoch 2"), "{told}");
    assert_eq!(s.losses("out").len(), 34);
}

#[test]
fn another_runs_checkpoint_is_not_gone_on_from_over_a_run() {
    let s = Setup::new();
    let short = ["--set", "train.max_steps=5", "--set", "eval.final_validation=false"];
    for out in ["one", "two"] {
        assert!(s.run(out, &short).status.success());
    }
    let before = weights(&s.path("two/final"));
    let from = s.path("one/final").display().to_string();
    let output = s.run("two", &[&short[..], &["--resume", &from]].concat());
    assert!(!output.status.success());
    let told = text(&output);
    assert!(
        told.contains("`out_dir` holds another run than") && told.contains("one/final"),
        "{told}"
    );
    assert_eq!(weights(&s.path("two/final")), before);
}
