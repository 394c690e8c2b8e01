//! GGUF: values equal to the Python package's, what is written is read back, hostile files are refused.

use crate::chat_template::{PIECES, write_pieces};
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use tinyllama::checkpoint::gguf::mix::{Mix, Model};
use tinyllama::checkpoint::gguf::quants::{self, dequantize, quantized};
use tinyllama::checkpoint::gguf::vocab::{self, Special, bpe, pieces, pieces::Piece};
use tinyllama::checkpoint::gguf::{
    Array, GgufError, GgufFile, GgufWriter, Metadata, TensorInfo, Type, Value, llama,
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf").join(name)
}

fn expected() -> Json {
    serde_json::from_slice(&std::fs::read(golden("expected.json")).unwrap()).unwrap()
}

fn sha256(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn every_tensor_of_every_file_has_the_values_of_the_python_package() {
    for (file, tensors) in expected()["tensors"].as_object().unwrap() {
        let gguf = GgufFile::open(&golden(file)).unwrap();
        assert_eq!(gguf.tensors().len(), tensors.as_object().unwrap().len());
        for (name, want) in tensors.as_object().unwrap() {
            let tensor = gguf.tensor(name).unwrap();
            assert_eq!(tensor.kind.to_string(), want["type"], "{name}");
            assert_eq!(serde_json::json!(tensor.shape), want["shape"], "{name}");
            assert_eq!(sha256(&gguf.dequantize(tensor).unwrap()), want["sha256"], "{file} {name}");
            let last = tensor.values().unwrap() / tensor.row() - 1;
            let rows = gguf.dequantize_rows(tensor, last..last + 1).unwrap();
            assert!(gguf.dequantize(tensor).unwrap().ends_with(&rows));
            assert!(gguf.dequantize_rows(tensor, last..last + 2).is_err());
        }
    }
}

#[test]
fn quantised_bytes_equal_those_of_the_python_package() {
    let gguf = GgufFile::open(&golden("quants.gguf")).unwrap();
    assert_eq!(gguf.get("general.alignment"), Some(&Value::U32(64)));
    let input = gguf.dequantize(gguf.tensor("input").unwrap()).unwrap();
    for tensor in gguf.tensors() {
        let ours = quantized(tensor.kind, &input).unwrap();
        assert!(ours == gguf.bytes(tensor), "{} differs", tensor.kind);
    }
    assert_eq!(gguf.tensors().len(), 8);
}

#[test]
fn metadata_of_every_type_is_read_and_a_wrong_one_named() {
    let gguf = GgufFile::open(&golden("types.gguf")).unwrap();
    let metadata = gguf.metadata();
    let cases: [(&str, Value); 12] = [
        ("a.u8", 255u8.into()),
        ("a.i8", (-128i8).into()),
        ("a.u16", u16::MAX.into()),
        ("a.i16", i16::MIN.into()),
        ("a.u32", u32::MAX.into()),
        ("a.i32", i32::MIN.into()),
        ("a.f32", 0.1f32.into()),
        ("a.bool", true.into()),
        ("a.u64", u64::MAX.into()),
        ("a.i64", i64::MIN.into()),
        ("a.f64", 0.1f64.into()),
        ("a.string", "gr\u{fc}\u{df} dich \u{1f600}".into()),
    ];
    for (key, want) in cases {
        assert_eq!(metadata.get(key), Some(&want), "{key}");
    }
    assert_eq!(metadata.find_i32s("a.ints").unwrap(), Some(vec![1, -2, 3]));
    assert_eq!(metadata.find_f32s("a.floats").unwrap(), Some(&[0.5, -1.5][..]));
    assert_eq!(metadata.strings("a.strings").unwrap(), ["", "a", "\u{2581}the"]);
    let nested = Array::Array(vec![Array::I32(vec![1, 2]), Array::I32(vec![3])]);
    assert_eq!(metadata.get("a.nested"), Some(&Value::Array(nested)));
    assert_eq!(metadata.str("general.architecture").unwrap(), "llama");
    let told = |error: GgufError| error.to_string();
    let error = told(metadata.u64("a.string").unwrap_err());
    assert!(error.contains("metadata `a.string`: expected an integer of at least 0, got"));
    let error = told(metadata.u64("a.none").unwrap_err());
    assert!(error.contains("`a.none`") && error.contains("no such key"), "{error}");
}

/// A file with every type that can be written, from `values`.
fn write_all(path: &Path, metadata: &Metadata) -> Vec<(TensorInfo, Vec<u8>)> {
    let values: Vec<f32> = (0..512).map(|i| (i as f32 * 0.37).sin() * 0.1).collect();
    let kinds: Vec<Type> = Type::ALL.iter().copied().filter(|&k| quants::writable(k)).collect();
    assert_eq!(kinds.len(), 10);
    let tensor = |kind: &Type| {
        let info = TensorInfo::new(format!("blk.0.{kind}.weight"), *kind, &[2, 256]);
        (info, quantized(*kind, &values).unwrap())
    };
    let mut tensors: Vec<_> = kinds.iter().map(tensor).collect();
    tensors.push((TensorInfo::new("odd", Type::F16, &[3]), vec![1; 6]));
    tensors.push((TensorInfo::new("empty", Type::F32, &[0, 7]), vec![]));
    tensors.push((TensorInfo::new("scalar", Type::F32, &[]), vec![0; 4]));
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let mut writer = GgufWriter::create(path, metadata, &infos).unwrap();
    for (info, bytes) in &tensors {
        assert_eq!(writer.next().unwrap().name, info.name);
        writer.write(bytes).unwrap();
    }
    writer.finish().unwrap();
    tensors
}

#[test]
fn what_is_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    let mut metadata = GgufFile::open(&golden("types.gguf")).unwrap().metadata().clone();
    for alignment in [32u32, 8, 256] {
        metadata.set("general.alignment", alignment);
        let tensors = write_all(&path, &metadata);
        let gguf = GgufFile::open(&path).unwrap();
        assert_eq!((gguf.header().version, gguf.metadata()), (3, &metadata));
        for (info, bytes) in &tensors {
            let tensor = gguf.tensor(&info.name).unwrap();
            assert_eq!((tensor.kind, &tensor.shape), (info.kind, &info.shape));
            assert_eq!(gguf.bytes(tensor), bytes, "{}", info.name);
        }
    }
}

