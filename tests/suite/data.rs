//! Packed files, the loader and preparation.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use tch::Tensor;
use tinyllama::config::{DataOrder, DataSource, PrepareConfig, chunk_tokens};
use tinyllama::data::packed::{Access, PackedWriter};
use tinyllama::data::prepare::prepare;
use tinyllama::data::{DataLoader, LoaderOptions, ValidationSet};
use tinyllama::tokenizer::Tokenizer;

const T: usize = 7;

/// A packed folder of `n` distinct tokens, from `first` on, in files of 50.
fn packed(dir: &Path, name: &str, first: u32, n: u32) -> PathBuf {
    let path = dir.join(name);
    fs::create_dir_all(&path).unwrap();
    let mut writer = PackedWriter::new(&path, "train", 50, 60_000);
    let tokens: Vec<u32> = (first..first + n).collect();
    tokens.chunks(13).for_each(|document| writer.add(document).unwrap());
    writer.finish().unwrap();
    path
}

fn options(sources: &[(&Path, f64)], rank: usize, world: usize) -> LoaderOptions {
    let source = |(path, weight): &(&Path, f64)| DataSource {
        path: path.to_path_buf(),
        weight: (*weight).into(),
    };
    LoaderOptions {
        sources: sources.iter().map(source).collect(),
        micro_batch_size: 2,
        block_size: T,
        rank,
        world,
        seed: 5,
        vocab_size: 60_000,
        prefetch: 3,
        order: DataOrder::Global,
        access: Access::Mapped,
        borders: None,
    }
}

fn values(t: &Tensor) -> Vec<i64> {
    Vec::try_from(t.view([-1])).unwrap()
}

/// First token of each row of the next batch; checks that rows are consecutive and targets shifted.
fn rows(loader: &mut DataLoader) -> Vec<i64> {
    let batch = loader.next().unwrap();
    assert_eq!(batch.n_targets, batch.target.numel() as i64);
    assert!((&batch.input + 1).equal(&batch.target));
    values(&batch.input.select(1, 0))
}

#[test]
fn an_epoch_reads_every_block_of_every_file_once_then_in_another_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = packed(dir.path(), "a", 0, 323); // 40 blocks of 8, files of 50: blocks cross file borders
    let mut loader = DataLoader::train(options(&[(&path, 1.0)], 0, 1)).unwrap();
    let epoch = |loader: &mut DataLoader| (0..20).flat_map(|_| rows(loader)).collect::<Vec<_>>();
    let (first, second) = (epoch(&mut loader), epoch(&mut loader));
    let sorted = |mut v: Vec<i64>| {
        v.sort_unstable();
        v
    };
    assert_ne!(first, second);
    let want: Vec<i64> = (0..40).map(|i| i * 8).collect();
    assert_eq!(sorted(first), want);
    assert_eq!(sorted(second), want);
}

#[test]
fn every_world_size_trains_on_the_same_sequences_and_ranks_share_none() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (packed(dir.path(), "a", 0, 400), packed(dir.path(), "b", 10_000, 400));
    let sources = [(a.as_path(), 0.7), (b.as_path(), 0.3)];
    let step = |world: usize, batches: usize| {
        let mut all = Vec::new();
        for rank in 0..world {
            let mut loader = DataLoader::train(options(&sources, rank, world)).unwrap();
            all.extend((0..batches).flat_map(|_| rows(&mut loader)));
        }
        all.sort_unstable();
        all
    };
    let one = step(1, 12);
    assert_eq!(one, step(2, 6));
    assert_eq!(one, step(4, 3));
}

#[test]
fn a_restored_cursor_continues_as_if_nothing_had_happened_also_across_epochs() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (packed(dir.path(), "a", 0, 100), packed(dir.path(), "b", 10_000, 60));
    let sources = [(a.as_path(), 2.0), (b.as_path(), 1.0)];
    for stop in [1, 5, 17, 40] {
        let mut straight = DataLoader::train(options(&sources, 0, 1)).unwrap();
        (0..stop).for_each(|_| drop(rows(&mut straight)));
        let json = serde_json::to_string(&straight.state()).unwrap();
        let mut resumed = DataLoader::train(options(&sources, 0, 1)).unwrap();
        resumed.restore(&serde_json::from_str(&json).unwrap()).unwrap();
        for _ in 0..20 {
            assert_eq!(rows(&mut straight), rows(&mut resumed));
        }
        assert_eq!(straight.state(), resumed.state());
    }
    let mut other = DataLoader::train(options(&sources[..1], 0, 1)).unwrap();
    let straight = DataLoader::train(options(&sources, 0, 1)).unwrap();
    assert!(other.restore(&straight.state()).unwrap_err().to_string().contains("data changed"));
}

