//! `doctor` runs everywhere and says what it found.

use assert_cmd::cargo::cargo_bin_cmd;

#[test]
fn doctor_prints_versions_as_text_and_as_json() {
    let out = cargo_bin_cmd!("tinyllama").args(["doctor", "--json"]).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["libtorch"], "2.11.0");
    assert!(json["threads"].as_i64().unwrap() >= 1);
    let problems = json["problems"].as_array().unwrap();
    assert_eq!(out.status.code(), Some(i32::from(!problems.is_empty())));

    let text = cargo_bin_cmd!("tinyllama").arg("doctor").output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("libtorch        2.11.0"), "{text}");
}