#[test]
fn a_writer_refuses_what_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    let create = |infos: &[TensorInfo]| GgufWriter::create(&path, &Metadata::default(), infos);
    let told = |error: anyhow::Error| format!("{error:#}");
    let x = TensorInfo::new("x", Type::Q8_0, &[2, 32]);
    let error = told(create(&[x.clone(), x.clone()]).err().unwrap());
    assert!(error.contains("tensor `x`: expected one tensor of that name"), "{error}");
    let error = told(create(&[TensorInfo::new("y", Type::Q4_K, &[576])]).err().unwrap());
    assert!(error.contains("rows of a multiple of 256 values (Q4_K), got 576"), "{error}");
    assert!(create(&[TensorInfo::new("y", Type::F32, &[1; 5])]).is_err());
    assert!(create(&[TensorInfo::new("y", Type::F32, &[u64::MAX, 2])]).is_err());
    let mut writer = create(std::slice::from_ref(&x)).unwrap();
    writer.write(&[0; 67]).unwrap();
    let error = told(writer.write(&[0; 2]).unwrap_err());
    assert!(error.contains("tensor `x`: expected 68 bytes, got 69"), "{error}");
    let mut writer = create(std::slice::from_ref(&x)).unwrap();
    writer.write(&[0; 67]).unwrap();
    writer.write(&[0; 1]).unwrap();
    assert!(told(writer.write(&[0; 68]).unwrap_err()).contains("no more than 1 tensors"));
    writer.finish().unwrap();
    let error = told(create(&[x]).unwrap().finish().unwrap_err());
    assert!(error.contains("expected its bytes, got 0 of 1 tensors"), "{error}");
}