#[test]
fn the_mixture_keeps_its_published_shares() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (packed(dir.path(), "a", 0, 100), packed(dir.path(), "b", 10_000, 100));
    let sources = [(a.as_path(), 0.693584), (b.as_path(), 0.306416)];
    let mut loader = DataLoader::train(options(&sources, 0, 1)).unwrap();
    let n = 5000;
    (0..n).for_each(|_| drop(loader.next().unwrap()));
    let share = loader.state().drawn[0] as f64 / (2 * n) as f64;
    assert!((share - 0.693584).abs() < 0.015, "{share}");
}

#[test]
fn validation_scores_every_token_once_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = packed(dir.path(), "v", 0, 103);
    let set = ValidationSet::open(&path, T, 4, 60_000).unwrap();
    for _ in 0..2 {
        let batches: Vec<_> = set.batches().map(Result::unwrap).collect();
        let mut targets: Vec<i64> = batches.iter().flat_map(|b| values(&b.target)).collect();
        assert_eq!(batches.iter().map(|b| b.n_targets).sum::<i64>(), 102);
        targets.retain(|&t| t != -100);
        assert_eq!(targets, (1..103).collect::<Vec<_>>());
    }
}

fn open_error(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("x.bin"), bytes).unwrap();
    let error = ValidationSet::open(dir.path(), T, 1, 100).err().unwrap();
    format!("{error:#}")
}

#[test]
fn damaged_packed_files_are_refused_with_expected_and_got() {
    let mut good = b"LITPKDS\x01\0\0\0\0\0\0\0\x08\x04\0\0\0\0\0\0\0".to_vec();
    good.extend([1, 0, 2, 0, 3, 0, 4, 0]);
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        open_error(&bytes)
    };
    assert!(with(0, b'X').contains("begins with `LITPKDS`, got `XITPKDS`"));
    assert!(with(7, 2).contains("version 1, got 2"));
    assert!(with(15, 6).contains("integer dtype (code 1 to 5 or 8), got code 6"));
    let truncated = open_error(&good[..good.len() - 3]);
    assert!(truncated.contains("expected 32 bytes for 4 tokens, got 29"), "{truncated}");
    assert!(open_error(b"LIT").contains("got 3 bytes"));

    let missing = ValidationSet::open(Path::new("/no/such/set"), T, 1, 100).err().unwrap();
    assert!(missing.to_string().contains("no packed `.bin` files at `/no/such/set`"));
}

#[test]
fn an_id_outside_the_vocabulary_and_a_source_too_short_are_errors_with_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = packed(dir.path(), "a", 0, 120);
    let small = LoaderOptions { vocab_size: 60, ..options(&[(&path, 1.0)], 0, 1) };
    let mut loader = DataLoader::train(small).unwrap();
    let error = (0..20).find_map(|_| loader.next().err()).unwrap().to_string();
    assert!(error.contains("outside the model's vocabulary of 60"), "{error}");
    assert!(error.contains("train_000000000"), "{error}");

    let short = packed(dir.path(), "b", 0, 5);
    let error = DataLoader::train(options(&[(&short, 1.0)], 0, 1)).err().unwrap().to_string();
    assert!(error.contains("has 5 tokens, a training sequence needs 8"), "{error}");
}

fn quickstart(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/quickstart").join(path)
}

fn preparation(kind: &str, source: &Path, out: &Path) -> PrepareConfig {
    PrepareConfig {
        validation_fraction: 0.1,
        validation_out: Some(out.join("validation")),
        chunk_tokens: 20_000,
        ..PrepareConfig::new(kind, source.display().to_string(), &out.join("train"))
    }
}

