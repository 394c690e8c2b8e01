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

// ------------------------------------------------------------ files made by hand

/// An entry of a zip archive, honest unless told otherwise.
struct Entry {
    name: &'static str,
    data: Vec<u8>,
    /// 0: stored, 8: deflated.
    method: u16,
    /// What its headers claim.
    size: u64,
    /// Where its local header is already; `None`: it is written.
    header: Option<u64>,
}

fn entry(name: &'static str, data: &[u8]) -> Entry {
    Entry { name, data: data.to_vec(), method: 0, size: data.len() as u64, header: None }
}

/// The local header of an entry, with the mark of 64-bit sizes.
fn local_header(name: &str, method: u16) -> Vec<u8> {
    let mut out = b"PK\x03\x04\x2d\0\0\0".to_vec();
    out.extend(method.to_le_bytes());
    out.extend([0; 8]); // date and CRC-32
    out.extend([0xff; 8]);
    out.extend([name.len() as u8, 0, 0, 0]);
    out.extend(name.as_bytes());
    out
}

/// An archive whose directory has the sizes and places in zip64 extra fields.
fn zip(entries: &[Entry]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for Entry { name, data, method, size, header } in entries {
        let at = header.unwrap_or(file.len() as u64);
        if header.is_none() {
            file.extend(local_header(name, *method));
            file.extend(data);
        }
        directory.extend(b"PK\x01\x02\x2d\0\x2d\0\0\0");
        directory.extend(method.to_le_bytes());
        directory.extend([0; 8]);
        directory.extend([0xff; 8]);
        directory.extend([name.len() as u8, 0, 28, 0]);
        directory.extend([0; 10]);
        directory.extend([0xff; 4]);
        directory.extend(name.as_bytes());
        directory.extend([1, 0, 24, 0]);
        directory.extend([*size, *size, at].map(u64::to_le_bytes).concat());
    }
    let (count, length) = (entries.len() as u16, directory.len() as u32);
    let start = file.len() as u32;
    file.extend(directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend([count, count].map(u16::to_le_bytes).concat());
    file.extend([length, start].map(u32::to_le_bytes).concat());
    file.extend([0, 0]);
    file
}

/// A zip file of a pickle and one storage of 16 bytes, `0`.
fn recent(pickle: &[u8]) -> Vec<u8> {
    zip(&[entry("x/data.pkl", pickle), entry("x/data/0", &[0; 16])])
}

/// The same in the layout before PyTorch 1.6.
fn old(pickle: &[u8], has_storage: bool) -> Vec<u8> {
    let number = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    let mut file = [number, &b"\x80\x02M\xe9\x03."[..], b"\x80\x02}.", pickle].concat();
    if has_storage {
        file.extend(b"\x80\x02]X\x01\0\0\x000a.\x04\0\0\0\0\0\0\0");
        file.extend([0; 16]);
    } else {
        file.extend(b"\x80\x02].");
    }
    file
}

/// Opcodes of an integer that is not negative.
fn int(value: u64) -> Vec<u8> {
    let sign: &[u8] = if value >> 63 == 1 { &[0] } else { &[] };
    [&[0x8a, 8 + sign.len() as u8], &value.to_le_bytes()[..], sign].concat()
}

fn ints(values: &[u64]) -> Vec<u8> {
    let values: Vec<u8> = values.iter().flat_map(|&value| int(value)).collect();
    [b"(", &values[..], b"t"].concat()
}

/// Opcodes of a tensor of a storage of floats.
fn tensor(numel: u64, offset: u64, shape: &[u64], strides: &[u64]) -> Vec<u8> {
    let storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu";
    [
        &b"ctorch._utils\n_rebuild_tensor_v2\n"[..],
        storage,
        &int(numel),
        b"tQ",
        &int(offset),
        &ints(shape),
        &ints(strides),
        b"\x89}tR",
    ]
    .concat()
}

fn pickle(opcodes: &[u8]) -> Vec<u8> {
    [b"\x80\x02", opcodes, b"."].concat()
}

/// What a file is refused for.
fn refusal(bytes: Vec<u8>) -> String {
    let error = read_all(bytes).expect_err("a hostile file was read");
    assert!(error.chain().any(|e| e.is::<TorchFileError>()), "{error:#}");
    format!("{error:#}")
}

#[test]
fn code_is_refused_by_its_full_name() {
    let cases: [(&[u8], &[&str]); 8] = [
        (b"cos\nsystem\nX\x02\0\0\0id\x85R", &["os.system"]),
        (b"cposix\nsystem\n0N", &["posix.system"]), // named, not even called
        (b"\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R", &["builtins.eval"]),
        (b"\x8c\x02os\x8c\x0bpath.exists\x93)R", &["os.path.exists"]),
        (b"(X\x02\0\0\0idios\nsystem\n", &["os.system"]),
        (b"ctorch.storage\n_load_from_bytes\nC\x00\x85R", &["torch.storage._load_from_bytes"]),
        (b"ctorch\nload\n)\x81}b", &["torch.load"]),
        // All are told, in the file's order, also those that are arguments of others.
        (
            b"c__builtin__\ngetattr\nccollections\nOrderedDict\ncevil\nRun\n)R\x86R",
            &["__builtin__.getattr", "evil.Run"],
        ),
    ];
    for (opcodes, expected) in cases {
        for file in [recent(&pickle(opcodes)), old(&pickle(opcodes), false)] {
            let error = TorchFile::parse(file).err().unwrap();
            let names = error.chain().find_map(|e| match e.downcast_ref() {
                Some(TorchFileError::Refused { names, more: 0 }) => Some(names),
                _ => None,
            });
            assert_eq!(names.unwrap_or_else(|| panic!("{error:#}")), expected);
        }
    }
    let long = format!("c{}\nsystem\n)R", "os.".repeat(150));
    let error = refusal(recent(&pickle(long.as_bytes())));
    assert!(error.contains("os.os.") && error.contains("...system`"), "{error}");
    let error = refusal(recent(&pickle(b"cos\n\x1b[2Jsystem\n)R")));
    assert!(error.contains("`os.\\u{1b}[2Jsystem`"), "{error}");
}

#[test]
fn a_zip_archive_that_contradicts_itself_is_refused() {
    let data = pickle(b"}");
    let honest = || vec![entry("x/data.pkl", &data), entry("x/data/0", b"1234")];
    // Its checksums are 0, which opening does not look at.
    TorchFile::parse(zip(&honest())).unwrap().verify().unwrap_err();

    let changed = |change: fn(&mut Entry)| {
        let mut entries = honest();
        change(&mut entries[1]);
        refusal(zip(&entries))
    };
    let error = changed(|entry| entry.size = 1 << 40);
    assert!(error.contains("has 1099511627776 bytes behind it"), "{error}");
    let error = changed(|entry| entry.size = u64::MAX);
    assert!(error.contains("beyond the end of the data"), "{error}");
    let error = changed(|entry| entry.method = 8);
    assert!(error.contains("the compressed zip entry `x/data/0`"), "{error}");
    let error = changed(|entry| entry.header = Some(u64::MAX));
    assert!(error.contains("expected the zip archive's header of `x/data/0`"), "{error}");
    let error = changed(|entry| entry.header = Some(0));
    assert!(error.contains("the header of `x/data/0` has another name"), "{error}");

    // An entry within another one's bytes.
    let inner = [local_header("x/data/1", 0), b"1234".to_vec()].concat();
    let at = (zip(&honest()).windows(4).position(|w| w == b"1234").unwrap()) as u64;
    let mut entries = vec![entry("x/data.pkl", &data), entry("x/data/0", &inner)];
    entries.push(Entry { header: Some(at), ..entry("x/data/1", b"1234") });
    assert!(refusal(zip(&entries)).contains("two entries of the zip archive overlap"));

    let mut entries = honest();
    entries.push(entry("x/data/0", b"5678"));
    assert!(refusal(zip(&entries)).contains("two entries named `x/data/0`"));

    // A directory of which the end record counts only a part.
    let mut file = zip(&honest());
    let counts = file.len() - 22 + 8;
    file[counts..counts + 4].copy_from_slice(&[1, 0, 1, 0]);
    assert!(refusal(file).contains("more bytes of directory behind its 1 entries"));
}

#[test]
fn a_tensor_stays_within_its_storage() {
    type Case = (u64, u64, &'static [u64], &'static [u64], &'static str);
    let cases: [Case; 12] = [
        (4, 0, &[1 << 63], &[1], "expected a number from 0 to 2^63"),
        (4, 0, &[1 << 62], &[1], "more than 2^63 bytes"),
        (4, 0, &[1 << 32, 1 << 32], &[0, 0], "more than 2^63 bytes"),
        (4, 0, &[0, 1 << 62, 1 << 62], &[1, 1, 1], "more than 2^63 bytes"),
        (4, 0, &[5], &[1], "reach beyond a storage of 16 bytes"),
        (4, 4, &[1], &[1], "reach beyond a storage of 16 bytes"),
        (4, (1 << 63) - 1, &[2], &[1], "reach beyond a storage of 16 bytes"),
        (4, 0, &[2, 2], &[3, 1], "reach beyond a storage of 16 bytes"),
        (4, 0, &[3], &[(1 << 63) - 1], "reach beyond a storage of 16 bytes"),
        (4, 0, &[2, 2], &[2], "2 dimensions with 1 strides"),
        (4, 0, &[1 << 30], &[0], "is expanded from a storage of 16 bytes"),
        (1 << 62, 0, &[4], &[1], "a storage of more than 2^64 bytes"),
    ];
    for (numel, offset, shape, strides, expected) in cases {
        let pickle = pickle(&tensor(numel, offset, shape, strides));
        for file in [recent(&pickle), old(&pickle, true)] {
            let error = refusal(file);
            assert!(error.contains(expected), "expected {expected}, got {error}");
        }
    }
    // A storage that is said to be longer, or shorter, than it is.
    for numel in [3, 5, 1 << 60] {
        let pickle = pickle(&tensor(numel, 0, &[1], &[1]));
        for file in [recent(&pickle), old(&pickle, true)] {
            assert!(refusal(file).contains("expected "));
        }
    }
    // Tensors may share elements: tied weights, rows of one matrix.
    let (whole, part) = (tensor(4, 0, &[2, 2], &[2, 1]), tensor(4, 1, &[3], &[1]));
    let pickle = pickle(&[&whole[..], &part, b"\x86"].concat());
    for file in [recent(&pickle), old(&pickle, true)] {
        let file = TorchFile::parse(file).unwrap();
        let lengths: Vec<u64> = file.tensors().iter().map(|(_, t)| t.byte_len()).collect();
        assert_eq!(lengths, [16, 12]);
        assert!(file.tensors().iter().all(|(_, tensor)| file.bytes(tensor).is_ok()));
    }
}

#[test]
fn nothing_shared_is_paid_for_again_and_again() {
    let times = |n: usize, opcodes: &[u8]| opcodes.repeat(n);
    let text = |length: usize, letter: &str| {
        [b"X", &(length as u32).to_le_bytes()[..], letter.repeat(length).as_bytes()].concat()
    };
    // A long key in many dicts.
    let key = [text(100_000, "k"), b"q\x000](".to_vec(), times(1000, b"}h\0Ns")].concat();
    let error = refusal(old(&pickle(&[&key[..], b"e"].concat()), false));
    assert!(error.contains("bytes of keys and tensors' names"), "{error}");
    // A long list as the flags of many tensors.
    let flags = [b"}q\0(".to_vec(), times(20_000, b"K\0\x89"), b"u0".to_vec()].concat();
    let mut one = tensor(4, 0, &[1], &[1]);
    one.truncate(one.len() - 3); // `{}`, the end of the arguments, the call
    one.extend(b"}h\0tR0");
    let error = refusal(old(&pickle(&[&flags[..], &times(100, &one), b"N"].concat()), true));
    assert!(error.contains("copies of shared values"), "{error}");
    // A dtype of numpy with a long name, of many scalars.
    let dtype = [&b"cnumpy\ndtype\n"[..], &text(100_000, "<"), b"\x85R"].concat();
    let error = refusal(old(&pickle(&dtype), false));
    assert!(error.contains("the numpy dtype `<<<") && error.len() < 600, "{error}");
    // A list that holds itself, twice.
    let error = refusal(old(&pickle(b"]q\0h\0ah\0a"), false));
    assert!(error.contains("levels of nested containers"), "{error}");
    // Lists of the same list, ever longer: 2^60 values.
    let doubled = [b"]q\0".to_vec(), times(60, b"q\0h\0\x86")].concat();
    let error = refusal(old(&pickle(&doubled), false));
    assert!(error.contains("values, shared ones counted each time"), "{error}");
}

#[test]
fn a_scalar_of_numpy_has_the_bytes_of_its_dtype() {
    let scalar = |code: &str, bytes: &[u8]| {
        let code = [&[b'U', code.len() as u8], code.as_bytes()].concat();
        let bytes = [&[b'C', bytes.len() as u8], bytes].concat();
        let make = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n";
        let file = old(&pickle(&[&make[..], &code, b"\x85R", &bytes, b"\x86R"].concat()), false);
        TorchFile::parse(file).unwrap()
    };
    assert_eq!(scalar("b1", &[1]).root().as_bool(), Some(true));
    assert_eq!(scalar("i2", &[0xfe, 0xff]).root().as_i64(), Some(-2));
    assert_eq!(scalar("u8", &[0xff; 8]).root().as_u64(), Some(u64::MAX));
    assert_eq!(scalar("f2", &[0, 0x3c]).root().as_f64(), Some(1.0));
    assert_eq!(scalar("f2", &[1, 0x80]).root().as_f64(), Some(-(2f64.powi(-24))));
    assert_eq!(scalar("U2", b"a\0\0\0\0\0\0\0").root().as_str(), Some("a"));
    let wrong: [(&str, &[u8]); 6] =
        [("b1", &[]), ("i8", &[1]), ("u1", &[]), ("U1", b"abc"), ("U9", &[]), ("i16", &[0; 16])];
    for (code, bytes) in wrong {
        assert_eq!(scalar(code, bytes).root().kind(), "numpy.generic", "{code}");
    }
}

#[test]
fn inputs_that_reach_every_branch_do_no_harm() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/torch_file");
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    assert!(paths.map(|path| _ = read_all(fs::read(path).unwrap())).count() > 50);
}