#[test]
fn k_quants_are_near_their_input() {
    // Relative RMSE of a Gaussian: 4 bits with a scale and a minimum each 32 values, 6 bits with a
    // scale each 16.
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let gaussian: Vec<f32> =
        (0..1 << 14).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
    for (kind, most) in [(Type::Q4_K, 0.075), (Type::Q6_K, 0.02), (Type::Q8_0, 0.006)] {
        let mut back = vec![0.0; gaussian.len()];
        dequantize(kind, &quantized(kind, &gaussian).unwrap(), &mut back).unwrap();
        let (error, size) = back.iter().zip(&gaussian).fold((0.0, 0.0), |(e, s), (a, b)| {
            (e + f64::from(a - b).powi(2), s + f64::from(*b).powi(2))
        });
        let rmse = (error / size).sqrt();
        println!("{kind}: relative RMSE {rmse:.5}");
        assert!(rmse < most, "{kind}: {rmse}");
    }
}

#[test]
fn quantisers_survive_every_float() {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45, -0.0, 0.0];
    for &kind in Type::ALL.iter().filter(|&&kind| quants::writable(kind)) {
        for first in odd {
            for second in odd {
                let values: Vec<f32> =
                    (0..256).map(|i| if i % 2 == 0 { first } else { second }).collect();
                let bytes = quantized(kind, &values).unwrap();
                dequantize(kind, &bytes, &mut [0.0; 256]).unwrap();
            }
        }
    }
    // Zeros stay zeros.
    for &kind in Type::ALL.iter().filter(|&&kind| quants::writable(kind)) {
        let mut back = [1.0; 256];
        dequantize(kind, &quantized(kind, &[0.0; 256]).unwrap(), &mut back).unwrap();
        assert_eq!(back, [0.0; 256], "{kind}");
    }
    let error = dequantize(Type::IQ2_XS, &[0; 74], &mut [0.0; 256]).unwrap_err().to_string();
    assert!(error.contains("expected one of the types F32, F16") && error.ends_with("got IQ2_XS"));
    assert!(dequantize(Type::Q4_0, &[0; 17], &mut [0.0; 32]).is_err());
}

