//! `tinyllama doctor` as a user runs it.

use assert_cmd::cargo::cargo_bin_cmd;
use serde_json::Value;

fn doctor(args: &[&str]) -> (Option<i32>, String) {
    let output = cargo_bin_cmd!("tinyllama").arg("doctor").args(args).output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn doctor_prints_versions_and_a_verdict_that_the_exit_code_repeats() {
    let (code, text) = doctor(&[]);
    assert!(text.contains("\nlibtorch       2.11.0, "), "{text}");
    match code {
        Some(0) => assert!(text.ends_with("\nno problems found\n"), "{text}"),
        Some(1) => {
            assert!(text.contains("\nproblems:\n- ") && text.contains("\n  fix: "), "{text}")
        }
        other => panic!("exit code {other:?}\n{text}"),
    }
}

#[test]
fn doctor_prints_the_same_facts_as_one_json_object() {
    let (code, text) = doctor(&["--json"]);
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["libtorch"], "2.11.0");
    assert!(report["torch_threads"].as_i64().unwrap() > 0);
    assert!(report["cpu"]["cores"].as_u64().unwrap() > 0);
    if cfg!(target_os = "linux") {
        assert!(report["ram"]["total_bytes"].as_u64().unwrap() > 1 << 28);
        assert!(report["disk"]["total_bytes"].as_u64().unwrap() > 1 << 28);
    }
    for card in report["cards"].as_array().unwrap() {
        assert!(card["total_bytes"].as_u64().unwrap() > 1 << 30, "{card}");
        assert!(card["capability"][0].as_i64().unwrap() >= 5, "{card}");
    }
    let problems = report["problems"].as_array().unwrap();
    assert_eq!(code, Some(i32::from(!problems.is_empty())));
}
