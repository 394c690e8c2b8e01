//! PyTorch files: what the real `torch.save` wrote is read bit for bit, and no damage or malice gets
//! beyond an error. The files are made by `scripts/golden/torch_files.py`.

use serde_json::Value as Json;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use tinyllama::checkpoint::torch_file::{TorchFile, TorchFileError, Value, is_torch_file};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/torch_file").join(name)
}

fn manifest() -> Json {
    serde_json::from_str(&fs::read_to_string(golden("manifest.json")).unwrap()).unwrap()
}

/// Names of the files, and what each should hold.
fn files(manifest: &Json) -> Vec<(&String, &Json)> {
    let content = |content: &Json| &manifest["contents"][content.as_str().unwrap()];
    manifest["files"].as_object().unwrap().iter().map(|(k, v)| (k, content(v))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a value is what JSON says; infinity is the text `inf` there.
fn equals(value: Value, json: &Json) -> bool {
    match json {
        Json::Null => value.is_none(),
        Json::Bool(bool) => value.as_bool() == Some(*bool),
        Json::String(text) => value
            .as_str()
            .map_or(value.as_f64() == Some(f64::INFINITY) && text == "inf", |got| got == text),
        Json::Number(number) if number.is_f64() => {
            value.as_i64().is_none() && value.as_f64() == number.as_f64()
        }
        Json::Number(number) => match number.as_i64() {
            Some(int) => value.as_i64() == Some(int),
            None => value.as_i64().is_none() && value.as_u64() == number.as_u64(),
        },
        _ => false,
    }
}

#[test]
fn every_tensor_of_every_layout_is_read_bit_for_bit() {
    let manifest = manifest();
    let mut checked = 0;
    for (name, content) in files(&manifest) {
        let file = TorchFile::open(&golden(name)).unwrap();
        let tensors = file.tensors();
        let expected = content["tensors"].as_array().unwrap();
        let names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        let expected_names: Vec<&str> =
            expected.iter().map(|entry| entry["name"].as_str().unwrap()).collect();
        assert_eq!(names, expected_names, "{name}");
        for ((path, tensor), entry) in tensors.iter().zip(expected) {
            assert_eq!(tensor.dtype().name(), entry["dtype"], "{name}: {path}");
            assert_eq!(serde_json::json!(tensor.shape()), entry["shape"], "{name}: {path}");
            let bytes = file.bytes(tensor).unwrap();
            assert_eq!(bytes.len() as u64, tensor.byte_len(), "{name}: {path}");
            assert_eq!(hex(&Sha256::digest(&bytes)), entry["sha256"], "{name}: {path}");
            checked += 1;
        }
    }
    assert!(checked > 150, "{checked}");
}

#[test]
fn hyper_parameters_and_counters_are_read_with_their_types() {
    let manifest = manifest();
    for (name, content) in files(&manifest) {
        let file = TorchFile::open(&golden(name)).unwrap();
        for (path, json) in content["values"].as_object().unwrap() {
            let mut value = file.root();
            for key in path.split('.') {
                value = value.get(key).unwrap_or_else(|| panic!("{name}: no {path}"));
            }
            assert!(equals(value, json), "{name}: {path}: expected {json}, got {value:?}");
        }
    }
}

#[test]
fn what_has_no_plain_form_keeps_its_kind() {
    let kinds = [
        ("big", "int"),
        ("set", "set"),
        ("frozen", "set"),
        ("list", "list"),
        ("tuple", "tuple"),
        ("dict", "dict"),
        ("args", "dict"),
        ("counter", "dict"),
        ("default", "dict"),
        ("dtype", "dtype"),
        ("complex", "complex"),
        ("array", "numpy.ndarray"),
        ("bytes", "bytes"),
    ];
    for name in ["checkpoint-p2.pt", "checkpoint-p5.pt", "checkpoint-old.pt"] {
        let file = TorchFile::open(&golden(name)).unwrap();
        let hparams = file.root().get("hparams").unwrap();
        for (key, kind) in kinds {
            assert_eq!(hparams.get(key).unwrap().kind(), kind, "{name}: {key}");
        }
        let bytes = |key| hparams.get(key).unwrap().as_bytes().unwrap();
        assert_eq!(
            (bytes("bytes"), bytes("no_bytes"), bytes("bytearray")),
            (&[0, 255][..], &[][..], &b"ab"[..])
        );
        assert_eq!(hparams.get("set").unwrap().items().next().unwrap().as_i64(), Some(7));
        assert!(hparams.get("array").unwrap().parts().is_some());
        let groups = file.root().get("optimizer").unwrap().get("param_groups").unwrap();
        assert_eq!(groups.get("0").unwrap().get("params").unwrap().len(), 5);
        let state = file.root().get("optimizer").unwrap().get("state").unwrap();
        assert_eq!(
            state.get("4").unwrap().get("exp_avg").unwrap().as_tensor().unwrap().shape(),
            [2, 4]
        );
    }
}

#[test]
fn contiguous_tensors_are_borrowed_and_checksums_fit() {
    let file = TorchFile::open(&golden("views.pt")).unwrap();
    for (name, tensor) in file.tensors() {
        let borrowed = matches!(file.bytes(tensor).unwrap(), std::borrow::Cow::Borrowed(_));
        let contiguous = ["whole", "row", "scalar", "empty", "strange_strides", "none"];
        assert_eq!(borrowed, contiguous.contains(&&*name), "{name}");
    }
    assert!(file.verify().unwrap() > 100);
    assert_eq!(TorchFile::open(&golden("views-old.pt")).unwrap().verify().unwrap(), 0);
    let mut bytes = fs::read(golden("views.pt")).unwrap();
    let at = bytes.windows(8).position(|w| w == [0, 0, 0x80, 0x3f, 0, 0, 0, 0x40]).unwrap();
    bytes[at] ^= 1; // within a tensor
    let error = TorchFile::parse(bytes).unwrap().verify().unwrap_err();
    assert!(error.to_string().contains("expected CRC-32"), "{error}");
}

#[test]
fn files_of_all_layouts_are_recognised() {
    for (name, _) in files(&manifest()) {
        let bytes = fs::read(golden(name)).unwrap();
        assert!(is_torch_file(&bytes[..32]), "{name}");
    }
    assert!(!is_torch_file(b"") && !is_torch_file(b"GGUF") && !is_torch_file(&[0x80, 2, b'}']));
    let error = TorchFile::parse(b"GGUF....".to_vec()).err().unwrap();
    assert!(error.to_string().contains("expected a `torch.save` file"), "{error}");
    assert!(TorchFile::parse(Vec::new()).is_err());
    let error = TorchFile::open(Path::new("/nowhere/x.pt")).err().unwrap();
    assert!(error.to_string().contains("cannot open `/nowhere/x.pt`"), "{error}");
}

/// Reads all there is, as a hostile file would like it.
fn read_all(bytes: Vec<u8>) -> anyhow::Result<()> {
    let file = TorchFile::parse(bytes)?;
    for (_, tensor) in file.tensors() {
        file.bytes(tensor)?;
    }
    let _ = file.verify();
    Ok(())
}

#[test]
fn a_file_cut_anywhere_is_refused_with_a_typed_error() {
    for (name, _) in files(&manifest()) {
        let whole = fs::read(golden(name)).unwrap();
        let step = if whole.len() < 3000 { 1 } else { whole.len() / 100 };
        for length in (0..whole.len()).step_by(step).chain([whole.len() - 1]) {
            let Err(error) = read_all(whole[..length].to_vec()) else {
                panic!("{name} cut to {length} of {} bytes was read", whole.len())
            };
            assert!(error.chain().any(|e| e.is::<TorchFileError>()), "{name}: {length}: {error:#}");
        }
    }
}

#[test]
fn no_flipped_byte_makes_a_panic() {
    for name in ["tensor.pt", "tensor-old.pt", "views-old.pt"] {
        let whole = fs::read(golden(name)).unwrap();
        for at in 0..whole.len() {
            for flip in [1, 0x80, 0xff, whole[at]] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                let _ = read_all(bytes); // often harmless: names, padding, values
            }
        }
    }
}