/// A header by hand: counts, then whatever follows.
fn file(tensors: u64, entries: u64, rest: &[&[u8]]) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(tensors.to_le_bytes());
    out.extend(entries.to_le_bytes());
    rest.iter().for_each(|part| out.extend(*part));
    out
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A description of a tensor; dims as the file has them, the row first.
fn info(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut out = text(name);
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
    out.extend(kind.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

fn fault(bytes: &[u8]) -> String {
    GgufFile::parse(bytes).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn files_that_lie_are_refused_with_the_place() {
    let data = [0u8; 4096];
    let one = |dims: &[u64], kind, offset| file(1, 0, &[&info("x", dims, kind, offset), &data]);
    assert!(GgufFile::parse(&one(&[8, 2], 0, 0)).is_ok());
    let key = |kind: u32, rest: &[u8]| file(0, 1, &[&text("k"), &kind.to_le_bytes(), rest, &data]);
    let array =
        |kind: u32, count: u64| key(9, &[&kind.to_le_bytes()[..], &count.to_le_bytes()].concat());
    let nested = |deep: usize| {
        let one = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
        key(9, &[one.repeat(deep), array(4, 0)[37..49].to_vec()].concat())
    };
    assert!(GgufFile::parse(&nested(3)).is_ok());
    let mut big = b"GGUF\0\0\0\x03".to_vec();
    big.extend([0; 64]);
    let mut old = file(0, 0, &[]);
    old[4] = 1;
    let (x, y) = (info("x", &[8, 2], 0, 0), info("y", &[8, 2], 0, 32));
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"GGML....".to_vec(), "the magic at byte 0: expected `GGUF`, got `GGML`"),
        (big, "expected 2 or 3, little-endian, got big-endian 3"),
        (old, "got 1, whose lengths have 32 bits"),
        (file(1 << 63, 0, &[&data]), "the tensor count at byte 8: expected at most 170"),
        (file(0, u64::MAX, &[&data]), "the metadata count at byte 16: expected at most 315"),
        (
            file(0, 1, &[&[0xff; 8], &data]),
            "a metadata key at byte 32: expected 18446744073709551615",
        ),
        (file(0, 1, &[&text("k"), &99u32.to_le_bytes(), &data]), "a value type of 0 to 12, got 99"),
        (array(10, 1 << 61), "k at byte 49: expected 18446744073709551615 bytes"),
        (array(0, 1 << 63), "k at byte 49: expected 9223372036854775808 bytes"),
        (array(8, 1 << 40), "expected at most 512 elements"),
        (array(13, 1), "an element type of 0 to 12, got 13"),
        (nested(4), "arrays nested at most 4 deep"),
        (key(7, &[2]), "k at byte 37: expected 0 or 1, got 2"),
        (key(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), "expected UTF-8"),
        (file(0, 2, &[&text("k"), &[0; 5], &text("k"), &[0; 64]]), "expected a new one, got k"),
        (
            file(1, 0, &[&info("x", &[1; 5], 0, 0), &data]),
            "`x`: expected at most 4 dimensions, got 5",
        ),
        (one(&[8, 2], 4, 0), "`x`: expected a known type, got type 4"),
        (one(&[8, 2], 0, 8), "an offset that is a multiple of 32, got 8"),
        (one(&[40, 2], 8, 0), "rows of a multiple of 32 values (Q8_0), got 40"),
        (one(&[1 << 40, 1 << 40], 0, 0), "fewer than 2^63 values"),
        (one(&[1 << 62], 0, 0), "fewer than 2^64 bytes"),
        (one(&[1 << 60], 0, 0), "to end within the file's"),
        (one(&[8, 2], 0, 4096), "`x`: expected to end within the file's"),
        (one(&[8, 2], 0, u64::MAX - 31), "`x`: expected to end within the file's"),
        (
            file(2, 0, &[&x, &y, &data]),
            "`y`: expected an offset of at least 64, where `x` ends, got 32",
        ),
        (file(2, 0, &[&x, &x, &data]), "`x`: expected one tensor of that name, got two"),
    ];
    for (bytes, want) in cases {
        let got = fault(&bytes);
        assert!(got.contains(want), "expected {want:?}, got {got:?}");
    }
    for alignment in [0u32, 3, 48] {
        let rest =
            [text("general.alignment"), 4u32.to_le_bytes().into(), alignment.to_le_bytes().into()];
        assert!(fault(&file(0, 1, &[&rest.concat()])).contains("a u32, a power of two"));
    }
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    for name in ["types.gguf", "types.v2.gguf", "quants.gguf"] {
        let whole = std::fs::read(golden(name)).unwrap();
        let header = GgufFile::parse(&whole).unwrap();
        let place = |t: &TensorInfo| header.data + t.offset + t.bytes().unwrap();
        let end = header.tensors.iter().map(place).max().unwrap() as usize;
        for length in 0..whole.len() {
            let result = GgufFile::parse(&whole[..length]);
            assert_eq!(result.is_ok(), length >= end, "{name} cut at {length}"); // padding is not needed
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("empty.gguf");
    for bytes in [&b""[..], b"GGUF"] {
        std::fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", GgufFile::open(&path).err().unwrap());
        assert!(error.contains("empty.gguf` is damaged, or is no GGUF file"), "{error}");
    }
}

#[test]
fn any_byte_changed_is_refused_or_read_within_bounds() {
    let whole = std::fs::read(golden("types.gguf")).unwrap();
    let data = GgufFile::parse(&whole).unwrap().data as usize;
    let mut bytes = whole.clone();
    for at in 0..data {
        for change in [0xff, 0x01, 0x80] {
            bytes[at] = whole[at] ^ change;
            read_all(&bytes);
        }
        bytes[at] = whole[at];
    }
}

/// Reads all there is in a file, which may be refused.
fn read_all(bytes: &[u8]) {
    let Ok(header) = GgufFile::parse(bytes) else { return };
    for tensor in &header.tensors {
        let raw = header.bytes(bytes, tensor).unwrap();
        let mut out = vec![0.0; tensor.values().unwrap() as usize];
        _ = dequantize(tensor.kind, raw, &mut out);
    }
    let metadata = &header.metadata;
    _ = llama::config_json(metadata, &header.tensors, None);
    _ = bpe::tokenizer_json(metadata);
    _ = pieces::tokenizer_model(metadata);
    _ = vocab::tokenizer_config(metadata);
}

#[test]
fn inputs_that_reach_every_branch_do_no_harm() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/gguf");
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    assert!(paths.map(|path| read_all(&std::fs::read(path).unwrap())).count() > 50);
}

#[test]
fn a_mix_gives_every_tensor_its_type() {
    let model = Model { layers: 22, group: 8, tied: false };
    let q4 = |name: &str, shape: &[u64]| Mix::Q4KM.kind(name, shape, &model).to_string();
    assert_eq!(q4("output.weight", &[32000, 2048]), "Q6_K");
    assert_eq!(q4("token_embd.weight", &[32000, 2048]), "Q4_K");
    assert_eq!(q4("blk.0.attn_norm.weight", &[2048]), "F32");
    assert_eq!(q4("blk.0.attn_q.bias", &[2048]), "F32");
    let more: Vec<u64> = (0..22)
        .filter(|i| q4(&format!("blk.{i}.ffn_down.weight"), &[2048, 5632]) == "Q6_K")
        .collect();
    assert_eq!(more, [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]);
    assert_eq!(q4("blk.1.attn_v.weight", &[256, 2048]), "Q6_K");
    assert_eq!(q4("blk.2.attn_v.weight", &[256, 2048]), "Q4_K");
    assert_eq!(q4("blk.1.ffn_up.weight", &[5632, 2048]), "Q4_K");
    // SmolLM2-135M: rows of 576 are no whole K-blocks.
    let small = Model { layers: 30, group: 3, tied: true };
    let q4 = |name: &str, shape: &[u64]| Mix::Q4KM.kind(name, shape, &small).to_string();
    assert_eq!(q4("token_embd.weight", &[49152, 576]), "Q8_0");
    assert_eq!(q4("blk.3.attn_q.weight", &[576, 576]), "Q5_0");
    assert_eq!(q4("blk.0.attn_v.weight", &[192, 576]), "Q8_0");
    assert_eq!(q4("blk.0.ffn_down.weight", &[576, 1536]), "Q6_K");
    assert_eq!(q4("blk.0.ffn_up.weight", &[1536, 100]), "F16");
    let all = |kind| Mix::All(kind).kind("token_embd.weight", &[49152, 576], &small);
    assert_eq!((all(Type::Q4_0), all(Type::Q8_0)), (Type::Q8_0, Type::Q8_0));
    assert_eq!(Mix::from_name("Q4_K_M"), Some(Mix::Q4KM));
    assert_eq!(Mix::from_name("Q3_K"), None);
}

#[test]
fn names_of_a_llama_go_both_ways() {
    let pairs = [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.21.attn_k.bias", "model.layers.21.self_attn.k_proj.bias"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("blk.7.ffn_gate.weight", "model.layers.7.mlp.gate_proj.weight"),
    ];
    for (gguf, hf) in pairs {
        assert_eq!(llama::hf_name(gguf).unwrap(), hf);
        assert_eq!(llama::gguf_name(hf).unwrap(), gguf);
    }
    for name in ["rope_freqs.weight", "blk.x.attn_q.weight", "blk.0.ffn_gate_exps.weight", "", "."]
    {
        assert_eq!(llama::hf_name(name), None, "{name}");
    }
    assert!(
        llama::is_interleaved("blk.3.attn_q.weight") && llama::is_interleaved("blk.3.attn_k.bias")
    );
    assert!(
        !llama::is_interleaved("blk.3.attn_v.weight") && !llama::is_interleaved("output.weight")
    );
}

#[test]
fn query_rows_are_interleaved_and_back() {
    // 2 heads of 6 rows of 2 values: reshape(2, 2, 3, 2).swapaxes(1, 2) of numpy.
    let rows: Vec<u32> = (0..24).collect();
    let there = llama::interleave(&rows, 2, 6);
    assert_eq!(there[..12], [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
    assert_eq!(llama::split_halves(&there, 2, 6), rows);
    for row in 0..128 {
        assert_eq!(llama::hf_row(llama::gguf_row(row, 64), 64), row);
    }
}

#[test]
fn settings_of_a_llama_go_both_ways() {
    let scalings = [
        json!(null),
        json!({"rope_type": "linear", "factor": 4.0}),
        json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}),
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}),
    ];
    for scaling in scalings {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "_name_or_path": "x",
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0, "rope_scaling": scaling, "vocab_size": 32000,
            "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
            "bos_token_id": null, "eos_token_id": null,
        });
        let metadata = llama::metadata(&config, "x").unwrap();
        let rope = llama::Llama3Rope::of_config(&config);
        assert_eq!(rope.is_some(), scaling["rope_type"] == "llama3");
        let factors = rope.map(|rope| rope.factors(500000.0, 64));
        let back = llama::config_json(&metadata, &[], factors.as_deref()).unwrap();
        assert_eq!(back, config);
    }
    let told = |config: Json| llama::metadata(&config, "x").unwrap_err().to_string();
    assert!(told(json!({"model_type": "gpt_neox"})).contains("expected `llama`"));
    assert!(told(json!({"model_type": "llama"})).contains("`hidden_size`"));
    let mut factors = llama::Llama3Rope { factor: 8.0, low: 1.0, high: 4.0, length: 8192.0 }
        .factors(500000.0, 64);
    factors[10] = 3.0;
    let metadata = GgufFile::open(&golden("types.gguf")).unwrap().metadata().clone();
    let error = llama::config_json(&metadata, &[], Some(&factors)).unwrap_err().to_string();
    assert!(error.contains("llama.embedding_length"), "{error}");
}