/// Every file of a folder with its bytes; the manifest names the folder, so it is left out.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for part in ["train", "validation"] {
        for entry in fs::read_dir(dir.join(part)).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("{part}/{}", path.file_name().unwrap().to_string_lossy());
            if !name.ends_with("manifest.json") {
                out.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    out
}

#[test]
fn preparation_is_byte_identical_whatever_the_number_of_threads() {
    let tokenizer = Tokenizer::load(&quickstart("tokenizer")).unwrap();
    let run = |threads: usize| {
        let dir = tempfile::tempdir().unwrap();
        let options = preparation("slimpajama", &quickstart("slimpajama"), dir.path());
        let manifest = prepare(&options, &tokenizer, Some(threads)).unwrap();
        assert_eq!(manifest.counts.skipped.get("RedPajamaGithub"), Some(&2));
        assert!(
            manifest.counts.documents > 100 && manifest.counts.validation_documents > 5,
            "{manifest:?}"
        );
        contents(dir.path())
    };
    let one = run(1);
    assert!(one.len() > 8);
    assert_eq!(run(2), one);
    assert_eq!(run(7), one);
}

#[test]
fn whole_documents_come_back_from_the_packed_files() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::load(&quickstart("tokenizer")).unwrap();
    let texts = ["One.", "Two  spaces\n\tand a tab.", "\u{4f60}\u{597d} \u{1f999}"];
    let lines: String =
        texts.iter().map(|t| serde_json::json!({ "text": t }).to_string() + "\n").collect();
    let mut zst =
        zstd::Encoder::new(fs::File::create(dir.path().join("a.jsonl.zst")).unwrap(), 3).unwrap();
    zst.write_all((lines + "{broken\n{\"other\": 1}\n").as_bytes()).unwrap();
    zst.finish().unwrap();

    let source = dir.path().join("*.jsonl.zst");
    let mut options = preparation("jsonl", &source, dir.path());
    (options.validation_fraction, options.validation_out) = (0.0, None);
    let manifest = prepare(&options, &tokenizer, None).unwrap();
    assert_eq!((manifest.counts.documents, manifest.counts.skipped.len()), (3, 2), "{manifest:?}");
    assert_eq!(prepare(&options, &tokenizer, None).unwrap(), manifest, "found prepared already");

    let set = ValidationSet::open(&options.out, 1000, 1, 4096).unwrap();
    let batch = set.batches().next().unwrap().unwrap();
    let mut ids: Vec<u32> = vec![values(&batch.input)[0] as u32];
    ids.extend(values(&batch.target).iter().filter(|&&t| t >= 0).map(|&t| t as u32));
    let eos = tokenizer.eos_id().unwrap();
    let documents: Vec<String> = ids
        .split(|&id| id == eos)
        .filter(|d| !d.is_empty())
        .map(|d| tokenizer.decode(d).unwrap())
        .collect();
    assert_eq!(documents, texts);

    options.chunk_tokens = chunk_tokens();
    let error = prepare(&options, &tokenizer, None).unwrap_err().to_string();
    assert!(error.contains("`chunk_tokens`: was 20000, now 2098176"), "{error}");
}

#[test]
fn sources_that_hold_nothing_usable_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::load(&quickstart("tokenizer")).unwrap();
    let error = |kind: &str, source: &Path| {
        let mut options = preparation(kind, source, dir.path());
        (options.validation_fraction, options.validation_out) = (0.0, None);
        format!("{:#}", prepare(&options, &tokenizer, None).unwrap_err())
    };
    assert!(error("jsonl", Path::new("/no/such")).contains("no jsonl files at `/no/such`"));
    assert!(error("books", dir.path()).contains("`books` is no kind of corpus"));
    let parquet = quickstart("starcoder/python/train-00000-of-00001.parquet");
    fs::write(dir.path().join("bad.jsonl"), "{oops\n").unwrap();
    assert!(error("jsonl", dir.path()).contains("no document in"));
    let mut options = preparation("parquet", &parquet, dir.path());
    options.text_field = Some("txt".into());
    let missing = prepare(&options, &tokenizer, None).unwrap_err();
    assert!(format!("{missing:#}").contains("has no column `txt`"), "{missing:#}");
    fs::write(dir.path().join("no.parquet"), "not parquet").unwrap();
    assert!(error("parquet", &dir.path().join("no.parquet")).contains("as Parquet"));
}