#[test]
fn a_yarn_that_a_file_cannot_say_is_refused() {
    let config = |scaling: Json| {
        json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "vocab_size": 9,
            "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 32,
            "rms_norm_eps": 1e-5, "rope_scaling": scaling})
    };
    let with = |more: Json| {
        let mut scaling = json!({"rope_type": "yarn", "factor": 8.0});
        scaling.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        llama::metadata(&config(scaling), "x")
    };
    let usual = 0.1 * 8f64.ln() + 1.0;
    for said in [
        json!({"truncate": true, "beta_fast": 16.0}),
        json!({"attention_factor": usual}),
        json!({"mscale": 1.0}),
        json!({"mscale": 1.0, "mscale_all_dim": 0.0}),
    ] {
        with(said).unwrap();
    }
    for (key, unsaid) in [
        ("attention_factor", json!({"attention_factor": 1.0})),
        ("mscale", json!({"mscale": 1.0, "mscale_all_dim": 1.0})),
        ("truncate", json!({"truncate": false})),
    ] {
        let error = with(unsaid).unwrap_err().to_string();
        assert!(error.contains(&format!("`rope_scaling.{key}`: expected ")), "{error}");
    }
    // And what `config.json` cannot say of a file.
    let read = |key: &str, value: f32| {
        let mut m = with(json!({})).unwrap();
        m.set(format!("llama.rope.scaling.{key}"), value);
        llama::config_json(&m, &[], None).map_err(|error| error.to_string())
    };
    assert!(read("attn_factor", 1.0).is_ok() && read("yarn_ext_factor", -1.0).is_ok());
    let error = read("attn_factor", 0.5).unwrap_err();
    assert!(error.contains("`llama.rope.scaling.attn_factor`: expected 1, got 0.5"), "{error}");
    assert!(read("yarn_log_multiplier", 0.1).is_err());
}

#[test]
fn a_byte_level_tokenizer_goes_both_ways() {
    for pre in ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"] {
        assert_eq!(bpe::pre_name(&bpe::pre_tokenizer(pre).unwrap()).unwrap(), pre);
        let special = Special {
            bos: Some(3),
            eos: Some(3),
            eot: Some(4),
            eom: Some(3),
            add_bos: true,
            chat_template: Some("{{ x }}".into()),
            ..Special::default()
        };
        let mut m = Metadata::default();
        m.set("tokenizer.ggml.model", "gpt2");
        m.set("tokenizer.ggml.pre", pre);
        let tokens = ["a", "b", "ab", "<|end|>", "<tool>", "[PAD5]"].map(String::from);
        m.set("tokenizer.ggml.tokens", tokens.to_vec());
        m.set("tokenizer.ggml.token_type", vec![1, 1, 1, 3, 4, 5]);
        m.set("tokenizer.ggml.merges", vec!["a b".to_owned()]);
        special.put(&mut m);
        assert_eq!(Special::of(&m).unwrap(), special);
        assert_eq!(special.ends(), [3, 4]);
        let json = bpe::tokenizer_json(&m).unwrap();
        assert_eq!(json["post_processor"]["single"][0]["SpecialToken"]["id"], "<|end|>");
        assert_eq!(bpe::metadata(&json, 6, &special).unwrap(), m);
        assert_eq!(vocab::tokenizer_config(&m).unwrap()["chat_template"], "{{ x }}");
        let error = bpe::metadata(&json, 4, &special).unwrap_err().to_string();
        assert!(error.contains("an id below 4"), "{error}");
    }
    let error = bpe::pre_tokenizer("tekken").unwrap_err().to_string();
    assert!(error.contains("`tokenizer.ggml.pre`: expected one of default, gpt-2"), "{error}");
    assert!(bpe::pre_name(&json!({"type": "Whitespace"})).is_err());
}

#[test]
fn pieces_of_a_llama_go_both_ways() {
    let kinds = [
        ("<unk>", 2, 0.0),
        ("<s>", 3, 0.0),
        ("<0x00>", 6, 0.0),
        ("ab", 1, -0.0),
        ("abb", 1, -1.0),
        ("a", 1, -2.0),
        ("b", 1, -2.0),
    ];
    let list: Vec<Piece> =
        kinds.iter().map(|&(text, kind, score)| Piece { text: text.into(), score, kind }).collect();
    let special = Special { bos: Some(1), add_bos: true, ..Special::default() };
    let m = pieces::metadata(&list, true, 8, &special).unwrap();
    let mut padded = list.clone();
    padded.push(Piece { text: "[PAD7]".into(), score: -1e4, kind: 5 });
    assert_eq!(pieces::pieces(&m).unwrap(), padded);
    assert!(pieces::metadata(&list, true, 6, &special).is_err());
    // Pieces, then trainer and normaliser; the first bytes spelt out.
    let model = pieces::tokenizer_model(&m).unwrap();
    assert_eq!(model[..16], *b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02");
    let json = json!({
        "added_tokens": [{"id": 0, "content": "<unk>", "special": true}, {"id": 1, "content": "<s>", "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true,
                  "vocab": {"<unk>": 0, "<s>": 1, "<0x00>": 2, "ab": 3, "abb": 4, "a": 5, "b": 6},
                  "merges": [["a", "b"], ["ab", "b"]]},
    });
    assert!(pieces::puts_space(&json));
    pieces::check_normalizer(&json).unwrap();
    pieces::check_normalizer(&json!({"normalizer": null})).unwrap();
    let error = pieces::check_normalizer(&json!({"normalizer": {"type": "NFKC"}})).unwrap_err();
    assert!(error.to_string().contains("`normalizer`: expected a space before"), "{error}");
    assert_eq!(pieces::of_tokenizer_json(&json, 7).unwrap(), (list, true));
    let mut other = json.clone();
    other["model"]["merges"] = json!(["a b"]);
    assert!(!pieces::of_tokenizer_json(&other, 7).unwrap().1);
}

#[test]
fn unused_pieces_at_the_end_are_no_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let size = |change: fn(&mut Metadata)| write_pieces(dir.path(), change).vocab_size();
    assert_eq!(size(|_| {}), PIECES);
    // But one that has a meaning is.
    assert_eq!(size(|m| m.set("tokenizer.ggml.padding_token_id", PIECES as u32 + 1)), PIECES + 2);
}
